"""MobileNetV2 (https://arxiv.org/abs/1801.04381), EfficientNet (https://arxiv.org/abs/1905.11946)
and EfficientNet-Lite.

One module, as in timm 1.0 (timm/models/efficientnet.py): stages of inverted residuals. MobileNetV2
and the Lite nets have ReLU6, EfficientNet has SiLU and squeeze-excitation.

Exactness, where ports go wrong:
  - `same_padding` is TensorFlow's: what a stride leaves over is padded, the odd pixel at the bottom
    right, so it depends on the image size; without it a kernel k pads k // 2 on each side;
  - BatchNorm's epsilon is 1e-5, or 1e-3 in nets that come from TensorFlow;
  - a block without expansion has no first convolution; the last convolution has no activation;
  - squeeze-excitation sits after the depthwise convolution, its width a share of the block's input.
"""

import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.models.layers import ACTIVATIONS, BatchNorm, Conv, Dense, drop_path, normalize

_MOBILE = {
    "depths": (1, 2, 3, 4, 3, 3, 1),
    "widths": (16, 24, 32, 64, 96, 160, 320),
    "kernels": (3,) * 7,
    "expansions": (1, 6, 6, 6, 6, 6, 6),
}
_EFFICIENT = {
    "depths": (1, 2, 2, 3, 3, 4, 1),
    "widths": (16, 24, 40, 80, 112, 192, 320),
    "kernels": (3, 3, 5, 3, 5, 5, 3),
    "expansions": (1, 6, 6, 6, 6, 6, 6),
}


def round_channels(width: float) -> int:
    """The nearest multiple of 8 that keeps at least 90 % of a width."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def _scaled(base: dict[str, Any], width: float, depth: float, fixed_ends: bool) -> dict[str, Any]:
    """Another width and depth; `fixed_ends` leaves stem, head and outer depths alone."""
    ends = (0, len(base["depths"]) - 1)
    return {
        **base,
        "depths": tuple(
            n if fixed_ends and i in ends else math.ceil(n * depth)
            for i, n in enumerate(base["depths"])
        ),
        "widths": tuple(round_channels(width * w) for w in base["widths"]),
        "stem_width": 32 if fixed_ends else round_channels(32 * width),
        "head_width": 1280 if fixed_ends else round_channels(1280 * width),
    }


# Width and depth of b0 to b7.
_SCALES: tuple[tuple[float, float], ...] = (
    *((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4)),
    *((1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1)),
)
_TF = {"same_padding": True, "batch_norm_eps": 1e-3}
_SE = {"se_ratio": 0.25, "activation": "silu"}
VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"mobilenetv2_{round(100 * w):03d}": {
            **_scaled(_MOBILE, w, 1.0, False),
            "head_width": max(1280, round_channels(1280 * w)),
        }
        for w in (0.35, 0.5, 0.75, 1.0, 1.4)
    },
    "mobilenetv2_110d": _scaled(_MOBILE, 1.1, 1.2, True),
    "mobilenetv2_120d": _scaled(_MOBILE, 1.2, 1.4, True),
    **{
        f"{prefix}efficientnet_lite{i}": _scaled(_EFFICIENT, *scale, True) | tf
        for prefix, tf in (("", {}), ("tf_", _TF))
        for i, scale in enumerate(_SCALES[:5])
    },
    **{
        f"{prefix}efficientnet_b{i}": _scaled(_EFFICIENT, *scale, False) | _SE | tf
        for prefix, tf in (("", {}), ("tf_", _TF))
        for i, scale in enumerate(_SCALES)
    },
}

_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("mobilenetv2_100", "tf_efficientnet_lite0"), or None."""
    return VARIANTS.get(name)


