"""The loss of hidden patches against numpy, what is hidden, and the names of a collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.ops import reconstruction
from vision_jax.tasks.pretraining import metrics, objective

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


def made(normalize=True, mask_ratio=0.75):
    return objective.Task(
        patch_size=4, patches=6, mean=MEAN, std=STD, mask_ratio=mask_ratio, normalize=normalize
    )


def apply(params, model_state, images, visible, *, train, keys):
    """Predicts the same for all patches; sees what it is given."""
    patches = jnp.broadcast_to(params["constant"], (len(images), 6, 48))
    token = images.mean((1, 2)) if visible is None else None  # of the whole image
    return {"logits": patches, "visible": visible, "token": token}, model_state


def batch_of(rng, count=5):
    return {
        "image": jnp.asarray(rng.integers(0, 256, (count, 8, 12, 3)), jnp.uint8),
        "label": jnp.arange(count, dtype=jnp.int32) % 2,
        "index": jnp.arange(count, dtype=jnp.int32),
        "mask": jnp.ones(count, bool),
    }


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_numpys(rng, normalize):
    """Patch by patch, pixel by pixel, with the unbiased variance."""
    task, batch = made(normalize), batch_of(rng)
    goal = objective.make_objective(apply, lambda flat: flat, task)
    flat = {"constant": jnp.asarray(rng.normal(size=(1, 1, 48)), jnp.float32)}
    view = goal.prepare(flat, {}, {}, batch, jax.random.key(3))
    outputs, _ = goal.forward(flat, {}, {}, view, jax.random.key(0), train=True)
    losses, _ = goal.criterion(flat, outputs, view)
    assert view["visible"].shape == (5, 1)
    images = (np.float64(batch["image"]) / 255 - MEAN) / STD
    for image, visible, loss in zip(images, np.asarray(view["visible"]), losses, strict=True):
        errors = []
        for patch in sorted(set(range(6)) - set(visible)):
            row, column = divmod(patch, 3)
            target = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].ravel()
            if normalize:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(np.mean((np.float64(flat["constant"]).ravel() - target) ** 2))
        np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-5)


def test_what_is_hidden_follows_from_the_key_alone(rng):
    task, batch = made(mask_ratio=0.5), batch_of(rng, 400)
    goal = objective.make_objective(apply, lambda flat: flat, task)
    one, again, other = (
        np.asarray(goal.prepare({}, {}, {}, batch, jax.random.key(seed))["visible"])
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert one.shape == (400, 3)
    assert all(len(set(row)) == 3 for row in one)
    shares = np.bincount(one.ravel(), minlength=6) / 400  # of 0.5 each
    assert np.abs(shares - 0.5).max() < 5 * np.sqrt(0.25 / 400)


def test_evaluation_hides_by_the_images_row_whatever_the_batch(rng):
    outputs_fn = objective.make_outputs(apply, lambda flat: flat, made())
    batch = batch_of(rng)
    flat = {"constant": jnp.zeros((1, 1, 48))}
    whole = outputs_fn(flat, {}, {}, batch)
    turned = {name: array[::-1] for name, array in batch.items()}
    back = outputs_fn(flat, {}, {}, turned)
    np.testing.assert_array_equal(whole["hidden"], back["hidden"][::-1])
    np.testing.assert_allclose(whole["loss"], back["loss"][::-1], rtol=1e-6)
    np.testing.assert_allclose(whole["loss"], 1, rtol=0.05)  # the variance of what is normalized
    np.testing.assert_allclose(whole["spread"], 0, atol=1e-6)
    colors = np.float64(batch["image"]).mean((1, 2)) / 255
    np.testing.assert_allclose(whole["token"], colors, rtol=1e-5)
    np.testing.assert_array_equal(whole["label"], batch["label"])
    assert (np.asarray(whole["target_spread"]) > 0.5).all()


def test_a_share_that_leaves_nothing_is_an_error():
    for ratio in (0.99, 0.0):
        with pytest.raises(ValueError, match="patches leaves"):
            reconstruction.visible_patches(jnp.zeros((1, 6)), ratio)


def test_a_constant_reconstruction_is_named():
    ones = np.ones(4)
    healthy = metrics.summarize(ones, 0.4 * ones, ones)
    assert healthy == {"loss": 1.0, "spread": 0.4, "count": 4}
    assert metrics.diagnose(healthy, 300, 200) == []
    constant = metrics.summarize(ones, 1e-3 * ones, ones)
    assert metrics.diagnose(constant, 199, 200) == []  # too early to tell
    (line,) = metrics.diagnose(constant, 200, 200)
    assert line.startswith("constant reconstruction: ")
    (line,) = metrics.diagnose(metrics.summarize(ones, ones, 0 * ones), 0, 200)
    assert "are the images blank?" in line
    with pytest.raises(UserError, match="not finite for 1 of 4 images"):
        metrics.summarize(np.array([1, 1, np.nan, 1]), ones, ones)
