"""Whether a small detector learns, from nothing, seed by seed.

    python -m benchmarks.small_detectors --seeds=5
    python -m benchmarks.small_detectors --data=aerial --seeds=5
    python -m benchmarks.small_detectors --config=configs/fasterrcnn_finetune.py
    python -m benchmarks.small_detectors --config=configs/yolox_finetune.py
    python -m benchmarks.small_detectors --config=... --data=plain --seeds=1

Prints AP50, AP and mean IoU of the last evaluation and the CPU minutes of each seed, compiling
included. An AP on composites says that the detector works, and nothing about photographs; the one
on aerial tiles (configs/detr_tiny.py alone) is real, on another photo. "plain" is the simplest
set-up there is, one class and one box an image from a JSON file, and prints the mean IoU after each
epoch; it exits with 1 unless that improves.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

from vision_jax import train
from vision_jax.config import load_config
from vision_jax.data.composites import write_composites
from vision_jax.logging import read_metrics

REPORTED = ("ap50", "ap", "mean_iou_matched")
PLAIN_IMAGES = 1_000


def run(config: str, overrides: dict[str, str]) -> list[dict[str, float]]:
    """Trains once, silently; returns the evaluations in order."""
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        code = train.run(load_config(config, overrides), Path(workdir))
        assert code == 0, f"interrupted: {code}"
        records = read_metrics(Path(workdir) / "metrics.jsonl")
    evaluations = [
        {name.removeprefix("eval/"): value for name, value in record.items()} for record in records
    ]
    return [record for record in evaluations if REPORTED[0] in record]


def table(config: str, data: str, seeds: int, changed: dict[str, str]) -> None:
    """Figures by seed, then their mean and least."""
    rows = []
    for seed in range(seeds):
        start = time.process_time()
        (last,) = run(
            f"{config}:{data}", {"seed": str(seed), "evaluate.every": "1000000", **changed}
        )
        minutes = (time.process_time() - start) / 60
        rows.append([last[name] for name in REPORTED])
        figures = "  ".join(
            f"{name} {value:.3f}" for name, value in zip(REPORTED, rows[-1], strict=True)
        )
        print(f"{data}  seed {seed}: {figures}  {minutes:.1f} CPU minutes", flush=True)
    for name, column in zip(REPORTED, zip(*rows, strict=True), strict=True):
        print(f"{data}  {name}: mean {statistics.mean(column):.3f}, least {min(column):.3f}")


def plain(config: str, seeds: int, changed: dict[str, str]) -> bool:
    """Mean IoU by epoch; whether it improves for every seed."""
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", PLAIN_IMAGES), ("test", PLAIN_IMAGES // 5)):
            write_composites(Path(folder), split, count=count, seed=0, size=96, plain=True)
        improves = True
        for seed in range(seeds):
            overrides = {
                "seed": str(seed),
                "data.train": f"{folder}/train.json",
                "data.eval": f"{folder}/test.json",
                "evaluate.every": "0",
                "total_steps": "620",  # ten epochs
                **changed,
            }
            ious = [record["mean_iou_top1"] for record in run(f"{config}:composites", overrides)]
            text = " ".join(f"{iou:.3f}" for iou in ious)
            print(f"plain  seed {seed}: mean IoU after each epoch {text}", flush=True)
            improves &= ious[-1] > ious[0]
    return improves


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/detr_tiny.py")
    parser.add_argument("--data", choices=("composites", "aerial", "plain"), default="composites")
    parser.add_argument("--seeds", type=int, default=5)
    flags, changes = parser.parse_known_args()
    changed = dict(change.removeprefix("--config.").split("=", 1) for change in changes)
    if flags.data == "plain":
        return 0 if plain(flags.config, flags.seeds, changed) else 1
    table(flags.config, flags.data, flags.seeds, changed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
