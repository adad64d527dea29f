"""Faster R-CNN (Ren et al. 2015, https://arxiv.org/abs/1506.01497) on a feature pyramid.

A ResNet or MobileNetV3, a pyramid over its maps (FPN, Lin et al. 2016,
https://arxiv.org/abs/1612.03144), a network that proposes boxes on it (RPN), and one that
classifies what is inside of each proposal and moves it. The structure is that of torchvision 0.29
(models/detection): with a ResNet in two versions, the paper's, and v2 with norms in the pyramid and
convolutions in the box head (Li et al. 2021, https://arxiv.org/abs/2111.11429); with a MobileNetV3
as the first of these.

Everything has a fixed shape: proposals and detections are padded and say which are there, so all of
it, sampling and losses too, is one program.

Exactness, where ports go wrong:
  - an image is seen on a canvas of its own (models/pyramid.py), so that nothing depends on its
    batch; torchvision's results do;
  - the published v1 weights (COCO_V1) are for a BatchNorm whose epsilon is 0 (`batch_norm_eps`), in
    no file; others for 1e-5;
  - a MobileNetV3 gives two maps, both of stride 32: of the block that reaches it and of the last
    convolution. All boxes read the first of them, each level has anchors of all sizes, the
    epsilon is 1e-5, and proposals with a score below 0.05 are none, in training too;
  - convolutions of the pyramid have no ReLU; maps grow by repeating cells; the last level takes
    every second cell of the one before;
  - anchors step by the canvas's side // the cells of a level, which on the last level may be 61;
  - proposals rank by logit within a level, 1,000 of each (2,000 in training), and are suppressed
    level by level, so that each of the levels keeps its own;
  - the box head reads 7 x 7 bins of one level, not moved by half a cell (ops/roi_align.py);
  - class 0 is none; deltas are of a class, divided by 10, 10, 5, 5.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from vision_jax.errors import UserError
from vision_jax.models.efficientnet import MOBILE_V3, EfficientNet, each
from vision_jax.models.efficientnet import VARIANTS as MOBILENETS
from vision_jax.models.layers import Dense, masked
from vision_jax.models.pyramid import ConvNorm, OnPyramid, Pyramid
from vision_jax.models.resnet import VARIANTS as RESNETS
from vision_jax.models.resnet import ResNet
from vision_jax.models.taps import tap_levels
from vision_jax.ops import anchors, nms
from vision_jax.ops.boxes import clip_xyxy, targets_in_pixels
from vision_jax.ops.roi_align import roi_align

MOBILE_HEAD = 6  # channels of a MobileNetV3's last convolution, in those before it
RATIOS = (0.5, 1.0, 2.0)  # heights over widths of anchors
BINS = 7  # of a proposal, along a side
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # that the box head's deltas are multiplied by
# Overlaps from and below which something is trained, and the share of foreground among it.
RPN_FOREGROUND, RPN_BACKGROUND, RPN_SHARE = 0.7, 0.3, 0.5
BOX_FOREGROUND, BOX_BACKGROUND, BOX_SHARE = 0.5, 0.5, 0.25
RPN_OVERLAP, LEAST_PROPOSAL = 0.7, 1e-3  # IoU of suppression, side in pixels
LEAST_SCORE, OVERLAP, LEAST_BOX = 0.05, 0.5, 1e-2  # of detections
LOW_RESOLUTION = "fasterrcnn_mobilenet_v3_large_320_fpn"
LOW_SIDES = {"short": 320, "longest": 640}  # of its images
# What a MobileNetV3 is told beside what a ResNet is told too.
MOBILE_ONLY = ("kernels", "expansions", "strides", "se_ratio", "relu_stages")
_MOBILE: dict[str, Any] = {
    "body": "mobilenet_v3",
    **{
        name: MOBILENETS["mobilenet_v3_large"][name]
        for name in ("depths", "widths", "stem_width", *MOBILE_ONLY)
    },
    "anchor_sizes": ((32, 64, 128, 256, 512),) * 3,
    "least_proposal_score": 0.05,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "fasterrcnn_resnet50_fpn": RESNETS["resnet50"],
    "fasterrcnn_resnet50_fpn_v2": {
        **RESNETS["resnet50"],
        "fpn_norm": True,
        "rpn_depth": 2,
        "head_convs": 4,
        "head_layers": 1,
    },
    LOW_RESOLUTION: {**_MOBILE, "proposals": 150},
    "fasterrcnn_mobilenet_v3_large_fpn": _MOBILE,
}

# torch's own start of a linear layer, uniform in ±1 / √inputs.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_small = nn.initializers.normal(0.01)


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("fasterrcnn_resnet50_fpn_v2"), or None."""
    return VARIANTS.get(name)


