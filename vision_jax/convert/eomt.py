"""Tables for EoMT, of which transformers has the files.

Source: transformers 5.24 models/eomt/modeling_eomt.py, whose files have the names of its modules,
the shares of masked queries (`attn_mask_probs`) and the weights of the classes' loss among them.
"""

import re
from typing import Any

import numpy as np

from vision_jax.convert.engine import CONV, Layout, Rule, Rules, affine, fused, norm, one
from vision_jax.convert.fields import Fields
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table, pair
from vision_jax.convert.vit import names as vit_names
from vision_jax.convert.vit.names import Unused
from vision_jax.errors import UserError
from vision_jax.models.eomt import VARIANTS

NO_OBJECT_WEIGHT = 0.1
HEAD_WIDTH = 64  # of the published models

_FIELDS = Fields(
    types=("eomt",),
    used="num_attention_heads image_size layer_norm_eps",
    seen="num_channels hidden_size num_hidden_layers patch_size mlp_ratio num_upscale_blocks "
    "num_blocks num_queries num_register_tokens",
    # Training and its loss.
    free="hidden_dropout_prob attention_dropout drop_path_rate initializer_range layerscale_value "
    "no_object_weight class_weight mask_weight dice_weight train_num_points oversample_ratio "
    "importance_sample_ratio",
    only={"hidden_act": ("gelu",), "use_swiglu_ffn": (False,)},
)
# A transposed convolution [in, out, 2, 2] as a product with [in, 2 · 2 · out].
_TRANSPOSED = Layout(
    lambda xs: [x.transpose(0, 2, 3, 1).reshape(x.shape[0], -1) for x in xs],
    lambda xs: [x.reshape(len(x), 2, 2, -1).transpose(0, 3, 1, 2) for x in xs],
)
_TABLE = Layout(lambda xs: [x[None] for x in xs], lambda xs: [x[0] for x in xs])


def _rules(arguments: Arguments) -> Rules:
    rules: list[Any] = [
        *one("embeddings.cls_token", "cls_token"),
        *one("embeddings.register_tokens", "reg_token"),
        *affine("embeddings.patch_embeddings.projection", "patch_embed", CONV),
        *one("embeddings.position_embeddings.weight", "pos_embed", _TABLE),
        *norm("layernorm", "norm"),
        *one("query.weight", "query_embed"),
    ]
    for index in range(arguments["depth"]):
        name, path = f"layers.{index}", f"block_{index}"
        rules += fused([f"{name}.attention.{part}_proj" for part in "qkv"], f"{path}/attn/qkv")
        rules += affine(f"{name}.attention.out_proj", f"{path}/attn/proj")
        for number in (1, 2):
            rules += norm(f"{name}.norm{number}", f"{path}/norm{number}")
            rules += affine(f"{name}.mlp.fc{number}", f"{path}/mlp/fc{number}")
            rules += one(f"{name}.layer_scale{number}.lambda1", f"{path}/layer_scale{number}")
    for index in range(arguments["upscale_blocks"]):
        name, path = f"upscale_block.block.{index}", f"mask_head/upscale_{index}"
        rules += one(f"{name}.conv1.weight", f"{path}/conv1/kernel", _TRANSPOSED)
        rules += one(f"{name}.conv1.bias", f"{path}/conv1_bias")
        rules += one(f"{name}.conv2.weight", f"{path}/conv_dw/kernel", CONV)
        rules += norm(f"{name}.layernorm2d", f"{path}/norm")
    for index in (1, 2, 3):
        rules += affine(f"mask_head.fc{index}", f"mask_head/fc{index}")
    rules += affine("class_predictor", "class_head")
    rules += one("attn_mask_probs", "mask_probs")
    rules.append(Rule(("attn_mask_count",), ("mask_count",), default=0, written=False))
    classes = arguments["num_classes"]

    def class_weights() -> np.ndarray:
        return np.asarray([*[1.0] * classes, NO_OBJECT_WEIGHT], np.float32)

    return [*rules, Unused("criterion.empty_weight", class_weights)]


