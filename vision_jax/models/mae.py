"""Masked autoencoder (He et al. 2022, https://arxiv.org/abs/2111.06377): a ViT and a light decoder.

The encoder is a ViT of any kind: its parameters have the names that they have there, and what is
added lies under `decoder/`. So a ViT's weights are an encoder as they are, and without `decoder/`
the parameters are a ViT's again.

Exactness, where ports go wrong:
  - positions are added before patches are taken out, and do not train: sines in both parts, unless
    the encoder's came with its weights;
  - the encoder's last norm acts on all tokens, whatever its pooling would be;
  - the class token goes through the decoder too, with positions of zero;
  - the prediction is of pixels less the model's mean and over its std, in the order of
    ops.reconstruction.patchify, or of those scaled patch by patch: the task says which.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models import vit
from vision_jax.models.layers import Dense, layer_norm
from vision_jax.models.vit import Block, ViT
from vision_jax.ops.position_embedding import grid_positions

DECODER = "decoder/"  # where the parameters begin that no ViT has
_PAPER: dict[str, Any] = {
    "decoder_width": 512,
    "decoder_depth": 8,
    "decoder_num_heads": 16,
    "decoder_mlp_width": 2048,
}
# The original's names; each is a ViT of these sizes with the paper's decoder.
VARIANTS = {
    "mae_vit_base_patch16": "b/16",
    "mae_vit_large_patch16": "l/16",
    "mae_vit_huge_patch14": "h/14",
}


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a variant's name, or None for others."""
    known = VARIANTS.get(name)
    return None if known is None else {**vit.variant_arguments(known), **_PAPER}


class Decoder(nn.Module):
    """From the encoder's tokens f[B, P + n, D] of the visible patches to all patches' pixels."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    grid: tuple[int, int]
    num_prefix: int
    outputs: int
    qkv_bias: bool
    activation: str
    layer_norm_eps: float
    dropout: float
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x, visible, train: bool):
        dtype = self.dtype
        patches = self.grid[0] * self.grid[1]
        x = Dense(self.width, dtype=dtype, name="embed")(x)  # [B, P + n, E]
        token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        shape = (1, self.num_prefix + patches, self.width)
        positions = self.param("pos_embed", self._init_positions, shape)
        if visible is not None:
            prefix, seen = x[:, : self.num_prefix], x[:, self.num_prefix :]
            hidden = jnp.broadcast_to(token.astype(dtype), (x.shape[0], patches, self.width))
            x = jnp.concatenate([prefix, _put(hidden, visible, seen)], axis=1)  # [B, P + N, E]
        x = x + positions.astype(dtype)
        arguments = {
            "num_heads": self.num_heads,
            "mlp_width": self.mlp_width,
            "qkv_bias": self.qkv_bias,
            "activation": self.activation,
            "layer_norm_eps": self.layer_norm_eps,
            "dropout": self.dropout,
            "dtype": dtype,
        }
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for index in range(self.depth):
            x = block(**arguments, name=f"block_{index}")(x, None, train)
        x = layer_norm("norm", self.layer_norm_eps, dtype)(x)
        wide = np.promote_types(dtype, np.float32)
        return Dense(self.outputs, dtype=wide, name="pred")(x[:, self.num_prefix :])

    def _init_positions(self, key, shape):
        del key, shape
        return _positions(self.grid, self.width, self.num_prefix, "decoder_width")


class Mae(ViT):
    """Images f32[B, H, W, in_channels] in [0, 1] -> a dict.

    "logits" f32[B, N, P·P·C], of all patches, and "token" f32[B, D], the mean of the encoder's
    patches after its last norm. The normalization by `mean` and `std` is inside. Arguments are a
    ViT's, with num_classes 0, and:

    Attributes:
      decoder_width, decoder_depth, decoder_num_heads, decoder_mlp_width: of the decoder; its
        blocks are the encoder's in everything else but LayerScale, gating and norms of q and k.
    """

    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    decoder_mlp_width: int = 2048

    takes_merged: ClassVar[bool] = False
    # Of a ViT's parameters, those that it has not: weights may have them all the same.
    left_out: ClassVar[tuple[str, ...]] = vit.HEADS
    added: ClassVar[tuple[str, ...]] = (DECODER,)  # how the paths of what no ViT has begin
    # Those that need no training to be right.
    computed: ClassVar[tuple[str, ...]] = ("pos_embed", f"{DECODER}pos_embed")

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: as in the ViT, and the decoder's at depth + 1."""
        return self.depth + 1 if path.startswith(DECODER) else super().layer_of(path)

    @property
    def tensor_rules(self):
        """Of both stacks of blocks."""
        encoder = vit.block_rules(self.num_heads, self.gated_mlp)
        return (*encoder, *vit.block_rules(self.decoder_num_heads, blocks=DECODER + r"block_\d+/"))

    def init_positions(self, key, shape):
        """Sines of the column and the row."""
        del key, shape
        return _positions(self.grid, self.width, self.position_prefix, "width")

    @nn.compact
    def __call__(self, images, visible=None, *, train: bool = False, return_features: bool = False):
        """Runs the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of `image_size`.
          visible: i32[B, n], the patches that the encoder sees, each at most once; None: all.
          train: dropout and stochastic depth act, with keys from the "dropout" collection.
          return_features: also return a dict of the encoder's tokens f[B, P + n, D]: "embed",
            "block_0" ... and "encoded".
        """
        if images.shape[1:3] != self.image_size:
            raise ValueError(f"images are {images.shape[1:3]}, the model takes {self.image_size}")
        x = self._embed(images, train)
        if visible is not None:
            patches = x[:, self.num_prefix :]
            seen = jnp.take_along_axis(
                patches, visible[..., None], axis=1, mode="promise_in_bounds"
            )
            x = jnp.concatenate([x[:, : self.num_prefix], seen], axis=1)  # [B, P + n, D]
        features = {"embed": x}
        x, outputs, _ = self._blocks(x, train)
        features.update({f"block_{index}": output for index, output in enumerate(outputs)})
        x = layer_norm("norm", self.layer_norm_eps, self.dtype)(x)
        features["encoded"] = x
        decoder = Decoder(
            width=self.decoder_width,
            depth=self.decoder_depth,
            num_heads=self.decoder_num_heads,
            mlp_width=self.decoder_mlp_width,
            grid=self.grid,
            num_prefix=self.num_prefix,
            outputs=self.patch_size**2 * self.in_channels,
            qkv_bias=self.qkv_bias,
            activation="gelu" if self.gated_mlp else self.activation,
            layer_norm_eps=self.layer_norm_eps,
            dropout=self.dropout,
            dtype=self.dtype,
            remat=self.remat,
            name="decoder",
        )
        wide = np.promote_types(self.dtype, np.float32)
        token = x[:, self.num_prefix :].mean(1).astype(wide)
        result = {"logits": decoder(x, visible, train), "token": token}
        return (result, features) if return_features else result


def _put(hidden: jax.Array, visible: jax.Array, seen: jax.Array) -> jax.Array:
    """f[B, N, E] `hidden` with the tokens `seen` f[B, n, E] at the places `visible` i32[B, n]."""

    def put(hidden, places, tokens):
        return hidden.at[places].set(tokens, mode="promise_in_bounds", unique_indices=True)

    return jax.vmap(put)(hidden, visible, seen)


def _positions(grid: tuple[int, int], width: int, num_prefix: int, name: str) -> jax.Array:
    if width % 4:
        raise UserError(f"mae: {name} {width}: sines of two places need a multiple of 4")
    return jnp.asarray(grid_positions(grid, width, num_prefix))
