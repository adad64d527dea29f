"""The step on a loss whose gradient is known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vision_jax import steps

DRAW = np.random.default_rng(0)
X = DRAW.standard_normal((8, 3)).astype(np.float32)
Y = DRAW.standard_normal(8).astype(np.float32)
BATCH = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
FROZEN = {"offset": jnp.asarray(0.5)}


def squared_error(trainable, frozen, model_state, batch, key):
    del key
    error = batch["x"] @ trainable["w"] + frozen["offset"] - batch["y"]
    return jnp.mean(error**2), (model_state, {"worst": jnp.max(jnp.abs(error))})


def make(loss_fn=squared_error, *, tx=None, ema_decay=0.0, **arguments):
    tx = tx or optax.sgd(0.1)
    state = steps.make_state({"w": jnp.asarray([1.0, -2.0, 3.0])}, {}, tx=tx, ema=ema_decay > 0)
    step = steps.make_train_step(
        loss_fn, tx, seed=3, schedule=lambda step: 0.1, ema_decay=ema_decay, **arguments
    )
    return step, state


def by_hand(w):
    error = X.astype(np.float64) @ w + 0.5 - Y
    return np.mean(error**2), 2 * X.T.astype(np.float64) @ error / len(error)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_one_step_is_the_gradient_of_the_whole_batch(accumulate):
    step, state = make(accumulate=accumulate)
    state, metrics = step(state, FROZEN, BATCH)
    loss, gradient = by_hand(np.array([1.0, -2.0, 3.0]))
    np.testing.assert_allclose(state.trainable["w"], [1, -2, 3] - 0.1 * gradient, rtol=2e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    assert int(state.step) == 1
    assert bool(metrics["finite"])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_what_is_counted_is_counted_over_the_whole_update(accumulate):
    """A mean over some of the rows, of which micro-batches have different numbers."""
    some = np.array([True, True, True, False, True, False, False, False])

    def loss_of_some(trainable, frozen, model_state, batch, key):
        error = batch["x"] @ trainable["w"] + frozen["offset"] - batch["y"]
        counted = batch["whole"]["some"] if "whole" in batch else batch["some"]
        losses = jnp.where(batch["some"], error**2, 0) / (counted.sum() / len(counted))
        return losses.mean(), (model_state, {})

    found = []
    for parts in (1, accumulate):
        step, state = make(loss_of_some, accumulate=parts, whole=("some",))
        found.append(step(state, FROZEN, {**BATCH, "some": jnp.asarray(some)}))
    (one, whole), (other, split) = found
    np.testing.assert_allclose(other.trainable["w"], one.trainable["w"], rtol=1e-5)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(split[name], whole[name], rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_one_trace_over_50_steps(accumulate, ema_decay):
    traces = []

    def counted(*arguments):
        traces.append(None)
        return squared_error(*arguments)

    step, state = make(counted, tx=optax.adam(1e-2), accumulate=accumulate, ema_decay=ema_decay)
    state, _ = step(state, FROZEN, BATCH)
    first = len(traces)
    for _ in range(49):
        state, _ = step(state, FROZEN, BATCH)
    assert len(traces) == first
    assert step._cache_size() == 1
    assert int(state.step) == 50


def test_moving_average_follows_its_warm_up():
    step, state = make(ema_decay=0.3)
    w = average = np.array([1.0, -2.0, 3.0])
    for index in range(3):
        state, _ = step(state, FROZEN, BATCH)
        w = w - 0.1 * by_hand(w)[1]
        decay = min(0.3, (1 + index) / (10 + index))
        average = decay * average + (1 - decay) * w
    np.testing.assert_allclose(steps.averaged(state)[0]["w"], average, rtol=1e-5)
    np.testing.assert_allclose(state.trainable["w"], w, rtol=1e-5)


def test_without_an_average_the_weights_themselves_are_evaluated():
    _, state = make()
    trainable, model_state = steps.averaged(state)
    assert trainable is state.trainable
    assert model_state is state.model_state


def test_statistics_are_averaged_with_the_weights_and_counts_are_not():
    def moving(trainable, frozen, model_state, batch, key):
        loss, (_, metrics) = squared_error(trainable, frozen, model_state, batch, key)
        (norm,) = model_state.values()
        return loss, ({"norm": {"mean": norm["mean"] * 2, "count": norm["count"] + 1}}, metrics)

    tx = optax.sgd(0.1)
    start = {"norm": {"mean": jnp.asarray([3.0, -1.0]), "count": jnp.int32(5)}}
    state = steps.make_state({"w": jnp.zeros(3)}, start, tx=tx, ema=True)
    step = steps.make_train_step(moving, tx, seed=0, schedule=lambda step: 0.1, ema_decay=0.15)
    mean = average = np.array([3.0, -1.0])
    for index in range(3):
        state, _ = step(state, FROZEN, BATCH)
        mean, decay = mean * 2, min(0.15, (1 + index) / (10 + index))
        average = decay * average + (1 - decay) * mean
    trainable, model_state = steps.averaged(state)
    assert trainable.keys() == {"w"}
    np.testing.assert_allclose(model_state["norm"]["mean"], average, rtol=1e-6)
    np.testing.assert_allclose(state.model_state["norm"]["mean"], mean, rtol=1e-6)
    assert model_state["norm"]["count"] == state.model_state["norm"]["count"] == 8
    assert jax.tree.structure(model_state) == jax.tree.structure(state.model_state)
    assert step._cache_size() == 1


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where):
    def spoiled(trainable, frozen, model_state, batch, key):
        loss, rest = squared_error(trainable, frozen, model_state, batch, key)
        if where == "loss":
            loss = loss + jnp.nan
        if where == "gradient":  # finite itself, infinite slope at 0
            loss = loss + jnp.sqrt(jnp.abs(trainable["w"][0] - 1.0))
        return loss, rest

    step, state = make(spoiled, tx=optax.adam(0.1), ema_decay=0.9)
    kept = jax.tree.map(np.asarray, state)
    state, metrics = step(state, FROZEN, BATCH)
    assert not bool(metrics["finite"])
    assert int(state.step) == 1
    for name in ("trainable", "ema", "opt_state"):
        old, new = getattr(kept, name), getattr(state, name)
        jax.tree.map(np.testing.assert_array_equal, old, new)


def test_an_update_beyond_float32_is_reported():
    step, state = make(squared_error, tx=optax.sgd(1e38))
    assert not bool(step(state, FROZEN, BATCH)[1]["finite"])


def test_the_key_is_a_function_of_seed_and_step():
    def noise(trainable, frozen, model_state, batch, key):
        return jnp.sum(trainable["w"] * 0) + jax.random.normal(key), (model_state, {})

    step, state = make(noise)
    losses = []
    for _ in range(3):
        state, metrics = step(state, FROZEN, BATCH)
        losses.append(float(metrics["loss"]))
    expected = [
        float(jax.random.normal(jax.random.fold_in(jax.random.key(3), index))) for index in range(3)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_micro_batches_have_keys_of_their_own():
    def noise(trainable, frozen, model_state, batch, key):
        value = jax.random.normal(key)
        return jnp.sum(trainable["w"] * 0) + value, (model_state, {"square": value**2})

    step, state = make(noise, accumulate=2)
    _, metrics = step(state, FROZEN, BATCH)
    # Two equal draws would have the square of their mean as the mean of their squares.
    assert abs(float(metrics["square"]) - float(metrics["loss"]) ** 2) > 1e-6


def test_model_state_goes_from_one_micro_batch_to_the_next():
    def counting(trainable, frozen, model_state, batch, key):
        loss, (_, metrics) = squared_error(trainable, frozen, model_state, batch, key)
        return loss, ({"seen": model_state["seen"] + batch["y"].sum()}, metrics)

    tx = optax.sgd(0.1)
    state = steps.make_state({"w": jnp.zeros(3)}, {"seen": jnp.zeros(())}, tx=tx, ema=False)
    step = steps.make_train_step(counting, tx, seed=0, schedule=lambda step: 0.1, accumulate=4)
    state, _ = step(state, FROZEN, BATCH)
    np.testing.assert_allclose(state.model_state["seen"], Y.sum(), rtol=1e-5, atol=1e-6)


def test_dtypes_promote_where_it_is_written_alone():
    """The fixture of conftest.py is on."""
    with pytest.raises(jax.dtypes.TypePromotionError, match="strict"):
        jnp.ones(2) * jnp.ones(2, bool)
