"""The boxes that a detector finds, and what of its outputs is explained of each.

A detector says a box and classes at each of many places: an anchor, a point, a cell, a proposal, a
query of the last layer. A box is explained by

- the logit of its class at its place, which has a gradient: `box_logit`; and
- how well any place still says the box and its class, which needs no place, for methods that change
  the image and measures of what they find: `box_score`, after D-RISE.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vision_jax.explain.forward import Target
from vision_jax.models.faster_rcnn import BOX_WEIGHTS
from vision_jax.ops import anchors
from vision_jax.ops.boxes import cxcywh_to_xyxy, pairwise_iou_xyxy
from vision_jax.ops.detection_outputs import POSTPROCESS

NEAR = 1e-5  # of an image's side: boxes that are the same but for rounding
# Whose places move with the image: the best proposals, the queries of the best cells.
MOVING = ("proposals", "sigmoid_set")

Array = jax.Array


class Boxes(NamedTuple):
    """Boxes of images, f[B, ...] of one each or f[B, N, ...] of several.

    Attributes:
      place: i32, of what said the box, see the head of this file.
      label: i32.
      score: f in [0, 1], 0 of what is no box.
      xyxy_01: f[..., 4], relative to the image without its padding, and within it.
    """

    place: Array
    label: Array
    score: Array
    xyxy_01: Array


class Places(NamedTuple):
    """What each place says of one class.

    Attributes:
      logit: f[B, A], of the class; of a YOLOX with that of an object, as its score is a product.
      score: f[B, A] in [0, 1].
      xyxy_01: f[B, A, 4], see Boxes.
    """

    logit: Array
    score: Array
    xyxy_01: Array


def places_of(predicts: str, outputs: Mapping[str, Any], labels: Array, sizes: Array) -> Places:
    """What the places of each image say of a class.

    Args:
      predicts: see models.families.Family.
      outputs: the detector's.
      labels: i32[B].
      sizes: i32[B, 2], (height, width) of the images without padding, in pixels of the canvas.
    """

    def of_class(x):  # [B, A, C] -> [B, A]
        return jnp.take_along_axis(x, labels[:, None, None], axis=2)[..., 0]

    if predicts == "proposals":  # the first class is none, and each has a box of its own
        rows = jnp.arange(len(labels))
        deltas = outputs["deltas"][rows, :, labels + 1]
        boxes = anchors.decode(deltas, outputs["proposals_xyxy_px"], BOX_WEIGHTS)
        score = of_class(jax.nn.softmax(outputs["logits"])[..., 1:])
        score = jnp.where(outputs["proposed"], score, 0)
        return Places(of_class(outputs["logits"][..., 1:]), score, _shares(boxes, sizes))
    if predicts in ("anchors", "points"):
        logit = of_class(outputs["logits"])
        score = jax.nn.sigmoid(logit)
        if predicts == "anchors":
            boxes = anchors.decode(outputs["box_deltas"], outputs["anchors_xyxy_px"])
        else:
            boxes = anchors.decode_distances(outputs["distances"], outputs["points_xyxy_px"])
            score = jnp.sqrt(score * jax.nn.sigmoid(outputs["center_logits"]))
        return Places(logit, jnp.where(outputs["inside"], score, 0), _shares(boxes, sizes))
    last = predicts.endswith("_set")
    logits, boxes = (outputs[name][-1] if last else outputs[name] for name in
                     ("logits", "boxes_cxcywh_01"))  # fmt: skip
    boxes = jnp.clip(cxcywh_to_xyxy(boxes), 0, 1)
    logit = of_class(logits)
    if predicts == "softmax_set":
        return Places(logit, of_class(jax.nn.softmax(logits)), boxes)
    if predicts == "cells":
        objects = outputs["object_logits"]
        score = jax.nn.sigmoid(logit) * jax.nn.sigmoid(objects)
        return Places(logit + objects, score, boxes)
    return Places(logit, jax.nn.sigmoid(logit), boxes)


def _shares(boxes: Array, sizes: Array) -> Array:
    """Boxes f[B, A, 4] in pixels as shares of the images' sides."""
    return jnp.clip(boxes / jnp.tile(sizes[:, None, ::-1].astype(boxes.dtype), 2), 0, 1)


def place_of(places: Places, xyxy_01: Array) -> Array:
    """i32[B]: the place that says a box f[B, 4]; of several that do, the one surest of the class.

    No gradient flows through it.
    """
    away = jax.lax.stop_gradient(abs(places.xyxy_01 - xyxy_01[:, None]).max(-1))  # [B, A]
    says = away <= away.min(-1, keepdims=True) + NEAR
    return jnp.argmax(jnp.where(says, jax.lax.stop_gradient(places.logit), -jnp.inf), axis=-1)


def find_boxes(
    predicts: str,
    outputs: Mapping[str, Any],
    sizes: Array,
    *,
    most: int,
    least: float,
    label: int | None = None,
) -> Boxes:
    """The detector's own boxes [B, N], those of the highest scores.

    Args:
      predicts, outputs, sizes: see `places_of`.
      most: N.
      least: score below which a box is none.
      label: the only class, if any.
    """
    found = POSTPROCESS[predicts](outputs, sizes)
    wanted = found["score"] >= least
    if label is not None:
        wanted &= found["label"] == label
    score, best = jax.lax.top_k(jnp.where(wanted, found["score"], 0), min(most, wanted.shape[1]))
    labels = jnp.take_along_axis(found["label"], best, axis=1)
    boxes = jnp.take_along_axis(_shares(found["boxes_xyxy_px"], sizes), best[..., None], axis=1)

    def place(labels, boxes):
        return place_of(places_of(predicts, outputs, labels, sizes), boxes)

    places = jax.vmap(place, in_axes=1, out_axes=1)(labels, boxes)
    return Boxes(places, labels, score, boxes)


def box_logit(predicts: str, box: Boxes, sizes: Array) -> Target:
    """The logit of a box's class at its place, one box an image.

    Where places move with the image, it is the place that now says the box, or what is nearest.
    """

    def target(outputs):
        places = places_of(predicts, outputs, box.label, sizes)
        place = place_of(places, box.xyxy_01) if predicts in MOVING else box.place
        return jnp.take_along_axis(places.logit, place[:, None], axis=1)[:, 0]

    return target


def box_score(predicts: str, box: Boxes, sizes: Array) -> Target:
    """The largest product of a place's score and its overlap (IoU) with the box, one box an image.

    Petsiuk et al. 2021 (D-RISE, https://arxiv.org/abs/2006.03204, equation 1), with the score of
    the box's class in the place of the likeness of all classes and the score of an object.
    """

    def target(outputs):
        places = places_of(predicts, outputs, box.label, sizes)
        overlap = pairwise_iou_xyxy(box.xyxy_01[:, None], places.xyxy_01)[:, 0]  # [B, A]
        return (overlap * places.score).max(-1)

    return target
