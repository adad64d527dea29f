"""Explanations by the gradient of the score with respect to the image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vision_jax.errors import UserError
from vision_jax.explain.forward import Forward, Target, Variables, score_and_gradient


def saliency(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array | None = None,
) -> jax.Array:
    """The gradient of the score (Simonyan et al. 2013, https://arxiv.org/abs/1312.6034).

    Args:
      forward: the model.
      variables: its arrays.
      images: f[B, H, W, C] in [0, 1].
      target: what of the outputs is explained.
      keys: not used: nothing is drawn.

    Returns:
      f[B, H, W, C], score by unit of the image, with its sign.
    """
    del keys
    return score_and_gradient(forward, variables, images, target)[1]


def smooth_grad(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array,
    *,
    samples: int = 25,
    noise: float = 0.15,
) -> jax.Array:
    """The mean gradient over noisy images (Smilkov et al. 2017, https://arxiv.org/abs/1706.03825).

    Args:
      forward, variables, images, target: see `saliency`.
      keys: key[B], of each image's noise.
      samples: noisy images, one after another.
      noise: standard deviation of what is added, in units of the image.

    Returns:
      f[B, H, W, C], the mean of the signed gradients.
    """
    _at_least_one("samples", samples)

    def noisy(sample):
        return images + noise * noise_of(keys, sample, images)

    weights = np.full(samples, 1 / samples)
    return _sum_of_gradients(forward, variables, images, target, noisy, np.arange(samples), weights)


def noise_of(keys: jax.Array, sample: ArrayLike, images: jax.Array) -> jax.Array:
    """Standard normal f[B, H, W, C]: that of an image depends on its own key and the sample."""
    draw = jax.vmap(
        lambda key: jax.random.normal(
            jax.random.fold_in(key, sample), images.shape[1:], images.dtype
        )
    )
    return draw(keys)


def integrated_gradients(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array | None = None,
    *,
    nodes: int = 50,
    baseline: ArrayLike = 0.0,
) -> jax.Array:
    """The gradient along the way from a baseline to the image, times the way.

    Sundararajan et al. 2017 (https://arxiv.org/abs/1703.01365), the integral by Gauss and
    Legendre's nodes. The sum over an image is the score's difference from the baseline's, but for
    the error of the integral: measures.completeness tells it. The memory does not grow with the
    nodes.

    Args:
      forward, variables, images, target: see `saliency`.
      keys: not used: nothing is drawn.
      nodes: images on the way, one after another.
      baseline: the image without anything to see: a number, or f[B, H, W, C] or what broadcasts.

    Returns:
      f[B, H, W, C], shares of the score.
    """
    del keys
    _at_least_one("nodes", nodes)
    places, weights = gauss_legendre(nodes)
    way = images - jnp.broadcast_to(jnp.asarray(baseline, images.dtype), images.shape)

    def on_the_way(rest):  # from the image back: the last node is near it, to the last bit
        return images - rest * way

    rest = np.asarray(1 - places, images.dtype)
    return way * _sum_of_gradients(forward, variables, images, target, on_the_way, rest, weights)


def gauss_legendre(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """(places, weights) f64[nodes] of the quadrature on [0, 1], exact to degree 2·nodes - 1.

    Examples:
      >>> places, weights = gauss_legendre(2)
      >>> round(float((weights * places**3).sum()), 12)
      0.25
    """
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return (1 + places) / 2, weights / 2


def _sum_of_gradients(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    point_of: Callable[[jax.Array], jax.Array],
    steps: np.ndarray,
    weights: np.ndarray,
) -> jax.Array:
    """f[B, H, W, C]: Σ weight · gradient at point_of(step), one after another.

    The memory is that of one gradient, however many there are.
    """

    def body(total, step):
        place, weight = step
        gradient = score_and_gradient(forward, variables, point_of(place), target)[1]
        return total + weight * gradient, None

    given = (jnp.asarray(steps), jnp.asarray(weights, images.dtype))
    return jax.lax.scan(body, jnp.zeros_like(images), given)[0]


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} {value}: give 1 or more")
