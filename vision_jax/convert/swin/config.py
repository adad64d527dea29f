"""What each library's config can say of a Swin, and what we write there."""

from typing import Any

from vision_jax.convert.fields import Fields
from vision_jax.convert.swin.names import windows_of
from vision_jax.convert.table import Arguments
from vision_jax.errors import UserError
from vision_jax.models.swin import EPSILON, VARIANTS, Swin

# transformers' names of activations by ours; timm's are ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
    "relu6": "relu6",
}
BUILDERS = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_s": "swinv2_small_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
}
_STRUCTURE = (
    "depths",
    "num_heads",
    "windows",
    "width",
    "version",
    "pretrained_windows",
    "patch_size",
    "mlp_ratio",
    "qkv_bias",
    "activation",
)
_DEFAULTS = {name: getattr(Swin, name) for name in _STRUCTURE if hasattr(Swin, name)}

FIELDS = Fields(
    types=("swin", "swinv2"),
    used="pretrained_window_sizes layer_norm_eps hidden_act",
    seen="image_size patch_size num_channels embed_dim depths num_heads window_size mlp_ratio "
    "qkv_bias",
    free="hidden_dropout_prob attention_probs_dropout_prob drop_path_rate initializer_range "
    "encoder_stride num_layers hidden_size stage_names out_features out_indices path_norm",
    only={"use_absolute_embeddings": (False,)},
)


def holds(library: str, arguments: Arguments) -> bool:
    a = arguments
    if a["always_partition"] or not _same_windows(a, library):
        return False
    if library == "transformers":
        return len(set(a["windows"])) == 1 and a["windows"][0][0] == a["windows"][0][1]
    plain = a["layer_norm_eps"] == EPSILON
    if a.get("head_size") and a["version"] == 2:  # which has no word for it anywhere
        return False
    if library == "timm":
        return plain and (a["version"] == 2 or a["activation"] == "gelu")
    fixed = a["activation"] == "gelu" and a["qkv_bias"] and not a["pretrained_windows"]
    return plain and fixed and len(set(a["windows"])) == 1


def _same_windows(arguments: Arguments, library: str) -> bool:
    """Whether such a model has the same windows by another library's rules."""
    if library == arguments["library"]:
        return True
    try:
        plan, theirs = windows_of(arguments), windows_of(arguments, library)
    except UserError:  # windows that are not square
        return False
    # What timm shifts before it pads comes out otherwise than what is shifted after padding.
    padded = any(
        any(side % most for side, most in zip(w.grid, w.size, strict=True)) and any(w.shift)
        for w in plan
    )
    return plan == theirs and not (padded and "timm" in (library, arguments["library"]))


def _named(arguments: Arguments) -> str | None:
    """timm's first architecture that this is, at whatever image size."""
    structure = {name: arguments[name] for name in _STRUCTURE}
    for name, known in VARIANTS.items():
        known = {**_DEFAULTS, **known}
        if all(known[key] == value for key, value in structure.items()):
            return name
    return None


def timm_config(arguments: Arguments) -> dict[str, Any]:
    a = arguments
    name = None if a.get("head_size") else _named(a)
    if name is not None:
        own = VARIANTS[name]["image_size"] == a["image_size"]
        size = {} if own else {"img_size": list(a["image_size"])}
        return {"architecture": name, "model_args": size}
    given = {
        "img_size": list(a["image_size"]),
        "patch_size": a["patch_size"],
        "embed_dim": a["width"],
        "depths": list(a["depths"]),
        "num_heads": list(a["num_heads"]),
        "window_size": [list(window) for window in a["windows"]],
        "mlp_ratio": a["mlp_ratio"],
        "qkv_bias": a["qkv_bias"],
    }
    if a["version"] == 1:
        if a.get("head_size"):
            given["head_dim"] = a["head_size"]
        return {"architecture": "swin_tiny_patch4_window7_224", "model_args": given}
    given |= {
        "act_layer": a["activation"],
        "pretrained_window_sizes": list(a["pretrained_windows"] or [0] * len(a["depths"])),
    }
    return {"architecture": "swinv2_tiny_window8_256", "model_args": given}


def torchvision_config(arguments: Arguments) -> dict[str, Any]:
    """A builder, or the class and its arguments, of which those in torchvision are named."""
    a = arguments
    for builder, name in BUILDERS.items():
        if _named(a) == name:
            return {"model": builder, "kwargs": {}}
    module = "torchvision.models.swin_transformer."
    given = {
        "patch_size": [a["patch_size"]] * 2,
        "embed_dim": a["width"],
        "depths": list(a["depths"]),
        "num_heads": list(a["num_heads"]),
        "window_size": list(a["windows"][0]),
        "mlp_ratio": a["mlp_ratio"],
    }
    if a["version"] == 2:
        given |= {
            "block": f"{module}SwinTransformerBlockV2",
            "downsample_layer": f"{module}PatchMergingV2",
        }
    return {"model": f"{module}SwinTransformer", "kwargs": given}


def transformers_config(arguments: Arguments) -> dict[str, Any]:
    a = arguments
    kind = "swin" if a["version"] == 1 else "swinv2"
    head = "ForImageClassification" if a["num_classes"] else "Model"
    square = a["image_size"][0] == a["image_size"][1]
    config = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}{head}"],
        "image_size": a["image_size"][0] if square else list(a["image_size"]),
        "patch_size": a["patch_size"],
        "embed_dim": a["width"],
        "depths": list(a["depths"]),
        "num_heads": list(a["num_heads"]),
        "window_size": a["windows"][0][0],
        "mlp_ratio": a["mlp_ratio"],
        "qkv_bias": a["qkv_bias"],
        "hidden_act": ACTIVATIONS[a["activation"]],
        "layer_norm_eps": a["layer_norm_eps"],
        "use_absolute_embeddings": False,
    }
    if kind == "swinv2":
        none = [0] * len(a["depths"])
        config["pretrained_window_sizes"] = list(a["pretrained_windows"] or none)
    return config
