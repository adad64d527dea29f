"""The table for RF-DETR: transformers' files and those of the package rfdetr name alike.

Sources: transformers 5.24 models/rf_detr/modeling_rf_detr.py and conversion_mapping.py; rfdetr 1.11
config.py, models/. A `.pth` of rfdetr holds {"model": tensors, ...} and no config.json is beside
it: what its tensors don't tell is the published variants'.
"""

import math
import re
from typing import Any

import numpy as np

from vision_jax.convert.engine import (
    CONV,
    Fixed,
    Layout,
    Rule,
    Rules,
    affine,
    fused,
    norm,
    one,
)
from vision_jax.convert.fields import Fields
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.convert.vit.names import Unused
from vision_jax.errors import UserError
from vision_jax.models.rf_detr import VARIANTS, RfDetr
from vision_jax.models.vit import SIZES

_ENCODER = "{p}backbone.0.encoder.encoder."
_PROJECTOR = "{p}backbone.0.projector.stages.0."
# torch's packed attention in three of ours: [3·D, D], [D, D] × 3.
_PACKED_LINEAR = Layout(
    lambda xs: [part.T for part in np.split(xs[0], 3)],
    lambda xs: [np.concatenate([x.T for x in xs])],
)
_PACKED_BIAS = Layout(lambda xs: np.split(xs[0], 3), lambda xs: [np.concatenate(xs)])
_FIELDS = Fields(
    types=("rf_detr",),
    used="layer_norm_eps decoder_self_attention_heads decoder_cross_attention_heads "
    "decoder_n_points",
    seen="hidden_expansion c2f_num_blocks d_model decoder_ffn_dim decoder_layers num_queries "
    "group_detr",
    # Training, the loss, and the heads for masks.
    free="dropout attention_dropout activation_dropout init_std disable_custom_kernels class_cost "
    "bbox_cost giou_cost class_loss_coefficient dice_loss_coefficient bbox_loss_coefficient "
    "giou_loss_coefficient eos_coefficient focal_alpha auxiliary_loss mask_loss_coefficient "
    "mask_point_sample_ratio mask_downsample_ratio mask_class_loss_coefficient "
    "mask_dice_loss_coefficient segmentation_head_activation_function intermediate_size",
    only={
        "activation_function": ("silu",),
        "decoder_activation_function": ("relu",),
        "attention_bias": (True,),
        "num_feature_levels": (1,),
    },
    inner={
        "backbone_config": Fields(
            types=("rf_detr_dinov2",),
            used="num_attention_heads num_windows out_features out_indices window_block_indexes",
            seen="image_size patch_size num_channels hidden_size num_hidden_layers mlp_ratio",
            free="hidden_dropout_prob attention_probs_dropout_prob initializer_range "
            "layerscale_value drop_path_rate use_mask_token stage_names",
            only={
                "hidden_act": ("gelu",),
                "use_swiglu_ffn": (False,),
                "qkv_bias": (True,),
                "apply_layernorm": (True,),
                "reshape_hidden_states": (True,),
                "layer_norm_eps": (1e-6,),
                "num_register_tokens": (0,),
            },
        )
    },
)


