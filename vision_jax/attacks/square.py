"""Square: an attack that sees logits and no gradient (Andriushchenko et al. 2020).

Each query changes one square of an example and keeps the change where the margin falls. Squares
shrink as queries go by. L-infinity paints a square in one color of ±epsilon; L2 and L1 move mass
from one square to a bump in another. Each example draws its own squares, where the published code
draws one for its whole batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vision_jax.attacks import losses, norms
from vision_jax.attacks.losses import LogitsOfImages
from vision_jax.attacks.norms import Norm
from vision_jax.errors import UserError

Array = jax.Array

P_INIT = 0.8  # share of an image's area in the first squares, the paper's p
HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which it is halved
TILES = 5  # a side, in the start of L2 and L1


class Draw(NamedTuple):
    """What one query of one example draws."""

    places: Array  # f[4] in [0, 1): row and column of the square, and of the one that gives mass
    signs: Array  # f[C], -1 or 1
    upright: Array  # bool, the bump's two halves lie side by side


def square(
    logits_of_images: LogitsOfImages,
    images: Array,
    labels: Array,
    keys: Array,
    *,
    epsilon: ArrayLike,
    norm: Norm = "linf",
    queries: int = 5000,
    first: ArrayLike = 0,
    begun: Array | None = None,
) -> Array:
    """The point of the smallest margin, or the first that fools.

    Stops when all examples are fooled. A run may be cut in pieces, with the same result: give the
    next one the points so far and the number of queries that they took.

    Args:
      logits_of_images: the model, deterministic.
      images: f[B, H, W, C] in [0, 1].
      labels: i32[B].
      keys: key[B].
      epsilon: the radius, a scalar or f[B]; may be traced.
      norm: of the ball.
      queries: forward passes at most, besides the one of the start.
      first: queries made before; may be traced.
      begun: f[B, H, W, C], their result.

    Returns:
      f[B, H, W, C] within epsilon of images and in [0, 1].

    Raises:
      UserError: images of less than 5 pixels a side in L2 and L1.
    """
    images = images.astype(np.promote_types(images.dtype, np.float32))
    height, width, channels = images.shape[1:]
    if norm != "linf" and min(height, width) < TILES:
        raise UserError(
            f"square attack in {norm}: images of {height} x {width} pixels; needs 5 a side"
        )
    propose = (_repaint if norm == "linf" else _move_mass)(images, epsilon, norm)
    sides = jnp.array(square_sides(height, width, norm), jnp.int32)

    def margin(at: Array) -> Array:
        logits = logits_of_images(at)
        logits = logits.astype(np.promote_types(logits.dtype, np.float32))
        return -losses.margin(logits, labels)

    def unsolved(state: tuple[Array, Array, Array]) -> Array:
        number, _, least = state
        return (number < first + queries) & (least > 0).any()

    def query(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        number, at, least = state
        level = (number > jnp.array(HALVED)).sum()
        draws = _draw(keys, number, channels)
        room = (jnp.array([height, width] * 2, jnp.int32) - sides[level])[None]
        places = jnp.floor(draws.places * room.astype(draws.places.dtype))
        tried = propose(at, draws._replace(places=places.astype(jnp.int32)), level, sides[level])
        found = margin(tried)
        better = (least > 0) & ((found < least) | (found <= 0))
        at = jnp.where(better.reshape(-1, 1, 1, 1), tried, at)
        return number + 1, at, jnp.where(better, found, least)

    at = start(keys, images, epsilon, norm) if begun is None else begun.astype(images.dtype)
    return jax.lax.while_loop(unsolved, query, (jnp.asarray(first), at, margin(at)))[1]


def square_sides(height: int, width: int, norm: Norm) -> tuple[int, ...]:
    """Sides in pixels, from the first squares on; each as long as `HALVED` says.

    Examples:
      >>> square_sides(32, 32, "linf")
      (29, 20, 14, 10, 7, 5, 4, 3, 2, 1)
    """
    sides = []
    for level in range(len(HALVED) + 1):
        side = round(math.sqrt(P_INIT / 2**level * height * width))
        side = max(side, 1) if norm == "linf" else max(side, 3) // 2 * 2 + 1
        sides.append(min(side, height, width))
    return tuple(sides)


def start(keys: Array, images: Array, epsilon: ArrayLike, norm: Norm) -> Array:
    """Columns of ±epsilon for L-infinity; a grid of bumps for L2 and L1."""
    _, height, width, channels = images.shape
    side = height // TILES
    before = (height - TILES * side) // 2
    fitting = (1, width) if norm == "linf" else _fitting(height, width, side, before)

    def draw(key: Array) -> tuple[Array, Array]:
        signs_key, upright_key = jax.random.split(jax.random.fold_in(key, 0))
        signs = jax.random.rademacher(signs_key, (*fitting, channels), images.dtype)
        return signs, jax.random.bernoulli(upright_key, shape=fitting)

    return _start_from(*jax.vmap(draw)(keys), images, epsilon, norm)


def _start_from(
    signs: Array, upright: Array, images: Array, epsilon: ArrayLike, norm: Norm
) -> Array:
    """Of signs f[B, rows, columns, C] and upright bool[B, rows, columns] of the tiles."""
    count, height, width, channels = images.shape
    if norm == "linf":
        return jnp.clip(images + norms.per_example(epsilon, images) * signs, 0, 1)
    side = height // TILES
    before = (height - TILES * side) // 2
    rows, columns = _fitting(height, width, side, before)
    tile = jnp.asarray(bump(side, norm), images.dtype)
    grid = (1,) * 3 + tile.shape
    upright = upright[..., None, None]  # [B, rows, columns, 1, 1]
    tiles = jnp.where(upright, tile.T.reshape(grid), tile.reshape(grid))
    delta = jnp.einsum("brcyx,brcn->brycxn", tiles, signs)
    delta = delta.reshape(count, rows * side, columns * side, channels)
    after = (height - before - rows * side, width - before - columns * side)
    delta = jnp.pad(delta, ((0, 0), (before, after[0]), (before, after[1]), (0, 0)))
    return _put(delta, images, epsilon, norm)


def bump(side: int, norm: Norm) -> np.ndarray:
    """f64[side, side] of norm 1: a peak in the upper half and the same pit in the lower."""
    power = 2 if norm == "l2" else 4
    upper = side // 2
    halves = []
    for height in (upper, side - upper):
        rings = max(height, side) // 2 + 1
        heights = np.cumsum(1 / np.arange(rings, 0, -1.0) ** power)[::-1]
        rows, columns = np.abs(np.arange(height) - height // 2), np.abs(np.arange(side) - side // 2)
        half = heights[np.maximum(rows[:, None], columns[None])]
        halves.append(half / _size(half, norm) if height else half)
    whole = np.concatenate([halves[0], -halves[1]])
    return whole / _size(whole, norm)


def _size(array: np.ndarray, norm: Norm) -> float:
    return np.sqrt((array**2).sum()) if norm == "l2" else np.abs(array).sum()


def _fitting(height: int, width: int, side: int, before: int) -> tuple[int, int]:
    """How many tiles fit below and beside each other."""
    rows, columns = ((length - before) // side for length in (height, width))
    return min(rows, height // side), min(columns, width // side)


def _draw(keys: Array, number: ArrayLike, channels: int) -> Draw:
    def draw(key: Array) -> Draw:
        places_key, signs_key, upright_key = jax.random.split(
            jax.random.fold_in(key, number + 1), 3
        )
        return Draw(
            jax.random.uniform(places_key, (4,)),
            jax.random.rademacher(signs_key, (channels,), jnp.float32),
            jax.random.bernoulli(upright_key),
        )

    return jax.vmap(draw)(keys)


Propose = Callable[[Array, Draw, Array, Array], Array]  # (at, draws, level, side) -> points


def _window(images: Array, row: Array, column: Array, side: Array) -> Array:
    """bool[B, H, W, 1], True in each example's square."""

    def inside(first: Array, length: int) -> Array:
        offset = jnp.arange(length, dtype=jnp.int32)[None] - first[:, None]
        return (offset >= 0) & (offset < side)

    height, width = images.shape[1:3]
    return inside(row, height)[:, :, None, None] & inside(column, width)[:, None, :, None]


