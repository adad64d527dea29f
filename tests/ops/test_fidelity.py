"""Distances between sets of features, against scipy's matrix root and plain loops."""

import numpy as np
import pytest
import scipy.linalg

from vision_jax.ops import fidelity


def sets(rng, made=60, real=80, width=7):
    mix = rng.normal(size=(width, width))
    return rng.normal(size=(made, width)) @ mix + rng.normal(size=width), rng.normal(
        size=(real, width)
    )


def test_frechet_distance_is_the_formula(rng):
    made, real = sets(rng)
    first, second = np.cov(made.T), np.cov(real.T)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = np.sum((made.mean(0) - real.mean(0)) ** 2)
    expected += np.trace(first + second - 2 * root)
    assert fidelity.frechet_distance(made, real) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_shifts_and_of_few_images(rng):
    made, _ = sets(rng)
    assert abs(fidelity.frechet_distance(made, made)) < 1e-9 * np.trace(np.cov(made.T))
    assert fidelity.frechet_distance(made + 2, made) == pytest.approx(4 * 7, rel=1e-8)
    few, _ = sets(rng, made=3)  # covariances of rank 2
    assert np.isfinite(fidelity.frechet_distance(few, made))
    with pytest.raises(ValueError, match="two images or more"):
        fidelity.frechet_distance(made[:1], made)


def test_moments_of_batches_are_those_of_all(rng):
    made, _ = sets(rng)
    made += 1e4  # what a sum of squares would lose
    found = None
    for rows in np.split(made, [1, 20, 21]):
        found = fidelity.moments(rows, found)
    assert found.count == len(made)
    np.testing.assert_allclose(found.mean, made.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(made.T), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(fidelity.moments(made).covariance, np.cov(made.T), rtol=1e-9)


@pytest.mark.parametrize(("k", "bound"), [(1, ("CHUNK", 17)), (4, ("CHUNK", 17)), (4, ("MOST", 9))])
def test_nearest(rng, k, bound, monkeypatch):
    monkeypatch.setattr(fidelity, *bound)
    queries, others = sets(rng)
    distances = np.linalg.norm(queries[:, None] - others[None], axis=-1)
    which, far = fidelity.nearest(queries, others, k)
    np.testing.assert_array_equal(which, distances.argmin(1))
    np.testing.assert_allclose(far, np.sort(distances, axis=1)[:, k - 1], rtol=1e-10)
    assert (fidelity.nearest(others, others)[1] == 0).all()  # not the rounding of big squares


def test_distances_to_many_images_are_taken_of_few_at_once():
    rows = np.arange(2000)
    for others, most in ((10, 1024), (2**20, 16), (2**30, 1)):
        chunks = list(fidelity._chunks(rows, others))
        assert max(map(len, chunks)) == most
        np.testing.assert_array_equal(np.concatenate(chunks), rows)


def test_precision_and_recall(rng, monkeypatch):
    monkeypatch.setattr(fidelity, "CHUNK", 17)
    made, real = sets(rng)
    real = 2 * real

    def covered(points, members, k=3):
        own = np.linalg.norm(members[:, None] - members[None], axis=-1)
        radius = np.sort(own, axis=1)[:, k]
        apart = np.linalg.norm(points[:, None] - members[None], axis=-1)
        return np.mean((apart <= radius[None]).any(1))

    expected = covered(made, real), covered(real, made)
    assert fidelity.precision_recall(made, real) == pytest.approx(expected)
    assert fidelity.precision_recall(real, real) == (1, 1)
    assert fidelity.precision_recall(real[:20] * 0, real)[1] == 0  # one mode covers nothing
    with pytest.raises(ValueError, match="more than 3 images"):
        fidelity.precision_recall(made[:3], real)


def test_copies_are_flagged(rng):
    train, held_out = rng.normal(size=(200, 6)), rng.normal(size=(50, 6))
    fresh = rng.normal(size=(40, 6))
    copies = fidelity.find_copies(np.concatenate([fresh, train[:5] + 1e-3]), train, held_out)
    assert copies.flagged[40:].all()
    np.testing.assert_array_equal(copies.index[40:], np.arange(5))
    assert copies.flagged[:40].mean() < 0.2
    assert copies.flagged_held_out < 0.2
    assert 0.7 < fidelity.find_copies(fresh, train, held_out).ratio < 1.3
    assert fidelity.find_copies(train + 1e-6, train, held_out).ratio < 1e-3
