"""Losses of self-distillation against numpy in float64, values and gradients, and the teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.ops import self_distillation as ops

BARS = {"float32": 1e-5, "float64": 1e-10}


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def check(dtype, loss, expected, gradient, *arrays):
    """The mean loss and its gradient by the first array against numpy's."""
    with jax.enable_x64(dtype == "float64"):
        given = [jnp.asarray(x, dtype) for x in arrays]
        value, found = jax.jit(jax.value_and_grad(lambda *xs: loss(*xs).mean()))(*given)
        np.testing.assert_allclose(value, expected, rtol=BARS[dtype])
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found, gradient, atol=BARS[dtype] * scale, rtol=BARS[dtype])


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("views", [(2, 5), (2, 2)])
def test_dino(rng, dtype, views):
    """Pair by pair, without those of a view with itself."""
    student = rng.normal(size=(views[1], 3, 7))
    teacher = softmax(5 * rng.normal(size=(views[0], 3, 7)))
    pairs = [(t, s) for t in range(views[0]) for s in range(views[1]) if s != t]
    assert len(pairs) == views[0] * (views[1] - 1)
    predicted = softmax(student / 0.1)
    loss = -np.mean([(teacher[t] * np.log(predicted[s])).sum(-1).mean() for t, s in pairs])
    gradient = np.zeros_like(student)
    for t, s in pairs:
        gradient[s] += (predicted[s] - teacher[t]) / 0.1 / 3 / len(pairs)
    check(dtype, lambda x, y: ops.dino_losses(x, y, 0.1), loss, gradient, student, teacher)


def test_one_view_makes_no_pair():
    with pytest.raises(ValueError, match="make no pair"):
        ops.dino_losses(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3)), 0.1)


@pytest.mark.parametrize("dtype", BARS)
def test_masked_patches(rng, dtype):
    """Each weighs one by the masked ones of its image; an image without any counts as zero."""
    counts = (3, 1, 0)
    student = rng.normal(size=(3, 4, 6))
    teacher = softmax(rng.normal(size=(3, 4, 6)))
    masked = np.arange(4)[None] < np.array(counts)[:, None]
    predicted, loss, gradient = softmax(student / 0.2), 0.0, np.zeros_like(student)
    for image, count in enumerate(counts):
        for place in range(count):
            weight = 1 / count / 3
            loss -= weight * (teacher[image, place] * np.log(predicted[image, place])).sum()
            gradient[image, place] = weight * (predicted - teacher)[image, place] / 0.2
    check(
        dtype, lambda *xs: ops.masked_patch_losses(*xs, 0.2), loss, gradient,
        student, teacher, masked,
    )  # fmt: skip


def nearest_rows(features):
    """By loops, the largest cosine."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return [
        max(
            (other for other in range(len(unit)) if other != row), key=lambda o: unit[o] @ unit[row]
        )
        for row in range(len(unit))
    ]


def koleo(features, nearest):
    """Of each row."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances = [
        np.sqrt(((unit[row] - unit[other] + 1e-8) ** 2).sum()) for row, other in enumerate(nearest)
    ]
    return -np.log(np.array(distances) + 1e-8)


@pytest.mark.parametrize("dtype", BARS)
def test_koleo(rng, dtype):
    """The gradient of their mean, of the neighbors too, by differences of fourth order.

    Logarithms of distances near 1 have either sign: their scale is that of the largest. Where a row
    has two neighbors at almost the same distance a difference would see both, so they are fixed.
    """
    features = rng.normal(size=(5, 4))
    nearest = nearest_rows(features)
    gradient, step = np.zeros_like(features), 1e-3
    for place in np.ndindex(*features.shape):

        def at(shift, place=place):
            moved = features.copy()
            moved[place] += shift
            return koleo(moved, nearest).mean()

        gradient[place] = (8 * (at(step) - at(-step)) - at(2 * step) + at(-2 * step)) / 12 / step
    with jax.enable_x64(dtype == "float64"):
        given = jnp.asarray(features, dtype)
        losses = jax.jit(ops.koleo_losses)(given)
        found = jax.jit(jax.grad(lambda x: ops.koleo_losses(x).mean()))(given)
    wanted = koleo(features, nearest)
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=BARS[dtype] * np.abs(wanted).max())
    np.testing.assert_allclose(found, gradient, atol=max(BARS[dtype], 1e-8))


@pytest.mark.parametrize("dtype", BARS)
def test_sinkhorn_is_the_scaling_of_rows_and_columns(rng, dtype):
    """As DINOv2's code has it, over the rows that count."""
    logits = rng.uniform(-1, 1, (6, 4))
    counted = np.array([1, 1, 0, 1, 1, 0.0])
    kept = np.exp(logits[counted > 0] / 0.05).T  # [K, N]
    kept /= kept.sum()
    for _ in range(3):
        kept /= kept.sum(1, keepdims=True) * len(kept)
        kept /= kept.sum(0, keepdims=True) * kept.shape[1]
    kept *= kept.shape[1]
    with jax.enable_x64(dtype == "float64"):
        given = [jnp.asarray(x, dtype) for x in (logits, counted)]
        found = np.asarray(jax.jit(ops.sinkhorn_knopp)(given[0], 0.05, given[1]))
    np.testing.assert_allclose(found[counted > 0], kept.T, rtol=10 * BARS[dtype])
    assert np.isfinite(found).all()
    huge = np.asarray(ops.sinkhorn_knopp(1000 * jnp.eye(3), 0.01, jnp.ones(3)))
    np.testing.assert_allclose(huge, np.eye(3), atol=1e-6)


def test_the_center_moves_after_its_batch(rng):
    logits = rng.normal(size=(4, 3))
    center = ops.update_center(jnp.zeros((1, 3)), jnp.asarray(logits), jnp.ones(4), 0.9)
    np.testing.assert_allclose(center[0], 0.1 * logits.mean(0), rtol=1e-5, atol=1e-7)
    half = ops.update_center(center, jnp.asarray(logits), jnp.array([1.0, 0, 0, 0]), 0.5)
    np.testing.assert_allclose(half, (center + logits[:1]) / 2, rtol=1e-5, atol=1e-6)
    still = ops.update_center(center, jnp.asarray(logits), jnp.zeros(4), 0.9)
    np.testing.assert_array_equal(still, center)
    shared = np.asarray(ops.centered_probabilities(jnp.asarray(logits), center, 0.04))
    exact = softmax((logits - np.asarray(center)) / 0.04)
    np.testing.assert_allclose(shared, exact, rtol=1e-4, atol=1e-37)  # float32 ends there
    np.testing.assert_allclose(ops.entropy(jnp.full((2, 8), 1 / 8)), np.log(8), rtol=1e-6)


def test_a_temperature_without_a_warm_up_is_the_last_at_once():
    for warmup in (0, 1):
        temperature = ops.teacher_temperature(0, first=0.04, last=0.07, warmup_steps=warmup)
        assert float(temperature) == pytest.approx(0.07)


def test_rank_tells_features_that_agree(rng):
    spread = rng.normal(size=(64, 8))
    assert float(ops.effective_rank(jnp.asarray(spread))) > 7
    line = 5 + spread[:, :1] * np.ones((1, 8))
    assert float(ops.effective_rank(jnp.asarray(line))) == pytest.approx(1, abs=0.01)
    same = ops.effective_rank(jnp.full((16, 8), 3.0))
    assert float(same) == pytest.approx(1, abs=1e-3)
