"""Tables for ConvNeXt V1 and V2: timm, torchvision, and transformers' files.

Sources: timm 1.0 convnext.py; torchvision 0.29 models/convnext.py; transformers 5.23
models/convnext/modeling_convnext.py and models/convnextv2/modeling_convnextv2.py.
"""

import re
from functools import partial
from typing import Any

from vision_jax.convert.engine import CONV, COPY, LINEAR, POINTWISE, Layout, Rule, affine, norm, one
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
from vision_jax.models.convnext import VARIANTS, ConvNeXt
from vision_jax.models.layers import RUN_ARGUMENTS

_OTHER = r"_rms|zepto|^test_"  # other norms or activations
_TIMM_SEEN = (
    *("depths", "dims", "kernel_sizes", "patch_size", "stem_type", "ls_init_value", "use_grn"),
    *("head_norm_first", "head_hidden_size", "conv_mlp", "conv_bias", "norm_eps"),
)
_TIMM_FIXED = {"output_stride": 32, "global_pool": "avg", "act_layer": "gelu"}
_TORCHVISION = ("tiny", "small", "base", "large")
_PER_CHANNEL = Layout(
    lambda xs: [x[:, 0, 0] for x in xs], lambda xs: [x[:, None, None] for x in xs]
)
_LAST_AXIS = Layout(
    lambda xs: [x[0, 0, 0] for x in xs], lambda xs: [x[None, None, None] for x in xs]
)


FIELDS = Fields(
    types=("convnext", "convnextv2"),
    used="layer_norm_eps",  # of the last norm
    seen="num_channels patch_size num_stages hidden_sizes depths",
    free="initializer_range layer_scale_init_value drop_path_rate image_size out_features "
    "out_indices stage_names",
    only={"hidden_act": ("gelu",)},
)


def _timm_rules(a: Arguments) -> list[Rule]:
    mlp = POINTWISE if a["conv_mlp"] else LINEAR
    rules: list[Rule] = []
    if a["stem_widths"]:
        rules += affine("stem.0", "stem_conv_0", CONV) + affine("stem.1", "stem_conv_1", CONV)
        rules += norm("stem.2", "stem_norm")
    else:
        rules += affine("stem.0", "stem_conv", CONV) + norm("stem.1", "stem_norm")
    for stage, depth in enumerate(a["depths"]):
        name, path = f"stages.{stage}", f"stage_{stage}"
        rules += norm(f"{name}.downsample.0", f"{path}/downsample_norm")
        rules += affine(f"{name}.downsample.1", f"{path}/downsample_conv", CONV)
        for block in range(depth):
            rules += _block(
                f"{name}.blocks.{block}",
                f"{path}/block_{block}",
                ("conv_dw", "norm", "mlp.fc1", "mlp.fc2", "gamma", "mlp.grn"),
                mlp,
            )
    rules += norm("norm_pre" if a["norm_before_pool"] else "head.norm", "norm")
    return [*rules, *affine("head.pre_logits.fc", "pre_logits"), *affine("head.fc", "head")]


def _torchvision_rules(a: Arguments) -> list[Rule]:
    rules: list[Rule] = [*affine("features.0.0", "stem_conv", CONV)]
    rules += norm("features.0.1", "stem_norm")
    for stage, depth in enumerate(a["depths"]):
        path = f"stage_{stage}"
        rules += norm(f"features.{2 * stage}.0", f"{path}/downsample_norm") if stage else ()
        if stage:
            rules += affine(f"features.{2 * stage}.1", f"{path}/downsample_conv", CONV)
        for block in range(depth):
            rules += _block(
                f"features.{2 * stage + 1}.{block}",
                f"{path}/block_{block}",
                ("block.0", "block.2", "block.3", "block.5", "layer_scale", "grn"),
                LINEAR,
                scale=_PER_CHANNEL,
            )
    return [*rules, *norm("classifier.0", "norm"), *affine("classifier.2", "head")]


