"""YOLOX (Ge et al. 2021, https://arxiv.org/abs/2107.08430): one box for each cell of three maps.

A CSPDarknet, a feature pyramid that goes down and up again (PAFPN), and a head whose branches for
classes and boxes are apart. The structure is that of the original code
(https://github.com/Megvii-BaseDetection/YOLOX) as in pixeltable-yolox 0.4.3.

Exactness, where ports go wrong:
  - the published weights take blue, green, red from 0 to 255, without mean and std, although
    pixeltable-yolox's own processor feeds them red first. Here images are red first in [0, 1] as
    everywhere: `std` is 1/255, and the converter turns the stem's channels around;
  - an image is resized to fit, put at the top left, and the rest of the canvas is grey, 114 of 255:
    here canvases are padded with anything, and the model paints what its mask leaves out;
  - BatchNorm: epsilon 1e-3, momentum 0.03, in no file;
  - the stem takes 2 x 2 pixels as channels (left column first) under a 3 x 3 convolution: that is a
    6 x 6 convolution of stride 2 and padding 2, as which it is kept;
  - max pools of 5, 9 and 13 pad with minus infinity and keep the size;
  - maps grow by repeating cells; a canvas is a multiple of 32 pixels.
"""

import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.layers import BatchNorm, Conv, Dense, max_pool, normalize
from vision_jax.models.taps import OUTPUT, tap, tap_levels
from vision_jax.ops import cells

EPSILON, MOMENTUM = 1e-3, 0.03  # of BatchNorm
STRIDES = (8, 16, 32)  # of the maps with boxes, in pixels
GREY = 114 / 255  # around an image
PRIOR = 0.01  # probability of an object, and of each class, at first
POOL, POOLED = 5, 3  # side of a window, how often one follows the other
# Of images, for which the two smallest variants were trained at 416 pixels.
PREPROCESSING = {
    "short": 640,
    "longest": 640,
    "rule": "letterbox",
    "interpolation": "bilinear_aliased",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "yolox_nano": {"csp_depth": 1, "width": 16, "depthwise": True},
    "yolox_tiny": {"csp_depth": 1, "width": 24},
    "yolox_s": {"csp_depth": 1, "width": 32},
    "yolox_m": {"csp_depth": 2, "width": 48},
    "yolox_l": {"csp_depth": 3, "width": 64},
    "yolox_x": {"csp_depth": 4, "width": 80},
}

