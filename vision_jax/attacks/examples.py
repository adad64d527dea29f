"""What attacks do example by example: draw from keys of their own, and choose."""

import jax
import jax.numpy as jnp

Array = jax.Array


def keys_of(key: Array, index: Array) -> Array:
    """key[B], one an example by its place in the data, whatever batch or device it comes in."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def where(choice: Array, left: Array, right: Array) -> Array:
    """`left` or `right` f[B, ...], by one choice bool[B] an example."""
    return jnp.where(choice.reshape(-1, *[1] * (left.ndim - 1)), left, right)
