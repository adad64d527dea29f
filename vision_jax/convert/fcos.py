"""Tables for FCOS: torchvision's files, in both spellings of the pyramid.

Source: torchvision 0.29 models/detection/fcos.py. Files from before 0.13 call the convolutions of
the pyramid without the numbers of a Sequential. In the heads a norm and a ReLU follow each
convolution.
"""

from functools import partial
from typing import Any

from vision_jax.convert.dense import (
    KEYWORDS,
    TOWERS,
    dense_arguments,
    dense_config,
    dense_modules,
    dense_named,
    dense_rules,
)
from vision_jax.convert.engine import Rule
from vision_jax.convert.pyramid import BODY, FPN
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.models.families import FAMILIES
from vision_jax.models.fcos import VARIANTS
from vision_jax.models.resnet import ResNet

FAMILY = "fcos"
_KEYWORDS = {**KEYWORDS, "center_sampling_radius": "radius"}
_CLASSES, _BOXES = f"{TOWERS['class']}.cls_logits", f"{TOWERS['box']}.bbox_reg"
_CENTER = f"{TOWERS['box']}.bbox_ctrness"


def _rules(numbered: bool, arguments: Arguments) -> list[Rule]:
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


def _named(arguments: Arguments) -> str:
    return dense_named(FAMILY, VARIANTS, arguments, ("point_sizes",))


def _config(arguments: Arguments) -> dict[str, Any]:
    builder = _named(arguments)
    return dense_config(FAMILY, builder, VARIANTS[builder], arguments, _KEYWORDS)


def _table(numbered: bool) -> Table:
    first = ".0" if numbered else ""
    return Table(
        "torchvision",
        FAMILY,
        "numbered" if numbered else "before 0.13",
        (
            f"{BODY}conv1.weight",
            f"{FPN}inner_blocks.0{first}.weight",
            f"{FPN}extra_blocks.p6.weight",
            f"{TOWERS['class']}.conv.0.weight",
            f"{_CLASSES}.weight",
            f"{_CENTER}.weight",
        ),
        arguments=partial(_arguments, numbered),
        rules=partial(_rules, numbered),
        holds=lambda arguments: numbered and _named(arguments) != "",
        config=_config,
        modules=dense_modules,
        unseen=("batch_norm_eps", "point_sizes", "radius", "least_score"),
    )


TABLES = tuple(_table(numbered) for numbered in (True, False))
ZOO = tuple(
    Entry(
        f"torchvision/{name}",
        "FCOS",
        name,
        image_size=128,
        published=f"torchvision://{name}",
        license="BSD-3-Clause",
    )
    for name in VARIANTS
)
