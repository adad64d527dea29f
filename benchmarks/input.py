"""Input beside a torch DataLoader: from JPEG files to batches of uint8, in CPU seconds of a batch.

    pip install -e '.[parity]'
    python -m benchmarks.input
    python -m benchmarks.input --jobs crop --json input.json

The files are 500 × 375 and 2000 × 1500, quality 90, photo-like (smooth shapes plus noise), and in
the page cache. The peer is torchvision's v2 transforms on Pillow's images, as its own recipes read
them, without workers, whose CPU time nobody would count; ours is one thread. Both sides resample
alike: with antialiasing, by the interpolation that a job's name says. benchmarks/beside.py says
what the columns are; batch / CPU-s is images per CPU-second.

Of the views of self-distillation, 2 of 224 pixels and 8 of 98, torch's side makes all on the host,
as DINO's code does. Ours hands over a square of 448 pixels as bytes and cuts them on the device;
"all on the CPU" has that device's part too, computed by XLA on the same thread.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import beside
from benchmarks.beside import Job, Side

SIZE = 224
# The views of configs/dinov2_vit_small.py.
SQUARE, LOCAL, LOCALS = 448, 98, 8
GLOBAL_SCALE, LOCAL_SCALE = (0.32, 1.0), (0.05, 0.32)


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
    if view.startswith("multi-crop"):
        square = Preprocessing(
            (SQUARE, SQUARE), (0.5,) * 3, (0.5,) * 3, 1.0, interpolation, "center"
        )
        arguments |= {"preprocessing": square, "crop": "none", "flip": False}
        batches = make_train_iterator(**arguments, seed=0, max_damaged=0.0)
        images = (batch["image"] for batch in batches)
        return _over_and_over(map(_make_views(), images) if "CPU" in view else images)
    batches = make_train_iterator(
        **arguments, crop="random_resized", flip=True, seed=0, max_damaged=0.0
    )
    return _over_and_over(batch["image"] for batch in batches)


def _make_views():
    """A function from u8[B, H, W, 3] to the first of its views; all are made on the device."""
    import jax

    from vision_jax.ops.images import to_float
    from vision_jax.ops.multi_crop import Crop, make_views

    large = Crop(SIZE, GLOBAL_SCALE, (1.0, 0.1), (0.0, 0.2))
    small = Crop(LOCAL, LOCAL_SCALE, (0.5,) * LOCALS, (0.0,) * LOCALS)

    @jax.jit
    def views(key, images):
        keys = jax.random.split(key)
        images = to_float(images)
        return make_views(keys[0], images, large), make_views(keys[1], images, small)

    count = itertools.count()

    def first(images: np.ndarray) -> np.ndarray:
        made = jax.block_until_ready(views(jax.random.key(next(count)), images))
        return 255 * np.asarray(made[0][0])

    return first


class _Views:
    """DINO's views of a picture, by torchvision's v2 on Pillow's: f32[3, h, w] each, normalized.

    Source: facebookresearch/dino, main_dino.py `DataAugmentationDINO`, with DINOv2's blur.
    """

    def __init__(self, interpolation: str):
        import torch
        from torchvision.transforms import InterpolationMode, v2

        mode = InterpolationMode(interpolation)
        jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
        ends = [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.5,) * 3, (0.5,) * 3),
        ]

        def view(size: int, scale: tuple[float, float], blurred: float, solarized: float):
            return v2.Compose(
                [
                    v2.RandomResizedCrop(size, scale, interpolation=mode, antialias=True),
                    v2.RandomHorizontalFlip(),
                    v2.RandomApply([jitter], 0.8),
                    v2.RandomGrayscale(0.2),
                    v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], blurred),
                    v2.RandomSolarize(128, solarized),
                    *ends,
                ]
            )

        large = [view(SIZE, GLOBAL_SCALE, 1.0, 0.0), view(SIZE, GLOBAL_SCALE, 0.1, 0.2)]
        self._views = [*large, *[view(LOCAL, LOCAL_SCALE, 0.5, 0.0)] * LOCALS]

    def __call__(self, image: Image.Image) -> list:
        return [view(image) for view in self._views]


def torch_loader(
    folder: Path, batch_size: int, view: str, interpolation: str, count: int, size: tuple[int, int]
) -> Side:
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    write_jpegs(folder / "photos", count, size)
    mode = InterpolationMode(interpolation)
    if view.startswith("multi-crop"):
        data = ImageFolder(folder / "photos", _Views(interpolation))
        loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True)
        return _over_and_over(_Crops(loader))
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


class _Crops:
    """The first views of a DataLoader's batches, as bytes would have them."""

    def __init__(self, loader):
        self._loader = loader

    def __iter__(self):
        return (255 * (views[0].numpy() / 2 + 0.5) for views, _ in self._loader)


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
            input_job("multi-crop", "bicubic", (50, 37), 4, 2),
        ]
    return [
        input_job("random crop", "bicubic", (500, 375), 128),
        input_job("random crop", "bilinear", (500, 375), 128),
        input_job("evaluation", "bicubic", (500, 375), 128),
        input_job("random crop", "bicubic", (2000, 1500), 32),
        input_job("multi-crop", "bicubic", (500, 375), 128),
        input_job("multi-crop, all on the CPU", "bicubic", (500, 375), 128, 8),
    ]


def main() -> int:
    """Prints the table."""
    flags = beside.parser(__doc__).parse_args()
    return beside.run(jobs(flags.small), flags)


if __name__ == "__main__":
    raise SystemExit(main())
