"""The 15 common corruptions of ImageNet-C and CIFAR-10-C, made on the fly: uint8 in, uint8 out.

Source: Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261, with the parameters of the
authors' make_imagenet_c.py and make_cifar_c.py; motion and zoom blur at any image size are those of
the package imagecorruptions 1.1.2 (Michaelis et al. 2019, https://arxiv.org/abs/1907.07484), with
which tests/parity compares everything but two:

- frost: the authors' photographs are not ours to ship. The textures here are drawn: fields with the
  photographs' power spectrum, mean colors and contrasts, folded into ridges that look like needles.
- elastic: warped with exact bilinear weights where OpenCV rounds to 1/32 of a pixel, and in
  proportion to the image where the authors' displacements are for 224 pixels.

Figures on these images compare with one another, and closely but not to the digit with those on the
published files, which were also saved as JPEG once more (ImageNet-C).
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vision_jax.errors import UserError, nearest

Rng = np.random.Generator
# corruption(image u8[H, W, C], its parameters, rng) -> f[H, W, C], 0 .. 255 but for outliers
Corruption = Callable[[np.ndarray, Any, Rng], np.ndarray]

SEVERITIES = (1, 2, 3, 4, 5)
LARGEST_SMALL = 64  # pixels a side up to which CIFAR-10-C's parameters are used

# Of each corruption, by severity: ImageNet-C's parameters, then CIFAR-10-C's.
PARAMETERS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    # standard deviation
    "gaussian_noise": ((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    # photons that make white
    "shot_noise": ((60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    # share of the values
    "impulse_noise": ((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    # radius of the disk, standard deviation of its antialiasing
    "defocus_blur": (
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    # standard deviation of the blur, farthest move, how often
    "glass_blur": (
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    # radius, standard deviation
    "motion_blur": (
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    # end and step of the factors
    "zoom_blur": (
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    # mean, deviation, size and threshold of the flakes; radius and deviation of their motion; share
    # of the image that is not whitened
    "snow": (
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    # weights of the image and of the frost
    "frost": (
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    # weight of the fog, by which its details fade at each halving of the scale
    "fog": (
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    # what is added to the value of hue, saturation, value
    "brightness": ((0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    # what is left of the differences from the mean
    "contrast": ((0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    # size and smoothness of the displacement, largest shift of the corners of an affine map; shares
    # of a side (the authors' 244 pixels are for images of 224)
    "elastic": (
        (
            (2 * 244 / 224, 0.7 * 244 / 224, 0.1 * 244 / 224),
            (2 * 244 / 224, 0.08 * 244 / 224, 0.2 * 244 / 224),
            (0.05 * 244 / 224, 0.01 * 244 / 224, 0.02 * 244 / 224),
            (0.07 * 244 / 224, 0.01 * 244 / 224, 0.02 * 244 / 224),
            (0.12 * 244 / 224, 0.01 * 244 / 224, 0.02 * 244 / 224),
        ),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    # scale
    "pixelate": ((0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    # quality
    "jpeg": ((25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
}
NAMES = tuple(PARAMETERS)

# Of the five photographs that ImageNet-C draws from: mean color, standard deviation of the grey.
FROSTS = (
    ((78, 149, 166), 19),
    ((201, 205, 214), 22),
    ((201, 205, 214), 22),
    ((138, 153, 165), 28),
    ((112, 123, 135), 43),
)
FROST_SLOPE = -1.0  # of amplitude over frequency; with it the textures' is -0.85, as theirs
NEEDLES, SLENDER = 5, 6.0  # directions of needles, their length over their width


def corrupt(image: np.ndarray, index: int, *, name: str, severity: int, seed: int) -> np.ndarray:
    """One corrupted image: u8[H, W, C] → u8[H, W, C], C 1 or 3.

    Args:
      image: as the model would see it, cropped and resized.
      index: of the image in its data set. What is random is drawn from (seed, name, severity,
        index), so it is the same in any batch and order.
      name: one of NAMES.
      severity: 1 to 5.
      seed: at least 0.

    Raises:
      UserError: an image of another number of channels.
    """
    if image.shape[2] not in (1, 3):
        raise UserError(
            f"corruptions are defined for 1 or 3 channels, and the images have {image.shape[2]}: "
            "set config.robustness.corruptions=()"
        )
    parameters = PARAMETERS[name][max(image.shape[:2]) <= LARGEST_SMALL][severity - 1]
    rng = np.random.default_rng((seed, NAMES.index(name), severity, index))
    corrupted = FUNCTIONS[name](image, parameters, rng)
    return np.clip(corrupted, 0, 255).astype(np.uint8)  # cut, not rounded, as the authors do


def find_names(given: Sequence[str], field: str) -> tuple[str, ...]:
    """The corruptions that a config's field names; "all" is all of them.

    Raises:
      UserError: a name that is no corruption's.
    """
    if tuple(given) == ("all",):
        return NAMES
    for name in given:
        if name not in NAMES:
            raise UserError(f"{field}: unknown `{name}`{nearest(name, NAMES)}")
    return tuple(given)


# Noise ------------------------------------------------------------------------------------------


def gaussian_noise(image: np.ndarray, scale: float, rng: Rng) -> np.ndarray:
    """Independent normal noise on each value."""
    return (image / 255 + rng.normal(size=image.shape, scale=scale)) * 255


def shot_noise(image: np.ndarray, photons: float, rng: Rng) -> np.ndarray:
    """Poisson noise of so many photons for white."""
    return rng.poisson(image / 255 * photons) / photons * 255


def impulse_noise(image: np.ndarray, share: float, rng: Rng) -> np.ndarray:
    """That share of the values becomes 0 or 255, each half of them."""
    hit = rng.random(image.shape) <= share
    white = rng.random(image.shape) <= 0.5
    return np.where(hit, np.where(white, 255, 0), image)


# Blur -------------------------------------------------------------------------------------------


def defocus_blur(image: np.ndarray, parameters: tuple[float, float], rng: Rng) -> np.ndarray:
    """Defocus: the mean over a disk, antialiased."""
    from scipy import ndimage, signal  # here, because training imports this file and needs neither

    del rng
    radius, alias = parameters
    half, soft = (8, 1) if radius <= 8 else (math.floor(radius), 2)
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float32)
    disk /= disk.sum()
    antialias = np.exp(-(np.arange(-soft, soft + 1) ** 2) / (2 * alias**2))
    antialias /= antialias.sum()
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, antialias, axis, mode="mirror")
    padded = np.pad(image / 255, ((half, half), (half, half), (0, 0)), mode="reflect")
    kernel = disk.astype(np.float64)[..., None]  # else its transform is computed in float32
    return signal.fftconvolve(padded, kernel, mode="valid", axes=(0, 1)) * 255


def glass_blur(image: np.ndarray, parameters: tuple[float, int, int], rng: Rng) -> np.ndarray:
    """Blurs, moves pixels about, blurs again.

    The authors meant to exchange pixels; what their code does, and the published images show, is to
    overwrite each with its partner, from the last pixel to the first.
    """
    sigma, farthest, times = parameters
    blurred = (_gaussian(image / 255, sigma) * 255).astype(np.uint8)
    height, width, channels = image.shape
    rows = range(height - farthest, farthest, -1)
    columns = range(width - farthest, farthest, -1)
    origin = list(range(height * width))  # which pixel stands at each place
    for _ in range(times):
        moves = rng.integers(-farthest, farthest, size=(len(rows), len(columns), 2))
        offsets = (moves[..., 1] * width + moves[..., 0]).tolist()
        for row, offsets_of_row in zip(rows, offsets, strict=True):
            for place, offset in zip(
                range(row * width + columns.start, row * width + farthest, -1),
                offsets_of_row,
                strict=True,
            ):
                origin[place] = origin[place + offset]
    moved = blurred.reshape(-1, channels)[origin].reshape(image.shape)
    return _gaussian(moved / 255, sigma) * 255


def motion_blur(image: np.ndarray, parameters: tuple[int, float], rng: Rng) -> np.ndarray:
    """Smears in a direction within 45 degrees of the horizontal."""
    radius, sigma = parameters
    return _smear(image, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(image: np.ndarray, parameters: tuple[float, float], rng: Rng) -> np.ndarray:
    """The mean of the image and of enlargements of its center."""
    del rng
    end, step = parameters
    unit = (image / 255).astype(np.float32)
    factors = np.arange(1, end, step)
    total = np.zeros_like(unit)
    for factor in factors:
        total += _zoom(unit, factor)[: image.shape[0], : image.shape[1]]
    return (unit + total) / (len(factors) + 1) * 255


# Weather ----------------------------------------------------------------------------------------


def snow(image: np.ndarray, parameters: tuple[float, ...], rng: Rng) -> np.ndarray:
    """Flakes in motion, twice, over a whitened image."""
    mean, deviation, size, threshold, radius, sigma, kept = parameters
    height, width = image.shape[:2]
    flakes = _zoom(rng.normal(size=(height, width, 1), loc=mean, scale=deviation), size)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _smear(flakes, int(radius), sigma, rng.uniform(-135, -45))
    flakes = np.round(flakes[:height, :width] * 255).astype(np.uint8) / 255
    unit = image.astype(np.float32) / 255
    whitened = np.maximum(unit, _luma(unit) * 1.5 + 0.5)
    return (kept * unit + (1 - kept) * whitened + flakes + np.rot90(flakes, 2)) * 255


def frost(image: np.ndarray, parameters: tuple[float, float], rng: Rng) -> np.ndarray:
    """A mixture with a texture of ice."""
    kept, weight = parameters
    return kept * image + weight * _ice(image.shape, rng)


def fog(image: np.ndarray, parameters: tuple[float, float], rng: Rng) -> np.ndarray:
    """A mixture with a cloud."""
    weight, decay = parameters
    height, width, channels = image.shape
    side = 2 ** (max(height, width, channels) - 1).bit_length()
    cloud = _plasma(side, decay, rng)[:height, :width, None]
    unit = image / 255
    brightest = unit.max()
    return (unit + weight * cloud) * brightest / (brightest + weight) * 255


def brightness(image: np.ndarray, added: float, rng: Rng) -> np.ndarray:
    """Adds to the value of (hue, saturation, value)."""
    del rng
    unit = image / 255
    value, least = unit.max(2), unit.min(2)  # [H, W]
    brighter = np.clip(value + added, 0, 1)
    if image.shape[2] == 1:
        return brighter[..., None] * 255
    spread = value - least
    with np.errstate(invalid="ignore", divide="ignore"):  # grey and black pixels
        saturation = np.where(spread == 0, 0, spread / value)
        red, green, blue = np.moveaxis(unit, 2, 0)
        sixth = np.where(
            blue == value,
            4 + (red - green) / spread,
            np.where(green == value, 2 + (blue - red) / spread, (green - blue) / spread),
        )
    hue = np.where(spread == 0, 0, sixth / 6 % 1) * 6
    sector = np.floor(hue)
    part = hue - sector
    low = brighter * (1 - saturation)
    falling = brighter * (1 - part * saturation)
    rising = brighter * (1 - (1 - part) * saturation)
    colors = (  # by sector of the hue, from red over green and blue
        (brighter, rising, low),
        (falling, brighter, low),
        (low, brighter, rising),
        (low, falling, brighter),
        (rising, low, brighter),
        (brighter, low, falling),
    )
    channels = [np.choose(sector.astype(int) % 6, channel) for channel in zip(*colors, strict=True)]
    return np.stack(channels, axis=2) * 255


# Digital ----------------------------------------------------------------------------------------


def contrast(image: np.ndarray, kept: float, rng: Rng) -> np.ndarray:
    """Moves every value toward its channel's mean."""
    del rng
    unit = image / 255
    mean = unit.mean((0, 1), keepdims=True)
    return ((unit - mean) * kept + mean) * 255


