"""Runs of Faster R-CNN: draws that replay, resume, frozen parts, adapters under attack."""

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
from vision_jax.ops.proposal_losses import proposal_loss
from vision_jax.run.restore import restore

CONFIG = runs.ROOT / "configs/fasterrcnn_finetune.py"
ARGUMENTS = {"num_classes": 3, **dict(detection_runs.FASTER_RCNN["model__arguments"])}


def config_of(**more):
    fields = detection_runs.overrides(
        **{**detection_runs.FASTER_RCNN, "model__freeze_norm": False, **more}
    )
    return load_config(str(CONFIG), fields)


@functools.cache
def batch():
    """(model, variables, images, mask, targets): a box without area, no box, half an image."""
    model = build_model("faster_rcnn", **ARGUMENTS)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((3, 32, 64, 3)), jnp.float32)
    mask = jnp.ones((3, 32, 64), bool).at[1, :, 32:].set(False)
    boxes = jnp.asarray(rng.uniform(0.2, 0.6, (3, 4, 4)), jnp.float32).at[0, 0, 2:].set(0)
    targets = {
        "label": jnp.asarray(rng.integers(0, 3, (3, 4))),
        "boxes_cxcywh_01": boxes,
        "target_mask": jnp.arange(4)[None] < jnp.array([[4], [0], [2]]),
    }
    return model, jax.jit(model.init)(jax.random.key(0), images), images, mask, targets


@pytest.mark.long
def test_losses_are_drawn_by_keys_and_stay_finite():
    model, variables, *inputs = batch()

    @jax.jit
    def learn(params, key):
        def loss(params):
            given = {**variables, "params": params}
            outputs = model.apply(given, *inputs, train=True, rngs={"dropout": key})
            losses, _ = proposal_loss(outputs, jnp.ones(3, bool))
            return losses.sum(), (outputs["rpn_sample"], outputs["box_sample"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    first, again, other = (learn(variables["params"], jax.random.key(i)) for i in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    (_, (anchors, boxes)), gradients = first
    assert not np.array_equal(anchors, other[0][1][0])
    assert [int(x) for x in (anchors >= 0).sum(1)] == [16] * 3
    assert (boxes[1] <= 0).all()  # nothing to find
    assert (boxes[0] > 0).any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(first))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients["rpn"]))


@pytest.mark.long
def test_draws_of_evaluation_do_not_depend_on_the_batch():
    model, variables, *inputs = batch()
    evaluate = jax.jit(model.apply)
    whole = evaluate(variables, *inputs)
    part = evaluate(variables, *jax.tree.map(lambda x: x[::-1], inputs))
    for name in ("rpn_sample", "box_sample", "label"):
        np.testing.assert_array_equal(whole[name], part[name][::-1], err_msg=name)


@pytest.mark.long
def test_a_run_resumes_where_it_stopped(tmp_path, capsys):
    """To the bit, of one program; then boxes of a file, and the weights by torchvision's names."""
    config = config_of()
    assert detection_runs.check_resume(config, tmp_path) == [1, 1, 1]
    records = read_metrics(tmp_path / "once/metrics.jsonl")
    names = ("loss_objectness", "loss_rpn_box", "loss_class", "loss_box")
    for record in (record for record in records if "train/loss" in record):
        terms = sum(record[f"train/{name}"] for name in names)
        np.testing.assert_allclose(record["train/loss"], terms, rtol=1e-4)

    assert detection_runs.check_predictions(config, tmp_path / "once", tmp_path) > 0
    found = convert.read_weights(str(tmp_path / "once/model.safetensors"))
    assert convert.recognize(found)[0] == "faster_rcnn"
    assert found.preprocessing["rule"] == "torchvision"
    assert "rpn.head.conv.0.0.weight" in found.tensors
    capsys.readouterr()


@pytest.mark.long
def test_adapters_train_against_attacks(tmp_path):
    """On convolutions and on the box head, beside new heads, and their files in PEFT's layout."""
    rules = ("backbone/stage_.*conv[12]/kernel", "roi_head/fc1/kernel")
    config = config_of(
        recipes=("lora", "adversarial"),
        model__freeze_norm=True,
        trainable=("(rpn|class_head)/.*",),
        lora__rules=rules,
        lora__rank=2,
        adversarial__steps=1,
        total_steps=2,
        evaluate__every=2,
    )
    assert train.run(config, tmp_path) == 0
    restored = restore(config, tmp_path, "last")
    for path in ("backbone/stage_0/block_0/conv1/kernel", "roi_head/fc1/kernel"):
        assert f"{path}/base" in restored.frozen
        assert f"{path}/b" in restored.state.trainable
    weights = convert.read_weights(str(tmp_path / "model.safetensors"))
    assert convert.recognize(weights)[0] == "faster_rcnn"


