"""The losses against their formulas in numpy, and who counts as fooled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.attacks import losses
from vision_jax.errors import UserError

LOGITS = np.random.default_rng(0).normal(size=(12, 6)) * 3
LABELS = np.arange(12) % 6
TARGETS = (LABELS + 1 + np.arange(12) // 4) % 6


def of(images):
    """Logits that are the images themselves."""
    return images.reshape(len(images), -1)


def images_of(logits):
    return jnp.asarray(logits.reshape(len(logits), 1, 1, -1), np.float32)


def others(row, label):
    return np.delete(row, label)


def test_losses_are_their_formulas():
    rows = list(zip(LOGITS, LABELS, TARGETS, strict=True))
    ordered = [np.sort(row)[::-1] for row in LOGITS]
    expected = {
        losses.cross_entropy: [np.log(np.exp(z).sum()) - z[y] for z, y, _ in rows],
        losses.margin: [others(z, y).max() - z[y] for z, y, _ in rows],
        losses.dlr: [
            -(z[y] - others(z, y).max()) / (s[0] - s[2])
            for (z, y, _), s in zip(rows, ordered, strict=True)
        ],
    }
    for loss, values in expected.items():
        raised, fooled = losses.make_untargeted(of, jnp.asarray(LABELS), loss)(images_of(LOGITS))
        np.testing.assert_allclose(raised, values, rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(fooled, LOGITS.argmax(1) != LABELS)
        lowered, _ = losses.make_targeted(of, jnp.asarray(LABELS), loss)(images_of(LOGITS))
        np.testing.assert_array_equal(lowered, -raised)
    raised, fooled = losses.make_targeted_dlr(of, jnp.asarray(LABELS), jnp.asarray(TARGETS))(
        images_of(LOGITS)
    )
    values = [
        -(z[y] - z[t]) / (s[0] - (s[2] + s[3]) / 2)
        for (z, y, t), s in zip(rows, ordered, strict=True)
    ]
    np.testing.assert_allclose(raised, values, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(fooled, LOGITS.argmax(1) != LABELS)


def test_a_target_is_reached_where_it_is_predicted():
    predicted = jnp.asarray(LOGITS.argmax(1))
    for loss in (losses.cross_entropy, losses.margin):
        assert losses.make_targeted(of, predicted, loss)(images_of(LOGITS))[1].all()
        assert not losses.make_targeted(of, (predicted + 1) % 6, loss)(images_of(LOGITS))[1].any()


def test_soft_labels_are_their_likeliest_class_and_mix_in_cross_entropy():
    soft = 0.7 * np.eye(6)[LABELS] + 0.3 * np.eye(6)[TARGETS]
    images = images_of(LOGITS)
    mixed, fooled = losses.make_untargeted(of, jnp.asarray(soft, np.float32))(images)
    label, _ = losses.make_untargeted(of, jnp.asarray(LABELS))(images)
    target, _ = losses.make_untargeted(of, jnp.asarray(TARGETS))(images)
    np.testing.assert_allclose(mixed, 0.7 * label + 0.3 * target, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(fooled, LOGITS.argmax(1) != LABELS)
    np.testing.assert_array_equal(
        losses.margin(jnp.asarray(LOGITS), jnp.asarray(soft)),
        losses.margin(jnp.asarray(LOGITS), jnp.asarray(LABELS)),
    )


def test_losses_and_gradients_are_float32_of_a_half_precision_model():
    half = losses.make_untargeted(lambda x: of(x).astype(jnp.bfloat16), jnp.asarray(LABELS))
    images = images_of(LOGITS)
    assert half(images)[0].dtype == jnp.float32
    assert jax.grad(lambda x: half(x)[0].sum())(images).dtype == jnp.float32


def test_too_few_classes_are_an_error():
    few = images_of(LOGITS[:, :2])
    labels = jnp.zeros(12, int)
    with pytest.raises(UserError, match="dlr loss compares 3 classes and the model has 2"):
        losses.make_untargeted(of, labels, losses.dlr)(few)
    with pytest.raises(UserError, match="targeted dlr loss compares 4 classes and the model has 2"):
        losses.make_targeted_dlr(of, labels, labels)(few)
