"""The three balls that perturbations stay in: random points, steepest steps, projections."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Array = jax.Array
Norm = Literal["linf", "l2", "l1"]


def per_example(value: ArrayLike, images: Array) -> Array:
    """A scalar or f[B] as f[B, 1, 1, 1] in the images' dtype."""
    value = jnp.broadcast_to(jnp.asarray(value, images.dtype), images.shape[:1])
    return value.reshape(-1, *[1] * (images.ndim - 1))


def size(delta: Array, norm: Norm) -> Array:
    """The norm of each example, f[B, 1, 1, 1].

    Examples:
      >>> size(jnp.array([[3.0, -4.0]]), "l2").tolist()
      [[5.0]]
    """
    axes = tuple(range(1, delta.ndim))
    largest = jnp.abs(delta).max(axes, keepdims=True)
    if norm == "linf":
        return largest
    if norm == "l1":
        return jnp.abs(delta).sum(axes, keepdims=True)
    # Squares of gradients as small as a saturated model's would underflow.
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.sqrt(jnp.square(delta / scale).sum(axes, keepdims=True))


def normalize(delta: Array, norm: Norm) -> Array:
    """Each example divided by its norm; zeros stay zeros."""
    length = size(delta, norm)
    return delta / jnp.where(length > 0, length, 1)


def random_start(keys: Array, images: Array, epsilon: ArrayLike, norm: Norm) -> Array:
    """A uniform point of the ball around each image, clipped to [0, 1].

    Args:
      keys: key[B].
      images: f[B, H, W, C].
      epsilon: the radius, a scalar or f[B].
      norm: of the ball.
    """
    shape, dtype = images.shape[1:], images.dtype

    def draw(key: Array) -> Array:
        direction_key, radius_key = jax.random.split(key)
        if norm == "linf":
            return jax.random.uniform(direction_key, shape, dtype, -1, 1)
        if norm == "l2":
            direction = jax.random.normal(direction_key, shape, dtype)
            radius = jax.random.uniform(radius_key, (), dtype) ** (1 / direction.size)
            return radius * normalize(direction[None], "l2")[0]
        # n of n + 1 exponential variables over the sum of them all are uniform in the simplex.
        direction = jax.random.laplace(direction_key, shape, dtype)
        return direction / (
            jnp.abs(direction).sum() + jax.random.exponential(radius_key, (), dtype)
        )

    return jnp.clip(images + per_example(epsilon, images) * jax.vmap(draw)(keys), 0, 1)


def steepest(gradient: Array, at: Array, norm: Norm, *, quantile: float = 0.99) -> Array:
    """The step of norm 1 (L-infinity: largest entry 1) along which a gradient gains most.

    L1's best step would change one entry only. Its signs are shared out evenly over the largest
    entries instead, without those that the box stops (SLIDE; Tramèr & Boneh 2019, section 4.1).

    Args:
      gradient: f[B, H, W, C].
      at: f[B, H, W, C] in [0, 1], where it was taken.
      norm: of the step.
      quantile: of L1; the share of entries that don't move.
    """
    if norm == "linf":
        return jnp.sign(gradient)
    if norm == "l2":
        return normalize(gradient, "l2")
    stopped = ((at <= 0) & (gradient < 0)) | ((at >= 1) & (gradient > 0))
    gradient = jnp.where(stopped, 0, gradient)
    axes = tuple(range(1, gradient.ndim))
    least = jnp.quantile(jnp.abs(gradient), quantile, axis=axes, keepdims=True)
    return normalize(jnp.where(jnp.abs(gradient) >= least, jnp.sign(gradient), 0), "l1")


def project(points: Array, images: Array, epsilon: ArrayLike, norm: Norm) -> Array:
    """Points put back into the ball around images and into [0, 1].

    L-infinity and L1: the nearest point of both. L2: the nearest of the ball, then clipped, as all
    references do; clipping leaves no ball that is centered in the box.

    Args:
      points: f[B, H, W, C].
      images: f[B, H, W, C] in [0, 1], the centers.
      epsilon: the radius, a scalar or f[B].
      norm: of the ball.
    """
    epsilon, delta = per_example(epsilon, images), points - images
    if norm == "linf":
        delta = jnp.clip(delta, -epsilon, epsilon)
    elif norm == "l2":
        delta = _shrink(delta, epsilon, "l2")
    else:
        room = jnp.where(delta > 0, 1 - images, images)
        flat = jax.vmap(_l1_projection)(
            jnp.abs(delta).reshape(len(delta), -1),
            room.reshape(len(delta), -1),
            epsilon.reshape(-1),
        )
        # Sums of many numbers are rounded; the ball is kept all the same.
        delta = _shrink(jnp.sign(delta) * flat.reshape(delta.shape), epsilon, "l1")
    return jnp.clip(images + delta, 0, 1)


def _shrink(delta: Array, epsilon: Array, norm: Norm) -> Array:
    length = size(delta, norm)
    return delta * jnp.minimum(1, epsilon / jnp.where(length > 0, length, 1))


def _l1_projection(size: Array, room: Array, epsilon: Array) -> Array:
    """The point t nearest to `size` f[N] >= 0 with 0 <= t <= room and Σ t <= epsilon.

    It is clip(size - λ, 0, room) for the smallest λ >= 0 that is enough. Σ t falls with λ in
    straight pieces that meet where λ passes a size (an entry starts) or size - room (it is full).
    """
    knots = jnp.concatenate([size, size - room])
    kinds = jnp.concatenate([jnp.ones_like(size), -jnp.ones_like(size)])
    order = jnp.argsort(-knots)
    knots, kinds = knots[order], kinds[order]
    slope, weighted = jnp.cumsum(kinds), jnp.cumsum(kinds * knots)
    last = jnp.maximum(jnp.sum(weighted - slope * knots <= epsilon) - 1, 0)
    shift = (weighted[last] - epsilon) / jnp.maximum(slope[last], 1)
    enough = jnp.minimum(size, room).sum() <= epsilon
    return jnp.clip(size - jnp.where(enough, 0, shift), 0, room)


def show_epsilon(epsilon: float, norm: Norm) -> str:
    """For people: L-infinity in steps of 8-bit pixels.

    Examples:
      >>> show_epsilon(8 / 255, "linf"), show_epsilon(0.5, "l2")
      ('8/255', '0.5')
    """
    return f"{255 * epsilon:.4g}/255" if norm == "linf" else f"{epsilon:.4g}"
