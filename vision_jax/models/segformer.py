"""SegFormer (Xie et al. 2021, https://arxiv.org/abs/2105.15203): a pyramid and a decoder of MLPs.

The structure is that of transformers 5.24 (models/segformer/modeling_segformer.py); the encoder is
models/mit.py.

Exactness, where ports go wrong:
  - the decoder's maps are concatenated from coarse to fine, so the first channels of its fusing
    kernel are the last stage's;
  - maps grow bilinearly without aligned corners to the first stage's size (125 x 84 of an image of
    500 x 333), where the logits stay: the loss and the predictions enlarge these;
  - BatchNorm (epsilon 1e-5, momentum 0.1) and ReLU after the fusion, and dropout before the head;
  - in transformers num_labels = 1 is a sigmoid with a binary loss.

Fusing is linear, and so is enlarging: here each map is multiplied by its part of the fusing kernel
while it is small, and what is enlarged is added up. That is a third of the reference's arithmetic.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.models import mit
from vision_jax.models.backbone import OnBackbone
from vision_jax.models.layers import BatchNorm, Dense
from vision_jax.models.mit import MixTransformer
from vision_jax.ops.resize import resize_bilinear

VARIANTS: dict[str, dict[str, Any]] = {
    name.replace("mit", "segformer"): {
        **arguments,
        "decoder_width": 256 if name in ("mit_b0", "mit_b1") else 768,
    }
    for name, arguments in mit.VARIANTS.items()
}

_small = nn.initializers.truncated_normal(0.02)


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("segformer_b0"), or None."""
    return VARIANTS.get(name)


class SegFormer(OnBackbone):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, H / 4, W / 4, num_classes].

    Attributes:
      num_classes: K.
      depths, widths, num_heads, reductions, patch_sizes, strides, mlp_ratios: of the encoder, as
        there.
      decoder_width: channels of the decoder.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      dropout: rate in training, of what the head takes.
      drop_path: rate in training, which grows linearly with the encoder's depth up to this value.
      freeze_norm: BatchNorm keeps its running statistics in training.
      dtype: compute dtype; parameters stay float32. The head computes in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    num_classes: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)
    decoder_width: int = 256
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dropout: float = 0.0
    drop_path: float = 0.0
    freeze_norm: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size.
          train: BatchNorm takes the batch's statistics and updates its own (collection
            "batch_stats") unless frozen; dropout and drop_path act, with keys from "dropout".
          return_features: also return a dict of named intermediates f[B, h, w, C]: "stage_0" ...,
            and "fused", which the head takes.

        Returns:
          logits f32[B, h, w, num_classes] at the first stage's stride, or (logits, features).
        """
        _, features = self._backbone(name="backbone")(images, train=train, return_features=True)
        del features["pooled"]
        fused = None
        for index in reversed(range(len(self.depths))):
            x = features[f"stage_{index}"]
            x = Dense(
                self.decoder_width, dtype=self.dtype, kernel_init=_small, name=f"proj_{index}"
            )(x)
            x = Dense(
                self.decoder_width,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=_small,
                name=f"fuse_{index}",
            )(x)
            x = resize_bilinear(x, features["stage_0"].shape[1:3])
            fused = x if fused is None else fused + x
        x = BatchNorm(frozen=self.freeze_norm, dtype=self.dtype, name="fuse_bn")(fused, train)
        features["fused"] = x = nn.relu(x)
        if train and self.dropout:
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        dtype = np.promote_types(self.dtype, np.float32)
        logits = Dense(self.num_classes, dtype=dtype, kernel_init=_small, name="class_head")(x)
        return (logits, features) if return_features else logits

    def _backbone(self, **place):
        return self._built(MixTransformer, **place)
