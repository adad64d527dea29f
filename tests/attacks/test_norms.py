"""Balls, their projections and steps, against optimality conditions and against what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.attacks import norms

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 0.1, "l2": 0.7, "l1": 4.0}
SHAPE = (5, 4, 3)


def make_images(rng, count, dtype=np.float32):
    images = rng.uniform(-0.2, 1.2, (count, *SHAPE))
    return jnp.asarray(images.clip(0, 1), dtype)  # many on the border of the box


def make_keys(index):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.asarray(index))


def length(delta, norm):
    flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.linalg.norm(flat, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)


@pytest.mark.parametrize("norm", NORMS)
def test_sizes_are_numpys_and_nothing_underflows(norm, rng):
    delta = rng.normal(size=(6, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(
        norms.size(jnp.asarray(delta), norm).reshape(-1), length(delta, norm), rtol=1e-6
    )
    tiny = jnp.asarray(delta * np.float32(1e-30))
    np.testing.assert_allclose(length(norms.normalize(tiny, norm), norm), 1, rtol=1e-5)
    assert not np.asarray(norms.normalize(jnp.zeros_like(tiny), norm)).any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_fills_the_ball_and_belongs_to_its_key(norm, rng):
    start = jax.jit(lambda *given: norms.random_start(*given, norm))
    keys, center = make_keys(np.arange(2000)), jnp.full((2000, *SHAPE), 0.5)
    points = np.asarray(start(keys, center, 0.4))
    np.testing.assert_array_equal(start(keys[::-1], center, 0.4), points[::-1])
    radius = length(points - 0.5, norm) / 0.4
    assert radius.max() <= 1 + 1e-5
    # The share of a ball of dimension n within radius r is r^n.
    assert abs((radius ** np.prod(SHAPE)).mean() - 0.5) < 0.03
    deviations = np.abs((points - 0.5).mean(0)) / points.std(0) * 2000**0.5
    assert deviations.max() < 5
    border = make_images(rng, 2000)
    moved = np.asarray(start(keys, border, EPSILON[norm]))
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (length(moved - border, norm) <= EPSILON[norm] * (1 + 1e-5)).all()


@pytest.mark.long(but=("linf", "l2"))
@pytest.mark.parametrize("norm", NORMS)
def test_a_projection_is_in_both_and_moves_nothing_that_is_inside(norm, rng):
    images = make_images(rng, 16)
    points = images + jnp.asarray(rng.normal(size=images.shape), np.float32) * np.linspace(
        1e-3, 2, 16, dtype=np.float32
    ).reshape(-1, 1, 1, 1)
    epsilon = jnp.linspace(0.5, 1.5, 16) * EPSILON[norm]
    projected = norms.project(points, images, epsilon, norm)
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert (length(projected - images, norm) <= epsilon * (1 + 1e-6)).all()
    np.testing.assert_allclose(
        norms.project(projected, images, epsilon, norm), projected, atol=1e-6
    )


@pytest.mark.long
def test_the_l1_projection_is_the_nearest_point_of_ball_and_box(rng):
    """From the nearest point, no feasible one lies further towards the point that was projected.

    The feasible point that lies furthest that way is known: a fractional knapsack.
    """
    with jax.enable_x64(True):
        images = make_images(rng, 40, np.float64)
        scale, epsilon = rng.uniform(0.05, 2, 40), rng.uniform(0.01, 12, 40)
        scale[:5], epsilon[:5] = 1e-3, 1  # inside, whatever is drawn
        scale[5:20], epsilon[5:20] = 1, 0.1  # outside
        points = images + rng.normal(size=images.shape) * scale[:, None, None, None]
        projected = np.asarray(norms.project(points, images, epsilon, "l1"))
    binds = 0
    for image, point, nearest, radius in zip(images, points, projected, epsilon, strict=True):
        image, point, nearest = (np.asarray(x).ravel() for x in (image, point, nearest))
        gap = point - nearest
        room = np.where(gap > 0, 1 - image, image)
        order = np.argsort(-np.abs(gap))
        taken = np.minimum(room[order], np.maximum(radius - room[order].cumsum() + room[order], 0))
        best = (np.abs(gap)[order] * taken).sum()
        np.testing.assert_allclose((gap * (nearest - image)).sum(), best, rtol=1e-9, atol=1e-12)
        inside = np.abs(np.clip(point, 0, 1) - image).sum() <= radius
        if inside:
            np.testing.assert_allclose(nearest, np.clip(point, 0, 1), atol=1e-14)
        binds += not inside
    assert 10 < binds < 40


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_has_norm_1_and_no_other_gains_more(norm, rng):
    gradient = jnp.asarray(rng.normal(size=(4, *SHAPE)), np.float32)
    inside = jnp.full(gradient.shape, 0.5)
    step = norms.steepest(gradient, inside, norm, quantile=1.0)
    np.testing.assert_allclose(length(step, norm), 1, rtol=1e-6)
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    np.testing.assert_allclose((gradient * step).sum((1, 2, 3)), length(gradient, dual), rtol=1e-5)


def test_a_step_in_l1_shares_out_and_leaves_out_what_the_box_stops():
    gradient = jnp.arange(1.0, 61).reshape(1, 5, 4, 3)
    at = jnp.full(gradient.shape, 0.5).at[0, 4].set(1.0)  # the 12 largest cannot grow
    step = np.asarray(norms.steepest(gradient, at, "l1", quantile=0.75)).ravel()
    assert (step[48:] == 0).all()
    assert (step > 0).sum() == 15
    assert (step[45 - 12 : 48] > 0).all()
    np.testing.assert_allclose(step.sum(), 1, rtol=1e-6)
