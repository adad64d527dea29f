"""Structured leaves: objects that stand in for one array of a parameter tree.

A layer never asks what kind of leaf it holds. It calls `dot` or `convolve` below with its input and
its kernel; the kernel may be an array or a `LowRank`, and the product and its gradient follow.

The gradient of `LowRank` is the point of this file. The layer multiplies by the merged kernel
W + s·A·B, one dense product as without adapters. Backward, dx goes through the merged kernel and
the factors get

    dA = s · xᵀ (dy Bᵀ)        dB = s · (x A)ᵀ dy

so the dense gradient xᵀ dy of the frozen W is never formed. (LoRA: Hu et al. 2021,
https://arxiv.org/abs/2106.09685; DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "magnitude"],
    meta_fields=["scale", "parts", "dropout"],
)
@dataclass(frozen=True)
class LowRank:
    """A kernel W [..., in, out] with a low-rank update: W + scale · A·B.

    `base` comes first because flax compares the first flattened leaf with the layer's shape.

    Attributes:
      base: the frozen kernel, [in, out] of a dense layer or [h, w, in, out] of a convolution.
      a: [in, r] or [h, w, in, r]; with `parts`, [len(chosen), in, r].
      b: [r, out]; with `parts`, [len(chosen), r, out / total].
      magnitude: None, or DoRA's [out]: the kernel is magnitude · (W + sAB) / ‖W + sAB‖, where the
        norm is taken over each output's inputs and held constant in the gradient, as PEFT does.
      scale: s, usually alpha / r; with `parts` it may be a tuple with one for each.
      parts: None, or (total, chosen): the output columns of a fused kernel split into `total` equal
        parts, of which `chosen` have adapters of their own; (3, (0, 2)) is q and v of a fused qkv.
      dropout: rate on the adapter's input, in training only.
    """

    base: Array
    a: Array
    b: Array
    magnitude: Array | None = None
    scale: float | tuple[float, ...] = field(default=1.0)
    parts: tuple[int, tuple[int, ...]] | None = None
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this leaf stands in for."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Rank of the kernel that this leaf stands in for."""
        return self.base.ndim

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this leaf stands in for."""
        return self.base.dtype


Kernel = Array | LowRank


def low_rank_delta(leaf: LowRank) -> Array:
    """The update s·A·B as a dense array of the kernel's shape."""
    product = leaf.a @ leaf.b  # with parts [P, in, out / total]
    if isinstance(leaf.scale, tuple):
        blocks = jnp.array(leaf.scale, product.dtype)[:, None, None] * product
    else:
        blocks = leaf.scale * product
    if leaf.parts is None:
        return blocks
    total, chosen = leaf.parts
    rows, columns = blocks.shape[1:]
    delta = jnp.zeros((rows, total, columns), blocks.dtype)
    delta = delta.at[:, jnp.array(chosen)].set(blocks.swapaxes(0, 1))  # [in, total, out / total]
    return delta.reshape(rows, total * columns)


def part_scales(leaf: LowRank) -> tuple[float, ...]:
    """The scale of each of the chosen parts; one scale of a leaf without parts."""
    count = 1 if leaf.parts is None else len(leaf.parts[1])
    return leaf.scale if isinstance(leaf.scale, tuple) else (leaf.scale,) * count


def output_norm(kernel: Array) -> Array:
    """Euclidean norm of each output's weights: [..., in, out] -> [out]."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1))))


def merge_leaf(leaf: Kernel) -> Array:
    """The plain array that `leaf` stands in for; an array is returned as it is."""
    if not isinstance(leaf, LowRank):
        return leaf
    kernel = leaf.base + low_rank_delta(leaf).astype(leaf.base.dtype)
    if leaf.magnitude is None:
        return kernel
    return _scale_outputs(kernel, leaf.magnitude / lax.stop_gradient(output_norm(kernel)))


def _scale_outputs(x: Array, gain: Array) -> Array:
    """x[..., out] · gain[out], in x's dtype."""
    return x * gain.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def dot(x: Array, kernel: Kernel, dropout_key: Array | None = None) -> Array:
    """`x[..., in] · kernel[in, out]`, in x's dtype, accumulated in at least float32.

    Args:
      x: f[..., in], the layer's input in its compute dtype.
      kernel: an array or a `LowRank`, usually in float32.
      dropout_key: key of the adapter's input dropout; None outside training.
    """
    return _multiply(_dense_product(x), x, kernel, dropout_key)


def convolve(
    x: Array,
    kernel: Kernel,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    groups: int = 1,
    dropout_key: Array | None = None,
    dilation: int = 1,
) -> Array:
    """Convolution of x[B, H, W, in] with kernel[h, w, in / groups, out], in x's dtype."""
    sides = tuple((low, high) for low, high in padding)
    product = partial(_convolution, tuple(strides), sides, groups, dilation)
    return _multiply(product, x, kernel, dropout_key)


def _dense_product(x: Array) -> Any:
    return _half_dot if x.dtype in (jnp.bfloat16, jnp.float16) else _plain_dot


def _plain_dot(x: Array, kernel: Array) -> Array:
    return lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


