"""Attacks on a detector: padding stays, and an image's attack depends on nothing but the image."""

import detection_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from vision_jax import sharding
from vision_jax.attacks import gradient
from vision_jax.data.detection_pipeline import make_detection_eval_batches
from vision_jax.data.pipeline import DamageLog
from vision_jax.models import families
from vision_jax.recipes.adversarial import objective as adversarial
from vision_jax.run.prepare import prepare
from vision_jax.run.restore import restore
from vision_jax.tasks.detection import objective as detection
from vision_jax.tasks.detection import task as detect
from vision_jax.tasks.gradient_attacks import make_adversarial_outputs

EPSILON = 0.05


@pytest.fixture(scope="module")
def restored():
    return restore(detection_runs.tiny_config(), detection_runs.finished(), "last")


@pytest.fixture(scope="module")
def batch(restored):
    """8 images of 48 × 48 on a canvas of 64 × 80; what stands in the padding is not black."""
    config = detection_runs.tiny_config()
    preprocessing = restored.run.description.preprocessing
    preprocessing = type(preprocessing)(**{**vars(preprocessing), "buckets": ((64, 80),)})
    source = detect.read_eval_source(config, restored.run.description.class_names)
    made = next(
        make_detection_eval_batches(
            source, batch_size=8, preprocessing=preprocessing, max_boxes=6, num_threads=1
        )
    )
    made["image"][~np.asarray(detection.pixel_mask(jnp.asarray(made["size"]), (64, 80)))] = 99
    return made


@pytest.fixture(scope="module")
def attacked(restored):
    """A compiled function of a batch: outputs under attack, with losses before and after."""
    config = detection_runs.tiny_config()
    model = restored.run.model
    objective = detection.make_objective(
        families.make_apply(model),
        restored.run.parameters.assemble,
        loss=detect._make_loss(config, model, "softmax_set", alone=True),
    )
    read = detection.make_read(detection.PREDICTIONS["softmax_set"].postprocess)
    outputs_fn = make_adversarial_outputs(objective, read=read, attack=pgd, seed=3)
    trainable, frozen, model_state = jax.device_get(restored.trained.arguments)
    state = (model_state, np.float32(EPSILON), 7 * jnp.arange(9))

    def losses_of(batch, images):
        key = jax.random.key(0)
        view = {**objective.prepare(trainable, frozen, model_state, batch, key), "image": images}
        outputs, _ = objective.forward(trainable, frozen, model_state, view, key, train=False)
        return objective.criterion(trainable, outputs, view)[0]

    def outputs_and_losses(batch):
        found = outputs_fn(trainable, frozen, state, batch)
        images = {"before": found["image"], "after": found["adversarial"]}
        return {**found, **{name: losses_of(batch, image) for name, image in images.items()}}

    return jax.jit(outputs_and_losses)


def pgd(loss, images, keys, *, epsilon, pixel_mask):
    return gradient.pgd(
        loss, images, keys, epsilon=epsilon, step_size=epsilon / 2, steps=2, pixel_mask=pixel_mask
    )


@pytest.mark.long
def test_an_attack_stays_in_its_ball_and_off_the_padding(attacked, batch):
    found = jax.device_get(attacked(batch))
    inside = np.asarray(detection.pixel_mask(jnp.asarray(batch["size"]), (64, 80)))
    np.testing.assert_allclose(found["image"], batch["image"] / 255, rtol=1e-6)
    change = found["adversarial"] - found["image"]
    assert (change[~inside] == 0).all()
    assert np.abs(change).max() == pytest.approx(EPSILON, rel=1e-5)
    assert (np.abs(change[inside]) > 0.2 * EPSILON).mean() > 0.5
    assert (found["after"] > found["before"]).all()


