"""Outputs over a dataset: what is read of a batch at a time."""

from functools import partial

import jax
import numpy as np
import pytest

from vision_jax import sharding
from vision_jax.data.pipeline import DamageLog
from vision_jax.evaluation import make_run_batches

IMAGES = 27


def make_batches(source, *, batch_size, process_index, process_count, damage_log):
    """Rows of numbers, the last batch filled up."""
    del process_index, process_count, damage_log
    for first in range(0, len(source), batch_size):
        index = np.arange(first, first + batch_size, dtype=np.int32)
        there = index < len(source)
        image = source[np.minimum(index, len(source) - 1)]
        yield {"image": image, "index": np.where(there, index, -1), "mask": there}


def outputs_fn(scale, frozen, model_state, batch):
    """The batch is the second axis."""
    del frozen, model_state
    assert set(batch) <= {"image", "index", "mask"}
    return {"seen": scale * batch["image"][None]}


def read(outputs, rows, batch, *, asked):
    asked.append(rows.shape)
    return {**batch, "sum": outputs["seen"][0, rows].sum(1)}


@pytest.mark.parametrize("batch_size", [8, 24, 32])
def test_rows_are_read_as_many_at_a_time_as_there_are_devices(batch_size, rng):
    """Whatever the batch's size: memory at the images' own size does not grow with it."""
    source = rng.integers(-99, 99, (IMAGES, 5)).astype(np.float32)  # sums are exact
    mesh = sharding.make_mesh(-1, 1)
    asked: list[tuple[int, ...]] = []
    run = make_run_batches(
        outputs_fn, mesh, make_batches, batch_size=batch_size, read=partial(read, asked=asked)
    )
    found = list(run(source, DamageLog(), np.float32(3), {}, {}))
    devices = jax.device_count()
    assert asked == [(devices,)]  # traced once
    assert {len(one["mask"]) for one in found} == {devices}
    kept = np.concatenate([one["mask"] for one in found])
    index = np.concatenate([one["index"] for one in found])[kept]
    np.testing.assert_array_equal(index, np.arange(IMAGES))
    total = np.concatenate([one["sum"] for one in found])[kept]
    np.testing.assert_array_equal(total, 3 * source.sum(1))
