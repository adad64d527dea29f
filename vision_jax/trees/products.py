"""The products of layers, dense and convolution, in the form that each platform runs best.

A product is a function of x and a whole kernel, linear in both. On GPUs and TPUs it is XLA's own,
with autodiff's gradient. On a CPU the forms below are the same sums in an order for which XLA has
fast code there; docs/performance.md says what each of them gains.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product as pairs
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from vision_jax import platform

Array = jax.Array
Product = Callable[[Array, Array], Array]
Sides = tuple[tuple[int, int], ...]  # padding before and after

HALF = (jnp.bfloat16, jnp.float16)
# A convolution of fewer channels multiplies all its windows at once, a wider one tap by tap.
FEW_CHANNELS = 16
# One of so few, 3 x 3 and stride 2, of which no gradient is taken, sees pairs of pixels.
IMAGE_CHANNELS = 4
# An atrous convolution whose taps meet the image, and not its padding, at most this often.
FEW_SEEN = 2 / 3
# A dense kernel of so few outputs has its gradient as [out, in].
FEW_OUTPUTS = 64


def dense(x: Array) -> Product:
    """x[..., in], kernel[in, out] -> f[..., out], for inputs of x's dtype; i32[..., out] for i8.

    A kernel [in, P, out] gives f[..., P, out].
    """
    if x.dtype == jnp.int8:
        return _integer_dot
    if x.dtype in HALF:
        return _half_dot
    return _flat_dot if platform.current() == "cpu" else _plain_dot


def dot(x: Array, kernel: Array) -> Array:
    """The product of `dense` that is for these inputs: a leaf may call it with others than x."""
    return dense(x)(x, kernel)


def convolution(
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: Sides,
    groups: int = 1,
    dilation: int = 1,
) -> Product:
    """x[B, H, W, in], kernel[h, w, in / groups, out] -> f[B, H', W', out]; i32 for i8.

    A kernel whose windows tile the image (a patch embedding, or 1 x 1) is one dot on rearranged
    pixels.

    Args:
      window: (h, w) of the kernel.
      strides: of its rows and columns.
      padding: rows above and below, columns left and right.
      groups: of channels, each with outputs of its own.
      dilation: steps between the pixels of a window.
    """
    cpu = platform.current() == "cpu"
    reach = tuple((size - 1) * dilation + 1 for size in window)
    tiles = groups == 1 and not any(map(any, padding))
    if tiles and platform.current() != platform.NO_LOOPS:  # whose formats have convolutions
        if strides == window == reach:
            return _tiled
        if cpu and window == (1, 1):
            return partial(_strided_pixels, strides)
    return Convolution(strides, padding, groups, dilation)


@dataclass(frozen=True)
class Convolution:
    """The product of a convolution whose windows don't tile the image; see `convolution`."""

    strides: tuple[int, ...]
    padding: Sides
    groups: int
    dilation: int

    def __call__(self, x: Array, kernel: Array) -> Array:
        convolve = _by_groups if platform.current() == "cpu" else _convolution
        return convolve(self.strides, self.padding, self.groups, self.dilation, x, kernel)


# Dense -------------------------------------------------------------------------------------------


def _plain_dot(x: Array, kernel: Array) -> Array:
    return lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def _integer_dot(x: Array, kernel: Array) -> Array:
    contracted = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, kernel, contracted, preferred_element_type=jnp.int32)


def _flat_dot(x: Array, kernel: Array) -> Array:
    """With two axes, whose transposes XLA folds into the products of the gradient.

    With more it copies the wide gradient of the outputs for the kernel's gradient. A narrow one,
    an adapter's A, is summed over the rows as [out, in], where the long axis is the contiguous one;
    the barrier keeps XLA from folding the transpose into the product.
    """
    rows, kernel = x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype)
    if kernel.ndim > 2:
        product = _plain_dot(rows, kernel)
        return product.reshape(*x.shape[:-1], *kernel.shape[1:])
    if kernel.shape[1] <= min(FEW_OUTPUTS, kernel.shape[0] - 1):
        turned = lax.optimization_barrier(kernel.T)  # [out, in]
        product = lax.dot_general(rows, turned, (((1,), (1,)), ((), ())))
    else:
        product = rows @ kernel
    return product.reshape(*x.shape[:-1], -1)


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
    outputs = tuple(range(x.ndim - 1, dy.ndim)), tuple(range(1, kernel.ndim))
    dx = lax.dot_general(dy, kernel.astype(x.dtype), (outputs, ((), ())), **float32)
    rows = tuple(range(x.ndim - 1))
    dkernel = lax.dot_general(x, dy, ((rows, rows), ((), ())), **float32)  # [in, out]
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_half_dot.defvjp(_half_dot_forward, _half_dot_backward)


