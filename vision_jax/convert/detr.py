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
from vision_jax.convert.backbone import Backbone
from vision_jax.convert.engine import (
    CONV,
    UNPACK_BIAS,
    UNPACK_LINEAR,
    Rule,
    Rules,
    affine,
    norm,
    one,
)
from vision_jax.convert.fields import Fields
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES
from vision_jax.models.resnet import BOTTLENECK, VARIANTS

HEADS = 8  # of the original, whose files don't say
ORIGINAL = "detr"

_STRUCTURE = ("depths", "block", "widths", "stem_width")
_TIMM = tuple(f"resnet{size}" for size in (18, 26, 34, 50, 101, 152, 200))
_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_RESNETS = {table.source: table for table in resnet.TABLES}


_LOSS = (
    "class_cost bbox_cost giou_cost mask_loss_coefficient dice_loss_coefficient "
    "bbox_loss_coefficient giou_loss_coefficient eos_coefficient"
)
_FIELDS = Fields(
    types=("detr",),
    used="auxiliary_loss encoder_attention_heads decoder_attention_heads dilation backbone_kwargs",
    seen="num_channels num_queries encoder_layers encoder_ffn_dim decoder_layers decoder_ffn_dim "
    "d_model backbone",
    free=f"encoder_layerdrop decoder_layerdrop dropout attention_dropout activation_dropout "
    f"init_std init_xavier_std {_LOSS} use_timm_backbone use_pretrained_backbone hidden_size "
    "num_attention_heads num_hidden_layers max_position_embeddings classifier_dropout "
    "scale_embedding",
    only={"activation_function": ("relu",), "position_embedding_type": ("sine",)},
    inner={
        "backbone_config": replace(
            resnet.FIELDS,
            types=(*resnet.FIELDS.types, "timm_backbone"),
            used=f"{resnet.FIELDS.used} backbone output_stride out_features out_indices",
            free="stage_names features_only freeze_batch_norm_2d use_pretrained_backbone "
            "use_timm_backbone",
        )
    },
)


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


def _backbone(names: Names) -> Backbone:
    return Backbone(_RESNETS[names.resnet], names.backbone, _STRUCTURE)


def _backbone_rules(names: Names, arguments: Arguments) -> Rules:
    """No count of updates is written, and one that is there says nothing."""
    return [
        replace(rule, default=0, written=False)
        if isinstance(rule, Rule) and rule.paths[0].endswith("/count")
        else rule
        for rule in _backbone(names).rules(arguments)
    ]


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


def _rules(names: Names, arguments: Arguments) -> Rules:
    rules = [*_backbone_rules(names, arguments)]
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
    backbone = config.get("backbone_config") or {}
    said = {**backbone, "architecture": backbone.get("backbone") or config.get("backbone") or ""}
    found = _backbone(names).read(shapes, {"config": said}, "DETR")
    queries, width = shapes[names.queries]
    mlp_widths = [
        shapes[f"{layer.replace('{i}', '0')}{names.mlp[0]}.weight"][0]
        for layer in (names.encoder, names.decoder)
    ]
    from_config = _from_original if names is _ORIGINAL else _from_transformers
    return {
        "num_classes": shapes[f"{names.classes}.weight"][0] - 1,
        **found,
        "num_queries": queries,
        "width": width,
        "mlp_width": mlp_widths[0],
        "decoder_mlp_width": None if mlp_widths[1] == mlp_widths[0] else mlp_widths[1],
        "encoder_depth": _count(shapes, names.encoder + names.norms[0][0]),
        "decoder_depth": _count(shapes, names.decoder + names.norms[1][0]),
        **from_config(config, len(found["depths"])),
    }


def _count(shapes: Shapes, name: str) -> int:
    pattern = re.escape(f"{name}.weight").replace(r"\{i\}", r"\d+")
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)


