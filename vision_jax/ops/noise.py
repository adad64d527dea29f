"""Noise with a key for each image, so that what one becomes does not depend on its batch."""

from typing import Any

import jax
import jax.numpy as jnp


def normal(keys: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal draws f[B, *shape], each row by its own key.

    Args:
      keys: key[B].
      shape: of one draw.
      dtype: of the draws.

    Examples:
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> bool((normal(keys, (2,))[1:] == normal(keys[1:], (2,))).all())
      True
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
