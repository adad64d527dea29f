"""DeepLabV3 (Chen et al. 2017, https://arxiv.org/abs/1706.05587): a dilated ResNet and its context.

The structure is that of torchvision 0.29 (models/segmentation/deeplabv3.py, fcn.py).

Exactness, where ports go wrong:
  - the ResNet's last two stages keep the grid (stride 8) and dilate by 2 and 4; the first block of
    each has the dilation of the stage before;
  - atrous convolutions are 12, 24 and 36 cells apart and padded as much, which is for stride 8;
  - the pooled branch has a BatchNorm too, whose batch is one cell of each image;
  - dropout 0.5 after the projection and 0.1 in the auxiliary head, in training;
  - the auxiliary head is of the last stage but one, with a quarter of its channels.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.models.backbone import OnBackbone
from vision_jax.models.layers import Conv, ConvNormReLU
from vision_jax.models.resnet import VARIANTS as RESNETS
from vision_jax.models.resnet import ResNet

AUXILIARY_DROPOUT = 0.1
VARIANTS: dict[str, dict[str, Any]] = {
    f"deeplabv3_resnet{size}": RESNETS[f"resnet{size}"] for size in (50, 101)
}

# torch's own start of convolutions: uniform in ±1 / √inputs.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("deeplabv3_resnet50"), or None."""
    return VARIANTS.get(name)


class DeepLabV3(OnBackbone):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, H / 8, W / 8, num_classes].

    Attributes:
      num_classes: K.
      depths, block, widths, stem_width: of the ResNet, as there.
      dilation: 2 for logits at stride 8; True for 16, with half the rates.
      rates: cells between the pixels that each atrous convolution sees.
      width: channels of the context.
      auxiliary_head: a head of the last stage but one, whose loss helps training.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      dropout: rate in training, of the projected context; torchvision's is 0.5. The auxiliary head
        has 0.1 where this is not 0.
      freeze_norm: BatchNorm keeps its running statistics in training.
      dtype: compute dtype; parameters stay float32. The heads compute in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    num_classes: int
    depths: tuple[int, ...]
    block: Literal["basic", "bottleneck"] = "bottleneck"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_width: int = 64
    dilation: Literal[True, 2] = 2
    rates: tuple[int, ...] = (12, 24, 36)
    width: int = 256
    auxiliary_head: bool = False
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dropout: float = 0.0
    freeze_norm: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size.
          train: BatchNorm takes the batch's statistics and updates its own (collection
            "batch_stats") unless frozen; dropout acts, with keys from "dropout".
          return_features: also return a dict of named intermediates f[B, h, w, C]: "stem",
            "stage_0" ..., and "context", the projected one.

        Returns:
          {"logits": f32[B, h, w, num_classes]}, with an auxiliary head "auxiliary_logits" of the
          same shape, or (these, features).
        """
        _, features = self._backbone(name="backbone")(images, train=train, return_features=True)
        del features["pooled"]
        last = len(self.depths) - 1
        x = features[f"stage_{last}"]
        branches = [self._conv_norm("aspp_0", 1)(x, train)]
        for index, rate in enumerate(self.rates, 1):
            branches.append(self._conv_norm(f"aspp_{index}", 3, rate)(x, train))
        pooled = self._conv_norm("aspp_pool", 1)(x.mean((1, 2), keepdims=True), train)
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = self._conv_norm("project", 1)(jnp.concatenate(branches, axis=-1), train)
        features["context"] = x
        x = self._dropped(x, self.dropout, train)
        x = self._conv_norm("head_conv", 3)(x, train)
        outputs = {"logits": self._head("class_head")(x)}
        if self.auxiliary_head:
            x = features[f"stage_{last - 1}"]
            x = self._conv_norm("auxiliary_conv", 3, features=x.shape[-1] // 4)(x, train)
            x = self._dropped(x, AUXILIARY_DROPOUT if self.dropout else 0.0, train)
            outputs["auxiliary_logits"] = self._head("auxiliary_class_head")(x)
        return (outputs, features) if return_features else outputs

    def _conv_norm(self, name, size, dilation=1, features=None):
        norms = (self.freeze_norm, self.dtype)
        return ConvNormReLU(features or self.width, *norms, size, dilation, _uniform, name=name)

    def _head(self, name):
        dtype = np.promote_types(self.dtype, np.float32)
        return Conv(self.num_classes, (1, 1), dtype=dtype, kernel_init=_uniform, name=name)

    def _dropped(self, x, rate, train):
        return nn.Dropout(rate, deterministic=False)(x) if train and rate else x

    def _backbone(self, **place):
        return self._built(ResNet, **place)
