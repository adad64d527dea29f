"""Low-rank adapters as transforms of the parameter tree.

    attach(params, rules, ...)       kernels -> LowRank leaves that compute the same at first
    merge(params)                    LowRank leaves -> plain kernels W + s·A·B
    unmerge(merged, adapters)        the way back
    detach(params)                   -> (the bit-identical base, adapters by path)
    apply_adapters(base, adapters)   -> LowRank leaves again; other adapters, same base
    split_adapter(adapter, ...)      one adapter -> factors of each part of its kernel's columns
    join_adapter(factors, ...)       the way back

All are pure and work on arrays, on traced and on abstract values alike. How a LowRank leaf
multiplies, and what its gradient is, stands in `trees/low_rank.py`.

Adapters apart from their base are a dict from the kernel's path to a LowRank without base, so they
are a pytree that can be mapped, saved and sharded like any other.

Examples:
  >>> params = {"head": {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}}
  >>> adapted = attach(params, ["head/kernel"], key=jax.random.key(0), rank=2, alpha=4.0)
  >>> {path: array.shape for path, array in paths.flatten(adapted).items()}
  {'head/bias': (3,), 'head/kernel/base': (4, 3), 'head/kernel/a': (4, 2), 'head/kernel/b': (2, 3)}
  >>> base, adapters = detach(adapted)
  >>> {path: array.shape for path, array in paths.flatten(base).items()}
  {'head/bias': (3,), 'head/kernel': (4, 3)}
  >>> {path: array.shape for path, array in paths.flatten(adapters).items()}
  {'head/kernel/a': (4, 2), 'head/kernel/b': (2, 3)}
  >>> moved = jax.tree.map(lambda factor: factor + 1, adapters)  # as training does
  >>> merged = merge(apply_adapters(base, moved))
  >>> bool((merged["head"]["kernel"] != params["head"]["kernel"]).all())
  True
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.errors import UserError
from vision_jax.trees import paths
from vision_jax.trees.leaf import Leaf, Params, leaves, map_leaves, merge_leaf
from vision_jax.trees.low_rank import LowRank, low_rank_delta, output_norm, part_scales

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
    kernels = {path: leaf for path, leaf in leaves(params).items() if path.endswith("kernel")}
    chosen = paths.select(kernels, rules, field="lora.rules")
    parts = _parse_parts(qkv_parts, chosen)  # of each kernel that is split, by path
    scale = alpha / math.sqrt(rank) if rank_stabilized else alpha / rank

    shapes = {}  # of each adapter: those of A and of B, and the dtype of both
    for path in sorted(chosen):
        kernel = kernels[path]
        if isinstance(kernel, LowRank):
            raise UserError(f"{path} has an adapter already: merge or detach it first")
        if kernel.ndim not in (2, 4):
            raise UserError(
                f"lora.rules: {path} {kernel.shape} is no kernel of a dense or convolution layer; "
                "exclude it from the rules"
            )
        dtype = np.promote_types(kernel.dtype, np.float32)
        shapes[path] = (*_factor_shapes(path, kernel.shape, rank, parts.get(path)), dtype)
    fans = {path: math.prod(kernels[path].shape[:-1]) for path in shapes}
    first = _draw({path: (a, dtype, fans[path]) for path, (a, _, dtype) in shapes.items()}, key)

    def adapt(path: str, kernel: Any) -> Any:
        if path not in chosen:
            return kernel
        _, b_shape, dtype = shapes[path]
        return LowRank(
            base=kernel,
            a=first[path],
            b=jnp.zeros(b_shape, dtype),
            magnitude=output_norm(merge_leaf(kernel).astype(dtype)) if dora else None,
            scale=scale,
            parts=parts.get(path),
            dropout=dropout,
        )

    return map_leaves(adapt, params)


def merge(params: Params) -> Params:
    """The tree with the plain kernel of each structured leaf: W + s·A·B (DoRA: rescaled)."""
    return map_leaves(lambda _, leaf: merge_leaf(leaf), params)


def unmerge(merged: Params, adapters: Adapters) -> Params:
    """Undoes `merge`: LowRank leaves whose base is the merged kernel less the update.

    The base comes back within rounding; the base of `detach` is bit-identical.

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
            leaf, base=merge_leaf(leaf.base) - low_rank_delta(leaf).astype(leaf.base.dtype)
        )

    attached = apply_adapters(merged, adapters)
    return map_leaves(
        lambda path, leaf: subtract(path, leaf) if path in adapters else leaf, attached
    )


