"""ResNet (He et al. 2015, https://arxiv.org/abs/1512.03385) and its relatives.

One module covers ResNet 18 to 152, ResNeXt, wide ResNets and the `d` variants with a deep stem and
average-pooled shortcuts (https://arxiv.org/abs/1812.01187). Structure and names follow timm 1.0
(timm/models/resnet.py); torchvision and transformers compute the same.

Exactness, where ports go wrong:
  - convolutions pad (1, 1) for 3 x 3 and (3, 3) for 7 x 7, also at stride 2; SAME would not;
  - the max pool pads (1, 1) with minus infinity;
  - a bottleneck's stride sits on its 3 x 3 convolution, in transformers by request on the first;
  - the average pool of a `d` shortcut is ceil_mode without counting the padding;
  - BatchNorm: epsilon 1e-5 (0 in torchvision's Faster R-CNN of COCO_V1), momentum 0.1.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    average,
    drop_path,
    masked,
    max_pool,
    normalize,
    stride_mask,
)
from vision_jax.models.taps import OUTPUT, tap

BASIC, BOTTLENECK = "basic", "bottleneck"
_LAYERS: dict[int, tuple[str, tuple[int, ...]]] = {
    10: (BASIC, (1, 1, 1, 1)),
    14: (BOTTLENECK, (1, 1, 1, 1)),
    18: (BASIC, (2, 2, 2, 2)),
    26: (BOTTLENECK, (2, 2, 2, 2)),
    34: (BASIC, (3, 4, 6, 3)),
    50: (BOTTLENECK, (3, 4, 6, 3)),
    101: (BOTTLENECK, (3, 4, 23, 3)),
    152: (BOTTLENECK, (3, 8, 36, 3)),
    200: (BOTTLENECK, (3, 24, 36, 3)),
}
_DEEP = {"stem_widths": (32, 32), "pooled_shortcut": True}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"resnet{n}": {"block": b, "depths": d} for n, (b, d) in _LAYERS.items()},
    **{f"resnet{n}d": {"block": b, "depths": d, **_DEEP} for n, (b, d) in _LAYERS.items()},
    **{
        f"resnext{n}_{groups}x{width}d": {
            "block": BOTTLENECK,
            "depths": _LAYERS[n][1],
            "groups": groups,
            "base_width": width,
        }
        for n, groups, width in (
            (50, 32, 4),
            (101, 32, 4),
            (101, 32, 8),
            (101, 32, 16),
            (101, 32, 32),
            (101, 64, 4),
        )
    },
    "resnext50d_32x4d": {
        "block": BOTTLENECK,
        "depths": (3, 4, 6, 3),
        "groups": 32,
        "base_width": 4,
        **_DEEP,
    },
    **{
        f"wide_resnet{n}_2": {"block": BOTTLENECK, "depths": _LAYERS[n][1], "base_width": 128}
        for n in (50, 101)
    },
}

# He initialization by the outputs, as torchvision and timm start their ResNets.
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("resnet50", "resnext101_32x8d"), or None."""
    return VARIANTS.get(name)


def relu(x, mask):
    """relu(x[B, h, w, C]), zero outside the mask."""
    return masked(nn.relu(x), mask)


