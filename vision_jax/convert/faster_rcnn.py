"""Tables for Faster R-CNN on a pyramid: torchvision's files, in both of their spellings.

Source: torchvision 0.29 models/detection/faster_rcnn.py. Files from before 0.13, the published v1
weights among them, call the convolutions of the pyramid and of the proposals without the numbers of
a Sequential. A frozen BatchNorm has no count of updates. Its epsilon is in no file: that of the
published v1 weights is 0, which is known by their name; of others it is asked for
(`batch_norm_eps`). The two builders with a MobileNetV3 have the same tensors: how many proposals
there are, and how large images, says their name.
"""

import re
from functools import partial
from typing import Any

from vision_jax.convert.engine import POINTWISE, Rules, affine
from vision_jax.convert.pyramid import (
    BODIES,
    BODY,
    FPN,
    conv_norm,
    epsilon_of,
    level_rules,
    said_epsilon,
)
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.models.families import FAMILIES
from vision_jax.models.faster_rcnn import LOW_RESOLUTION, MOBILE_ONLY, VARIANTS

V1 = "fasterrcnn_resnet50_fpn"
PUBLISHED_V1 = f"{V1}_coco"  # how the file's name begins
MOBILE = "fasterrcnn_mobilenet_v3_large_fpn"
_BOX = "roi_heads.box_head"
# Arguments of torchvision's builders that no tensor shows.
_KEYWORDS = {
    "rpn_pre_nms_top_n_test": "proposals",
    "rpn_post_nms_top_n_test": "proposals",
    "rpn_pre_nms_top_n_train": "train_proposals",
    "rpn_post_nms_top_n_train": "train_proposals",
    "rpn_batch_size_per_image": "rpn_samples",
    "box_batch_size_per_image": "box_samples",
    "box_detections_per_img": "most",
    "rpn_score_thresh": "least_proposal_score",
}


def _maps(arguments: Arguments) -> int:
    """How many the pyramid stands on."""
    return 2 if arguments["body"] == "mobilenet_v3" else len(arguments["depths"])


def _rules(numbered: bool, arguments: Arguments) -> Rules:
    """`numbered`: convolutions of the pyramid and of the proposals stand in a Sequential."""
    rules = BODIES[arguments["body"]].rules(arguments)
    rules += level_rules(_maps(arguments), arguments["fpn_norm"], numbered)
    for index in range(arguments["rpn_depth"]):
        name = f"rpn.head.conv.{index}" if numbered else "rpn.head.conv"
        rules += conv_norm(name, f"rpn/conv_{index}", False, numbered)
    rules += affine("rpn.head.cls_logits", "rpn/score_head", POINTWISE)
    rules += affine("rpn.head.bbox_pred", "rpn/box_head", POINTWISE)
    convs = arguments["head_convs"]
    for index in range(convs):
        rules += conv_norm(f"{_BOX}.{index}", f"roi_head/conv_{index}", True)
    for index in range(arguments["head_layers"]):
        # After the convolutions what flattens, and after each layer a ReLU.
        name = f"{_BOX}.{convs + 1 + 2 * index}" if convs else f"{_BOX}.fc{6 + index}"
        rules += affine(name, f"roi_head/fc{index + 1}")
    rules += affine("roi_heads.box_predictor.cls_score", "class_head/logits")
    rules += affine("roi_heads.box_predictor.bbox_pred", "class_head/deltas")
    return rules


