"""Tables for NanoDet-g: the original code's names, and TensorFlow.js graph models of it.

Source: https://github.com/RangiLyu/nanodet, version 0.x, modules CustomCspNet, PAN and NanoDetHead
with `share_cls_reg`, whose one convolution gives classes and sides. Its checkpoints are
{"state_dict": ...}, each name behind "model.".
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vision_jax.convert.engine import (
    CONV,
    COPY,
    POINTWISE,
    Layout,
    Rule,
    affine,
    batch_norm,
    one,
)
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table, count_blocks
from vision_jax.errors import UserError
from vision_jax.models.nanodet import EPSILON, STRIDES, VARIANTS, NanoDet

SOURCE = "nanodet"
BINS = NanoDet.bins  # where nothing says how many there are
FIRST = 2  # the number of the first stage in files; the stem is 0, the max pool 1
# NanoDet's class names of COCO, in the order of its labels, which no file of weights has.
COCO = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog"),
    *("horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella"),
    *("handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite"),
    *("baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle"),
    *("wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich"),
    *("orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote"),
    *("keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book"),
    *("clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)


# The original's names -----------------------------------------------------------------------------


def _convolutions(arguments: Arguments) -> Iterator[tuple[str, str]]:
    """(name, path) of the convolutions with a norm, but for the heads'."""
    yield "backbone.stages.0", "stem"
    for index, depth in enumerate(arguments["depths"]):
        name, path = f"backbone.stages.{index + FIRST}", f"stage_{index}"
        yield f"{name}.in_conv", f"{path}/in_conv"
        for block in range(depth):
            for theirs, ours in (("in_conv", "conv1"), ("mid_conv", "conv2")):
                yield f"{name}.res_blocks.{block}.{theirs}", f"{path}/block_{block}/{ours}"
        yield f"{name}.res_out_conv", f"{path}/out_conv"


def _blue_first(layout: Layout) -> Layout:
    """The layout of a stem that takes blue, green, red."""
    return Layout(
        lambda xs: [x[:, :, ::-1] for x in layout.to_tree(xs)],
        lambda xs: layout.to_file([x[:, :, ::-1] for x in xs]),
    )


def _parted(layout: Layout, classes: int) -> Layout:
    """A layout, and after it what comes of one convolution apart: classes, sides."""
    return Layout(
        lambda xs: np.split(layout.to_tree(xs)[0], [classes], axis=-1),
        lambda xs: layout.to_file([np.concatenate(xs, axis=-1)]),
    )


def _rules(arguments: Arguments) -> list[Rule]:
    rules: list[Rule] = []
    heads = [(f"head.cls_convs.{i}.0", f"head_{i}/conv") for i in range(len(STRIDES))]
    for name, path in (*_convolutions(arguments), *heads):
        layout = _blue_first(CONV) if path == "stem" else CONV
        rules += one(f"{{p}}{name}.conv.weight", f"{path}/conv/kernel", layout)
        rules += batch_norm(f"{{p}}{name}.bn", f"{path}/bn")
    for index in range(len(STRIDES)):
        rules += affine(f"{{p}}fpn.lateral_convs.{index}.conv", f"lateral_{index}", POINTWISE)
        for kind, leaf, layout in (("weight", "kernel", POINTWISE), ("bias", "bias", COPY)):
            found = tuple(f"head_{index}/{part}_head/{leaf}" for part in ("class", "side"))
            whole = _parted(layout, arguments["num_classes"])
            rules.append(Rule((f"{{p}}head.gfl_cls.{index}.{kind}",), found, whole))
    return rules


