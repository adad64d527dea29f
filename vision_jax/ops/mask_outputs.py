"""Instances and panoptic segments out of what a model that finds masks predicts.

Source: transformers 5.24, models/eomt/image_processing_eomt.py (`EomtImageProcessor`,
`post_process_instance_segmentation` and `post_process_panoptic_segmentation`). Masks are brought to
the model's size, cut to the part of it that the image fills, and brought to the image's size, each
bilinearly by pixels' centers; both are linear along each axis, and are one matrix here. Queries are
taken one after the other, so that no more than one mask has real numbers at the image's size.

Everything is computed in float32, or in float64 where the logits are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.ops.resize import bilinear_weights

Array = jax.Array
Size = tuple[int, int]  # (height, width)

LEAST_AREA = 1e-6  # added to a mask's area, as in the reference


class View(NamedTuple):
    """How the model saw an image, in pixels.

    Attributes:
      canvas: of the model's images.
      content: the part of it, from the upper left corner, that the image fills.
      image: of the image itself, which masks are wanted at.
    """

    canvas: Size
    content: Size
    image: Size


def instance_outputs(logits: Array, mask_logits: Array, view: View) -> dict[str, Array]:
    """Each query as an instance of its likeliest class; masks may overlap.

    A score is the class's probability times the mean probability of the mask's pixels, those above
    0.5. What has no pixel scores 0.

    Args:
      logits: f[B, Q, K + 1]; the last class is "no object".
      mask_logits: f[B, Q, h, w].
      view: of the images.

    Returns:
      "score" f[B, Q], "label" i32[B, Q] and "mask_bits" u8[B, Q, H, ceil(W / 8)] of the image's
      size, eight pixels of a row in a byte as `numpy.packbits` has them.
    """
    chances = jax.nn.softmax(_wide(logits), axis=-1)[..., :-1]
    resize = _make_resize(view, mask_logits)

    def of_query(small: Array) -> tuple[Array, Array]:
        logit = resize(small)  # [B, H, W]
        mask = logit > 0
        area = mask.sum((1, 2)).astype(logit.dtype)
        certainty = jnp.where(mask, jax.nn.sigmoid(logit), 0).sum((1, 2)) / (area + LEAST_AREA)
        return jnp.packbits(mask, axis=-1), certainty

    bits, certainty = lax.map(of_query, _by_query(mask_logits))
    return {
        "score": chances.max(-1) * certainty.T,
        "label": chances.argmax(-1).astype(jnp.int32),
        "mask_bits": bits.swapaxes(0, 1),
    }


def panoptic_outputs(
    logits: Array,
    mask_logits: Array,
    view: View,
    *,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
) -> dict[str, Array]:
    """Each pixel in at most one segment, the one of the query that is surest of it.

    A query counts if its class scores above `threshold`; of these each pixel goes to the one with
    the largest product of score and mask probability, and stays there if that probability is at
    least `mask_threshold`. A query that wins no more than `overlap_threshold` of its own mask's
    pixels is no segment. Queries of one class of stuff are not merged yet.

    Args:
      logits: f[B, Q, K + 1]; the last class is "no object".
      mask_logits: f[B, Q, h, w].
      view: of the images.
      threshold: of scores.
      mask_threshold: of mask probabilities.
      overlap_threshold: least share of its own mask that a segment keeps.

    Returns:
      "segments" i32[B, H, W], the query of each pixel's segment, or -1; "score" f[B, Q] and "label"
      i32[B, Q] of the queries, whether or not they are a segment.
    """
    chances = jax.nn.softmax(_wide(logits), axis=-1)
    score, label = chances.max(-1), chances.argmax(-1).astype(jnp.int32)
    counts = (label < logits.shape[-1] - 1) & (score > threshold)  # [B, Q]
    queries = jnp.arange(logits.shape[1], dtype=jnp.int32)
    resize = _make_resize(view, mask_logits)
    start = jnp.full((len(logits), *view.image), -1.0, score.dtype)

    def of_query(best: tuple[Array, Array, Array], given: tuple[Array, Array, Array, Array]):
        value, winner, chance = best
        query, small, score, counts = given
        ours = jax.nn.sigmoid(resize(small))  # [B, H, W]
        weighted = jnp.where(counts[:, None, None], score[:, None, None] * ours, -1.0)
        wins = weighted > value  # among equals the first
        best = (
            jnp.where(wins, weighted, value),
            jnp.where(wins, query, winner),
            jnp.where(wins, ours, chance),
        )
        return best, (ours >= mask_threshold).sum((1, 2))

    given = (queries, _by_query(mask_logits), score.T, counts.T)
    first = (start, jnp.full(start.shape, -1, jnp.int32), jnp.zeros_like(start))
    (_, winner, chance), area = lax.scan(of_query, first, given)  # area [Q, B]

    least = _below(overlap_threshold)

    def of_image(winner: Array, chance: Array, area: Array) -> Array:
        sure = chance >= mask_threshold
        won = _count(winner, winner >= 0, len(queries))
        final = _count(winner, (winner >= 0) & sure, len(queries))
        share = won.astype(jnp.float32) / jnp.maximum(area, 1).astype(jnp.float32)
        kept = (final > 0) & (share > least)  # [Q]
        return jnp.where((winner >= 0) & sure & kept[winner], winner, -1)

    segments = jax.vmap(of_image)(winner, chance, area.T)
    return {"segments": segments, "score": score, "label": label}


def _count(place: Array, counted: Array, length: int) -> Array:
    """i32[length]: how many of the counted pixels have each place."""
    where = jnp.where(counted, place, length).reshape(-1)
    return jnp.zeros(length, jnp.int32).at[where].add(1, mode="drop")


def _below(threshold: float) -> np.float32:
    """The largest float32 that is not above it.

    The reference compares shares in float32 with a number in float64, so that 4 of 5 pixels, which
    are 0.8 rounded up, exceed 0.8.
    """
    near = np.float32(threshold)
    return near if float(near) <= threshold else np.nextafter(near, np.float32(-np.inf))


def _wide(logits: Array) -> Array:
    return logits.astype(np.promote_types(logits.dtype, np.float32))


def _by_query(mask_logits: Array) -> Array:
    """f[Q, B, h, w]."""
    return _wide(mask_logits).swapaxes(0, 1)


def _make_resize(view: View, mask_logits: Array):
    """A function f[B, h, w] -> f[B, H, W], by a matrix for each axis."""
    dtype = np.promote_types(mask_logits.dtype, np.float32)
    down, across = (
        jnp.asarray(
            bilinear_weights(content, image) @ bilinear_weights(small, canvas)[:content], dtype
        )
        for small, canvas, content, image in zip(mask_logits.shape[2:], *view, strict=True)
    )
    exact = lax.Precision.HIGHEST

    def resize(maps: Array) -> Array:
        tall = jnp.einsum("Hh,bhw->bHw", down, maps, precision=exact)
        return jnp.einsum("bHw,Ww->bHW", tall, across, precision=exact)

    return resize
