"""Tables for YOLOX: the published `.pth` files, {"model": tensors by name, ...}, and ONNX files.

Source: https://github.com/Megvii-BaseDetection/YOLOX, release 0.1.1 and later, and pixeltable-yolox
0.4.3, whose modules have the same names. Older files were of networks with a mean and std.
"""

import re
from itertools import product
from typing import Any

from vision_jax.convert.engine import (
    CONV,
    POINTWISE,
    Layout,
    Rule,
    affine,
    batch_norm,
    one,
)
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.errors import UserError
from vision_jax.models.yolox import EPSILON, VARIANTS

SOURCE = "yolox"
DEEPEST = 9  # csp_depth that is tried for a file without names
_BACKBONE = "backbone.backbone."
# (name in the file, path) of the neck's parts, as they compute; those with "C3" are CSP blocks.
_NECK = (
    ("lateral_conv0", "reduce_2"),
    ("C3_p4", "up_1"),
    ("reduce_conv1", "reduce_1"),
    ("C3_p3", "up_0"),
    ("bu_conv2", "down_1_conv"),
    ("C3_n3", "down_1"),
    ("bu_conv1", "down_2_conv"),
    ("C3_n4", "down_2"),
)
_ACTIVATIONS = {"silu": "silu", "relu": "relu", "lrelu": "leaky_relu"}