def _from_file(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    stem = shapes["backbone.stages.0.conv.weight"]
    outputs, width = shapes["head.gfl_cls.0.weight"][:2]
    bins = metadata.get("config", {}).get("reg_max", BINS - 1) + 1
    pattern = r"backbone\.stages\.(\d+)\.res_blocks\.(\d+)\.in_conv\.conv\.weight"
    return {
        "num_classes": outputs - 4 * bins,
        "stem_width": stem[0],
        "depths": count_blocks(shapes, pattern),
        "width": width,
        "bins": bins,
        "in_channels": stem[1],
    }


def _config(arguments: Arguments) -> dict[str, Any]:
    """What differs of the original's config nanodet-g, by its names."""
    return {
        "num_classes": arguments["num_classes"],
        "depths": list(arguments["depths"]),
        "stem_width": arguments["stem_width"],
        "feat_channels": arguments["width"],
        "reg_max": arguments["bins"] - 1,
    }


def _modules(arguments: Arguments) -> dict[str, str]:
    stages = {f"stage_{i}": f"{{p}}backbone.stages.{i + FIRST}" for i in range(4)}
    return {"stem": "{p}backbone.stages.0", **stages}


# TensorFlow.js ------------------------------------------------------------------------------------

# A window of 1 x 1 in TensorFlow's order, [1, 1, in, out].
FLAT = Layout(lambda xs: [x[0, 0] for x in xs], lambda xs: [x[None, None] for x in xs])


def _in_order(arguments: Arguments) -> list[str]:
    """Paths of the convolutions, "_head" for two in one, as the outputs need them."""
    found = [path for _, path in _convolutions(arguments)]
    for index, stage in enumerate((1, 2, 3)):
        at = found.index(f"stage_{stage}/out_conv")
        found.insert(at + 1, f"lateral_{index}")
    for index in range(len(STRIDES)):
        found += [f"head_{index}/conv", f"head_{index}/_head"]
    return found


def _tfjs_rules(arguments: Arguments) -> list[Rule]:
    """The file's convolutions by number; biases are those of norms that do nothing else."""
    rules: list[Rule] = []
    for index, path in enumerate(_in_order(arguments)):
        name = f"conv_{index:03d}"
        if path.endswith("_head"):
            paths = [path.replace("_head", f"{part}_head") for part in ("class", "side")]
            for kind, leaf, layout in (("weight", "kernel", FLAT), ("bias", "bias", COPY)):
                parted = _parted(layout, arguments["num_classes"])
                found = tuple(f"{path}/{leaf}" for path in paths)
                rules.append(Rule((f"{name}.{kind}",), found, parted))
        elif path.startswith("lateral"):
            rules += affine(name, path, FLAT)
        else:
            layout = _blue_first(COPY) if path == "stem" else COPY
            rules += one(f"{name}.weight", f"{path}/conv/kernel", layout)
            rules += one(f"{name}.bias", f"{path}/bn/bias")
            scale = (1 + EPSILON) ** 0.5
            for leaf, value in (("scale", scale), ("mean", 0), ("var", 1), ("count", 0)):
                rules.append(Rule((f"{name}.{leaf}",), (f"{path}/bn/{leaf}",), default=value))
    return rules


def _from_tfjs(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    del metadata
    *_, channels, stem_width = shapes["conv_000.weight"]
    *_, width, outputs = shapes["conv_033.weight"]
    if outputs <= 4 * BINS:
        raise UserError(f"{outputs} outputs: a NanoDet-g has {4 * BINS}, and one for each class")
    return {
        "num_classes": outputs - 4 * BINS,
        "stem_width": stem_width,
        "depths": (1, 2, 2, 3),
        "width": width,
        "bins": BINS,
        "in_channels": channels,
    }


TABLES = (
    Table(
        SOURCE,
        "nanodet",
        "the original's",
        (
            "{p}backbone.stages.0.conv.weight",
            "{p}backbone.stages.5.res_out_conv.bn.weight",
            "{p}fpn.lateral_convs.2.conv.weight",
            "{p}head.gfl_cls.2.bias",
        ),
        arguments=_from_file,
        rules=_rules,
        dropped=(
            r"{p}head\.gfl_reg\..*",  # of heads whose classes and sides are apart
            r"{p}head\.distribution_project\.project",
        ),
        holds=lambda arguments: arguments["in_channels"] == 3,
        config=_config,
        modules=_modules,
        unseen=("bins",),
    ),
    Table(
        "tfjs",
        "nanodet",
        "a TensorFlow.js graph model, norms folded",
        ("conv_000.weight", "conv_000.bias", "conv_033.weight", "conv_033.bias"),
        arguments=_from_tfjs,
        rules=_tfjs_rules,
        recognizes=lambda shapes: (
            shapes["conv_000.weight"][:3] == (3, 3, 3)
            and shapes["conv_033.weight"][:2] == (1, 1)
            and sum(name.endswith(".weight") for name in shapes) == 34
        ),
        holds=lambda arguments: False,
        unseen=("depths", "bins"),
        class_names=COCO,
    ),
)
ZOO = tuple(
    Entry(f"{SOURCE}/{name}", "NanoDet", name, image_size=128, license="apache-2.0")
    for name in VARIANTS
)
