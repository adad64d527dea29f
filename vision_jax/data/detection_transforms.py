"""Image geometry with boxes on the host: sizes, canvases, and augmentations that boxes follow.

Boxes are f64[T, 4] corners x, y, x, y in pixels. Each function is pure; the random ones draw from
the generator they are given. Resampling is Pillow's, as in data/transforms.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from vision_jax.data.transforms import INTERPOLATIONS, flip_image, resize, to_channels
from vision_jax.errors import UserError

STRIDE = 32  # of default canvases: what detectors divide their input by
ALIASED = "bilinear_aliased"
STRIP = 32  # rows that are resized at once, whose floats stay in a cache
RULES = ("detr", "torchvision", "letterbox")  # of sizes, see resized_size
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601-2


@dataclass(frozen=True)
class DetectionPreprocessing:
    """What a detector expects of its images; it travels with the weights.

    The short side becomes `short`, unless the long side would exceed `longest` then; `rule` says
    how, see `resized_size`. With `square` both sides become `short`, whatever the
    aspect ratio. `interpolation` is Pillow's, antialiased, or "bilinear_aliased", which is bilinear
    without antialiasing, as transformers' RfDetrImageProcessor and torchvision's detectors have it.
    `mean` and `std` are per channel, for images in [0, 1]; the model applies them, the host
    doesn't. `buckets` are the canvases, (height, width), that images are padded to at the bottom
    and right: one compilation each.
    """

    short: int
    longest: int
    square: bool
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    buckets: tuple[tuple[int, int], ...]
    rule: str = "detr"

    def __post_init__(self):
        if self.rule not in RULES:
            raise UserError(f"preprocessing rule {self.rule!r}: use one of {', '.join(RULES)}")
        for field in ("mean", "std"):  # model.json has lists
            object.__setattr__(self, field, tuple(getattr(self, field)))
        object.__setattr__(self, "buckets", tuple((h, w) for h, w in self.buckets))
        known = (*INTERPOLATIONS, ALIASED)
        if self.interpolation not in known:
            raise UserError(
                f"preprocessing interpolation {self.interpolation!r}: use one of {', '.join(known)}"
            )
        if not 0 < self.short <= self.longest:
            raise UserError(
                f"preprocessing short {self.short}, longest {self.longest}: use 0 < short ≤ longest"
            )
        if not self.buckets or min(min(bucket) for bucket in self.buckets) < 1:
            raise UserError(f"preprocessing buckets {self.buckets}: use pairs (height, width)")
        if self.on_squares and (self.short, self.short) not in self.buckets:
            raise UserError(
                f"preprocessing buckets {self.buckets}: square images of {self.short} need the"
                f" bucket ({self.short}, {self.short})"
            )

    @property
    def on_squares(self) -> bool:
        """Whether images of each short side come on a square of it."""
        return self.square or self.rule == "letterbox"

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the smallest canvas, with which a model of any size is planned."""
        return min(self.buckets, key=lambda bucket: bucket[0] * bucket[1])


