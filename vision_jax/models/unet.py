"""U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) on any of our CNNs.

An encoder gives maps from fine to coarse; block by block the coarsest one grows, joins the
encoder's map of its new size and passes two convolutions, until it has the image's size. The
decoder is that of segmentation_models_pytorch 0.6 (decoders/unet/decoder.py), which with a ResNet
computes the same, from the same weights.

Exactness, where ports go wrong:
  - maps grow by the nearest pixel, floor(i · old / new) as torch has it, and not bilinearly;
  - a map joins with the grown one first and the encoder's behind it;
  - convolutions have no bias and are followed by BatchNorm (epsilon 1e-5) and ReLU;
  - of a ResNet the finest map is the stem's before its max pool; what no map has the size of grows
    alone, as at the image's own size;
  - of an EfficientNet the coarsest map is that of its last convolution, which changes no stride;
  - images of any size do: each map has the size that the encoder gives it.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.backbone import OnAnyBackbone, on_variant
from vision_jax.models.layers import Conv, ConvNormReLU, normalize
from vision_jax.models.taps import OUTPUT, tap

DECODER = (256, 128, 64, 32, 16)  # channels, coarse to fine; segmentation_models_pytorch's


class PlainEncoder(nn.Module):
    """Two convolutions a stage, each stage after the first on half of the grid (a 2 x 2 max pool).

    Attributes:
      widths: channels of each stage.
      in_channels, mean, std: of the images.
      freeze_norm, dtype: as everywhere; `remat` and `drop_path` change nothing here.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128)
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    freeze_norm: bool = False
    dtype: Any = jnp.float32
    remat: bool = False
    drop_path: float = 0.0
    num_classes: int = 0

    stem = "stage_0/conv1/conv/kernel"

    @property
    def depths(self) -> tuple[int, ...]:
        """One block each."""
        return (1,) * len(self.widths)

    @property
    def pyramid(self) -> tuple[tuple[str, int], ...]:
        """Named features and their stride in pixels, from fine to coarse."""
        return tuple((f"stage_{i}", 2**i) for i in range(len(self.widths)))

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay, and a head's that is not there, as others count."""
        return len(self.widths) + 1

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: its stage's."""
        return int(path.partition("/")[0].removeprefix("stage_"))

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """{"stage_0": f[B, H, W, C], ...} beside None: there is no head."""
        del return_features
        x = normalize(images, self.mean, self.std)
        features = {}
        for index, width in enumerate(self.widths):
            if index:
                more = [(0, side % 2) for side in x.shape[1:3]]  # ceil_mode
                x = nn.max_pool(x, (2, 2), (2, 2), more)
            stage = PlainStage(width, self.freeze_norm, self.dtype, name=f"stage_{index}")
            features[f"stage_{index}"] = x = stage(x, train)
        return None, features


class PlainStage(nn.Module):
    """Two convolutions of one width."""

    width: int
    freeze_norm: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        for number in (1, 2):
            x = ConvNormReLU(self.width, self.freeze_norm, self.dtype, name=f"conv{number}")(
                x, train
            )
        return tap(self, OUTPUT, x)


class Block(nn.Module):
    """x grows to the size of the encoder's map, joins it, and passes two convolutions."""

    width: int
    freeze_norm: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, size, skip, train: bool):
        x = grow(x, size)
        if skip is not None:
            x = jnp.concatenate([x, skip], axis=-1)
        x = ConvNormReLU(self.width, self.freeze_norm, self.dtype, name="conv1")(x, train)
        return ConvNormReLU(self.width, self.freeze_norm, self.dtype, name="conv2")(x, train)


def grow(x, size):
    """f[B, h, w, C] -> f[B, *size, C], the nearest pixel at floor(i · old / new)."""
    for axis, (old, new) in enumerate(zip(x.shape[1:3], size, strict=True), 1):
        if new == 2 * old:
            x = jnp.repeat(x, 2, axis=axis)
        elif new != old:
            # torch multiplies in float32.
            places = np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new))
            x = jnp.take(x, np.minimum(places.astype(np.int32), old - 1), axis=axis)
    return x


_CNNS = ("resnet", "regnet", "efficientnet", "convnext")


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of "unet_plain" or of "unet_" and a CNN's name ("unet_resnet50"), or None."""
    if name == "unet_plain":
        return {"encoder": "plain", "decoder_widths": (64, 32, 16)}
    return on_variant(name, "unet_", _CNNS)


class UNet(OnAnyBackbone):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits of each pixel.

    Attributes:
      decoder_widths: channels of the decoder's blocks from coarse to fine, one for each time that
        the encoder halves the grid.

    The others are `OnAnyBackbone`'s.
    """

    encoder: Literal["plain", "resnet", "regnet", "efficientnet", "convnext"]
    decoder_widths: tuple[int, ...] = DECODER

    @property
    def _encoder(self) -> Any:
        return PlainEncoder if self.encoder == "plain" else super()._encoder

    @property
    def _layers_above(self) -> int:  # type: ignore[override]
        return len(self.decoder_widths) + 1

    def _depth_above(self, top: str) -> int:
        """Block by block, the head last."""
        index = top.removeprefix("decoder_")
        return int(index) if index != top else len(self.decoder_widths)

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size.
          train: BatchNorm takes the batch's statistics and updates its own (collection
            "batch_stats") unless frozen; drop_path acts, with keys from "dropout".
          return_features: also return a dict of named intermediates f[B, h, w, C]: the encoder's,
            and the decoder's "decoder_0" ...

        Returns:
          {"logits": f32[B, H, W, num_classes]}, or (that, features).

        Raises:
          UserError: other than one decoder width for each halving.
        """
        encoder = self._backbone(name="backbone")
        # Of a ResNet also what its stem gives before the pool.
        wanted = "unpooled" if self.encoder == "resnet" else True
        _, features = encoder(images, train=train, return_features=wanted)
        features.pop("pooled", None)
        maps = self._maps(features, images.shape[1:3])
        if len(maps) != len(self.decoder_widths) + 1:
            raise UserError(
                f"unet: decoder_widths {self.decoder_widths}: the encoder halves the grid"
                f" {len(maps) - 1} times: give a number for each"
            )
        _, x = maps[-1]
        for index, width in enumerate(self.decoder_widths):
            size, skip = maps[-2 - index]
            block = Block(width, self.freeze_norm, self.dtype, name=f"decoder_{index}")
            features[f"decoder_{index}"] = x = block(x, size, skip, train)
        logits = Conv(
            self.num_classes,
            (3, 3),
            padding=((1, 1), (1, 1)),
            dtype=np.promote_types(self.dtype, np.float32),
            kernel_init=nn.initializers.xavier_uniform(),
            name="class_head",
        )(x)
        outputs = {"logits": logits}
        return (outputs, features) if return_features else outputs

    def _maps(self, features: dict[str, Any], size: tuple[int, int]) -> list[tuple[Any, Any]]:
        """(size, map or None) at each stride 1, 2, 4, ... up to the coarsest."""
        found = {stride: features[name] for name, stride in self.pyramid}
        coarsest = max(found)
        if self.encoder == "efficientnet":
            found[coarsest] = features["last"]
        stem = features.pop("unpooled", features.get("stem"))
        if stem is not None and stem.shape[1:3] == tuple(-(-side // 2) for side in size):
            found.setdefault(2, stem)
        maps = []
        for stride in (2**i for i in range(coarsest.bit_length())):
            own = found.get(stride)
            sides = tuple(-(-side // stride) for side in size)
            maps.append((sides if own is None else own.shape[1:3], own))
        return maps