def _repaint(images: Array, epsilon: ArrayLike, norm: Norm) -> Propose:
    radius = norms.per_example(epsilon, images)

    def propose(at: Array, draws: Draw, level: Array, side: Array) -> Array:
        window = _window(images, draws.places[:, 0], draws.places[:, 1], side)
        color = 2 * radius * draws.signs[:, None, None].astype(at.dtype)
        return norms.project(jnp.where(window, at + color, at), images, epsilon, norm)

    return propose


def _move_mass(images: Array, epsilon: ArrayLike, norm: Norm) -> Propose:
    height, width, channels = images.shape[1:]
    radius = norms.per_example(epsilon, images)
    # Each size of bump in the middle of nothing; a slice of an image's size puts it anywhere.
    sides = square_sides(height, width, norm)
    bumps = np.zeros((len(sides), 2 * height, 2 * width))
    for level, side in enumerate(sides):
        bumps[level, height : height + side, width : width + side] = bump(side, norm)
    upright_bumps = np.zeros(bumps.shape)
    for level, side in enumerate(sides):
        upright_bumps[level, height : height + side, width : width + side] = bump(side, norm).T
    both = jnp.asarray(np.stack([bumps, upright_bumps]), images.dtype)

    def size(delta: Array) -> Array:
        """Of each channel, f[B, 1, 1, C]."""
        if norm == "l1":
            return jnp.abs(delta).sum((1, 2), keepdims=True)
        return jnp.sqrt(jnp.square(delta).sum((1, 2), keepdims=True))

    def propose(at: Array, draws: Draw, level: Array, side: Array) -> Array:
        row, column, other_row, other_column = draws.places.T
        window = _window(images, row, column, side)
        other = _window(images, other_row, other_column, side)
        delta = at - images
        inside = jnp.where(window, delta, 0)
        placed = jax.vmap(
            lambda upright, row, column: jax.lax.dynamic_slice(
                both[upright.astype(jnp.int32), level],
                (height - row, width - column),
                (height, width),
            )
        )(draws.upright, row, column)
        new = placed[..., None] * draws.signs[:, None, None].astype(at.dtype)
        new = new + inside / (1e-12 + size(inside))
        new = new / (1e-12 + size(new))
        held = size(jnp.where(window | other, delta, 0))
        whole = norms.size(delta, norm)
        if norm == "l2":
            unused = jnp.maximum(radius**2 - whole**2, 0)
            new = new * jnp.sqrt(unused / channels + held**2)
        else:
            unused = jnp.maximum(radius - whole, 0)
            new = new * (unused / channels + held) * channels
        delta = jnp.where(window, new, jnp.where(other, 0, delta))
        return _put(delta, images, epsilon, norm)

    return propose


def _put(delta: Array, images: Array, epsilon: ArrayLike, norm: Norm) -> Array:
    """L2: stretched to epsilon and clipped; L1: put back into the ball and the box."""
    if norm == "l1":
        return norms.project(images + delta, images, epsilon * (1 - 1e-6), norm)
    radius = norms.per_example(epsilon, images)
    return jnp.clip(images + radius * norms.normalize(delta, norm), 0, 1)
