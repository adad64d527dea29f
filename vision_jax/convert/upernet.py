"""Tables for UPerNet: transformers' on a Swin, a ConvNeXt or a ResNet; on other backbones ours.

Source: transformers 5.24 models/upernet/modeling_upernet.py. Of a Swin it saves the last norm too,
which takes no part. Where it has no such backbone its tensors have timm's or transformers' names
behind "backbone."; such files are ours, and their header says what they are.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from vision_jax.convert import convnext, efficientnet, mit, regnet, resnet
from vision_jax.convert.backbone import Backbone, table_of
from vision_jax.convert.engine import CONV, Rule, Rules, affine, batch_norm, norm, one
from vision_jax.convert.fields import Fields
from vision_jax.convert.swin import tables as swin
from vision_jax.convert.swin.config import FIELDS as SWIN_FIELDS
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.errors import UserError
from vision_jax.models.backbone import ENCODERS, encoder_pairs
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.models.upernet import LEVELS, NORMS

FAMILY = "upernet"
_BACKBONE = "backbone."
_AUXILIARY = "auxiliary_head"
_FIELDS = Fields(
    types=("upernet",),
    used="pool_scales",
    seen="hidden_size use_auxiliary_head auxiliary_in_channels auxiliary_channels "
    "auxiliary_num_convs",
    free="initializer_range auxiliary_loss_weight loss_ignore_index backbone backbone_kwargs "
    "use_pretrained_backbone use_timm_backbone",
    only={"auxiliary_concat_input": (False,)},
)
_DECODER = ("decode_head.psp_modules.0.1.conv.weight", "decode_head.classifier.weight")
_FREE = "stage_names out_features out_indices"  # which maps: the tensors show that


def _conv_norm(name: str, path: str) -> tuple[Rule, ...]:
    kernel = one(f"{name}.conv.weight", f"{path}/conv/kernel", CONV)
    return (*kernel, *batch_norm(f"{name}.batch_norm", f"{path}/bn"))


def _rules(backbone: Backbone, arguments: Arguments) -> Rules:
    rules = [*backbone.rules(arguments)]
    maps = len(build_model(FAMILY, **arguments).pyramid[-LEVELS:])
    if arguments["map_norm_eps"] is not None:
        for index in range(maps):
            rules += norm(f"{_BACKBONE}hidden_states_norms.stage{index + 1}", f"map_norm_{index}")
    for index in range(len(arguments["pool_sizes"])):
        rules += _conv_norm(f"decode_head.psp_modules.{index}.1", f"pool_{index}")
    rules += _conv_norm("decode_head.bottleneck", "context")
    for index in range(maps - 1):
        rules += _conv_norm(f"decode_head.lateral_convs.{index}", f"lateral_{index}")
        rules += _conv_norm(f"decode_head.fpn_convs.{index}", f"fpn_{index}")
    rules += _conv_norm("decode_head.fpn_bottleneck", "fuse")
    rules += affine("decode_head.classifier", "class_head", CONV)
    if arguments["auxiliary_head"]:
        for index in range(arguments["auxiliary_depth"]):
            rules += _conv_norm(f"{_AUXILIARY}.convs.{index}", f"auxiliary_{index}")
        rules += affine(f"{_AUXILIARY}.classifier", "auxiliary_class_head", CONV)
    return rules


def _from_file(backbone: Backbone, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    family = backbone.table.family
    inner = config.get("backbone_config")
    said = {"config": inner if isinstance(inner, Mapping) else {}}
    found = backbone.table.arguments(backbone.shapes(shapes), said)
    found.pop("head_norm_eps", None)  # of a norm that takes no part

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in shapes)

    maps, stages = count(r"decode_head\.lateral_convs\.\d+\.conv\.weight") + 1, len(found["depths"])
    if maps != stages or maps > LEVELS:
        raise UserError(
            f"a UPerNet on {maps} maps of a {family} with {stages} stages: this model takes each"
            f" stage's, up to {LEVELS}"
        )
    classes, width = shapes["decode_head.classifier.weight"][:2]
    scales = config.get("pool_scales", FAMILIES[FAMILY].defaults["pool_sizes"])
    pools = count(r"decode_head\.psp_modules\.\d+\.1\.conv\.weight")
    if not isinstance(scales, list | tuple) or len(scales) != pools:
        raise UserError(f"config.json: pool_scales {scales!r}, and the tensors are of {pools}")
    auxiliary = shapes.get(f"{_AUXILIARY}.classifier.weight")
    head: dict[str, Any] = {"auxiliary_head": auxiliary is not None}
    if auxiliary is not None:
        depth = count(rf"{_AUXILIARY}\.convs\.\d+\.conv\.weight")
        head |= {"auxiliary_width": auxiliary[1], "auxiliary_depth": depth}
    return {
        "num_classes": classes,
        "encoder": family,
        "encoder_arguments": encoder_pairs(family, found),
        "in_channels": found["in_channels"],
        "width": width,
        "pool_sizes": tuple(scales),
        "map_norm_eps": NORMS.get(family),
        **head,
    }


def _holds(backbone: Backbone, a: Arguments) -> bool:
    family = backbone.table.family
    if a["encoder"] != family or a["map_norm_eps"] != NORMS.get(family):
        return False
    own = backbone.arguments(a) | {"always_partition": False}
    return len(own["depths"]) <= LEVELS and backbone.table.holds(own)


def _config(backbone: Backbone, a: Arguments) -> dict[str, Any]:
    own = backbone.arguments(a)
    inner = backbone.table.config(own)
    del inner["architectures"]
    stages = [f"stage{index + 1}" for index in range(len(own["depths"]))]
    return {
        "model_type": "upernet",
        "architectures": ["UperNetForSemanticSegmentation"],
        "backbone_config": {**inner, "num_channels": a["in_channels"], "out_features": stages},
        "hidden_size": a["width"],
        "pool_scales": list(a["pool_sizes"]),
        "use_auxiliary_head": a["auxiliary_head"],
        "auxiliary_channels": a["auxiliary_width"],
        "auxiliary_num_convs": a["auxiliary_depth"],
        "auxiliary_concat_input": False,
    }


def _modules(backbone: Backbone, a: Arguments) -> dict[str, str]:
    return {
        **backbone.modules(a),
        "pooled_context": "decode_head.bottleneck",
        "fused": "decode_head.fpn_bottleneck",
    }


def _table(
    source: Table, fields: Fields, name: str = _BACKBONE, in_memory: str = "", exported: bool = True
) -> Table:
    """The table of UPerNets on the backbone that `source` has the names of.

    Its tensors' names begin with `name`, its modules' with `in_memory` if that is something else.
    """
    backbone = Backbone(source, name)
    modules = replace(backbone, name=in_memory or name)
    inside = replace(fields, free=f"{fields.free} {_FREE}")
    anchors = (anchor.replace("{p}", name) for anchor in source.anchors)
    return Table(
        "transformers",
        FAMILY,
        source.kind,
        (*_DECODER, *anchors),
        arguments=partial(_from_file, backbone),
        rules=partial(_rules, backbone),
        dropped=(r"backbone\.swin\.layernorm\..*",),
        recognizes=lambda shapes: source.with_prefix("").recognizes(backbone.shapes(shapes)),
        holds=partial(_holds, backbone) if exported else lambda arguments: False,
        config=partial(_config, backbone),
        modules=partial(_modules, modules),
        fields=replace(_FIELDS, inner={"backbone_config": inside}),
        unseen=("pool_sizes", *source.unseen),
    )


# Of a family that transformers has no such backbone of, and of models that its own cannot be.
_OTHERS = {
    **{
        module.TABLES[0].family: Backbone(table_of(module.TABLES, "timm"), _BACKBONE)
        for module in (resnet, regnet, efficientnet, convnext, swin)
    },
    "mit": Backbone(table_of(mit.TABLES, "transformers"), _BACKBONE),
}
_HUB = {
    table.kind: table
    for module in (resnet, convnext, swin)
    for table in module.TABLES
    if table.source == "transformers"
}


def _unknown(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    raise UserError(
        "a UPerNet on a backbone that is no Swin, ConvNeXt or ResNet of transformers': of others,"
        " files of this program alone are read"
    )


_OF_TRANSFORMERS = (
    _table(_HUB["resnet"], resnet.FIELDS),
    *(_table(_HUB[kind], convnext.FIELDS) for kind in ("convnextv2", "convnext")),
    _table(_HUB["swin"], SWIN_FIELDS, in_memory="backbone.swin."),
    _table(_HUB["swin in memory"], SWIN_FIELDS, "backbone.swin.", exported=False),
)
TABLES = (
    Table(
        "transformers",
        FAMILY,
        "others",
        _DECODER,
        arguments=_unknown,
        rules=lambda arguments: _rules(_OTHERS[arguments["encoder"]], arguments),
        recognizes=lambda shapes: not any(table.matches(shapes) for table in _OF_TRANSFORMERS),
        holds=lambda arguments: False,
    ),
    *_OF_TRANSFORMERS,
)


# openmmlab's, trained on ADE20K: name there -> the backbone's variant.
_PUBLISHED = {
    **{f"swin-{size}": f"swin_{size}_patch4_window7_224" for size in ("tiny", "small")},
    **{f"swin-{size}": f"swin_{size}_patch4_window12_384" for size in ("base", "large")},
    **{
        f"convnext-{size}": f"convnext_{size}"
        for size in ("tiny", "small", "base", "large", "xlarge")
    },
}
_GIANTS = ("base", "large", "xlarge")


def _entry(name: str) -> Entry:
    kind, _, size = name.partition("-")
    backbone, table = _PUBLISHED[name], _HUB[kind]
    own = {**FAMILIES[kind].defaults, **(ENCODERS[kind][1](backbone) or {}), "num_classes": 0}
    inner = table.config(own) | {"out_features": [f"stage{index}" for index in (1, 2, 3, 4)]}
    del inner["architectures"]
    inner.pop("image_size", None)  # of the backbone's own training
    given = {"backbone_config": inner, "num_labels": 150}
    shallow = {"backbone_config": {**inner, "depths": [2, 2, 2, 2]}}
    return Entry(
        f"transformers/upernet-{name}",
        "UPerNet",
        "UperNetForSemanticSegmentation",
        tuple(given.items()),
        reduced=tuple(shallow.items()) if size in _GIANTS else (),
        image_size=512,
        published=f"hf://openmmlab/upernet-{name}",
        license="mit",
    )


ZOO = tuple(_entry(name) for name in _PUBLISHED)
