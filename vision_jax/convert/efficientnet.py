"""Tables for MobileNetV2 and V3, EfficientNet and EfficientNet-Lite.

timm, torchvision's MobileNets and EfficientNet, transformers' MobileNetV2, and the naming of the
packages efficientnet-pytorch and efficientnet-lite-pytorch, in which the real Lite checkpoints are.

Sources: timm 1.0 efficientnet.py, mobilenetv3.py and _efficientnet_blocks.py; torchvision 0.29
models/mobilenetv2.py, mobilenetv3.py and efficientnet.py; transformers 5.23 models/mobilenet_v2;
efficientnet_lite_pytorch 0.1.0.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import groupby, product
from typing import Any

from vision_jax.convert.engine import CONV, LINEAR, POINTWISE, Rule, affine, batch_norm, one
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
from vision_jax.models.efficientnet import TORCHVISION, VARIANTS, EfficientNet, each, round_channels

_TIMM_SEEN = ("num_features", "stem_size", "stem_kernel_size", "fix_stem")
_TIMM_FIXED = {"output_stride": 32, "global_pool": "avg"}
_KNOWN = r"(tf_)?(mobilenetv2_\w+|mobilenetv3_(large|small)_\d+d?|efficientnet_(lite\d|b\d))"
_STRUCTURE = (
    "depths",
    "widths",
    "kernels",
    "expansions",
    "strides",
    "stem_width",
    "head_width",
    "head_hidden",
    "se_ratio",
    "hard_gate",
    "activation",
    "relu_stages",
    "same_padding",
    "batch_norm_eps",
    "batch_norm_momentum",
)
_DEFAULTS = {
    name: field.default
    for name, field in EfficientNet.__dataclass_fields__.items()
    if name in _STRUCTURE
}
_KNOWN_DEPTHS = {sum(sizes["depths"]): sizes["depths"] for sizes in VARIANTS.values()}
_OF_V3 = {  # by the number of stages
    len(VARIANTS[name]["depths"]): VARIANTS[name]
    for name in ("mobilenetv3_large_100", "mobilenetv3_small_100")
}
_LARGE = ("efficientnet_b5", "efficientnet_b6", "efficientnet_b7")  # norms as TORCHVISION has them
_TORCHVISION = (
    *("mobilenet_v3_large", "mobilenet_v3_small"),
    *(f"efficientnet_b{size}" for size in range(8)),
)
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


# The names of a block's parts, each a pair: of a convolution and its norm, and of the gate's two.
Parts = dict[str, tuple[str, str]]
Block = dict[str, tuple[int, ...]]  # shapes of the kernels of a block's parts, of the gate's first


def _rules(
    a: Arguments,
    stem: tuple[str, str],
    last: tuple[str, str],
    block_name: Callable[[int, int], str],
    parts: Callable[[bool, bool], Parts],
    head: str,
    hidden: str = "",
) -> list[Rule]:
    """`parts(expanded, gated)` names what is in a block; `hidden` is the layer before the head."""

    def conv_norm(names: tuple[str, str], path: str) -> tuple[Rule, ...]:
        kernel = one(f"{names[0]}.weight", f"{path}_conv/kernel", CONV)
        return (*kernel, *batch_norm(names[1], f"{path}_bn"))

    rules: list[Rule] = [*conv_norm(stem, "stem")]
    gates = each(a["se_ratio"], len(a["depths"]))
    for stage, depth in enumerate(a["depths"]):
        gated = gates[stage] != 0
        for block, expansion in enumerate(each(a["expansions"][stage], depth)):
            expanded = expansion != 1
            name, path = block_name(stage, block), f"stage_{stage}/block_{block}"
            named = {
                part: (f"{name}.{first}", f"{name}.{second}")
                for part, (first, second) in parts(expanded, gated).items()
            }
            for part in ("expand", "depthwise", "project"):
                if part != "expand" or expanded:
                    rules += conv_norm(named[part], f"{path}/{part}")
            if gated:
                reduce, expand = named["gate"]
                rules += affine(reduce, f"{path}/se/reduce", POINTWISE)
                rules += affine(expand, f"{path}/se/expand", POINTWISE)
    rules += conv_norm(last, "last")
    if hidden:
        rules += affine(hidden, "pre_logits", POINTWISE if hidden == "conv_head" else LINEAR)
    return [*rules, *affine(head, "head")]


def _timm_parts(expanded: bool, gated: bool) -> Parts:
    gate = {"gate": ("se.conv_reduce", "se.conv_expand")}
    if not expanded:
        return {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2"), **gate}
    return {
        "expand": ("conv_pw", "bn1"),
        "depthwise": ("conv_dw", "bn2"),
        "project": ("conv_pwl", "bn3"),
        **gate,
    }


def _timm_rules(a: Arguments) -> list[Rule]:
    v3 = a["hard_gate"]
    end = f"blocks.{len(a['depths'])}.0"  # MobileNetV3's last convolution is a stage of its own
    return _rules(
        a,
        ("conv_stem", "bn1"),
        (f"{end}.conv", f"{end}.bn1") if v3 else ("conv_head", "bn2"),
        lambda stage, block: f"blocks.{stage}.{block}",
        _timm_parts,
        "classifier",
        "conv_head" if v3 else "",
    )


def _number(a: Arguments, stage: int, block: int) -> int:
    """A block's number when all are counted through."""
    return sum(a["depths"][:stage]) + block


