"""AutoencoderKL (Rombach et al. 2022, https://arxiv.org/abs/2112.10752): images as latents.

The convolutional autoencoder whose latents Stable Diffusion, DiT and SiT are trained on. The
encoder gives the mean and the log of the variance of each cell's latents; a generator takes them
shifted and scaled to a variance near 1. Names and structure follow diffusers 0.42
(models/autoencoders/autoencoder_kl.py and vae.py).

Exactness, where ports go wrong:
  - a convolution that halves the grid pads by one at the bottom and at the right alone;
  - the grid grows by the nearest cell, before a convolution;
  - GroupNorm's epsilon is 1e-6 everywhere, the attention in the middle has one head;
  - the decoder's stages have a block more than the encoder's;
  - the log of the variance is cut to [-30, 20], after the 1 x 1 convolution behind the encoder;
  - latents of a generator are (z - shift_factor) · scaling_factor.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from vision_jax.models.autoencoder import Autoencoder, conv3, wide
from vision_jax.models.layers import Conv, GroupNorm, normalize
from vision_jax.models.taps import OUTPUT, tap
from vision_jax.models.unet import grow
from vision_jax.models.vit import Attention
from vision_jax.ops.latents import scaled

EPSILON = 1e-6
LEAST_LOGVAR, LARGEST_LOGVAR = -30.0, 20.0
# Stable Diffusion's, whose widths SDXL's, SD 3's and FLUX.1's share.
VARIANTS: dict[str, dict[str, Any]] = {
    "autoencoder_kl_sd": {},
    "autoencoder_kl_sdxl": {"scaling_factor": 0.13025},
    "autoencoder_kl_sd3": {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "quant_conv": False,
        "post_quant_conv": False,
    },
    "autoencoder_kl_flux": {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "quant_conv": False,
        "post_quant_conv": False,
    },
}


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a variant's name, or None for others."""
    known = VARIANTS.get(name)
    return None if known is None else dict(known)


class Block(nn.Module):
    """x and two convolutions behind norms; x passes a 1 x 1 convolution where the width changes."""

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = x
        for number in (1, 2):
            y = GroupNorm(self.groups, EPSILON, self.dtype, name=f"norm{number}")(y)
            y = conv3(self.width, self.dtype, f"conv{number}")(nn.silu(y))
        if x.shape[-1] != self.width:
            x = Conv(self.width, (1, 1), dtype=self.dtype, name="shortcut")(x)
        return x + y


class Stage(nn.Module):
    """Blocks of one width, and the way to the next grid: "down", "up" or "" for none."""

    width: int
    depth: int
    groups: int
    way: str
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for index in range(self.depth):
            x = Block(self.width, self.groups, self.dtype, name=f"block_{index}")(x)
        if self.way == "down":
            side = ((0, 1), (0, 1))
            x = Conv(self.width, (3, 3), (2, 2), padding=side, dtype=self.dtype, name="downsample")(
                x
            )
        elif self.way == "up":
            x = grow(x, (2 * x.shape[1], 2 * x.shape[2]))
            x = conv3(self.width, self.dtype, "upsample")(x)
        return tap(self, OUTPUT, x)


class Middle(nn.Module):
    """Two blocks, and between them attention over all cells."""

    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        x = Block(channels, self.groups, self.dtype, name="block_0")(x)
        if self.attention:
            y = GroupNorm(self.groups, EPSILON, self.dtype, name="norm")(x)
            y = y.reshape(batch, height * width, channels)
            y, _ = Attention(1, True, False, EPSILON, self.dtype, name="attn")(y)
            x = x + y.reshape(x.shape)
        return Block(channels, self.groups, self.dtype, name="block_1")(x)


class Encoder(nn.Module):
    """Normalized images f[B, H, W, C] -> f32[B, h, w, outputs], and named features."""

    widths: tuple[int, ...]
    depth: int
    outputs: int
    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        features = {}
        last = len(self.widths) - 1
        x = conv3(self.widths[0], self.dtype, "conv_in")(x)
        for index, width in enumerate(self.widths):
            way = "down" if index < last else ""
            stage = Stage(width, self.depth, self.groups, way, self.dtype, name=f"stage_{index}")
            features[f"encoder_{index}"] = x = stage(x)
        x = Middle(self.groups, self.attention, self.dtype, name="middle")(x)
        features["encoder_middle"] = x
        x = GroupNorm(self.groups, EPSILON, self.dtype, name="norm")(x)
        return conv3(self.outputs, wide(self.dtype), "conv_out")(nn.silu(x)), features


