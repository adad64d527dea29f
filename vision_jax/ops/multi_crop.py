"""Views of images on the device: random crops of several sizes, each augmented by its own draw.

DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294), section 3.1 and its code's
DataAugmentationDINO, after BYOL and SwAV: two global crops and several smaller local ones, flipped
and jittered in color, some grey, blurred or solarized. Each operation is torchvision's
(transforms.v2.functional) on numbers that are not rounded, crops as products with matrices, so that
all shapes are fixed. All randomness follows from the key, whatever the devices.

Images are f32[B, H, W, C] in [0, 1], C is 3 where colors change, and stay in [0, 1].
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.ops import augment
from vision_jax.ops.position_embedding import CUBIC

ASPECTS = (3 / 4, 4 / 3)  # width / height of a crop
TRIES = 10  # to draw a window that fits
SOLARIZED = 128 / 255  # from here on a solarized pixel is inverted
BLUR_REACH = 4  # pixels on each side: torchvision's GaussianBlur(9), as DINOv2 has it
JITTERED, GREY = 0.8, 0.2  # shares of the views
# Half the range of the factor of brightness, contrast and saturation, and of the hue's turn.
STRENGTHS = (0.4, 0.4, 0.2, 0.1)
SIMCLR_STRENGTHS = (0.8, 0.8, 0.8, 0.2)  # Chen et al. 2020, appendix A


@dataclass(frozen=True)
class Crop:
    """A kind of view.

    Attributes:
      size: pixels a side.
      scale: smallest and largest share of the image's area.
      blurred: share of the views that are blurred, of the first of each image, the second and so
        on: as many as there are.
      solarized: share of the views that are solarized, as many.
      sigmas: smallest and largest standard deviation of the blur in pixels; () blurs none.
      jitter: strength of changed colors, 1 the paper's; 0 changes none, nor makes any grey.
      strengths: half the ranges of brightness, contrast, saturation and hue at jitter 1.
    """

    size: int
    scale: tuple[float, float]
    blurred: tuple[float, ...]
    solarized: tuple[float, ...]
    sigmas: tuple[float, ...] = (0.1, 2.0)
    jitter: float = 1.0
    strengths: tuple[float, float, float, float] = STRENGTHS


def make_views(key: jax.Array, images: jax.Array, crop: Crop) -> jax.Array:
    """f32[V, B, size, size, C]: the views of each image.

    Computed one after the other, as one program: the largest array is of one view of each image.
    """
    keys = jax.random.split(key, len(crop.blurred))
    shares = jnp.array([crop.blurred, crop.solarized], jnp.float32).T  # [V, 2]
    return lax.map(lambda drawn: _make_view(drawn[0], drawn[1], images, crop), (keys, shares))


def in_turn(views: jax.Array) -> jax.Array:
    """f[B·V, ...] of views f[V, B, ...]: an image's stay together, and so on one device."""
    return views.swapaxes(0, 1).reshape(-1, *views.shape[2:])


def by_view(array: jax.Array, count: int) -> jax.Array:
    """f[V, B, D] of f[B·V, D], B being `count`."""
    return array.reshape(count, -1, array.shape[-1]).swapaxes(0, 1)


def _make_view(key: jax.Array, shares: jax.Array, images: jax.Array, crop: Crop) -> jax.Array:
    """f32[B, size, size, C], of shares f32[2] that are blurred and solarized."""
    batch = len(images)
    box_key, flip_key, color_key, blur_key, solarize_key = jax.random.split(key, 5)
    size = (images.shape[1], images.shape[2])
    windows = draw_windows(box_key, batch, size, crop.scale)
    x = crop_and_resize(images, windows, crop.size, _longest(size, crop.scale[1]))
    flipped = jax.random.bernoulli(flip_key, 0.5, (batch,))
    x = _where(flipped, x[:, :, ::-1], x)
    if crop.jitter:
        x = change_colors(color_key, x, crop.jitter, crop.strengths)
    if any(crop.blurred) and crop.sigmas:
        sigma_key, chosen_key = jax.random.split(blur_key)
        low, high = crop.sigmas
        sigmas = jax.random.uniform(sigma_key, (batch,), minval=low, maxval=high)
        chosen = jax.random.bernoulli(chosen_key, shares[0], (batch,))
        x = _where(chosen, blur(x, sigmas), x)
    if any(crop.solarized):
        chosen = jax.random.bernoulli(solarize_key, shares[1], (batch,))
        x = _where(chosen, jnp.where(x >= SOLARIZED, 1 - x, x), x)
    return x


