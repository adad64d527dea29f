"""Names of a ViT's tensors and modules in timm, torchvision, and transformers' save_pretrained.

`{p}` stands for the prefix of the file at hand (`vit.`, `vision_model.`, or nothing), `{i}` for a
block's index.

Sources: timm 1.0 vision_transformer.py and deit.py; torchvision 0.29 models/vision_transformer.py;
transformers 5.23 models/vit, deit, vit_mae, dinov2, dinov2_with_registers, clip and siglip, whose
files name what is in memory otherwise ("in memory" below: what torch.save(model.state_dict())
writes).
"""

import math
from dataclasses import dataclass

import numpy as np

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
    affine,
    fused,
    norm,
    one,
)
from vision_jax.convert.table import Arguments
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


def timm(final_norm: str) -> tuple[Rule, ...]:
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


def torchvision(fc1: str, fc2: str) -> tuple[Rule, ...]:
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


def transformers_vit(memory: bool) -> tuple[Rule, ...]:
    block = "{p}layers.{i}" if memory else "{p}encoder.layer.{i}"
    fc1, fc2 = ("mlp.fc1", "mlp.fc2") if memory else ("intermediate.dense", "output.dense")
    return (
        *_bert(block, memory),
        *norm(f"{block}.layernorm_before", "block_{i}/norm1"),
        *norm(f"{block}.layernorm_after", "block_{i}/norm2"),
        *affine(f"{block}.{fc1}", "block_{i}/mlp/fc1"),
        *affine(f"{block}.{fc2}", "block_{i}/mlp/fc2"),
    )


def dinov2(memory: bool, gated: bool) -> tuple[Rule, ...]:
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


def clip_tower() -> tuple[Rule, ...]:
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


def siglip_pool() -> tuple[Rule, ...]:
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


@dataclass(frozen=True)
class Unused(Fixed):
    """A tensor that a library insists on and no inference reads: any value, zeros where written."""

    def agrees(self, tensor: np.ndarray) -> bool:
        """Whatever was learned is left out."""
        return True


def modules(embed: str, block: str, pooled: str, a: Arguments) -> dict[str, str]:
    blocks = {f"block_{i}": block.format(i) for i in range(a["depth"])}
    # Of two tokens, a distilled model's, no library has a module that gives them alone.
    known = {"pooled": pooled} if pooled and not a["distillation_token"] else {}
    return {"embed": embed, **blocks, **known}


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
