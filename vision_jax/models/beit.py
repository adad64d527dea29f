"""BEiT (Bao et al. 2021, https://arxiv.org/abs/2106.08254) and BEiT v2
(https://arxiv.org/abs/2208.06366); data2vec's image encoder (https://arxiv.org/abs/2202.03555).

A ViT whose attention knows the offsets between patches by tables of learned biases. Structure and
names follow timm 1.0 (timm/models/beit.py).

Exactness, where ports go wrong:
  - GELU is exact (erf); LayerNorm epsilon is 1e-6 in timm, 1e-12 in transformers;
  - q and v have a bias, k has none;
  - a table's last three rows are not of offsets: from the class token to any, from any to it, and
    from it to itself;
  - the final norm follows the mean over the patches (`norm_after_pool`) or precedes the choice of
    the class token;
  - LayerScale starts at 0.1 in BEiT's base models, at 1e-5 in the large ones and in v2.
"""

from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.limits import CELLS
from vision_jax.models.attention import attend
from vision_jax.models.layers import Conv, Dense, add_bias, drop_path, layer_norm, normalize
from vision_jax.models.swin import position_index
from vision_jax.models.taps import ATTENTION, NORMED, make_tap, tap
from vision_jax.models.vit import Mlp

NUM_EXTRA = 3  # rows of a table that belong to the class token

# width, depth, heads, hidden width of the MLP
_SIZES = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096)}
_V2 = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _arguments(size: str, image: int, layer_scale: float, **more: Any) -> dict[str, Any]:
    names = ("width", "depth", "num_heads", "mlp_width")
    sizes = dict(zip(names, _SIZES[size], strict=True))
    common = {"image_size": (image, image), "patch_size": 16, "layer_scale": layer_scale}
    return {**common, **sizes, **more}


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"beit_base_patch16_{side}": _arguments("base", side, 0.1) for side in (224, 384)},
    **{f"beit_large_patch16_{side}": _arguments("large", side, 1e-5) for side in (224, 384, 512)},
    **{f"beitv2_{size}_patch16_224": _arguments(size, 224, 1e-5, **_V2) for size in _SIZES},
}


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant of timm's ("beit_base_patch16_224"), or None."""
    return VARIANTS.get(name)


def relative_index(grid: tuple[int, int]) -> np.ndarray:
    """i64[1 + h·w, 1 + h·w]: row of a table for each pair (query, key), class token first.

    Examples:
      >>> relative_index((1, 2))
      array([[5, 3, 3],
             [4, 1, 0],
             [4, 2, 1]])
    """
    if grid[0] * grid[1] > CELLS:
        raise UserError(f"relative positions of {grid[0]} x {grid[1]} patches: {CELLS} at most")
    rows = num_offsets(grid)
    index = np.pad(position_index(grid), ((1, 0), (1, 0)))
    index[0], index[:, 0], index[0, 0] = rows, rows + 1, rows + 2
    return index


def num_offsets(grid: tuple[int, int]) -> int:
    """How many offsets there are between the patches of a grid (h, w)."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


class Attention(nn.Module):
    """Multi-head self-attention of x[B, N, D] with a fused qkv kernel [D, 3·D].

    q and v have biases of their own beside it. `shared` is a bias f[1, K, N, N] or None; with
    `grid` the layer adds one from a table of its own.
    """

    num_heads: int
    qkv_bias: bool
    grid: tuple[int, int] | None
    dtype: Any

    @nn.compact
    def __call__(self, x, shared):
        batch, tokens, width = x.shape
        qkv = Dense(3 * width, use_bias=False, dtype=self.dtype, name="qkv")(x)
        if self.qkv_bias:
            zeros = nn.initializers.zeros
            q, v = (self.param(name, zeros, (width,)) for name in ("q_bias", "v_bias"))
            qkv = add_bias(qkv, jnp.concatenate([q, jnp.zeros_like(q), v]))
        # A split's gradient is one array put together; three slices' are three that are added up.
        shape = (batch, tokens, self.num_heads, -1)
        q, k, v = (part.reshape(shape) for part in jnp.split(qkv, 3, axis=-1))  # [B, N, K, d]
        bias = shared
        if self.grid is not None:
            own = relative_bias(self, self.num_heads, self.grid, self.dtype)
            bias = own if shared is None else own + shared
        x = attend(q, k, v, bias=bias, tap=make_tap(self, ATTENTION))
        x = x.reshape(batch, tokens, width)
        return Dense(width, dtype=self.dtype, name="proj")(x)


def relative_bias(module: nn.Module, num_heads: int, grid: tuple[int, int], dtype: Any):
    """f[1, K, N, N] from the module's parameter `relative_position_bias_table`, in float32."""
    shape = (num_offsets(grid) + NUM_EXTRA, num_heads)
    table = module.param("relative_position_bias_table", nn.initializers.zeros, shape)
    table = table.astype(np.promote_types(dtype, np.float32))
    return table[relative_index(grid)].transpose(2, 0, 1)[None]


