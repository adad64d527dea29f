"""Losses of a student to its teacher: arrays in, one loss per example out, f[B].

    of logits      soft_logits, hard_label, decoupled, token; ensemble_logits for several teachers
    of features    hint, attention_transfer, attention_maps, patch_tokens, relational_distance,
                   relational_angle; to_grid brings other architectures' features to one grid
    of detectors   detr_queries; yolox_detections and yolox_cells, sums over cells
    to store       compress_logits and expand_logits

The mean over the batch is the loss of the paper; where that compares examples with each other, each
row gets its share. No gradient flows to the teacher. All is computed in float32, or in float64
where an input is. Shapes that do not go together, and unknown kinds, raise UserError.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp, xlogy

from vision_jax.errors import UserError
from vision_jax.ops import boxes as box_ops
from vision_jax.ops.cells import decode
from vision_jax.ops.losses import cross_entropy
from vision_jax.ops.matching import match
from vision_jax.ops.simota import BOX_WEIGHT, cell_sums, iou_cxcywh

Array = jax.Array


# Logits -------------------------------------------------------------------------------------------


def soft_logits(logits: Array, teacher_logits: Array, temperature: float = 1.0) -> Array:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), in nats.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2. Equal to timm 1.0
    `LogitDistillationTask`.

    Examples:
      >>> soft_logits(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 0.0]]), 4.0).tolist()
      [0.0]

    Args:
      logits: f[B, C].
      teacher_logits: f[B, C].
      temperature: T > 0.
    """
    logits, teacher_logits = _wide(*_alike(logits, teacher_logits))
    return temperature**2 * _kl(logits / temperature, teacher_logits / temperature)


def hard_label(logits: Array, teacher_logits: Array, label_smoothing: float = 0.0) -> Array:
    """Cross-entropy with the teacher's best class, smoothed as in `losses.one_hot_targets`.

    Touvron et al. 2020 (DeiT), https://arxiv.org/abs/2012.12877, section 4.

    Examples:
      >>> hard_label(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 3.0]])).tolist()
      [0.6931471824645996]

    Args:
      logits: f[B, C].
      teacher_logits: f[B, C].
      label_smoothing: ε in [0, 1].
    """
    logits, teacher_logits = _wide(*_alike(logits, teacher_logits))
    classes = logits.shape[-1]
    best = jax.nn.one_hot(jnp.argmax(teacher_logits, axis=-1), classes, dtype=logits.dtype)
    return cross_entropy(logits, (1 - label_smoothing) * best + label_smoothing / classes)


def token(
    losses: Array,
    token_logits: Array,
    teacher_logits: Array,
    *,
    kind: Literal["soft", "hard"] = "hard",
    weight: float = 0.5,
    temperature: float = 1.0,
) -> Array:
    """DeiT: the class token's head learns the labels, the distillation token's head the teacher.

    (1 - weight) · losses + weight · (`hard_label` or `soft_logits` of the token's head): Touvron et
    al. 2020, section 4. Equal to timm 1.0 `TokenDistillationTask`; DeiT's own code divides the soft
    term by the number of classes too.

    Args:
      losses: f[B], of the class token's head towards the labels.
      token_logits: f[B, C], of the distillation token's head.
      teacher_logits: f[B, C].
      kind: of the teacher's term.
      weight: of the teacher's term, in [0, 1].
      temperature: of the soft term; the paper's is 3, with weight 0.1.
    """
    if _known(kind, ("soft", "hard")) == "soft":
        taught = soft_logits(token_logits, teacher_logits, temperature)
    else:
        taught = hard_label(token_logits, teacher_logits)
    return (1 - weight) * losses + weight * taught


def decoupled(
    logits: Array,
    teacher_logits: Array,
    label: Array,
    *,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
    temperature: float = 4.0,
) -> Array:
    """Decoupled distillation: KL of the target class against the rest, and KL within the rest.

    Zhao et al. 2022 (DKD), https://arxiv.org/abs/2203.08679, equation 7 with alpha
    `target_weight` and beta `other_weight`, times T² as in the authors' code, but in logarithms.
    With the weights 1 and 1 - (the teacher's probability of the target) it is `soft_logits`.

    Args:
      logits: f[B, C], C > 1.
      teacher_logits: f[B, C].
      label: i32[B].
      target_weight: of the first term, alpha.
      other_weight: of the second, beta.
      temperature: T.
    """
    logits, teacher_logits = _wide(*_alike(logits, teacher_logits))
    is_target = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)

    def parts(logits: Array) -> tuple[Array, Array]:
        """Log probabilities of (target, rest) f[B, 2], and the others' logits f[B, C]."""
        scaled = logits / temperature
        others = jnp.where(is_target, -jnp.inf, scaled)
        target = jnp.where(is_target, scaled, 0).sum(-1)
        pair = jnp.stack([target, logsumexp(others, axis=-1)], axis=-1)
        return pair, others

    (pair, others), (teacher_pair, teacher_others) = parts(logits), parts(teacher_logits)
    terms = target_weight * _kl(pair, teacher_pair) + other_weight * _kl(
        others, teacher_others, where=~is_target
    )
    return temperature**2 * terms