def _torchvision_v2_parts(expanded: bool, gated: bool) -> Parts:
    index = int(expanded)
    return {
        "expand": ("conv.0.0", "conv.0.1"),
        "depthwise": (f"conv.{index}.0", f"conv.{index}.1"),
        "project": (f"conv.{index + 1}", f"conv.{index + 2}"),
    }


def _torchvision_parts(expanded: bool, gated: bool) -> Parts:
    """In a MobileNetV3 and an EfficientNet, whose parts are counted through."""
    kinds = {"expand": expanded, "depthwise": True, "gate": gated, "project": True}
    parts = {}
    for index, kind in enumerate(kind for kind, there in kinds.items() if there):
        first, second = ("fc1", "fc2") if kind == "gate" else ("0", "1")
        parts[kind] = (f"block.{index}.{first}", f"block.{index}.{second}")
    return parts


def _torchvision_rules(kind: str, a: Arguments) -> list[Rule]:
    """Blocks are counted through, but in EfficientNet by stages."""

    def block_name(stage: int, block: int) -> str:
        if kind == "efficientnet":
            return f"features.{stage + 1}.{block}"
        return f"features.{_number(a, stage, block) + 1}"

    end = 1 + (len(a["depths"]) if kind == "efficientnet" else sum(a["depths"]))
    v3 = kind == "mobilenet_v3"
    return _rules(
        a,
        ("features.0.0", "features.0.1"),
        (f"features.{end}.0", f"features.{end}.1"),
        block_name,
        _torchvision_v2_parts if kind == "mobilenet_v2" else _torchvision_parts,
        "classifier.3" if v3 else "classifier.1",
        "classifier.0" if v3 else "",
    )


def _transformers_parts(expanded: bool, gated: bool) -> Parts:
    names = {"expand": "expand_1x1", "depthwise": "conv_3x3", "project": "reduce_1x1"}
    parts = {part: (f"{name}.convolution", f"{name}.normalization") for part, name in names.items()}
    return parts


def _transformers_rules(a: Arguments) -> list[Rule]:
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
        _transformers_parts,
        "classifier",
    )


def _package_parts(expanded: bool, gated: bool) -> Parts:
    return {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "gate": ("_se_reduce", "_se_expand"),
        "project": ("_project_conv", "_bn2"),
    }


