"""Tables for MobileNetV2, EfficientNet and EfficientNet-Lite.

timm, torchvision's MobileNetV2 and EfficientNet, transformers' MobileNetV2, and the naming of the
packages efficientnet-pytorch and efficientnet-lite-pytorch, in which the real Lite checkpoints are.

Sources: timm 1.0 efficientnet.py and _efficientnet_blocks.py; torchvision 0.29
models/mobilenetv2.py and models/efficientnet.py; transformers 5.23 models/mobilenet_v2;
efficientnet_lite_pytorch 0.1.0.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from vision_jax.convert.engine import CONV, POINTWISE, Rule, affine, batch_norm, one
from vision_jax.convert.fields import Fields
from vision_jax.convert.table import (
    Arguments,
    Entry,
    Metadata,
    Shapes,
    Table,
    count_blocks,
    timm_arguments,
)
from vision_jax.errors import UserError
from vision_jax.models.efficientnet import VARIANTS, EfficientNet, round_channels

_TIMM_SEEN = ("num_features", "stem_size", "stem_kernel_size", "fix_stem")
_TIMM_FIXED = {"output_stride": 32, "global_pool": "avg"}
_KNOWN = r"(tf_)?(mobilenetv2_\w+|efficientnet_(lite\d|b\d))"
_STRUCTURE = (
    "depths",
    "widths",
    "kernels",
    "expansions",
    "strides",
    "stem_width",
    "head_width",
    "se_ratio",
    "activation",
    "same_padding",
    "batch_norm_eps",
)
_DEFAULTS = {
    name: field.default
    for name, field in EfficientNet.__dataclass_fields__.items()
    if name in _STRUCTURE
}
_KNOWN_DEPTHS = {sum(sizes["depths"]): sizes["depths"] for sizes in VARIANTS.values()}
_TV_SIZES = (224, 240, 288, 300, 380, 456, 528, 600)  # pixels of b0 to b7
_TV_WIDTHS = tuple(percent / 100 for percent in range(10, 301, 5))


_FIELDS = Fields(
    types=("mobilenet_v2",),
    used="tf_padding layer_norm_eps",
    seen="num_channels depth_multiplier finegrained_output depth_divisible_by min_depth "
    "expand_ratio",
    free="image_size classifier_dropout_prob initializer_range semantic_loss_ignore_index",
    only={"output_stride": (32,), "hidden_act": ("relu6",), "first_layer_is_expansion": (True,)},
)


def _rules(
    a: Arguments,
    stem: tuple[str, str],
    last: tuple[str, str],
    block_name: Callable[[int, int], str],
    conv: Callable[[str, bool], tuple[str, str]],
    squeeze: tuple[str, str],
    head: str,
) -> list[Rule]:
    """`conv(part, expanded)` names a convolution and its norm within a block."""

    def conv_norm(names: tuple[str, str], path: str) -> tuple[Rule, ...]:
        kernel = one(f"{names[0]}.weight", f"{path}_conv/kernel", CONV)
        return (*kernel, *batch_norm(names[1], f"{path}_bn"))

    rules: list[Rule] = [*conv_norm(stem, "stem")]
    for stage, depth in enumerate(a["depths"]):
        expanded = a["expansions"][stage] != 1
        for block in range(depth):
            name, path = block_name(stage, block), f"stage_{stage}/block_{block}"
            for part in (
                ("expand", "depthwise", "project") if expanded else ("depthwise", "project")
            ):
                first, second = (f"{name}.{n}" if name else n for n in conv(part, expanded))
                rules += conv_norm((first, second), f"{path}/{part}")
            if a["se_ratio"]:
                rules += affine(f"{name}.{squeeze[0]}", f"{path}/se/reduce", POINTWISE)
                rules += affine(f"{name}.{squeeze[1]}", f"{path}/se/expand", POINTWISE)
    return [*rules, *conv_norm(last, "last"), *affine(head, "head")]


def _timm_rules(a: Arguments) -> list[Rule]:
    def conv(part: str, expanded: bool) -> tuple[str, str]:
        if expanded:
            names = {"expand": "conv_pw bn1", "depthwise": "conv_dw bn2", "project": "conv_pwl bn3"}
        else:
            names = {"depthwise": "conv_dw bn1", "project": "conv_pw bn2"}
        first, second = names[part].split()
        return first, second

    return _rules(
        a,
        ("conv_stem", "bn1"),
        ("conv_head", "bn2"),
        lambda stage, block: f"blocks.{stage}.{block}",
        conv,
        ("se.conv_reduce", "se.conv_expand"),
        "classifier",
    )


def _number(a: Arguments, stage: int, block: int) -> int:
    """A block's number when all are counted through."""
    return sum(a["depths"][:stage]) + block


