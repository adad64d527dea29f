"""The tables of Vision Transformers: a naming, its anchors, what it can hold and its config each.

`{p}` stands for the prefix of the file at hand, `{i}` for a block's index.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.engine import Fixed, Rule, Rules, affine, expand, one
from vision_jax.convert.table import Arguments, Table
from vision_jax.convert.vit import config, names, npz
from vision_jax.convert.vit.arguments import infer_arguments
from vision_jax.convert.vit.names import Unused

_CLIP_PATCHES = "{p}embeddings.patch_embedding.weight"
_TEXT_TOWER = (r"text_model\..*", r"text_projection\..*", "logit_scale", "logit_bias")
_INDICES = r"{p}embeddings\.position_ids"


def _table(
    source: str,
    kind: str,
    anchors: tuple[str, ...],
    rules: Sequence[Rule],
    defaults: Mapping[str, Any] | None = None,
    **more: Any,
) -> Table:
    bare = [_bare(rule) for rule in rules]

    def expanded(arguments: Arguments) -> Rules:
        fixed: list[Fixed] = []
        if kind.startswith("dinov2_registers"):
            width = arguments["width"]
            fixed.append(
                Unused("{p}embeddings.mask_token", lambda: np.zeros((1, width), np.float32))
            )
        return [*expand(rules, arguments["depth"]), *fixed]

    return Table(
        source,
        "vit",
        kind,
        anchors,
        arguments=partial(infer_arguments, source, bare, defaults or {}),
        rules=expanded,
        adapt=names.adapt,
        unseen=("num_heads", "activation", "pool", "layer_norm_eps"),
        **more,
    )


def _bare(rule: Rule) -> Rule:
    return replace(rule, names=tuple(name.replace("{p}", "") for name in rule.names))


def _transformers(
    kind: str,
    anchors: tuple[str, ...],
    rules: Sequence[Rule],
    modules: tuple[str, str, str],
    defaults: Mapping[str, Any],
    *,
    written: bool = True,
    **more: Any,
) -> Table:
    return _table(
        "transformers",
        kind if written else f"{kind} in memory",
        anchors,
        rules,
        defaults,
        holds=partial(config.holds_transformers, kind) if written else lambda arguments: False,
        config=partial(config.transformers_config, kind),
        modules=partial(names.modules, *modules),
        fields=config.fields(kind),
        **more,
    )


def _bert_tables(
    kind: str,
    rules: Callable[[bool], tuple[Rule, ...]],
    *anchors: str,
    prefix: str,
    heads: tuple[Rule, ...] = (),
    **defaults: Any,
) -> tuple[Table, Table]:
    """A ViT of transformers' as its files name it, and as it is named in memory."""
    blocks = "encoder.layer." if kind.startswith("dinov2") else "layers."
    modules = ("{p}embeddings", f"{{{{p}}}}{blocks}{{}}", "")

    def build(memory: bool) -> Table:
        block = f"{{p}}{blocks}0" if memory else "{p}encoder.layer.0"
        query = "attention.q_proj.weight" if memory else "attention.attention.query.weight"
        first = ["{p}embeddings.patch_embeddings.projection.weight", f"{block}.{query}"]
        if "swiglu" in kind:
            first.append(f"{block}.mlp.{'gate_proj' if memory else 'weights_in'}.weight")
        return _transformers(
            kind,
            (*first, *anchors),
            (*rules(memory), *heads),
            modules,
            defaults,
            written=not memory,
            prefixes=(prefix, ""),
            # ViTModel saves a pooler over its features, which is no part of them.
            pruned=("head_size",),
            dropped=(
                r"{p}embeddings\.(mask_token|position_ids)",
                r"{p}pooler\.dense\.(weight|bias)",
                r"decoder\..*",
            ),
        )

    return build(False), build(True)


_DISTILLATION = "{p}embeddings.distillation_token"
_TOWER: dict[str, Any] = {
    "prefixes": ("vision_model.", ""),
    "dropped": (*_TEXT_TOWER, _INDICES),
}

