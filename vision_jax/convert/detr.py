"""Tables for DETR: transformers' files and names in memory, and the original repository's.

Sources: transformers 5.24 models/detr, whose backbone is timm's ResNet or its own and whose files
keep older names than its modules; https://github.com/facebookresearch/detr, whose backbone is
torchvision's. In all of them BatchNorm is frozen and has no count of updates; some published files
have one here and there all the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vision_jax.convert import resnet
from vision_jax.convert.engine import (
    CONV,
    UNPACK_BIAS,
    UNPACK_LINEAR,
    Rule,
    affine,
    norm,
    one,
)
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES
from vision_jax.models.resnet import BOTTLENECK, VARIANTS

HEADS = 8  # of the original, whose files don't say
ORIGINAL = "detr"

_STRUCTURE = ("depths", "block", "widths", "stem_width")
_TIMM = tuple(f"resnet{size}" for size in (18, 26, 34, 50, 101, 152, 200))
_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_RESNETS = {table.source: table.with_prefix("") for table in resnet.TABLES}


@dataclass(frozen=True)
class Names:
    """What one kind of file calls the modules; those of a layer follow its name.

    Attributes:
      resnet: whose names the backbone's tensors have after `backbone`.
      attentions: of a layer, the encoder's first.
      qkv: the three of an attention, or none where they are packed in one.
      norms: of a layer of the encoder, and of one of the decoder.
      stages: name of each stage, and of what comes before the first, for certificates.
    """

    resnet: str
    backbone: str
    queries: str
    projection: str
    encoder: str
    decoder: str
    attentions: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    mlp: tuple[str, str]
    norms: tuple[tuple[str, ...], tuple[str, ...]]
    final_norm: str
    classes: str
    boxes: str


_HUB = Names(
    resnet="timm",
    backbone="model.backbone.conv_encoder.model.",
    queries="model.query_position_embeddings.weight",
    projection="model.input_projection",
    encoder="model.encoder.layers.{i}.",
    decoder="model.decoder.layers.{i}.",
    attentions=("self_attn.", "encoder_attn."),
    qkv=("q_proj", "k_proj", "v_proj"),
    out="out_proj",
    mlp=("fc1", "fc2"),
    norms=(
        ("self_attn_layer_norm", "final_layer_norm"),
        ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    ),
    final_norm="model.decoder.layernorm",
    classes="class_labels_classifier",
    boxes="bbox_predictor.layers.",
)
_MEMORY = replace(  # what torch.save(model.state_dict()) writes
    _HUB, backbone="model.backbone.model.", out="o_proj", mlp=("mlp.fc1", "mlp.fc2")
)
_ORIGINAL = Names(
    resnet="torchvision",
    backbone="backbone.0.body.",
    queries="query_embed.weight",
    projection="input_proj",
    encoder="transformer.encoder.layers.{i}.",
    decoder="transformer.decoder.layers.{i}.",
    attentions=("self_attn.", "multihead_attn."),
    qkv=(),
    out="out_proj",
    mlp=("linear1", "linear2"),
    norms=(("norm1", "norm2"), ("norm1", "norm2", "norm3")),
    final_norm="transformer.decoder.norm",
    classes="class_embed",
    boxes="bbox_embed.layers.",
)


def _resnet_arguments(arguments: Arguments) -> dict[str, Any]:
    """The backbone's, as its own tables take them."""
    own = {name: arguments[name] for name in (*_STRUCTURE, "in_channels", "mean", "std")}
    return {**FAMILIES["resnet"].defaults, **own, "num_classes": 0}


def _backbone_rules(names: Names, arguments: Arguments) -> list[Rule]:
    rules = []
    for rule in _RESNETS[names.resnet].rules(_resnet_arguments(arguments)):
        assert isinstance(rule, Rule)
        if rule.paths[0].startswith("head/"):
            continue
        (name,), (path,) = rule.names, rule.paths
        moved = Rule((names.backbone + name,), (f"backbone/{path}",), rule.layout)
        rules.append(replace(moved, default=0, written=False) if path.endswith("/count") else moved)
    return rules


def _attention(names: Names, name: str, path: str) -> tuple[Rule, ...]:
    paths = [f"{path}/{part}" for part in "qkv"]
    out = affine(name + names.out, f"{path}/out")
    if names.qkv:
        parts = zip(names.qkv, paths, strict=True)
        return (*(rule for part, own in parts for rule in affine(name + part, own)), *out)
    kernels, biases = (tuple(f"{own}/{leaf}" for own in paths) for leaf in ("kernel", "bias"))
    return (
        Rule((f"{name}in_proj_weight",), kernels, UNPACK_LINEAR),
        Rule((f"{name}in_proj_bias",), biases, UNPACK_BIAS),
        *out,
    )


