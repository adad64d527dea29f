"""What a model says of images: the nearest captions of each, in a picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vision_jax.figures import INK, save_figure

WIDTH = 24  # characters of a line
LINES = 3  # of a caption


def draw_captions(images: np.ndarray, captions: Sequence[Sequence[str]], path: str | Path) -> Path:
    """Images as a PNG, each above its captions.

    Args:
      images: u8[N, H, W, C], N at least 1.
      captions: N, of each image some.
      path: of the file.
    """
    count = len(images)
    figure = Figure(figsize=(2.2 * count + 0.3, 4.2), dpi=120, layout="constrained")
    cells = figure.subplots(1, count, squeeze=False)[0]
    for cell, picture, texts in zip(cells, images, captions, strict=True):
        if picture.shape[2] != 3:  # grey, or the first of many channels in color
            several = picture.shape[2] > 3
            picture = picture[..., :3] if several else picture[..., :1].repeat(3, axis=2)
        tiny = min(picture.shape[:2]) < 100  # pixels of such images are shown as squares
        cell.imshow(picture, interpolation="nearest" if tiny else "antialiased")
        shown = [
            textwrap.fill(text.replace("$", r"\$"), WIDTH, max_lines=LINES, placeholder=" …")
            for text in texts
        ]
        cell.set_xlabel("\n\n".join(shown), fontsize=8, color=INK)
        cell.set(xticks=[], yticks=[])
        for spine in cell.spines.values():
            spine.set(color=INK, linewidth=0.5)
    return save_figure(figure, path)
