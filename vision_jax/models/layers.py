"""Dense and convolution layers whose kernels may be structured leaves.

flax's own layers take a `dot_general` hook; these two say the same in fewer words, for convolutions
too, and in one place: `trees.leaves` multiplies, whatever the kernel is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vision_jax.trees import leaves

Initializer = Callable[..., Any]

# Keys for the adapters' input dropout arrive in this collection, in training only.
ADAPTER_KEYS = "adapter"


class Dense(nn.Module):
    """x[..., in] · kernel[in, out] + bias[out]."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        key = self.make_rng(ADAPTER_KEYS) if self.has_rng(ADAPTER_KEYS) else None
        x = leaves.dot(x.astype(self.dtype), kernel, key)
        if self.use_bias:
            x = add_bias(x, self.param("bias", self.bias_init, (self.features,)))
        return x


class Conv(nn.Module):
    """Convolution of x[B, H, W, in] with kernel[h, w, in, out]; padding is given in numbers.

    A kernel that tiles the image (stride = size, no padding: a patch embedding) is one dot on
    rearranged pixels, which is the same sum and faster, in its weight gradient most of all.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] = (1, 1)
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0))
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        key = self.make_rng(ADAPTER_KEYS) if self.has_rng(ADAPTER_KEYS) else None
        x = x.astype(self.dtype)
        tiles = tuple(self.strides) == tuple(self.kernel_size) and not any(map(any, self.padding))
        if tiles and not isinstance(kernel, leaves.LowRank):
            h, w = self.kernel_size
            batch, height, width, channels = x.shape
            x = x[:, : height // h * h, : width // w * w]  # what a strided convolution leaves out
            x = x.reshape(batch, height // h, h, width // w, w, channels)
            x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // h, width // w, -1)
            x = leaves.dot(x, kernel.reshape(-1, self.features))  # [B, H/h, W/w, out]
        else:
            x = leaves.convolve(x, kernel, self.strides, self.padding, key)
        if self.use_bias:
            x = add_bias(x, self.param("bias", nn.initializers.zeros, (self.features,)))
        return x


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x[..., D] + bias[D] in x's dtype, the broadcast written out."""
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
