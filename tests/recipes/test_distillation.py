"""Distillation: what teachers see and say, what a student makes of it, how a run lives with it."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import detection_runs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from vision_jax import convert, cost, steps, train
from vision_jax.commands import cache_teacher
from vision_jax.config import load_config
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.models.families import make_apply
from vision_jax.objective import Objective, make_loss
from vision_jax.ops import distillation as ops
from vision_jax.ops.detection_outputs import POSTPROCESS
from vision_jax.ops.simota import yolox_loss
from vision_jax.recipes.adversarial import objective as adversarial
from vision_jax.recipes.adversarial.objective import ThreatModel
from vision_jax.recipes.distillation import objective as distillation
from vision_jax.recipes.distillation.recipe import Distill
from vision_jax.run import prepare as preparation
from vision_jax.tasks.detection import task as detect
from vision_jax.tasks.detection.objective import pixel_mask
from vision_jax.trees import paths

ON = "('distill',)"


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A ResNet that takes 24 pixels where the student takes 16."""
    path = tmp_path_factory.mktemp("teachers") / "resnet.safetensors"
    small = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "stem_width": 8, "block": "basic"}
    return runs.write_teacher(
        path, "resnet", 4, 24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), **small
    )


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A ViT of two blocks, wider than the student's one."""
    path = tmp_path_factory.mktemp("teachers") / "vit.safetensors"
    small = {"width": 48, "depth": 2, "num_heads": 4, "mlp_width": 64, "patch_size": 8}
    return runs.write_teacher(path, "vit", 4, 16, image_size=(16, 16), **small)


# Composition, on a linear model ------------------------------------------------------------------

DRAW = np.random.default_rng(0)
PIXELS = jnp.asarray(DRAW.uniform(0.3, 0.7, (4, 2, 2, 1)), jnp.float32)
VIEW = {
    "image": PIXELS,
    "label": jnp.asarray([0, 1, 2, 0]),
    "index": jnp.arange(4),
    "step": jnp.int32(0),
}
KERNEL, TEACHER = (jnp.asarray(DRAW.normal(size=(4, 3)), jnp.float32) for _ in range(2))


def logits_of(images, kernel):
    return images.reshape(len(images), -1) @ kernel


def linear() -> Objective:
    def prepare(trainable, frozen, model_state, batch, key):
        return dict(batch)

    def forward(trainable, frozen, model_state, view, key, *, train):
        return {"logits": logits_of(view["image"], trainable["kernel"])}, model_state

    def criterion(trainable, outputs, view):
        own = jnp.take_along_axis(outputs["logits"], view["label"][:, None], 1)[:, 0]
        return jax.nn.logsumexp(outputs["logits"], -1) - own, {}

    return Objective(prepare, forward, criterion)


def taught(goal: Objective, share: float = 0.3) -> Objective:
    def ask(frozen, model_state, view):
        return {"logits": logits_of(view["image"], frozen["teacher_0/kernel"])}

    return distillation.distill(
        goal,
        teacher_outputs=distillation.make_teacher_outputs([ask], logits="soft", temperature=2.0),
        terms={"soft": (share, distillation.make_logits_term("soft", temperature=2.0))},
        share=share,
    )


@pytest.mark.long
def test_the_loss_is_shared_between_labels_and_teacher_and_the_teacher_learns_nothing():
    loss = make_loss(taught(linear()))

    def mean(trainable, frozen):
        return loss(trainable, frozen, {}, VIEW, jax.random.key(0))

    (value, (_, metrics)), (own, theirs) = jax.value_and_grad(mean, (0, 1), has_aux=True)(
        {"kernel": KERNEL}, {"teacher_0/kernel": TEACHER}
    )
    student, teacher = (logits_of(PIXELS, kernel) for kernel in (KERNEL, TEACHER))
    labels = -jax.nn.log_softmax(student)[jnp.arange(4), VIEW["label"]].mean()
    soft = ops.soft_logits(student, teacher, 2.0).mean()
    np.testing.assert_allclose(value, 0.7 * labels + 0.3 * soft, rtol=1e-6)
    np.testing.assert_allclose(metrics["soft"], soft, rtol=1e-6)
    assert jnp.abs(own["kernel"]).max() > 0
    assert not theirs["teacher_0/kernel"].any()


