"""Losses of detectors without proposals: RetinaNet's, of anchors, and FCOS', of points.

    focal loss of the classes of each place, and how far the boxes of some are from their targets

Lin et al. 2017 (https://arxiv.org/abs/1708.02002) and Tian et al. 2019
(https://arxiv.org/abs/1904.01355), as torchvision 0.29 computes them. All is of fixed shapes; T
targets are padded, and a target without area is none. Computed in float32, or in float64 where the
logits are.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.ops import anchors
from vision_jax.ops.boxes import targets_in_pixels
from vision_jax.ops.losses import sigmoid_focal_loss

Array = jax.Array

FOREGROUND, BACKGROUND = 0.5, 0.4  # IoU from and below which an anchor is trained
EPSILON = 1e-7  # of the areas that are divided by


def anchor_loss(
    outputs: Mapping[str, Array],
    label: Array,
    boxes_cxcywh_01: Array,
    target_mask: Array,
    mask: Array,
    size: Array,
    *,
    box_loss: Literal["l1", "giou"] = "l1",
) -> tuple[Array, dict[str, Array]]:
    """RetinaNet's loss of each image: focal loss of its anchors + distance of those with a target.

    Both are sums, divided by the number of anchors of the image with a target, at least 1, so that
    an image's loss depends on no other.

    Args:
      outputs: "logits" f[B, A, C], "box_deltas" f[B, A, 4], "anchors_xyxy_px" f[B, A, 4] and
        "inside" bool[B, A], as the model gives them.
      label: i32[B, T], each in 0 .. C - 1.
      boxes_cxcywh_01: f[B, T, 4], relative to the images without padding.
      target_mask: bool[B, T].
      mask: bool[B], the images that count.
      size: i32[B, 2], (height, width) of the images without padding, in pixels.
      box_loss: L1 distance of the deltas, or 1 - GIoU of the boxes.

    Returns:
      The losses f[B], 0 of a padded example, whose mean is torchvision's, and metrics: `loss_class`
      and `loss_box`, and `anchors` of an image that have a target.
    """
    logits, deltas, boxes, targets = _wide(
        outputs, "box_deltas", "anchors_xyxy_px", boxes_cxcywh_01
    )
    targets, there = targets_in_pixels(targets, target_mask & mask[:, None], size)
    inside = outputs["inside"]
    boxes = jnp.where(inside[..., None], boxes, 0)  # without area, so that they overlap nothing
    target, kind = anchors.assign(
        boxes,
        targets,
        there,
        foreground=FOREGROUND,
        background=BACKGROUND,
        low_quality=True,
    )
    kind = jnp.where(inside & mask[:, None], kind, -1)
    foreground = kind == 1
    classes = _class_losses(logits, jnp.take_along_axis(label, target, axis=1), foreground)
    aims = _aims(targets, target, foreground, boxes)
    if box_loss == "giou":
        # The boxes of all others are their own targets, so that no gradient is without end.
        off = giou_loss(anchors.decode(deltas, boxes), aims)
    else:
        off = jnp.abs(deltas - anchors.encode(aims, boxes)).sum(-1)
    found = foreground.sum(axis=1)
    count = jnp.maximum(found, 1).astype(logits.dtype)
    terms = {
        "loss_class": jnp.where(kind >= 0, classes, 0).sum(axis=1) / count,
        "loss_box": jnp.where(foreground, off, 0).sum(axis=1) / count,
    }
    metrics = {name: value.mean() for name, value in terms.items()}
    metrics["anchors"] = found.sum() / jnp.maximum(mask.sum(), 1)
    return terms["loss_class"] + terms["loss_box"], metrics


def point_loss(
    outputs: Mapping[str, Array],
    label: Array,
    boxes_cxcywh_01: Array,
    target_mask: Array,
    mask: Array,
    size: Array,
    *,
    radius: float = 1.5,
    alone: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """FCOS' loss of each image: focal loss of its points, of those with a target GIoU and BCE.

    BCE is of how central the point is in its target. Sums, divided by the number of points with a
    target of the batch, at least 1.

    Args:
      outputs: "logits" f[B, A, C], "center_logits" f[B, A], "distances" f[B, A, 4],
        "points_xyxy_px" f[B, A, 4], "reach_px" f[B, A, 2] and "inside" bool[B, A], as the model
        gives them.
      label: i32[B, T], each in 0 .. C - 1.
      boxes_cxcywh_01: f[B, T, 4], relative to the images without padding.
      target_mask: bool[B, T].
      mask: bool[B], the images that count.
      size: i32[B, 2], (height, width) of the images without padding, in pixels.
      radius: see `assign_points`.
      alone: each image's loss is what it is in a batch of this image only.

    Returns:
      The losses f[B], 0 of a padded example, whose mean is torchvision's, and metrics:
      `loss_class`, `loss_box` and `loss_center`, and how many points have a target, `foreground`,
      by which all of these are divided.
    """
    logits, distances, points, targets = _wide(
        outputs, "distances", "points_xyxy_px", boxes_cxcywh_01
    )
    targets, there = targets_in_pixels(targets, target_mask & mask[:, None], size)
    target, foreground = assign_points(
        points, outputs["reach_px"].astype(points.dtype), targets, there, radius=radius
    )
    inside = outputs["inside"] & mask[:, None]
    foreground &= inside
    classes = _class_losses(logits, jnp.take_along_axis(label, target, axis=1), foreground)
    aims = _aims(targets, target, foreground, points)
    off = giou_loss(anchors.decode_distances(distances, points), aims)
    center = outputs["center_logits"].astype(logits.dtype)
    unsure = jax.nn.softplus(center) - center * centrality(points, aims)
    found = foreground.sum(axis=1)
    count = jnp.maximum(found, 1) if alone else jnp.maximum(found.sum(), 1)[None] / len(found)
    count = count.astype(logits.dtype)
    terms = {
        "loss_class": jnp.where(inside, classes, 0).sum(axis=1) / count,
        "loss_box": jnp.where(foreground, off, 0).sum(axis=1) / count,
        "loss_center": jnp.where(foreground, unsure, 0).sum(axis=1) / count,
    }
    metrics = {name: value.mean() for name, value in terms.items()}
    metrics["foreground"] = found.sum()
    return sum(terms.values(), jnp.zeros(len(mask), logits.dtype)), metrics


def assign_points(
    points_xyxy: Array, reach: Array, targets_xyxy: Array, target_mask: Array, *, radius: float
) -> tuple[Array, Array]:
    """The target that each point learns, and whether there is one.

    A point learns a box that it is inside of, if it is near its center and the farthest of the
    box's sides is within its reach; of several the smallest, and of equal ones the first. Targets
    are visited one after the other, the padded ones at the end not at all. No gradient flows
    through it. Source: torchvision 0.29, models/detection/fcos.py `compute_loss`.

    Args:
      points_xyxy: f[B, A, 4], squares around the points.
      reach: f[B, A, 2], between which the distance to the farthest side must be.
      targets_xyxy: f[B, T, 4].
      target_mask: bool[B, T].
      radius: how far a point may be from a box's center, along either axis, in sides of its square.

    Returns:
      (i32[B, A] a target, any one where there is none; bool[B, A]).
    """
    points, reach, targets = (lax.stop_gradient(x) for x in (points_xyxy, reach, targets_xyxy))
    across, down = ((points[..., i] + points[..., i + 2]) / 2 for i in range(2))  # [B, A]
    near = radius * (points[..., 2] - points[..., 0])
    least, most = reach[..., 0], reach[..., 1]
    count = jnp.max(jnp.where(target_mask, jnp.arange(target_mask.shape[1])[None] + 1, 0))

    def visit(number, state):
        smallest, target = state
        mask = lax.dynamic_index_in_dim(target_mask, number, 1)  # [B, 1]
        one = lax.dynamic_slice_in_dim(targets, number, 1, 1)  # [B, 1, 4]
        left, top, right, bottom = (one[..., i] for i in range(4))
        away = jnp.maximum(jnp.abs(across - (left + right) / 2), jnp.abs(down - (top + bottom) / 2))
        sides = (across - left, down - top, right - across, bottom - down)
        closest = jnp.minimum(jnp.minimum(*sides[:2]), jnp.minimum(*sides[2:]))
        farthest = jnp.maximum(jnp.maximum(*sides[:2]), jnp.maximum(*sides[2:]))
        area = (right - left) * (bottom - top)
        better = mask & (away < near) & (closest > 0) & (farthest > least) & (farthest < most)
        better &= area < smallest
        return jnp.where(better, area, smallest), jnp.where(better, number, target)

    shape = points.shape[:2]
    state = (jnp.full(shape, jnp.inf, points.dtype), jnp.zeros(shape, jnp.int32))
    smallest, target = lax.fori_loop(0, count, visit, state)
    return target, smallest < jnp.inf


def centrality(points_xyxy: Array, boxes_xyxy: Array) -> Array:
    """How central a point is in its box, √(min/max of left and right · of top and bottom).

    Tian et al. 2019, equation 3. 0 for a point at a side or outside. No gradient flows through it.

    Examples:
      >>> box = jnp.array([0.0, 0.0, 4.0, 4.0])
      >>> centrality(jnp.array([1.0, 1.0, 3.0, 3.0]), box).item()
      1.0

    Args:
      points_xyxy: f[..., 4], squares around the points.
      boxes_xyxy: f[..., 4].

    Returns:
      f[...] in [0, 1].
    """
    points, boxes = lax.stop_gradient(points_xyxy), lax.stop_gradient(boxes_xyxy)
    sides = anchors.encode_distances(boxes, points)
    before, after = sides[..., :2], sides[..., 2:]
    low, high = jnp.minimum(before, after), jnp.maximum(before, after)
    ratio = jnp.where(high > 0, low / jnp.where(high > 0, high, 1), 0)
    return jnp.sqrt(jnp.maximum(ratio, 0).prod(axis=-1))


def giou_loss(boxes_xyxy: Array, targets_xyxy: Array) -> Array:
    """1 - GIoU of each box with its partner, as torchvision 0.29's `generalized_box_iou_loss`.

    Unlike ops.boxes.giou_xyxy it adds 1e-7 to what it divides by, and boxes that touch don't pull
    on each other.

    Examples:
      >>> box = jnp.array([0.0, 0.0, 1.0, 1.0])
      >>> round(giou_loss(box, box + jnp.array([3.0, 0.0, 3.0, 0.0])).item(), 4)
      1.5

    Args:
      boxes_xyxy: f[..., 4].
      targets_xyxy: f[..., 4].

    Returns:
      f[...] in [0, 2].
    """
    low = jnp.maximum(boxes_xyxy[..., :2], targets_xyxy[..., :2])
    high = jnp.minimum(boxes_xyxy[..., 2:], targets_xyxy[..., 2:])
    common = jnp.where((high > low).all(axis=-1), (high - low).prod(axis=-1), 0)
    areas = [(x[..., 2:] - x[..., :2]).prod(axis=-1) for x in (boxes_xyxy, targets_xyxy)]
    union = areas[0] + areas[1] - common
    outer = jnp.maximum(boxes_xyxy[..., 2:], targets_xyxy[..., 2:]) - jnp.minimum(
        boxes_xyxy[..., :2], targets_xyxy[..., :2]
    )
    hull = outer.prod(axis=-1)
    return 1 - common / (union + EPSILON) + (hull - union) / (hull + EPSILON)


def _wide(outputs: Mapping[str, Array], said: str, places: str, targets: Array) -> list[Array]:
    """Logits, what is said of boxes, places and targets, in float32 or better."""
    dtype = np.promote_types(outputs["logits"].dtype, np.float32)
    arrays = (outputs["logits"], outputs[said], outputs[places], targets)
    return [x.astype(dtype) for x in arrays]


def _class_losses(logits: Array, label: Array, foreground: Array) -> Array:
    """Focal losses f[B, A] of all classes f[B, A, C] of a place, of which one or none is there."""
    classes = jnp.arange(logits.shape[-1])[None, None]
    there = foreground[..., None] & (label[..., None] == classes)
    return sigmoid_focal_loss(logits, there.astype(logits.dtype)).sum(axis=-1)


def _aims(targets: Array, target: Array, foreground: Array, places: Array) -> Array:
    """The boxes f[B, A, 4] that places are trained towards; those without a target, themselves."""
    aims = jnp.take_along_axis(targets, target[..., None], axis=1)
    return lax.stop_gradient(jnp.where(foreground[..., None], aims, places))
