"""Tables for Vision Transformers: timm, torchvision, and what transformers' save_pretrained writes.

`{p}` stands for the prefix of the file at hand (`vit.`, `vision_model.`, or nothing), `{i}` for a
block's index.

Sources: timm 1.0 vision_transformer.py and deit.py; torchvision 0.29 models/vision_transformer.py;
transformers 5.23 (the *files*: its modules are named differently in memory).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.engine import (
    ADD_1,
    ADD_2,
    CONV,
    LINEAR,
    SPLIT_BIAS,
    SPLIT_LINEAR,
    Rule,
    affine,
    expand,
    fused,
    norm,
    one,
)
from vision_jax.convert.table import Arguments, Table, fill_prefix
from vision_jax.convert.vit_arguments import infer_arguments
from vision_jax.ops.position_embedding import resample_positions


def _timm(final_norm: str) -> tuple[Rule, ...]:
    block = "blocks.{i}"
    return (
        *affine("patch_embed.proj", "patch_embed", CONV),
        *one("cls_token", "cls_token"),
        *one("dist_token", "dist_token"),
        *one("reg_token", "reg_token"),
        *one("pos_embed", "pos_embed"),
        *norm("norm_pre", "norm_pre"),
        *norm(f"{block}.norm1", "block_{i}/norm1"),
        *affine(f"{block}.attn.qkv", "block_{i}/attn/qkv"),
        *norm(f"{block}.attn.q_norm", "block_{i}/attn/q_norm"),
        *norm(f"{block}.attn.k_norm", "block_{i}/attn/k_norm"),
        *affine(f"{block}.attn.proj", "block_{i}/attn/proj"),
        *one(f"{block}.ls1.gamma", "block_{i}/layer_scale1"),
        *norm(f"{block}.norm2", "block_{i}/norm2"),
        *affine(f"{block}.mlp.fc1", "block_{i}/mlp/fc1"),
        *affine(f"{block}.mlp.fc2", "block_{i}/mlp/fc2"),
        *one(f"{block}.ls2.gamma", "block_{i}/layer_scale2"),
        *norm(final_norm, "norm"),
        *one("attn_pool.latent", "attn_pool/latent"),
        *affine("attn_pool.q", "attn_pool/q"),
        *affine("attn_pool.kv", "attn_pool/kv"),
        *affine("attn_pool.proj", "attn_pool/proj"),
        *norm("attn_pool.norm", "attn_pool/norm"),
        *affine("attn_pool.mlp.fc1", "attn_pool/mlp/fc1"),
        *affine("attn_pool.mlp.fc2", "attn_pool/mlp/fc2"),
        *affine("head", "head"),
        *affine("head_dist", "head_dist"),
    )


def _torchvision(fc1: str, fc2: str) -> tuple[Rule, ...]:
    block = "encoder.layers.encoder_layer_{i}"
    return (
        *affine("conv_proj", "patch_embed", CONV),
        *one("class_token", "cls_token"),
        *one("encoder.pos_embedding", "pos_embed"),
        *norm(f"{block}.ln_1", "block_{i}/norm1"),
        *one(f"{block}.self_attention.in_proj_weight", "block_{i}/attn/qkv/kernel", LINEAR),
        *one(f"{block}.self_attention.in_proj_bias", "block_{i}/attn/qkv/bias"),
        *affine(f"{block}.self_attention.out_proj", "block_{i}/attn/proj"),
        *norm(f"{block}.ln_2", "block_{i}/norm2"),
        *affine(f"{block}.mlp.{fc1}", "block_{i}/mlp/fc1"),
        *affine(f"{block}.mlp.{fc2}", "block_{i}/mlp/fc2"),
        *norm("encoder.ln", "norm"),
        *affine("heads.head", "head"),
    )


def _bert_embeddings() -> tuple[Rule, ...]:
    return (
        *affine("{p}embeddings.patch_embeddings.projection", "patch_embed", CONV),
        *one("{p}embeddings.cls_token", "cls_token"),
        *one("{p}embeddings.position_embeddings", "pos_embed"),
    )


def _bert_attention(block: str) -> tuple[Rule, ...]:
    parts = [f"{block}.attention.attention.{part}" for part in ("query", "key", "value")]
    return (
        *fused(parts, "block_{i}/attn/qkv"),
        *affine(f"{block}.attention.output.dense", "block_{i}/attn/proj"),
    )


def _transformers_vit() -> tuple[Rule, ...]:
    block = "{p}encoder.layer.{i}"
    return (
        *_bert_embeddings(),
        *norm(f"{block}.layernorm_before", "block_{i}/norm1"),
        *_bert_attention(block),
        *norm(f"{block}.layernorm_after", "block_{i}/norm2"),
        *affine(f"{block}.intermediate.dense", "block_{i}/mlp/fc1"),
        *affine(f"{block}.output.dense", "block_{i}/mlp/fc2"),
        *norm("{p}layernorm", "norm"),
    )


def _dinov2(fc1: str, fc2: str) -> tuple[Rule, ...]:
    block = "{p}encoder.layer.{i}"
    return (
        *_bert_embeddings(),
        *one("{p}embeddings.register_tokens", "reg_token"),
        *norm(f"{block}.norm1", "block_{i}/norm1"),
        *_bert_attention(block),
        *one(f"{block}.layer_scale1.lambda1", "block_{i}/layer_scale1"),
        *norm(f"{block}.norm2", "block_{i}/norm2"),
        *affine(f"{block}.mlp.{fc1}", "block_{i}/mlp/fc1"),
        *affine(f"{block}.mlp.{fc2}", "block_{i}/mlp/fc2"),
        *one(f"{block}.layer_scale2.lambda1", "block_{i}/layer_scale2"),
        *norm("{p}layernorm", "norm"),
        *affine("classifier", "head"),
    )


def _clip_tower() -> tuple[Rule, ...]:
    block = "{p}encoder.layers.{i}"
    parts = [f"{block}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    return (
        *affine("{p}embeddings.patch_embedding", "patch_embed", CONV),
        *one("{p}embeddings.class_embedding", "cls_token", ADD_2),
        *one("{p}embeddings.position_embedding.weight", "pos_embed", ADD_1),
        *norm("{p}pre_layrnorm", "norm_pre"),  # spelled so in the files
        *norm(f"{block}.layer_norm1", "block_{i}/norm1"),
        *fused(parts, "block_{i}/attn/qkv"),
        *affine(f"{block}.self_attn.out_proj", "block_{i}/attn/proj"),
        *norm(f"{block}.layer_norm2", "block_{i}/norm2"),
        *affine(f"{block}.mlp.fc1", "block_{i}/mlp/fc1"),
        *affine(f"{block}.mlp.fc2", "block_{i}/mlp/fc2"),
        *norm("{p}post_layernorm", "norm"),
    )


def _siglip_pool() -> tuple[Rule, ...]:
    in_proj = "{p}head.attention.in_proj"
    return (
        *one("{p}head.probe", "attn_pool/latent"),
        Rule((f"{in_proj}_weight",), ("attn_pool/q/kernel", "attn_pool/kv/kernel"), SPLIT_LINEAR),
        Rule((f"{in_proj}_bias",), ("attn_pool/q/bias", "attn_pool/kv/bias"), SPLIT_BIAS),
        *affine("{p}head.attention.out_proj", "attn_pool/proj"),
        *norm("{p}head.layernorm", "attn_pool/norm"),
        *affine("{p}head.mlp.fc1", "attn_pool/mlp/fc1"),
        *affine("{p}head.mlp.fc2", "attn_pool/mlp/fc2"),
    )


_BERT_PATCHES = "{p}embeddings.patch_embeddings.projection.weight"
_CLIP_PATCHES = "{p}embeddings.patch_embedding.weight"
_TEXT_TOWER = (r"text_model\..*", r"text_projection\..*", "logit_scale", "logit_bias")
_INDICES = r"{p}embeddings\.position_ids"


def adapt(path: str, array: np.ndarray, own: Arguments, wanted: Arguments) -> np.ndarray:
    """Position embeddings for another image size, resampled as timm does."""
    if path != "pos_embed" or own["image_size"] == wanted["image_size"]:
        return array
    patch = own["patch_size"]
    old, new = (
        tuple(side // patch for side in arguments["image_size"]) for arguments in (own, wanted)
    )
    tokens = own["class_token"] + own["distillation_token"] + own["num_registers"]
    prefix = own["position_prefix"] if tokens else 0
    if array.ndim != 3 or array.shape[1] - prefix != math.prod(old):
        return array  # the import reports its shape
    return resample_positions(array, old, new, prefix)


def _transformers_kind(arguments: Arguments) -> str:
    """Which of transformers' models a ViT is, as far as a naming can hold it."""
    if arguments["pre_norm"]:
        return "clip"
    if arguments["pool"] == "map":
        return "siglip"
    if arguments["layer_scale"] is not None:
        return "dinov2_swiglu" if arguments["gated_mlp"] else "dinov2"
    if arguments["distillation_token"]:
        return "deit_distilled"
    return "deit" if arguments["num_registers"] else "vit"