@pytest.mark.long
def test_an_attack_is_against_what_the_teacher_says_of_the_plain_image():
    """Robust distillation: one step along the gradient of the whole criterion, teacher held."""
    goal = adversarial.on_adversarial_examples(
        taught(linear()), ThreatModel("linf", 0.1, step_size=3.0, steps=1)
    )
    frozen = {"teacher_0/kernel": TEACHER}
    view = goal.prepare({"kernel": KERNEL}, frozen, {}, VIEW, jax.random.key(0))
    told = logits_of(PIXELS, TEACHER)
    np.testing.assert_allclose(view["teacher/logits"], told, rtol=1e-6)

    def criterion(images):  # at the random start, whose sign pattern is what a long step leaves
        student = logits_of(images, KERNEL)
        labels = -jax.nn.log_softmax(student)[jnp.arange(4), VIEW["label"]]
        return (0.7 * labels + 0.3 * ops.soft_logits(student, told, 2.0)).sum()

    uphill = jax.grad(criterion)(view["image"])
    raised = criterion(view["image"]) - criterion(PIXELS)
    assert raised > 0
    steepest = (PIXELS + 0.1 * jnp.sign(uphill)).clip(0, 1)
    assert (jnp.abs(view["image"] - PIXELS).max() - 0.1) < 1e-6
    assert criterion(steepest) >= criterion(view["image"]) - 1e-4


def test_several_teachers_are_averaged_at_the_temperature(rng):
    first, second = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(2))
    asked = [lambda *_, said=said: {"logits": said} for said in (first, second)]
    weights = (1.0, 3.0)
    said = distillation.make_teacher_outputs(
        asked, logits="soft", temperature=2.0, weights=weights
    )({}, {}, {})
    expected = 0.25 * jax.nn.softmax(first / 2) + 0.75 * jax.nn.softmax(second / 2)
    np.testing.assert_allclose(jax.nn.softmax(said["teacher/logits"] / 2), expected, rtol=1e-5)


# A run --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_teacher_is_asked_at_its_own_size_with_its_own_normalization(resnet):
    prepared = runs.Prepared(recipes=ON, trainable=".*", distill__teachers=resnet)
    assert prepared.batch["image"].shape == (8, 24, 24, 3)  # the larger of both
    [teacher] = prepared.run.recipes[-1].teachers
    ask = jax.jit(teacher.make_forward(("stage_1",)))
    images = prepared.batch["image"].astype(jnp.float32) / 255
    said = ask(prepared.frozen, {}, {"image": images})
    variables = {
        name: paths.unflatten(
            tree, distillation.taken_from(prepared.frozen, f"{teacher.prefix}{name}/")
        )
        for name, tree in teacher.like.items()
    }
    assert "batch_stats" in variables
    expected = jax.jit(lambda v, x: teacher.model.apply(v, x, train=False))(variables, images)
    np.testing.assert_allclose(said["logits"], expected, rtol=1e-5, atol=1e-6)
    assert teacher.model.mean == (0.4, 0.5, 0.6)
    # And the weights are those of the file.
    flat = paths.flatten(variables["params"])
    own = convert.import_weights(
        teacher.weights,
        {k: v for tree in variables.values() for k, v in paths.flatten(tree).items()},
        convert.arguments_of(teacher.model),
    )
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, own[path])


FEATURES = (
    "(('hint', 'block_0', 'block_1', 0.5), ('patch_tokens', 'embed', 'embed', 0.5),"
    " ('attention_transfer', 'block_0', 'block_0', 0.5), ('relational_angle', 'pooled', 'pooled',"
    " 1.0), ('attention_maps', 'block_0/attention', 'block_1/attention', 1.0))"
)


