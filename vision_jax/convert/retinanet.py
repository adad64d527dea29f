"""Tables for RetinaNet: torchvision's files of v1 and v2, v1's in both of their spellings.

Source: torchvision 0.29 models/detection/retinanet.py. Files from before 0.13, the published v1
weights among them, call the convolutions of the pyramid without the numbers of a Sequential, and
those of the heads by the number of each second one, between which ReLUs stand. BatchNorm's epsilon
is in no file: that of the published v1 weights is 0, which is known by their name; of others it is
asked for (`batch_norm_eps`).
"""

from typing import Any

from vision_jax.convert.dense import (
    KEYWORDS,
    TOWERS,
    dense_arguments,
    dense_rules,
    dense_tables,
    dense_zoo,
)
from vision_jax.convert.engine import Rules
from vision_jax.convert.pyramid import epsilon_of
from vision_jax.convert.table import Arguments, Metadata, Shapes
from vision_jax.models.families import FAMILIES
from vision_jax.models.retinanet import VARIANTS

FAMILY = "retinanet"
V1 = "retinanet_resnet50_fpn"
PUBLISHED_V1 = f"{V1}_coco"  # how the file's name begins
_CLASSES, _BOXES = f"{TOWERS['class']}.cls_logits", f"{TOWERS['box']}.bbox_reg"


def _rules(numbered: bool, arguments: Arguments) -> Rules:
    """`numbered`: convolutions of the pyramid and the heads stand in Sequentials of their own."""
    return dense_rules(
        arguments,
        {"class": _CLASSES, "box": _BOXES},
        numbered,
        not arguments["head_groups"],
        lambda index: (f"{index}.0", f"{index}.1") if numbered else (f"{2 * index}", ""),
    )


def _arguments(numbered: bool, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    found = dense_arguments(
        shapes, config, "RetinaNet", numbered, FAMILIES[FAMILY].defaults, KEYWORDS
    )
    anchors = shapes[f"{_BOXES}.weight"][0] // 4
    return {
        "num_classes": shapes[f"{_CLASSES}.weight"][0] // anchors,
        **found,
        "batch_norm_eps": epsilon_of(config, (V1, PUBLISHED_V1)),
        "box_loss": "giou" if found["head_groups"] else "l1",
    }


TABLES = dense_tables(
    FAMILY,
    VARIANTS,
    arguments=_arguments,
    rules=_rules,
    anchors=lambda first: (
        f"{TOWERS['class']}.conv.0{first}.weight",
        f"{_CLASSES}.weight",
        f"{_BOXES}.weight",
    ),
    keywords=KEYWORDS,
    also=("anchor_sizes", "box_loss"),
    unseen=("batch_norm_eps", "anchor_sizes", "box_loss", "least_score"),
    by_name=("batch_norm_eps",),
    file_names=PUBLISHED_V1,
)
ZOO = dense_zoo("RetinaNet", VARIANTS)
