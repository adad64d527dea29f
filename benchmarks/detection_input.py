"""Detection input: images per second of decode → crop → resize → flip → color → padded batch.

    python -m benchmarks.detection_input [--images=200] [--threads=1,2,4]

Generates photo-like JPEGs (quality 90) of COCO's common sizes, 6 boxes each, then times training
and evaluation at DETR's sizes beside two plain single-threaded loops in the same run: one that only
decodes, and one that decodes and resizes. Files are in the page cache. Each figure is the best of
3, since other programs may take CPU time. The last lines tell how much of the batches is padding.
"""

import argparse
import itertools
import os
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from vision_jax.data.detection import DetectionSource, Ragged
from vision_jax.data.detection_pipeline import (
    make_detection_eval_batches,
    make_detection_train_iterator,
)
from vision_jax.data.detection_transforms import (
    DetectionAugmentation,
    DetectionPreprocessing,
    default_buckets,
)
from vision_jax.data.sources import FileReader

BATCH_SIZE = 8
SIZES = [(480, 640)] * 5 + [(640, 480)] * 2 + [(427, 640)] * 2 + [(375, 500)]  # (height, width)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DETR = DetectionPreprocessing(
    800, 1333, False, "bilinear", MEAN, STD, default_buckets(800, 1333, 4)
)
EIGHT = replace(DETR, buckets=default_buckets(640, 1066, 4) + DETR.buckets)
SHORTS = tuple(range(480, 801, 32))
COLOR = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
RECIPES = {
    "flip": (DETR, DetectionAugmentation()),
    "multi-scale": (DETR, DetectionAugmentation(shorts=SHORTS)),
    "multi-scale, 8 buckets": (EIGHT, DetectionAugmentation(shorts=SHORTS)),
    "and DETR's crop": (EIGHT, DetectionAugmentation(shorts=SHORTS, crop=0.5)),
    "and color": (EIGHT, DetectionAugmentation(shorts=SHORTS, crop=0.5, **COLOR)),
}


def write_source(folder: Path, count: int) -> DetectionSource:
    rng = np.random.default_rng(0)
    sizes = np.array([SIZES[i % len(SIZES)] for i in range(count)], np.int32)
    paths = tuple(f"{i:04}.jpg" for i in range(count))
    for (height, width), path in zip(sizes, paths, strict=True):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.normal(0, 8, smooth.shape).astype(np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / path, quality=90)
    corners = np.sort(rng.uniform(0, 1, (count, 6, 2, 2)), axis=2)  # [N, T, corner, xy]
    boxes = (corners * sizes[:, None, None, ::-1]).reshape(-1, 4)
    offsets = np.arange(count + 1) * 6
    return DetectionSource(
        "random", ("thing",), (1,), tuple(range(count)), paths, sizes, Ragged(boxes, offsets),
        Ragged(np.zeros(6 * count, np.int32), offsets), Ragged(np.zeros(6 * count, bool), offsets),
        Ragged(np.ones(6 * count), offsets), np.arange(count), FileReader(folder, paths),
    )  # fmt: skip


def best_seconds(function: Callable[[], None]) -> float:
    return min(timeit.repeat(function, number=1, repeat=3))


def plain_loop(source: DetectionSource, *, resize: bool) -> None:
    """What one would write without a library, one image after the other."""
    for row in range(len(source)):
        with Image.open(source.example_name(row)) as file:
            image = file.convert("RGB")
        if resize:
            scale = 800 / min(image.size)
            image = image.resize((int(image.width * scale), int(image.height * scale)))
        np.asarray(image)


def train_seconds(
    source: DetectionSource,
    preprocessing: DetectionPreprocessing,
    augmentation: DetectionAugmentation,
    threads: int,
) -> tuple[float, float]:
    """(seconds for len(source) images once the threads run, share of the pixels that is padding)"""
    iterator = make_detection_train_iterator(
        source,
        batch_size=BATCH_SIZE,
        preprocessing=preprocessing,
        augmentation=augmentation,
        max_boxes=100,
        seed=0,
        num_threads=threads,
        max_damaged=0.0,
    )
    padding = []

    def run(batches: int) -> None:
        for batch in itertools.islice(iterator, batches):
            padding.append(1 - batch["size"].prod(1).mean() / np.prod(batch["image"].shape[1:3]))

    run(threads + 1)  # batches that may be finished before the clock starts
    seconds = best_seconds(lambda: run(len(source) // BATCH_SIZE))
    iterator.close()
    return seconds, float(np.mean(padding))


def eval_pipeline(source: DetectionSource, threads: int) -> None:
    for _ in make_detection_eval_batches(
        source, batch_size=BATCH_SIZE, preprocessing=DETR, max_boxes=100, num_threads=threads
    ):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--threads", default="1,2,4")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        source = write_source(Path(name), arguments.images)
        print(
            f"{len(source)} JPEGs of COCO's sizes, {os.cpu_count()} CPUs, batches of {BATCH_SIZE}"
        )
        for label, resize in (("decode", False), ("decode and resize", True)):
            seconds = best_seconds(lambda resize=resize: plain_loop(source, resize=resize))
            print(f"{f'plain loop, {label}':40}{len(source) / seconds:8.0f} images/s")
        paddings = {}
        for threads in (int(n) for n in arguments.threads.split(",")):
            for label, recipe in RECIPES.items():
                seconds, paddings[label] = train_seconds(source, *recipe, threads)
                label = f"train, {label}, {threads} threads"
                print(f"{label:40}{len(source) / seconds:8.0f} images/s")
            seconds = best_seconds(lambda n=threads: eval_pipeline(source, n))
            print(f"{f'evaluation, {threads} threads':40}{len(source) / seconds:8.0f} images/s")
        for label, padding in paddings.items():
            print(f"{f'padding, {label}':40}{padding:8.1%}")


if __name__ == "__main__":
    main()