def detach(params: Params) -> tuple[Params, Adapters]:
    """Splits into (the plain tree of bit-identical base kernels, adapters by the kernel's path)."""
    base = map_leaves(lambda _, leaf: leaf.base if isinstance(leaf, LowRank) else leaf, params)
    adapters = {
        path: dataclasses.replace(leaf, base=None)  # type: ignore[arg-type]
        for path, leaf in leaves(params).items()
        if isinstance(leaf, LowRank)
    }
    return base, adapters


def apply_adapters(base: Params, adapters: Mapping[str, LowRank]) -> Params:
    """Puts detached adapters on a plain tree; several may be kept and swapped over one base.

    Raises:
      UserError: an adapter whose path or shape does not fit, or a kernel that has one already.
    """
    kernels = leaves(base)
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

    return map_leaves(put, base)


def move_adapters(adapted: Params, base: Params) -> Params:
    """`adapted`, over the structured leaves that `base` has in place of its plain kernels."""
    plain, adapters = detach(adapted)
    kept = {path: leaf for path, leaf in leaves(base).items() if isinstance(leaf, Leaf)}
    return apply_adapters(map_leaves(lambda path, leaf: kept.get(path, leaf), plain), adapters)


def adapter_paths(params: Params) -> set[str]:
    """Paths of the adapters' arrays in `paths.flatten(params)`, those of their bases left out."""
    return set(paths.flatten(detach(params)[1]))


