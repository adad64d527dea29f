"""The text tower of SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343).

A transformer of a ViT's blocks over a fixed number of tokens, whose last one, after a linear layer,
stands for the text. Names and structure follow transformers 5.24 models/siglip.

Exactness, where ports go wrong:
  - every token sees every other: nothing is causal, and padding is not masked;
  - the last token is the last of the fixed number, padding or not, so texts are padded to it in
    training and after;
  - GELU is tanh's; LayerNorm epsilon is 1e-6.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from vision_jax.models.layers import Dense, layer_norm
from vision_jax.models.vit import Block


class TextTower(nn.Module):
    """Tokens i32[B, L], all of them below `vocab_size` -> f[B, outputs].

    Attributes:
      vocab_size: V, different tokens.
      length: L.
      width, depth, num_heads, mlp_width: of the transformer.
      outputs: of the linear layer at the end.
      activation: of its MLPs.
      layer_norm_eps: epsilon of its norms.
      dropout: rate in training, with keys from the "dropout" collection.
      dtype: compute dtype; parameters stay float32.
      remat: recompute each block in the backward pass.
    """

    vocab_size: int
    length: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    outputs: int
    activation: str = "gelu_tanh"
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, tokens, train: bool = False):
        if tokens.shape[1] != self.length:
            raise ValueError(f"texts of {tokens.shape[1]} tokens, the model takes {self.length}")
        normal = nn.initializers.normal(self.width**-0.5)
        embedding = self.param("token_embed", normal, (self.vocab_size, self.width))
        positions = self.param("pos_embed", normal, (1, self.length, self.width))
        x = embedding[tokens].astype(self.dtype) + positions.astype(self.dtype)  # [B, L, D]
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for index in range(self.depth):
            x = block(
                num_heads=self.num_heads,
                mlp_width=self.mlp_width,
                activation=self.activation,
                layer_norm_eps=self.layer_norm_eps,
                dropout=self.dropout,
                dtype=self.dtype,
                name=f"block_{index}",
            )(x, None, train)
        x = layer_norm("norm", self.layer_norm_eps, self.dtype)(x[:, -1])
        init = nn.initializers.lecun_normal()
        return Dense(self.outputs, dtype=self.dtype, kernel_init=init, name="head")(x)
