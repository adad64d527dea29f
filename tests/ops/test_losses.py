"""Losses against their formulas written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.ops import losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_the_smoothed_one_hot(smoothing, rng):
    labels = rng.integers(0, 7, 20)
    expected = np.full((20, 7), smoothing / 7)
    expected[np.arange(20), labels] += 1 - smoothing
    targets = losses.one_hot_targets(jnp.asarray(labels), 7, smoothing)
    assert targets.dtype == jnp.float32
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


def reference(logits, targets):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return -(targets * (shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))).sum(1)


def test_cross_entropy_of_soft_targets(rng):
    logits = 5 * rng.normal(size=(16, 10))
    targets = rng.dirichlet(np.ones(10), 16)
    result = losses.cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    assert result.shape == (16,)
    np.testing.assert_allclose(result, reference(logits, targets), rtol=2e-6)


def test_weights_are_of_the_classes(rng):
    logits, targets = 5 * rng.normal(size=(16, 10)), rng.dirichlet(np.ones(10), 16)
    weights = rng.uniform(0, 3, 10)
    result = losses.cross_entropy(
        jnp.asarray(logits, jnp.float32), jnp.asarray(targets), jnp.asarray(weights)
    )
    np.testing.assert_allclose(result, reference(logits, targets * weights), rtol=2e-6)


def test_half_precision_logits_are_computed_in_float32(rng):
    logits = jnp.asarray(5 * rng.normal(size=(16, 1000)), jnp.bfloat16)
    targets = rng.dirichlet(np.ones(1000), 16)
    result = losses.cross_entropy(logits, jnp.asarray(targets))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, reference(logits, targets), rtol=5e-6)


def test_large_logits_stay_finite_and_the_gradient_is_softmax_minus_target():
    logits = jnp.asarray([[1e4, 0.0, -1e4], [0.5, 0.25, -1.0]])
    targets = losses.one_hot_targets(jnp.array([2, 0]), 3)
    loss, gradient = jax.value_and_grad(lambda x: losses.cross_entropy(x, targets).sum())(logits)
    assert np.isfinite(loss)
    np.testing.assert_allclose(gradient, jax.nn.softmax(logits) - targets, atol=1e-6)
