"""What pretraining and LoRA are worth: three recipes on the embedded data, over several seeds.

    python -m benchmarks.transfer --seeds=5

Each recipe has the budget of configs/vit_lora.py: the same images, updates and batch. They differ
in what trains and in where the frozen parameters come from. The learning rate of each is the best
of three (RATES) on seed 100, which `--rates` compares again. Prints top-1 on the 1,000 test images
by seed, then the mean and the sample standard deviation.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path

from vision_jax import convert, train
from vision_jax.config import load_config
from vision_jax.logging import read_metrics

CONFIG = "configs/vit_lora.py"
RATES = {
    "LoRA, pretrained": (2e-3, 5e-3, 1e-2),
    "linear probe, pretrained": (5e-3, 2e-2, 5e-2),
    "LoRA, random initialization": (2e-3, 5e-3, 1e-2),
}


def recipes() -> dict[str, dict[str, str]]:
    """Overrides of the config, by name of the recipe."""
    weights = load_config(CONFIG, {}).model.weights
    family, arguments = convert.recognize(convert.read_weights(weights))
    arguments.pop("num_classes")
    same_model = {"model.weights": "", "model.variant": family}
    same_model |= {"model.arguments": repr(tuple(arguments.items()))}
    return {
        "LoRA, pretrained": {"optim.lr": "5e-3"},
        "linear probe, pretrained": {"recipes": "()", "optim.lr": "5e-2"},
        "LoRA, random initialization": {**same_model, "optim.lr": "1e-2"},
    }


def top1(overrides: dict[str, str]) -> float:
    """Trains once, silently; returns the top-1 of the last evaluation."""
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        total = load_config(CONFIG, overrides).total_steps
        overrides = {**overrides, "evaluate.every": str(total), "checkpoint_every": str(total)}
        code = train.run(load_config(CONFIG, overrides), Path(workdir))
        assert code == 0, f"interrupted: {code}"
        return read_metrics(Path(workdir) / "metrics.jsonl")[-1]["eval/top1"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipes", nargs="*", help="all by default")
    parser.add_argument("--rates", action="store_true", help="compare learning rates on seed 100")
    flags, changes = parser.parse_known_args()
    changed = dict(change.removeprefix("--config.").split("=", 1) for change in changes)
    for name, overrides in recipes().items():
        if flags.recipes and name not in flags.recipes:
            continue
        if flags.rates:
            for rate in RATES[name]:
                figure = top1({**overrides, **changed, "seed": "100", "optim.lr": str(rate)})
                print(f"{name:28} lr {rate:g}: {figure:.4f}", flush=True)
            continue
        runs = ({**overrides, **changed, "seed": str(seed)} for seed in range(flags.seeds))
        figures = [top1(fields) for fields in runs]
        spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
        each = " ".join(f"{figure:.3f}" for figure in figures)
        print(f"{name:28} {statistics.mean(figures):.4f} ± {spread:.4f}   ({each})", flush=True)


if __name__ == "__main__":
    main()
