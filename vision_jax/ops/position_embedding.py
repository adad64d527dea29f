"""Learned position embeddings on another grid of patches."""

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