def _holds(source: str, kind: str, arguments: Arguments) -> bool:
    if source == "timm":
        return kind == ("fc_norm" if arguments["norm_after_pool"] else "norm")
    if source == "torchvision":
        return kind == "mlp.0"
    return kind == _transformers_kind(arguments)


def _vit_table(
    source: str,
    kind: str,
    anchors: tuple[str, ...],
    rules: Sequence[Rule],
    *,
    prefixes: tuple[str, ...] = ("",),
    dropped: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | tuple[tuple[str, Any], ...] = (),
) -> Table:
    return Table(
        source,
        "vit",
        kind,
        anchors,
        arguments=partial(infer_arguments, source, fill_prefix(rules, ""), dict(defaults)),
        rules=lambda arguments: expand(rules, arguments["depth"]),
        prefixes=prefixes,
        dropped=dropped,
        holds=partial(_holds, source, kind),
        adapt=adapt,
    )


# The first whose anchors are all there is the one, so the special stand before the general.
TABLES = (
    _vit_table(
        "timm",
        "fc_norm",
        ("patch_embed.proj.weight", "blocks.0.norm1.weight", "fc_norm.weight"),
        _timm("fc_norm"),
        defaults=(("norm_after_pool", True), ("pool", "avg")),
    ),
    _vit_table(
        "timm",
        "norm",
        ("patch_embed.proj.weight", "blocks.0.norm1.weight"),
        _timm("norm"),
        # MAE's and DINOv2's own pretraining files name their encoders as timm does.
        dropped=("mask_token", r"decoder_.*"),
    ),
    _vit_table(
        "torchvision",
        "mlp.0",
        ("conv_proj.weight", "encoder.layers.encoder_layer_0.mlp.0.weight"),
        _torchvision("0", "3"),
    ),
    _vit_table(
        "torchvision",
        "mlp.linear_1",  # the published files, from before torchvision 0.13
        ("conv_proj.weight", "encoder.layers.encoder_layer_0.mlp.linear_1.weight"),
        _torchvision("linear_1", "linear_2"),
    ),
    _vit_table(
        "transformers",
        "deit_distilled",
        (_BERT_PATCHES, "{p}embeddings.distillation_token", "cls_classifier.weight"),
        (
            *_transformers_vit(),
            *one("{p}embeddings.distillation_token", "dist_token"),
            *affine("cls_classifier", "head"),
            *affine("distillation_classifier", "head_dist"),
        ),
        prefixes=("deit.", ""),
        defaults=(("layer_norm_eps", 1e-12), ("position_prefix", 2)),
    ),
    _vit_table(
        "transformers",
        "deit",  # with one head the distillation token is one register among the others
        (_BERT_PATCHES, "{p}embeddings.distillation_token"),
        (
            *_transformers_vit(),
            *one("{p}embeddings.distillation_token", "reg_token"),
            *affine("classifier", "head"),
        ),
        prefixes=("deit.", ""),
        defaults=(("layer_norm_eps", 1e-12), ("position_prefix", 2)),
    ),
    _vit_table(
        "transformers",
        "dinov2_swiglu",
        (_BERT_PATCHES, "{p}encoder.layer.0.mlp.weights_in.weight"),
        _dinov2("weights_in", "weights_out"),
        prefixes=("dinov2.", "dinov2_with_registers.", ""),
        dropped=(r"{p}embeddings\.mask_token",),
        defaults=(("position_prefix", 1),),
    ),
    _vit_table(
        "transformers",
        "dinov2",
        (_BERT_PATCHES, "{p}encoder.layer.0.layer_scale1.lambda1"),
        _dinov2("fc1", "fc2"),
        prefixes=("dinov2.", "dinov2_with_registers.", ""),
        dropped=(r"{p}embeddings\.mask_token",),
        defaults=(("position_prefix", 1),),
    ),
    _vit_table(
        "transformers",
        "vit",  # and the encoder of MAE
        (_BERT_PATCHES, "{p}encoder.layer.0.layernorm_before.weight"),
        (*_transformers_vit(), *affine("classifier", "head")),
        prefixes=("vit.", ""),
        dropped=(r"decoder\..*", _INDICES),
        defaults=(("layer_norm_eps", 1e-12), ("position_prefix", 1)),
    ),
    _vit_table(
        "transformers",
        "clip",
        (_CLIP_PATCHES, "{p}embeddings.class_embedding"),
        (*_clip_tower(), *affine("visual_projection", "head")),
        prefixes=("vision_model.", ""),
        dropped=(*_TEXT_TOWER, _INDICES),
        defaults=(
            ("layer_norm_eps", 1e-5),
            ("activation", "quick_gelu"),
            ("position_prefix", 1),
        ),
    ),
    _vit_table(
        "transformers",
        "siglip_classifier",  # pools by the mean; its attention pooling is unused
        (_CLIP_PATCHES, "classifier.weight"),
        (*_clip_tower(), *affine("classifier", "head")),
        prefixes=("vision_model.", ""),
        dropped=(r"{p}head\..*", *_TEXT_TOWER, _INDICES),
        defaults=(("activation", "gelu_tanh"), ("position_prefix", 0), ("pool", "avg")),
    ),
    _vit_table(
        "transformers",
        "siglip",
        (_CLIP_PATCHES,),
        (*_clip_tower(), *_siglip_pool()),
        prefixes=("vision_model.", ""),
        dropped=(*_TEXT_TOWER, _INDICES),
        defaults=(("activation", "gelu_tanh"), ("position_prefix", 0)),
    ),
)
