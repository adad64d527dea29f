"""SimOTA, YOLOX' assignment of cells to targets, and the loss that follows from it.

Ge et al. 2021, https://arxiv.org/abs/2107.08430, section 2.1; equal to pixeltable-yolox 0.4.3
`YoloxHead.get_losses`. The reference loops over images and cuts out the cells near a target; here
all is of fixed shapes, [B, T, A], so that a whole batch is one program. T targets are padded, as in
ops/detection_losses.py, and what is masked counts nothing. Everything is computed in float32, or in
float64 where the logits are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.ops.boxes import cxcywh_to_xyxy
from vision_jax.ops.cells import decode, encode, grid

Array = jax.Array

RADIUS = 1.5  # strides from a target's center, within which a cell may be its own
CANDIDATES = 10  # cells whose overlaps say how many cells a target gets
IOU_COST, FAR_COST = 3.0, 1e6
LEAST_LOG = -100.0  # of a probability, as torch's binary cross entropy has it
BOX_WEIGHT = 5.0


class Assignment(NamedTuple):
    """What each cell is trained towards.

    Attributes:
      foreground: bool[B, A], the cells that have a target.
      target: i32[B, A], which; 0 where there is none.
      iou: f[B, A] of the cell's box with it; 0 where there is none.
    """

    foreground: Array
    target: Array
    iou: Array


def assign(
    logits: Array,
    object_logits: Array,
    boxes_cxcywh_px: Array,
    label: Array,
    target_boxes_cxcywh_px: Array,
    target_mask: Array,
    *,
    canvas: Sequence[int],
    strides: Sequence[int],
) -> Assignment:
    """Cells of the least cost for each target, as many as its ten best overlaps add up to.

    Only cells near the center of some target take part. A cell that several targets want goes to
    the one of least cost. No gradient flows through it.

    Args:
      logits: f[B, A, C] of the classes.
      object_logits: f[B, A].
      boxes_cxcywh_px: f[B, A, 4] on the canvas.
      label: i32[B, T].
      target_boxes_cxcywh_px: f[B, T, 4].
      target_mask: bool[B, T].
      canvas: (H, W) in pixels.
      strides: of the maps, in pixels.
    """
    logits, objects, boxes, targets = (
        lax.stop_gradient(x)
        for x in (logits, object_logits, boxes_cxcywh_px, target_boxes_cxcywh_px)
    )
    cells, stride = (x.astype(boxes.dtype) for x in grid(canvas, strides))
    centers = (cells + 0.5) * stride  # [A, 2]
    away = jnp.abs(centers[None, None] - targets[:, :, None, :2]).max(axis=-1)  # [B, T, A]
    near = (away < RADIUS * stride[:, 0][None, None]) & target_mask[..., None]
    taking_part = near.any(axis=1)[:, None]  # [B, 1, A]

    overlap = jnp.where(taking_part, _pairwise_iou(targets, boxes), 0)  # [B, T, A]
    cost = _class_cost(logits, objects, label) - IOU_COST * jnp.log(overlap + 1e-8)
    cost += jnp.where(near, 0, FAR_COST)
    cost = jnp.where(taking_part & target_mask[..., None], cost, jnp.inf)

    count = min(CANDIDATES, overlap.shape[-1])
    wanted = lax.top_k(overlap, count)[0].sum(axis=-1).astype(jnp.int32)
    cheapest, best = lax.top_k(-cost, count)  # [B, T, 10]
    chosen = jnp.arange(count, dtype=jnp.int32)[None, None] < jnp.maximum(wanted, 1)[..., None]
    chosen &= cheapest > -jnp.inf
    pairs = jnp.put_along_axis(jnp.zeros(cost.shape, bool), best, chosen, axis=-1, inplace=False)

    wanting = pairs.sum(axis=1)  # [B, A]
    target = jnp.where(wanting > 1, cost.argmin(axis=1), pairs.argmax(axis=1)).astype(jnp.int32)
    iou = jnp.take_along_axis(overlap, target[:, None], axis=1)[:, 0]
    foreground = wanting > 0
    return Assignment(foreground, target, jnp.where(foreground, iou, 0))


def _pairwise_iou(targets: Array, boxes: Array) -> Array:
    """f[B, T, 4], f[B, A, 4] as cxcywh -> f[B, T, A]."""
    first, second = cxcywh_to_xyxy(targets)[:, :, None], cxcywh_to_xyxy(boxes)[:, None]
    low = jnp.maximum(first[..., :2], second[..., :2])
    high = jnp.minimum(first[..., 2:], second[..., 2:])
    common = jnp.maximum(high - low, 0).prod(axis=-1)
    union = targets[..., 2:].prod(axis=-1)[:, :, None] + boxes[..., 2:].prod(axis=-1)[:, None]
    return common / (union - common)


def _class_cost(logits: Array, objects: Array, label: Array) -> Array:
    """Binary cross entropy f[B, T, A] of all classes, of √(class · object), with one-hot labels.

    It differs from that with no class at all in one term, so that no [B, T, A, C] is needed.
    """
    log_chance = (jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(objects)[..., None]) / 2
    log_other = jnp.maximum(jnp.log1p(-jnp.exp(log_chance)), LEAST_LOG)  # [B, A, C]
    log_chance = jnp.maximum(log_chance, LEAST_LOG)
    differs = (log_other - log_chance).swapaxes(1, 2)  # [B, C, A]
    return jnp.take_along_axis(differs, label[..., None], axis=1) - log_other.sum(-1)[:, None]


def yolox_loss(
    logits: Array,
    object_logits: Array,
    box_deltas: Array,
    label: Array,
    target_boxes_cxcywh_px: Array,
    target_mask: Array,
    mask: Array,
    *,
    canvas: Sequence[int],
    strides: Sequence[int],
    l1_weight: Array | float = 0.0,
    alone: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """YOLOX' loss: 5·(1 - IoU²) + BCE of an object + BCE of the classes towards the IoU (+ L1).

    Sums over cells, divided by the number of cells with a target in the batch.

    Args:
      logits: f[B, A, C], as the next two a model's outputs.
      object_logits: f[B, A].
      box_deltas: f[B, A, 4].
      label: i32[B, T], each in 0 .. C - 1.
      target_boxes_cxcywh_px: f[B, T, 4] on the canvas.
      target_mask: bool[B, T].
      mask: bool[B].
      canvas: (H, W) in pixels.
      strides: of the maps, in pixels.
      l1_weight: of the deltas' L1 distance; the reference trains its last epochs with 1.
      alone: each image's loss is what it is in a batch of this image only.

    Returns:
      The losses f[B], 0 of a padded example, whose mean is the batch's, and metrics without their
      weights: `loss_box`, `loss_object`, `loss_class`, `loss_l1`; how many cells have a target,
      `foreground`, by which all of these are divided; and their mean IoU, `matched_iou`.
    """
    terms, foreground, iou = cell_sums(
        logits,
        object_logits,
        box_deltas,
        label,
        target_boxes_cxcywh_px,
        target_mask,
        mask,
        canvas=canvas,
        strides=strides,
    )
    found = foreground.sum(axis=1)  # [B]
    count = jnp.maximum(found, 1) if alone else jnp.maximum(found.sum(), 1)[None] / len(found)
    terms = {name: value / count for name, value in terms.items()}
    losses = BOX_WEIGHT * terms["loss_box"] + terms["loss_object"] + terms["loss_class"]
    metrics = {name: value.mean() for name, value in terms.items()}
    metrics["matched_iou"] = iou.sum() / jnp.maximum(found.sum(), 1)
    metrics["foreground"] = found.sum()
    return losses + l1_weight * terms["loss_l1"], metrics


def cell_sums(
    logits: Array,
    object_logits: Array,
    box_deltas: Array,
    label: Array,
    target_boxes_cxcywh_px: Array,
    target_mask: Array,
    mask: Array,
    confidence: Array | None = None,
    *,
    canvas: Sequence[int],
    strides: Sequence[int],
) -> tuple[dict[str, Array], Array, Array]:
    """The terms of YOLOX' loss summed over cells, of targets that are more or less certain.

    A cell's object is trained towards the confidence of its target, and its box and classes in
    proportion to it. Arguments are those of `yolox_loss`.

    Args:
      confidence: f[B, T] in [0, 1]; None for targets that are certain.

    Returns:
      ({`loss_box`, `loss_object`, `loss_class`, `loss_l1`: f[B]}, the confidence of each cell's
      target f[B, A], 0 where there is none, and the IoU f[B, A] of its box with it).
    """
    dtype = np.promote_types(logits.dtype, np.float32)
    logits, objects, deltas, targets = (
        x.astype(dtype) for x in (logits, object_logits, box_deltas, target_boxes_cxcywh_px)
    )
    target_mask = target_mask & mask[:, None]
    targets = jnp.where(target_mask[..., None], targets, 1)  # finite gradients, whatever it held
    label = jnp.where(target_mask, label, 0)
    boxes = decode(deltas, canvas, strides)
    foreground, target, iou = assign(
        logits, objects, boxes, label, targets, target_mask, canvas=canvas, strides=strides
    )
    towards = jnp.take_along_axis(targets, target[..., None], axis=1)  # [B, A, 4]
    class_of = jnp.take_along_axis(label, target, axis=1)  # [B, A]
    at_class = jnp.take_along_axis(logits, class_of[..., None], axis=2)[..., 0]
    weight = foreground.astype(dtype)  # [B, A]
    if confidence is not None:
        sure = jnp.where(target_mask, confidence, 0).astype(dtype)
        weight *= jnp.take_along_axis(sure, target, axis=1)

    def total(values: Array) -> Array:
        return jnp.where(foreground, weight * values, 0).sum(axis=1)  # [B]

    boxes = jnp.where(foreground[..., None], boxes, 1)
    certain = jnp.where(mask[:, None], jax.nn.softplus(objects) - weight * objects, 0)
    return (
        {
            "loss_box": total(1 - jnp.square(iou_cxcywh(boxes, towards))),
            "loss_object": certain.sum(axis=1),
            "loss_class": total(jax.nn.softplus(logits).sum(-1) - iou * at_class),
            "loss_l1": total(jnp.abs(deltas - encode(towards, canvas, strides)).sum(-1)),
        },
        weight,
        iou,
    )


def iou_cxcywh(boxes: Array, others: Array) -> Array:
    """IoU of each box with its partner as YOLOX' loss has it, f[B, A, 4], f[B, A, 4] -> f[B, A]."""
    first, second = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(others)
    sides = jnp.minimum(first[..., 2:], second[..., 2:]) - jnp.maximum(
        first[..., :2], second[..., :2]
    )
    common = jnp.where((sides > 0).all(axis=-1), sides.prod(axis=-1), 0)
    union = boxes[..., 2:].prod(axis=-1) + others[..., 2:].prod(axis=-1) - common
    return common / (union + 1e-16)
