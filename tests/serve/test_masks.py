"""Masks are as large as the images that came, so few are in memory at once, however many wait."""

import dataclasses
import threading

import numpy as np
import pytest
import serving_runs

from vision_jax.serve.answers import Asked
from vision_jax.serve.batches import Batcher
from vision_jax.serve.body import Limits
from vision_jax.serve.metrics import Metrics
from vision_jax.serve.model import Servable, View

pytest.importorskip("starlette", reason="the extra serve")


@dataclasses.dataclass
class Counting:
    """Programs that note how many images they have seen."""

    rows: tuple = (1, 4)
    seen: int = 0

    def run(self, canvas, views):
        self.seen += len(views)
        return [{"label": np.zeros(view.size, np.uint8)} for view in views]


def test_few_masks_are_in_memory_at_once(rng):
    from vision_jax.serve.app import Parts

    most, asked, programs, go = 5, 16, Counting(), threading.Event()

    def look(picture):
        return View(0, np.zeros((1, 1, 3), np.uint8), (8, 8))

    def describe(found, size, asked):
        assert go.wait(60)
        return {"sum": int(found["label"].sum())}

    servable = Servable("pixels", ("a", "b"), 3, ((1, 1),), look, None, None, None)
    batcher = Batcher(lambda: programs, wait=0.0)
    parts = Parts(
        servable, describe, Asked(), batcher, Metrics(), Limits(seconds=60), 1, "x", masks=most
    )
    data, answers = serving_runs.photo(rng, 8, 8), []
    with serving_runs.running(parts) as port:
        serving_runs.wait_until(lambda: batcher.ready)
        clients = [
            threading.Thread(target=lambda: answers.append(serving_runs.predict(port, data)))
            for _ in range(asked)
        ]
        for client in clients:
            client.start()
        serving_runs.wait_until(lambda: programs.seen == most)
        threading.Event().wait(0.3)
        assert programs.seen == most
        assert not answers
        go.set()
        for client in clients:
            client.join(60)
    assert programs.seen == asked
    assert [status for status, _ in answers] == [200] * asked
