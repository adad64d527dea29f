"""What a generator makes while it trains: strips of pictures of the same noise, step by step."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vision_jax.files import write_whole
from vision_jax.logging import say

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
    content = io.BytesIO()
    Image.fromarray(strip).save(content, "png")
    write_whole(content.getvalue(), path)
    return path


def draw_progress(workdir: Path, real: np.ndarray) -> Path:
    """Writes WORKDIR/samples.png: real images u8[N, H, W, C], and below them strips by step.

    The strips are read from their files, so that a resumed run shows those of before, too. One that
    can't be read, or is none of these, is left out with a warning.
    """
    from vision_jax.figures import draw_rows  # matplotlib, only where something is drawn

    files = [path for path in sorted((workdir / FOLDER).glob("*.png")) if path.stem.isdigit()]
    found = {int(path.stem): _pictures(path, len(real)) for path in files}
    strips = [(step, pictures) for step, pictures in found.items() if pictures is not None]
    last = len(strips) - 1
    chosen = np.unique(np.linspace(0, last, min(ROWS, len(strips))).round().astype(int))
    rows = {"held-out images": real / 255}
    for step, pictures in (strips[index] for index in chosen):
        title = f"after {step} updates" if step else "before the first update"
        rows[title] = pictures / 255
    return draw_rows(rows, workdir / "samples.png")


def _pictures(file: Path, count: int) -> np.ndarray | None:
    """u8[N, H, W, 3] of a strip of so many pictures, None for what is none."""
    try:
        strip = np.asarray(Image.open(file).convert("RGB"))
    except OSError:  # Pillow's, of what is no picture too
        strip = np.zeros(())
    if strip.ndim != 3 or strip.shape[1] % count:
        say(f"warning: {file}: no strip of {count} pictures, and not shown in samples.png")
        return None
    height, whole, _ = strip.shape
    return strip.reshape(height, count, whole // count, 3).transpose(1, 0, 2, 3)
