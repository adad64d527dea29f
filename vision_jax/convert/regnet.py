"""Tables for RegNet X and Y: timm, torchvision, and transformers' files.

Sources: timm 1.0 regnet.py; torchvision 0.29 models/regnet.py; transformers 5.23
models/regnet/modeling_regnet.py.
"""

import re
from collections.abc import Callable
from functools import partial
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
from vision_jax.models.regnet import VARIANTS

_OTHER = r"_sgn|regnetv|regnetz"  # other norms, activations and block orders
_TIMM_SEEN = ("depth", "w0", "wa", "wm", "group_size", "bottle_ratio", "se_ratio", "stem_width")
_TIMM_FIXED = {"output_stride": 32, "global_pool": "avg", "act_layer": "relu"}
_TORCHVISION = {
    "regnetx_004_tv": "regnet_x_400mf",
    "regnetx_008": "regnet_x_800mf",
    "regnetx_016": "regnet_x_1_6gf",
    "regnetx_032": "regnet_x_3_2gf",
    "regnetx_080": "regnet_x_8gf",
    "regnetx_160": "regnet_x_16gf",
    "regnetx_320": "regnet_x_32gf",
    "regnety_004": "regnet_y_400mf",
    "regnety_008_tv": "regnet_y_800mf",
    "regnety_016": "regnet_y_1_6gf",
    "regnety_032": "regnet_y_3_2gf",
    "regnety_080_tv": "regnet_y_8gf",
    "regnety_160": "regnet_y_16gf",
    "regnety_320": "regnet_y_32gf",
    "regnety_1280": "regnet_y_128gf",
}


_FIELDS = Fields(
    types=("regnet",),
    used="downsample_in_first_stage",
    seen="num_channels embedding_size hidden_sizes depths groups_width layer_type",
    only={"hidden_act": ("relu",)},
)


def _rules(
    a: Arguments,
    stem: tuple[str, str],
    block_name: Callable[[int, int], str],
    conv: Callable[[str], tuple[str, str]],
    squeeze: tuple[str, str],
    head: str,
) -> list[Rule]:
    """`conv` gives the names of a convolution and its norm: "1", "2", "3" or "_downsample"."""

    def conv_norm(names: tuple[str, str], kernel: str, bn: str) -> tuple[Rule, ...]:
        return (*one(f"{names[0]}.weight", f"{kernel}/kernel", CONV), *batch_norm(names[1], bn))

    rules: list[Rule] = [*conv_norm(stem, "stem_conv", "stem_bn")]
    for stage, depth in enumerate(a["depths"]):
        for block in range(depth):
            name, path = block_name(stage, block), f"stage_{stage}/block_{block}"
            for part in ("1", "2", "3", *(("_downsample",) if block == 0 else ())):
                first, second = conv(part)
                names = (f"{name}.{first}", f"{name}.{second}")
                rules += conv_norm(names, f"{path}/conv{part}", f"{path}/bn{part}")
            if a["se_ratio"]:
                for ours, theirs in zip(("fc1", "fc2"), squeeze, strict=True):
                    rules += affine(f"{name}.{theirs}", f"{path}/se/{ours}", POINTWISE)
    return [*rules, *affine(head, "head")]


def _timm_rules(a: Arguments) -> list[Rule]:
    def conv(part: str) -> tuple[str, str]:
        name = "downsample" if part == "_downsample" else f"conv{part}"
        return f"{name}.conv", f"{name}.bn"

    return _rules(
        a,
        ("stem.conv", "stem.bn"),
        lambda stage, block: f"s{stage + 1}.b{block + 1}",
        conv,
        ("se.fc1", "se.fc2"),
        "head.fc",
    )


def _torchvision_rules(a: Arguments) -> list[Rule]:
    names = {"1": "f.a", "2": "f.b", "3": "f.c", "_downsample": "proj"}
    return _rules(
        a,
        ("stem.0", "stem.1"),
        lambda s, b: f"trunk_output.block{s + 1}.block{s + 1}-{b}",
        lambda part: (f"{names[part]}.0", f"{names[part]}.1"),
        ("f.se.fc1", "f.se.fc2"),
        "fc",
    )