def _rules(arguments: Arguments) -> Rules:
    rules: list[Rule | Fixed] = [
        *affine(f"{_ENCODER}embeddings.patch_embeddings.projection", "backbone/patch_embed", CONV),
        *one(f"{_ENCODER}embeddings.cls_token", "backbone/cls_token"),
        *one(f"{_ENCODER}embeddings.position_embeddings", "backbone/pos_embed"),
        *norm(f"{_ENCODER}layernorm", "backbone/norm"),
    ]
    for index in range(arguments["backbone_depth"]):
        name, path = f"{_ENCODER}encoder.layer.{index}", f"backbone/block_{index}"
        parts = [f"{name}.attention.attention.{part}" for part in ("query", "key", "value")]
        rules += fused(parts, f"{path}/attn/qkv")
        rules += affine(f"{name}.attention.output.dense", f"{path}/attn/proj")
        for number in (1, 2):
            rules += norm(f"{name}.norm{number}", f"{path}/norm{number}")
            rules += affine(f"{name}.mlp.fc{number}", f"{path}/mlp/fc{number}")
            rules += one(f"{name}.layer_scale{number}.lambda1", f"{path}/layer_scale{number}")
    rules += _projector_rules(arguments["projector_blocks"])
    for index in range(arguments["decoder_depth"]):
        rules += _decoder_rules(f"{{p}}transformer.decoder.layers.{index}", f"decoder_{index}")
    rules += norm("{p}transformer.decoder.norm", "decoder_norm")
    for index in (1, 2):
        name = f"{{p}}transformer.decoder.ref_point_head.layers.{index - 1}"
        rules += affine(name, f"position_fc{index}")
    rules += one("{p}query_feat.weight", "query_embed")
    rules += one("{p}refpoint_embed.weight", "box_embed")
    rules += _head_rules("{p}class_embed", "{p}bbox_embed", "")
    for index in range(arguments["num_groups"]):
        path = f"proposals_{index}"
        rules += affine(f"{{p}}transformer.enc_output.{index}", f"{path}/proj")
        rules += norm(f"{{p}}transformer.enc_output_norm.{index}", f"{path}/norm")
        rules += _head_rules(
            f"{{p}}transformer.enc_out_class_embed.{index}",
            f"{{p}}transformer.enc_out_bbox_embed.{index}",
            f"{path}/",
        )
    width = arguments["backbone_width"]
    token = f"{_ENCODER}embeddings.mask_token"
    return [*rules, Unused(token, lambda: np.zeros((1, width), np.float32))]


def _projector_rules(blocks: int) -> list[Rule]:
    def conv_norm(name: str, path: str, index: int) -> tuple[Rule, ...]:
        return (
            *one(f"{_PROJECTOR}{name}cv{index}.conv.weight", f"{path}/conv{index}/kernel", CONV),
            *norm(f"{_PROJECTOR}{name}cv{index}.bn", f"{path}/norm{index}"),
        )

    rules = [*norm(f"{_PROJECTOR}1", "projector/norm")]
    for index in (1, 2):
        rules += conv_norm("0.", "projector", index)
        for block in range(blocks):
            rules += conv_norm(f"0.m.{block}.", f"projector/block_{block}", index)
    return rules


def _decoder_rules(name: str, path: str) -> list[Rule]:
    parts = [f"{path}/self_attn/{part}" for part in ("q", "k", "v")]
    kernels, biases = (tuple(f"{part}/{leaf}" for part in parts) for leaf in ("kernel", "bias"))
    packed = [
        Rule((f"{name}.self_attn.in_proj_weight",), kernels, _PACKED_LINEAR),
        Rule((f"{name}.self_attn.in_proj_bias",), biases, _PACKED_BIAS),
    ]
    rules = [*packed, *affine(f"{name}.self_attn.out_proj", f"{path}/self_attn/out")]
    for theirs, ours in (
        ("sampling_offsets", "offsets"),
        ("attention_weights", "weights"),
        ("value_proj", "value"),
        ("output_proj", "out"),
    ):
        rules += affine(f"{name}.cross_attn.{theirs}", f"{path}/cross_attn/{ours}")
    for index in (1, 2):
        rules += affine(f"{name}.linear{index}", f"{path}/fc{index}")
    for index in (1, 2, 3):
        rules += norm(f"{name}.norm{index}", f"{path}/norm{index}")
    return rules


def _head_rules(classes: str, boxes: str, path: str) -> list[Rule]:
    rules = [*affine(classes, f"{path}class_head")]
    for index in (1, 2, 3):
        rules += affine(f"{boxes}.layers.{index - 1}", f"{path}box_head/fc{index}")
    return rules


