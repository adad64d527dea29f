"""A search beside as many runs: FLOPs, CPU time, and what the best trial is worth.

    python -m benchmarks.search                                  # FLOPs of 64 trials: compiled only
    python -m benchmarks.search --parts time --config.total_steps=50
    python -m benchmarks.search --parts best --seeds=3 --config.total_steps=50

Flags of the form --config.FIELD=VALUE change configs/vit_lora.py. FLOPs are those of a step's
matrix products (vision_jax/cost.py): T trials cost F_shared + T · F_own, T runs
T · (F_shared + F_own), where F_shared is the forward pass through what is frozen, up to the first
layer with an array that trains. CPU seconds are the user's and the system's of whole processes,
compilation and the start included, with a cache of their own for each: of a search of T trials, and
T times those of one run (the median over `--rounds`). The last part chooses, at each seed, the best
of `--trials` trials by a fifth of the training images, which is held out, and compares it with the
config as it stands on the test images, which neither has seen.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = "configs/vit_lora.py"
LAST_TWO = "('head/.*', 'norm/.*', 'block_[45]/.*')"
JOBS = {
    "the head": {"recipes": "()"},
    "the last two of six blocks": {"recipes": "()", "trainable": LAST_TWO},
    "adapters in the last two": {"lora.rules": r"(r'block_[45]/.*/(qkv|proj|fc\d)/kernel',)"},
    "adapters in all blocks": {},
}
SPACE = """
from vision_jax.search import choice, log_uniform, uniform


def get_space():
    return {
        "optim.lr": log_uniform(1e-3, 3e-2),
        "optim.weight_decay": log_uniform(1e-3, 0.3),
        "augment.label_smoothing": uniform(0.0, 0.2),
        "optim.b2": uniform(0.95, 0.999),
        "lora.alpha": log_uniform(4.0, 64.0),
        "lora.rank": choice(4, 8, 16),
    }
"""
SPACE_OF_THE_HEAD = """
from vision_jax.search import log_uniform, uniform


def get_space():
    return {
        "optim.lr": log_uniform(1e-3, 0.3),
        "optim.weight_decay": log_uniform(1e-3, 0.3),
        "augment.label_smoothing": uniform(0.01, 0.2),
        "optim.b2": uniform(0.95, 0.999),
    }
"""


def flops(trials: int, overrides: Sequence[str]) -> None:
    """Prints FLOPs of a step of T trials and of T runs."""
    from vision_jax import cost
    from vision_jax.config import load_config
    from vision_jax.run.prepare import prepare
    from vision_jax.search.stack import Stack

    for name, changed in JOBS.items():
        fields = dict(one.removeprefix("--config.").split("=", 1) for one in overrides)
        config = load_config(CONFIG, {**fields, **changed})
        run = prepare(config)
        numbers = ("optim.lr", "optim.weight_decay", "augment.label_smoothing")
        together = cost.count(Stack(run, numbers).lower(trials).compile()).flops
        frozen = run.parameters.abstract()[1] | run.abstract_beside()
        step = run.make_train_step().lower(run.abstract_state, frozen, run.abstract_batch())
        alone = cost.count(step.compile()).flops
        own = (together - alone) / (trials - 1)
        print(
            f"{name}: {together / 1e9:.2f} GFLOP a step of {trials} trials, {alone / 1e9:.2f} of a "
            f"run: {together / (trials * alone):.3f} of {trials} runs (shared "
            f"{(alone - own) / alone:.3f} of a run's)",
            flush=True,
        )


def call(arguments: Sequence[str], cache: Path) -> tuple[float, str]:
    """(CPU seconds of a command, what it printed).

    Raises:
      RuntimeError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vision_jax.main", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, done.stdout


def times(trials: int, rounds: int, overrides: Sequence[str], folder: Path) -> None:
    """Prints CPU seconds of a search and of as many runs, each with an empty cache."""
    space = folder / "space.py"
    space.write_text(SPACE)
    alone, together = [], []
    for number in range(rounds):
        run = [f"--config={CONFIG}", f"--workdir={folder}/run{number}", *overrides]
        alone.append(call(run, folder / f"cache_run{number}")[0])
        search = [
            *("search", f"--config={CONFIG}", f"--space={space}", f"--trials={trials}"),
            *(f"--workdir={folder}/search{number}", *overrides),
        ]
        together.append(call(search, folder / f"cache_search{number}")[0])
        print(f"  a run {alone[-1]:.1f} CPU-s, the search {together[-1]:.1f}", flush=True)
    one, all_of_them = statistics.median(alone), statistics.median(together)
    print(
        f"{trials} trials with adapters in all blocks: {all_of_them:.1f} CPU-s, {trials} runs "
        f"{trials * one:.1f}: {all_of_them / (trials * one):.3f}"
    )


def best(
    trials: int, seeds: int, scheduler: Sequence[str], overrides: Sequence[str], folder: Path
) -> None:
    """Prints top-1 of the best trial and of the config's own values, by seed."""
    space, cache, gains = folder / "space.py", folder / "cache", []
    space.write_text(SPACE_OF_THE_HEAD if "--config.recipes=()" in overrides else SPACE)
    for seed in range(seeds):
        held_out = ("--config.data.eval=", "--config.data.holdout=0.2", f"--config.seed={seed}")
        others = [one for one in overrides if not one.startswith("--config.data.eval=")]
        own = [f"--config={CONFIG}", *held_out, *others]
        call([*own, f"--workdir={folder}/own{seed}"], cache)
        settings = (f"--space={space}", f"--trials={trials}", f"--seed={seed}", *scheduler)
        call(["search", *own, *settings, f"--workdir={folder}/{seed}"], cache)
        hand = _top1(folder / f"own{seed}", cache, overrides)
        found = _top1(folder / str(seed) / "best", cache, overrides)
        table = json.loads((folder / str(seed) / "search.json").read_text())["trials"]
        (first,) = (row for row in table if row["place"] == 1)
        gains.append(found - hand)
        print(
            f"  seed {seed}: best of {trials} {found:.4f}, the config's values {hand:.4f}; trial "
            f"{first['trial']}: {first['values']}",
            flush=True,
        )
    spread = statistics.stdev(gains) if seeds > 1 else 0.0
    print(f"gain in top-1 over {seeds} seeds: {statistics.mean(gains):+.4f} ± {spread:.4f}")


def _top1(workdir: Path, cache: Path, overrides: Sequence[str]) -> float:
    """Of a finished run, on the config's own test images."""
    given = [one for one in overrides if one.startswith("--config.data.eval=")]
    data = given or ["--config.data.eval=embedded:fashion_mnist/test"]
    _, text = call(["evaluate", f"--workdir={workdir}", *data], cache)
    found = re.search(r"top1 ([\d.]+)", text)
    assert found is not None, text
    return float(found[1])


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["flops"], choices=("flops", "time", "best"))
    parser.add_argument("--trials", type=int, help="64 for FLOPs, 16 for times, 32 for the best")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scheduler", default="none", help="of the search for the best")
    flags, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if "flops" in flags.parts:
            flops(flags.trials or 64, overrides)
        if "time" in flags.parts:
            times(flags.trials or 16, flags.rounds, overrides, Path(folder))
        if "best" in flags.parts:
            scheduler = (f"--scheduler={flags.scheduler}",)
            best(flags.trials or 32, flags.seeds, scheduler, overrides, Path(folder))


if __name__ == "__main__":
    main()
