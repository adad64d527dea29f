"""Input beside a torch DataLoader: from JPEG files to batches of uint8, in CPU seconds of a batch.

    pip install -e '.[parity]'
    python -m benchmarks.input
    python -m benchmarks.input --jobs crop --json input.json

The files are 500 × 375 and 2000 × 1500, quality 90, photo-like (smooth shapes plus noise), and in
the page cache. The peer is torchvision's v2 transforms on Pillow's images, as its own recipes read
them, without workers, whose CPU time nobody would count; ours is one thread. Both sides resample
alike: with antialiasing, by the interpolation that a job's name says. benchmarks/beside.py says
what the columns are; 32 / CPU-s is images per CPU-second.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import beside
from benchmarks.beside import Job, Side

SIZE = 224


def write_jpegs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """`count` photos of (width, height) in four classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.normal(0, 8, smooth.shape).astype(np.int16)
        path = folder / f"class_{i % 4}" / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def _over_and_over(batches: Iterable[np.ndarray]) -> Side:
    """A step is a batch; its value the mean of the first pixels, which all views nearly share."""
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    return Side(lambda: float(next(endless).mean()) / 255)


class _Evaluation:
    """Batches of the evaluation view, from the beginning each time."""

    def __init__(self, **arguments):
        self._arguments = arguments

    def __iter__(self):
        from vision_jax.data.pipeline import make_eval_batches

        return (batch["image"] for batch in make_eval_batches(**self._arguments))


def ours(folder: Path, batch_size: int, view: str, interpolation: str, **_) -> Side:
    from vision_jax import machine

    machine.keep_memory()  # as every command does, before JAX is imported
    from vision_jax.data.pipeline import make_train_iterator
    from vision_jax.data.sources import read_source
    from vision_jax.data.transforms import Preprocessing

    arguments = {
        "source": read_source(str(folder / "photos")),
        "batch_size": batch_size,
        "preprocessing": Preprocessing(
            (SIZE, SIZE), (0.5,) * 3, (0.5,) * 3, 0.875, interpolation, "center"
        ),
        "num_threads": 1,
    }
    if view == "evaluation":
        return _over_and_over(_Evaluation(**arguments))
    batches = make_train_iterator(
        **arguments, crop="random_resized", flip=True, seed=0, max_damaged=0.0
    )
    return _over_and_over(batch["image"] for batch in batches)


def torch_loader(
    folder: Path, batch_size: int, view: str, interpolation: str, count: int, size: tuple[int, int]
) -> Side:
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    write_jpegs(folder / "photos", count, size)
    mode = InterpolationMode(interpolation)
    if view == "evaluation":
        steps = [v2.Resize(int(SIZE / 0.875), mode, antialias=True), v2.CenterCrop(SIZE)]
    else:
        crop = v2.RandomResizedCrop(SIZE, interpolation=mode, antialias=True)
        steps = [crop, v2.RandomHorizontalFlip()]
    data = ImageFolder(folder / "photos", v2.Compose([*steps, v2.PILToTensor()]))
    loader = torch.utils.data.DataLoader(
        data, batch_size, shuffle=view != "evaluation", drop_last=True
    )
    return _over_and_over(_Images(loader))


class _Images:
    """The images of a DataLoader's batches, as arrays."""

    def __init__(self, loader):
        self._loader = loader

    def __iter__(self):
        return (images.numpy() for images, _ in self._loader)


def input_job(view: str, interpolation: str, size: tuple[int, int], count: int, batch=32) -> Job:
    """`count` files of (width, height), read in this view."""
    shared = {
        "batch_size": batch,
        "view": view,
        "interpolation": interpolation,
        "count": count,
        "size": size,
    }
    return Job(
        f"{view}, {interpolation}, {size[0]} × {size[1]} → {SIZE}, batch {batch}",
        ("input.ours", shared),
        {"torch": ("input.torch_loader", shared)},
        tolerance=0.2,  # other windows
    )


def jobs(small: bool = False) -> list[Job]:
    if small:
        return [
            input_job("random crop", "bicubic", (50, 37), 4, 2),
            input_job("evaluation", "bicubic", (50, 37), 4, 2),
        ]
    return [
        input_job("random crop", "bicubic", (500, 375), 128),
        input_job("random crop", "bilinear", (500, 375), 128),
        input_job("evaluation", "bicubic", (500, 375), 128),
        input_job("random crop", "bicubic", (2000, 1500), 32),
    ]


def main() -> int:
    """Prints the table."""
    flags = beside.parser(__doc__).parse_args()
    return beside.run(jobs(flags.small), flags)


if __name__ == "__main__":
    raise SystemExit(main())