def _transformers_rules(a: Arguments) -> list[Rule]:
    last = "layer.3" if a["se_ratio"] else "layer.2"
    names = {"1": "layer.0", "2": "layer.1", "3": last, "_downsample": "shortcut"}
    stem = "{p}embedder.embedder"
    return _rules(
        a,
        (f"{stem}.convolution", f"{stem}.normalization"),
        lambda stage, block: f"{{p}}encoder.stages.{stage}.layers.{block}",
        lambda part: (f"{names[part]}.convolution", f"{names[part]}.normalization"),
        ("layer.2.attention.0", "layer.2.attention.2"),
        "classifier.1",
    )


def _arguments(
    shapes: Shapes, depths: tuple[int, ...], names: dict[str, str], block: str
) -> dict[str, Any]:
    """From shapes; `names` of stem, conv1, conv2, squeeze and head, `block` with two indices."""
    first = [f"{block.format(stage, 0)}." for stage in range(len(depths))]
    grouped = [shapes[f"{name}{names['conv2']}.weight"] for name in first]
    stem = shapes[f"{names['stem']}.weight"]
    inputs = [shapes[f"{name}{names['conv1']}.weight"][1] for name in first]
    squeezed = [shapes.get(f"{name}{names['squeeze']}.weight", (0,))[0] for name in first]
    ratio = squeezed[-1] / inputs[-1]
    if [round(width / 4) for width in inputs] == squeezed:  # what rounding hides
        ratio = 0.25
    return {
        "num_classes": shapes.get(f"{names['head']}.weight", (0,))[0],
        "in_channels": stem[1],
        "stem_width": stem[0],
        "depths": depths,
        "widths": tuple(shape[0] for shape in grouped),
        "group_widths": tuple(shape[1] for shape in grouped),
        "se_ratio": ratio,
    }


