"""The regions that a segmenter finds, and what of its outputs is explained of each.

A region is where a class is the likeliest one, or the mask of a query of a model that finds masks.
It is explained by the mean logit over its pixels, as Vinogradova et al. 2020 do by the sum
(Seg-Grad-CAM, https://arxiv.org/abs/2002.11434), of a query's mask with the logit of its class.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vision_jax.explain.forward import Target, region_logit
from vision_jax.ops.mask_outputs import LEAST_AREA
from vision_jax.ops.resize import resize_bilinear

Array = jax.Array


class Regions(NamedTuple):
    """Regions of images, [B, ...] of one each or [B, N, ...] of several.

    Attributes:
      query: i32, of a model that finds masks; 0 of others.
      label: i32.
      score: f in [0, 1], how sure the model is: the mean probability of the class over the pixels,
        or a query's class's times the mean of its mask's. 0 of what is no region.
      inside: bool[..., H, W], in pixels of the model's images.
    """

    query: Array
    label: Array
    score: Array
    inside: Array


def find_regions(
    predicts: str,
    outputs: Mapping[str, Any],
    valid: Array,
    *,
    most: int,
    least: float,
    label: int | None = None,
) -> Regions:
    """Regions [B, N] of images: classes by their pixels, or masks by their scores.

    Args:
      predicts: see models.families.Family.
      outputs: the segmenter's.
      valid: bool[B, H, W], the pixels that are the image.
      most: N.
      least: score below which a region is none.
      label: the only class, if any.
    """
    if predicts == "semantic":
        chances = _chances(outputs, valid.shape[1:])
        classes = jnp.arange(chances.shape[-1])
        inside = (chances.argmax(-1)[:, None] == classes.reshape(1, -1, 1, 1)) & valid[:, None]
        certainty = chances.transpose(0, 3, 1, 2)  # [B, K, H, W]
        labels = jnp.broadcast_to(classes, inside.shape[:2])
        score = _mean(certainty, inside)
        rank = inside.sum((2, 3)).astype(score.dtype)
    else:
        chances = jax.nn.softmax(outputs["logits"][-1])[..., :-1]
        masks = _masks(outputs["mask_logits"][-1], valid.shape[1:])  # [B, Q, H, W]
        inside = (masks > 0) & valid[:, None]
        labels = chances.argmax(-1)
        rank = score = chances.max(-1) * _mean(jax.nn.sigmoid(masks), inside)
    wanted = (score >= least) & (score > 0)
    if label is not None:
        wanted &= labels == label
    rank, best = jax.lax.top_k(jnp.where(wanted, rank, 0), min(most, rank.shape[1]))
    score, labels = (jnp.take_along_axis(x, best, axis=1) for x in (score, labels))
    return Regions(
        best if predicts != "semantic" else jnp.zeros_like(best),
        labels.astype(jnp.int32),
        jnp.where(rank > 0, score, 0),
        jnp.take_along_axis(inside, best[..., None, None], axis=1),
    )


def region_score(predicts: str, region: Regions) -> Target:
    """What has a gradient: the mean logit of the region, one an image."""
    if predicts == "semantic":
        return region_logit(region.inside, region.label)

    def target(outputs):
        classes, masks = _of_query(outputs, region)
        return classes[jnp.arange(len(classes)), region.label] + _mean(masks, region.inside)

    return target


def region_probability(predicts: str, region: Regions) -> Target:
    """`Regions.score` of a region that stays where it is, one an image."""

    def semantic(outputs):
        chances = _chances(outputs, region.inside.shape[1:])
        own = jnp.take_along_axis(chances, region.label[:, None, None, None], axis=-1)[..., 0]
        return _mean(own, region.inside)

    def of_query(outputs):
        classes, masks = _of_query(outputs, region)
        chance = jax.nn.softmax(classes)[jnp.arange(len(classes)), region.label]
        return chance * _mean(jax.nn.sigmoid(masks), region.inside)

    return semantic if predicts == "semantic" else of_query


def _chances(outputs: Mapping[str, Any], size: tuple[int, ...]) -> Array:
    """f[B, H, W, K]."""
    return jax.nn.softmax(resize_bilinear(outputs["logits"], size))


def _masks(masks: Array, size: tuple[int, ...]) -> Array:
    """Logits f[B, Q, h, w] -> f[B, Q, H, W]."""
    return resize_bilinear(masks.transpose(0, 2, 3, 1), size).transpose(0, 3, 1, 2)


def _of_query(outputs: Mapping[str, Any], region: Regions) -> tuple[Array, Array]:
    """(logits of the classes f[B, K + 1], of the mask f[B, H, W]) of the region's query."""
    rows = jnp.arange(len(region.query))
    classes, masks = (outputs[name][-1][rows, region.query] for name in ("logits", "mask_logits"))
    return classes, _masks(masks[:, None], region.inside.shape[1:])[:, 0]


def _mean(values: Array, inside: Array) -> Array:
    """f[...]: of f[..., H, W] over the pixels inside; 0 without any."""
    count = inside.sum((-2, -1)).astype(values.dtype)
    return jnp.where(inside, values, 0).sum((-2, -1)) / (count + LEAST_AREA)