def ensemble_logits(
    teacher_logits: Array, weights: Array | Sequence[float], temperature: float = 1.0
) -> Array:
    """Logits of several teachers' weighted mean probabilities at a temperature.

    T · log Σ w · softmax(teacher / T), whose softmax at the same T is the student's target (You
    et al. 2017, Learning from multiple teacher networks, section 3.1).

    Examples:
      >>> certain = ensemble_logits(jnp.array([[[90.0, 0.0]], [[0.0, 90.0]]]), [1, 1])
      >>> jax.nn.softmax(certain).tolist()
      [[0.5, 0.5]]

    Args:
      teacher_logits: f[M, B, C].
      weights: f[M], or f[M, B] for a weight by example; none negative, with a sum above 0.
      temperature: T.

    Returns:
      f[B, C].
    """
    (teacher_logits,) = _wide(teacher_logits)
    weights = jnp.asarray(weights, teacher_logits.dtype)
    weights = weights.reshape(*weights.shape, *(1,) * (3 - weights.ndim))  # [M, 1 or B, 1]
    log_probability = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)
    weights = jnp.broadcast_to(weights / weights.sum(0, keepdims=True), log_probability.shape)
    return temperature * logsumexp(log_probability, axis=0, b=weights)


# Features -----------------------------------------------------------------------------------------


def hint(features: Array, teacher_features: Array) -> Array:
    """Mean squared difference, after the student's features were projected to the teacher's shape.

    Romero et al. 2015 (FitNets), https://arxiv.org/abs/1412.6550, equation 3, as a mean and not
    half a sum, which is what implementations take. Equal to timm 1.0 `FeatureDistillationTask`.

    Examples:
      >>> hint(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]])).tolist()
      [2.0]

    Args:
      features: f[B, ...].
      teacher_features: f[B, ...] of the same shape.
    """
    features, teacher_features = _wide(*_alike(features, teacher_features))
    return _example_mean(jnp.square(features - teacher_features))


def attention_transfer(features: Array, teacher_features: Array, power: float = 2.0) -> Array:
    """Mean squared difference of where features are large: normalized maps of mean |x|^power.

    Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928, section 3.1, as in the authors'
    code, a mean over places.

    Args:
      features: f[B, ..., C], maps [B, h, w, C] or patch tokens [B, N, D].
      teacher_features: f[B, ..., C'], of the same places; C' may differ.
      power: p.
    """
    features, teacher_features = _wide(*_alike(features, teacher_features, -1))

    def map_of(features: Array) -> Array:
        energy = jnp.mean(jnp.abs(features) ** power, axis=-1)  # [B, ...]
        return _unit(energy.reshape(energy.shape[0], -1))  # [B, h·w]

    return _example_mean(jnp.square(map_of(features) - map_of(teacher_features)))


def attention_maps(
    attention: Array, teacher_attention: Array, kind: Literal["kl", "mse"] = "kl"
) -> Array:
    """Difference of two attentions: KL(teacher ‖ student) of each query's row, or squared error.

    Means over heads and queries (and keys, for "mse"). Where the numbers of heads differ, both are
    averaged over their heads first. MiniLM (Wang et al. 2020, https://arxiv.org/abs/2002.10957,
    section 3.1) takes the KL of the last layer.

    Args:
      attention: f[B, K, N, M], probabilities over the last axis.
      teacher_attention: f[B, K', N, M].
      kind: of the difference.
    """
    attention, teacher_attention = _wide(attention, teacher_attention)
    if attention.shape[1] != teacher_attention.shape[1]:
        attention, teacher_attention = (
            array.mean(1, keepdims=True) for array in (attention, teacher_attention)
        )
    _alike(attention, teacher_attention)
    if _known(kind, ("kl", "mse")) == "mse":
        return _example_mean(jnp.square(attention - teacher_attention))
    smallest = float(jnp.finfo(attention.dtype).tiny)
    log_attention = jnp.log(jnp.maximum(attention, smallest))
    kl = xlogy(teacher_attention, teacher_attention) - teacher_attention * log_attention
    return _example_mean(kl.sum(-1))


