"""DETR's files without torch: both namings and back bit-identical, other classes, the dilation."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.convert import (
    arguments_of,
    import_weights,
    own_naming,
    read_weights,
    recognize,
    unknown_fields,
)
from vision_jax.convert.package import write_package
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.trees.paths import flatten, select

SMALL = {
    "num_classes": 3,
    "depths": (2, 2, 2, 2),
    "block": "basic",
    "num_queries": 5,
    "width": 16,
    "mlp_width": 24,
    "encoder_depth": 1,
    "decoder_depth": 2,
}
NAMES = ("N/A", "person", "kite")
SIDES = {"short": 480, "longest": 640, "square": False, "interpolation": "bilinear"}


def target_of(model):
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return {path: x for tree in like.values() for path, x in flatten(tree).items()}


def small(**arguments):
    model = build_model("detr", **{**SMALL, **arguments})
    rng = np.random.default_rng(0)
    params = {
        path: rng.normal(size=x.shape).astype(x.dtype) if x.ndim else np.zeros((), x.dtype)
        for path, x in target_of(model).items()
    }
    return model, params


@pytest.mark.long
@pytest.mark.parametrize("to", ["transformers", "detr"])
def test_a_file_comes_back_bit_identical(to, tmp_path):
    model, params = small()
    record = {**SIDES, "mean": list(model.mean), "std": list(model.std)}
    options = {"to": to, "class_names": NAMES, "preprocessing": record}
    write_package(tmp_path, params, "detr", arguments_of(model), **options)
    weights = read_weights(str(tmp_path))
    family, arguments = recognize(weights)
    assert build_model(family, **arguments) == model
    again = import_weights(weights, target_of(model), arguments)
    assert set(again) == set(params)
    for path, value in params.items():
        np.testing.assert_array_equal(again[path], value, path)
    assert not any("num_batches_tracked" in name for name in weights.tensors)
    assert (weights.preprocessing["short"], weights.preprocessing["longest"]) == (480, 640)
    # Another library's file says the same by its names and shapes alone.
    family, arguments = recognize(dataclasses.replace(weights, metadata={}, preprocessing=None))
    assert build_model(family, **arguments) == model


def test_an_unequal_decoder_goes_to_transformers_alone(tmp_path):
    model, params = small(num_heads=4, decoder_heads=2, decoder_mlp_width=40)
    write_package(tmp_path / "hf", params, "detr", arguments_of(model), to="transformers")
    weights = read_weights(str(tmp_path / "hf"))
    theirs = dataclasses.replace(weights, metadata={"config": weights.metadata["config"]})
    family, arguments = recognize(theirs)
    assert build_model(family, **arguments) == model
    with pytest.raises(UserError, match="it can go to transformers"):
        write_package(tmp_path / "detr", params, "detr", arguments_of(model), to="detr")


@pytest.mark.long(but=("backbone_config-value4-output_stride 8",))
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("auxiliary_loss", True, "set it to false"),
        ("encoder_layers", 7, "encoder_layers 7, and the tensors are of 1"),
        ("model_type", "conditional_detr", "model_type 'conditional_detr'"),
        ("activation_function", "gelu", "computes with 'relu'"),
        ("backbone_config", {"output_stride": 8}, "output_stride 8"),
        ("backbone_config", {"out_indices": [1, 2]}, "do not end with the last"),
        ("backbone_config", 3, "not an object"),
    ],
)
def test_a_field_that_changes_the_arithmetic_is_named(field, value, words, tmp_path):
    model, params = small()
    write_package(tmp_path, params, "detr", arguments_of(model), to="transformers")
    weights = read_weights(str(tmp_path))
    config = {**weights.metadata["config"], field: value}
    with pytest.raises(UserError, match=words):
        recognize(dataclasses.replace(weights, metadata={"config": config}))


def test_unknown_fields_are_told(tmp_path):
    model, params = small()
    write_package(tmp_path, params, "detr", arguments_of(model), to="transformers")
    weights = read_weights(str(tmp_path))
    config = {**weights.metadata["config"], "my_note": "x"}
    told = unknown_fields(dataclasses.replace(weights, metadata={"config": config}))
    assert told == ("my_note",)


@pytest.mark.long
def test_another_number_of_classes_keeps_everything_else(tmp_path):
    model, params = small()
    write_package(tmp_path, params, "detr", arguments_of(model), to="transformers")
    weights = read_weights(str(tmp_path))
    _, arguments = recognize(weights)
    wanted = {**arguments, "num_classes": 7}
    target = target_of(build_model("detr", **wanted))
    with pytest.raises(UserError, match=r"class_labels_classifier.weight \(4, 16\) for class_head"):
        import_weights(weights, target, wanted)
    fresh = select(target, ("class_head/.*",), field="config.model.reinitialize")
    found = import_weights(weights, target, wanted, reinitialized=sorted(fresh))
    assert set(found) == set(params) - {"class_head/kernel", "class_head/bias"}
    for path, value in found.items():
        np.testing.assert_array_equal(value, params[path], path)


@pytest.mark.long
def test_dilation_is_in_the_config_and_in_no_tensor(tmp_path):
    for to, block in (("transformers", "basic"), ("detr", "bottleneck")):
        depths = (2, 2, 2, 2) if block == "basic" else (3, 4, 6, 3)
        model, params = small(dilation=True, block=block, depths=depths)
        write_package(tmp_path / to, params, "detr", arguments_of(model), to=to)
        config = json.loads((tmp_path / to / "config.json").read_text())
        assert config["dilation"] is True
        weights = read_weights(str(tmp_path / to))
        theirs = dataclasses.replace(weights, metadata={"config": config})
        assert recognize(theirs)[1]["dilation"] is True
        assert recognize(dataclasses.replace(weights, metadata={}))[1]["dilation"] is False


def test_a_runs_own_file_takes_transformers_names():
    assert own_naming("detr") == "transformers"
