"""Tables for Vision Transformers: timm, torchvision, and what transformers' save_pretrained writes.

`{p}` stands for the prefix of the file at hand (`vit.`, `vision_model.`, or nothing), `{i}` for a
block's index. convert/vit_npz.py has those of AugReg's and big_vision's files.

Sources: timm 1.0 vision_transformer.py and deit.py; torchvision 0.29 models/vision_transformer.py;
transformers 5.23 models/vit, deit, vit_mae, dinov2, dinov2_with_registers, clip and siglip, whose
files name what is in memory otherwise ("in memory" below: what torch.save(model.state_dict())
writes).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert import vit_npz
from vision_jax.convert.engine import (
    ADD_1,
    ADD_2,
    CONV,
    LINEAR,
    SPLIT_BIAS,
    SPLIT_LINEAR,
    Fixed,
    Layout,
    Rule,
    Rules,
    affine,
    expand,
    fused,
    norm,
    one,
)
from vision_jax.convert.fields import Fields
from vision_jax.convert.table import Arguments, Entry, Table
from vision_jax.convert.vit_arguments import infer_arguments
from vision_jax.models.vit import VARIANTS, ViT
from vision_jax.ops.position_embedding import resample_positions

_IN_FILES = {
    "qkv": ("attention.query", "attention.key", "attention.value"),
    "proj": "output.dense",
}
_IN_MEMORY = {"qkv": ("q_proj", "k_proj", "v_proj"), "proj": "o_proj"}

# Two layers side by side in one of ours: [in, out] x 2, [in, 2·out].
JOIN_LINEAR = Layout(
    lambda xs: [np.concatenate([x.T for x in xs], axis=1)],
    lambda xs: [part.T for part in np.split(xs[0], 2, axis=1)],
)
JOIN_BIAS = Layout(lambda xs: [np.concatenate(xs)], lambda xs: np.split(xs[0], 2))


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


def _bert(block: str, memory: bool) -> tuple[Rule, ...]:
    """Embeddings and attention of transformers' ViTs, as in their files or in memory."""
    names = _IN_MEMORY if memory else _IN_FILES
    return (
        *affine("{p}embeddings.patch_embeddings.projection", "patch_embed", CONV),
        *one("{p}embeddings.cls_token", "cls_token"),
        *one("{p}embeddings.position_embeddings", "pos_embed"),
        *fused([f"{block}.attention.{part}" for part in names["qkv"]], "block_{i}/attn/qkv"),
        *affine(f"{block}.attention.{names['proj']}", "block_{i}/attn/proj"),
        *norm("{p}layernorm", "norm"),
    )


def _transformers_vit(memory: bool) -> tuple[Rule, ...]:
    block = "{p}layers.{i}" if memory else "{p}encoder.layer.{i}"
    fc1, fc2 = ("mlp.fc1", "mlp.fc2") if memory else ("intermediate.dense", "output.dense")
    return (
        *_bert(block, memory),
        *norm(f"{block}.layernorm_before", "block_{i}/norm1"),
        *norm(f"{block}.layernorm_after", "block_{i}/norm2"),
        *affine(f"{block}.{fc1}", "block_{i}/mlp/fc1"),
        *affine(f"{block}.{fc2}", "block_{i}/mlp/fc2"),
    )


