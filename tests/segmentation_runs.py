"""Segmentation runs small enough for tests: a U-Net of a few thousand parameters, 12 images."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import runs
from PIL import Image

from vision_jax import train
from vision_jax.config import load_config

CONFIG = runs.ROOT / "configs/segment_nuclei.py"
CLASSES = ("ground", "disc", "bar")
ARGUMENTS = (("encoder_arguments", (("widths", (4, 8)),)), ("decoder_widths", (4,)))
STEPS = 6


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image of a disc and a bar, and its mask; a corner is ignored."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    mask = np.zeros(size, np.uint8)
    mask[(y - rng.integers(height)) ** 2 + (x - rng.integers(width)) ** 2 < 30] = 1
    top = rng.integers(height - 4)
    mask[top : top + 4] = 2
    colors = np.array([[40, 40, 40], [200, 60, 60], [60, 60, 200]])
    image = np.clip(colors[mask] + rng.normal(size=(*size, 3)) * 20, 0, 255).astype(np.uint8)
    mask[:3, :3] = 255
    return image, mask


@functools.cache
def data() -> Path:
    """A folder with train/ and test/ of images/ and masks/, and classes.json."""
    folder, rng = runs.inputs() / "scenes", np.random.default_rng(0)
    for split, sizes in (
        ("train", [(24, 32), (40, 24), (33, 27)] * 4),
        ("test", [(24, 32)] * 3 + [(30, 21)] * 2),
    ):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for i, size in enumerate(sizes):
            image, mask = draw_scene(rng, size)
            Image.fromarray(image).save(folder / split / "images" / f"{i:02d}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{i:02d}.png")
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    return folder


def overrides(**more: Any) -> dict[str, str]:
    """Fields of configs/segment_nuclei.py for a tiny run; `optim__lr=1` sets optim.lr."""
    fields = {
        "model.arguments": ARGUMENTS,
        "model.image_size": 16,
        "loss.class_weights": (),
        "data.train": data() / "train",
        "data.eval": data() / "test",
        "batch_size": 8,
        "total_steps": STEPS,
        "checkpoint_every": 2,
        "log_every": 1,
        "optim.warmup_steps": 1,
        "evaluate.every": 3,
        "evaluate.batch_size": 2,
        "evaluate.background": "ground",
        "evaluate.objects": "disc",
    }
    fields |= {name.replace("__", "."): value for name, value in more.items()}
    return {name: str(value) for name, value in fields.items()}


def tiny_config(**more: Any):
    """configs/segment_nuclei.py as a tiny run."""
    return load_config(str(CONFIG), overrides(**more))


@functools.cache
def finished() -> Path:
    """The workdir of a finished tiny run; not to be changed."""
    workdir = runs.inputs() / "segmentation_finished"
    assert train.run(tiny_config(), workdir) == 0
    return workdir


def volumes(
    folder: Path, rng: np.random.Generator, patients: int = 2, shape: tuple[int, ...] = (20, 24, 12)
) -> Path:
    """Noisy balls in NIfTI of 1 × 2 × 3 mm; a folder for `volumes:`."""
    import nibabel

    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    for patient in range(patients):
        ball = (grid**2).sum(0) < 0.4 + 0.2 * patient
        image = np.clip(60 + 120 * ball + rng.normal(size=shape) * 20, 0, 255).astype(np.uint8)
        for kind, voxels in (("images", image), ("masks", ball.astype(np.uint8))):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            volume = nibabel.Nifti1Image(voxels, np.diag([1.0, 2.0, 3.0, 1.0]))
            volume.header.set_xyzt_units("mm")
            nibabel.save(volume, folder / f"{kind}/p{patient}.nii.gz")
    (folder / "classes.json").write_text('["outside", "ball"]')
    return folder