def elastic(image: np.ndarray, parameters: tuple[float, float, float], rng: Rng) -> np.ndarray:
    """A random affine map, then a smooth random displacement of each pixel."""
    from scipy import ndimage

    height, width = image.shape[:2]
    side = min(height, width)
    size, smooth, shift = (side * share for share in parameters)
    unit = image.astype(np.float32) / 255
    moved = _corners_moved(height, width, shift, rng)
    dx = _gaussian(rng.uniform(-1, 1, (height, width)), smooth, "reflect", 3) * size
    dy = _gaussian(rng.uniform(-1, 1, (height, width)), smooth, "reflect", 3) * size
    y, x = np.mgrid[:height, :width]
    matrix, offset = moved[:, :2], moved[:, 2]
    channels = []
    for channel in np.moveaxis(unit, 2, 0):
        turned = ndimage.affine_transform(channel, matrix, offset, order=1, mode="mirror")
        at = (y + dy.astype(np.float32), x + dx.astype(np.float32))
        channels.append(ndimage.map_coordinates(turned, at, order=1, mode="reflect"))
    return np.stack(channels, axis=2) * 255


def pixelate(image: np.ndarray, scale: float, rng: Rng) -> np.ndarray:
    """Fewer pixels, enlarged again as squares."""
    del rng
    height, width = image.shape[:2]
    small = (max(int(width * scale), 1), max(int(height * scale), 1))
    picture = _picture(image).resize(small, Image.Resampling.BOX)
    return _array(picture.resize((width, height), Image.Resampling.BOX))


