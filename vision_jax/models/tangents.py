"""Norms, GELU and max-pooling whose tangents are written out, for CPUs.

XLA's compiler for CPUs runs what autodiff makes of them slowly (docs/performance.md has the
figures). The values are those of the plain functions. Each rule is one of the tangent, which
reverse mode transposes, so that forward mode, batching and second derivatives work as before.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from vision_jax import platform
from vision_jax.trees.products import taps

Array = jax.Array
Statistics = tuple[Array, Array, Array]


def batch_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Statistics:
    """(y, mean, variance) of f[..., D] over all axes but the last, of f32 (or better).

    y = (x - mean) / sqrt(variance + epsilon) · scale + bias; mean and (biased) variance are f[D].
    """
    norm = _batch_norm if platform.current() == "cpu" else _plain_batch_norm
    return norm(epsilon, x, scale, bias)


@platform.whole
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """f[..., D] normalized over its last axis, · scale[D] + bias[D], in f32 (or better)."""
    norm = _layer_norm if platform.current() == "cpu" else _plain_layer_norm
    return norm(epsilon, x, scale, bias)


@platform.whole
def gelu(x: Array) -> Array:
    """x · Φ(x) of f[...], Φ that of the normal distribution (https://arxiv.org/abs/1606.08415)."""
    if platform.current() in ("gpu", "tpu"):
        return nn.gelu(x, approximate=False)
    return _gelu(x)


@platform.whole
def gelu_tanh(x: Array) -> Array:
    """GELU of f[...] with tanh in place of Φ, as the same paper approximates it."""
    return nn.gelu(x, approximate=True)


def max_pool(x: Array, size: int, strides: int) -> Array:
    """Largest of size x size windows of x[B, H, W, C], without padding.

    The gradient goes to the first of several equal ones, row by row.
    """
    pool = _max_pool if platform.current() == "cpu" else _plain_max_pool
    return pool(size, strides, x)


# Batch norm --------------------------------------------------------------------------------------


def _plain_batch_norm(epsilon: float, x: Array, scale: Array, bias: Array) -> Statistics:
    axes, row = _rows(x)
    mean = x.mean(axes)
    # Two passes: the mean of squares less the square of the mean cancels in float32.
    variance = jnp.square(x - row(mean)).mean(axes)
    return scale_and_shift(x, mean, variance, scale, bias, epsilon), mean, variance


def scale_and_shift(
    x: Array, mean: Array, variance: Array, scale: Array, bias: Array, epsilon: float
) -> Array:
    """x[..., D] normalized by f[D] each: one product and one sum an element."""
    row = _rows(x)[1]
    gain = scale * lax.rsqrt(variance + epsilon)
    return x * row(gain) + row(bias - mean * gain)


_batch_norm = jax.custom_jvp(_plain_batch_norm, nondiff_argnums=(0,))


@_batch_norm.defjvp
def _batch_norm_jvp(
    epsilon: float, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Statistics, Statistics]:
    """Transposed, two sums over the rows, of dy and of dy · x, and one pass for dx.

    The sums are over x as it is, which XLA needn't write out anew.
    """
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    axes, row = _rows(x)
    y, mean, variance = _plain_batch_norm(epsilon, x, scale, bias)
    inverse = lax.rsqrt(variance + epsilon)
    gain = scale * inverse
    dmean, along = dx.mean(axes), ((x - row(mean)) * dx).mean(axes)
    dgain = inverse * (dscale - gain * inverse * along)  # scale / sqrt(variance + epsilon)
    dy = dx * row(gain) + x * row(dgain) + row(dbias - gain * dmean - mean * dgain)
    return (y, mean, variance), (dy, dmean, 2 * along)


def _rows(x: Array) -> tuple[tuple[int, ...], Callable[[Array], Array]]:
    """All axes of x but the last, and what brings an f[D] to x's number of axes."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    return tuple(range(x.ndim - 1)), lambda vector: vector.reshape(shape)


# Layer norm --------------------------------------------------------------------------------------


def _plain_layer_norm(epsilon: float, x: Array, scale: Array, bias: Array) -> Array:
    row = _rows(x)[1]
    centered, inverse = _centered(epsilon, x)
    return centered * (inverse * row(scale)) + row(bias)


def _centered(epsilon: float, x: Array) -> tuple[Array, Array]:
    """(x - mean, 1 / sqrt(variance + epsilon)) over the last axis, the variance in two passes."""
    centered = x - x.mean(-1, keepdims=True)
    return centered, lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + epsilon)


_layer_norm = jax.custom_jvp(_plain_layer_norm, nondiff_argnums=(0,))


@_layer_norm.defjvp
def _layer_norm_jvp(
    epsilon: float, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    """Between barriers, which are in the transpose too.

    Without, XLA computes a block's gradient again in the fusions of the block before it.
    """
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    row = _rows(x)[1]
    centered, inverse = _centered(epsilon, x)
    normed = centered * inverse
    dx = lax.optimization_barrier(dx)
    dx = dx - dx.mean(-1, keepdims=True) - normed * (normed * dx).mean(-1, keepdims=True)
    dnormed = lax.optimization_barrier(inverse * dx)
    y = centered * (inverse * row(scale)) + row(bias)
    return y, dnormed * row(scale) + normed * row(dscale) + row(dbias)


# GELU --------------------------------------------------------------------------------------------


@jax.custom_jvp
def _gelu(x: Array) -> Array:
    """By erf, as PyTorch has it: one polynomial, where flax's erfc is two and an exponential."""
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@_gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """dx · (Φ(x) + x · φ(x)): one array is kept, where autodiff of the product keeps two."""
    (x,), (dx,) = primals, tangents
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    cdf = _normal_cdf(wide)
    density = jnp.exp(-0.5 * jnp.square(wide)) * math.sqrt(0.5 / math.pi)
    return (wide * cdf).astype(x.dtype), dx * (cdf + wide * density).astype(x.dtype)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


# Max-pooling -------------------------------------------------------------------------------------


def _plain_max_pool(size: int, strides: int, x: Array) -> Array:
    return nn.max_pool(x, (size, size), (strides, strides))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _max_pool(size: int, strides: int, x: Array) -> Array:
    """The largest of each row of a window, and then of these, in strided slices."""
    for axis in (1, 2):
        last = x.shape[axis] - size
        parts = [
            lax.slice_in_dim(x, tap, tap + last + 1, strides, axis=axis) for tap in range(size)
        ]
        x = reduce(lax.max, parts)
    return x


@_max_pool.defjvp
def _max_pool_jvp(
    size: int, strides: int, primals: tuple[Array], tangents: tuple[Any]
) -> tuple[Array, Array]:
    """The tangent of the pixel that is the largest of its window."""
    (x,), (dx,) = primals, tangents
    of = partial(taps, (strides, strides), ((0, 0), (0, 0)), 1, window=(size, size))
    first, *others = of(x)
    largest, chosen = first, jnp.zeros(first.shape, jnp.int8)
    for index, tap in enumerate(others, 1):
        chosen = jnp.where(tap > largest, jnp.int8(index), chosen)
        largest = lax.max(largest, tap)
    chosen = lax.optimization_barrier(chosen)  # computed once and not once a tap
    parts = [jnp.where(chosen == index, tap, 0) for index, tap in enumerate(of(dx))]
    return largest, reduce(jnp.add, parts)