@pytest.mark.long
def test_features_are_matched_through_learned_projections(vit, monkeypatch):
    """The loss and its parts, against the operations on features taken from both models."""
    prepared = runs.Prepared(
        recipes=ON, trainable=".*", distill__teachers=vit, distill__features=FEATURES
    )
    trainable = prepared.state.trainable
    assert trainable["projection_0/kernel"].shape == (32, 48)
    _, (_, metrics) = jax.jit(prepared.loss_fn)(
        trainable, prepared.frozen, {}, {**prepared.batch, "step": 0}, jax.random.key(0)
    )
    [teacher] = prepared.run.recipes[-1].teachers
    view = {"image": prepared.batch["image"].astype(jnp.float32) / 255}
    told = teacher.make_forward(("block_0", "block_1", "embed", "pooled", "block_1/attention"))(
        prepared.frozen, {}, view
    )["features"]
    apply = make_apply(prepared.model, ("block_0", "embed", "pooled", "block_0/attention"))
    own = {k: v for k, v in prepared.frozen.items() if not distillation.is_beside(k)}
    params = prepared.plan.assemble({**trainable, **own})
    said = apply(params, {}, view["image"], train=False, keys={})[0]["features"]
    patches = {name: said[name][:, 1:] for name in ("block_0", "embed")}  # without the class token
    hint = ops.hint(patches["block_0"] @ trainable["projection_0/kernel"], told["block_1"][:, 1:])
    tokens = ops.patch_tokens(
        patches["embed"] @ trainable["projection_1/kernel"], told["embed"][:, 1:]
    )
    expected = {
        "taught_hint_block_0": hint,
        "taught_patch_tokens_embed": tokens,
        "taught_attention_transfer_block_0": ops.attention_transfer(
            patches["block_0"], told["block_0"][:, 1:]
        ),
        "taught_relational_angle_pooled": ops.relational_angle(said["pooled"], told["pooled"]),
        "taught_attention_maps_block_0/attention": ops.attention_maps(
            said["block_0/attention"], told["block_1/attention"]
        ),
    }
    for name, losses in expected.items():
        np.testing.assert_allclose(metrics[name], losses.mean(), rtol=1e-4, err_msg=name)
    before = {name: np.array(trainable[name]) for name in trainable if "projection" in name}
    state = prepared.state
    for _ in range(2):  # the first step's rate is 0
        state, metrics = prepared.step(state, prepared.frozen, prepared.batch)
    assert np.isfinite(metrics["loss"])
    assert all((np.asarray(state.trainable[name]) != before[name]).any() for name in before)


@pytest.mark.long
def test_the_moving_average_teaches():
    prepared = runs.Prepared(
        recipes=ON, trainable=".*", distill__teachers="ema", optim__ema_decay=0.5, optim__lr=0.1
    )
    state, seen = prepared.state, []
    for _ in range(3):
        average = {k: np.array(v) for k, v in state.ema.items()}  # the step takes their memory
        current = {k: np.array(v) for k, v in state.trainable.items()}
        state, metrics = prepared.step(state, prepared.frozen, prepared.batch)
        seen.append(float(metrics["taught_soft"]))
    images = prepared.batch["image"].astype(jnp.float32) / 255
    frozen = prepared.frozen
    said, own = (
        prepared.apply(prepared.plan.assemble({**x, **frozen}), {}, images, train=False, keys={})[0]
        for x in (average, current)
    )
    expected = ops.soft_logits(own["logits"], said["logits"], 4.0).mean()
    np.testing.assert_allclose(seen[-1], expected, rtol=1e-4)
    assert seen[-1] > 0


def test_the_moving_average_teaches_with_its_own_statistics():
    def forward(trainable, frozen, model_state, view, key, *, train):
        assert not train
        return {"logits": (trainable, frozen, model_state)}, model_state

    objective = Objective(prepare=None, forward=forward, criterion=None)
    frozen = {"teacher_ema/w": 1, "teacher_ema/norm/mean": 2, "base": 3}
    said = distillation.make_average_forward(objective)(frozen, {"norm": {"mean": 4}}, {})
    assert said["logits"] == ({"w": 1}, {"base": 3}, {"norm": {"mean": 2}})


@pytest.mark.long
def test_the_distillation_token_learns_of_the_teacher_and_the_other_of_labels(vit):
    arguments = "(('width', 32), ('depth', 1), ('num_heads', 2), ('mlp_width', 64), "
    arguments += "('patch_size', 8), ('distillation_token', True), ('position_prefix', 2))"
    fields = {
        "recipes": ON,
        "trainable": ".*",
        "model__weights": "",
        "model__variant": "vit",
        "model__arguments": arguments,
        "model__reinitialize": "()",
        "distill__teachers": vit,
        "distill__logits": "hard",
        "augment__label_smoothing": 0.0,
    }
    prepared = runs.Prepared(distill__token=True, **fields)
    gradient = jax.jit(jax.grad(lambda *a: prepared.loss_fn(*a, jax.random.key(0))[0]))
    batch = {**prepared.batch, "step": 0}
    found = gradient(prepared.state.trainable, prepared.frozen, {}, batch)
    # Both heads begin at zero, so all classes have a quarter: p - target, halved.
    told = np.asarray(
        prepared.run.recipes[-1]
        .teachers[0]
        .make_forward(())(prepared.frozen, {}, {"image": batch["image"] / 255})["logits"]
    ).argmax(-1)
    for head, targets in (("head", np.asarray(batch["label"])), ("head_dist", told)):
        expected = 0.5 * (0.25 - np.eye(4)[targets]).mean(0)
        np.testing.assert_allclose(found[f"{head}/bias"], expected, atol=1e-6)