def patch_tokens(
    tokens: Array, teacher_tokens: Array, kind: Literal["cosine", "mse"] = "cosine"
) -> Array:
    """Difference of each patch's tokens, 1 - cosine or mean squared error, a mean over patches.

    Args:
      tokens: f[B, ..., D], patch tokens without prefix, projected to the teacher's width.
      teacher_tokens: f[B, ..., D].
      kind: of the difference. The cosine's norms are at least 1e-8, as in torch.
    """
    if _known(kind, ("cosine", "mse")) == "mse":
        return hint(tokens, teacher_tokens)
    tokens, teacher_tokens = _wide(*_alike(tokens, teacher_tokens))
    return _example_mean(1 - (_unit(tokens, 1e-8) * _unit(teacher_tokens, 1e-8)).sum(-1))


def relational_distance(features: Array, teacher_features: Array) -> Array:
    """Huber loss of the distances between examples, in units of their mean.

    Park et al. 2019 (RKD-D), https://arxiv.org/abs/1904.05068, section 3.2.1, as in the authors'
    code: a mean over all B² pairs, of which each example gets those of its row.

    Args:
      features: f[B, D].
      teacher_features: f[B, D']; D' may differ.
    """
    features, teacher_features = _wide(*_alike(features, teacher_features, 1))
    difference = _distances(features) - _distances(teacher_features)
    return _huber(difference).mean(-1)


def relational_angle(features: Array, teacher_features: Array) -> Array:
    """Huber loss of the cosines of the angles that every two examples make at a third.

    Park et al. 2019 (RKD-A), section 3.2.2, as in the authors' code: a mean over all B³ triplets,
    of which each example gets those whose corner it is. Memory is B²·D and B³.

    Args:
      features: f[B, D].
      teacher_features: f[B, D']; D' may differ.
    """
    features, teacher_features = _wide(*_alike(features, teacher_features, 1))

    def cosines(features: Array) -> Array:
        direction = _unit(features[None] - features[:, None])  # [B, B, D], from each to each
        return jnp.einsum("ijd,ikd->ijk", direction, direction, precision="highest")

    return _huber(cosines(features) - cosines(teacher_features)).mean((1, 2))


def to_grid(
    features: Array,
    size: tuple[int, int],
    *,
    grid: tuple[int, int] | None = None,
    num_prefix: int = 0,
) -> Array:
    """Features on another grid, bilinear between the centers of places, as torch interpolates.

    So that a ViT's tokens can be compared with a convolutional network's map, and a grid of one
    resolution with that of another.

    Args:
      features: f[B, h, w, C], or tokens f[B, P + h·w, C] with `grid`.
      size: the grid wanted, (rows, columns).
      grid: the tokens' own grid, (rows, columns).
      num_prefix: P, tokens in front that are dropped.

    Returns:
      f[B, *size, C].

    Raises:
      UserError: tokens that are not as many as the grid has places.
    """
    if features.ndim == 3:
        features = features[:, num_prefix:]
        if grid is None or features.shape[1] != grid[0] * grid[1]:
            raise UserError(
                f"distillation: {features.shape[1]} tokens after {num_prefix} in front make no grid"
                f" {grid}: name the layer of a ViT and its own grid"
            )
        features = features.reshape(features.shape[0], *grid, -1)  # [B, h, w, C]
    if features.shape[1:3] == tuple(size):
        return features
    (features,) = _wide(features)
    for axis, wanted in zip((1, 2), size, strict=True):
        features = _interpolate(features, axis, wanted)
    return features


# Detectors ----------------------------------------------------------------------------------------


