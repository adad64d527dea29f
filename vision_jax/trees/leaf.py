"""Structured leaves: objects that stand in for one array of a parameter tree.

A layer never asks what kind of leaf it holds. It calls `dot` or `convolve` with its input and its
kernel, which is an array or a `Leaf`, and the product and its gradient follow. Training and
sharding go by `roles`, export by `merge_leaf`. So a new kind of leaf is one file beside this one
with one subclass of `Leaf`, and a transform that puts it in the tree; nothing else changes.
"""

import abc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax

from vision_jax.trees import paths, products
from vision_jax.trees.products import Product

Array = jax.Array
Params = Any  # nested dicts of arrays and structured leaves


class Leaf(abc.ABC):
    """Stands in for one kernel, [in, out] or [h, w, in, out].

    A subclass is a frozen dataclass that `jax.tree_util.register_dataclass` has made a pytree. A
    field of arrays may hold another structured leaf: a LowRank's base may be quantized.

    Class attributes:
      trains: what is said of fields whatever `config.trainable` says: True, its arrays always
        train; False, they never do. It goes for a leaf inside as well. The arrays of other fields
        are chosen by rule, as plain ones are.
      like_kernel: fields that rules of training and sharding know by the kernel's own path, since
        they are of its kind: the base of an update, the values under a scale or a mask.
    """

    trains: ClassVar[Mapping[str, bool]] = MappingProxyType({})
    like_kernel: ClassVar[Collection[str]] = ()

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this leaf stands in for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Dtype of the kernel that this leaf stands in for."""

    @property
    def ndim(self) -> int:
        """Rank of the kernel that this leaf stands in for."""
        return len(self.shape)

    @property
    def supports_groups(self) -> bool:
        """Whether it can be the kernel of a convolution in groups."""
        return True

    @abc.abstractmethod
    def merge(self) -> Array:
        """The kernel that this leaf stands in for, as a plain array of its shape and dtype."""

    def multiply(self, product: Product, x: Array, dropout_key: Array | None) -> Array:
        """`product(x, kernel)`; a subclass may know a cheaper way, or a cheaper gradient.

        Args:
          product: what the layer does with a plain kernel; also with one of other outputs.
          x: the layer's input, f[..., in].
          dropout_key: for dropout inside of the leaf; None outside training.
        """
        return product(x, self.merge())


Kernel = Array | Leaf


def merge_leaf(kernel: Kernel) -> Array:
    """The plain array that `kernel` stands in for; an array is returned as it is."""
    return kernel.merge() if isinstance(kernel, Leaf) else kernel


def supports_groups(kernel: Kernel) -> bool:
    """Whether it can be the kernel of a convolution in groups."""
    return not isinstance(kernel, Leaf) or kernel.supports_groups


# What the leaves of a tree are for ---------------------------------------------------------------


def leaves(params: Params) -> dict[str, Any]:
    """Arrays and whole structured leaves by path.

    Examples:
      >>> leaves({"head": {"bias": 1, "kernel": 2}})
      {'head/bias': 1, 'head/kernel': 2}
    """
    found: dict[str, Any] = {}
    map_leaves(lambda path, leaf: found.setdefault(path, leaf), params)
    return found


def map_leaves(function: Callable[[str, Any], Any], params: Params) -> Params:
    """Maps function(path, leaf) over arrays and whole structured leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: function(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf),
        params,
        is_leaf=lambda leaf: isinstance(leaf, Leaf),
    )


class Role(NamedTuple):
    """What one array of a tree is for.

    Attributes:
      trains: True or False whatever the rules say; None leaves it to them.
      rule_path: the path that the rules of training and sharding know it by: its own, or the
        kernel's for what takes the kernel's place.
    """

    trains: bool | None
    rule_path: str


def roles(params: Params) -> dict[str, Role]:
    """The role of each array, by the paths of `paths.flatten` and in their order.

    Examples:
      >>> roles({"head": {"bias": 1}})
      {'head/bias': Role(trains=None, rule_path='head/bias')}
    """
    found: dict[str, Role] = {}
    for path, leaf in leaves(params).items():
        found |= _roles(path, leaf, Role(None, path))
    return found


def trainable_paths(params: Params, rules: Sequence[str], *, field: str) -> set[str]:
    """Paths of the arrays that train: what always does, and of the rest what a rule matches whole.

    Examples:
      >>> params = {"head": {"bias": 1, "kernel": 2}}
      >>> trainable_paths(params, ["head/b.*"], field="trainable")
      {'head/bias'}

    Raises:
      UserError: a rule that matches nothing that may train; `field` is the config's, to name it.
    """
    free = {path: role for path, role in roles(params).items() if role.trains is not False}
    chosen = paths.select([role.rule_path for role in free.values()], rules, field=field)
    return {path for path, role in free.items() if role.trains or role.rule_path in chosen}


def _roles(path: str, leaf: Any, role: Role) -> Iterator[tuple[str, Role]]:
    if not isinstance(leaf, Leaf):
        yield path, role
        return
    inner = jax.tree_util.tree_leaves_with_path(leaf, is_leaf=lambda node: node is not leaf)
    for keys, field in inner:
        name = jax.tree_util.keystr(keys, simple=True)
        if field is None:
            continue
        trains = leaf.trains.get(name) if role.trains is None else role.trains
        own = role.rule_path if name in leaf.like_kernel else f"{role.rule_path}/{name}"
        yield from _roles(f"{path}/{name}", field, Role(trains, own))


# How a layer multiplies --------------------------------------------------------------------------


def dot(x: Array, kernel: Kernel, dropout_key: Array | None = None) -> Array:
    """`x[..., in] · kernel[in, out]`, in x's dtype, accumulated in at least float32.

    Args:
      x: f[..., in], the layer's input in its compute dtype.
      kernel: an array or a structured leaf, usually in float32.
      dropout_key: for dropout inside of the leaf; None outside training.
    """
    return multiply(products.dot, x, kernel, dropout_key)


def convolve(
    x: Array,
    kernel: Kernel,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    groups: int = 1,
    dropout_key: Array | None = None,
    dilation: int = 1,
) -> Array:
    """Convolution of x[B, H, W, in] with kernel[h, w, in / groups, out], in x's dtype."""
    product = products.convolution(
        kernel.shape[:2],
        tuple(strides),
        tuple((low, high) for low, high in padding),
        groups,
        dilation,
    )
    return multiply(product, x, kernel, dropout_key)


def multiply(product: Product, x: Array, kernel: Kernel, dropout_key: Array | None) -> Array:
    """`product(x, kernel)` of an array or of a structured leaf."""
    if isinstance(kernel, Leaf):
        return kernel.multiply(product, x, dropout_key)
    return product(x, kernel)