class Block(nn.Module):
    """relu(x + branch(x)): two 3 x 3 convolutions, or 1 x 1, 3 x 3 in groups, 1 x 1.

    Attributes:
      mid: channels inside.
      out: channels that leave.
      strides: of the whole block.
      project: the shortcut has a convolution of its own.
      dilations: of the first and of the second 3 x 3; a bottleneck has the first alone.
      stride_first: a bottleneck's stride sits on its first convolution.
    """

    kind: str
    mid: int
    out: int
    strides: int
    project: bool
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    pooled_shortcut: bool = False
    stride_first: bool = False
    batch_norm_eps: float = 1e-5
    freeze_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, rate, train: bool, mask=None):
        def conv_norm(x, index, features, size, strides=1, groups=1, dilation=1, last=False):
            pad = (dilation * (size // 2),) * 2
            x = Conv(
                features,
                (size, size),
                (strides, strides),
                (pad, pad),
                groups=groups,
                dilation=dilation,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=_he_normal,
                name=f"conv{index}",
            )(x)
            # A branch starts at zero, so that a deep network starts as its shortcuts.
            init = nn.initializers.zeros if last else nn.initializers.ones
            return self._norm(f"bn{index}", init)(x, train)

        dilation, second_dilation = self.dilations
        after = stride_mask(mask, self.strides)
        if self.kind == BASIC:
            y = relu(conv_norm(x, 1, self.mid, 3, self.strides, dilation=dilation), after)
            y = conv_norm(y, 2, self.out, 3, dilation=second_dilation, last=True)
        else:
            first, second = (self.strides, 1) if self.stride_first else (1, self.strides)
            y = relu(conv_norm(x, 1, self.mid, 1, first), stride_mask(mask, first))
            y = relu(conv_norm(y, 2, self.mid, 3, second, self.groups, dilation), after)
            y = conv_norm(y, 3, self.out, 1, last=True)
        if train and rate is not None:
            y = drop_path(y, rate, self.make_rng("dropout"))
        return relu(self._shortcut(x, train) + y, after)

    def _shortcut(self, x, train):
        if not self.project:
            return x
        strides = self.strides
        if self.pooled_shortcut and strides > 1:
            bottom, right = (-side % strides for side in x.shape[1:3])  # ceil_mode
            x = nn.avg_pool(
                x,
                (strides, strides),
                (strides, strides),
                ((0, bottom), (0, right)),
                count_include_pad=False,
            )
            strides = 1
        x = Conv(
            self.out,
            (1, 1),
            (strides, strides),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_he_normal,
            name="downsample_conv",
        )(x)
        return self._norm("downsample_bn")(x, train)

    def _norm(self, name, init=nn.initializers.ones):
        return BatchNorm(
            self.batch_norm_eps,
            frozen=self.freeze_norm,
            dtype=self.dtype,
            scale_init=init,
            name=name,
        )


class Stage(nn.Module):
    """The blocks of one stage; the first one changes width and stride.

    `arguments` are `Block`'s that all blocks share; `rates` of drop_path, one a block. The first
    3 x 3 convolution of a dilated stage has the `first_dilation`, which is that of the stage
    before, as in torchvision and timm.
    """

    arguments: dict[str, Any]
    strides: int
    rates: tuple[float, ...]
    remat: bool
    dilation: int = 1
    first_dilation: int = 1

    @nn.compact
    def __call__(self, x, train: bool, mask=None):
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for index, rate in enumerate(self.rates):
            strides = 1 if index else self.strides
            project = strides > 1 or x.shape[-1] != self.arguments["out"]
            x = block(
                **self.arguments,
                strides=strides,
                project=project,
                dilations=(self.dilation if index else self.first_dilation, self.dilation),
                name=f"block_{index}",
            )(x, rate if rate else None, train, mask)
            mask = stride_mask(mask, strides)
        return tap(self, OUTPUT, x)


class ResNet(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, num_classes].

    Attributes:
      num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
      depths: blocks of each stage.
      block: "basic" or "bottleneck".
      widths: each stage's channels before a bottleneck's expansion by 4.
      groups, base_width: a bottleneck's 3 x 3 has width · base_width / 64 · groups channels.
      mid_widths: each stage's channels inside of its blocks, where pruning has left others than
        follow from `widths`; () otherwise.
      stem_width: channels of the stem.
      stem_size: of the stem's one convolution: 7 halves the image, 3 keeps it (ResNets for CIFAR).
      stem_widths: of the two further 3 x 3 convolutions in a deep stem; () for one alone.
      pooled_shortcut: shortcuts that shrink pool first and then project.
      stride_first: a bottleneck's stride sits on its first 1 x 1 (transformers'
        downsample_in_bottleneck).
      first_stride: stride of the first stage (transformers' downsample_in_first_stage is 2).
      stem_pool: a max pool follows the stem.
      dilation: the last stage (True, DC5) or the last two (2, DeepLab) keep the grid of the one
        before and dilate their convolutions.
      batch_norm_eps: what BatchNorm adds to the variance.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      dropout, drop_path: rates in training; drop_path grows linearly with depth up to its value.
      freeze_norm: BatchNorm keeps its running statistics in training.
      dtype: compute dtype; parameters stay float32. The head computes in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    num_classes: int
    depths: tuple[int, ...]
    block: Literal["basic", "bottleneck"] = "bottleneck"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    groups: int = 1
    base_width: int = 64
    mid_widths: tuple[int, ...] = ()
    stem_width: int = 64
    stem_size: Literal[7, 3] = 7
    stem_widths: tuple[int, ...] = ()
    pooled_shortcut: bool = False
    stride_first: bool = False
    first_stride: int = 1
    stem_pool: bool = True
    dilation: Literal[False, True, 2] = False
    batch_norm_eps: float = 1e-5
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dropout: float = 0.0
    drop_path: float = 0.0
    freeze_norm: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def stem(self) -> str:
        """Path of the first convolution's kernel."""
        return "conv1_0/kernel" if self.stem_widths else "conv1/kernel"

    @property
    def pyramid(self) -> tuple[tuple[str, int], ...]:
        """Named features and their stride in pixels, from fine to coarse."""
        stride = self._stem_stride * (2 if self.stem_pool else 1) * self.first_stride
        return tuple(
            (f"stage_{i}", stride * 2**i // self._dilation(i)) for i in range(len(self.depths))
        )

    @property
    def _stem_stride(self) -> int:
        return 2 if self.stem_widths or self.stem_size == 7 else 1

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay."""
        return sum(self.depths) + 2

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the stem 0, then block by block, the head last."""
        top, _, rest = path.partition("/")
        if top.startswith("stage_"):
            stage, block = int(top.removeprefix("stage_")), rest.split("/")[0]
            return sum(self.depths[:stage]) + int(block.removeprefix("block_")) + 1
        return sum(self.depths) + 1 if top == "head" else 0

    @nn.compact
    def __call__(
        self,
        images,
        *,
        mask=None,
        train: bool = False,
        return_features: bool | Literal["unpooled"] = False,
    ):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size.
          mask: bool[B, H, W] of the pixels that are the image, or None for all. The others are zero
            from the normalized image on and after each ReLU, as the padding of a convolution is, so
            the features inside are those of the image alone, on any canvas that is padded at the
            bottom and the right. Not with `pooled_shortcut`, whose average would count them.
          train: BatchNorm takes the batch's statistics and updates its own (collection
            "batch_stats") unless frozen; dropout and drop_path act, with keys from "dropout".
          return_features: also return a dict of named intermediates: "stem" and "stage_0" ... as
            f[B, h, w, C], and "pooled" f[B, D]. "unpooled" adds the stem's map before its pool
            under that name, as a U-Net needs it.

        Returns:
          logits f32[B, num_classes], or (logits, features).
        """
        unpooled, x, mask = self._stem(
            masked(normalize(images, self.mean, self.std), mask), train, mask
        )
        features = {"stem": x}
        if return_features == "unpooled":
            features["unpooled"] = unpooled
        for index in range(len(self.depths)):
            stage = self._stage(index)
            x = stage(x, train, mask)
            mask = stride_mask(mask, stage.strides)
            features[f"stage_{index}"] = x
        features["pooled"] = pooled = average(x, mask)
        if self.num_classes:
            if train and self.dropout:
                pooled = nn.Dropout(self.dropout, deterministic=False)(pooled)
            dtype = np.promote_types(self.dtype, np.float32)
            init = nn.initializers.zeros
            pooled = Dense(self.num_classes, dtype=dtype, kernel_init=init, name="head")(pooled)
        return (pooled, features) if return_features else pooled

    def _stage(self, index):
        width, bottleneck = self.widths[index], self.block == BOTTLENECK
        mid = width * self.base_width // 64 * self.groups if bottleneck else width
        strides = 2 if index else self.first_stride
        before, last = sum(self.depths[:index]), max(sum(self.depths) - 1, 1)
        return Stage(
            {
                "kind": self.block,
                "mid": self.mid_widths[index] if self.mid_widths else mid,
                "out": 4 * width if bottleneck else width,
                "groups": self.groups,
                "pooled_shortcut": self.pooled_shortcut,
                "stride_first": self.stride_first,
                "batch_norm_eps": self.batch_norm_eps,
                "freeze_norm": self.freeze_norm,
                "dtype": self.dtype,
            },
            strides=1 if self._dilation(index) > 1 else strides,
            rates=tuple(self.drop_path * (before + i) / last for i in range(self.depths[index])),
            remat=self.remat,
            dilation=self._dilation(index),
            first_dilation=self._dilation(index - 1),
            name=f"stage_{index}",
        )

    def _dilation(self, index):
        """Of a stage: 2 in the first one that keeps the grid of the one before, then 4."""
        last_whole = max(len(self.depths) - 1 - self.dilation, 0)
        return 2 ** max(index - last_whole, 0)

    def _stem(self, x, train, mask):
        def conv(x, name, features, size, strides):
            pad = (size // 2, size // 2)
            return Conv(
                features,
                (size, size),
                (strides, strides),
                (pad, pad),
                use_bias=False,
                dtype=self.dtype,
                kernel_init=_he_normal,
                name=name,
            )(x)

        def norm(x, name):
            x = BatchNorm(
                self.batch_norm_eps, frozen=self.freeze_norm, dtype=self.dtype, name=name
            )(x, train)
            return relu(x, mask)

        mask = stride_mask(mask, self._stem_stride)
        if self.stem_widths:
            for index, width in enumerate(self.stem_widths):
                x = norm(conv(x, f"conv1_{index}", width, 3, 2 - (index > 0)), f"bn1_{index}")
            x = conv(x, f"conv1_{len(self.stem_widths)}", self.stem_width, 3, 1)
        else:
            x = conv(x, "conv1", self.stem_width, self.stem_size, self._stem_stride)
        unpooled = x = norm(x, "bn1")
        if self.stem_pool:
            mask = stride_mask(mask, 2)
            x = masked(max_pool(x, 3, 2, 1), mask)  # a window outside may reach inside
        return unpooled, x, mask
