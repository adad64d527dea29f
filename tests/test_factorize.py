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
from vision_jax.models import families
from vision_jax.run import factorize, prune
from vision_jax.run.restore import restore
from vision_jax.trees import factored, lora, paths, quantize
from vision_jax.trees.leaf import leaves

KEY = jax.random.key(0)
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
    assert report["image_size"] == [16, 16]
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
def test_what_is_no_whole_model_is_refused(held, whole, tmp_path, capsys):
    """A share of factors would be counted from other kernels, and int8 would come out in float."""
    params = whole.variables["params"]
    for name, tree in (
        ("int8", quantize.quantize(params, {"block_0/mlp/fc1/kernel"}, quantize.FORMS["int8"])),
        ("both", quantize.quantize(held[1], {*RANKS}, quantize.FORMS["int8"])),
    ):
        (tmp_path / name).mkdir()
        write_quantized(
            tmp_path / name / "model.safetensors",
            {"params": jax.device_get(tree)},
            family="vit",
            arguments=convert.arguments_of(whole.model),
            preprocessing=vars(whole.preprocessing),
            class_names=whole.class_names,
        )
    for source, message in (
        (held[0].parent, "is factored already: factorize the model that it was made of"),
        (tmp_path / "int8", "is a quantized model: factorize the float weights"),
        (tmp_path / "both", "is a quantized model: factorize the float weights"),
    ):
        out = tmp_path / "out"
        assert command.main([str(source), "--keep=0.75", f"--to={out}"]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1
        assert not out.exists()


def test_moments_are_those_of_all_batches(monkeypatch):
    """Of all images at once, and in float64 by the kernel's own outputs."""
    prepared = runs.Prepared()
    run, state = prepared.run, prepared.state.model_state
    params = lora.merge(prepared.plan.assemble({**prepared.state.trainable, **prepared.frozen}))
    rng = np.random.default_rng(3)
    batches = [
        {**prepared.batch, "image": rng.integers(0, 255, prepared.batch["image"].shape, np.uint8)}
        for _ in range(3)
    ]
    path = "patch_embed/kernel"
    found = factorize.output_moments(run, params, state, batches, {path})[path]
    assert found.dtype == np.float64
    each = [factorize.output_moments(run, params, state, [one], {path})[path] for one in batches]
    np.testing.assert_allclose(found, sum(each), rtol=1e-12)
    assert all(largest(one, each[0]) > 1e-4 for one in each[1:])


def test_convolutions_in_groups_stay_whole():
    """ConvNeXt's depthwise ones, beside convolutions and dense layers that are counted."""
    model = families.build_model("convnext", num_classes=3, depths=(1, 1), widths=(16, 24))
    variables = jax.eval_shape(lambda key: families.initialize(model, key, (64, 64)), KEY)
    kernels = {
        path: leaf
        for path, leaf in paths.flatten(variables["params"]).items()
        if path.endswith("kernel")
    }
    rows = factorize.count_rows(model, variables, (64, 64), kernels)
    grouped = {path for path, leaf in kernels.items() if leaf.ndim == 4 and leaf.shape[-2] == 1}
    assert grouped
    assert rows.keys() == kernels.keys() - grouped


@pytest.mark.long
def test_scanned_blocks_multiply_by_the_same_factors(tmp_path):
    """Kernels are found and counted as without `scan`, and outputs and gradients are the same."""
    path = runs.write_teacher(
        tmp_path / "model.safetensors",
        "vit",
        3,
        16,
        width=32,
        depth=3,
        num_heads=2,
        mlp_width=64,
        patch_size=8,
        image_size=(16, 16),
    )
    loaded = vision_jax.load(path)
    plain, params = loaded.model, loaded.variables["params"]
    scanned = plain.clone(scan=True)
    layers, others = (
        factorize.find_layers(model, loaded.variables, (16, 16), of_parameters=False)
        for model in (plain, scanned)
    )
    assert [(p, one.shape, one.rows) for p, one in layers.items()] == [
        (p, one.shape, one.rows) for p, one in others.items()
    ]
    assert "block_2/mlp/fc1/kernel" in layers
    alike = {p: 6 for p in layers if p.endswith("mlp/fc1/kernel")}  # what a loop needs
    smaller = factorize.factor(params, alike, layers)
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)

    def loss(params, model):
        return (families.as_outputs(model.apply({"params": params}, images))["logits"] ** 2).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(smaller, model)
        for model in (scanned, plain)
    )
    assert abs(ours[0] / theirs[0] - 1) < 1e-5
    for one, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    uneven = factorize.factor(params, {**alike, "block_1/mlp/fc1/kernel": 4}, layers)
    with pytest.raises(UserError, match=r"factors or adapters .*several ranks.*=False"):
        loss(uneven, scanned)