def _transformers_rules(a: Arguments) -> list[Rule]:
    rules: list[Rule] = [*affine("{p}embeddings.patch_embeddings", "stem_conv", CONV)]
    rules += norm("{p}embeddings.layernorm", "stem_norm")
    for stage, depth in enumerate(a["depths"]):
        name, path = f"{{p}}encoder.stages.{stage}", f"stage_{stage}"
        rules += norm(f"{name}.downsampling_layer.0", f"{path}/downsample_norm")
        rules += affine(f"{name}.downsampling_layer.1", f"{path}/downsample_conv", CONV)
        for block in range(depth):
            rules += _block(
                f"{name}.layers.{block}",
                f"{path}/block_{block}",
                ("dwconv", "layernorm", "pwconv1", "pwconv2", "layer_scale_parameter", "grn"),
                LINEAR,
                grn=_LAST_AXIS,
            )
    return [*rules, *norm("{p}layernorm", "norm"), *affine("classifier", "head")]


def _block(
    name: str,
    path: str,
    parts: tuple[str, ...],
    mlp: Layout,
    scale: Layout = COPY,
    grn: Layout = COPY,
) -> tuple[Rule, ...]:
    conv, before, fc1, fc2, gamma, response = (f"{name}.{part}" for part in parts)
    return (
        *affine(conv, f"{path}/conv_dw", CONV),
        *norm(before, f"{path}/norm"),
        *affine(fc1, f"{path}/mlp/fc1", mlp),
        *one(f"{response}.weight", f"{path}/mlp/grn/scale", grn),
        *one(f"{response}.bias", f"{path}/mlp/grn/bias", grn),
        *affine(fc2, f"{path}/mlp/fc2", mlp),
        *one(gamma, f"{path}/layer_scale", scale),
    )


