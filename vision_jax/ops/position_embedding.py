"""Position embeddings: learned ones on another grid of patches, and sines of the place."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CUBIC = -0.5  # Keys' coefficient with antialiasing, in torch and in Pillow


def resample_positions(
    positions: np.ndarray, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int
) -> np.ndarray:
    """Resamples position embeddings bicubically with antialiasing, as timm does.

    timm 1.0 layers/pos_embed.py `resample_abs_pos_embed`, which is torch's `F.interpolate(mode=
    "bicubic", antialias=True, align_corners=False)`. The embeddings of prefix tokens stay.

    Args:
      positions: f[1, P + h·w, D].
      old_grid: (h, w).
      new_grid: (H, W).
      num_prefix: P, how many prefix tokens have an embedding of their own.

    Returns:
      f[1, P + H·W, D] in the dtype of `positions`; the very array if the grid is the same.

    Examples:
      >>> grid = np.arange(4.0).reshape(1, 4, 1)
      >>> resample_positions(grid, (2, 2), (1, 1), 0).item()
      1.5
    """
    if old_grid == new_grid:
        return positions
    prefix, grid = positions[:, :num_prefix], positions[:, num_prefix:]
    grid = grid.reshape(*old_grid, -1).astype(np.float64)  # [h, w, D]
    rows, columns = (resize_weights(old, new) for old, new in zip(old_grid, new_grid, strict=True))
    grid = np.einsum("Hh,hwd,Ww->HWd", rows, grid, columns, optimize=True)  # [H, W, D]
    grid = grid.reshape(1, new_grid[0] * new_grid[1], -1).astype(positions.dtype)
    return np.concatenate([prefix, grid], axis=1)


def interpolate_positions(
    positions: jax.Array, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int
) -> jax.Array:
    """`resample_positions` of f[1, P + h·w, D] inside a model, with its gradient.

    Examples:
      >>> grid = jnp.arange(4.0).reshape(1, 4, 1)
      >>> interpolate_positions(grid, (2, 2), (1, 1), 0).item()
      1.5
    """
    if old_grid == new_grid:
        return positions
    prefix, grid = positions[:, :num_prefix], positions[:, num_prefix:]
    grid = grid.reshape(*old_grid, -1)  # [h, w, D]
    rows, columns = (
        jnp.asarray(resize_weights(old, new), grid.dtype)
        for old, new in zip(old_grid, new_grid, strict=True)
    )
    grid = jnp.einsum("Hh,hwd,Ww->HWd", rows, grid, columns, precision="highest")
    return jnp.concatenate([prefix, grid.reshape(1, -1, grid.shape[-1])], axis=1)


def resize_weights(old: int, new: int) -> np.ndarray:
    """Matrix f64[new, old] that resizes a line by an antialiased cubic; its rows sum to one."""
    scale = old / new
    stretch = max(scale, 1.0)  # shrinking widens the kernel
    centers = (np.arange(new) + 0.5) * scale  # [new]
    distances = np.abs(np.arange(old)[None] + 0.5 - centers[:, None]) / stretch  # [new, old]
    near = ((CUBIC + 2) * distances - (CUBIC + 3)) * distances**2 + 1
    far = ((distances - 5) * distances + 8) * distances * CUBIC - 4 * CUBIC
    weights = np.where(distances < 1, near, np.where(distances < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def resample_relative_positions(
    table: np.ndarray,
    old_window: tuple[int, int],
    new_window: tuple[int, int],
    num_extra: int = 0,
) -> np.ndarray:
    """Resamples a table of relative position biases for another window, as timm does.

    timm 1.0 layers/pos_embed_rel.py `resize_rel_pos_bias_table`, after BEiT's fine-tuning code: the
    old offsets are placed at distances that grow geometrically up to the largest new offset, so
    that near offsets keep their meaning, and the biases between them are interpolated linearly.

    Args:
      table: f[(2·h - 1)·(2·w - 1) + num_extra, K], by rows of vertical offsets.
      old_window: (h, w) in tokens.
      new_window: (H, W).
      num_extra: biases at the end that belong to no offset (to and from a class token); they stay.

    Returns:
      f[(2·H - 1)·(2·W - 1) + num_extra, K] in the dtype of `table`; the very array if the window is
      the same.

    Examples:
      >>> resample_relative_positions(np.arange(3.0).reshape(3, 1), (1, 2), (1, 3)).ravel()
      array([0., 0., 1., 2., 2.])
    """
    if old_window == new_window:
        return table
    offsets, extra = np.split(table, [len(table) - num_extra])
    old = tuple(2 * side - 1 for side in old_window)
    rows, columns = (_offset_weights(*sides) for sides in zip(old_window, new_window, strict=True))
    grid = offsets.reshape(*old, -1).astype(np.float64)  # [2h - 1, 2w - 1, K]
    grid = np.einsum("Hh,hwk,Ww->HWk", rows, grid, columns, optimize=True)
    grid = grid.reshape(rows.shape[0] * columns.shape[0], -1).astype(table.dtype)
    return np.concatenate([grid, extra])


def _offset_weights(old: int, new: int) -> np.ndarray:
    """Matrix f64[2·new - 1, 2·old - 1] that interpolates along one side of the window."""
    low, high = 1.01, 1.5  # the ratio of the progression, by bisection
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reached = (1 - ratio ** (old - 1)) / (1 - ratio)
        low, high = (low, ratio) if reached > new - 1 else (ratio, high)
    distances = np.cumsum([1.0, *(ratio**step for step in range(1, old))])[: old - 1]
    places = np.concatenate([-distances[::-1], [0.0], distances])  # of the old offsets
    wanted = np.arange(1.0 - new, new)
    return np.stack([np.interp(wanted, places, unit) for unit in np.eye(2 * old - 1)], axis=1)


def sine_positions(mask: jax.Array, width: int, dtype: Any = jnp.float32) -> jax.Array:
    """Sines and cosines of the row and of the column, as fractions of the image's valid part.

    DETR (https://arxiv.org/abs/2005.12872), models/position_encoding.py of the original code: rows
    and columns count from 1 over the valid cells, the last is 2π, and the frequencies fall
    geometrically to 1/10000.

    Args:
      mask: bool[B, h, w], True where the image is.
      width: D, a multiple of 4: half of the channels are the row's, half the column's, and sine and
        cosine of a frequency stand side by side.
      dtype: to compute in.

    Returns:
      f[B, h, w, D].

    Examples:
      >>> angles = sine_positions(jnp.ones((1, 2, 1), bool), 4)[0, :, 0]
      >>> [[round(float(x), 3) + 0.0 for x in row] for row in angles]
      [[0.0, -1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]
    """
    half = width // 2
    frequencies = 10000.0 ** (-2 * (np.arange(half) // 2) / half)  # [D/2]
    parts = []
    for axis in (1, 2):
        count = jnp.cumsum(mask.astype(dtype), axis)  # [B, h, w]
        last = jax.lax.slice_in_dim(count, mask.shape[axis] - 1, None, axis=axis)
        angle = count / (last + 1e-6) * (2 * math.pi)
        angle = angle[..., None] * jnp.asarray(frequencies, dtype).reshape(1, 1, 1, -1)
        both = jnp.stack([jnp.sin(angle[..., ::2]), jnp.cos(angle[..., 1::2])], axis=-1)
        parts.append(both.reshape(*mask.shape, half))  # [B, h, w, D/2]
    return jnp.concatenate(parts, axis=-1)


def grid_positions(grid: tuple[int, int], width: int, num_prefix: int) -> np.ndarray:
    """Sines and cosines of each patch's column and row, which don't train: MAE's positions.

    MAE (https://arxiv.org/abs/2111.06377), util/pos_embed.py of the original code: places count
    from 0, and the frequencies fall geometrically from 1 to 1/10000.

    Args:
      grid: (rows, columns) of patches.
      width: D, a multiple of 4: half of the channels are the column's, half the row's, and of each
        half the sines stand before the cosines.
      num_prefix: tokens before the patches, which get zeros.

    Returns:
      f32[1, num_prefix + rows·columns, D].

    Raises:
      ValueError: a width that is no multiple of 4.

    Examples:
      >>> (100 * grid_positions((1, 2), 4, 1)).round().astype(int).tolist()
      [[[0, 0, 0, 0], [0, 100, 0, 100], [84, 54, 0, 100]]]
    """
    if width % 4:
        raise ValueError(f"sines of two places need a width that is a multiple of 4, not {width}")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))  # [D/4]
    rows, columns = (axis.ravel() for axis in np.indices(grid))  # [N] each
    angles = [place[:, None] * frequencies for place in (columns, rows)]  # [N, D/4] each
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    patches = np.concatenate(parts, axis=1)  # [N, D]
    whole = np.concatenate([np.zeros((num_prefix, width)), patches])
    return whole.astype(np.float32)[None]


def sine_boxes(boxes: jax.Array, width: int) -> jax.Array:
    """Sines and cosines of the numbers of boxes.

    LW-DETR's (https://arxiv.org/abs/2406.03459): like DETR's sine positions, of y, x, w and h in
    this order, with the frequencies rounded to float32 as torch has them.

    Args:
      boxes: f[B, Q, 4] as (cx, cy, w, h), relative to the image.
      width: channels of each number, even; sine and cosine of a frequency stand side by side.

    Returns:
      f[B, Q, 4 · width] in the dtype of `boxes`.

    Examples:
      >>> sine_boxes(jnp.array([[[0.0, 0.25, 0.5, 1.0]]]), 2).round(3).tolist()
      [[[1.0, -0.0, 0.0, 1.0, -0.0, -1.0, 0.0, 1.0]]]
    """
    exponents = (2 * (np.arange(width) // 2) / width).astype(np.float32)
    periods = (10000.0 ** exponents.astype(np.float64)).astype(np.float32)
    angles = boxes[..., jnp.array([1, 0, 2, 3]), None] * (2 * math.pi)  # [B, Q, 4, 1]
    angles = angles / jnp.asarray(periods, boxes.dtype).reshape(1, 1, 1, -1)
    both = jnp.stack([jnp.sin(angles[..., ::2]), jnp.cos(angles[..., 1::2])], axis=-1)
    return both.reshape(*boxes.shape[:2], 4 * width)
