"""What each library's config can say of a ViT, what we write there, and what we read there."""

import math
from dataclasses import replace
from typing import Any

from vision_jax.convert.fields import Fields
from vision_jax.convert.table import Arguments
from vision_jax.models.vit import VARIANTS, ViT

# What a naming can hold ---------------------------------------------------------------------------

EPSILON = 1e-6
_PLAIN: dict[str, Any] = {
    "pool": "token",
    "norm_after_pool": False,
    "class_token": True,
    "distillation_token": False,
    "num_registers": 0,
    "position_prefix": 1,
    "patch_bias": True,
    "qkv_bias": True,
    "qk_norm": False,
    "layer_scale": False,
    "pre_norm": False,
    "activation": "gelu",
    "gated_mlp": False,
    "head_bias": True,
}
_MAP = {"pool": "map", "class_token": False, "position_prefix": 0}


def _differs(arguments: Arguments, **wanted: Any) -> set[str]:
    """Names of the arguments that are not a plain ViT's, but for what is `wanted` otherwise."""
    own = {name: arguments[name] for name in _PLAIN}
    own["layer_scale"] = own["layer_scale"] is not None
    own["head_bias"] = own["head_bias"] or not arguments["num_classes"]
    return {name for name, value in {**_PLAIN, **wanted}.items() if own[name] != value}


def _square(a: Arguments) -> bool:
    return a["image_size"][0] == a["image_size"][1]


def holds_timm(norm_after_pool: bool, a: Arguments) -> bool:
    tokens = a["class_token"] + a["distillation_token"] + a["num_registers"]
    # timm's configs have no word for an epsilon, a gated MLP or a LayerScale left out: they come
    # with the architectures that have them.
    epsilons = (EPSILON,) if a["gated_mlp"] or a["distillation_token"] else (EPSILON, 1e-5)
    gated = a["activation"] == "silu" and a["layer_scale"] is not None and a["pool"] != "map"
    distilled = not _differs(a, distillation_token=True, position_prefix=a["position_prefix"]) - {
        "qkv_bias",
        "qk_norm",
        "layer_scale",
        "activation",
    }
    return (
        a["norm_after_pool"] == norm_after_pool
        and a["layer_norm_eps"] in epsilons
        and a["patch_bias"] != a["pre_norm"]
        and (a["head_bias"] or not a["num_classes"])
        and a["pool"] in ("token", "avg", "map")
        and (a["class_token"] or a["pool"] != "token")
        and a["position_prefix"] in (0, tokens)
        and (gated or not a["gated_mlp"])
        and (bool(distilled and a["num_classes"]) or not a["distillation_token"])
    )


def holds_torchvision(a: Arguments) -> bool:
    whole = _square(a) and a["image_size"][0] % a["patch_size"] == 0
    return not _differs(a) and a["layer_norm_eps"] == EPSILON and bool(a["num_classes"]) and whole


