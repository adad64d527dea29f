"""Near-duplicates among many images: CPU seconds, memory, and how many planted ones are found.

    python -m benchmarks.duplicates [--images=100000]

The images are thumbnails as the doctor makes them, of noise whose amplitude falls with frequency as
that of photos does; a tenth are copies of others with grey levels changed and noise of two levels
added. Three quarters of the copies are of one image each, the others all of one: a still camera's.
"""

import argparse
import resource
import time

import numpy as np

from vision_jax.doctor.scan import SIDE, Scan, near_duplicates


def make_thumbnails(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(u8[N, 256], i64[N]: of each the row that it is a copy of, or its own)."""
    frequency = np.hypot(np.fft.fftfreq(4 * SIDE)[:, None], np.fft.rfftfreq(4 * SIDE))
    frequency[0, 0] = np.inf
    source, copies = np.arange(count), count // 10
    source[count - copies :] = rng.permutation(count - copies)[:copies]
    source[count - copies // 4 :] = 0
    thumbnails = np.empty((count, SIDE * SIDE), np.uint8)
    for row, first in enumerate(source):
        if row == first:
            waves = np.fft.rfft2(rng.normal(size=(4 * SIDE, 4 * SIDE))) / frequency
            values = np.fft.irfft2(waves)[: 2 * SIDE, : 2 * SIDE]
            values = values.reshape(SIDE, 2, SIDE, 2).mean((1, 3)).ravel()
            values = 128 + 50 * (values - values.mean()) / values.std()
        else:
            values = rng.uniform(0.7, 1) * thumbnails[first] + rng.normal(0, 2, SIDE * SIDE)
        thumbnails[row] = values.clip(0, 255)
    return thumbnails, source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    count = parser.parse_args().images
    thumbnails, source = make_thumbnails(count, np.random.default_rng(0))
    scan = Scan((None,) * count, {}, (None,) * count, thumbnails)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    found = near_duplicates(scan)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    planted = {row: int(first) for row, first in enumerate(source) if row != first}
    right = sum(planted.get(row) == first for row, first in found.items())
    print(
        f"{count:,} images: {seconds:.1f} CPU seconds, {grown:.0f} MB more; of {len(planted):,}"
        f" copies {right:,} found with their first, {len(found) - right:,} other pairs"
    )


if __name__ == "__main__":
    main()
