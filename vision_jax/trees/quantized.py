"""Kernels in 8 and 4 bits: leaves that hold them, and one that trains towards int8.

    Int8           int8 and a scale for each output; multiplies in float, or with int8 inputs
    NF4            4-bit NormalFloat in blocks, packed two to a byte
    FakeQuantized  a float kernel that is rounded to int8 wherever it is used

Symmetric int8 has the levels -127 ... 127, so that a zero stays one and a padded convolution needs
no correction. NF4 and its double quantization are QLoRA's (Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314, sections 3 and appendix E), numerically those of bitsandbytes
0.50.2 for kernels whose inputs are whole blocks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.trees.leaf import Kernel, Leaf, merge_leaf
from vision_jax.trees.products import Product

Array = jax.Array

LEVELS = 127  # of int8, on each side of zero
BLOCK = 64  # weights that share a scale, QLoRA's
SCALES_BLOCK = 256  # scales that share a scale, where they are quantized too
# The 16 numbers of NF4, from the quantiles of a normal distribution (QLoRA, appendix E).
NF4_CODE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def dynamic_code() -> np.ndarray:
    """The 256 numbers of an 8-bit float whose exponent takes as many bits as it needs, f32[256].

    Between 10**-(n + 1) and 10**-n there are half as many as in the decade above. (Dettmers 2016,
    https://arxiv.org/abs/1511.04561; bitsandbytes' create_dynamic_map.)
    """
    found = [0.0, 1.0]
    for bits in range(7):
        edges = np.linspace(0.1, 1, 2**bits + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (bits - 6)
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


# int8 --------------------------------------------------------------------------------------------


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "input_scale"],
    meta_fields=["dynamic"],
)
@dataclass(frozen=True)
class Int8(Leaf):
    """values · scale, and inputs in float or in int8 too.

    With int8 inputs the products are of integers and accumulate in int32. Their gradient is that of
    the kernel in float (straight through the rounding of x), zero where x was clipped.

    Attributes:
      values: i8[..., in, out] in -127 ... 127.
      scale: f[out].
      input_scale: f[] of calibrated inputs: x is rounded to multiples of it and clipped at 127 of
        them. None without.
      dynamic: the inputs' scale is what their largest magnitude asks for: of each row of a dense
        layer's, of each image of a convolution's.
    """

    trains: ClassVar[Mapping[str, bool]] = {"values": False, "scale": False, "input_scale": False}
    like_kernel: ClassVar[tuple[str, ...]] = ("values",)

    values: Array
    scale: Array
    input_scale: Array | None = None
    dynamic: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this leaf stands in for."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this leaf stands in for."""
        return self.scale.dtype

    def merge(self) -> Array:
        """values · scale."""
        return self.values.astype(self.dtype) * _by_output(self.scale, self.ndim)

    def multiply(self, product: Product, x: Array, dropout_key: Array | None) -> Array:
        """By the kernel in float, which no gradient keeps; or int8 by int8."""
        del dropout_key
        if self.dynamic or self.input_scale is not None:
            return _integer_product(product, x, self)
        return _float_product(product, x, self)


def to_int8(kernel: Kernel, *, dynamic: bool = False, input_scale: Array | None = None) -> Int8:
    """The nearest Int8 of a kernel [..., in, out]; its largest weights and its zeros are exact."""
    kernel = merge_leaf(kernel)
    scale = _scale_of(jnp.abs(kernel).max(tuple(range(kernel.ndim - 1))))
    values = jnp.round(kernel / _by_output(scale, kernel.ndim)).astype(jnp.int8)
    return Int8(values, scale, input_scale, dynamic)


def round_inputs(x: Array, leaf: "Int8 | FakeQuantized") -> tuple[Array, Array]:
    """(whole numbers in -127 ... 127 in float, f[..., 1] or f[] of their scales)."""
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    fixed = getattr(leaf, "input_scale", None)
    if fixed is not None:
        scale = fixed.astype(wide.dtype)
        return jnp.round(jnp.clip(wide / scale, -LEVELS, LEVELS)), scale
    axes = -1 if leaf.ndim == 2 else tuple(range(1, x.ndim))
    least = jnp.finfo(wide.dtype).tiny * LEVELS  # where all is zero
    scale = jnp.maximum(jnp.abs(wide).max(axes, keepdims=True), least) / LEVELS
    return jnp.round(wide / scale), scale  # the largest is 127


def _scale_of(largest: Array) -> Array:
    """The step between levels that reaches `largest`; 1 where all is zero."""
    return jnp.where(largest > 0, largest, LEVELS) / LEVELS


def _by_output(per_output: Array, ndim: int) -> Array:
    return per_output.reshape((1,) * (ndim - 1) + (-1,))


def _float_product(product: Product, x: Array, leaf: Leaf) -> Array:
    """`product(x, kernel)`; the backward pass makes the kernel again and keeps the few bits only.

    Kept, the float kernels of all layers would lie in memory together.
    """
    return jax.checkpoint(lambda x, leaf: product(x, leaf.merge()))(x, leaf)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _integer_product(product: Product, x: Array, leaf: Int8) -> Array:
    whole, scale = round_inputs(x, leaf)
    total = product(whole.astype(jnp.int8), leaf.values)  # i32
    wide, step = total.astype(scale.dtype), _by_output(leaf.scale.astype(scale.dtype), x.ndim)
    # One after the other: with a product of both onnxruntime 1.32 gets the bias after it wrong. The
    # outputs' first: a file's product has them inside.
    wide = wide * step * scale if scale.ndim else wide * (scale * step)
    return wide.astype(x.dtype)


def _integer_forward(product: Product, x: Array, leaf: Int8) -> tuple[Array, Any]:
    inside = None
    if leaf.input_scale is not None:
        inside = jnp.abs(x) <= (LEVELS * leaf.input_scale).astype(x.dtype)
    return _integer_product(product, x, leaf), (x, inside, leaf)


def _integer_backward(product: Product, residuals: Any, dy: Array) -> tuple[Array, None]:
    x, inside, leaf = residuals
    (dx,) = jax.vjp(lambda x: product(x, leaf.merge()), x)[1](dy)
    return dx if inside is None else jnp.where(inside, dx, 0), None


_integer_product.defvjp(_integer_forward, _integer_backward)


@partial(jax.tree_util.register_dataclass, data_fields=["base"], meta_fields=["dynamic"])
@dataclass(frozen=True)
class FakeQuantized(Leaf):
    """A float kernel, used as the Int8 of it: what trains it sees the rounding.

    The gradient passes straight through the rounding of kernel and inputs (Jacob et al. 2018,
    https://arxiv.org/abs/1712.05877; Bengio et al. 2013, https://arxiv.org/abs/1308.3432).

    Attributes:
      base: f[..., in, out], which trains by rule as a plain kernel does; or one with zeros.
      dynamic: inputs are rounded too, as Int8's are.
    """

    like_kernel: ClassVar[tuple[str, ...]] = ("base",)

    base: Kernel
    dynamic: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this leaf stands in for."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this leaf stands in for."""
        return self.base.dtype

    def merge(self) -> Array:
        """The kernel rounded to int8's levels, in float: `to_int8` of it loses nothing."""
        kernel = merge_leaf(self.base)
        return _straight_through(to_int8(lax.stop_gradient(kernel)).merge(), kernel)

    def multiply(self, product: Product, x: Array, dropout_key: Array | None) -> Array:
        """What Int8 computes, in float."""
        del dropout_key
        if self.dynamic:
            whole, scale = round_inputs(lax.stop_gradient(x), self)
            x = _straight_through((whole * scale).astype(x.dtype), x)
        return product(x, self.merge())


def _straight_through(rounded: Array, x: Array) -> Array:
    """`rounded`, to the bit, with the gradient of x."""
    return rounded + (x - lax.stop_gradient(x))


# 4 bits ------------------------------------------------------------------------------------------


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "absmax_scale", "absmax_mean"],
    meta_fields=["made_of", "block_size"],
)
@dataclass(frozen=True)
class NF4(Leaf):
    """4-bit NormalFloat: each block of an output's weights is its largest magnitude times a code.

    The inputs of an output are K = h · w · in numbers in a row, cut into blocks.

    Attributes:
      codes: u8[ceil(K / 2), out], two positions of NF4_CODE each, the first in the high bits.
      absmax: f[ceil(K / block_size), out], or with double quantization u8 of positions in
        `dynamic_code()`, a scale for 256 of them beside each other in an output's blocks.
      absmax_scale: f[ceil(blocks / 256)] of these, or None.
      absmax_mean: f[], which was subtracted before, or None.
      made_of: shape of the kernel, [in, out] or [h, w, in, out].
      block_size: weights of a block.
    """

    trains: ClassVar[Mapping[str, bool]] = {
        "codes": False,
        "absmax": False,
        "absmax_scale": False,
        "absmax_mean": False,
    }

    codes: Array
    absmax: Array
    absmax_scale: Array | None
    absmax_mean: Array | None
    made_of: tuple[int, ...]
    block_size: int = BLOCK

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this leaf stands in for."""
        return self.made_of

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this leaf stands in for."""
        return (self.absmax if self.absmax_scale is None else self.absmax_scale).dtype

    def merge(self) -> Array:
        """The kernel in float."""
        inputs, outputs = math.prod(self.made_of[:-1]), self.made_of[-1]
        pairs = jnp.stack([self.codes >> 4, self.codes & 15], axis=1)  # [ceil(K/2), 2, out]
        codes = pairs.reshape(-1, outputs)[:inputs]
        values = jnp.asarray(NF4_CODE, self.dtype)[codes]
        blocks = _blocks(values, self.block_size) * self._largest()[:, None]
        return blocks.reshape(-1, outputs)[:inputs].reshape(self.made_of)

    def _largest(self) -> Array:
        """f[blocks, out]: the largest magnitude of each block."""
        if self.absmax_scale is None or self.absmax_mean is None:
            return self.absmax
        values = jnp.asarray(dynamic_code(), self.dtype)[self.absmax.T.reshape(-1)]
        scales = jnp.repeat(self.absmax_scale, SCALES_BLOCK)[: values.size]
        return (values * scales + self.absmax_mean).reshape(self.absmax.T.shape).T

    def multiply(self, product: Product, x: Array, dropout_key: Array | None) -> Array:
        """By the kernel in float, which no gradient keeps."""
        del dropout_key
        return _float_product(product, x, self)