# Layers -----------------------------------------------------------------------------------------


class ProposalHead(nn.Module):
    """Of one map f[B, h, w, D]: logits f32[B, h·w·A] and deltas f32[B, h·w·A, 4] of its anchors."""

    num_anchors: int
    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, x, mask, train: bool):
        for index in range(self.depth):
            layer = ConvNorm(x.shape[-1], 3, _small, False, True, self.dtype, name=f"conv_{index}")
            x = masked(nn.relu(layer(x, train)), mask)
        wide = np.promote_types(self.dtype, np.float32)

        def predict(name, features):
            return Dense(features, dtype=wide, kernel_init=_small, name=name)(x)

        logits = predict("score_head", self.num_anchors).reshape(x.shape[0], -1)
        deltas = predict("box_head", 4 * self.num_anchors).reshape(x.shape[0], -1, 4)
        return logits, deltas


class RoiHead(nn.Module):
    """Bins f[B, R, 7, 7, D] of proposals -> features f[B, R, W]."""

    width: int
    convs: int
    layers: int
    frozen: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        batch, count, *shape = x.shape
        x = x.reshape(batch * count, *shape)
        for index in range(self.convs):
            layer = ConvNorm(
                shape[-1], 3, _he_normal, True, self.frozen, self.dtype, name=f"conv_{index}"
            )
            x = nn.relu(layer(x, train))
        # Channel by channel, as the references flatten it.
        x = x.transpose(0, 3, 1, 2).reshape(batch, count, -1)
        for index in range(1, self.layers + 1):
            dense = Dense(self.width, dtype=self.dtype, kernel_init=_uniform, name=f"fc{index}")
            x = nn.relu(dense(x))
        return x


class ClassHead(nn.Module):
    """f[..., W] -> logits f32[..., K + 1], the first of none, and deltas f32[..., K + 1, 4]."""

    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        def predict(name, features):
            return Dense(features, dtype=self.dtype, kernel_init=_uniform, name=name)(x)

        count = self.num_classes + 1
        deltas = predict("deltas", 4 * count)
        return predict("logits", count), deltas.reshape(*x.shape[:-1], count, 4)


# Model ------------------------------------------------------------------------------------------