def _from_transformers(config: Mapping[str, Any], stages: int) -> dict[str, Any]:
    if config.get("auxiliary_loss"):
        raise UserError(
            "config.json: auxiliary_loss true: transformers 5 then normalizes what a layer of the "
            "decoder hands to the next, which neither this model nor the original does; set it to "
            "false if the weights were trained otherwise, as by transformers 4"
        )
    # What is left of older configs decides where there is no backbone_config.
    backbone = config.get("backbone_config") or config.get("backbone_kwargs")
    stride = backbone.get("output_stride") if backbone else 16 * bool(config.get("dilation"))
    if stride not in (None, 0, 16, 32):
        raise UserError(f"config.json: backbone's output_stride {stride!r} is none of 16, 32")
    names, indices = ((backbone or {}).get(key) for key in ("out_features", "out_indices"))
    last = (names or [f"stage{stages}"])[-1], (indices or [stages])[-1] % (stages + 1)
    if last not in ((f"stage{stages}", stages), (f"layer{stages}", stages)):  # timm's name
        raise UserError(
            f"config.json: the backbone's out_features {names!r} and out_indices {indices!r} do "
            f"not end with the last of its {stages} stages"
        )
    heads = config.get("encoder_attention_heads", HEADS)
    decoding = config.get("decoder_attention_heads", HEADS)
    return {
        "num_heads": heads,
        "decoder_heads": None if decoding == heads else decoding,
        "dilation": stride == 16,
    }


def _from_original(config: Mapping[str, Any], stages: int) -> dict[str, Any]:
    for name, ours in (("position_embedding", "sine"), ("pre_norm", False), ("masks", False)):
        if config.get(name, ours) != ours:
            raise UserError(f"config.json: {name} {config[name]!r}: this model has {ours!r}")
    return {
        "num_heads": config.get("nheads", HEADS),
        "dilation": bool(config.get("dilation", False)),
    }


def _named(arguments: Arguments) -> str | None:
    """The name of the backbone, if it has one."""
    own = {name: arguments[name] for name in _STRUCTURE}
    defaults = {name: FAMILIES["resnet"].defaults[name] for name in _STRUCTURE if name != "depths"}
    return next((name for name in _TIMM if {**defaults, **VARIANTS[name]} == own), None)


def decoder_size(arguments: Arguments, name: str) -> int:
    """The decoder's heads or mlp_width, which are the encoder's unless they are given."""
    return arguments.get(f"decoder_{name}") or arguments[_ENCODERS[name]]


_ENCODERS = {"heads": "num_heads", "mlp_width": "mlp_width"}


def _holds(names: Names, arguments: Arguments) -> bool:
    if names is _ORIGINAL:
        equal = all(decoder_size(arguments, n) == arguments[e] for n, e in _ENCODERS.items())
        named = equal and _named(arguments) in _TORCHVISION
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
        "encoder_attention_heads": a["num_heads"],
        "decoder_attention_heads": decoder_size(a, "heads"),
        "encoder_ffn_dim": a["mlp_width"],
        "decoder_ffn_dim": decoder_size(a, "mlp_width"),
        "num_channels": a["in_channels"],
    }
    if names.resnet == "timm":
        backbone = {"use_timm_backbone": True, "backbone": _named(a), "dilation": a["dilation"]}
        return config | backbone | {"use_pretrained_backbone": False}
    backbone = _RESNETS["transformers"].config(_backbone(names).arguments(a))
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
    inside = names if names is _ORIGINAL else replace(_MEMORY, resnet=names.resnet)
    layers = {
        f"{part}_{index}": name.replace("{i}", str(index)).rstrip(".")
        for part, name in (("encoder", inside.encoder), ("decoder", inside.decoder))
        for index in range(arguments[f"{part}_depth"])
    }
    return {
        **_backbone(inside).modules(arguments),
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
        unseen=("num_heads", "decoder_heads", "dilation"),
        config=own_config,
        modules=partial(_modules, names),
        fields=None if names is _ORIGINAL else _FIELDS,
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