@pytest.mark.long
def test_several_devices_and_full_sharding_change_nothing(vit):
    fields = {
        "recipes": "('lora', 'distill', 'adversarial')",
        "distill__teachers": vit,
        "distill__features": "(('hint', 'block_0', 'block_1', 0.5),)",
        "adversarial__steps": 1,
        "sharding_rules": "()",
    }
    losses = []
    for devices, fsdp in ((1, 1), (8, 8)):
        prepared = runs.Prepared(devices=devices, fsdp=fsdp, **fields)
        kept = {k: np.asarray(v) for k, v in prepared.frozen.items()}
        state = prepared.state
        for _ in range(3):
            state, metrics = prepared.step(state, prepared.frozen, prepared.batch)
        assert prepared.step._cache_size() == 1
        losses.append(float(metrics["loss"]))
        for path, leaf in prepared.frozen.items():
            np.testing.assert_array_equal(leaf, kept[path], err_msg=path)
    np.testing.assert_allclose(*losses, rtol=1e-6)


def losses_of(workdir):
    return [r["train/loss"] for r in read_metrics(workdir / "metrics.jsonl") if "train/loss" in r]


@pytest.mark.long
def test_cached_teacher_outputs_give_bit_identical_losses(resnet, vit, tmp_path, monkeypatch):
    """Augmented, of two teachers the best logits and a feature, and under attack."""
    vit = shutil.copy(vit, tmp_path / "vit.safetensors")
    monkeypatch.setattr(train, "write_results", lambda *arguments, **keywords: None)
    fields = {
        "recipes": "('distill', 'adversarial')",
        "trainable": ".*",
        "distill__teachers": f"('{vit}', '{resnet}')",
        "distill__top_k": 2,
        "distill__features": "(('hint', 'block_0', 'block_1', 0.5),)",
        "adversarial__steps": 1,
        "adversarial__watch": 0,
        "augment__policy": "trivial",
        "augment__mixup": 0.5,
        "total_steps": 3,
        "evaluate__every": 3,
    }
    live = runs.tiny_config(**fields)
    stored = runs.tiny_config(**fields, distill__cache=tmp_path / "said")
    assert train.run(live, tmp_path / "live") == 0
    assert cache_teacher.run(stored) == 0
    asked = []
    monkeypatch.setattr(Distill, "place_teachers", lambda *_: asked.append(1) or {})
    assert train.run(stored, tmp_path / "stored") == 0
    assert not asked  # the teachers' arrays are not even read
    assert losses_of(tmp_path / "stored") == losses_of(tmp_path / "live")
    for file in ("live", "stored"):
        assert not (tmp_path / file / "frozen").exists()  # teachers are kept by nobody

    with pytest.raises(UserError, match=r"stored with .*seed 0, and this run has 1"):
        train.run(runs.tiny_config(**fields, distill__cache=tmp_path / "said", seed=1), tmp_path)
    longer = {**fields, "total_steps": 4}
    with pytest.raises(UserError, match="need 32: cache more"):
        train.run(runs.tiny_config(**longer, distill__cache=tmp_path / "said"), tmp_path)
    teacher = Path(vit).read_bytes()
    Path(vit).write_bytes(teacher[:-4] + bytes(4))  # another last number
    with pytest.raises(UserError, match="has changed since this run began"):
        train.run(live, tmp_path / "live")