class FasterRcnn(OnPyramid):
    """Images f32[B, H, W, in_channels] in [0, 1] -> proposals, and what is inside of them.

    Attributes:
      num_classes: K, without the one for none.
      body: what the pyramid stands on; of a ResNet all maps, of a MobileNetV3 the last two.
      depths, widths, stem_width, batch_norm_eps: of the body, as there.
      block: of a ResNet.
      kernels, expansions, strides, se_ratio, relu_stages: of a MobileNetV3, as there.
      width: channels of the pyramid.
      fpn_norm: its convolutions have norms in place of biases (v2).
      anchor_sizes: sides in pixels of a square anchor on each level, one or as many; there is one
        level more than maps.
      rpn_depth: 3 x 3 convolutions of the network that proposes.
      proposals, train_proposals: of each level that are considered, and of all that are kept.
      least_proposal_score: from 0 to 1, of those that are kept.
      rpn_samples, box_samples: anchors and proposals of an image that are trained.
      head_convs, head_layers, head_width: of the box head: 3 x 3 convolutions with norms, then
        fully connected layers and their width.
      candidates: boxes of an image with the highest scores among which suppression chooses. What it
        keeps of them does not depend on the rest.
      most: detections of an image.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      freeze_norm: BatchNorm keeps its running statistics in training.
      dtype: compute dtype; parameters stay float32. Logits, deltas and boxes are computed in
        float32.
      remat: recompute the body's blocks in the backward pass instead of keeping activations.
    """

    num_classes: int
    depths: tuple[int, ...]
    body: Literal["resnet", "mobilenet_v3"] = "resnet"
    block: Literal["basic", "bottleneck"] = "bottleneck"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_width: int = 64
    batch_norm_eps: float = 1e-5
    kernels: tuple[int, ...] = ()
    expansions: tuple[float | tuple[float, ...], ...] = ()
    strides: tuple[int, ...] = ()
    se_ratio: float | tuple[float, ...] = 0.0
    relu_stages: int = 0
    width: int = 256
    fpn_norm: bool = False
    anchor_sizes: tuple[int | tuple[int, ...], ...] = (32, 64, 128, 256, 512)
    rpn_depth: int = 1
    proposals: int = 1000
    train_proposals: int = 2000
    least_proposal_score: float = 0.0
    rpn_samples: int = 256
    box_samples: int = 512
    head_convs: int = 0
    head_layers: int = 2
    head_width: int = 1024
    candidates: int = 4096
    most: int = 100
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    freeze_norm: bool = True
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def _maps(self) -> tuple[tuple[str, int], ...]:
        """Those that the levels are made of, and their strides."""
        if self.body == "resnet":
            return self.pyramid
        shrinking = max(index for index, strides in enumerate(self.strides) if strides > 1)
        stride = 2 * math.prod(self.strides)
        return (f"stage_{shrinking}/block_0", stride), ("last", stride)

    @nn.compact
    def __call__(
        self,
        images,
        pixel_mask=None,
        targets: Mapping[str, Any] | None = None,
        *,
        train: bool = False,
        return_features: bool = False,
    ):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size, padded at the bottom and right.
          pixel_mask: bool[B, H, W], True where the image is; None if nothing is padded.
          targets: "label" i32[B, T], "boxes_cxcywh_01" f[B, T, 4], relative to the image without
            its padding, and "target_mask" bool[B, T]; None if no loss is asked for.
          train: BatchNorm updates unless frozen; anchors and proposals are drawn by keys from
            "dropout", else by fixed ones, the same for an image in every batch.
          return_features: also return a dict of named intermediates as f[B, h, w, C]: the body's,
            "stem", "stage_0" ..., and the pyramid's "level_0" ...

        Returns:
          Of A anchors, R proposals, S samples and D detections, beside "rpn_logits" f32[B, A] and
          "rpn_deltas" f32[B, A, 4]:
          with targets what ops.proposal_losses takes, "rpn_sample", "rpn_target_deltas",
            "box_logits", "box_deltas", "box_sample" and "box_target_deltas";
          unless it trains by targets, of the proposals "proposals_xyxy_px" f32[B, R, 4], "proposed"
            bool[B, R], "logits" f32[B, R, K + 1], the first of none, and "deltas"
            f32[B, R, K + 1, 4]; of the detections "score" f32[B, D], 0 of what is none, "label"
            i32[B, D] and "boxes_xyxy_01" f32[B, D, 4], relative to the image without its padding.
          Or (that, features).

        Raises:
          UserError: other than one size of anchors, or as many, for each level.
        """
        sizes_of = [each(sizes, 1) for sizes in self.anchor_sizes]
        if len(sizes_of) != len(self._maps) + 1 or len({len(sizes) for sizes in sizes_of}) > 1:
            raise UserError(
                f"anchor_sizes {self.anchor_sizes}: give {len(self._maps) + 1}, one for each map "
                "of the body and one more, or as many for each"
            )
        images, sizes, extents, masks = self._canvas(images, pixel_mask)
        backbone = self._backbone(name="backbone")
        _, features = backbone(images, mask=masks[0], train=train, return_features=True)
        del features["pooled"]
        norms = (self.fpn_norm, self.freeze_norm, self.dtype)
        maps = [features[name] for name, _ in self._maps]
        pyramid = Pyramid(self.width, *norms, name="fpn")
        levels = tap_levels(self, pyramid(maps, masks[1:-1], train))
        features |= {f"level_{index}": x for index, x in enumerate(levels)}

        num_anchors = len(RATIOS) * len(sizes_of[0])
        head = ProposalHead(num_anchors, self.rpn_depth, self.dtype, name="rpn")
        found = [head(x, mask, train) for x, mask in zip(levels, masks[1:], strict=True)]
        boxes, inside = self._anchors(levels, extents, self.anchor_sizes, RATIOS)
        learns = train and targets is not None
        count = self.train_proposals if learns else self.proposals
        least = self.least_proposal_score
        proposals, proposed = _propose(found, boxes, inside, sizes, count, least)
        outputs: dict[str, Any] = {
            name: jnp.concatenate(level, axis=1)
            for name, level in zip(
                ("rpn_logits", "rpn_deltas"), zip(*found, strict=True), strict=True
            )
        }

        strides = [stride for _, stride in self._maps]
        roi_head = RoiHead(
            self.head_width,
            self.head_convs,
            self.head_layers,
            self.freeze_norm,
            self.dtype,
            name="roi_head",
        )
        wide = np.promote_types(self.dtype, np.float32)
        class_head = ClassHead(self.num_classes, wide, name="class_head")

        def look(boxes):
            bins = roi_align(levels[:-1], strides, boxes, BINS, extents)
            return class_head(roi_head(bins.astype(self.dtype), train))

        if targets is not None:
            keys = self._keys(len(images), train)
            wanted = targets_in_pixels(targets["boxes_cxcywh_01"], targets["target_mask"], sizes)
            outputs |= self._rpn_targets(keys[:, 0], boxes, inside, wanted)
            chosen, aims = self._box_targets(keys[:, 1], proposals, proposed, targets, wanted)
            logits, deltas = look(chosen)
            label = jnp.maximum(aims["box_sample"], 0)[..., None, None]
            outputs |= aims | {
                "box_logits": logits,
                "box_deltas": jnp.take_along_axis(deltas, label, axis=2)[:, :, 0],
            }
        if not learns:
            logits, deltas = look(proposals)
            outputs |= {
                "proposals_xyxy_px": proposals,
                "proposed": proposed,
                "logits": logits,
                "deltas": deltas,
            }
            outputs |= _detect(
                logits, deltas, proposals, proposed, sizes, self.candidates, self.most
            )
        return (outputs, features) if return_features else outputs

    def _backbone(self, **place):
        if self.body == "resnet":
            return self._built(ResNet, **place)
        fixed = {"head_width": MOBILE_HEAD * self.widths[-1], "stem_width": self.stem_width}
        return self._built(EfficientNet, **MOBILE_V3 | fixed, **place)

    def _keys(self, batch, train):
        """key[B, 2]: of the anchors and of the proposals that are drawn."""
        if not train:
            key = jax.random.key(0)
            return jnp.broadcast_to(jax.random.split(key)[None], (batch, 2))
        return jax.random.split(self.make_rng("dropout"), (batch, 2))

    def _rpn_targets(self, keys, boxes, inside, wanted):
        """What anchors are trained to be: a sample of them, and the deltas of their targets."""
        boxes, inside = (jnp.concatenate(level, axis=1) for level in (boxes, inside))
        # An anchor without area overlaps nothing.
        boxes = jnp.where(inside[..., None], boxes, 0)
        target, label = anchors.assign(
            boxes,
            *wanted,
            foreground=RPN_FOREGROUND,
            background=RPN_BACKGROUND,
            low_quality=True,
        )
        label = jnp.where(inside, label, -1)
        aims = anchors.encode(jnp.take_along_axis(wanted[0], target[..., None], axis=1), boxes)
        return {
            "rpn_sample": _sampled(*anchors.sample(keys, label, self.rpn_samples, RPN_SHARE)),
            "rpn_target_deltas": lax.stop_gradient(aims),
        }

    def _box_targets(self, keys, proposals, proposed, targets, wanted):
        """Proposals and true boxes that are drawn, f[B, S, 4], and what they are trained to be."""
        boxes = jnp.concatenate([proposals, wanted[0]], axis=1)
        there = jnp.concatenate([proposed, wanted[1]], axis=1)
        target, label = anchors.assign(
            boxes, *wanted, foreground=BOX_FOREGROUND, background=BOX_BACKGROUND
        )
        label = jnp.where(there, label, -1)
        sample = _sampled(*anchors.sample(keys, label, self.box_samples, BOX_SHARE))
        _, place = lax.top_k(sample, min(self.box_samples, boxes.shape[1]))  # foreground first
        sample, target = (jnp.take_along_axis(x, place, axis=1) for x in (sample, target))
        boxes = jnp.take_along_axis(boxes, place[..., None], axis=1)
        aims = jnp.take_along_axis(wanted[0], target[..., None], axis=1)
        classes = jnp.take_along_axis(targets["label"], target, axis=1) + 1
        return boxes, {
            "box_sample": jnp.where(sample == 1, classes, sample),
            "box_target_deltas": lax.stop_gradient(anchors.encode(aims, boxes, BOX_WEIGHTS)),
        }


# Proposals and detections -----------------------------------------------------------------------


def _propose(
    found: Sequence[tuple[Any, Any]],
    boxes: Sequence[Any],
    inside: Sequence[Any],
    sizes,
    count: int,
    least: float,
):
    """The best anchors of all levels, moved, without what a better one of its level covers.

    (f[B, R, 4] in pixels, within the image; bool[B, R] which are some). No gradient flows to them.
    """
    parts = []
    for (logits, deltas), own, there in zip(found, boxes, inside, strict=True):
        logits, deltas = (lax.stop_gradient(x) for x in (logits, deltas))
        score = jnp.where(there, logits, -jnp.inf)
        score, index = lax.top_k(score, min(count, score.shape[1]))  # [B, N]
        deltas, own = (jnp.take_along_axis(x, index[..., None], axis=1) for x in (deltas, own))
        moved = clip_xyxy(anchors.decode(deltas, own), sizes[:, None])
        parts.append((score, moved))
    most = max(score.shape[1] for score, _ in parts)
    score = jnp.stack([_padded(score, most, -jnp.inf) for score, _ in parts], axis=1)  # [B, L, N]
    moved = jnp.stack([_padded(moved, most, 0) for _, moved in parts], axis=1)
    valid = (score > -jnp.inf) & _large(moved, LEAST_PROPOSAL)
    if least:
        valid &= nn.sigmoid(score) >= least
    keep = nms.nms(moved, score, valid, RPN_OVERLAP)
    keep, score, moved = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (keep, score, moved))
    index, proposed = nms.best(keep, score, count)
    moved = jnp.take_along_axis(moved, index[..., None], axis=1)
    return jnp.where(proposed[..., None], moved, 0), proposed


def _detect(logits, deltas, proposals, proposed, sizes, candidates: int, most: int):
    """Scored boxes of classes, without what a better one of its class covers."""
    classes = logits.shape[-1] - 1
    chance = jax.nn.softmax(logits)[..., 1:]  # [B, R, K]
    there = proposed[..., None] & (chance > LEAST_SCORE)
    score = jnp.where(there, chance, 0).reshape(logits.shape[0], -1)
    score, pair = lax.top_k(score, min(candidates, score.shape[1]))  # [B, M]
    row, label = pair // classes, pair % classes
    flat = deltas[:, :, 1:].reshape(deltas.shape[0], -1, 4)
    moves = jnp.take_along_axis(flat, pair[..., None], axis=1)
    boxes = jnp.take_along_axis(proposals, row[..., None], axis=1)
    boxes = clip_xyxy(anchors.decode(moves, boxes, BOX_WEIGHTS), sizes[:, None])
    valid = (score > 0) & _large(boxes, LEAST_BOX)
    index, kept = nms.best(nms.nms(boxes, score, valid, OVERLAP, label), score, most)
    sides = jnp.tile(sizes[:, ::-1].astype(boxes.dtype), 2)[:, None]  # width, height, twice
    return {
        "score": jnp.where(kept, jnp.take_along_axis(score, index, axis=1), 0),
        "label": jnp.take_along_axis(label, index, axis=1).astype(jnp.int32),
        "boxes_xyxy_01": jnp.take_along_axis(boxes, index[..., None], axis=1) / sides,
    }


def _padded(values, count: int, fill: float):
    """[B, n, ...] -> [B, count, ...]."""
    more = count - values.shape[1]
    return jnp.pad(
        values, ((0, 0), (0, more), *((0, 0),) * (values.ndim - 2)), constant_values=fill
    )


def _large(boxes, least: float):
    return jnp.all(boxes[..., 2:] - boxes[..., :2] >= least, axis=-1)


def _sampled(foreground, background):
    """i32[B, N]: 1 foreground, 0 background, -1 what is not drawn."""
    return jnp.where(foreground, 1, jnp.where(background, 0, -1))