def _arguments(kind: str, numbered: bool, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    builder = config.get("model") or config.get("architecture")
    known = VARIANTS.get(builder, VARIANTS[MOBILE if kind == "mobilenet_v3" else V1])
    unseen = ("anchor_sizes", *_KEYWORDS.values())

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in shapes)

    inner = f"{FPN}inner_blocks.0"
    convs = count(rf"{re.escape(_BOX)}\.\d+\.0\.weight")
    given = config.get("kwargs") or {}
    return {
        "num_classes": shapes["roi_heads.box_predictor.cls_score.weight"][0] - 1,
        "body": kind,
        **BODIES[kind].read(shapes, {}, "Faster R-CNN"),
        **{name: known[name] for name in unseen if name in known},
        "batch_norm_eps": epsilon_of(config, (V1, PUBLISHED_V1)),
        "width": shapes[f"{inner}.0.weight" if numbered else f"{inner}.weight"][0],
        "fpn_norm": f"{inner}.1.weight" in shapes,
        "rpn_depth": count(r"rpn\.head\.conv\.\d\.0\.weight") if numbered else 1,
        "head_convs": convs,
        "head_layers": count(rf"{re.escape(_BOX)}\.(fc)?\d+\.weight"),
        "head_width": shapes["roi_heads.box_predictor.cls_score.weight"][1],
        **{ours: given[name] for name, ours in _KEYWORDS.items() if name in given},
    }


def _named(arguments: Arguments) -> str:
    """torchvision's builder of such a model; "" for none."""
    defaults = FAMILIES["faster_rcnn"].defaults
    fixed = {"width": 256, "head_width": 1024}
    names = (
        *("body", "block", "depths", "widths", "stem_width", *MOBILE_ONLY, "anchor_sizes"),
        *("fpn_norm", "rpn_depth", "head_convs", "head_layers"),
    )
    found = []
    for name, sizes in VARIANTS.items():
        wanted = {key: {**defaults, **sizes}[key] for key in names} | fixed
        if {key: arguments[key] for key in wanted} == wanted:
            found.append(name)
    if LOW_RESOLUTION in found and arguments["proposals"] != VARIANTS[LOW_RESOLUTION]["proposals"]:
        found.remove(LOW_RESOLUTION)
    return found[0] if found else ""


def _config(arguments: Arguments) -> dict[str, Any]:
    """The builder and its arguments; `norm_eps` is what overwrite_eps must be told, if anything."""
    builder = _named(arguments)
    known = {**FAMILIES["faster_rcnn"].defaults, **VARIANTS[builder]}
    given = {
        name: arguments[ours] for name, ours in _KEYWORDS.items() if arguments[ours] != known[ours]
    }
    return {
        "model": builder,
        "kwargs": {
            "num_classes": arguments["num_classes"] + 1,  # one for none
            "weights_backbone": None,
            **given,
        },
        **said_epsilon(arguments),
    }


def _modules(arguments: Arguments) -> dict[str, str]:
    levels = range(_maps(arguments))
    return {
        **BODIES[arguments["body"]].modules(arguments),
        **{f"level_{index}": f"{FPN}layer_blocks.{index}" for index in levels},
    }


def _table(kind: str, numbered: bool) -> Table:
    first = ".0" if numbered else ""
    stem = {"resnet": "conv1", "mobilenet_v3": "0.0"}[kind]
    named = {"resnet": PUBLISHED_V1, "mobilenet_v3": f"{LOW_RESOLUTION}|{MOBILE}"}[kind]
    return Table(
        "torchvision",
        "faster_rcnn",
        kind if numbered else f"{kind} before 0.13",
        (
            f"{BODY}{stem}.weight",
            f"{FPN}inner_blocks.0{first}.weight",
            f"rpn.head.conv{first}{first}.weight",
            "roi_heads.box_predictor.cls_score.weight",
        ),
        arguments=partial(_arguments, kind, numbered),
        rules=partial(_rules, numbered),
        holds=lambda arguments: numbered and _named(arguments) != "",
        config=_config,
        modules=_modules,
        unseen=("batch_norm_eps", "anchor_sizes", "proposals", "least_proposal_score"),
        by_name=("batch_norm_eps",),
        file_names=named,
    )


TABLES = tuple(
    _table(kind, numbered) for kind in ("resnet", "mobilenet_v3") for numbered in (True, False)
)
# Of more, float32 may order two of them otherwise, and all that follows differs.
_FEW = tuple((f"rpn_{when}_nms_top_n_test", 16) for when in ("pre", "post"))
ZOO = tuple(
    Entry(
        f"torchvision/{name}",
        "Faster R-CNN",
        name,
        reduced=_FEW,
        image_size=128,
        published=f"torchvision://{name}",
        license="BSD-3-Clause",
    )
    for name in VARIANTS
)
