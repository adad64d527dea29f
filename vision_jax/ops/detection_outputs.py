"""A detector's logits and boxes as scored boxes in pixels, of fixed shapes.

{"score": f[B, N], "label": i32[B, N], "boxes_xyxy_px": f[B, N, 4]}, in pixels of the size that is
given; not clipped to the image, as in the reference. Computed in float32 at least.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.ops.boxes import cxcywh_to_xyxy

Array = jax.Array


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


def _pixels(boxes_cxcywh_01: Array, size: Array) -> Array:  # [B, N, 4]
    boxes = cxcywh_to_xyxy(_float(boxes_cxcywh_01))
    return boxes * jnp.tile(size[:, None, ::-1], 2).astype(boxes.dtype)  # width, height, twice


def _float(values: Array) -> Array:
    return values.astype(np.promote_types(values.dtype, np.float32))
