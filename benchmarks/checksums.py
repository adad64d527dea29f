"""What the checksums of a checkpoint cost: a state of 1 GB, restored and verified.

    python -m benchmarks.checksums [--gigabytes=1]

Prints the seconds of the restore, those of the verification alone, and their share of the rest:
the median of seven turns, the files in the page cache.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import jax
import numpy as np

from vision_jax import sharding
from vision_jax.checkpoints import Checkpoints, restore
from vision_jax.checksums import verify_checksums

TURNS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    count = round(parser.parse_args().gigabytes * 1e9 / (4 * 2048**2))
    place, rng = sharding.replicated(sharding.make_mesh(-1, 1)), np.random.default_rng(0)
    state = {
        f"block_{i}/kernel": sharding.place(rng.standard_normal((2048, 2048), np.float32), place)
        for i in range(count)
    }
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        with closing(Checkpoints(workdir, "top1")) as checkpoints:
            start = time.perf_counter()
            checkpoints.save(1, state, None)
            print(f"save returns after {time.perf_counter() - start:.2f} s")
        whole, checking = [], []
        for _ in range(TURNS):
            start = time.perf_counter()
            jax.block_until_ready(restore(workdir, 1, target)[0])
            whole.append(time.perf_counter() - start)
            start = time.perf_counter()
            verify_checksums(workdir / "checkpoints" / "1")
            checking.append(time.perf_counter() - start)
    restored, checked = statistics.median(whole), statistics.median(checking)
    share = checked / (restored - checked)
    print(f"restored in {restored:.3f} s, of it checksums {checked:.3f} s: {share:.1%} of the rest")


if __name__ == "__main__":
    main()
