"""Mix Transformer, SegFormer's encoder (Xie et al. 2021, https://arxiv.org/abs/2105.15203).

Four stages of a pyramid, each with overlapping patches, attention to a reduced map and an MLP with
a depthwise convolution inside, in place of position embeddings. The structure is that of
transformers 5.24 (models/segformer/modeling_segformer.py).

Exactness, where ports go wrong:
  - LayerNorm epsilon is 1e-5 everywhere; transformers' config says layer_norm_eps 1e-6, and nothing
    reads it (the original code has 1e-6 in the blocks and after the stages, 1e-5 elsewhere);
  - GELU is exact (erf) and comes after the depthwise convolution;
  - patches of 7 and 3 pixels pad 3 and 1 on each side, so odd sides are rounded up;
  - keys and values are of windows that tile the map; rows and columns that fill no window are left
    out of them;
  - the next stage takes the normed output of the one before.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.attention import attend
from vision_jax.models.layers import ACTIVATIONS, Conv, Dense, drop_path, layer_norm, normalize
from vision_jax.models.taps import OUTPUT, tap

EPSILON = 1e-5

# depths, widths
_SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256)),
    "b1": ((2, 2, 2, 2), (64, 128, 320, 512)),
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512)),
    "b3": ((3, 4, 18, 3), (64, 128, 320, 512)),
    "b4": ((3, 8, 27, 3), (64, 128, 320, 512)),
    "b5": ((3, 6, 40, 3), (64, 128, 320, 512)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"mit_{name}": {"depths": depths, "widths": widths} for name, (depths, widths) in _SIZES.items()
}

_small = nn.initializers.truncated_normal(0.02)
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Of a depthwise kernel [3, 3, 1, D] the outputs that one input has are as many as its inputs.
_he_normal_depthwise = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("mit_b0"), or None."""
    return VARIANTS.get(name)


