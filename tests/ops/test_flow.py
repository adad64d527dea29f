"""Samplers on differential equations with known ends, in batches of any size, in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.ops.ddim import ddim, ddim_steps, kept_signal
from vision_jax.ops.flow import as_velocity, even_times, guided, integrate
from vision_jax.ops.noise import normal


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_errors_fall_by_the_order_of_the_method(method, order):
    """x' = -x · time from 1 ends at exp(-1/2); Heun's last step is Euler's."""

    def error(steps):
        times = even_times(steps)
        if method == "heun":  # but for what that step adds
            times = np.append(times, 1 + 1e-9)
        end = integrate(lambda x, time: -x * time, jnp.ones(1), times, method)
        return abs(float(end[0]) - np.exp(-0.5))

    with jax.enable_x64(True):
        ratio = error(20) / error(40)
    assert ratio == pytest.approx(2**order, rel=0.1)


def test_an_image_of_an_exact_model_is_reached_by_both_predictions():
    """Where the image is known, velocity and image lead to it in any number of steps."""
    image, noise = jnp.asarray([2.0, -1.0]), jnp.asarray([0.3, 0.4])
    for predicts, said in (("velocity", image - noise), ("image", image)):
        for method in ("euler", "heun"):
            end = integrate(
                lambda x, time, p=predicts, s=said: as_velocity(s, x, time, p, least=1e-3),
                noise,
                even_times(7, shift=2.0),
                method,
            )
            np.testing.assert_allclose(end, image, atol=1e-5)
    with pytest.raises(ValueError, match="a flow takes a velocity or an image"):
        as_velocity(image, noise, jnp.float32(0), "noise")
    with pytest.raises(ValueError, match="none of euler, heun"):
        integrate(lambda x, time: x, noise, even_times(2), "midpoint")


def test_ddim_reaches_the_image_of_an_exact_model():
    image = np.float32([1.5, -0.5, 0.2])
    noise = np.float32([0.4, -1.0, 2.0])
    signal = kept_signal()
    for spacing in ("leading", "trailing"):
        steps = ddim_steps(13, spacing)
        start = np.sqrt(signal[steps[0]]) * image + np.sqrt(1 - signal[steps[0]]) * noise
        end = ddim(lambda x, step: jnp.asarray(noise), jnp.asarray(start), steps, signal)
        np.testing.assert_allclose(end, image, atol=2e-4)
    with pytest.raises(ValueError, match="1001 steps of 1000"):
        ddim_steps(1001)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_steps_of_any_number_fall_and_are_there(spacing):
    for count in range(1, 1001):
        steps = ddim_steps(count, spacing)
        assert len(steps) == count
        assert (np.diff(steps) < 0).all()
        assert 0 <= steps[-1] <= steps[0] <= 999


def test_half_precision_keeps_its_steps_and_times():
    seen = []

    def model(x, time):
        seen.append((x.dtype, time.dtype))
        return x

    noise = jnp.ones(2, jnp.bfloat16)
    for end in (
        ddim(model, noise, ddim_steps(3), kept_signal()),
        integrate(model, noise, even_times(3), "heun"),
    ):
        assert end.dtype == jnp.bfloat16
    assert set(seen) == {(jnp.dtype("bfloat16"), jnp.dtype("float32"))}


def predict(x, time, labels):
    """Depends on each input, and on no other image of the batch."""
    return jnp.sin(3 * x + time[:, None]) + labels[:, None].astype(x.dtype) * jnp.asarray(
        [[0.1, -0.2, 0.3]]
    )


def test_guidance_acts_in_its_interval_and_channels():
    x, labels = jnp.ones((2, 3)), jnp.asarray([1, 4])
    given = predict(x, jnp.full(2, 0.5), labels)
    bare = predict(x, jnp.full(2, 0.5), jnp.full(2, 9))
    pushed = bare + 3 * (given - bare)
    half = jnp.float32(0.5)
    np.testing.assert_allclose(guided(predict, labels, 9, 3.0)(x, half), pushed, rtol=1e-6)
    assert jnp.array_equal(guided(predict, labels, 9, 1.0)(x, half), given)
    for interval, wanted in (((0.0, 0.4), given), ((0.4, 0.6), pushed), ((0.6, 1.0), given)):
        found = guided(predict, labels, 9, 3.0, interval=interval)(x, half)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    part = guided(predict, labels, 9, 3.0, channels=2)(x, half)
    np.testing.assert_allclose(part[:, :2], pushed[:, :2], rtol=1e-6)
    assert jnp.array_equal(part[:, 2:], given[:, 2:])


def test_a_sample_depends_on_its_key_and_not_on_its_batch_and_compiles_once():
    keys = jax.random.split(jax.random.key(3), 8)
    labels = jnp.arange(8) % 3
    traces = []

    @jax.jit
    def sample(keys, labels, times):
        traces.append(len(keys))
        velocity = guided(predict, labels, 9, 2.0, interval=(0.1, 0.9))
        return integrate(velocity, normal(keys, (3,)), times)

    whole = sample(keys, labels, even_times(6))
    for index in range(8):  # a program of another size rounds otherwise
        alone = sample(keys[index : index + 1], labels[index : index + 1], even_times(6))
        np.testing.assert_allclose(alone[0], whole[index], rtol=2e-6)
    order = np.asarray([4, 0, 6, 1, 7, 3, 2, 5])
    among_others = sample(keys[order], labels[order], even_times(6))
    np.testing.assert_allclose(among_others, whole[order], rtol=2e-6)
    sample(keys, labels, even_times(6, shift=2.0))
    assert traces == [8, 1]
    assert len({tuple(row) for row in np.asarray(whole).tolist()}) == 8


def test_memory_does_not_grow_with_the_steps():
    noise = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def peak(steps):
        run = jax.jit(lambda x: integrate(lambda x, t: jnp.sin(x) * t, x, even_times(steps)))
        return run.lower(noise).compile().memory_analysis().temp_size_in_bytes

    assert peak(200) <= peak(10) + 200 * 16
