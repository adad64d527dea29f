"""A program that runs one training command again and again, and has it die in many ways.

    python tests/crashes.py FOLDER OVERRIDES    # prints {name: [exit code, screen]}, all in JSON

Each command runs in a child of its own, forked before JAX has started any thread, so that its death
is real and the imports are paid once. Exit codes are the shell's: 128 + n for death by signal n.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import runs

from vision_jax import figures, main, steps, train
from vision_jax.checkpoints import Checkpoints
from vision_jax.run import workdirs
from vision_jax.tasks.classification import figures as predictions


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def before(owner: object, name: str, act: Callable[[], object], *, call: int = 1) -> None:
    """Makes `owner.name` call `act()` first, at its `call`-th call."""
    _patch(owner, name, act, call, first=True)


def after(owner: object, name: str, act: Callable[[], object], *, call: int = 1) -> None:
    """Makes `owner.name` call `act()` last."""
    _patch(owner, name, act, call, first=False)


def _patch(owner, name, act, call, first):
    original, calls = getattr(owner, name), []

    def patched(*arguments, **keywords):
        calls.append(None)
        if first and len(calls) == call:
            act()
        result = original(*arguments, **keywords)
        if not first and len(calls) == call:
            act()
        return result

    setattr(owner, name, patched)


def fill_disk() -> None:
    """No file may grow beyond 512 bytes from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))


def spoil_step() -> None:
    """The frozen parameters of the fifth step hold a NaN."""
    make = steps.make_train_step

    def make_spoiled(*arguments, **keywords):
        step, calls = make(*arguments, **keywords), []

        def spoiled(state, frozen, batch):
            calls.append(None)
            if len(calls) == 5:
                frozen = {**frozen, "norm/bias": frozen["norm/bias"] * jax.numpy.nan}
            return step(state, frozen, batch)

        return spoiled

    steps.make_train_step = make_spoiled


# Checkpoints are saved after steps 2, 3, 4 and 6. (name, workdir, what goes wrong)
SCENARIOS: tuple[tuple[str, str, Callable[[], object]], ...] = (
    ("uninterrupted", "whole", lambda: None),
    # One run that is killed wherever it hurts, each time a little later.
    ("writing frozen", "killed", lambda: after(ocp.StandardCheckpointer, "save", die)),
    ("before config", "killed", lambda: before(workdirs, "save_config", die)),
    ("before checkpoint", "killed", lambda: before(Checkpoints, "save", die)),
    ("writing checkpoint", "killed", lambda: after(ocp.CheckpointManager, "save", die)),
    ("mid-run", "killed", lambda: after(ocp.CheckpointManager, "save", die, call=3)),
    ("before results", "killed", lambda: before(train, "write_results", die)),
    ("after kills", "killed", lambda: None),
    # A disk that is full at the third checkpoint, and later is not.
    ("full disk", "full", lambda: before(ocp.CheckpointManager, "save", fill_disk, call=3)),
    ("after full disk", "full", lambda: None),
    # Signals: one asks, two kill.
    ("terminated", "stopped", lambda: before(Checkpoints, "save", lambda: die(signal.SIGTERM))),
    (
        "twice",
        "stopped",
        lambda: before(Checkpoints, "save", lambda: (die(signal.SIGINT), die(signal.SIGINT))),
    ),
    ("after signals", "stopped", lambda: None),
    ("not finite", "spoiled", spoil_step),
)


def run_child(folder: Path, workdir: str, spoil: Callable[[], object]) -> tuple[int, str]:
    """Forks, spoils, runs the command; returns its exit code and what it put on the screen."""
    reading, writing = os.pipe()  # a file would feel the full disk
    child = os.fork()
    if not child:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        spoil()
        fields = [f"--config.{name}={value}" for name, value in json.loads(sys.argv[2]).items()]
        config = f"--config={runs.ROOT / 'configs/vit_lora.py'}"
        sys.argv = ["main", config, f"--workdir={folder / workdir}", *fields]
        main.command()
        sys.exit()
    os.close(writing)
    with os.fdopen(reading) as screen:  # ends when the child does
        text = screen.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (status if status >= 0 else 128 - status), text


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for module in (figures, predictions):  # slow, and not what this is about
        module.save_figure = lambda figure, path: Path(path).touch()
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    results = {name: run_child(folder, workdir, spoil) for name, workdir, spoil in SCENARIOS}
    print(json.dumps(results))
