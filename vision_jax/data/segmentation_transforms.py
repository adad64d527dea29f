"""Image geometry with masks on the host: what happens to an image happens to its mask in step.

Masks are u8[H, W] of class indices, or u8[S, H, W] of S segments, 1 inside. They are resized by the
nearest pixel and never interpolated; beyond the image a mask of classes is 255, which counts
nowhere, one of a segment 0, and the image is the mean color. Resampling of images is Pillow's, as
in data/transforms.py.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vision_jax import limits
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.detection_transforms import bounded_size, color_jitter
from vision_jax.data.masks import IGNORED
from vision_jax.data.transforms import INTERPOLATIONS, flip_image, resize, to_channels
from vision_jax.errors import UserError

VIEWS = ("original", "squash", "pad", "short", "windows")


@dataclass(frozen=True)
class SegmentationPreprocessing:
    """What a segmenter expects of its images; it travels with the weights.

    `image_size` is (height, width) of training's crops, and with the view "squash" of evaluation's
    images too, whatever their aspect ratio (transformers' processors); with "short" it is their
    short side's, and their aspect ratio stays (torchvision's presets); with "original" evaluation
    takes images as they are. With "pad" they fill a square of `image_size` as far as their aspect
    ratio lets them, and are black at the bottom or at the right (transformers' EomtImageProcessor
    that pads). With "windows" the short side is resized, too, and the image is seen in square
    windows along the long one (the same processor where it splits). What takes neither, an attack,
    sees images squashed. Predictions are of the original size in all of them. `interpolation` is
    Pillow's, antialiased. `mean` and `std` are per channel, for images in [0, 1]; the model applies
    them, the host doesn't. `mean` has an entry for each channel that the model takes.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    view: str = "original"

    def __post_init__(self):
        for field, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("view", self.view, VIEWS),
        ):
            if value not in known:
                raise UserError(f"preprocessing {field} {value!r}: use one of {', '.join(known)}")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise UserError(f"preprocessing image_size {self.image_size}: use positive numbers")
        if self.view in ("windows", "pad") and self.image_size[0] != self.image_size[1]:
            what = {"windows": "windows are squares", "pad": "images are padded to squares"}
            raise UserError(
                f"preprocessing image_size {self.image_size}: {what[self.view]}; use squash"
            )
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise UserError(f"preprocessing mean {self.mean}, std {self.std}: no normalization")


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Random changes of training images.

    `scale`: smallest and largest factor, between which one is drawn evenly on a logarithmic scale.
    `flip`: half of the images are mirrored. `turn`: they are turned by 0, 90, 180 or 270 degrees,
    where up is no direction: microscopes, satellites. `brightness`, `contrast`, `saturation`:
    factors in 1 ± these.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    turn: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0


