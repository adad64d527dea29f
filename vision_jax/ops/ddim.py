"""DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502): samples of models of a DDPM's noise.

With DiT's 1,000 steps and linear variances (Ho et al. 2020). Like a flow's, a sample is one loop
under jit.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 1000  # of training


def kept_signal(first: float = 1e-4, last: float = 0.02, steps: int = STEPS) -> np.ndarray:
    """f32[steps]: the share of the image's variance at each step, the product of 1 - beta so far.

    Examples:
      >>> kept_signal().round(4)[[0, 500, 999]].tolist()
      [0.9998999834060669, 0.07779999822378159, 0.0]
    """
    betas = np.linspace(first, last, steps).astype(np.float32)
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def ddim_steps(
    count: int, spacing: Literal["leading", "trailing"] = "leading", steps: int = STEPS
) -> np.ndarray:
    """The steps i64[count] that a sample visits, falling.

    Args:
      count: at most `steps`.
      spacing: "leading" begins below the noisiest step, as DiT's published sampler does;
        "trailing" begins there and ends before the first (Lin et al. 2023, table 2).
      steps: of training.

    Examples:
      >>> ddim_steps(4).tolist(), ddim_steps(4, "trailing").tolist()
      ([750, 500, 250, 0], [999, 749, 499, 249])
    """
    if not 0 < count <= steps:
        raise ValueError(f"{count} steps of {steps}")
    if spacing == "leading":
        return np.arange(count)[::-1] * (steps // count)
    if spacing != "trailing":
        raise ValueError(f"spacing {spacing!r} is none of leading, trailing")
    # A step that is no whole number adds one more now and then, of what rounding leaves over.
    return np.round(np.arange(steps, 0, -steps / count)[:count]).astype(np.int64) - 1


def noised(images: jax.Array, noise: jax.Array, signal: jax.Array) -> jax.Array:
    """Images f[B, ...] with as much noise as where this share f[] of their variance is kept."""
    return jnp.sqrt(signal) * images + jnp.sqrt(1 - signal) * noise


def ddim(
    predict_noise: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    steps: np.ndarray,
    signal: np.ndarray,
    keep: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Follows predictions of the noise to images, without new noise on the way (eta 0).

    diffusers 0.42's DDIMScheduler but where steps are "trailing" and no divisor of 1,000: each of
    its steps then leads to one beside the next that it visits.

    Args:
      predict_noise: (x f[B, ...], step f[]) -> f[B, ...]; see ops.flow.guided.
      noise: f[B, ...], what is there at the first step.
      steps: `ddim_steps`, or the last of them.
      signal: `kept_signal`.
      keep: (x, signal f[]) -> x after each step, which puts back what is known of the images.

    Returns:
      f[B, ...] in the dtype of `noise`.
    """
    ends = np.append(signal[steps[1:]], 1.0)  # of the step that each leads to, the image at last
    dtype = np.promote_types(noise.dtype, np.float32)  # half precision has no step 999
    rows = (jnp.asarray(steps, dtype), jnp.asarray(signal[steps], dtype), jnp.asarray(ends, dtype))

    def body(x, row):
        step, now, then = row
        found = predict_noise(x, step).astype(dtype)
        image = (x.astype(dtype) - jnp.sqrt(1 - now) * found) / jnp.sqrt(now)
        x = (jnp.sqrt(then) * image + jnp.sqrt(1 - then) * found).astype(x.dtype)
        return (x if keep is None else keep(x, then)), None

    return jax.lax.scan(body, noise, rows)[0]
