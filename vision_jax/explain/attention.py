"""Explanations by the attention of a transformer whose tokens all see each other: ViT and BEiT.

What a token looks at goes on from block to block as a product of matrices. Results are of the
model's grid of patches, f[B, h, w]; the prefix tokens are left out. The probabilities are formed
one by one, so attention that is fused otherwise is not, here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.explain.forward import Forward, Target, Variables, tapped_and_gradients

POOL = "attn_pool/attention"  # of a model that pools by attention: f[B, K, 1, h·w]


def attention_rollout(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
    """How attention mixes the patches into what the head reads, the same for each class.

    Abnar and Zuidema 2020 (https://arxiv.org/abs/2005.00928): the product over the blocks of the
    mean over the heads and the identity, half each.

    Args:
      forward: the model.
      variables: its arrays.
      images: f[B, H, W, C] in [0, 1].
      target: not used: attention is not of a class.
      keys: not used: nothing is drawn.

    Returns:
      f[B, h, w], shares of at most 1.

    Raises:
      UserError: a model whose tokens don't all see each other.
    """
    del target, keys
    names = _names(forward, variables, images)
    _, found = forward(variables, images, dict.fromkeys(names, 0.0))
    blocks = [x.mean(1) for x in _wide([found[name] for name in names if name != POOL])]
    identity = jnp.eye(blocks[0].shape[-1], dtype=blocks[0].dtype)[None]
    rolled = identity
    for attention in blocks:  # [B, N, N], rows sum to 1
        rolled = jnp.einsum("bnm,bmk->bnk", (attention + identity) / 2, rolled)
    pooled = found[POOL].mean((1, 2)) if POOL in found else None
    return _read(forward, rolled, pooled)


def attention_relevance(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array | None = None,
) -> jax.Array:
    """How the patches reach the score: attention where more of it would raise the score.

    Chefer et al. 2021 (https://arxiv.org/abs/2103.15679, equations 5 and 6): the relevance of the
    tokens for each other grows in each block by the mean over the heads of the positive part of
    gradient · attention.

    Args:
      forward, variables, images: see `attention_rollout`.
      target: what of the outputs is explained.
      keys: not used: nothing is drawn.

    Returns:
      f[B, h, w], at least 0.

    Raises:
      UserError: a model whose tokens don't all see each other.
    """
    del keys
    names = _names(forward, variables, images)
    found, gradients = tapped_and_gradients(forward, variables, images, target, names)
    moved = {name: jax.nn.relu(found[name] * gradients[name]).mean(1) for name in names}
    blocks = _wide([moved[name] for name in names if name != POOL])
    relevance = jnp.broadcast_to(
        jnp.eye(blocks[0].shape[-1], dtype=blocks[0].dtype)[None], blocks[0].shape
    )
    for block in blocks:  # [B, N, N]
        relevance = relevance + jnp.einsum("bnm,bmk->bnk", block, relevance)
    pooled = moved[POOL].mean(1) if POOL in moved else None
    return _read(forward, relevance, pooled)


def _names(forward: Forward, variables: Variables, images: jax.Array) -> list[str]:
    """The taps of attention; that of the pooling last, if there is one."""
    known = forward.taps(variables, images)
    return [*forward.attention_taps(variables, images), *([POOL] if POOL in known else [])]


def _wide(arrays: list[jax.Array]) -> list[jax.Array]:
    return [x.astype(np.promote_types(x.dtype, np.float32)) for x in arrays]


def _read(forward: Forward, matrix: jax.Array, pooled: jax.Array | None) -> jax.Array:
    """f[B, h, w]: the patches' columns of [B, N, N], in the mixture of rows that the head reads.

    `pooled`: f[B, h·w], how pooling by attention weighs the patches.
    """
    prefix = forward.num_prefix
    if pooled is not None:
        row = jnp.einsum("bn,bnk->bk", pooled.astype(matrix.dtype), matrix[:, prefix:])
    else:
        weights = jnp.asarray(readout(forward), matrix.dtype)
        row = jnp.einsum("n,bnk->bk", weights, matrix)
    return forward.as_map(row[..., None])[..., 0]


def readout(forward: Forward) -> np.ndarray:
    """f64[P + h·w]: how much of each token the pooled vector is; it sums to 1.

    The class token; both that have a head; the mean over the patches; or half of each.
    """
    model, prefix = forward.model, forward.num_prefix
    rows, columns = model.grid
    weights = np.zeros(prefix + rows * columns)
    if model.pool != "avg":
        heads = 2 if getattr(model, "distillation_token", False) and model.pool == "token" else 1
        weights[:heads] = 1 / heads
    if model.pool in ("avg", "token_avg"):
        weights[prefix:] = 1 / (rows * columns)
    return weights / weights.sum()
