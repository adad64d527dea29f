"""Vision Transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929) and its relatives.

One module covers ViT, AugReg, DeiT, MAE's encoder, DINOv2 with registers and the CLIP and SigLIP
towers: they differ by the arguments of `ViT`, which docs/weights.md lists per family. Names and
structure follow timm 1.0 (timm/models/vision_transformer.py).

Exactness, where ports go wrong:
  - GELU is exact (erf) except in CLIP (x · sigmoid(1.702 x)) and SigLIP (tanh);
  - LayerNorm epsilon is 1e-6 in timm and torchvision, 1e-12 in transformers' ViT, DeiT and MAE,
    1e-6 in Dinov2 and SigLIP, 1e-5 in CLIP;
  - the qkv kernel's columns are q, k, v, each with its heads one after another;
  - `norm` sits before pooling ("token", "map") or after it (`norm_after_pool`, timm's fc_norm).
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.attention import attend
from vision_jax.models.layers import (
    ACTIVATIONS,
    Conv,
    Dense,
    Dropout,
    drop_path,
    layer_norm,
    normalize,
)
from vision_jax.models.merging import (
    mean_over_patches,
    merge_counts,
    merge_tokens,
    ones,
    size_bias,
)
from vision_jax.models.scanned import scan_blocks
from vision_jax.models.taps import ATTENTION, NORMED, make_tap, tap
from vision_jax.ops.position_embedding import interpolate_positions
from vision_jax.ops.traced import is_on
from vision_jax.trees.parted import INPUTS, OUTPUTS, TensorRule

# width, depth, heads, hidden width of the MLP
SIZES = {
    "ti": (192, 12, 3, 768),
    "s": (384, 12, 6, 1536),
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "h": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
}
PATCHES = (8, 14, 16, 32)

_TIMM_SIZES = {
    "tiny": SIZES["ti"],
    "small": SIZES["s"],
    "medium": (512, 12, 8, 2048),
    "base": SIZES["b"],
    "large": SIZES["l"],
    "so400m": (1152, 27, 16, 4304),
    "huge": SIZES["h"],
    "giant": SIZES["g"],
    "giantopt": (1536, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}
_SMALL = ("tiny", "small", "base", "large")
_TIMM_NAME = re.compile(
    r"(?P<model>vit|deit|deit3)_(?P<size>[a-z0-9]+)(?P<distilled>_distilled)?_patch(?P<patch>\d+)"
    r"(?P<kind>_dinov2|_reg4_dinov2|_clip|_clip_quickgelu|_siglip)?(?:_(?P<image>\d+))?"
)
_DISTILLED = {"distillation_token": True, "position_prefix": 2}
_CLIP = {"pre_norm": True, "patch_bias": False, "layer_norm_eps": 1e-5}
_SIGLIP = {"pool": "map", "class_token": False, "position_prefix": 0}
_DINOV2 = {"image_size": (518, 518), "layer_scale": 1e-5}
_KINDS: dict[str, dict[str, Any]] = {
    "_dinov2": _DINOV2,
    "_reg4_dinov2": {**_DINOV2, "num_registers": 4, "position_prefix": 0},
    "_clip": _CLIP,
    "_clip_quickgelu": {**_CLIP, "activation": "quick_gelu"},
    "_siglip": _SIGLIP,
}


def _timm_arguments(name: str) -> dict[str, Any]:
    """Arguments of an architecture of timm's, from its name."""
    match = _TIMM_NAME.fullmatch(name)
    assert match, name
    size, kind = match["size"], match["kind"] or ""
    width, depth, num_heads, mlp_width = _TIMM_SIZES[size]
    arguments: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_width": mlp_width,
        "patch_size": int(match["patch"]),
    }
    if match["image"]:
        arguments["image_size"] = (int(match["image"]),) * 2
    if match["model"] == "deit3":
        arguments |= {"position_prefix": 0, "layer_scale": 1e-6}
    arguments |= _DISTILLED if match["distilled"] else {}
    arguments |= _KINDS.get(kind, {})
    if size == "giant" and kind.endswith("dinov2"):
        gated = {"gated_mlp": True, "activation": "silu"}
        arguments |= {"width": 1536, "num_heads": 24, "mlp_width": 4096, **gated}
    # Of the first SigLIP's sizes, trained with tanh too, timm computes GELU exactly.
    if kind == "_siglip" and re.search(r"patch32|giantopt|so400m_patch16|large.*512", name):
        arguments["activation"] = "gelu_tanh"
    return arguments