def to_nf4(kernel: Kernel, *, block_size: int = BLOCK, double: bool = True) -> NF4:
    """The nearest NF4 of a kernel [..., in, out].

    Args:
      kernel: f[in, out] or f[h, w, in, out].
      block_size: weights of one output that share a scale.
      double: the scales take 8 bits each instead of 32.
    """
    kernel = merge_leaf(kernel)
    outputs = kernel.shape[-1]
    rows = kernel.reshape(-1, outputs)
    blocks = _blocks(rows, block_size)  # [blocks, block_size, out]
    largest = jnp.abs(blocks).max(1)
    unit = blocks / jnp.where(largest > 0, largest, 1)[:, None]
    codes = _nearest(unit, NF4_CODE).reshape(-1, outputs)[: len(rows)]
    codes = jnp.pad(codes, ((0, len(rows) % 2), (0, 0)))
    packed = codes[::2] << 4 | codes[1::2]
    if not double:
        return NF4(packed, largest, None, None, kernel.shape, block_size)
    mean = largest.mean()
    centered = (largest - mean).T.reshape(-1)  # an output's blocks beside each other
    padded = jnp.pad(centered, (0, -centered.size % SCALES_BLOCK)).reshape(-1, SCALES_BLOCK)
    scale = jnp.abs(padded).max(1)
    unit = padded / jnp.where(scale > 0, scale, 1)[:, None]
    positions = _nearest(unit, dynamic_code()).reshape(-1)[: centered.size]
    return NF4(packed, positions.reshape(largest.T.shape).T, scale, mean, kernel.shape, block_size)


def _blocks(rows: Array, block_size: int) -> Array:
    """f[K, out] -> f[ceil(K / block_size), block_size, out], the last block filled with zeros."""
    rows = jnp.pad(rows, ((0, -len(rows) % block_size), (0, 0)))
    return rows.reshape(-1, block_size, rows.shape[-1])


def _nearest(x: Array, code: np.ndarray) -> Array:
    """u8: for each number the position of the nearest in the ascending `code`."""
    middles = jnp.asarray((code[:-1] + code[1:]) / 2, x.dtype)
    return jnp.searchsorted(middles, x, method="scan_unrolled").astype(jnp.uint8)
