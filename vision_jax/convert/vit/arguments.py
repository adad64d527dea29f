"""The arguments of `ViT`, from what comes with weights: our header, a config, names and shapes."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vision_jax.convert.engine import Rule, expand, tree_shapes
from vision_jax.convert.table import Metadata, Shapes, head_channels, pair, timm_arguments
from vision_jax.errors import UserError
from vision_jax.models.vit import VARIANTS

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu6": "relu6",
}

# Models whose heads are not 64 channels wide, by width.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
# Arguments of timm's that are read, or show in names and shapes.
TIMM_SEEN = (
    *("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm"),
    *("scale_attn_norm", "scale_mlp_norm", "proj_bias", "init_values", "class_token", "pos_embed"),
    *("no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm", "dynamic_img_pad"),
    *("act_layer", "global_pool"),
)

# What the name of a timm architecture says and its tensors don't; every match adds its arguments.
TIMM_FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"_clip_", {"layer_norm_eps": 1e-5}),
    (r"_quickgelu_", {"activation": "quick_gelu"}),
    (r"_gap_", {"pool": "avg"}),
    (r"^vit_base_patch16_gap_", {"num_heads": 16}),
    (r"^vit_giantopt_", {"num_heads": 16, "activation": "gelu_tanh"}),
    # The SigLIP 2 sizes; the first SigLIP's are exact in timm, though trained with tanh.
    (r"_patch32_siglip_|_so400m_patch16_siglip_", {"activation": "gelu_tanh"}),
    (r"_large_patch16_siglip_(gap_)?512$", {"activation": "gelu_tanh"}),
)
# Same tensors as a ViT, other arithmetic: reading them as a ViT would be silently wrong.
TIMM_OTHER = (
    r"_rpn_|_pe_|^vit_d?pwee_|^vit_d(wee|little)_|_(xp|relpos|srelpos|mci|rope)_|radio|^eva"
)


def infer_arguments(
    source: str,
    rules: Sequence[Rule],
    defaults: Mapping[str, Any],
    shapes: Shapes,
    metadata: Metadata,
) -> dict[str, Any]:
    """Arguments of `ViT`, num_classes and image_size included.

    Sizes come from the tensors' shapes; what shapes don't say (heads, activation, epsilon, pooling)
    from config.json, else from what the source's models have in common.

    Args:
      source: of the table.
      rules: of the table, without prefix, `{i}` for the block.
      defaults: what holds for such files unless their config says otherwise.
      shapes: of the file's tensors by name without prefix.
      metadata: "config" is config.json's contents.

    Raises:
      UserError: not a ViT, or one that this model cannot be.
    """
    depth = _depth(shapes, rules)
    ours = tree_shapes(shapes, expand(rules, depth))
    config = metadata.get("config", {})
    said = dict(defaults)
    if source == "timm":
        said |= _from_timm_config(config)
    elif source == "transformers":
        said |= _from_transformers_config(config)
    elif source == "torchvision" and isinstance(config.get("kwargs"), dict):
        said |= {
            name: config["kwargs"][name] for name in ("num_heads",) if name in config["kwargs"]
        }
    if "norm_pre/scale" in ours and source == "timm" and not config.get("architecture"):
        said.setdefault("layer_norm_eps", 1e-5)  # CLIP's towers
    return from_shapes(ours, depth, said)


def _depth(shapes: Shapes, rules: Sequence[Rule]) -> int:
    template = next(
        re.escape(rule.names[0]).replace(r"\{i\}", r"(\d+)")
        for rule in rules
        if rule.paths == ("block_{i}/norm1/scale",)
    )
    return sum(re.fullmatch(template, name) is not None for name in shapes)


def _from_timm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    name, given = timm_arguments({"config": config}, TIMM_SEEN)
    if re.search(TIMM_OTHER, name):
        raise UserError(f"timm's {name} computes otherwise than a ViT; it is not supported")
    said: dict[str, Any] = {}
    for pattern, arguments in TIMM_FAMILIES:
        if re.search(pattern, name):
            said |= arguments
    if name in VARIANTS:
        # Of another width the heads are still as many as the name says.
        said["num_heads"] = VARIANTS[name]["num_heads"]
    if match := re.search(r"_(\d{2,4})$", name):  # holds if the position embeddings agree
        said["image_size"] = pair(int(match[1]), "architecture")
    cfg = config.get("pretrained_cfg")
    if isinstance(cfg, dict) and isinstance(cfg.get("input_size"), list):
        said["image_size"] = tuple(cfg["input_size"][-2:])
    pool = given.get("global_pool", config.get("global_pool"))
    if pool in ("token", "avg", "map"):
        said["pool"] = pool
    elif pool:
        raise UserError(f"config.json: global_pool {pool!r} is none of token, avg, map")
    if "img_size" in given:
        said["image_size"] = pair(given["img_size"], "img_size")
    if "num_heads" in given:
        said["num_heads"] = given["num_heads"]
    if "act_layer" in given:
        said["activation"] = _activation(given["act_layer"])
    return said


def _from_transformers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    config = vision_config(config)
    said: dict[str, Any] = {}
    if "num_attention_heads" in config:
        said["num_heads"] = config["num_attention_heads"]
    if config.get("head_dim") is not None:
        said["head_size"] = config["head_dim"]
    if "layer_norm_eps" in config:
        said["layer_norm_eps"] = float(config["layer_norm_eps"])
    if "hidden_act" in config:
        said["activation"] = _activation(config["hidden_act"])
    if "image_size" in config:
        said["image_size"] = pair(config["image_size"], "image_size")
    return said


def vision_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a model with a text tower the image tower's, as transformers reads it."""
    tower = config.get("vision_config")
    older = config.get("vision_config_dict")  # which comes before the other
    if not (isinstance(tower, dict) or isinstance(older, dict)):
        return config
    return {**(tower or {}), **(older or {})}


