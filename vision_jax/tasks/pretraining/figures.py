"""The pictures of a masked autoencoder: what it saw, and what it makes of the rest."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vision_jax.figures import draw_rows
from vision_jax.ops.reconstruction import VARIANCE_EPSILON, unpatchify

ROWS = ("image", "what is visible", "reconstruction")
GREY = 0.5  # of a hidden patch


def reconstruct(
    images: np.ndarray,
    predicted: np.ndarray,
    hidden: np.ndarray,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    normalized: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """(what is visible, the reconstruction) f[B, H, W, C] in [0, 1], of images whose grid is whole.

    In the reconstruction visible patches are as they are. A prediction of normalized patches does
    not tell their mean and standard deviation: those of the image itself are taken.

    Args:
      images: u8[B, H, W, C].
      predicted: f[B, N, P·P·C].
      hidden: f[B, N], 1 where a patch is hidden.
      mean: per channel, of the model.
      std: per channel, of the model.
      normalized: whether the model predicts normalized patches.
    """
    channels = images.shape[-1]
    side = int(np.sqrt(predicted.shape[-1] / channels) + 0.5)
    grid = images.shape[1] // side, images.shape[2] // side
    inside = images[:, : grid[0] * side, : grid[1] * side].astype(np.float64) / 255
    shift, scale = np.asarray(mean), np.asarray(std)
    if normalized:
        blocks = ((inside - shift) / scale).reshape(len(images), grid[0], side, grid[1], side, -1)
        true = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(predicted.shape)
        spread = np.sqrt(true.var(-1, keepdims=True, ddof=1) + VARIANCE_EPSILON)
        predicted = predicted * spread + true.mean(-1, keepdims=True)
    made = unpatchify(np.asarray(predicted, np.float64), grid, side) * scale + shift
    covered = np.repeat(hidden[..., None] > 0, predicted.shape[-1], axis=-1)
    covered = unpatchify(covered, grid, side)
    visible = np.where(covered, GREY, inside)
    return visible, np.clip(np.where(covered, made, inside), 0, 1)


def draw_reconstructions(
    images: np.ndarray, visible: np.ndarray, made: np.ndarray, path: str | Path
) -> Path:
    """Three rows of pictures as a PNG: images, their visible patches, the reconstruction.

    Args:
      images: u8[N, H, W, C], N at least 1.
      visible: f[N, h, w, C] in [0, 1].
      made: f[N, h, w, C] in [0, 1].
      path: of the file.
    """
    rows = (images / 255, visible, made)
    return draw_rows(dict(zip(ROWS, rows, strict=True)), path)
