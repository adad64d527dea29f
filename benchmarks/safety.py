"""What a run pays for being safe: the loop's stall while its state is saved, and comparing copies.

    python -m benchmarks.safety [--variant=b/16] [--image_size=64] [--batch_size=8]

All of a ViT-B trains with AdamW, a state of 1 GB: `saving` is the training loop itself on one
process, which saves twice; `comparing` is its step on two processes of the loopback. Shares are of
one run: each is of what was measured beside it.

The stall of a save is what the loop does not go on for: the call that begins the save, the wait for
the step before it, and what the next step takes longer than those after it, which run while the
rest is written.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vision_jax import machine, processes, replicas, sharding, train
from vision_jax.config import default_config
from vision_jax.data.pipeline import DamageLog
from vision_jax.hosts import link, supervise
from vision_jax.logging import human_size
from vision_jax.run.prepare import prepare
from vision_jax.tasks.api import find_task

STEPS, EVERY = 30, 12  # of the loop, and between its saves
TURNS = 5


def make_config(flags: argparse.Namespace) -> ConfigDict:
    config = default_config("classification")
    config.total_steps, config.checkpoint_every = STEPS, EVERY
    config.batch_size = config.evaluate.batch_size = flags.batch_size
    config.model.variant, config.model.image_size = flags.variant, flags.image_size
    config.trainable, config.recipes = (".*",), ()
    config.data.train = config.data.eval = "embedded:fashion_mnist/test"
    config.evaluate.every = STEPS * 2
    config.optim.warmup_steps = 0
    return config


def measure_saving(config: ConfigDict) -> None:
    starts: list[float] = []  # of each step
    saves: list[tuple[int, float, float]] = []  # (step, when it was asked for, its call's seconds)
    ends: list[float] = []
    waiters: list[threading.Thread] = []
    make, save = train._make_program, train.Checkpoints.save

    def noting(*arguments: Any) -> Any:
        program = make(*arguments)

        def train_step(state: Any, batch: Any) -> Any:
            starts.append(time.perf_counter())
            if len(starts) == 1:
                size = sum(x.nbytes for x in jax.tree.leaves(state))
                print(f"state: {human_size(size)}")
            return program.train_step(state, batch)

        return dataclasses.replace(program, train_step=train_step)

    def timed_save(self: Any, step: int, state: Any, metrics: Any) -> None:
        begin = time.perf_counter()
        save(self, step, state, metrics)
        saves.append((step, begin, time.perf_counter() - begin))

        def wait() -> None:
            self._manager.wait_until_finished()
            ends.append(time.perf_counter())

        waiters.append(threading.Thread(target=wait))
        waiters[-1].start()

    train._make_program, train.Checkpoints.save = noting, timed_save  # type: ignore
    train._finish = lambda *_: None  # type: ignore  # results are no part of the loop
    with tempfile.TemporaryDirectory() as folder:
        train.run(config, Path(folder) / "run")
        for waiter in waiters:
            waiter.join()
    took = np.diff(starts)
    inside = saves[:-1]  # the last one ends the run
    quiet = [
        x
        for n, x in enumerate(took[2:], 2)
        if not any(
            begin - x < starts[n] < end for (_, begin, _), end in zip(saves, ends, strict=True)
        )
    ]
    usual = statistics.median(quiet)
    print(f"a step beside no save: {usual:.2f} s (median of {len(quiet)})")
    for (step, begin, call), end in zip(inside, ends[:-1], strict=True):
        # Steps from the one that was asked to be saved, until all is written.
        beside = [took[n] for n in range(step, len(took)) if starts[n + 1] < end]
        later = statistics.median(beside[1:]) if len(beside) > 1 else usual
        first = max(0.0, took[step] - later) if beside else 0.0
        pause = max(0.0, took[step - 1] - usual)
        share = (pause + first) / (end - begin)
        print(
            f"save after step {step}: written in {end - begin:.1f} s; the pause {pause:.2f} s "
            f"(its call {call:.3f} s), the next step {first:.2f} s longer than the "
            f"{len(beside) - 1} after it ({later:.2f} s): stall {share:.1%}"
        )


def measure_comparing(config: ConfigDict) -> None:
    """In each of two processes; the first prints."""
    source, _ = find_task(config.task).read_sources(config)
    run = prepare(config, source.class_names)
    state, frozen, _ = run.make_arrays()
    frozen = {**frozen, **run.place_beside()}
    step = run.make_train_step()
    batch = sharding.make_batch_placer(run.mesh)(next(run.training_data(source, DamageLog())))
    tree = {"frozen": frozen, "state": state}
    compare = replicas.make_compare(tree)
    layout = jax.tree.map(replicas.Layout, tree)
    seconds: dict[str, list[float]] = {"step": [], "compare": [], "agree": [], "tell": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = jax.block_until_ready(call())
        seconds[name].append(time.perf_counter() - begin)
        return found

    def tell() -> None:
        for _ in range(100):
            processes.at(1, processes.STEP)

    for _ in range(TURNS + 1):  # the first of each compiles
        state, _ = timed("step", partial(step, state, frozen, batch))
        sums = timed("compare", partial(compare, {"frozen": frozen, "state": state}))
        assert replicas.find_difference(layout, sums) is None
        timed("agree", partial(multihost_utils.process_allgather, np.int32(0)))
        timed("tell", tell)
    median = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    every, stop = config.hosts.compare_every, train.STEPS_BETWEEN_AGREEMENTS
    shares = {
        f"all copies, each {every} steps": median["compare"] / every,
        f"whether to stop, each {stop} steps": median["agree"] / stop,
        "where a process is, 5 times a step": median["tell"] / 100 * 5,
    }
    if jax.process_index() == 0:
        size = sum(x.nbytes for x in jax.tree.leaves(tree))
        print(f"a step {median['step']:.2f} s, one comparison of {human_size(size)} ", end="")
        print(f"{median['compare']:.3f} s, one agreement {1e3 * median['agree']:.1f} ms")
        for name, each in shares.items():
            print(f"  {name}: {each / median['step']:.3%} of a step")
        print(f"  together {sum(shares.values()) / median['step']:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="b/16")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--part", choices=("saving", "comparing"), help="both in turn else")
    flags = parser.parse_args()
    if not flags.part:  # in processes of their own: each forks, or keeps memory, before JAX starts
        for part in ("saving", "comparing"):
            command = [sys.executable, "-m", "benchmarks.safety", *sys.argv[1:], f"--part={part}"]
            subprocess.run(command, check=True)
        return
    config = make_config(flags)
    machine.keep_memory()
    if flags.part == "saving":
        measure_saving(config)
        return
    mine = supervise.start(link.Place("", 2, 0, 2))
    processes.connect(mine)
    measure_comparing(config)
    processes.end("", 0)


if __name__ == "__main__":
    main()
