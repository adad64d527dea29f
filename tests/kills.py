"""A program that kills a training command at random moments, again and again, until it is trained.

    python tests/kills.py FOLDER CONFIG OVERRIDES PROCESSES KILLS SEED

FOLDER/whole is a run that nobody kills. FOLDER/killed_0 is killed and run again until it ends; then
FOLDER/killed_1, until there were so many KILLS. Of a run of two processes one is killed, or its
supervisor, or all at once, as when a machine loses its power. Prints JSON: {"starts": [folder, exit
codes, what was killed, when, who outlived it], "screen": what the last ones said}.

Each process is forked from here, before JAX has started any thread, so that its imports are paid
once; it has a session and a folder for temporary files of its own.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax

sys.path.append(str(Path(__file__).parent / "hosts"))

from clusters import flags, free_port

from vision_jax import figures, machine, main, train

assert train  # imported once, for all that are forked

PATIENCE = 300.0  # seconds that a start may take
LEAVE = 10.0  # seconds for what has lost its parent


class Start:
    """One start of a command, as one or two processes."""

    def __init__(self, folder: Path, name: str, config: str, fields: list[str], processes: int):
        self.screen, self.temporary = folder / f"{name}.txt", folder / f"{name}.tmp"
        self.temporary.mkdir(exist_ok=True)
        self.screen.unlink(missing_ok=True)
        port = free_port()
        self.began = time.monotonic()
        self.codes: dict[int, int] = {}
        self.leaders = [
            self._fork(
                [
                    *(f"--config={config}", f"--workdir={folder / name}", *fields),
                    *(flags(number, processes, port) if processes > 1 else ()),
                ]
            )
            for number in range(processes)
        ]

    def _fork(self, arguments: list[str]) -> int:
        if child := os.fork():
            return child
        os.setsid()
        screen = os.open(self.screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(screen, 1)
        os.dup2(screen, 2)
        os.environ["TMPDIR"], tempfile.tempdir = str(self.temporary), None
        sys.argv = ["main", *arguments]
        main.command()
        sys.stdout.flush()
        os._exit(0)

    def ended(self) -> bool:
        for pid in set(self.leaders) - self.codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - self.began > PATIENCE:
            for pid in self.living():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise TimeoutError(self.screen.read_text())
        return len(self.codes) == len(self.leaders)

    def living(self) -> dict[int, int]:
        """{process: its parent}, of these sessions."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = (entry / "stat").read_bytes().rsplit(b")", 1)[1].split()
                if int(stat[3]) in self.leaders and stat[0] != b"Z":
                    found[int(entry.name)] = int(stat[1])
        return found

    def kill(self, draw: random.Random) -> str:
        """Kills something of it; returns what."""
        here, number = self.living(), draw.randrange(len(self.leaders))
        what = draw.choice(("process", "supervisor", "all")) if len(self.leaders) > 1 else "all"
        victims = {
            "all": list(here),
            "supervisor": [self.leaders[number]],
            "process": [pid for pid, parent in here.items() if parent == self.leaders[number]],
        }[what]
        for pid in victims or self.leaders:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return what if what == "all" else f"{what} {number}"

    def orphans(self) -> int:
        end = time.monotonic() + LEAVE
        while (here := self.living()) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in here:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(here)


def saved(workdir: Path) -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(workdir / "checkpoints"))
    return set()


def run(
    folder: Path, name: str, arguments: tuple, usual: float, draw: random.Random | None
) -> list:
    """One start, killed if there is a `draw`.

    Half of the moments are counted from the start, half from when something is saved.
    """
    before = saved(folder / name)
    start = Start(folder, name, *arguments)
    moment, what, at = start.began, "", 0.0
    if draw is not None:
        if draw.random() < 0.5:
            moment += draw.random() * usual
        else:
            while not start.ended() and saved(folder / name) == before:
                time.sleep(0.001)
            moment = time.monotonic() + draw.random() * 0.3
        while not start.ended() and time.monotonic() < moment:
            time.sleep(0.001)
        if not start.codes:
            what, at = start.kill(draw), time.monotonic() - start.began
    while not start.ended():
        time.sleep(0.01)
    codes = [start.codes[pid] for pid in start.leaders]
    what = what if any(codes) else ""  # else it had ended by then
    return [name, codes, what, round(at, 2), start.orphans()]


def command() -> None:
    folder, config, overrides = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    processes, kills, seed = map(int, sys.argv[4:])
    fields = [f"--config.{name}={value}" for name, value in overrides.items()]
    draw, arguments = random.Random(seed), (config, fields, processes)
    jax.config.update("jax_compilation_cache_dir", None)  # but in FOLDER, as a user's
    machine.CACHED_SECONDS = 0.0
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    for name in ("coco_figures", *(f"{t}.figures" for t in ("classification", "segmentation"))):
        importlib.import_module(f"vision_jax.tasks.{name}")
    save = figures.save_figure
    for module in [*sys.modules.values()]:  # figures are slow, and not what this is about
        if vars(module).get("save_figure") is save:
            vars(module)["save_figure"] = lambda figure, path: Path(path).touch()
    starts = [run(folder, "compiled", arguments, 0.0, None)]
    began = time.monotonic()
    starts.append(run(folder, "whole", arguments, 0.0, None))
    usual, number, killed = time.monotonic() - began, 0, 0
    while killed < kills or starts[-1][2]:
        name = f"killed_{number}"
        starts.append(run(folder, name, arguments, usual, draw if killed < kills else None))
        killed += bool(starts[-1][2])
        if not starts[-1][2]:  # it came through
            if any(starts[-1][1]):
                break
            number += 1
    screen = (folder / f"{starts[-1][0]}.txt").read_text()
    print(json.dumps({"starts": starts, "screen": screen}))


if __name__ == "__main__":
    command()
