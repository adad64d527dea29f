"""Runs of RetinaNet and FCOS: resume, micro-batches, frozen parts, adapters under attack."""

import functools
import re

import detection_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vision_jax import convert, train
from vision_jax.config import load_config
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.models.families import build_model
from vision_jax.ops.dense_losses import anchor_loss, giou_loss, point_loss
from vision_jax.run.restore import restore

CONFIG = runs.ROOT / "configs/retinanet_finetune.py"
MODELS = {"retinanet": detection_runs.RETINANET, "fcos": detection_runs.FCOS}
TERMS = {"retinanet": ("loss_class", "loss_box"), "fcos": ("loss_class", "loss_box", "loss_center")}


def config_of(family, **more):
    fields = {**MODELS[family], "model__freeze_norm": False, **more}
    return load_config(str(CONFIG), detection_runs.overrides(**fields))


@functools.cache
def batch(family):
    """(model, variables, images, mask): the second image is half of the canvas."""
    model = build_model(family, num_classes=3, **dict(MODELS[family]["model__arguments"]))
    images = jnp.asarray(np.random.default_rng(0).random((3, 64, 96, 3)), jnp.float32)
    mask = jnp.ones((3, 64, 96), bool).at[1, :, 40:].set(False)
    return model, jax.jit(model.init)(jax.random.key(0), images), images, mask


