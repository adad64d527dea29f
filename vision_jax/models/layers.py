"""The layers that the architectures share.

Dense and Conv take kernels that may be structured leaves. flax's own layers have a `dot_general`
hook for that; these two say the same in fewer words, for convolutions too, and in one place:
`trees.leaf` multiplies, whatever the kernel is. The norms compute what torch's compute.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import ScopeParamShapeError

from vision_jax.errors import UserError
from vision_jax.models import tangents
from vision_jax.trees.leaf import Kernel, convolve, dot, supports_groups

Initializer = Callable[..., Any]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": tangents.gelu,
    "gelu_tanh": tangents.gelu_tanh,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
    "relu": nn.relu,
    "relu6": nn.relu6,
    "hard_swish": nn.hard_swish,
}

# Arguments that say how a model computes and not what it is; each run decides them for itself.
RUN_ARGUMENTS = ("dtype", "remat", "scan", "dropout", "drop_path", "freeze_norm")

# Keys for the adapters' input dropout arrive in this collection, in training only.
ADAPTER_KEYS = "adapter"

# The name of a layer's input among the intermediates, for whoever measures its range.
KERNEL_INPUT = "kernel_input"


class Dense(nn.Module):
    """x[..., in] · kernel[in, out] + bias[out]; with `parts`, so many equal ones of it in a list.

    Where the kernel is in parts (trees/parted.py), no array of all outputs comes to be.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    bias_init: Initializer = nn.initializers.zeros
    parts: int = 1

    @nn.compact
    def __call__(self, x):
        kernel = _kernel(self, (x.shape[-1], self.features))
        key = self.make_rng(ADAPTER_KEYS) if self.has_rng(ADAPTER_KEYS) else None
        x = x.astype(self.dtype)
        self.sow("intermediates", KERNEL_INPUT, x)
        y = dot(x, kernel, key)  # [..., out], or [..., P, out / P]
        apart = y.ndim > x.ndim
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            y = add_bias(y, bias.reshape(y.shape[-2:]) if apart else bias)
        if self.parts == 1:
            return y
        # A split's gradient is one array put together; slices' are several that are added up.
        if apart:
            return [one.squeeze(-2) for one in jnp.split(y, self.parts, -2)]
        return jnp.split(y, self.parts, -1)


class Conv(nn.Module):
    """Convolution of x[B, H, W, in] with kernel[h, w, in / groups, out]; padding is in numbers."""

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] = (1, 1)
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0))
    groups: int = 1
    dilation: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = _kernel(self, shape)
        if self.groups > 1 and not supports_groups(kernel):
            raise UserError(
                f"{'/'.join(self.path)}: a convolution in groups takes no adapter; leave it out of "
                "config.lora.rules"
            )
        key = self.make_rng(ADAPTER_KEYS) if self.has_rng(ADAPTER_KEYS) else None
        x = x.astype(self.dtype)
        self.sow("intermediates", KERNEL_INPUT, x)
        x = convolve(x, kernel, self.strides, self.padding, self.groups, key, self.dilation)
        if self.use_bias:
            x = add_bias(x, self.param("bias", self.bias_init, (self.features,)))
        return x


