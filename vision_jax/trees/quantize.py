"""Quantization as a transform of the parameter tree: which kernels, into what, of what size.

    choose(params, rules, keep)        paths of the kernels that rules choose
    quantize(params, chosen, make)     these as leaves of `trees/quantized.py`
    kernel_bytes(shape, form, ...)     what one takes, without making it
    describe(params), like(...)        what a file must say to be read again

All are pure and work on arrays, on traced and on abstract values alike.

Examples:
  >>> params = {"fc": {"kernel": jnp.ones((64, 8))}, "head": {"kernel": jnp.ones((8, 3))}}
  >>> chosen = choose(params, [".*kernel"], keep=["head/.*"])
  >>> tree = quantize(params, chosen, FORMS["nf4"])
  >>> {path: f"{array.dtype}{list(array.shape)}" for path, array in paths.flatten(tree).items()}
  {'fc/kernel/codes': 'uint8[32, 8]', 'fc/kernel/absmax': 'uint8[1, 8]', \
'fc/kernel/absmax_scale': 'float32[1]', 'fc/kernel/absmax_mean': 'float32[]', \
'head/kernel': 'float32[8, 3]'}
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vision_jax.errors import UserError
from vision_jax.trees import factored, paths
from vision_jax.trees.factored import Factored, factor_paths
from vision_jax.trees.leaf import Kernel, Leaf, Params, leaves, map_leaves, merge_leaf, multiply
from vision_jax.trees.masked import MaskedKernel
from vision_jax.trees.products import Product
from vision_jax.trees.quantized import (
    BLOCK,
    NF4,
    SCALES_BLOCK,
    FakeQuantized,
    Int8,
    to_int8,
    to_nf4,
)

Make = Callable[[Any], Leaf]  # of an array, or of a MaskedKernel
FORMS: Mapping[str, Callable[..., Leaf]] = {
    "int8": to_int8,
    "nf4": to_nf4,
    "fake_int8": FakeQuantized,
}
FACTORED = "factored"  # the form of two factors, of which each may have one of these


def choose(
    params: Params, rules: Sequence[str], keep: Sequence[str] = (), *, field: str = "rules"
) -> set[str]:
    """Paths of the kernels that rules choose, of dense layers and convolutions.

    Args:
      params: the parameter tree.
      rules: regular expressions over whole paths; each must match a kernel.
      keep: such as stay in float whatever the rules say; they need not match anything.
      field: the config field of the rules, for the error message.

    Raises:
      UserError: a rule that matches no kernel, or nothing that is left to quantize.
    """
    kernels = [
        path
        for path, leaf in leaves(params).items()
        if path.rpartition("/")[2] == "kernel" and leaf.ndim in (2, 4)
    ]
    chosen = paths.select(kernels, rules, field=field, kind="kernel")
    chosen -= paths.select(kernels, keep, field=field, strict=False)
    if not chosen:
        raise UserError(f"{field}: all that they match is kept as it is: nothing is left to change")
    return chosen


def quantize(params: Params, chosen: Collection[str], make: Make) -> Params:
    """The tree with make(kernel) in place of the chosen kernels; zeros of a mask stay.

    Of a factored kernel both factors are changed.

    Raises:
      UserError: one that has another structured leaf already.
    """

    def change(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        if isinstance(leaf, Factored):
            return Factored(change(path, leaf.u), change(path, leaf.v))
        if isinstance(leaf, Leaf) and not isinstance(leaf, MaskedKernel):
            raise UserError(f"{path} is no plain kernel: merge it first")
        return make(leaf)

    return map_leaves(change, params)


@partial(jax.tree_util.register_dataclass, data_fields=["on", "base", "other"], meta_fields=[])
@dataclass(frozen=True)
class Switched(Leaf):
    """One of two leaves for a kernel: one program measures what each layer's change does.

    Attributes:
      on: bool[]: whether it is `other`.
      base: the kernel as it was.
      other: what it would be.
    """

    like_kernel: ClassVar[tuple[str, ...]] = ("base",)

    on: jax.Array
    base: Kernel
    other: Kernel

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this leaf stands in for."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the kernel that this leaf stands in for."""
        return self.base.dtype

    def merge(self) -> jax.Array:
        """The kernel that is on."""
        return jnp.where(self.on, merge_leaf(self.other), merge_leaf(self.base))

    def multiply(self, product: Product, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """By the kernel that is on; the other product is not computed."""

        def by(kernel: Kernel) -> jax.Array:
            return multiply(product, x, kernel, dropout_key)

        return lax.cond(self.on, lambda: by(self.other), lambda: by(self.base))


def switch(plain: Params, quantized: Params, on: Collection[str]) -> Params:
    """The tree whose quantized kernels are switches; those of the paths `on` are quantized."""
    changed = leaves(quantized)

    def change(path: str, leaf: Any) -> Any:
        if not isinstance(changed[path], Leaf):
            return leaf
        return Switched(jnp.asarray(path in on), leaf, changed[path])

    return map_leaves(change, plain)


def only(plain: Params, quantized: Params, chosen: Collection[str]) -> Params:
    """The tree whose chosen kernels are quantized, and the others as they were."""
    changed = leaves(quantized)
    return map_leaves(lambda path, leaf: changed[path] if path in chosen else leaf, plain)


class Integers(NamedTuple):
    """A kernel in int8, for other formats.

    Attributes:
      values: i8[..., in, out] in -127 ... 127.
      scale: f[out], the step between the levels of each output.
      inputs: of the products: "float"; or rounded to int8, "dynamic" or "static" as of ptq.
    """

    values: jax.Array
    scale: jax.Array
    inputs: str


def int8_kernels(params: Params) -> dict[str, Integers]:
    """The kernels, and factors of kernels, that are held in int8, by path."""
    found: dict[str, Integers] = {}

    def find(path: str, leaf: Any) -> None:
        if isinstance(leaf, Factored):
            for inner, factor in zip(factor_paths(path), (leaf.u, leaf.v), strict=True):
                find(inner, factor)
        elif isinstance(leaf, Int8):
            static = leaf.input_scale is not None
            inputs = "dynamic" if leaf.dynamic else "static" if static else "float"
            found[path] = Integers(leaf.values, leaf.scale, inputs)

    map_leaves(find, params)
    return found


def merge_but_int8(params: Params) -> Params:
    """`factored.merge`, but what is in int8 stays."""

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, Int8):
            return leaf
        if isinstance(leaf, Factored):
            return Factored(plain(leaf.u), plain(leaf.v))
        return factored.merge(leaf)

    return map_leaves(lambda _, leaf: plain(leaf), params)


