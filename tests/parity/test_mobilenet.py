"""MobileNetV3 beside torchvision's and timm's: recognized by tensors, each layer, files back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import torchvision

from vision_jax.certify.measure import certify_reference
from vision_jax.certify.random_weights import randomize, randomize_statistics
from vision_jax.certify.references import make_reference
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.efficientnet import EfficientNet
from vision_jax.models.families import FAMILIES, build_model, find_variant

COUNTS = {"large": 5_483_032, "small": 2_542_856}  # of torchvision's own metadata
DEFAULTS = FAMILIES["efficientnet"].defaults


def on_meta(source, name, **arguments):
    with torch.device("meta"):
        if source == "timm":
            return timm.create_model(name, **arguments)
        return torchvision.models.get_model(name, **arguments)


def inferred(module, metadata):
    shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    table = find_table(shapes)
    return table, shapes, {**DEFAULTS, **infer_arguments(table, shapes, metadata)}


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("source", ["torchvision", "timm", "timm from TensorFlow"])
def test_each_is_known_by_its_tensors(source, size):
    name, library = f"mobilenet_v3_{size}", source.split()[0]
    if library == "timm":
        prefix = "tf_" if source != "timm" else ""
        name = f"{prefix}mobilenetv3_{size}_100"
    module = on_meta(library, name)
    table, shapes, found = inferred(module, {"config": {"architecture": name}})
    _, variant = find_variant(name)
    assert found == {**DEFAULTS, **variant, "num_classes": 1000}
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {found["batch_norm_eps"]}
    assert {norm.momentum for norm in norms} == {found["batch_norm_momentum"]}
    assert sorted(name for rule in table.rules(found) for name in rule.names) == sorted(shapes)
    assert sum(p.numel() for p in module.parameters()) == COUNTS[size]
    config = table_for_export(library, "efficientnet", found).config(found)
    assert name in (config.get("model"), config.get("architecture"))
    other = "timm" if library == "torchvision" else "torchvision"
    with pytest.raises(UserError, match=rf"{other} has no efficientnet that is such a model"):
        table_for_export(other, "efficientnet", found)


def test_other_widths_are_read_and_relatives_refused():
    """A width of their own, torchvision's reduced tail; no file says how timm's are padded."""
    tail = on_meta("torchvision", "mobilenet_v3_small", reduced_tail=True)
    _, _, found = inferred(tail, {})
    assert (found["widths"], found["head_hidden"]) == ((16, 24, 40, 48, 48), 512)
    module = on_meta("timm", "mobilenetv3_small_050")
    config = {"architecture": "mobilenetv3_small_050"}
    table, shapes, found = inferred(module, {"config": config})
    assert sorted(name for rule in table.rules(found) for name in rule.names) == sorted(shapes)
    model = build_model("efficientnet", **found)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    count = sum(x.size for x in jax.tree.leaves(like["params"]))
    assert count == sum(p.numel() for p in module.parameters())
    with pytest.raises(UserError, match="whether a MobileNetV3 pads as TensorFlow does"):
        inferred(module, {})
    minimal = "tf_mobilenetv3_small_minimal_100"
    with pytest.raises(UserError, match=f"timm's {minimal} is neither a MobileNetV2 or V3"):
        inferred(on_meta("timm", minimal), {"config": {"architecture": minimal}})


@pytest.mark.long
@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("torchvision", "mobilenet_v3_large"),
        ("torchvision", "mobilenet_v3_small"),
        ("timm", "mobilenetv3_small_100"),
        ("timm", "tf_mobilenetv3_large_100"),
    ],
)
def test_layers_logits_and_the_way_back(source, name):
    """On images that are not whole in strides, in float32 and float64."""
    size = (40, 72)
    reference = make_reference(source, name, {"num_classes": 5})
    randomize(reference.module, 0)
    randomize_statistics(reference, size, 3, 0)
    certificate = certify_reference(reference, size, whole=True)
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    assert certificate["tensors_consumed"] == certificate["tensors"]
    compared = {"stem", "stage_1/block_0", "stage_1", "last", "pooled", "logits"}
    assert compared <= set(certificate["errors"]["float64"])


@pytest.mark.long
def test_padding_changes_nothing():
    """Each of two images as on a canvas of its own, what is beside it full of noise."""
    model = EfficientNet(
        0,
        depths=(1, 2),
        widths=(8, 8),
        kernels=(5, 3),
        expansions=(1, (2, 3)),
        strides=(2, 2),
        se_ratio=(0.25, 0.25),
        hard_gate=True,
        activation="hard_swish",
        relu_stages=1,
    )
    images = np.random.default_rng(0).random((2, 32, 48, 3)).astype(np.float32)
    mask = np.zeros((2, 32, 48), bool)
    mask[0], mask[1, :16, :32] = True, True
    variables = jax.jit(model.init)(jax.random.key(0), images)
    variables = jax.tree.map(lambda x: x + 0.1, variables)  # zero would stay zero
    apply = jax.jit(lambda x, m: model.apply(variables, x, mask=m, return_features=True)[1])
    together = apply(images, mask)
    alone = apply(images[1:, :16, :32], mask[1:, :16, :32])
    for name, x in alone.items():
        part = together[name][1]
        if x.ndim == 4:
            assert not part[x.shape[1] :].any(), name
            assert not part[:, x.shape[2] :].any(), name
            part = part[: x.shape[1], : x.shape[2]]
        np.testing.assert_allclose(part, x[0], rtol=2e-5, atol=1e-5, err_msg=name)