def jpeg(image: np.ndarray, quality: int, rng: Rng) -> np.ndarray:
    """Saves as JPEG and reads it back."""
    del rng
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=quality)
    return _array(Image.open(file))


FUNCTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic": elastic,
    "pixelate": pixelate,
    "jpeg": jpeg,
}


# Shared steps -----------------------------------------------------------------------------------


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image if image.shape[2] == 3 else image[..., 0])


def _array(picture: Image.Image) -> np.ndarray:
    array = np.asarray(picture)
    return array if array.ndim == 3 else array[..., None]


def _luma(unit: np.ndarray) -> np.ndarray:
    """f[H, W, C] -> f[H, W, 1], ITU-R 601-2."""
    if unit.shape[2] == 1:
        return unit
    return (unit * np.array([0.299, 0.587, 0.114], unit.dtype)).sum(2, keepdims=True)


def _gaussian(
    image: np.ndarray, sigma: float, mode: str = "nearest", truncate: float = 4
) -> np.ndarray:
    """A Gaussian blur of the first two axes."""
    from scipy import ndimage

    sigmas = (sigma, sigma, 0)[: image.ndim]
    return ndimage.gaussian_filter(image, sigmas, mode=mode, truncate=truncate)


def _zoom(image: np.ndarray, factor: float) -> np.ndarray:
    """The center enlarged, bilinearly: f[H, W, C] -> f[at least H, at least W, C]."""
    for axis, size in enumerate(image.shape[:2]):
        kept = math.ceil(size / factor)
        start = (size - kept) // 2
        made = round(kept * factor)
        at = np.arange(made) * ((kept - 1) / max(made - 1, 1))
        low = np.minimum(at.astype(int), kept - 1)
        high = np.minimum(low + 1, kept - 1)
        weight = (at - low).reshape(-1, *(1,) * (image.ndim - 1 - axis))
        part = np.take(image, start + low, axis).astype(np.float64)
        part += weight * (np.take(image, start + high, axis) - part)
        image = part
    return image


