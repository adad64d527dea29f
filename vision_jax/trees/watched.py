"""Watched: a kernel that says what it multiplies, and what comes of it.

    watch(params, chosen, note)       the tree whose chosen kernels call note(path, ...)

It is made and used inside of one trace, whose values `note` gets; layers in loops have another.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax

from vision_jax.trees.leaf import Leaf, Params, map_leaves
from vision_jax.trees.products import Product

Array = jax.Array
# (path, product, x f[..., in], kernel f[..., in, out], y f[..., out] = product(x, kernel))
Note = Callable[[str, Product, Array, Array, Array], None]


@partial(jax.tree_util.register_dataclass, data_fields=["base"], meta_fields=["note"])
@dataclass(frozen=True)
class Watched(Leaf):
    """A plain kernel, and who is told of its products.

    Attributes:
      base: f[..., in, out].
      note: (product, x, kernel, y) -> None, called at each product as it is traced.
    """

    like_kernel: ClassVar[tuple[str, ...]] = ("base",)

    base: Array
    note: Callable[[Product, Array, Array, Array], None]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel."""
        return self.base.dtype

    def merge(self) -> Array:
        """The kernel."""
        return self.base

    def multiply(self, product: Product, x: Array, dropout_key: Array | None) -> Array:
        """By the kernel."""
        del dropout_key
        y = product(x, self.base)
        self.note(product, x, self.base, y)
        return y


def watch(params: Params, chosen: Collection[str], note: Note) -> Params:
    """The tree whose kernels of these paths say what they multiply."""
    return map_leaves(
        lambda path, leaf: Watched(leaf, partial(note, path)) if path in chosen else leaf, params
    )
