"""Winograd: kernels of 3 x 3 convolutions for a CPU, with 16 products where 36 would be.

    transform(params, apply, ...)     the tree with the kernels that are faster so

F(2 x 2, 3 x 3) of Lavin & Gray 2015 (https://arxiv.org/abs/1509.09308): 2 x 2 outputs see 4 x 4
pixels. Sums of pixels, multiplied with sums of a kernel's taps, add up to the outputs; the sums of
taps are made once, so this is for parameters that train no more. In float32 the outputs are off by
about twice of what a plain convolution's are.

Examples:
  >>> kernel = np.arange(9, dtype=np.float32).reshape(3, 3, 1, 1)
  >>> leaf = to_winograd(kernel)
  >>> len(leaf.sums), leaf.shape, bool(np.allclose(leaf.merge(), kernel))
  (16, (3, 3, 1, 1), True)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.trees.leaf import Kernel, Leaf, Params, leaves, map_leaves
from vision_jax.trees.products import HALF, Convolution, Product, dense
from vision_jax.trees.watched import watch

Array = jax.Array

# The convolution that a transformed kernel is for; other ones multiply by `merge`.
KEEPS_SIZE = Convolution(strides=(1, 1), padding=((1, 1), (1, 1)), groups=1, dilation=1)
# Narrower ones gain nothing; below WIDE inputs only those do whose images stay in a cache.
NARROW, WIDE = 64, 128
CACHED = 2**20  # bytes

# Taps to sums of taps, along an axis.
TAPS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


@partial(jax.tree_util.register_dataclass, data_fields=["sums"], meta_fields=[])
@dataclass(frozen=True)
class Winograd(Leaf):
    """A kernel [3, 3, in, out] as sums of its taps.

    Attributes:
      sums: 16 of f[in, out], row by row of 4 x 4. As one array each of them would be copied.
    """

    like_kernel: ClassVar[tuple[str, ...]] = ("sums",)

    sums: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this leaf stands in for."""
        return (3, 3, *self.sums[0].shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this leaf stands in for."""
        return self.sums[0].dtype

    def merge(self) -> Array:
        """The kernel, but for rounding."""
        back = np.linalg.pinv(TAPS).astype(self.dtype)
        sums = jnp.stack(self.sums).reshape(4, 4, *self.shape[2:])
        return jnp.einsum("ai,bj,ijco->abco", back, back, sums, precision="highest")

    def multiply(self, product: Product, x: Array, dropout_key: Array | None) -> Array:
        """By tiles of 2 x 2 outputs, if it is the convolution that this is for."""
        if product != KEEPS_SIZE:
            return super().multiply(product, x, dropout_key)
        return _by_tiles(x, self.sums)


def to_winograd(kernel: Array | np.ndarray) -> Winograd:
    """The Winograd of a kernel f[3, 3, in, out]."""
    wide = np.asarray(kernel, np.float64)
    sums = np.einsum("ia,jb,abco->ijco", TAPS, TAPS, wide, optimize=True)
    return Winograd(tuple(jnp.asarray(one, kernel.dtype) for row in sums for one in row))


def transform(params: Params, apply: Callable[..., Any], *arguments: Any) -> Params:
    """The tree with the kernels that are faster as sums, by what they multiply.

    Args:
      params: parameters that train no more.
      apply: calls the model, (params, *arguments) -> anything. It is traced and not run.
      arguments: of `apply`, arrays or their shapes.
    """
    candidates = {path for path, leaf in leaves(params).items() if _may_gain(leaf)}
    gains: dict[str, bool] = {}

    def note(path: str, product: Product, x: Array, kernel: Array, y: Array) -> None:
        del y
        cached = x.size * x.dtype.itemsize <= CACHED
        gain = product == KEEPS_SIZE and x.dtype not in HALF
        gain = gain and (kernel.shape[-2] >= WIDE or cached)
        gains[path] = gain and gains.get(path, True)

    jax.eval_shape(
        lambda params, *rest: apply(watch(params, candidates, note), *rest), params, *arguments
    )
    return map_leaves(lambda path, leaf: to_winograd(leaf) if gains.get(path) else leaf, params)


def _may_gain(leaf: Kernel) -> bool:
    """Whether a leaf is a plain kernel of 3 x 3, wide enough, with room for the sums' digits."""
    plain = not isinstance(leaf, Leaf) and leaf.ndim == 4 and leaf.dtype not in HALF
    return plain and leaf.shape[:2] == (3, 3) and min(leaf.shape[2:]) >= NARROW


def _by_tiles(x: Array, sums: Sequence[Array]) -> Array:
    """The convolution of x[B, H, W, in] by the kernel whose 16 sums f[in, out] are."""
    batch, height, width, channels = x.shape
    down, across = -(-height // 2), -(-width // 2)  # tiles
    around = ((0, 0), (1, 1 + 2 * down - height), (1, 1 + 2 * across - width), (0, 0))
    x = jnp.pad(x, around)
    seen = [
        [
            x[:, row : row + 2 * down - 1 : 2, column : column + 2 * across - 1 : 2]
            for column in range(4)
        ]
        for row in range(4)
    ]  # of each tile, 4 x 4 of f[B, down, across, in]
    pixels = [cell.reshape(-1, channels) for row in _along_both(_sums_seen, seen) for cell in row]
    products = [dense(cell)(cell, one) for cell, one in zip(pixels, sums, strict=True)]
    products = [one.reshape(batch, down, across, -1) for one in products]
    grid = [products[first : first + 4] for first in range(0, 16, 4)]
    rows = [jnp.stack(row, 3) for row in _along_both(_sums_shown, grid)]
    y = jnp.stack(rows, 2)  # [B, down, 2, across, 2, out]
    return y.reshape(batch, 2 * down, 2 * across, -1)[:, :height, :width]


def _along_both(sums_of: Callable[..., Sequence[Array]], grid: Sequence[Sequence[Array]]) -> Any:
    """A grid of arrays with sums of them, along its columns and then its rows."""
    columns = [sums_of(*column) for column in zip(*grid, strict=True)]
    return [sums_of(*row) for row in zip(*columns, strict=True)]


def _sums_seen(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    return a - c, b + c, c - b, b - d


def _sums_shown(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    return a + b + c, b - c - d