def _kernel(layer: Dense | Conv, shape: tuple[int, ...]) -> Kernel:
    """The layer's kernel, which must have this shape, whatever stands in for it.

    flax would compare the first array of a structured leaf, which may be packed or a part.
    """
    if not layer.has_variable("params", "kernel"):
        return layer.param("kernel", layer.kernel_init, shape)
    kernel: Kernel = layer.get_variable("params", "kernel")
    if kernel.shape != shape:
        raise ScopeParamShapeError("kernel", "/".join(layer.path), kernel.shape, shape)
    return kernel


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) · scale + bias over the last axis of x[B, ..., D].

    torch's BatchNorm2d: the running variance is the unbiased one, and `momentum` is the share of
    the new batch. The statistics are explicit state in the collection "batch_stats": `mean`, `var`
    and `count`, the number of updates (torch's num_batches_tracked). In training the batch's own
    statistics normalize; under a sharded batch they are those of the whole batch, since the mean of
    a sharded array is a mean over all devices. `frozen` uses and keeps the running statistics in
    training too.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    frozen: bool = False
    dtype: Any = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x, train: bool):
        width = x.shape[-1:]
        scale = self.param("scale", self.scale_init, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        var = self.variable("batch_stats", "var", jnp.ones, width)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        if train and not self.frozen and not self.is_initializing():
            wide = x.astype(np.promote_types(x.dtype, np.float32))
            y, batch_mean, batch_var = tangents.batch_norm(wide, scale, bias, self.epsilon)
            size = x.size // x.shape[-1]
            unbiased = batch_var * (size / max(size - 1, 1))
            for running, new in ((mean, batch_mean), (var, unbiased)):
                running.value += self.momentum * (jax.lax.stop_gradient(new) - running.value)
            count.value += 1
        else:
            wide = x.astype(np.promote_types(self.dtype, np.float32))
            y = tangents.scale_and_shift(wide, mean.value, var.value, scale, bias, self.epsilon)
        return y.astype(self.dtype)


class ConvNormReLU(nn.Module):
    """relu(norm(conv(x))) of x[B, h, w, C], padded such that it keeps the size."""

    features: int
    freeze_norm: bool
    dtype: Any
    size: int = 3
    dilation: int = 1
    kernel_init: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

    @nn.compact
    def __call__(self, x, train: bool):
        pad = (self.dilation * (self.size // 2),) * 2
        x = Conv(
            self.features,
            (self.size, self.size),
            padding=(pad, pad),
            dilation=self.dilation,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )(x)
        return nn.relu(BatchNorm(frozen=self.freeze_norm, dtype=self.dtype, name="bn")(x, train))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) · scale + bias over the last axis of x[..., D].

    The variance takes two passes, as torch computes it, in float32 (or better).
    """

    epsilon: float
    dtype: Any = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1:]
        scale = self.param("scale", self.scale_init, width, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, width, jnp.float32)
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        scale, bias = (leaf.astype(wide.dtype) for leaf in (scale, bias))
        return tangents.layer_norm(wide, scale, bias, self.epsilon).astype(self.dtype)


class GroupNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) · scale + bias of groups of channels of x[B, h, w, D].

    torch's: mean and (biased) variance are of an image, over all cells and the channels of a group,
    D / groups beside each other. Computed in float32 (or better).
    """

    groups: int
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None):
        """`mask`: bool[B, h, w] of the cells that count; what is elsewhere makes no sense after."""
        batch, height, width, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        groups = wide.reshape(batch, height * width, self.groups, -1)
        there, cells = None, height * width
        if mask is not None:
            there = mask.reshape(batch, -1, 1, 1)
            cells = jnp.maximum(there.sum(1, keepdims=True), 1).astype(wide.dtype)

        def mean(values):
            kept = values if there is None else jnp.where(there, values, 0)
            return kept.sum((1, 3), keepdims=True) / (cells * groups.shape[-1])

        centered = groups - mean(groups)
        normed = centered * jax.lax.rsqrt(mean(jnp.square(centered)) + self.epsilon)
        row = (1, 1, 1, -1)
        y = normed.reshape(x.shape) * scale.astype(wide.dtype).reshape(row)
        return (y + bias.astype(wide.dtype).reshape(row)).astype(self.dtype)


def layer_norm(
    name: str, epsilon: float, dtype: Any, scale_init: Initializer = nn.initializers.ones
) -> LayerNorm:
    """A LayerNorm of this name."""
    return LayerNorm(epsilon=epsilon, dtype=dtype, scale_init=scale_init, name=name)


def max_pool(x: jax.Array, size: int, strides: int, padding: int) -> jax.Array:
    """Largest of size x size windows of x[B, H, W, C], `padding` on each side never the largest.

    The padding is written out: exporters to ONNX get a padded pool wrong.
    """
    sides = (padding, padding)
    x = jnp.pad(x, ((0, 0), sides, sides, (0, 0)), constant_values=jnp.finfo(x.dtype).min)
    return tangents.max_pool(x, size, strides)


def masked(x, mask):
    """x[B, h, w, C] with zeros where mask[B, h, w] is False; x itself without a mask."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def stride_mask(mask, strides: int):
    """The mask after a convolution: an output is valid where its center is."""
    return mask if mask is None else mask[:, ::strides, ::strides]


def average(x, mask):
    """The mean f[B, C] of x[B, h, w, C] over a mask bool[B, h, w], or over all without one."""
    if mask is None:
        return x.mean((1, 2))
    return x.sum((1, 2)) / jnp.maximum(mask.sum((1, 2)), 1)[:, None].astype(x.dtype)


class Dropout(nn.Module):
    """flax's Dropout in training, with the same draws, also at a traced rate.

    Attributes:
      rate: the probability that a number becomes zero, above 0.
    """

    rate: Any

    @nn.compact
    def __call__(self, x):
        keep = 1 - self.rate
        mask = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
        return jax.lax.select(mask, (x / keep).astype(x.dtype), jnp.zeros_like(x))


def drop_path(x: jax.Array, rate: Any, key: jax.Array) -> jax.Array:
    """Stochastic depth: whole branches x[B, ...] of single images become zero, others grow."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images[B, H, W, C] - mean[C]) / std[C]."""
    shift, scale = (jnp.asarray(v, images.dtype).reshape(1, 1, 1, -1) for v in (mean, std))
    return (images - shift) / scale


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x[..., D] + bias[D] in x's dtype, the broadcast written out; the same of bias[P, D]."""
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
