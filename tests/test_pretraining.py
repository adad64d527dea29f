"""Pretraining as users run it: a run, its continuation, what comes out, and what is refused."""

import io
import json
import tarfile

import jax
import numpy as np
import pyarrow.parquet
import pytest
import runs
from jax.sharding import Mesh
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
    overrides,
    steps_on,
    write_images,
)

from vision_jax import convert, cost, train
from vision_jax.checkpoints import best_step
from vision_jax.commands import convert as converter
from vision_jax.config import load_config
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.run.prepare import prepare
from vision_jax.run.restore import restore
from vision_jax.tasks.pretraining.figures import reconstruct

DECODER = {
    "decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2, "decoder_mlp_width": 32,
}  # fmt: skip
TINY = {
    "model.arguments": repr(tuple((ENCODER | DECODER).items())),
}


def tiny(**more):
    return config_of("mae_embedded", TINY, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the workdir of a finished run, how often its step was compiled)."""
    workdir = tmp_path_factory.mktemp("mae") / "run"
    labelled = f"cifar10:{runs.inputs()}/train"
    config = tiny(optim__ema_decay=0.5, optim__accumulate=2, probe__data=labelled)
    return workdir, finish(config, workdir)


def test_a_run_leaves_its_figures_and_compiles_once(finished):
    workdir, compilations = finished
    assert compilations == 1
    records = read_metrics(workdir / "metrics.jsonl")
    losses = {r["step"]: r["eval/loss"] for r in records if "eval/loss" in r}
    assert sorted(losses) == [3, 6]
    others = ("spread", "knn", "linear", "few_shot", "rank")
    assert all(f"eval/{name}" in r for r in records if "eval/loss" in r for name in others)
    assert best_step(workdir, "loss", "lowest") == min(losses, key=losses.get)
    with Image.open(workdir / "reconstructions.png") as image:
        assert image.width > image.height > 300
    screen = (workdir / "model.json").read_text()
    assert json.loads(screen)["family"] == "mae"
    assert json.loads(screen)["class_names"] == []


def test_positions_are_sines_and_do_not_train(finished):
    restored = restore(load_config(str(finished[0] / "config.json"), {}), finished[0], "last")
    assert set(restored.frozen) == {"pos_embed", "decoder/pos_embed"}
    assert np.abs(restored.frozen["pos_embed"][0, 0]).max() == 0  # the class token's


def test_what_comes_out_is_an_ordinary_vit(finished, tmp_path):
    """For config.model.weights, timm and transformers; with --family=mae the decoder is kept."""
    workdir, _ = finished
    tensors = load_file(workdir / "model.safetensors")
    pooling = "(('pool', 'avg'), ('norm_after_pool', True))"
    config = few_labels(workdir, 16, model__arguments=pooling, total_steps=2)
    run = prepare(config, runs.CLASSES)
    state, frozen, fresh = run.make_arrays()
    assert fresh == ["head/bias", "head/kernel"]
    assert run.description.family == "vit"
    arrays = {**state.trainable, **frozen}
    np.testing.assert_array_equal(
        arrays["block_0/attn/qkv/kernel"].T, tensors["blocks.0.attn.qkv.weight"]
    )
    np.testing.assert_array_equal(arrays["pos_embed"], tensors["pos_embed"])
    assert not any(path.startswith("decoder") for path in arrays)
    for to, family, kind in (
        ("timm", "", "vit"), ("transformers", "", "vit"), ("transformers", "mae", "vit_mae")
    ):  # fmt: skip
        out = tmp_path / f"{to}{family}"
        flags = [f"--out={out}", f"--to={to}", *([f"--family={family}"] if family else [])]
        assert converter.main([str(workdir), *flags]) == 0
        written = json.loads((out / "config.json").read_text())
        assert written.get("model_type", "vit") == kind
        again = convert.read_weights(str(out), family=family)
        assert convert.recognize(again)[0] == (family or "vit")
    # From a checkpoint, the same.
    assert converter.main([str(workdir), "--checkpoint=last", f"--out={tmp_path / 'last'}"]) == 0
    last = load_file(tmp_path / "last/model.safetensors")
    assert not any(name.startswith("decoder") for name in last)
    np.testing.assert_array_equal(last["cls_token"], tensors["cls_token"])


@pytest.mark.long
def test_fine_tuning_from_a_run(finished, tmp_path):
    assert train.run(few_labels(finished[0], 16), tmp_path / "fine") == 0
    assert any("eval/top1" in r for r in read_metrics(tmp_path / "fine/metrics.jsonl"))


@pytest.mark.long
def test_transfer_begins_with_what_comes_out(finished, tmp_path):
    check_transfer(finished[0], "timm/vit_base_patch16_224.mae", tmp_path / "fine")


@pytest.mark.long
def test_predict_and_evaluate_of_a_finished_run(finished, tmp_path, capsys):
    said = check_predict(finished[0], tmp_path, capsys, "reconstructions.png")
    assert said.count("loss ") == 2
    check_evaluate(finished[0], "loss", capsys)


def pack(folder, kind, count=50):
    """Two shards of random images without labels; returns the pattern of their names."""
    folder.mkdir(exist_ok=True)
    draws = np.random.default_rng(count)
    for part in range(2):
        encoded = []
        for _ in range(count // 2):
            file = io.BytesIO()
            Image.fromarray(draws.integers(0, 256, (20, 24, 3), np.uint8)).save(file, "png")
            encoded.append(file.getvalue())
        if kind == "tar":
            with tarfile.open(folder / f"{part}.tar", "w") as tar:
                for number, data in enumerate(encoded):
                    entry = tarfile.TarInfo(f"{number:03}.png")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        else:
            table = pyarrow.table({"image": [{"bytes": data, "path": None} for data in encoded]})
            pyarrow.parquet.write_table(table, folder / f"{part}.parquet", row_group_size=7)
    return folder / f"{{0..1}}.{kind}"


@pytest.mark.long
@pytest.mark.parametrize("store", ["arrays", "tar", "parquet"])
def test_an_interrupted_run_is_bit_identical(tmp_path, monkeypatch, store):
    monkeypatch.setattr("vision_jax.run.results._draw", lambda *arguments: None)
    fields = {"optim__schedule": "constant", "optim__ema_decay": 0.5}
    if store != "arrays":
        fields |= {"data__train": pack(tmp_path / "data", store), "data__eval": ""}
    assert train.run(tiny(**fields), tmp_path / "whole") == 0
    assert train.run(tiny(**fields, total_steps=3), tmp_path / "parts") == 0
    assert train.run(tiny(**fields), tmp_path / "parts") == 0
    whole, parts = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array, err_msg=name)
    if store != "arrays":
        pack(tmp_path / "data", store, 46)
        with pytest.raises(UserError, match=r"has changed since this run began: .* removed \('"):
            train.run(tiny(**fields, total_steps=9), tmp_path / "parts")


@pytest.mark.long
def test_one_and_eight_devices_are_the_same():
    (one, first), (eight, second) = (steps_on(devices, tiny()) for devices in (1, 8))
    np.testing.assert_allclose(eight[-1], one[-1], rtol=1e-6)
    ours, theirs = (np.asarray(s.trainable["patch_embed/kernel"]) for s in (second, first))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# Cost --------------------------------------------------------------------------------------------


def flops(config, class_names):
    """Of a step on one device; nothing is computed."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    run = prepare(config, class_names, mesh=mesh)
    frozen = run.parameters.abstract()[1]
    step = run.make_train_step().lower(run.abstract_state, frozen, run.abstract_batch())
    return cost.count(step.compile()).flops


