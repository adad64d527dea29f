"""Anchors: boxes laid out in a grid, deltas from them to other boxes, and who is trained as what.

As torchvision 0.29 has them (models/detection/anchor_utils.py and _utils.py), of fixed shapes:
targets are padded, f[B, T, 4] beside a mask.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.ops.boxes import iou_of_sides, sides_of

Array = jax.Array

LARGEST_CHANGE = math.log(1000 / 16)  # of a width's or height's logarithm
SMALLEST = 1e-6  # side in pixels that deltas are taken from: no box of a file is smaller


def base_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """Anchors around 0, f64[ratios · sizes, 4]: height over width is the ratio, rounded to pixels.

    Examples:
      >>> base_anchors((32,), (0.5, 1.0)).tolist()
      [[-23.0, -11.0, 23.0, 11.0], [-16.0, -16.0, 16.0, 16.0]]
    """
    down = np.sqrt(np.asarray(ratios, np.float32))[:, None]
    side = np.asarray(sizes, np.float32)[None]
    width, height = ((1 / down) * side).ravel() / 2, (down * side).ravel() / 2
    return np.round(np.stack([-width, -height, width, height], axis=1)).astype(np.float64)


def grid_anchors(base: np.ndarray, grid: tuple[int, int], strides: Array) -> Array:
    """The base anchors at each cell of a grid, cell by cell: f[B, h · w · A, 4].

    Args:
      base: f[A, 4].
      grid: cells (h, w).
      strides: f[B, 2], pixels from cell to cell (down, across) of each image.
    """
    rows, columns = np.indices(grid).reshape(2, -1)
    cells = np.stack([columns, rows, columns, rows], axis=1)  # [h · w, 4]
    steps = jnp.tile(strides[:, ::-1], 2)[:, None]  # [B, 1, 4]
    places = jnp.asarray(cells, strides.dtype)[None] * steps  # [B, h · w, 4]
    anchors = places[:, :, None] + jnp.asarray(base, strides.dtype)[None, None]
    return anchors.reshape(strides.shape[0], -1, 4)


def decode(deltas: Array, boxes_xyxy: Array, weights: Sequence[float] = (1, 1, 1, 1)) -> Array:
    """Boxes f[..., 4] xyxy from deltas f[..., 4] (x, y, log width, log height) of other boxes.

    Examples:
      >>> decode(jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 2.0, 4.0])).tolist()
      [2.0, 0.0, 4.0, 4.0]
    """
    sides = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    centers = boxes_xyxy[..., :2] + sides / 2
    scaled = deltas / _weights(weights, deltas)
    center = scaled[..., :2] * sides + centers
    half = jnp.exp(jnp.minimum(scaled[..., 2:], LARGEST_CHANGE)) * sides / 2
    return jnp.concatenate([center - half, center + half], axis=-1)


def encode(
    targets_xyxy: Array, boxes_xyxy: Array, weights: Sequence[float] = (1, 1, 1, 1)
) -> Array:
    """The deltas f[..., 4] that decode to the targets; finite for boxes without area.

    Examples:
      >>> encode(jnp.array([2.0, 0.0, 4.0, 4.0]), jnp.array([0.0, 0.0, 2.0, 4.0])).tolist()
      [1.0, 0.0, 0.0, 0.0]
    """
    sides, target_sides = (
        jnp.maximum(x[..., 2:] - x[..., :2], SMALLEST) for x in (boxes_xyxy, targets_xyxy)
    )
    centers, target_centers = ((x[..., :2] + x[..., 2:]) / 2 for x in (boxes_xyxy, targets_xyxy))
    moves = (target_centers - centers) / sides
    deltas = jnp.concatenate([moves, jnp.log(target_sides / sides)], axis=-1)
    return deltas * _weights(weights, deltas)


def decode_distances(distances: Array, squares_xyxy: Array) -> Array:
    """Boxes f[..., 4] xyxy whose left, top, right and bottom are so far from squares' middles.

    Distances f[..., 4] are in sides of the squares f[..., 4]; negative ones lie beyond the middle.

    Examples:
      >>> square = jnp.array([2.0, 2.0, 4.0, 4.0])
      >>> decode_distances(jnp.array([0.0, 1.0, 2.0, 3.0]), square).tolist()
      [3.0, 1.0, 7.0, 9.0]
    """
    low, high = squares_xyxy[..., :2], squares_xyxy[..., 2:]
    middle, moves = (low + high) / 2, distances * jnp.concatenate([high - low] * 2, axis=-1)
    return jnp.concatenate([middle - moves[..., :2], middle + moves[..., 2:]], axis=-1)


def encode_distances(targets_xyxy: Array, squares_xyxy: Array) -> Array:
    """The distances f[..., 4] that decode to the targets; finite for squares without area.

    Examples:
      >>> box = jnp.array([3.0, 1.0, 7.0, 9.0])
      >>> encode_distances(box, jnp.array([2.0, 2.0, 4.0, 4.0])).tolist()
      [0.0, 1.0, 2.0, 3.0]
    """
    low, high = squares_xyxy[..., :2], squares_xyxy[..., 2:]
    middle, sides = (low + high) / 2, jnp.maximum(high - low, SMALLEST)
    moves = (middle - targets_xyxy[..., :2], targets_xyxy[..., 2:] - middle)
    return jnp.concatenate([x / sides for x in moves], axis=-1)


def _weights(weights: Sequence[float], like: Array) -> Array:
    return jnp.asarray(weights, like.dtype).reshape((1,) * (like.ndim - 1) + (4,))


def assign(
    boxes_xyxy: Array,
    targets_xyxy: Array,
    target_mask: Array,
    *,
    foreground: float,
    background: float,
    low_quality: bool = False,
) -> tuple[Array, Array]:
    """The target that each box overlaps most, and whether it is trained to find it.

    Targets are visited one after the other, the padded ones at the end not at all, so nothing of
    size T · N is kept. No gradient flows through it.

    Args:
      boxes_xyxy: f[B, N, 4].
      targets_xyxy: f[B, T, 4].
      target_mask: bool[B, T].
      foreground: least IoU of a box that is trained to find its target.
      background: IoU below which a box is trained to find none.
      low_quality: a box is trained to find its target, too, if no other box overlaps some target
        more than it does; ties among them count all.

    Returns:
      (i32[B, N] a target, any one where there is none; i32[B, N]: 1 foreground, 0 background,
      -1 neither).
    """
    boxes, targets = (lax.stop_gradient(x) for x in (boxes_xyxy, targets_xyxy))
    sides = sides_of(boxes)
    count = jnp.max(jnp.where(target_mask, jnp.arange(target_mask.shape[1])[None] + 1, 0))

    def visit(number, state):
        best, target, closest = state
        mask = lax.dynamic_index_in_dim(target_mask, number, 1)  # [B, 1]
        one = lax.dynamic_slice_in_dim(targets, number, 1, 1)
        overlap = iou_of_sides(sides, sides_of(one))  # [B, N]
        better = mask & (overlap > best)
        closest |= mask & (overlap == jnp.max(overlap, axis=1, keepdims=True))
        return jnp.where(better, overlap, best), jnp.where(better, number, target), closest

    shape = boxes.shape[:2]
    state = (jnp.full(shape, -1, boxes.dtype), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    best, target, closest = lax.fori_loop(0, count, visit, state)
    found = best >= foreground
    if low_quality:
        found |= closest
    return target, jnp.where(found, 1, jnp.where(best < background, 0, -1))


def sample(keys: Array, label: Array, count: int, share: float) -> tuple[Array, Array]:
    """Which boxes of each image are trained: (foreground bool[B, N], background bool[B, N]).

    At most `count` of an image, at most `share` of them foreground, each equally likely; background
    fills up what foreground leaves.

    Args:
      keys: key[B], one an image, so that a draw does not depend on the batch.
      label: i32[B, N]: 1 foreground, 0 background, others neither.
      count: of an image.
      share: of foreground.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, label.shape[1:]))(keys)
    foreground = _first(label == 1, draws, jnp.full(len(label), int(count * share)), count)
    left = count - foreground.sum(1)
    return foreground, _first(label == 0, draws, left, count)


def _first(candidates: Array, draws: Array, wanted: Array, most: int) -> Array:
    """bool[B, N]: of candidates[B, N] those of the `wanted`[B] largest draws."""
    value, index = lax.top_k(jnp.where(candidates, draws, -1.0), min(most, draws.shape[1]))
    taken = (value >= 0) & (jnp.arange(index.shape[1])[None] < wanted[:, None])
    return jnp.put_along_axis(jnp.zeros_like(candidates), index, taken, axis=1, inplace=False)
