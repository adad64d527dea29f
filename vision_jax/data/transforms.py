"""Image geometry on the host: uint8[h, w, C] of a picture.

A picture is uint8[H, W, C], or Pillow's own of mode RGB: what is decoded from a file stays Pillow's
until it has its final size, because an array of all its pixels and back costs a third of cropping
and resizing them. Both give the same bytes. Each function is pure; the random ones draw from the
generator they are given. Resampling is Pillow's, antialiased, because that is what the weights of
timm, torchvision and transformers saw. Augmentations that need arithmetic on pixels run on the
device instead.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from PIL import Image

from vision_jax.data.decode import MAX_PIXELS, DamagedImageError, Picture
from vision_jax.errors import UserError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
CROP_MODES = ("center", "squash", "border")
CROP_RULES = ("torchvision", "transformers")


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images; it travels with the weights.

    `image_size` is (height, width). `mean` and `std` are per channel, for images in [0, 1]; the
    model applies them, the host doesn't. `crop_pct` and `crop_mode` have timm's meaning: the image
    is resized to floor(image_size / crop_pct) and the center is cut out, where "center" resizes the
    short side, "squash" both sides and "border" the long side (the rest is filled with the mean
    color); a `crop_pct` over 1 leaves a black frame. A transformers processor that resizes to
    (height, width) is "squash" with `crop_pct` 1.0; one with a `shortest_edge` is "center" with
    crop_size / shortest_edge. `crop_rule` is whose center that is where an odd number of pixels is
    left over, see `center_crop`. `mean` has an entry for each channel that the model takes.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    crop_mode: str
    crop_rule: str = "torchvision"  # timm's too; older records don't say it

    def __post_init__(self):
        for field, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("crop_mode", self.crop_mode, CROP_MODES),
            ("crop_rule", self.crop_rule, CROP_RULES),
        ):
            if value not in known:
                raise UserError(f"preprocessing {field} {value!r}: use one of {', '.join(known)}")
        if min(self.image_size) < 1:
            raise UserError(f"preprocessing image_size {self.image_size}: use positive numbers")
        if not 0 < self.crop_pct <= min(self.image_size):
            raise UserError(f"preprocessing crop_pct {self.crop_pct}: use a positive number")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise UserError(f"preprocessing mean {self.mean}, std {self.std}: no normalization")


def complete_crop(own: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """crop_pct, crop_mode and crop_rule as the weights say them, and timm's usual ones elsewhere.

    Of images that are not square nothing is usual: where the weights say nothing, both sides are
    resized and nothing is cut, which every library can do.
    """
    unknown = own.get("crop_pct") is None and own.get("crop_mode") is None
    usual = (1.0, "squash") if unknown and size[0] != size[1] else (0.875, "center")
    return {
        "crop_pct": own.get("crop_pct") or usual[0],
        "crop_mode": own.get("crop_mode") or usual[1],
        "crop_rule": own.get("crop_rule") or CROP_RULES[0],
    }


def size_of(picture: Picture) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return picture.shape[0], picture.shape[1]


@overload
def to_channels(image: np.ndarray, channels: int) -> np.ndarray: ...
@overload
def to_channels(image: Picture, channels: int) -> Picture: ...
def to_channels(image: Picture, channels: int) -> Picture:
    """[H, W, C] → [H, W, channels]: color to luma and grey to color, nothing else.

    Luma is Pillow's (ITU-R 601-2). Raises DamagedImageError for other numbers of channels.
    """
    if isinstance(image, Image.Image):
        if channels == 3:
            return image
        image = np.asarray(image)
    own = image.shape[2]
    if own == channels:
        return image
    if (own, channels) == (3, 1):
        return np.asarray(Image.fromarray(image).convert("L"))[..., None]
    if own == 1:
        return np.repeat(image, channels, axis=2)
    raise DamagedImageError(
        f"the image has {own} channels and the model takes {channels}: images of more than 3 are "
        ".npy files, uint8[H, W, C]"
    )


def eval_transform(image: Picture, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and crop as timm or transformers do, up to normalization, bit-identical to them.

    Returns uint8[h, w, len(mean)], (h, w) = preprocessing.image_size. Source: timm 1.0.31,
    data/transforms_factory.py `transforms_imagenet_eval`; torchvision's Resize and CenterCrop;
    transformers 5.24, image_processing_backends.py `PilBackend`.
    """
    size = preprocessing.image_size
    image = to_channels(image, len(preprocessing.mean))
    height, width = size_of(image)
    # timm floors a quotient of floats (224 / 0.9 → 248); the same expression gives the same floor.
    target_h, target_w = (math.floor(side / preprocessing.crop_pct) for side in size)
    fill: tuple[int, ...] = (0,)
    if preprocessing.crop_mode == "squash":
        resized = (target_h, target_w)
    elif preprocessing.crop_mode == "border":
        ratio = max(height / target_h, width / target_w)
        resized = (round(height / ratio), round(width / ratio))
        fill = tuple(round(255 * m) for m in preprocessing.mean)
    elif target_h == target_w:  # the short side, the long one rounded down
        if width <= height:
            resized = (int(target_w * height / width), target_w)
        else:
            resized = (target_h, int(target_h * width / height))
    else:
        ratio = min(height / target_h, width / target_w)
        resized = (round(height / ratio), round(width / ratio))
    view = resize(image, resized, preprocessing.interpolation)
    return center_crop(view, size, fill, preprocessing.crop_rule)


