"""What autoencoders share: two halves of stages, and latents that are shifted and scaled.

A generator takes latents (z - shift_factor) · scaling_factor, whose variance is near 1.
"""

import abc
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from vision_jax.models.layers import Conv
from vision_jax.ops.latents import draw, scaled

SAME = ((1, 1), (1, 1))  # padding of a 3 x 3 convolution that keeps the grid


class Autoencoder(abc.ABC):
    """A mixin of flax modules with the attributes scaling_factor, shift_factor, mean and std.

    They say how many stages their halves have (`stages`), and encode and decode what is normalized
    but not scaled (`posterior`, `_decode`).
    """

    scaling_factor: float
    shift_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    stem: ClassVar[str] = "encoder/conv_in/kernel"
    pyramid: ClassVar[tuple[tuple[str, int], ...]] = ()

    @property
    @abc.abstractmethod
    def stages(self) -> tuple[int, int]:
        """Of the encoder and of the decoder."""

    @property
    def size_divisor(self) -> int:
        """Pixels a side of a cell of the latents: of other images the last are cut off."""
        return 2 ** (self.stages[0] - 1)

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay: stages, and what is before and behind each half's."""
        return sum(self.stages) + 4

    def layer_of(self, path: str) -> int:
        """Depth of a parameter, by the path, in the order of computation."""
        part, _, inner = path.partition("/")
        top = inner.split("/")[0]
        encodes = part in ("encoder", "quant_conv")
        before = 0 if encodes else self.stages[0] + 2  # the layer of this half's first convolution
        if top.startswith("stage_"):
            return before + 1 + int(top.removeprefix("stage_"))
        first = ("conv_in",) if encodes else ("conv_in", "middle")
        if top in first or part == "post_quant_conv":
            return before
        return before + 1 + self.stages[0 if encodes else 1]

    @abc.abstractmethod
    def posterior(self, images):
        """(mean, log of the variance or None) f32[B, h, w, Z], of the latents before scaling."""

    def encode(self, images, keys=None):
        """Latents as a generator takes them.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1]; sides are multiples of `size_divisor`.
          keys: key[B], one for each image, by which its latents are drawn; None: their means.
            Where nothing of them is random they are of no use.

        Returns:
          f32[B, h, w, Z], (z - shift_factor) · scaling_factor.
        """
        mean, logvar = self.posterior(images)
        return scaled(draw(mean, logvar, keys), self.scaling_factor, self.shift_factor)

    def decode(self, latents):
        """Images f32[B, H, W, in_channels] of latents as `encode` gives them.

        They are in [0, 1] but for what the decoder overshoots: clip them before they are shown.
        """
        images, _ = self._decode(latents / self.scaling_factor + self.shift_factor)
        scale, shift = (
            jnp.asarray(values, images.dtype).reshape(1, 1, 1, -1)
            for values in (self.std, self.mean)
        )
        return images * scale + shift

    @abc.abstractmethod
    def _decode(self, z):
        """(normalized images, named features) of latents before scaling."""


def wide(dtype: Any) -> Any:
    """What latents and images are computed in: float32 or better."""
    return np.promote_types(dtype, np.float32)


def conv3(width: int, dtype: Any, name: str) -> Conv:
    """A 3 x 3 convolution that keeps the grid."""
    return Conv(width, (3, 3), padding=SAME, dtype=dtype, name=name)
