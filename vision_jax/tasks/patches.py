"""What patches have in common: the principal components of their tokens, as colors."""

from pathlib import Path

import numpy as np

from vision_jax.figures import draw_rows

ROWS = ("image", "patches by their three main components")
CLIPPED = 2  # percent of the values at each end of a color


def color_patches(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """f[n, h, w, 3] in [0, 1]: three principal components of the tokens f[n, h·w, D] of all images.

    The same color in two images says the same. A component's sign is that of its largest weight.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    centered = flat - flat.mean(0)
    _, _, axes = np.linalg.svd(centered, full_matrices=False)
    axes = axes[:3]
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    values = centered @ axes.T  # [n·N, 3]
    values = np.pad(values, ((0, 0), (0, 3 - values.shape[1])))
    low, high = np.percentile(values, (CLIPPED, 100 - CLIPPED), axis=0)
    colors = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colors.reshape(len(tokens), *grid, 3)


def draw_patches(images: np.ndarray, colors: np.ndarray, path: str | Path) -> Path:
    """Two rows of pictures as a PNG: images, and the colors of their patches.

    Args:
      images: u8[N, H, W, C], N at least 1.
      colors: f[N, h, w, 3] in [0, 1].
      path: of the file.
    """
    return draw_rows(dict(zip(ROWS, (images / 255, colors), strict=True)), path)
