"""APGD against recorded runs of the published code."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.attacks import apgd, losses

# Made by scripts/make_golden_autoattack.py, in float64.
GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "autoattack.npz"))
IMAGES, LABELS, TARGETS = (GOLDEN[name] for name in ("images", "labels", "targets"))
RADII = {"linf": 0.012, "l2": 0.12, "l1": 1.2}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def logits_of_images(images):
    flat = images.reshape(len(images), -1)
    return jnp.tanh(flat @ GOLDEN["first"]) @ GOLDEN["second"]


def loss_of_images(loss):
    if loss == "targeted":
        return losses.make_targeted_dlr(logits_of_images, jnp.array(LABELS), jnp.array(TARGETS))
    return losses.make_untargeted(
        logits_of_images,
        jnp.array(LABELS),
        losses.dlr if loss == "dlr" else losses.cross_entropy,
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])  # in L1 theirs counts what rounding moved
@pytest.mark.parametrize("loss", ["ce", "targeted"])
def test_apgd_climbs_as_the_published_code_does(x64, norm, loss):
    golden = {
        key.rsplit("/", 1)[1]: value
        for key, value in GOLDEN.items()
        if key.startswith(f"{norm}/{loss}/")
    }

    @jax.jit
    def climb(images, noise):
        begin = apgd.start_from(noise, images, RADII[norm], norm)
        return apgd.climb(
            loss_of_images(loss), images, begin=begin, epsilon=RADII[norm], norm=norm, steps=60
        )

    run = climb(IMAGES, golden["noise"])
    np.testing.assert_array_equal(run.fooled, golden["fooled"])
    np.testing.assert_allclose(run.step_sizes, golden["step_sizes"], rtol=1e-15)
    np.testing.assert_allclose(run.loss, golden["loss"], rtol=1e-12)
    np.testing.assert_allclose(run.highest, golden["best"], atol=1e-12)
    np.testing.assert_allclose(run.fooling, golden["adversarial"], atol=1e-12)


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 100])
def test_checkpoints_are_those_of_a_count(steps):
    window = max(int(0.22 * steps), 1)
    least, shorter = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    found, count = [], 0
    for number in range(1, steps + 1):
        count += 1
        if count == window:
            found.append(number)
            count, window = 0, max(window - shorter, least)
    assert apgd.checkpoints(steps) == tuple(found)