def _where(chosen: jax.Array, changed: jax.Array, images: jax.Array) -> jax.Array:
    """By image."""
    return jnp.where(chosen[:, None, None, None], changed, images)


# Geometry -----------------------------------------------------------------------------------------


def draw_windows(
    key: jax.Array, count: int, size: tuple[int, int], scale: tuple[float, float]
) -> jax.Array:
    """Windows i32[count, 4] as (top, left, height, width), drawn as RandomResizedCrop does.

    The area is uniform in `scale`, the logarithm of width / height uniform; the first of ten draws
    that fits counts, and otherwise the largest central window of an aspect that may be.
    """
    height, width = size
    areas_key, aspects_key, places_key = jax.random.split(key, 3)
    low, high = scale
    areas = jax.random.uniform(areas_key, (count, TRIES), minval=low, maxval=high)
    areas *= height * width
    low, high = (math.log(aspect) for aspect in ASPECTS)
    aspects = jnp.exp(jax.random.uniform(aspects_key, (count, TRIES), minval=low, maxval=high))
    heights = jnp.round(jnp.sqrt(areas / aspects)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas * aspects)).astype(jnp.int32)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first, rows = jnp.argmax(fits, axis=1), jnp.arange(count)
    h, w = heights[rows, first], widths[rows, first]
    room = jnp.stack([height - h, width - w], axis=1)
    corner = jax.random.uniform(places_key, (count, 2)) * (room + 1).astype(jnp.float32)
    corner = corner.astype(jnp.int32)
    drawn = jnp.concatenate([jnp.minimum(corner, room), h[:, None], w[:, None]], axis=1)
    most = _largest(height, width)
    central = jnp.array([[(height - most[0]) // 2, (width - most[1]) // 2, *most]], jnp.int32)
    return jnp.where(fits.any(1, keepdims=True), drawn, central)


def _largest(height: int, width: int) -> tuple[int, int]:
    if width / height < ASPECTS[0]:
        return round(width / ASPECTS[0]), width
    if width / height > ASPECTS[1]:
        return height, round(height * ASPECTS[1])
    return height, width


def _longest(size: tuple[int, int], largest_share: float) -> float:
    """Pixels that a side of a window of `draw_windows` has at most."""
    longest = math.sqrt(largest_share * size[0] * size[1] * ASPECTS[1]) + 1
    # A window that may not fit has the central one in its place.
    return longest if longest < min(size) else max(longest, *_largest(*size))


def crop_and_resize(
    images: jax.Array, windows: jax.Array, size: int, longest: float = math.inf
) -> jax.Array:
    """f32[B, size, size, C]: windows i32[B, 4] of images, resized by an antialiased cubic.

    No pixel outside of a window has a part in it: torchvision's resized_crop(antialias=True).

    Args:
      images: f32[B, H, W, C].
      windows: (top, left, height, width) of each, inside of its image.
      size: pixels a side of what comes out.
      longest: pixels that a window's side has at most, where that is known.
    """
    top, left, height, width = windows.T.astype(jnp.float32)
    x = _resize_rows(images, top, height, size, longest)
    x = _resize_rows(x.swapaxes(1, 2), left, width, size, longest).swapaxes(1, 2)
    return jnp.clip(x, 0, 1)


ROWS = 32  # resized together, by one matrix, where there are so many


def _resize_rows(
    images: jax.Array, start: jax.Array, length: jax.Array, new: int, longest: float
) -> jax.Array:
    """f32[B, new, W, C]: `length` f32[B] rows of images from `start` f32[B] on, as so many.

    As a product with one matrix for all rows most of its numbers are zeros. Rows that follow one
    another see a band of the image; with a matrix for each band the rest is left out.
    """
    batch, old, *rest = images.shape
    together = min(ROWS, new)
    scale = (length / new)[:, None]  # [B, 1]
    stretch = jnp.maximum(scale, 1)
    most = min(longest, old) / new
    band = min(old, math.ceil((together - 1) * most + 4 * max(most, 1)) + 2)
    rows = jnp.arange(-(-new // together) * together, dtype=jnp.float32) + 0.5
    rows = rows.reshape(1, -1, together)  # [1, K, together], the last ones beyond the last row
    centers = start[:, None, None] + rows * scale[..., None]  # [B, K, together]
    low = jnp.floor(centers[:, :, 0] - 2 * stretch).astype(jnp.int32)
    low = jnp.clip(low, 0, old - band)  # [B, K]
    places = (low[..., None] + jnp.arange(band)[None, None]).astype(jnp.float32) + 0.5
    places = places[:, :, None]  # [B, K, 1, band]
    distances = jnp.abs(places - centers[..., None]) / stretch[..., None, None]
    near = ((CUBIC + 2) * distances - (CUBIC + 3)) * distances**2 + 1
    far = ((distances - 5) * distances + 8) * distances * CUBIC - 4 * CUBIC
    weights = jnp.where(distances < 1, near, jnp.where(distances < 2, far, 0.0))
    begin, end = (x[:, None, None, None] for x in (start, start + length))
    weights = jnp.where((places > begin) & (places < end), weights, 0.0)
    total = weights.sum(-1, keepdims=True)  # 0 beyond the last row
    weights /= jnp.where(total > 0, total, 1)
    cut = jax.vmap(jax.vmap(lax.dynamic_slice_in_dim, (None, 0, None)), (0, 0, None))
    bands = cut(images.reshape(batch, old, -1), low, band)  # [B, K, band, W·C]
    exact = lax.Precision.HIGHEST  # of 8 bits and more
    resized = jnp.einsum("bkoj,bkjn->bkon", weights, bands, precision=exact)
    return resized.reshape(batch, -1, *rest)[:, :new]


def blur(images: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Images blurred by a Gaussian of each one's own f32[B] pixels, mirrored beyond their edges."""
    offsets = jnp.arange(-BLUR_REACH, BLUR_REACH + 1, dtype=jnp.float32)
    kernel = jnp.exp(-((offsets[None] / sigmas[:, None]) ** 2) / 2)  # [B, k]
    kernel /= kernel.sum(1, keepdims=True)
    for axis in (1, 2):
        around = [(BLUR_REACH,) * 2 if i == axis else (0, 0) for i in range(images.ndim)]
        padded = jnp.pad(images, around, mode="reflect")
        images = sum(
            weights[:, None, None, None]
            * lax.slice_in_dim(padded, offset, offset + images.shape[axis], axis=axis)
            for offset, weights in enumerate(kernel.T)
        )
    return jnp.clip(images, 0, 1)


# Colors -------------------------------------------------------------------------------------------


def change_colors(
    key: jax.Array,
    images: jax.Array,
    strength: float,
    strengths: tuple[float, float, float, float] = STRENGTHS,
) -> jax.Array:
    """Brightness, contrast, saturation and hue of most images, and some without color.

    The order of the four is drawn for all images of the batch together, their factors for each.
    """
    order_key, factor_key, jitter_key, grey_key = jax.random.split(key, 4)
    batch = len(images)
    limits = strength * jnp.array(strengths, jnp.float32)
    factors = jax.random.uniform(factor_key, (4, batch), minval=-1) * limits[:, None]
    branches = [jax.vmap(change) for change in (*_BLENDS, turn_hue)]

    def change(x, which):
        return lax.switch(which, branches, x, factors[which]), None

    jittered, _ = lax.scan(change, images, jax.random.permutation(order_key, 4))
    chosen = jax.random.bernoulli(jitter_key, JITTERED, (batch,))
    images = _where(chosen, jittered, images)
    grey = jnp.broadcast_to(jax.vmap(augment.color)(images, -jnp.ones(batch)), images.shape)
    return _where(jax.random.bernoulli(grey_key, GREY, (batch,)), grey, images)


_BLENDS = (augment.brightness, augment.contrast, augment.color)


def turn_hue(image: jax.Array, turn: jax.Array) -> jax.Array:
    """An image f32[H, W, 3] whose hue is turned by so many whole turns."""
    highest, lowest = image.max(-1), image.min(-1)
    span = highest - lowest
    red, green, blue = (image[..., channel] for channel in range(3))
    slope = 1 / jnp.where(span > 0, span, 1)
    hue = jnp.where(
        highest == red,
        (green - blue) * slope,
        jnp.where(highest == green, 2 + (blue - red) * slope, 4 + (red - green) * slope),
    )
    hue = hue / 6 + turn
    channels = []
    for offset in (5, 3, 1):
        place = hue + offset / 6
        place = 6 * (place - jnp.floor(place))  # jnp.mod has no vector instructions
        channels.append(highest - span * jnp.clip(jnp.minimum(place, 4 - place), 0, 1))
    return jnp.stack(channels, axis=-1)


# Masked patches -----------------------------------------------------------------------------------

BLOCKS = 8  # rectangles that are tried for a mask
LEAST_BLOCK = 4  # patches


def draw_masks(
    key: jax.Array,
    count: int,
    grid: tuple[int, int],
    *,
    share: float,
    ratio: tuple[float, float],
) -> jax.Array:
    """bool[count, h·w]: patches that are masked, in blocks, of a share of the images.

    iBOT's blockwise masking (BEiT's): rectangles of at least 4 patches and an aspect of 0.3 to its
    inverse, one after the other until the number is reached that is drawn for the image, from
    `ratio` of its patches; here the number is met exactly, the last rectangle in part.

    Args:
      key: of the draw.
      count: of images.
      grid: (rows, columns) of patches.
      share: of the images that have masked patches.
      ratio: smallest and largest share of an image's patches.
    """
    rows, columns = grid
    patches = rows * columns
    image_key, ratio_key, area_key, aspect_key, place_key, noise_key = jax.random.split(key, 6)
    low, high = ratio
    wanted = jax.random.uniform(ratio_key, (count,), minval=low, maxval=high)
    number = jnp.floor(wanted * patches)  # [B]
    number = jnp.where(jax.random.bernoulli(image_key, share, (count,)), number, 0)
    most = jnp.maximum(number, LEAST_BLOCK)[:, None]
    area = LEAST_BLOCK + jax.random.uniform(area_key, (count, BLOCKS)) * (most - LEAST_BLOCK)
    limit = math.log(0.3)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (count, BLOCKS), minval=limit, maxval=-limit))
    heights = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, rows)
    widths = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, columns)
    room = jnp.stack([rows - heights, columns - widths])
    top, left = jnp.floor(jax.random.uniform(place_key, room.shape) * (room + 1))
    y, x = (jnp.asarray(axis.ravel(), jnp.float32)[None, None] for axis in np.indices(grid))
    top, left, bottom, right = (
        edge[..., None] for edge in (top, left, top + heights, left + widths)
    )
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # [B, blocks, N]
    first = jnp.where(inside.any(1), inside.argmax(1), BLOCKS)  # the block that brings a patch
    rank = first.astype(jnp.float32) + jax.random.uniform(noise_key, (count, patches))
    place = jnp.argsort(jnp.argsort(rank, axis=1), axis=1)
    return place < number.astype(place.dtype)[:, None]


def most_masked(grid: tuple[int, int], ratio: tuple[float, float]) -> int:
    """Patches of an image that `draw_masks` masks at most."""
    return int(ratio[1] * grid[0] * grid[1])
