"""Tables for FCOS: torchvision's files, in both spellings of the pyramid.

Source: torchvision 0.29 models/detection/fcos.py. Files from before 0.13 call the convolutions of
the pyramid without the numbers of a Sequential. In the heads a norm and a ReLU follow each
convolution.
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
from vision_jax.convert.table import Arguments, Metadata, Shapes
from vision_jax.models.families import FAMILIES
from vision_jax.models.fcos import VARIANTS
from vision_jax.models.resnet import ResNet

FAMILY = "fcos"
_KEYWORDS = {**KEYWORDS, "center_sampling_radius": "radius"}
_CLASSES, _BOXES = f"{TOWERS['class']}.cls_logits", f"{TOWERS['box']}.bbox_reg"
_CENTER = f"{TOWERS['box']}.bbox_ctrness"


def _rules(numbered: bool, arguments: Arguments) -> Rules:
    """`numbered`: convolutions of the pyramid stand in a Sequential."""
    return dense_rules(
        arguments,
        {"class": _CLASSES, "box": _BOXES, "center": _CENTER},
        numbered,
        True,
        lambda index: (f"{3 * index}", f"{3 * index + 1}"),
    )


def _arguments(numbered: bool, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    return {
        "num_classes": shapes[f"{_CLASSES}.weight"][0],
        **dense_arguments(shapes, config, "FCOS", numbered, FAMILIES[FAMILY].defaults, _KEYWORDS),
        "batch_norm_eps": float(config.get("norm_eps", ResNet.batch_norm_eps)),
    }


TABLES = dense_tables(
    FAMILY,
    VARIANTS,
    arguments=_arguments,
    rules=_rules,
    anchors=lambda first: (
        f"{TOWERS['class']}.conv.0.weight",
        f"{_CLASSES}.weight",
        f"{_CENTER}.weight",
    ),
    keywords=_KEYWORDS,
    also=("point_sizes",),
    unseen=("batch_norm_eps", "point_sizes", "radius", "least_score"),
)
ZOO = dense_zoo("FCOS", VARIANTS)