def share_of_supervised(variant, encoder=(), decoder=(), **fields):
    """FLOPs of a step at 75 % masking over those of the same encoder's step on labels."""
    common = {
        "model__variant": variant, "model__image_size": 224, "batch_size": 2, "data__subset": 0,
        "model__arguments": repr(encoder), **fields,
    }  # fmt: skip
    own = {**common, "model__arguments": repr((*encoder, *decoder))}
    mae = load_config(str(runs.ROOT / "configs/mae_embedded.py"), overrides(TINY, **own))
    labels = load_config(
        str(runs.ROOT / "configs/mae_embedded.py") + ":few_labels", overrides({}, **common)
    )
    return flops(mae, ()) / flops(labels, tuple(map(str, range(1000))))


@pytest.mark.long
def test_a_step_costs_a_share_of_the_supervised_one():
    """With a decoder as light beside its encoder as the paper's beside ViT-L."""
    decoder = (
        ("decoder_width", 64), ("decoder_depth", 1), ("decoder_num_heads", 2),
        ("decoder_mlp_width", 256),
    )  # fmt: skip
    assert 0.25 < share_of_supervised("ti/16", (("depth", 3),), decoder) <= 0.40


@pytest.mark.long
@pytest.mark.parametrize(("variant", "share"), [("l/16", 0.337), ("b/16", 0.556)])
def test_the_papers_decoder_costs_what_its_sizes_say(variant, share):
    """ViT-L, the paper's main model: a third. Of ViT-B the decoder is half of the whole."""
    assert abs(share_of_supervised(variant, model__scan=True) - share) < 0.01


# Other weights -----------------------------------------------------------------------------------


