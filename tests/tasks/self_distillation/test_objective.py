"""The loss of a student and its average against numpy: what each sees, and what moves."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.objective import make_loss
from vision_jax.ops.multi_crop import Crop
from vision_jax.tasks.self_distillation import objective
from vision_jax.tasks.self_distillation.objective import TEACHER

PROTOTYPES, WIDTH = 5, 4
PLAIN = {"scale": (0.3, 1.0), "sigmas": (), "jitter": 0.0}
SETTINGS = objective.Settings(
    global_crops=Crop(8, blurred=(0.0, 0.0), solarized=(0.0, 0.0), **PLAIN),
    local_crops=Crop(4, blurred=(0.0,) * 3, solarized=(0.0,) * 3, **PLAIN),
    grid=(2, 2),
    student_temperature=0.1,
    teacher_temperature=(0.04, 0.07),
    temperature_steps=11,
    momentum=(0.9, 1.0),
    total_steps=20,
    centering="center",
    center_momentum=0.9,
    frozen_steps=3,
    patch_weight=0.5,
    masked_images=0.5,
    mask_ratio=(0.3, 0.8),
    koleo_weight=0.25,
)


def patches_of(images):  # [B, N, 3]
    batch, side = images.shape[0], images.shape[1] // 4
    return images.reshape(batch, side, 4, side, 4, 3).mean((2, 4)).reshape(batch, -1, 3)


def apply(params, model_state, images, masked=None, places=None, *, train, keys):
    """Linear in the mean color of patches; records what it was asked."""
    CALLS.append((images.shape, masked is not None, train))
    patches = patches_of(images) @ params["kernel"]
    if masked is not None:
        patches = jnp.where(masked[..., None], params["mask_token"], patches)
    outputs = {"token": patches.mean(1), "logits": patches.mean(1) @ params["dino_head/prototypes"]}
    if places is not None:
        chosen = jnp.take_along_axis(patches, places[..., None], axis=1)
        outputs["patch_logits"] = chosen @ params["dino_head/prototypes"]
    return outputs, model_state


CALLS: list = []


def small_numbers(rng, shape):
    """Of which the teacher is in doubt."""
    return jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)


def setting(rng, **changes):
    """(objective, trainable, frozen, model_state, batch)."""
    CALLS.clear()
    goal = objective.make_objective(apply, lambda flat: flat, replace(SETTINGS, **changes))
    shapes = {
        "kernel": (3, WIDTH), "dino_head/prototypes": (WIDTH, PROTOTYPES),
        "mask_token": (1, 1, WIDTH),
    }  # fmt: skip
    student, teacher = (
        {name: small_numbers(rng, shape) for name, shape in shapes.items()} for _ in range(2)
    )
    frozen = {TEACHER + name: array for name, array in teacher.items()}
    state = {
        "center": small_numbers(rng, (1, PROTOTYPES)),
        "patch_center": small_numbers(rng, (1, PROTOTYPES)),
    }
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (4, 10, 10, 3)), jnp.uint8),
        "index": jnp.arange(4, dtype=jnp.int32),
        "mask": jnp.ones(4, bool),
        "step": jnp.int32(5),
    }
    return goal, student, frozen, state, batch


@functools.partial(jax.jit, static_argnums=0)
def run(goal, student, frozen, state, batch):
    """(view, next state, losses, metrics)."""
    view = goal.prepare(student, frozen, state, batch, jax.random.key(3))
    outputs, after = goal.forward(student, frozen, state, view, jax.random.key(0), train=True)
    return view, after, *goal.criterion(student, outputs, view)


def softmax(x):
    x = np.exp(np.float64(x) - np.float64(x).max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_the_loss_is_numpys(rng):
    goal, student, frozen, state, batch = setting(rng)
    view, after, losses, metrics = run(goal, student, frozen, state, batch)
    # The teacher sees whole global crops, still; the student masked ones, and the local ones.
    assert CALLS == [
        ((8, 8, 8, 3), False, False), ((8, 8, 8, 3), True, True), ((12, 4, 4, 3), False, True)
    ]  # fmt: skip

    given = {name: np.float64(x) for name, x in {**student, **frozen, **state}.items()}
    theirs = np.float64(patches_of(view["image"])) @ given[f"{TEACHER}kernel"]
    logits = theirs.mean(1) @ given[f"{TEACHER}dino_head/prototypes"]  # [2 B, K]
    temperature = 0.04 + 0.03 * 5 / 10
    target = softmax((logits - given["center"]) / temperature)
    np.testing.assert_allclose(
        after["center"][0], 0.9 * given["center"][0] + 0.1 * logits.mean(0), rtol=1e-4
    )
    masked = np.asarray(view["masked"])
    ours = np.float64(patches_of(view["image"])) @ given["kernel"]
    ours = np.where(masked[..., None], given["mask_token"], ours)
    head = given["dino_head/prototypes"]
    local = (np.float64(patches_of(view["local"])) @ given["kernel"]).mean(1) @ head
    whole, tokens = ours.mean(1) @ head, ours.mean(1)
    expected = []
    for image in range(4):
        seen = [*whole[2 * image : 2 * image + 2], *local[3 * image : 3 * image + 3]]
        pairs = [(t, s) for t in range(2) for s in range(5) if s != t]
        total = -np.mean([target[2 * image + t] @ np.log(softmax(seen[s] / 0.1)) for t, s in pairs])
        for crop in range(2):
            row = 2 * image + crop
            hidden = np.flatnonzero(masked[row])
            told = theirs[row, hidden] @ given[f"{TEACHER}dino_head/prototypes"]
            told = softmax((told - given["patch_center"]) / temperature)
            said = np.log(softmax(ours[row, hidden] @ head / 0.1))
            if len(hidden):
                total -= 0.5 * (told * said).sum(-1).mean() / 2
            same = tokens[crop::2] / np.linalg.norm(tokens[crop::2], axis=1, keepdims=True)
            others = np.delete(same, image, 0)
            nearest = others[(others @ same[image]).argmax()]
            total -= 0.25 * np.log(np.linalg.norm(same[image] - nearest + 1e-8) + 1e-8)
        expected.append(total)
    assert 0 < masked.any(1).sum() < 8
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert float(metrics["teacher_entropy"]) == pytest.approx(
        -(target * np.log(target)).sum(-1).mean(), rel=1e-3
    )
    assert {"dino", "patch", "koleo", "batch_entropy", "feature_spread"} <= metrics.keys()


@pytest.mark.parametrize("step", [2, 3])
def test_prototypes_are_held_at_first_and_the_teacher_always(rng, step):
    goal, student, frozen, state, batch = setting(
        rng, local_crops=None, patch_weight=0.0, koleo_weight=0.0
    )
    batch["step"] = jnp.int32(step)
    gradient = jax.jit(jax.grad(make_loss(goal), argnums=(0, 1), has_aux=True))
    (ours, theirs), (after, _) = gradient(student, frozen, state, batch, jax.random.key(0))
    assert np.abs(ours["kernel"]).max() > 0
    assert (np.abs(ours["dino_head/prototypes"]).max() > 0) == (step >= 3)
    assert all(np.abs(x).max() == 0 for x in jax.tree.leaves(theirs))
    assert after.keys() == state.keys()
    np.testing.assert_array_equal(after["patch_center"], state["patch_center"])  # nothing masked
    assert np.abs(after["center"] - state["center"]).max() > 0


@pytest.mark.long
def test_sinkhorn_needs_no_center(rng):
    goal, student, frozen, state, batch = setting(rng, centering="sinkhorn")
    view, after, losses, _ = run(goal, student, frozen, state, batch)
    used = np.asarray(view["target"]).reshape(-1, PROTOTYPES).mean(0)
    assert used.max() < 0.5
    np.testing.assert_allclose(view["target"].sum(-1), 1, rtol=1e-5)
    assert np.isfinite(losses).all()
    for name in state:
        np.testing.assert_array_equal(after[name], state[name])


def test_the_teachers_momentum_ends_at_one():
    average = objective.make_objective(apply, lambda flat: flat, SETTINGS).average
    assert average.prefix == TEACHER
    assert float(average.decay(0)) == pytest.approx(0.9)
    assert float(average.decay(10)) == pytest.approx(0.95)
    assert float(average.decay(20)) == 1
