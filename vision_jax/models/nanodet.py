"""NanoDet-g: a detector of 3.8 M parameters whose boxes are distributions of their sides.

A small CSP network of plain 3 x 3 convolutions, a pyramid whose maps are added up and down by
bilinear resizing without convolutions, and one head a map. Each point of a map says for each of its
box's four sides how far it is as a distribution over 0, 1, ... strides: the head of Generalized
Focal Loss (Li et al. 2020, https://arxiv.org/abs/2006.04388). The structure is that of the original
code (https://github.com/RangiLyu/nanodet, version 0.x, its config nanodet-g).

Exactness, where ports go wrong:
  - published weights take blue, green, red; here images are red first as everywhere, mean and std
    are ImageNet's, and the converter turns the stem's channels around;
  - maps are halved by bilinear resizing without antialiasing: the mean of 2 x 2 cells. Doubling
    repeats the outermost cells;
  - a point is the middle of its cell, half a stride from the cell's corner;
  - the slope of the leaky ReLU is 0.1; BatchNorm's epsilon is torch's 1e-5.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.layers import BatchNorm, Conv, Dense, max_pool, normalize
from vision_jax.models.taps import OUTPUT, tap, tap_levels
from vision_jax.ops import cells

EPSILON = 1e-5  # of BatchNorm
SLOPE = 0.1  # of the leaky ReLU
STRIDES = (8, 16, 32)  # of the maps with boxes, in pixels
PRIOR = -math.log((1 - 0.01) / 0.01)  # logit of a class at first
PREPROCESSING = {
    "short": 416,
    "longest": 416,
    "rule": "letterbox",
    "interpolation": "bilinear_aliased",
}
VARIANTS: dict[str, dict[str, Any]] = {"nanodet_g": {}}

_spread = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_small = nn.initializers.normal(0.01)


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("nanodet_g"), or None."""
    return VARIANTS.get(name)


class ConvNorm(nn.Module):
    """leaky_relu(norm(conv(x))) with windows of 3 x 3, padded such that stride 1 keeps the size.

    `shared` are the arguments of BatchNorm and compute that all have in common.
    """

    features: int
    shared: dict[str, Any]
    strides: int = 1
    kernel_init: Any = _spread

    @nn.compact
    def __call__(self, x, train: bool):
        x = Conv(
            self.features,
            (3, 3),
            (self.strides, self.strides),
            ((1, 1), (1, 1)),
            use_bias=False,
            dtype=self.shared["dtype"],
            kernel_init=self.kernel_init,
            name="conv",
        )(x)
        return nn.leaky_relu(BatchNorm(EPSILON, **self.shared, name="bn")(x, train), SLOPE)


class Block(nn.Module):
    """Joins the half of the channels that a convolution leaves to what another makes of them."""

    shared: dict[str, Any]

    @nn.compact
    def __call__(self, x, train: bool):
        width = x.shape[-1] // 2
        half = ConvNorm(width, self.shared, name="conv1")(x, train)
        more = ConvNorm(width, self.shared, name="conv2")(half, train)
        return jnp.concatenate([more, half], axis=-1)


class Stage(nn.Module):
    """Halves the map but for the first stage, and joins what `depth` blocks make of it to it."""

    depth: int
    strides: int
    shared: dict[str, Any]

    @nn.compact
    def __call__(self, x, train: bool):
        width = x.shape[-1]
        x = ConvNorm(width, self.shared, self.strides, name="in_conv")(x, train)
        y = x
        for index in range(self.depth):
            y = Block(self.shared, name=f"block_{index}")(y, train)
        y = ConvNorm(width, self.shared, name="out_conv")(y, train)
        return tap(self, OUTPUT, jnp.concatenate([y, x], axis=-1))


class Head(nn.Module):
    """Of one map: logits [B, h·w, C] of the classes and [B, h·w, 4·R] of the sides."""

    num_classes: int
    bins: int
    shared: dict[str, Any]

    @nn.compact
    def __call__(self, x, train: bool):
        x = ConvNorm(x.shape[-1], self.shared, kernel_init=_small, name="conv")(x, train)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        dtype = np.promote_types(x.dtype, np.float32)

        def predict(name, features, init):
            return Dense(features, dtype=dtype, kernel_init=_small, bias_init=init, name=name)(x)

        return (
            predict("class_head", self.num_classes, nn.initializers.constant(PRIOR)),
            predict("side_head", 4 * self.bins, nn.initializers.zeros),
        )


def _twice(x):
    """x[B, h, w, C] -> [B, 2·h, 2·w, C], bilinear."""
    batch, height, width, channels = x.shape
    return jax.image.resize(x, (batch, 2 * height, 2 * width, channels), "bilinear")