class Attention(nn.Module):
    """Self-attention of x[B, h, w, D] whose keys and values are of windows of a reduced map.

    Attributes:
      num_heads: K.
      reduction: side of a window in cells; 1 leaves the map as it is.
    """

    num_heads: int
    reduction: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape

        def project(x, name):
            x = Dense(channels, dtype=self.dtype, kernel_init=_small, name=name)(x)
            return x.reshape(batch, -1, self.num_heads, channels // self.num_heads)

        seen = x
        if min(height, width) < self.reduction:
            raise UserError(
                f"a map of {height} x {width} cells has no window of {self.reduction} for keys: "
                "take larger images"
            )
        if self.reduction > 1:
            size = (self.reduction, self.reduction)
            seen = Conv(
                channels, size, size, dtype=self.dtype, kernel_init=_he_normal, name="sr_conv"
            )(x)
            seen = layer_norm("sr_norm", EPSILON, self.dtype)(seen)
        q, k, v = project(x, "q"), project(seen, "k"), project(seen, "v")  # [B, N, K, d]
        x = attend(q, k, v).reshape(batch, height, width, channels)
        return Dense(channels, dtype=self.dtype, kernel_init=_small, name="proj")(x)


class Mlp(nn.Module):
    """fc2(GELU(conv_dw(fc1(x)))) of x[B, h, w, D], the convolution 3 x 3 on single channels."""

    hidden_width: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        width, hidden = x.shape[-1], self.hidden_width
        x = Dense(hidden, dtype=self.dtype, kernel_init=_small, name="fc1")(x)
        x = Conv(
            hidden,
            (3, 3),
            padding=((1, 1), (1, 1)),
            groups=hidden,
            dtype=self.dtype,
            kernel_init=_he_normal_depthwise,
            name="conv_dw",
        )(x)
        x = ACTIVATIONS["gelu"](x)
        return Dense(width, dtype=self.dtype, kernel_init=_small, name="fc2")(x)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), of maps x[B, h, w, D]."""

    num_heads: int
    reduction: int
    mlp_width: int
    dtype: Any

    @nn.compact
    def __call__(self, x, rate, train: bool):
        def drop(y):
            return drop_path(y, rate, self.make_rng("dropout")) if train and rate else y

        y = layer_norm("norm1", EPSILON, self.dtype)(x)
        x = x + drop(Attention(self.num_heads, self.reduction, self.dtype, name="attn")(y))
        y = layer_norm("norm2", EPSILON, self.dtype)(x)
        return x + drop(Mlp(self.mlp_width, self.dtype, name="mlp")(y))


class Stage(nn.Module):
    """Overlapping patches, blocks (of `block`'s fields) and a norm; `rates` of drop_path."""

    width: int
    patch_size: int
    strides: int
    block: dict[str, Any]
    rates: tuple[float, ...]
    remat: bool

    @nn.compact
    def __call__(self, x, train: bool):
        dtype = self.block["dtype"]
        pad = (self.patch_size // 2, self.patch_size // 2)
        x = Conv(
            self.width,
            (self.patch_size, self.patch_size),
            (self.strides, self.strides),
            (pad, pad),
            dtype=dtype,
            kernel_init=_he_normal,
            name="patch_embed",
        )(x)
        x = layer_norm("patch_norm", EPSILON, dtype)(x)
        block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
        for index, rate in enumerate(self.rates):
            x = block(**self.block, name=f"block_{index}")(x, rate, train)
        return tap(self, OUTPUT, layer_norm("norm", EPSILON, dtype)(x))


class MixTransformer(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, num_classes].

    Attributes:
      num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
      depths, widths, num_heads: blocks, channels and heads of each stage.
      reductions: side of the windows that each stage's keys and values are of, in cells.
      patch_sizes, strides: of each stage's overlapping patches.
      mlp_ratios: hidden widths of each stage's MLPs, in widths.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      dropout, drop_path: rates in training; drop_path grows linearly with depth up to its value.
      dtype: compute dtype; parameters stay float32. The head computes in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    num_classes: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def stem(self) -> str:
        """Path of the first convolution's kernel."""
        return "stage_0/patch_embed/kernel"

    @property
    def pyramid(self) -> tuple[tuple[str, int], ...]:
        """Named features and their stride in pixels, from fine to coarse."""
        strides = np.cumprod(self.strides[: len(self.depths)]).tolist()
        return tuple((f"stage_{index}", stride) for index, stride in enumerate(strides))

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay."""
        return sum(self.depths) + 2

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the first patches 0, block by block, the head last.

        A stage's patches count with its first block, its norm with its last.
        """
        top, _, rest = path.partition("/")
        if not top.startswith("stage_"):
            return sum(self.depths) + 1
        stage, part = int(top.removeprefix("stage_")), rest.partition("/")[0]
        before = sum(self.depths[:stage])
        if part.startswith("block_"):
            return before + int(part.removeprefix("block_")) + 1
        if part == "norm":
            return before + self.depths[stage]
        return before + 1 if stage else 0

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size.
          train: dropout and drop_path act, with keys from "dropout".
          return_features: also return a dict of named intermediates: "stage_0" ... as
            f[B, h, w, C], and "pooled" f[B, D].

        Returns:
          logits f32[B, num_classes], or (logits, features).
        """
        x = normalize(images, self.mean, self.std)
        features = {}
        total = max(sum(self.depths) - 1, 1)
        for index, depth in enumerate(self.depths):
            before = sum(self.depths[:index])
            block = {
                "num_heads": self.num_heads[index],
                "reduction": self.reductions[index],
                "mlp_width": self.widths[index] * self.mlp_ratios[index],
                "dtype": self.dtype,
            }
            x = Stage(
                self.widths[index],
                self.patch_sizes[index],
                self.strides[index],
                block,
                tuple(self.drop_path * (before + i) / total for i in range(depth)),
                self.remat,
                name=f"stage_{index}",
            )(x, train)
            features[f"stage_{index}"] = x
        features["pooled"] = pooled = x.mean((1, 2))
        if self.num_classes:
            if train and self.dropout:
                pooled = nn.Dropout(self.dropout, deterministic=False)(pooled)
            dtype = np.promote_types(self.dtype, np.float32)
            init = nn.initializers.zeros
            pooled = Dense(self.num_classes, dtype=dtype, kernel_init=init, name="head")(pooled)
        return (pooled, features) if return_features else pooled