def _from_file(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    config = metadata.get("config", {})
    if "layers.0.mlp.gate_proj.weight" in shapes:
        raise UserError("an EoMT with SwiGLU inside (giant): this model has none")

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in shapes)

    width, channels, patch, _ = shapes["embeddings.patch_embeddings.projection.weight"]
    patches = shapes["embeddings.position_embeddings.weight"][0]
    side = round(patches**0.5) * patch
    heads = config.get("num_attention_heads", width // HEAD_WIDTH)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(
            f"how many heads share {width} channels is not in the weights: put config.json with "
            '{"num_attention_heads": 16} beside model.safetensors'
        )
    return {
        "num_classes": shapes["class_predictor.weight"][0] - 1,
        "image_size": pair(config.get("image_size", side), "image_size"),
        "patch_size": patch,
        "in_channels": channels,
        "width": width,
        "depth": count(r"layers\.\d+\.norm1\.weight"),
        "num_heads": heads,
        "mlp_width": shapes["layers.0.mlp.fc1.weight"][0],
        "num_registers": shapes.get("embeddings.register_tokens", (1, 0))[1],
        "position_prefix": 0,
        "layer_scale": 1.0,
        "layer_norm_eps": config.get("layer_norm_eps", 1e-6),
        "num_queries": shapes["query.weight"][0],
        "num_blocks": shapes["attn_mask_probs"][0],
        "upscale_blocks": count(r"upscale_block\.block\.\d+\.conv1\.weight"),
    }


def _config(a: Arguments) -> dict[str, Any]:
    return {
        "model_type": "eomt",
        "architectures": ["EomtForUniversalSegmentation"],
        "hidden_size": a["width"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["num_heads"],
        "mlp_ratio": a["mlp_width"] // a["width"],
        "image_size": a["image_size"][0],
        "patch_size": a["patch_size"],
        "num_register_tokens": a["num_registers"],
        "layer_norm_eps": a["layer_norm_eps"],
        "num_queries": a["num_queries"],
        "num_blocks": a["num_blocks"],
        "num_upscale_blocks": a["upscale_blocks"],
        "no_object_weight": NO_OBJECT_WEIGHT,
        "hidden_act": "gelu",
        "use_swiglu_ffn": False,
    }


def _holds(a: Arguments) -> bool:
    """Whether transformers' EoMT is such a model: DINOv2's form of a ViT, of square images."""
    height, width = a["image_size"]
    fixed = {
        "class_token": True,
        "distillation_token": False,
        "position_prefix": 0,
        "patch_bias": True,
        "qkv_bias": True,
        "qk_norm": False,
        "pre_norm": False,
        "activation": "gelu",
        "gated_mlp": False,
    }
    plain = {name: a[name] for name in fixed} == fixed and a["layer_scale"] is not None
    return plain and height == width and a["mlp_width"] % a["width"] == 0 and a["num_registers"] > 0


def _modules(a: Arguments) -> dict[str, str]:
    blocks = {f"block_{index}": f"layers.{index}" for index in range(a["depth"])}
    return {"embed": "embeddings", **blocks, "normed": "layernorm"}


TABLES = (
    Table(
        "transformers",
        "eomt",
        "eomt",
        (
            "attn_mask_probs",
            "query.weight",
            "embeddings.patch_embeddings.projection.weight",
            "mask_head.fc1.weight",
            "class_predictor.weight",
        ),
        arguments=_from_file,
        rules=_rules,
        holds=_holds,
        config=_config,
        modules=_modules,
        adapt=vit_names.adapt,
        fields=_FIELDS,
        unseen=("num_heads", "layer_norm_eps"),
    ),
)


def _entry(name: str, published: str, classes: int) -> Entry:
    a = VARIANTS[name]
    given = {
        "hidden_size": a["width"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["num_heads"],
        "image_size": a["image_size"][0],
        "num_blocks": a["num_blocks"],
        "num_labels": classes,
    }
    return Entry(
        f"transformers/{published}",
        "EoMT",
        "EomtForUniversalSegmentation",
        tuple(given.items()),
        reduced=(("num_hidden_layers", 6),) if a["depth"] > 12 else (),
        image_size=a["image_size"][0],
        published=f"hf://tue-mps/{published}",
        license="mit",
    )


ZOO = (
    _entry("eomt_small_640", "coco_panoptic_eomt_small_640_2x", 133),
    _entry("eomt_base_640", "coco_panoptic_eomt_base_640_2x", 133),
    _entry("eomt_large_640", "coco_panoptic_eomt_large_640", 133),
    _entry("eomt_large_1280", "coco_panoptic_eomt_large_1280", 133),
)
