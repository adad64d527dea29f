"""ConvNeXt (Liu et al. 2022, https://arxiv.org/abs/2201.03545) and ConvNeXt V2 (Woo et al. 2023,
https://arxiv.org/abs/2301.00808).

Structure and names follow timm 1.0 (timm/models/convnext.py).

Exactness, where ports go wrong:
  - GELU is exact (erf); LayerNorm's epsilon is 1e-6, in transformers 1e-12 for the last norm alone,
    in timm's xxlarge 1e-5;
  - the depthwise convolution pads (3, 3) on each side for its 7 x 7;
  - V2 has response normalization (GRN) between the MLP's layers in place of LayerScale; its epsilon
    of 1e-6 is added to the mean of the norms;
  - the last norm acts on the pooled vector, except with `norm_before_pool`.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.layers import ACTIVATIONS, Conv, Dense, drop_path, layer_norm, normalize
from vision_jax.models.taps import OUTPUT, tap

# depths, widths
_SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
_SMALL = ("atto", "femto", "pico", "nano")
_V2 = {"grn": True, "layer_scale": None}


def _size(name: str) -> dict[str, Any]:
    depths, widths = _SIZES[name]
    return {"depths": depths, "widths": widths, "conv_mlp": name in _SMALL}


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"convnext_{name}": _size(name) for name in _SIZES if name != "huge"},
    **{
        f"convnextv2_{name}": _size(name) | _V2
        for name in _SIZES
        if name not in ("xlarge", "xxlarge")
    },
    "convnext_atto_ols": _size("atto") | {"stem_widths": (24,)},
    "convnext_femto_ols": _size("femto") | {"stem_widths": (24,)},
    "convnext_pico_ols": _size("pico") | {"stem_widths": (32,)},
    "convnext_nano_ols": _size("nano") | {"stem_widths": (80,)},
    "convnext_tiny_hnf": _size("tiny") | {"norm_before_pool": True, "conv_mlp": True},
    "convnext_large_mlp": _size("large") | {"head_hidden": 1536},
}
VARIANTS["convnext_xxlarge"] |= {"layer_norm_eps": 1e-5, "head_norm_eps": 1e-5}

_normal = nn.initializers.truncated_normal(0.02)


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("convnext_tiny", "convnextv2_base"), or None."""
    return VARIANTS.get(name)


