"""A ViT with the projection head of contrastive learning (SimCLR, Chen et al. 2020).

https://arxiv.org/abs/2002.05709: an MLP maps the class token to the vectors that the loss compares,
and is left out afterwards. The ViT's parameters have the names that they have there, so a ViT's
weights are a part of this model as they are, and without what is `added` the parameters are a ViT's
again.

Exactness, where ports go wrong:
  - the loss divides the vectors by their length, and not the head;
  - the head has no BatchNorm, which the paper's code has behind each of its layers: nothing of an
    image depends on the others of its batch but in the loss;
  - the last norm acts on all tokens, whatever the ViT's pooling would be.
"""

from typing import Any, ClassVar

import numpy as np
from flax import linen as nn

from vision_jax.models import vit
from vision_jax.models.layers import ACTIVATIONS, Dense
from vision_jax.models.vit import ViT

HEAD = "contrastive_head"
# ViTs of these sizes with the paper's head.
VARIANTS = {f"simclr_vit{size}{patch}": f"{size}/{patch}" for size in "sb" for patch in (16, 8)}


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a variant's name, or None for others."""
    known = VARIANTS.get(name)
    return None if known is None else vit.variant_arguments(known)


class ProjectionHead(nn.Module):
    """Tokens f[B, D] -> vectors f32[B, P], by an MLP with ReLU."""

    width: int
    depth: int
    outputs: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for index in range(1, self.depth):
            x = ACTIVATIONS["relu"](Dense(self.width, dtype=self.dtype, name=f"fc{index}")(x))
        wide = np.promote_types(self.dtype, np.float32)
        return Dense(self.outputs, dtype=wide, name=f"fc{self.depth}")(x)


class SimClr(ViT):
    """Images f32[B, H, W, in_channels] in [0, 1] -> a dict.

    "logits" f32[B, P], the projections that the loss compares, of the class token, or of the mean
    of the patches where there is none; "token" f32[B, D], what is projected, and "patch_tokens"
    f32[B, N, D], after the last norm. The normalization by `mean` and `std` is inside. Arguments
    are a ViT's, with num_classes 0, and:

    Attributes:
      head_width, head_depth: of the projection's MLP: hidden units, layers.
      projection: P.
    """

    head_width: int = 2048
    head_depth: int = 2
    projection: int = 128

    takes_merged: ClassVar[bool] = False
    left_out: ClassVar[tuple[str, ...]] = vit.HEADS  # of a ViT's parameters, those it has not
    added: ClassVar[tuple[str, ...]] = (f"{HEAD}/",)  # how the paths of what no ViT has begin

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Runs the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], sides that are multiples of the patch.
          train: dropout and stochastic depth act, with keys from the "dropout" collection.
          return_features: also return a dict of tokens f[B, P + N, D]: "embed", "block_0" ... and
            "normed".
        """
        features = self._tokens(images, train)
        tokens = features["normed"]
        patches = tokens[:, self.num_prefix :]
        whole = tokens[:, 0] if self.class_token else patches.mean(1)
        head = ProjectionHead(
            self.head_width, self.head_depth, self.projection, self.dtype, name=HEAD
        )
        wide = np.promote_types(self.dtype, np.float32)
        result = {
            "logits": head(whole),
            "token": whole.astype(wide),
            "patch_tokens": patches.astype(wide),
        }
        return (result, features) if return_features else result
