"""Images and texts as users run it: a run, its continuation, what comes out, what is refused."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import runs
from PIL import Image
from safetensors.numpy import load_file, save_file

from vision_jax import convert, train
from vision_jax.commands import convert as converter
from vision_jax.config import load_config
from vision_jax.data import captions
from vision_jax.data.captions import load_tokenizer
from vision_jax.logging import read_metrics
from vision_jax.main import main
from vision_jax.run.prepare import Run, prepare
from vision_jax.run.restore import restore
from vision_jax.tasks.image_text import task

IMAGE = {
    "width": 32, "depth": 1, "num_heads": 2, "mlp_width": 64, "patch_size": 4, "pool": "map",
    "class_token": False, "position_prefix": 0, "activation": "gelu_tanh",
}  # fmt: skip
TEXT = {
    "vocab_size": 300, "text_length": 8, "text_width": 16, "text_depth": 1, "text_num_heads": 2,
    "text_mlp_width": 24,
}  # fmt: skip
TINY = {
    "model.arguments": repr(tuple((IMAGE | TEXT).items())),
    "model.image_size": 16,
    "batch_size": 16,
    "total_steps": 6,
    "checkpoint_every": 2,
    "log_every": 1,
    "evaluate.every": 3,
    "evaluate.batch_size": 8,
    "optim.warmup_steps": 1,
    "optim.lr": 0.01,
    "text.length": 8,
    "text.vocab_size": 300,
}


def overrides(**more):
    own = {"data.train": f"cifar10:{runs.inputs()}/train"}
    own |= dict.fromkeys(("data.eval", "text.zero_shot"), f"cifar10:{runs.inputs()}/test")
    fields = TINY | own | {name.replace("__", "."): value for name, value in more.items()}
    return {name: str(value) for name, value in fields.items()}


def tiny(**more):
    return load_config(str(runs.ROOT / "configs/siglip_embedded.py"), overrides(**more))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the workdir of a finished run, how often its step was compiled)."""
    workdir, made, make = tmp_path_factory.mktemp("siglip") / "run", [], Run.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "make_train_step", lambda run: made.append(make(run)) or made[-1])
        assert train.run(tiny(), workdir) == 0
    (step,) = made
    return workdir, step._cache_size()


@pytest.mark.long
def test_a_run_leaves_its_figures_and_compiles_once(finished):
    workdir, compilations = finished
    assert compilations == 1
    records = read_metrics(workdir / "metrics.jsonl")
    evaluations = [r for r in records if "eval/recall" in r]
    assert [r["step"] for r in evaluations] == [3, 6]
    for record in evaluations:
        assert all(0 <= record[f"eval/{name}"] <= 1 for name in task.reported)
        assert record["eval/image_to_text_1"] <= record["eval/image_to_text_5"]
    first = next(r for r in records if r["step"] == 1)
    assert first["train/logit_scale"] == pytest.approx(10, rel=1e-5)
    assert first["train/logit_bias"] == -10
    named = ("image_spread", "text_spread", "pair_logit")
    assert all(np.isfinite(first[f"train/{name}"]) for name in named)
    with Image.open(workdir / "captions.png") as image:
        assert image.width > image.height > 200
    assert json.loads((workdir / "model.json").read_text())["family"] == "siglip"
    assert 258 < load_tokenizer(str(workdir)).get_vocab_size() <= 300


@pytest.mark.long
def test_what_comes_out_is_an_ordinary_vit(finished, tmp_path):
    """For config.model.weights, timm and transformers; as a siglip it is all of itself."""
    workdir, _ = finished
    tensors = load_file(workdir / "model.safetensors")
    config = load_config(
        str(runs.ROOT / "configs/mae_embedded.py") + ":few_labels",
        {
            "model.weights": str(workdir), "model.variant": "", "model.image_size": "16",
            "model.arguments": "()", "data.subset": "0", "batch_size": "16",
            "data.train": f"cifar10:{runs.inputs()}/train",
        },
    )  # fmt: skip
    run = prepare(config, runs.CLASSES)
    state, frozen, fresh = run.make_arrays()
    assert (run.description.family, run.model.pool) == ("vit", "map")
    assert fresh == ["head/bias", "head/kernel"]
    arrays = {**state.trainable, **frozen}
    np.testing.assert_array_equal(
        arrays["block_0/attn/qkv/kernel"].T, tensors["blocks.0.attn.qkv.weight"]
    )
    assert not any(path.startswith(("text", "logit")) for path in arrays)
    for to in ("timm", "transformers"):
        out = tmp_path / to
        assert converter.main([str(workdir), f"--out={out}", f"--to={to}"]) == 0
        assert convert.recognize(convert.read_weights(str(out)))[0] == "vit"
    both = [str(workdir), f"--out={tmp_path / 'both'}", "--to=transformers", "--family=siglip"]
    assert converter.main(both) == 0
    config = json.loads((tmp_path / "both/config.json").read_text())
    assert (config["model_type"], config["text_config"]["vocab_size"]) == ("siglip", 300)
    # And a run goes on from it, text tower included, from its workdir and from transformers' files.
    for weights in (workdir, tmp_path / "both"):
        again = tiny(model__weights=weights, model__variant="", model__arguments="()")
        with again.unlocked():
            again.model.reinitialize = ()
        state, _, fresh = prepare(again, ()).make_arrays()
        assert not fresh
        np.testing.assert_array_equal(
            state.trainable["text/head/kernel"].T, tensors["text_model.head.weight"]
        )
        np.testing.assert_array_equal(state.trainable["logit_bias"], tensors["logit_bias"])


