"""Orders in which classes come in other shares than they have: counts, seeds, resumption, hosts."""

import collections
import pickle

import grain
import numpy as np
import pytest

from vision_jax.data import order
from vision_jax.data.order import BalancedOrder, OwnRows
from vision_jax.data.pipeline import make_train_iterator
from vision_jax.data.sources import ArrayReader, Source
from vision_jax.data.transforms import Preprocessing

SIZES = (200, 40, 7, 1, 0, 12)  # of classes; one has no images


def draw_labels(rng):
    return rng.permutation(np.repeat(np.arange(len(SIZES), dtype=np.int32), SIZES))


def shares(balance):
    """By hand: n^(1 - balance) over all classes that have images."""
    weights = [n ** (1 - balance) if n else 0 for n in SIZES]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("balance", [0.3, 0.5, 1.0])
def test_classes_have_their_shares_and_images_of_one_come_equally_often(balance, by_blocks, rng):
    labels = draw_labels(rng)
    count, seed = len(labels), int(rng.integers(2**32))
    blocks = (np.arange(count) // 13, np.full(count // 13 + 1, 10)) if by_blocks else None
    own = BalancedOrder(labels, balance, seed, blocks)
    expected = count * np.array(shares(balance))
    by_class, by_image = np.zeros(len(SIZES)), np.zeros(count)
    epochs = 200
    for epoch in range(epochs):
        rows = own.order(epoch)
        assert len(rows) == count
        drawn = np.bincount(labels[rows], minlength=len(SIZES))
        assert (np.abs(drawn - expected) < 1 + 1e-6).all()
        times = np.bincount(rows, minlength=count)
        for label in range(len(SIZES)):
            assert not SIZES[label] or np.ptp(times[labels == label]) <= 1
        by_class, by_image = by_class + drawn, by_image + times
    # A count is a Bernoulli draw beside a whole number: its mean deviates by 0.5/sqrt(E) at most.
    assert np.abs(by_class / epochs - expected).max() < 5 * 0.5 / epochs**0.5
    for label, n in enumerate(SIZES):
        if n:  # over epochs no image of a class comes more often
            mean = by_image[labels == label] / epochs
            assert np.abs(mean - expected[label] / n).max() < 6 * 0.5 / epochs**0.5 + 1 / n / epochs


def test_an_order_is_a_function_of_seed_and_epoch(rng):
    labels, seed = draw_labels(rng), int(rng.integers(2**32))
    count, own = len(labels), BalancedOrder(labels, 1.0, seed)
    rows = [own(place, 0) for place in range(2 * count)]
    assert rows[:count] == own.order(0).tolist()
    assert rows[:count] != rows[count:]
    again = pickle.loads(pickle.dumps(own))
    assert [again(place, 0) for place in (count + 3, 3)] == [rows[count + 3], rows[3]]
    assert BalancedOrder(labels, 1.0, seed ^ 1).order(0).tolist() != rows[:count]
    seen = labels[rows[:count]]  # mixed: any part has all classes as the whole has
    half = np.bincount(seen[: count // 2], minlength=len(SIZES))
    assert np.abs(half - np.bincount(seen, minlength=len(SIZES)) / 2).max() < 6 * count**0.5 / 2


def test_what_is_read_by_blocks_stays_in_its_window(monkeypatch, rng):
    monkeypatch.setattr(order, "WINDOW_BYTES", 40)  # four blocks
    labels = draw_labels(rng)
    block = np.arange(len(labels)) // 13
    own = BalancedOrder(labels, 1.0, int(rng.integers(2**32)), (block, np.full(block[-1] + 1, 10)))
    seen = block[own.order(0)]
    first = [np.flatnonzero(seen == b)[[0, -1]] for b in np.unique(seen)]
    open_at_once = [sum(a <= place <= b for a, b in first) for place in range(len(seen))]
    assert max(open_at_once) <= 5


@pytest.mark.parametrize("processes", [1, 2])
def test_any_batch_can_be_the_first_and_processes_share_one_order(processes, rng):
    labels = draw_labels(rng)
    images = rng.integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
    names = tuple(f"class {n}" for n in range(len(SIZES)))
    source = Source("random", names, labels, np.arange(len(labels)), ArrayReader("random", images))
    seed = int(rng.integers(2**32))

    def take(count, **changes):
        iterator = make_train_iterator(
            source,
            preprocessing=Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear", "squash"),
            **{"crop": "none", "flip": True, "seed": seed, "num_threads": 2, "max_damaged": 0.0},
            **{"batch_size": 10, "balance": 1.0, **changes},
        )
        return [next(iterator) for _ in range(count)]

    whole = take(60)  # over the end of the second epoch
    assert all(
        np.array_equal(a["image"], b["image"])
        for a, b in zip(whole[41:], take(19, first_batch=41), strict=True)
    )
    parts = [
        take(60, batch_size=10 // processes, process_index=n, process_count=processes)
        for n in range(processes)
    ]
    for n, batch in enumerate(whole):
        own = np.concatenate([part[n]["index"] for part in parts])
        assert own.tolist() == batch["index"].tolist()
    rows = np.concatenate([batch["label"] for batch in whole])[: 2 * len(labels)]
    drawn = collections.Counter(rows.tolist())
    expected = 2 * len(labels) / (len(SIZES) - 1)
    assert all(abs(drawn[label] - expected) <= 2 for label, n in enumerate(SIZES) if n)


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_rows_of_processes_make_up_the_global_batches(processes):
    rows = grain.MapDataset.range(24)
    parts = [OwnRows(rows, 6 // processes, n, processes) for n in range(processes)]
    assert {len(part) for part in parts} == {24 // processes}
    size = 6 // processes
    for batch in range(4):
        dealt = [part[batch * size + row] for part in parts for row in range(size)]
        assert dealt == list(range(6 * batch, 6 * batch + 6))
    endless = OwnRows(rows.repeat(), 4, 1, 2)
    assert [endless[n] for n in range(12, 14)] == [4, 5]  # example 28 is the second epoch's 4th
    assert list(endless[3:5]) == [7, 12]