def resize(
    image: Picture,
    size: tuple[int, int],
    interpolation: str,
    window: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """A picture, or its `window` (top, left, h, w) alone, to uint8[*size, C], with antialiasing.

    No pixel outside of the window has a part in it, unlike in Pillow's own `resize(box=window)`.
    """
    top, left, old_h, old_w = window or (0, 0, *size_of(image))
    height, width = size
    if height * width > MAX_PIXELS or min(size) < 1:  # a strip of pixels grows without bound
        raise DamagedImageError(f"{old_w} × {old_h} pixels is too narrow to resize: crop it")
    if isinstance(image, Image.Image):
        cut = image.crop((left, top, left + old_w, top + old_h)) if window else image
        whole = size == (old_h, old_w)
        return np.asarray(
            cut if whole else cut.resize((width, height), INTERPOLATIONS[interpolation])
        )
    image = image[top : top + old_h, left : left + old_w]
    if size == (old_h, old_w):
        return image
    planes = [image] if image.shape[2] == 3 else list(image.transpose(2, 0, 1))
    resized = [
        np.asarray(Image.fromarray(plane).resize((width, height), INTERPOLATIONS[interpolation]))
        for plane in planes
    ]
    return resized[0] if image.shape[2] == 3 else np.stack(resized, axis=-1)


def center_crop(
    image: np.ndarray,
    size: tuple[int, int],
    fill: tuple[int, ...] = (0,),
    rule: str = "torchvision",
) -> np.ndarray:
    """Cut the central (h, w) out; a side that is too short is padded with `fill` first.

    Of an odd number of pixels torchvision (and timm) cuts half to even at the top and left, and
    pads the smaller half there; transformers cuts the smaller half and pads the larger one there.
    Source: torchvision 0.29.1, `center_crop`; transformers 5.24, image_transforms.py `center_crop`
    (its torchvision backend cuts alike and pads as torchvision does).
    """
    (height, width), (h, w) = image.shape[:2], size
    pad_h, pad_w = max(h - height, 0), max(w - width, 0)
    if pad_h or pad_w:
        padded = np.empty((height + pad_h, width + pad_w, image.shape[2]), np.uint8)
        padded[:] = fill
        more = rule == "transformers"
        y, x = (pad_h + more) // 2, (pad_w + more) // 2
        padded[y : y + height, x : x + width] = image
        image, (height, width) = padded, padded.shape[:2]
    if rule == "transformers":
        top, left = (height - h) // 2, (width - w) // 2
    else:
        top, left = round((height - h) / 2), round((width - w) / 2)
    return image[top : top + h, left : left + w]


def random_resized_crop(
    image: Picture,
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
) -> np.ndarray:
    """A random window, resized: uint8[h, w, C], `size` = (h, w).

    The window's area is a fraction of the image in `scale`, its width / height is log-uniform in
    `ratio`. After 10 windows that don't fit, the largest central one within `ratio`. Source:
    torchvision 0.29.1, RandomResizedCrop.get_params.
    """
    height, width = size_of(image)
    top, left, h, w = _fallback_window(height, width, ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        try_h, try_w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < try_h <= height and 0 < try_w <= width:
            h, w = try_h, try_w
            top, left = (int(rng.integers(room + 1)) for room in (height - h, width - w))
            break
    return resize(image, size, interpolation, (top, left, h, w))


def _fallback_window(
    height: int, width: int, ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, h, w) of the largest central window whose w / h is within `ratio`."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop_padded(image: np.ndarray, rng: np.random.Generator, padding: int) -> np.ndarray:
    """Shift by up to `padding` pixels each way, black coming in: uint8[H, W, C], same shape.

    The usual augmentation for CIFAR-sized images (torchvision's RandomCrop with padding).
    """
    height, width = image.shape[:2]
    shape = (height + 2 * padding, width + 2 * padding, image.shape[2])
    padded = np.zeros(shape, np.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    top, left = rng.integers(2 * padding + 1), rng.integers(2 * padding + 1)
    return padded[top : top + height, left : left + width]


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror left to right with probability 1/2: uint8[H, W, C], same shape."""
    return flip_image(image) if rng.random() < 0.5 else image


def flip_image(image: np.ndarray) -> np.ndarray:
    """uint8[H, W, C] mirrored left to right, as a copy that moves pixels rather than bytes."""
    pixels = np.ascontiguousarray(image).view(f"V{image.shape[2]}")  # [H, W, 1]
    return pixels[:, ::-1].copy().view(np.uint8)