# torch's own start of a convolution: uniform in ±1 / √inputs.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_prior = nn.initializers.constant(-math.log((1 - PRIOR) / PRIOR))
_ACTIVATIONS = {
    "silu": nn.silu,
    "relu": nn.relu,
    "leaky_relu": lambda x: nn.leaky_relu(x, 0.1),
}


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("yolox_s"), or None."""
    return VARIANTS.get(name)


class ConvNorm(nn.Module):
    """activation(norm(conv(x))), padded such that stride 1 keeps the size.

    `depthwise` convolves each channel by itself.
    """

    features: int
    size: int
    strides: int = 1
    padding: int | None = None
    depthwise: bool = False
    activation: str = "silu"
    freeze_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        sides = ((self.size - 1) // 2 if self.padding is None else self.padding,) * 2
        x = Conv(
            self.features,
            (self.size, self.size),
            (self.strides, self.strides),
            (sides, sides),
            groups=x.shape[-1] if self.depthwise else 1,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_uniform,
            name="conv",
        )(x)
        x = BatchNorm(EPSILON, MOMENTUM, self.freeze_norm, self.dtype, name="bn")(x, train)
        return _ACTIVATIONS[self.activation](x)


def _spread(x, train, name, features, strides, depthwise, shared):
    """A 3 x 3 ConvNorm, or a depthwise one and a 1 x 1, for which the names say it."""
    if not depthwise:
        return ConvNorm(features, 3, strides, **shared, name=name)(x, train)
    x = ConvNorm(x.shape[-1], 3, strides, depthwise=True, **shared, name=f"{name}_depthwise")(
        x, train
    )
    return ConvNorm(features, 1, **shared, name=f"{name}_pointwise")(x, train)


class Csp(nn.Module):
    """Half of the channels through blocks of 1 x 1 and 3 x 3, the other half past them.

    `shared` are ConvNorm's arguments that all have in common; `shortcut` adds each block's input.
    """

    features: int
    depth: int
    shortcut: bool
    depthwise: bool
    shared: dict[str, Any]

    @nn.compact
    def __call__(self, x, train: bool):
        half = self.features // 2
        y, past = (ConvNorm(half, 1, **self.shared, name=f"conv{i}")(x, train) for i in (1, 2))
        for index in range(self.depth):
            z = ConvNorm(half, 1, **self.shared, name=f"block_{index}_conv1")(y, train)
            name = f"block_{index}_conv2"
            z = _spread(z, train, name, half, 1, self.depthwise, self.shared)
            y = y + z if self.shortcut else z
        joined = jnp.concatenate([y, past], axis=-1)
        return ConvNorm(self.features, 1, **self.shared, name="conv3")(joined, train)


class Stage(nn.Module):
    """Halves the map; the last stage also looks around by max pools."""

    features: int
    depth: int
    last: bool
    depthwise: bool
    remat: bool
    shared: dict[str, Any]

    @nn.compact
    def __call__(self, x, train: bool):
        x = _spread(x, train, "down", self.features, 2, self.depthwise, self.shared)
        if self.last:
            x = ConvNorm(self.features // 2, 1, **self.shared, name="pool_conv1")(x, train)
            pooled = [x]
            # Windows of 9 and 13 are those of 5 over windows of 5.
            for _ in range(POOLED):
                pooled.append(max_pool(pooled[-1], POOL, 1, POOL // 2))
            x = jnp.concatenate(pooled, axis=-1)
            x = ConvNorm(self.features, 1, **self.shared, name="pool_conv2")(x, train)
        csp = nn.remat(Csp, static_argnums=(2,)) if self.remat else Csp
        shortcut = not self.last
        x = csp(self.features, self.depth, shortcut, self.depthwise, self.shared, name="csp")(
            x, train
        )
        return tap(self, OUTPUT, x)


class Backbone(nn.Module):
    """The CSPDarknet: images -> {"stem": ..., "stage_0": ..., ..., "stage_3": ...}."""

    depth: int
    width: int
    depthwise: bool
    remat: bool
    shared: dict[str, Any]

    @nn.compact
    def __call__(self, x, train: bool):
        x = ConvNorm(self.width, 6, 2, 2, **self.shared, name="stem")(x, train)
        features = {"stem": x}
        depths = (self.depth, 3 * self.depth, 3 * self.depth, self.depth)
        for index, depth in enumerate(depths):
            x = Stage(
                2 ** (index + 1) * self.width,
                depth,
                index == len(depths) - 1,
                self.depthwise,
                self.remat,
                self.shared,
                name=f"stage_{index}",
            )(x, train)
            features[f"stage_{index}"] = x
        return features


class Neck(nn.Module):
    """The PAFPN: the last three maps of the backbone -> as many of one meaning, fine to coarse."""

    depth: int
    depthwise: bool
    remat: bool
    shared: dict[str, Any]

    @nn.compact
    def __call__(self, fine, middle, coarse, train: bool):
        widths = [x.shape[-1] for x in (fine, middle, coarse)]

        def csp(name, features, *maps):
            kind = nn.remat(Csp, static_argnums=(2,)) if self.remat else Csp
            module = kind(features, self.depth, False, self.depthwise, self.shared, name=name)
            return module(jnp.concatenate(maps, axis=-1), train)

        def down(name, x):
            return _spread(x, train, name, x.shape[-1], 2, self.depthwise, self.shared)

        top = ConvNorm(widths[1], 1, **self.shared, name="reduce_2")(coarse, train)
        x = csp("up_1", widths[1], _twice(top), middle)
        side = ConvNorm(widths[0], 1, **self.shared, name="reduce_1")(x, train)
        level_0 = csp("up_0", widths[0], _twice(side), fine)
        level_1 = csp("down_1", widths[1], down("down_1_conv", level_0), side)
        level_2 = csp("down_2", widths[2], down("down_2_conv", level_1), top)
        return level_0, level_1, level_2


def _twice(x):
    """x[B, h, w, C] -> [B, 2·h, 2·w, C], each cell four times."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


class Head(nn.Module):
    """Of one map: logits [B, h, w, C] of the classes, of an object [.., 1], and deltas [.., 4]."""

    num_classes: int
    width: int
    depthwise: bool
    shared: dict[str, Any]

    @nn.compact
    def __call__(self, x, train: bool):
        x = ConvNorm(self.width, 1, **self.shared, name="stem")(x, train)
        branches = []
        for branch in ("class", "box"):
            y = x
            for index in (1, 2):
                name = f"{branch}_conv{index}"
                y = _spread(y, train, name, self.width, 1, self.depthwise, self.shared)
            branches.append(y)

        def predict(name, features, y, init):
            dtype = np.promote_types(y.dtype, np.float32)
            return Dense(features, dtype=dtype, kernel_init=_uniform, bias_init=init, name=name)(y)

        classes, boxes = branches
        return (
            predict("class_head", self.num_classes, classes, _prior),
            predict("object_head", 1, boxes, _prior),
            predict("box_head", 4, boxes, nn.initializers.zeros),
        )