def _layer(names: Names, name: str, path: str, decodes: bool) -> list[Rule]:
    rules: list[Rule] = []
    own = ("self_attn", "cross_attn")[: 1 + decodes]
    for attention, part in zip(own, names.attentions, strict=False):
        rules += _attention(names, name + part, f"{path}/{attention}")
    for index, part in enumerate(names.mlp, 1):
        rules += affine(name + part, f"{path}/fc{index}")
    for index, part in enumerate(names.norms[decodes], 1):
        rules += norm(name + part, f"{path}/norm{index}")
    return rules


def _rules(names: Names, arguments: Arguments) -> list[Rule]:
    rules = _backbone_rules(names, arguments)
    rules += affine(names.projection, "input_proj", CONV)
    rules += one(names.queries, "query_embed")
    for decodes, name, part in (
        (False, names.encoder, "encoder"),
        (True, names.decoder, "decoder"),
    ):
        for index in range(arguments[f"{part}_depth"]):
            rules += _layer(names, name.replace("{i}", str(index)), f"{part}_{index}", decodes)
    rules += norm(names.final_norm, "decoder_norm")
    rules += affine(names.classes, "class_head")
    for index in range(3):
        rules += affine(f"{names.boxes}{index}", f"box_head/fc{index + 1}")
    return rules


def _arguments(names: Names, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    own = {
        name.removeprefix(names.backbone): shape
        for name, shape in shapes.items()
        if name.startswith(names.backbone)
    }
    backbone = config.get("backbone_config") or {}
    said = {**backbone, "architecture": backbone.get("backbone") or config.get("backbone") or ""}
    found = _RESNETS[names.resnet].arguments(own, {"config": said})
    defaults = FAMILIES["resnet"].defaults
    for name, value in found.items():
        if name not in (*_STRUCTURE, "in_channels", "num_classes") and value != defaults[name]:
            raise UserError(
                f"the backbone is a ResNet with {name} {value}: not supported in a DETR"
            )
    queries, width = shapes[names.queries]
    return {
        "num_classes": shapes[f"{names.classes}.weight"][0] - 1,
        **{name: found[name] for name in (*_STRUCTURE, "in_channels")},
        "num_queries": queries,
        "width": width,
        "mlp_width": shapes[f"{names.encoder.replace('{i}', '0')}{names.mlp[0]}.weight"][0],
        "encoder_depth": _count(shapes, names.encoder + names.norms[0][0]),
        "decoder_depth": _count(shapes, names.decoder + names.norms[1][0]),
        **(_from_original(config) if names is _ORIGINAL else _from_transformers(config)),
    }


def _count(shapes: Shapes, name: str) -> int:
    pattern = re.escape(f"{name}.weight").replace(r"\{i\}", r"\d+")
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)


def _from_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    for name, ours in (
        ("model_type", "detr"),
        ("activation_function", "relu"),
        ("position_embedding_type", "sine"),
    ):
        if config.get(name, ours) != ours:
            raise UserError(f"config.json: {name} {config[name]!r}: this model has {ours}")
    heads = config.get("encoder_attention_heads", HEADS)
    if config.get("decoder_attention_heads", heads) != heads:
        raise UserError("config.json: encoder_attention_heads and decoder_attention_heads differ")
    backbone = config.get("backbone_config")
    strides = (backbone.get("output_stride"),) if backbone else (16 * bool(config.get("dilation")),)
    return {"num_heads": heads, "dilation": strides == (16,)}


def _from_original(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_heads": config.get("nheads", HEADS),
        "dilation": bool(config.get("dilation", False)),
    }


def _named(arguments: Arguments) -> str | None:
    """The name of the backbone, if it has one."""
    own = {name: arguments[name] for name in _STRUCTURE}
    defaults = {name: FAMILIES["resnet"].defaults[name] for name in _STRUCTURE if name != "depths"}
    return next((name for name in _TIMM if {**defaults, **VARIANTS[name]} == own), None)


def _holds(names: Names, arguments: Arguments) -> bool:
    if names is _ORIGINAL:
        named = _named(arguments) in _TORCHVISION
        return named and (arguments["block"] == BOTTLENECK or not arguments["dilation"])
    if names.resnet == "timm":
        return _named(arguments) is not None
    return not arguments["dilation"]


