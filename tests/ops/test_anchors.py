"""Sampling, and what is finite; anchors and deltas are compared in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.ops import anchors


def test_a_sample_is_balanced_and_replays(rng):
    label = rng.integers(-1, 2, size=(2, 200))
    label[1, 3:] = np.where(label[1, 3:] == 1, 0, label[1, 3:])  # three foreground at most
    label[1, :3] = 1
    keys = jax.random.split(jax.random.key(3), 2)
    positive, negative = map(np.asarray, anchors.sample(keys, jnp.asarray(label), 20, 0.25))
    assert (label[positive] == 1).all()
    assert (label[negative] == 0).all()
    assert positive.sum(1).tolist() == [5, 3]
    assert negative.sum(1).tolist() == [15, 17]
    again = anchors.sample(keys[1:], jnp.asarray(label[1:]), 20, 0.25)  # an image by itself
    np.testing.assert_array_equal(again[0][0], positive[1])
    everything = anchors.sample(keys, jnp.asarray(label), 10**7, 0.5)
    np.testing.assert_array_equal(everything[0], label == 1)
    np.testing.assert_array_equal(everything[1], label == 0)


def test_a_sample_is_even():
    label = jnp.asarray([[1] * 8 + [0] * 8])
    draw = jax.jit(lambda key: anchors.sample(key[None], label, 8, 0.5))
    counts = sum(
        np.concatenate(draw(key), axis=0).astype(int)
        for key in jax.random.split(jax.random.key(0), 400)
    )
    used = np.concatenate([counts[0, :8], counts[1, 8:]])
    assert counts.sum() == 400 * 8
    assert abs(used - 200).max() < 60, used  # six deviations of 10


def test_boxes_without_area_have_finite_deltas():
    point = jnp.array([3.0, 3.0, 3.0, 3.0])
    box = jnp.array([1.0, 1.0, 5.0, 5.0])
    for pair in ((point, box), (box, point), (point, point)):
        assert np.isfinite(anchors.encode(*pair)).all()