def test_micro_batches_of_full_samples_are_their_batch(rng):
    """An image has as many samples as any other, so their mean is that of the batch (float64)."""
    images, anchors, samples, classes = 4, 12, 6, 3
    drawn = np.stack([rng.permutation([1, 1, 0, 0, 0] + [-1] * 7) for _ in range(images)])
    shapes = {
        "rpn_logits": (anchors,),
        "rpn_deltas": (anchors, 4),
        "rpn_target_deltas": (anchors, 4),
        "box_logits": (samples, classes + 1),
        "box_deltas": (samples, 4),
        "box_target_deltas": (samples, 4),
    }
    outputs = {name: rng.normal(size=(images, *shape)) for name, shape in shapes.items()}
    sampled = {"rpn_sample": drawn, "box_sample": rng.integers(0, classes, (images, samples))}

    @jax.jit
    def both(outputs, sampled):
        def loss(outputs, parts):
            rows = jax.tree.map(
                lambda x: x.reshape(parts, images // parts, *x.shape[1:]), {**outputs, **sampled}
            )
            ones = jnp.ones(images // parts, bool)
            found = [
                proposal_loss({name: x[part] for name, x in rows.items()}, ones)
                for part in range(parts)
            ]
            metrics = jax.tree.map(lambda *x: jnp.stack(x).mean(), *(m for _, m in found))
            return jnp.concatenate([losses for losses, _ in found]).mean(), metrics

        gradient = jax.value_and_grad(loss, has_aux=True)
        return gradient(outputs, 1), gradient(outputs, 2)

    with jax.enable_x64(True):
        whole, split = both(*jax.tree.map(jnp.asarray, (outputs, sampled)))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14), *(split, whole)
    )


@pytest.mark.long
def test_a_mobilenet_trains_with_adapters(tmp_path):
    """On its expansions and gates, and its file has torchvision's names."""
    body = {
        "body": "mobilenet_v3",
        "depths": (1, 1, 1, 2),
        "widths": (8, 8, 8, 8),
        "stem_width": 8,
        "kernels": (3, 3, 5, 5),
        "expansions": (1, 2, 2, (2, 3)),
        "strides": (2, 2, 2, 2),
        "se_ratio": (0.0, 0.25, 0.25, 0.25),
        "relu_stages": 1,
        "anchor_sizes": ((12, 20), (20, 32), (32, 64)),
        "least_proposal_score": 0.05,
    }
    own = {name: value for name, value in ARGUMENTS.items() if name not in ("num_classes", "block")}
    config = config_of(
        model__arguments=tuple({**own, **body}.items()),
        model__freeze_norm=True,
        recipes=("lora",),
        trainable=("(rpn|class_head)/.*",),
        lora__rules=("backbone/stage_.*/(expand_conv|se/reduce)/kernel",),
        lora__rank=2,
        total_steps=2,
        evaluate__every=2,
    )
    assert train.run(config, tmp_path) == 0
    restored = restore(config, tmp_path, "last")
    assert "backbone/stage_3/block_1/expand_conv/kernel/b" in restored.state.trainable
    weights = convert.read_weights(str(tmp_path / "model.safetensors"))
    assert convert.recognize(weights)[1]["expansions"] == (1, 2, 2, (2, 3))
    assert "backbone.body.5.block.3.0.weight" in weights.tensors


def test_what_the_config_trains_of_either_body():
    """All kernels after the first stage, with the biases of gates, and no norm."""
    rule, rest = load_config(str(CONFIG), {}).trainable
    golden = runs.ROOT / "tests/golden/parameters/faster_rcnn.txt"
    names = {line.split()[0] for line in golden.read_text().splitlines()}
    names = {name.partition("/")[2] for name in names if name.startswith("params/")}
    body = {path for path in names if path.startswith("backbone/")}
    late = {path for path in body if re.match("backbone/(stage_[1-9]|last)", path)}
    assert {path for path in names if re.fullmatch(rule, path)} == {
        path for path in late if path.endswith("/kernel") or "/se/" in path
    }
    assert {path for path in names if re.fullmatch(rest, path)} == names - body


def test_anchors_of_too_few_levels_are_refused():
    model = build_model("faster_rcnn", **{**ARGUMENTS, "anchor_sizes": (8, 16)})
    with pytest.raises(UserError, match=r"anchor_sizes \(8, 16\): give 3, one for each map"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
