"""What a generator makes while it trains: strips of pictures of the same noise, step by step."""

from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = "samples"
ROWS = 4  # of samples.png that show steps: the first, the last, and some between


def write_strip(workdir: Path, step: int, made: np.ndarray) -> Path:
    """Writes pictures u8[N, H, W, C] beside each other as WORKDIR/samples/STEP.png.

    Where C is neither 1 nor 3, the first of the channels is shown, in grey.
    """
    if made.shape[3] != 3:
        made = np.repeat(made[..., :1], 3, axis=3)
    path = workdir / FOLDER / f"{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    count, height, width, _ = made.shape
    strip = made.transpose(1, 0, 2, 3).reshape(height, count * width, 3)
    Image.fromarray(strip).save(path)
    return path


def draw_progress(workdir: Path, real: np.ndarray) -> Path:
    """Writes WORKDIR/samples.png: real images u8[N, H, W, C], and below them strips by step.

    The strips are read from their files, so that a resumed run shows those of before, too.
    """
    from vision_jax.figures import draw_rows  # matplotlib, only where something is drawn

    files = [p for p in sorted((workdir / FOLDER).glob("*.png")) if p.stem.isdigit()]
    chosen = np.unique(np.linspace(0, len(files) - 1, min(ROWS, len(files))).round().astype(int))
    rows = {"held-out images": real / 255}
    for file in (files[index] for index in chosen):
        step = int(file.stem)
        title = f"after {step} updates" if step else "before the first update"
        rows[title] = _pictures(file, len(real)) / 255
    return draw_rows(rows, workdir / "samples.png")


def _pictures(file: Path, count: int) -> np.ndarray:
    """u8[N, H, W, 3] of a strip."""
    strip = np.asarray(Image.open(file))
    height, whole, _ = strip.shape
    return strip.reshape(height, count, whole // count, 3).transpose(1, 0, 2, 3)