@pytest.mark.long
def test_an_attack_is_the_same_in_another_batch_and_on_8_devices(attacked, batch):
    """But for signs of gradients that are zero up to rounding."""
    alone = jax.device_get(attacked(batch))
    order = np.concatenate([np.arange(8)[::-1], [0, 0, 0, 3, 3, 5, 6, 6]])
    other = {name: array[order] for name, array in batch.items()}
    placed = sharding.make_batch_placer(sharding.make_mesh(data=-1, fsdp=1))(other)
    assert len(placed["image"].sharding.device_set) == 8
    spread = jax.device_get(attacked(placed))
    for name in ("adversarial", "score", "boxes_xyxy_px", "after"):
        wanted = alone[name][order]
        same = np.isclose(spread[name], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
        print(name, same.mean(), np.abs(spread[name] - wanted).max())
        assert same.mean() > 0.999 if name == "adversarial" else 0.9, name


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversarial_training_keeps_off_the_padding(norm, rng):
    """Even of a model that would see it."""
    slope = jnp.asarray(rng.normal(size=(1, 6, 7, 3)), jnp.float32)

    def apply(params, model_state, images, pixel_mask, *, train, keys):
        del params, pixel_mask, keys
        assert not train
        return {"sum": (slope * images).sum((1, 2, 3))}, model_state

    objective = detection.make_objective(
        apply, dict, loss=lambda outputs, view: (outputs["sum"], {})
    )
    threat_model = adversarial.ThreatModel(norm, epsilon=0.1, step_size=0.5, steps=3)
    size = np.array([[6, 7], [4, 7], [6, 2]], np.int32)
    batch = {
        "image": rng.uniform(0.3, 0.7, (3, 6, 7, 3)).astype(np.float32),
        "size": size,
        "index": np.arange(3),
        "mask": np.ones(3, bool),
        "step": jnp.int32(0),
    }
    prepare = adversarial.make_adversarial(objective, "pgd", threat_model).prepare
    image = jax.jit(prepare)({}, {}, {}, batch, jax.random.key(0))["image"]
    change = np.asarray(image) - batch["image"]
    inside = np.asarray(detection.pixel_mask(jnp.asarray(size), (6, 7)))
    assert (change[~inside] == 0).all()
    assert (change[inside] != 0).all()
    if norm == "linf":
        np.testing.assert_allclose(np.abs(change[inside]).max(), 0.1, rtol=1e-5)
    else:
        np.testing.assert_allclose(np.sqrt(np.square(change).sum((1, 2, 3))), 0.1, rtol=1e-5)


# The losses below differ by the attack alone: nothing is dropped, and the first steps are tiny.
STILL = {
    "model__dropout": 0.0,
    "trainable": ("class_head/.*", "box_head/.*"),
    "optim__lr_multipliers": (),
    "total_steps": 1000,
    "optim__warmup_steps": 1000,
    "optim__lr": 0.01,
}


@pytest.mark.long
@pytest.mark.parametrize("family", ["detr", "rf_detr"])
def test_adversarial_training_of_a_detector(family):
    """Every way that there is: one compilation, and higher losses than those of plain images."""
    small = (*detection_runs.ARGUMENTS[:-1], ("decoder_depth", 1))
    changes = {"model__arguments": small} if family == "detr" else detection_runs.RF_DETR
    changes = STILL | changes
    config = detection_runs.tiny_config(**changes)
    source, _ = detect.read_sources(config)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    plain = prepare(config, source.class_names, mesh=mesh)
    state, frozen, _ = jax.device_get(plain.make_arrays())
    trainable, model_state = state.trainable, state.model_state
    assert len(frozen) > 10
    data = plain.training_data(source, DamageLog())
    batches = [sharding.make_batch_placer(mesh)(next(data)) for _ in range(2)]
    clean, _ = jax.jit(plain.loss_fn)(trainable, frozen, model_state, batches[0], jax.random.key(0))
    for settings in (
        {"method": "pgd", "steps": 2},
        {"method": "free", "replays": 4},  # the first of them sees random perturbations
    ):
        settings = {f"adversarial__{name}": value for name, value in settings.items()}
        config = detection_runs.tiny_config(
            recipes=("adversarial",), adversarial__epsilon=0.1, **changes, **settings
        )
        run = prepare(config, source.class_names, mesh=mesh)
        step, state = run.make_train_step(), run.make_state(trainable, model_state)
        held = jax.device_put(frozen, sharding.replicated(mesh))
        losses = []
        for batch in batches:
            state, metrics = step(state, held, batch)
            assert bool(metrics["finite"])
            losses.append(float(metrics["loss"]))
        assert step._cache_size() == 1
        assert losses[0] > 1.003 * float(clean), (losses, clean)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(held), frozen)
        name = "class_head/kernel"
        assert (jax.device_get(state.trainable[name]) != trainable[name]).any()
