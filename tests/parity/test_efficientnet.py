"""torchvision's EfficientNets: each builder is recognized by its tensors, and two are compared."""

import pytest
import torch
import torchvision

from vision_jax.certify.measure import certify_reference
from vision_jax.certify.random_weights import randomize, randomize_statistics
from vision_jax.certify.references import make_reference
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.models.efficientnet import VARIANTS, EfficientNet


@pytest.mark.parametrize("size", range(8))
def test_each_builder_is_known_by_its_tensors(size):
    with torch.device("meta"):
        module = torchvision.models.get_model(f"efficientnet_b{size}")
    state = module.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    table = find_table(shapes)
    found = infer_arguments(table, shapes, {})
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {found["batch_norm_eps"]}
    for name, value in VARIANTS[f"efficientnet_b{size}"].items():
        assert found[name] == value, name
    names = [name for rule in table.rules(found) for name in rule.names]
    assert sorted(names) == sorted(state)
    defaults = {n: getattr(EfficientNet, n) for n in ("strides", "same_padding", "mean", "std")}
    exported = table_for_export("torchvision", "efficientnet", {**defaults, **found})
    assert exported.config({**defaults, **found})["model"] == f"efficientnet_b{size}"


def test_logits_and_the_way_back():
    size = (40, 64)
    reference = make_reference("torchvision", "efficientnet_b0", {"num_classes": 5})
    randomize(reference.module, 0)
    randomize_statistics(reference, size, 3, 0)
    certificate = certify_reference(reference, size, whole=True)
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    assert certificate["tensors_consumed"] == certificate["tensors"]
