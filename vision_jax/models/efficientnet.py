"""MobileNetV2 (https://arxiv.org/abs/1801.04381), MobileNetV3 (https://arxiv.org/abs/1905.02244),
EfficientNet (https://arxiv.org/abs/1905.11946) and EfficientNet-Lite.

One module for timm 1.0's two (timm/models/efficientnet.py, mobilenetv3.py): stages of inverted
residuals. MobileNetV2 and the Lite nets have ReLU6, EfficientNet has SiLU and squeeze-excitation.
MobileNetV3 has hard swish after its first stages, gates in some stages, hidden widths of each block
and a hidden layer in front of the head.

Exactness, where ports go wrong:
  - `same_padding` is TensorFlow's: what a stride leaves over is padded, the odd pixel at the bottom
    right, so it depends on the image size; without it a kernel k pads k // 2 on each side;
  - BatchNorm's epsilon is 1e-5, or 1e-3 in nets that come from TensorFlow;
  - a block without expansion has no first convolution; the last convolution has no activation;
  - squeeze-excitation sits after the depthwise convolution, its width a share of the block's input.
    MobileNetV3's is a share of the hidden width, rounded to channels, with ReLU inside and a hard
    sigmoid;
  - torchvision's MobileNetV3 and EfficientNet b5 to b7 have an epsilon of 1e-3 and a momentum of
    0.01, but as a detector's body 1e-5; timm's has 1e-5.
"""

import math
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.models.layers import (
    ACTIVATIONS,
    BatchNorm,
    Conv,
    Dense,
    average,
    drop_path,
    masked,
    normalize,
    stride_mask,
)
from vision_jax.models.taps import OUTPUT, tap

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
# Tables 1 and 2 of the MobileNetV3 paper.
_V3: dict[str, dict[str, Any]] = {
    "large": {
        "depths": (1, 2, 3, 4, 2, 3),
        "widths": (16, 24, 40, 80, 112, 160),
        "kernels": (3, 3, 5, 3, 3, 5),
        "expansions": (1, (4, 3), 3, (6, 2.5, 2.3, 2.3), 6, 6),
        "strides": (1, 2, 2, 2, 1, 2),
        "se_ratio": (0.0, 0.0, 0.25, 0.0, 0.25, 0.25),
        "relu_stages": 3,
        "head_width": 960,
        "head_hidden": 1280,
    },
    "small": {
        "depths": (1, 2, 3, 2, 3),
        "widths": (16, 24, 40, 48, 96),
        "kernels": (3, 3, 5, 5, 5),
        "expansions": (1, (72 / 16, 88 / 24), (4, 6, 6), 3, 6),
        "strides": (2, 2, 2, 1, 2),
        "se_ratio": (0.25, 0.0, 0.25, 0.25, 0.25),
        "relu_stages": 2,
        "head_width": 576,
        "head_hidden": 1024,
    },
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
MOBILE_V3 = {"stem_width": 16, "activation": "hard_swish", "hard_gate": True}
TORCHVISION = {"batch_norm_eps": 1e-3, "batch_norm_momentum": 0.01}  # of its later builders
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
        f"{prefix}mobilenetv3_{size}_100": {**sizes, **MOBILE_V3} | tf
        for prefix, tf in (("", {}), ("tf_", _TF))
        for size, sizes in _V3.items()
    },
    **{
        f"mobilenet_v3_{size}": {**sizes, **MOBILE_V3, **TORCHVISION} for size, sizes in _V3.items()
    },
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