def _from_file(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    if other := next((n for n in shapes if n.startswith(("segmentation_head", "keypoint"))), None):
        raise UserError(f"{other}: an RF-DETR for masks or keypoints; the one here finds boxes")
    if any(".stages.1." in name or "register" in name for name in shapes):
        raise UserError(
            "an RF-DETR of several scales or with register tokens (rfdetr's first large): this "
            "model is nano, small, medium, large of 2026 and base"
        )
    encoder, decoder = _ENCODER.removeprefix("{p}"), "transformer.decoder.layers"
    patch = shapes[f"{encoder}embeddings.patch_embeddings.projection.weight"]
    positions = shapes[f"{encoder}embeddings.position_embeddings"][1] - 1

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in shapes)

    groups = count(r"transformer\.enc_output\.\d+\.weight")
    width = shapes["class_embed.weight"][1]
    grid = round(positions**0.5)
    arguments: dict[str, Any] = {
        "num_classes": shapes["class_embed.weight"][0],
        "in_channels": patch[1],
        "position_grid": grid,
        "patch_size": patch[2],
        "backbone_width": patch[0],
        "backbone_depth": count(r".*\.encoder\.layer\.\d+\.norm1\.weight"),
        "backbone_mlp_width": shapes[f"{encoder}encoder.layer.0.mlp.fc1.weight"][0],
        "width": width,
        "projector_width": shapes["backbone.0.projector.stages.0.0.cv1.conv.weight"][0] // 2,
        "projector_blocks": count(r".*\.0\.m\.\d+\.cv1\.bn\.weight"),
        "decoder_depth": count(r".*\.decoder\.layers\.\d+\.norm1\.weight"),
        "mlp_width": shapes[f"{decoder}.0.linear1.weight"][0],
        "num_groups": groups,
        "num_queries": shapes["query_feat.weight"][0] // groups,
    }
    if "config" in metadata:
        arguments |= _from_config(metadata["config"], arguments)
    else:
        sizes = {size[0]: size[2] for size in SIZES.values()}
        if patch[0] not in sizes:
            raise UserError(f"a backbone of width {patch[0]}: put transformers' config.json beside")
        base = VARIANTS["rf_detr_base"]
        kept = ("num_windows", "feature_depths", "global_blocks")
        arguments |= {name: base[name] for name in kept if patch[2] == base["patch_size"]}
        reads = shapes[f"{decoder}.0.cross_attn.attention_weights.weight"][0]
        arguments["backbone_heads"] = sizes[patch[0]]
        arguments["num_points"] = reads // RfDetr.cross_heads
    # The table's size, or the next that its windows divide: 560 pixels for base's 37 · 14 = 518.
    unit = patch[2] * arguments.get("num_windows", RfDetr.num_windows)
    return {**arguments, "image_size": (math.ceil(grid * patch[2] / unit) * unit,) * 2}


def _from_config(config: dict[str, Any], arguments: Arguments) -> dict[str, Any]:
    """What only config.json says; where it is silent, transformers' defaults."""
    absent = {"num_attention_heads": 6, "out_features": ["stage2", "stage5", "stage8", "stage11"]}
    backbone: dict[str, Any] = config.get("backbone_config") or absent
    depth = arguments["backbone_depth"]
    stages = ["stem", *(f"stage{index}" for index in range(1, depth + 1))]
    if names := backbone.get("out_features"):
        if unknown := [name for name in names if name not in stages]:
            raise UserError(f"config.json: out_features {unknown[0]!r} is none of {depth} blocks'")
        features = [stages.index(name) for name in names]
    else:
        features = [index % len(stages) for index in backbone.get("out_indices") or [depth]]
    windowed = backbone.get("window_block_indexes")
    if windowed is None:
        windowed = set(range(features[-1] + 1)) - set(features)
    return {
        "num_windows": backbone.get("num_windows", 4),
        "backbone_heads": backbone.get("num_attention_heads", 12),
        "feature_depths": tuple(features),
        "global_blocks": tuple(index for index in range(depth) if index not in windowed),
        "projector_eps": config.get("layer_norm_eps", 1e-5),
        "num_heads": config.get("decoder_self_attention_heads", 8),
        "cross_heads": config.get("decoder_cross_attention_heads", 16),
        "num_points": config.get("decoder_n_points", 4),
    }


