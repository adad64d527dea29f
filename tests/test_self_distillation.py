"""Self-distillation as users run it: a run, its continuation, what comes out, what is refused."""

import json

import jax
import numpy as np
import pytest
import runs
from PIL import Image
from safetensors.numpy import load_file
from unlabelled_runs import (
    ENCODER,
    RESNET,
    check_adapters,
    check_evaluate,
    check_predict,
    check_refused,
    check_transfer,
    config_of,
    few_labels,
    finish,
    steps_on,
    write_images,
)

from vision_jax import convert, train
from vision_jax.commands import convert as converter
from vision_jax.config import load_config
from vision_jax.logging import read_metrics
from vision_jax.run.prepare import prepare
from vision_jax.run.restore import restore
from vision_jax.tasks import features

HEAD = {"prototypes": 16, "head_width": 24, "head_depth": 2, "bottleneck": 8}
TINY = {
    "model.arguments": repr(tuple((ENCODER | HEAD).items())),
    "model.image_size": 12,
    "dino.view_size": 16,
    "dino.local_size": 8,
    "dino.local_crops": 2,
    "dino.frozen_steps": 2,
    "probe.data": f"cifar10:{runs.inputs()}/train",
    "probe.neighbors": 5,
    "probe.shots": 2,
}
DINOV2 = {"dino__patch_weight": 1.0, "dino__koleo_weight": 0.1, "dino__centering": "sinkhorn"}
SEPARATE = repr(tuple((ENCODER | HEAD | {"patch_prototypes": 12}).items()))


