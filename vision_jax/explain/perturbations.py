"""Explanations by what the score loses where parts of the image are taken away: no gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vision_jax.errors import UserError
from vision_jax.explain.forward import Forward, Target, Variables, score_of
from vision_jax.ops.resize import resize_bilinear

CELLS = 8  # along the shorter side of an image, where nothing else is asked for


def occlusion(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array | None = None,
    *,
    window: int = 0,
    stride: int = 0,
    baseline: ArrayLike = 0.0,
) -> jax.Array:
    """What the score loses under a sliding square (Zeiler and Fergus 2013, arXiv:1311.2901).

    A pixel has the mean of the losses of all squares over it; the last squares of a row or column
    may stand out of the image.

    Args:
      forward: the model.
      variables: its arrays.
      images: f[B, H, W, C] in [0, 1].
      target: what of the outputs is explained.
      keys: not used: nothing is drawn.
      window: side of the square in pixels; 0 for an eighth of the image's shorter side.
      stride: its steps in pixels, at most a window; 0 for half a window.
      baseline: what the square shows: a number, or f[B, H, W, C] or what broadcasts.

    Returns:
      f[B, H, W], score lost; negative where the score grows.
    """
    del keys
    height, width = images.shape[1:3]
    window = window or max(min(height, width) // CELLS, 1)
    stride = stride or max(window // 2, 1)
    if not 1 <= stride <= window <= min(height, width):
        raise UserError(
            f"window {window} and stride {stride}: give 1 <= stride <= window <= "
            f"{min(height, width)}, the image's shorter side"
        )
    starts = np.stack(
        np.meshgrid(
            *(np.arange(-(-(side - window) // stride) + 1) * stride for side in (height, width)),
            indexing="ij",
        ),
        axis=-1,
    ).reshape(-1, 2)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]

    def covered(start):
        top, left = start
        inside = (
            (rows >= top) & (rows < top + window) & (columns >= left) & (columns < left + window)
        )  # [H, W]
        return jnp.broadcast_to(inside[None], images.shape[:3])

    total = _sum_of_losses(forward, variables, images, target, covered, starts, baseline)
    counts = np.zeros((height, width))
    for top, left in starts:
        counts[top : top + window, left : left + window] += 1
    return total / jnp.asarray(counts, total.dtype)[None]


def feature_ablation(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array | None = None,
    *,
    cells: int = CELLS,
    baseline: ArrayLike = 0.0,
) -> jax.Array:
    """What the score loses without each cell of a grid over the image.

    See `ablate_segments` for parts of other shapes.

    Args:
      forward, variables, images, target, keys: see `occlusion`.
      cells: along each side.
      baseline: what stands in a cell's place.

    Returns:
      f[B, H, W], score lost; negative where the score grows.
    """
    del keys
    height, width = images.shape[1:3]
    if not 1 <= cells <= min(height, width):
        raise UserError(f"cells {cells}: give 1 to {min(height, width)}")
    grid = jnp.asarray(grid_segments((height, width), cells))
    segments = jnp.broadcast_to(grid[None], images.shape[:3])
    return ablate_segments(
        forward, variables, images, target, segments, count=cells**2, baseline=baseline
    )


def ablate_segments(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    segments: jax.Array,
    *,
    count: int,
    baseline: ArrayLike = 0.0,
) -> jax.Array:
    """What the score loses without each segment: superpixels, the masks of a segmenter.

    Args:
      forward, variables, images, target, baseline: see `occlusion`.
      segments: i32[B, H, W], numbered from 0.
      count: of them, in the image that has most.

    Returns:
      f[B, H, W]: of each pixel what its segment is worth.
    """
    steps = np.arange(count)
    return _sum_of_losses(
        forward, variables, images, target, lambda number: segments == number, steps, baseline
    )


def grid_segments(size: tuple[int, int], cells: int) -> np.ndarray:
    """i32[H, W]: the number of each pixel's cell, row by row, of `cells` along each side.

    Examples:
      >>> grid_segments((2, 3), 2).tolist()
      [[0, 0, 1], [2, 2, 3]]
    """
    row, column = (np.arange(side) * cells // side for side in size)
    return (row[:, None] * cells + column[None]).astype(np.int32)


def rise(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array,
    *,
    masks: int = 500,
    cells: int = CELLS - 1,
    keep: float = 0.5,
    baseline: ArrayLike = 0.0,
) -> jax.Array:
    """The mean of random masks, weighed by the score of what they leave (Petsiuk et al. 2018,
    https://arxiv.org/abs/1806.07421).

    Args:
      forward, variables, images: see `occlusion`.
      target: what of the outputs is explained, at least 0: a probability.
      keys: key[B], of each image's masks.
      masks: how many, one after another.
      cells: of the coarse masks, along each side.
      keep: share of the cells that stay, above 0, at most 1.
      baseline: what stands in the place of the others.

    Returns:
      f[B, H, W], the expected score given that the pixel is seen.
    """
    if masks < 1 or cells < 1 or not 0 < keep <= 1:
        raise UserError(
            f"masks {masks}, cells {cells}, keep {keep}: give 1 or more, 1 or more, and above 0"
        )
    base = jnp.broadcast_to(jnp.asarray(baseline, images.dtype), images.shape)

    def body(total, index):
        mask = coarse_masks(keys, index, images, cells, keep)  # [B, H, W]
        seen = base + (images - base) * mask[..., None]
        scores = score_of(forward, variables, seen, target)
        return total + scores[:, None, None] * mask.astype(scores.dtype), None

    dtype = jax.eval_shape(lambda x: score_of(forward, variables, x, target), images).dtype
    total, _ = jax.lax.scan(body, jnp.zeros(images.shape[:3], dtype), jnp.arange(masks))
    return total / (masks * keep)


def coarse_masks(
    keys: jax.Array, index: ArrayLike, images: jax.Array, cells: int, keep: float
) -> jax.Array:
    """RISE's masks f[B, H, W] in [0, 1]: cells drawn for each image, enlarged, and shifted."""
    height, width = images.shape[1:3]
    sides = -(-height // cells), -(-width // cells)  # of a cell
    large = tuple((cells + 1) * side for side in sides)

    def draw(key):
        grid_key, shift_key = jax.random.split(jax.random.fold_in(key, index))
        grid = jax.random.bernoulli(grid_key, keep, (cells, cells)).astype(images.dtype)
        enlarged = resize_bilinear(grid[None, ..., None], large)[0, ..., 0]
        shift = jax.random.randint(shift_key, (2,), 0, jnp.asarray(sides))
        return jax.lax.dynamic_slice(enlarged, (shift[0], shift[1]), (height, width))

    return jax.vmap(draw)(keys)


def _sum_of_losses(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    inside_of: Callable[[jax.Array], jax.Array],
    steps: np.ndarray,
    baseline: ArrayLike,
) -> jax.Array:
    """f[B, H, W]: the sum of what the score loses without the pixels inside, there alone.

    Args:
      forward, variables, images, target, baseline: see `occlusion`.
      inside_of: a step -> bool[B, H, W].
      steps: one after another.
    """
    base = jnp.broadcast_to(jnp.asarray(baseline, images.dtype), images.shape)
    whole = score_of(forward, variables, images, target)  # [B]

    def body(total, step):
        inside = inside_of(step)
        without = jnp.where(inside[..., None], base, images)
        lost = whole - score_of(forward, variables, without, target)  # [B]
        return total + jnp.where(inside, lost[:, None, None], 0), None

    empty = jnp.zeros(images.shape[:3], whole.dtype)
    return jax.lax.scan(body, empty, jnp.asarray(steps))[0]
