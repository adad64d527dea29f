"""Our ConvNeXt V1 and V2 against timm, torchvision and transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, sample_images
from vision_jax.certify.references import make_reference, rebuild
from vision_jax.convert.read import Weights
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.convnext import VARIANTS
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.trees.paths import flatten

SMALL = {"depths": (1, 2, 1, 1), "dims": (16, 24, 24, 24), "num_classes": 7}
HUB = {"depths": [1, 2], "hidden_sizes": [16, 24], "num_stages": 2, "num_labels": 7}
ODD = (71, 58)
EVEN = (68, 56)  # behind overlapping convolutions the maps are as large as behind ODD's patches
REFERENCES = {
    "timm v1": ("timm", "convnext_tiny", SMALL, ODD),
    "timm v2, one channel, no head": (
        "timm",
        "convnextv2_atto",
        {**SMALL, "num_classes": 0, "in_chans": 1},
        ODD,
    ),
    "timm overlapping stem": (
        "timm",
        "convnext_atto_ols",
        {**SMALL, "norm_eps": 1e-5},
        EVEN,
    ),
    "timm norm first, patches of 2": (
        "timm",
        "convnext_tiny_hnf",
        {**SMALL, "patch_size": 2},
        ODD,
    ),
    "timm hidden head": (
        "timm",
        "convnext_tiny",
        {**SMALL, "head_hidden_size": 20, "kernel_sizes": 3},
        ODD,
    ),
    "transformers v1": ("transformers", "ConvNextForImageClassification", HUB, ODD),
    "transformers v2": (
        "transformers",
        "ConvNextV2ForImageClassification",
        {**HUB, "num_channels": 4, "layer_norm_eps": 1e-6},
        ODD,
    ),
    "transformers v1, no head, patches of 2, no LayerScale": (
        "transformers",
        "ConvNextModel",
        {**HUB, "patch_size": 2, "layer_scale_init_value": 0.0},
        ODD,
    ),
}
# The following stays in torch.
MORE = {"torchvision": ("torchvision", "convnext_tiny", {"num_classes": 5}, ODD)}


def reference_of(name):
    source, build, arguments, size = (REFERENCES | MORE)[name]
    reference = make_reference(source, build, arguments)
    randomize(reference.module, 3)
    return reference, size


@pytest.mark.parametrize("name", REFERENCES)
def test_everything_equals_the_reference_and_goes_back(name):
    reference, size = reference_of(name)
    certificate = certify_reference(reference, size, whole=True)
    print(name, certificate["worst"])
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    assert certificate["family"] == "convnext"
    assert certificate["parameters_filled"] == certificate["parameters_in_model"]
    assert certificate["tensors_consumed"] == certificate["tensors"]
    stages = {f"stage_{i}" for i in range(len(certificate["arguments"]["depths"]))}
    assert set(certificate["errors"]["float64"]) == {"stem", "pooled", "logits"} | stages


def imported(reference, size, folder):
    folder.mkdir()
    weights = convert.read_weights(reference.save(folder))
    family, arguments = convert.recognize(weights)
    model = build_model(family, **arguments)
    images = jnp.zeros((1, *size, arguments["in_channels"]))
    like = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return family, arguments, convert.import_weights(weights, flatten(like), arguments)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("timm v1", {"transformers"}),
        ("timm overlapping stem", set()),
        ("timm hidden head", set()),
        ("torchvision", {"timm", "transformers"}),
        ("transformers v1", set()),  # of another epsilon in its last norm, and two stages
    ],
)
def test_a_model_goes_to_the_libraries_that_have_such(name, others, tmp_path):
    reference, size = reference_of(name)
    family, arguments, flat = imported(reference, size, tmp_path / "source")
    images = sample_images(2, size, 3, 1)
    images = ((images - arguments["mean"]) / arguments["std"]).astype(np.float32)
    theirs = reference.outputs(images)["logits"]
    for to in {"timm", "torchvision", "transformers"} - {reference.source}:
        if to not in others:
            with pytest.raises(UserError, match=f"{to} has no convnext that is such a model"):
                table_for_export(to, family, arguments)
            continue
        table = table_for_export(to, family, arguments)
        again = rebuild(table, family, arguments, flat, None, tmp_path / to)
        assert relative_error(again.outputs(images)["logits"], theirs) <= 1e-5, to


def meta(name):
    with torch.device("meta"):
        module = timm.create_model(name)
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_named_variants_are_timms(name):
    shapes = meta(name)
    arguments = infer_arguments(find_table(shapes), shapes, {"config": {"architecture": name}})
    full = {**FAMILIES["convnext"].defaults, **arguments}
    assert full == {**full, **VARIANTS[name]}
    table = table_for_export("timm", "convnext", full)
    assert table.config(full) == {"architecture": name, "model_args": {}}


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_torchvisions_builders_are_named(name):
    with torch.device("meta"):
        module = make_reference("torchvision", f"convnext_{name}", {}).module
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    full = {**FAMILIES["convnext"].defaults, **infer_arguments(find_table(shapes), shapes, {})}
    table = table_for_export("torchvision", "convnext", full)
    assert table.config(full) == {"model": f"convnext_{name}", "kwargs": {}}


@pytest.mark.parametrize(
    "name", ["convnext_atto_rms", "convnext_zepto_rms", "test_convnext", "cs3darknet_s"]
)
def test_its_relatives_are_no_convnext(name):
    arrays = {key: np.empty(shape, np.float32) for key, shape in meta(name).items()}
    weights = Weights(arrays, {"config": {"architecture": name}}, None, name, "")
    with pytest.raises(UserError) as caught:
        convert.recognize(weights)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_activation_is_refused(tmp_path):
    make_reference("transformers", "ConvNextForImageClassification", HUB).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_act": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="hidden_act 'relu' is not supported"):
        convert.recognize(convert.read_weights(str(tmp_path)))