@pytest.mark.long
def test_whole_updates_from_a_file_are_those_of_a_live_teacher_bit_identical(tmp_path):
    """The config at its own size, with XLA's usual optimizations, in which gradients may round
    otherwise where something else surrounds the student."""
    common = ["--config=configs/distill_vit_small.py"]
    common += ["--config.distill.teachers=('embedded:vit_cifar10',)"]  # of as many classes
    common += ["--config.total_steps=3", "--config.optim.warmup_steps=1", "--config.log_every=1"]
    stored = f"--config.distill.cache={tmp_path / 'said'}"
    commands = [
        [*common, f"--workdir={tmp_path / 'live'}"],
        ["cache-teacher", *common, stored],
        [*common, stored, f"--workdir={tmp_path / 'stored'}"],
    ]
    code = "from vision_jax import main\n"
    code += "".join(f"assert main.main({command}) == 0\n" for command in commands)
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=runs.ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    live, from_file = (
        [
            {
                name: value
                for name, value in record.items()
                if name.startswith(("train/", "eval/")) and "second" not in name
            }
            for record in read_metrics(tmp_path / run / "metrics.jsonl")
        ]
        for run in ("live", "stored")
    )
    assert len(live) == 4
    assert all("train/grad_norm" in record for record in live[:3])
    assert from_file == live


@pytest.mark.long
def test_cached_teacher_outputs_cost_nothing(vit):
    fields = {"recipes": ON, "trainable": ".*", "distill__teachers": vit}
    plain = runs.Prepared(recipes="()", trainable=".*")
    live = runs.Prepared(**fields)
    flops = {name: cost.count(p.compiled()).flops for name, p in (("plain", plain), ("live", live))}
    batch = {**live.batch, "teacher/logits": jnp.zeros((8, 4))}
    own = {k: v for k, v in live.frozen.items() if not distillation.is_beside(k)}
    stored = cost.count(live.step.lower(live.state, own, batch).compile()).flops
    assert stored == flops["plain"]
    ask = jax.jit(live.run.recipes[-1].teachers[0].make_forward(())).lower(
        live.frozen, {}, {"image": live.batch["image"]}
    )
    assert flops["live"] == flops["plain"] + cost.count(ask.compile()).flops


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill__teachers": "()"}, "set config.distill.teachers"),
        ({"distill__teachers": "ema"}, "set config.optim.ema_decay"),
        ({"distill__logits": "none"}, "nothing to learn from"),
        ({"distill__logits": "queries"}, "a vit, it is soft, hard, decoupled or none"),
        ({"distill__logits": "decoupled", "augment__mixup": 0.2}, "sets the one true class apart"),
        ({"distill__token": True}, "no distillation token"),
        ({"distill__teacher_weights": "(1.0, 2.0)"}, "2 for 1 teachers"),
        ({"distill__teachers": "embedded:vit_cifar10"}, "knows 10 classes and the data has 4"),
        ({"distill__features": "(('hint', 'block_7', 'block_1', 1.0),)"}, "gives no 'block_7'"),
        ({"distill__cache": "x", "optim__accumulate": 2}, "set config.optim.accumulate to 1"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_what_makes_no_sense_is_refused_with_the_reason(vit, changes, message):
    fields = {"recipes": ON, "trainable": ".*", "distill__teachers": vit, **changes}
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        runs.Prepared(**fields)


@pytest.mark.long
@pytest.mark.parametrize("family", ["detr", "rf_detr"])
def test_a_detector_learns_from_the_queries_of_another(family, tmp_path):
    model = detection_runs.RF_DETR if family == "rf_detr" else {}
    arguments = dict(model.get("model__arguments", detection_runs.ARGUMENTS))
    classes = {"detr": 8, "rf_detr": 8}[family]
    name = runs.write_teacher(tmp_path / "teacher.safetensors", family, classes, 48, **arguments)
    config = detection_runs.tiny_config(
        recipes=ON, distill__teachers=name, distill__weight=1.0, model__dropout=0.0, **model
    )
    prepared = runs.Prepared(config=config)
    batch = {**prepared.batch, "step": 0}
    loss, (_, metrics) = jax.jit(prepared.loss_fn)(
        prepared.state.trainable, prepared.frozen, prepared.state.model_state, batch,
        jax.random.key(0),
    )  # fmt: skip
    np.testing.assert_allclose(loss, metrics["taught_queries"], rtol=1e-6)
    [teacher] = prepared.run.recipes[-1].teachers
    view = {
        "image": batch["image"] / 255,
        "pixel_mask": pixel_mask(batch["size"], batch["image"].shape[1:3])[..., None],
    }

    @jax.jit
    def answers(trainable, frozen, view):
        told = teacher.make_forward(())(frozen, {}, view)
        said, _ = prepared.apply(
            prepared.plan.assemble({**trainable, **frozen}), prepared.state.model_state,
            view["image"], view["pixel_mask"][..., 0], train=family == "rf_detr", keys={},
        )  # fmt: skip
        return told, said

    told, said = answers(prepared.state.trainable, prepared.frozen, view)
    queries = slice(prepared.model.num_queries)
    expected = ops.detr_queries(
        *(said[name][-1][:, queries] for name in ("logits", "boxes_cxcywh_01")),
        *(told[name][-1] for name in ("logits", "boxes_cxcywh_01")),
        sigmoid=family == "rf_detr",
    )
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-4)


