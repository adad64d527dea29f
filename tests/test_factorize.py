"""`vision_jax factorize`: its file and report, and what becomes of a factored model everywhere."""

import json
import shutil

import jax
import numpy as np
import pytest
import runs
from safetensors import safe_open
from safetensors.numpy import load_file

import vision_jax
from vision_jax import convert, figures, main, train
from vision_jax.commands import convert as convert_command
from vision_jax.commands import factorize as command
from vision_jax.convert.quantized import write_quantized
from vision_jax.errors import UserError
from vision_jax.run import factorize, prune
from vision_jax.run.restore import restore
from vision_jax.trees import factored, lora

RANKS = {"block_0/mlp/fc1/kernel": 4, "block_0/attn/qkv/kernel": 5, "patch_embed/kernel": 3}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)


def largest(a, b):
    return max(
        float(np.abs(x - y).max() / np.abs(y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def whole():
    return vision_jax.load(runs.teacher())


@pytest.fixture(scope="module")
def held(whole, tmp_path_factory):
    """A file of the model with factors, and its tree."""
    path = tmp_path_factory.mktemp("factored") / "model.safetensors"
    params = jax.device_get(factored.factorize(whole.variables["params"], RANKS))
    write_quantized(
        path,
        {"params": params},
        family="vit",
        arguments=convert.arguments_of(whole.model),
        preprocessing=vars(whole.preprocessing),
        class_names=whole.class_names,
    )
    return path, params


def test_a_file_holds_the_factors_and_is_weights_as_well(held, whole, tmp_path):
    path, params = held
    loaded = vision_jax.load(path)
    assert jax.tree.structure(loaded.variables["params"]) == jax.tree.structure(params)
    for one, other in zip(
        jax.tree.leaves(loaded.variables["params"]), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(one, other)

    # What reads weights gets kernels, in the naming of a run's own files, and the ranks beside.
    weights = convert.read_weights(str(path))
    assert convert.ranks_of(weights) == RANKS
    plain = load_file(runs.teacher())
    assert {name: x.shape for name, x in plain.items()} == weights.tensors.shapes
    kernel = params["block_0"]["mlp"]["fc1"]["kernel"].merge()
    np.testing.assert_array_equal(weights.tensors["blocks.0.mlp.fc1.weight"], kernel.T)
    assert convert.class_names_of(weights) == list(whole.class_names)

    # Another head: factors of the same ranks, which say the same.
    other = vision_jax.load(path, num_classes=7)
    assert factored.ranks_of(other.variables["params"]) == RANKS
    ours, theirs = (lora.merge(one.variables["params"])["block_0"] for one in (other, loaded))
    assert largest(ours, theirs) < 1e-5

    out = tmp_path / "timm"
    assert convert_command.main([str(path), "--to=timm", f"--out={out}"]) == 0
    assert load_file(out / "model.safetensors").keys() == plain.keys()


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("block_0/mlp/fc1/kernel/u", None, "should be two factors of rank 4, and is not"),
        ("block_0/mlp/fc1/kernel/v", (5, 64), "should be two factors of rank 4, and is not"),
        ("block_0/mlp/fc1/kernel/v", (4, 63), r"for block_0/mlp/fc1/kernel \(32, 64\)"),
        ("block_0/mlp/fc1/kernel/u", (31, 4), r"for block_0/mlp/fc1/kernel \(32, 64\)"),
    ],
)
def test_damaged_factors_are_refused(held, tmp_path, path, shape, message):
    tensors = load_file(held[0])
    with safe_open(held[0], "numpy") as file:
        header = file.metadata()
    del tensors[path]
    if shape:
        tensors[path] = np.zeros(shape, np.float32)
    file = tmp_path / "model.safetensors"
    convert.write_safetensors(file, tensors, header)
    for given in ({}, {"num_classes": 7}):
        with pytest.raises(UserError, match=message if given else "block_0/mlp/fc1/kernel"):
            vision_jax.load(file, **given)


def test_costs_are_those_of_the_compiled_program(whole):
    """Of each kernel alone factored: what the report says goes from the model's products."""
    size = whole.preprocessing.image_size
    layers = factorize.find_layers(whole.model, whole.variables, size, of_parameters=False)
    assert "head/kernel" not in layers
    assert set(layers) >= set(RANKS)
    before = prune.macs(whole.model, whole.variables, size)
    smaller = factorize.factor(whole.variables["params"], RANKS, layers)
    after = prune.macs(whole.model, {"params": smaller}, size)
    saved = sum(layers[path].cost(0) - layers[path].cost(rank) for path, rank in RANKS.items())
    assert saved > 0
    assert before - after == saved
    counted = factorize.find_layers(whole.model, whole.variables, size, of_parameters=True)
    gone = sum(counted[path].cost(0) - counted[path].cost(rank) for path, rank in RANKS.items())
    assert prune.count(whole.variables) - prune.count({"params": smaller}) == gone


def test_weights_alone_are_factored_by_themselves(tmp_path, capsys):
    out = tmp_path / "factored"
    arguments = [str(runs.teacher()), f"--to={out}", "--multiple=1"]
    assert command.main([*arguments, "--keep=0.6", "--of=parameters"]) == 0
    report = json.loads((out / "factorization.json").read_text())
    assert report["score"] == "weights"
    share = report["after"]["parameters"] / report["before"]["parameters"]
    assert 0.55 < share <= 0.6
    ranks = {one["path"]: one["rank"] for one in report["kernels"] if one["rank"]}
    loaded = vision_jax.load(out)
    assert factored.ranks_of(loaded.variables["params"]) == ranks
    assert prune.count(loaded.variables) == report["after"]["parameters"]
    assert "Factors" in capsys.readouterr().out
    for flags, message in (
        (["--keep=0.6", "--score=outputs"], "is none: take --score=weights"),
        (["--keep=0.01"], "raise --keep or lower --multiple"),
        (["--keep=1.5"], "give a share above 0 and below 1"),
        (["--keep=0.5", "--images=0"], "--images=0: give 1 or more"),
    ):
        assert command.main([*arguments, *flags]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1


@pytest.mark.long
def test_a_run_is_factored_recovers_and_goes_everywhere(tmp_path, capsys):
    source, out = runs.finished(), tmp_path / "factored"
    flags = ("--keep=0.6", "--multiple=2", "--images=16")
    assert command.main([str(source), *flags, f"--to={out}"]) == 0
    report = json.loads((out / "factorization.json").read_text())
    assert report["score"] == "outputs"
    assert report["after"]["products"] <= 0.6 * report["before"]["products"]
    assert all(one["error_alone"] > 0 for one in report["kernels"])
    assert report["evaluation"]["whole"]["agreement"] == 1
    assert 0 <= report["evaluation"]["factored"]["agreement"] <= 1
    ranks = {one["path"]: one["rank"] for one in report["kernels"] if one["rank"]}
    model = vision_jax.load(out)
    assert factored.ranks_of(model.variables["params"]) == ranks

    # It learns back from the whole one, stopped and resumed as if it had not been.
    fields = {
        "recipes": "distill",
        "trainable": ".*",
        "model__weights": str(out / "model.safetensors"),
        "model__reinitialize": "()",
        "distill__teachers": f"('{source}',)",
    }
    config = runs.tiny_config(**fields)
    recovered = tmp_path / "recovered"
    assert train.run(config, recovered) == 0
    restored = restore(config, recovered, "last")
    assert restored.run.description.ranks == ranks
    trained = restored.run.parameters.assemble({**restored.state.trainable, **restored.frozen})
    kept = vision_jax.load(recovered).variables["params"]
    assert factored.ranks_of(kept) == ranks
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(
        (np.asarray(one) != np.asarray(other)).any()
        for one, other in zip(
            jax.tree.leaves(kept), jax.tree.leaves(model.variables["params"]), strict=True
        )
    )
    before = {path.name: path for path in (recovered / "checkpoints").iterdir()}
    shutil.rmtree(before[str(runs.STEPS)])
    (recovered / "model.safetensors").unlink()
    assert train.run(config, recovered) == 0  # from the checkpoint before
    again = vision_jax.load(recovered).variables["params"]
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(one, other)

    # In int8: both factors of each kernel, and what is exported makes two products of them.
    int8 = tmp_path / "int8"
    overrides = ["--config.ptq.images=16", "--config.ptq.activations=dynamic"]
    assert main.main(["quantize", f"--workdir={recovered}", f"--out={int8}", *overrides]) == 0
    quantized = vision_jax.load(int8)
    dtypes = {x.dtype.name for x in jax.tree.leaves(quantized.variables["params"])}
    assert dtypes == {"int8", "float32"}
    assert factored.ranks_of(quantized.variables["params"]) == ranks
    for folder in (recovered, int8):
        given = [str(folder), "--to=stablehlo", f"--out={tmp_path / 'file'}", "--seed=1"]
        assert main.main(["export", *given]) == 0
        record = json.loads((tmp_path / "file" / "model.stablehlo.json").read_text())
        assert record["certificate"]["pass"], record["certificate"]
    with pytest.raises(UserError, match="is a quantized model"):
        convert.read_weights(str(int8))
