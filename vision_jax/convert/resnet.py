"""Tables for ResNets: timm, torchvision (which names alike), and transformers' files.

Sources: timm 1.0 resnet.py; torchvision 0.29 models/resnet.py; transformers 5.23
models/resnet/modeling_resnet.py.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from vision_jax.convert.engine import CONV, Rule, affine, batch_norm, one
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
from vision_jax.models.resnet import BASIC, BOTTLENECK, VARIANTS, ResNet

# Relatives of timm's whose tensors may be a plain ResNet's while they compute otherwise.
_TIMM_OTHER = r"aa|blur|^se|eca|rs\d|^gc|^sk|^lamb|clip|cotn|ibn|_gn|evos|frn|tresnet|resnest"
_TIMM_SEEN = (  # in the tensors' shapes and names
    *("layers", "channels", "cardinality", "base_width", "stem_width", "stem_type", "avg_down"),
    *("block_reduce_first", "down_kernel_size", "replace_stem_pool"),
)
_TIMM_FIXED = {"output_stride": 32, "global_pool": "avg", "act_layer": "relu"}
_TORCHVISION = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "resnext50_32x4d": "resnext50_32x4d",
    "resnext101_32x8d": "resnext101_32x8d",
    "resnext101_64x4d": "resnext101_64x4d",
    "wide_resnet50_2": "wide_resnet50_2",
    "wide_resnet101_2": "wide_resnet101_2",
}
_STRUCTURE = (
    "depths",
    "block",
    "widths",
    "groups",
    "base_width",
    "stem_width",
    "stem_size",
    "stem_widths",
    "pooled_shortcut",
    "stride_first",
    "first_stride",
    "stem_pool",
)
_DEFAULTS = {name: getattr(ResNet, name) for name in _STRUCTURE if name != "depths"}


FIELDS = Fields(
    types=("resnet",),
    used="downsample_in_bottleneck downsample_in_first_stage",
    seen="num_channels embedding_size hidden_sizes depths layer_type",
    free="out_features out_indices stage_names",
    only={"hidden_act": ("relu",)},
)


def _convolutions(arguments: Arguments) -> range:
    return range(1, 3 if arguments["block"] == BASIC else 4)


def _projects(arguments: Arguments, stage: int) -> bool:
    """Whether the first block of a stage has a convolution in its shortcut."""
    expansion = 1 if arguments["block"] == BASIC else 4
    widths = arguments["widths"]
    before = arguments["stem_width"] if stage == 0 else expansion * widths[stage - 1]
    strides = 2 if stage else arguments["first_stride"]
    return strides > 1 or before != expansion * widths[stage]


def _timm_rules(arguments: Arguments) -> list[Rule]:
    rules: list[Rule] = []
    deep = arguments["stem_widths"]
    for index in range(len(deep)):
        rules += one(f"conv1.{3 * index}.weight", f"conv1_{index}/kernel", CONV)
        rules += batch_norm(f"conv1.{3 * index + 1}", f"bn1_{index}")
    stem = (f"conv1.{3 * len(deep)}", f"conv1_{len(deep)}") if deep else ("conv1", "conv1")
    rules += one(f"{stem[0]}.weight", f"{stem[1]}/kernel", CONV)
    rules += batch_norm("bn1", "bn1")
    shortcut = 1 if arguments["pooled_shortcut"] else 0
    for stage, depth in enumerate(arguments["depths"]):
        for block in range(depth):
            name, path = f"layer{stage + 1}.{block}", f"stage_{stage}/block_{block}"
            for index in _convolutions(arguments):
                rules += one(f"{name}.conv{index}.weight", f"{path}/conv{index}/kernel", CONV)
                rules += batch_norm(f"{name}.bn{index}", f"{path}/bn{index}")
            if block == 0 and _projects(arguments, stage):
                names = [f"{name}.downsample.{shortcut + i}" for i in (0, 1)]
                rules += one(f"{names[0]}.weight", f"{path}/downsample_conv/kernel", CONV)
                rules += batch_norm(names[1], f"{path}/downsample_bn")
    return [*rules, *affine("fc", "head")]


def _transformers_rules(arguments: Arguments) -> list[Rule]:
    def conv_norm(name: str, conv: str, norm: str) -> tuple[Rule, ...]:
        return (
            *one(f"{{p}}{name}.convolution.weight", f"{conv}/kernel", CONV),
            *batch_norm(f"{{p}}{name}.normalization", norm),
        )

    rules: list[Rule] = [*conv_norm("embedder.embedder", "conv1", "bn1")]
    for stage, depth in enumerate(arguments["depths"]):
        for block in range(depth):
            name, path = f"encoder.stages.{stage}.layers.{block}", f"stage_{stage}/block_{block}"
            for index in _convolutions(arguments):
                layer = f"{name}.layer.{index - 1}"
                rules += conv_norm(layer, f"{path}/conv{index}", f"{path}/bn{index}")
            if block == 0 and _projects(arguments, stage):
                rules += conv_norm(
                    f"{name}.shortcut", f"{path}/downsample_conv", f"{path}/downsample_bn"
                )
    return [*rules, *affine("classifier.1", "head")]


def _from_timm(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    architecture, _ = timm_arguments(metadata, _TIMM_SEEN, _TIMM_FIXED)
    if re.search(_TIMM_OTHER, architecture):
        raise UserError(f"timm's {architecture} computes otherwise than a ResNet: not supported")
    depths = count_blocks(shapes, r"layer(\d)\.(\d+)\.conv1\.weight")
    bottleneck = "layer1.0.conv3.weight" in shapes
    last = "conv3" if bottleneck else "conv2"
    outputs = [shapes[f"layer{stage + 1}.0.{last}.weight"][0] for stage in range(len(depths))]
    deep = [index for index in range(0, 9, 3) if f"conv1.{index}.weight" in shapes]
    stem = [shapes[f"conv1.{index}.weight"] for index in deep] or [shapes["conv1.weight"]]
    mid, per_group = shapes["layer1.0.conv2.weight"][:2]
    groups = mid // per_group if bottleneck else 1
    widths = tuple(width // 4 for width in outputs) if bottleneck else tuple(outputs)
    pooled = [len(shape) for name, shape in shapes.items() if name.endswith("downsample.1.weight")]
    return {
        "num_classes": shapes["fc.weight"][0] if "fc.weight" in shapes else 0,
        "in_channels": stem[0][1],
        "depths": depths,
        "block": BOTTLENECK if bottleneck else BASIC,
        "widths": widths,
        "groups": groups,
        "base_width": mid // groups * 64 // widths[0] if bottleneck else 64,
        "stem_width": stem[-1][0],
        "stem_widths": tuple(shape[0] for shape in stem[:-1]),
        "pooled_shortcut": 4 in pooled,
    }


def _from_transformers(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    block = r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.0\.convolution\.weight"
    depths = count_blocks(shapes, block)
    first = "encoder.stages.{}.layers.0.layer.{}.convolution.weight"
    bottleneck = first.format(0, 2) in shapes
    outputs = [shapes[first.format(s, 2 if bottleneck else 1)][0] for s in range(len(depths))]
    stem = shapes["embedder.embedder.convolution.weight"]
    return {
        "num_classes": shapes["classifier.1.weight"][0] if "classifier.1.weight" in shapes else 0,
        "in_channels": stem[1],
        "depths": depths,
        "block": BOTTLENECK if bottleneck else BASIC,
        "widths": tuple(width // 4 for width in outputs) if bottleneck else tuple(outputs),
        "stem_width": stem[0],
        "stride_first": bool(config.get("downsample_in_bottleneck", False)),
        "first_stride": 2 if config.get("downsample_in_first_stage", False) else 1,
    }


def _structure(arguments: Arguments) -> dict[str, Any]:
    return {name: arguments[name] for name in _STRUCTURE}


def _named(arguments: Arguments, names: Mapping[str, str]) -> str | None:
    """The first of these names whose architecture this is."""
    structure = _structure(arguments)
    matches = (ours for ours in names if {**_DEFAULTS, **VARIANTS[ours]} == structure)
    return next((names[ours] for ours in matches), None)


def _stem_type(arguments: Arguments) -> str | None:
    """timm's name for the stem, or None if it has none."""
    width = arguments["stem_width"] // 2
    stems = {(): "", (width, width): "deep", (3 * (width // 4), width): "deep_tiered"}
    found = stems.get(tuple(arguments["stem_widths"]))
    return None if found == "" and arguments["stem_width"] != 64 else found


def _holds(source: str, arguments: Arguments) -> bool:
    a = arguments
    if not a["stem_pool"] or a["stem_size"] != 7 or a["dilation"]:
        return False
    if a["batch_norm_eps"] != ResNet.batch_norm_eps:
        return False
    if source == "transformers":
        plain = not a["stem_widths"] and not a["pooled_shortcut"]
        return plain and a["groups"] == 1 and a["base_width"] == 64
    if a["stride_first"] or a["first_stride"] != 1:
        return False
    if source == "timm":
        return len(a["depths"]) == 4 and _stem_type(a) is not None
    return _torchvision_config(a) != {}


def _timm_config(arguments: Arguments) -> dict[str, Any]:
    if name := _named(arguments, {name: name for name in VARIANTS}):
        return {"architecture": name, "model_args": {}}
    a = arguments
    given = {
        "layers": list(a["depths"]),
        "channels": list(a["widths"]),
        "cardinality": a["groups"],
        "base_width": a["base_width"],
        "stem_type": _stem_type(a),
        "stem_width": a["stem_width"] // 2 if a["stem_widths"] else 64,
        "avg_down": a["pooled_shortcut"],
    }
    architecture = "resnet18" if a["block"] == BASIC else "resnet50"
    return {"architecture": architecture, "model_args": given}


def _torchvision_config(arguments: Arguments) -> dict[str, Any]:
    if name := _named(arguments, _TORCHVISION):
        return {"model": name, "kwargs": {}}
    plain = {**arguments, "groups": 1, "base_width": 64}
    if arguments["block"] == BASIC or not (name := _named(plain, _TORCHVISION)):
        return {}  # its builders have these depths and widths only
    given = {"groups": arguments["groups"], "width_per_group": arguments["base_width"]}
    return {"model": name, "kwargs": given}


def _transformers_config(arguments: Arguments) -> dict[str, Any]:
    expansion = 1 if arguments["block"] == BASIC else 4
    head = "ForImageClassification" if arguments["num_classes"] else "Model"
    return {
        "model_type": "resnet",
        "architectures": [f"ResNet{head}"],
        "embedding_size": arguments["stem_width"],
        "hidden_sizes": [expansion * width for width in arguments["widths"]],
        "depths": list(arguments["depths"]),
        "layer_type": arguments["block"],
        "hidden_act": "relu",
        "downsample_in_first_stage": arguments["first_stride"] == 2,
        "downsample_in_bottleneck": arguments["stride_first"],
    }


def _modules(source: str, arguments: Arguments) -> dict[str, str]:
    stages = range(len(arguments["depths"]))
    if source == "transformers":
        named = {f"stage_{i}": f"{{p}}encoder.stages.{i}" for i in stages}
        return {"stem": "{p}embedder", **named, "pooled": "{p}pooler"}
    pool = "global_pool" if source == "timm" else "avgpool"
    return {"stem": "maxpool", **{f"stage_{i}": f"layer{i + 1}" for i in stages}, "pooled": pool}


_ANCHORS = ("bn1.running_mean", "layer1.0.conv1.weight", "layer1.0.bn2.running_var")

# timm's stands first, so a file of torchvision's is read as timm's: the names are the same.
TABLES = (
    *(
        Table(
            source,
            "resnet",
            source,
            _ANCHORS,
            arguments=_from_timm,
            rules=_timm_rules,
            recognizes=lambda shapes: "conv1.weight" in shapes or "conv1.0.weight" in shapes,
            holds=partial(_holds, source),
            config=config,
            modules=partial(_modules, source),
            file_names=r"(wide_)?[a-z]*resne[xs]?t[a-z0-9]*",
            unseen=("ReLU", "pooling and strides without blur", "output stride 32"),
        )
        for source, config in (("timm", _timm_config), ("torchvision", _torchvision_config))
    ),
    Table(
        "transformers",
        "resnet",
        "resnet",
        (
            "{p}embedder.embedder.convolution.weight",
            "{p}encoder.stages.0.layers.0.layer.0.convolution.weight",
        ),
        arguments=_from_transformers,
        rules=_transformers_rules,
        prefixes=("resnet.", ""),
        # A bare RegNet names alike; its stem is 3 x 3.
        recognizes=lambda shapes: shapes["embedder.embedder.convolution.weight"][2] == 7,
        holds=partial(_holds, "transformers"),
        config=_transformers_config,
        modules=partial(_modules, "transformers"),
        fields=FIELDS,
        unseen=("stride_first", "first_stride", "ReLU"),
    ),
)


def _entries() -> tuple[Entry, ...]:
    timm = {
        "ResNet": ("resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152"),
        "ResNet-D": (
            "resnet18d",
            "resnet26d",
            "resnet34d",
            "resnet50d",
            "resnet101d",
            "resnet152d",
        ),
        "ResNeXt": ("resnext50_32x4d", "resnext50d_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
        "Wide ResNet": ("wide_resnet50_2", "wide_resnet101_2"),
    }
    titles = {"resnet": "ResNet", "resnext": "ResNeXt", "wide": "Wide ResNet"}
    sizes = {18: BASIC, 34: BASIC, 50: BOTTLENECK, 101: BOTTLENECK, 152: BOTTLENECK}
    return (
        *(Entry(f"timm/{name}", title, name) for title, names in timm.items() for name in names),
        *(
            Entry(
                f"torchvision/{name}",
                next(title for key, title in titles.items() if name.startswith(key)),
                name,
                published=f"torchvision://{name}",
                license="BSD-3-Clause",
            )
            for name in _TORCHVISION.values()
        ),
        *(
            Entry(
                f"transformers/resnet-{size}",
                "ResNet",
                "ResNetForImageClassification",
                (
                    ("layer_type", kind),
                    ("depths", VARIANTS[f"resnet{size}"]["depths"]),
                    (
                        "hidden_sizes",
                        (64, 128, 256, 512) if kind == BASIC else (256, 512, 1024, 2048),
                    ),
                    ("num_labels", 1000),
                ),
                published=f"hf://microsoft/resnet-{size}",
                license="apache-2.0",
            )
            for size, kind in sizes.items()
        ),
    )


ZOO = _entries()
