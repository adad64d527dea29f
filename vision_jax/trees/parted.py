"""Kernels whose outputs are several things beside each other, so that each of them can be split.

The outputs of a fused qkv are queries, keys and values. Cut into T equal pieces, its columns are
some queries on one device and some values on another; what a device needs are its heads of all
three. `part` gives the kernel as three of them, [in, 3, out / 3], whose last axis is cut instead.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.trees.leaf import Kernel, Leaf, merge_leaf, multiply
from vision_jax.trees.low_rank import LowRank, part_scales
from vision_jax.trees.products import Product
from vision_jax.trees.quantized import NF4

Array = jax.Array
# (array, take) -> take(array), which is linear, its last axis split over devices.
Split = Callable[[Array, Callable[[Array], Array]], Array]
INPUTS, OUTPUTS = -2, -1  # axes of a kernel


@dataclass(frozen=True)
class TensorRule:
    """Which axis of some leaves a mesh's axis `tensor` splits.

    A layer whose outputs are split and one behind it whose inputs are make a pair that sums up once
    (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3).

    Attributes:
      paths: regular expression over whole paths of leaves.
      axis: OUTPUTS, or INPUTS of a kernel.
      units: equal parts of that axis that stay whole, such as heads; None: its numbers.
      parts: beside each other on it, each of which is split: the 3 of a fused qkv.
    """

    paths: str
    axis: int
    units: int | None = None
    parts: int = 1


def part(kernel: Kernel, count: int, split: Split) -> Leaf:
    """The kernel [in, out] as `count` ones beside each other, whose products are f[..., P, out/P].

    Args:
      kernel: an array or a structured leaf.
      count: P, which divides its outputs.
      split: takes from arrays those whose last axis are outputs of one part, and lays them out.
    """
    if isinstance(kernel, Leaf):
        return PartedLeaves(tuple(_columns(kernel, index, count, split) for index in range(count)))
    return PartedKernel(split(kernel, partial(_in_parts, count=count)))


@partial(jax.tree_util.register_dataclass, data_fields=["kernel"], meta_fields=[])
@dataclass(frozen=True)
class PartedKernel(Leaf):
    """One array of several kernels.

    Attributes:
      kernel: f[in, P, out / P].
    """

    kernel: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all side by side, [in, out]."""
        inputs, parts, outputs = self.kernel.shape
        return inputs, parts * outputs

    @property
    def dtype(self) -> Any:
        """Of all."""
        return self.kernel.dtype

    def merge(self) -> Array:
        """All side by side."""
        return self.kernel.reshape(self.shape)

    def multiply(self, product: Product, x: Array, dropout_key: Array | None) -> Array:
        """f[..., P, out / P], in one product, whose gradient is summed over devices once."""
        del dropout_key
        return product(x, self.kernel)


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=[])
@dataclass(frozen=True)
class PartedLeaves(Leaf):
    """Several kernels of which some have adapters, say.

    Attributes:
      parts: [in, out / P] each.
    """

    parts: tuple[Kernel, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all side by side, [in, out]."""
        return (*self.parts[0].shape[:-1], sum(one.shape[-1] for one in self.parts))

    @property
    def dtype(self) -> Any:
        """Of all."""
        return self.parts[0].dtype

    def merge(self) -> Array:
        """All side by side."""
        return jnp.concatenate([merge_leaf(one) for one in self.parts], axis=-1)

    def multiply(self, product: Product, x: Array, dropout_key: Array | None) -> Array:
        """f[..., P, out / P]; the inputs that one key drops are the same for all."""
        return jnp.stack([multiply(product, x, one, dropout_key) for one in self.parts], axis=-2)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel"],
    meta_fields=["index", "count", "split"],
)
@dataclass(frozen=True)
class PartOf(Leaf):
    """The `index`-th of `count` equal parts of the outputs of a kernel whose arrays can't be cut.

    Attributes:
      kernel: a structured leaf whose product is with its merged array; each use makes that anew.
      split: see `part`.
    """

    kernel: Kernel
    index: int
    count: int
    split: Split

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        return (*self.kernel.shape[:-1], self.kernel.shape[-1] // self.count)

    @property
    def dtype(self) -> Any:
        """Of the kernel."""
        return self.kernel.dtype

    def merge(self) -> Array:
        """The part as an array."""
        return _cut(merge_leaf(self.kernel), self.index, self.count, self.split)


def _columns(kernel: Kernel, index: int, count: int, split: Split) -> Kernel:
    """One of the parts, a leaf of the same kind where its arrays can be cut."""
    if not isinstance(kernel, Leaf):
        return _cut(kernel, index, count, split)
    if isinstance(kernel, NF4):  # whose scales lie in one row for all outputs
        return PartOf(kernel, index, count, split)
    outputs = kernel.shape[-1]
    if isinstance(kernel, LowRank) and kernel.parts is not None:
        total, chosen = kernel.parts
        assert total == count, kernel.parts
        base = _columns(kernel.base, index, count, split)
        magnitude = kernel.magnitude
        if magnitude is not None:
            magnitude = _cut(magnitude, index, count, split)
        elif index not in chosen:
            return base
        if index in chosen:
            at = chosen.index(index)
            a, b = kernel.a[at], split(kernel.b, partial(_entry, at=at))
            scale = part_scales(kernel)[at]
        else:  # DoRA's magnitudes are of all outputs
            a, scale = jnp.zeros_like(kernel.a[0]), 1.0
            b = jnp.zeros_like(kernel.b[0])
        return replace(kernel, base=base, a=a, b=b, magnitude=magnitude, scale=scale, parts=None)

    def cut(array: Any) -> Any:
        if array is None:
            return None
        if isinstance(array, Leaf) or jnp.shape(array)[-1:] == (outputs,):
            return _columns(array, index, count, split)
        return array

    return jax.tree.map(cut, kernel, is_leaf=lambda node: node is not kernel)


def _cut(array: Array, index: int, count: int, split: Split) -> Array:
    return split(array, partial(_slice, index=index, count=count))


def _in_parts(array: Array, count: int) -> Array:
    return array.reshape(array.shape[0], count, -1)


def _slice(array: Array, index: int, count: int) -> Array:
    size = array.shape[-1] // count
    return array[..., index * size : (index + 1) * size]


def _entry(array: Array, at: int) -> Array:
    return array[at]