@pytest.mark.long
def test_a_vit_of_the_zoo_is_an_image_tower(tmp_path):
    """With a class token and another width than the text's; adapters train beside the text."""
    config = tiny(
        model__weights=runs.inputs() / "weights.safetensors", model__variant="",
        model__arguments=repr(tuple(TEXT.items())), recipes="lora",
        lora__rules=r"block_\d+/attn/qkv/kernel", trainable="text/.*|logit_.*",
    )  # fmt: skip
    assert train.run(config, tmp_path / "run") == 0
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    before = load_file(runs.inputs() / "weights.safetensors")
    after = load_file(tmp_path / "run/model.safetensors")
    np.testing.assert_array_equal(after["norm.weight"], before["norm.weight"])
    assert (after["blocks.0.attn.qkv.weight"] != before["blocks.0.attn.qkv.weight"]).any()
    assert after["text_model.head.weight"].shape == (32, 16)


@pytest.mark.long
def test_predict_and_evaluate_of_a_finished_run(finished, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        image = Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8))
        image.save(tmp_path / name)
    flags = [f"--workdir={finished[0]}", f"--images={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert main(["predict", *flags]) == 0
    said = capsys.readouterr().out
    assert sum(said.count(f"{name} 0.") for name in runs.CLASSES) == 4
    assert (tmp_path / "out/captions.png").is_file()
    assert main(["evaluate", f"--workdir={finished[0]}"]) == 0
    line = capsys.readouterr().out
    (logged,) = (
        r for r in read_metrics(finished[0] / "metrics.jsonl")
        if r.get("step") == 6 and "eval/recall" in r
    )  # fmt: skip
    for name in ("recall", "zero_shot"):
        found = float(line.split(f"{name} ")[1].split()[0])
        assert abs(found - logged[f"eval/{name}"]) < 2e-4
    assert main(["robustness", f"--workdir={finished[0]}"]) == 2
    assert "fine-tune it first" in capsys.readouterr().err


@pytest.mark.long
def test_an_interrupted_run_is_bit_identical(tmp_path, monkeypatch):
    """Tokenizer, captions and order: it ends at step 3 and goes on from checkpoint 2."""
    monkeypatch.setattr("vision_jax.run.results._draw", lambda *arguments: None)
    config = tiny(data__crop="random_resized", optim__ema_decay=0.5, model__dropout=0.1)
    assert train.run(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(task.Evaluation, "line", lambda evaluation: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(config, tmp_path / "parts")
    assert train.run(config, tmp_path / "parts") == 0
    whole, parts = (restore(config, tmp_path / n, "last").state for n in ("whole", "parts"))
    assert int(whole.step) == int(parts.step) == 6
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.long
def test_one_and_eight_devices_are_the_same():
    losses, kernels = [], []
    for devices, fsdp in ((1, 1), (8, 1), (8, 4)):
        config = tiny(optim__lr=1e-3, optim__warmup_steps=0)
        prepared = runs.Prepared(devices=devices, fsdp=fsdp, config=config)
        state, found = prepared.state, []
        for _ in range(3):
            state, metrics = prepared.step(state, prepared.frozen, prepared.batch)
            found.append(float(metrics["loss"]))
        assert prepared.step._cache_size() == 1
        losses.append(found)
        kernels.append(np.asarray(state.trainable["text/block_0/mlp/fc1/kernel"]))
    for found, kernel in zip(losses[1:], kernels[1:], strict=True):
        np.testing.assert_allclose(found[0], losses[0][0], rtol=1e-6)
        np.testing.assert_allclose(found, losses[0], rtol=1e-4)  # Adam enlarges rounding
        np.testing.assert_allclose(kernel, kernels[0], atol=1e-4)


RESNET = "(('depths', (1,)), ('widths', (8,)), ('stem_width', 8))"


@pytest.mark.long
def test_bad_input_is_one_line(tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    for name, text in (("empty", "a.png,\n"), ("gone", "a.png,one\nb.png,two\n")):
        (tmp_path / f"{name}.csv").write_text("path,caption\n" + text)
    cases = (
        ({"batch_size": 64}, "48 pairs to train on are fewer than a batch of 64"),
        ({"data__train": tmp_path / "empty.csv"}, "empty.csv:2: caption '': give the image a"),
        ({"data__train": tmp_path / "gone.csv"}, "gone.csv:3: b.png: no such file"),
        ({"text__length": 9}, "config.text.length 9, and the model takes 8 tokens"),
        ({"text__vocab_size": 301}, "asks for 301 tokens, and the model takes 300"),
        ({"text__vocab_size": 100}, "config.text.vocab_size 100: a tokenizer of one's own"),
        ({"text__tokenizer": tmp_path}, "tokenizer.json: give a tokenizer.json"),
        ({"text__templates": "('a photo',)"}, "texts with {} once in each"),
        ({"text__classes": "('x', 'y')"}, "config.text.classes names 2 classes, and"),
        ({"model__variant": "resnet", "model__arguments": RESNET}, "takes a ViT"),
        ({"recipes": "adversarial"}, "adversarial is not for images and texts"),
    )
    for fields, message in cases:
        flags = [f"--config.{name}={value}" for name, value in overrides(**fields).items()]
        config = f"--config={runs.ROOT / 'configs/siglip_embedded.py'}"
        assert main([config, f"--workdir={tmp_path / 'run'}", *flags]) == 2, message
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
        assert message in line
        assert not (tmp_path / "run").exists()


# Collapse ----------------------------------------------------------------------------------------


def of_embedded_images(**more):
    """160 updates of a small SigLIP on Fashion-MNIST."""
    source = {"data__train": "embedded:fashion_mnist/train", "text__zero_shot": ""}
    fields = {
        "total_steps": 160, "optim__lr": 1e-3, "optim__warmup_steps": 20, "evaluate__every": 160,
        "checkpoint_every": 160, "model__image_size": 28, "evaluate__batch_size": 500,
        "data__eval": "embedded:fashion_mnist/test", "batch_size": 32,
    }  # fmt: skip
    return tiny(**(source | fields | more))


def alike(source):
    """A source whose captions are all the same."""
    return replace(source, captions=("an image",) * len(source.captions))


def shuffled(source):
    """A source whose captions are those of other images."""
    return replace(source, captions=source.captions[7:] + source.captions[:7])


@pytest.mark.long
def test_the_start_of_transformers_is_named(finished, tmp_path, monkeypatch, capsys):
    """A SiglipModel that nobody has trained has a scale and a bias of 0."""
    monkeypatch.setattr("vision_jax.run.results._draw", lambda *arguments: None)
    both = [str(finished[0]), f"--out={tmp_path / 'both'}", "--to=transformers", "--family=siglip"]
    assert converter.main(both) == 0
    tensors = load_file(tmp_path / "both/model.safetensors")
    tensors |= {name: np.zeros(1, np.float32) for name in ("logit_scale", "logit_bias")}
    save_file(tensors, tmp_path / "both/model.safetensors")
    fields = {
        "model.weights": tmp_path / "both", "model.variant": "", "model.arguments": "()",
        "model.reinitialize": "()", "total_steps": 130, "evaluate.every": 130,
        "checkpoint_every": 130, "optim.lr": 1e-3,
    }  # fmt: skip
    config = tiny(**{name.replace(".", "__"): value for name, value in fields.items()})
    assert train.run(config, tmp_path / "run") == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "collapse: " in line]
    assert "logit_bias is -0.1, where most pairs must be told no: begin with -10" in said


PLANTED = {
    "rate": ({"optim__lr": 3.0, "optim__clip_norm": 0.0}, None, "the rate is too high"),
    "alike": ({}, alike, "or the captions are alike"),
    "shuffled": ({}, shuffled, "the captions are not of their images"),
    "healthy": ({}, None, ""),
}


@pytest.mark.long
@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_collapse_is_named_and_a_healthy_run_hears_nothing(
    case, tmp_path, monkeypatch, capsys
):
    planted, change, cause = PLANTED[case]
    if change is not None:
        read = captions.read_captioned
        monkeypatch.setattr(captions, "read_captioned", lambda *a, **more: change(read(*a, **more)))
    monkeypatch.setattr("vision_jax.run.results._draw", lambda *arguments: None)
    assert train.run(of_embedded_images(**planted), tmp_path) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "collapse: " in line]
    assert cause in "".join(said)
    assert bool(said) == bool(cause)
