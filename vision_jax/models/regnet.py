"""RegNet X and Y (Radosavovic et al. 2020, https://arxiv.org/abs/2003.13678).

Structure and names follow timm 1.0 (timm/models/regnet.py); torchvision and transformers compute
the same.

Exactness, where ports go wrong:
  - 3 x 3 convolutions pad (1, 1), also at stride 2; the stem is one of them, without a max pool;
  - squeeze-excitation (Y) sits after the 3 x 3 and its width is a share of the block's *input*;
  - a group has `group_widths` channels, and never more than there are;
  - BatchNorm: epsilon 1e-5, momentum 0.1.
"""

import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.models.layers import BatchNorm, Conv, Dense, drop_path, normalize
from vision_jax.models.taps import OUTPUT, tap

# Initial width, its slope and multiplier, channels of a group, depth (the paper's tables 8 and 9).
_X = {
    "002": (24, 36.44, 2.49, 8, 13),
    "004": (24, 24.48, 2.54, 16, 22),
    "006": (48, 36.97, 2.24, 24, 16),
    "008": (56, 35.73, 2.28, 16, 16),
    "016": (80, 34.01, 2.25, 24, 18),
    "032": (88, 26.31, 2.25, 48, 25),
    "040": (96, 38.65, 2.43, 40, 23),
    "064": (184, 60.83, 2.07, 56, 17),
    "080": (80, 49.56, 2.88, 120, 23),
    "120": (168, 73.36, 2.37, 112, 19),
    "160": (216, 55.59, 2.1, 128, 22),
    "320": (320, 69.86, 2.0, 168, 23),
}
_Y = {
    "002": (24, 36.44, 2.49, 8, 13),
    "004": (48, 27.89, 2.09, 8, 16),
    "006": (48, 32.54, 2.32, 16, 15),
    "008": (56, 38.84, 2.4, 16, 14),
    "016": (48, 20.71, 2.65, 24, 27),
    "032": (80, 42.63, 2.66, 24, 21),
    "040": (96, 31.41, 2.24, 64, 22),
    "064": (112, 33.22, 2.27, 72, 25),
    "080": (192, 76.82, 2.19, 56, 17),
    "120": (168, 73.36, 2.37, 112, 19),
    "160": (200, 106.23, 2.48, 112, 18),
    "320": (232, 115.89, 2.53, 232, 20),
    "640": (352, 147.48, 2.4, 328, 20),
    "1280": (456, 160.83, 2.52, 264, 27),
}


def _stages(
    initial: int, slope: float, multiplier: float, group: int, depth: int, torchvision: bool = False
) -> dict[str, Any]:
    """The widths that the paper's four numbers stand for: a linear ramp, rounded to stages.

    torchvision rounds a width down to whole groups only if that keeps 90 % of it.
    """
    exponents = [
        round(math.log((initial + slope * i) / initial) / math.log(multiplier))
        for i in range(depth)
    ]
    ramp = [8 * round(initial * multiplier**e / 8) for e in exponents]
    widths, groups, depths = [], [], []
    for width in sorted(set(ramp)):
        own = min(group, width)
        whole = max(own, int(width + own / 2) // own * own)
        if torchvision:
            whole += own if whole < 0.9 * width else 0
        else:
            whole = round(width / own) * own
        widths.append(whole)
        groups.append(own)
        depths.append(ramp.count(width))
    return {"depths": tuple(depths), "widths": tuple(widths), "group_widths": tuple(groups)}


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"regnetx_{name}": _stages(*numbers) for name, numbers in _X.items()},
    **{f"regnety_{name}": _stages(*numbers) | {"se_ratio": 0.25} for name, numbers in _Y.items()},
    "regnetx_004_tv": _stages(*_X["004"], torchvision=True),
    "regnety_008_tv": _stages(*_Y["008"], torchvision=True) | {"se_ratio": 0.25},
    "regnety_080_tv": _stages(*_Y["080"], torchvision=True) | {"se_ratio": 0.25},
}