def _swiglu_ratio(a: Arguments) -> int | None:
    """The whole mlp_ratio from which Dinov2Config derives the width of a gated MLP."""
    width = a["width"]
    rounded = {ratio: (int(width * ratio * 2 / 3) + 7) // 8 * 8 for ratio in range(1, 17)}
    return next((ratio for ratio, hidden in rounded.items() if hidden == a["mlp_width"]), None)


def holds_transformers(kind: str, a: Arguments) -> bool:
    head, bias = bool(a["num_classes"]), {"qkv_bias"}
    free = bias if a["gated_mlp"] else bias | {"activation"}
    if kind.startswith("dinov2"):
        wanted = {
            "layer_scale": True,
            "gated_mlp": "swiglu" in kind,
            "pool": "token_avg" if head else "token",
        }
        if "swiglu" in kind:
            wanted["activation"] = "silu"
            ratio: Any = _swiglu_ratio(a)
        else:
            ratio = a["mlp_width"] % a["width"] == 0
        # The one for another image size, which it takes any but a square for, wants a square grid.
        registers = ("registers" in kind) == bool(a["num_registers"]) and _square(a)
        return bool(ratio) and registers and not _differs(a, **wanted) - free - {"num_registers"}
    if kind in ("vit", "deit"):
        register = {"num_registers": 1, "position_prefix": 2} if kind == "deit" else {}
        return not _differs(a, **register) - free
    if kind == "deit_distilled":
        both = {"distillation_token": True, "position_prefix": 2}
        return head and not _differs(a, **both) - free
    if not _square(a):  # the towers know the side of a square
        return False
    if kind == "clip":
        pre_norm = {"pre_norm": True, "patch_bias": False}
        bare = not head or not a["head_bias"]
        return bare and not _differs(a, **pre_norm) - {"activation", "head_bias"}
    if kind == "siglip_classifier":
        mean = {**_MAP, "pool": "avg"}
        return head and not _differs(a, **mean) - {"activation"}
    return not head and not _differs(a, **_MAP) - {"activation"}


# What is written ---------------------------------------------------------------------------------

_DEFAULTS = {name: getattr(ViT, name) for name in _PLAIN} | {"layer_norm_eps": ViT.layer_norm_eps}
_SIZES = ("width", "depth", "num_heads", "mlp_width", "patch_size")


def _kind_of(arguments: Arguments) -> dict[str, Any]:
    known = {**_DEFAULTS, **arguments}
    known["layer_scale"] = known["layer_scale"] is not None
    return {name: known[name] for name in (*_DEFAULTS, *_SIZES)}


def _named(arguments: Arguments) -> str | None:
    """timm's architecture that this is: of the image size, or the first at another."""
    kind = _kind_of({name: arguments[name] for name in (*_DEFAULTS, *_SIZES)})
    names = [name for name, known in VARIANTS.items() if _kind_of(known) == kind]
    sized = [n for n in names if VARIANTS[n].get("image_size") == arguments["image_size"]]
    return next(iter(sized + names), None)


def _ratio(width: int, hidden: int) -> float:
    """A ratio that gives `hidden` when its product with the width is rounded down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def timm_config(a: Arguments) -> dict[str, Any]:
    name = _named(a)
    if name is not None:
        own = VARIANTS[name].get("image_size") == a["image_size"]
        size = {} if own else {"img_size": list(a["image_size"])}
        return {"architecture": name, "model_args": size}
    hidden = a["mlp_width"] * (1 + a["gated_mlp"])
    given = {
        "img_size": list(a["image_size"]),
        "patch_size": a["patch_size"],
        "embed_dim": a["width"],
        "depth": a["depth"],
        "num_heads": a["num_heads"],
        "mlp_ratio": _ratio(a["width"], hidden),
        "qkv_bias": a["qkv_bias"],
        "qk_norm": a["qk_norm"],
        "global_pool": a["pool"],
        "fc_norm": a["norm_after_pool"],
        "class_token": a["class_token"],
        "no_embed_class": a["position_prefix"] == 0,
        "reg_tokens": a["num_registers"],
        "pre_norm": a["pre_norm"],
        "act_layer": a["activation"],
    }
    if a["layer_scale"] is not None:
        given["init_values"] = a["layer_scale"]
    architecture = "vit_base_patch16_224"
    if a["gated_mlp"]:
        architecture = "vit_giant_patch14_dinov2"
    elif a["distillation_token"]:
        architecture = "deit_base_distilled_patch16_224"
    elif a["layer_norm_eps"] != EPSILON:
        architecture = "vit_base_patch16_clip_224"
    return {"architecture": architecture, "model_args": given}


BUILDERS = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
}


def torchvision_config(a: Arguments) -> dict[str, Any]:
    """A builder and the image size, or the class and all that it asks for."""
    size = {"image_size": a["image_size"][0]}
    for builder, name in BUILDERS.items():
        if all(VARIANTS[name][key] == a[key] for key in _SIZES):
            return {"model": builder, "kwargs": size}
    given = {
        "patch_size": a["patch_size"],
        "num_layers": a["depth"],
        "num_heads": a["num_heads"],
        "hidden_dim": a["width"],
        "mlp_dim": a["mlp_width"],
    }
    return {"model": "torchvision.models.VisionTransformer", "kwargs": {**size, **given}}


def hidden_act(activation: str) -> str:
    """transformers' name of an activation."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)


_MODEL_TYPES = {  # model_type, class with a head, class without
    "vit": ("vit", "ViTForImageClassification", "ViTModel"),
    "deit": ("deit", "DeiTForImageClassification", "DeiTModel"),
    "deit_distilled": ("deit", "DeiTForImageClassificationWithTeacher", ""),
    "dinov2": ("dinov2", "Dinov2ForImageClassification", "Dinov2Model"),
    "dinov2_registers": (
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersModel",
    ),
    "clip": ("clip_vision_model", "CLIPVisionModelWithProjection", "CLIPVisionModel"),
    "siglip": ("siglip_vision_model", "", "SiglipVisionModel"),
    "siglip_classifier": ("siglip", "SiglipForImageClassification", ""),
}


def transformers_config(kind: str, a: Arguments) -> dict[str, Any]:
    model_type, headed, headless = _MODEL_TYPES[kind.removesuffix("_swiglu")]
    config: dict[str, Any] = {
        "image_size": a["image_size"][0] if _square(a) else list(a["image_size"]),
        "patch_size": a["patch_size"],
        "hidden_size": a["width"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["num_heads"],
        "hidden_act": hidden_act(a["activation"]),
        "layer_norm_eps": a["layer_norm_eps"],
    }
    if model_type.startswith("dinov2"):
        ratio = _swiglu_ratio(a) if a["gated_mlp"] else a["mlp_width"] // a["width"]
        config |= {"mlp_ratio": ratio, "use_swiglu_ffn": a["gated_mlp"]}
        if model_type == "dinov2":
            config["use_mask_token"] = False
        else:
            config["num_register_tokens"] = a["num_registers"]
        config["layerscale_value"] = a["layer_scale"]
    else:
        config["intermediate_size"] = a["mlp_width"]
    if model_type in ("vit", "deit") or model_type.startswith("dinov2"):
        config["qkv_bias"] = a["qkv_bias"]
    if a.get("head_size") and "qkv_bias" in config:
        config["head_dim"] = a["head_size"]
    if kind == "clip" and a["num_classes"]:
        config["projection_dim"] = a["num_classes"]
    if kind == "siglip_classifier":
        # Its own attention pooling takes no part in the logits.
        tower = {**config, "num_channels": a["in_channels"], "vision_use_head": False}
        config = {"vision_config": tower}
    architecture = headed if a["num_classes"] else headless
    return {"model_type": model_type, "architectures": [architecture], **config}


# What is read ------------------------------------------------------------------------------------

_OF_ALL = "hidden_size num_hidden_layers num_attention_heads image_size patch_size num_channels"
_BLOCKS = Fields(
    used="hidden_act layer_norm_eps",
    seen=f"{_OF_ALL} intermediate_size qkv_bias head_dim",
    # Dropout, the pooler that is no part of the features, and the heads of pretraining.
    free="hidden_dropout_prob attention_probs_dropout_prob initializer_range encoder_stride "
    "pooler_output_size pooler_act decoder_num_attention_heads decoder_hidden_size "
    "decoder_num_hidden_layers decoder_intermediate_size mask_ratio norm_pix_loss",
)
_TOWER_FIELDS = Fields(
    used="hidden_act layer_norm_eps",
    seen=f"{_OF_ALL} intermediate_size projection_dim",
    free="attention_dropout dropout initializer_range initializer_factor logit_scale_init_value",
    only={"vision_use_head": (True,)},
)


def fields(kind: str) -> Fields:
    """What config.json may say beside such tensors."""
    if kind.startswith("deit"):
        return replace(_BLOCKS, types=("deit",))
    if kind.startswith("dinov2"):
        return Fields(
            types=("dinov2_with_registers" if "registers" in kind else "dinov2",),
            used="hidden_act layer_norm_eps",
            seen=f"{_OF_ALL} mlp_ratio use_swiglu_ffn num_register_tokens qkv_bias head_dim",
            free="hidden_dropout_prob attention_probs_dropout_prob initializer_range "
            "layerscale_value drop_path_rate apply_layernorm reshape_hidden_states use_mask_token "
            "stage_names out_features out_indices interpolate_antialias interpolate_offset",
        )
    if kind == "vit":
        return replace(_BLOCKS, types=("vit", "vit_mae"))
    name = kind.partition("_")[0]
    tower = replace(_TOWER_FIELDS, types=(f"{name}_vision_model", name))
    if kind == "siglip_classifier":  # its attention pooling takes no part
        tower = replace(tower, free=f"{tower.free} vision_use_head", only={})
    both = {"vision_config": tower, "vision_config_dict": tower}
    texts = "text_config text_config_dict projection_dim"
    return replace(tower, free=f"{tower.free} {texts}", inner=both)
