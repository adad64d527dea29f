"""Input pipeline: images per second of decode → random-resized crop → flip → batch.

    python -m benchmarks.input [--images=400] [--threads=1,2,4] [--workers=0]

Generates 500 × 375 JPEGs (quality 90, photo-like: smooth shapes plus noise), then times the
training and evaluation pipelines per thread count, beside a plain single-threaded Pillow loop that
does the same work without grain, in the same run. Files are in the page cache. Each figure is the
best of 3, since other programs may take CPU time.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vision_jax.data.pipeline import make_eval_batches, make_train_iterator
from vision_jax.data.sources import Source, read_source
from vision_jax.data.transforms import Preprocessing

BATCH_SIZE = 32
PREPROCESSING = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, 0.875, "bicubic", "center")


def write_jpegs(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.normal(0, 8, smooth.shape).astype(np.int16)
        path = folder / f"class_{i % 4}" / f"{i:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def plain_pillow(source: Source, batches: int) -> None:
    """The peer: what one would write without a library, one image after the other."""
    rng = np.random.default_rng(0)
    for _ in range(batches):
        images = []
        for row in rng.integers(len(source), size=BATCH_SIZE):
            with Image.open(source.example_name(row)) as file:
                image = file.convert("RGB")
            width, height = image.size
            h, w = (int(side * rng.uniform(0.5, 1)) for side in (height, width))
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            image = image.crop((left, top, left + w, top + h))
            image = image.resize((224, 224), Image.Resampling.BICUBIC)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            images.append(np.asarray(image))
        np.stack(images)


def train_pipeline(source: Source, batches: int, threads: int, workers: int) -> float:
    """Seconds for `batches`, the first one (threads and workers starting) not counted."""
    iterator = make_train_iterator(
        source,
        batch_size=BATCH_SIZE,
        preprocessing=PREPROCESSING,
        crop="random_resized",
        crop_scale=(0.25, 1.0),
        flip=True,
        seed=0,
        num_threads=threads,
        num_workers=workers,
        max_damaged=0.0,
    )
    ahead = (threads + 1) * max(workers, 1)  # batches that may be finished before the clock starts
    for _ in itertools.islice(iterator, ahead):
        pass

    def run() -> None:
        for _ in itertools.islice(iterator, batches):
            pass

    seconds = best_seconds(run)
    iterator.close()
    return seconds


def eval_pipeline(source: Source, threads: int) -> None:
    for _ in make_eval_batches(
        source, batch_size=BATCH_SIZE, preprocessing=PREPROCESSING, num_threads=threads
    ):
        pass


def best_seconds(function: Callable[[], None]) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--threads", default="1,2,4")
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        write_jpegs(Path(name), arguments.images)
        source = read_source(name)
        batches = max(arguments.images // BATCH_SIZE, 8)
        count = batches * BATCH_SIZE
        print(f"{len(source)} JPEGs of 500 × 375, {os.cpu_count()} CPUs, {count} images a run")
        rate = count / best_seconds(lambda: plain_pillow(source, batches))
        print(f"{'plain Pillow loop':24}{rate:8.0f} images/s")
        for threads in (int(n) for n in arguments.threads.split(",")):
            rate = count / train_pipeline(source, batches, threads, arguments.workers)
            label = f"train, {threads} threads"
            if arguments.workers:
                label += f" × {arguments.workers} workers"
            print(f"{label:24}{rate:8.0f} images/s")
            rate = len(source) / best_seconds(lambda n=threads: eval_pipeline(source, n))
            print(f"{f'evaluation, {threads} threads':24}{rate:8.0f} images/s")


if __name__ == "__main__":
    main()