@jax.custom_vjp
def _half_dot(x: Array, kernel: Array) -> Array:
    """A product of half-precision inputs whose three products all accumulate in float32.

    Autodiff of a dot with a float32 result would multiply float32 by bfloat16 in its backward pass,
    which no matrix unit takes; and one with a bfloat16 result rounds the parameters' gradient.
    """
    product = lax.dot_general(
        x,
        kernel.astype(x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return product.astype(x.dtype)


def _half_dot_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _half_dot(x, kernel), (x, kernel)


def _half_dot_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    float32 = {"preferred_element_type": jnp.float32}
    dx = lax.dot_general(dy, kernel.astype(x.dtype), (((dy.ndim - 1,), (1,)), ((), ())), **float32)
    rows = tuple(range(x.ndim - 1))
    dkernel = lax.dot_general(x, dy, ((rows, rows), ((), ())), **float32)  # [in, out]
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_half_dot.defvjp(_half_dot_forward, _half_dot_backward)


def _convolution(
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    groups: int,
    dilation: int,
    x: Array,
    kernel: Array,
) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        strides,
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _multiply(product: Any, x: Array, kernel: Kernel, dropout_key: Array | None) -> Array:
    """Multiplies by an array or by a structured leaf; `product(x, array)` is linear in both."""
    if not isinstance(kernel, LowRank):
        return product(x, kernel)
    if dropout_key is None or kernel.dropout == 0:
        return _low_rank_product(product, x, kernel)
    # Dropout on the adapter's input alone: the two paths see different inputs, so the merged kernel
    # cannot serve both. PEFT does the same, with the same keep probability.
    keep = jax.random.bernoulli(dropout_key, 1 - kernel.dropout, x.shape)
    dropped = jnp.where(keep, x / (1 - kernel.dropout), 0).astype(x.dtype)
    update = _factored_update(product, dropped, kernel)
    if kernel.magnitude is None:
        return product(x, lax.stop_gradient(kernel.base)) + update
    gain = kernel.magnitude / lax.stop_gradient(
        output_norm(kernel.base + low_rank_delta(kernel).astype(kernel.base.dtype))
    )
    plain = product(x, lax.stop_gradient(kernel.base)) + update
    return _scale_outputs(plain, gain)


def _factored_update(product: Any, x: Array, leaf: LowRank) -> Array:
    """s · (x·A)·B by the skinny products; the merged form is cheaper wherever it applies."""
    dense = _dense_product(x)
    scales = part_scales(leaf)
    if leaf.parts is None:
        return scales[0] * dense(product(x, leaf.a), leaf.b)
    total, chosen = leaf.parts
    columns = [jnp.zeros((*x.shape[:-1], leaf.b.shape[-1]), x.dtype)] * total
    for position, (part, scale) in enumerate(zip(chosen, scales, strict=True)):
        columns[part] = scale * dense(product(x, leaf.a[position]), leaf.b[position])
    return jnp.concatenate(columns, axis=-1)  # [..., out]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank_product(product: Any, x: Array, leaf: LowRank) -> Array:
    return product(x, merge_leaf(leaf))


def _low_rank_forward(product: Any, x: Array, leaf: LowRank) -> tuple[Array, Any]:
    if leaf.magnitude is None:
        return product(x, merge_leaf(leaf)), (x, leaf, None)
    kernel = leaf.base + low_rank_delta(leaf).astype(leaf.base.dtype)
    direction = product(x, kernel)  # kept: the magnitude's gradient needs it
    return _scale_outputs(direction, leaf.magnitude / output_norm(kernel)), (x, leaf, direction)


def _low_rank_backward(product: Any, residuals: Any, dy: Array) -> tuple[Array, LowRank]:
    x, leaf, direction = residuals
    # The merged kernel is computed again, which is cheap. The barrier (as in jax.checkpoint) hides
    # from XLA that it has been computed before: kept from the forward pass, it would take as much
    # memory as the dense gradient. XLA on the CPU drops barriers and keeps it all the same.
    factors, dy = lax.optimization_barrier(((leaf.a, leaf.b), dy))
    leaf = _with_factors(leaf, *factors)
    dmagnitude = None
    if leaf.magnitude is not None:
        norm = output_norm(leaf.base + low_rank_delta(leaf).astype(leaf.base.dtype))
        rows = tuple(range(dy.ndim - 1))
        dmagnitude = jnp.sum(dy * direction, axis=rows, dtype=leaf.magnitude.dtype) / norm
    # dx passes the merged kernel, gain included; the factors' own dy is scaled by the gain.
    (dx,) = jax.vjp(lambda x: product(x, merge_leaf(leaf)), x)[1](dy)
    if leaf.magnitude is not None:
        dy = _scale_outputs(dy, leaf.magnitude / norm)
    update = partial(_factored_update, product)
    _, pull = jax.vjp(lambda a, b: update(x, _with_factors(leaf, a, b)), *factors)
    da, db = pull(dy)
    # None is a symbolic zero: no array of the frozen kernel's shape comes to be.
    return dx, LowRank(None, da, db, dmagnitude, leaf.scale, leaf.parts, leaf.dropout)  # type: ignore[arg-type]


def _with_factors(leaf: LowRank, a: Array, b: Array) -> LowRank:
    return LowRank(leaf.base, a, b, leaf.magnitude, leaf.scale, leaf.parts, leaf.dropout)


_low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)
