"""What a process and its supervisor tell each other: a page of memory that both see.

The process writes where it is, that it lives, and why it ends. Nothing waits for the other side, so
a process that hangs in C++ or was stopped keeps nobody from noticing.

    worker:      board.at(step, phase) ... board.say(text, kind)
    supervisor:  board.read() -> Place; board.let_go(address)
"""

import mmap
import struct
import threading
import time
from dataclasses import dataclass
from typing import Any

# Where a process is in a step. In their order, of which `judge` asks who is behind.
START, DATA, COMPILE, STEP, WAIT, EVALUATE, SAVE, RESULTS = range(8)
WORDS = (
    "before its first step",
    "reading data",
    "compiling",
    "computing",
    "waiting for its devices",
    "evaluating",
    "saving",
    "writing results",
)
QUICK = (DATA, STEP, WAIT)  # phases that take as long as those before them, or nearly so

# Why a process ends.
NOTHING, BAD_INPUT, UNFORESEEN = range(3)

SECONDS_BETWEEN_BEATS = 0.5
PATIENCE = 40.0  # seconds; config.hosts.patience by default
_HEAD = struct.Struct("=QqBdddBI")  # beats, step, phase, since, longest, patience, kind, length
_ADDRESS = 3072  # where the supervisor writes
_SIZE = 4096
_TEXT = _ADDRESS - _HEAD.size


@dataclass(frozen=True)
class Place:
    """What a board says.

    Attributes:
      beats: how often the process has said that it lives.
      step: the update that it works at, counted from 1; 0 before the first.
      phase: of it.
      since: when that began, by time.monotonic().
      longest: seconds that a quick phase has taken so far.
      patience: seconds that others wait for it.
      kind: of its end.
      text: its reason, "" for none.
    """

    beats: int
    step: int
    phase: int
    since: float
    longest: float
    patience: float
    kind: int
    text: str


class Board:
    """The page, made before the process is forked."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, _SIZE)  # shared with children
        self._head: list[Any] = [0, 0, START, time.monotonic(), 0.0, PATIENCE, NOTHING, 0]
        self._lock = threading.Lock()
        self._write()

    def _write(self) -> None:
        _HEAD.pack_into(self._page, 0, *self._head)

    # The process's side.

    def start_beating(self) -> None:
        """Says from a thread that this process lives, until it ends."""

        def beat() -> None:
            while True:
                with self._lock:
                    self._head[0] += 1
                    self._write()
                time.sleep(SECONDS_BETWEEN_BEATS)

        threading.Thread(target=beat, name="beats", daemon=True).start()

    def at(self, step: int, phase: int) -> None:
        """Says where this process is; 2 µs."""
        with self._lock:
            now, head = time.monotonic(), self._head
            if head[2] in (*QUICK, COMPILE) and head[1]:
                head[4] = max(head[4], now - head[3])
            head[1:4] = step, phase, now
            self._write()

    def have_patience(self, seconds: float) -> None:
        """How long others wait for this process."""
        with self._lock:
            self._head[5] = seconds
            self._write()

    def say(self, text: str, kind: int) -> None:
        """The reason of this process's end; the first one counts."""
        encoded = text.encode("utf-8", "backslashreplace")[:_TEXT]
        with self._lock:
            if self._head[6] == NOTHING:
                self._page[_HEAD.size : _HEAD.size + len(encoded)] = encoded
                self._head[6:] = kind, len(encoded)
                self._write()

    def wait_for_address(self) -> str:
        """Where JAX's processes meet, once the supervisor knows it."""
        while not (length := self._page[_ADDRESS]):
            time.sleep(0.02)
        return self._page[_ADDRESS + 1 : _ADDRESS + 1 + length].decode()

    # The supervisor's side.

    def read(self) -> Place:
        """What the process has written last."""
        beats, step, phase, since, longest, patience, kind, length = _HEAD.unpack_from(self._page)
        text = self._page[_HEAD.size : _HEAD.size + length].decode("utf-8", "replace")
        return Place(beats, step, phase, since, longest, patience, kind, text)

    def let_go(self, address: str) -> None:
        """Tells the process where to meet the others."""
        encoded = address.encode()
        self._page[_ADDRESS + 1 : _ADDRESS + 1 + len(encoded)] = encoded
        self._page[_ADDRESS] = len(encoded)