def _from_timm(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    architecture, given = timm_arguments(metadata, _TIMM_SEEN, _TIMM_FIXED)
    if re.search(_OTHER, architecture):
        raise UserError(f"timm's {architecture} has other norms than a ConvNeXt: not supported")
    depths = count_blocks(shapes, r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.weight")
    widths = tuple(shapes[f"stages.{i}.blocks.0.conv_dw.weight"][0] for i in range(len(depths)))
    overlaps = "stem.2.weight" in shapes
    fc1 = shapes["stages.0.blocks.0.mlp.fc1.weight"]
    eps = 1e-5 if architecture == "convnext_xxlarge" else 1e-6
    eps = given.get("norm_eps") or eps
    hidden = shapes.get("head.pre_logits.fc.weight", (0,))[0]
    return {
        "num_classes": shapes.get("head.fc.weight", (0,))[0],
        "in_channels": shapes["stem.0.weight"][1],
        "depths": depths,
        "widths": widths,
        "stem_widths": (shapes["stem.0.weight"][0],) if overlaps else (),
        "patch_size": 4 if overlaps else shapes["stem.0.weight"][2],
        "first_stride": shapes.get("stages.0.downsample.1.weight", (0, 0, 1))[2],
        "kernel_size": shapes["stages.0.blocks.0.conv_dw.weight"][2],
        "mlp_ratio": fc1[0] // widths[0],
        "grn": "stages.0.blocks.0.mlp.grn.weight" in shapes,
        "layer_scale": 1e-6 if "stages.0.blocks.0.gamma" in shapes else None,
        "conv_mlp": len(fc1) == 4,
        "norm_before_pool": "norm_pre.weight" in shapes,
        "head_hidden": hidden,
        "layer_norm_eps": eps,
        "head_norm_eps": eps,
    }


def _from_torchvision(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    stages = count_blocks(shapes, r"features\.(\d+)\.(\d+)\.block\.0\.weight")
    widths = tuple(shapes[f"features.{2 * i + 1}.0.block.0.weight"][0] for i in range(len(stages)))
    return {
        "num_classes": shapes["classifier.2.weight"][0],
        "in_channels": shapes["features.0.0.weight"][1],
        "depths": stages,
        "widths": widths,
        "patch_size": shapes["features.0.0.weight"][2],
    }


def _from_transformers(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    depths = count_blocks(shapes, r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.weight")
    first = "encoder.stages.{}.layers.0.{}"
    stem = shapes["embeddings.patch_embeddings.weight"]
    return {
        "num_classes": shapes.get("classifier.weight", (0,))[0],
        "in_channels": stem[1],
        "depths": depths,
        "widths": tuple(shapes[first.format(i, "dwconv.weight")][0] for i in range(len(depths))),
        "patch_size": stem[2],
        "grn": first.format(0, "grn.weight") in shapes,
        "layer_scale": 1e-6 if first.format(0, "layer_scale_parameter") in shapes else None,
        "head_norm_eps": float(config.get("layer_norm_eps", 1e-12)),
    }


_NOT_STRUCTURE = ("num_classes", "in_channels", "mean", "std", "parent", "name", *RUN_ARGUMENTS)
_STRUCTURE = [name for name in ConvNeXt.__dataclass_fields__ if name not in _NOT_STRUCTURE]
_DEFAULTS = {
    name: ConvNeXt.__dataclass_fields__[name].default
    for name in _STRUCTURE
    if name not in ("depths", "widths")
}


def _plain(a: Arguments) -> bool:
    return not (a["stem_widths"] or a["norm_before_pool"] or a["head_hidden"])


def _usual(a: Arguments) -> bool:
    usual = (7, 4, 1, 1e-6)
    return (a["kernel_size"], a["mlp_ratio"], a["first_stride"], a["layer_norm_eps"]) == usual


def _holds(source: str, a: Arguments) -> bool:
    if a["activation"] != "gelu":
        return False
    if source == "timm":
        half = -(-a["widths"][0] // 16) * 8
        stems = ((), (a["widths"][0],), (half,))
        same_eps = a["layer_norm_eps"] == a["head_norm_eps"]
        first = 2 if a["patch_size"] == 2 and not a["stem_widths"] else 1
        same = same_eps and first == a["first_stride"]
        return same and len(a["depths"]) == 4 and a["stem_widths"] in stems
    if source == "torchvision":
        return _torchvision_config(a) != {}
    # transformers: V2 has response normalization in the place of LayerScale
    return _plain(a) and _usual(a) and (not a["grn"] or a["layer_scale"] is None)


def _timm_config(a: Arguments) -> dict[str, Any]:
    for name, sizes in VARIANTS.items():
        if {**_DEFAULTS, **sizes} == {field: a[field] for field in _STRUCTURE}:
            return {"architecture": name, "model_args": {}}
    stem = "patch"
    if a["stem_widths"]:
        stem = "overlap" if a["stem_widths"][0] == a["widths"][0] else "overlap_tiered"
    given = {
        "depths": list(a["depths"]),
        "dims": list(a["widths"]),
        "kernel_sizes": a["kernel_size"],
        "patch_size": a["patch_size"],
        "stem_type": stem,
        "conv_mlp": a["conv_mlp"],
        "use_grn": a["grn"],
        "head_norm_first": a["norm_before_pool"],
        "norm_eps": a["layer_norm_eps"],
    }
    if a["head_hidden"]:
        given["head_hidden_size"] = a["head_hidden"]
    if a["layer_scale"] is None:  # which timm takes from V2 alone: it ignores a None of ours
        return {"architecture": "convnextv2_tiny", "model_args": given}
    given["ls_init_value"] = a["layer_scale"]
    return {"architecture": "convnext_tiny", "model_args": given}


def _torchvision_config(a: Arguments) -> dict[str, Any]:
    plain = {field: a[field] for field in _STRUCTURE if field != "conv_mlp"}
    for name in _TORCHVISION:
        named = {**_DEFAULTS, **VARIANTS[f"convnext_{name}"]}
        if all(named[field] == value for field, value in plain.items()):
            return {"model": f"convnext_{name}", "kwargs": {}}
    return {}


def _transformers_config(a: Arguments) -> dict[str, Any]:
    kind, name = ("convnextv2", "ConvNextV2") if a["grn"] else ("convnext", "ConvNext")
    head = "ForImageClassification" if a["num_classes"] else "Model"
    scale = {} if a["grn"] else {"layer_scale_init_value": a["layer_scale"] or 0.0}
    return {
        "model_type": kind,
        "architectures": [f"{name}{head}"],
        "depths": list(a["depths"]),
        "hidden_sizes": list(a["widths"]),
        "num_stages": len(a["depths"]),
        "patch_size": a["patch_size"],
        "hidden_act": "gelu",
        "layer_norm_eps": a["head_norm_eps"],
        **scale,
    }


def _modules(source: str, a: Arguments) -> dict[str, str]:
    stages = range(len(a["depths"]))
    if source == "torchvision":
        named = {f"stage_{i}": f"features.{2 * i + 1}" for i in stages}
        return {"stem": "features.0", **named, "pooled": "classifier.1"}
    if source == "transformers":
        named = {f"stage_{i}": f"{{p}}encoder.stages.{i}" for i in stages}
        return {"stem": "{p}embeddings", **named, "pooled": "{p}layernorm"}
    pooled = "head.norm"
    if a["norm_before_pool"] or a["head_hidden"]:
        pooled = "head.global_pool" if a["norm_before_pool"] else "head.pre_logits"
    return {"stem": "stem", **{f"stage_{i}": f"stages.{i}" for i in stages}, "pooled": pooled}


def _transformers_table(kind: str, grn: bool) -> Table:
    return Table(
        "transformers",
        "convnext",
        kind,
        (
            "{p}embeddings.patch_embeddings.weight",
            "{p}encoder.stages.0.layers.0.pwconv1.weight",
            *(("{p}encoder.stages.0.layers.0.grn.weight",) if grn else ()),
        ),
        arguments=_from_transformers,
        rules=_transformers_rules,
        prefixes=(f"{kind}.", ""),
        holds=lambda a: a["grn"] == grn and _holds("transformers", a),
        config=_transformers_config,
        modules=partial(_modules, "transformers"),
        fields=FIELDS,
        unseen=("head_norm_eps", "GELU"),
    )


TABLES = (
    Table(
        "timm",
        "convnext",
        "timm",
        ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.mlp.fc1.weight"),
        arguments=_from_timm,
        rules=_timm_rules,
        holds=partial(_holds, "timm"),
        config=_timm_config,
        modules=partial(_modules, "timm"),
        file_names=r"convnext(v2)?_[a-z]+(_(ols|hnf|rms|mlp))*",
        unseen=("layer_norm_eps", "GELU", "output stride 32"),
    ),
    Table(
        "torchvision",
        "convnext",
        "torchvision",
        ("features.0.0.weight", "features.1.0.layer_scale", "classifier.2.weight"),
        arguments=_from_torchvision,
        rules=_torchvision_rules,
        holds=partial(_holds, "torchvision"),
        config=_torchvision_config,
        modules=partial(_modules, "torchvision"),
    ),
    _transformers_table("convnextv2", grn=True),
    _transformers_table("convnext", grn=False),  # whose anchors the other's contain
)


def _entries() -> tuple[Entry, ...]:
    shallow = (("depths", (1, 1, 2, 1)),)
    giants = ("large", "large_mlp", "xlarge", "xxlarge", "huge")
    v1 = [name.removeprefix("convnext_") for name in VARIANTS if name.startswith("convnext_")]
    v2 = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")

    def timm(prefix: str, title: str, name: str) -> Entry:
        reduced = shallow if name in giants else ()
        return Entry(f"timm/{prefix}_{name}", title, f"{prefix}_{name}", reduced=reduced)

    def hub(kind: str, title: str, build: str, size: str) -> Entry:
        depths, widths = (VARIANTS[f"{kind}_{size}"][field] for field in ("depths", "widths"))
        return Entry(
            f"transformers/{kind}-{size}",
            title,
            build,
            (("depths", depths), ("hidden_sizes", widths), ("num_labels", 1000)),
            reduced=shallow if size in giants else (),
            published=f"hf://facebook/{kind}-{size}-" + ("224" if kind == "convnext" else "1k-224"),
            license="apache-2.0",
        )

    return (
        *(timm("convnext", "ConvNeXt", name) for name in v1),
        *(timm("convnextv2", "ConvNeXt V2", name) for name in v2),
        *(
            Entry(
                f"torchvision/convnext_{name}",
                "ConvNeXt",
                f"convnext_{name}",
                published=f"torchvision://convnext_{name}",
                license="BSD-3-Clause",
            )
            for name in _TORCHVISION
        ),
        *(
            hub("convnext", "ConvNeXt", "ConvNextForImageClassification", size)
            for size in ("tiny", "small", "base")
        ),
        *(
            hub("convnextv2", "ConvNeXt V2", "ConvNextV2ForImageClassification", size)
            for size in ("atto", "nano", "tiny", "base")
        ),
    )


ZOO = _entries()