def _package_rules(a: Arguments) -> list[Rule]:
    return _rules(
        a,
        ("_conv_stem", "_bn0"),
        ("_conv_head", "_bn1"),
        lambda stage, block: f"_blocks.{_number(a, stage, block)}",
        _package_parts,
        "_fc",
    )


def _from_stages(
    shapes: Shapes, stages: list[list[Block]], stem: str, last: str, head: str, hidden: str = ""
) -> dict[str, Any]:
    """Arguments that the kernels' shapes show; `hidden` is a MobileNetV3's layer before the head.

    Raises:
      UserError: of so many stages none is known, and their strides are in no tensor.
    """
    v3 = bool(hidden)
    known = _OF_V3.get(len(stages)) if v3 else {"strides": EfficientNet.strides}
    if known is None or len(stages) != len(known["strides"]):
        raise UserError(
            f"{len(stages)} stages: the strides of other nets than MobileNetV2 and EfficientNet, "
            "which have 7, and MobileNetV3, which has 5 or 6, are not in their weights"
        )
    expansions: list[Any] = []
    gates: list[list[tuple[int, int]]] = []  # of each stage (width before, width of the gate)
    before = shapes[f"{stem}.weight"][0]
    for stage in stages:
        ratios: list[float] = []
        gates.append([])
        for block in stage:
            mid = block["project"][1]
            ratios.append(_expansion(before, mid) if "expand" in block else 1)
            if "gate" in block:
                gates[-1].append((mid if v3 else before, block["gate"][0]))
            before = block["project"][0]
        expansions.append(_once(ratios))
    rounded = round_channels if v3 else round
    quarter = all(rounded(width / 4) == own for stage in gates for width, own in stage)
    last_of = [stage[-1] if stage else (1, 0) for stage in gates]
    ratio = _once([0.25 if quarter and own else own / width for width, own in last_of])
    activation = "hard_swish" if v3 else "silu" if ratio else "relu6"
    return {
        "num_classes": shapes.get(f"{head}.weight", (0,))[0],
        "in_channels": shapes[f"{stem}.weight"][1],
        "depths": tuple(map(len, stages)),
        "widths": tuple(stage[-1]["project"][0] for stage in stages),
        "kernels": tuple(stage[0]["depthwise"][2] for stage in stages),
        "expansions": tuple(expansions),
        "strides": known["strides"],
        "stem_width": shapes[f"{stem}.weight"][0],
        "head_width": shapes[f"{last}.weight"][0],
        "head_hidden": shapes.get(f"{hidden}.weight", (0,))[0],
        "se_ratio": ratio,
        "hard_gate": v3,
        "activation": activation,
        "relu_stages": known.get("relu_stages", 0),
        "batch_norm_momentum": EfficientNet.batch_norm_momentum,
    }


def _once(values: list[Any]) -> Any:
    """The one value that all have, else all of them."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _staged(blocks: list[Block]) -> list[list[Block]]:
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


def _block(shapes: Shapes, name: str, parts: Callable[[bool, bool], Parts]) -> Block:
    """What is in a block, as a table's `parts` names it."""
    for expanded, gated in product((True, False), repeat=2):
        there = {"expand": expanded, "depthwise": True, "gate": gated, "project": True}
        named = parts(expanded, gated)
        if gated and "gate" not in named:
            continue
        tensors = {kind: f"{name}.{named[kind][0]}.weight" for kind in there if there[kind]}
        if all(tensor in shapes for tensor in tensors.values()):
            return {kind: shapes[tensor] for kind, tensor in tensors.items()}
    raise LookupError(f"{name} is no block")


