"""SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343): a ViT, and a text tower beside it.

The image tower is a ViT of any kind: its parameters have the names that they have there, and what
is added lies under `text/`, beside the scale and the bias of the logits. So a ViT's weights are an
image tower as they are, and without what is `added` the parameters are a ViT's again. The text
tower ends in as many channels as the ViT's pooled features have, whatever its own width.

Exactness, where ports go wrong:
  - logits are exp(logit_scale) · cosine + logit_bias, which begin at log 10 and -10 as in the paper
    (transformers begins with 0 and 0, where every pair costs log 2);
  - nothing projects the image: its features are the pooled ones.
"""

import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.models import vit
from vision_jax.models.text import TextTower
from vision_jax.models.vit import ViT
from vision_jax.ops.contrastive import unit

TEXT = "text/"  # how the paths of the text tower begin
LOGIT_SCALE, LOGIT_BIAS = "logit_scale", "logit_bias"
# The published sizes; the text tower is as wide and deep as the image tower.
VARIANTS = {
    f"siglip_{size}_patch{patch}_{image}": f"vit_{size}_patch{patch}_siglip_{image}"
    for size, patch, image in (
        *(("base", 16, image) for image in (224, 256, 384, 512)),
        *(("large", 16, image) for image in (256, 384)),
        *(("so400m", 14, image) for image in (224, 384)),
    )
}


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a variant's name, or None for others."""
    known = VARIANTS.get(name)
    if known is None:
        return None
    image = vit.VARIANTS[known]
    text = {f"text_{key}": image[key] for key in ("width", "depth", "num_heads", "mlp_width")}
    return {**image, "activation": "gelu_tanh", **text}  # timm's is exact, SigLIP's tanh


class Siglip(ViT):
    """Images f32[B, H, W, in_channels] in [0, 1], tokens i32[T, L] -> a dict of their features.

    "image" f32[B, D] and "text" f32[T, D] have length 1; "logit_scale" and "logit_bias" f32[] are
    such that an image and a text belong together by exp(logit_scale) · cosine + logit_bias. The
    normalization by `mean` and `std` is inside. Arguments are a ViT's, with num_classes 0, and:

    Attributes:
      vocab_size: different tokens.
      text_length: L, tokens of a text, padding among them.
      text_width, text_depth, text_num_heads, text_mlp_width, text_activation, text_layer_norm_eps:
        of the text tower.
      remat, dropout: of both towers; scan and drop_path are the image tower's.
    """

    vocab_size: int = 32_000
    text_length: int = 64
    text_width: int = 768
    text_depth: int = 12
    text_num_heads: int = 12
    text_mlp_width: int = 3072
    text_activation: str = "gelu_tanh"
    text_layer_norm_eps: float = 1e-6

    # Of a ViT's parameters, those that it has not: weights may have them all the same.
    left_out: ClassVar[tuple[str, ...]] = tuple(p for p in vit.HEADS if p.startswith("head"))
    # How the paths of what no ViT has begin.
    added: ClassVar[tuple[str, ...]] = (TEXT, LOGIT_SCALE, LOGIT_BIAS)

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: as in the ViT; both towers end at the same layer."""
        if not path.startswith(TEXT):
            return super().layer_of(path)
        top = path.removeprefix(TEXT).split("/")[0]
        if top.startswith("block_"):
            from_end = self.text_depth - int(top.removeprefix("block_"))
            return max(self.depth + 1 - from_end, 1)
        return {"token_embed": 0, "pos_embed": 0, "norm": self.depth}.get(top, self.depth + 1)

    def init_positions(self, key, shape):
        """The first position embeddings f32[1, P + N, D], larger than a classifier's."""
        return nn.initializers.normal(self.width**-0.5)(key, shape)

    @nn.compact
    def __call__(self, images, tokens=None, *, train: bool = False, return_features: bool = False):
        """Runs one tower, or both.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of `image_size`; None: no "image".
          tokens: i32[T, L]; None: no "text".
          train: dropout and stochastic depth act, with keys from the "dropout" collection.
          return_features: also return a dict of the image's tokens f[B, P + N, D], "embed",
            "block_0" ..., and of features f[B, D] before they have length 1, "pooled" and
            "text_pooled".
        """
        result, features = {}, {}
        wide = np.promote_types(self.dtype, np.float32)
        if images is not None:
            if images.shape[1:3] != self.image_size:
                raise ValueError(
                    f"images are {images.shape[1:3]}, the model takes {self.image_size}"
                )
            x = self._embed(images, train)
            features["embed"] = x
            x, outputs, sizes = self._blocks(x, train)
            features.update({f"block_{index}": output for index, output in enumerate(outputs)})
            pooled = self._pool(x, sizes)
            if pooled.ndim == 3:  # of a class and a distillation token
                pooled = pooled.mean(1)
            features["pooled"] = pooled
            result["image"] = unit(pooled.astype(wide))
        if tokens is not None or self.is_initializing():
            tower = TextTower(
                vocab_size=self.vocab_size,
                length=self.text_length,
                width=self.text_width,
                depth=self.text_depth,
                num_heads=self.text_num_heads,
                mlp_width=self.text_mlp_width,
                outputs=self.width * (2 if self.pool == "token_avg" else 1),
                activation=self.text_activation,
                layer_norm_eps=self.text_layer_norm_eps,
                dropout=self.dropout,
                dtype=self.dtype,
                remat=self.remat,
                name="text",
            )
            if tokens is None:
                tower(jnp.zeros((1, self.text_length), jnp.int32), train)
            else:
                features["text_pooled"] = tower(tokens, train)
                result["text"] = unit(features["text_pooled"].astype(wide))
        for name, first in ((LOGIT_SCALE, math.log(10)), (LOGIT_BIAS, -10.0)):
            begin = nn.initializers.constant(first)
            result[name] = self.param(name, begin, (1,))[0].astype(wide)
        return (result, features) if return_features else result
