"""AutoencoderTiny: Ollin Boer Bohan's TAESD, a small autoencoder to the latents of AutoencoderKL.

Without norms and attention, a fortieth of the parameters: for previews, and where memory is short
(https://github.com/madebyollin/taesd). Names and structure follow diffusers 0.42
(models/autoencoders/autoencoder_tiny.py and vae.py).

Exactness, where ports go wrong:
  - the encoder takes images in [0, 1] and the decoder gives such, while diffusers' model has
    [-1, 1] around them;
  - a convolution that halves the grid pads by one on each side, and has no bias;
  - the decoder begins with 3 · tanh(z / 3);
  - its latents are those of a generator as they are: scaling_factor is 1.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from vision_jax.models.autoencoder import SAME, Autoencoder, conv3, wide
from vision_jax.models.layers import Conv, normalize
from vision_jax.models.taps import OUTPUT, tap
from vision_jax.models.unet import grow
from vision_jax.ops.latents import scaled

MAGNITUDE = 3.0  # what the decoder softly cuts latents to
VARIANTS: dict[str, dict[str, Any]] = {
    "autoencoder_tiny_sd": {},  # TAESD; SDXL's has the same sizes
    "autoencoder_tiny_sd3": {"latent_channels": 16},  # SD 3's and FLUX.1's
}


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a variant's name, or None for others."""
    known = VARIANTS.get(name)
    return None if known is None else dict(known)


class Block(nn.Module):
    """relu of x and three convolutions."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = x
        for number in (1, 2, 3):
            y = y if number == 1 else nn.relu(y)
            y = conv3(x.shape[-1], self.dtype, f"conv{number}")(y)
        return nn.relu(x + y)


class Stage(nn.Module):
    """A convolution to this stage's grid, and its blocks; in the decoder the blocks come first.

    Attributes:
      width: channels.
      depth: blocks.
      way: "down", "up" or "" for a stage that keeps the grid and has no such convolution.
    """

    width: int
    depth: int
    way: str
    dtype: Any

    @nn.compact
    def __call__(self, x):
        if self.way == "down":
            x = Conv(
                self.width,
                (3, 3),
                (2, 2),
                padding=SAME,
                use_bias=False,
                dtype=self.dtype,
                name="downsample",
            )(x)
        for index in range(self.depth):
            x = Block(self.dtype, name=f"block_{index}")(x)
        x = tap(self, OUTPUT, x)
        if self.way == "up":
            x = grow(x, (2 * x.shape[1], 2 * x.shape[2]))
            x = Conv(
                self.width,
                (3, 3),
                padding=SAME,
                use_bias=False,
                dtype=self.dtype,
                name="upsample",
            )(x)
        return x


class Encoder(nn.Module):
    """Images f[B, H, W, C] in [0, 1] -> latents f32[B, h, w, Z], and named features."""

    width: int
    depths: tuple[int, ...]
    outputs: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        features = {}
        x = conv3(self.width, self.dtype, "conv_in")(x)
        for index, depth in enumerate(self.depths):
            way = "down" if index else ""
            x = Stage(self.width, depth, way, self.dtype, name=f"stage_{index}")(x)
            features[f"encoder_{index}"] = x
        return conv3(self.outputs, wide(self.dtype), "conv_out")(x), features


class Decoder(nn.Module):
    """Latents f[B, h, w, Z] -> images f32[B, H, W, C] around [0, 1], and named features."""

    width: int
    depths: tuple[int, ...]
    outputs: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        features = {}
        x = MAGNITUDE * jnp.tanh(x / MAGNITUDE)
        x = nn.relu(conv3(self.width, self.dtype, "conv_in")(x))
        for index, depth in enumerate(self.depths):
            way = "up" if index < len(self.depths) - 1 else ""
            x = Stage(self.width, depth, way, self.dtype, name=f"stage_{index}")(x)
            features[f"decoder_{index}"] = x
        return conv3(self.outputs, wide(self.dtype), "conv_out")(x), features


class AutoencoderTiny(Autoencoder, nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> latents -> images; normalized inside.

    `encode` and `decode` are an AutoencoderKl's, but that nothing of the latents is random.

    Attributes:
      num_classes: 0; there are none.
      encoder_width, decoder_width: channels of all stages.
      encoder_depths, decoder_depths: blocks of the stages, in the order of computation.
      latent_channels: Z.
      in_channels: of the images.
      scaling_factor, shift_factor: see `encode`.
      mean, std: per-channel normalization of the images in [0, 1]; the encoder undoes 0.5 and 0.5,
        with which the published weights were trained.
      dtype: compute dtype; parameters stay float32, and so do latents and images.
    """

    num_classes: int = 0
    encoder_width: int = 64
    decoder_width: int = 64
    encoder_depths: tuple[int, ...] = (1, 3, 3, 3)
    decoder_depths: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    in_channels: int = 3
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: Any = jnp.float32

    @property
    def stages(self) -> tuple[int, int]:
        """Of the encoder and of the decoder."""
        return len(self.encoder_depths), len(self.decoder_depths)

    def setup(self):
        sizes = (self.encoder_width, self.encoder_depths, self.latent_channels)
        self.encoder = Encoder(*sizes, self.dtype)
        sizes = (self.decoder_width, self.decoder_depths, self.in_channels)
        self.decoder = Decoder(*sizes, self.dtype)

    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Encodes images and decodes what that gives.

        Returns:
          {"latents": f32[B, h, w, Z], as `encode` gives them; "reconstruction": f32[B, H, W, C],
          normalized as the images are inside}; with `return_features` also a dict of maps
          f[B, h, w, D].
        """
        del train  # nothing is random, nothing is counted
        z, features = self._encode(images)
        decoded, more = self._decode(z)
        latents = scaled(z, self.scaling_factor, self.shift_factor)
        outputs = {"latents": latents, "reconstruction": decoded}
        return (outputs, {**features, **more}) if return_features else outputs

    def posterior(self, images):
        """(mean f32[B, h, w, Z] of the latents before scaling, None): nothing of them is random."""
        return self._encode(images)[0], None

    def _encode(self, images):
        x = (normalize(images, self.mean, self.std) + 1) / 2
        return self.encoder(x.astype(self.dtype))

    def _decode(self, z):
        images, features = self.decoder(z)
        return images * 2 - 1, features
