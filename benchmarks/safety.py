"""What a run pays for being safe: the loop's stall while its state is saved, and comparing copies.

    python -m benchmarks.safety [--variant=b/16] [--image_size=64] [--batch_size=8]

All of a ViT-B trains with AdamW, a state of 1 GB: `saving` is the trainer's step and its saver on
one process, `comparing` the step on two processes of the loopback. Shares are of one run, of the
least of four turns each.

The loop stalls for the call that begins a save, and on a CPU for the copy that the next step makes
of the state, which it may not write over until all is written. The writing itself goes on beside
the steps, in threads.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vision_jax import machine, processes, replicas, sharding, train
from vision_jax.checkpoints import Checkpoints
from vision_jax.config import default_config
from vision_jax.data.pipeline import DamageLog
from vision_jax.hosts import link, supervise
from vision_jax.logging import human_size
from vision_jax.run.prepare import prepare
from vision_jax.tasks.api import find_task

TURNS = 4


def make_config(flags: argparse.Namespace) -> ConfigDict:
    config = default_config("classification")
    config.total_steps = 100
    config.batch_size = config.evaluate.batch_size = flags.batch_size
    config.model.variant, config.model.image_size = flags.variant, flags.image_size
    config.trainable, config.recipes = (".*",), ()
    config.data.train = config.data.eval = "embedded:fashion_mnist/test"
    config.optim.warmup_steps = 0
    return config


class Seconds:
    """What each of some calls took, by name, and the least: other programs may run beside."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def of(self, name: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = jax.block_until_ready(call())
        self.add(name, time.perf_counter() - begin)
        return found

    def add(self, name: str, seconds: float) -> None:
        self._found.setdefault(name, []).append(seconds)

    def least(self) -> dict[str, float]:
        return {name: min(found[1:]) for name, found in self._found.items()}


def make_step(config: ConfigDict) -> tuple[Callable[[Any], Any], Any, Any]:
    """(the trainer's step, from a state to the next; a state, what is frozen)."""
    source, _ = find_task(config.task).read_sources(config)
    run = prepare(config, source.class_names)
    state, frozen, _ = run.make_arrays()
    frozen = {**frozen, **run.place_beside()}
    batch = sharding.make_batch_placer(run.mesh)(next(run.training_data(source, DamageLog())))
    program = run.make_train_step()
    return lambda state: program(state, frozen, batch)[0], state, frozen


def measure_saving(config: ConfigDict) -> None:
    train_step, state, _ = make_step(config)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    seconds, held = Seconds(), jax.tree.map(lambda x: np.ones(x.shape, x.dtype), state)
    with tempfile.TemporaryDirectory() as folder, closing(Checkpoints(Path(folder), "a")) as saver:
        for turn in range(TURNS + 1):  # the first compiles
            state = seconds.of("step", partial(train_step, state))
            # As while it is written: a buffer that somebody looks at is copied, not written over.
            views = jax.tree.map(np.asarray, state)
            state = seconds.of("step of a state that is looked at", partial(train_step, state))
            del views
            seconds.of("copy", partial(jax.tree.map, np.copyto, held, state))
            begin = time.perf_counter()
            seconds.of("call", partial(saver.save, turn, state, None))
            seconds.of("memory given back", machine.give_back_memory)
            state = seconds.of("step beside the writing", partial(train_step, state))
            saver.wait()
            seconds.add("save", time.perf_counter() - begin)
    least = seconds.least()
    copied = max(0.0, least["step of a state that is looked at"] - least["step"])
    parts = {
        "the call": least["call"],
        "memory given back": least["memory given back"],
        "the state copied by the next step": copied,
    }
    print(f"a state of {human_size(size)} is written in {least['save']:.2f} s; the loop waits for")
    for name, each in parts.items():
        print(f"  {name}: {each:.3f} s, {each / least['save']:.2%}")
    print(f"  together {sum(parts.values()) / least['save']:.2%}")
    print(
        f"NumPy copies as many bytes in {least['copy']:.3f} s, {least['copy'] / least['save']:.2%}"
    )
    beside = least["step beside the writing"] / least["step"]
    print(f"a step takes {least['step']:.2f} s, and {beside:.2f} of that beside the writing")


def measure_comparing(config: ConfigDict) -> None:
    """In each of two processes; the first prints."""
    train_step, state, frozen = make_step(config)
    tree = {"frozen": frozen, "state": state}
    compare, layout = replicas.make_compare(tree), jax.tree.map(replicas.Layout, tree)
    seconds = Seconds()

    def tell() -> None:
        for _ in range(100):
            processes.at(1, processes.STEP)

    for _ in range(TURNS + 1):  # the first compiles
        state = seconds.of("step", partial(train_step, state))
        sums = seconds.of("compare", partial(compare, {"frozen": frozen, "state": state}))
        assert replicas.find_difference(layout, sums) is None
        seconds.of("agree", partial(multihost_utils.process_allgather, np.int32(0)))
        seconds.of("tell", tell)
    least = seconds.least()
    every, stop = config.hosts.compare_every, train.STEPS_BETWEEN_AGREEMENTS
    shares = {
        f"all copies, each {every} steps": least["compare"] / every,
        f"whether to stop, each {stop} steps": least["agree"] / stop,
        "where a process is, 6 times a step": least["tell"] / 100 * 6,
    }
    if jax.process_index() == 0:
        size = sum(x.nbytes for x in jax.tree.leaves(tree))
        print(f"a step {least['step']:.2f} s, one comparison of {human_size(size)} ", end="")
        print(f"{least['compare']:.3f} s, one agreement {1e3 * least['agree']:.1f} ms")
        for name, each in shares.items():
            print(f"  {name}: {each / least['step']:.3%} of a step")
        print(f"  together {sum(shares.values()) / least['step']:.2%}")


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
