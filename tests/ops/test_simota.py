"""SimOTA without its reference: what is masked, images alone, and the cells that a target gets.

tests/parity/test_yolox.py compares terms and gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vision_jax import steps
from vision_jax.ops import cells
from vision_jax.ops.simota import assign, yolox_loss

CANVAS, STRIDES, CLASSES, SLOTS = (32, 64), (8, 16, 32), 3, 4
CELLS = len(cells.grid(CANVAS, STRIDES)[0])


def predictions(rng, batch):
    return (
        jnp.asarray(rng.normal(size=(batch, CELLS, CLASSES)), jnp.float32),
        jnp.asarray(rng.normal(size=(batch, CELLS)), jnp.float32),
        jnp.asarray(rng.normal(size=(batch, CELLS, 4)) * 0.5, jnp.float32),
    )


def targets(rng, counts):
    boxes = rng.uniform([8, 8, 6, 6], [56, 24, 30, 20], (len(counts), SLOTS, 4))
    label = rng.integers(0, CLASSES, (len(counts), SLOTS))
    mask = np.arange(SLOTS)[None] < np.array(counts)[:, None]
    return jnp.asarray(label, jnp.int32), jnp.asarray(boxes, jnp.float32), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnums=3)
def loss(predicted, given, mask, alone=False):
    return yolox_loss(
        *predicted, *given, mask, canvas=CANVAS, strides=STRIDES, l1_weight=1.0, alone=alone
    )


@pytest.mark.long
def test_what_is_masked_counts_nothing(rng):
    """Whatever stands there: targets, and whole examples; gradients stay finite."""
    predicted, (label, boxes, mask) = predictions(rng, 3), targets(rng, (2, 0, 4))
    there = jnp.array([True, True, False])
    losses, metrics = loss(predicted, (label, boxes, mask), there)
    junk = jnp.where(mask[..., None], boxes, jnp.nan).at[2].set(jnp.nan)
    other = jnp.where(mask, label, 99)
    again, same = loss(predicted, (other, junk, mask), there)
    np.testing.assert_array_equal(losses, again)
    jax.tree.map(np.testing.assert_array_equal, metrics, same)
    assert losses[2] == 0
    gradients = jax.grad(lambda p: loss(p, (other, junk, mask), there)[0].mean())(predicted)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert not gradient[2].any()
    # Two examples of three: the mean over the two, less what a row more divides.
    two, _ = loss(
        jax.tree.map(lambda x: x.at[2].set(x[1]), predicted),
        jax.tree.map(lambda x: x.at[2].set(x[1]), (label, boxes, mask)),
        there,
    )
    np.testing.assert_allclose(two[:2], losses[:2], rtol=1e-6)


@pytest.mark.long
def test_an_image_alone_is_a_batch_of_one(rng):
    predicted, given = predictions(rng, 3), targets(rng, (3, 1, 0))
    there = jnp.ones(3, bool)
    losses, _ = loss(predicted, given, there, True)
    for index in range(3):
        one = jax.tree.map(lambda x, i=index: jnp.stack([x[i]] * 3), (predicted, given))
        only = jnp.arange(3) == 0
        batch, _ = loss(*one, only)
        np.testing.assert_allclose(batch.mean(), losses[index], rtol=2e-6)


@pytest.mark.long
def test_parts_of_an_update_count_the_foregrounds_of_all_of_it(rng):
    """One update of eight images in 1 and 4 parts, in float64: losses, metrics, gradients.

    Parts have 0 to 4 targets an image, and so very different foregrounds, which only the model's
    own predictions tell.
    """
    predicted = predictions(rng, 8)
    label, boxes, mask = targets(rng, (4, 0, 0, 1, 2, 4, 0, 3))
    batch = {"label": label, "boxes": boxes, "target_mask": mask, "row": jnp.arange(8)}

    def loss_fn(trainable, frozen, model_state, batch, key):
        rows = [trainable[name][batch["row"]] for name in sorted(trainable)]
        given = (batch["label"], batch["boxes"], batch["target_mask"])
        losses, metrics = loss(rows, given, jnp.ones(len(batch["row"]), bool))
        return losses.mean(), (model_state, metrics)

    with jax.enable_x64(True):
        found = []
        for parts in (1, 4):
            tx = optax.sgd(1.0)
            trainable = {f"{i}": jnp.asarray(x, jnp.float64) for i, x in enumerate(predicted)}
            step = steps.make_train_step(
                loss_fn,
                tx,
                seed=0,
                schedule=lambda step: 1.0,
                accumulate=parts,
                counted="foreground",
            )
            state = steps.make_state(trainable, {}, tx=tx, ema=False)
            state, metrics = step(state, {}, jax.tree.map(jnp.asarray, batch))
            found.append(jax.device_get((state.trainable, metrics)))
    whole, split = found
    assert whole[1]["foreground"] > 8
    jax.tree.map(
        lambda own, wanted: np.testing.assert_allclose(own, wanted, rtol=1e-10, atol=1e-12),
        *(split, whole),
    )


@pytest.mark.long
def test_a_perfect_prediction_gets_the_cells_around_the_center():
    """Ten cells of perfect overlap want ten cells, of all maps, nearest to the target's center."""
    target = jnp.array([[[32.0, 16.0, 40.0, 20.0]]])
    deltas = cells.encode(jnp.broadcast_to(target, (1, CELLS, 4)), CANVAS, STRIDES)
    boxes = cells.decode(deltas, CANVAS, STRIDES)
    np.testing.assert_allclose(boxes, jnp.broadcast_to(target, boxes.shape), rtol=1e-5)
    found = assign(
        jnp.full((1, CELLS, CLASSES), 3.0),
        jnp.full((1, CELLS), 3.0),
        boxes,
        jnp.zeros((1, 1), jnp.int32),
        target,
        jnp.ones((1, 1), bool),
        canvas=CANVAS,
        strides=STRIDES,
    )
    grid, stride = cells.grid(CANVAS, STRIDES)
    away = np.abs((grid + 0.5) * stride - np.array([32, 16])).max(-1)
    near = away < 1.5 * stride[:, 0]
    assert found.foreground.sum() in (9, 10)  # the sum of ten overlaps of nearly 1, rounded down
    assert not found.foreground[0][~near].any()
    np.testing.assert_allclose(found.iou[0][found.foreground[0]], 1, rtol=1e-5)