def segmentation_train_transform(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    *,
    preprocessing: SegmentationPreprocessing,
    augmentation: SegmentationAugmentation,
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop at a random scale, perhaps turned and mirrored: u8[h, w, C], u8[(S,) h, w].

    Args:
      image: u8[H, W, C].
      mask: u8[H, W], or u8[S, H, W] of segments.
      rng: of the draws.
      preprocessing: its image_size is (h, w).
      augmentation: what is drawn.

    Raises:
      DamagedImageError: another number of channels.
    """
    image = to_channels(image, len(preprocessing.mean))
    height, width = preprocessing.image_size
    quarters = int(rng.integers(4)) if augmentation.turn else 0
    if quarters % 2:
        height, width = width, height
    smallest, largest = augmentation.scale
    factor = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
    window = random_window(image.shape[:2], (height / factor, width / factor), rng)
    image, mask = view_window(image, mask, window, (height, width), preprocessing)
    if quarters:
        image = np.ascontiguousarray(np.rot90(image, quarters))
        mask = np.ascontiguousarray(np.rot90(mask, quarters, (-2, -1)))
    if augmentation.flip and rng.random() < 0.5:
        image, mask = flip_image(image), np.ascontiguousarray(mask[..., ::-1])
    return color_jitter(image, rng, augmentation), mask


def random_window(
    size: tuple[int, ...], wanted: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a window, in whole pixels, anywhere in an image of `size`.

    Along a side that the image does not fill, the image is anywhere in the window.
    """
    starts, sides = [], []
    for side, want in zip(size, wanted, strict=True):
        whole = max(round(want), 1)
        room = side - whole
        starts.append(int(rng.integers(min(room, 0), max(room, 0) + 1)))
        sides.append(whole)
    return starts[0], starts[1], sides[0], sides[1]


def view_window(
    image: np.ndarray,
    mask: np.ndarray,
    window: tuple[int, int, int, int],
    size: tuple[int, int],
    preprocessing: SegmentationPreprocessing,
) -> tuple[np.ndarray, np.ndarray]:
    """A window of image and mask, resized to `size`: u8[*size, C], u8[(S,) *size].

    Args:
      image: u8[H, W, C].
      mask: u8[H, W], or u8[S, H, W] of segments.
      window: (top, left, height, width), which may reach beyond the image.
      size: (height, width).
      preprocessing: of the interpolation and the mean color.
    """
    inside, places = [], []  # by axis: what of the image is seen, and where in the view
    for start, length, side, out in zip(window[:2], window[2:], image.shape, size, strict=False):
        first, last = max(start, 0), min(start + length, side)
        ends = [round((end - start) * out / length) for end in (first, last)]
        ends[1] = max(ends[1], min(ends[0] + 1, out))
        ends[0] = min(ends[0], ends[1] - 1)
        inside.append((first, last - first))
        places.append(slice(*ends))
    (top, h), (left, w) = inside
    fitted = (places[0].stop - places[0].start, places[1].stop - places[1].start)
    seen = resize(image, fitted, preprocessing.interpolation, (top, left, h, w))
    seen_mask = resize_mask(mask[..., top : top + h, left : left + w], fitted)
    if fitted == size:
        return seen, seen_mask
    view = np.empty((*size, image.shape[2]), np.uint8)
    view[:] = [round(255 * value) for value in preprocessing.mean]
    beyond = IGNORED if mask.ndim == 2 else 0
    view_mask = np.full((*mask.shape[:-2], *size), beyond, np.uint8)
    view[places[0], places[1]], view_mask[..., places[0], places[1]] = seen, seen_mask
    return view, view_mask


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """u8[(S,) H, W] -> u8[(S,) *size], each pixel the one at its center."""
    if mask.shape[-2:] == size:
        return mask
    if mask.ndim == 3:
        resized = np.zeros((len(mask), *size), np.uint8)
        for number, one in enumerate(mask):
            resized[number] = resize_mask(one, size)
        return resized
    height, width = size
    nearest = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(nearest)


def segmentation_eval_transform(
    image: np.ndarray, preprocessing: SegmentationPreprocessing
) -> np.ndarray:
    """The image as evaluation sees it: u8[h, w, C], of the size that the view makes it.

    Raises:
      DamagedImageError: another number of channels, or a long side beyond any bound.
    """
    image = to_channels(image, len(preprocessing.mean))
    if preprocessing.view == "original":
        return image
    size = preprocessing.image_size
    if preprocessing.view == "pad":
        content = bounded_size(image.shape[:2], size[0], size[0])
        canvas = np.zeros((*size, image.shape[2]), np.uint8)
        canvas[: content[0], : content[1]] = resize(image, content, preprocessing.interpolation)
        return canvas
    if preprocessing.view == "short":
        (height, width), new = image.shape[:2], min(size)
        short = min(height, width)
        size = (int(new * height / short), int(new * width / short))  # as torchvision rounds
        if max(size) > limits.SIDE:
            raise DamagedImageError(
                f"the image of {height} x {width} pixels would be {size[0]} x {size[1]} with its"
                f" short side resized, of at most {limits.SIDE} a side: use data.view=squash"
            )
    return resize(image, size, preprocessing.interpolation)
