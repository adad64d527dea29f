"""The table of U-Nets: segmentation_models_pytorch 0.6, whose U-Net on a ResNet this is.

With other encoders the encoder's tensors have timm's names behind "encoder."; such files are ours,
and their header says what they are.
"""

from typing import Any

from vision_jax.convert import convnext, efficientnet, regnet, resnet
from vision_jax.convert.backbone import Backbone, table_of
from vision_jax.convert.engine import CONV, Rule, Rules, affine, batch_norm, one
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.errors import UserError
from vision_jax.models.backbone import encoder_pairs

SOURCE = "smp"
_ENCODER = "encoder."
_TIMM = {
    module.TABLES[0].family: table_of(module.TABLES, "timm")
    for module in (resnet, regnet, efficientnet, convnext)
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


def _arguments(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """Of a file without our header: a ResNet's, by its tensors."""
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
        unseen=("ReLU", "maps that grow by the nearest pixel"),
    ),
)
ZOO: tuple[Entry, ...] = ()