def _torchvision_rules(a: Arguments) -> list[Rule]:
    def conv(part: str, expanded: bool) -> tuple[str, str]:
        index = ("expand", "depthwise", "project").index(part) - (not expanded)
        if part == "project":
            return f"conv.{index}", f"conv.{index + 1}"
        return f"conv.{index}.0", f"conv.{index}.1"

    end = sum(a["depths"]) + 1
    return _rules(
        a,
        ("features.0.0", "features.0.1"),
        (f"features.{end}.0", f"features.{end}.1"),
        lambda stage, block: f"features.{_number(a, stage, block) + 1}",
        conv,
        ("", ""),
        "classifier.1",
    )


def _torchvision_b_rules(a: Arguments) -> list[Rule]:
    """torchvision's EfficientNet, whose blocks stand in stages and whose gate is one of them."""

    def conv(part: str, expanded: bool) -> tuple[str, str]:
        # Within a block: expand, depthwise, the gate, project.
        index = {"expand": 0, "depthwise": 1, "project": 3}[part] - (not expanded)
        return f"block.{index}.0", f"block.{index}.1"

    end = len(a["depths"]) + 1
    rules = _rules(
        a,
        ("features.0.0", "features.0.1"),
        (f"features.{end}.0", f"features.{end}.1"),
        lambda stage, block: f"features.{stage + 1}.{block}",
        conv,
        ("block.GATE.fc1", "block.GATE.fc2"),
        "classifier.1",
    )

    def gate(name: str) -> str:
        stage = name.split(".")[1]
        expanded = ".GATE." in name and a["expansions"][int(stage) - 1] != 1
        return name.replace("GATE", "2" if expanded else "1")

    return [replace(rule, names=tuple(map(gate, rule.names))) for rule in rules]


def _transformers_rules(a: Arguments) -> list[Rule]:
    names = {"expand": "expand_1x1", "depthwise": "conv_3x3", "project": "reduce_1x1"}

    def block_name(stage: int, block: int) -> str:
        number = _number(a, stage, block)  # the first block belongs to the stem
        return "{p}conv_stem" if number == 0 else f"{{p}}layer.{number - 1}"

    def pair(name: str) -> tuple[str, str]:
        return f"{name}.convolution", f"{name}.normalization"

    return _rules(
        a,
        pair("{p}conv_stem.first_conv"),
        pair("{p}conv_1x1"),
        block_name,
        lambda part, expanded: pair(names[part]),
        ("", ""),
        "classifier",
    )


def _package_rules(a: Arguments) -> list[Rule]:
    names = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    return _rules(
        a,
        ("_conv_stem", "_bn0"),
        ("_conv_head", "_bn1"),
        lambda stage, block: f"_blocks.{_number(a, stage, block)}",
        lambda part, expanded: names[part],
        ("_se_reduce", "_se_expand"),
        "_fc",
    )


def _from_stages(
    shapes: Shapes, stages: list[list[dict[str, tuple[int, ...]]]], stem: str, last: str, head: str
) -> dict[str, Any]:
    """From the shapes of each block's parts, stage by stage."""
    if len(stages) != len(EfficientNet.strides):
        raise UserError(
            f"{len(stages)} stages: the strides of other nets than MobileNetV2 and EfficientNet, "
            "which have 7, are not in their weights"
        )
    widths: list[int] = []
    kernels: list[int] = []
    expansions: list[float] = []
    squeezed: list[tuple[int, int]] = []  # (a block's inputs, its squeeze-excitation's width)
    before = shapes[f"{stem}.weight"][0]
    for stage in stages:
        first = stage[0]
        kernels.append(first["depthwise"][2])
        expansions.append(_expansion(before, first["project"][1]) if "expand" in first else 1)
        for block in stage:
            squeezed += [(before, block["squeeze"][0])] if "squeeze" in block else []
            before = block["project"][0]
        widths.append(before)
    ratio = 0.0
    if squeezed:
        inputs, width = squeezed[-1]
        ratio = 0.25 if all(round(i / 4) == w for i, w in squeezed) else width / inputs
    return {
        "num_classes": shapes.get(f"{head}.weight", (0,))[0],
        "in_channels": shapes[f"{stem}.weight"][1],
        "depths": tuple(map(len, stages)),
        "widths": tuple(widths),
        "kernels": tuple(kernels),
        "expansions": tuple(expansions),
        "stem_width": shapes[f"{stem}.weight"][0],
        "head_width": shapes[f"{last}.weight"][0],
        "se_ratio": ratio,
        "activation": "silu" if ratio else "relu6",
    }