_SHARED = (  # of all blocks
    *("hard_gate", "same_padding", "batch_norm_eps", "batch_norm_momentum"),
    *("freeze_norm", "dtype"),
)
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("mobilenetv2_100", "tf_efficientnet_lite0"), or None."""
    return VARIANTS.get(name)


def each(given: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """What is given once for all, or for each, as so many values.

    Examples:
      >>> each(3, 2), each((4, 3), 2)
      ((3, 3), (4, 3))
    """
    return (given,) * count if isinstance(given, int | float) else tuple(given)


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
    se_ratio: float
    activation: str
    net: dict[str, Any]

    @nn.compact
    def __call__(self, x, rate, train: bool, mask=None):
        net, inputs = self.net, x.shape[-1]
        act, hard = ACTIVATIONS[self.activation], net["hard_gate"]
        mid = round_channels(inputs * self.expansion) if self.expansion != 1 else inputs
        y = x
        if self.expansion != 1:
            y = act(conv_norm(y, train, "expand", mid, 1, 1, 1, net, mask))
        mask = stride_mask(mask, self.strides)
        y = act(conv_norm(y, train, "depthwise", mid, self.kernel, self.strides, mid, net, mask))
        if ratio := self.se_ratio:
            squeezed = round_channels(mid * ratio) if hard else round(inputs * ratio)
            inner = "relu" if hard else self.activation
            y = SqueezeExcitation(squeezed, inner, hard, net["dtype"], name="se")(y, mask)
        y = conv_norm(y, train, "project", self.width, 1, 1, 1, net, mask)
        if self.strides > 1 or inputs != self.width:
            return y
        if train and rate is not None:
            y = drop_path(y, rate, self.make_rng("dropout"))
        return x + y


class SqueezeExcitation(nn.Module):
    """x · sigmoid(expand(act(reduce(mean of x)))), a gate for each channel; or hard_sigmoid."""

    squeezed: int
    activation: str
    hard: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, mask=None):
        gate = average(x, mask)  # [B, C]
        gate = Dense(self.squeezed, dtype=self.dtype, name="reduce")(gate)
        gate = Dense(x.shape[-1], dtype=self.dtype, name="expand")(
            ACTIVATIONS[self.activation](gate)
        )
        gate = nn.hard_sigmoid(gate) if self.hard else nn.sigmoid(gate)
        return x * gate[:, None, None, :]


class Stage(nn.Module):
    """The blocks of one stage: what the first one, which changes width and stride, and all give."""

    block: dict[str, Any]
    strides: int
    expansions: tuple[float, ...]
    rates: tuple[float, ...]
    remat: bool

    @nn.compact
    def __call__(self, x, train: bool, mask=None):
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        outputs = []
        for index, (expansion, rate) in enumerate(zip(self.expansions, self.rates, strict=True)):
            strides = 1 if index else self.strides
            x = block(**self.block, expansion=expansion, strides=strides, name=f"block_{index}")(
                x, rate if rate else None, train, mask
            )
            mask = stride_mask(mask, strides)
            outputs.append(x)
        return outputs[0], tap(self, OUTPUT, x)


class EfficientNet(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, num_classes].

    Attributes:
      num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
      depths, widths, kernels, strides, expansions: of each stage: its blocks, channels, depthwise
        kernel, first block's stride, and hidden widths in inputs, or those of each of its blocks.
      stem_width, head_width: channels of the first and of the last convolution.
      head_hidden: width of a hidden layer in front of the head; 0 for none.
      se_ratio: squeeze-excitation's width, as a share of the block's input; 0 for none; or that of
        each stage.
      hard_gate: squeeze-excitation is MobileNetV3's: a share of the hidden width, hard sigmoid.
      activation: "relu6", "silu" or "hard_swish".
      relu_stages: so many stages, the first ones, have ReLU in its place.
      same_padding: TensorFlow's padding.
      batch_norm_eps, batch_norm_momentum: BatchNorm's epsilon, and a new batch's share in its
        running statistics.
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
    expansions: tuple[float | tuple[float, ...], ...]
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    stem_width: int = 32
    head_width: int = 1280
    head_hidden: int = 0
    se_ratio: float | tuple[float, ...] = 0.0
    hard_gate: bool = False
    activation: str = "relu6"
    relu_stages: int = 0
    same_padding: bool = False
    batch_norm_eps: float = 1e-5
    batch_norm_momentum: float = 0.1
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
        return sum(self.depths) + 2 + bool(self.head_hidden)

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the stem 0, block by block, the head last.

        As in timm, the last convolution and its BatchNorm count with the last block, in MobileNetV3
        as a block, and the hidden layer with the head.
        """
        top, _, rest = path.partition("/")
        if top.startswith("stage_"):
            before = sum(self.depths[: int(top.removeprefix("stage_"))])
            return before + 1 + int(rest.split("/")[0].removeprefix("block_"))
        if top.startswith("stem"):
            return 0
        return self.num_layers - (2 if top.startswith("last_") else 1)

    @nn.compact
    def __call__(
        self,
        images,
        *,
        mask=None,
        train: bool = False,
        return_features: bool | Literal["maps"] = False,
    ):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size.
          mask: bool[B, H, W] of the pixels that are the image, or None for all: see ResNet's. Not
            with `same_padding`, which would pad otherwise.
          train: BatchNorm takes the batch's statistics and updates its own (collection
            "batch_stats") unless frozen; dropout and drop_path act, with keys from "dropout".
          return_features: also return a dict of named intermediates: "stem", "stage_0/block_0" (a
            stage's first block), "stage_0" ..., and "last" as f[B, h, w, C], and "pooled" f[B, D],
            of the hidden layer if there is one. "maps" leaves out all that follows the last stage.

        Returns:
          logits f32[B, num_classes], or (logits, features), the former None of maps alone.
        """
        net = {name: getattr(self, name) for name in _SHARED}
        act = ACTIVATIONS[self.activation]
        x = masked(normalize(images, self.mean, self.std), mask)
        mask = stride_mask(mask, 2)
        x = act(conv_norm(x, train, "stem", self.stem_width, 3, 2, 1, net, mask))
        features = {"stem": x}
        last = max(sum(self.depths) - 1, 1)
        for index, depth in enumerate(self.depths):
            expansions = each(self.expansions[index], depth)
            block = {
                "width": self.widths[index],
                "kernel": self.kernels[index],
                "se_ratio": each(self.se_ratio, len(self.depths))[index],
                "activation": "relu" if index < self.relu_stages else self.activation,
                "net": net,
            }
            before = sum(self.depths[:index])
            rates = tuple(self.drop_path * (before + i) / last for i in range(depth))
            name, strides = f"stage_{index}", self.strides[index]
            stage = Stage(block, strides, expansions, rates, self.remat, name=name)
            features[f"{name}/block_0"], x = stage(x, train, mask)
            features[name] = x
            mask = stride_mask(mask, strides)
        if return_features == "maps":
            return None, features
        x = act(conv_norm(x, train, "last", self.head_width, 1, 1, 1, net, mask))
        features["last"] = x
        pooled = average(x, mask)  # [B, D]
        if self.head_hidden:
            init = nn.initializers.normal(0.01)
            hidden = Dense(self.head_hidden, dtype=self.dtype, kernel_init=init, name="pre_logits")
            pooled = act(hidden(pooled))
        features["pooled"] = logits = pooled
        if self.num_classes:
            if train and self.dropout:
                pooled = nn.Dropout(self.dropout, deterministic=False)(pooled)
            dtype = np.promote_types(self.dtype, np.float32)
            zeros = nn.initializers.zeros
            logits = Dense(self.num_classes, dtype=dtype, kernel_init=zeros, name="head")(pooled)
        return (logits, features) if return_features else logits


def conv_norm(x, train, name, features, kernel, strides, groups, net, mask):
    """norm(conv(x)), called {name}_conv and {name}_bn, inside a compact method.

    Zero outside the mask, and what follows keeps it: all of these activations are 0 at 0.
    """
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
    norm = BatchNorm(
        epsilon=net["batch_norm_eps"],
        momentum=net["batch_norm_momentum"],
        frozen=net["freeze_norm"],
        dtype=net["dtype"],
        name=f"{name}_bn",
    )
    return masked(norm(x, train), mask)
