"""Sampling of maps at free places: the sum that deformable attention is made of."""

import jax
import jax.numpy as jnp

Array = jax.Array


def sample_weighted(maps: Array, xy_01: Array, weights: Array) -> Array:
    """Weighted sums of maps at points, bilinear between the cells' centers and zero outside.

    Deformable DETR (https://arxiv.org/abs/2010.04159), equation 2, of one level: what torch's
    `grid_sample(align_corners=False, padding_mode="zeros")` gives, summed over the points. Each of
    the four corners is one gather, with the point's weight inside the corner's.

    Args:
      maps: f[B, h, w, K, d]; K heads of d channels.
      xy_01: f[B, Q, K, P, 2], P points of each query and head as (column, row), where 0 and 1 are
        the map's edges.
      weights: f[B, Q, K, P].

    Returns:
      f[B, Q, K, d] in the dtype of `maps`.

    Examples:
      >>> maps = jnp.arange(4.0).reshape(1, 2, 2, 1, 1)
      >>> sample_weighted(maps, jnp.full((1, 1, 1, 1, 2), 0.5), jnp.full((1, 1, 1, 1), 2.0)).item()
      3.0
    """
    batch, height, width, heads, channels = maps.shape
    flat = maps.transpose(0, 3, 1, 2, 4).reshape(batch, heads, height * width, channels)
    xy, weights = xy_01.transpose(0, 2, 1, 3, 4), weights.transpose(0, 2, 1, 3)  # [B, K, Q, P, ...]
    x, y = xy[..., 0] * width - 0.5, xy[..., 1] * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    total = jnp.zeros((*weights.shape[:3], channels), maps.dtype)
    for column, across in ((left, left + 1 - x), (left + 1, x - left)):
        for row, down in ((top, top + 1 - y), (top + 1, y - top)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            share = jnp.where(inside, weights * across * down, 0).astype(maps.dtype)
            # Bounded before it becomes an integer, which might not hold it.
            cell = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
            cell = cell.astype(jnp.int32).reshape(batch, heads, -1, 1)  # [B, K, Q·P, 1]
            value = jnp.take_along_axis(flat, cell, axis=2, mode="clip")
            value = value.reshape(*weights.shape, channels)  # [B, K, Q, P, d]
            total = total + jnp.einsum("bkqp,bkqpd->bkqd", share, value)
    return total.transpose(0, 2, 1, 3)  # [B, Q, K, d]