def _smear(image: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Half a Gaussian along a line that starts at each pixel: f[H, W, C] -> f64[H, W, C]."""
    height, width = image.shape[:2]
    count = 2 * radius + 1
    end_y, end_x = (count * f(math.radians(degrees)) for f in (math.sin, math.cos))
    length = math.hypot(end_y, end_x)
    weights = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2))
    weights /= np.sqrt(2 * np.pi) * sigma  # nothing but rounding, which decides on flat areas
    weights /= weights.sum()
    total = np.zeros(image.shape)
    for step, weight in enumerate(weights):
        dy = -math.ceil(step * end_y / length - 0.5)
        dx = -math.ceil(step * end_x / length - 0.5)
        if abs(dy) >= height or abs(dx) >= width:
            break
        rows = np.clip(np.arange(height) - dy, 0, height - 1)
        columns = np.clip(np.arange(width) - dx, 0, width - 1)
        total += weight * image[rows][:, columns]
    return total


def _plasma(side: int, decay: float, rng: Rng) -> np.ndarray:
    """f64[side, side] in [0, 1] by diamonds and squares, periodic; `side` is a power of two.

    Fournier, Fussell and Carpenter 1982, "Computer rendering of stochastic models".
    """
    heights = np.zeros((side, side))
    amplitude = 100.0

    def middle(sums: np.ndarray) -> np.ndarray:
        return sums / 4 + amplitude * rng.uniform(-amplitude, amplitude, sums.shape)

    step = side
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        right_and_below = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = middle(right_and_below + np.roll(right_and_below, -1, 1))
        centers = heights[half::step, half::step]
        heights[::step, half::step] = middle(
            centers + np.roll(centers, 1, 0) + (corners + np.roll(corners, -1, 1))
        )
        heights[half::step, ::step] = middle(
            centers + np.roll(centers, 1, 1) + (corners + np.roll(corners, -1, 0))
        )
        step //= 2
        amplitude /= decay
    heights -= heights.min()
    return heights / heights.max()


def _ice(shape: tuple[int, ...], rng: Rng) -> np.ndarray:
    """A texture f64[H, W, C] in 0 .. 255 for frost; see the top of this file."""
    height, width, channels = shape
    color, deviation = FROSTS[rng.integers(len(FROSTS))]
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    field = np.full((height, width), -np.inf)
    for angle in rng.uniform(0, np.pi, NEEDLES):  # of needles, each lot over the ones before
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        frequency = np.hypot(SLENDER * along, across)
        frequency[0, 0] = np.inf
        noise = np.fft.rfft2(rng.normal(size=(height, width)))
        needles = np.fft.irfft2(noise * frequency**FROST_SLOPE, (height, width))
        field = np.maximum(field, needles / needles.std())
    field = (field - field.mean()) / field.std()
    mean = np.array(color if channels == 3 else [np.mean(color)])
    return np.clip(mean + deviation * field[..., None], 0, 255)


def _corners_moved(height: int, width: int, shift: float, rng: Rng) -> np.ndarray:
    """f64[2, 3], the affine map from (row, column, 1) of the result to those of the image.

    It takes three points about the center, each moved by up to `shift` pixels, back to their
    places.
    """
    center = np.array([height // 2, width // 2], np.float64)  # the authors' x counts rows' number
    reach = min(height, width) // 3
    before = np.array(
        [center + reach, (center[0] + reach, center[1] - reach), center - reach], np.float64
    )
    after = before + rng.uniform(-shift, shift, size=before.shape)
    columns_rows = np.concatenate([after, np.ones((3, 1))], axis=1)  # x, y, 1
    back = np.linalg.solve(columns_rows, before).T  # [2, 3]: (x, y) of the image from the result's
    return back[::-1][:, [1, 0, 2]]
