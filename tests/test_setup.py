"""Recipes as overrides of one config, each for one step through the public functions."""

import json

import jax
import numpy as np
import pytest
import runs
from jax.sharding import Mesh
from safetensors.numpy import load_file

from vision_jax import figures, sharding, train
from vision_jax.data.sources import read_source
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.run.description import (
    build_model,
    load_description,
    save_description,
)
from vision_jax.run.prepare import prepare
from vision_jax.run.restore import restore
from vision_jax.tasks.classification import task as classify
from vision_jax.trees import paths


@pytest.fixture(scope="module", autouse=True)
def finished():
    """The shared run, made before any test of this file replaces a part of the program."""
    return runs.finished()


class Prepared:
    """What train.run prepares, without a workdir."""

    def __init__(self, adapter=None, **fields):
        config = self.config = runs.tiny_config(**fields)
        mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
        run = self.run = prepare(config, runs.CLASSES, adapter=adapter, mesh=mesh)
        self.description, self.model, self.plan = run.description, run.model, run.parameters
        state, self.frozen, self.fresh = run.make_arrays()
        self.trainable, self.model_state = state.trainable, state.model_state
        source = read_source(config.data.train)
        self.batch = sharding.make_batch_placer(mesh)(
            {
                "image": np.stack([source[i]["image"] for i in range(8)]),
                "label": source.labels[:8],
                "mask": np.ones(8, bool),
                "index": np.arange(8, dtype=np.int32),
            }
        )

    def step(self, count=1):
        """(trainable before, state after, metrics) of updates on the same batch."""
        before = {path: np.asarray(array) for path, array in self.trainable.items()}
        state = self.run.make_state(self.trainable, self.model_state)
        step = self.run.make_train_step()
        for _ in range(count):
            state, metrics = step(state, self.frozen, self.batch)
        assert step._cache_size() == 1
        return before, state, metrics


RECIPES = {
    "linear probe, sgd": {"recipes": "()", "optim__name": "sgd"},
    "full, layer decay, lamb": {
        "recipes": "()",
        "trainable": ".*",
        "optim__layer_decay": 0.5,
        "optim__name": "lamb",
    },
    "some, lars": {
        "recipes": "()",
        "trainable": "('.*norm.*', '.*/fc1/.*', 'head/.*')",
        "optim__name": "lars",
    },
    "DoRA, mixing": {"lora__dora": True, "augment__mixup": 0.2, "augment__cutmix": 1.0},
    "q and v, lion": {"lora__qkv_parts": "q,v", "optim__name": "lion"},
    "rsLoRA, muon, bfloat16": {
        "lora__rank_stabilized": True,
        "optim__name": "muon",
        "model__dtype": "bfloat16",
    },
    "dropout, scan": {
        "model__dropout": 0.1,
        "model__drop_path": 0.1,
        "lora__dropout": 0.1,
        "model__scan": True,
    },
    "QLoRA, DoRA": {"recipes": "('quantize', 'lora')", "lora__dora": True},
    "QLoRA, scan": {"recipes": "('quantize', 'lora')", "model__scan": True},
    "int8 with int8 inputs": {
        "recipes": "quantize",
        "quantize__form": "int8",
        "quantize__activations": "int8",
        "trainable": ".*",
    },
    "training for int8": {
        "recipes": "quantize",
        "quantize__form": "int8",
        "quantize__train": True,
        "trainable": ".*",
    },
    "RandAugment, remat": {"augment__policy": "rand", "model__remat": True},
    "TrivialAugment, random weights": {
        "augment__policy": "trivial",
        "model__weights": "",
        "model__variant": "vit",
        "model__arguments": "(('width', 32), ('depth', 1), ('num_heads', 2), ('mlp_width', 64), "
        "('patch_size', 8))",
    },
}


@pytest.mark.long(but=["linear probe, sgd", "q and v, lion"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_change_what_trains_and_nothing_else(name):
    prepared = Prepared(
        optim__warmup_steps=0, optim__clip_norm=0.0, optim__weight_decay=0.1, **RECIPES[name]
    )
    kept = {path: np.asarray(array) for path, array in prepared.frozen.items()}
    before, state, metrics = prepared.step(2)  # LoRA's A moves once B has
    assert np.isfinite(float(metrics["loss"]))
    for path, array in state.trainable.items():
        assert array.dtype == np.float32
        assert (np.asarray(array) != before[path]).any(), path
    for path, array in prepared.frozen.items():
        np.testing.assert_array_equal(array, kept[path])
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    assert shapes == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), prepared.run.abstract_state
    )


def test_what_trains_is_what_the_rules_say():
    probe = Prepared(recipes="()")
    assert set(probe.plan.trainable) == {"head/kernel", "head/bias"}
    assert probe.fresh == ["head/bias", "head/kernel"]
    full = Prepared(recipes="()", trainable=".*")
    assert full.plan.trainable == set(full.trainable)
    assert full.frozen == {}
    adapted = Prepared(lora__rules=r"block_\d+/mlp/fc1/kernel", trainable="()")
    kernel = "block_0/mlp/fc1/kernel"
    assert set(adapted.plan.trainable) == {f"{kernel}/a", f"{kernel}/b"}
    assert f"{kernel}/base" in adapted.frozen
    both = Prepared(lora__rules=r"block_\d+/mlp/fc1/kernel", trainable=".*")
    assert set(both.frozen) == {f"{kernel}/base"}  # an adapter's base never trains


