"""FAB: the nearest image of another class, by steps onto the decision boundary (Croce & Hein 2020).

Each step goes to the point of the box that a linear model of the boundary puts nearest, a little
beyond it and a little towards the image. A point that fools is kept if it is the nearest so far,
and the search goes on from closer to the image. It minimizes the distance; the radius decides
afterwards. Names are those of the paper's algorithm 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vision_jax.attacks import norms
from vision_jax.attacks.examples import where
from vision_jax.attacks.losses import LogitsOfImages, predicts
from vision_jax.attacks.norms import Norm

Array = jax.Array

ALPHA_MAX = 0.1  # the image's largest share in a step's starting point
ETA = 1.05  # overshoot of a step, over what the linear model asks for
BETA = 0.9  # share of the distance that remains after a point that fools


def fab(
    logits_of_images: LogitsOfImages,
    images: Array,
    labels: Array,
    keys: Array | None = None,
    *,
    epsilon: ArrayLike,
    norm: Norm = "linf",
    steps: int = 100,
    targets: Array | None = None,
    start: Array | None = None,
) -> Array:
    """The nearest image that fools, at whatever distance; the image itself where there is none.

    Towards targets (FAB-T) a step costs two forward passes and one gradient. Without them it needs
    the gradient of each class.

    Args:
      logits_of_images: the model, deterministic.
      images: f[B, H, W, C] in [0, 1].
      labels: i32[B]; of an image that is misclassified already nothing changes.
      keys: key[B], to begin at a random point; None begins at the images.
      epsilon: a scalar or f[B]; the random point is at half this distance.
      norm: of the distance.
      steps: number of steps.
      targets: i32[B], whose boundary is looked for; fooled is whoever is not `labels`.
      start: f[B, H, W, C], where to begin instead of the images.
    """
    images = images.astype(np.promote_types(images.dtype, np.float32))
    if keys is not None:
        start = random_start(keys, images, epsilon, norm)
    begin = images if start is None else start.astype(images.dtype)
    rows = jnp.arange(len(images))

    def linear_model(at: Array) -> tuple[Array, Array]:
        """The nearest boundary's (other logit minus the label's f[B], its gradient like at)."""

        def differences(at: Array) -> Array:
            logits = logits_of_images(at).astype(at.dtype)
            own = jnp.take_along_axis(logits, labels[:, None], axis=1)
            if targets is None:
                return logits - own
            return jnp.take_along_axis(logits, targets[:, None], axis=1) - own

        values, pull = jax.vjp(differences, at)
        if targets is not None:
            return values[:, 0], pull(jnp.ones_like(values))[0]
        columns = jnp.eye(values.shape[1], dtype=at.dtype)
        slopes = jax.lax.map(
            lambda column: pull(jnp.broadcast_to(column, values.shape))[0], columns
        )
        values = values.at[rows, labels].set(jnp.inf)
        lengths = jax.vmap(lambda slope: norms.size(slope, _DUAL[norm])[:, 0, 0, 0])(slopes)
        nearest = jnp.argmin(jnp.abs(values) / (1e-12 + lengths.T), axis=1)
        return values[rows, nearest], slopes[nearest, rows]

    def step(carry: tuple[Array, Array, Array], _: None):
        x, x_out, least = carry
        f, w = linear_model(x)
        # The hyperplane <w, x> = b is the linear model's boundary.
        b = (w * x).sum((1, 2, 3)) - f
        delta = jax.vmap(_onto_plane, (0, 0, 0, None))(x, w, b, norm)
        delta_orig = jax.vmap(_onto_plane, (0, 0, 0, None))(images, w, b, norm)
        d, d_orig = (jnp.maximum(norms.size(x, norm), 1e-8) for x in (delta, delta_orig))
        alpha = jnp.minimum(d / (d + d_orig), ALPHA_MAX)
        x = (x + ETA * delta) * (1 - alpha) + (images + ETA * delta_orig) * alpha
        x = jnp.clip(x, 0, 1)
        fooled = ~predicts(logits_of_images(x), labels)
        length = norms.size(x - images, norm)[:, 0, 0, 0]
        closer = fooled & (length < least)
        x_out = where(closer, x, x_out)
        x = where(fooled, images + (x - images) * BETA, x)
        return (x, x_out, jnp.where(closer, length, least)), None

    solved = ~predicts(logits_of_images(images), labels)
    least = jnp.where(solved, 0, jnp.full(len(images), jnp.inf, images.dtype))
    return jax.lax.scan(step, (begin, images, least), length=steps)[0][1]


def random_start(keys: Array, images: Array, epsilon: ArrayLike, norm: Norm) -> Array:
    """Images with noise of norm epsilon / 2, in [0, 1]: uniform for L-infinity, else normal."""
    shape, dtype = images.shape[1:], images.dtype
    if norm == "linf":
        noise = jax.vmap(lambda key: jax.random.uniform(key, shape, dtype, -1, 1))(keys)
    else:
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
    half = norms.per_example(epsilon, images) / 2
    return jnp.clip(images + half * norms.normalize(noise, norm), 0, 1)


_DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}


def _onto_plane(point: Array, slope: Array, bound: Array, norm: Norm) -> Array:
    """The smallest change that brings a point of [0, 1] to <slope, point> = bound, staying there.

    Where the box does not reach the plane: as far towards it as the box allows. Each entry moves
    against (or along) its slope, at most to the wall: by its share of one common length for
    L-infinity and L2, and for L1 all the way, steepest entries first, until it is enough.

    Args:
      point, slope: f[H, W, C]; bound: a scalar.
    """
    gap = (slope * point).sum() - bound
    slope = jnp.where(gap >= 0, slope, -slope)
    steepness, gap = jnp.abs(slope), jnp.abs(gap)
    room = jnp.where(slope == 0, 0, jnp.where(slope > 0, point, 1 - point))
    if norm == "l1":
        flat, flat_room = steepness.reshape(-1), room.reshape(-1)
        order = jnp.argsort(-flat)
        gains = (flat * flat_room)[order]
        left = jnp.maximum(gap - (jnp.cumsum(gains) - gains), 0)
        moved = jnp.minimum(flat_room[order], left / jnp.maximum(flat[order], 1e-30))
        size = jnp.zeros_like(flat).at[order].set(moved).reshape(point.shape)
    else:
        share = steepness if norm == "l2" else jnp.ones_like(steepness)
        size = jnp.minimum(_common_length(steepness, share, room, gap) * share, room)
    return -jnp.sign(slope) * size


def _common_length(steepness: Array, share: Array, room: Array, gap: Array) -> Array:
    """The t >= 0 for which Σ steepness · min(t · share, room) is gap, or one that fills all rooms.

    The sum rises with t in ever flatter straight pieces. So Newton's steps from 0 never pass the
    solution, and are there after as many as there are pieces on the way, in practice below ten; no
    sorting is needed.
    """

    def unsettled(state: tuple[Array, Array, Array]) -> Array:
        length, last, count = state
        return (length > last) & (count < 100)

    def newton(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        length, _, count = state
        free = length * share < room
        # In each piece the equation itself is solved; sums of what was left would round twice.
        rate = jnp.where(free, steepness * share, 0).sum()
        filled = jnp.where(free, 0, steepness * room).sum()
        better = jnp.where(rate > 0, (gap - filled) / jnp.where(rate > 0, rate, 1), jnp.inf)
        return jnp.maximum(length, better), length, count + 1

    zero = jnp.zeros_like(gap)
    start = newton((zero, zero, jnp.int32(0)))
    length = jax.lax.while_loop(unsettled, newton, start)[0]
    return jnp.where(jnp.isfinite(length), length, jnp.finfo(gap.dtype).max)
