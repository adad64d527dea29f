"""Names of a backbone and its pyramid inside a detector of torchvision's.

Source: torchvision 0.29 models/detection/backbone_utils.py and ops/feature_pyramid_network.py.
Files from before 0.13 call the pyramid's convolutions without the number of a Sequential. A frozen
BatchNorm has no count of updates, and its epsilon is in no file.
"""

from typing import Any

from vision_jax.convert import efficientnet, resnet
from vision_jax.convert.backbone import Backbone, table_of
from vision_jax.convert.engine import CONV, Rule, affine, batch_norm, one
from vision_jax.convert.table import Arguments, Metadata
from vision_jax.models.efficientnet import MOBILE_V3, TORCHVISION
from vision_jax.models.faster_rcnn import MOBILE_HEAD, MOBILE_ONLY
from vision_jax.models.resnet import ResNet

BODY, FPN = "backbone.body.", "backbone.fpn."
_STRUCTURE = ("depths", "widths", "stem_width", "batch_norm_eps")  # of any backbone


def _of_mobilenet(arguments: Arguments) -> dict[str, Any]:
    momentum = TORCHVISION["batch_norm_momentum"]
    return {
        **MOBILE_V3,
        "batch_norm_momentum": momentum,
        "head_width": MOBILE_HEAD * arguments["widths"][-1],
    }


BODIES = {
    "resnet": Backbone(table_of(resnet.TABLES, "torchvision"), BODY, (*_STRUCTURE, "block")),
    "mobilenet_v3": Backbone(
        next(table for table in efficientnet.TABLES if table.kind == "mobilenet_v3"),
        BODY,
        (*_STRUCTURE, *MOBILE_ONLY),
        "features.",
        _of_mobilenet,
    ),
}


def level_rules(count: int, norm: bool, numbered: bool) -> list[Rule]:
    """Rules of the convolutions of so many maps; `numbered`: they stand in a Sequential."""
    rules: list[Rule] = []
    for index in range(count):
        for kind in ("inner", "layer"):
            name, path = f"{FPN}{kind}_blocks.{index}", f"fpn/{kind}_{index}"
            rules += conv_norm(name, path, norm, numbered)
    return rules


def conv_norm(name: str, path: str, norm: bool, numbered: bool = True) -> tuple[Rule, ...]:
    """Rules of a convolution with a norm, or with a bias."""
    conv = f"{name}.0" if numbered else name
    if not norm:
        return affine(conv, f"{path}/conv", CONV)
    kernel = one(f"{conv}.weight", f"{path}/conv/kernel", CONV)
    return (*kernel, *batch_norm(f"{name}.1", f"{path}/bn"))


def epsilon_of(config: Metadata, published: tuple[str, str]) -> float:
    """BatchNorm's epsilon: what a config of ours says, or what the weights' name tells.

    Args:
      config: config.json's.
      published: (builder, how the file's name begins) of weights for an epsilon of 0.
    """
    builder, file = published
    by_name = (config.get("model"), config.get("weights")) == (builder, "COCO_V1")
    if by_name or config.get("architecture") == file:
        return 0.0
    return float(config.get("norm_eps", ResNet.batch_norm_eps))


def said_epsilon(arguments: Arguments) -> dict[str, float]:
    """`norm_eps` of a config of ours, what overwrite_eps must be told, if anything."""
    eps = arguments["batch_norm_eps"]
    return {"norm_eps": eps} if eps != ResNet.batch_norm_eps else {}