@dataclass(frozen=True)
class Factors:
    """The adapter of one kernel [..., in, out], or of an equal part of a fused one's columns.

    Attributes:
      a: f[in, r], or f[h, w, in, r] of a convolution.
      b: f[r, out].
      magnitude: f[out] of DoRA, or None.
      scale, dropout: as in LowRank.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    scale: float
    dropout: float


def has_magnitude(adapter: LowRank) -> bool:
    """Whether an adapter has the magnitude of DoRA."""
    return adapter.magnitude is not None


def split_adapter(
    adapter: LowRank, kernel: jax.Array, total: int, *, magnitude: bool
) -> dict[int, Factors]:
    """The factors of each of `total` equal parts of a kernel's columns, by the part's position.

    An adapter over all columns shares its A between the parts. Adapters of parts (`qkv_parts`) are,
    for a total of 1, one of the summed rank, whose B has a block for each: the same update, and as
    many zeros as that takes. A part without an adapter is left out, or has a zero update where it
    has a magnitude.

    Args:
      adapter: as `detach` gives it.
      kernel: [..., in, out], the plain array that it is for.
      total: 1, or the number of parts that the adapter has or could have.
      magnitude: gives an adapter that is not DoRA's the magnitudes that change nothing.
    """
    if magnitude and adapter.magnitude is None:
        merged = dataclasses.replace(adapter, base=kernel).merge()
        adapter = dataclasses.replace(adapter, magnitude=output_norm(merged))
    a, b = np.asarray(adapter.a), np.asarray(adapter.b)
    whole = None if adapter.magnitude is None else np.asarray(adapter.magnitude)
    magnitudes = [None] * total if whole is None else np.split(whole, total)
    scales = part_scales(adapter)
    make = partial(Factors, dropout=adapter.dropout)
    if adapter.parts is None:  # one A serves all modules
        columns = np.split(b, total, axis=1)
        return {part: make(a, columns[part], magnitudes[part], scales[0]) for part in range(total)}
    if total == 1:
        count, rows, rank = a.shape
        scale = max(scales, key=abs) or 1.0  # of all, so that none is divided by zero
        blocks = np.zeros((count, rank, adapter.parts[0], b.shape[-1]), b.dtype)
        for position, part in enumerate(adapter.parts[1]):
            blocks[position, :, part] = b[position] * (scales[position] / scale)
        a = a.transpose(1, 0, 2).reshape(rows, count * rank)
        return {0: make(a, blocks.reshape(count * rank, -1), whole, scale)}
    factors = {
        part: make(a[position], b[position], magnitudes[part], scales[position])
        for position, part in enumerate(adapter.parts[1])
    }
    if whole is not None:  # a part without an update may still have a trained magnitude
        for part in set(range(total)) - set(factors):
            zeros = np.zeros_like(a[0]), np.zeros_like(b[0])
            factors[part] = make(*zeros, magnitudes[part], scales[0])
    return factors


def join_adapter(factors: Mapping[int, Factors], kernel: jax.Array, total: int) -> LowRank:
    """The inverse: factors of parts of a kernel [..., in, out] as one adapter without its base.

    Where the ranks differ the smaller are filled up with zeros.
    """
    first = factors[min(factors)]
    rank = max(one.a.shape[-1] for one in factors.values())
    dtype = np.promote_types(kernel.dtype, np.float32)
    a, b, magnitudes = [], [], []
    for part, columns in enumerate(jnp.split(kernel, total, axis=-1)):
        if part not in factors:
            magnitudes.append(output_norm(columns.astype(dtype)))
            continue
        one = factors[part]
        fill = rank - one.a.shape[-1]
        a.append(np.pad(one.a, [(0, 0)] * (one.a.ndim - 1) + [(0, fill)]))
        b.append(np.pad(one.b, ((0, fill), (0, 0))))
        if one.magnitude is not None:
            magnitudes.append(jnp.asarray(one.magnitude, dtype))
    scales = tuple(factors[part].scale for part in sorted(factors))
    return LowRank(
        base=None,  # type: ignore[arg-type]
        a=jnp.asarray(np.stack(a) if total > 1 else a[0], dtype),
        b=jnp.asarray(np.stack(b) if total > 1 else b[0], dtype),
        magnitude=None if first.magnitude is None else jnp.concatenate(magnitudes),
        scale=first.scale if len(set(scales)) == 1 else scales,
        parts=(total, tuple(sorted(factors))) if total > 1 else None,
        dropout=first.dropout,
    )


def _draw(
    arrays: Mapping[str, tuple[tuple[int, ...], Any, int]], key: jax.Array
) -> dict[str, jax.Array]:
    """By path, an array of (shape, dtype), uniform in ±1/√fan_in; each has a key of its own.

    Those that are alike are drawn in one loop, whose body compiles once: the same draws.
    """
    alike: dict[Any, list[str]] = {}
    for path, of in arrays.items():
        alike.setdefault(of, []).append(path)
    drawn: dict[str, jax.Array] = {}
    for (shape, dtype, fan_in), names in alike.items():
        draw = partial(_draw_one, key, shape, dtype, 1 / math.sqrt(fan_in))
        own = np.array([zlib.crc32(path.encode()) for path in names], np.uint32)
        drawn |= dict(zip(names, jax.lax.map(draw, own), strict=True))
    return drawn


def _draw_one(
    key: jax.Array, shape: tuple[int, ...], dtype: Any, bound: float, number: jax.Array
) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, number), shape, dtype, -bound, bound)


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


def _parse_parts(qkv_parts: str, chosen: set[str]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """`LowRank.parts` of the fused qkv kernels among the chosen ones, by path; {} for ""."""
    if not qkv_parts:
        return {}
    names = [name.strip() for name in qkv_parts.split(",")]
    if not set(names) <= set(QKV) or len(set(names)) != len(names):
        raise UserError(f"lora.qkv_parts: {qkv_parts!r} is no list of q, k and v, such as 'q,v'")
    parts = len(QKV), tuple(sorted(QKV.index(name) for name in names))
    found = {path: parts for path in chosen if path.endswith("qkv/kernel")}
    if not found:
        raise UserError(
            f"lora.qkv_parts: {qkv_parts!r} needs a fused qkv kernel among those of lora.rules; "
            "add '.*/qkv/kernel' there or set lora.qkv_parts=''"
        )
    return found


def _check_settings(rank: int, alpha: float, dropout: float) -> None:
    if rank < 1:
        raise UserError(f"lora.rank: {rank} must be at least 1")
    if not 0 < alpha < math.inf:
        raise UserError(f"lora.alpha: {alpha} must be positive")
    if not 0 <= dropout < 1:
        raise UserError(f"lora.dropout: {dropout} must be at least 0 and below 1")
