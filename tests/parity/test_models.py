"""The counts that `vision_jax models` prints, of models without a certificate, are the sources'."""

import pytest
import timm
import torch
import torchvision
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

from vision_jax.commands.models import all_models

BUILDERS = {
    "timm/convnext_nano": lambda: timm.create_model("convnext_nano"),
    "timm/swin_s3_base_224": lambda: timm.create_model("swin_s3_base_224"),
    "torchvision/efficientnet_b5": torchvision.models.efficientnet_b5,
    "torchvision/resnext101_64x4d": torchvision.models.resnext101_64x4d,
    "transformers/convnextv2-nano": lambda: ConvNextV2ForImageClassification(
        ConvNextV2Config(depths=[2, 2, 8, 2], hidden_sizes=[80, 160, 320, 640], num_labels=1000)
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_parameters_are_those_of_the_source(name):
    with torch.device("meta"):
        module = BUILDERS[name]()
    listed = {model.name: model.parameters for model in all_models()}
    assert listed[name] == sum(parameter.numel() for parameter in module.parameters())
