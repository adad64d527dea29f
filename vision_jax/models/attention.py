"""Softmax attention, in one place, in the form that each platform runs best."""

import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, platform: str | None = None) -> jax.Array:
    """softmax(q·kᵀ / √d)·v for every head.

    Args:
      q: f[B, N, K, d]; K heads of d channels.
      k: f[B, M, K, d].
      v: f[B, M, K, d].
      platform: "cpu", "gpu" or "tpu"; the default backend if None. On a GPU in half precision this
        is cuDNN's fused kernel, on other accelerators what XLA makes of `dot_product_attention`; on
        a CPU, two head-major products, which measured 1.4 times as fast there.

    Returns:
      f[B, N, K, d] in q's dtype. The softmax is in float32 (or better).
    """
    platform = platform or jax.default_backend()
    if platform != "cpu":
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        fused = platform == "gpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if fused else "xla")
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # [B, K, N, d]
    scale = q.shape[-1] ** -0.5
    softmax_dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bknd,bkmd->bknm", q * scale, k, preferred_element_type=softmax_dtype)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bknm,bkmd->bknd", weights, v).transpose(0, 2, 1, 3)  # [B, N, K, d]