class Decoder(nn.Module):
    """Latents f[B, h, w, Z] -> normalized images f32[B, H, W, outputs], and named features."""

    widths: tuple[int, ...]
    depth: int
    outputs: int
    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        features = {}
        last = len(self.widths) - 1
        x = conv3(self.widths[-1], self.dtype, "conv_in")(x)
        x = Middle(self.groups, self.attention, self.dtype, name="middle")(x)
        features["decoder_middle"] = x
        for index, width in enumerate(reversed(self.widths)):
            way = "up" if index < last else ""
            stage = Stage(
                width, self.depth + 1, self.groups, way, self.dtype, name=f"stage_{index}"
            )
            features[f"decoder_{index}"] = x = stage(x)
        x = GroupNorm(self.groups, EPSILON, self.dtype, name="norm")(x)
        return conv3(self.outputs, wide(self.dtype), "conv_out")(nn.silu(x)), features


class AutoencoderKl(Autoencoder, nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> latents -> images; normalized inside.

    `encode` and `decode` are what a generator needs, `apply(variables, images, method="encode")`;
    without a method see `__call__`.

    Attributes:
      num_classes: 0; there are none.
      widths: channels of the stages, each on half of the grid of the one before; multiples of
        `groups`.
      stage_depth: blocks of a stage of the encoder; the decoder's have one more.
      latent_channels: Z.
      in_channels: of the images.
      groups: of each GroupNorm.
      mid_attention: whether the middle attends.
      quant_conv, post_quant_conv: whether a 1 x 1 convolution follows the encoder, and one comes
        before the decoder.
      scaling_factor, shift_factor: see `encode`.
      mean, std: per-channel normalization of the images in [0, 1].
      dtype: compute dtype; parameters stay float32, and so do latents and images.
    """

    num_classes: int = 0
    widths: tuple[int, ...] = (128, 256, 512, 512)
    stage_depth: int = 2
    latent_channels: int = 4
    in_channels: int = 3
    groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32

    @property
    def stages(self) -> tuple[int, int]:
        """Of the encoder and of the decoder."""
        return len(self.widths), len(self.widths)

    def setup(self):
        shared = (self.groups, self.mid_attention, self.dtype)
        self.encoder = Encoder(self.widths, self.stage_depth, 2 * self.latent_channels, *shared)
        self.decoder = Decoder(self.widths, self.stage_depth, self.in_channels, *shared)
        wider = wide(self.dtype)
        # A submodule has the name of its attribute, and an argument of the model has these.
        if self.quant_conv:
            self.quant = Conv(2 * self.latent_channels, (1, 1), dtype=wider, name="quant_conv")
        if self.post_quant_conv:
            self.post_quant = Conv(
                self.latent_channels, (1, 1), dtype=self.dtype, name="post_quant_conv"
            )

    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Encodes images and decodes the means.

        Returns:
          {"latents": f32[B, h, w, Z], as `encode` gives them; "logvar": f32[B, h, w, Z], the log
          of their variance before they are scaled; "reconstruction": f32[B, H, W, C], normalized
          as the images are inside}; with `return_features` also a dict of maps f[B, h, w, D].
        """
        del train  # nothing is random, nothing is counted
        mean, logvar, features = self._posterior(images)
        decoded, more = self._decode(mean)
        latents = scaled(mean, self.scaling_factor, self.shift_factor)
        outputs = {"latents": latents, "logvar": logvar, "reconstruction": decoded}
        return (outputs, {**features, **more}) if return_features else outputs

    def posterior(self, images):
        """(mean, log of the variance) f32[B, h, w, Z] each, of the latents before scaling."""
        return self._posterior(images)[:2]

    def _posterior(self, images):
        x, features = self.encoder(normalize(images, self.mean, self.std).astype(self.dtype))
        if self.quant_conv:
            x = self.quant(x)
        mean, logvar = jnp.split(x, 2, axis=-1)
        return mean, jnp.clip(logvar, LEAST_LOGVAR, LARGEST_LOGVAR), features

    def _decode(self, z):
        return self.decoder(self.post_quant(z) if self.post_quant_conv else z)