def _transformers_config(names: Names, arguments: Arguments) -> dict[str, Any]:
    a = arguments
    config = {
        "model_type": "detr",
        "architectures": ["DetrForObjectDetection"],
        "d_model": a["width"],
        "num_queries": a["num_queries"],
        "activation_function": "relu",
        "position_embedding_type": "sine",
        **{f"{part}_layers": a[f"{part}_depth"] for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": a["num_heads"] for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": a["mlp_width"] for part in ("encoder", "decoder")},
    }
    if names.resnet == "timm":
        backbone = {"use_timm_backbone": True, "backbone": _named(a), "dilation": a["dilation"]}
        return config | backbone | {"use_pretrained_backbone": False}
    backbone = _RESNETS["transformers"].config(_resnet_arguments(a))
    del backbone["architectures"]
    backbone |= {"num_channels": a["in_channels"], "out_features": [f"stage{len(a['depths'])}"]}
    plain = {"use_timm_backbone": False, "backbone": None, "dilation": False}
    return config | plain | {"backbone_config": backbone}


def _original_config(arguments: Arguments) -> dict[str, Any]:
    """The options of its main.py that say what to build."""
    a = arguments
    return {
        "backbone": _named(a),
        "dilation": a["dilation"],
        "hidden_dim": a["width"],
        "nheads": a["num_heads"],
        "dim_feedforward": a["mlp_width"],
        "enc_layers": a["encoder_depth"],
        "dec_layers": a["decoder_depth"],
        "num_queries": a["num_queries"],
        "num_classes": a["num_classes"],
    }


def _modules(names: Names, arguments: Arguments) -> dict[str, str]:
    backbone = _RESNETS[names.resnet].modules(_resnet_arguments(arguments))
    inside = names if names is _ORIGINAL else _MEMORY
    layers = {
        f"{part}_{index}": name.replace("{i}", str(index)).rstrip(".")
        for part, name in (("encoder", inside.encoder), ("decoder", inside.decoder))
        for index in range(arguments[f"{part}_depth"])
    }
    return {
        **{own: inside.backbone + name for own, name in backbone.items() if own != "pooled"},
        "input_proj": inside.projection,
        **layers,
    }


def _table(source: str, kind: str, names: Names, exported: bool = True) -> Table:
    backbone = "embedder.embedder.convolution" if names.resnet == "transformers" else "conv1"
    config = _original_config if names is _ORIGINAL else partial(_transformers_config, names)

    def own_config(arguments: Arguments) -> dict[str, Any]:
        if arguments.get("grid_queries"):
            raise UserError("grid_queries: no other DETR has them, so it would find other boxes")
        return config(arguments)

    return Table(
        source,
        "detr",
        kind,
        (
            f"{names.backbone}{backbone}.weight",
            names.queries,
            f"{names.encoder.replace('{i}', '0')}{names.attentions[0]}{names.out}.weight",
            f"{names.classes}.weight",
        ),
        arguments=partial(_arguments, names),
        rules=partial(_rules, names),
        holds=partial(_holds, names) if exported else lambda arguments: False,
        config=own_config,
        modules=partial(_modules, names),
    )


TABLES = (
    _table("transformers", "timm's backbone", _HUB),
    _table("transformers", "its own backbone", replace(_HUB, resnet="transformers")),
    _table("transformers", "timm's backbone, in memory", _MEMORY, False),
    _table(
        "transformers",
        "its own backbone, in memory",
        replace(_MEMORY, resnet="transformers"),
        False,
    ),
    _table(ORIGINAL, "the original", _ORIGINAL),
)


def _entries() -> tuple[Entry, ...]:
    entries = []
    for size in (50, 101):
        for suffix, dilation in (("", False), ("-dc5", True)):
            backbone = f"resnet{size}"
            name = f"detr-resnet-{size}{suffix}"
            entries.append(
                Entry(
                    f"transformers/{name}",
                    "DETR",
                    "DetrForObjectDetection",
                    (("backbone", backbone), ("dilation", dilation), ("num_labels", 91)),
                    image_size=256,
                    published=f"hf://facebook/{name}",
                    license="apache-2.0",
                )
            )
            entries.append(
                Entry(
                    f"{ORIGINAL}/detr-r{size}{suffix}",
                    "DETR",
                    "DETR",
                    (("backbone", backbone), ("dilation", dilation), ("num_classes", 91)),
                    image_size=256,
                    license="apache-2.0",
                )
            )
    return tuple(entries)


ZOO = _entries()