def _dinov2(memory: bool, gated: bool) -> tuple[Rule, ...]:
    block = "{p}encoder.layer.{i}"
    fc1, fc2 = ("weights_in", "weights_out") if gated else ("fc1", "fc2")
    mlp: tuple[Rule, ...] = (
        *affine(f"{block}.mlp.{fc1}", "block_{i}/mlp/fc1"),
        *affine(f"{block}.mlp.{fc2}", "block_{i}/mlp/fc2"),
    )
    if gated and memory:
        parts = [f"{block}.mlp.{part}_proj" for part in ("gate", "up")]
        weights, biases = (tuple(f"{part}.{kind}" for part in parts) for kind in ("weight", "bias"))
        mlp = (
            Rule(weights, ("block_{i}/mlp/fc1/kernel",), JOIN_LINEAR),
            Rule(biases, ("block_{i}/mlp/fc1/bias",), JOIN_BIAS),
            *affine(f"{block}.mlp.down_proj", "block_{i}/mlp/fc2"),
        )
    return (
        *_bert(block, memory),
        *one("{p}embeddings.register_tokens", "reg_token"),
        *norm(f"{block}.norm1", "block_{i}/norm1"),
        *one(f"{block}.layer_scale1.lambda1", "block_{i}/layer_scale1"),
        *norm(f"{block}.norm2", "block_{i}/norm2"),
        *mlp,
        *one(f"{block}.layer_scale2.lambda1", "block_{i}/layer_scale2"),
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


def _holds_timm(norm_after_pool: bool, a: Arguments) -> bool:
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


def _holds_torchvision(a: Arguments) -> bool:
    whole = _square(a) and a["image_size"][0] % a["patch_size"] == 0
    return not _differs(a) and a["layer_norm_eps"] == EPSILON and bool(a["num_classes"]) and whole


def _swiglu_ratio(a: Arguments) -> int | None:
    """The whole mlp_ratio from which Dinov2Config derives the width of a gated MLP."""
    width = a["width"]
    rounded = {ratio: (int(width * ratio * 2 / 3) + 7) // 8 * 8 for ratio in range(1, 17)}
    return next((ratio for ratio, hidden in rounded.items() if hidden == a["mlp_width"]), None)


def _holds_transformers(kind: str, a: Arguments) -> bool:
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


# Configs ------------------------------------------------------------------------------------------

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


def _timm_config(a: Arguments) -> dict[str, Any]:
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


_BUILDERS = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
}


def _torchvision_config(a: Arguments) -> dict[str, Any]:
    """A builder and the image size, or the class and all that it asks for."""
    size = {"image_size": a["image_size"][0]}
    for builder, name in _BUILDERS.items():
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


_HIDDEN_ACT = {"gelu_tanh": "gelu_pytorch_tanh"}
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


def _transformers_config(kind: str, a: Arguments) -> dict[str, Any]:
    model_type, headed, headless = _MODEL_TYPES[kind.removesuffix("_swiglu")]
    config: dict[str, Any] = {
        "image_size": a["image_size"][0] if _square(a) else list(a["image_size"]),
        "patch_size": a["patch_size"],
        "hidden_size": a["width"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["num_heads"],
        "hidden_act": _HIDDEN_ACT.get(a["activation"], a["activation"]),
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
    if kind == "clip" and a["num_classes"]:
        config["projection_dim"] = a["num_classes"]
    if kind == "siglip_classifier":
        # Its own attention pooling takes no part in the logits.
        tower = {**config, "num_channels": a["in_channels"], "vision_use_head": False}
        config = {"vision_config": tower}
    architecture = headed if a["num_classes"] else headless
    return {"model_type": model_type, "architectures": [architecture], **config}


_OF_ALL = "hidden_size num_hidden_layers num_attention_heads image_size patch_size num_channels"
_BLOCKS = Fields(
    used="hidden_act layer_norm_eps",
    seen=f"{_OF_ALL} intermediate_size qkv_bias",
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


def _fields(kind: str) -> Fields:
    """What config.json may say beside such tensors."""
    if kind.startswith("deit"):
        return replace(_BLOCKS, types=("deit",))
    if kind.startswith("dinov2"):
        return Fields(
            types=("dinov2_with_registers" if "registers" in kind else "dinov2",),
            used="hidden_act layer_norm_eps",
            seen=f"{_OF_ALL} mlp_ratio use_swiglu_ffn num_register_tokens qkv_bias",
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


# Named intermediates ------------------------------------------------------------------------------


def _modules(embed: str, block: str, pooled: str, a: Arguments) -> dict[str, str]:
    blocks = {f"block_{i}": block.format(i) for i in range(a["depth"])}
    # Of two tokens, a distilled model's, no library has a module that gives them alone.
    known = {"pooled": pooled} if pooled and not a["distillation_token"] else {}
    return {"embed": embed, **blocks, **known}


# The tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unused(Fixed):
    """A tensor that a library insists on and no inference reads: any value, zeros where written."""

    def agrees(self, tensor: np.ndarray) -> bool:
        """Whatever was learned is left out."""
        return True


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
        adapt=adapt,
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
        holds=partial(_holds_transformers, kind) if written else lambda arguments: False,
        config=partial(_transformers_config, kind),
        modules=partial(_modules, *modules),
        fields=_fields(kind),
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
            _timm(final_norm),
            defaults,
            # MAE's and DINOv2's own pretraining files name their encoders as timm does.
            dropped=("mask_token", r"decoder_.*"),
            file_names=r"(vit|deit3?)_[a-z0-9_]+?(?=[-.]|$)",
            holds=partial(_holds_timm, after),
            config=_timm_config,
            modules=partial(_modules, "norm_pre", "blocks.{}", "fc_norm"),
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
            _torchvision(fc1, fc2),
            holds=_holds_torchvision if kind == "torchvision" else lambda arguments: False,
            config=_torchvision_config,
            modules=partial(_modules, "encoder.dropout", "encoder.layers.encoder_layer_{}", ""),
        )
        for kind, fc1, fc2 in (
            ("torchvision", "0", "3"),
            ("torchvision before 0.13", "linear_1", "linear_2"),  # the published files
        )
    ),
    *_bert_tables(
        "deit_distilled",
        _transformers_vit,
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
        _transformers_vit,
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
            partial(_dinov2, gated=gated),
            "{p}encoder.layer.0.layer_scale1.lambda1",
            *(["{p}embeddings.register_tokens"] if registers else []),
            prefix="dinov2_with_registers." if registers else "dinov2.",
            position_prefix=1,
        )
    ),
    *_bert_tables(
        "vit",  # and the encoder of MAE
        _transformers_vit,
        prefix="vit.",
        heads=affine("classifier", "head"),
        layer_norm_eps=1e-12,
        position_prefix=1,
    ),
    _transformers(
        "clip",
        (_CLIP_PATCHES, "{p}embeddings.class_embedding"),
        (*_clip_tower(), *affine("visual_projection", "head")),
        ("{p}pre_layrnorm", "{{p}}encoder.layers.{}", "{p}post_layernorm"),
        {"layer_norm_eps": 1e-5, "activation": "quick_gelu", "position_prefix": 1},
        **_TOWER,
    ),
    _transformers(
        "siglip_classifier",  # pools by the mean; its attention pooling is unused
        (_CLIP_PATCHES, "classifier.weight"),
        (*_clip_tower(), *affine("classifier", "head")),
        ("{p}embeddings", "{{p}}encoder.layers.{}", ""),
        {"activation": "gelu_tanh", "position_prefix": 0, "pool": "avg"},
        prefixes=("vision_model.", ""),
        dropped=(r"{p}head\..*", *_TEXT_TOWER, _INDICES),
    ),
    _transformers(
        "siglip",
        (_CLIP_PATCHES,),
        (*_clip_tower(), *_siglip_pool()),
        ("{p}embeddings", "{{p}}encoder.layers.{}", "{p}head"),
        {"activation": "gelu_tanh", "position_prefix": 0},
        **_TOWER,
    ),
    *vit_npz.tables(adapt, _timm_config, partial(_modules, "norm_pre", "blocks.{}", "fc_norm")),
)


# The zoo ------------------------------------------------------------------------------------------


def _timm_entry(title: str, name: str, **arguments: Any) -> Entry:
    architecture = name.split(".")[0]
    large = re.search("large|huge|giant|so400m", name)
    return Entry(
        f"timm/{name}",
        title,
        name,
        tuple(arguments.items()),
        reduced=_TIMM_REDUCED if large else (),
        image_size=VARIANTS[architecture]["image_size"][0],
        published=f"timm://{name}",
    )


def _torchvision_entry(builder: str) -> Entry:
    known = VARIANTS[_BUILDERS[builder]]
    build, arguments = builder, {}
    if "vit_b" not in builder:  # the builders have no argument for the depth
        build = "torchvision.models.VisionTransformer"
        arguments = {
            "image_size": 224,
            "patch_size": known["patch_size"],
            "num_layers": known["depth"],
            "num_heads": known["num_heads"],
            "hidden_dim": known["width"],
            "mlp_dim": known["mlp_width"],
        }
    return Entry(
        f"torchvision/{builder}",
        "ViT",
        build,
        tuple(arguments.items()),
        reduced=(("num_layers", 2),) if arguments else (),
        published=f"torchvision://{builder}",
        license="BSD-3-Clause",
    )


def _transformers_entry(
    title: str, build: str, published: str, variant: str, license: str = "apache-2.0", **more: Any
) -> Entry:
    """An entry whose config is that of a variant of timm's, and what this class says otherwise."""
    known = VARIANTS[variant]
    arguments: dict[str, Any] = {
        "image_size": known["image_size"][0],
        "patch_size": known["patch_size"],
        "hidden_size": known["width"],
        "num_hidden_layers": known["depth"],
        "num_attention_heads": known["num_heads"],
    }
    if not build.startswith("Dinov2"):
        arguments["intermediate_size"] = known["mlp_width"]
    elif known.get("gated_mlp"):
        arguments["use_swiglu_ffn"] = True
    if build.endswith(("ImageClassification", "WithTeacher")):
        arguments["num_labels"] = 1000
    large = re.search("large|huge|giant|so400m", published)
    return Entry(
        f"transformers/{published.partition('/')[2]}",
        title,
        build,
        tuple((arguments | more).items()),
        reduced=(("num_hidden_layers", 2),) if large else (),
        image_size=known["image_size"][0],
        published=f"hf://{published}",
        license=license,
    )


def _npz_entry(title: str, name: str, **arguments: Any) -> Entry:
    large = re.search("large|so400m", name)
    return Entry(
        f"npz/{name}",
        title,
        name,
        (("act_layer", vit_npz.ACTIVATION), *arguments.items()),
        reduced=_TIMM_REDUCED if large else (),
        image_size=VARIANTS[name]["image_size"][0],
        license="apache-2.0",
    )


_TIMM_REDUCED = (("depth", 2),)
_TIMM_ZOO = {
    "ViT": (
        "vit_base_patch16_224.orig_in21k_ft_in1k",
        "vit_base_patch32_224.orig_in21k",
        "vit_large_patch32_384.orig_in21k_ft_in1k",
        "vit_huge_patch14_224.orig_in21k",
    ),
    "AugReg ViT": (
        "vit_tiny_patch16_224.augreg_in21k",
        "vit_small_patch16_224.augreg_in21k_ft_in1k",
        "vit_small_patch32_224.augreg_in21k_ft_in1k",
        "vit_base_patch16_224.augreg_in1k",
        "vit_base_patch16_384.augreg_in21k_ft_in1k",
        "vit_base_patch8_224.augreg_in21k_ft_in1k",
        "vit_large_patch16_224.augreg_in21k_ft_in1k",
    ),
    "DeiT": (
        "deit_tiny_patch16_224.fb_in1k",
        "deit_small_patch16_224.fb_in1k",
        "deit_base_patch16_224.fb_in1k",
        "deit_tiny_distilled_patch16_224.fb_in1k",
        "deit_base_distilled_patch16_224.fb_in1k",
    ),
    "DeiT III": (
        "deit3_small_patch16_224.fb_in1k",
        "deit3_base_patch16_224.fb_in1k",
        "deit3_large_patch16_224.fb_in1k",
        "deit3_huge_patch14_224.fb_in1k",
    ),
    "DINOv2": (
        "vit_small_patch14_dinov2.lvd142m",
        "vit_base_patch14_dinov2.lvd142m",
        "vit_large_patch14_dinov2.lvd142m",
        "vit_giant_patch14_dinov2.lvd142m",
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_large_patch14_reg4_dinov2.lvd142m",
        "vit_giant_patch14_reg4_dinov2.lvd142m",
    ),
    "MAE": (
        "vit_base_patch16_224.mae",
        "vit_large_patch16_224.mae",
        "vit_huge_patch14_224.mae",
    ),
    "CLIP": (
        "vit_base_patch16_clip_224.laion2b",
        "vit_base_patch32_clip_224.laion2b",
        "vit_base_patch16_clip_quickgelu_224.openai",
        "vit_large_patch14_clip_quickgelu_224.openai",
        "vit_huge_patch14_clip_224.laion2b",
    ),
    "SigLIP": (
        "vit_base_patch16_siglip_224.webli",
        "vit_base_patch16_siglip_256.v2_webli",
        "vit_base_patch32_siglip_256.v2_webli",
        "vit_large_patch16_siglip_256.webli",
        "vit_so400m_patch14_siglip_384.webli",
        "vit_giantopt_patch16_siglip_256.v2_webli",
    ),
}
_VIT, _DINO = "ViTForImageClassification", "Dinov2ForImageClassification"
_REGISTERS = "Dinov2WithRegistersForImageClassification"
_WHOLE = {"mask_ratio": 0.0}  # all patches, in their order
_TRANSFORMERS_ZOO: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("ViT", _VIT, "google/vit-base-patch16-224", "vit_base_patch16_224", {}),
    ("ViT", _VIT, "google/vit-base-patch32-384", "vit_base_patch32_384", {}),
    ("ViT", _VIT, "google/vit-large-patch16-224", "vit_large_patch16_224", {}),
    ("DeiT", _VIT, "facebook/deit-small-patch16-224", "deit_small_patch16_224", {}),
    *(
        (
            "DeiT",
            "DeiTForImageClassificationWithTeacher",
            f"facebook/deit-{size}-distilled-patch16-224",
            f"deit_{size}_distilled_patch16_224",
            {},
        )
        for size in ("tiny", "small")
    ),
    *(
        (
            "DINOv2",
            _DINO,
            f"facebook/dinov2-{size}-imagenet1k-1-layer",
            f"vit_{size}_patch14_dinov2",
            {},
        )
        for size in ("small", "large", "giant")
    ),
    (
        "DINOv2",
        _REGISTERS,
        "facebook/dinov2-with-registers-small-imagenet1k-1-layer",
        "vit_small_patch14_reg4_dinov2",
        {},
    ),
    (
        "DINOv2",
        "Dinov2WithRegistersModel",
        "facebook/dinov2-with-registers-giant",
        "vit_giant_patch14_reg4_dinov2",
        {},
    ),
    ("MAE", "ViTMAEModel", "facebook/vit-mae-base", "vit_base_patch16_224", _WHOLE),
    ("MAE", "ViTMAEModel", "facebook/vit-mae-large", "vit_large_patch16_224", _WHOLE),
    ("CLIP", "CLIPVisionModel", "openai/clip-vit-base-patch16", "vit_base_patch16_clip_224", {}),
    (
        "CLIP",
        "CLIPVisionModelWithProjection",
        "openai/clip-vit-base-patch32",
        "vit_base_patch32_clip_224",
        {"projection_dim": 512},
    ),
    (
        "CLIP",
        "CLIPVisionModelWithProjection",
        "openai/clip-vit-large-patch14-336",
        "vit_large_patch14_clip_quickgelu_336",
        {"projection_dim": 768},
    ),
    *(
        ("SigLIP", "SiglipVisionModel", f"google/{name}", variant, {})
        for name, variant in (
            ("siglip-base-patch16-224", "vit_base_patch16_siglip_224"),
            ("siglip-so400m-patch14-384", "vit_so400m_patch14_siglip_384"),
            ("siglip2-base-patch16-256", "vit_base_patch16_siglip_256"),
            ("siglip2-large-patch16-512", "vit_large_patch16_siglip_512"),
        )
    ),
)
_NPZ_ZOO = {
    "AugReg ViT": (
        ("vit_tiny_patch16_224", {"num_classes": 21843}),
        ("vit_small_patch16_224", {}),
        ("vit_small_patch32_384", {}),
        ("vit_base_patch16_224", {}),
        ("vit_base_patch32_224", {}),
        ("vit_base_patch8_224", {}),
        ("vit_large_patch16_384", {}),
    ),
    "SigLIP": (
        ("vit_base_patch16_siglip_224", {}),
        ("vit_base_patch16_siglip_384", {}),
        ("vit_large_patch16_siglip_256", {}),
        ("vit_so400m_patch14_siglip_224", {}),
    ),
}
ZOO = (
    *(_timm_entry(title, name) for title, names in _TIMM_ZOO.items() for name in names),
    *(_torchvision_entry(builder) for builder in _BUILDERS),
    *(
        _transformers_entry(
            title, build, name, variant, "" if title == "CLIP" else "apache-2.0", **more
        )
        for title, build, name, variant, more in _TRANSFORMERS_ZOO
    ),
    *(
        _npz_entry(title, name, **arguments)
        for title, entries in _NPZ_ZOO.items()
        for name, arguments in entries
    ),
)
