"""MaskedKernel: a kernel of which some weights are zero and stay so.

    to_masked(kernel, share)          the smallest weights out, anywhere in the kernel
    to_n_of_m(kernel, n, m)           all but the n largest of each m inputs of an output: 2:4

How they get into a tree is `quantize.quantize`: it puts leaves in the place of chosen kernels.

Examples:
  >>> to_n_of_m(jnp.array([[1.0], [-4.0], [3.0], [2.0]]), 2, 4).merge()[:, 0].tolist()
  [0.0, -4.0, 3.0, 0.0]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vision_jax.errors import UserError
from vision_jax.trees.leaf import Kernel, Leaf, merge_leaf

Array = jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["base", "mask"], meta_fields=[])
@dataclass(frozen=True)
class MaskedKernel(Leaf):
    """A kernel [..., in, out] with zeros; neither training nor a merge fills them.

    Attributes:
      base: the kernel. What the mask hides has no influence and no gradient.
      mask: bool[..., in, out], False where it is zero.
    """

    trains: ClassVar[Mapping[str, bool]] = {"mask": False}
    like_kernel: ClassVar[tuple[str, ...]] = ("base",)

    base: Kernel
    mask: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this leaf stands in for."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this leaf stands in for."""
        return self.base.dtype

    def merge(self) -> Array:
        """The kernel with its zeros."""
        kernel = merge_leaf(self.base)
        return jnp.where(self.mask, kernel, jnp.zeros((), kernel.dtype))


def to_masked(kernel: Array, share: float) -> MaskedKernel:
    """The kernel without the smallest weights, by magnitude; ties go by position.

    Args:
      kernel: f[..., in, out].
      share: of the weights that are left out, rounded to a whole number of them.
    """
    order = jnp.argsort(jnp.abs(kernel).reshape(-1), stable=True)
    kept = jnp.ones(kernel.size, bool).at[order[: round(share * kernel.size)]].set(False)
    return MaskedKernel(kernel, kept.reshape(kernel.shape))


def to_n_of_m(kernel: Array, n: int = 2, m: int = 4) -> MaskedKernel:
    """The n largest of each m weights beside each other along the inputs of an output.

    2:4 is what sparse matrix units take (Mishra et al. 2021, https://arxiv.org/abs/2104.08378).

    Args:
      kernel: f[..., in, out].
      n: weights that stay.
      m: of so many.

    Raises:
      UserError: inputs that m does not divide.
    """
    inputs = kernel.shape[-2]
    if inputs % m:
        raise UserError(
            f"{n}:{m} along {inputs} inputs: {m} must divide them; leave the kernel out"
        )
    rows = jnp.abs(kernel).reshape(*kernel.shape[:-2], inputs // m, m, kernel.shape[-1])
    ranks = jnp.argsort(jnp.argsort(-rows, axis=-2, stable=True), axis=-2)
    return MaskedKernel(kernel, (ranks < n).reshape(kernel.shape))