@dataclass(frozen=True)
class DetectionAugmentation:
    """Random changes of training images.

    `shorts`: short sides, one of which is drawn for each batch; () is the preprocessing's. `flip`:
    mirror half of the images. `crop`: the share of images of which a window is cut out. For its
    size the image is imagined at a short side that is drawn from `crop_resize`; the window's sides
    are drawn, each on its own, from `crop_size` there, as far as the image reaches. Both are
    relative to the preprocessing's `short`; the defaults are DETR's 400, 500, 600 and 384–600 at
    800. `brightness`, `contrast`, `saturation`: factors are drawn from 1 ± these. `mosaic`: the
    share of images that become a part of four, scaled by a factor of `mosaic_scale`, and `mixup`
    the share of those that are mixed with a fifth (data/mosaic.py), both before batch `plain_from`.
    """

    shorts: tuple[int, ...] = ()
    flip: bool = True
    crop: float = 0.0
    crop_resize: tuple[float, ...] = (0.5, 0.625, 0.75)
    crop_size: tuple[float, float] = (0.48, 0.75)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    mosaic: float = 0.0
    mosaic_scale: tuple[float, float] = (0.5, 1.5)
    mixup: float = 0.0
    plain_from: float = math.inf

    def __post_init__(self):
        if self.shorts and min(self.shorts) < 1:
            raise UserError(f"augmentation shorts {self.shorts}: use numbers of pixels")
        for field in ("crop", "mosaic", "mixup"):
            if not 0 <= getattr(self, field) <= 1:
                value = getattr(self, field)
                raise UserError(f"augmentation {field} {value}: use a share of the images, 0 to 1")
        if not 0 < self.mosaic_scale[0] <= self.mosaic_scale[1]:
            raise UserError(f"augmentation mosaic_scale {self.mosaic_scale}: use 0 < least ≤ most")
        if not self.crop_resize or min(self.crop_resize) <= 0:
            raise UserError(f"augmentation crop_resize {self.crop_resize}: use positive numbers")
        if not 0 < self.crop_size[0] <= self.crop_size[1]:
            raise UserError(f"augmentation crop_size {self.crop_size}: use 0 < least ≤ most")
        for field in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"augmentation {field} {getattr(self, field)}: use 0 to 1")


# --- sizes --------------------------------------------------------------------------------------


def resized_size(
    size: tuple[int, int], preprocessing: DetectionPreprocessing, short: int | None = None
) -> tuple[int, int]:
    """(height, width) of an image of `size` after the resize; `short` replaces preprocessing.short.

    By the rule "detr" the short side becomes `short` and the long side is rounded down; if the long
    side would exceed `longest`, it becomes that, and the short side is rounded. Equal to
    transformers 5.23, DetrImageProcessor, but for two corners: transformers leaves an image alone
    whose short side is right already, even if it is longer than `longest` (300 × 641 at 480 and
    640); and it fails on strips whose short side rounds to 0, which is 1 here.

    By the rule "letterbox" the image becomes as large as a square of `short` holds, both sides
    rounded down. Equal to pixeltable-yolox 0.4.3, `preproc`, whose canvases are these squares.

    By the rule "torchvision" both sides are rounded down, and may miss `short` by one where a float
    falls short of it. Equal to torchvision 0.29, GeneralizedRCNNTransform.
    """
    height, width = size
    side = preprocessing.short if short is None else short
    if preprocessing.square:
        return side, side
    if preprocessing.rule == "letterbox":
        scale = min(side / height, side / width)
        return max(int(height * scale), 1), max(int(width * scale), 1)
    least, most = min(size), max(size)
    if preprocessing.rule == "torchvision":
        scale = min(side / least, preprocessing.longest / most)
        return max(int(height * scale), 1), max(int(width * scale), 1)
    return bounded_size(size, side, preprocessing.longest)


