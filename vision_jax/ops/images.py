"""Images as the device sees them."""

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
    """uint8 -> f32 in [0, 1]; images leave the host as bytes. Floats are in [0, 1] already."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
