"""The tables of masked autoencoders, encoder and decoder.

Such a file is an encoder's too: `find_table` takes it for a ViT and leaves the decoder out, unless
it is asked for an MAE.

Sources: transformers 5.24 models/vit_mae; facebookresearch/mae models_mae.py, whose encoder has
timm's names. transformers from 5 on writes `decoder_encoder.layer` for the decoder's blocks, and
the published files, which it reads as well and older versions alone, have `decoder_layers`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.engine import Rule, Rules, affine, expand, fused, norm, one, tree_shapes
from vision_jax.convert.fields import Fields
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.convert.vit import config as vit_config
from vision_jax.convert.vit import names
from vision_jax.convert.vit.arguments import infer_arguments
from vision_jax.errors import UserError
from vision_jax.models.mae import DECODER
from vision_jax.ops.position_embedding import resample_positions

_BLOCK = f"{DECODER}block_{{i}}"


def _ends(prefix: str) -> tuple[Rule, ...]:
    """What stands before and after the decoder's blocks, alike in all files."""
    return (
        *one(f"{prefix}mask_token", f"{DECODER}mask_token"),
        *one(f"{prefix}decoder_pos_embed", f"{DECODER}pos_embed"),
        *affine(f"{prefix}decoder_embed", f"{DECODER}embed"),
        *norm(f"{prefix}decoder_norm", f"{DECODER}norm"),
        *affine(f"{prefix}decoder_pred", f"{DECODER}pred"),
    )