def _half(x):
    """x[B, 2·h, 2·w, C] -> [B, h, w, C], bilinear without antialiasing."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


class NanoDet(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> what each point of three maps predicts.

    Attributes:
      num_classes: C.
      stem_width: channels of the stem; the stages have 2, 4, 8 and 16 times as many.
      depths: blocks of the four stages.
      width: channels of the pyramid and the heads.
      bins: R, distances that the distribution of a side is over: 0 to R - 1 strides.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      freeze_norm: BatchNorm keeps its running statistics in training.
      dtype: compute dtype; parameters stay float32. The predictions are computed in float32.
      remat: recompute the stages in the backward pass instead of keeping their activations.
    """

    num_classes: int
    stem_width: int = 32
    depths: tuple[int, int, int, int] = (1, 2, 2, 3)
    width: int = 128
    bins: int = 11
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    freeze_norm: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    strides = STRIDES

    @property
    def stem(self) -> str:
        """Path of the first convolution's kernel."""
        return "stem/conv/kernel"

    @property
    def pyramid(self) -> tuple[tuple[str, int], ...]:
        """Named features and their stride in pixels, from fine to coarse."""
        return tuple((f"stage_{index}", 4 * 2**index) for index in range(4))

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay: the stem, the blocks, the pyramid with the heads."""
        return sum(self.depths) + 2

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the stem 0, then block by block, the rest.

        What comes before and after the blocks of a stage goes with the first and the last of them.
        """
        top, _, rest = path.partition("/")
        if not top.startswith("stage_"):
            return 0 if top == "stem" else self.num_layers - 1
        stage = int(top.removeprefix("stage_"))
        within = rest.split("/")[0].removeprefix("block_")
        index = {"in_conv": 0, "out_conv": self.depths[stage] - 1}.get(within)
        return 1 + sum(self.depths[:stage]) + (int(within) if index is None else index)

    @nn.compact
    def __call__(
        self, images, pixel_mask=None, *, train: bool = False, return_features: bool = False
    ):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1]; H and W are multiples of 32.
          pixel_mask: bool[B, H, W], True where the image is: the rest is painted black, as in
            training. None if the image fills the canvas, or is on black already.
          train: BatchNorm takes the batch's statistics and updates its own unless frozen.
          return_features: also return a dict of named intermediates as f[B, h, w, C]: "stem",
            "stage_0" ... "stage_3", and the pyramid's "level_0" ... "level_2".

        Returns:
          {"logits": f32[B, A, C], "side_logits": f32[B, A, 4, R]} of the A points of the maps of
          stride 8, 16 and 32, row by row (see ops/cells.py); sides are left, top, right, bottom.
          And the boxes that they say, "boxes_cxcywh_01": f32[B, A, 4], relative to the image
          without its padding. Or (that, features).

        Raises:
          UserError: sides that are no multiples of 32.
        """
        height, width = images.shape[1:3]
        if height % STRIDES[-1] or width % STRIDES[-1]:
            raise UserError(
                f"images of {height} x {width} pixels: NanoDet takes multiples of {STRIDES[-1]}"
            )
        sides = jnp.array([[width, height]])  # of the image, across and down
        if pixel_mask is not None:
            images = jnp.where(pixel_mask[..., None], images, 0)
            sides = jnp.stack([pixel_mask.any(axis=1).sum(1), pixel_mask.any(axis=2).sum(1)], -1)
        sides = jnp.tile(jnp.maximum(sides, 1), 2)[:, None].astype(images.dtype)  # [B or 1, 1, 4]

        shared = {"frozen": self.freeze_norm, "dtype": self.dtype}
        x = normalize(images, self.mean, self.std)
        x = ConvNorm(self.stem_width, shared, 2, name="stem")(x, train)
        features = {"stem": x}
        x = max_pool(x, 3, 2, 1)
        stage = nn.remat(Stage, static_argnums=(2,)) if self.remat else Stage
        for index, depth in enumerate(self.depths):
            x = stage(depth, 2 if index else 1, shared, name=f"stage_{index}")(x, train)
            features[f"stage_{index}"] = x

        fine, middle, coarse = (
            Dense(self.width, dtype=self.dtype, name=f"lateral_{index}")(features[f"stage_{stage}"])
            for index, stage in enumerate((1, 2, 3))
        )
        middle = middle + _twice(coarse)
        fine = fine + _twice(middle)
        middle = middle + _half(fine)
        coarse = coarse + _half(middle)

        found = []
        for index, x in enumerate(tap_levels(self, (fine, middle, coarse))):
            features[f"level_{index}"] = x
            head = Head(self.num_classes, self.bins, shared, name=f"head_{index}")
            found.append(head(x, train))
        logits, side_logits = (jnp.concatenate(level, axis=1) for level in zip(*found, strict=True))
        side_logits = side_logits.reshape(*side_logits.shape[:2], 4, self.bins)  # [B, A, 4, R]
        boxes = cells.decode_sides(side_logits, (height, width), STRIDES) / sides
        predictions = {
            "logits": logits,
            "side_logits": side_logits,
            "boxes_cxcywh_01": boxes,
        }
        return (predictions, features) if return_features else predictions
