"""UPerNet (Xiao et al. 2018, https://arxiv.org/abs/1807.10221) on any backbone with a pyramid.

The structure is that of transformers 5.24 (models/upernet/modeling_upernet.py), which has it on
Swin, ConvNeXt and ResNet: the coarsest map is pooled to a few cells at several scales, a pyramid
leads from it to finer maps, and all of its levels are fused at the finest one's size.

Exactness, where ports go wrong:
  - each map of a Swin and a ConvNeXt has a LayerNorm of its own (epsilon 1e-5 and 1e-6), and of
    other backbones none;
  - a Swin's windows are never clipped to its map and shifted in every second block, also where one
    window holds all of it;
  - pooled cells overlap where their number does not divide the map's: from floor(i · h / n) to
    ceil((i + 1) · h / n);
  - convolutions have no bias and are followed by BatchNorm (epsilon 1e-5) and ReLU;
  - maps grow bilinearly without aligned corners; the logits stay at the finest map's size, where
    transformers enlarges them to the image's;
  - the auxiliary head is of the third map.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.backbone import ENCODERS, OnAnyBackbone, on_variant
from vision_jax.models.layers import Conv, ConvNormReLU, layer_norm
from vision_jax.ops.resize import pool_adaptive, resize_bilinear

LEVELS = 4  # the coarsest maps of the backbone, or all where it has fewer
AUXILIARY_LEVEL = 2
_small = nn.initializers.normal(0.02)
NORMS = {"swin": 1e-5, "convnext": 1e-6}  # of the maps of a backbone that ends without one


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of "upernet_" and a backbone's name ("upernet_convnext_tiny"), or None."""
    arguments = on_variant(name, "upernet_", ENCODERS)
    return arguments and {**arguments, "map_norm_eps": NORMS.get(arguments["encoder"])}


class UPerNet(OnAnyBackbone):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, H / 4, W / 4, num_classes].

    Attributes:
      width: channels of the pyramid.
      pool_sizes: cells a side of the pooled maps.
      map_norm_eps: epsilon of the LayerNorm of each map of the backbone; None for no such norms.
      auxiliary_head: a head of the third map, whose loss helps training.
      auxiliary_width, auxiliary_depth: channels of it, and its 3 x 3 convolutions.

    The others are `OnAnyBackbone`'s.
    """

    encoder: Literal["resnet", "regnet", "efficientnet", "convnext", "mit", "swin"]
    width: int = 512
    pool_sizes: tuple[int, ...] = (1, 2, 3, 6)
    map_norm_eps: float | None = None
    auxiliary_head: bool = False
    auxiliary_width: int = 256
    auxiliary_depth: int = 1

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size.
          train: BatchNorm takes the batch's statistics and updates its own (collection
            "batch_stats") unless frozen; drop_path acts, with keys from "dropout".
          return_features: also return a dict of named intermediates f[B, h, w, C]: the backbone's,
            "pooled_context" of the coarsest map and "fused", which the head takes.

        Returns:
          {"logits": f32[B, h, w, num_classes]}, with an auxiliary head "auxiliary_logits" at the
          third map's size, or (these, features).

        Raises:
          UserError: an auxiliary head, and no third map.
        """
        backbone = self._backbone(name="backbone")
        _, features = backbone(images, train=train, return_features="maps")
        features.pop("pooled", None)
        maps = [features[name] for name, _ in self.pyramid[-LEVELS:]]
        if self.map_norm_eps is not None:
            norms = (
                layer_norm(f"map_norm_{i}", self.map_norm_eps, self.dtype) for i in range(len(maps))
            )
            maps = [norm(x) for norm, x in zip(norms, maps, strict=True)]

        features["pooled_context"] = above = self._context(maps[-1], train)
        levels = [above]
        for index in reversed(range(len(maps) - 1)):
            x = self._conv(f"lateral_{index}", 1, maps[index], train)
            above = x + resize_bilinear(above, x.shape[1:3])
            levels.insert(0, self._conv(f"fpn_{index}", 3, above, train))
        grid = levels[0].shape[1:3]
        x = jnp.concatenate([resize_bilinear(level, grid) for level in levels], axis=-1)
        features["fused"] = x = self._conv("fuse", 3, x, train)
        outputs = {"logits": self._head("class_head")(x)}
        if self.auxiliary_head:
            if len(maps) <= AUXILIARY_LEVEL:
                raise UserError(f"upernet: auxiliary_head: {self.encoder} has no third map")
            x = maps[AUXILIARY_LEVEL]
            for index in range(self.auxiliary_depth):
                x = self._conv(f"auxiliary_{index}", 3, x, train, self.auxiliary_width)
            outputs["auxiliary_logits"] = self._head("auxiliary_class_head")(x)
        return (outputs, features) if return_features else outputs

    def _context(self, x, train):
        """The coarsest map beside what it is on average in a few cells, fused."""
        parts = [x]
        for index, side in enumerate(self.pool_sizes):
            pooled = self._conv(f"pool_{index}", 1, pool_adaptive(x, (side, side)), train)
            parts.append(resize_bilinear(pooled, x.shape[1:3]))
        return self._conv("context", 3, jnp.concatenate(parts, axis=-1), train)

    def _conv(self, name, size, x, train, width=None):
        norms = (self.freeze_norm, self.dtype)
        return ConvNormReLU(width or self.width, *norms, size, name=name)(x, train)

    def _head(self, name):
        dtype = np.promote_types(self.dtype, np.float32)
        return Conv(self.num_classes, (1, 1), dtype=dtype, kernel_init=_small, name=name)
