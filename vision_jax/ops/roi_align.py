"""RoIAlign (He et al. 2017, https://arxiv.org/abs/1703.06870): maps read on a grid inside of boxes.

The form of torchvision 0.29 with `aligned=False` and two samples a bin and axis: corners are not
moved by half a cell, and a box counts as one cell wide and high at least.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax import platform

Array = jax.Array

SAMPLES = 2  # a bin and axis
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4  # a box of this side reads the map of stride 2^4


def roi_align(
    maps: Sequence[Array],
    strides: Sequence[int],
    boxes_xyxy_px: Array,
    size: int = 7,
    extents: Array | None = None,
) -> Array:
    """Averages of bilinear samples in size x size bins of boxes, each of one map of a pyramid.

    All maps lie in one array, so that each of the reads is one gather whatever the boxes' levels.
    No gradient flows to the boxes.

    Args:
      maps: f[B, h, w, C] from fine to coarse.
      strides: of the maps, in pixels.
      boxes_xyxy_px: f[B, R, 4].
      size: bins along a side.
      extents: i32[B, 2], (height, width) in pixels of the part of the canvas that counts, multiples
        of the strides; samples are clamped to it. None is all of the maps.

    Returns:
      f[B, R, size, size, C].
    """
    boxes = lax.stop_gradient(boxes_xyxy_px)
    batch, channels = maps[0].shape[0], maps[0].shape[-1]
    flat = jnp.concatenate([x.reshape(batch, -1, channels) for x in maps], axis=1)
    widths = np.array([x.shape[2] for x in maps])
    first = np.cumsum([0] + [x.shape[1] * x.shape[2] for x in maps[:-1]])
    level = levels_of(boxes, strides)  # [B, R]
    scale = jnp.asarray(1 / np.array(strides), boxes.dtype)[level]
    if extents is None:
        extents = jnp.asarray([[s * strides[0] for s in maps[0].shape[1:3]]] * batch)
    cells = extents[:, None] // jnp.asarray(strides)[level][..., None]  # [B, R, 2]

    def along(axis):
        """Cells i32[B, R, size, 4] and weights of the reads of each bin along an axis."""
        low, high = (boxes[..., i] * scale for i in (1 - axis, 3 - axis))
        step = jnp.maximum(high - low, 1) / size
        bins, samples = np.arange(size)[:, None], (np.arange(SAMPLES)[None] + 0.5) / SAMPLES
        at = (
            low[..., None, None]
            + jnp.asarray(bins + samples, step.dtype)[None, None] * (step[..., None, None])
        )  # [B, R, size, SAMPLES]
        limit = cells[..., axis][..., None, None]
        inside = (at >= -1) & (at <= limit.astype(at.dtype))
        at = jnp.clip(at, 0, (limit - 1).astype(at.dtype))
        cell = jnp.floor(at)
        share = at - cell
        cell = cell.astype(jnp.int32)
        weights = jnp.stack([1 - share, share], axis=-1)
        weights = jnp.where(inside[..., None], weights / SAMPLES, 0)
        reads = jnp.stack([cell, jnp.minimum(cell + 1, limit - 1)], axis=-1)
        flattened = (*at.shape[:-1], 2 * SAMPLES)
        return reads.reshape(flattened), weights.reshape(flattened).astype(flat.dtype)

    rows, down = along(0)
    columns, across = along(1)
    start, width = (jnp.asarray(x)[level][..., None, None] for x in (first, widths))

    def pairs(vertical, horizontal):  # [B, R, size, 4] twice -> [4, 4, B, R, size, size]
        vertical, horizontal = (jnp.moveaxis(x, -1, 0) for x in (vertical, horizontal))
        return vertical[:, None, ..., None], horizontal[None, ..., None, :]

    down_rows, along_columns = pairs(rows, columns)
    cells = start[None, None] + down_rows * width[None, None] + along_columns
    shares = jnp.multiply(*pairs(down, across))
    reads = [x.reshape((2 * SAMPLES) ** 2, batch, -1) for x in (cells, shares)]
    return _weighted_reads(flat, *reads).reshape(*level.shape, size, size, channels)


@jax.custom_vjp
def _weighted_reads(flat: Array, cells: Array, shares: Array) -> Array:
    """f[B, M, C] at cells i32[K, B, N], weighed by shares f[K, B, N] and summed over K.

    One of the K after the other, there and back: together they would need K times the memory of
    the result, and unrolled they are compiled for minutes.
    """

    def read(total, where):
        cell, share = where
        value = jnp.take_along_axis(flat, cell[..., None], axis=1, mode="clip")
        return total + share[..., None] * value, None

    total = jnp.zeros((*cells.shape[1:], flat.shape[-1]), flat.dtype)
    if platform.current() == platform.NO_LOOPS:
        for where in zip(cells, shares, strict=True):
            total, _ = read(total, where)
        return total
    return lax.scan(read, total, (cells, shares))[0]


def _reads_forward(flat, cells, shares):
    return _weighted_reads(flat, cells, shares), (flat, cells, shares)


def _reads_backward(kept, gradient):
    flat, cells, shares = kept
    image = jnp.arange(len(flat))[:, None]

    def add(total, where):
        cell, share = where
        return total.at[image, cell].add(share[..., None] * gradient, mode="clip"), None

    return lax.scan(add, jnp.zeros_like(flat), (cells, shares))[0], None, None


_weighted_reads.defvjp(_reads_forward, _reads_backward)


def levels_of(boxes_xyxy_px: Array, strides: Sequence[int]) -> Array:
    """The map that each box reads, i32[...]: coarser by one where its side is twice as long.

    Lin et al. 2016, https://arxiv.org/abs/1612.03144, equation 1, with torchvision's epsilon.

    Examples:
      >>> boxes = jnp.array([[0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 60.0, 60.0]])
      >>> levels_of(boxes, (4, 8, 16, 32)).tolist()
      [2, 0]
    """
    first, last = (int(np.log2(strides[i])) for i in (0, -1))
    sides = boxes_xyxy_px[..., 2:] - boxes_xyxy_px[..., :2]
    side = jnp.sqrt(sides[..., 0] * sides[..., 1])
    # A box without area reads the finest map.
    level = CANONICAL_LEVEL + jnp.log2(jnp.maximum(side, 1e-6) / CANONICAL_SIDE)
    return (jnp.clip(jnp.floor(level + 1e-6), first, last) - first).astype(jnp.int32)