def detr_queries(
    logits: Array,
    boxes_cxcywh_01: Array,
    teacher_logits: Array,
    teacher_boxes_cxcywh_01: Array,
    *,
    sigmoid: bool = False,
    most_queries: int = 100,
    temperature: float = 1.0,
    class_cost: float = 1.0,
    l1_cost: float = 5.0,
    giou_cost: float = 2.0,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> Array:
    """The teacher's queries as soft targets of the student's, each in proportion to its confidence.

    The teacher's most confident queries are matched to queries of the student at the least cost
    l1_cost · L1 - giou_cost · GIoU - class_cost · Σ of the products of their probabilities. A pair
    costs class_weight · T² · KL of the classes + l1_weight · L1 + giou_weight · (1 - GIoU), and
    the loss of an image is the mean of its pairs weighted by the teacher's best probability of an
    object. After DETRDistill (Chang et al. 2022, https://arxiv.org/abs/2211.10156, section 3.2) and
    KD-DETR (Wang et al. 2022, https://arxiv.org/abs/2211.08071, section 3.3).

    Args:
      logits: f[B, Q, C].
      boxes_cxcywh_01: f[B, Q, 4].
      teacher_logits: f[B, Q', C] over the same classes.
      teacher_boxes_cxcywh_01: f[B, Q', 4].
      sigmoid: each class is a decision of its own; else a softmax whose last class is "no object".
      most_queries: how many of the teacher's are taken, at most Q and Q'.
      temperature: T of the KL.
      class_cost: factor of the classes in the matching's cost.
      l1_cost: of the boxes' L1 distance.
      giou_cost: of minus their GIoU.
      class_weight: factor of the classes in the loss.
      l1_weight: of the boxes' L1 distance.
      giou_weight: of 1 - their GIoU.
    """
    logits, boxes, teacher_logits, teacher_boxes = _wide(
        logits, boxes_cxcywh_01, teacher_logits, teacher_boxes_cxcywh_01, students=2
    )
    _alike(logits[:, 0], teacher_logits[:, 0])
    probabilities = jax.nn.sigmoid if sigmoid else jax.nn.softmax
    objects = teacher_logits.shape[-1] - (not sigmoid)
    confidence = probabilities(teacher_logits)[..., :objects].max(-1)  # [B, Q']
    count = min(most_queries, logits.shape[1], teacher_logits.shape[1])
    confidence, chosen = lax.top_k(confidence, count)  # [B, T]
    teacher_logits, teacher_boxes = (
        jnp.take_along_axis(array, chosen[..., None], axis=1)
        for array in (teacher_logits, teacher_boxes)
    )

    products = jnp.einsum("btc,bqc->btq", probabilities(teacher_logits), probabilities(logits))
    l1, giou = _box_distances(boxes[:, None], teacher_boxes[:, :, None])  # [B, T, Q]
    cost = l1_cost * l1 - giou_cost * giou - class_cost * products
    query = match(cost, jnp.ones(cost.shape[:2], bool))  # [B, T]

    logits, boxes = (
        jnp.take_along_axis(array, query[..., None], axis=1) for array in (logits, boxes)
    )
    kl = (_binary_kl if sigmoid else _kl)(logits / temperature, teacher_logits / temperature)
    l1, giou = _box_distances(boxes, teacher_boxes)
    pairs = class_weight * temperature**2 * kl + l1_weight * l1 + giou_weight * (1 - giou)
    total = confidence.sum(-1)
    return (confidence * pairs).sum(-1) / jnp.where(total > 0, total, 1)


def yolox_detections(
    logits: Array,
    object_logits: Array,
    box_deltas: Array,
    score: Array,
    label: Array,
    boxes_xyxy_px: Array,
    mask: Array,
    *,
    canvas: Sequence[int],
    strides: Sequence[int],
    least_score: float,
) -> Array:
    """YOLOX' loss of what a teacher has found, in proportion to how sure it is.

    SimOTA (Ge et al. 2021, https://arxiv.org/abs/2107.08430) gives the teacher's boxes to cells of
    the student, wherever the teacher itself looked for them: it may be any detector. A cell's
    object is trained towards the score of its box, as Efficient Teacher does where a teacher is not
    sure (Xu et al. 2023, https://arxiv.org/abs/2302.07577); its class towards the IoU and its box
    by 5·(1 - IoU²), as YOLOX does, both times the score. With scores of 1 it is the loss of labels,
    but for their count.

    Args:
      logits: f[B, A, C], as the next two a student's outputs.
      object_logits: f[B, A].
      box_deltas: f[B, A, 4].
      score: f[B, N] in [0, 1] of the teacher's boxes, 0 of what is none.
      label: i32[B, N].
      boxes_xyxy_px: f[B, N, 4] on the student's canvas.
      mask: bool[B], the images that count.
      canvas: (H, W) in pixels.
      strides: of the student's maps, in pixels.
      least_score: of a box that is learned.

    Returns:
      Sums over cells, f[B], to be divided by a number of cells.
    """
    logits, objects, deltas, score, boxes = _wide(
        logits, object_logits, box_deltas, score, boxes_xyxy_px, students=3
    )
    area = jnp.all(boxes[..., 2:] > boxes[..., :2], axis=-1)
    terms, _, _ = cell_sums(
        logits,
        objects,
        deltas,
        label,
        box_ops.xyxy_to_cxcywh(boxes),
        (score > 0) & (score >= least_score) & area,
        mask,
        score,
        canvas=canvas,
        strides=strides,
    )
    return BOX_WEIGHT * terms["loss_box"] + terms["loss_object"] + terms["loss_class"]


def yolox_cells(
    logits: Array,
    object_logits: Array,
    box_deltas: Array,
    teacher_logits: Array,
    teacher_object_logits: Array,
    teacher_box_deltas: Array,
    mask: Array,
    *,
    canvas: Sequence[int],
    strides: Sequence[int],
    temperature: float = 1.0,
) -> Array:
    """What another YOLOX says of each cell, its classes and boxes times its objectness.

    T² · KL of an object + objectness · (T² · Σ KL of each class + 5·(1 - IoU²)): the scaling by the
    teacher's objectness, without which background is most of the loss, is Mehta & Ozturk's (2018,
    https://arxiv.org/abs/1805.06361), the box's distance YOLOX' own.

    Args:
      logits: f[B, A, C], as the next two a student's outputs.
      object_logits: f[B, A].
      box_deltas: f[B, A, 4].
      teacher_logits: f[B, A, C], as the next two a teacher's of the same cells.
      teacher_object_logits: f[B, A].
      teacher_box_deltas: f[B, A, 4].
      mask: bool[B], the images that count.
      canvas: (H, W) in pixels.
      strides: of the maps, in pixels.
      temperature: T of the KLs.

    Returns:
      Sums over cells, f[B], to be divided by a number of cells.
    """
    _alike(logits, teacher_logits)
    logits, objects, deltas, teacher_logits, teacher_objects, teacher_deltas = _wide(
        logits,
        object_logits,
        box_deltas,
        teacher_logits,
        teacher_object_logits,
        teacher_box_deltas,
        students=3,
    )
    objectness = jax.nn.sigmoid(teacher_objects)  # [B, A]
    yes, classes = (
        temperature**2 * _binary_kl(x / temperature, y / temperature)
        for x, y in ((objects[..., None], teacher_objects[..., None]), (logits, teacher_logits))
    )
    boxes, theirs = (decode(x, canvas, strides) for x in (deltas, teacher_deltas))
    off = BOX_WEIGHT * (1 - jnp.square(iou_cxcywh(boxes, theirs)))
    return jnp.where(mask[:, None], yes + objectness * (classes + off), 0).sum(axis=1)


# Storage ------------------------------------------------------------------------------------------


class TopLogits(NamedTuple):
    """The best k of C logits, and one that stands for each of the others.

    Attributes:
      values: f32[B, k], the largest first.
      classes: i32[B, k].
      rest: f32[B].
    """

    values: Array
    classes: Array
    rest: Array


def compress_logits(logits: Array, k: int, temperature: float = 1.0) -> TopLogits:
    """Keeps the best k logits exactly, and of the rest their mean probability at a temperature.

    So at this temperature the k best classes keep their probabilities, and what is left over is
    shared by the others: the marginal smoothing of Shen & Xing 2022 (FKD),
    https://arxiv.org/abs/2112.01528, section 3.3.

    Args:
      logits: f[B, C].
      k: 1 .. C - 1.
      temperature: of the loss that will be taken.

    Raises:
      UserError: k out of range.
    """
    classes = logits.shape[-1]
    if not 0 < k < classes:
        raise UserError(f"top {k} logits of {classes} classes: take 1 to {classes - 1}, or all")
    logits = lax.stop_gradient(logits.astype(jnp.float32))
    values, chosen = lax.top_k(logits, k)
    others = jax.vmap(lambda row, at: row.at[at].set(-jnp.inf))(logits, chosen)
    rest = logsumexp(others / temperature, axis=-1) - jnp.log(float(classes - k))
    return TopLogits(values, chosen.astype(jnp.int32), temperature * rest)


def expand_logits(top: TopLogits, num_classes: int) -> Array:
    """All logits f32[B, C], for any of the losses, from the best ones.

    Examples:
      >>> top = compress_logits(jnp.array([[0.0, 5.0, 0.0, 2.0]]), 2)
      >>> expand_logits(top, 4).tolist()
      [[0.0, 5.0, 0.0, 2.0]]
    """
    rows = jnp.broadcast_to(top.rest[:, None], (top.rest.shape[0], num_classes))
    return jax.vmap(lambda row, at, values: row.at[at].set(values))(rows, top.classes, top.values)


# Parts --------------------------------------------------------------------------------------------


def _wide(*arrays: Array, students: int = 1) -> list[Array]:
    """All in one dtype, at least float32; those after the students' without a gradient."""
    dtype = functools.reduce(np.promote_types, (x.dtype for x in arrays), np.dtype("float32"))
    return [
        array.astype(dtype) if index < students else lax.stop_gradient(array).astype(dtype)
        for index, array in enumerate(arrays)
    ]


def _alike(student: Array, teacher: Array, axes: int | None = None) -> tuple[Array, Array]:
    """Both, if their shapes agree, or the first `axes` of them (-1: all but the last)."""
    if student.shape[:axes] != teacher.shape[:axes]:
        raise UserError(
            f"distillation: the student gives {student.shape} and the teacher {teacher.shape}: "
            "give both the same classes; project features, or bring them to one grid"
        )
    return student, teacher


def _known(kind: str, kinds: tuple[str, ...]) -> str:
    if kind not in kinds:
        raise UserError(f"distillation: kind {kind!r} is none of {', '.join(kinds)}")
    return kind


def _kl(logits: Array, teacher_logits: Array, where: Array | None = None) -> Array:
    """KL(softmax(teacher) ‖ softmax(student)) over the last axis, of the classes in `where`."""
    log_student, log_teacher = (jax.nn.log_softmax(x, axis=-1) for x in (logits, teacher_logits))
    if where is not None:  # 0 · (inf - inf)
        log_student, log_teacher = (jnp.where(where, x, 0) for x in (log_student, log_teacher))
    terms = jnp.exp(log_teacher) * (log_teacher - log_student)
    return terms.sum(-1, where=where)


def _binary_kl(logits: Array, teacher_logits: Array) -> Array:
    """KL of each class's yes or no, summed over the classes."""
    probability = jax.nn.sigmoid(teacher_logits)
    yes = jax.nn.softplus(-logits) - jax.nn.softplus(-teacher_logits)
    no = jax.nn.softplus(logits) - jax.nn.softplus(teacher_logits)
    return (probability * yes + (1 - probability) * no).sum(-1)


def _example_mean(values: Array) -> Array:
    return values.mean(tuple(range(1, values.ndim)))


def _unit(vectors: Array, smallest: float = 1e-12) -> Array:
    """vectors[..., D] over their norms; a zero vector stays zero, and so does its gradient."""
    squares = jnp.square(vectors).sum(-1, keepdims=True)
    positive = squares > 0
    norm = jnp.sqrt(jnp.where(positive, squares, 1))
    return jnp.where(positive, vectors / jnp.maximum(norm, smallest), 0)


def _distances(features: Array) -> Array:
    """Euclidean distances f[B, B] over the mean of those that are not zero."""
    centered = features - features.mean(0, keepdims=True)  # the squares cancel less
    squares = jnp.square(centered).sum(-1)
    products = jnp.matmul(centered, centered.T, precision="highest")
    squared = squares[:, None] + squares[None] - 2 * products
    apart = ~jnp.eye(len(features), dtype=bool)
    distance = jnp.where(apart, jnp.sqrt(jnp.maximum(squared, 1e-12)), 0)
    count = jnp.maximum((distance > 0).sum(), 1).astype(distance.dtype)
    return distance / (distance.sum() / count)


def _huber(difference: Array) -> Array:
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(difference), size - 0.5)


def _interpolate(features: Array, axis: int, size: int) -> Array:
    """Linear between the centers of places along one axis; the border is continued."""
    old = features.shape[axis]
    place = (jnp.arange(size, dtype=features.dtype) + 0.5) * (old / size) - 0.5
    place = jnp.clip(place, 0, old - 1)
    low = jnp.floor(place).astype(jnp.int32)
    shape = [1] * features.ndim
    shape[axis] = size
    share = (place - low.astype(place.dtype)).reshape(shape)
    below, above = (
        jnp.take(features, index, axis=axis) for index in (low, jnp.minimum(low + 1, old - 1))
    )
    return below + share * (above - below)


def _box_distances(boxes: Array, others: Array) -> tuple[Array, Array]:
    """L1 distance and GIoU of cxcywh boxes f[..., 4]."""
    corners = (box_ops.cxcywh_to_xyxy(array) for array in (boxes, others))
    return jnp.abs(boxes - others).sum(-1), box_ops.giou_xyxy(*corners)
