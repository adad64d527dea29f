"""What detectors without proposals have in common: RetinaNet's and FCOS' structure and outputs.

A ResNet, a pyramid with P6 and P7, and two rows of convolutions that all levels share, one for
classes and one for boxes. Each place of each level says a box and classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from vision_jax.errors import UserError
from vision_jax.models.layers import Conv, GroupNorm, masked
from vision_jax.models.pyramid import OnPyramid, Pyramid
from vision_jax.models.resnet import ResNet
from vision_jax.models.taps import tap_levels
from vision_jax.ops import nms
from vision_jax.ops.boxes import clip_xyxy

PRIOR = 0.01  # probability of each class at first
_small = nn.initializers.normal(0.01)
_prior = nn.initializers.constant(-math.log((1 - PRIOR) / PRIOR))


class Tower(nn.Module):
    """relu(norm(conv(x))) of a map f[B, h, w, D], again and again; of 0 groups without the norm."""

    depth: int
    groups: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        for index in range(self.depth):
            x = _spread(x.shape[-1], self.dtype, name=f"conv_{index}", use_bias=self.use_bias)(x)
            if self.groups:
                x = GroupNorm(self.groups, dtype=self.dtype, name=f"norm_{index}")(x, mask)
            x = masked(nn.relu(x), mask)
        return x


def _spread(features, dtype, name, **more):
    """A 3 x 3 convolution that keeps the size."""
    sides = ((1, 1), (1, 1))
    return Conv(features, (3, 3), padding=sides, dtype=dtype, kernel_init=_small, name=name, **more)


class DenseDetector(OnPyramid):
    """Images f32[B, H, W, in_channels] in [0, 1] -> what each place of each level says.

    Attributes:
      num_classes: C.
      depths, block, widths, stem_width, batch_norm_eps: of the ResNet, as there.
      first_map: the first of its stages that gives a level; P6 and P7 are beyond the last one.
      width: channels of the pyramid and of the heads.
      coarse_of_map: P6 is made of the last stage, not of its level.
      head_depth: 3 x 3 convolutions before those that predict.
      head_groups: of their GroupNorms; 0 leaves the norms out.
      candidates: pairs of place and class of each level, with the highest scores, among which
        suppression chooses.
      least_score: above which a pair is one of them, from 0 to 1.
      most: detections of an image.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      freeze_norm: BatchNorm keeps its running statistics in training.
      dtype: compute dtype; parameters stay float32. Predictions and boxes are computed in float32.
      remat: recompute the body's blocks in the backward pass instead of keeping activations.
    """

    num_classes: int
    depths: tuple[int, ...]
    block: Literal["basic", "bottleneck"] = "bottleneck"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_width: int = 64
    batch_norm_eps: float = 1e-5
    first_map: int = 1
    width: int = 256
    coarse_of_map: bool = False
    head_depth: int = 4
    head_groups: int = 0
    candidates: int = 1000
    least_score: float = 0.05
    most: int = 300
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    freeze_norm: bool = True
    dtype: Any = jnp.float32
    remat: bool = False

    _more = 2

    @property
    def _maps(self) -> tuple[tuple[str, int], ...]:
        return self.pyramid[self.first_map :]

    def _backbone(self, **place):
        return self._built(ResNet, **place)

    def _check(self, field: str, sizes: Sequence[Any]) -> None:
        """Checks arguments that only together make no sense.

        Raises:
          UserError: no stage for a level, other than one entry of `sizes` for each level, or groups
            that the channels can't be put in.
        """
        if self.first_map >= len(self.depths):
            raise UserError(f"first_map {self.first_map}: the body has {len(self.depths)} stages")
        levels = len(self.depths) - self.first_map + self._more
        if len(sizes) != levels:
            raise UserError(f"{field} {sizes}: give {levels}, one for each level")
        if self.head_groups and self.width % self.head_groups:
            raise UserError(
                f"head_groups {self.head_groups}: {self.width} channels are no multiple of it"
            )

    def _levels(self, images, masks, train: bool):
        """(the pyramid's maps f[B, h, w, D] from fine to coarse, all named features)."""
        backbone = self._backbone(name="backbone")
        _, features = backbone(images, mask=masks[0], train=train, return_features=True)
        del features["pooled"]
        pyramid = Pyramid(
            self.width,
            norm=False,
            frozen=True,
            dtype=self.dtype,
            coarser=True,
            of_map=self.coarse_of_map,
            name="fpn",
        )
        maps = [features[name] for name, _ in self._maps]
        levels = tap_levels(self, pyramid(maps, masks[1:], train))
        return levels, features | {f"level_{index}": x for index, x in enumerate(levels)}

    def _say(
        self, levels, masks, heads: Mapping[str, Mapping[str, tuple[int, int]]], use_bias: bool
    ) -> dict[str, list[Any]]:
        """Of each prediction its values f32[B, N, ...] of each level.

        Args:
          levels: maps f[B, h, w, D].
          masks: bool[B, h, w] of each, or None.
          heads: tower -> its predictions -> (how many at a cell, numbers of each).
          use_bias: of the towers' convolutions.
        """
        wide = np.promote_types(self.dtype, np.float32)
        said: dict[str, list[Any]] = {}
        for tower, predictions in heads.items():
            parts = (self.head_depth, self.head_groups, use_bias, self.dtype)
            row = Tower(*parts, name=f"{tower}_tower")
            maps = [row(x, mask) for x, mask in zip(levels, masks, strict=True)]
            for name, (count, size) in predictions.items():
                start = {"bias_init": _prior} if name == "class" else {}
                head = _spread(count * size, wide, name=f"{name}_head", **start)
                said[name] = [head(x).reshape(x.shape[0], -1, size) for x in maps]
        return said


def detect(
    logits: Sequence[Any],
    distances: Sequence[Any],
    places: Sequence[Any],
    inside: Sequence[Any],
    sizes,
    *,
    decode: Callable[..., Any],
    overlap: float,
    candidates: int,
    least: float,
    most: int,
    centered: Sequence[Any] | None = None,
):
    """Scored boxes of classes, without what a better one of its class covers.

    Args:
      logits: f[B, N, C] of each level.
      distances: f[B, N, 4], what `decode` makes boxes of.
      places: f[B, N, 4] xyxy in pixels, to which they are relative.
      inside: bool[B, N], the places of the image's own canvas.
      sizes: i32[B, 2], (height, width) of the images without padding.
      decode: (distances, places) -> boxes xyxy in pixels.
      overlap: IoU above which the lower score is dropped, within a class.
      candidates: pairs of place and class of a level that are considered.
      least: score above which they are.
      most: boxes that are kept.
      centered: logits f[B, N] of how central a place is in its box; the score is then the root of
        the product of both probabilities.

    Returns:
      "score" f[B, D], 0 of what is none, by falling score, "label" i32[B, D] and "boxes_xyxy_01"
      f[B, D, 4], relative to the image without its padding. No gradient flows through it.
    """
    parts = []
    for index, level in enumerate(zip(logits, distances, places, inside, strict=True)):
        classes, own, boxes, there = (lax.stop_gradient(x) for x in level)
        central = None if centered is None else lax.stop_gradient(centered[index])
        # The best pairs are of the places with the best class.
        rank = jnp.where(there, _score(classes.max(-1), central), -1)
        count = min(candidates, rank.shape[1])
        rank, place = lax.top_k(rank, count)  # [B, N]
        classes, own, boxes = (_at(x, place) for x in (classes, own, boxes))
        if central is not None:
            central = jnp.take_along_axis(central, place, axis=1)[..., None]
        score = jnp.where((rank >= 0)[..., None], _score(classes, central), -1)
        score, pair = lax.top_k(
            score.reshape(score.shape[0], -1), min(candidates, math.prod(score.shape[1:]))
        )  # [B, M]
        place, label = pair // classes.shape[-1], pair % classes.shape[-1]
        parts.append((score, label, decode(_at(own, place), _at(boxes, place))))
    score, label, boxes = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    boxes = clip_xyxy(boxes, sizes[:, None])
    kept = nms.nms(boxes, score, score > least, overlap, label)
    order, kept = nms.best(kept, score, most)
    sides = jnp.tile(sizes[:, ::-1].astype(boxes.dtype), 2)[:, None]  # width, height, twice
    return {
        "score": jnp.where(kept, jnp.take_along_axis(score, order, axis=1), 0),
        "label": jnp.take_along_axis(label, order, axis=1).astype(jnp.int32),
        "boxes_xyxy_01": _at(boxes, order) / sides,
    }


def _score(logits, central):
    chance = nn.sigmoid(logits)
    return chance if central is None else jnp.sqrt(chance * nn.sigmoid(central))


def _at(values, index):
    """values[b, index[b]] of f[B, N, K] and i32[B, M]."""
    return jnp.take_along_axis(values, index[..., None], axis=1)


def joined(levels: Sequence[Any]):
    """The values of all levels, one after the other: f[B, A, ...]."""
    return jnp.concatenate(levels, axis=1)
