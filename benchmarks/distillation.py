"""What a teacher is worth to a small student: the embedded data, 5 seeds.

    python -m benchmarks.distillation --teacher=runs/teacher --seeds=5

All rows are configs/distill_vit_small.py, the first without its teacher. Prints top-1 on the 1,000
test images by seed, and the mean, the sample standard deviation and the paired difference to the
first row. The teacher's command is in the config's docstring. The config's choices were made on
seed 100.
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
from vision_jax.logging import read_metrics

CONFIG = "configs/distill_vit_small.py"
ROWS = {
    "alone": {"recipes": "()"},
    "taught": {},
}


def train_once(overrides: dict[str, str]) -> float:
    """Trains silently; returns top-1 after the last step."""
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        total = load_config(CONFIG, overrides).total_steps
        once = {"evaluate.every": str(total), "checkpoint_every": str(total)}
        code = train.run(load_config(CONFIG, {**once, **overrides}), Path(workdir))
        assert code == 0, f"interrupted: {code}"
        return read_metrics(Path(workdir) / "metrics.jsonl")[-1]["eval/top1"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="runs/teacher")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="all by default")
    flags, changes = parser.parse_known_args()
    overrides = dict(change.removeprefix("--config.").split("=", 1) for change in changes)
    results: dict[str, list[float]] = {}
    for name in flags.rows:
        results[name] = []
        for seed in range(flags.first, flags.first + flags.seeds):
            start = time.monotonic()
            fields = {"distill.teachers": flags.teacher, **ROWS[name], **overrides}
            results[name].append(train_once({**fields, "seed": str(seed)}))
            seconds = time.monotonic() - start
            print(f"{name:8} seed {seed}: {results[name][-1]:.3f}  {seconds:.0f} s", flush=True)
    first = next(iter(results.values()))
    for name, values in results.items():
        gains = [value - other for value, other in zip(values, first, strict=True)]
        print(f"{name:8} {_mean(values)}, paired {_mean(gains)}")


def _mean(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


if __name__ == "__main__":
    main()
