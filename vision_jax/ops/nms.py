"""Non-maximum suppression on the device, of fixed shapes, batched, each class for itself.

A box is dropped if a kept one of its class, with a higher score, overlaps it by more than a
threshold. Equal to torchvision 0.29's `nms` called class by class, ties included; not to its
`batched_nms` of few boxes, which moves classes apart and rounds the corners by it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from vision_jax import platform as platforms
from vision_jax.ops.boxes import iou_of_sides, pairwise_iou_xyxy, sides_of

Array = jax.Array

ROUNDS = 24  # of suppression, where there are no loops


def nms(
    boxes_xyxy: Array,
    scores: Array,
    valid: Array,
    iou: float,
    labels: Array | None = None,
    platform: str | None = None,
) -> Array:
    """Which boxes are kept.

    Among equal scores the earlier box goes first. No gradient flows through it. By platform it is
    one of two algorithms with the same result: on a CPU the boxes of each class are visited by
    falling score, all classes at once, without an array of pairs; elsewhere the greedy choice is
    found as the fixed point of "kept, unless a kept one suppresses it" over all pairs, in as many
    rounds as the longest chain of suppressions has links.

    Examples:
      >>> boxes = jnp.array([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 3.0], [4.0, 4.0, 5.0, 5.0]])
      >>> nms(boxes, jnp.array([0.5, 0.9, 0.1]), jnp.ones(3, bool), 0.5).tolist()
      [False, True, True]

    Args:
      boxes_xyxy: f[..., N, 4].
      scores: f[..., N].
      valid: bool[..., N]; what is not valid is not kept and suppresses nothing.
      iou: the overlap above which the lower score is dropped.
      labels: i32[..., N], the class of each box, or None for one class.
      platform: see platform.py; the current one if None. For any of them both are in the program.
        Without loops the rounds are written out, ROUNDS of them: all is as above, unless so many
        boxes and one more each suppress the next.

    Returns:
      bool[..., N] in the order of the boxes.
    """
    boxes, scores = (lax.stop_gradient(x) for x in (boxes_xyxy, scores))
    count = scores.shape[-1]

    def flat(values, *rest):
        return None if values is None else values.reshape(-1, count, *rest)

    platform = platform or platforms.current()
    scores = jnp.where(valid, scores, -jnp.inf)
    given = (flat(boxes, 4), flat(scores), flat(valid), flat(labels))
    if platform == platforms.NO_LOOPS:
        keep = _by_pairs(*given, iou, rounds=ROUNDS)
    elif platform == platforms.ANY:
        keep = lax.platform_dependent(
            *given, cpu=partial(_by_rank, iou=iou), default=partial(_by_pairs, iou=iou)
        )
    else:
        keep = (_by_rank if platform == "cpu" else _by_pairs)(*given, iou)
    return keep.reshape(valid.shape)


def best(keep: Array, scores: Array, most: int) -> tuple[Array, Array]:
    """The kept boxes by falling score: (i32[..., most], bool[..., most] which are there).

    Of fewer than `most` boxes, N, the result has N places.

    Examples:
      >>> best(jnp.array([True, False, True]), jnp.array([0.1, 0.9, 0.5]), 2)[0].tolist()
      [2, 0]
    """
    count = min(most, scores.shape[-1])
    found, index = lax.top_k(jnp.where(keep, scores, -jnp.inf), count)
    return index, found > -jnp.inf


def _by_rank(boxes: Array, scores: Array, valid: Array, labels: Array | None, iou: float) -> Array:
    """f[B, N, 4], f[B, N] -> bool[B, N]: round r asks of each class its box of rank r."""
    place = jnp.broadcast_to(jnp.arange(scores.shape[1])[None], scores.shape)
    if labels is None:
        order, start = jnp.argsort(-scores, axis=-1, stable=True), None
        rank = place
    else:
        order = jnp.lexsort((-scores, labels), axis=-1)  # [B, N]
        labels = _take(labels, order)
        first = labels[:, 1:] != labels[:, :-1]
        first = jnp.concatenate([jnp.ones_like(valid[:, :1]), first], axis=1)
        start = lax.cummax(jnp.where(first, place, 0), axis=1)
        rank = place - start
    valid = _take(valid, order)
    sides = sides_of(_take(boxes, order))
    rounds = jnp.max(jnp.where(valid, rank, 0))  # the last of a class suppresses nobody

    def suppress(rank_now, keep):
        def leading(values):  # of each box's class, [B, N] or, of one class, [B, 1]
            if start is None:
                return lax.dynamic_slice_in_dim(values, rank_now, 1, axis=1)
            return _take(values, jnp.minimum(start + rank_now, order.shape[1] - 1))

        left, top, right, bottom = map(leading, sides)
        overlap = iou_of_sides((left, top, right, bottom), sides) > iou
        return keep & ~((rank > rank_now) & leading(keep) & overlap)

    keep = lax.fori_loop(0, rounds, suppress, valid)
    return _put(keep, order)


def _by_pairs(
    boxes: Array,
    scores: Array,
    valid: Array,
    labels: Array | None,
    iou: float,
    rounds: int | None = None,
) -> Array:
    """f[B, N, 4], f[B, N] -> bool[B, N]: the fixed point over all pairs, or so many rounds."""
    place = jnp.arange(scores.shape[1])
    score, other = scores[:, :, None], scores[:, None, :]
    earlier = (place[:, None] < place[None, :])[None]
    suppresses = (score > other) | ((score == other) & earlier)
    suppresses &= pairwise_iou_xyxy(boxes, boxes) > iou  # [B, N, N]
    if labels is not None:
        suppresses &= labels[:, :, None] == labels[:, None, :]

    def again(state):
        keep, last = state
        return jnp.any(keep != last)

    def settle(state):
        keep, _ = state
        return valid & ~jnp.any(suppresses & keep[:, :, None], axis=1), keep

    if rounds is None:
        keep, _ = lax.while_loop(again, settle, (valid, ~valid))
    else:
        keep = valid
        for _ in range(rounds):
            keep, _ = settle((keep, keep))
    return keep


def _take(values: Array, index: Array) -> Array:
    """values[b, index[b]], of f[B, N, ...] and i32[B, M]."""
    index = index.reshape(*index.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1, mode="clip")


def _put(values: Array, order: Array) -> Array:
    """The inverse of `_take` by a permutation."""
    image = jnp.arange(values.shape[0])[:, None]
    return values.at[image, order].set(values, unique_indices=True)