def _config(a: Arguments) -> dict[str, Any]:
    stages = ["stem", *(f"stage{index}" for index in range(1, a["backbone_depth"] + 1))]
    return {
        "model_type": "rf_detr",
        "architectures": ["RfDetrForObjectDetection"],
        "backbone_config": {
            "model_type": "rf_detr_dinov2",
            "image_size": a["position_grid"] * a["patch_size"],
            "patch_size": a["patch_size"],
            "num_channels": a["in_channels"],
            "hidden_size": a["backbone_width"],
            "num_hidden_layers": a["backbone_depth"],
            "num_attention_heads": a["backbone_heads"],
            "mlp_ratio": a["backbone_mlp_width"] // a["backbone_width"],
            "num_windows": a["num_windows"],
            "out_features": [stages[index] for index in a["feature_depths"]],
            "out_indices": list(a["feature_depths"]),
            "window_block_indexes": [
                index for index in range(a["backbone_depth"]) if index not in a["global_blocks"]
            ],
        },
        "layer_norm_eps": a["projector_eps"],
        "hidden_expansion": a["projector_width"] / a["width"],
        "c2f_num_blocks": a["projector_blocks"],
        "d_model": a["width"],
        "decoder_ffn_dim": a["mlp_width"],
        "decoder_layers": a["decoder_depth"],
        "decoder_self_attention_heads": a["num_heads"],
        "decoder_cross_attention_heads": a["cross_heads"],
        "decoder_n_points": a["num_points"],
        "num_queries": a["num_queries"],
        "group_detr": a["num_groups"],
        "dropout": 0.0,
    }


def _holds(a: Arguments) -> bool:
    expansion = a["projector_width"] / a["width"]
    whole = a["backbone_mlp_width"] % a["backbone_width"] == 0
    return whole and int(a["width"] * expansion) == a["projector_width"]


def _modules(a: Arguments) -> dict[str, str]:
    decoder = {f"decoder_{i}": "model.decoder.layernorm" for i in range(a["decoder_depth"])}
    return {"memory": "model.backbone.projector", **dict(list(decoder.items())[-1:])}


TABLES = (
    Table(
        "transformers",
        "rf_detr",
        "rf_detr",
        (
            f"{_ENCODER}embeddings.position_embeddings",
            f"{_PROJECTOR}0.cv1.conv.weight",
            "{p}transformer.enc_output.0.weight",
            "{p}refpoint_embed.weight",
            "{p}class_embed.weight",
        ),
        arguments=_from_file,
        rules=_rules,
        dropped=(r"{p}backbone\.0\..*mask_token", "{p}_kp_active_mask"),
        prefixes=("", "model."),  # Lightning's checkpoints
        holds=_holds,
        config=_config,
        modules=_modules,
        fields=_FIELDS,
        unseen=("num_heads", "cross_heads", "num_windows", "feature_depths", "projector_eps"),
    ),
)


def _entries() -> tuple[Entry, ...]:
    entries = []
    for name, a in VARIANTS.items():
        model = RfDetr(num_classes=91, **a)
        side = model.image_size[0]
        backbone = {
            "model_type": "rf_detr_dinov2",
            "hidden_size": model.backbone_width,
            "num_attention_heads": model.backbone_heads,
            "patch_size": model.patch_size,
            # Base's own table is of 37 · 14 pixels, and transformers resamples it in float32.
            "image_size": side,
            "num_windows": model.num_windows,
            "out_features": [f"stage{depth}" for depth in model.feature_depths],
        }
        given = {
            "backbone_config": backbone,
            "layer_norm_eps": model.projector_eps,
            "decoder_layers": model.decoder_depth,
            "decoder_n_points": model.num_points,
            "num_labels": model.num_classes,
        }
        entries.append(
            Entry(
                f"transformers/{name.replace('_', '-')}",
                "RF-DETR",
                "RfDetrForObjectDetection",
                tuple(given.items()),
                image_size=side,
                published=f"hf://Roboflow/{name.replace('_', '-')}",
                license="apache-2.0",
            )
        )
    return tuple(entries)


ZOO = _entries()
