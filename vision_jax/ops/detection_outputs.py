"""A detector's logits and boxes as scored boxes in pixels, of fixed shapes.

{"score": f[B, N], "label": i32[B, N], "boxes_xyxy_px": f[B, N, 4]}, in pixels of the size that is
given; not clipped to the image, as in the reference. Computed in float32 at least.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.ops import nms
from vision_jax.ops.boxes import cxcywh_to_xyxy

Array = jax.Array
# postprocess(outputs of the model, sizes of the original images i32[B, 2]) -> scored boxes, as
# above; what scores 0 is no box
Postprocess = Callable[[Mapping[str, Array], Array], dict[str, Array]]


def softmax_detections(logits: Array, boxes_cxcywh_01: Array, size: Array) -> dict[str, Array]:
    """One box a query, with its likeliest class; DETR's, as in transformers 5.23's DETR processor.

    Examples:
      >>> found = softmax_detections(
      ...     jnp.zeros((1, 1, 4)), jnp.array([[[0.5, 0.5, 1.0, 0.5]]]), jnp.array([[100, 200]])
      ... )
      >>> found["score"].tolist(), found["boxes_xyxy_px"].tolist()
      ([[0.25]], [[[0.0, 25.0, 200.0, 75.0]]])

    Args:
      logits: f[B, Q, C + 1]; the last class is "no object".
      boxes_cxcywh_01: f[B, Q, 4], relative to the image without padding.
      size: i32[B, 2], (height, width) of the original image in pixels.

    Returns:
      N = Q rows in the order of the queries.
    """
    chance = jax.nn.softmax(_float(logits), axis=-1)[..., :-1]  # [B, Q, C]
    return {
        "score": jnp.max(chance, axis=-1),
        "label": jnp.argmax(chance, axis=-1).astype(jnp.int32),
        "boxes_xyxy_px": _pixels(boxes_cxcywh_01, size),
    }


def sigmoid_detections(
    logits: Array, boxes_cxcywh_01: Array, size: Array, most: int = 300
) -> dict[str, Array]:
    """The best pairs of query and class; RF-DETR's, as in transformers 5.23's processor of it.

    A query may come more than once, with different classes. Pairs rank by logit, so that scores
    which round to 1 keep their order; among equal logits the earlier query and class ranks first.

    Args:
      logits: f[B, Q, C].
      boxes_cxcywh_01: f[B, Q, 4], relative to the image without padding.
      size: i32[B, 2], (height, width) of the original image in pixels.
      most: pairs that are kept.

    Returns:
      N = min(most, Q · C) rows by falling score.
    """
    batch, queries, classes = logits.shape
    flat = _float(logits).reshape(batch, queries * classes)
    best, pair = jax.lax.top_k(flat, min(most, queries * classes))  # [B, N]
    boxes = jnp.take_along_axis(boxes_cxcywh_01, (pair // classes)[..., None], axis=1)  # [B, N, 4]
    return {
        "score": jax.nn.sigmoid(best),
        "label": (pair % classes).astype(jnp.int32),
        "boxes_xyxy_px": _pixels(boxes, size),
    }


def cell_detections(
    logits: Array,
    object_logits: Array,
    boxes_cxcywh_01: Array,
    size: Array,
    *,
    least: float = 0.001,
    overlap: float = 0.65,
    candidates: int = 1000,
    most: int = 300,
) -> dict[str, Array]:
    """The likeliest class of each cell, without what a better box of that class covers; YOLOX'.

    As pixeltable-yolox 0.4.3 `postprocess`, which has no limits: a box's score is that of an object
    times that of its likeliest class.

    Args:
      logits: f[B, A, C].
      object_logits: f[B, A].
      boxes_cxcywh_01: f[B, A, 4], relative to the image without padding.
      size: i32[B, 2], (height, width) of the original image in pixels.
      least: score of a box that is considered; the paper's for AP.
      overlap: IoU above which the lower score is dropped, within a class.
      candidates: boxes of the best scores that are considered.
      most: boxes that are kept.

    Returns:
      N = min(most, A) rows by falling score, 0 of a row without a box.
    """
    logits, objects = _float(logits), _float(object_logits)
    label = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # [B, A]
    score = jax.nn.sigmoid(jnp.max(logits, axis=-1)) * jax.nn.sigmoid(objects)
    score, best = jax.lax.top_k(score, min(candidates, score.shape[1]))  # [B, M]
    label = jnp.take_along_axis(label, best, axis=1)
    boxes = jnp.take_along_axis(_pixels(boxes_cxcywh_01, size), best[..., None], axis=1)
    return _not_covered(score, label, boxes, score >= least, overlap, most)


def pair_detections(
    logits: Array,
    boxes_cxcywh_01: Array,
    size: Array,
    *,
    least: float = 0.05,
    overlap: float = 0.6,
    candidates: int = 1000,
    most: int = 100,
) -> dict[str, Array]:
    """The best pairs of cell and class, without what a better box of that class covers; NanoDet's.

    As the original's GFLHead.get_bboxes, which takes the best 1,000 cells of each map and no limit
    of pairs. Boxes are clipped to the image, first.

    Args:
      logits: f[B, A, C].
      boxes_cxcywh_01: f[B, A, 4], relative to the image without padding.
      size: i32[B, 2], (height, width) of the original image in pixels.
      least: score above which a pair is considered.
      overlap: IoU above which the lower score is dropped, within a class.
      candidates: pairs of the best scores that are considered.
      most: boxes that are kept.

    Returns:
      N = min(most, A · C) rows by falling score, 0 of a row without a box.
    """
    found = sigmoid_detections(logits, boxes_cxcywh_01, size, candidates)
    score, boxes = found["score"], found["boxes_xyxy_px"]
    edges = jnp.tile(size[:, None, ::-1].astype(boxes.dtype), 2)
    boxes = jnp.clip(boxes, 0, edges)
    return _not_covered(score, found["label"], boxes, score > least, overlap, most)


def _not_covered(score, label, boxes, valid, overlap, most) -> dict[str, Array]:
    """At most `most` of the valid rows [B, M], by falling score, of each class its own."""
    kept = nms.nms(boxes, score, valid, overlap, label)
    index, there = nms.best(kept, score, most)
    return {
        "score": jnp.where(there, jnp.take_along_axis(score, index, axis=1), 0),
        "label": jnp.take_along_axis(label, index, axis=1),
        "boxes_xyxy_px": jnp.take_along_axis(boxes, index[..., None], axis=1),
    }


def _pixels(boxes_cxcywh_01: Array, size: Array) -> Array:  # [B, N, 4]
    boxes = cxcywh_to_xyxy(_float(boxes_cxcywh_01))
    return boxes * jnp.tile(size[:, None, ::-1].astype(boxes.dtype), 2)  # width, height, twice


def _float(values: Array) -> Array:
    return values.astype(np.promote_types(values.dtype, np.float32))


# By what is predicted ----------------------------------------------------------------------------


def _of_last_layer(detections: Callable[..., dict[str, Array]]) -> Postprocess:
    """The boxes of the decoder's last layer."""
    return lambda outputs, size: detections(
        outputs["logits"][-1], outputs["boxes_cxcywh_01"][-1], size
    )


def _of_cells(outputs: Mapping[str, Array], size: Array) -> dict[str, Array]:
    boxes = outputs["boxes_cxcywh_01"]
    return cell_detections(outputs["logits"], outputs["object_logits"], boxes, size)


def _of_sides(outputs: Mapping[str, Array], size: Array) -> dict[str, Array]:
    return pair_detections(outputs["logits"], outputs["boxes_cxcywh_01"], size)


def _chosen(outputs: Mapping[str, Array], size: Array) -> dict[str, Array]:
    """The boxes that the model itself has chosen."""
    boxes = outputs["boxes_xyxy_01"]
    pixels = jnp.tile(size[:, None, ::-1].astype(boxes.dtype), 2)
    return {**{name: outputs[name] for name in ("score", "label")}, "boxes_xyxy_px": boxes * pixels}


# Keys are what a model predicts (models.families.Family.predicts).
POSTPROCESS: dict[str, Postprocess] = {
    "softmax_set": _of_last_layer(softmax_detections),
    "sigmoid_set": _of_last_layer(sigmoid_detections),
    "proposals": _chosen,
    "anchors": _chosen,
    "points": _chosen,
    "cells": _of_cells,
    "sides": _of_sides,
}