def from_shapes(shapes: Shapes, depth: int, said: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ViT` from its parameters' shapes by path, and what these don't say.

    Raises:
      UserError: not a ViT, or one that this model cannot be.
    """
    for path in ("patch_embed/kernel", "block_0/mlp/fc1/kernel", "block_0/mlp/fc2/kernel"):
        if len(shapes.get(path, ())) < 2:
            raise UserError(f"the weights have nothing for {path}: not a ViT, or damaged")
    if "pos_embed" not in shapes or len(shapes["pos_embed"]) != 3:
        raise UserError("the weights have no learned position embeddings: not a ViT that we know")
    patch_height, patch_width, channels, width = shapes["patch_embed/kernel"]
    if patch_height != patch_width:
        raise UserError(f"patches of {patch_height} × {patch_width} pixels: only squares are known")
    mlp_width = shapes["block_0/mlp/fc2/kernel"][0]
    gated = shapes["block_0/mlp/fc1/kernel"][1] == 2 * mlp_width
    head = shapes.get("head/kernel", (width, 0))
    class_token = "cls_token" in shapes
    if head[0] == 2 * width:
        pool = "token_avg"
    elif "attn_pool/latent" in shapes:
        pool = "map"
    else:
        pool = said.get("pool", "token" if class_token else "avg")
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    prefix = int(class_token) + int("dist_token" in shapes) + registers
    image_size, position_prefix = _positions(shapes["pos_embed"][1], patch_height, prefix, said)
    num_heads = said["num_heads"] if "num_heads" in said else _heads(width)
    head_size = _head_size(shapes, width, num_heads, said.get("head_size"))
    return {
        "num_classes": head[1],
        "image_size": image_size,
        "patch_size": patch_height,
        "in_channels": channels,
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_width": mlp_width,
        **({"head_size": head_size} if head_size else {}),
        "pool": pool,
        "norm_after_pool": said.get("norm_after_pool", False),
        "class_token": class_token,
        "distillation_token": "dist_token" in shapes,
        "num_registers": registers,
        "position_prefix": position_prefix,
        "patch_bias": "patch_embed/bias" in shapes,
        "qkv_bias": "block_0/attn/qkv/bias" in shapes,
        "qk_norm": "block_0/attn/q_norm/scale" in shapes,
        "layer_scale": 1e-5 if "block_0/layer_scale1" in shapes else None,
        "pre_norm": "norm_pre/scale" in shapes,
        "activation": "silu" if gated else said.get("activation", "gelu"),
        "gated_mlp": gated,
        "head_bias": "head/bias" in shapes or "head/kernel" not in shapes,
        "layer_norm_eps": said.get("layer_norm_eps", 1e-6),
    }


def _head_size(shapes: Shapes, width: int, num_heads: int, told: Any) -> int | None:
    """Channels of a head of a pruned model; None: the width's share, as in all others.

    Raises:
      UserError: so many heads can't share the channels, or the config tells of others.
    """
    inner = shapes.get("block_0/attn/qkv/kernel", (width, 3 * width))[1] // 3
    found = head_channels(inner, num_heads) if told is not None or inner != width else None
    if told not in (None, found):
        raise UserError(
            f"config.json: head_dim {told!r}, and the tensors have {num_heads} heads of {found}"
        )
    return None if inner == width else found


def _heads(width: int) -> int:
    """Of 64 channels each, as every published ViT has them but for a few."""
    if width not in HEADS and width % 64:
        raise UserError(
            f"how many heads share {width} channels is not in the weights: put config.json with "
            '{"model_args": {"num_heads": 3}} (timm), {"num_attention_heads": 3} (transformers) or '
            '{"kwargs": {"num_heads": 3}} (torchvision) beside model.safetensors'
        )
    return HEADS.get(width, width // 64)


def _positions(
    length: int, patch: int, prefix: int, said: Mapping[str, Any]
) -> tuple[tuple[int, int], int]:
    """Image size in pixels and the number of prefix tokens with a position of their own."""
    prefixes = [said["position_prefix"]] if "position_prefix" in said else [prefix, 0]
    if "image_size" in said:
        height, width = said["image_size"]
        for own in prefixes:
            if (height // patch) * (width // patch) == length - own:
                return (height, width), own
    for own in prefixes:
        side = math.isqrt(max(length - own, 0))
        if side and side * side == length - own:
            return (side * patch, side * patch), own
    raise UserError(
        f"{length} position embeddings are no square grid, with or without {prefix} prefix tokens, "
        "and no config.json beside the weights says the image size"
    )


def _activation(name: Any) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: activation {name!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
