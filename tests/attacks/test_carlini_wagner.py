"""Carlini & Wagner's attack where the nearest image that fools is known: a linear model."""

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.attacks import losses
from vision_jax.attacks.carlini_wagner import carlini_wagner

SHAPE = (4, 4, 3)


def test_it_finds_the_nearest_image_of_a_linear_model(rng):
    """Of two classes: with more, the first descent may lead to another class than the nearest."""
    images = rng.uniform(0.4, 0.6, (6, *SHAPE))  # the box is farther than the other class
    distance = rng.uniform(0.1, 0.5, 6)
    weights = rng.normal(size=images.shape)
    bias = distance * np.linalg.norm(weights.reshape(6, -1), axis=1)
    bias -= (weights * images).sum((1, 2, 3))

    def logits(images):
        margin = (jnp.asarray(weights, jnp.float32) * images).sum((1, 2, 3))
        margin += jnp.asarray(bias, jnp.float32)
        return jnp.stack([margin, jnp.zeros_like(margin)], axis=1)

    loss_of_images = losses.make_untargeted(logits, jnp.zeros(6, int), losses.margin)
    given = jnp.asarray(images, jnp.float32)
    attack = jax.jit(
        lambda x, c: carlini_wagner(loss_of_images, x, steps=500, learning_rate=2e-3, confidence=c)
    )
    found = attack(given, 0.0)
    assert loss_of_images(found)[1].all()
    assert found.min() >= 0
    assert found.max() <= 1
    reached = np.linalg.norm((np.asarray(found) - given).reshape(6, -1), axis=1)
    assert (reached >= distance * (1 - 1e-4)).all()  # nothing is nearer
    assert (reached <= distance * 1.02).all(), (reached, distance)
    sure = attack(given, 0.5)
    assert (loss_of_images(sure)[0] >= 0.5 - 1e-4).all()
    assert attack._cache_size() == 1


def test_images_come_back_where_nothing_fools(rng):
    images = jnp.asarray(rng.random((2, *SHAPE)), jnp.float32)
    labels = jnp.zeros(2, int)

    def blind(images):
        return jnp.stack([images.sum((1, 2, 3)) * 0 + 1, images.sum((1, 2, 3)) * 0], axis=1)

    loss_of_images = losses.make_untargeted(blind, labels, losses.margin)
    found = carlini_wagner(loss_of_images, images, steps=3, searches=3)
    np.testing.assert_array_equal(found, images)