# A YOLOX student ----------------------------------------------------------------------------------

OTHERS = {
    "detr": detection_runs.ARGUMENTS,
    "rf_detr": detection_runs.RF_DETR["model__arguments"],
    "faster_rcnn": detection_runs.FASTER_RCNN["model__arguments"],
    "retinanet": detection_runs.RETINANET["model__arguments"],
    "fcos": detection_runs.FCOS["model__arguments"],
    "yolox": (("csp_depth", 1), ("width", 16)),
}


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """family -> the file of a random detector of eight classes."""
    folder = tmp_path_factory.mktemp("detectors")

    @functools.cache
    def write(family):
        path = folder / f"{family}.safetensors"
        return detection_runs.write_detector(path, 8, family, OTHERS[family])

    return write


def taught_config(teacher, **more):
    fields = {
        **detection_runs.YOLOX,
        "recipes": ON,
        "distill__teachers": f"('{teacher}',)",
        "distill__logits": "detections",
        "distill__least_score": 0.0,
        **more,
    }
    path = runs.ROOT / "configs/yolox_finetune.py"
    return load_config(str(path), detection_runs.overrides(**fields))


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("detr", "detections"),
        ("rf_detr", "detections"),
        ("faster_rcnn", "detections"),
        ("retinanet", "detections"),
        ("fcos", "detections"),
        ("yolox", "detections"),
        ("yolox", "cells"),
    ],
)
def test_a_yolox_learns_from_any_detector(family, kind, detector):
    """The loss alone, against the operation on what both say of the same mosaics."""
    config = taught_config(detector(family), distill__logits=kind, distill__weight=1.0)
    prepared = runs.Prepared(config=config)
    [teacher] = prepared.run.recipes[-1].teachers
    batch = {**prepared.batch, "step": 0}
    mask = pixel_mask(batch["size"], batch["image"].shape[1:3])
    view = {"image": batch["image"] / 255, "pixel_mask": mask[..., None]}

    @jax.jit
    def answers(trainable, frozen, model_state, batch, view):
        key = jax.random.key(0)
        loss, (_, metrics) = prepared.loss_fn(trainable, frozen, model_state, batch, key)
        told = teacher.make_forward(())(frozen, {}, view)
        params = prepared.plan.assemble({**trainable, **frozen})
        seen = (view["image"], view["pixel_mask"][..., 0])
        said, _ = prepared.apply(params, model_state, *seen, train=True, keys={})
        found = POSTPROCESS[teacher.predicts](told, batch["size"])
        return loss, metrics, told, said, found

    state = prepared.state
    loss, metrics, told, said, found = answers(
        state.trainable, prepared.frozen, state.model_state, batch, view
    )
    names = ("logits", "object_logits", "box_deltas")
    student = [said[name] for name in names]
    shapes = {"canvas": batch["image"].shape[1:3], "strides": (8, 16, 32)}
    if kind == "cells":
        expected = ops.yolox_cells(
            *student, *(told[name] for name in names), batch["mask"], **shapes
        )
    else:
        best = np.argsort(-found["score"], axis=1, kind="stable")[:, : config.data.max_boxes]
        score, label = (np.take_along_axis(found[x], best, 1) for x in ("score", "label"))
        assert (score[:, 0] > 0).all()
        boxes = np.take_along_axis(np.asarray(found["boxes_xyxy_px"]), best[..., None], 1)
        edges = np.tile(np.float32(batch["size"])[:, None, ::-1], 2)
        expected = ops.yolox_detections(
            *student,
            score,
            label,
            jnp.asarray(np.clip(boxes, 0, edges), jnp.float32),
            batch["mask"],
            least_score=0,
            **shapes,
        )
    expected = expected.sum() / jnp.maximum(metrics["foreground"], 1)
    np.testing.assert_allclose(metrics[f"taught_{kind}"], expected, rtol=1e-4)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.long