def _from_timm(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    architecture, _ = timm_arguments(metadata, _TIMM_SEEN, _TIMM_FIXED)
    if re.search(_OTHER, architecture):
        raise UserError(f"timm's {architecture} computes otherwise than a RegNet: not supported")
    depths = count_blocks(shapes, r"s(\d+)\.b(\d+)\.conv1\.conv\.weight", first=1)
    names = {"stem": "stem.conv", "conv1": "conv1.conv", "conv2": "conv2.conv", "squeeze": "se.fc1"}
    shifted = {re.sub(r"^s(\d+)\.b(\d+)", _shift, name): shape for name, shape in shapes.items()}
    return _arguments(shifted, depths, names | {"head": "head.fc"}, "s{}.b{}")


def _shift(match: re.Match[str]) -> str:
    return f"s{int(match[1]) - 1}.b{int(match[2]) - 1}"  # timm counts from 1


def _from_torchvision(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    pattern = r"trunk_output\.block(\d+)\.block\d+-(\d+)\.f\.a\.0\.weight"
    depths = count_blocks(shapes, pattern)
    names = {"stem": "stem.0", "conv1": "f.a.0", "conv2": "f.b.0", "squeeze": "f.se.fc1"}

    def shift(match: re.Match[str]) -> str:
        return f"{int(match[1]) - 1}-"

    shifted = {
        re.sub(r"^trunk_output\.block\d+\.block(\d+)-", shift, name): shape
        for name, shape in shapes.items()
    }
    return _arguments(shifted, depths, names | {"head": "fc"}, "{}-{}")


def _from_transformers(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    block = r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.0\.convolution\.weight"
    depths = count_blocks(shapes, block)
    names = {
        "stem": "embedder.embedder.convolution",
        "conv1": "layer.0.convolution",
        "conv2": "layer.1.convolution",
        "squeeze": "layer.2.attention.0",
        "head": "classifier.1",
    }
    first = 2 if config.get("downsample_in_first_stage", True) else 1
    found = _arguments(shapes, depths, names, "encoder.stages.{}.layers.{}")
    return found | {"first_stride": first}


def _named(a: Arguments) -> str | None:
    """timm's name of the architecture."""
    plain = a["stem_width"] == 32 and a["first_stride"] == 2
    for name, sizes in VARIANTS.items():
        if plain and {"se_ratio": 0.0, **sizes} == {
            field: a[field] for field in sizes | {"se_ratio": 0}
        }:
            return name
    return None


def _in_torchvision(a: Arguments) -> str | None:
    structure = ("depths", "widths", "group_widths", "se_ratio", "stem_width", "first_stride")
    for ours, theirs in _TORCHVISION.items():
        named = {"se_ratio": 0.0, "stem_width": 32, "first_stride": 2, **VARIANTS[ours]}
        if named == {field: a[field] for field in structure}:
            return theirs
    return None


def _group_width(a: Arguments) -> int | None:
    """The one width of all groups that narrower stages have less of, or None."""
    width = max(a["group_widths"])
    fits = all(
        own == (width if stage >= width else stage)
        for own, stage in zip(a["group_widths"], a["widths"], strict=True)
    )
    return width if fits else None


def _transformers_config(a: Arguments) -> dict[str, Any]:
    head = "ForImageClassification" if a["num_classes"] else "Model"
    return {
        "model_type": "regnet",
        "architectures": [f"RegNet{head}"],
        "embedding_size": a["stem_width"],
        "hidden_sizes": list(a["widths"]),
        "depths": list(a["depths"]),
        "groups_width": _group_width(a),
        "layer_type": "y" if a["se_ratio"] else "x",
        "hidden_act": "relu",
        "downsample_in_first_stage": a["first_stride"] == 2,
    }


def _modules(stem: str, stage: str, pool: str, first: int, a: Arguments) -> dict[str, str]:
    stages = range(len(a["depths"]))
    return {
        "stem": stem,
        **{f"stage_{i}": stage.format(i + first) for i in stages},
        "pooled": pool,
    }


TABLES = (
    Table(
        "timm",
        "regnet",
        "timm",
        ("stem.conv.weight", "s1.b1.conv1.conv.weight", "s1.b1.conv2.bn.running_mean"),
        arguments=_from_timm,
        rules=_timm_rules,
        holds=lambda a: _named(a) is not None,
        config=lambda a: {"architecture": _named(a), "model_args": {}},
        modules=partial(_modules, "stem", "s{}", "head.global_pool", 1),
        file_names=r"regnet[a-z]_[a-z]?\d+(_sgn|_evos)?",
        unseen=("ReLU", "output stride 32"),
    ),
    Table(
        "torchvision",
        "regnet",
        "torchvision",
        ("stem.0.weight", "trunk_output.block1.block1-0.f.a.0.weight"),
        arguments=_from_torchvision,
        rules=_torchvision_rules,
        holds=lambda a: _in_torchvision(a) is not None,
        config=lambda a: {"model": _in_torchvision(a), "kwargs": {}},
        modules=partial(_modules, "stem", "trunk_output.block{}", "avgpool", 1),
    ),
    Table(
        "transformers",
        "regnet",
        "regnet",
        (
            "{p}embedder.embedder.convolution.weight",
            "{p}encoder.stages.0.layers.0.layer.1.convolution.weight",
        ),
        arguments=_from_transformers,
        rules=_transformers_rules,
        prefixes=("regnet.", ""),
        # A bare ResNet names alike; its stem is 7 x 7.
        recognizes=lambda shapes: shapes["embedder.embedder.convolution.weight"][2] == 3,
        holds=lambda a: a["se_ratio"] in (0, 0.25) and _group_width(a) is not None,
        config=_transformers_config,
        modules=partial(_modules, "{p}embedder", "{{p}}encoder.stages.{}", "{p}pooler", 0),
        fields=_FIELDS,
        unseen=("first_stride", "ReLU"),
    ),
)


def _entries() -> tuple[Entry, ...]:
    def title(name: str) -> str:
        return "RegNetX" if "x_" in name else "RegNetY"

    hub = ("x_002", "x_040", "y_002", "y_008", "y_040", "y_160")
    timm = [name for name in VARIANTS if not name.endswith(("_640", "_1280"))]
    return (
        *(Entry(f"timm/{name}", title(name), name) for name in timm),
        *(
            Entry(
                f"torchvision/{name}",
                title(name),
                name,
                published=f"torchvision://{name}",
                license="BSD-3-Clause",
            )
            for name in _TORCHVISION.values()
            if name != "regnet_y_128gf"
        ),
        *(
            Entry(
                f"transformers/regnet-{name.replace('_', '-')}",
                title(name),
                "RegNetForImageClassification",
                (
                    ("depths", VARIANTS[f"regnet{name}"]["depths"]),
                    ("hidden_sizes", VARIANTS[f"regnet{name}"]["widths"]),
                    ("groups_width", max(VARIANTS[f"regnet{name}"]["group_widths"])),
                    ("layer_type", name[0]),
                    ("num_labels", 1000),
                ),
                published=f"hf://facebook/regnet-{name.replace('_', '-')}",
                license="apache-2.0",
            )
            for name in hub
        ),
    )


ZOO = _entries()
