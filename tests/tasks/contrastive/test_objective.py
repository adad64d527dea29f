"""The loss of an image's views against numpy, what it is of, and the names of a collapse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.objective import make_loss
from vision_jax.ops.multi_crop import Crop
from vision_jax.tasks.collapse import Watching
from vision_jax.tasks.contrastive import metrics, objective

VIEWS = Crop(8, (0.3, 1.0), blurred=(0.0, 0.0), solarized=(0.0, 0.0), sigmas=(), jitter=0.0)


def apply(params, model_state, images, *, train, keys):
    """Linear in the mean color."""
    assert images.shape[1:] == (8, 8, 3)
    return {"logits": images.mean((1, 2)) @ params["kernel"]}, model_state


def setting(rng):
    """(objective, trainable, batch)."""
    goal = objective.make_objective(apply, lambda flat: flat, views=VIEWS, temperature=0.3)
    flat = {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (5, 10, 10, 3)), jnp.uint8),
        "index": jnp.arange(5, dtype=jnp.int32),
        "mask": jnp.ones(5, bool),
        "step": jnp.int32(0),
    }
    return goal, flat, batch


def test_the_loss_is_numpys(rng):
    goal, flat, batch = setting(rng)
    view = goal.prepare(flat, {}, {}, batch, jax.random.key(3))
    assert view["image"].shape == (10, 8, 8, 3)
    outputs, _ = goal.forward(flat, {}, {}, view, jax.random.key(0), train=True)
    losses, found = goal.criterion(flat, outputs, view)
    vectors = np.float64(outputs["logits"])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = []
    for row in range(10):  # an image's views are neighbors
        others = [other for other in range(10) if other != row]
        scores = {other: math.exp(vectors[row] @ vectors[other] / 0.3) for other in others}
        expected.append(-math.log(scores[row ^ 1] / sum(scores.values())))
    np.testing.assert_allclose(losses, np.reshape(expected, (5, 2)).mean(1), rtol=1e-5)
    together = [vectors[2 * image] @ vectors[2 * image + 1] for image in range(5)]
    assert float(found["agreement"]) == pytest.approx(np.mean(together), rel=1e-5)
    by_view = vectors.reshape(5, 2, -1).mean(0)
    spread = np.sqrt(1 - (by_view**2).sum(1)).mean()
    assert float(found["projection_spread"]) == pytest.approx(spread, rel=1e-3)


@pytest.mark.long
def test_views_follow_from_the_key(rng):
    goal, flat, batch = setting(rng)
    one, again, other = (
        np.asarray(goal.prepare(flat, {}, {}, batch, jax.random.key(seed))["image"])
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (one[0] != one[1]).any()  # two views of an image
    gradient = jax.grad(make_loss(goal), has_aux=True)(flat, {}, {}, batch, jax.random.key(0))[0]
    assert np.abs(gradient["kernel"]).max() > 0


# Collapse ----------------------------------------------------------------------------------------


MOST = math.log(2 * 32 - 1)
WATCH = metrics.Watch(images=32, temperature=0.5, warn_after=100, warmup_steps=50, stop=False)
HEALTHY = {"loss": 0.8 * MOST, "agreement": 0.8, "projection_spread": 0.9}


def watched(steps, watch=WATCH, **changes):
    """{step: warning} of a run whose metrics are these."""
    watching, said = Watching(watch), {}
    for step in range(1, steps + 1):
        for line in watching(step, {**HEALTHY, **changes}):
            said[step] = line
    return said


def changed(**fields):
    return metrics.Watch(**{**vars(WATCH), **fields})


def test_a_healthy_run_hears_nothing():
    assert watched(1000) == {}
    assert watched(149, loss=MOST) == {}  # while the rate warms up


@pytest.mark.parametrize(
    ("fields", "values", "cause"),
    [
        ({}, {"projection_spread": 0.001, "loss": MOST}, "(spread 0.0010, loss 4.1431, log(2N"),
        ({}, {"projection_spread": 0.001}, "the rate is too high"),
        ({}, {"loss": MOST, "agreement": 0.995}, "(loss 4.1431, log(2N - 1) 4.1431): the rate is"),
        ({"temperature": 50.0}, {"loss": MOST}, "temperature 50 is too high"),
        ({}, {"loss": MOST, "agreement": 0.1}, "too little in common: set config.contrastive"),
    ],
)
def test_a_collapse_is_named_once_with_its_cause(fields, values, cause):
    ((step, line),) = watched(1000, changed(**fields), **values).items()
    assert 100 <= step <= 200
    assert line.startswith("collapse: ")
    assert cause in line
    with pytest.raises(UserError, match=r"config.contrastive.stop ended this one"):
        watched(1000, changed(**fields, stop=True), **values)