@pytest.mark.long
def test_a_scanned_run_is_factored(tmp_path, monkeypatch):
    """Whose blocks get ranks of their own, which the run's own loop can't have."""
    monkeypatch.setattr(runs, "DEPTH", 2)
    runs.write_weights(tmp_path / "weights.safetensors")
    workdir, out = tmp_path / "run", tmp_path / "factored"
    weights = str(tmp_path / "weights.safetensors")
    assert train.run(runs.tiny_config(model__weights=weights, model__scan=True), workdir) == 0
    arguments = [str(workdir), "--keep=0.6", "--multiple=2", "--images=16", f"--to={out}"]
    assert command.main(arguments) == 0
    report = json.loads((out / "factorization.json").read_text())
    ranks = {one["path"]: one["rank"] for one in report["kernels"] if one["rank"]}
    assert any(ranks.get(path.replace("block_0", "block_1")) != ranks[path] for path in ranks)
    assert factored.ranks_of(vision_jax.load(out).variables["params"]) == ranks
    assert report["after"]["products"] <= 0.6 * report["before"]["products"]


@pytest.mark.long
def test_an_adapter_that_makes_factors_no_smaller_leaves_the_kernel_whole(whole, tmp_path):
    """22 + 2 of a kernel [32, 96]; loaded, resumed and trained on, nothing of it is lost."""
    path, kernel = tmp_path / "model.safetensors", "block_0/attn/qkv/kernel"
    params = jax.device_get(
        factored.factorize(whole.variables["params"], {kernel: 22, "patch_embed/kernel": 3})
    )
    write_quantized(
        path,
        {"params": params},
        family="vit",
        arguments=convert.arguments_of(whole.model),
        preprocessing=vars(whole.preprocessing),
        class_names=whole.class_names,
    )
    config = runs.tiny_config(model__weights=str(path), lora__rules="('.*attn/qkv/kernel',)")
    workdir = tmp_path / "run"
    assert train.run(config, workdir) == 0
    restored = restore(config, workdir, "last")
    trained = restored.run.parameters.assemble({**restored.state.trainable, **restored.frozen})
    assert isinstance(leaves(trained)[kernel].base, factored.Factored)
    expected = jax.device_get(lora.merge(trained))
    assert largest(leaves(params)[kernel].merge(), leaves(expected)[kernel]) > 1e-3

    def check(folder):
        tree = vision_jax.load(folder).variables["params"]
        assert factored.ranks_of(tree) == {"patch_embed/kernel": 3}
        assert largest(lora.merge(tree), expected) < 1e-5

    check(workdir)
    again = runs.tiny_config(model__weights=str(workdir / "model.safetensors"))
    _, frozen, _ = runs.Prepared(config=again).run.make_arrays()
    assert largest(frozen[f"{kernel}/base"], leaves(expected)[kernel]) < 1e-5
    shutil.rmtree(workdir / "checkpoints" / str(runs.STEPS))
    (workdir / "model.safetensors").unlink()
    assert train.run(config, workdir) == 0
    check(workdir)


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