def _original() -> tuple[Rule, ...]:
    block = "decoder_blocks.{i}"
    return (
        *_ends(""),
        *norm(f"{block}.norm1", f"{_BLOCK}/norm1"),
        *affine(f"{block}.attn.qkv", f"{_BLOCK}/attn/qkv"),
        *affine(f"{block}.attn.proj", f"{_BLOCK}/attn/proj"),
        *norm(f"{block}.norm2", f"{_BLOCK}/norm2"),
        *affine(f"{block}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
        *affine(f"{block}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
    )


def _transformers(layers: str, memory: bool) -> tuple[Rule, ...]:
    block = f"decoder.{layers}.{{i}}"
    attention = f"{block}.attention"
    parts = [f"{attention}.{part}_proj" for part in "qkv"]
    proj, fc1, fc2 = f"{attention}.o_proj", f"{block}.mlp.fc1", f"{block}.mlp.fc2"
    if not memory:
        parts = [f"{attention}.attention.{part}" for part in ("query", "key", "value")]
        proj, fc1 = f"{attention}.output.dense", f"{block}.intermediate.dense"
        fc2 = f"{block}.output.dense"
    return (
        *_ends("decoder."),
        *norm(f"{block}.layernorm_before", f"{_BLOCK}/norm1"),
        *fused(parts, f"{_BLOCK}/attn/qkv"),
        *affine(proj, f"{_BLOCK}/attn/proj"),
        *norm(f"{block}.layernorm_after", f"{_BLOCK}/norm2"),
        *affine(fc1, f"{_BLOCK}/mlp/fc1"),
        *affine(fc2, f"{_BLOCK}/mlp/fc2"),
    )


def _arguments(
    source: str,
    encoder: tuple[Rule, ...],
    decoder: tuple[Rule, ...],
    defaults: dict[str, Any],
    shapes: Shapes,
    metadata: Metadata,
) -> dict[str, Any]:
    """A ViT's arguments, and the decoder's from its tensors and config.

    Raises:
      UserError: see vit.arguments.infer_arguments, or a decoder whose heads nothing tells.
    """
    found = infer_arguments(source, encoder, defaults, shapes, metadata)
    (first,) = (rule for rule in decoder if rule.paths == (f"{_BLOCK}/norm1/scale",))
    depth = 0
    while first.names[0].replace("{i}", str(depth)) in shapes:
        depth += 1
    ours = tree_shapes(shapes, expand(decoder, depth))
    width = ours[f"{DECODER}mask_token"][-1]
    hidden = ours.get(f"{DECODER}block_0/mlp/fc1/kernel", (0, 0))[1]
    heads = metadata.get("config", {}).get("decoder_num_attention_heads", width // 32)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(
            f"how many heads share the decoder's {width} channels is not in the weights: put "
            'config.json with {"decoder_num_attention_heads": 16} beside model.safetensors'
        )
    return {
        **found,
        "num_classes": 0,
        "decoder_width": width,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "decoder_mlp_width": hidden,
    }


def _adapt(path: str, array: np.ndarray, own: Arguments, wanted: Arguments) -> np.ndarray:
    """Position embeddings of both parts for another image size."""
    if path != f"{DECODER}pos_embed" or own["image_size"] == wanted["image_size"]:
        return names.adapt(path, array, own, wanted)
    old, new = (
        (a["image_size"][0] // a["patch_size"], a["image_size"][1] // a["patch_size"])
        for a in (own, wanted)
    )
    prefix = own["class_token"] + own["distillation_token"] + own["num_registers"]
    if array.ndim != 3 or array.shape[1] - prefix != old[0] * old[1]:
        return array  # the import reports its shape
    return resample_positions(array, old, new, prefix)


def _holds(a: Arguments) -> bool:
    """Whether transformers' ViTMAE is such a model: a plain ViT of square images inside."""
    square = a["image_size"][0] == a["image_size"][1]
    return square and vit_config.holds_transformers("vit", {**a, "num_classes": 0})


def _config(a: Arguments) -> dict[str, Any]:
    return {
        **vit_config.transformers_config("vit", {**a, "num_classes": 0}),
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        "decoder_hidden_size": a["decoder_width"],
        "decoder_num_hidden_layers": a["decoder_depth"],
        "decoder_num_attention_heads": a["decoder_num_heads"],
        "decoder_intermediate_size": a["decoder_mlp_width"],
        "norm_pix_loss": True,
    }


_SIZES = (
    "decoder_hidden_size decoder_num_hidden_layers decoder_num_attention_heads "
    "decoder_intermediate_size"
)


def _fields() -> Fields:
    known = vit_config.fields("vit")
    free = " ".join(name for name in known.free.split() if name not in _SIZES.split())
    return replace(known, types=("vit_mae",), seen=f"{known.seen} {_SIZES}", free=free)


def _modules(a: Arguments) -> dict[str, str]:
    return {
        "embed": "vit.embeddings",
        **{f"block_{i}": f"vit.layers.{i}" for i in range(a["depth"])},
        "encoded": "vit.layernorm",
    }


def _table(
    source: str,
    kind: str,
    encoder: tuple[Rule, ...],
    decoder: tuple[Rule, ...],
    defaults: dict[str, Any],
    anchors: tuple[str, ...],
    **more: Any,
) -> Table:
    encoder = tuple(
        replace(rule, names=tuple(name.replace("{p}", "vit.") for name in rule.names))
        for rule in encoder
    )

    def rules(arguments: Arguments) -> Rules:
        return [
            *expand(encoder, arguments["depth"]),
            *expand(decoder, arguments["decoder_depth"]),
        ]

    return Table(
        source,
        "mae",
        kind,
        anchors,
        arguments=partial(_arguments, source, encoder, decoder, defaults),
        rules=rules,
        adapt=_adapt,
        unseen=("num_heads", "decoder_num_heads", "activation", "layer_norm_eps"),
        **more,
    )


_BERT = {"layer_norm_eps": 1e-12, "position_prefix": 1}

TABLES = (
    *(
        _table(
            "transformers",
            kind,
            names.transformers_vit(memory),
            _transformers(layers, memory),
            _BERT,
            (
                "vit.embeddings.patch_embeddings.projection.weight",
                f"vit.{'layers' if memory else 'encoder.layer'}.0.layernorm_before.weight",
                f"decoder.{layers}.0.{query}.weight",
                "decoder.decoder_pred.weight",
            ),
            holds=_holds if kind == "vit_mae" else lambda arguments: False,
            config=_config,
            modules=_modules,
            fields=_fields(),
        )
        for kind, layers, memory, query in (
            ("vit_mae", "decoder_layers", False, "attention.attention.query"),
            ("vit_mae from 5 on", "decoder_encoder.layer", False, "attention.attention.query"),
            ("vit_mae in memory", "decoder_layers", True, "attention.q_proj"),
        )
    ),
    # The original's files; ours too, since these names have a place for every ViT.
    _table(
        "timm",
        "mae",
        names.timm("norm"),
        _original(),
        {},
        ("patch_embed.proj.weight", "decoder_embed.weight", "decoder_pred.weight"),
        holds=lambda arguments: False,  # timm has no decoder
    ),
)

ZOO = (
    Entry(
        "transformers/vit-mae-base-pretraining",
        "MAE",
        "ViTMAEForPreTraining",
        published="hf://facebook/vit-mae-base",
        license="apache-2.0",
        family="mae",
    ),
)
