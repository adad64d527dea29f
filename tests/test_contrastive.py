"""Contrastive learning as users run it: a run, its continuation, what comes out and is refused."""

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
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.models.families import build_model
from vision_jax.run.prepare import prepare
from vision_jax.run.restore import restore
from vision_jax.tasks import features
from vision_jax.tasks.contrastive import task

HEAD = {"head_width": 24, "projection": 8}
TINY = {
    "model.arguments": repr(tuple((ENCODER | HEAD).items())),
    "contrastive.view_size": 20,
    "probe.data": f"cifar10:{runs.inputs()}/train",
    "probe.shots": 2,
}


def tiny(**more):
    return config_of("simclr_embedded", TINY, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the workdir of a finished run, how often its step was compiled)."""
    workdir = tmp_path_factory.mktemp("simclr") / "run"
    return workdir, finish(tiny(optim__accumulate=2), workdir)


@pytest.mark.long
def test_a_run_leaves_its_figures_and_compiles_once(finished):
    workdir, compilations = finished
    assert compilations == 1
    records = read_metrics(workdir / "metrics.jsonl")
    for name in features.REPORTED:
        assert [r["step"] for r in records if f"eval/{name}" in r] == [3, 6]
    first = next(r for r in records if r["step"] == 1)
    assert all(np.isfinite(first[f"train/{n}"]) for n in ("agreement", "projection_spread"))
    with Image.open(workdir / "patches.png") as image:
        assert image.width > image.height > 200
    assert json.loads((workdir / "model.json").read_text())["family"] == "simclr"


@pytest.mark.long
def test_what_comes_out_is_an_ordinary_vit(finished, tmp_path):
    """For config.model.weights, timm and transformers; as a simclr it is all of itself."""
    workdir, _ = finished
    run = prepare(few_labels(workdir, 16), runs.CLASSES)
    state, frozen, fresh = run.make_arrays()
    assert fresh == ["head/bias", "head/kernel"]
    assert run.description.family == "vit"
    tensors = load_file(workdir / "model.safetensors")
    arrays = {**state.trainable, **frozen}
    np.testing.assert_array_equal(
        arrays["block_0/attn/qkv/kernel"].T, tensors["blocks.0.attn.qkv.weight"]
    )
    for to in ("timm", "transformers"):
        out = tmp_path / to
        assert converter.main([str(workdir), f"--out={out}", f"--to={to}"]) == 0
        assert convert.recognize(convert.read_weights(str(out)))[0] == "vit"
    # And contrastive learning goes on from it, the head included.
    again = tiny(model__weights=workdir, model__variant="", model__arguments="()")
    with again.unlocked():
        again.model.reinitialize = ()
    state, _, fresh = prepare(again, ()).make_arrays()
    assert not fresh
    np.testing.assert_array_equal(
        state.trainable["contrastive_head/fc2/kernel"].T, tensors["projection_head.layers.2.weight"]
    )


@pytest.mark.long
def test_transfer_begins_with_what_comes_out(finished, tmp_path):
    check_transfer(finished[0], "timm/vit_small_patch16_224", tmp_path / "fine")


@pytest.mark.long
def test_predict_and_evaluate_of_a_finished_run(finished, tmp_path, capsys):
    said = check_predict(finished[0], tmp_path, capsys, "patches.png")
    assert said.count("cosine ") == 2
    for name in ("rank", "linear"):
        check_evaluate(finished[0], name, capsys, "--checkpoint=last")


@pytest.mark.long
def test_an_interrupted_run_is_bit_identical(tmp_path, monkeypatch):
    """Views included: it ends at step 3 and goes on from checkpoint 2."""
    monkeypatch.setattr("vision_jax.run.results._draw", lambda *arguments: None)
    config = tiny(optim__ema_decay=0.5)
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
def test_one_and_eight_devices_are_the_same():
    """Every view is compared with those of all devices."""
    config = tiny(optim__lr=1e-3, optim__warmup_steps=0)
    (one, first), (eight, second) = (steps_on(devices, config) for devices in (1, 8))
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(eight, one, rtol=1e-4)  # Adam enlarges rounding
    name = "contrastive_head/fc2/kernel"
    ours, theirs = (np.asarray(state.trainable[name]) for state in (second, first))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.long
def test_adapters_continue_a_vit(tmp_path):
    config = tiny(
        model__weights=runs.inputs() / "weights.safetensors", model__variant="",
        model__arguments=repr(tuple(HEAD.items())), recipes="lora",
        lora__rules=r"block_\d+/attn/qkv/kernel", trainable="contrastive_head/.*",
    )  # fmt: skip
    check_adapters(config, tmp_path / "run")


@pytest.mark.long
def test_bad_input_is_one_line(tmp_path, capsys):
    small = write_images(tmp_path / "small", 30, (10, 8))
    cases = (
        ({"batch_size": 64}, "48 images to train on are fewer than a batch of 64"),
        ({"data__train": small}, "images of 8 x 10 pixels are smaller than"),
        ({"model__variant": "resnet", "model__arguments": RESNET}, "takes a ViT"),
        ({"recipes": "adversarial"}, "adversarial is not for images without labels"),
        ({"probe__data": small}, "small"),
    )
    check_refused("simclr_embedded", TINY, cases, tmp_path / "run", capsys)


def test_one_image_alone_is_refused():
    sizes = {"image_size": (16, 16), "num_classes": 0}
    model = build_model("simclr", **sizes, **ENCODER)
    for fields in ({"batch_size": 1}, {"batch_size": 4, "optim__accumulate": 4}):
        with pytest.raises(UserError, match="which the loss compares 1: an image is told from"):
            task.make_objective(tiny(**fields), model, "projections", None, None, None)


# Collapse ----------------------------------------------------------------------------------------


PLANTED = [
    ({"contrastive__temperature": 100.0}, "the temperature 100 is too high"),
    ({"contrastive__scale": "(0.002, 0.003)"}, "too little in common"),
    ({"optim__lr": 3.0, "optim__clip_norm": 0.0}, "the rate is too high"),
]


def of_embedded_images(**more):
    """200 updates of a small ViT on Fashion-MNIST."""
    fields = {
        "total_steps": 200, "optim__lr": 1e-3, "optim__warmup_steps": 20, "evaluate__every": 200,
        "checkpoint_every": 200, "model__image_size": 28, "contrastive__view_size": 0,
        "data__train": "embedded:fashion_mnist/train", "data__eval": "embedded:fashion_mnist/test",
        "evaluate__batch_size": 500, "batch_size": 32, "probe__data": "",
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