def test_a_yolox_goes_toward_a_teacher_that_finds_what_is_labeled(detector):
    """Its loss is that of the labels, and falls, by one program."""
    config = taught_config(
        detector("detr"), data__mosaic=0.0, distill__weight=1.0, optim__lr=0.01, optim__name="adamw"
    )
    prepared = runs.Prepared(config=config)
    batch, state, found = prepared.batch, prepared.state, []
    sides = jnp.tile(batch["size"][:, None, ::-1], 2).astype(jnp.float32)
    boxes = batch["boxes_cxcywh_01"]
    corners = jnp.concatenate(
        [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=-1
    )
    told = {
        "teacher/score": batch["target_mask"].astype(jnp.float32),
        "teacher/label": batch["label"],
        "teacher/boxes_xyxy_px": corners * sides,
    }
    for _ in range(12):
        state, metrics = prepared.step(state, prepared.frozen, {**batch, **told})
        labels = 5 * metrics["loss_box"] + metrics["loss_object"] + metrics["loss_class"]
        np.testing.assert_allclose(metrics["taught_detections"], labels, rtol=1e-3)
        found.append(float(metrics["taught_detections"]))
    assert found[-1] < 0.95 * found[0], found
    assert prepared.step._cache_size() == 1


@pytest.mark.long
@pytest.mark.parametrize("kind", ["detections", "cells"])
def test_micro_batches_of_a_taught_yolox_add_up_to_their_batch(kind, rng):
    """One update in 1 and 4 parts, in float64, whose images have 0 to 3 boxes."""
    size, slots, cells = 8, 3, 42
    counts = np.array([3, 0, 0, 1, 2, 3, 0, 2])
    boxes = rng.uniform([20, 10, 12, 10], [44, 22, 32, 20], (size, slots, 4))
    corners = rng.uniform([4, 2, 24, 16], [20, 10, 60, 30], (size, slots, 4))
    batch = {
        "image": np.zeros((size, 32, 64, 1)),
        "label": rng.integers(0, 3, (size, slots)),
        "boxes": boxes,
        "target_mask": np.arange(slots)[None] < counts[:, None],
        "mask": np.ones(size, bool),
        "index": np.arange(size),
    }
    own, theirs = (
        (
            rng.normal(size=(size, cells, 3)),
            rng.normal(size=(size, cells)),
            0.5 * rng.normal(size=(size, cells, 4)),
        )
        for _ in range(2)
    )
    found = (rng.uniform(size=(size, slots)), rng.integers(0, 3, (size, slots)), corners)
    names = distillation.CELLS if kind == "cells" else ("score", "label", "boxes_xyxy_px")
    told = theirs if kind == "cells" else found
    batch |= {f"teacher/{name}": array for name, array in zip(names, told, strict=True)}
    settings = {"temperature": 2.0} if kind == "cells" else {"least_score": 0.1}
    term = getattr(distillation, f"make_{kind}_term")(strides=(8, 16, 32), **settings)

    def loss(outputs, view):
        predicted = (outputs[name] for name in distillation.CELLS)
        targets = (view[name] for name in ("label", "boxes", "target_mask", "mask"))
        return yolox_loss(*predicted, *targets, canvas=(32, 64), strides=(8, 16, 32))

    student = Objective(
        prepare=lambda trainable, frozen, model_state, batch, key: dict(batch),
        forward=lambda trainable, frozen, model_state, view, key, train: (
            {name: trainable[name][view["index"]] for name in trainable},
            model_state,
        ),
        criterion=lambda trainable, outputs, view: loss(outputs, view),
        counted="foreground",
    )
    objective = distillation.distill(
        student,
        teacher_outputs=lambda *_: {},
        terms={"taught": (0.7, term)},
        share=0.4,
        counted=["taught"],
    )
    results = []
    with jax.enable_x64(True):
        for parts in (1, 4):
            tx = optax.sgd(1.0)
            step = steps.make_train_step(
                make_loss(objective),
                tx,
                seed=0,
                schedule=lambda step: 1.0,
                accumulate=parts,
                counted="foreground",
            )
            trainable = {n: jnp.asarray(x) for n, x in zip(distillation.CELLS, own, strict=True)}
            state = steps.make_state(trainable, {}, tx=tx, ema=False)
            state, metrics = step(state, {}, jax.tree.map(jnp.asarray, batch))
            results.append(jax.device_get((state.trainable, metrics)))
    whole, split = results
    assert whole[1]["foreground"] > 8
    assert whole[1]["taught"] > 0
    jax.tree.map(
        lambda own, wanted: np.testing.assert_allclose(own, wanted, rtol=1e-10, atol=1e-12),
        *(split, whole),
    )


@pytest.mark.long
def test_a_taught_yolox_with_adapters_under_attack_resumes_and_reads_stored_boxes(
    detector, tmp_path, monkeypatch
):
    """Bit-identical: a run that was stopped, and one that reads a Faster R-CNN's boxes."""
    monkeypatch.setattr(train, "write_results", lambda *arguments, **keywords: None)
    fields = {
        "recipes": "('lora', 'distill', 'adversarial')",
        "model__freeze_norm": True,
        "trainable": ("head_./(class|box|object)_head/.*",),
        "lora__rules": ("backbone/stage_.*conv/kernel",),
        "lora__rank": 2,
        "adversarial__steps": 1,
        "data__shorts": (),
        "total_steps": 4,
        "evaluate__every": 2,
        "checkpoint_every": 2,
    }
    teacher = detector("faster_rcnn")
    live = taught_config(teacher, **fields)
    stored = taught_config(teacher, **fields, distill__cache=tmp_path / "told")
    assert detection_runs.check_resume(live, tmp_path) == [1, 1, 1]
    assert cache_teacher.run(stored) == 0
    assert train.run(stored, tmp_path / "stored") == 0
    assert losses_of(tmp_path / "stored") == losses_of(tmp_path / "once")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["detections", "cells"])