def bounded_size(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """(height, width) of an image of `size` by the rule "detr" of `resized_size`."""
    (height, width), least, most = size, min(size), max(size)
    exact: float = short
    if most / least * short > longest:
        exact = longest * least / most
        short = round(exact)
    if least == short and most <= longest:
        return size
    short = max(short, 1)
    if width < height:
        return max(int(exact * height / width), 1), short
    return short, max(int(exact * width / height), 1)


def default_buckets(short: int, longest: int, count: int) -> tuple[tuple[int, int], ...]:
    """`count` canvases, multiples of 32, that hold every image resized to (short, longest).

    Landscape ones of evenly spaced widths, the same upright, and a square of the short side if
    `count` is odd; 1 is a square of the long side. Sides may coincide; there are fewer canvases
    then.
    """
    if count < 1 or not 0 < short <= longest:
        raise UserError(f"{count} buckets for {short} to {longest}: use 1 or more, short ≤ longest")

    def ceil(side: float) -> int:
        return math.ceil(side / STRIDE) * STRIDE

    if count == 1:
        return ((ceil(longest), ceil(longest)),)
    steps = count // 2
    sides = [ceil(short + (longest - short) * step / steps) for step in range(1, steps + 1)]
    buckets = [bucket for side in sides for bucket in ((ceil(short), side), (side, ceil(short)))]
    return tuple(dict.fromkeys([(ceil(short), ceil(short))] * (count % 2) + buckets))


def choose_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> int:
    """Which canvas an image of `size` goes to: the smallest that holds it.

    If none does, the one that it has to shrink least for.
    """
    height, width = size

    def badness(bucket: int) -> tuple[float, int]:
        h, w = buckets[bucket]
        return max(height / h, width / w, 1.0), h * w

    return min(range(len(buckets)), key=badness)


def fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """`size`, shrunk if necessary so that the canvas holds it; no side is less than 1."""
    excess = max(size[0] / canvas[0], size[1] / canvas[1])
    if excess <= 1:
        return size
    height, width = (
        min(max(round(side / excess), 1), limit) for side, limit in zip(size, canvas, strict=True)
    )
    return height, width


# --- boxes --------------------------------------------------------------------------------------


def to_cxcywh_01(boxes_xyxy_px: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Corners in pixels → center, width, height in shares of `size` (height, width): f32[T, 4]."""
    first, last = boxes_xyxy_px[:, :2], boxes_xyxy_px[:, 2:]
    scale = np.array([size[1], size[0]], np.float64)
    shares = [(first + last) / 2 / scale, (last - first) / scale]
    return np.concatenate(shares, axis=1).astype(np.float32)


def crop_boxes(boxes: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    """Clipped to the window (top, left, height, width), and relative to it; some may be empty."""
    top, left, height, width = window
    return np.clip(boxes - [left, top, left, top], 0, [width, height, width, height])


def flip_boxes(boxes: np.ndarray, width: float) -> np.ndarray:
    """Mirrored left to right in an image of `width`."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


def scale_boxes(boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """As the image of size `old` (height, width) is resized to `new`; never over its border."""
    limit = np.tile(new[::-1], 2)
    return np.clip(boxes * limit / np.tile(old[::-1], 2), 0, limit)


# --- images with boxes --------------------------------------------------------------------------


def detection_eval_transform(
    image: np.ndarray,
    boxes: np.ndarray,
    preprocessing: DetectionPreprocessing,
    canvas: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """uint8[H, W, C], f64[T, 4] → uint8[h, w, len(mean)], f64[T, 4]: resized, within the canvas.

    Bit-identical to transformers' DetrImageProcessor, PIL backend, before normalization.
    """
    image = to_channels(image, len(preprocessing.mean))
    size = image.shape[0], image.shape[1]
    new = fit(resized_size(size, preprocessing), canvas)
    return resize_image(image, new, preprocessing.interpolation), scale_boxes(boxes, size, new)


def detection_train_transform(
    image: np.ndarray,
    boxes: np.ndarray,
    rng: np.random.Generator,
    *,
    preprocessing: DetectionPreprocessing,
    augmentation: DetectionAugmentation,
    short: int,
    canvas: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crop, resize, flip, color: (uint8[h, w, C], f64[T', 4], bool[T] which boxes are left).

    The crop is cut from the original pixels, so that the image is resampled once. What doesn't fit
    the canvas shrinks. The draws are those of the augmentation alone: they don't depend on boxes.
    """
    image = to_channels(image, len(preprocessing.mean))
    if augmentation.crop and rng.random() < augmentation.crop:
        size = image.shape[0], image.shape[1]
        top, left, height, width = window = random_window(
            size, rng, augmentation, preprocessing.short
        )
        image = image[top : top + height, left : left + width]
        boxes = crop_boxes(boxes, window)
    old = image.shape[0], image.shape[1]
    new = fit(resized_size(old, preprocessing, short), canvas)
    image = resize_image(image, new, preprocessing.interpolation)
    boxes = scale_boxes(boxes, old, new)
    kept = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    if augmentation.flip and rng.random() < 0.5:
        image, boxes = flip_image(image), flip_boxes(boxes, new[1])
    return color_jitter(image, rng, augmentation), boxes[kept], kept


def resize_image(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """uint8[H, W, C] → uint8[h, w, C], `size` = (h, w); see `DetectionPreprocessing`."""
    if interpolation != ALIASED:
        return resize(image, size, interpolation)
    (height, width), channels = size, np.arange(image.shape[2])
    above, below, lower = _taps(image.shape[0], height)
    left, right, share = _taps(image.shape[1], width)
    left, right = ((at[:, None] * len(channels) + channels).ravel() for at in (left, right))
    share = np.repeat(share, len(channels))
    rows = image.reshape(len(image), -1)  # [H, W·C]: gathers along one axis cost least
    resized = np.empty((height, len(share)), np.uint8)
    for first in range(0, height, STRIP):
        strip = slice(first, first + STRIP)
        pixels = _mix(rows[above[strip]], rows[below[strip]], lower[strip, None])
        mixed = _mix(pixels.take(left, 1), pixels.take(right, 1), share)
        resized[strip] = np.rint(mixed, out=mixed)
    return resized.reshape(height, width, -1)


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The old pixels i64[new] that each new one lies between, and f32[new] of the second."""
    at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)  # pixel centers
    first = at.astype(np.int64)
    return first, np.minimum(first + 1, old - 1), (at - first).astype(np.float32)


def _mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """first · (1 - share) + second · share in f32; floats are written over."""
    first, second = (one.astype(np.float32, copy=False) for one in (first, second))
    first *= 1 - share
    second *= share
    first += second
    return first


def random_window(
    size: tuple[int, int], rng: np.random.Generator, augmentation: DetectionAugmentation, short: int
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of DETR's random crop in an image of `size`, in whole pixels.

    Source: DETR, datasets/transforms.py, RandomResize and RandomSizeCrop, without the resampling.
    """
    scale = rng.choice(augmentation.crop_resize) * short / min(size)  # of the imagined image
    least, most = (share * short for share in augmentation.crop_size)
    sides = []
    for side in size:
        longest = min(most, side * scale)
        drawn = rng.uniform(min(least, longest), longest) / scale
        sides.append(min(max(round(drawn), 1), side))
    top, left = (int(rng.integers(side - cut + 1)) for side, cut in zip(size, sides, strict=True))
    return top, left, sides[0], sides[1]


class ColorLimits(Protocol):
    """By how much colors change at most: factors are drawn in 1 ± these."""

    @property
    def brightness(self) -> float: ...
    @property
    def contrast(self) -> float: ...
    @property
    def saturation(self) -> float: ...


def color_jitter(
    image: np.ndarray, rng: np.random.Generator, augmentation: ColorLimits
) -> np.ndarray:
    """Random brightness, contrast and saturation of uint8[H, W, 3], in one pass over the pixels.

    Brightness scales the pixels, contrast their distance from the image's mean luma, saturation
    the distance from their own luma; rounded and clipped once, at the end. Images of other numbers
    of channels are left alone.
    """
    limits = np.array([augmentation.brightness, augmentation.contrast, augmentation.saturation])
    if not limits.any() or image.shape[2] != 3:
        return image
    brightness, contrast, saturation = 1 + limits * rng.uniform(-1, 1, 3)
    picture = Image.fromarray(image)
    counts = np.array(picture.histogram()).reshape(3, 256)  # ten times faster than a mean
    mean = float(LUMA @ (counts @ np.arange(256))) / (image.shape[0] * image.shape[1])
    matrix = saturation * np.eye(3) + (1 - saturation) * LUMA  # rows: R, G, B
    offset = np.full((3, 1), brightness * (1 - contrast) * mean)
    rows = np.concatenate([brightness * contrast * matrix, offset], axis=1)
    return np.asarray(picture.convert("RGB", tuple(rows.ravel().tolist())))