_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("regnety_040"), or None."""
    return VARIANTS.get(name)


class Block(nn.Module):
    """relu(shortcut(x) + branch(x)): 1 x 1, 3 x 3 in groups, squeeze-excitation, 1 x 1."""

    width: int
    strides: int
    groups: int
    se_ratio: float
    freeze_norm: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, rate, train: bool):
        def conv_norm(x, name, size, strides=1, groups=1, last=False):
            init = nn.initializers.zeros if last else nn.initializers.ones
            return _conv_norm(self, x, train, name, self.width, size, strides, groups, init)

        squeezed = round(x.shape[-1] * self.se_ratio)
        y = nn.relu(conv_norm(x, "1", 1))
        y = nn.relu(conv_norm(y, "2", 3, self.strides, self.groups))
        if self.se_ratio:
            y = SqueezeExcitation(squeezed, self.dtype, name="se")(y)
        y = conv_norm(y, "3", 1, last=True)
        if train and rate is not None:
            y = drop_path(y, rate, self.make_rng("dropout"))
        if self.strides > 1 or x.shape[-1] != self.width:
            x = conv_norm(x, "_downsample", 1, self.strides)
        return nn.relu(x + y)


class SqueezeExcitation(nn.Module):
    """x · sigmoid(fc2(relu(fc1(mean of x)))), a gate for each channel."""

    squeezed: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        gate = x.mean((1, 2))  # [B, C]
        gate = nn.relu(Dense(self.squeezed, dtype=self.dtype, name="fc1")(gate))
        gate = nn.sigmoid(Dense(x.shape[-1], dtype=self.dtype, name="fc2")(gate))
        return x * gate[:, None, None, :]


class Stage(nn.Module):
    """The blocks of one stage; the first one changes width and halves the size."""

    block: dict[str, Any]
    strides: int
    rates: tuple[float, ...]
    remat: bool

    @nn.compact
    def __call__(self, x, train: bool):
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for index, rate in enumerate(self.rates):
            strides = 1 if index else self.strides
            x = block(**self.block, strides=strides, name=f"block_{index}")(
                x, rate if rate else None, train
            )
        return tap(self, OUTPUT, x)


class RegNet(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, num_classes].

    Attributes:
      num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
      depths, widths, group_widths: blocks, channels and channels of a group in each stage.
      se_ratio: squeeze-excitation's width, as a share of the block's input (Y); 0 for none (X).
      stem_width: channels of the stem.
      first_stride: of the first stage.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      dropout, drop_path: rates in training; drop_path grows linearly with depth up to its value.
      freeze_norm: BatchNorm keeps its running statistics in training.
      dtype: compute dtype; parameters stay float32. The head computes in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    num_classes: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group_widths: tuple[int, ...]
    se_ratio: float = 0.0
    stem_width: int = 32
    first_stride: int = 2
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dropout: float = 0.0
    drop_path: float = 0.0
    freeze_norm: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    stem: ClassVar[str] = "stem_conv/kernel"

    @property
    def pyramid(self) -> tuple[tuple[str, int], ...]:
        """Named features and their stride in pixels, from fine to coarse."""
        first = 2 * self.first_stride
        return tuple((f"stage_{i}", first * 2**i) for i in range(len(self.depths)))

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay."""
        return sum(self.depths) + 2

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the stem 0, then block by block, the head last."""
        top, _, rest = path.partition("/")
        if top.startswith("stage_"):
            before = sum(self.depths[: int(top.removeprefix("stage_"))])
            return before + 1 + int(rest.split("/")[0].removeprefix("block_"))
        return sum(self.depths) + 1 if top == "head" else 0

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size.
          train: BatchNorm takes the batch's statistics and updates its own (collection
            "batch_stats") unless frozen; dropout and drop_path act, with keys from "dropout".
          return_features: also return a dict of named intermediates: "stem" and "stage_0" ... as
            f[B, h, w, C], and "pooled" f[B, D].

        Returns:
          logits f32[B, num_classes], or (logits, features).
        """
        x = normalize(images, self.mean, self.std)
        ones = nn.initializers.ones
        x = nn.relu(_conv_norm(self, x, train, "", self.stem_width, 3, 2, 1, ones, prefix="stem_"))
        features = {"stem": x}
        last = max(sum(self.depths) - 1, 1)
        for index, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            block = {
                "width": width,
                "groups": width // self.group_widths[index],
                "se_ratio": self.se_ratio,
                "freeze_norm": self.freeze_norm,
                "dtype": self.dtype,
            }
            before = sum(self.depths[:index])
            rates = tuple(self.drop_path * (before + i) / last for i in range(depth))
            strides = 2 if index else self.first_stride
            x = Stage(block, strides, rates, self.remat, name=f"stage_{index}")(x, train)
            features[f"stage_{index}"] = x
        pooled = x.mean((1, 2))  # [B, D]
        features["pooled"] = logits = pooled
        if self.num_classes:
            if train and self.dropout:
                pooled = nn.Dropout(self.dropout, deterministic=False)(pooled)
            dtype = np.promote_types(self.dtype, np.float32)
            zeros = nn.initializers.zeros
            logits = Dense(self.num_classes, dtype=dtype, kernel_init=zeros, name="head")(pooled)
        return (logits, features) if return_features else logits


def _conv_norm(module, x, train, name, features, size, strides, groups, scale_init, prefix=""):
    """norm(conv(x)), called conv{name} and bn{name}, inside a compact method of `module`."""
    pad = (size // 2, size // 2)
    x = Conv(
        features,
        (size, size),
        (strides, strides),
        (pad, pad),
        groups=groups,
        use_bias=False,
        dtype=module.dtype,
        kernel_init=_he_normal,
        name=f"{prefix}conv{name}",
    )(x)
    return BatchNorm(
        frozen=module.freeze_norm,
        dtype=module.dtype,
        scale_init=scale_init,
        name=f"{prefix}bn{name}",
    )(x, train)