# Convolution -------------------------------------------------------------------------------------


def _tiled(x: Array, kernel: Array) -> Array:
    """The convolution of x[B, H, W, in] by a kernel[h, w, in, out] whose windows tile it."""
    h, w, _, outputs = kernel.shape
    batch, height, width, channels = x.shape
    x = x[:, : height // h * h, : width // w * w]  # what a strided convolution leaves out
    x = x.reshape(batch, height // h, h, width // w, w, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // h, width // w, -1)
    return dense(x)(x, kernel.reshape(-1, outputs))  # [B, H/h, W/w, out]


def _strided_pixels(strides: tuple[int, ...], x: Array, kernel: Array) -> Array:
    """A strided 1 x 1 convolution: a dot of the pixels that it sees."""
    return _tiled(x[:, :: strides[0], :: strides[1]], kernel)


def _convolution(
    strides: tuple[int, ...],
    padding: Sides,
    groups: int,
    dilation: int,
    x: Array,
    kernel: Array,
    axes: str = "HWIO",
) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        strides,
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", axes, "NHWC"),
        feature_group_count=groups,
        preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else None,
    )


def _by_groups(
    strides: tuple[int, ...], padding: Sides, groups: int, dilation: int, x: Array, kernel: Array
) -> Array:
    """A convolution for each group of channels, at several times the speed of one of all groups.

    Groups of one channel are left together. Integers have no gradient, and XLA's own convolution.
    An atrous convolution that mostly meets padding is dots of what it sees of the image.
    """
    if x.dtype == jnp.int8:
        return _convolution(strides, padding, groups, dilation, x, kernel)
    depthwise = groups == x.shape[-1] == kernel.shape[-1] > 1
    convolve = partial(_cpu_convolution, strides, padding, dilation, depthwise)
    if groups == 1 and strides == (1, 1) and dilation > 1 and x.dtype not in HALF:
        axes = _seen_along(padding, dilation, x, kernel)
        if math.prod(axis.share for axis in axes) <= FEW_SEEN:
            return _by_seen(axes, x, kernel)
    if groups == 1 or depthwise:
        return convolve(x, kernel)
    parts = (jnp.split(array, groups, axis=-1) for array in (x, kernel))
    return jnp.concatenate(list(map(convolve, *parts)), axis=-1)


@dataclass(frozen=True)
class _Seen:
    """What the taps of a window see along an axis of the image.

    Attributes:
      count: outputs.
      spans: of each tap (first, last, shift): outputs first to last - 1 see the image, at
        themselves + shift; the others padding.
    """

    count: int
    spans: tuple[tuple[int, int, int], ...]

    @property
    def share(self) -> float:
        return sum(last - first for first, last, _ in self.spans) / (self.count * len(self.spans))


def _seen_along(padding: Sides, dilation: int, x: Array, kernel: Array) -> tuple[_Seen, _Seen]:
    """Along rows and columns of x[B, H, W, in], for a window that goes by single steps."""

    def along(side: int, size: int, low: int, high: int) -> _Seen:
        count = side + low + high - (size - 1) * dilation
        spans = []
        for shift in range(-low, -low + size * dilation, dilation):
            first, last = (min(max(at - shift, 0), count) for at in (0, side))
            spans.append((first, last, shift))
        return _Seen(count, tuple(spans))

    rows, columns = (
        along(side, size, *sides)
        for side, size, sides in zip(x.shape[1:3], kernel.shape[:2], padding, strict=True)
    )
    return rows, columns


def _by_seen(axes: tuple[_Seen, _Seen], x: Array, kernel: Array) -> Array:
    """The convolution as dots of the pixels that each tap sees of the image.

    DeepLab's window at rate 36 has nine taps, eight of which see nothing of a map of 32 cells.
    """
    rows, columns = axes
    total = jnp.zeros((len(x), rows.count, columns.count, kernel.shape[-1]), x.dtype)
    for row, (top, bottom, down) in enumerate(rows.spans):
        for column, (left, right, across) in enumerate(columns.spans):
            if top < bottom and left < right:
                seen = x[:, top + down : bottom + down, left + across : right + across]
                around = ((top, rows.count - bottom), (left, columns.count - right))
                product = dense(seen)(seen, kernel[row, column])
                total += jnp.pad(product, ((0, 0), *around, (0, 0)))
    return total


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _cpu_convolution(
    strides: tuple[int, ...],
    padding: Sides,
    dilation: int,
    depthwise: bool,
    x: Array,
    kernel: Array,
) -> Array:
    """`_convolution`, whose gradient of the kernel is dots of windows and outputs.

    XLA would convolve the images with the outputs' gradient as a kernel of its size, at a fraction
    of the speed. A rule of the tangent, which is transposed, and not of the gradient: forward mode
    and batching go on working.

    A convolution of single channels is sums of shifted images, and so are its gradients.
    """
    if depthwise:
        return _image_by_image(partial(_by_shifts, strides, padding, dilation), x, kernel)
    few = x.shape[-1] <= IMAGE_CHANNELS and kernel.shape[:2] == (3, 3)
    if few and strides == (2, 2) and dilation == 1:
        return _by_pairs(padding, x, kernel)
    return _convolution(strides, padding, 1, dilation, x, kernel)


def _by_pairs(padding: Sides, x: Array, kernel: Array) -> Array:
    """A convolution of stride 2 as one of stride 1 on 2 x 2 pixels: of an image's few channels.

    x[B, H, W, in] has pairs of rows and columns as channels, [B, H / 2, W / 2, 4 · in], and so has
    the kernel, which zeros bring to pairs that begin where those of x do.
    """
    kernel = kernel.astype(x.dtype)
    sides, missing = [], []
    for axis, (low, high) in enumerate(padding):
        old, window = x.shape[1 + axis], kernel.shape[axis]
        outputs = (old + low + high - window) // 2 + 1
        front = low % 2
        back = (window + front) % 2
        blocks, before = (window + front + back) // 2, (low + front) // 2
        missing.append((front, back))
        sides.append((before, outputs - 1 + blocks - before - (old + 1) // 2))
    kernel = jnp.pad(kernel, (*missing, (0, 0), (0, 0)))
    x = jnp.pad(x, ((0, 0), *((0, side % 2) for side in x.shape[1:3]), (0, 0)))
    pairs = [side // 2 for side in (*x.shape[1:3], *kernel.shape[:2])]
    channels, outputs = kernel.shape[2:]
    x = x.reshape(-1, pairs[0], 2, pairs[1], 2, channels).transpose(0, 1, 3, 2, 4, 5)
    kernel = kernel.reshape(pairs[2], 2, pairs[3], 2, channels, outputs).transpose(0, 2, 1, 3, 4, 5)
    return _convolution(
        (1, 1),
        tuple(sides),
        1,
        1,
        x.reshape(*x.shape[:3], 4 * channels),
        kernel.reshape(pairs[2], pairs[3], 4 * channels, outputs),
    )


def _cpu_convolution_jvp(
    strides: tuple[int, ...],
    padding: Sides,
    dilation: int,
    depthwise: bool,
    primals: tuple[Array, Array],
    tangents: tuple[Any, Any],
) -> tuple[Array, Any]:
    (x, kernel), (dx, dkernel) = primals, tangents
    if depthwise:
        y = _cpu_convolution(strides, padding, dilation, depthwise, x, kernel)
    else:
        y = _convolution(strides, padding, 1, dilation, x, kernel)
    parts = []
    if isinstance(dx, SymbolicZero):
        pass
    elif depthwise:
        parts.append(_image_by_image(partial(_by_places, strides, padding, dilation), dx, kernel))
    else:
        # Transposed, this is a convolution by a kernel whose axes are in the usual order. XLA has
        # no fast code for the other order inside of a loop, over the steps of an attack, say.
        turned = kernel.swapaxes(-1, -2)
        parts.append(_convolution(strides, padding, 1, dilation, dx, turned, axes="HWOI"))
    if not isinstance(dkernel, SymbolicZero):
        by = _by_rows if depthwise else _by_windows
        # In float32, as the kernel is: half precision is not faster here, and `_half_dot`, whose
        # gradient is its own, can't be transposed.
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        parts.append(by(strides, padding, dilation, wide, dkernel).astype(x.dtype))
    return y, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(y)


_cpu_convolution.defjvp(_cpu_convolution_jvp, symbolic_zeros=True)


def _image_by_image(convolve: Product, x: Array, kernel: Array) -> Array:
    """convolve(x, kernel) in a loop: what leaves it, XLA does not compute again for each use."""
    return lax.map(lambda image: convolve(image[None], kernel)[0], x)


def _by_windows(
    strides: tuple[int, ...], padding: Sides, dilation: int, x: Array, kernel: Array
) -> Array:
    """The convolution as dots of what each tap of the kernel[h, w, in, out] sees of x."""
    kernel = kernel.astype(x.dtype)
    seen = list(taps(strides, padding, dilation, x, window=kernel.shape[:2]))
    if x.shape[-1] < FEW_CHANNELS:
        return dense(x)(jnp.concatenate(seen, -1), kernel.reshape(-1, kernel.shape[-1]))
    products = map(dense(x), seen, kernel.reshape(-1, *kernel.shape[2:]))
    return sum(products, start=next(products))  # [B, H', W', out]


def _by_shifts(
    strides: tuple[int, ...], padding: Sides, dilation: int, x: Array, kernel: Array
) -> Array:
    """The convolution of x[B, H, W, in] by a kernel[h, w, 1, in] as sums of shifted images."""
    seen = taps(strides, padding, dilation, x, window=kernel.shape[:2])
    weights = kernel.astype(x.dtype).reshape(-1, 1, 1, 1, kernel.shape[-1])
    products = (tap * weight for tap, weight in zip(seen, weights, strict=True))
    return sum(products, start=next(products))


def _by_places(
    strides: tuple[int, ...], padding: Sides, dilation: int, x: Array, kernel: Array
) -> Array:
    """`_by_shifts`, as a sum of images that are put where the outputs which see them are.

    Transposed, it is a sum of shifted images of one padded array, as `_by_shifts` itself is: a
    fifth of the time of what that gives transposed, which asks of each pixel and tap whether it is
    inside.
    """
    weights = kernel.astype(x.dtype).reshape(-1, 1, 1, 1, kernel.shape[-1])
    reaches = [(size - 1) * dilation for size in kernel.shape[:2]]
    places = pairs(*(range(0, reach + 1, dilation) for reach in reaches))
    total = jnp.zeros((), x.dtype)
    for weight, place in zip(weights, places, strict=True):
        around = [(reach - at, at) for reach, at in zip(reaches, place, strict=True)]
        total = total + jnp.pad(x * weight, ((0, 0), *around, (0, 0)))
    # Negative padding, which cuts: lax.pad has it, jnp.pad doesn't.
    sides = [
        (low - reach, high - reach, 0) for (low, high), reach in zip(padding, reaches, strict=True)
    ]
    outputs = lax.pad(total, np.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])
    return outputs[:, :: strides[0], :: strides[1]]


def _by_rows(
    strides: tuple[int, ...], padding: Sides, dilation: int, x: Array, kernel: Array
) -> Array:
    """`_by_shifts`, row by row of the kernel[h, w, 1, in] and row by row of the outputs.

    Transposed, its loops add up products of rows; as a sum over whole images XLA would run one
    channel at a time. What a loop takes of x is taken again in the transposed loop.
    """
    h, w, _, channels = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = (
        (side - (size - 1) * dilation - 1) // stride + 1
        for side, size, stride in zip(x.shape[1:3], (h, w), strides, strict=True)
    )
    batch = x.shape[0]
    # Weights for each pixel of an output row, f[h, B, W', in] for each of w: the sum over the
    # pixels comes once, behind the loops.
    kernel = kernel.astype(x.dtype).reshape(h, w, 1, 1, channels)
    kernel = jnp.broadcast_to(kernel, (h, w, batch, width, channels))
    columns = tuple(kernel[:, index] for index in range(w))

    @jax.checkpoint
    def kernel_row(y: Array, row: tuple[Array, tuple[Array, ...]]) -> tuple[Array, None]:
        below, weights = row

        @jax.checkpoint
        def output_row(_: None, index: Array) -> tuple[None, Array]:
            pixels = lax.dynamic_index_in_dim(x, index * strides[0] + below, 1, keepdims=False)
            ends = (width - 1) * strides[1] + 1
            seen = (
                pixels[:, first : first + ends : strides[1]]
                for first in range(0, w * dilation, dilation)
            )
            products = (tap * weight for tap, weight in zip(seen, weights, strict=True))
            return None, sum(products, start=next(products))  # [B, W', in]

        return y + lax.scan(output_row, None, jnp.arange(height))[1], None

    y = jnp.zeros((height, batch, width, channels), x.dtype)
    y, _ = lax.scan(kernel_row, y, (jnp.arange(0, h * dilation, dilation), columns))
    return y.swapaxes(0, 1)  # [B, H', W', in]


def taps(
    strides: tuple[int, ...], padding: Sides, dilation: int, x: Array, window: tuple[int, ...]
) -> Iterator[Array]:
    """f[B, H', W', in] for each tap of the window, row by row: the pixels that it meets."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    counts = [
        (side - (size - 1) * dilation - 1) // stride + 1
        for side, size, stride in zip(x.shape[1:3], window, strides, strict=True)
    ]
    for first in pairs(*(range(0, size * dilation, dilation) for size in window)):
        rows, columns = (
            slice(low, low + (count - 1) * stride + 1, stride)
            for low, count, stride in zip(first, counts, strides, strict=True)
        )
        yield x[:, rows, columns]
