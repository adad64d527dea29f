import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.ops import segmentation_losses as ops


def draw(rng, batch=3, classes=4, size=(5, 7), ignored=0.2):
    logits = rng.normal(size=(batch, *size, classes)) * 3
    label = rng.integers(classes, size=(batch, *size)).astype(np.uint8)
    label[rng.random(label.shape) < ignored] = 255
    return logits, label


def by_hand(logits, label, gamma=0.0, weights=None):
    """Pixel by pixel: (weighted sum of losses, sum of weights) of each image."""
    sums, counts = np.zeros(len(label)), np.zeros(len(label))
    for i, y, x in np.ndindex(label.shape):
        k = label[i, y, x]
        if k == 255:
            continue
        p = np.exp(logits[i, y, x]) / np.exp(logits[i, y, x]).sum()
        weight = 1.0 if weights is None else weights[k]
        sums[i] -= weight * (1 - p[k]) ** gamma * np.log(p[k])
        counts[i] += weight
    return sums, counts


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_pixel_losses_are_means_over_all_counted_pixels(rng, gamma, weighted):
    logits, label = draw(rng)
    weights = rng.random(4) + 0.1 if weighted else None
    sums, counts = by_hand(logits, label, gamma, weights)
    with jax.enable_x64(True):
        losses = ops.pixel_losses(jnp.asarray(logits), label, gamma=gamma)
        given = None if weights is None else jnp.asarray(weights)
        ours = ops.weighted_mean(losses, jnp.asarray(label), given)
        alone = ops.weighted_mean(losses, jnp.asarray(label), given, alone=True)
    np.testing.assert_allclose(np.asarray(ours).mean(), sums.sum() / counts.sum(), rtol=1e-10)
    np.testing.assert_allclose(alone, sums / counts, rtol=1e-10)


def test_micro_batches_add_up_to_their_batch(rng):
    logits, label = draw(rng, batch=4)
    with jax.enable_x64(True):
        losses = ops.pixel_losses(jnp.asarray(logits), label)
        whole = ops.weighted_mean(losses, jnp.asarray(label)).mean()
        parts = [
            ops.weighted_mean(
                losses[rows], jnp.asarray(label[rows]), whole=jnp.asarray(label)
            ).mean()
            for rows in (slice(0, 2), slice(2, 4))
        ]
    np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-12)


def test_nothing_counted_is_no_loss_and_no_gradient(rng):
    logits, _ = draw(rng)
    label = jnp.full((3, 5, 7), 255, jnp.uint8)

    def loss(logits):
        pixels = ops.pixel_losses(logits, label, gamma=0.5)
        return ops.weighted_mean(pixels, label).sum() + ops.dice_losses(logits, label).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32))
    assert value == 0
    assert not np.asarray(gradient).any()


def test_the_focal_gradient_is_finite_where_all_is_right():
    logits = jnp.asarray([[[[200.0, 0.0]]]])
    label = jnp.zeros((1, 1, 1), jnp.uint8)
    gradient = jax.grad(lambda x: ops.pixel_losses(x, label, gamma=0.5).sum())(logits)
    assert np.isfinite(gradient).all()


def test_dice_of_each_image_and_its_classes(rng):
    logits, label = draw(rng, ignored=0.3)
    label[0][label[0] == 2] = 1  # a class that an image has not
    expected = []
    for scores, mask in zip(logits, label, strict=True):
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        there = mask != 255
        terms = []
        for k in np.unique(mask[there]):
            t = mask[there] == k
            q = p[there][:, k]
            terms.append(1 - (2 * q[t].sum() + 1) / (q.sum() + t.sum() + 1))
        expected.append(np.mean(terms))
    with jax.enable_x64(True):
        ours = ops.dice_losses(jnp.asarray(logits), label)
    np.testing.assert_allclose(ours, expected, rtol=1e-10)


def test_rare_classes_weigh_more(rng):
    _, label = draw(rng, batch=2)
    counts = ops.class_counts(jnp.asarray(label), 4)
    assert counts.tolist() == [(label == k).sum() for k in range(4)]
    shares = np.asarray(counts) / np.asarray(counts).sum()
    found = ops.frequency_weights(counts)
    np.testing.assert_allclose(found, 1 / np.log(1.02 + shares), rtol=1e-5)
    with pytest.raises(UserError, match="3 for 4 classes"):
        ops.check_weights((1.0, 2.0, 3.0), 4)
