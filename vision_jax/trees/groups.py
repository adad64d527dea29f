"""Channels that can only be taken away together, found in the program that a model is.

    find_groups(function, arrays, ..) -> Group for each set of axes that are one
    take(arrays, group, kept)         the arrays with some of a group's channels

A channel is one entry of an axis: a head's, a hidden unit's, one of the residual stream. Each entry
of each channel axis of the parameters has a number, and the numbers go through the jaxpr as data
does: a reshape moves them, a split parts them, a sum of two arrays says that the numbers at the
same place are one, and so does a product along the axis that it contracts. What stays apart at the
end can be taken away apart. So the q, k and v of a head, which a fused kernel has in three places,
the gate and the value of a gated MLP, and the channels of a residual stream in all of its blocks
come out as one without a word about any architecture.

What this can't follow (a primitive that is not listed here, outputs of the model, a constant with
another value for each channel) holds its channels fast: they are in no group. This errs on the side
of keeping.

The idea of dependency groups is DepGraph's (Fang et al. 2023, https://arxiv.org/abs/2301.12900),
which couples layers by their types; here the primitives couple single entries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vision_jax.trees.channels import FIXED, Trace, along, constant, long_axes, make_value

Axis = tuple[str, int]  # path of an array, and one of its axes


@dataclass(frozen=True)
class Group:
    """Channels that stay apart, each with its entries of every axis that it takes part in.

    Attributes:
      members: for each axis the number of the channel of each of its entries, i64[n], all from 0 to
        `count` - 1. An axis may have a channel several times: q, k and v of a head.
      count: how many channels there are.
      exact: taking a channel away whose producers are zero changes no output. It does where a norm
        takes the mean over the channels.
    """

    members: Mapping[Axis, np.ndarray]
    count: int
    exact: bool


def find_groups(
    function: Callable[..., Any], arrays: Mapping[str, Any], *inputs: Any
) -> list[Group]:
    """The groups of the channels of a function's arrays.

    Args:
      function: from the arrays, by path, and the inputs to outputs; these keep their shapes.
      arrays: arrays or ShapeDtypeStructs. The channel axes of a kernel are the last two, and of
        another array the last one that is longer than 1.
      inputs: arrays or ShapeDtypeStructs.
    """
    closed = jax.make_jaxpr(function)(dict(arrays), *inputs)
    trace = Trace()
    names = sorted(arrays)  # as JAX orders a dict
    numbers: dict[Axis, np.ndarray] = {}
    values = []
    for path in names:
        shape = arrays[path].shape
        own = {axis: trace.fresh(shape[axis]) for axis in _channel_axes(path, shape)}
        numbers |= {(path, axis): ids for axis, ids in own.items()}
        factors = tuple(along(ids, axis, len(shape)) for axis, ids in own.items())
        values.append(make_value(factors, long_axes(shape) - own.keys()))
    values += [make_value((), long_axes(leaf.shape)) for leaf in jax.tree.leaves(inputs)]
    for output in trace.run(closed.jaxpr, [constant(c) for c in closed.consts], values):
        trace.fix(output)
    return list(_groups(numbers, *trace.classes()))


def take(arrays: Mapping[str, Any], group: Group, kept: np.ndarray) -> dict[str, Any]:
    """The arrays, those of the group with the channels `kept` alone, in the order that they had."""
    taken = dict(arrays)
    for (path, axis), members in group.members.items():
        places = np.flatnonzero(np.isin(members, kept))
        taken[path] = taken[path].take(places, axis=axis)
    return taken


def sums(values: Mapping[str, np.ndarray], group: Group) -> np.ndarray:
    """f64[count]: for each channel the sum of the values of its entries; without those of no array.

    Args:
      values: something of each weight, in the weights' shapes, by path.
      group: of these arrays and others.
    """
    total = np.zeros(group.count)
    for (path, axis), members in group.members.items():
        if path in values:
            array = np.asarray(values[path], np.float64)
            rest = tuple(other for other in range(array.ndim) if other != axis)
            total += np.bincount(members, array.sum(rest), group.count)
    return total


def _channel_axes(path: str, shape: Sequence[int]) -> list[int]:
    if path.rpartition("/")[2] == "kernel":
        return [axis for axis in range(len(shape))[-2:] if shape[axis] > 1]
    return sorted(long_axes(shape))[-1:]


def _groups(
    numbers: Mapping[Axis, np.ndarray], classes: np.ndarray, mixed: np.ndarray
) -> Iterator[Group]:
    """Axes with a class in common are of one group."""
    found = {axis: classes[ids] for axis, ids in numbers.items()}
    axes = list(found)
    pairs = np.array([(i, c) for i, axis in enumerate(axes) for c in np.unique(found[axis])])
    size = len(axes) + len(classes)
    _, of = connected_components(
        coo_array((np.ones(len(pairs)), (pairs[:, 0], len(axes) + pairs[:, 1])), (size, size))
    )
    for number in dict.fromkeys(of[: len(axes)]):
        own = {axis: found[axis] for i, axis in enumerate(axes) if of[i] == number}
        every = np.unique(np.concatenate(list(own.values())))
        if classes[FIXED] in every:
            continue
        members = {axis: np.searchsorted(every, ids) for axis, ids in own.items()}
        counts = [np.bincount(ids, minlength=len(every)) for ids in members.values()]
        if all((each == each[0]).all() for each in counts):  # else shapes would be ragged
            yield Group(members, len(every), not np.isin(every, classes[mixed]).any())
