"""Low-rank adapters as transforms of the parameter tree.

    attach(params, rules, ...)       kernels -> LowRank leaves that compute the same at first
    merge(params)                    LowRank leaves -> plain kernels W + s·A·B
    unmerge(merged, adapters)        the way back
    detach(params)                   -> (the base to the bit, adapters by path)
    apply_adapters(base, adapters)   -> LowRank leaves again; other adapters, same base

All are pure and work on arrays, on traced and on abstract values alike. How a LowRank leaf
multiplies, and what its gradient is, stands in `trees/leaves.py`.

Adapters apart from their base are a dict from the kernel's path to a LowRank without base, so they
are a pytree that can be mapped, saved and sharded like any other.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.errors import UserError
from vision_jax.trees import paths
from vision_jax.trees.leaves import LowRank, low_rank_delta, merge_leaf, output_norm

Params = Any  # nested dicts of arrays and LowRank leaves
Adapters = dict[str, LowRank]  # by the kernel's path; `base` is None

QKV = ("q", "k", "v")  # the order of a fused kernel's columns


def attach(
    params: Params,
    rules: Sequence[str],
    *,
    key: jax.Array,
    rank: int,
    alpha: float,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    dora: bool = False,
    qkv_parts: str = "",
) -> Params:
    """Puts adapters on the kernels that the rules choose; the model computes the same as before.

    A starts uniform in ±1/√fan_in and B at zero, as in PEFT. Each adapter's key depends on its own
    path, so another rule leaves the other adapters as they were.

    Args:
      params: the parameter tree.
      rules: regular expressions that match whole kernel paths (`block_\\d+/mlp/.*`); each must
        match something.
      key: random key of A.
      rank: r, the inner size of A·B.
      alpha: the update is scaled by alpha / rank.
      rank_stabilized: by alpha / √rank instead (rsLoRA, https://arxiv.org/abs/2312.03732).
      dropout: rate on the adapters' input in training.
      dora: also learn each output's magnitude, from the norm it has now.
      qkv_parts: "" for one adapter over a fused qkv kernel; "q,v" for one on each of these thirds.

    Raises:
      UserError: a rule that matches no kernel, a kernel that is neither dense nor a convolution or
        has an adapter already, or a setting out of range.
    """
    _check_settings(rank, alpha, dropout)
    kernels = {path: leaf for path, leaf in _leaves(params).items() if path.endswith("kernel")}
    chosen = paths.select(kernels, rules, field="lora.rules")
    parts = _parse_parts(qkv_parts, chosen)
    scale = alpha / math.sqrt(rank) if rank_stabilized else alpha / rank

    def adapt(path: str, kernel: Any) -> Any:
        if path not in chosen:
            return kernel
        if isinstance(kernel, LowRank):
            raise UserError(f"{path} has an adapter already: merge or detach it first")
        if kernel.ndim not in (2, 4):
            raise UserError(
                f"lora.rules: {path} {kernel.shape} is no kernel of a dense or convolution layer; "
                "exclude it from the rules"
            )
        own_parts = parts if path.endswith("qkv/kernel") else None
        a_shape, b_shape = _factor_shapes(path, kernel.shape, rank, own_parts)
        dtype = jnp.promote_types(kernel.dtype, jnp.float32)
        bound = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return LowRank(
            base=kernel,
            a=jax.random.uniform(own_key, a_shape, dtype, -bound, bound),
            b=jnp.zeros(b_shape, dtype),
            magnitude=output_norm(kernel.astype(dtype)) if dora else None,
            scale=scale,
            parts=own_parts,
            dropout=dropout,
        )

    return _map(adapt, params)


def merge(params: Params) -> Params:
    """The tree with plain kernels W + s·A·B (DoRA: rescaled) in place of the LowRank leaves."""
    return _map(lambda _, leaf: merge_leaf(leaf), params)


def unmerge(merged: Params, adapters: Adapters) -> Params:
    """Undoes `merge`: LowRank leaves whose base is the merged kernel less the update.

    The base comes back within rounding; keep the base of `detach` to have it to the bit.

    Raises:
      UserError: adapters that do not fit the tree, or DoRA's: a merged kernel no longer tells the
        norm that its base had.
    """

    def subtract(path: str, leaf: LowRank) -> LowRank:
        if leaf.magnitude is not None:
            raise UserError(
                f"{path}: a merged DoRA adapter cannot be undone, its kernel's norm is gone; "
                "detach the adapter and keep the base instead"
            )
        return dataclasses.replace(
            leaf, base=leaf.base - low_rank_delta(leaf).astype(leaf.base.dtype)
        )

    attached = apply_adapters(merged, adapters)
    return _map(lambda path, leaf: subtract(path, leaf) if path in adapters else leaf, attached)


def detach(params: Params) -> tuple[Params, Adapters]:
    """Splits into (the plain tree of base kernels to the bit, adapters by the kernel's path)."""
    base = _map(lambda _, leaf: leaf.base if isinstance(leaf, LowRank) else leaf, params)
    adapters = {
        path: dataclasses.replace(leaf, base=None)  # type: ignore[arg-type]
        for path, leaf in _leaves(params).items()
        if isinstance(leaf, LowRank)
    }
    return base, adapters


def apply_adapters(base: Params, adapters: Mapping[str, LowRank]) -> Params:
    """Puts detached adapters on a plain tree; several may be kept and swapped over one base.

    Raises:
      UserError: an adapter whose path or shape does not fit, or a kernel that has one already.
    """
    kernels = _leaves(base)
    paths.select(kernels, [re.escape(path) for path in adapters], field="adapters")
    for path, adapter in adapters.items():
        kernel = kernels[path]
        if isinstance(kernel, LowRank):
            raise UserError(f"{path} has an adapter already: merge or detach it first")
        rank = adapter.a.shape[-1]
        expected = _factor_shapes(path, kernel.shape, rank, adapter.parts)
        if (adapter.a.shape, adapter.b.shape) != expected:
            raise UserError(
                f"adapter {path!r} has A {adapter.a.shape} and B {adapter.b.shape}; the kernel "
                f"{kernel.shape} takes A {expected[0]} and B {expected[1]}"
            )

    def put(path: str, leaf: Any) -> Any:
        return dataclasses.replace(adapters[path], base=leaf) if path in adapters else leaf

    return _map(put, base)


def is_adapter_path(path: str) -> bool:
    """Whether a path of `paths.flatten` names an adapter's array, and not its frozen base.

    >>> [is_adapter_path(f"head/kernel{end}") for end in ("/a", "/b", "/magnitude", "/base", "")]
    [True, True, True, False, False]
    """
    return path.endswith(("kernel/a", "kernel/b", "kernel/magnitude"))


def _leaves(params: Params) -> dict[str, Any]:
    """Arrays and whole LowRank leaves by path."""
    found: dict[str, Any] = {}
    _map(lambda path, leaf: found.setdefault(path, leaf), params)
    return found


def _map(function: Callable[[str, Any], Any], params: Params) -> Params:
    """Maps function(path, leaf) over arrays and whole LowRank leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: function(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf),
        params,
        is_leaf=lambda leaf: isinstance(leaf, LowRank),
    )


def _factor_shapes(
    path: str, kernel_shape: tuple[int, ...], rank: int, parts: tuple[int, tuple[int, ...]] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of (A, B) for a kernel [..., in, out]."""
    *inputs, outputs = kernel_shape
    if parts is None:
        return (*inputs, rank), (rank, outputs)
    total, chosen = parts
    if len(inputs) != 1 or outputs % total:
        raise UserError(f"{path} {kernel_shape} cannot be split into {total} equal parts")
    return (len(chosen), *inputs, rank), (len(chosen), rank, outputs // total)


def _parse_parts(qkv_parts: str, chosen: set[str]) -> tuple[int, tuple[int, ...]] | None:
    if not qkv_parts:
        return None
    names = [name.strip() for name in qkv_parts.split(",")]
    if not set(names) <= set(QKV) or len(set(names)) != len(names):
        raise UserError(f"lora.qkv_parts: {qkv_parts!r} is no list of q, k and v, such as 'q,v'")
    if not any(path.endswith("qkv/kernel") for path in chosen):
        raise UserError(
            f"lora.qkv_parts: {qkv_parts!r} needs a fused qkv kernel among those of lora.rules; "
            "add '.*/qkv/kernel' there or set lora.qkv_parts=''"
        )
    return len(QKV), tuple(sorted(QKV.index(name) for name in names))


def _check_settings(rank: int, alpha: float, dropout: float) -> None:
    if rank < 1:
        raise UserError(f"lora.rank: {rank} must be at least 1")
    if not 0 < alpha < math.inf:
        raise UserError(f"lora.alpha: {alpha} must be positive")
    if not 0 <= dropout < 1:
        raise UserError(f"lora.dropout: {dropout} must be at least 0 and below 1")
