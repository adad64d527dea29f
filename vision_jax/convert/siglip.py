"""The tables of SigLIP with both towers.

Such a file is an image tower's too: `find_table` takes it for a ViT and leaves the text out, unless
it is asked for a "siglip".

Source: transformers 5.24 models/siglip, which names the same in files and in memory.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from vision_jax.convert.engine import (
    ADD_1,
    Rule,
    Rules,
    affine,
    expand,
    fused,
    norm,
    one,
    tree_shapes,
)
from vision_jax.convert.fields import Fields
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.convert.vit import config as vit_config
from vision_jax.convert.vit import names
from vision_jax.convert.vit.arguments import ACTIVATIONS, infer_arguments
from vision_jax.errors import UserError
from vision_jax.models.siglip import LOGIT_BIAS, LOGIT_SCALE, TEXT

_BLOCK = f"{TEXT}block_{{i}}"
_LAYER = "text_model.encoder.layers.{i}"
_TOKENS, _LAST = "text_model.embeddings.token_embedding.weight", "text_model.head.weight"
_HEADS = 12  # of a text tower, where its config names none: transformers' SiglipTextConfig

_TEXT: tuple[Rule, ...] = (
    *one(_TOKENS, f"{TEXT}token_embed"),
    *one("text_model.embeddings.position_embedding.weight", f"{TEXT}pos_embed", ADD_1),
    *norm(f"{_LAYER}.layer_norm1", f"{_BLOCK}/norm1"),
    *fused([f"{_LAYER}.self_attn.{part}_proj" for part in "qkv"], f"{_BLOCK}/attn/qkv"),
    *affine(f"{_LAYER}.self_attn.out_proj", f"{_BLOCK}/attn/proj"),
    *norm(f"{_LAYER}.layer_norm2", f"{_BLOCK}/norm2"),
    *affine(f"{_LAYER}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
    *affine(f"{_LAYER}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
    *norm("text_model.final_layer_norm", f"{TEXT}norm"),
    *affine("text_model.head", f"{TEXT}head"),
    *one("logit_scale", LOGIT_SCALE),
    *one("logit_bias", LOGIT_BIAS),
)
_IMAGE = tuple(
    replace(rule, names=tuple(name.replace("{p}", "vision_model.") for name in rule.names))
    for rule in (*names.clip_tower(), *names.siglip_pool())
)


def _arguments(
    source: str,
    image: tuple[Rule, ...],
    defaults: dict[str, Any],
    shapes: Shapes,
    metadata: Metadata,
) -> dict[str, Any]:
    """A ViT's arguments, and the text tower's from its tensors and config.

    Raises:
      UserError: see vit.arguments.infer_arguments, or a text tower whose heads nothing tells.
    """
    found = infer_arguments(source, image, defaults, shapes, metadata)
    depth = 0
    while f"{_LAYER}.layer_norm1.weight".replace("{i}", str(depth)) in shapes:
        depth += 1
    ours = tree_shapes(shapes, expand(_TEXT, depth))
    vocab_size, width = ours[f"{TEXT}token_embed"]
    config = metadata.get("config", {}).get("text_config") or {}
    heads = config.get("num_attention_heads", _HEADS)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(
            f"how many heads share the text tower's {width} channels is not in the weights: put "
            'config.json with {"text_config": {"num_attention_heads": 12}} beside model.safetensors'
        )
    activation = config.get("hidden_act", "gelu_pytorch_tanh")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"config.json: text_config.hidden_act {activation!r} is none of "
            f"{', '.join(ACTIVATIONS)}"
        )
    return {
        **found,
        "num_classes": 0,
        "vocab_size": vocab_size,
        "text_length": ours.get(f"{TEXT}pos_embed", (1, 0))[1],
        "text_width": width,
        "text_depth": depth,
        "text_num_heads": heads,
        "text_mlp_width": ours.get(f"{TEXT}block_0/mlp/fc1/kernel", (0, 0))[1],
        "text_activation": ACTIVATIONS[activation],
        "text_layer_norm_eps": float(config.get("layer_norm_eps", 1e-6)),
    }


def _holds(a: Arguments) -> bool:
    """Whether transformers' SiglipModel is such a model: its own image tower, of square images."""
    return vit_config.holds_transformers("siglip", {**a, "num_classes": 0})


def _config(a: Arguments) -> dict[str, Any]:
    image = vit_config.transformers_config("siglip", {**a, "num_classes": 0})
    del image["architectures"]
    text = {
        "model_type": "siglip_text_model",
        "vocab_size": a["vocab_size"],
        "max_position_embeddings": a["text_length"],
        "hidden_size": a["text_width"],
        "intermediate_size": a["text_mlp_width"],
        "num_hidden_layers": a["text_depth"],
        "num_attention_heads": a["text_num_heads"],
        "hidden_act": vit_config.hidden_act(a["text_activation"]),
        "layer_norm_eps": a["text_layer_norm_eps"],
        "projection_size": a["width"],
    }
    return {
        "model_type": "siglip",
        "architectures": ["SiglipModel"],
        "text_config": text,
        "vision_config": {**image, "num_channels": a["in_channels"]},
    }


def _fields() -> Fields:
    known = vit_config.fields("siglip")
    text = Fields(
        types=("siglip_text_model",),
        used="hidden_act layer_norm_eps num_attention_heads",
        seen="vocab_size max_position_embeddings hidden_size intermediate_size num_hidden_layers "
        "projection_size",
        free="attention_dropout bos_token_id eos_token_id pad_token_id",
    )
    return replace(
        known, types=("siglip",), inner={"vision_config": known.inner["vision_config"],
                                         "text_config": text},
    )  # fmt: skip


def _modules(a: Arguments) -> dict[str, str]:
    return {
        "embed": "vision_model.embeddings",
        **{f"block_{i}": f"vision_model.encoder.layers.{i}" for i in range(a["depth"])},
        "pooled": "vision_model.head",
        "text_pooled": "text_model.head",
    }


def _table(
    source: str,
    image: tuple[Rule, ...],
    defaults: dict[str, Any],
    anchors: tuple[str, ...],
    **more: Any,
) -> Table:
    def rules(arguments: Arguments) -> Rules:
        return [*expand(image, arguments["depth"]), *expand(_TEXT, arguments["text_depth"])]

    return Table(
        source,
        "siglip",
        "siglip",
        (*anchors, _TOKENS, _LAST),
        arguments=partial(_arguments, source, image, defaults),
        rules=rules,
        adapt=names.adapt,
        unseen=("num_heads", "text_num_heads", "activation", "text_activation", "layer_norm_eps"),
        **more,
    )


TABLES = (
    _table(
        "transformers",
        _IMAGE,
        {"activation": "gelu_tanh", "position_prefix": 0},
        ("vision_model.embeddings.patch_embedding.weight", "vision_model.head.probe"),
        holds=_holds,
        config=_config,
        modules=_modules,
        fields=_fields(),
        dropped=(r"(text|vision)_model\.embeddings\.position_ids",),
    ),
    # Ours: timm has words for every ViT, and none for a text tower.
    _table(
        "timm",
        names.timm("norm"),
        {},
        ("patch_embed.proj.weight",),
        holds=lambda arguments: False,
    ),
)

ZOO = (
    Entry(
        "transformers/siglip-base-patch16-224-pairs",
        "SigLIP",
        "SiglipModel",
        published="hf://google/siglip-base-patch16-224",
        license="apache-2.0",
        family="siglip",
    ),
)
