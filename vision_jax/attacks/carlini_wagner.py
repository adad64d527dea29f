"""Carlini & Wagner's L2 attack: the nearest image that fools, by Adam, without any epsilon."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vision_jax.attacks.losses import LossOfImages

Array = jax.Array


def carlini_wagner(
    loss_of_images: LossOfImages,
    images: Array,
    *,
    steps: int = 1000,
    searches: int = 9,
    learning_rate: float = 0.01,
    weight: float = 1e-3,
    confidence: float = 0.0,
) -> Array:
    """Minimizes |δ|² + c · max(confidence - loss, 0) for the smallest c of each example that fools.

    Carlini & Wagner 2017, section VI, as foolbox's L2CarliniWagnerAttack computes it without its
    early stop, which would let an example depend on its batch. It draws nothing.

    Args:
      loss_of_images: of losses.margin, whose sign says who is fooled (`make_untargeted`,
        `make_targeted`).
      images: f[B, H, W, C] in [0, 1].
      steps: of Adam for each c; each is one forward pass and one input gradient.
      searches: how many c are tried, times 10 until one fools and halfway between from there on.
      learning_rate: of Adam, where the image is (tanh(w) + 1) / 2.
      weight: the first c.
      confidence: the margin that counts as fooling.

    Returns:
      f[B, H, W, C]: the nearest image found that fools, and the image itself where none was.
    """
    images = images.astype(np.promote_types(images.dtype, np.float32))
    origin = jnp.arctanh((2 * images - 1) * 0.999999)  # black and white are infinitely far off
    center = _image(origin)
    adam = optax.adam(learning_rate)

    def search(carry, _):
        nearest, distance, weights, lower, upper = carry

        def objective(shift):
            at = _image(origin + shift)
            loss, fooled = loss_of_images(at)
            total = _square(at - center) + weights * jnp.maximum(confidence - loss, 0)
            return total.sum(), (at, fooled & (loss >= confidence))

        def step(carry, _):
            shift, state, nearest, distance, found = carry
            gradient, (at, fooled) = jax.grad(objective, has_aux=True)(shift)
            update, state = adam.update(gradient, state)
            length = _square(at - images)
            nearer = fooled & (length < distance)
            nearest = jnp.where(nearer.reshape(-1, *[1] * (at.ndim - 1)), at, nearest)
            distance = jnp.where(nearer, length, distance)
            return (shift + update, state, nearest, distance, found | fooled), None

        nothing = jnp.zeros_like(images)
        carry = nothing, adam.init(nothing), nearest, distance, jnp.zeros(len(images), bool)
        carry = jax.lax.scan(step, carry, length=steps)[0]
        nearest, distance, found = carry[2:]
        upper = jnp.where(found, weights, upper)
        lower = jnp.where(found, lower, weights)
        weights = jnp.where(jnp.isinf(upper), weights * 10, (lower + upper) / 2)
        return (nearest, distance, weights, lower, upper), None

    one = jnp.ones(len(images), images.dtype)
    carry = images, jnp.inf * one, weight * one, 0 * one, jnp.inf * one
    return jax.lax.scan(search, carry, length=searches)[0][0]


def _image(point: Array) -> Array:
    return (jnp.tanh(point) + 1) / 2


def _square(delta: Array) -> Array:
    """|δ|² of each example, f[B]."""
    return jnp.square(delta).sum(tuple(range(1, delta.ndim)))
