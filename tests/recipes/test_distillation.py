"""Distillation: what teachers see and say, what a student makes of it, how a run lives with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import detection_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vision_jax import convert, cost, train
from vision_jax.commands import cache_teacher
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.models.families import make_apply
from vision_jax.objective import Objective, make_loss
from vision_jax.ops import distillation as ops
from vision_jax.recipes.adversarial import objective as adversarial
from vision_jax.recipes.adversarial.objective import ThreatModel
from vision_jax.recipes.distillation import objective as distillation
from vision_jax.recipes.distillation.recipe import Distill
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


def test_a_teacher_is_asked_at_its_own_size_with_its_own_normalization(resnet):
    prepared = runs.Prepared(recipes=ON, trainable=".*", distill__teachers=resnet)
    assert prepared.batch["image"].shape == (8, 24, 24, 3)  # the larger of both
    [teacher] = prepared.run.recipes[-1].teachers
    ask = jax.jit(teacher.make_forward(("stage_1",)))
    images = prepared.batch["image"] / jnp.float32(255)
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
    view = {"image": prepared.batch["image"] / jnp.float32(255)}
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
    images = prepared.batch["image"] / jnp.float32(255)
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
        ({"distill__logits": "queries"}, "for classification it is soft"),
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