class Block(nn.Module):
    """x + scale · fc2(GELU(fc1(norm(conv_dw(x))))), with GRN before fc2 in V2."""

    kernel_size: int
    hidden_width: int
    grn: bool
    layer_scale: float | None
    activation: str
    layer_norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x, rate, train: bool):
        width, size = x.shape[-1], self.kernel_size
        pad = (size // 2, size // 2)
        y = Conv(
            width,
            (size, size),
            padding=(pad, pad),
            groups=width,
            dtype=self.dtype,
            kernel_init=_normal,
            name="conv_dw",
        )(x)
        y = layer_norm("norm", self.layer_norm_eps, self.dtype)(y)
        y = Mlp(self.hidden_width, self.activation, self.grn, self.dtype, name="mlp")(y)
        if self.layer_scale is not None:
            scale = self.param("layer_scale", nn.initializers.constant(self.layer_scale), (width,))
            y = y * scale.astype(y.dtype).reshape(1, 1, 1, -1)
        if train and rate is not None:
            y = drop_path(y, rate, self.make_rng("dropout"))
        return x + y


class Mlp(nn.Module):
    """fc2(grn(activation(fc1(x)))) on each pixel."""

    hidden_width: int
    activation: str
    grn: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = Dense(self.hidden_width, dtype=self.dtype, kernel_init=_normal, name="fc1")(x)
        x = ACTIVATIONS[self.activation](x)
        if self.grn:
            x = GlobalResponseNorm(name="grn")(x)
        return Dense(width, dtype=self.dtype, kernel_init=_normal, name="fc2")(x)


class GlobalResponseNorm(nn.Module):
    """x + scale · x · n + bias, n the channel's norm over the image relative to the mean norm."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        zeros, width = nn.initializers.zeros, (x.shape[-1],)
        scale, bias = (
            self.param(name, zeros, width).reshape(1, 1, 1, -1) for name in ("scale", "bias")
        )
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        norms = jnp.sqrt(jnp.square(wide).sum((1, 2), keepdims=True))  # [B, 1, 1, C]
        norms = norms / (norms.mean(-1, keepdims=True) + self.epsilon)
        return x + (scale * (wide * norms) + bias).astype(x.dtype)


class Stage(nn.Module):
    """Norm and convolution where the width or size changes, then blocks (of `block`'s fields)."""

    width: int
    strides: int
    rates: tuple[float, ...]
    block: dict[str, Any]
    remat: bool

    @nn.compact
    def __call__(self, x, train: bool):
        dtype = self.block["dtype"]
        if self.strides > 1 or x.shape[-1] != self.width:
            x = layer_norm("downsample_norm", self.block["layer_norm_eps"], dtype)(x)
            size = (self.strides, self.strides)
            x = Conv(
                self.width, size, size, dtype=dtype, kernel_init=_normal, name="downsample_conv"
            )(x)
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for index, rate in enumerate(self.rates):
            x = block(**self.block, name=f"block_{index}")(x, rate if rate else None, train)
        return tap(self, OUTPUT, x)


class ConvNeXt(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, num_classes].

    Attributes:
      num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
      depths, widths: blocks and channels of each stage.
      stem_widths: of the first of two overlapping 3 x 3 convolutions; () for one patch convolution.
      patch_size: of the patch convolution, in pixels.
      first_stride: of the first stage; timm's is 2 behind patches of 2 pixels.
      kernel_size: of the depthwise convolutions.
      mlp_ratio: hidden width of the MLP, in widths.
      mlp_widths: each stage's hidden width, where pruning has left others than follow from
        `mlp_ratio`; () otherwise.
      grn: response normalization in the MLP (V2).
      layer_scale: initial value, or None for no LayerScale (V2).
      conv_mlp: timm keeps the MLP's kernels as 1 x 1 convolutions; it computes the same.
      norm_before_pool: the last norm acts on pixels and not on the pooled vector.
      head_hidden: width of a hidden layer with GELU in front of the head; 0 for none.
      layer_norm_eps, head_norm_eps: of all norms, and of the last.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      dropout, drop_path: rates in training; drop_path grows linearly with depth up to its value.
      dtype: compute dtype; parameters stay float32. The head computes in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    num_classes: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem_widths: tuple[int, ...] = ()
    patch_size: int = 4
    first_stride: int = 1
    kernel_size: int = 7
    mlp_ratio: int = 4
    mlp_widths: tuple[int, ...] = ()
    grn: bool = False
    layer_scale: float | None = 1e-6
    conv_mlp: bool = False
    norm_before_pool: bool = False
    head_hidden: int = 0
    activation: str = "gelu"
    layer_norm_eps: float = 1e-6
    head_norm_eps: float = 1e-6
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
        return "stem_conv_0/kernel" if self.stem_widths else "stem_conv/kernel"

    @property
    def pyramid(self) -> tuple[tuple[str, int], ...]:
        """Named features and their stride in pixels, from fine to coarse."""
        first = (4 if self.stem_widths else self.patch_size) * self.first_stride
        return tuple((f"stage_{i}", first * 2**i) for i in range(len(self.depths)))

    @property
    def size_divisor(self) -> int:
        """Of an image's sides: of others the last pixels would be cut off."""
        return 1 if self.stem_widths else self.patch_size

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay."""
        return sum(self.depths) + 2

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the stem 0, block by block, what follows last.

        As in timm's group_matcher, a stage's downsampling counts with its first block, and a last
        norm of pixels with the last block.
        """
        top, _, rest = path.partition("/")
        if top == "norm" and self.norm_before_pool:
            return sum(self.depths)
        if not top.startswith("stage_"):
            return 0 if top.startswith("stem") else sum(self.depths) + 1
        before = sum(self.depths[: int(top.removeprefix("stage_"))])
        block = rest.split("/")[0]
        return before + 1 + (int(block[6:]) if block.startswith("block_") else 0)

    @nn.compact
    def __call__(
        self,
        images,
        *,
        train: bool = False,
        return_features: bool | Literal["maps"] = False,
    ):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size from 32 pixels on.
          train: dropout and drop_path act, with keys from the "dropout" collection.
          return_features: also return a dict of named intermediates: "stem" and "stage_0" ... as
            f[B, h, w, C], and "pooled" f[B, D]. "maps" leaves out all that follows the last stage.

        Returns:
          logits f32[B, num_classes], or (logits, features), the former None of maps alone.
        """
        x = self._stem(normalize(images, self.mean, self.std))
        features = {"stem": x}
        block = {
            "kernel_size": self.kernel_size,
            "grn": self.grn,
            "layer_scale": self.layer_scale,
            "activation": self.activation,
            "layer_norm_eps": self.layer_norm_eps,
            "dtype": self.dtype,
        }
        last = max(sum(self.depths) - 1, 1)
        for index, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            before = sum(self.depths[:index])
            rates = tuple(self.drop_path * (before + i) / last for i in range(depth))
            strides = 2 if index else self.first_stride
            hidden = self.mlp_widths[index] if self.mlp_widths else self.mlp_ratio * width
            own = {**block, "hidden_width": hidden}
            stage = Stage(width, strides, rates, own, self.remat, name=f"stage_{index}")
            if min(x.shape[1:3]) < strides:
                raise UserError(
                    f"convnext: images of {images.shape[1:3]} pixels are too small, nothing is "
                    f"left of them for stage {index}"
                )
            features[f"stage_{index}"] = x = stage(x, train)
        if return_features == "maps":
            return None, features
        pooled = self._pool(x)  # [B, D]
        features["pooled"] = pooled
        logits = self._head(pooled, train) if self.num_classes else pooled
        return (logits, features) if return_features else logits

    def _stem(self, x):
        width = self.widths[0]

        def conv(x, name, features, size, strides, pad):
            sides = ((pad, pad), (pad, pad))
            return Conv(
                features,
                (size, size),
                (strides, strides),
                sides,
                dtype=self.dtype,
                kernel_init=_normal,
                name=name,
            )(x)

        if self.stem_widths:
            x = conv(x, "stem_conv_0", self.stem_widths[0], 3, 2, 1)
            x = conv(x, "stem_conv_1", width, 3, 2, 1)
        else:
            x = conv(x, "stem_conv", width, self.patch_size, self.patch_size, 0)
        return layer_norm("stem_norm", self.layer_norm_eps, self.dtype)(x)

    def _pool(self, x):
        norm = layer_norm("norm", self.head_norm_eps, self.dtype)
        x = norm(x).mean((1, 2)) if self.norm_before_pool else norm(x.mean((1, 2)))
        if self.head_hidden:
            x = Dense(self.head_hidden, dtype=self.dtype, kernel_init=_normal, name="pre_logits")(x)
            x = ACTIVATIONS["gelu"](x)
        return x

    def _head(self, x, train):
        if train and self.dropout:
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        dtype = np.promote_types(self.dtype, np.float32)
        zeros = nn.initializers.zeros
        return Dense(self.num_classes, dtype=dtype, kernel_init=zeros, name="head")(x)