def _to_stem(kernel: Any) -> Any:
    """[out, 4·C, 3, 3] over 2 x 2 pixels as channels -> [6, 6, C, out] over pixels, red first.

    The channels are the left column's upper and lower pixel, then the right one's, each blue first.
    """
    out, channels, *_ = kernel.shape
    split = kernel.reshape(out, 2, 2, channels // 4, 3, 3)  # [out, column, row, C, h, w]
    pixels = split.transpose(4, 2, 5, 1, 3, 0)  # [h, row, w, column, C, out]
    return pixels.reshape(6, 6, channels // 4, out)[:, :, ::-1]


def _from_stem(kernel: Any) -> Any:
    *_, channels, out = kernel.shape
    pixels = kernel[:, :, ::-1].reshape(3, 2, 3, 2, channels, out)
    return pixels.transpose(5, 3, 1, 4, 0, 2).reshape(out, 4 * channels, 3, 3)


STEM = Layout(lambda xs: [_to_stem(x) for x in xs], lambda xs: [_from_stem(x) for x in xs])


def _conv_norm(name: str, path: str, layout: Layout = CONV) -> tuple[Rule, ...]:
    kernel = one(f"{{p}}{name}.conv.weight", f"{path}/conv/kernel", layout)
    return (*kernel, *batch_norm(f"{{p}}{name}.bn", f"{path}/bn"))


def _spread(name: str, path: str, depthwise: bool) -> tuple[Rule, ...]:
    if not depthwise:
        return _conv_norm(name, path)
    return (
        *_conv_norm(f"{name}.dconv", f"{path}_depthwise"),
        *_conv_norm(f"{name}.pconv", f"{path}_pointwise"),
    )


def _csp(name: str, path: str, depth: int, depthwise: bool) -> list[Rule]:
    rules = [
        *_conv_norm(f"{name}.conv1", f"{path}/conv1"),
        *_conv_norm(f"{name}.conv2", f"{path}/conv2"),
    ]
    for index in range(depth):
        rules += _conv_norm(f"{name}.m.{index}.conv1", f"{path}/block_{index}_conv1")
        rules += _spread(f"{name}.m.{index}.conv2", f"{path}/block_{index}_conv2", depthwise)
    return [*rules, *_conv_norm(f"{name}.conv3", f"{path}/conv3")]


def _rules(arguments: Arguments) -> list[Rule]:
    """In the order in which the reference computes."""
    depth, depthwise = arguments["csp_depth"], arguments["depthwise"]
    rules = [*_conv_norm(f"{_BACKBONE}stem.conv", "backbone/stem", STEM)]
    for stage, blocks in enumerate((depth, 3 * depth, 3 * depth, depth)):
        name, path = f"{_BACKBONE}dark{stage + 2}", f"backbone/stage_{stage}"
        rules += _spread(f"{name}.0", f"{path}/down", depthwise)
        if last := stage == 3:
            for index in (1, 2):
                rules += _conv_norm(f"{name}.1.conv{index}", f"{path}/pool_conv{index}")
        rules += _csp(f"{name}.{2 if last else 1}", f"{path}/csp", blocks, depthwise)
    for theirs, ours in _NECK:
        name, path = f"backbone.{theirs}", f"neck/{ours}"
        if theirs.startswith("C3"):
            rules += _csp(name, path, depth, depthwise)
        elif ours.endswith("conv"):
            rules += _spread(name, path, depthwise)
        else:
            rules += _conv_norm(name, path)
    for level in range(3):
        path = f"head_{level}"
        rules += _conv_norm(f"head.stems.{level}", f"{path}/stem")
        for theirs, ours in (("cls", "class"), ("reg", "box")):
            for index in (0, 1):
                name = f"head.{theirs}_convs.{level}.{index}"
                rules += _spread(name, f"{path}/{ours}_conv{index + 1}", depthwise)
            rules += affine(f"{{p}}head.{theirs}_preds.{level}", f"{path}/{ours}_head", POINTWISE)
        rules += affine(f"{{p}}head.obj_preds.{level}", f"{path}/object_head", POINTWISE)
    return rules


def _from_file(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    stem = shapes[f"{_BACKBONE}stem.conv.conv.weight"]
    block = rf"{re.escape(_BACKBONE)}dark2\.1\.m\.\d+\.conv1\.conv\.weight"
    act = metadata.get("config", {}).get("act", "silu")
    if act not in _ACTIVATIONS:
        raise UserError(f"config.json: act {act!r} is none of {', '.join(_ACTIVATIONS)}")
    return {
        "num_classes": shapes["head.cls_preds.0.weight"][0],
        "csp_depth": sum(re.fullmatch(block, name) is not None for name in shapes),
        "width": stem[0],
        "depthwise": f"{_BACKBONE}dark2.0.dconv.conv.weight" in shapes,
        "activation": _ACTIVATIONS[act],
        "in_channels": stem[1] // 4,
    }


def _config(arguments: Arguments) -> dict[str, Any]:
    """Arguments of pixeltable-yolox's YoloxConfig that build this very model."""
    act = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[arguments["activation"]]
    return {
        "depth": arguments["csp_depth"] / 3,
        "width": arguments["width"] / 64,
        "depthwise": arguments["depthwise"],
        "act": act,
    }


def _modules(arguments: Arguments) -> dict[str, str]:
    stages = {f"stage_{index}": f"{{p}}{_BACKBONE}dark{index + 2}" for index in range(4)}
    levels = ("C3_p3", "C3_n3", "C3_n4")
    return {
        "stem": f"{{p}}{_BACKBONE}stem",
        **stages,
        **{f"level_{index}": f"{{p}}backbone.{name}" for index, name in enumerate(levels)},
    }


def _onnx_convolutions(arguments: Arguments) -> list[tuple[str, Layout]]:
    """(path before /kernel, layout) of each convolution, as they are computed."""
    kernels = [rule for rule in _rules(arguments) if rule.paths[0].endswith("/kernel")]
    return [(rule.paths[0].removesuffix("/kernel"), rule.layout) for rule in kernels]


def _onnx_rules(arguments: Arguments) -> list[Rule]:
    """The file's convolutions by number, whose biases are those of norms that do nothing else."""
    rules: list[Rule] = []
    for index, (path, layout) in enumerate(_onnx_convolutions(arguments)):
        name = f"conv_{index:03d}"
        rules += one(f"{name}.weight", f"{path}/kernel", layout)
        if path.endswith("_head"):
            rules += one(f"{name}.bias", f"{path}/bias")
            continue
        norm = f"{path.removesuffix('/conv')}/bn"
        rules += one(f"{name}.bias", f"{norm}/bias")
        for leaf, value in (("scale", (1 + EPSILON) ** 0.5), ("mean", 0), ("var", 1), ("count", 0)):
            rules.append(Rule((f"{name}.{leaf}",), (f"{norm}/{leaf}",), default=value))
    return rules


def _from_onnx(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """By the number of convolutions, and of what sizes."""
    kernels = sum(name.endswith(".weight") for name in shapes)
    stem, following = (shapes[f"conv_00{index}.weight"] for index in (0, 1))
    arguments = {"width": stem[0], "in_channels": stem[1] // 4, "activation": "silu"}
    for depthwise, csp_depth in product((False, True), range(1, DEEPEST)):
        found = {**arguments, "csp_depth": csp_depth, "depthwise": depthwise}
        order = _onnx_convolutions(found)
        paths = [path for path, _ in order]
        if len(order) == kernels and depthwise == (following[1] == 1):
            classes = paths.index("head_0/class_head")
            return {**found, "num_classes": shapes[f"conv_{classes:03d}.weight"][0]}
    raise UserError(f"{kernels} convolutions: no YOLOX has so many")


TABLES = (
    Table(
        SOURCE,
        "yolox",
        "published",
        (
            f"{{p}}{_BACKBONE}stem.conv.conv.weight",
            f"{{p}}{_BACKBONE}dark5.2.conv3.bn.weight",
            "{p}backbone.C3_n4.conv3.conv.weight",
            "{p}head.obj_preds.2.bias",
        ),
        arguments=_from_file,
        rules=_rules,
        holds=lambda arguments: arguments["in_channels"] == 3,
        config=_config,
        modules=_modules,
        unseen=("activation",),
    ),
    Table(
        "onnx",
        "yolox",
        "an ONNX file, norms folded",
        ("conv_000.weight", "conv_000.bias", "conv_058.bias"),
        arguments=_from_onnx,
        rules=_onnx_rules,
        recognizes=lambda shapes: shapes["conv_000.weight"][1:] == (12, 3, 3),
        holds=lambda arguments: False,
        unseen=("activation",),
    ),
)
ZOO = tuple(
    Entry(
        f"{SOURCE}/{name}",
        "YOLOX",
        name,
        image_size=128,
        license="apache-2.0",
    )
    for name in VARIANTS
)