def padding(size: int, kernel: int, strides: int, same: bool) -> tuple[int, int]:
    """(before, after) along an axis of `size` pixels.

    Examples:
      >>> padding(224, 3, 2, same=True), padding(225, 3, 2, same=True)
      ((0, 1), (1, 1))
      >>> padding(224, 3, 2, same=False)
      (1, 1)
    """
    if not same:
        return kernel // 2, kernel // 2
    total = max((-(-size // strides) - 1) * strides + kernel - size, 0)
    return total // 2, total - total // 2


class Block(nn.Module):
    """x + branch(x): expand by 1 x 1, depthwise, squeeze-excitation, project by 1 x 1.

    The sum is made where strides and widths allow. `net` holds the fields that all blocks share.
    """

    width: int
    kernel: int
    strides: int
    expansion: float
    net: dict[str, Any]

    @nn.compact
    def __call__(self, x, rate, train: bool):
        net, inputs = self.net, x.shape[-1]
        act = ACTIVATIONS[net["activation"]]
        mid = round_channels(inputs * self.expansion) if self.expansion != 1 else inputs
        y = x
        if self.expansion != 1:
            y = act(conv_norm(y, train, "expand", mid, 1, 1, 1, net))
        y = act(conv_norm(y, train, "depthwise", mid, self.kernel, self.strides, mid, net))
        if net["se_ratio"]:
            squeezed = round(inputs * net["se_ratio"])
            y = SqueezeExcitation(squeezed, net["activation"], net["dtype"], name="se")(y)
        y = conv_norm(y, train, "project", self.width, 1, 1, 1, net)
        if self.strides > 1 or inputs != self.width:
            return y
        if train and rate is not None:
            y = drop_path(y, rate, self.make_rng("dropout"))
        return x + y


class SqueezeExcitation(nn.Module):
    """x · sigmoid(expand(act(reduce(mean of x)))), a gate for each channel."""

    squeezed: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x):
        gate = x.mean((1, 2))  # [B, C]
        gate = Dense(self.squeezed, dtype=self.dtype, name="reduce")(gate)
        gate = Dense(x.shape[-1], dtype=self.dtype, name="expand")(
            ACTIVATIONS[self.activation](gate)
        )
        return x * nn.sigmoid(gate)[:, None, None, :]


class Stage(nn.Module):
    """The blocks of one stage; the first one changes width and stride."""

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
        return x


class EfficientNet(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, num_classes].

    Attributes:
      num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
      depths, widths, kernels, strides, expansions: of each stage: its blocks, channels, depthwise
        kernel, first block's stride, and hidden widths in inputs.
      stem_width, head_width: channels of the first and of the last convolution.
      se_ratio: squeeze-excitation's width, as a share of the block's input; 0 for none.
      activation: "relu6" or "silu".
      same_padding: TensorFlow's padding.
      batch_norm_eps: BatchNorm's epsilon.
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
    kernels: tuple[int, ...]
    expansions: tuple[float, ...]
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    stem_width: int = 32
    head_width: int = 1280
    se_ratio: float = 0.0
    activation: str = "relu6"
    same_padding: bool = False
    batch_norm_eps: float = 1e-5
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
        """The last feature at each stride in pixels, from fine to coarse."""
        last, stride = {}, 2
        for index, strides in enumerate(self.strides):
            stride *= strides
            last[stride] = f"stage_{index}"
        return tuple((name, stride) for stride, name in last.items())

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay."""
        return sum(self.depths) + 2

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the stem 0, block by block, the head last.

        As in timm, the last convolution and its BatchNorm count with the last block.
        """
        top, _, rest = path.partition("/")
        if top.startswith("stage_"):
            before = sum(self.depths[: int(top.removeprefix("stage_"))])
            return before + 1 + int(rest.split("/")[0].removeprefix("block_"))
        if top.startswith("stem"):
            return 0
        return sum(self.depths) + (0 if top.startswith("last_") else 1)

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
        names = ("se_ratio", "activation", "same_padding", "batch_norm_eps", "freeze_norm", "dtype")
        net = {name: getattr(self, name) for name in names}
        act = ACTIVATIONS[self.activation]
        x = normalize(images, self.mean, self.std)
        x = act(conv_norm(x, train, "stem", self.stem_width, 3, 2, 1, net))
        features = {"stem": x}
        last = max(sum(self.depths) - 1, 1)
        for index, depth in enumerate(self.depths):
            block = {
                "width": self.widths[index],
                "kernel": self.kernels[index],
                "expansion": self.expansions[index],
                "net": net,
            }
            before = sum(self.depths[:index])
            rates = tuple(self.drop_path * (before + i) / last for i in range(depth))
            stage = Stage(block, self.strides[index], rates, self.remat, name=f"stage_{index}")
            features[f"stage_{index}"] = x = stage(x, train)
        x = act(conv_norm(x, train, "last", self.head_width, 1, 1, 1, net))
        features["pooled"] = logits = pooled = x.mean((1, 2))  # [B, D]
        if self.num_classes:
            if train and self.dropout:
                pooled = nn.Dropout(self.dropout, deterministic=False)(pooled)
            dtype = np.promote_types(self.dtype, np.float32)
            zeros = nn.initializers.zeros
            logits = Dense(self.num_classes, dtype=dtype, kernel_init=zeros, name="head")(pooled)
        return (logits, features) if return_features else logits


def conv_norm(x, train, name, features, kernel, strides, groups, net):
    """norm(conv(x)), called {name}_conv and {name}_bn, inside a compact method."""
    pads = tuple(padding(side, kernel, strides, net["same_padding"]) for side in x.shape[1:3])
    x = Conv(
        features,
        (kernel, kernel),
        (strides, strides),
        pads,
        groups=groups,
        use_bias=False,
        dtype=net["dtype"],
        kernel_init=_he_normal,
        name=f"{name}_conv",
    )(x)
    return BatchNorm(
        epsilon=net["batch_norm_eps"],
        frozen=net["freeze_norm"],
        dtype=net["dtype"],
        name=f"{name}_bn",
    )(x, train)
