"""Token merging (Bolya et al. 2023, ToMe, https://arxiv.org/abs/2210.09461): the alike become one.

In each block, behind the attention, the patch tokens are dealt into two sets in turn. Each token of
the first finds the token of the second whose key is most like its own, and the pairs that are most
alike become one token each, the mean over the patches that it stands for. How many these are is its
size; attention counts a token as often, by the logarithm of its size on the logits.

Exactness, where ports go wrong:
  - keys are the mean over the heads, before the comparison by their cosine;
  - the sets alternate by the place among all tokens, so that an even place is of the first, but
    tokens in front of the patches (class, distillation, registers) neither merge nor are merged;
  - behind them come what is left of the first set, in its order, then the second set;
  - of equal likenesses the earlier token merges, into the earlier one;
  - at most half of the patch tokens merge;
  - a mean over the patches weighs tokens by their sizes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.errors import UserError


def merge_counts(merge: float, depth: int, patches: int) -> tuple[int, ...]:
    """How many tokens merge in each block.

    Args:
      merge: so many in each block, or below 1 that share of the patch tokens that are left.
      depth: blocks.
      patches: tokens before the first.

    Raises:
      UserError: neither a whole number nor a share.

    Examples:
      >>> merge_counts(8, 3, 196)
      (8, 8, 8)
      >>> merge_counts(0.25, 3, 196)
      (49, 37, 28)
      >>> merge_counts(6, 4, 16)  # half at most
      (6, 5, 2, 1)
    """
    if merge < 0 or (merge >= 1 and merge != int(merge)):
        raise UserError(
            f"merge {merge}: give a whole number of tokens that merge in each block, a share below "
            "1 of those that are left, or 0"
        )
    counts = []
    for _ in range(depth):
        wanted = int(merge) if merge >= 1 else round(merge * patches)
        counts.append(min(wanted, patches // 2))
        patches -= counts[-1]
    return tuple(counts)


def merge_tokens(
    x: jax.Array, sizes: jax.Array, keys: jax.Array, count: int, num_prefix: int
) -> tuple[jax.Array, jax.Array]:
    """Makes `count` tokens fewer; gradients pass through what merges, not through the choice.

    By what runs and differentiates fast on each platform and has a word in each export format: a
    sort is no part of it, and sums are a product with zeros and ones.

    Args:
      x: f[B, N, D], `num_prefix` tokens and then patches.
      sizes: f[B, N], patches that each stands for.
      keys: f[B, N, K, d] of the attention of K heads.
      count: at most half of the patches.
      num_prefix: tokens that stay as they are.

    Returns:
      (x f[B, N - count, D], sizes f[B, N - count])
    """
    if not count:
        return x, sizes
    wide = sizes.dtype
    keys = jax.lax.stop_gradient(keys).astype(wide).mean(2)  # [B, N, d]
    length = jnp.linalg.norm(keys, axis=-1, keepdims=True)
    keys = keys / jnp.maximum(length, jnp.finfo(wide).tiny)
    _, first, second = _deal(keys, num_prefix)
    # In full precision: which pairs merge is a choice, that other platforms make alike then.
    likeness = jnp.einsum("bnd,bmd->bnm", first, second, precision="highest")
    own = likeness.shape[1]
    moves = jax.lax.top_k(likeness.max(-1), count)[1]  # [B, count], places in the first set
    into = _take(likeness.argmax(-1), moves)  # [B, count], places in the second

    moved = _one_hot(moves, own).any(1)  # [B, own]
    # The largest of what falls with the place: the others in their order, without a sort.
    falling = -jax.lax.broadcasted_iota(moves.dtype, moved.shape, 1)
    stays = jax.lax.top_k(jnp.where(moved, falling - own, falling), own - count)[1]

    def left(x):  # nothing, where all of the set merge: onnxruntime fails on empty arrays
        return [_take(x, stays)] if count < own else []

    prefix, first, second = _deal(x, num_prefix)
    of_prefix, of_first, of_second = _deal(sizes[..., None], num_prefix)  # [B, n, 1]
    onto = _one_hot(into, second.shape[1]).astype(wide)  # [B, count, m]
    weights = _take(of_first, moves)
    total = of_second + _add_up(weights, onto)
    moving = _add_up(weights * _take(first, moves).astype(wide), onto)
    mean = ((of_second * second.astype(wide) + moving) / total).astype(x.dtype)
    x = jnp.concatenate([prefix, *left(first), mean], axis=1)
    sizes = jnp.concatenate([of_prefix, *left(of_first), total], axis=1)
    return x, sizes[..., 0]


def mean_over_patches(x: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """f[B, D] of tokens f[B, n, D] that stand for so many patches f[B, n]; None: for one each."""
    if sizes is None:
        return x.mean(axis=1)
    shares = sizes / sizes.sum(axis=1, keepdims=True)
    return jnp.einsum("bn,bnd->bd", shares, x, precision="highest").astype(x.dtype)


def size_bias(sizes: jax.Array) -> jax.Array:
    """f[B, 1, 1, N] for the logits of attention to tokens of these sizes f[B, N]."""
    return jnp.log(sizes)[:, None, None, :]


def ones(x: jax.Array) -> jax.Array:
    """The sizes f[B, N], in float32 or better, of tokens f[B, N, D] that have not merged yet."""
    return jnp.ones(x.shape[:2], np.promote_types(x.dtype, np.float32))


def _deal(x: jax.Array, num_prefix: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(prefix, first set, second set) of tokens f[B, N, D]."""
    patches, odd = x[:, num_prefix:], num_prefix % 2
    return x[:, :num_prefix], patches[:, odd::2], patches[:, 1 - odd :: 2]


def _take(x: jax.Array, places: jax.Array) -> jax.Array:
    """x f[B, n] or f[B, n, D] at places i32[B, m] of its second axis."""
    places = places.reshape(*places.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, places, axis=1, mode="promise_in_bounds")


def _one_hot(places: jax.Array, length: int) -> jax.Array:
    """bool[B, n, length] of places i32[B, n]."""
    shape = (*places.shape, length)
    return places[:, :, None] == jax.lax.broadcasted_iota(places.dtype, shape, 2)


def _add_up(x: jax.Array, onto: jax.Array) -> jax.Array:
    """f[B, m, D]: sums of rows x f[B, n, D], of which `onto` f[B, n, m] says where each belongs.

    In full precision: accelerators would otherwise round what is added up.
    """
    return jnp.einsum("bnm,bnd->bmd", onto, x, precision="highest")
