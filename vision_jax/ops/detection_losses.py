"""Set losses of the DETR family: predictions are matched to targets, then each query is scored.

    detr_loss          softmax over K classes and "no object" (DETR)
    sigmoid_detr_loss  one sigmoid a class: IoU-aware BCE (RF-DETR), focal (Deformable DETR)

Both take all decoder layers at once, f[L, B, Q, ...], match each of them on its own, and return the
weighted sum over layers of each image, f[B], with metrics of the last one. The mean of them is the
loss of the batch, whose sums are divided by something of the whole batch, such as its boxes. A
micro-batch of an update is told what there is to count in all of it (`whole`): then the means over
the micro-batches are the loss and metrics of the update. Boxes are cxcywh in shares of the image.
A plain sum over B is the sum over the global batch under `jit`, on any number of devices.
Everything is computed in float32, or in float64 where the logits are.

Batches of targets are padded: `label` i32[B, T], `target_boxes` f[B, T, 4], `target_mask`
bool[B, T]; and so are the examples, `mask` bool[B]. What is masked counts nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.errors import UserError
from vision_jax.ops import boxes as box_ops
from vision_jax.ops.matching import match

Array = jax.Array
Metrics = dict[str, Array]
Masks = tuple[Array, Array]  # target_mask bool[B, T], mask bool[B]

CLASS_LOSSES = ("ia_bce", "focal")
LEAST_QUALITY = 0.01  # that IoU-aware BCE trains a matched query towards


def detr_loss(
    logits: Array,
    boxes_cxcywh_01: Array,
    label: Array,
    target_boxes_cxcywh_01: Array,
    target_mask: Array,
    mask: Array,
    *,
    class_cost: float = 1.0,
    l1_cost: float = 5.0,
    giou_cost: float = 2.0,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    no_object_weight: float = 0.1,
    whole: Masks | None = None,
    alone: bool = False,
) -> tuple[Array, Metrics]:
    """DETR's set loss (Carion et al. 2020, https://arxiv.org/abs/2005.12872, section 3.1).

    The cost of a pair is l1_cost · L1 - giou_cost · GIoU - class_cost · probability. The class term
    is a weighted mean over all queries, the box terms are sums over matched pairs divided by the
    number of boxes. Equal to transformers 5.23 `ForObjectDetectionLoss` with auxiliary losses.

    Args:
      logits: f[L, B, Q, K + 1]; the last class is "no object".
      boxes_cxcywh_01: f[L, B, Q, 4].
      label: i32[B, T], each in 0 .. K - 1.
      target_boxes_cxcywh_01: f[B, T, 4].
      target_mask: bool[B, T].
      mask: bool[B].
      class_cost: factor of the classes in the matching's cost.
      l1_cost: of the boxes' L1 distance.
      giou_cost: of minus their GIoU.
      class_weight: factor of the classes in the loss of each layer.
      l1_weight: of the boxes' L1 distance.
      giou_weight: of 1 - their GIoU.
      no_object_weight: of a query without a target in the class term.
      whole: `target_mask` and `mask` of the whole update, where this batch is a part of it.
      alone: each image's loss is what it is in a batch of this image only. Else a batch's boxes
        decide how an image's class term weighs against its box terms.

    Returns:
      The losses f[B], 0 of a padded example, and metrics: `loss_ce`, `loss_bbox` and `loss_giou` of
      the last layer without their weights; `loss_aux`, the weighted sum of the other layers;
      `cardinality_error`, how far the number of queries with a class is from the number of boxes;
      over matched pairs, the share whose best class is wrong, `class_error`, and the mean IoU,
      `matched_iou`.

    Raises:
      UserError: more targets than queries.
    """
    no_object = logits.shape[-1] - 1
    logits, boxes, target_boxes, target_mask = _prepared(
        logits, boxes_cxcywh_01, target_boxes_cxcywh_01, target_mask, mask
    )
    cost = class_cost * _of_labels(-jax.nn.softmax(logits, axis=-1), label)  # [L, B, T, Q]
    cost += _box_cost(boxes, target_boxes, l1_cost, giou_cost)
    query = match(cost, jnp.broadcast_to(target_mask, cost.shape[:-1]))  # [L, B, T]

    def classes_of(query: Array, label: Array) -> Array:
        return jnp.full(logits.shape[2], no_object, label.dtype).at[query].set(label, mode="drop")

    classes = jax.vmap(jax.vmap(classes_of), (0, None))(query, label)  # [L, B, Q]
    log_likelihood = _at(jax.nn.log_softmax(logits), classes[..., None])[..., 0]
    weights = jnp.where(classes == no_object, no_object_weight, 1.0).astype(logits.dtype)
    weights *= mask[None, :, None].astype(weights.dtype)
    whole_targets, whole_mask = _whole((target_mask, mask), whole)
    num_boxes, num_images = _counts(whole_targets, whole_mask)
    boxes_a_row, images_a_row = (
        _a_row(n, whole_mask, logits.dtype) for n in (num_boxes, num_images)
    )
    count = _alone(target_mask, logits.dtype) if alone else boxes_a_row
    terms, iou = _box_terms(boxes, query, target_boxes, target_mask, count)
    # Of each image: a query for each target, and the others, which are without.
    if alone:
        found = target_mask.sum(1).astype(float)
        total = no_object_weight * (logits.shape[2] - found) + found
        total = jnp.where(mask, total, 0).astype(logits.dtype)[None]
    else:
        free = logits.shape[2] * num_images - num_boxes
        total = no_object_weight * free.astype(float) + num_boxes.astype(float)
        total = (total / len(whole_mask)).astype(logits.dtype)
    terms["loss_ce"] = -(weights * log_likelihood).sum(2) / jnp.where(total > 0, total, 1)

    best = jnp.argmax(logits[-1], axis=-1)  # [B, Q]
    metrics = {
        "cardinality_error": _cardinality_error(best != no_object, target_mask, mask, images_a_row),
        **_pair_metrics(best, query, label, iou, target_mask, boxes_a_row),
    }
    totals, last = _weighted(terms, class_weight, l1_weight, giou_weight)
    return totals.sum(0), {**last, "loss_aux": totals[:-1].sum(0).mean(), **metrics}


def sigmoid_detr_loss(
    logits: Array,
    boxes_cxcywh_01: Array,
    label: Array,
    target_boxes_cxcywh_01: Array,
    target_mask: Array,
    mask: Array,
    *,
    encoder_logits: Array | None = None,
    encoder_boxes_cxcywh_01: Array | None = None,
    class_loss: str = "ia_bce",
    groups: int = 1,
    class_cost: float = 2.0,
    l1_cost: float = 5.0,
    giou_cost: float = 2.0,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    alpha: float = 0.25,
    whole: Masks | None = None,
    alone: bool = False,
) -> tuple[Array, Metrics]:
    """The set loss of detectors with a sigmoid for each class.

    The class term of the matching is the focal loss of the target's class as found, less the same
    as missed. That of the loss is one of
      ia_bce: IoU-aware BCE (Cai et al. 2023, https://arxiv.org/abs/2303.14404, equation 6, as in
        LW-DETR and RF-DETR): the matched class is trained towards t = p^α · IoU^(1 - α), others
        towards 0 with weight p². Equal to transformers 5.23 `LwDetrForObjectDetectionLoss`, which
        is RF-DETR's, with logarithms of sigmoids that stay finite.
      focal: Lin et al. 2017, as in Deformable, Conditional and DAB DETR. Equal to transformers 5.23
        `DeformableDetrForObjectDetectionLoss`.
    Either is summed over queries and classes and divided, as the box terms are, by the number of
    boxes.

    Group DETR (Chen et al. 2022, https://arxiv.org/abs/2207.13085): in training the queries are
    several groups of equal size, one after the other, and each is matched to all targets.

    Args:
      logits: f[L, B, groups · Q, K].
      boxes_cxcywh_01: f[L, B, groups · Q, 4].
      label: this and the next three as `detr_loss` has them.
      target_boxes_cxcywh_01: f[B, T, 4].
      target_mask: bool[B, T].
      mask: bool[B].
      encoder_logits: f[B, groups · Q, K], proposals of a two-stage model, which are one layer more.
      encoder_boxes_cxcywh_01: f[B, groups · Q, 4].
      class_loss: "ia_bce" or "focal".
      groups: of queries.
      class_cost: factor of the classes in the matching's cost.
      l1_cost: of the boxes' L1 distance.
      giou_cost: of minus their GIoU.
      class_weight: factor of the classes in the loss of each layer.
      l1_weight: of the boxes' L1 distance.
      giou_weight: of 1 - their GIoU.
      alpha: of IoU-aware BCE or of the focal loss, and of the matching.
      whole: as `detr_loss` has it.
      alone: as `detr_loss` has it.

    Returns:
      The losses and metrics as `detr_loss` has them, of all groups, but `cardinality_error` of the
      first alone, which is the one that predicts. `loss_encoder` is the weighted sum of the
      proposals' terms, where there are any.

    Raises:
      UserError: another class loss, queries that do not split into the groups, or more targets than
        a group has queries.
    """
    if class_loss not in CLASS_LOSSES:
        raise UserError(f"class_loss is one of {', '.join(CLASS_LOSSES)}, not {class_loss!r}")
    queries, remainder = divmod(logits.shape[2], groups)
    if remainder:
        raise UserError(f"{logits.shape[2]} queries do not split into {groups} groups")
    if encoder_logits is not None:
        assert encoder_boxes_cxcywh_01 is not None
        logits = jnp.concatenate([encoder_logits[None], logits])
        boxes_cxcywh_01 = jnp.concatenate([encoder_boxes_cxcywh_01[None], boxes_cxcywh_01])
    logits, boxes, target_boxes, target_mask = _prepared(
        logits, boxes_cxcywh_01, target_boxes_cxcywh_01, target_mask, mask
    )
    cost = class_cost * _of_labels(jnp.subtract(*_focal(logits, alpha)), label)
    cost += _box_cost(boxes, target_boxes, l1_cost, giou_cost)  # [L, B, T, groups · Q]
    query = _match_in_groups(cost, target_mask, groups)  # [L, B, groups · T]

    # Each group's copy of the targets is from here on just more targets.
    label, all_mask = (jnp.tile(array, (1, groups)) for array in (label, target_mask))
    target_boxes = jnp.tile(target_boxes, (1, groups, 1))
    whole_targets, whole_mask = _whole((target_mask, mask), whole)
    num_boxes, num_images = _counts(whole_targets, whole_mask)
    images_a_row = _a_row(num_images, whole_mask, logits.dtype)
    boxes_a_row = _a_row(groups * num_boxes, whole_mask, logits.dtype)
    count = _alone(all_mask, logits.dtype) if alone else boxes_a_row
    terms, iou = _box_terms(boxes, query, target_boxes, all_mask, count)
    loss_ce = _sigmoid_term(logits, query, label, iou, all_mask, mask, class_loss, alpha)
    terms["loss_ce"] = loss_ce / count

    sure = logits[-1, :, :queries].max(-1) > 0  # [B, Q], a probability above a half
    best = jnp.argmax(logits[-1], axis=-1)  # [B, groups · Q]
    metrics = {
        "cardinality_error": _cardinality_error(sure, target_mask, mask, images_a_row),
        **_pair_metrics(best, query, label, iou, all_mask, boxes_a_row),
    }
    totals, last = _weighted(terms, class_weight, l1_weight, giou_weight)
    first = 0 if encoder_logits is None else 1
    if first:
        metrics["loss_encoder"] = totals[0].mean()
    return totals.sum(0), {**last, "loss_aux": totals[first:-1].sum(0).mean(), **metrics}


def _prepared(
    logits: Array, boxes: Array, target_boxes: Array, target_mask: Array, mask: Array
) -> tuple[Array, Array, Array, Array]:
    """All in one precision; a padded example has no targets, and zeros for what may be NaN."""
    dtype = np.promote_types(logits.dtype, np.float32)
    rows = mask[None, :, None, None]
    logits = jnp.where(rows, logits.astype(dtype), 0)
    boxes = jnp.where(rows, boxes.astype(dtype), 0)
    return logits, boxes, target_boxes.astype(dtype), target_mask & mask[:, None]


def _match_in_groups(cost: Array, target_mask: Array, groups: int) -> Array:
    """The query of each target in each group, f[L, B, T, groups · Q] -> i32[L, B, groups · T]."""
    queries = cost.shape[-1] // groups
    cost = cost.reshape(*cost.shape[:-1], groups, queries).swapaxes(2, 3)  # [L, B, groups, T, Q]
    query = match(cost, jnp.broadcast_to(target_mask[:, None], cost.shape[:-1]))
    query += queries * jnp.arange(groups, dtype=query.dtype)[None, None, :, None]
    return query.reshape(*query.shape[:2], -1)


def _sigmoid_term(
    logits: Array,
    query: Array,
    label: Array,
    iou: Array,
    target_mask: Array,
    mask: Array,
    class_loss: str,
    alpha: float,
) -> Array:
    """The sum over queries and classes of each image's class loss, f[L, B].

    Args:
      logits: f[L, B, Q, K].
      query: i32[L, B, T], that of each target.
      label: i32[B, T].
      iou: f[L, B, T], of each target's box and its query's.
      target_mask: bool[B, T].
      mask: bool[B].
      class_loss, alpha: as `sigmoid_detr_loss` has them.
    """
    flat = logits.reshape(*logits.shape[:2], -1)  # [L, B, Q · K]
    matched = _at(flat, query * logits.shape[-1] + label[None])  # [L, B, T]
    if class_loss == "focal":
        found, _ = _focal(matched, alpha)
        missing = [_focal(x, alpha)[1] for x in (logits, matched)]
    else:
        found = _towards_quality(matched, iou, alpha)
        missing = [jax.nn.sigmoid(x) ** 2 * jax.nn.softplus(x) for x in (logits, matched)]
    # As if nothing were found, then corrected where something is: no array of targets is built.
    loss_ce = jnp.where(mask[None, :, None, None], missing[0], 0).sum((2, 3))
    return loss_ce + jnp.where(target_mask[None], found - missing[1], 0).sum(2)


def _of_labels(scores: Array, label: Array) -> Array:
    """The score of each target's class at each query, f[L, B, Q, K], i32[B, T] -> f[L, B, T, Q]."""
    return _at(lax.stop_gradient(scores), label[None, :, None, :]).swapaxes(-1, -2)


def _box_cost(boxes: Array, target_boxes: Array, l1_cost: float, giou_cost: float) -> Array:
    """What a pair's boxes add to its cost, f[L, B, Q, 4], f[B, T, 4] -> f[L, B, T, Q]."""
    boxes, targets = lax.stop_gradient(boxes)[:, :, None], target_boxes[None, :, :, None]
    l1 = jnp.abs(boxes - targets).sum(-1)
    corners = (box_ops.cxcywh_to_xyxy(array) for array in (boxes, targets))
    return l1_cost * l1 - giou_cost * box_ops.giou_xyxy(*corners)


def _whole(own: Masks, whole: Masks | None) -> Masks:
    """The masks to count by; a padded example has no targets."""
    if whole is None:
        return own
    target_mask, mask = whole
    return target_mask & mask[:, None], mask


def _counts(target_mask: Array, mask: Array) -> Array:
    """i[2], the true ones of target_mask[B, T] and of mask[B].

    Both in one sum over B: of sums that wait for nothing, devices of one CPU may begin one each and
    wait for each other for ever.
    """
    return jnp.stack([target_mask.sum(1), mask.astype(int)]).sum(1)


def _a_row(count: Array, mask: Array, dtype: jnp.dtype) -> Array:
    """The count in the mean over B of mask[B], f[]; at least one in all."""
    return (jnp.maximum(count, 1) / len(mask)).astype(dtype)


def _alone(target_mask: Array, dtype: jnp.dtype) -> Array:
    """What an image's sums are divided by if it is alone: its boxes, f[1, B], at least 1."""
    return jnp.maximum(target_mask.sum(1), 1)[None].astype(dtype)


def _box_terms(
    boxes: Array, query: Array, target_boxes: Array, target_mask: Array, count: Array
) -> tuple[Metrics, Array]:
    """L1 and GIoU terms f[L, B] over matched pairs, and the IoU f[L, B, T] of each pair.

    Args:
      boxes: f[L, B, Q, 4].
      query: i32[L, B, T].
      target_boxes: f[B, T, 4].
      target_mask: bool[B, T].
      count: what the terms are divided by, f[] or f[1, B].
    """
    boxes, targets = _at(boxes, query[..., None], axis=2), target_boxes[None]
    l1 = jnp.abs(boxes - targets).sum(-1)
    corners = [box_ops.cxcywh_to_xyxy(array) for array in (boxes, targets)]
    pairs = {"loss_bbox": l1, "loss_giou": 1 - box_ops.giou_xyxy(*corners)}
    terms = {
        name: jnp.where(target_mask[None], pair, 0).sum(2) / count for name, pair in pairs.items()
    }
    return terms, lax.stop_gradient(box_ops.iou_xyxy(*corners))


def _focal(logits: Array, alpha: float) -> tuple[Array, Array]:
    """Focal loss of each logit, with exponent 2: if its class is there, and if it is not."""
    probability = jax.nn.sigmoid(logits)
    there = alpha * (1 - probability) ** 2 * jax.nn.softplus(-logits)
    return there, (1 - alpha) * probability**2 * jax.nn.softplus(logits)


def _towards_quality(logits: Array, iou: Array, alpha: float) -> Array:
    """BCE of matched logits against t = p^alpha · iou^(1 - alpha), taken as a constant."""
    quality = jax.nn.sigmoid(logits) ** alpha * iou ** (1 - alpha)
    quality = lax.stop_gradient(jnp.maximum(quality, LEAST_QUALITY))
    return jax.nn.softplus(logits) - quality * logits


def _weighted(
    terms: Metrics, class_weight: float, l1_weight: float, giou_weight: float
) -> tuple[Array, Metrics]:
    """The weighted sum of each layer's terms, f[L, B], and the mean terms of the last layer."""
    totals = class_weight * terms["loss_ce"]
    totals += l1_weight * terms["loss_bbox"] + giou_weight * terms["loss_giou"]
    return totals, {name: term[-1].mean() for name, term in terms.items()}


def _pair_metrics(
    best: Array, query: Array, label: Array, iou: Array, target_mask: Array, count: Array
) -> Metrics:
    """Of the last layer's pairs the share whose query has another best class, and the mean IoU."""
    return {
        "class_error": _mean(_at(best, query[-1]) != label, target_mask, count),
        "matched_iou": _mean(iou[-1], target_mask, count),
    }


def _cardinality_error(
    has_class: Array, target_mask: Array, mask: Array, images_a_row: Array
) -> Array:
    """How far the number of queries with a class, bool[B, Q], is from that of targets."""
    return _mean(jnp.abs(has_class.sum(-1) - target_mask.sum(-1)), mask, images_a_row)


def _at(values: Array, index: Array, axis: int = -1) -> Array:
    """values[..., index, ...]; the index of a padded target lies outside and reads anything."""
    return jnp.take_along_axis(values, index, axis=axis, mode="clip")


def _mean(values: Array, mask: Array, a_row: Array) -> Array:
    """The mean of what is in mask[B, ...], of which there are `a_row` in the mean over B."""
    return jnp.where(mask, values.astype(a_row.dtype), 0).sum() / len(mask) / a_row