@pytest.mark.long
def test_any_vits_weights_are_continued():
    """The encoder is the weights', their head has no place, the decoder begins anew."""
    path = runs.inputs() / "weights.safetensors"
    arguments = repr(tuple(DECODER.items()))
    config = tiny(model__weights=path, model__variant="", model__arguments=arguments)
    run = prepare(config, ())
    state, frozen, fresh = run.make_arrays()
    tensors = load_file(path)
    assert all(name.startswith("decoder/") for name in fresh)
    arrays = {**state.trainable, **frozen}
    np.testing.assert_array_equal(arrays["pos_embed"], tensors["pos_embed"])
    np.testing.assert_array_equal(arrays["norm/scale"], tensors["norm.weight"])
    assert run.model.mean == pytest.approx((0.5, 0.4, 0.3))  # the weights' own
    # A ViT has no decoder to give, so it begins anew whatever else is asked to.
    config = tiny(
        model__weights=path, model__variant="", model__arguments=arguments,
        model__reinitialize="norm/.*",
    )  # fmt: skip
    *_, more = prepare(config, ()).make_arrays()
    assert set(more) == {*fresh, "norm/scale", "norm/bias"}


@pytest.mark.long
def test_attention_pooling_is_left_out(tmp_path):
    """SigLIP's tower becomes an encoder, which pools by the mean afterwards."""
    path = runs.write_teacher(
        tmp_path / "siglip.safetensors", "vit", 0, 16, **ENCODER, image_size=(16, 16),
        pool="map", class_token=False, position_prefix=0,
    )  # fmt: skip
    arguments = repr(tuple(DECODER.items()))
    run = prepare(tiny(model__weights=path, model__variant="", model__arguments=arguments), ())
    assert (run.model.pool, run.model.num_prefix) == ("avg", 0)
    state, frozen, _ = run.make_arrays()
    assert not any("attn_pool" in path for path in {**state.trainable, **frozen})


@pytest.mark.long
def test_adapters_continue_a_vit(tmp_path):
    config = tiny(
        model__weights=runs.inputs() / "weights.safetensors", model__variant="",
        model__arguments=repr(tuple(DECODER.items())), recipes="lora",
        lora__rules=r"block_\d+/attn/qkv/kernel", trainable="decoder/(?!pos_embed).*",
    )  # fmt: skip
    check_adapters(config, tmp_path / "run")


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_bad_input_is_one_line(tmp_path, capsys):
    two, small = (
        write_images(tmp_path / "two", 2, (32, 32)),
        write_images(tmp_path / "small", 30, (12, 20)),
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    tar = pack(tmp_path / "tar", "tar").parent
    (tar / "0.tar").write_bytes((tar / "0.tar").read_bytes()[:2000])
    (tar / "none.tar").write_bytes(bytes(10240))
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "b": ["x"]}), tmp_path / "b.parquet")
    cases = (
        (
            {"data__train": two, "data__eval": ""},
            "1 images to train on are fewer than a batch",
        ),
        ({"data__train": small, "data__eval": ""}, "images of 20 x 12 pixels are smaller than"),
        ({"data__train": empty}, "no image in it or below"),
        ({"data__train": tar}, "0.tar: a damaged or truncated tar file"),
        ({"data__train": tar / "none.tar"}, "none.tar: no image in it: its images end in"),
        ({"data__train": tmp_path / "b.parquet"}, "its columns: a (int64), b (string)"),
        ({"data__train": tmp_path / "{0..1}.tar"}, "there is no"),
        ({"mae__mask_ratio": 0.99}, "some must be hidden and some visible"),
        ({"model__variant": "resnet", "model__arguments": RESNET}, "takes a ViT"),
        ({"recipes": "adversarial"}, "adversarial is not for images without labels"),
    )
    check_refused("mae_embedded", TINY, cases, tmp_path / "run", capsys)


# Pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalized", [True, False])
def test_a_perfect_prediction_gives_the_image_back(rng, normalized):
    from vision_jax.ops import reconstruction

    shown = rng.integers(0, 256, (2, 9, 12, 3)).astype(np.uint8)  # the last row fills no patch
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
    patches = reconstruction.patchify(
        ((shown / 255 - np.reshape(mean, (1, 1, 1, 3))) / np.reshape(std, (1, 1, 1, 3))), 4
    )
    if normalized:
        patches = np.asarray(reconstruction.normalize_patches(patches))
    hidden = np.array([[1, 0, 1, 1, 1, 0]] * 2, np.float32)
    visible, made = reconstruct(
        shown, np.asarray(patches), hidden, mean=mean, std=std, normalized=normalized
    )
    np.testing.assert_allclose(made, shown[:, :8] / 255, atol=1e-5)
    assert (visible[:, :4, :4] == 0.5).all()
    np.testing.assert_array_equal(visible[:, :4, 4:8], shown[:, :4, 4:8] / 255)