def test_the_weights_own_facts_are_taken_unless_the_config_has_others():
    own = Prepared().description
    assert own.preprocessing.mean == own.arguments["mean"] == (0.5, 0.4, 0.3)
    assert own.preprocessing.interpolation == "bicubic"
    assert own.weights.endswith("weights.safetensors")
    changed = Prepared(
        model__mean="(0.1, 0.2, 0.3)", model__image_size=24, data__interpolation="bilinear"
    )
    assert changed.description.arguments["mean"] == (0.1, 0.2, 0.3)
    assert changed.description.preprocessing.mean == (0.1, 0.2, 0.3)
    assert changed.description.preprocessing.image_size == (24, 24)
    assert changed.description.preprocessing.interpolation == "bilinear"
    assert changed.frozen["pos_embed"].shape == (1, 10, 32)  # resampled


def test_a_description_comes_back_from_its_file(tmp_path):
    description = load_description(runs.finished() / "model.json")
    save_description(description, tmp_path / "model.json")
    assert load_description(tmp_path / "model.json") == description


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"family": "no_such"}, "no_such"),
        ({"family": ["vit"]}, "unknown family"),
        ({"arguments": {"depth": 10**9}}, "depth 1000000000 is not from 0 to"),
        ({"arguments": {"width": "32"}}, "width '32' is no whole number"),
        ({"arguments": ["width"]}, "items"),
        ({"arguments": {"mean": [float("inf"), 0.5, 0.5]}}, "mean"),
        ({"task": "sorting"}, "sorting"),
        ({"more": 1}, "more"),
    ],
)
def test_a_description_that_no_model_can_be_is_one_line(change, word, tmp_path):
    record = json.loads((runs.finished() / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(record | change))
    with pytest.raises(UserError, match=word) as caught:
        load_description(tmp_path / "model.json")
    assert "model.json" in str(caught.value)


@pytest.mark.long
def test_keys_and_weights_decide_the_parameters():
    one, two, other = Prepared(), Prepared(), Prepared(seed=1)
    kernel = "block_0/attn/qkv/kernel/a"
    for path in one.trainable:
        np.testing.assert_array_equal(one.trainable[path], two.trainable[path])
    assert (np.asarray(one.trainable[kernel]) != np.asarray(other.trainable[kernel])).any()
    for path in one.frozen:
        np.testing.assert_array_equal(one.frozen[path], other.frozen[path])


@pytest.mark.long
def test_dropout_is_for_training_alone():
    fields = {"model__dropout": 0.5, "model__drop_path": 0.5, "lora__dropout": 0.5}
    outputs = [
        jax.jit(one.run.outputs_fn)(one.trainable, one.frozen, {}, one.batch)["logits"]
        for one in (Prepared(**fields), Prepared())
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.long
def test_a_run_starts_from_an_adapter_and_its_head(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    adapter = runs.finished() / "adapter"
    fields = {"lora__rules": "()", "lora__init_from": adapter, "total_steps": 2, "optim__lr": 0.0}
    config = runs.tiny_config(**fields)
    assert train.run(config, tmp_path) == 0
    began = load_file(adapter / "adapter_model.safetensors")
    ended = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert began.keys() == ended.keys()
    for name in began:  # a rate of 0 moves nothing
        np.testing.assert_allclose(ended[name], began[name], rtol=1e-6, err_msg=name)
    # The workdir has its own copy, and evaluates without the original.
    changed = runs.tiny_config(**(fields | {"lora__init_from": "gone"}))
    restored = restore(changed, tmp_path, "last")
    evaluated = read_metrics(runs.finished() / "metrics.jsonl")[-1]["eval/loss"]
    again = read_metrics(tmp_path / "metrics.jsonl")[-1]["eval/loss"]
    np.testing.assert_allclose(again, evaluated, rtol=1e-5)
    assert "head/kernel" in restored.state.trainable


def test_a_held_out_share_has_the_classes_of_the_rest():
    config = runs.tiny_config(data__eval="", data__holdout=0.25)
    held_in, held_out = classify.read_sources(config)
    assert (len(held_in), len(held_out)) == (36, 12)
    assert held_in.class_names == held_out.class_names == runs.CLASSES
    assert not set(held_in.rows) & set(held_out.rows)
    again = classify.read_eval_source(config, runs.CLASSES)
    np.testing.assert_array_equal(again.rows, held_out.rows)


def test_evaluation_data_with_fewer_classes_keep_the_labels_of_training(tmp_path):
    for name in ("dog", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    config = runs.tiny_config(data__eval=str(tmp_path))
    _, evaluation = classify.read_sources(config)
    assert evaluation.class_names == runs.CLASSES
    assert evaluation.labels.tolist() == [1, 3]


def test_the_tree_is_assembled_from_both_parts():
    prepared = Prepared()
    tree = prepared.plan.assemble({**prepared.trainable, **prepared.frozen})
    assert set(paths.flatten(tree)) == set(prepared.trainable) | set(prepared.frozen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": [1, 2]}, "class_names"),
        ({"class_names": "ab"}, "class_names"),
        ({"projections": {"x": [0, 4]}}, "projections"),
        ({"projections": 3}, "damaged"),
        ({"arguments": {}}, "missing"),
    ],
)
def test_a_damaged_description_is_one_line(change, message, tmp_path):
    record = json.loads((runs.finished() / "model.json").read_text()) | change
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        build_model(runs.tiny_config(), load_description(tmp_path / "model.json"))
