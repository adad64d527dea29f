"""A process that was forked, seen from its supervisor: whether it lives, and what it prints.

Lines go through as they come. Those that may be the consequence of another process's end wait until
it is known whose end it was.
"""

import contextlib
import os
import re
import selectors
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable

from vision_jax.hosts.board import NOTHING, UNFORESEEN, Board
from vision_jax.hosts.judge import Report

LONGEST_LINE = 65_536  # bytes that wait for their end
HELD = (
    10.0  # seconds that a process's last words may be held back, until it is known whose they are
)
MOST_HELD = 2**20  # bytes
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What JAX's C++ says when another process has gone; a stack follows.
_OF_CPP = re.compile(
    rb"^(F\d{4} |E\d{4} .*(coordination|Polled)|\*\*\* Check failure|terminate called)"
)


class Worker:
    """A process that was forked, seen from its supervisor."""

    def __init__(self, number: int, prefixed: bool):
        self.number, self.prefixed = number, prefixed
        self.board = Board()
        self.pid = 0
        self.code: int | None = None
        self._beats, self._beaten = 0, time.monotonic()
        self._seconds = 0.0  # of CPU, when it was last looked at
        self._failed_at = 0.0
        self._relays: list[Relay] = []

    def fork(self) -> bool:
        """Whether this is the new process."""
        pipes = [os.pipe() for _ in range(2 if self.prefixed else 1)]
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX may be imported; it has no threads yet
            self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)  # a terminal's Ctrl-C comes once, from the supervisor
            _die_with(parent)
            for descriptor, (reading, writing) in zip((2, 1), pipes, strict=False):
                os.dup2(writing, descriptor)
                os.close(reading)
                os.close(writing)
            for number in FORWARDED:
                usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, usual)
            self.board.start_beating()
            return True
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)
        prefix = f"[{self.number}] ".encode() if self.prefixed else b""
        for stream, (reading, writing) in zip((sys.stderr, sys.stdout), pipes, strict=False):
            os.close(writing)
            held = self._holds if stream is sys.stderr else None
            self._relays.append(Relay(reading, stream.fileno(), prefix, held))
        return False

    def forget(self) -> None:
        """In a sibling: what is not its own is closed."""
        for relay in self._relays:
            relay.forget()

    def _holds(self) -> bool:
        """Whether what it prints is about its end, and may be another's."""
        return self.board.read().kind == UNFORESEEN

    def report(self, host: str) -> Report:
        """What is known of it now."""
        now, at = time.monotonic(), self.board.read()
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        state, seconds = "", self._seconds
        if at.beats != self._beats:
            self._beats, self._beaten = at.beats, now
        elif now - self._beaten > 2 and self.code is None:
            state, seconds = _look(self.pid)
            if seconds > self._seconds and state != "T":  # one long call holds Python's lock
                self._beaten = now
        self._seconds = seconds
        if not self._failed_at and (self.code is not None or at.kind != NOTHING):
            self._failed_at = now
        return Report(
            host=host,
            still=now - self._beaten,
            state=state,
            step=at.step,
            phase=at.phase,
            age=now - at.since,
            usual=at.usual,
            patience=at.patience,
            kind=at.kind,
            text=at.text,
            code=self.code,
            ended=now - self._failed_at if self._failed_at else 0.0,
        )

    def signal(self, number: int) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self, show: bool) -> None:
        """Relays the last of its output; what was held back only if it is to be shown."""
        for relay in self._relays:
            relay.close(show)


class Relay:
    """Copies a pipe to a descriptor in a thread, whole lines; holds back what may be another's."""

    def __init__(self, reading: int, to: int, prefix: bytes, held: Callable[[], bool] | None):
        self._reading, self._to, self._prefix, self._asks = reading, to, prefix, held
        self._held: list[bytes] = []
        self._since = 0.0  # when the first of them came
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def forget(self) -> None:
        os.close(self._reading)

    def _copy(self) -> None:
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._reading, selectors.EVENT_READ)
            while True:
                if not selector.select(1.0):
                    self._release()
                    continue
                if not (piece := os.read(self._reading, 65_536)):
                    break
                *lines, rest = (rest + piece).split(b"\n")
                if len(rest) > LONGEST_LINE:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._line(line + b"\n")
        if rest:
            self._line(rest)

    def _line(self, line: bytes) -> None:
        self._release()
        if self._asks and (self._held or self._asks() or _OF_CPP.match(line)):
            self._since = self._since if self._held else time.monotonic()
            self._held.append(line)
        else:
            write(self._to, self._prefix + line)

    def _release(self) -> None:
        """Shows what was held back of a process that goes on all the same."""
        if not self._held or self._asks is None:
            return
        goes_on = time.monotonic() - self._since > HELD and not self._asks()
        if goes_on or sum(map(len, self._held)) > MOST_HELD:
            self._show()

    def _show(self) -> None:
        for line in self._held:
            write(self._to, self._prefix + line)
        self._held = []

    def close(self, show: bool) -> None:
        if self._thread is not None:
            self._thread.join(2)
        if show:
            self._show()


def write(descriptor: int, content: bytes) -> None:
    with contextlib.suppress(OSError):
        while content:
            content = content[os.write(descriptor, content) :]


def _die_with(parent: int) -> None:
    """Ends this process when its supervisor does, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def _look(pid: int) -> tuple[str, float]:
    """(the kernel's letter for it, "T" for stopped; its seconds of CPU); ("", 0) but on Linux."""
    with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{pid}/stat", "rb") as f:
        fields = f.read().rsplit(b")", 1)[1].split()
        return fields[0].decode(), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return "", 0.0
