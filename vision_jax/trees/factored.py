"""Factored: a kernel as the product of two smaller ones, x·U·V in the place of x·W.

    to_factored(kernel, rank)          the nearest such kernel; on given outputs, with their basis
    factorize(params, ranks)           the tree with these kernels as their factors
    merge(params)                      plain kernels of all other leaves; factors stay two

A LowRank (trees/low_rank.py) is another thing: an update beside a whole kernel, which multiplies as
one. Here nothing is left of the kernel but the factors, and a layer makes two narrow products.

What is nearest is the truncated SVD (Eckart & Young 1936): the error is the root of the sum of the
squares of the singular values that are left out. What is nearest in a layer's *outputs* x·W takes
their own principal components: with B the first eigenvectors of (xW)ᵀxW, as columns, no product of
this rank is closer to x·W than x·(W·B)·Bᵀ. It is the SVD of the kernel whitened by its inputs
(SVD-LLM, Wang et al. 2024, https://arxiv.org/abs/2403.07378; DRONE, Chen et al. 2021), without the
inverse of their covariance.

Examples:
  >>> kernel = jnp.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])  # of rank 1
  >>> leaf = to_factored(kernel, 1)
  >>> leaf.u.shape, leaf.v.shape, bool(jnp.allclose(leaf.merge(), kernel, atol=1e-5))
  ((2, 1), (1, 3), True)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.trees import products
from vision_jax.trees.leaf import Kernel, Leaf, Params, leaves, map_leaves, merge_leaf, multiply
from vision_jax.trees.low_rank import LowRank, output_norm, part_scales
from vision_jax.trees.products import Product

Array = jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["u", "v"], meta_fields=[])
@dataclass(frozen=True)
class Factored(Leaf):
    """U·V; of a convolution a narrow one and a 1 x 1.

    Attributes:
      u: [in, r], or [h, w, in, r] of a convolution.
      v: [r, out].
    Both train by the kernel's rules, and may be structured leaves: quantized, say.
    """

    like_kernel: ClassVar[tuple[str, ...]] = ("u", "v")

    u: Kernel
    v: Kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this leaf stands in for."""
        return (*self.u.shape[:-1], self.v.shape[-1])

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this leaf stands in for."""
        return self.u.dtype

    @property
    def rank(self) -> int:
        """r, what is between the two."""
        return self.u.shape[-1]

    @property
    def supports_groups(self) -> bool:
        """A group has inputs of its own, and one U is for all of them."""
        return False

    def merge(self) -> Array:
        """U·V."""
        return _product(merge_leaf(self.u), merge_leaf(self.v))

    def multiply(self, product: Product, x: Array, dropout_key: Array | None) -> Array:
        """Two products; the kernel itself never comes to be."""
        del dropout_key
        return multiply(products.dot, multiply(product, x, self.u, None), self.v, None)


def to_factored(
    kernel: Array | np.ndarray, rank: int, basis: Array | np.ndarray | None = None
) -> Factored:
    """The Factored of a kernel [..., in, out]; a column of U is as long as its row of V.

    Args:
      kernel: f[in, out] or f[h, w, in, out], of numpy or JAX.
      rank: r, at most the smaller side of the matrix [h · w · in, out].
      basis: f[n, out], orthonormal rows, the most important first, of which V spans `rank`: the
        principal components of the outputs, or None for the kernel's own right singular vectors.
    """
    rows: Any = kernel.reshape(-1, kernel.shape[-1])
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    if basis is None:
        basis = xp.linalg.svd(rows, full_matrices=False)[2]
    v = basis[:rank].astype(kernel.dtype)
    rank = len(v)
    u = _product(rows, v.T)
    length = xp.sqrt(xp.sqrt(xp.square(u).sum(0, keepdims=True)))  # V's rows are of length 1
    length = xp.where(length > 0, length, 1)
    return Factored((u / length).reshape(*kernel.shape[:-1], rank), v * length.T)


def _product(a: Any, b: Any) -> Any:
    """a·b of numpy or JAX: factors are made and multiplied out once, in all digits of their dtype.

    What an accelerator multiplies with by itself has a third of float32's, or half.
    """
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a @ b
    return jnp.matmul(a, b, precision="highest")


def factorize(params: Params, ranks: Mapping[str, int]) -> Params:
    """The tree with the kernels of these paths as factors of these ranks.

    A kernel that is a product of this rank already comes back within rounding.
    """
    return map_leaves(
        lambda path, leaf: to_factored(leaf, ranks[path]) if path in ranks else leaf, params
    )


def ranks_of(params: Params) -> dict[str, int]:
    """The rank of each kernel that is factored, by path."""
    return {path: leaf.rank for path, leaf in leaves(params).items() if isinstance(leaf, Factored)}


def factor_paths(path: str) -> tuple[str, str]:
    """The paths of U and V of the kernel that is factored at a path.

    Examples:
      >>> factor_paths("fc/kernel")
      ('fc/kernel/u', 'fc/kernel/v')
    """
    return f"{path}/u", f"{path}/v"


def is_smaller(shape: tuple[int, ...], rank: int) -> bool:
    """Whether two factors of this rank have fewer numbers than a kernel [..., in, out].

    Examples:
      >>> is_smaller((64, 64), 31), is_smaller((64, 64), 32)
      (True, False)
    """
    inputs, outputs = math.prod(shape[:-1]), shape[-1]
    return rank * (inputs + outputs) < inputs * outputs


def merge(params: Params) -> Params:
    """The tree with the plain kernel of each structured leaf, but Factored ones of plain factors.

    An adapter on a factored kernel adds its rank to the factors', as long as they stay smaller.
    """

    def plain(_: str, leaf: Any) -> Any:
        if isinstance(leaf, Factored):
            return Factored(merge_leaf(leaf.u), merge_leaf(leaf.v))
        if isinstance(leaf, LowRank) and isinstance(leaf.base, Factored):
            return _joined(leaf, leaf.base)
        return merge_leaf(leaf)

    return map_leaves(plain, params)


def _joined(leaf: LowRank, base: Factored) -> Kernel:
    """[U, s·A]·[V; B] of an adapter on U·V, rescaled by DoRA's magnitudes."""
    scales = part_scales(leaf)
    a, b = scales[0] * leaf.a, leaf.b
    if leaf.parts is not None:
        total, chosen = leaf.parts
        width = b.shape[-1]
        a = jnp.concatenate([scale * one for scale, one in zip(scales, leaf.a, strict=True)], -1)
        around = [((0, 0), (part * width, (total - 1 - part) * width)) for part in chosen]
        b = jnp.concatenate([jnp.pad(one, at) for one, at in zip(leaf.b, around, strict=True)])
    if not is_smaller(leaf.shape, base.rank + a.shape[-1]):
        return leaf.merge()
    u = jnp.concatenate([merge_leaf(base.u), a.astype(base.dtype)], -1)
    v = jnp.concatenate([merge_leaf(base.v), b.astype(base.dtype)])
    if leaf.magnitude is not None:
        v = v * (leaf.magnitude / output_norm(_product(u, v))).astype(v.dtype)[None]
    return Factored(u, v)
