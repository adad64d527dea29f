"""What rare classes gain from being drawn more often, or weighing more: the embedded data, 3 seeds.

    python -m benchmarks.imbalance

The training images are a long tail of the embedded 4,000: `--most` of the most frequent class, and
of the others exponentially fewer, to a `--ratio`-th; which class is rare is another at each seed.
The job is the linear probe of configs/vit_lora.py (100 steps). Prints the macro accuracy, the mean
of all classes' accuracies, on the 1,000 test images, and that of the three rarest classes.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vision_jax import train
from vision_jax.config import load_config
from vision_jax.data.sources import Source, read_source
from vision_jax.run.restore import restore

CONFIG = "configs/vit_lora.py"
PROBE = {"recipes": "()", "optim.lr": "5e-2", "total_steps": "100", "optim.warmup_steps": "10"}
BALANCED = "config.data.balance="
ROWS = ("as they are", "loss.class_weights", f"{BALANCED}0.5", f"{BALANCED}1")
RAREST = 3


def long_tail(source: Source, most: int, ratio: float, seed: int) -> np.ndarray:
    """i64[C], how many images of each class stay; the order of the classes is drawn."""
    classes = len(source.class_names)
    counts = np.round(most * ratio ** (-np.arange(classes) / (classes - 1))).astype(int)
    return np.maximum(np.random.default_rng(seed).permutation(counts), 1)


def left_out(source: Source, counts: np.ndarray, seed: int) -> list[str]:
    """The names of all images but so many of each class."""
    rng, kept = np.random.default_rng([seed, 1]), np.zeros(len(source), bool)
    for label, count in enumerate(counts):
        kept[rng.permutation(np.flatnonzero(source.labels == label))[:count]] = True
    return [source.reader.relative_name(int(row)) for row in source.rows[~kept]]


def train_once(
    row: str, source: Source, counts: np.ndarray, overrides: Mapping[str, str]
) -> tuple[float, float]:
    """Trains silently; returns the accuracy on test images, of all classes and of the rarest."""
    fields = {**PROBE, **overrides}
    if row.startswith(BALANCED):
        fields["data.balance"] = row.removeprefix(BALANCED)
    elif row == "loss.class_weights":  # as scikit-learn's "balanced": a mean of 1 over the images
        fields["loss.class_weights"] = str(tuple((counts.sum() / (len(counts) * counts)).tolist()))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        exclude = Path(folder) / "exclude.json"
        exclude.write_text(json.dumps(left_out(source, counts, int(fields["seed"]))))
        total = load_config(CONFIG, fields).total_steps
        once = {"evaluate.every": total, "checkpoint_every": total, "data.exclude": exclude}
        config = load_config(CONFIG, {**fields, **{n: str(v) for n, v in once.items()}})
        assert train.run(config, Path(folder) / "run") == 0
        restored = restore(config, Path(folder) / "run", "last")
        run = restored.run
        tested = run.task.read_eval_source(config, run.description.class_names)
        result = run.make_evaluate(tested)(*restored.trained.arguments)
    by_class = {
        label: accuracy  # None of a class without test images
        for label, name in enumerate(source.class_names)
        if (accuracy := result.summary["per_class"][name]) is not None
    }
    rarest = [int(label) for label in np.argsort(counts) if label in by_class][:RAREST]
    return (
        statistics.mean(by_class.values()),
        statistics.mean(by_class[label] for label in rarest),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--most", type=int, default=400)
    parser.add_argument("--ratio", type=float, default=100)
    flags, changes = parser.parse_known_args()
    overrides = dict(change.removeprefix("--config.").split("=", 1) for change in changes)
    source = read_source(overrides.get("data.train") or load_config(CONFIG, {}).data.train)
    found: dict[str, list[tuple[float, float]]] = {row: [] for row in ROWS}
    for seed in range(flags.first, flags.first + flags.seeds):
        counts = long_tail(source, flags.most, flags.ratio, seed)
        for row in ROWS:
            clock = time.process_time()
            found[row].append(train_once(row, source, counts, {**overrides, "seed": str(seed)}))
            whole, rare = found[row][-1]
            print(
                f"{row:24} seed {seed}: {whole:.3f} {rare:.3f}  "
                f"{time.process_time() - clock:.0f} CPU-s",
                flush=True,
            )
    for row, figures in found.items():
        whole, rare = ([one[n] for one in figures] for n in range(2))
        spread = statistics.stdev(whole) if len(whole) > 1 else 0.0
        print(
            f"{row:24} macro accuracy {statistics.mean(whole):.4f} ± {spread:.4f}, "
            f"of the {RAREST} rarest classes {statistics.mean(rare):.4f}"
        )


if __name__ == "__main__":
    main()
