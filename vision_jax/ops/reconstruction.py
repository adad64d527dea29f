"""Masked patches of images and the loss of their reconstruction.

MAE (He et al. 2022, https://arxiv.org/abs/2111.06377), and its code models_mae.py. Where ports go
wrong: a patch's pixels are rows, columns, channels, as they lie in the image; the variance of a
patch is the unbiased one, with 1e-6 added before the root; the targets are of the images that the
model sees inside, less its mean and over its standard deviation.
"""

import jax
import jax.numpy as jnp
import numpy as np

VARIANCE_EPSILON = 1e-6


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Images f[B, H, W, C] as patches f[B, N, P·P·C]; what does not fill a patch is cut off.

    Examples:
      >>> patchify(jnp.arange(8.0).reshape(1, 2, 4, 1), 2).tolist()
      [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    batch, height, width, channels = images.shape
    h, w = height // patch_size, width // patch_size
    x = images[:, : h * patch_size, : w * patch_size]
    x = x.reshape(batch, h, patch_size, w, patch_size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, h, w, P, P, C]
    return x.reshape(batch, h * w, patch_size * patch_size * channels)


def unpatchify(patches: np.ndarray, grid: tuple[int, int], patch_size: int) -> np.ndarray:
    """The way back: images f[B, h·P, w·P, C] of patches f[B, h·w, P·P·C], for pictures."""
    h, w = grid
    x = patches.reshape(len(patches), h, w, patch_size, patch_size, -1)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, h, P, w, P, C]
    return x.reshape(len(patches), h * patch_size, w * patch_size, -1)


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean, standard deviation) f[B, N, 1] of each patch f[B, N, D], as its target is scaled."""
    mean = patches.mean(-1, keepdims=True)
    variance = patches.var(-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + VARIANCE_EPSILON)


def normalize_patches(patches: jax.Array) -> jax.Array:
    """Each patch f[B, N, D] less its mean, over its standard deviation."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def visible_patches(noise: jax.Array, mask_ratio: float) -> jax.Array:
    """i32[B, n]: the patches of the least noise f[B, N]; n is (1 - mask_ratio) of N, rounded down.

    Raises:
      ValueError: none is left to see, or none to reconstruct.

    Examples:
      >>> visible_patches(jnp.array([[0.3, 0.1, 0.9, 0.2]]), 0.5).tolist()
      [[1, 3]]
    """
    patches = noise.shape[1]
    count = int(patches * (1 - mask_ratio))
    if not 0 < count < patches:
        raise ValueError(
            f"a share of {mask_ratio:g} of {patches} patches leaves {count} to see and "
            f"{patches - count} to reconstruct"
        )
    return jnp.argsort(noise, axis=1)[:, :count].astype(jnp.int32)


def hidden_mask(visible: jax.Array, patches: int) -> jax.Array:
    """f32[B, N]: 1 where a patch is none of `visible` i32[B, n], else 0."""
    seen = visible[:, :, None] == jnp.arange(patches).reshape(1, 1, patches)  # [B, n, N]
    return 1 - seen.any(1).astype(jnp.float32)


def reconstruction_losses(
    predicted: jax.Array, targets: jax.Array, hidden: jax.Array
) -> jax.Array:  # f[B]
    """Each image's mean squared error over the pixels of its hidden patches.

    Args:
      predicted: f[B, N, D].
      targets: f[B, N, D].
      hidden: f[B, N], 1 where a patch counts, at least one in each image.
    """
    errors = ((predicted - targets) ** 2).mean(-1)  # [B, N]
    return (errors * hidden).sum(1) / hidden.sum(1)


def spread_of_patches(patches: jax.Array, hidden: jax.Array) -> jax.Array:  # f[B]
    """How far an image's hidden patches f[B, N, D] are from each other, 0 if all are alike.

    The standard deviation over the patches, of each pixel alone, and its root mean square over
    pixels.
    """
    weights = (hidden / hidden.sum(1, keepdims=True))[..., None]  # [B, N, 1]
    mean = (patches * weights).sum(1, keepdims=True)
    variance = ((patches - mean) ** 2 * weights).sum(1)  # [B, D]
    return jnp.sqrt(variance.mean(-1))