def _from_timm(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    architecture, _ = timm_arguments(metadata, _TIMM_SEEN, _TIMM_FIXED)
    if architecture and not re.fullmatch(_KNOWN, architecture):
        raise UserError(
            f"timm's {architecture} is neither a MobileNetV2 or V3 nor an EfficientNet B or Lite: "
            "not supported"
        )
    depths = count_blocks(shapes, r"blocks\.(\d+)\.(\d+)\.conv_dw\.weight")
    stages = [
        [_block(shapes, f"blocks.{stage}.{block}", _timm_parts) for block in range(depth)]
        for stage, depth in enumerate(depths)
    ]
    if v3 := "conv_head.bias" in shapes:
        last = f"blocks.{len(depths)}.0.conv"
        found = _from_stages(shapes, stages, "conv_stem", last, "classifier", "conv_head")
    else:
        found = _from_stages(shapes, stages, "conv_stem", "conv_head", "classifier")
    mobile = set(found["kernels"]) == {3} and not v3
    if not (architecture or mobile):
        kind = "a MobileNetV3" if v3 else "an EfficientNet"
        example = "mobilenetv3_large_100" if v3 else "tf_efficientnet_lite0"
        raise UserError(
            f"whether {kind} pads as TensorFlow does is not in its weights: put config.json with "
            f'{{"architecture": "{example}"}}, say, beside model.safetensors'
        )
    tf = architecture.startswith("tf_")
    return found | {"same_padding": tf, "batch_norm_eps": 1e-3 if tf else 1e-5}


def _counted(shapes: Shapes, parts: Callable[[bool, bool], Parts]) -> tuple[Any, str]:
    """(stages, the last convolution) of a torchvision model that counts its blocks through."""
    end = _count(shapes, r"features\.(\d+)\..*weight") - 1
    blocks = [_block(shapes, f"features.{number}", parts) for number in range(1, end)]
    return _staged(blocks), f"features.{end}.0"


def _from_torchvision_v2(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    stages, last = _counted(shapes, _torchvision_v2_parts)
    return _from_stages(shapes, stages, "features.0.0", last, "classifier.1")


def _from_torchvision_v3(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    stages, last = _counted(shapes, _torchvision_parts)
    ends = (last, "classifier.3", "classifier.0")
    return _from_stages(shapes, stages, "features.0.0", *ends) | TORCHVISION


def _from_torchvision_b(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    depths = count_blocks(shapes, r"features\.(\d+)\.(\d+)\.block\.0\.0\.weight")
    stages = [
        [_block(shapes, f"features.{stage}.{i}", _torchvision_parts) for i in range(depth)]
        for stage, depth in enumerate(depths, 1)
    ]
    last = f"features.{len(depths) + 1}.0"
    found = _from_stages(shapes, stages, "features.0.0", last, "classifier.1")
    # Its builders of b5, b6 and b7 have other norms than those of b0 to b4.
    large = _torchvision_named({**_DEFAULTS, **found, **TORCHVISION})
    return found | (TORCHVISION if large else {"batch_norm_eps": 1e-5})


def _torchvision_named(a: Arguments) -> str:
    """torchvision's builder of a MobileNetV3 or an EfficientNet; "" for none."""
    structure = {name: a[name] for name in _STRUCTURE}
    for name in _TORCHVISION:
        own = TORCHVISION if name in _LARGE else {}
        if structure == {**_DEFAULTS, **VARIANTS[name], **own}:
            return name
    return ""


def _from_transformers(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    if "conv_stem.expand_1x1.convolution.weight" in shapes:
        raise UserError("config.json: first_layer_is_expansion=False is not supported")
    layers = _count(shapes, r"layer\.(\d+)\.conv_3x3\.convolution\.weight")
    names = ("conv_stem", *(f"layer.{i}" for i in range(layers)))
    blocks = [_block(shapes, name, _transformers_parts) for name in names]
    stem, last = "conv_stem.first_conv.convolution", "conv_1x1.convolution"
    found = _from_stages(shapes, _staged(blocks), stem, last, "classifier")
    return found | {
        "same_padding": bool(config.get("tf_padding", True)),
        "batch_norm_eps": float(config.get("layer_norm_eps", 1e-3)),
    }


def _from_package(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    count = _count(shapes, r"_blocks\.(\d+)\._depthwise_conv\.weight")
    blocks = [_block(shapes, f"_blocks.{i}", _package_parts) for i in range(count)]
    found = _from_stages(shapes, _staged(blocks), "_conv_stem", "_conv_head", "_fc")
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
        if re.fullmatch(_KNOWN, name) and {**_DEFAULTS, **sizes} == structure:
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
    count, v3 = len(ends), a["hard_gate"]
    if source == "timm":
        stages = {f"stage_{i}": f"blocks.{i}" for i in range(count)}
        first = {f"{stage}/block_0": f"{name}.0" for stage, name in stages.items()}
        last = {"last": f"blocks.{count}", "pooled": "flatten"} if v3 else {"last": "bn2"}
        return {"stem": "bn1", **first, **stages, "pooled": "global_pool", **last}
    if source == "efficientnet":
        stages = {f"stage_{i}": f"features.{i + 1}" for i in range(count)}
        first = {f"{stage}/block_0": f"{name}.0" for stage, name in stages.items()}
        last = {"last": f"features.{count + 1}"}
        return {"stem": "features.0", **first, **stages, **last, "pooled": "avgpool"}
    if source in ("mobilenet_v2", "mobilenet_v3"):
        stages = {f"stage_{i}": f"features.{end + 1}" for i, end in enumerate(ends)}
        first = {f"stage_{i}/block_0": f"features.{_number(a, i, 0) + 1}" for i in range(count)}
        pooled = {"pooled": "classifier.1" if v3 else "classifier.0"}
        last = {"last": f"features.{ends[-1] + 2}"}
        return {"stem": "features.0", **first, **stages, **last, **pooled}
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
        file_names=r"(tf_)?(mobilenetv2_\d+d?|mobilenetv3_(large|small)_\d+d?|"
        r"efficientnet_(lite|b)\d)",
        unseen=("same_padding", "batch_norm_eps", "activation", "output stride 32"),
    ),
    Table(
        "torchvision",
        "efficientnet",
        "mobilenet_v2",
        ("features.0.0.weight", "features.1.conv.0.0.weight", "features.2.conv.2.weight"),
        arguments=_from_torchvision_v2,
        rules=partial(_torchvision_rules, "mobilenet_v2"),
        holds=lambda a: _torchvision_config(a) != {},
        config=_torchvision_config,
        modules=partial(_modules, "mobilenet_v2"),
    ),
    Table(
        "torchvision",
        "efficientnet",
        "mobilenet_v3",
        ("features.0.0.weight", "features.1.block.0.0.weight", "classifier.3.weight"),
        arguments=_from_torchvision_v3,
        rules=partial(_torchvision_rules, "mobilenet_v3"),
        holds=lambda a: _torchvision_named(a).startswith("mobilenet"),
        config=lambda a: {"model": _torchvision_named(a), "kwargs": {}},
        modules=partial(_modules, "mobilenet_v3"),
        unseen=("batch_norm_eps", "batch_norm_momentum", "activation"),
    ),
    Table(
        "torchvision",
        "efficientnet",
        "efficientnet",
        ("features.0.0.weight", "features.1.0.block.1.fc1.weight", "features.2.0.block.3.0.weight"),
        arguments=_from_torchvision_b,
        rules=partial(_torchvision_rules, "efficientnet"),
        holds=lambda a: _torchvision_named(a).startswith("efficientnet"),
        config=lambda a: {"model": _torchvision_named(a), "kwargs": {}},
        modules=partial(_modules, "efficientnet"),
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
        Entry(f"timm/{name}", f"MobileNetV{name.partition('mobilenetv')[2][0]}", name)
        for name in VARIANTS
        if re.match(r"(tf_)?mobilenetv", name)
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
    torchvision = [
        Entry(
            f"torchvision/{name}",
            f"MobileNetV{name[11]}",
            name,
            published=f"torchvision://{name}",
            license="BSD-3-Clause",
        )
        for name in ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
    ]
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
    return (*mobile, *torchvision, *builders, *hub, *lite, *plain)


ZOO = _entries()
