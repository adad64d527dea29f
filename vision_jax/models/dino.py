"""A ViT with the heads of self-distillation (Caron et al. 2021, https://arxiv.org/abs/2104.14294).

A head maps the class token to its likeness to each of K prototypes: an MLP, a vector of length 1,
and the cosine with each prototype (DINOHead of the original code, whose last layer is normalized
and has no magnitude of its own). iBOT (https://arxiv.org/abs/2111.07832) and DINOv2
(https://arxiv.org/abs/2304.07193) also look at patches, by the same head or one of their own, and
put a token in the place of a masked patch. The ViT's parameters have the names that they have
there, so a ViT's weights are a part of this model as they are, and without what is `added` the
parameters are a ViT's again.

Exactness, where ports go wrong:
  - images of another size than `image_size`, the local crops, take the position embeddings
    resampled as timm's dynamic_img_size does, antialiased, and not as DINO's code does;
  - the last norm acts on all tokens, whatever the ViT's pooling would be;
  - a patch is masked before its position is added, and the token begins at zero;
  - a head's layers begin as normal numbers of 0.02, which is what trunc_normal_(std=0.02) draws,
    with its cut at ±2; a vector is divided by its length, at least 1e-12.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.models import vit
from vision_jax.models.layers import ACTIVATIONS, Dense
from vision_jax.models.vit import ViT

HEAD, PATCH_HEAD = "dino_head", "ibot_head"
# The originals' names; each is a ViT of these sizes with the paper's head.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dino_vits16": ("s/16", {}),
    "dino_vits8": ("s/8", {}),
    "dino_vitb16": ("b/16", {}),
    "dino_vitb8": ("b/8", {}),
    **{
        f"dinov2_vit{size}14": (f"{size}/14", {"layer_scale": 1e-5, "patch_prototypes": 65_536})
        for size in ("s", "b", "l")
    },
}
_SHORTEST = 1e-12  # of a vector that is divided by its length


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a variant's name, or None for others."""
    known = VARIANTS.get(name)
    return None if known is None else {**vit.variant_arguments(known[0]), **known[1]}


class Head(nn.Module):
    """Tokens f[..., D] -> cosines f32[..., K] with the prototypes."""

    prototypes: int
    width: int
    depth: int
    bottleneck: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(0.02)
        for index in range(1, self.depth + 1):
            last = index == self.depth
            features = self.bottleneck if last else self.width
            x = Dense(features, dtype=self.dtype, kernel_init=init, name=f"fc{index}")(x)
            x = x if last else ACTIVATIONS["gelu"](x)
        wide = np.promote_types(self.dtype, np.float32)
        x = _unit(x.astype(wide), -1)
        shape = (self.bottleneck, self.prototypes)
        prototypes = _unit(self.param("prototypes", init, shape), 0)
        return jnp.matmul(
            x.astype(self.dtype), prototypes.astype(self.dtype), preferred_element_type=wide
        )


def _unit(x: jax.Array, axis: int) -> jax.Array:
    """Vectors of length 1 along the axis; the gradient of a vector of zeros is zero."""
    squared = (x * x).sum(axis, keepdims=True)
    length = jnp.sqrt(jnp.maximum(squared, _SHORTEST**2))
    return x / length


class Dino(ViT):
    """Images f32[B, H, W, in_channels] in [0, 1] -> a dict of what the heads say of them.

    "logits" f32[B, K], of the class token, or of the mean of the patches where there is none;
    "token" f32[B, D] and "patch_tokens" f32[B, N, D], after the last norm; "patch_logits"
    f32[B, M, K'] of chosen patches. The normalization by `mean` and `std` is inside. The centers
    of the teacher's logits are state beside the parameters: f32[1, K] "center" and f32[1, K']
    "patch_center", which whoever trains moves. Arguments are a ViT's, with num_classes 0, and:

    Attributes:
      prototypes: K.
      patch_prototypes: K' of a head for patches alone; 0 for the one head of both.
      head_width, head_depth, bottleneck: of the MLP in a head: hidden units, layers, outputs.
    """

    prototypes: int = 65_536
    patch_prototypes: int = 0
    head_width: int = 2048
    head_depth: int = 3
    bottleneck: int = 256

    takes_merged: ClassVar[bool] = False
    left_out: ClassVar[tuple[str, ...]] = vit.HEADS  # of a ViT's parameters, those it has not
    # How the paths of what no ViT has begin.
    added: ClassVar[tuple[str, ...]] = (
        f"{HEAD}/",
        f"{PATCH_HEAD}/",
        "mask_token",
        "center",
        "patch_center",
    )
    averages_state: ClassVar[bool] = False  # the centers are those of averaged weights already

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: as in the ViT, and the heads' at depth + 1."""
        return 0 if path == "mask_token" else super().layer_of(path)

    @nn.compact
    def __call__(
        self,
        images,
        masked=None,
        places=None,
        *,
        train: bool = False,
        return_features: bool = False,
    ):
        """Runs the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], sides that are multiples of the patch.
          masked: bool[B, N], patches that a token takes the place of; None: no patch.
          places: i32[B, M], patches that "patch_logits" are of; None: of none.
          train: dropout and stochastic depth act, with keys from the "dropout" collection.
          return_features: also return a dict of tokens f[B, P + N, D]: "embed", "block_0" ... and
            "normed".
        """
        token = self.param("mask_token", nn.initializers.zeros, (1, 1, self.width))

        def hide(patches):  # [B, N, D]
            return jnp.where(masked[..., None], token.astype(patches.dtype), patches)

        features = self._tokens(images, train, None if masked is None else hide)
        x = features["normed"]
        patches = x[:, self.num_prefix :]
        whole = x[:, 0] if self.class_token else patches.mean(1)

        sizes = (self.head_width, self.head_depth, self.bottleneck, self.dtype)
        head = Head(self.prototypes, *sizes, name=HEAD)
        patch_head = head
        if self.patch_prototypes:
            patch_head = Head(self.patch_prototypes, *sizes, name=PATCH_HEAD)
        self.variable("batch_stats", "center", jnp.zeros, (1, self.prototypes))
        shape = (1, self.patch_prototypes or self.prototypes)
        self.variable("batch_stats", "patch_center", jnp.zeros, shape)
        wide = np.promote_types(self.dtype, np.float32)
        result = {
            "logits": head(whole),
            "token": whole.astype(wide),
            "patch_tokens": patches.astype(wide),
        }
        if places is not None:
            chosen = jnp.take_along_axis(
                patches, places[..., None], axis=1, mode="promise_in_bounds"
            )
            result["patch_logits"] = patch_head(chosen)  # [B, M, K']
        elif self.is_initializing():
            patch_head(patches)
        return (result, features) if return_features else result
