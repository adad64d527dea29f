"""The queue and its thread, with programs that only note what they are given."""

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import serving_runs

from vision_jax.serve.batches import Batcher, take
from vision_jax.serve.body import Refused
from vision_jax.serve.model import Programs, View


class Slow:
    """Programs that wait for `go`, and answer each view with its number."""

    def __init__(self, rows=(1, 4)):
        self.batches, self.go = [], threading.Event()
        self.programs = Programs(None, rows, self.run)

    def run(self, canvas, views):
        self.go.wait(60)
        self.batches.append((canvas, [view.size[0] for view in views]))
        if any(view.size[0] < 0 for view in views):
            raise ValueError("no such size")
        return [{"number": np.array(view.size[0])} for view in views]


def view(number, canvas=0):
    return View(canvas, np.zeros((1, 1, 3), np.uint8), (number, 1))


def start(slow, wait=0.0, **told):
    batcher = Batcher(lambda: slow.programs, wait=wait, **told)
    batcher.start()
    serving_runs.wait_until(lambda: batcher.ready)
    return batcher


def test_batches_fill_while_one_is_computed_and_the_oldest_canvas_comes_first():
    slow, counted = Slow(), []
    batcher = start(slow, on_batch=lambda *numbers: counted.append(numbers[:2]))
    first = batcher.submit(view(0))
    serving_runs.wait_until(lambda: batcher.waiting == 0)
    rest = [batcher.submit(view(number, canvas=int(number in (1, 4)))) for number in range(1, 9)]
    slow.go.set()
    assert [int(one.result(60)["number"]) for one in (first, *rest)] == list(range(9))
    batcher.close()
    assert slow.batches == [(0, [0]), (1, [1, 4]), (0, [2, 3, 5, 6]), (0, [7, 8])]
    assert counted == [(1, 1), (2, 4), (4, 4), (2, 4)]
    assert batcher.seconds_an_image > 0


def test_what_nobody_waits_for_is_not_computed():
    slow, dropped = Slow(), []
    batcher = start(slow, on_dropped=dropped.append)
    batcher.submit(view(0))
    serving_runs.wait_until(lambda: batcher.waiting == 0)
    some = [batcher.submit(view(number)) for number in (1, 2, 3)]
    assert batcher.waiting == 3
    assert some[1].cancel()
    assert (batcher.waiting, dropped) == (2, [1])  # while another batch is computed
    slow.go.set()
    assert [int(some[place].result(60)["number"]) for place in (0, 2)] == [1, 3]
    batcher.close()
    assert slow.batches == [(0, [0]), (0, [1, 3])]
    assert sum(dropped) == 1
    with pytest.raises(CancelledError):
        some[1].result()


def test_closing_answers_the_queue_and_refuses_more():
    slow = Slow()
    batcher = start(slow, wait=60.0)  # which closing does not wait for
    some = [batcher.submit(view(number)) for number in range(6)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    serving_runs.wait_until(lambda: not batcher.ready)
    with pytest.raises(Refused):
        batcher.submit(view(9))
    slow.go.set()
    closing.join(60)
    assert [int(one.result(0)["number"]) for one in some] == list(range(6))
    assert not batcher.alive


def test_a_failed_batch_fails_its_images_alone():
    slow = Slow()
    slow.go.set()
    batcher = start(slow)
    bad = batcher.submit(view(-1))
    with pytest.raises(ValueError, match="no such size"):
        bad.result(60)
    assert int(batcher.submit(view(5)).result(60)["number"]) == 5
    batcher.close()


def test_a_first_image_waits_for_others_no_longer_than_it_is_told():
    slow = Slow()
    slow.go.set()
    batcher = start(slow, wait=0.2)
    begin = time.monotonic()
    some = [batcher.submit(view(number)) for number in (0, 1)]
    for one in some:
        one.result(60)
    assert time.monotonic() - begin > 0.15
    assert slow.batches == [(0, [0, 1])]
    batcher.close()
    batcher = start(slow, wait=1000.0)  # for which a full one does not wait
    for one in [batcher.submit(view(number)) for number in range(4)]:
        one.result(60)
    batcher.close()


def test_what_fails_to_compile_ends_the_thread_and_says_so():
    ended = []

    def fail():
        raise RuntimeError("no memory")

    batcher = Batcher(fail, wait=0.0, on_end=ended.append)
    batcher.start()
    serving_runs.wait_until(lambda: ended)
    assert str(ended[0]) == "no memory"
    assert not batcher.ready
    with pytest.raises(Refused):
        batcher.submit(view(0))
    batcher.close()


def test_closing_while_it_compiles_ends_before_the_next_program_or_in_time():
    compiling, go, made, ended = threading.Event(), threading.Event(), [], []

    def compile_all():
        for number in range(3):
            batcher.check()
            made.append(number)
            compiling.set()
            go.wait(60)

    batcher = Batcher(compile_all, wait=0.0, on_end=ended.append)
    batcher.start()
    assert compiling.wait(60)
    begin = time.monotonic()
    batcher.close(0.1)
    assert time.monotonic() - begin < 30
    assert batcher.alive
    go.set()
    batcher.close(60)
    assert (batcher.alive, made, ended) == (False, [0], [None])


def test_rows_are_never_more_than_half_empty_but_in_the_smallest(rng):
    for _ in range(200):
        rows = sorted({int(size) for size in rng.integers(1, 40, rng.integers(1, 5))})
        waiting = int(rng.integers(1, 100))
        taken = take(waiting, rows)
        size = next(size for size in rows if size >= taken)
        assert 0 < taken <= waiting
        assert size == rows[0] or 2 * taken >= size
        assert taken == waiting or taken in rows
