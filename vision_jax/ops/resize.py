"""Bilinear resizing of maps, as torch's `interpolate(align_corners=False)` does it, and pooling.

A new pixel's center is mapped onto the old grid, and mixes the two old pixels on each side of it;
beyond the outermost centers the outermost pixel counts alone. Nothing is averaged when a map
shrinks (no antialiasing). Source: torch 2.12, aten/src/ATen/native/UpSample.h.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def resize_bilinear(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """x[B, h, w, C] -> f[B, H, W, C] in x's dtype.

    Args:
      x: maps.
      size: (H, W).
    """
    for axis, new in enumerate(size, 1):
        x = _resize_line(x, axis, new)
    return x


def resize_from_corner(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """x[B, h, w, C] -> f[B, H, W, C], bilinear as TensorFlow 1's ResizeBilinear does it.

    Pixel i of the new grid stands at i · h / H of the old one: corners are mapped onto each other
    and centers are not, so images move by up to half a pixel. Places are rounded to float32, as
    there. What an FID is measured with.

    Args:
      x: images.
      size: (H, W).
    """
    for axis, new in enumerate(size, 1):
        old = x.shape[axis]
        at = np.arange(new, dtype=np.float32) * np.float32(old / new)
        at = np.minimum(at.astype(np.float64), old - 1)
        first = np.floor(at).astype(np.int32)
        share = jnp.asarray(at - first, x.dtype).reshape(*(1,) * axis, -1, *(1,) * (3 - axis))
        here, next_ = (x.take(np.minimum(first + step, old - 1), axis) for step in (0, 1))
        x = here + (next_ - here) * share
    return x


def pool_adaptive(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """x[B, h, w, C] -> f[B, H, W, C], means of cells, as torch's `adaptive_avg_pool2d`.

    Cell i of n along a side of h is from floor(i · h / n) to ceil((i + 1) · h / n): cells overlap
    where n doesn't divide h, and repeat where it is larger.

    Args:
      x: maps.
      size: (H, W).
    """
    for axis, new in enumerate(size, 1):
        old = x.shape[axis]
        cell, place = np.arange(new)[:, None], np.arange(old)[None]
        weights = (place >= cell * old // new) & (place < -(-(cell + 1) * old // new))
        x = _product(x, axis, weights / weights.sum(1, keepdims=True))
    return x


def bilinear_weights(old: int, new: Any) -> Any:
    """Matrix f64[new, old] that resizes a line; its rows sum to one.

    A `new` that is a symbolic dimension of jax.export gives an array of the traced program.
    """
    if isinstance(new, int | np.integer):
        return _weights(old, new, new, np)
    with jax.enable_x64(True):
        return _weights(old, new, jnp.asarray(new), jnp)


def _weights(old: int, new: Any, length: Any, xp: Any) -> Any:
    centers = xp.clip((xp.arange(new) + 0.5) * (old / length) - 0.5, 0, old - 1)  # [new]
    return xp.maximum(1 - xp.abs(centers[:, None] - xp.arange(old)[None]), 0)


def _resize_line(x: jax.Array, axis: int, new: int) -> jax.Array:
    """Along axis 1 or 2 of x[B, h, w, C].

    To a multiple of the old size this is a mixture of the map and its neighbors for each place
    within a pixel: much less than the product with a matrix that is nearly all zeros.
    """
    old = x.shape[axis]
    if new == old:
        return x
    if new % old:
        return _product(x, axis, bilinear_weights(old, new))
    times = new // old
    before = jnp.concatenate([_part(x, axis, 0, 1), _part(x, axis, 0, old - 1)], axis)
    after = jnp.concatenate([_part(x, axis, 1, old), _part(x, axis, old - 1, old)], axis)
    places = []
    for place in range(times):
        offset = (place + 0.5) / times - 0.5  # from the old pixel's center, in old pixels
        other = before if offset < 0 else after
        places.append(x + (other - x) * abs(offset))
    shape = (*x.shape[:axis], new, *x.shape[axis + 1 :])
    return jnp.stack(places, axis + 1).reshape(shape)


def _product(x: jax.Array, axis: int, weights: np.ndarray) -> jax.Array:
    """weights[new, old] applied along axis 1 or 2 of x[B, h, w, C]."""
    equation = "Hh,bhwc->bHwc" if axis == 1 else "Ww,bhwc->bhWc"
    return jnp.einsum(equation, jnp.asarray(weights, x.dtype), x)


def _part(x: jax.Array, axis: int, start: int, stop: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, start, stop, axis=axis)
