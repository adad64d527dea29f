"""What adversarial training of LoRA adapters is worth, and its price: the embedded data, 5 seeds.

    python -m benchmarks.adversarial --seeds=5

Both rows are configs/vit_lora_pgd.py, the first without attacks in training. Prints top-1 on the
1,000 test images by seed, clean and under PGD with 20 steps from a random start at the config's
epsilon, then the mean and the sample standard deviation. The config's choices were made on seed
100.
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
from vision_jax.evaluation import make_run_over
from vision_jax.logging import read_metrics
from vision_jax.run.restore import restore
from vision_jax.tasks import images
from vision_jax.tasks.classification import task as classify
from vision_jax.tasks.classification.under_attack import make_watch

CONFIG = "configs/vit_lora_pgd.py"
ROWS = {
    "LoRA": {"recipes": "('lora',)"},
    "LoRA against PGD": {},
}


def train_once(overrides: dict[str, str]) -> tuple[float, float]:
    """Trains silently; returns top-1, clean and under PGD, on all test images."""
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        total = load_config(CONFIG, overrides).total_steps
        once = {"evaluate.every": total, "checkpoint_every": total, "adversarial.watch": 0}
        config = load_config(CONFIG, {**overrides, **{n: str(v) for n, v in once.items()}})
        code = train.run(config, Path(workdir))
        assert code == 0, f"interrupted: {code}"
        trained = restore(config, Path(workdir), "last").trained
        section = config.adversarial
        outputs_fn = classify.make_outputs(
            config, trained.model, trained.predicts, trained.apply, trained.assemble
        )
        watched = make_watch(
            outputs_fn, norm=section.norm, epsilon=section.epsilon, seed=config.seed
        )
        source = classify.read_eval_source(config, trained.class_names)
        batches = images.make_batches(config, trained.preprocessing)
        run_over = make_run_over(
            watched, trained.mesh, batches, batch_size=config.evaluate.batch_size
        )
        found, _ = run_over(source, *trained.arguments)
        clean = read_metrics(Path(workdir) / "metrics.jsonl")[-1]["eval/top1"]
        return clean, float(found["pgd"].mean())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--rows", nargs="*", help="all by default")
    flags, changes = parser.parse_known_args()
    overrides = dict(change.removeprefix("--config.").split("=", 1) for change in changes)
    for name, row in ROWS.items():
        if flags.rows and name not in flags.rows:
            continue
        figures = []
        for seed in range(flags.first, flags.first + flags.seeds):
            start = time.monotonic()
            figures.append(train_once({**row, **overrides, "seed": str(seed)}))
            clean, under_pgd = figures[-1]
            seconds = time.monotonic() - start
            print(
                f"{name:18} seed {seed}: {clean:.3f} {under_pgd:.3f}  {seconds:.0f} s", flush=True
            )
        for column, values in zip(("clean", "PGD-20"), zip(*figures, strict=True), strict=True):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{name:18} {column:6} {statistics.mean(values):.4f} ± {spread:.4f}", flush=True)


if __name__ == "__main__":
    main()
