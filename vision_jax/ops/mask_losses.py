"""The set loss of models that find masks: each target mask has a query, each query a class.

Mask2Former's (Cheng et al. 2022, https://arxiv.org/abs/2112.01527, section 3.2 and 3.3.1), which
EoMT is trained by. Masks are compared at points: for matching at points that all masks of an image
share, for the loss at points of each matched pair, most of which are chosen where the predicted
mask is least certain. Equal to transformers 5.24 `EomtLoss` at the same points.

Everything is computed in float32, or in float64 where the logits are. Targets are padded: `label`
i32[B, T], `masks` [B, T, H, W], `target_mask` bool[B, T]. What is masked counts nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.ops.matching import match

Array = jax.Array

OVERSAMPLING = 3.0  # points that are drawn for each that is taken
IMPORTANCE = 0.75  # share of the points that are the least certain of these


class Points(NamedTuple):
    """Places (x, y) in a map of any size, from 0 to 1.

    Attributes:
      matching: f[B, P, 2], where pairs of masks are compared.
      candidates: f[B, T, 3·P, 2], among which the least certain are taken.
      others: f[B, T, P / 4, 2], which are taken as they are.
    """

    matching: Array
    candidates: Array
    others: Array


def draw_points(keys: Array, targets: int, count: int) -> Points:
    """`count` points of each of `targets` masks, for the images of the keys [B]."""
    chosen = int(IMPORTANCE * count)

    def of_image(key: Array) -> Points:
        first, second, third = jax.random.split(key, 3)
        return Points(
            jax.random.uniform(first, (count, 2)),
            jax.random.uniform(second, (targets, int(OVERSAMPLING * count), 2)),
            jax.random.uniform(third, (targets, count - chosen, 2)),
        )

    return jax.vmap(of_image)(keys)


def mask_set_loss(
    logits: Array,
    mask_logits: Array,
    label: Array,
    masks: Array,
    target_mask: Array,
    *,
    points: Callable[[Array], Points],
    class_weight: float = 2.0,
    mask_weight: float = 5.0,
    dice_weight: float = 5.0,
    no_object_weight: float = 0.1,
    whole: Array | None = None,
    alone: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """The loss of all predictions, each matched by itself.

    The weights are those of the cost of a pair too. The class term is a weighted mean over all
    queries, those of masks are sums over matched pairs of means over points, divided by the number
    of targets.

    Args:
      logits: f[L, B, Q, K + 1] of L predictions; the last class is "no object".
      mask_logits: f[L, B, Q, h, w].
      label: i32[B, T], each in 0 .. K - 1.
      masks: [B, T, H, W], 0 or 1, of any size.
      target_mask: bool[B, T].
      points: of a prediction, i32[] from 0 to L - 1.
      class_weight: factor of the class term.
      mask_weight: of the binary cross-entropy of masks.
      dice_weight: of 1 - Dice.
      no_object_weight: of a query without a target in the class term.
      whole: `target_mask` of the whole update, where this batch is a part of it.
      alone: each image's loss is what it is in a batch of this image only.

    Returns:
      The losses f[B], whose mean is the batch's, and metrics of the last prediction without their
      weights, `class_loss`, `mask_loss` and `mask_dice_loss`; and `deep_loss`, the weighted sum of
      the others.

    Raises:
      UserError: more targets than queries.
    """
    dtype = np.promote_types(logits.dtype, np.float32)
    logits, mask_logits = logits.astype(dtype), mask_logits.astype(dtype)
    masks = masks.astype(dtype)
    queries, no_object = logits.shape[2], logits.shape[3] - 1
    counted = target_mask if whole is None else whole
    if alone:
        number = jnp.maximum(target_mask.sum(1), 1).astype(dtype)  # [B]
        found = target_mask.sum(1).astype(dtype)
        total = no_object_weight * (queries - found) + found
    else:
        # Of a row, so that the mean over the rows is the sum over the number of all.
        rows = len(counted)
        found = counted.sum().astype(dtype)
        number = jnp.maximum(found, 1) / rows
        total = (no_object_weight * (rows * queries - found) + found) / rows

    def pair_cost(logits: Array, masks_of: Array, label: Array, masks: Array, at: Array) -> Array:
        """f[T, Q] of an image."""
        probability = jax.nn.softmax(logits, axis=-1)[:, label].T  # [T, Q]
        ours, theirs = sample(masks_of, at), sample(masks, at)  # [Q, P], [T, P]
        positive, negative = jax.nn.softplus(-ours), jax.nn.softplus(ours)
        bce = (theirs @ positive.T + (1 - theirs) @ negative.T) / at.shape[0]
        chance = jax.nn.sigmoid(ours)
        both = theirs.sum(1)[:, None] + chance.sum(1)[None]
        dice = 1 - (2 * theirs @ chance.T + 1) / (both + 1)
        return mask_weight * bce - class_weight * probability + dice_weight * dice

    def mask_terms(maps: Array, masks: Array, candidates: Array, others: Array):
        """(binary cross-entropy, 1 - Dice) f[T] each, of matched maps f[T, h, w] of an image."""
        chosen = round(candidates.shape[1] / OVERSAMPLING) - others.shape[1]
        sampled = jax.vmap(lambda x, at: sample(x[None], at)[0])(
            lax.stop_gradient(maps), candidates
        )
        _, place = lax.top_k(-jnp.abs(sampled), chosen)
        at = jnp.take_along_axis(candidates, place[..., None], axis=1)
        at = jnp.concatenate([at, others], axis=1)  # [T, P, 2]
        one = jax.vmap(lambda x, at: sample(x[None], at)[0])
        ours, theirs = one(maps, at), one(masks, at)
        bce = (jax.nn.softplus(ours) - ours * theirs).mean(1)
        chance = jax.nn.sigmoid(ours)
        both = chance.sum(1) + theirs.sum(1)
        return bce, 1 - (2 * (chance * theirs).sum(1) + 1) / (both + 1)

    def of_prediction(given):
        index, logits, mask_logits = given
        drawn = Points(*(x.astype(dtype) for x in points(index)))
        fixed, fixed_masks = lax.stop_gradient((logits, mask_logits))
        cost = jax.vmap(pair_cost)(fixed, fixed_masks, label, masks, drawn.matching)
        query = match(cost, target_mask)  # [B, T]

        def classes_of(query: Array, label: Array) -> Array:
            return jnp.full(queries, no_object, label.dtype).at[query].set(label, mode="drop")

        classes = jax.vmap(classes_of)(query, label)  # [B, Q]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), classes[..., None], 2)[..., 0]
        weights = jnp.where(classes == no_object, no_object_weight, 1.0).astype(dtype)
        class_loss = -(weights * log_p).sum(1) / total
        index = jnp.minimum(query, queries - 1)[..., None, None]
        maps = jnp.take_along_axis(mask_logits, index, axis=1)  # [B, T, h, w]
        bce, dice = jax.vmap(mask_terms)(maps, masks, drawn.candidates, drawn.others)
        kept = target_mask.astype(dtype)
        return class_loss, (bce * kept).sum(1) / number, (dice * kept).sum(1) / number

    steps = (jnp.arange(len(logits)), logits, mask_logits)
    class_loss, mask_loss, dice_loss = lax.map(of_prediction, steps)  # [L, B]
    totals = class_weight * class_loss + mask_weight * mask_loss + dice_weight * dice_loss
    metrics = {
        "class_loss": class_loss[-1].mean(),
        "mask_loss": mask_loss[-1].mean(),
        "mask_dice_loss": dice_loss[-1].mean(),
        "deep_loss": totals[:-1].sum(0).mean(),
    }
    return totals.sum(0), metrics


def sample(maps: Array, points: Array) -> Array:
    """f[N, P]: maps f[N, h, w] at points f[P, 2], bilinear between centers, 0 beyond the map.

    torch's `grid_sample(2 · points - 1, align_corners=False)`.
    """
    height, width = maps.shape[1:]
    x = points[:, 0] * width - 0.5
    y = points[:, 1] * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    flat = maps.reshape(len(maps), -1)
    total = jnp.zeros((), maps.dtype)
    for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = jnp.where(inside, row * width + column, 0).astype(jnp.int32)
            share = jnp.where(inside, down * across, 0).astype(maps.dtype)
            total = total + flat[:, place] * share[None]
    return total


def class_scores(logits: Array, mask_logits: Array) -> Array:
    """f[B, h, w, K]: how much of each class a pixel is, over all queries, 0 and more.

    Args:
      logits: f[B, Q, K + 1]; the last class is "no object".
      mask_logits: f[B, Q, h, w].
    """
    chance = jax.nn.softmax(logits, axis=-1)[..., :-1]
    return jnp.einsum("bqk,bqhw->bhwk", chance, jax.nn.sigmoid(mask_logits))
