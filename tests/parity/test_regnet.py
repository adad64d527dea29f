"""Our RegNets against timm, torchvision and transformers."""

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
from vision_jax.convert import regnet
from vision_jax.convert.read import Weights
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.models.regnet import VARIANTS
from vision_jax.trees.paths import flatten

CLASSIFIER = "RegNetForImageClassification"
HUB = {
    "embedding_size": 16,
    "depths": [1, 2],
    "hidden_sizes": [16, 48],
    "groups_width": 24,  # more than the first stage has
    "num_labels": 7,
}
X, Y = {**HUB, "layer_type": "x"}, {**HUB, "layer_type": "y"}
ODD = (71, 58)
REFERENCES = {
    "timm y, one channel": ("timm", "regnety_002", {"num_classes": 5, "in_chans": 1}, (32, 40)),
    "transformers x": ("transformers", CLASSIFIER, X, ODD),
    "transformers y, no head": ("transformers", "RegNetModel", Y, ODD),
    "transformers y, stride 1": (
        "transformers",
        CLASSIFIER,
        {**Y, "downsample_in_first_stage": False, "num_channels": 4},
        (32, 48),
    ),
}
# The following stay in torch.
MORE = {
    "timm x": ("timm", "regnetx_002", {"num_classes": 0}, (48, 64)),
    "timm y": ("timm", "regnety_004", {"num_classes": 5}, (48, 64)),
    "torchvision x": ("torchvision", "regnet_x_400mf", {"num_classes": 5}, (48, 64)),
    "torchvision y": ("torchvision", "regnet_y_400mf", {"num_classes": 5}, ODD),
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
    assert certificate["family"] == "regnet"
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
    target = flatten(like["params"]) | flatten(like["batch_stats"])
    return family, arguments, convert.import_weights(weights, target, arguments)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("timm x", {"transformers"}),
        ("timm y", {"torchvision", "transformers"}),
        ("torchvision x", {"timm", "transformers"}),
        ("torchvision y", {"timm", "transformers"}),
        ("transformers x", set()),
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
            with pytest.raises(UserError, match=f"{to} has no regnet that is such a model"):
                table_for_export(to, family, arguments)
            continue
        table = table_for_export(to, family, arguments)
        again = rebuild(table, family, arguments, flat, None, tmp_path / to)
        logits = again.outputs(images)["logits"].reshape(2, -1)
        assert relative_error(logits, theirs) <= 1e-5, to


def meta(name):
    with torch.device("meta"):
        module = timm.create_model(name)
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_named_variants_are_timms(name):
    shapes = meta(name)
    arguments = infer_arguments(find_table(shapes), shapes, {"config": {"architecture": name}})
    full = {**FAMILIES["regnet"].defaults, **arguments}
    assert full == {**full, **VARIANTS[name]}
    table = table_for_export("timm", "regnet", full)
    assert VARIANTS[table.config(full)["architecture"]] == VARIANTS[name]


# torchvision computes RegNets' widths with tensors, so they need memory: the largest stay out.
BUILDERS = sorted(
    n for n in regnet._TORCHVISION.values() if not n.endswith(("6gf", "2gf", "128gf"))
)


@pytest.mark.parametrize("builder", [*BUILDERS, "regnet_x_1_6gf", "regnet_y_3_2gf"])
def test_torchvisions_builders_are_named(builder):
    module = make_reference("torchvision", builder, {}).module
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    full = {**FAMILIES["regnet"].defaults, **infer_arguments(find_table(shapes), shapes, {})}
    table = table_for_export("torchvision", "regnet", full)
    assert table.config(full) == {"model": builder, "kwargs": {}}


@pytest.mark.parametrize("name", ["regnety_040_sgn", "regnetv_040", "regnetz_005", "regnetz_b16"])
def test_its_relatives_are_no_regnet(name):
    arrays = {key: np.empty(shape, np.float32) for key, shape in meta(name).items()}
    weights = Weights(arrays, {"config": {"architecture": name}}, None, name, "")
    with pytest.raises(UserError) as caught:
        convert.recognize(weights)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_activation_is_refused(tmp_path):
    make_reference("transformers", CLASSIFIER, X).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="hidden_act 'silu' is not supported"):
        convert.recognize(convert.read_weights(str(tmp_path)))
