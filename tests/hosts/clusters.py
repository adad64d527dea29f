"""Clusters on the loopback: several processes of a run, each started as a person would."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import runs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """Processes 0 to N - 1, each with its supervisor, in sessions of their own."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        devices: int = 1,
        before: Sequence[Sequence[str]] = (),
        environment: dict[str, str] | None = None,
    ):
        """Starts them: `commands` are Python's arguments, `before` stands before Python."""
        # Closed at __exit__.
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2 * len(commands))]  # noqa: SIM115
        self.children = [
            subprocess.Popen(
                [*(before[n] if before else ()), sys.executable, *map(str, command)],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join((str(runs.ROOT), str(runs.ROOT / "tests"))),
                    "XLA_FLAGS": runs.xla_flags(devices),
                    **(environment or {}),
                },
                stdout=self._files[2 * n],
                stderr=self._files[2 * n + 1],
                start_new_session=True,
            )
            for n, command in enumerate(commands)
        ]
        self._sessions = {child.pid for child in self.children}

    def wait(self, seconds: float, but: Sequence[int] = ()) -> list[int | None]:
        """Exit codes, once all but these have ended; None for one that lives."""
        end = time.monotonic() + seconds
        watched = [child for n, child in enumerate(self.children) if n not in but]
        while time.monotonic() < end and any(child.poll() is None for child in watched):
            time.sleep(0.05)
        return [child.poll() for child in self.children]

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Until the condition holds, while nobody has ended."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.screens()
            assert all(child.poll() is None for child in self.children), self.screens()
            time.sleep(0.05)

    def screen(self, n: int) -> tuple[str, str]:
        """(stdout, stderr) of a process so far."""
        found = []
        for file in self._files[2 * n : 2 * n + 2]:
            with open(f"/proc/self/fd/{file.fileno()}") as again:
                found.append(again.read())
        return found[0], found[1]

    def screens(self) -> list[tuple[str, str]]:
        return [self.screen(n) for n in range(len(self.children))]

    def errors(self, n: int) -> list[str]:
        """Lines that a process ends with."""
        return [line for line in self.screen(n)[1].splitlines() if line.startswith("error: ")]

    def living(self) -> list[int]:
        """Processes of these sessions that have not ended, whoever started them."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_bytes().rsplit(b")", 1)[1].split()
                if int(fields[3]) in self._sessions and fields[0] != b"Z":
                    found.append(int(entry.name))
        return found

    def workers(self, n: int) -> list[int]:
        """Processes that a supervisor has forked."""
        child = self.children[n].pid
        tasks = Path(f"/proc/{child}/task/{child}/children").read_text().split()
        return [int(pid) for pid in tasks]

    def no_orphans(self, seconds: float = 5) -> bool:
        end = time.monotonic() + seconds
        while self.living() and time.monotonic() < end:
            time.sleep(0.05)
        return not self.living()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in self.children:
            child.wait()
        for file in self._files:
            file.close()


def flags(process: int, processes: int, port: int, host: str = "127.0.0.1") -> list[str]:
    return [
        f"--coordinator={host}:{port}",
        f"--processes={processes}",
        f"--process={process}",
    ]
