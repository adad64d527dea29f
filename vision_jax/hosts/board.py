"""What a process and its supervisor tell each other: a page of memory that both see.

The process writes where it is, that it lives, and why it ends. Nothing waits for the other side, so
a process that hangs in C++ or was stopped keeps nobody from noticing.

    worker:      board.at(step, phase) ... board.say(text, kind)
    supervisor:  board.read() -> Place; board.let_go(address)
"""

import math
import mmap
import struct
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

# Where a process is in a step. In their order, of which `judge` asks who is behind.
START, DATA, READY, COMPILE, STEP, WAIT, COMPARE, EVALUATE, SAVE, RESULTS = range(10)
WORDS = (
    "before its first step",
    "reading data",
    "waiting for the step before",
    "compiling",
    "computing",
    "waiting for its devices",
    "comparing its arrays with the others'",
    "evaluating",
    "saving",
    "writing results",
)
# Phases that take as long as those before them, or nearly so.
QUICK = (DATA, READY, STEP, WAIT, COMPARE)

# Why a process ends.
NOTHING, BAD_INPUT, UNFORESEEN, STOPPED = range(4)

SECONDS_BETWEEN_BEATS = 0.5
STEPS = 9  # that count for what is usual
PATIENCE = 40.0  # seconds; config.hosts.patience by default
_HEAD = struct.Struct("=QqBdddBI")  # beats, step, phase, since, usual, patience, kind, length
_SUM = struct.Struct("=I")  # of the head: a read that meets a write is read again
_BEGIN = _HEAD.size + _SUM.size  # of the text
_ADDRESS = 3072  # where the supervisor writes
_SIZE = 4096
_TEXT = _ADDRESS - _BEGIN
_TRIES = 100


@dataclass(frozen=True)
class Place:
    """What a board says.

    Attributes:
      beats: how often the process has said that it lives.
      step: the update that it works at, counted from 1; 0 before the first.
      phase: of it.
      since: when that began, by time.monotonic().
      usual: seconds that a step takes, the median of the last ones; 0 before one was seen.
      patience: seconds that others wait for it.
      kind: of its end.
      text: its reason, "" for none.
    """

    beats: int
    step: int
    phase: int
    since: float
    usual: float
    patience: float
    kind: int
    text: str


class Board:
    """The page, made before the process is forked."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, _SIZE)  # shared with children
        self._head: list[Any] = [0, 0, START, time.monotonic(), 0.0, PATIENCE, NOTHING, 0]
        self._busy = 0.0  # seconds of this step so far, saving and evaluating left out
        self._steps: deque[float] = deque(maxlen=STEPS)  # seconds of the last ones
        self._lock = threading.Lock()
        self._write()
        self._last = Place(0, 0, START, time.monotonic(), 0.0, PATIENCE, NOTHING, "")

    def _write(self) -> None:
        head = _HEAD.pack(*self._head)
        self._page[:_BEGIN] = head + _SUM.pack(zlib.crc32(head))

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
            if head[2] in QUICK:
                self._busy += now - head[3]
            elif head[2] in (START, COMPILE):  # such a step is no measure of the others
                self._busy = math.inf
            if phase == WAIT:
                if self._busy < math.inf:
                    self._steps.append(self._busy)
                    head[4] = median(self._steps)
                self._busy = 0.0
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
                self._page[_BEGIN : _BEGIN + len(encoded)] = encoded
                self._head[6:] = kind, len(encoded)
                self._write()

    def wait_for_address(self) -> str:
        """Where JAX's processes meet, once the supervisor knows it."""
        while not (length := self._page[_ADDRESS]):
            time.sleep(0.02)
        return self._page[_ADDRESS + 1 : _ADDRESS + 1 + length].decode()

    # The supervisor's side.

    def read(self) -> Place:
        """What the process has written last; the last whole one, if it stopped in a write."""
        for _ in range(_TRIES):
            if (found := self._parse(self._page[:_BEGIN])) is not None:
                self._last = found
                break
        return self._last

    def _parse(self, content: bytes) -> Place | None:
        head = content[: _HEAD.size]
        if _SUM.pack(zlib.crc32(head)) != content[_HEAD.size :]:
            return None
        beats, step, phase, since, usual, patience, kind, length = _HEAD.unpack(head)
        text = self._page[_BEGIN : _BEGIN + length].decode("utf-8", "replace")
        return Place(beats, step, phase, since, usual, patience, kind, text)

    def let_go(self, address: str) -> None:
        """Tells the process where to meet the others."""
        encoded = address.encode()
        self._page[_ADDRESS + 1 : _ADDRESS + 1 + len(encoded)] = encoded
        self._page[_ADDRESS] = len(encoded)
