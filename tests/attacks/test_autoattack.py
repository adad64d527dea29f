"""APGD, FAB and Square against recorded runs of the published code."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.attacks import apgd, fab, losses, square

# Made by scripts/make_golden_autoattack.py, in float64.
GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "autoattack.npz"))
IMAGES, LABELS, TARGETS = (GOLDEN[name] for name in ("images", "labels", "targets"))
RADII = {"linf": 0.012, "l2": 0.12, "l1": 1.2}
NORMS = "linf", "l2", "l1"


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


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted"])
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
    np.testing.assert_allclose(run.loss, golden["loss"], rtol=1e-10)
    # Where the label is third the plain DLR loss is flat, and its gradient in L2 mere rounding.
    clear = (golden["loss"] < 1 - 1e-6) | (loss != "dlr") | (norm != "l2")
    assert clear.any()
    np.testing.assert_allclose(run.highest[clear], golden["best"][clear], atol=1e-12)
    np.testing.assert_allclose(run.fooling[clear], golden["adversarial"][clear], atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_walks_as_the_published_code_does(x64, norm):
    run = functools.partial(fab.fab, logits_of_images, epsilon=RADII[norm], norm=norm, steps=30)
    found = jax.jit(lambda images: run(images, LABELS, targets=TARGETS))(IMAGES)
    assert (np.abs(GOLDEN[f"{norm}/fab"] - IMAGES).max((1, 2, 3)) > 1e-3).all()
    np.testing.assert_allclose(found, GOLDEN[f"{norm}/fab"], atol=1e-11)


@pytest.mark.parametrize("norm", NORMS)
def test_square_with_the_published_codes_draws_ends_where_it_does(x64, norm, monkeypatch):
    golden = {key: GOLDEN[f"{norm}/square/{key}"] for key in ("places", "query_signs", "result")}
    upright = jnp.array(GOLDEN[f"{norm}/square/query_upright"])
    places, signs = jnp.array(golden["places"]), jnp.array(golden["query_signs"])

    def recorded(keys, number, channels):
        return square.Draw(places[number][None], signs[number][None], upright[number][None])

    monkeypatch.setattr(square, "_draw", recorded)
    image, radius = IMAGES[:1], 2 * RADII[norm]
    begun = square._start_from(
        jnp.array(GOLDEN[f"{norm}/square/signs"]),
        jnp.array(GOLDEN[f"{norm}/square/upright"]),
        image,
        radius,
        norm,
    )
    keys = jax.random.split(jax.random.key(0), 1)
    run = functools.partial(square.square, logits_of_images, epsilon=radius, norm=norm, queries=100)
    found = jax.jit(lambda image: run(image, LABELS[:1], keys, begun=begun))(image)
    assert np.abs(golden["result"] - begun).max() > 1e-3
    np.testing.assert_allclose(found, golden["result"], atol=1e-11)


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
