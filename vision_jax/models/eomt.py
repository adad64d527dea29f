"""EoMT (Kerssies et al. 2025, https://arxiv.org/abs/2503.19108): a plain ViT that finds masks.

Queries join the tokens in front of a ViT's last blocks. Of what leaves the last block, each query
gives a class and, by its product with the enlarged patches, a mask. In training each of these
blocks attends by a mask that is predicted in front of it, and these masks are given up block by
block until inference needs none. The structure is that of transformers 5.24
(models/eomt/modeling_eomt.py) on a ViT of ours; the published weights have a DINOv2 inside.

Exactness, where ports go wrong:
  - tokens are queries, class token, registers, patches; positions are added to patches alone;
  - one final norm acts on the tokens of each prediction, in front of a block too;
  - a query attends to the patches where its mask, resized to the grid bilinearly without
    averaging, is above 0, and to all other tokens; patches attend to everything;
  - `mask_probs`, a share for each of these blocks, says how many of the queries attend so. It is
    state and lies in the files. In training the others are drawn for each image. At inference a
    share of 0 predicts nothing in front of the block, which goes on with the mask of the block
    before it; a share between is a draw in transformers, and here the first queries;
  - a transposed convolution of 2 x 2 enlarges, GELU is exact, a depthwise convolution of 3 x 3
    without bias and a LayerNorm with epsilon 1e-6 follow, whatever the ViT's epsilon is;
  - the last class is "no object".
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models import vit
from vision_jax.models.layers import ACTIVATIONS, Conv, Dense, LayerNorm, layer_norm
from vision_jax.models.vit import ViT
from vision_jax.ops.resize import resize_bilinear

MASK_EPSILON = 1e-6
ANNEALING_POWER = 0.9
_FAR = -1e9  # of logits that count nothing, as in the reference
PREPROCESSING = {"view": "squash"}  # a ViT takes images of one size
# torch's own start of linear layers and convolutions, uniform in ±1 / √inputs.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_DINOV2 = {"position_prefix": 0, "num_registers": 4, "layer_scale": 1.0}
_SIZES = {"small": "s", "base": "b", "large": "l"}
VARIANTS: dict[str, dict[str, Any]] = {
    f"eomt_{name}_{side}": {
        **dict(zip(("width", "depth", "num_heads", "mlp_width"), vit.SIZES[size], strict=True)),
        "patch_size": 16,
        "image_size": (side, side),
        **_DINOV2,
        "num_blocks": 4 if size == "l" else 3,
    }
    for name, size in _SIZES.items()
    for side in (640, 1280)
}


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("eomt_large_640"), or None."""
    return VARIANTS.get(name)


