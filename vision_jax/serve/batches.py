"""The queue of images, and the one thread that takes batches out of it and runs programs.

A batch holds images of one canvas. The canvas whose first image has waited longest comes first. The
thread waits a few milliseconds for more images only while fewer wait than the largest batch has
rows; under load it never does, for the next batch gathers while the last one is computed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

from vision_jax.serve.body import Refused
from vision_jax.serve.model import Found, Programs, View

SMOOTHING = 0.1  # of the mean time of an image


@dataclass(eq=False)  # arrays have no one answer to ==
class Waiting:
    """An image in the queue."""

    view: View
    since: float  # of time.monotonic
    future: "Future[Found]"


class Batcher:
    """Answers views in batches.

    The queue itself has no bound: whoever submits holds a seat (app.Room), and seats are bounded.
    """

    def __init__(
        self,
        compile_all: Callable[[], Programs],
        *,
        wait: float,
        on_batch: Callable[[int, int, float], None] = lambda images, rows, seconds: None,
        on_dropped: Callable[[int], None] = lambda images: None,
        on_end: Callable[[BaseException | None], None] = lambda error: None,
    ):
        """Nothing runs before `start`.

        Args:
          compile_all: makes the programs, in the thread that runs them; it calls `check` between.
          wait: seconds that the first image of a batch waits for others.
          on_batch: told (images, rows of the program, seconds) after each batch.
          on_dropped: told how many images nobody waited for any more.
          on_end: told when the thread ends, with the error if it was one.
        """
        self._compile_all, self._wait = compile_all, wait
        self._on_batch, self._on_dropped, self._on_end = on_batch, on_dropped, on_end
        self._queues: dict[int, deque[Waiting]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._ready = threading.Event()
        self._seconds_an_image = 0.0
        self._thread = threading.Thread(target=self._live, name="programs", daemon=True)

    def start(self) -> None:
        """Begins to compile."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether all is compiled, and the thread lives and takes images."""
        return self._ready.is_set() and self.alive and not self._closing

    @property
    def alive(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        with self._changed:
            return sum(map(len, self._queues.values()))

    @property
    def seconds_an_image(self) -> float:
        """A moving mean of what an image takes in the thread; 0 before the first."""
        return self._seconds_an_image

    def submit(self, view: View, future: "Future[Found] | None" = None) -> "Future[Found]":
        """Puts a view into the queue; its answer comes into the future, `future` if it is given.

        If that is cancelled in time, the view is not computed.

        Raises:
          Refused: after `close`, or when the thread has ended.
        """
        one = Waiting(view, time.monotonic(), Future() if future is None else future)
        with self._changed:
            if self._closing or not self.alive:
                raise _stopped()
            self._queues.setdefault(view.canvas, deque()).append(one)
            self._changed.notify()
        one.future.add_done_callback(lambda future: self._drop(one) if future.cancelled() else None)
        return one.future

    def _drop(self, one: Waiting) -> None:
        """At once, with its pixels, and not when the batch that is computed has ended."""
        with self._changed:
            queue = self._queues.get(one.view.canvas, ())
            if one in queue:
                self._queues[one.view.canvas].remove(one)
        self._on_dropped(1)

    def check(self) -> None:
        """For what compiles, between programs. Raises CancelledError after `close`."""
        if self._closing:
            raise CancelledError

    def close(self, seconds: float | None = None) -> None:
        """Answers what is in the queue, then ends the thread; waits for that.

        While it compiles, for `seconds` at most: nothing ends a program that is being compiled.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(None if self._ready.is_set() else seconds)

    def _live(self) -> None:
        error: BaseException | None = None
        try:
            programs = self._compile_all()
            self._ready.set()
            while batch := self._next(programs.rows):
                self._answer(programs, batch)
        except CancelledError:  # of `check`
            pass
        except BaseException as raised:
            error = raised
        finally:
            with self._changed:
                self._closing = True
                left = [one for queue in self._queues.values() for one in queue]
                self._queues.clear()
            for one in left:
                if one.future.set_running_or_notify_cancel():
                    one.future.set_exception(_stopped())
            self._on_end(error)

    def _next(self, rows: Sequence[int]) -> list[Waiting]:
        """The next batch, waited for; empty at the end."""
        most = rows[-1]
        with self._changed:
            while True:
                first = min(
                    (queue for queue in self._queues.values() if queue),
                    key=lambda queue: queue[0].since,
                    default=None,
                )
                if first is None:
                    if self._closing:
                        return []
                    self._changed.wait()
                    continue
                left = first[0].since + self._wait - time.monotonic()
                if len(first) >= most or left <= 0 or self._closing:
                    return [first.popleft() for _ in range(take(len(first), rows))]
                self._changed.wait(left)

    def _answer(self, programs: Programs, batch: Sequence[Waiting]) -> None:
        wanted = [one for one in batch if one.future.set_running_or_notify_cancel()]
        if not wanted:
            return
        begin = time.monotonic()
        try:
            found = programs.run(wanted[0].view.canvas, [one.view for one in wanted])
        except Exception as error:
            for one in wanted:
                one.future.set_exception(error)
            return
        seconds = time.monotonic() - begin
        for one, answer in zip(wanted, found, strict=True):
            one.future.set_result(answer)
        share = seconds / len(wanted)
        last = self._seconds_an_image or share
        self._seconds_an_image = last + SMOOTHING * (share - last)
        filled = next(size for size in programs.rows if size >= len(wanted))
        self._on_batch(len(wanted), filled, seconds)


def take(waiting: int, rows: Sequence[int]) -> int:
    """How many of the images that wait come into the next batch.

    All that fit, unless more than half of the rows would be empty: then as many as fill the next
    smaller program.

    Examples:
      >>> [take(count, (1, 4, 16)) for count in (1, 2, 3, 5, 7, 8, 16, 40)]
      [1, 2, 3, 4, 4, 8, 16, 16]

    Args:
      waiting: images, at least 1.
      rows: sizes of batches, growing.
    """
    smaller = 0
    for size in rows:
        if waiting <= size:
            return waiting if 2 * waiting >= size or not smaller else smaller
        smaller = size
    return smaller


def _stopped() -> Refused:
    return Refused(503, "the server stops: try again", 1)
