"""Preprocessing as a part of a graph: images of any size become what the host's transforms make.

A resize is two dots with matrices of weights, one along the width and one along the height. Weights
and sums are Pillow's fixed-point numbers (libImaging/Resample.c: 22 bits after the point, an 8-bit
image between the two passes), and the passes have the order of Pillow 13: images are equal to the
byte. A dot of float32 is exact for whole numbers below 2^24: each weight is split in two.

Sizes and weights are computed in float64 as on the host: by NumPy where an image's size is known
when the graph is made, and by the graph where it isn't.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax import platform
from vision_jax.data.detection_transforms import (
    ALIASED,
    DetectionPreprocessing,
    bounded_size,
    choose_bucket,
    resized_size,
)
from vision_jax.data.segmentation_transforms import SegmentationPreprocessing
from vision_jax.data.transforms import Preprocessing

POINT = 22  # bits of a weight after the point
HALF = 12  # of these, in the lower half
ABOVE_PIXELS = 512.0  # more than any grey level

Array = jax.Array
Sides = Any  # height and width, numbers or f64[n] each


class View(NamedTuple):
    """What a model sees.

    Attributes:
      images: f32[B, h, w, C] in [0, 1].
      inside: bool[n, h, w], n 1 or B: where the image is, and not what fills it up.
    """

    images: Array
    inside: Array


class Placed(NamedTuple):
    """A line of pixels, resized and cut or padded, as f64[n, 1, 1] or numbers.

    Attributes:
      old: its length.
      new: its length once it is resized.
      start: the place of the first output pixel on it, below 0 in padding.
      pixels: in the output.
    """

    old: Any
    new: Any
    start: Any
    pixels: int


def make_view(
    images: Array,
    preprocessing: Preprocessing | DetectionPreprocessing | SegmentationPreprocessing,
    sizes: Array | None = None,
) -> View:
    """Images as the host's transforms of evaluation make them.

    A detector's canvas is the bucket of the image's size, as in `predict`. Where the size is not
    known it is as high as the highest bucket and as wide as the widest, and holds any image.

    Args:
      images: u8[B, H, W, C]; H and W may be symbolic dimensions of jax.export.
      preprocessing: of the model. A segmenter's view "original", "short" or "pad" needs fixed H
        and W.
      sizes: i32[B, 2], (height, width) of what counts of each, at the top left; None: all of it.
    """
    known = sizes is None and all(type(side) is int for side in images.shape[1:3])
    xp: Any = np if known else jnp
    with jax.enable_x64(True):
        if sizes is None:
            size: Any = [xp.asarray(side).astype(xp.float64)[None] for side in images.shape[1:3]]
        else:
            size = [sizes[:, axis].astype(jnp.float64) for axis in (0, 1)]
        lines = _lines(preprocessing, size, xp)
        aliased = preprocessing.interpolation == ALIASED
        weights = [
            _neighbors(line, xp)
            if aliased
            else _weights(line, length, preprocessing.interpolation, xp)
            for line, length in zip(lines, images.shape[1:3], strict=True)
        ]
        there = [_inside(line, xp) for line in lines]
        upright = _rows_first(*lines, xp)  # bool[n]
    pixels = images.astype(jnp.float32)
    if aliased:  # not rounded in between
        for axis in (0, 1):
            pixels = _mixed(weights[axis], pixels, axis)
        pixels = jnp.round(pixels)
    else:
        pixels = _resampled(weights, upright, pixels)
    rows, columns = map(jnp.asarray, there)
    inside = rows[:, :, None] & columns[:, None, :]  # [n, h, w]
    fill = _fill(preprocessing)
    if any(fill):
        color = jnp.asarray(fill, jnp.float32).reshape(1, 1, 1, -1)
        pixels = jnp.where(inside[..., None], pixels, color)
    return View(pixels / 255, inside)


# Sizes --------------------------------------------------------------------------------------------


def _lines(preprocessing: Any, size: Sides, xp: Any) -> tuple[Placed, Placed]:
    """How rows and columns of images of `size` are placed, by data/*transforms.py's rules."""
    if isinstance(preprocessing, DetectionPreprocessing):
        counts = _canvas(preprocessing, size)
        new = _fitted(_detector_size(preprocessing, size, xp), counts, xp)
        starts: Sides = (0.0, 0.0)
    elif isinstance(preprocessing, SegmentationPreprocessing):
        new, counts = _segmenter_size(preprocessing, size)
        starts = (0.0, 0.0)
    else:
        new, counts = _resized(preprocessing, size, xp), preprocessing.image_size
        starts = tuple(
            _crop_start(side, count, preprocessing.crop_rule, xp)
            for side, count in zip(new, counts, strict=True)
        )

    def column(x):
        return xp.reshape(xp.asarray(x), (-1, 1, 1))

    rows, columns = (
        Placed(column(old), column(made), column(start), pixels)
        for old, made, start, pixels in zip(size, new, starts, counts, strict=True)
    )
    return rows, columns


def _canvas(own: DetectionPreprocessing, size: Sides) -> tuple[int, ...]:
    """(height, width) in pixels."""
    if isinstance(size[0], np.ndarray):
        height, width = (int(side.item()) for side in size)
        return own.buckets[choose_bucket(resized_size((height, width), own), own.buckets)]
    return tuple(max(bucket[axis] for bucket in own.buckets) for axis in (0, 1))


def _resized(own: Preprocessing, size: Sides, xp: Any) -> Sides:
    """`transforms.eval_transform`'s size before the crop."""
    height, width = size
    target_h, target_w = (float(math.floor(side / own.crop_pct)) for side in own.image_size)
    if own.crop_mode == "squash":
        return target_h, target_w
    if own.crop_mode == "center" and target_h == target_w:
        upright = width <= height
        return (
            xp.where(upright, xp.floor(target_w * height / width), target_h),
            xp.where(upright, target_w, xp.floor(target_h * width / height)),
        )
    choose = xp.maximum if own.crop_mode == "border" else xp.minimum
    ratio = choose(height / target_h, width / target_w)
    return xp.round(height / ratio), xp.round(width / ratio)


def _crop_start(side: Any, count: int, rule: str, xp: Any) -> Any:
    """`transforms.center_crop`: of a side that is shorter than `count` the padding, negative."""
    padding = xp.maximum(count - side, 0.0)
    room = xp.maximum(side - count, 0.0)
    if rule == "transformers":
        return xp.floor(room / 2) - xp.floor((padding + (padding > 0)) / 2)
    return xp.round(room / 2) - xp.floor(padding / 2)


def _detector_size(own: DetectionPreprocessing, size: Sides, xp: Any) -> Sides:
    """`detection_transforms.resized_size`."""
    height, width = size
    side = float(own.short)
    if own.square:
        return side, side
    least, most = xp.minimum(height, width), xp.maximum(height, width)
    if own.rule == "letterbox":
        scale = xp.minimum(side / height, side / width)
    elif own.rule == "torchvision":
        scale = xp.minimum(side / least, own.longest / most)
    else:
        long = most / least * side > own.longest
        exact = xp.where(long, own.longest * least / most, side)
        short = xp.where(long, xp.round(exact), side)
        as_it_is = (least == short) & (most <= own.longest)
        short = xp.maximum(short, 1.0)
        upright = width < height
        rows = xp.where(upright, xp.maximum(xp.floor(exact * height / width), 1.0), short)
        columns = xp.where(upright, short, xp.maximum(xp.floor(exact * width / height), 1.0))
        return xp.where(as_it_is, height, rows), xp.where(as_it_is, width, columns)
    return tuple(xp.maximum(xp.floor(x * scale), 1.0) for x in size)


def _fitted(size: Sides, canvas: tuple[int, ...], xp: Any) -> Sides:
    """`detection_transforms.fit`."""
    excess = xp.maximum(size[0] / canvas[0], size[1] / canvas[1])
    return tuple(
        xp.where(excess <= 1, side, xp.clip(xp.round(side / excess), 1.0, float(limit)))
        for side, limit in zip(size, canvas, strict=True)
    )


def _segmenter_size(
    own: SegmentationPreprocessing, size: Sides
) -> tuple[tuple[int, int], tuple[int, int]]:
    """`segmentation_transforms.segmentation_eval_transform`'s: of the image, and of the canvas."""
    if own.view in ("squash", "windows"):
        return own.image_size, own.image_size
    height, width = (int(side.item()) for side in size)
    if own.view == "pad":
        side = own.image_size[0]
        return bounded_size((height, width), side, side), own.image_size
    if own.view == "short":
        new, short = min(own.image_size), min(height, width)
        height, width = int(new * height / short), int(new * width / short)
    return (height, width), (height, width)


def _fill(preprocessing: Any) -> tuple[int, ...]:
    """Grey levels beyond the image."""
    if isinstance(preprocessing, Preprocessing) and preprocessing.crop_mode == "border":
        return tuple(round(255 * mean) for mean in preprocessing.mean)
    return (0,)


# Weights ------------------------------------------------------------------------------------------


def _inside(line: Placed, xp: Any) -> Any:
    """bool[n, count]: the output pixels that are on the line."""
    at = xp.arange(line.pixels)[None] + line.start[..., 0]
    return (at >= 0) & (at < line.new[..., 0])


def _weights(line: Placed, length: Any, interpolation: str, xp: Any) -> Any:
    """f64[n, count, length]: what each output pixel takes of each pixel of the line."""
    at = xp.arange(line.pixels)[None, :, None] + line.start
    there = (at >= 0) & (at < line.new)
    pixel = xp.arange(length)[None, None]
    scale = line.old / line.new
    center = (at + 0.5) * scale
    if interpolation == "nearest":
        if xp is np:  # Pillow adds steps up, whose sum may fall short of a whole number
            steps = np.full(int(line.new.item()), scale.item())
            steps[0] /= 2
            center = np.add.accumulate(steps)[np.clip(at, 0, len(steps) - 1).astype(int)]
        return xp.where(there & (pixel == xp.floor(center)), 1.0, 0.0)
    reach, curve = FILTERS[interpolation]
    stretch = xp.maximum(scale, 1.0)
    first = xp.maximum(xp.floor(center - reach * stretch + 0.5), 0.0)
    last = xp.minimum(xp.floor(center + reach * stretch + 0.5), line.old)
    seen = (pixel >= first) & (pixel < last)
    weights = xp.where(seen, curve((pixel - center + 0.5) / stretch, xp), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights * (1 / xp.where(total == 0, 1.0, total))
    return xp.where(there, weights, 0.0)


def _box(x: Any, xp: Any) -> Any:
    return xp.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bilinear(x: Any, xp: Any) -> Any:
    return xp.maximum(1 - xp.abs(x), 0.0)


def _hamming(x: Any, xp: Any) -> Any:
    x = xp.abs(x)
    turned = xp.where(x == 0, 1.0, x) * math.pi
    curve = xp.sin(turned) / turned * (0.54 + 0.46 * xp.cos(turned))
    return xp.where(x == 0, 1.0, xp.where(x >= 1, 0.0, curve))


def _bicubic(x: Any, xp: Any) -> Any:
    a = -0.5
    x = xp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return xp.where(x < 1, near, xp.where(x < 2, far, 0.0))


def _lanczos(x: Any, xp: Any) -> Any:
    def sinc(x):
        turned = xp.where(x == 0, 1.0, x) * math.pi
        return xp.where(x == 0, 1.0, xp.sin(turned) / turned)

    return xp.where((x >= -3) & (x < 3), sinc(x) * sinc(x / 3), 0.0)


# Name -> (half of the width that it sees, its curve).
FILTERS: dict[str, tuple[float, Callable[[Any, Any], Any]]] = {
    "box": (0.5, _box),
    "bilinear": (1.0, _bilinear),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, _lanczos),
}


def _rows_first(rows: Placed, columns: Placed, xp: Any) -> Any:
    """bool[n]: whether Pillow 13 resizes along the height first; inferred from what it computes."""
    down, across = rows.old - rows.new, columns.old - columns.new
    return ((down > 0) & (down > 2 * across))[:, 0, 0]


# Dots ---------------------------------------------------------------------------------------------


def _resampled(weights: Any, upright: Any, pixels: Array) -> Array:
    """Grey levels f32[B, h, w, C] of f32[B, H, W, C], rows first where `upright` bool[n] is."""

    def rows_first(pixels):
        return _fixed_point(weights[1], _fixed_point(weights[0], pixels, 0), 1)

    def columns_first(pixels):
        return _fixed_point(weights[0], _fixed_point(weights[1], pixels, 1), 0)

    if isinstance(upright, np.ndarray):
        return (rows_first if upright.item() else columns_first)(pixels)
    if upright.shape[0] == 1 and platform.current() != platform.NO_LOOPS:
        return jax.lax.cond(upright[0], rows_first, columns_first, pixels)
    return jnp.where(upright[:, None, None, None], rows_first(pixels), columns_first(pixels))


def _fixed_point(weights: Any, pixels: Array, axis: int) -> Array:
    """Grey levels f32[B, h, w, C] of grey levels f32[B, H, W, C], of whole numbers both."""
    xp: Any = np if isinstance(weights, np.ndarray) else jnp
    if xp is np and np.array_equal(weights, np.eye(weights.shape[-1])[None]):
        return pixels  # of that size already
    with jax.enable_x64(True):
        whole = xp.sign(weights) * xp.floor(xp.abs(weights) * 2**POINT + 0.5)
        high = xp.floor(whole / 2**HALF + 0.5)
        low = whole - high * 2**HALF
        halves = [jnp.asarray(half).astype(jnp.float32) for half in (high, low)]
    high, low = (_dot(half, pixels, axis) for half in halves)
    # (high · 2^HALF + low + 2^(POINT - 1)) >> POINT, of which nothing may exceed 2^24: runtimes
    # (OpenVINO) compute int32 in float32, too.
    carried = jnp.floor((low + 2.0 ** (POINT - 1)) * 2.0**-HALF)
    return jnp.clip(jnp.floor((high + carried) * 2.0 ** (HALF - POINT)), 0, 255)


def _neighbors(line: Placed, xp: Any) -> tuple[Any, Any, Any, Any]:
    """(places i32[n, pixels] of the two pixels that each output mixes, their shares f32)."""
    at = xp.arange(line.pixels)[None] + line.start[..., 0]
    old, new = line.old[..., 0], line.new[..., 0]
    center = xp.clip((at + 0.5) * (old / new) - 0.5, 0.0, old - 1)
    first = xp.floor(center)
    second = xp.minimum(first + 1, old - 1)
    share = (center - first).astype(xp.float32)
    there = (at >= 0) & (at < new)
    shares = (xp.where(there, x, xp.zeros_like(x)) for x in (1 - share, share))
    return *(x.astype(xp.int32) for x in (first, second)), *shares


def _mixed(neighbors: Any, pixels: Array, axis: int) -> Array:
    """Two pixels of each line along axis 1 + `axis` of f32[B, H, W, C] by their shares.

    Products are rounded before they are added, as the host's are: an operation between the two,
    which changes nothing, keeps compilers from computing both at once (barriers are gone by then).
    """
    first, second, near, far = map(jnp.asarray, neighbors)
    shape = (-1, first.shape[1], 1, 1) if axis == 0 else (-1, 1, first.shape[1], 1)

    def product(place, share):
        if place.shape[0] == 1:
            taken = jnp.take(pixels, place[0], axis=1 + axis, mode="clip")
        else:
            taken = jax.vmap(lambda x, i: jnp.take(x, i, axis=axis, mode="clip"))(pixels, place)
        return jnp.minimum(taken * share.reshape(shape), ABOVE_PIXELS)

    return product(first, near) + product(second, far)


def _dot(weights: Array, pixels: Array, axis: int) -> Array:
    """Weights f32[n, m, S] along axis 1 + `axis` of f32[B, H, W, C]."""
    batch = "" if weights.shape[0] == 1 else "b"
    if not batch:
        weights = weights[0]
    sums = f"{batch}hH,bHWc->bhWc" if axis == 0 else f"{batch}wW,bHWc->bHwc"
    return jnp.einsum(sums, weights, pixels, precision="highest")