class Upscale(nn.Module):
    """x[B, h, w, D] on twice the grid: norm(conv_dw(GELU(transposed convolution)))."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        x = Dense(
            4 * channels, use_bias=False, dtype=self.dtype, kernel_init=_uniform, name="conv1"
        )(x)
        x = x.reshape(batch, height, width, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, 2 * height, 2 * width, channels)
        bias = self.param("conv1_bias", nn.initializers.zeros, (channels,))
        x = ACTIVATIONS["gelu"](x + bias.astype(x.dtype).reshape(1, 1, 1, -1))
        x = Conv(
            channels,
            (3, 3),
            padding=((1, 1), (1, 1)),
            groups=channels,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_uniform,
            name="conv_dw",
        )(x)
        return layer_norm("norm", MASK_EPSILON, self.dtype)(x)


class MaskHead(nn.Module):
    """Masks f32[B, H, W, Q] of normed tokens f[B, N, D], of which Q queries come first."""

    num_queries: int
    num_prefix: int
    grid: tuple[int, int]
    upscale_blocks: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        queries, patches = x[:, : self.num_queries], x[:, self.num_queries + self.num_prefix :]
        for index in (1, 2, 3):
            layer = Dense(x.shape[-1], dtype=self.dtype, kernel_init=_uniform, name=f"fc{index}")
            queries = layer(queries)
            queries = ACTIVATIONS["gelu"](queries) if index < 3 else queries
        patches = patches.reshape(x.shape[0], *self.grid, -1)  # [B, h, w, D]
        for index in range(self.upscale_blocks):
            patches = Upscale(self.dtype, name=f"upscale_{index}")(patches)
        wide = np.promote_types(self.dtype, np.float32)
        return jnp.einsum("bhwd,bqd->bhwq", patches, queries, preferred_element_type=wide)


class Eomt(ViT):
    """Images f32[B, H, W, in_channels] in [0, 1] -> a class and a mask of each query.

    The normalization by `mean` and `std` is inside. Arguments are a ViT's, with K num_classes, and:

    Attributes:
      num_queries: Q.
      num_blocks: of the ViT's blocks, so many last ones see the queries.
      upscale_blocks: times that the patches' grid doubles for the masks.
      mask_annealing: (start, stop) in updates for each of these blocks, between which its share of
        masked queries falls from 1 to 0 as a polynomial of power 0.9; () leaves the shares as they
        are, 1 at first. The original has the blocks fall one after the other.
    """

    num_queries: int = 200
    num_blocks: int = 4
    upscale_blocks: int = 2
    mask_annealing: tuple[tuple[int, int], ...] = ()

    takes_merged: ClassVar[bool] = False
    left_out: ClassVar[tuple[str, ...]] = vit.HEADS  # of a ViT's parameters, those it has not
    # How the paths of what no ViT has begin.
    added: ClassVar[tuple[str, ...]] = (
        *("query_embed", "class_head/", "mask_head/", "mask_probs", "mask_count"),
    )
    exported_whole: ClassVar[bool] = True  # and not as the ViT that it was made for
    averages_state: ClassVar[bool] = False  # shares by a schedule are no statistics

    @property
    def looped(self) -> str:
        """Regular expression of the parameters of the blocks that `scan` runs in a loop."""
        first = self.depth - self.num_blocks
        return rf"block_({'|'.join(map(str, range(first)))})/.*"

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Runs the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of the model's size.
          train: dropout and stochastic depth act, and queries whose attention is not masked are
            drawn, with keys from the "dropout" collection; the shares of masked queries (collection
            "batch_stats") fall by their schedule.
          return_features: also return a dict of tokens f[B, N, D]: "embed", "block_0" ... and
            "normed", from the first of the `num_blocks` last blocks on with queries in front.

        Returns:
          "logits" f32[L, B, Q, K + 1] and "mask_logits" f32[L, B, Q, h, w], where the last of L is
          the prediction; in training there are those in front of each of the last blocks as well.
        """
        if images.shape[1:3] != self.image_size:
            raise ValueError(f"images are {images.shape[1:3]}, the model takes {self.image_size}")
        if self.num_blocks > self.depth:
            raise UserError(f"num_blocks {self.num_blocks}: the ViT has {self.depth} blocks")
        shares = self._mask_probs(train)
        x = self._embed(images, train)
        features = {"embed": x}
        first = self.depth - self.num_blocks
        x, outputs, _ = self._blocks(x, train, stop=first)
        features.update({f"block_{index}": output for index, output in enumerate(outputs)})
        shape = (self.num_queries, self.width)
        queries = self.param("query_embed", nn.initializers.normal(1.0), shape)
        queries = jnp.broadcast_to(queries.astype(x.dtype)[None], (x.shape[0], *shape))
        x = jnp.concatenate([queries, x], axis=1)  # [B, Q + P + h·w, D]

        norm = layer_norm("norm", self.layer_norm_eps, self.dtype)
        head = self._mask_head(name="mask_head")
        wide = np.promote_types(self.dtype, np.float32)
        classes = Dense(self.num_classes + 1, dtype=wide, kernel_init=_uniform, name="class_head")

        def predict(x):
            return classes(x[:, : self.num_queries]), head(x).transpose(0, 3, 1, 2)

        found = []
        bias = jnp.zeros(
            (x.shape[0], 1, x.shape[1], x.shape[1]), np.promote_types(x.dtype, np.float32)
        )
        for index, share in enumerate(shares):
            if train or self.is_initializing():
                found.append(predict(norm(x)))
                bias = self._bias(found[-1][1], self._draw(share, len(x)))
            else:
                bias = self._bias_at_inference(x, share, bias)
            place = first + index
            x, (features[f"block_{place}"],), _ = self._blocks(x, train, place, place + 1, bias)
        features["normed"] = x = norm(x)
        found.append(predict(x))
        logits, masks = (jnp.stack(part) for part in zip(*found, strict=True))
        outputs = {"logits": logits, "mask_logits": masks}
        return (outputs, features) if return_features else outputs

    def _mask_head(self, **place):
        return MaskHead(
            *(self.num_queries, self.num_prefix, self.grid, self.upscale_blocks, self.dtype),
            **place,
        )

    def _mask_probs(self, train):
        """f32[num_blocks]: the share of each block's queries that attend by their mask."""
        probs = self.variable("batch_stats", "mask_probs", jnp.ones, (self.num_blocks,))
        count = self.variable("batch_stats", "mask_count", jnp.zeros, (), jnp.int32)
        if self.mask_annealing and train and not self.is_initializing():
            if len(self.mask_annealing) != self.num_blocks:
                raise UserError(
                    f"mask_annealing has {len(self.mask_annealing)} pairs: give {self.num_blocks}, "
                    "one for each block with queries"
                )
            start, stop = jnp.asarray(self.mask_annealing, jnp.float32).T
            done = (count.value.astype(jnp.float32) - start) / jnp.maximum(stop - start, 1)
            probs.value = (1 - jnp.clip(done, 0, 1)) ** ANNEALING_POWER
            count.value += 1
        return probs.value

    def _draw(self, share, batch):
        """bool[B or 1, Q]: which queries attend by their mask; the first without keys."""
        if self.has_rng("dropout"):
            key = self.make_rng("dropout")
            return jax.random.uniform(key, (batch, self.num_queries), share.dtype) < share
        return self._first(share)

    def _first(self, share):
        """bool[1, Q]: the first queries, of such a share."""
        places = (jnp.arange(self.num_queries, dtype=share.dtype) + 0.5) / self.num_queries
        return (places < share)[None]

    def _bias(self, masks, masked):
        """f[B, 1, N, N] for masks f[B, Q, H, W] of the queries that are `masked`, bool[B, Q]."""
        small = resize_bilinear(masks.reshape(-1, *masks.shape[2:], 1), self.grid)
        seen = small.reshape(*masks.shape[:2], -1) > 0  # [B, Q, h·w]
        seen |= ~masked[..., None]
        after = self.num_queries + self.num_prefix
        block = jnp.where(seen, jnp.zeros((), masks.dtype), jnp.asarray(_FAR, masks.dtype))
        sides = ((0, 0), (0, after - self.num_queries + seen.shape[2]), (after, 0))
        return jnp.pad(block, sides)[:, None]

    def _bias_at_inference(self, x, share, bias):
        """The block's own, or the one before where no query is masked; nothing is predicted then.

        By the arrays themselves: flax's layers can't be called in a branch.
        """
        params = self.variables["params"]

        def masked(x):
            norm = LayerNorm(self.layer_norm_eps, self.dtype, parent=None)
            x = norm.apply({"params": params["norm"]}, x)
            masks = self._mask_head(parent=None).apply({"params": params["mask_head"]}, x)
            return self._bias(masks.transpose(0, 3, 1, 2), self._first(share))

        return jax.lax.cond(share > 0, masked, lambda x: bias, x)
