"""Softmax attention, in one place, in the form that each platform runs best."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax import platform as platforms


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    platform: str | None = None,
    tap: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """softmax(scale · q·kᵀ + bias)·v for every head.

    Args:
      q: f[B, N, K, d]; K heads of d channels.
      k: f[B, M, K, d].
      v: f[B, M, K, d].
      bias: f[K, N, M], or f[B, K, N, M] where B, or K, may be 1: relative positions, masks.
      scale: 1 / √d if None.
      platform: see platform.py; the current one if None. On a GPU in half precision this
        is cuDNN's fused kernel (without a bias: it takes none of odd lengths), on other
        accelerators what XLA makes of `dot_product_attention`; on a CPU, two head-major products,
        which measured 1.4 times as fast there.
      tap: what the probabilities f[B, K, N, M] go through (see taps.make_tap); nothing is fused
        then.

    Returns:
      f[B, N, K, d] in q's dtype. The softmax is in float32 (or better).
    """
    platform = platform or platforms.current()
    if bias is not None and bias.ndim == 3:
        bias = bias[None]  # [1, K, N, M]
    if platform in ("gpu", "tpu") and tap is None:
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        small = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
        fused = platform == "gpu" and half and small and bias is None
        return jax.nn.dot_product_attention(
            q, k, v, bias, scale=scale, implementation="cudnn" if fused else "xla"
        )
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # [B, K, N, d]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    softmax_dtype = np.promote_types(q.dtype, np.float32)
    logits = jnp.einsum("bknd,bkmd->bknm", q * scale, k, preferred_element_type=softmax_dtype)
    if bias is not None:
        logits = logits + bias.astype(softmax_dtype)
    weights = softmax(logits).astype(v.dtype)
    if tap is not None:
        weights = tap(weights)
    return jnp.einsum("bknm,bkmd->bknd", weights, v).transpose(0, 2, 1, 3)  # [B, N, K, d]


@platforms.whole
def softmax(logits: jax.Array) -> jax.Array:
    """Of f[..., M], over the last axis."""
    return jax.nn.softmax(logits, axis=-1)


def attention_weights(q: jax.Array, k: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """softmax(q·kᵀ / √d + bias), which `attend` never forms where it is fused.

    Args:
      q: f[B, N, K, d].
      k: f[B, M, K, d].
      bias: as of `attend`, with four axes.

    Returns:
      f[B, K, N, M], at least f32; rows sum to 1.
    """
    wide = np.promote_types(q.dtype, np.float32)
    logits = jnp.einsum("bnkd,bmkd->bknm", q * q.shape[-1] ** -0.5, k, preferred_element_type=wide)
    return jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)