def tiny(**more):
    return config_of("dino_embedded", TINY, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the workdir of a finished run, how often its step was compiled)."""
    workdir = tmp_path_factory.mktemp("dino") / "run"
    return workdir, finish(tiny(dino__patch_weight=1.0), workdir)


@pytest.mark.long
def test_a_run_leaves_its_figures_and_compiles_once(finished):
    workdir, compilations = finished
    assert compilations == 1
    records = read_metrics(workdir / "metrics.jsonl")
    ranks = {r["step"]: r["eval/rank"] for r in records if "eval/rank" in r}
    assert sorted(ranks) == [3, 6]
    assert all(1 <= rank <= 20 for rank in ranks.values())
    for name in features.OF_LABELS:
        shares = [r[f"eval/{name}"] for r in records if f"eval/{name}" in r]
        assert len(shares) == 2
        assert all(0 <= share <= 1 for share in shares)
    first = next(r for r in records if r["step"] == 1)
    named = ("dino", "patch", "teacher_entropy", "batch_entropy", "feature_spread")
    assert all(np.isfinite(first[f"train/{name}"]) for name in named)
    with Image.open(workdir / "patches.png") as image:
        assert image.width > image.height > 200
    assert json.loads((workdir / "model.json").read_text())["family"] == "dino"


@pytest.mark.long
def test_the_teacher_is_the_moving_average_and_the_centers_are_its_own(finished):
    restored = restore(load_config(str(finished[0] / "config.json"), {}), finished[0], "last")
    state = restored.state
    assert set(state.ema) == set(state.trainable)
    assert set(state.model_state) == {"center", "patch_center"}
    assert all(np.abs(x).max() > 0 for x in state.model_state.values())
    trained, _, centers = restored.trained.arguments
    for path, array in trained.items():
        np.testing.assert_array_equal(array, state.ema[path])
    np.testing.assert_array_equal(centers["center"], state.model_state["center"])
    tensors = load_file(finished[0] / "model.safetensors")
    np.testing.assert_array_equal(tensors["pos_embed"], state.ema["pos_embed"])
    assert np.abs(tensors["pos_embed"] - np.asarray(state.trainable["pos_embed"])).max() > 0


@pytest.mark.long
def test_what_comes_out_is_an_ordinary_vit(finished, tmp_path):
    """For config.model.weights, timm and transformers; as a dino it is all of itself."""
    workdir, _ = finished
    config = few_labels(workdir, 12)
    run = prepare(config, runs.CLASSES)
    state, frozen, fresh = run.make_arrays()
    assert fresh == ["head/bias", "head/kernel"]
    assert run.description.family == "vit"
    tensors = load_file(workdir / "model.safetensors")
    arrays = {**state.trainable, **frozen}
    np.testing.assert_array_equal(
        arrays["block_0/attn/qkv/kernel"].T, tensors["blocks.0.attn.qkv.weight"]
    )
    assert not any(path.startswith("dino") for path in arrays)
    for to in ("timm", "transformers"):
        out = tmp_path / to
        assert converter.main([str(workdir), f"--out={out}", f"--to={to}"]) == 0
        assert convert.recognize(convert.read_weights(str(out)))[0] == "vit"
    # From a checkpoint, the same.
    assert converter.main([str(workdir), "--checkpoint=last", f"--out={tmp_path / 'last'}"]) == 0
    last = load_file(tmp_path / "last/model.safetensors")
    assert not any(name.startswith(("dino", "mask")) for name in last)
    np.testing.assert_array_equal(last["cls_token"], tensors["cls_token"])
    # And a self-distillation goes on from it, heads and centers included.
    again = tiny(model__weights=workdir, model__variant="", model__arguments="()")
    with again.unlocked():
        again.model.reinitialize = ()
    state, _, fresh = prepare(again, ()).make_arrays()
    assert not fresh
    np.testing.assert_array_equal(
        state.trainable["dino_head/prototypes"].T, tensors["dino_head.last_layer.weight_v"]
    )
    np.testing.assert_array_equal(state.model_state["center"], tensors["dino_loss.center"])


@pytest.mark.long
def test_layer_scale_goes_to_a_folder_of_dinov2(tmp_path):
    arguments = ENCODER | HEAD | {"layer_scale": 0.5, "mlp_width": 128}
    config = tiny(model__arguments=repr(tuple(arguments.items())), total_steps=1)
    assert train.run(config, tmp_path / "run") == 0
    out = tmp_path / "folder"
    assert converter.main([str(tmp_path / "run"), f"--out={out}", "--to=transformers"]) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "dinov2"


@pytest.mark.long
def test_transfer_begins_with_what_comes_out(finished, tmp_path):
    check_transfer(finished[0], "timm/vit_small_patch16_224.dino", tmp_path / "fine")


@pytest.mark.long
def test_predict_and_evaluate_of_a_finished_run(finished, tmp_path, capsys):
    said = check_predict(finished[0], tmp_path, capsys, "patches.png")
    assert said.count("cosine ") == 2
    check_evaluate(finished[0], "rank", capsys, "--checkpoint=last")


@pytest.mark.long
@pytest.mark.parametrize("recipe", [{}, DINOV2], ids=["dino", "dinov2"])
def test_an_interrupted_run_is_bit_identical(recipe, tmp_path, monkeypatch):
    """Teacher, centers, crops and masks: it ends at step 3 and goes on from checkpoint 2."""
    monkeypatch.setattr("vision_jax.run.results._draw", lambda *arguments: None)
    config = tiny(**recipe, model__arguments=SEPARATE if recipe else TINY["model.arguments"])
    assert train.run(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(features.Evaluation, "line", lambda evaluation: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(config, tmp_path / "parts")
    assert train.run(config, tmp_path / "parts") == 0
    whole, parts = (restore(config, tmp_path / n, "last").state for n in ("whole", "parts"))
    assert int(whole.step) == int(parts.step) == 6
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.long
@pytest.mark.parametrize("recipe", [{}, DINOV2], ids=["dino", "dinov2"])
def test_one_and_eight_devices_are_the_same(recipe):
    config = tiny(**recipe, optim__lr=1e-3, optim__warmup_steps=0)
    (one, first), (eight, second) = (steps_on(devices, config) for devices in (1, 8))
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(eight, one, rtol=1e-4)  # Adam enlarges rounding
    for ours, theirs in (
        (second.ema["pos_embed"], first.ema["pos_embed"]),
        (second.model_state["center"], first.model_state["center"]),
    ):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-4)


@pytest.mark.long
def test_adapters_continue_a_vit(tmp_path):
    """The teacher is the average of what trains, on the same frozen weights."""
    config = tiny(
        model__weights=runs.inputs() / "weights.safetensors", model__variant="",
        model__image_size=16, model__arguments=repr(tuple(HEAD.items())), recipes="lora",
        lora__rules=r"block_\d+/attn/qkv/kernel", trainable="dino_head/.*",
    )  # fmt: skip
    check_adapters(config, tmp_path / "run")


@pytest.mark.long
def test_bad_input_is_one_line(tmp_path, capsys):
    small = write_images(tmp_path / "small", 30, (10, 8))
    cases = (
        ({"batch_size": 64}, "48 images to train on are fewer than a batch of 64"),
        ({"data__train": small, "data__holdout": 0.1}, "images of 8 x 10 pixels are smaller than"),
        ({"optim__ema_decay": 0}, "is the teacher's momentum: set it to 0.996, say"),
        ({"dino__local_size": 6}, "take a multiple of the patch, 4"),
        ({"dino__patch_weight": 1, "dino__mask_ratio": "(0.05, 0.1)"}, "3 x 3 patches it masks"),
        ({"model__variant": "resnet", "model__arguments": RESNET}, "takes a ViT"),
        ({"recipes": "adversarial"}, "adversarial is not for images without labels"),
    )
    check_refused("dino_embedded", TINY, cases, tmp_path / "run", capsys)


# Collapse ----------------------------------------------------------------------------------------


PLANTED = [
    ({"dino__center_momentum": 1.0}, "the center does not move"),
    ({"dino__teacher_temperature": "(0.3, 0.3)"}, "is not below the student's 0.1"),
    ({"optim__lr": 3.0, "optim__clip_norm": 0.0}, "the rate is too high"),
]


def of_embedded_images(**more):
    """200 updates of a small ViT on Fashion-MNIST."""
    fields = {
        "total_steps": 200, "optim__lr": 1e-3, "optim__warmup_steps": 20, "evaluate__every": 200,
        "checkpoint_every": 200,
        "model__image_size": 28, "dino__view_size": 0, "dino__local_size": 12,
        "data__train": "embedded:fashion_mnist/train", "data__eval": "embedded:fashion_mnist/test",
        "probe__data": "embedded:fashion_mnist/train",
        "evaluate__batch_size": 500, "dino__frozen_steps": 0, "batch_size": 32,
    }  # fmt: skip
    return tiny(**(fields | more))


@pytest.mark.long
@pytest.mark.parametrize(("planted", "cause"), [*PLANTED, ({}, "")])
def test_a_planted_collapse_is_named_and_a_healthy_run_hears_nothing(
    planted, cause, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("vision_jax.run.results._draw", lambda *arguments: None)
    assert train.run(of_embedded_images(**planted), tmp_path) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "collapse: " in line]
    assert len(said) >= bool(cause)
    assert cause in "".join(said)
    assert bool(said) == bool(cause)
