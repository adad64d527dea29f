"""How far to trust a map: what the score does when pixels come and go by it, and more.

All are pure functions of arrays. A map f[B, h, w] is enlarged to the image bilinearly; its largest
values are the most relevant.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg

from vision_jax.explain.forward import Forward, Target, Variables, score_of
from vision_jax.ops.resize import resize_bilinear

SURVIVES = 0.5  # rank correlation from which on a map does not depend on the weights
STEPS = 32  # of a curve
BLUR = 1 / 8  # sigma of what insertion begins with, as a share of an image's side


def to_pixels(maps: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Maps f[B, h, w] at the size (H, W) of the images."""
    return resize_bilinear(maps[..., None], size)[..., 0]


def to_patches(maps: jax.Array, grid: tuple[int, int] | None) -> jax.Array:
    """Maps f[B, H, W] with the mean over each patch of a model in the place of its pixels.

    A model of patches sees whole ones: pixels that come one by one, here and there, tell it little.

    Args:
      maps: of the images' size.
      grid: the model's patches (rows, columns); the maps stay as they are if None, or if these
        don't divide the image.
    """
    batch, height, width = maps.shape
    if grid is None or height % grid[0] or width % grid[1]:
        return maps
    tall, wide = height // grid[0], width // grid[1]
    means = maps.reshape(batch, grid[0], tall, grid[1], wide).mean((2, 4))
    return jnp.repeat(jnp.repeat(means, tall, axis=1), wide, axis=2)


def ranks(maps: jax.Array, keys: jax.Array) -> jax.Array:
    """i32[B, H, W]: place of each pixel by falling relevance, from 0 on.

    Args:
      maps: f[B, H, W].
      keys: key[B], which decide among equals.
    """

    def rank(values, key):
        drawn = jax.random.uniform(key, values.shape)
        order = jnp.lexsort((drawn, -values))
        return jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.size))

    return jax.vmap(rank)(maps.reshape(len(maps), -1), keys).reshape(maps.shape)


def insertion(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    order: jax.Array,
    baseline: jax.Array,
    *,
    steps: int = STEPS,
) -> jax.Array:
    """The score while the most relevant pixels come first, f[B, steps + 1].

    Petsiuk et al. 2018 (https://arxiv.org/abs/1806.07421, section 4.2). The higher its area, the
    better the map.

    Args:
      forward: the model.
      variables: its arrays.
      images: f[B, H, W, C] in [0, 1].
      target: what of the outputs is measured: a probability.
      order: i32[B, H, W], see `ranks`.
      baseline: f[B, H, W, C] (or what broadcasts), where the curve begins; the image is its end.
      steps: of equal shares of the pixels.
    """
    base = jnp.broadcast_to(jnp.asarray(baseline, images.dtype), images.shape)
    pixels = images.shape[1] * images.shape[2]
    counts = np.round(np.arange(steps + 1) * pixels / steps).astype(np.int32)

    def seen(count):
        return jnp.where((order < count)[..., None], images, base)

    return _scores(forward, variables, target, seen, counts).T


def deletion(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    order: jax.Array,
    baseline: jax.Array,
    *,
    steps: int = STEPS,
) -> jax.Array:
    """The score while the most relevant pixels go first, f[B, steps + 1]: the lower, the better.

    Arguments: see `insertion`; the image is where the curve begins, the baseline its end.
    """
    base = jnp.broadcast_to(jnp.asarray(baseline, images.dtype), images.shape)
    return insertion(forward, variables, base, target, order, images, steps=steps)


def blurred(images: jax.Array, share: float = BLUR) -> jax.Array:
    """Images f[B, H, W, C] through a Gaussian whose sigma is this share of each side.

    Where the curve of insertion begins in the paper: black or grey would be shapes of their own.
    """

    def weights(side: int) -> jax.Array:
        places = np.arange(side)
        near = np.exp(-0.5 * ((places[:, None] - places[None]) / (share * side)) ** 2)
        return jnp.asarray(near / near.sum(1, keepdims=True), images.dtype)

    height, width = images.shape[1:3]
    return jnp.einsum("Hh,bhwc,Ww->bHWc", weights(height), images, weights(width))


def area(curves: jax.Array) -> jax.Array:
    """f[B]: under curves f[B, n + 1] over [0, 1], by trapezes."""
    return (curves[:, 1:] + curves[:, :-1]).mean(1) / 2


def road(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    order: jax.Array,
    keys: jax.Array,
    *,
    shares: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8),
    noise: float = 0.01,
) -> jax.Array:
    """Remove and debias (Rong et al. 2022, https://arxiv.org/abs/2202.00449), f[B].

    Pixels are replaced by what their neighbors say, so that the shape of the hole tells little.
    Half the difference of the score without the least and without the most relevant share of the
    pixels, the mean over the shares: from -1 to 1 of a probability, the higher the better.

    Args:
      forward, variables, images, target, order: see `insertion`.
      keys: key[B], of the noise of each image.
      shares: of the pixels that are replaced, above 0, below 1.
      noise: its standard deviation, in units of the image.
    """
    pixels = images.shape[1] * images.shape[2]
    counts = np.round(np.asarray(shares) * pixels).astype(np.int32)
    steps = (np.arange(len(shares)), counts)

    def seen_without(missing, index):
        filled = impute(images, missing)
        draw = jax.vmap(lambda key, x: jax.random.normal(key, x.shape, x.dtype))
        drawn = draw(jax.vmap(jax.random.fold_in, (0, None))(keys, index), images)
        return filled + jnp.where(missing[..., None], noise * drawn, 0)

    def without_least(step):
        index, count = step
        return seen_without(order >= pixels - count, index)

    def without_most(step):
        index, count = step
        return seen_without(order < count, index)

    given = (forward, variables, target)
    least, most = (_scores(*given, seen, steps) for seen in (without_least, without_most))
    return (least - most).mean(0) / 2


