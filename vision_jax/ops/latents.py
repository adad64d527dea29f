"""Latents of an autoencoder: drawn from what it says of an image, and scaled for a generator."""

import jax
import jax.numpy as jnp

from vision_jax.ops.noise import normal


def draw(mean: jax.Array, logvar: jax.Array | None, keys: jax.Array | None) -> jax.Array:
    """Latents f[B, h, w, Z] before scaling.

    Args:
      mean: f[B, h, w, Z].
      logvar: the log of their variance; None where nothing of them is random.
      keys: key[B], one for each image; None: the means.
    """
    if keys is None or logvar is None:
        return mean
    return mean + jnp.exp(0.5 * logvar) * normal(keys, mean.shape[1:], mean.dtype)


def scaled(z: jax.Array, scaling_factor: float, shift_factor: float) -> jax.Array:
    """Latents as a generator takes them.

    Examples:
      >>> scaled(jnp.array([1.5, 0.5]), 2.0, 0.5).tolist()
      [2.0, 0.0]
    """
    return (z - shift_factor) * scaling_factor