def quantize_static(
    params: Params, chosen: Collection[str], input_scales: Mapping[str, jax.Array]
) -> Params:
    """The tree with the chosen kernels in int8, and their inputs by calibrated scales f[].

    A kernel whose inputs nobody saw multiplies in float: the second one of two factors.
    """

    def change(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        if isinstance(leaf, Factored):
            return Factored(change(path, leaf.u), to_int8(leaf.v))
        return to_int8(leaf, input_scale=input_scales.get(path))

    return map_leaves(change, params)


# What a file says of its leaves ------------------------------------------------------------------


def describe(params: Params) -> dict[str, dict[str, Any]]:
    """How each quantized or factored kernel was made, by path, for `like`: plain values for JSON.

    Examples:
      >>> describe({"fc": {"kernel": to_int8(jnp.ones((4, 2)))}})
      {'fc/kernel': {'form': 'int8', 'dynamic': False, 'static': False}}
    """
    told = {path: _told(leaf) for path, leaf in leaves(params).items()}
    return {path: one for path, one in told.items() if one}


def is_quantized(described: Mapping[str, Any]) -> bool:
    """Whether any kernel that `describe` told of is in few bits, and not in float factors alone."""
    return any(told["form"] != FACTORED or told["u"] or told["v"] for told in described.values())


def _told(leaf: Any) -> dict[str, Any]:
    """What `like` must know of a leaf; {} of a plain array."""
    if isinstance(leaf, Int8):
        static = leaf.input_scale is not None
        return {"form": "int8", "dynamic": leaf.dynamic, "static": static}
    if isinstance(leaf, NF4):
        double = leaf.absmax_scale is not None
        return {"form": "nf4", "block_size": leaf.block_size, "double": double}
    if isinstance(leaf, Factored):
        return {"form": FACTORED, "rank": leaf.rank, "u": _told(leaf.u), "v": _told(leaf.v)}
    return {}


def like(params: Params, described: Mapping[str, Any]) -> Params:
    """The abstract tree that `describe` told of, out of the abstract tree of plain kernels.

    Raises:
      UserError: a description of no such kernel or form.
    """
    kernels = leaves(params)
    for path, told in described.items():
        if path not in kernels or kernels[path].ndim not in (2, 4):
            raise UserError(f"{path} is described as quantized, and the model has no such kernel")
        if not _is_description(told, kernels[path].shape):
            raise UserError(f"{path}: it cannot be quantized as {str(told)[:80]!r}")
    return map_leaves(
        lambda path, leaf: _made(leaf, described[path]) if path in described else leaf, params
    )


def _made(leaf: Any, told: Mapping[str, Any]) -> Any:
    """The abstract leaf that is told of, of an abstract kernel."""
    if not told:
        return leaf
    settings = {**told}
    form = settings.pop("form")
    if form == FACTORED:
        u, v = _factors(leaf.shape, told["rank"])
        pairs = ((u, told["u"]), (v, told["v"]))
        return Factored(*(_made(jax.ShapeDtypeStruct(at, leaf.dtype), how) for at, how in pairs))
    inputs = {}
    if settings.pop("static", False):
        inputs["input_scale"] = jax.ShapeDtypeStruct((), leaf.dtype)
    return jax.eval_shape(partial(FORMS[form], **settings), leaf, **inputs)


def _factors(shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of U and V."""
    return (*shape[:-1], rank), (rank, shape[-1])


def _is_description(told: Any, shape: tuple[int, ...]) -> bool:
    if not isinstance(told, Mapping):
        return False
    if told.get("form") == FACTORED:
        return (
            told.keys() == {"form", "rank", "u", "v"}
            and type(told["rank"]) is int
            and 0 < told["rank"] <= min(math.prod(shape[:-1]), shape[-1])
            and all(
                told[name] == {}
                or (_is_description(told[name], part) and told[name]["form"] != FACTORED)
                for name, part in zip("uv", _factors(shape, told["rank"]), strict=True)
            )
        )
    if told.get("form") == "int8":
        return told.keys() == {"form", "dynamic", "static"} and all(
            isinstance(told[name], bool) for name in ("dynamic", "static")
        )
    return (
        told.keys() == {"form", "block_size", "double"}
        and told["form"] == "nf4"
        and type(told["block_size"]) is int
        and 0 < told["block_size"] < 2**16
        and isinstance(told["double"], bool)
    )


def kernel_bytes(
    shape: Sequence[int], form: str, *, block_size: int = BLOCK, double: bool = True
) -> int:
    """Bytes of a float32 kernel [..., in, out] in a form of FORMS; of "float", as it is.

    int8: a byte a weight, 4 an output. nf4: half a byte a weight, for each block 4, or with double
    quantization 1, and 4 for 256 blocks and the mean.

    Examples:
      >>> kernel_bytes((768, 3072), "float"), kernel_bytes((768, 3072), "int8")
      (9437184, 2371584)
      >>> kernel_bytes((768, 3072), "nf4")
      1217092
    """
    inputs, outputs = math.prod(shape[:-1]), shape[-1]
    if form == "int8":
        return (inputs + 4) * outputs
    if form != "nf4":
        return 4 * inputs * outputs
    codes, blocks = -(-inputs // 2) * outputs, -(-inputs // block_size) * outputs
    return codes + (blocks + 4 * -(-blocks // SCALES_BLOCK) + 4 if double else 4 * blocks)


def surviving_share(before: Params, wanted: Params, after: Params) -> dict[str, float]:
    """For each array that training changed, the share of the change that quantization left.

    It is the length of what became of the change in its own direction, <after - before, wanted -
    before> / ‖wanted - before‖²: 1 if all is there, 0 if rounding took all of it back.

    Args:
      before: the tree before training, of plain arrays: of a quantized base, its kernels in float.
      wanted: after training, in float.
      after: after training, quantized and made float again.
    """
    found = {}
    old, new, kept = (paths.flatten(tree) for tree in (before, wanted, after))
    for path, first in old.items():
        change, left = new[path] - first, kept[path] - first
        if size := float(jnp.vdot(change, change)):
            found[path] = float(jnp.vdot(left, change)) / size
    return found
