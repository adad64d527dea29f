"""Boxes of the cells of several maps: no anchors, one box a cell.

The A cells are those of the finest map first, row by row. As YOLOX has them, a cell of stride s in
column x and row y says the deltas (a, b, c, d) of the box with center ((x + a)·s, (y + b)·s) and
sides e^c·s, e^d·s.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

EPSILON = 1e-8  # inside the logarithm of a target's sides


def grid(canvas: Sequence[int], strides: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(column and row of each cell, f32[A, 2], its stride f32[A, 1]) of a canvas (H, W) in pixels.

    Examples:
      >>> cells, stride = grid((32, 64), (16, 32))
      >>> cells[:5].tolist(), stride[-3:].tolist()
      ([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]], [[16.0], [32.0], [32.0]])
    """
    cells, sizes = [], []
    for stride in strides:
        rows, columns = np.indices((canvas[0] // stride, canvas[1] // stride)).reshape(2, -1)
        cells.append(np.stack([columns, rows], axis=-1))
        sizes.append(np.full((len(rows), 1), stride))
    return np.concatenate(cells).astype(np.float32), np.concatenate(sizes).astype(np.float32)


def decode(deltas: Array, canvas: Sequence[int], strides: Sequence[int]) -> Array:
    """Deltas f[B, A, 4] -> boxes_cxcywh_px f[B, A, 4] on the canvas.

    Examples:
      >>> decode(jnp.array([[[0.5, 0.5, 0.0, 0.0]]]), (8, 8), (8,)).tolist()
      [[[4.0, 4.0, 8.0, 8.0]]]
    """
    cells, stride = (x[None].astype(deltas.dtype) for x in grid(canvas, strides))
    centers = (deltas[..., :2] + cells) * stride
    return jnp.concatenate([centers, jnp.exp(deltas[..., 2:]) * stride], axis=-1)


def decode_sides(side_logits: Array, canvas: Sequence[int], strides: Sequence[int]) -> Array:
    """Distributions of distances f[B, A, 4, R] -> boxes_cxcywh_px f[B, A, 4] on the canvas.

    NanoDet's: from the middle of its cell a box reaches as many strides to the left, top, right and
    bottom as the softmax of each side means, over 0 to R - 1.

    Examples:
      >>> decode_sides(jnp.zeros((1, 1, 4, 3)), (8, 8), (8,)).tolist()
      [[[4.0, 4.0, 16.0, 16.0]]]
    """
    cells, stride = (x[None].astype(side_logits.dtype) for x in grid(canvas, strides))
    distances = jnp.arange(side_logits.shape[-1], dtype=side_logits.dtype)[None, None, None]
    sides = (jax.nn.softmax(side_logits, axis=-1) * distances).sum(axis=-1)  # [B, A, 4]
    before, after = sides[..., :2], sides[..., 2:]
    centers = cells + 0.5 + (after - before) / 2
    return jnp.concatenate([centers * stride, (before + after) * stride], axis=-1)


def encode(boxes_cxcywh_px: Array, canvas: Sequence[int], strides: Sequence[int]) -> Array:
    """The deltas f[B, A, 4] with which each cell says a box f[B, A, 4]; sides may be 0.

    Examples:
      >>> encode(jnp.array([[[4.0, 4.0, 8.0, 8.0]]]), (8, 8), (8,)).tolist()
      [[[0.5, 0.5, 0.0, 0.0]]]
    """
    cells, stride = (x[None].astype(boxes_cxcywh_px.dtype) for x in grid(canvas, strides))
    centers = boxes_cxcywh_px[..., :2] / stride - cells
    sides = jnp.log(boxes_cxcywh_px[..., 2:] / stride + EPSILON)
    return jnp.concatenate([centers, sides], axis=-1)