class Yolox(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> what each cell of three maps predicts.

    Attributes:
      num_classes: C.
      csp_depth: blocks of the backbone's first and last stage and of each part of the neck; the
        stages between have three times as many.
      width: channels of the stem; the stages have 2, 4, 8 and 16 times as many.
      depthwise: 3 x 3 convolutions are depthwise ones and 1 x 1, as in the smallest variant.
      activation: after each norm; "leaky_relu" is of slope 0.1.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      freeze_norm: BatchNorm keeps its running statistics in training.
      dtype: compute dtype; parameters stay float32. The predictions are computed in float32.
      remat: recompute the CSP blocks in the backward pass instead of keeping their activations.
    """

    num_classes: int
    csp_depth: int
    width: int
    depthwise: bool = False
    activation: Literal["silu", "relu", "leaky_relu"] = "silu"
    in_channels: int = 3
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1 / 255, 1 / 255, 1 / 255)
    freeze_norm: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    strides = STRIDES

    @property
    def stem(self) -> str:
        """Path of the first convolution's kernel."""
        return "backbone/stem/conv/kernel"

    @property
    def pyramid(self) -> tuple[tuple[str, int], ...]:
        """Named features and their stride in pixels, from fine to coarse."""
        return tuple((f"stage_{index}", 4 * 2**index) for index in range(4))

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay: the stem, four stages, the neck, the heads."""
        return 7

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the stem 0, then stage by stage, the neck, the heads."""
        top, _, rest = path.partition("/")
        if top == "backbone":
            stage = rest.split("/")[0]
            return 0 if stage == "stem" else int(stage.removeprefix("stage_")) + 1
        return 5 if top == "neck" else 6

    @nn.compact
    def __call__(
        self, images, pixel_mask=None, *, train: bool = False, return_features: bool = False
    ):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1]; H and W are multiples of 32.
          pixel_mask: bool[B, H, W], True where the image is: the rest is painted grey, as in
            training. None if the image fills the canvas, or is on grey already.
          train: BatchNorm takes the batch's statistics and updates its own unless frozen.
          return_features: also return a dict of named intermediates as f[B, h, w, C]: "stem",
            "stage_0" ... "stage_3", and the neck's "level_0" ... "level_2".

        Returns:
          {"logits": f32[B, A, C], "object_logits": f32[B, A], "box_deltas": f32[B, A, 4]} of the
          A cells of the maps of stride 8, 16 and 32, row by row (see ops/cells.py), and the boxes
          that the deltas say, "boxes_cxcywh_01": f32[B, A, 4], relative to the image without its
          padding. Or (that, features).

        Raises:
          UserError: sides that are no multiples of 32.
        """
        height, width = images.shape[1:3]
        if height % STRIDES[-1] or width % STRIDES[-1]:
            raise UserError(
                f"images of {height} x {width} pixels: YOLOX takes multiples of {STRIDES[-1]}"
            )
        sides = jnp.array([[width, height]])  # of the image, across and down
        if pixel_mask is not None:
            images = jnp.where(pixel_mask[..., None], images, jnp.asarray(GREY, images.dtype))
            sides = jnp.stack([pixel_mask.any(axis=1).sum(1), pixel_mask.any(axis=2).sum(1)], -1)
        sides = jnp.tile(jnp.maximum(sides, 1), 2)[:, None].astype(images.dtype)  # [B or 1, 1, 4]
        shared = {
            "activation": self.activation,
            "freeze_norm": self.freeze_norm,
            "dtype": self.dtype,
        }
        parts = (self.depthwise, self.remat, shared)
        features = Backbone(self.csp_depth, self.width, *parts, name="backbone")(
            normalize(images, self.mean, self.std), train
        )
        fine, middle, coarse = (features[f"stage_{index}"] for index in (1, 2, 3))
        neck = Neck(self.csp_depth, *parts, name="neck")
        maps = tap_levels(self, neck(fine, middle, coarse, train))
        found = []
        for index, x in enumerate(maps):
            features[f"level_{index}"] = x
            head = Head(
                self.num_classes, 4 * self.width, self.depthwise, shared, name=f"head_{index}"
            )
            found.append([y.reshape(x.shape[0], -1, y.shape[-1]) for y in head(x, train)])
        logits, objects, deltas = (
            jnp.concatenate(level, axis=1) for level in zip(*found, strict=True)
        )
        boxes = cells.decode(deltas, (height, width), STRIDES) / sides
        predictions = {
            "logits": logits,
            "object_logits": objects[..., 0],
            "box_deltas": deltas,
            "boxes_cxcywh_01": boxes,
        }
        return (predictions, features) if return_features else predictions
