"""Image augmentation on the device: pure functions of a key and a batch.

Images are float32[B, H, W, 3] in [0, 1] and stay so. Every random number is drawn per batch or per
example from the key alone, so the result does not depend on how the batch lies on the devices.

Policies that give each example an operation of its own compute all operations for all examples and
keep one: that is what a vectorized machine does well and what shards over a batch. Measured on two
CPU cores, 128 images of 32×32: 7 ms for `trivial_augment`, 4 of them for the one histogram.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vision_jax.errors import UserError
from vision_jax.ops.traced import is_known, is_on

Array = jax.Array

# --- Mixing the examples of a batch ---------------------------------------------------------------


def mixup_or_cutmix(
    key: Array,
    images: Array,
    targets: Array,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    switch_probability: float = 0.5,
    probability: float = 1.0,
) -> tuple[Array, Array]:
    """Mixes each example with its partner, the one at the mirrored place of the batch.

    Mixup blends the two by λ ~ Beta(α, α) (Zhang et al. 2018, https://arxiv.org/abs/1710.09412);
    CutMix pastes a box of the partner that covers about 1 - λ of the image, and corrects λ to the
    area left after the box is clipped (Yun et al. 2019, https://arxiv.org/abs/1905.04899). One
    choice, one λ and one box serve the whole batch, as in timm's default mode "batch".

    Args:
      key: a PRNG key.
      images: f32[B, H, W, 3].
      targets: f32[B, C], class probabilities.
      mixup_alpha: α of mixup; 0 turns it off.
      cutmix_alpha: α of CutMix; 0 turns it off. With both off, the input is returned as it is.
      switch_probability: of CutMix rather than mixup, where both are on.
      probability: that the batch is mixed at all.

    Returns:
      Images and targets of the same shapes.

    Raises:
      UserError: a negative α or a probability outside [0, 1].
    """
    for field, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        if is_known(value) and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{field} must be finite and not negative, not {value}")
    _check_probability("switch_probability", switch_probability)
    _check_probability("probability", probability)
    if not is_on(mixup_alpha) and not is_on(cutmix_alpha):
        return images, targets

    if not is_on(mixup_alpha) or not is_on(cutmix_alpha):
        switch_probability = float(not is_on(mixup_alpha))

    choice_key, share_key = jax.random.split(key)
    mixed, cut, center_y, center_x = jax.random.uniform(choice_key, (4,))
    mixed, cut = mixed < probability, cut < switch_probability
    alpha = jnp.where(cut, cutmix_alpha, mixup_alpha)
    share = jax.random.beta(share_key, alpha, alpha)

    height, width = images.shape[1:3]
    rows = _interval(height, center_y, jnp.sqrt(1 - share))
    columns = _interval(width, center_x, jnp.sqrt(1 - share))
    outside = 1 - (rows[:, None] & columns[None, :]).astype(jnp.float32)  # [H, W]
    # The share of each pixel and of each target that stays its own.
    pixel_share = jnp.where(mixed, jnp.where(cut, outside, share), 1.0)[None, :, :, None]
    target_share = jnp.where(mixed, jnp.where(cut, jnp.mean(outside), share), 1.0)
    return (
        pixel_share * images + (1 - pixel_share) * images[::-1],
        target_share * targets + (1 - target_share) * targets[::-1],
    )


def _interval(size: int, center: Array, fraction: Array) -> Array:
    """bool[size], true on `fraction` of the places around `center` in [0, 1), clipped."""
    length = jnp.floor(size * fraction)
    start = jnp.floor(size * center) - length // 2
    places = jnp.arange(size, dtype=start.dtype)
    return (places >= start) & (places < start + length)


# --- Erasing --------------------------------------------------------------------------------------


def random_erasing(
    key: Array,
    images: Array,
    *,
    probability: float,
    min_area: float = 0.02,
    max_area: float = 1 / 3,
    min_aspect: float = 0.3,
) -> Array:
    """Fills one box of each chosen image with noise (Zhong et al. 2017, arXiv:1708.04896).

    The box is drawn as by timm: a share of the area between `min_area` and `max_area`, the
    logarithm of its aspect uniform between `min_aspect` and its inverse, the first of ten draws
    that fits. The noise is uniform in [0, 1] for each pixel and channel as in the paper, which
    keeps the range of an image; timm's mode "pixel" draws it normal, after the normalization.

    Args:
      key: a PRNG key.
      images: f32[B, H, W, 3].
      probability: that an image is erased.
      min_area: smallest box, as a share of the image.
      max_area: largest box.
      min_aspect: flattest box, as height / width.
    """
    _check_probability("probability", probability)
    if not 0 < min_area <= max_area <= 1 or not 0 < min_aspect <= 1:
        raise UserError(
            f"random erasing needs 0 < min_area <= max_area <= 1 and 0 < min_aspect <= 1, not "
            f"{min_area}, {max_area} and {min_aspect}"
        )
    if not is_on(probability):
        return images
    height, width = images.shape[1:3]

    def erase(key: Array, image: Array) -> Array:
        box_key, noise_key = jax.random.split(key)
        draws = jax.random.uniform(box_key, (23,))
        (chosen, top, left), areas, aspects = draws[:3], draws[3:13], draws[13:]
        areas = height * width * (min_area + (max_area - min_area) * areas)
        aspects = min_aspect ** (2 * aspects - 1)
        heights, widths = jnp.round(jnp.sqrt(areas * aspects)), jnp.round(jnp.sqrt(areas / aspects))
        fits = (heights < height) & (widths < width)
        box_height, box_width = heights[jnp.argmax(fits)], widths[jnp.argmax(fits)]
        top = jnp.floor(top * (height - box_height + 1))
        left = jnp.floor(left * (width - box_width + 1))
        y, x = _pixel_grid(height, width)
        inside = (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)
        erased = inside & jnp.any(fits) & (chosen < probability)
        return jnp.where(erased[:, :, None], jax.random.uniform(noise_key, image.shape), image)

    return jax.vmap(erase)(jax.random.split(key, images.shape[0]), images)


# --- Policies: a random operation for each example ------------------------------------------------


def rand_augment(key: Array, images: Array, *, num_ops: int = 2, magnitude: int = 9) -> Array:
    """`num_ops` random operations in a row (Cubuk et al. 2020, https://arxiv.org/abs/1909.13719).

    The operations, their strengths and the random sign are those of torchvision's RandAugment.

    Args:
      key: a PRNG key.
      images: f32[B, H, W, 3] in [0, 1].
      num_ops: operations for each example; 0 returns the images as they are.
      magnitude: 0 (weakest) to 30 (strongest).
    """
    if num_ops < 0 or not 0 <= magnitude < NUM_MAGNITUDES:
        raise UserError(
            f"RandAugment needs num_ops >= 0 and a magnitude of 0 to {NUM_MAGNITUDES - 1}, "
            f"not {num_ops} and {magnitude}"
        )
    height, width = images.shape[1:3]
    strengths = rand_augment_strengths(height, width)

    def augment(images: Array, key: Array) -> tuple[Array, None]:
        bins = jnp.full(images.shape[0], magnitude)
        return _apply_random_operations(key, images, strengths, bins), None

    return lax.scan(augment, images, jax.random.split(key, num_ops))[0]


def trivial_augment(key: Array, images: Array) -> Array:
    """One random operation of random strength (Müller and Hutter 2021, arXiv:2103.10158).

    The operations, their strengths and the random sign are those of torchvision's
    TrivialAugmentWide.

    Args:
      key: a PRNG key.
      images: f32[B, H, W, 3] in [0, 1].
    """
    bins_key, key = jax.random.split(key)
    bins = jax.random.randint(bins_key, images.shape[:1], 0, NUM_MAGNITUDES)
    return _apply_random_operations(key, images, trivial_augment_strengths(), bins)


def _apply_random_operations(
    key: Array, images: Array, strengths: Mapping[str, np.ndarray], bins: Array
) -> Array:
    """Applies a uniformly chosen operation to each example, at the strength in its bin int[B]."""
    operation_key, sign_key = jax.random.split(key)
    chosen = jax.random.randint(operation_key, images.shape[:1], 0, len(OPERATIONS))
    signs = jax.random.rademacher(sign_key, images.shape[:1], jnp.float32)
    table = jnp.array([strengths[name] for name in OPERATIONS], jnp.float32)
    signed = jnp.array([name in SIGNED for name in OPERATIONS])
    strength = table[chosen, bins] * jnp.where(signed[chosen], signs, 1.0)

    def apply(operation: Array, image: Array, strength: Array) -> Array:
        return lax.switch(operation, list(OPERATIONS.values()), image, strength)

    return jax.vmap(apply)(chosen, images, strength)


NUM_MAGNITUDES = 31
SIGNED = (
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
)


def rand_augment_strengths(height: int, width: int) -> dict[str, np.ndarray]:
    """Strength of each operation in each of the 31 bins, for images of this size."""
    return _strengths(0.3, 150 / 331 * width, 150 / 331 * height, 30, 0.9, 4)


def trivial_augment_strengths() -> dict[str, np.ndarray]:
    """Strength of each operation in each of the 31 bins; translation is up to 32 pixels.

    At the middle bin it is 16 pixels, and not the 15 that torchvision gets from 15.999999.
    """
    return _strengths(0.99, 32, 32, 135, 0.99, 6)


def _strengths(
    shear: float, shift_x: float, shift_y: float, angle: float, blend: float, lost_bits: int
) -> dict[str, np.ndarray]:
    share = np.linspace(0, 1, NUM_MAGNITUDES)
    ends = {"shear_x": shear, "shear_y": shear, "translate_x": shift_x, "translate_y": shift_y}
    ends |= {"rotate": angle, "brightness": blend, "color": blend, "contrast": blend}
    ends |= {"sharpness": blend, "identity": 0, "autocontrast": 0, "equalize": 0}
    return {name: end * share for name, end in ends.items()} | {
        "posterize": np.round(8 - lost_bits * share),
        "solarize": 1 - share,
    }


# --- Operations: one image f32[H, W, 3] in [0, 1] and a strength ----------------------------------
#
# Meaning and sign of each strength are torchvision's (transforms.v2.functional). Its uint8 kernels
# truncate after each operation; here nothing is rounded except where an operation is about the 256
# levels. Geometry samples the nearest pixel and fills with black, torchvision's default.


def identity(image: Array, strength: Array) -> Array:
    """The image; the strength is not used."""
    del strength
    return image


def shear_x(image: Array, strength: Array) -> Array:
    """Shifts row y by -strength · (y + 1/2) pixels."""
    y, x = _pixel_grid(*image.shape[:2])
    return _sample(image, y, x + strength * (y + 0.5))


def shear_y(image: Array, strength: Array) -> Array:
    """Shifts column x by -strength · (x + 1/2) pixels."""
    y, x = _pixel_grid(*image.shape[:2])
    return _sample(image, y + strength * (x + 0.5), x)


def translate_x(image: Array, strength: Array) -> Array:
    """Shifts to the right by the whole pixels in `strength`."""
    y, x = _pixel_grid(*image.shape[:2])
    return _sample(image, y, x - jnp.trunc(strength))


def translate_y(image: Array, strength: Array) -> Array:
    """Shifts downwards by the whole pixels in `strength`."""
    y, x = _pixel_grid(*image.shape[:2])
    return _sample(image, y - jnp.trunc(strength), x)


def rotate(image: Array, strength: Array) -> Array:
    """Rotates counterclockwise around the center by `strength` degrees."""
    height, width = image.shape[:2]
    y, x = _pixel_grid(height, width)
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    cos, sin = jnp.cos(jnp.deg2rad(strength)), jnp.sin(jnp.deg2rad(strength))
    return _sample(image, sin * x + cos * y + (height - 1) / 2, cos * x - sin * y + (width - 1) / 2)


def brightness(image: Array, strength: Array) -> Array:
    """Multiplies by 1 + strength."""
    return _blend(image, jnp.zeros_like(image), strength)


def color(image: Array, strength: Array) -> Array:
    """Moves away from grey; -1 is grey."""
    return _blend(image, _luma(image), strength)


def contrast(image: Array, strength: Array) -> Array:
    """Moves away from the mean luma; -1 is that one grey."""
    mean = jnp.mean(image, axis=(0, 1), keepdims=True)  # of the channels: one pass, in vectors
    return _blend(image, _luma(mean), strength)


def sharpness(image: Array, strength: Array) -> Array:
    """Moves away from a 3×3 blur (center 5, others 1, of 13); the border pixels stay."""
    height, width = image.shape[:2]
    if height < 3 or width < 3:
        return image
    center = image[1:-1, 1:-1]
    around = sum(image[y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3))
    blurred = (around + 4 * center) / 13
    return image.at[1:-1, 1:-1].set(_blend(center, blurred, strength))


def posterize(image: Array, strength: Array) -> Array:
    """Keeps the `strength` highest of the 8 bits."""
    lost = 8 - strength.astype(jnp.int32)
    return ((_levels(image) >> lost) << lost) / 255


def solarize(image: Array, strength: Array) -> Array:
    """Inverts what is at least `strength`."""
    return jnp.where(image >= strength, 1 - image, image)


def autocontrast(image: Array, strength: Array) -> Array:
    """Stretches each channel to [0, 1]; a constant channel stays. The strength is not used."""
    del strength
    low = jnp.min(image, axis=(0, 1), keepdims=True)
    span = jnp.max(image, axis=(0, 1), keepdims=True) - low
    return jnp.where(span > 0, (image - low) / jnp.where(span > 0, span, 1), image)


def equalize(image: Array, strength: Array) -> Array:
    """Flattens the histogram of each channel as PIL does. The strength is not used."""
    del strength
    flat = _levels(image).reshape(-1, image.shape[-1])
    return jax.vmap(_equalize_channel, in_axes=1, out_axes=1)(flat).reshape(image.shape) / 255


OPERATIONS: Mapping[str, Callable[[Array, Array], Array]] = {
    operation.__name__: operation
    for operation in (
        *(identity, shear_x, shear_y, translate_x, translate_y, rotate),
        *(brightness, color, contrast, sharpness),
        *(posterize, solarize, autocontrast, equalize),
    )
}


def _pixel_grid(height: int, width: int) -> tuple[Array, Array]:
    """Row and column of each pixel, two f32[H, W]."""
    y, x = jnp.meshgrid(
        jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32), indexing="ij"
    )
    return y, x


def _sample(image: Array, y: Array, x: Array) -> Array:
    """The pixels of `image` nearest to the places y, x f32[H, W]; black outside."""
    height, width = image.shape[:2]
    y, x = jnp.round(y).astype(jnp.int32), jnp.round(x).astype(jnp.int32)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    index = jnp.where(inside, y * width + x, 0)
    sampled = image.reshape(height * width, -1)[index]  # [H, W, 3]
    return jnp.where(inside[:, :, None], sampled, 0)


def _blend(image: Array, degenerate: Array, strength: Array) -> Array:
    """(1 + strength) · image - strength · degenerate, clipped to [0, 1]."""
    return jnp.clip(image * (1 + strength) - degenerate * strength, 0, 1)


def _luma(image: Array) -> Array:
    """Brightness as perceived (ITU-R 601-2), f32[H, W, 1]; the weights are torchvision's."""
    red, green, blue = jnp.split(image, 3, axis=-1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _levels(image: Array) -> Array:
    """The nearest of the levels 0 to 255, int32[H, W, 3]."""
    return jnp.round(image * 255).astype(jnp.int32)


def _equalize_channel(levels: Array) -> Array:
    """PIL's ImageOps.equalize of one channel int32[N]."""
    counts = jnp.zeros(256, jnp.int32).at[levels].add(1)
    step = (levels.size - counts[jnp.max(levels)]) // 255
    below = jnp.cumsum(counts) - counts
    mapped = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255)[levels]
    return jnp.where(step > 0, mapped, levels)


def _check_probability(field: str, value: float) -> None:
    if is_known(value) and not 0 <= value <= 1:
        raise UserError(f"{field} must lie between 0 and 1, not {value}")