def _scores(
    forward: Forward,
    variables: Variables,
    target: Target,
    images_of: Callable[[Any], jax.Array],
    steps: Any,
) -> jax.Array:
    """f[n, B]: the scores of the images that are made of each step, one after another."""

    def body(_, step):
        return None, score_of(forward, variables, images_of(step), target)

    return jax.lax.scan(body, None, jax.tree.map(jnp.asarray, steps))[1]


# Of a pixel's neighbors (rows down, columns right): beside it and across its corners.
_NEIGHBORS = tuple(
    (down, right, 1 / 6 if not down * right else 1 / 12)
    for down in (-1, 0, 1)
    for right in (-1, 0, 1)
    if down or right
)


def impute(images: jax.Array, missing: jax.Array) -> jax.Array:
    """Images whose missing pixels are the weighed mean of their neighbors, missing or not.

    The linear system of all missing pixels, a graph's Laplacian, by conjugate gradients.

    Args:
      images: f[B, H, W, C].
      missing: bool[B, H, W], not all of an image.
    """
    tolerance = 1e-12 if images.dtype == jnp.float64 else 1e-5

    def gather(x):
        """Σ w · neighbor of x[H, W, C]; beyond the edge there is none."""
        padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
        height, width = x.shape[:2]
        return sum(
            weight * padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]
            for down, right, weight in _NEIGHBORS
        )

    def fill(image, missing):
        inside = missing[..., None]
        degree = gather(jnp.ones((*image.shape[:2], 1), image.dtype))
        known = jnp.where(inside, 0, image)

        def laplacian(x):
            x = jnp.where(inside, x, 0)
            return jnp.where(inside, degree * x - gather(x), 0)

        right = jnp.where(inside, gather(known), 0)
        solved, _ = cg(laplacian, right, tol=tolerance, maxiter=10 * max(image.shape[:2]))
        return jnp.where(inside, solved, image)

    return jax.vmap(fill)(images, missing)


def box_pixels(boxes_xyxy_px: jax.Array, size: tuple[int, int]) -> jax.Array:
    """bool[B, H, W]: the pixels whose centers lie in a box f[B, 4] of an image of `size` (H, W)."""
    height, width = size
    x, y = jnp.arange(width) + 0.5, jnp.arange(height) + 0.5
    left, top, right, bottom = (side[:, None] for side in boxes_xyxy_px.T)
    across = (left <= x[None]) & (x[None] <= right)  # [B, W]
    down = (top <= y[None]) & (y[None] <= bottom)  # [B, H]
    return down[:, :, None] & across[:, None, :]


def pointing(maps: jax.Array, inside: jax.Array) -> jax.Array:
    """bool[B]: whether the largest value lies inside (the pointing game).

    Zhang et al. 2016 (https://arxiv.org/abs/1608.00507), without a tolerance around the object,
    which there is 15 pixels. Of several largest values the first counts; a map that is the same
    all over, such as zero, points nowhere.

    Args:
      maps: f[B, H, W], of the images' size; -inf where there is no image.
      inside: bool[B, H, W], the pixels of the object.
    """
    flat = maps.reshape(len(maps), -1)
    best = jnp.argmax(flat, axis=1)[:, None]
    points = ((flat < jnp.take_along_axis(flat, best, axis=1)) & (flat > -jnp.inf)).any(1)
    return points & jnp.take_along_axis(inside.reshape(len(maps), -1), best, axis=1)[:, 0]


def share_inside(maps: jax.Array, inside: jax.Array) -> jax.Array:
    """f[B] in [0, 1]: how much of the positive heat lies inside; 0 without any.

    Args: see `pointing`.
    """
    heat = jax.nn.relu(maps)
    own = jnp.where(inside, heat, 0).sum((1, 2))
    return own / jnp.maximum(heat.sum((1, 2)), jnp.finfo(heat.dtype).tiny)


def completeness(attributions: jax.Array, score: jax.Array, baseline_score: jax.Array) -> jax.Array:
    """f[B]: the sum of attributions f[B, ...] minus the difference of the scores, 0 at best."""
    return attributions.reshape(len(attributions), -1).sum(1) - (score - baseline_score)


def shuffled(variables: Variables, key: jax.Array) -> Variables:
    """The variables with the entries of each array in random order.

    What each array is made of stays, what was learned does not; arrays of structured leaves, and
    integers, likewise.
    """
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(key, len(leaves))
    mixed = [
        jax.random.permutation(one, leaf.reshape(-1)).reshape(leaf.shape) if leaf.ndim else leaf
        for one, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, mixed)


def rank_correlation(first: jax.Array, second: jax.Array) -> jax.Array:
    """f[B] in [-1, 1]: Spearman's, of two maps f[B, ...] each; 0 where one is the same all over.

    Adebayo et al. 2018 (https://arxiv.org/abs/1810.03292): a map that stays what it is when the
    weights are randomized explains the image and not the model, see SURVIVES.
    """

    def rank(values):
        values = values.reshape(-1)
        known = jnp.sort(values)
        middle = (
            jnp.searchsorted(known, values, side="left")
            + jnp.searchsorted(known, values, side="right")
        ) / 2  # the mean place of equals
        return (middle - values.size / 2) / values.size  # less their mean, exactly

    def correlate(first, second):
        first, second = rank(first), rank(second)
        length = jnp.sqrt((first**2).sum() * (second**2).sum())
        return jnp.where(length > 0, (first * second).sum() / jnp.where(length > 0, length, 1), 0)

    return jax.vmap(correlate)(first, second)