def test_the_average_of_a_yolox_teaches_in_micro_batches_under_attack(kind):
    """Traced, not compiled: shapes and dtypes of all of it go together."""
    config = taught_config(
        "ema",
        recipes="('distill', 'adversarial')",
        distill__logits=kind,
        optim__ema_decay=0.9,
        optim__accumulate=2,
        adversarial__steps=1,
        batch_size=16,
    )
    run = preparation.prepare(config, detect.read_sources(config)[0].class_names)
    frozen = run.parameters.abstract()[1]
    step = run.make_train_step()
    _, metrics = jax.eval_shape(step, run.abstract_state, frozen, run.abstract_batch())
    assert metrics[f"taught_{kind}"].shape == ()


@pytest.mark.long
def test_what_a_detector_does_not_teach_is_refused(detector, monkeypatch):
    """In one line, before training."""
    teacher, config = detector("detr"), taught_config(detector("detr"))
    names = detect.read_sources(config)[0].class_names

    def refused(message, names=names, **fields):
        with pytest.raises(UserError, match=message):
            preparation.prepare(taught_config(teacher, **fields), names).loss_fn  # noqa: B018

    refused("a yolox, it is detections, cells or none", distill__logits="queries")
    refused("does not predict what a yolox does: set it to detections", distill__logits="cells")
    two = f"('{teacher}', '{teacher}')"
    refused("detections of several detectors are not put together", distill__teachers=two)
    average = {"distill__teachers": "('ema',)", "optim__ema_decay": 0.9}
    refused("can't be stored", distill__cache="x", **average)
    refused("are megabytes", distill__logits="cells", distill__cache="x")
    refused("top_k is for classes of whole images", distill__top_k=2)
    refused("knows 8 classes and the data has 7", names=names[:7])
    monkeypatch.setattr(convert, "class_names_of", lambda weights: list(names[::-1]))
    refused(f"has class 0 for {names[7]}, and the data 7")
    monkeypatch.undo()
    hint = "(('attention_transfer', 'stage_0', 'stage_0', 1.0),)"
    parts = {"optim__accumulate": 2, "batch_size": 16}
    refused("terms of config.distill.features don't", distill__features=hint, **parts)
    rf_detr = {**detection_runs.RF_DETR, "distill__logits": "queries"}
    refused("does not predict what a rf_detr does: set it to none", **rf_detr)
    refused("a faster_rcnn, it is none, with", **detection_runs.FASTER_RCNN)
