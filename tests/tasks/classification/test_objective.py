"""The loss against numpy, with a model whose logits are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax import objective
from vision_jax.errors import UserError
from vision_jax.tasks.classification import objective as classification

DRAW = np.random.default_rng(0)
IMAGES = DRAW.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = DRAW.integers(0, 4, 6).astype(np.int32)
KERNEL = DRAW.standard_normal((192, 4)).astype(np.float32)
BATCH = {
    "image": jnp.asarray(IMAGES),
    "label": jnp.asarray(LABELS),
    "mask": jnp.ones(6, bool),
    "index": jnp.arange(6),
}


def apply(params, model_state, images, *, train, keys):
    flags = {"train": train, "keys": sorted(keys), "range": (images.min(), images.max())}
    apply.seen = flags  # type: ignore[attr-defined]
    return {"logits": images.reshape(len(images), -1) @ params["kernel"]}, model_state


def assemble(flat):
    return {"kernel": flat["a"] + flat["b"]}


def make_loss(**arguments):
    return objective.make_loss(classification.make_objective(apply, assemble, **arguments))


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_is_the_cross_entropy_of_images_in_0_1(smoothing):
    loss_fn = make_loss(num_classes=4, label_smoothing=smoothing)
    trainable, frozen = {"a": KERNEL / 2}, {"b": KERNEL / 2}
    loss, (state, metrics) = loss_fn(trainable, frozen, {"s": 1}, BATCH, jax.random.key(0))
    logits = IMAGES.reshape(6, -1).astype(np.float64) / 255 @ KERNEL
    targets = (1 - smoothing) * np.eye(4)[LABELS] + smoothing / 4
    expected = -(targets * log_softmax(logits)).sum(1).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert (state, metrics) == ({"s": 1}, {})
    assert apply.seen["train"] is True
    assert apply.seen["keys"] == ["adapter", "dropout"]


@pytest.mark.long(but=("changes5",))
@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 1.0},
        {"cutmix": 1.0},
        {"mixup": 1.0, "cutmix": 1.0},
        {"erasing": 1.0},
        {"policy": "rand"},
        {"policy": "trivial"},
    ],
)
def test_augmentations_change_the_loss_and_are_functions_of_the_key(changes):
    plain = make_loss(num_classes=4)
    loss_fn = jax.jit(make_loss(num_classes=4, **changes))
    arguments = ({"a": KERNEL}, {"b": 0 * KERNEL}, {}, BATCH)
    first, again, other = (
        float(loss_fn(*arguments, jax.random.key(seed))[0]) for seed in (4, 4, 5)
    )  # keys that mix a good share: key 0 draws a mixup of 0.001, key 1 an empty cutmix box
    assert np.isfinite(first)
    assert first == again != other
    assert abs(first - float(plain(*arguments, jax.random.key(4))[0])) > 1e-4


def test_weights_of_the_classes_weigh_their_images():
    arguments = ({"a": KERNEL}, {"b": 0 * KERNEL}, {}, BATCH, jax.random.key(0))
    plain = float(make_loss(num_classes=4)(*arguments)[0])
    one = [
        float(make_loss(num_classes=4, class_weights=w)(*arguments)[0]) for w in np.eye(4).tolist()
    ]
    assert sum(one) == pytest.approx(plain, rel=1e-6)
    absent = [label not in LABELS for label in range(4)]
    assert [value == 0 for value in one] == absent
    with pytest.raises(UserError, match="2 for 4 classes"):
        make_loss(num_classes=4, class_weights=(1.0, 2.0))


def test_outputs_are_logits_and_what_the_evaluation_needs():
    outputs = classification.make_outputs(apply, assemble)({"a": KERNEL}, {"b": KERNEL}, {}, BATCH)
    expected = IMAGES.reshape(6, -1) / 255 @ (2 * KERNEL)
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-4)
    for name in ("label", "mask", "index"):
        np.testing.assert_array_equal(outputs[name], BATCH[name])
    assert apply.seen["train"] is False
    assert apply.seen["keys"] == []
