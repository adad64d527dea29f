"""A program that runs one search again and again, killed at random moments, and by two processes.

    python tests/search/kills.py FOLDER SEED OVERRIDES KILLS FLAGS   # prints exit codes in JSON

FOLDER has space.py; OVERRIDES are fields in JSON, FLAGS those of the search. Each command runs in a
child of its own, forked before JAX has started any thread, so that its death is real and the
imports are paid once.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import runs

from vision_jax import figures, main
from vision_jax.tasks.classification import figures as predictions


def start(folder: Path, out: str) -> int:
    """Forks a child that searches; returns its number."""
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        fields, flags = json.loads(sys.argv[3]), sys.argv[5:]
        sys.argv = [
            *("main", "search", f"--config={runs.ROOT / 'configs/vit_lora.py'}"),
            *(f"--config.{name}={value}" for name, value in fields.items()),
            *(f"--space={folder / 'space.py'}", f"--workdir={folder / out}", "--trials=6"),
            *("--together=2", *flags),
        ]
        main.command()
    sys.exit()


def end(child: int) -> int:
    """Its exit code, as a shell gives it."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def search(folder: Path, out: str) -> int:
    return end(start(folder, out))


def kill(folder: Path, out: str, seconds: float) -> int:
    """Searches, for so long at most."""
    child = start(folder, out)
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    try:
        return end(child)
    finally:
        timer.cancel()


if __name__ == "__main__":
    folder, rng = Path(sys.argv[1]), np.random.default_rng(int(sys.argv[2]))
    for module in (figures, predictions):  # slow, and not what this is about
        module.save_figure = lambda figure, path: Path(path).touch()
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    results: dict[str, object] = {"whole": search(folder, "whole")}
    clock = time.monotonic()
    search(folder, "warm")  # with all programs in the cache
    usual = time.monotonic() - clock
    # Each goes on from where the last one was killed, until one ends: then another search begins.
    kills = ended = 0
    while kills < int(sys.argv[4]):
        code = kill(folder, f"killed{ended}", usual * rng.uniform(0.1, 0.9))
        kills += code == 128 + signal.SIGKILL
        ended += code == 0
        assert code in (0, 128 + signal.SIGKILL), code
    results |= {"kills": kills, "searches": ended + 1, "last": search(folder, f"killed{ended}")}
    results["two"] = [end(child) for child in [start(folder, "two"), start(folder, "two")]]
    results["seconds"] = usual
    print(json.dumps(results))