class Block(nn.Module):
    """x + layer_scale1 · attn(norm1(x)), then x + layer_scale2 · mlp(norm2(x))."""

    num_heads: int
    mlp_width: int
    qkv_bias: bool
    grid: tuple[int, int] | None
    layer_scale: float | None
    activation: str
    layer_norm_eps: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, shared, rate, train: bool):
        def branch(index, x):
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                scale = self.param(f"layer_scale{index}", init, (x.shape[-1],))
                x = x * scale.astype(x.dtype).reshape(1, 1, -1)
            if train and self.dropout:
                x = nn.Dropout(self.dropout, deterministic=False)(x)
            if train and rate is not None:
                x = drop_path(x, rate, self.make_rng("dropout"))
            return x

        y = tap(self, NORMED, layer_norm("norm1", self.layer_norm_eps, self.dtype)(x))
        attention = Attention(self.num_heads, self.qkv_bias, self.grid, self.dtype, name="attn")
        x = x + branch(1, attention(y, shared))
        y = layer_norm("norm2", self.layer_norm_eps, self.dtype)(x)
        y = Mlp(self.mlp_width, self.activation, False, self.dtype, name="mlp")(y)
        return x + branch(2, y)


class Beit(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, num_classes].

    Attributes:
      num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
      image_size: (height, width) in pixels; what does not fill a patch is cut off, as timm does.
      patch_size: pixels a side.
      in_channels: of the images; `mean` and `std` have as many entries.
      pool: "avg" (mean of the patch tokens) or "token" (class token).
      norm_after_pool: the final norm acts on the pooled vector (timm's fc_norm) and not on tokens.
      absolute_positions: learned position embeddings are added to the tokens.
      relative_bias: each block has a table of relative position biases.
      shared_relative_bias: all blocks have one in common, added to their own.
      layer_scale: initial value, or None for no LayerScale.
      dropout, drop_path: rates in training; drop_path grows linearly with depth up to its value.
      mean, std: per-channel normalization of the images in [0, 1].
      dtype: compute dtype; parameters stay float32. The head computes in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    num_classes: int
    image_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    in_channels: int = 3
    pool: Literal["avg", "token"] = "avg"
    norm_after_pool: bool = True
    absolute_positions: bool = False
    relative_bias: bool = True
    shared_relative_bias: bool = False
    qkv_bias: bool = True
    layer_scale: float | None = 0.1
    activation: str = "gelu"
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    drop_path: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32
    remat: bool = False

    stem: ClassVar[str] = "patch_embed/kernel"
    pyramid: ClassVar[tuple[tuple[str, int], ...]] = ()

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

        As in timm, a shared table is among the embeddings, and a final norm of the tokens counts
        with the last block.
        """
        top = path.split("/")[0]
        if top.startswith("block_"):
            return int(top.removeprefix("block_")) + 1
        if top == "norm" and not self.norm_after_pool:
            return self.depth
        first = ("patch_embed", "pos_embed", "cls_token", "relative_position_bias_table")
        return 0 if top in first else self.depth + 1

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches."""
        return 1

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1].
          train: dropout and drop_path act, with keys from the "dropout" collection.
          return_features: also return a dict of named intermediates: tokens f[B, 1 + h·w, D] of
            "embed" and "block_0" ..., and "pooled" f[B, D].

        Returns:
          logits f32[B, num_classes], or (logits, features).
        """
        if images.shape[1:3] != self.image_size:
            raise ValueError(f"images are {images.shape[1:3]}, the model takes {self.image_size}")
        x = self._embed(images, train)  # [B, 1 + h·w, D]
        features = {"embed": x}
        shared = None
        if self.shared_relative_bias:
            shared = relative_bias(self, self.num_heads, self.grid, self.dtype)
        last = max(self.depth - 1, 1)
        block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block
        for index in range(self.depth):
            rate = self.drop_path * index / last
            x = block(**self._block(), name=f"block_{index}")(x, shared, rate or None, train)
            features[f"block_{index}"] = x
        features["pooled"] = pooled = self._pool(x)  # [B, D]
        if self.num_classes:
            dtype = np.promote_types(self.dtype, np.float32)
            init = nn.initializers.zeros
            pooled = Dense(self.num_classes, dtype=dtype, kernel_init=init, name="head")(pooled)
        return (pooled, features) if return_features else pooled

    def _embed(self, images, train):
        patches = (self.patch_size, self.patch_size)
        x = normalize(images, self.mean, self.std)
        x = Conv(self.width, patches, patches, dtype=self.dtype, name="patch_embed")(x)
        x = x.reshape(x.shape[0], -1, self.width)  # [B, h·w, D]
        init = nn.initializers.truncated_normal(0.02)
        token = self.param("cls_token", init, (1, 1, self.width)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        if self.absolute_positions:
            x = x + self.param("pos_embed", init, (1, *x.shape[1:])).astype(self.dtype)
        if train and self.dropout:
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        return x

    def _block(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "mlp_width": self.mlp_width,
            "qkv_bias": self.qkv_bias,
            "grid": self.grid if self.relative_bias else None,
            "layer_scale": self.layer_scale,
            "activation": self.activation,
            "layer_norm_eps": self.layer_norm_eps,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }

    def _pool(self, x):
        norm = layer_norm("norm", self.layer_norm_eps, self.dtype)
        x = x if self.norm_after_pool else norm(x)
        if self.pool == "avg":
            x = x[:, 1:].mean(axis=1)
        elif self.pool == "token":
            x = x[:, 0]
        else:
            raise UserError(f"model.pool: {self.pool!r} is none of avg, token")
        return norm(x) if self.norm_after_pool else x
