"""Our ResNets against timm, torchvision and transformers: widths, depths and sizes of all kinds."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, randomize_statistics, sample_images
from vision_jax.certify.references import make_reference, rebuild
from vision_jax.convert import resnet
from vision_jax.convert.read import Weights
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.models.resnet import VARIANTS
from vision_jax.trees.paths import flatten

SMALL = {"layers": (1, 2, 1, 1), "channels": (16, 24, 24, 24), "num_classes": 7}
HUB = {"embedding_size": 16, "depths": [1, 2], "num_labels": 7}
BASIC = {**HUB, "layer_type": "basic", "hidden_sizes": [16, 24]}
WIDE = {**HUB, "layer_type": "bottleneck", "hidden_sizes": [32, 64]}
CLASSIFIER = "ResNetForImageClassification"
ODD = (71, 58)
REFERENCES = {  # few and of many traits each
    "timm basic": ("timm", "resnet18", SMALL, ODD),
    "timm groups, no head": (
        "timm",
        "resnext50_32x4d",
        {**SMALL, "cardinality": 4, "base_width": 16, "num_classes": 0},
        ODD,
    ),
    "timm d, tiered, one channel": (
        "timm",
        "resnet18d",
        {**SMALL, "stem_type": "deep_tiered", "stem_width": 16, "in_chans": 1},
        ODD,
    ),
    "torchvision basic": ("torchvision", "resnet18", {"num_classes": 5}, (32, 32)),
    "transformers, stride first": (
        "transformers",
        CLASSIFIER,
        {**WIDE, "downsample_in_bottleneck": True},
        ODD,
    ),
    "transformers, stage 0 strides, no head": (
        "transformers",
        "ResNetModel",
        {**BASIC, "downsample_in_first_stage": True, "num_channels": 4},
        ODD,
    ),
}
# The following stay in torch.
MORE = {
    "timm wide": ("timm", "resnet50", {**SMALL, "base_width": 128}, ODD),
    "timm d": ("timm", "resnet50d", SMALL, ODD),
    "transformers basic": ("transformers", CLASSIFIER, BASIC, ODD),
}


def reference_of(name):
    source, build, arguments, size = (REFERENCES | MORE)[name]
    reference = make_reference(source, build, arguments)
    randomize(reference.module, 3)
    channels = arguments.get("in_chans", arguments.get("num_channels", 3))
    randomize_statistics(reference, size, channels, 3)
    return reference, size


@pytest.mark.parametrize("name", REFERENCES)
def test_everything_equals_the_reference_and_goes_back(name):
    reference, size = reference_of(name)
    certificate = certify_reference(reference, size, whole=True)
    print(name, certificate["worst"])
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    assert certificate["family"] == "resnet"
    assert certificate["parameters_filled"] == certificate["parameters_in_model"]
    assert certificate["tensors_consumed"] == certificate["tensors"]
    stages = {f"stage_{i}" for i in range(len(certificate["arguments"]["depths"]))}
    assert set(certificate["errors"]["float64"]) == {"stem", "pooled", "logits"} | stages


def imported(reference, size, folder):
    folder.mkdir()
    weights = convert.read_weights(reference.save(folder))
    family, arguments = convert.recognize(weights)
    model = build_model(family, **arguments)
    like = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, *size, arguments["in_channels"]))
    )
    target = flatten(like["params"]) | flatten(like.get("batch_stats", {}))
    return family, arguments, convert.import_weights(weights, target, arguments)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("timm basic", {"transformers"}),
        ("timm groups, no head", set()),
        ("timm wide", set()),
        ("timm d", set()),
        ("torchvision basic", {"timm", "transformers"}),
        ("transformers basic", set()),
        ("transformers, stride first", set()),
    ],
)
def test_a_model_goes_to_the_libraries_that_have_such(name, others, tmp_path):
    reference, size = reference_of(name)
    family, arguments, flat = imported(reference, size, tmp_path / "source")
    images = sample_images(2, size, 3, 1)
    images = ((images - arguments["mean"]) / arguments["std"]).astype(np.float32)
    theirs = reference.outputs(images)["logits"].reshape(2, -1)
    for to in {"timm", "torchvision", "transformers"} - {reference.source}:
        if to not in others:
            with pytest.raises(UserError, match=f"{to} has no resnet that is such a model"):
                table_for_export(to, family, arguments)
            continue
        table = table_for_export(to, family, arguments)
        again = rebuild(table, family, arguments, flat, None, tmp_path / to)
        logits = again.outputs(images)["logits"].reshape(2, -1)
        assert relative_error(logits, theirs) <= 1e-5, to


def meta(name, **arguments):
    with torch.device("meta"):
        module = timm.create_model(name, **arguments)
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", [name for name in VARIANTS if timm.is_model(name)])
def test_named_variants_are_timms(name):
    shapes = meta(name)
    arguments = infer_arguments(find_table(shapes), shapes, {"config": {"architecture": name}})
    full = {**FAMILIES["resnet"].defaults, **arguments}
    assert full == {**full, **VARIANTS[name]}
    table = table_for_export("timm", "resnet", full)
    assert table.config(full) == {"architecture": name, "model_args": {}}


@pytest.mark.parametrize("builder", sorted(resnet._TORCHVISION.values()))
def test_torchvisions_builders_are_named(builder):
    with torch.device("meta"):
        module = make_reference("torchvision", builder, {}).module
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    full = {**FAMILIES["resnet"].defaults, **infer_arguments(find_table(shapes), shapes, {})}
    table = table_for_export("torchvision", "resnet", full)
    assert table.config(full) == {"model": builder, "kwargs": {}}


@pytest.mark.parametrize(
    "name",
    ["resnetaa50", "resnetblur50", "seresnet50", "ecaresnet50t", "resnet50_gn", "resnetv2_50"],
)
def test_its_relatives_are_no_resnet(name):
    """Those whose tensors are a ResNet's are refused by name; the others leave tensors over."""
    shapes = meta(name)
    arrays = {key: np.empty(shape, np.float32) for key, shape in shapes.items()}
    weights = Weights(arrays, {"config": {"architecture": name}}, None, name, "")
    with pytest.raises(UserError) as caught:
        convert.recognize(weights)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_activation_is_refused(tmp_path):
    reference = make_reference("transformers", CLASSIFIER, BASIC)
    reference.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="hidden_act 'silu' is not supported"):
        convert.recognize(convert.read_weights(str(tmp_path)))
