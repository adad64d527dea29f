"""The table of U-Nets: segmentation_models_pytorch 0.6, whose U-Net on a ResNet this is.

With other encoders the encoder's tensors have timm's names behind "encoder."; such files are ours,
and their header says what they are.
"""

import json
from typing import Any

from vision_jax.convert import convnext, efficientnet, regnet, resnet
from vision_jax.convert.backbone import Backbone, table_of
from vision_jax.convert.engine import CONV, Rule, Rules, affine, batch_norm, one
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.errors import UserError
from vision_jax.models.backbone import encoder_pairs
from vision_jax.models.resnet import VARIANTS as RESNETS

SOURCE = "smp"
_ENCODER = "encoder."
_TIMM = {
    module.TABLES[0].family: table_of(module.TABLES, "timm")
    for module in (resnet, regnet, efficientnet, convnext)
}
# The encoders that smp has by torchvision's structure, and the one value of what else it takes.
_ENCODER_NAMES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"),
    *(f"resnext101_32x{width}d" for width in (4, 8, 16, 32)),
)
_FIXED = {
    "encoder_depth": 5,
    "decoder_use_norm": "batchnorm",
    "decoder_attention_type": None,
    "decoder_interpolation": "nearest",
    "activation": None,
}


def _conv_norm(name: str, path: str) -> tuple[Rule, ...]:
    """segmentation_models_pytorch's Conv2dReLU."""
    kernel = one(f"{name}.0.weight", f"{path}/conv/kernel", CONV)
    return (*kernel, *batch_norm(f"{name}.1", f"{path}/bn"))


def _encoder_rules(arguments: Arguments) -> Rules:
    family, own = arguments["encoder"], dict(arguments["encoder_arguments"])
    rules: list[Rule] = []
    if family == "plain":
        for stage in range(len(own.get("widths", range(4)))):
            for number in (1, 2):
                name = f"{_ENCODER}stages.{stage}.conv{number}"
                rules += _conv_norm(name, f"backbone/stage_{stage}/conv{number}")
        return rules
    return Backbone(_TIMM[family], _ENCODER).rules(arguments)


def _rules(arguments: Arguments) -> Rules:
    """In the order in which the reference computes."""
    rules = [*_encoder_rules(arguments)]
    for block in range(len(arguments["decoder_widths"])):
        for number in (1, 2):
            name = f"decoder.blocks.{block}.conv{number}"
            rules += _conv_norm(name, f"decoder_{block}/conv{number}")
    return [*rules, *affine("segmentation_head.0", "class_head", CONV)]


def _config(arguments: Arguments) -> dict[str, Any]:
    """What smp.from_pretrained builds the model by; nothing where smp has no name of the ResNet."""
    own = json.dumps(dict(arguments["encoder_arguments"]), sort_keys=True)  # tuples are lists
    known = {
        json.dumps(dict(encoder_pairs("resnet", RESNETS[name])), sort_keys=True): name
        for name in _ENCODER_NAMES
    }
    name = known.get(own)
    if name is None:
        return {}
    return _FIXED | {
        "_model_class": "Unet",
        "encoder_name": name,
        "encoder_weights": None,
        "decoder_channels": list(arguments["decoder_widths"]),
        "in_channels": arguments["in_channels"],
        "classes": arguments["num_classes"],
    }


def _arguments(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """Of a file without our header: a ResNet's, by its tensors.

    Raises:
      UserError: another encoder, or a config that says of more than the tensors show.
    """
    config = metadata.get("config", {})
    for key, value in {**_FIXED, "_model_class": "Unet"}.items():
        if config.get(key, value) != value:
            raise UserError(
                f"config.json: {key} {config[key]!r} of segmentation_models_pytorch: a U-Net with"
                f" {value!r} alone is read"
            )
    own = Backbone(_TIMM["resnet"], _ENCODER).shapes(shapes)
    table = _TIMM["resnet"]
    if table.matches(own) is None:
        raise UserError(
            "a U-Net whose encoder is no ResNet: of others, files of this program alone are read"
        )
    found = table.arguments(own, {"config": {}})
    widths: list[int] = []
    while (name := f"decoder.blocks.{len(widths)}.conv2.0.weight") in shapes:
        widths.append(shapes[name][0])
    return {
        "num_classes": shapes["segmentation_head.0.weight"][0],
        "encoder": "resnet",
        "encoder_arguments": encoder_pairs("resnet", found),
        "decoder_widths": tuple(widths),
        "in_channels": found["in_channels"],
    }


TABLES = (
    Table(
        SOURCE,
        "unet",
        "segmentation_models_pytorch",
        ("decoder.blocks.0.conv1.0.weight", "segmentation_head.0.weight"),
        arguments=_arguments,
        rules=_rules,
        recognizes=lambda shapes: any(name.startswith(_ENCODER) for name in shapes),
        holds=lambda arguments: arguments["encoder"] == "resnet",
        config=_config,
        unseen=("ReLU", "maps that grow by the nearest pixel"),
    ),
)
ZOO: tuple[Entry, ...] = ()