VARIANTS: dict[str, dict[str, Any]] = {
    name: _timm_arguments(name)
    for name in (
        *(f"vit_{size}_patch16_{image}" for size in _SMALL for image in (224, 384)),
        *(f"vit_{size}_patch32_{image}" for size in _SMALL[1:] for image in (224, 384)),
        *(f"vit_{size}_patch8_224" for size in ("small", "base")),
        *(f"vit_{size}_patch14_224" for size in ("large", "huge", "giant", "gigantic")),
        *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
        "deit_base_patch16_384",
        *(f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")),
        "deit_base_distilled_patch16_384",
        *(f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")),
        *(f"deit3_{size}_patch16_384" for size in ("small", "base", "large")),
        "deit3_huge_patch14_224",
        *(
            f"vit_{size}_patch14_{kind}"
            for kind in ("dinov2", "reg4_dinov2")
            for size in ("small", "base", "large", "giant")
        ),
        *(f"vit_base_patch{patch}_clip_224" for patch in (16, 32)),
        *(f"vit_{size}_patch14_clip_224" for size in ("large", "huge", "gigantic")),
        *(f"vit_base_patch{patch}_clip_quickgelu_224" for patch in (16, 32)),
        *(f"vit_large_patch14_clip_quickgelu_{image}" for image in (224, 336)),
        *(f"vit_base_patch16_siglip_{image}" for image in (224, 256, 384, 512)),
        "vit_base_patch32_siglip_256",
        *(f"vit_large_patch16_siglip_{image}" for image in (256, 384, 512)),
        *(f"vit_so400m_patch14_siglip_{image}" for image in (224, 378, 384)),
        *(f"vit_so400m_patch16_siglip_{image}" for image in (256, 384, 512)),
        *(f"vit_giantopt_patch16_siglip_{image}" for image in (256, 384)),
    )
}


def variant_arguments(variant: str) -> dict[str, Any]:
    """Arguments of a named variant: "b/16" -> width, depth, num_heads, mlp_width, patch_size.

    Raises:
      UserError: an unknown variant.
    """
    size, _, patch = variant.partition("/")
    if size not in SIZES or patch not in map(str, PATCHES):
        raise UserError(
            f"unknown ViT variant {variant!r}: use SIZE/PATCH with a size of {'|'.join(SIZES)} "
            f"and a patch of {'|'.join(map(str, PATCHES))}, for example 'b/16'"
        )
    width, depth, num_heads, mlp_width = SIZES[size]
    return {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_width": mlp_width,
        "patch_size": int(patch),
    }


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of "b/16" or of a name of timm's ("vit_base_patch16_224"), or None for others."""
    known = VARIANTS.get(name.split(".")[0])  # without the tag of pretrained weights
    if known is not None:
        return dict(known)
    try:
        return variant_arguments(name)
    except UserError:
        return None


def build_vit(variant: str | None = None, **arguments: Any) -> "ViT":
    """Builds a ViT from a variant's name, from `ViT`'s arguments, or from both (arguments win)."""
    named = variant_arguments(variant) if variant else {}
    return ViT(**{**named, **arguments})


def encoder_arguments(arguments: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    """Arguments of a ViT, changed where it can be no part of another model as it is.

    Where attention pooling is among the parameters that are left out, the ViT pools by the mean
    afterwards.
    """
    pools = arguments.get("pool") == "map" and "attn_pool/latent" in left_out
    return {**arguments, **({"pool": "avg"} if pools else {})}


# The parameters of heads and of attention pooling, which an encoder has not.
HEADS = (
    *(f"{head}/{leaf}" for head in ("head", "head_dist") for leaf in ("kernel", "bias")),
    "attn_pool/latent",
    *(
        f"attn_pool/{layer}/{leaf}"
        for layer in ("q", "kv", "proj", "mlp/fc1", "mlp/fc2")
        for leaf in ("kernel", "bias")
    ),
    *(f"attn_pool/norm/{leaf}" for leaf in ("scale", "bias")),
)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv kernel [D, 3·K·d], [D, 3·D] unless pruned."""

    num_heads: int
    qkv_bias: bool
    qk_norm: bool
    layer_norm_eps: float
    dtype: Any
    head_size: int | None = None

    @nn.compact
    def __call__(self, x, bias=None):
        """(f[B, N, D], keys f[B, N, K, d]) of x[B, N, D].

        `bias`: added to the logits, f[B, 1, N, N], of which any may be 1.
        """
        batch, tokens, width = x.shape
        inner = self.num_heads * self.head_size if self.head_size else width
        qkv = Dense(3 * inner, use_bias=self.qkv_bias, dtype=self.dtype, parts=3, name="qkv")(x)
        q, k, v = (part.reshape(batch, tokens, self.num_heads, -1) for part in qkv)  # [B, N, K, d]
        if self.qk_norm:
            q = layer_norm("q_norm", self.layer_norm_eps, self.dtype)(q)
            k = layer_norm("k_norm", self.layer_norm_eps, self.dtype)(k)
        # Nothing unless the collection is asked for; see families.apply_with_features.
        self.sow("intermediates", "query_key", (q, k, bias))
        x = attend(q, k, v, bias=bias, tap=make_tap(self, ATTENTION))
        x = x.reshape(batch, tokens, inner)
        return Dense(width, dtype=self.dtype, name="proj")(x), k


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), plain or gated.

    Gated, fc1 gives [gate, value] packed and the hidden layer is activation(gate) · value: timm's
    SwiGLUPacked and transformers' Dinov2SwiGLUFFN, with silu.
    """

    hidden_width: int
    activation: str
    gated: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        act = ACTIVATIONS[self.activation]
        outputs = self.hidden_width * (1 + self.gated)
        x = Dense(outputs, dtype=self.dtype, parts=1 + self.gated, name="fc1")(x)
        if self.gated:
            gate, value = x  # [B, N, hidden] each
            x = act(gate) * value
        else:
            x = act(x)
        return Dense(width, dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
    """x + ls1·attn(norm1(x)), then x + ls2·mlp(norm2(x)).

    With `sizes` f[B, N], the patches that each token stands for, `merge` tokens behind `num_prefix`
    merge in between, and the result is (x, sizes).
    """

    num_heads: int
    mlp_width: int
    qkv_bias: bool = True
    qk_norm: bool = False
    gated_mlp: bool = False
    activation: str = "gelu"
    layer_scale: float | None = None
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    dtype: Any = jnp.float32
    head_size: int | None = None
    merge: int = 0
    num_prefix: int = 0

    @nn.compact
    def __call__(self, x, rate, train: bool, bias=None, sizes=None):
        def branch(index, x):
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                scale = self.param(f"layer_scale{index}", init, (x.shape[-1],))
                x = x * scale.astype(x.dtype).reshape(1, 1, -1)
            if train and is_on(self.dropout):
                x = Dropout(self.dropout)(x)
            if train and rate is not None:
                x = drop_path(x, rate, self.make_rng("dropout"))
            return x

        norm = (self.layer_norm_eps, self.dtype)
        y = tap(self, NORMED, layer_norm("norm1", *norm)(x))
        heads = (self.num_heads, self.qkv_bias, self.qk_norm, *norm, self.head_size)
        bias = bias if sizes is None else size_bias(sizes)
        y, keys = Attention(*heads, name="attn")(y, bias)
        x = x + branch(1, y)
        if sizes is not None:
            x, sizes = merge_tokens(x, sizes, keys, self.merge, self.num_prefix)
        y = layer_norm("norm2", *norm)(x)
        y = Mlp(self.mlp_width, self.activation, self.gated_mlp, self.dtype, name="mlp")(y)
        x = x + branch(2, y)
        return x if sizes is None else (x, sizes)


def block_rules(num_heads: int, gated: bool = False, blocks: str = r"block_\d+/"):
    """The tensor rules of a block: heads and hidden channels, each pair summed up once."""
    fc1 = (
        (TensorRule(blocks + "mlp/fc1/kernel", OUTPUTS, parts=2),)
        if gated
        else (TensorRule(blocks + "mlp/fc1/(kernel|bias)", OUTPUTS),)
    )
    return (
        TensorRule(blocks + "attn/qkv/kernel", OUTPUTS, num_heads, parts=3),
        TensorRule(blocks + "attn/proj/kernel", INPUTS, num_heads),
        *fc1,
        TensorRule(blocks + "mlp/fc2/kernel", INPUTS),
    )


HEAD_RULE = TensorRule(r"head(_dist)?/(kernel|bias)", OUTPUTS)  # classes


class AttentionPool(nn.Module):
    """SigLIP's pooling: one learned query attends to all tokens, then a residual MLP.

    timm/layers/attention_pool.py AttentionPoolLatent; transformers'
    SiglipMultiheadAttentionPoolingHead.
    """

    num_heads: int
    mlp_width: int
    activation: str
    layer_norm_eps: float
    dtype: Any
    head_size: int | None = None

    @nn.compact
    def __call__(self, x, bias=None):
        batch, tokens, width = x.shape
        heads = (self.num_heads, self.head_size or width // self.num_heads)
        inner = heads[0] * heads[1]
        latent = self.param("latent", nn.initializers.truncated_normal(0.02), (1, 1, width))
        latent = jnp.broadcast_to(latent.astype(self.dtype), (batch, 1, width))
        q = Dense(inner, dtype=self.dtype, name="q")(latent).reshape(batch, 1, *heads)
        kv = Dense(2 * inner, dtype=self.dtype, name="kv")(x)
        kv = kv.reshape(batch, tokens, 2, *heads)  # [B, N, 2, K, d]
        x = attend(q, kv[:, :, 0], kv[:, :, 1], bias=bias, tap=make_tap(self, ATTENTION))
        x = x.reshape(batch, 1, inner)
        x = Dense(width, dtype=self.dtype, name="proj")(x)
        y = layer_norm("norm", self.layer_norm_eps, self.dtype)(x)
        y = Mlp(self.mlp_width, self.activation, False, self.dtype, name="mlp")(y)
        return (x + y)[:, 0]  # [B, D]


class ViT(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, num_classes].

    The normalization by `mean` and `std` is inside.

    Attributes:
      num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
      image_size: (height, width) in pixels; what does not fill a patch is cut off, as timm does.
      patch_size: pixels a side.
      head_size: channels of a head; None for width / num_heads, as in every model but pruned ones.
      in_channels: of the images; `mean` and `std` have as many entries.
      pool: "token" (class token), "avg" (mean of the patch tokens), "map" (attention pooling),
        "token_avg" (class token and mean side by side: transformers' Dinov2ForImageClassification).
      norm_after_pool: the final norm acts on the pooled vector (timm's fc_norm) and not on tokens.
      class_token, distillation_token, num_registers: the prefix tokens, in this order. With a
        distillation token there are two heads, and the logits are their mean (DeiT).
      position_prefix: how many of the prefix tokens have a position embedding of their own.
      layer_scale: initial value, or None for no LayerScale.
      pre_norm: a norm between the embeddings and the first block (CLIP).
      gated_mlp: SwiGLU when `activation` is "silu".
      dropout, drop_path: rates in training; drop_path grows linearly with depth up to its value.
      merge: patch tokens that merge in each block (merging.py), a whole number of them, or below 1
        the share of those that are left; 0: none.
      mean, std: per-channel normalization of the images in [0, 1].
      dtype: compute dtype; parameters stay float32. The head computes in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
      scan: run the blocks as one scanned loop (compiles faster); parameters keep their names, and
        all blocks must then have leaves of the same kinds. A function is True, and what a block's
        parameters go through in the loop (see scanned.py).
    """

    num_classes: int
    image_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    head_size: int | None = None
    in_channels: int = 3
    pool: Literal["token", "avg", "map", "token_avg"] = "token"
    norm_after_pool: bool = False
    class_token: bool = True
    distillation_token: bool = False
    num_registers: int = 0
    position_prefix: int = 1
    patch_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    pre_norm: bool = False
    activation: str = "gelu"
    gated_mlp: bool = False
    head_bias: bool = True
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    drop_path: float = 0.0
    merge: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool | Callable[[Any, str], Any] = False

    stem: ClassVar[str] = "patch_embed/kernel"
    pyramid: ClassVar[tuple[tuple[str, int], ...]] = ()
    takes_merged: ClassVar[bool] = True  # whether it does without a token for each patch

    @property
    def size_divisor(self) -> int:
        """Of an image's sides: of others the last pixels would be cut off."""
        return self.patch_size

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay."""
        return self.depth + 2

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: embeddings 0, block i at i + 1, what follows at depth + 1.

        As in timm, a final norm of the tokens counts with the last block.
        """
        top = path.split("/")[0]
        if top.startswith("block_"):
            return int(top.removeprefix("block_")) + 1
        if top == "norm" and not self.norm_after_pool:
            return self.depth
        embeddings = ("patch_embed", "pos_embed", "cls_token", "dist_token", "reg_token")
        return 0 if top in (*embeddings, "norm_pre") else self.depth + 1

    @property
    def looped(self) -> str:
        """Regular expression of the parameters of the blocks that `scan` runs in a loop."""
        return r"block_\d+/.*"

    @property
    def tensor_rules(self) -> tuple[TensorRule, ...]:
        """What a mesh's axis `tensor` splits; attention pooling is whole on each device."""
        return (*block_rules(self.num_heads, self.gated_mlp), HEAD_RULE)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches."""
        return int(self.class_token) + int(self.distillation_token) + self.num_registers

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1].
          train: dropout and drop_path act, with keys from the "dropout" collection.
          return_features: also return a dict of named intermediates, tokens f[B, N, D]: "embed",
            "block_0" ... (N falls where tokens merge) and "pooled"; of two heads, the logits of
            each, "head" and "head_dist".

        Returns:
          logits f32[B, num_classes], or (logits, features).
        """
        if images.shape[1:3] != self.image_size:
            raise ValueError(f"images are {images.shape[1:3]}, the model takes {self.image_size}")
        features = {}
        x = self._embed(images, train)
        features["embed"] = x

        x, outputs, sizes = self._blocks(x, train)
        features.update({f"block_{index}": output for index, output in enumerate(outputs)})

        pooled = self._pool(x, sizes)  # [B, D]
        features["pooled"] = pooled
        logits, heads = self._head(pooled) if self.num_classes else (pooled, {})
        features.update(heads)
        return (logits, features) if return_features else logits

    def init_positions(self, key, shape):
        """The first position embeddings f32[1, P + N, D]."""
        return nn.initializers.normal(0.02)(key, shape)

    def _embed(self, images, train, hide: Callable[[Any], Any] | None = None):
        """Tokens f[B, P + N, D]; `hide` replaces some of the patches f[B, N, D]."""
        dtype = self.dtype
        patches = (self.patch_size, self.patch_size)
        x = Conv(
            self.width, patches, patches, use_bias=self.patch_bias, dtype=dtype, name="patch_embed"
        )(normalize(images, self.mean, self.std))
        grid = x.shape[1:3]
        x = x.reshape(x.shape[0], -1, self.width)  # [B, h·w, D]
        if hide is not None:
            x = hide(x)

        normal = nn.initializers.normal
        names = ["cls_token"] * self.class_token + ["dist_token"] * self.distillation_token
        prefix = [self.param(name, normal(1e-6), (1, 1, self.width)) for name in names]
        if self.num_registers:
            shape = (1, self.num_registers, self.width)
            prefix.append(self.param("reg_token", normal(1e-6), shape))
        shape = (1, self.position_prefix + self.grid[0] * self.grid[1], self.width)
        positions = self.param("pos_embed", self.init_positions, shape)
        positions = interpolate_positions(positions, self.grid, grid, self.position_prefix)
        if prefix:
            tokens = jnp.concatenate(prefix, axis=1)  # [1, P, D]
            own = self.position_prefix
            tokens = tokens.at[:, :own].add(positions[:, :own]).astype(dtype)
            tokens = jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape[1:]))
            x = x + positions[:, own:].astype(dtype)
            x = jnp.concatenate([tokens, x], axis=1)  # [B, P + h·w, D]
        else:
            x = x + positions.astype(dtype)
        if train and is_on(self.dropout):
            x = Dropout(self.dropout)(x)
        if self.pre_norm:
            x = layer_norm("norm_pre", self.layer_norm_eps, dtype)(x)
        return x

    def _tokens(self, images, train, hide: Callable[[Any], Any] | None = None):
        """{name: tokens f[B, P + N, D]}: "embed", "block_0" ... and "normed", all of these."""
        x = self._embed(images, train, hide)
        features = {"embed": x}
        x, outputs, _ = self._blocks(x, train)
        features.update({f"block_{index}": output for index, output in enumerate(outputs)})
        features["normed"] = layer_norm("norm", self.layer_norm_eps, self.dtype)(x)
        return features

    def _blocks(self, x, train, start=0, stop=None, bias=None):
        """(x, outputs of each, sizes) of the blocks from `start` to `stop`, all by default.

        `bias`: added to the logits of their attention, f[B, 1, N, N]. The sizes f[B, N] are the
        patches that each token of x stands for, None where none merge.
        """
        arguments = {
            "num_heads": self.num_heads,
            "head_size": self.head_size,
            "mlp_width": self.mlp_width,
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
            "gated_mlp": self.gated_mlp,
            "activation": self.activation,
            "layer_scale": self.layer_scale,
            "layer_norm_eps": self.layer_norm_eps,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }
        last = max(self.depth - 1, 1)
        rates = {i: self.drop_path * i / last for i in range(self.depth)[start:stop]}
        counts, sizes = self._merge_counts(), None
        if any(counts) and not self.is_initializing():
            arguments["num_prefix"], sizes = self.num_prefix, ones(x)
        elif self.scan and bias is None and rates and not self.is_initializing():
            return *self._scanned_blocks(arguments, x, train, rates), None
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        outputs = []
        for index, rate in rates.items():
            share = rate if index and is_on(rate) else None
            layer = block(**arguments, merge=counts[index], name=f"block_{index}")
            if sizes is None:
                x = layer(x, share, train, bias)
            else:
                x, sizes = layer(x, share, train, None, sizes)
            outputs.append(x)
        return x, outputs, sizes

    def _merge_counts(self) -> tuple[int, ...]:
        """Of each block, how many tokens merge in it."""
        counts = merge_counts(self.merge, self.depth, self.grid[0] * self.grid[1])
        if any(counts) and not self.takes_merged:
            raise UserError(
                f"merge {self.merge}: a {type(self).__name__} needs a token for each patch; set "
                "config.model.merge=0"
            )
        if any(counts) and self.scan:
            raise UserError(
                "model.scan: where tokens merge, each block has fewer than the one before; set "
                "model.scan=False"
            )
        return counts

    def _scanned_blocks(self, arguments, x, train, rates):
        block = Block(**arguments, parent=None)

        def apply(variables, x, rate, rngs):
            return block.apply(
                variables, x, rate if is_on(self.drop_path) else None, train, rngs=rngs
            )

        names = [f"block_{index}" for index in rates]
        rows = jnp.asarray(list(rates.values()), x.dtype)
        return scan_blocks(self, names, apply, x, rows, remat=self.remat, enter=self.scan)

    def _pool(self, x, sizes=None):
        """f[B, D], or f[B, 2, D] for two heads, of tokens that stand for so many patches."""
        own = None if sizes is None else sizes[:, self.num_prefix :]
        norm = (self.layer_norm_eps, self.dtype)
        if not self.norm_after_pool:
            x = layer_norm("norm", *norm)(x)
        if self.pool == "map":
            arguments = (self.num_heads, self.mlp_width, self.activation, *norm, self.head_size)
            bias = None if own is None else size_bias(own)
            x = AttentionPool(*arguments, name="attn_pool")(x[:, self.num_prefix :], bias)
        elif self.pool == "avg":
            x = mean_over_patches(x[:, self.num_prefix :], own)
        elif self.pool == "token_avg":
            mean = mean_over_patches(x[:, self.num_prefix :], own)
            x = jnp.concatenate([x[:, 0], mean], axis=-1)
        elif self.pool == "token" and self.distillation_token:
            x = x[:, :2]  # [B, 2, D]: a head for each
        elif self.pool == "token":
            x = x[:, 0]
        else:
            raise UserError(f"model.pool: {self.pool!r} is none of token, avg, map, token_avg")
        return layer_norm("norm", *norm)(x) if self.norm_after_pool else x

    def _head(self, pooled):
        dtype = np.promote_types(self.dtype, np.float32)
        arguments: dict[str, Any] = {
            "features": self.num_classes,
            "use_bias": self.head_bias,
            "dtype": dtype,
            "kernel_init": nn.initializers.zeros,
        }
        if self.distillation_token and self.pool == "token":
            logits = Dense(**arguments, name="head")(pooled[:, 0])
            taught = Dense(**arguments, name="head_dist")(pooled[:, 1])
            return (logits + taught) / 2, {"head": logits, "head_dist": taught}
        return Dense(**arguments, name="head")(pooled), {}