def _staged(blocks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Blocks counted through, by stage: those of a known net of as many, else by their widths."""
    depths = _KNOWN_DEPTHS.get(len(blocks), ())
    stages, start = [], 0
    for depth in depths:
        stages.append(blocks[start : start + depth])
        start += depth
    if stages and all(len({block["project"][0] for block in stage}) == 1 for stage in stages):
        return stages
    return [list(stage) for _, stage in groupby(blocks, key=lambda block: block["project"][0])]


def _expansion(inputs: int, mid: int) -> float:
    """The expansion ratio: whole if rounding to channels explains the rest."""
    whole = round(mid / inputs)
    return whole if round_channels(inputs * whole) == mid else mid / inputs


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that a pattern finds in the names."""
    return 1 + max(int(match[1]) for name in shapes if (match := re.fullmatch(pattern, name)))


def _blocks(shapes: Shapes, names: list[tuple[str, dict[str, str]]]) -> list[dict[str, Any]]:
    return [
        {
            part: shapes[f"{block}{name}.weight"]
            for part, name in parts.items()
            if f"{block}{name}.weight" in shapes
        }
        for block, parts in names
    ]


def _from_timm(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    architecture, _ = timm_arguments(metadata, _TIMM_SEEN, _TIMM_FIXED)
    if architecture and not re.fullmatch(_KNOWN, architecture):
        raise UserError(
            f"timm's {architecture} is neither a MobileNetV2 nor an EfficientNet B or Lite: not "
            "supported"
        )
    parts = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
    plain = {"depthwise": "conv_dw", "project": "conv_pw"}
    squeeze = {"squeeze": "se.conv_reduce"}
    depths = count_blocks(shapes, r"blocks\.(\d+)\.(\d+)\.conv_dw\.weight")
    stages = []
    for stage, depth in enumerate(depths):
        names = [f"blocks.{stage}.{block}." for block in range(depth)]
        kinds = [parts if f"{name}conv_pwl.weight" in shapes else plain for name in names]
        of_block = [(name, kind | squeeze) for name, kind in zip(names, kinds, strict=True)]
        stages.append(_blocks(shapes, of_block))
    found = _from_stages(shapes, stages, "conv_stem", "conv_head", "classifier")
    mobile = set(found["kernels"]) == {3}
    if not (architecture or mobile):
        raise UserError(
            "whether an EfficientNet pads as TensorFlow does is not in its weights: put config.json"
            ' with {"architecture": "tf_efficientnet_lite0"}, say, beside model.safetensors'
        )
    tf = architecture.startswith("tf_")
    return found | {"same_padding": tf, "batch_norm_eps": 1e-3 if tf else 1e-5}


def _from_torchvision(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    end = _count(shapes, r"features\.(\d+)\..*weight")
    names = []
    for number in range(1, end - 1):
        expanded = f"features.{number}.conv.1.0.weight" in shapes
        parts = {"expand": "0.0", "depthwise": "1.0", "project": "2"}
        if not expanded:
            parts = {"depthwise": "0.0", "project": "1"}
        names.append((f"features.{number}.conv.", parts))
    last = f"features.{end - 1}.0"
    return _from_stages(
        shapes, _staged(_blocks(shapes, names)), "features.0.0", last, "classifier.1"
    )


def _from_torchvision_b(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    depths = count_blocks(shapes, r"features\.(\d+)\.(\d+)\.block\.0\.0\.weight")
    stages = []
    for stage, depth in enumerate(depths, 1):
        names = []
        for block in range(depth):
            name = f"features.{stage}.{block}.block."
            expanded = f"{name}3.0.weight" in shapes
            parts = {"expand": "0.0", "depthwise": "1.0", "squeeze": "2.fc1", "project": "3.0"}
            if not expanded:
                parts = {"depthwise": "0.0", "squeeze": "1.fc1", "project": "2.0"}
            names.append((name, parts))
        stages.append(_blocks(shapes, names))
    last = f"features.{len(depths) + 1}.0"
    found = _from_stages(shapes, stages, "features.0.0", last, "classifier.1")
    # Its builders of b5, b6 and b7 have another epsilon than those of b0 to b4.
    large = _torchvision_b({**_DEFAULTS, **found, "batch_norm_eps": 1e-3})
    return found | {"batch_norm_eps": 1e-3 if large else 1e-5}


def _torchvision_b(a: Arguments) -> str | None:
    """torchvision's builder of an EfficientNet, or None."""
    structure = {name: a[name] for name in _STRUCTURE}
    for size in range(8):
        eps = 1e-3 if size >= 5 else 1e-5
        known = {**_DEFAULTS, **VARIANTS[f"efficientnet_b{size}"], "batch_norm_eps": eps}
        if structure == known:
            return f"efficientnet_b{size}"
    return None


def _from_transformers(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    if "conv_stem.expand_1x1.convolution.weight" in shapes:
        raise UserError("config.json: first_layer_is_expansion=False is not supported")
    layers = _count(shapes, r"layer\.(\d+)\.conv_3x3\.convolution\.weight")
    parts = {
        "expand": "expand_1x1.convolution",
        "depthwise": "conv_3x3.convolution",
        "project": "reduce_1x1.convolution",
    }
    names = [("conv_stem.", parts), *((f"layer.{i}.", parts) for i in range(layers))]
    stem, last = "conv_stem.first_conv.convolution", "conv_1x1.convolution"
    found = _from_stages(shapes, _staged(_blocks(shapes, names)), stem, last, "classifier")
    return found | {
        "same_padding": bool(config.get("tf_padding", True)),
        "batch_norm_eps": float(config.get("layer_norm_eps", 1e-3)),
    }


def _from_package(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    parts = {
        "expand": "_expand_conv",
        "depthwise": "_depthwise_conv",
        "project": "_project_conv",
        "squeeze": "_se_reduce",
    }
    count = _count(shapes, r"_blocks\.(\d+)\._depthwise_conv\.weight")
    names = [(f"_blocks.{i}.", parts) for i in range(count)]
    found = _from_stages(shapes, _staged(_blocks(shapes, names)), "_conv_stem", "_conv_head", "_fc")
    own: dict[str, Any] = {
        "same_padding": True,
        "batch_norm_eps": 1e-3,
    }  # the weights come from TensorFlow
    if not found["se_ratio"]:  # the Lite nets normalize to [-1, 1]
        own |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return found | own


def _named(a: Arguments) -> str | None:
    """timm's name of the architecture."""
    structure = {name: a[name] for name in _STRUCTURE}
    for name, sizes in VARIANTS.items():
        if {**_DEFAULTS, **sizes} == structure:
            return name
    return None


def _torchvision_config(a: Arguments) -> dict[str, Any]:
    """MobileNetV2 of some width, or nothing."""
    base = VARIANTS["mobilenetv2_100"]
    for width in _TV_WIDTHS:
        scaled = {
            **_DEFAULTS,
            **base,
            "widths": tuple(round_channels(width * w) for w in base["widths"]),
            "stem_width": round_channels(32 * width),
            "head_width": round_channels(1280 * max(1.0, width)),
        }
        if scaled == {name: a[name] for name in _STRUCTURE}:
            return {"model": "mobilenet_v2", "kwargs": {"width_mult": width}}
    return {}


def _transformers_config(a: Arguments) -> dict[str, Any]:
    """transformers' MobileNetV2 of some width, or nothing."""
    base = VARIANTS["mobilenetv2_100"]
    fixed = ("depths", "kernels", "expansions", "strides", "se_ratio", "activation")
    if any(a[name] != {**_DEFAULTS, **base}[name] for name in fixed):
        return {}
    head = "ForImageClassification" if a["num_classes"] else "Model"
    for width in _TV_WIDTHS:
        widths = tuple(round_channels(width * w) for w in base["widths"])
        if widths != a["widths"] or a["stem_width"] != round_channels(32 * width):
            continue
        for fine in (True, False):
            end = round_channels(1280 * width) if not (fine and width < 1) else 1280
            if end == a["head_width"]:
                return {
                    "model_type": "mobilenet_v2",
                    "architectures": [f"MobileNetV2{head}"],
                    "depth_multiplier": width,
                    "finegrained_output": fine,
                    "tf_padding": a["same_padding"],
                    "layer_norm_eps": a["batch_norm_eps"],
                    "hidden_act": "relu6",
                }
    return {}


def _modules(source: str, a: Arguments) -> dict[str, str]:
    ends = [_number(a, stage, depth - 1) for stage, depth in enumerate(a["depths"])]
    if source == "timm":
        stages = {f"stage_{i}": f"blocks.{i}" for i in range(len(ends))}
        return {"stem": "bn1", **stages, "pooled": "global_pool"}
    if source == "torchvision_b":
        stages = {f"stage_{i}": f"features.{i + 1}" for i in range(len(ends))}
        return {"stem": "features.0", **stages, "pooled": "avgpool"}
    if source == "torchvision":
        stages = {f"stage_{i}": f"features.{end + 1}" for i, end in enumerate(ends)}
        return {"stem": "features.0", **stages, "pooled": "classifier.0"}
    stages = {f"stage_{i}": f"{{p}}layer.{end - 1}" for i, end in enumerate(ends) if end}
    stem = {"stem": "{p}conv_stem.first_conv", "stage_0": "{p}conv_stem"}
    return {**stem, **stages, "pooled": "{p}pooler"}


TABLES = (
    Table(
        "timm",
        "efficientnet",
        "timm",
        ("conv_stem.weight", "blocks.0.0.conv_dw.weight", "blocks.1.0.conv_pwl.weight"),
        arguments=_from_timm,
        rules=_timm_rules,
        holds=lambda a: _named(a) is not None,
        config=lambda a: {"architecture": _named(a), "model_args": {}},
        modules=partial(_modules, "timm"),
        file_names=r"(tf_)?(mobilenetv2_\d+d?|efficientnet_(lite|b)\d)",
        unseen=("same_padding", "batch_norm_eps", "activation", "output stride 32"),
    ),
    Table(
        "torchvision",
        "efficientnet",
        "mobilenet_v2",
        ("features.0.0.weight", "features.1.conv.0.0.weight", "features.2.conv.2.weight"),
        arguments=_from_torchvision,
        rules=_torchvision_rules,
        holds=lambda a: _torchvision_config(a) != {},
        config=_torchvision_config,
        modules=partial(_modules, "torchvision"),
    ),
    Table(
        "torchvision",
        "efficientnet",
        "efficientnet",
        ("features.0.0.weight", "features.1.0.block.1.fc1.weight", "features.2.0.block.3.0.weight"),
        arguments=_from_torchvision_b,
        rules=_torchvision_b_rules,
        holds=lambda a: _torchvision_b(a) is not None,
        config=lambda a: {"model": _torchvision_b(a), "kwargs": {}},
        modules=partial(_modules, "torchvision_b"),
        unseen=("batch_norm_eps",),
    ),
    Table(
        "transformers",
        "efficientnet",
        "mobilenet_v2",
        ("{p}conv_stem.first_conv.convolution.weight", "{p}layer.0.conv_3x3.convolution.weight"),
        arguments=_from_transformers,
        rules=_transformers_rules,
        prefixes=("mobilenet_v2.", ""),
        holds=lambda a: _transformers_config(a) != {},
        config=_transformers_config,
        modules=partial(_modules, "transformers"),
        fields=_FIELDS,
        unseen=("same_padding", "batch_norm_eps", "output stride 32"),
    ),
    Table(
        "efficientnet_pytorch",
        "efficientnet",
        "package",
        ("_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_conv_head.weight"),
        arguments=_from_package,
        rules=_package_rules,
    ),
)


def _entries() -> tuple[Entry, ...]:
    sizes = {"lite": (224, 240, 260, 300, 380), "b": (224, 240, 260, 300, 380)}
    lite = [
        Entry(
            f"timm/{p}efficientnet_lite{i}",
            "EfficientNet-Lite",
            f"{p}efficientnet_lite{i}",
            image_size=size,
        )
        for p in ("", "tf_")
        for i, size in enumerate(sizes["lite"])
    ]
    plain = [
        Entry(
            f"timm/{p}efficientnet_b{i}", "EfficientNet", f"{p}efficientnet_b{i}", image_size=size
        )
        for p in ("", "tf_")
        for i, size in enumerate(sizes["b"])
    ]
    mobile = [
        Entry(f"timm/{name}", "MobileNetV2", name) for name in VARIANTS if name.startswith("mobile")
    ]
    hub = [
        Entry(
            f"transformers/mobilenet_v2_{width}_{size}",
            "MobileNetV2",
            "MobileNetV2ForImageClassification",
            (("depth_multiplier", float(width)), ("image_size", size), ("num_labels", 1001)),
            image_size=size,
            published=f"hf://google/mobilenet_v2_{width}_{size}",
            license="other",
        )
        for width, size in (("0.35", 96), ("0.75", 160), ("1.0", 224), ("1.4", 224))
    ]
    torchvision = Entry(
        "torchvision/mobilenet_v2",
        "MobileNetV2",
        "mobilenet_v2",
        published="torchvision://mobilenet_v2",
        license="BSD-3-Clause",
    )
    builders = [
        Entry(
            f"torchvision/efficientnet_b{i}",
            "EfficientNet",
            f"efficientnet_b{i}",
            image_size=size,
            published=f"torchvision://efficientnet_b{i}",
            license="BSD-3-Clause",
        )
        for i, size in enumerate(_TV_SIZES)
    ]
    return (*mobile, torchvision, *builders, *hub, *lite, *plain)


ZOO = _entries()
