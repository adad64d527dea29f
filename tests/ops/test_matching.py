"""Matching against scipy's exact assignment, and on costs that no model should give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vision_jax.errors import UserError
from vision_jax.ops import matching

match = jax.jit(matching.match)
solve = jax.jit(jax.vmap(matching.solve))


def random_problems(
    rng: np.random.Generator, kind: str, problems: int, targets: int, queries: int
) -> np.ndarray:
    """f64[problems, T, Q] that float32 holds exactly."""
    shape = (problems, targets, queries)
    if kind == "normal":
        cost = rng.normal(size=shape)
    elif kind == "ties":
        cost = rng.integers(0, 4, shape)
    elif kind == "same rows":  # every target wants the same queries: the longest searches
        cost = np.tile(rng.normal(size=(problems, 1, queries)), (1, targets, 1))
    else:  # "products": searches that reach nearly everything
        cost = (
            rng.integers(1, 99, (problems, targets, 1)) * rng.integers(1, 99, shape[::2])[:, None]
        )
    return np.asarray(cost, np.float32).astype(np.float64)


def check(cost: np.ndarray, mask: np.ndarray, query: np.ndarray, rtol: float) -> None:
    """Distinct queries for the real targets, Q for the others, and scipy's total cost."""
    queries = cost.shape[-1]
    for c, m, q in zip(cost, mask, np.asarray(query), strict=True):
        assert (q[~m] == queries).all()
        real, chosen = c[m], q[m]
        assert len(set(chosen)) == len(chosen)
        assert ((chosen >= 0) & (chosen < queries)).all()
        best = real[linear_sum_assignment(real)]
        total = real[np.arange(len(real)), chosen].sum()
        np.testing.assert_allclose(total, best.sum(), rtol=0, atol=rtol * np.abs(best).sum())


@pytest.mark.parametrize("kind", ["normal", "ties", "same rows", "products"])
@pytest.mark.parametrize("shape", [(1000, 6, 9), (1000, 8, 8), (40, 30, 100)])
def test_total_cost_is_scipys(kind, shape, rng):
    problems, targets, _ = shape
    cost = random_problems(rng, kind, *shape)
    mask = rng.random((problems, targets)) < rng.random((problems, 1))  # none and all of them too
    check(cost, mask, match(jnp.asarray(cost, jnp.float32), mask), rtol=1e-6)
    if shape == (1000, 8, 8):
        with jax.enable_x64(True):
            check(cost, mask, match(jnp.asarray(cost), mask), rtol=1e-14)


def test_layers_and_images_are_problems_of_their_own(rng):
    cost = random_problems(rng, "normal", 12, 5, 10).reshape(3, 4, 5, 10)
    mask = rng.random((3, 4, 5)) < 0.5
    query = match(jnp.asarray(cost, jnp.float32), mask)
    assert query.shape == (3, 4, 5)
    check(cost.reshape(12, 5, 10), mask.reshape(12, 5), np.asarray(query).reshape(12, 5), 1e-6)


def test_targets_that_want_different_queries_take_no_step_and_padded_ones_never_do(rng):
    cost = random_problems(rng, "normal", 3, 50, 60)
    cost[0, np.arange(50), rng.permutation(60)[:50]] = -9
    mask = np.stack([np.ones(50), np.zeros(50), np.arange(50) % 20 == 7]).astype(bool)
    _, steps = solve(jnp.asarray(cost, jnp.float32), mask)
    assert steps[:2].tolist() == [0, 0]
    assert steps[2] <= 3 * 4  # three real targets


def test_no_targets_and_no_slots_for_them():
    assert match(jnp.zeros((2, 0, 5)), jnp.zeros((2, 0), bool)).shape == (2, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_avoided(bad, rng):
    cost = random_problems(rng, "normal", 300, 6, 8)
    broken = rng.random(cost.shape) < rng.random((300, 1, 1))
    mask = rng.random((300, 6)) < 0.8
    query = match(jnp.asarray(np.where(broken, bad, cost), jnp.float32), mask)
    check(np.where(broken, 1e3, cost), mask, query, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e30, 3e38])
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_any_cost_ends_with_distinct_queries(scale, bad, rng):
    cost = random_problems(rng, "normal", 50, 9, 9).clip(-1, 1) * scale
    cost[rng.random(cost.shape) < 0.3] = bad
    cost[0] = bad
    mask = np.ones((50, 9), bool)
    query, steps = solve(jnp.asarray(cost, jnp.float32), mask)
    assert (np.sort(query) == np.arange(9)).all()
    assert (steps <= 9 * 10).all()


def test_half_precision_costs_are_solved_in_float32(rng):
    cost = jnp.asarray(rng.normal(size=(20, 6, 9)), jnp.bfloat16)
    mask = np.ones((20, 6), bool)
    check(np.asarray(cost, np.float64), mask, match(cost, mask), rtol=1e-6)


def test_more_targets_than_queries_raise_before_anything_runs():
    with pytest.raises(UserError, match=r"5 boxes but the model only 4 queries"):
        jax.eval_shape(match, jnp.zeros((2, 5, 4)), jnp.zeros((2, 5), bool))


@pytest.mark.long
def test_a_loss_over_matched_costs_has_the_gradient_of_the_costs_alone(rng):
    cost = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)

    def total(cost):
        query = matching.match(cost, jnp.ones(4, bool))
        return jnp.take_along_axis(cost, query[:, None], axis=1).sum()

    gradient = np.asarray(jax.grad(total)(cost))
    assert (gradient.sum(1) == 1).all()
    assert set(np.unique(gradient)) == {0, 1}