# The first whose anchors are all there is the one, so the special stand before the general.
TABLES = (
    *(
        _table(
            "timm",
            final_norm,
            ("patch_embed.proj.weight", "blocks.0.norm1.weight", *anchors),
            names.timm(final_norm),
            defaults,
            # MAE's and DINOv2's own pretraining files name their encoders as timm does, and so do
            # those of a run with a text tower.
            dropped=(
                "mask_token",
                r"decoder_.*",
                r"(dino|ibot)(_patch)?_(head|loss)\..*",
                r"projection_head\..*",  # of convert/simclr.py
                *_TEXT_TOWER,
            ),
            file_names=r"(vit|deit3?)_[a-z0-9_]+?(?=[-.]|$)",
            holds=partial(config.holds_timm, after),
            config=config.timm_config,
            modules=partial(names.modules, "norm_pre", "blocks.{}", "fc_norm"),
        )
        for final_norm, after, anchors, defaults in (
            ("fc_norm", True, ("fc_norm.weight",), {"norm_after_pool": True, "pool": "avg"}),
            ("norm", False, (), {}),
        )
    ),
    *(
        _table(
            "torchvision",
            kind,
            ("conv_proj.weight", f"encoder.layers.encoder_layer_0.mlp.{fc1}.weight"),
            names.torchvision(fc1, fc2),
            holds=config.holds_torchvision if kind == "torchvision" else lambda arguments: False,
            config=config.torchvision_config,
            modules=partial(
                names.modules, "encoder.dropout", "encoder.layers.encoder_layer_{}", ""
            ),
        )
        for kind, fc1, fc2 in (
            ("torchvision", "0", "3"),
            ("torchvision before 0.13", "linear_1", "linear_2"),  # the published files
        )
    ),
    *_bert_tables(
        "deit_distilled",
        names.transformers_vit,
        _DISTILLATION,
        "cls_classifier.weight",
        prefix="deit.",
        heads=(
            *one(_DISTILLATION, "dist_token"),
            *affine("cls_classifier", "head"),
            *affine("distillation_classifier", "head_dist"),
        ),
        layer_norm_eps=1e-12,
        position_prefix=2,
    ),
    *_bert_tables(
        "deit",  # with one head the distillation token is one register among the others
        names.transformers_vit,
        _DISTILLATION,
        prefix="deit.",
        heads=(*one(_DISTILLATION, "reg_token"), *affine("classifier", "head")),
        layer_norm_eps=1e-12,
        position_prefix=2,
    ),
    *(
        table
        for registers in (True, False)
        for gated in (True, False)
        for table in _bert_tables(
            f"dinov2{'_registers' if registers else ''}{'_swiglu' if gated else ''}",
            partial(names.dinov2, gated=gated),
            "{p}encoder.layer.0.layer_scale1.lambda1",
            *(["{p}embeddings.register_tokens"] if registers else []),
            prefix="dinov2_with_registers." if registers else "dinov2.",
            position_prefix=1,
        )
    ),
    *_bert_tables(
        "vit",  # and the encoder of MAE
        names.transformers_vit,
        prefix="vit.",
        heads=affine("classifier", "head"),
        layer_norm_eps=1e-12,
        position_prefix=1,
    ),
    _transformers(
        "clip",
        (_CLIP_PATCHES, "{p}embeddings.class_embedding"),
        (*names.clip_tower(), *affine("visual_projection", "head")),
        ("{p}pre_layrnorm", "{{p}}encoder.layers.{}", "{p}post_layernorm"),
        {"layer_norm_eps": 1e-5, "activation": "quick_gelu", "position_prefix": 1},
        **_TOWER,
    ),
    _transformers(
        "siglip_classifier",  # pools by the mean; its attention pooling is unused
        (_CLIP_PATCHES, "classifier.weight"),
        (*names.clip_tower(), *affine("classifier", "head")),
        ("{p}embeddings", "{{p}}encoder.layers.{}", ""),
        {"activation": "gelu_tanh", "position_prefix": 0, "pool": "avg"},
        prefixes=("vision_model.", ""),
        dropped=(r"{p}head\..*", *_TEXT_TOWER, _INDICES),
    ),
    _transformers(
        "siglip",
        (_CLIP_PATCHES,),
        (*names.clip_tower(), *names.siglip_pool()),
        ("{p}embeddings", "{{p}}encoder.layers.{}", "{p}head"),
        {"activation": "gelu_tanh", "position_prefix": 0},
        **_TOWER,
    ),
    *npz.TABLES,
)