@pytest.mark.long
@pytest.mark.parametrize("family", MODELS)
def test_predictions_depend_on_no_padding_and_no_batch(family):
    """Also on another, larger canvas; what is beyond an image says nothing."""
    model, variables, images, mask = batch(family)
    evaluate = jax.jit(model.apply)
    whole = evaluate(variables, images, mask)
    turned = evaluate(variables, images[::-1], mask[::-1])
    wide = [(0, 0), (0, 32), (0, 64)]
    padded = jnp.pad(images, [*wide, (0, 0)], constant_values=0.7), jnp.pad(mask, wide)
    larger = evaluate(variables, *padded)
    alone = evaluate(variables, images[1:2, :, :40])
    assert (whole["score"] > 0).all()
    for name in ("score", "label", "boxes_xyxy_01"):
        np.testing.assert_array_equal(whole[name], turned[name][::-1], err_msg=name)
        np.testing.assert_allclose(whole[name], larger[name], rtol=1e-4, atol=1e-5, err_msg=name)
        one = whole[name][1:2]
        np.testing.assert_allclose(one, alone[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("family", MODELS)
def test_a_run_resumes_where_it_stopped(family, tmp_path, capsys):
    """To the bit, of one program; then boxes of a file, and the weights by torchvision's names."""
    config = config_of(family, optim__ema_decay=0.9)
    assert detection_runs.check_resume(config, tmp_path) == [1, 1, 1]
    records = read_metrics(tmp_path / "once/metrics.jsonl")
    for record in (record for record in records if "train/loss" in record):
        terms = sum(record[f"train/{name}"] for name in TERMS[family])
        np.testing.assert_allclose(record["train/loss"], terms, rtol=1e-4)

    assert detection_runs.check_predictions(config, tmp_path / "once", tmp_path) > 0
    found = convert.read_weights(str(tmp_path / "once/model.safetensors"))
    assert convert.recognize(found)[0] == family
    assert found.preprocessing["rule"] == "torchvision"
    assert "backbone.fpn.extra_blocks.p6.weight" in found.tensors
    capsys.readouterr()


@pytest.mark.long
@pytest.mark.parametrize("family", MODELS)
def test_adapters_train_against_attacks_in_micro_batches(family, tmp_path):
    """On convolutions of the body and of a head, beside a new head, and their files in PEFT's."""
    config = config_of(
        family,
        recipes=("lora", "adversarial"),
        model__freeze_norm=True,
        trainable=("class_head/.*",),
        lora__rules=("backbone/stage_.*conv[12]/kernel", "box_tower/conv_0/kernel"),
        lora__rank=2,
        adversarial__steps=1,
        batch_size=16,
        optim__accumulate=2,
        total_steps=2,
        evaluate__every=2,
    )
    assert train.run(config, tmp_path) == 0
    restored = restore(config, tmp_path, "last")
    for path in ("backbone/stage_0/block_0/conv1/kernel", "box_tower/conv_0/kernel"):
        assert f"{path}/base" in restored.frozen
        assert f"{path}/b" in restored.state.trainable
    assert "box_tower/norm_0/scale" in restored.frozen
    weights = convert.read_weights(str(tmp_path / "model.safetensors"))
    assert convert.recognize(weights)[0] == family


def random_outputs(rng, family, images=4):
    """(outputs of a grid of four by four anchors or points of 16 pixels, targets)."""
    corner = 16.0 * np.indices((4, 4)).reshape(2, -1)[::-1].T
    places = np.concatenate([corner - 8, corner + 8], axis=1)
    places = np.broadcast_to(places, (images, 16, 4))
    outputs = {
        "logits": rng.normal(size=(images, 16, 3)),
        "inside": np.broadcast_to(np.arange(16) < 14, (images, 16)),
    }
    if family == "retinanet":
        outputs |= {"box_deltas": rng.normal(size=(images, 16, 4)), "anchors_xyxy_px": places}
    else:
        outputs |= {
            "distances": rng.uniform(0, 3, size=(images, 16, 4)),
            "center_logits": rng.normal(size=(images, 16)),
            "points_xyxy_px": places,
            "reach_px": np.broadcast_to([0.0, np.inf], (images, 16, 2)),
        }
    counts = np.array([3, 0, 1, 4])[:images]
    targets = (
        rng.integers(0, 3, (images, 4)),
        np.concatenate([rng.uniform(0.3, 0.7, (images, 4, 2)), np.full((images, 4, 2), 0.5)], -1),
        np.arange(4)[None] < counts[:, None],
    )
    return outputs, targets


@pytest.mark.long
@pytest.mark.parametrize("family", MODELS)
def test_a_batch_is_its_micro_batches_and_alone_each_image(family, rng):
    """RetinaNet's mean; FCOS' weighed by the points that are counted (float64)."""
    outputs, targets = random_outputs(rng, family)

    def loss(outputs, targets, **more):
        images = len(outputs["logits"])
        rest = (jnp.ones(images, bool), jnp.full((images, 2), 64))
        given = (jax.tree.map(jnp.asarray, outputs), *map(jnp.asarray, targets), *rest)
        return (anchor_loss if family == "retinanet" else point_loss)(*given, **more)

    def part(rows):
        return {name: x[rows] for name, x in outputs.items()}, [x[rows] for x in targets]

    with jax.enable_x64(True):
        losses, metrics = loss(outputs, targets)
        halves = [loss(*part(rows)) for rows in (slice(0, 2), slice(2, 4))]
        weights = [half[1].get("foreground", 1) for half in halves]
        mean = np.average([half[0].mean() for half in halves], weights=weights)
        np.testing.assert_allclose(losses.mean(), mean, rtol=1e-12)
        single = [loss(*part(slice(i, i + 1)))[0][0] for i in range(4)]
        alone, _ = loss(outputs, targets, **({"alone": True} if family == "fcos" else {}))
        np.testing.assert_allclose(alone, single, rtol=1e-12)
    assert np.isfinite(losses).all()
    assert float(metrics["foreground" if family == "fcos" else "anchors"]) > 0


@pytest.mark.long(but=("fcos",))
@pytest.mark.parametrize("family", MODELS)
def test_no_gradient_is_without_end(family, rng):
    """Boxes that vanish, targets without area and padded examples."""
    outputs, (label, boxes, mask) = random_outputs(rng, family)
    boxes[0, 0, 2:] = 0
    said = "box_deltas" if family == "retinanet" else "distances"
    outputs[said][1:] = -100 if family == "retinanet" else 0

    def loss(values):
        given = {**jax.tree.map(jnp.asarray, outputs), **values}
        rest = (label, boxes, mask, np.array([True, True, True, False]), np.full((4, 2), 64))
        if family == "retinanet":
            return anchor_loss(given, *map(jnp.asarray, rest), box_loss="giou")[0]
        return point_loss(given, *map(jnp.asarray, rest))[0]

    values = {name: jnp.asarray(outputs[name], jnp.float32) for name in ("logits", said)}
    losses, gradient = loss(values), jax.grad(lambda x: loss(x).sum())(values)
    assert losses[3] == 0
    assert (losses[:3] > 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((losses, gradient)))


def test_boxes_that_vanish_have_a_distance():
    box, none = jnp.array([0.0, 0.0, 2.0, 2.0]), jnp.zeros(4)
    found = [float(giou_loss(*pair)) for pair in ((box, box), (box, none), (none, none))]
    np.testing.assert_allclose(found, [0, 1, 1], atol=1e-6)


def test_what_the_config_trains():
    """All kernels of the body after the first stage and no norm of it; all of the rest."""
    rule, rest = load_config(str(CONFIG), {}).trainable
    for family in MODELS:
        golden = runs.ROOT / f"tests/golden/parameters/{family}.txt"
        names = {line.split()[0] for line in golden.read_text().splitlines()}
        names = {name.partition("/")[2] for name in names if name.startswith("params/")}
        body = {path for path in names if path.startswith("backbone/")}
        late = {path for path in body if re.match("backbone/stage_[1-9]", path)}
        kernels = {path for path in late if path.endswith("kernel")}
        assert {path for path in names if re.fullmatch(rule, path)} == kernels
        assert {path for path in names if re.fullmatch(rest, path)} == names - body


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("retinanet", {"anchor_sizes": (8, 16)}, r"anchor_sizes \(8, 16\): give 4, one for each"),
        ("retinanet", {"anchor_sizes": (8, 16, 32, (1, 2))}, "give as many for each level"),
        ("fcos", {"point_sizes": (8,) * 5}, "point_sizes .*: give 4"),
        ("fcos", {"head_groups": 3}, "head_groups 3: 8 channels are no multiple of it"),
        ("fcos", {"first_map": 2}, "first_map 2: the body has 2 stages"),
    ],
)
def test_sizes_that_make_no_model_are_refused(family, arguments, message):
    given = {**dict(MODELS[family]["model__arguments"]), **arguments}
    model = build_model(family, num_classes=3, **given)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
