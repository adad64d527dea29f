"""A map for each box of a DETR: what its query looks at, through the decoder and the encoder.

For other detectors the methods of methods.METHODS take `forward.place_logit` of the box's anchor,
cell or query as their target.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.errors import UserError
from vision_jax.explain.forward import (
    Forward,
    Variables,
    place_logit,
    tapped_and_gradients,
)
from vision_jax.models import families
from vision_jax.models.taps import ATTENTION, OUTPUT


def box_relevance(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    queries: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    """Gradient × attention of a query, rolled out through all layers.

    Chefer et al. 2021 (https://arxiv.org/abs/2103.15679, equations 5 to 10): the relevance of the
    encoder's cells for each other, and of queries and cells for queries, grows in each layer by the
    mean over the heads of the positive part of gradient · attention.

    Args:
      forward: a DETR.
      variables: its arrays.
      images: f[B, H, W, C] in [0, 1]; of images with padding the forward pass has the pixels' mask.
      queries: i32[B], the query of each image whose box is explained.
      labels: i32[B], its class.

    Returns:
      f[B, h, w] on the grid of the last map, at least 0.

    Raises:
      UserError: no DETR.
    """
    shapes = forward.taps(variables, images)
    names = [name for name in shapes if name.endswith(f"_attn/{ATTENTION}")]
    maps = [name for name in shapes if name.endswith(f"/{OUTPUT}")]
    if families.family_of(forward.model) != "detr":
        raise UserError(
            f"a {families.family_of(forward.model)} has no queries that attend to a map: explain "
            "its boxes by a method of methods.METHODS and forward.place_logit"
        )
    target = place_logit(queries, labels)
    found, gradients = tapped_and_gradients(forward, variables, images, target, names)

    def moved(name):
        """f[B, N, M]: the mean over the heads."""
        return jax.nn.relu(found[name] * gradients[name]).mean(1).astype(dtype)

    batch, height, width, _ = shapes[maps[-1]].shape
    count = forward.model.num_queries
    dtype = np.promote_types(images.dtype, np.float32)
    cells = _identity(batch, height * width, dtype)  # relevance of cells for cells
    among = _identity(batch, count, dtype)  # of queries for queries
    of_cells = jnp.zeros((batch, count, height * width), dtype)  # of cells for queries
    for name in names:
        own = moved(name)
        if name.startswith("encoder_"):  # [B, N, N]
            cells = cells + jnp.einsum("bnm,bmk->bnk", own, cells)
        elif "/self_attn/" in name:  # [B, Q, Q]
            of_cells = of_cells + jnp.einsum("bqp,bpn->bqn", own, of_cells)
            among = among + jnp.einsum("bqp,bpr->bqr", own, among)
        else:  # [B, Q, N]
            seen = jnp.einsum("bqn,bnm->bqm", own, _normalized(cells))
            of_cells = of_cells + jnp.einsum("bpq,bpn->bqn", _normalized(among), seen)
    chosen = jnp.take_along_axis(of_cells, queries[:, None, None], axis=1)[:, 0]  # [B, N]
    return chosen.reshape(batch, height, width)


def _normalized(relevance: jax.Array) -> jax.Array:
    """The identity, and what is beyond it with rows that sum to 1 (equations 8 and 9)."""
    identity = _identity(len(relevance), relevance.shape[1], relevance.dtype)
    beyond = relevance - identity
    total = beyond.sum(-1, keepdims=True)
    return beyond / jnp.where(total > 0, total, 1) + identity


def _identity(batch: int, size: int, dtype: Any) -> jax.Array:
    """f[B, n, n]."""
    return jnp.broadcast_to(jnp.eye(size, dtype=dtype)[None], (batch, size, size))
