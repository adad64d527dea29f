"""Whether the copies of replicated arrays are equal: faulty memory, or a process that strayed.

Data parallelism keeps a copy of each array on each device and never compares them. A flipped bit,
or a process that has restored something else, then trains a model of its own in silence. Here each
device sums its copies' bits, and all sums come to all processes, so that each names the same array.

    compare = make_compare(state)          # compiled once
    sums = compare(state)                  # starts, without waiting: u32[devices, arrays]
    difference = find_difference(state, sums)
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def _names(tree: Any) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path) for path, _ in leaves
    ]


def _mesh(tree: Any) -> Mesh:
    return next(leaf.sharding.mesh for leaf in jax.tree.leaves(tree))


class Layout:
    """Where an array lies, without the array: arrays are donated while sums are on their way."""

    def __init__(self, array: jax.Array):
        self.sharding = array.sharding


def make_compare(tree: Any) -> Callable[[Any], jax.Array]:
    """A program from arrays laid out like these to u32[devices, arrays], the same on all devices.

    Args:
      tree: of arrays with NamedShardings of one mesh.
    """
    leaves, mesh = jax.tree.leaves(tree), _mesh(tree)
    specs = tuple(leaf.sharding.spec for leaf in leaves)
    everywhere = PartitionSpec(mesh.axis_names)

    def of_device(leaves: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.stack([bit_sum(leaf) for leaf in leaves])[None]

    of_all = jax.shard_map(
        of_device, mesh=mesh, in_specs=(specs,), out_specs=everywhere, check_vma=False
    )
    program = jax.jit(of_all, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda tree: program(tuple(jax.tree.leaves(tree)))


def bit_sum(array: jax.Array) -> jax.Array:
    """u32[], of all bits: the sum of words times odd numbers, modulo 2^32.

    One flipped bit always changes it: an odd number times a power of two is never 0.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    integer = jnp.issubdtype(array.dtype, jnp.integer)
    if array.dtype == jnp.bool_ or (integer and jnp.iinfo(array.dtype).bits < 8):
        array = array.astype(jnp.int8)
    width = min(array.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])
    words = words.reshape(-1).astype(jnp.uint32)
    odd = jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(2) + jnp.uint32(1)
    return jnp.sum(words * odd, dtype=jnp.uint32)


def find_difference(tree: Any, sums: Any) -> tuple[str, list[int]] | None:
    """The first array whose copies differ, and the processes that hold what few hold; None: equal.

    Args:
      tree: of arrays, or of anything with their shardings.
      sums: of `make_compare`; reading them waits for them.
    """
    sums, mesh = np.asarray(sums), _mesh(tree)
    devices = mesh.devices.reshape(-1)
    places = np.stack(np.unravel_index(np.arange(devices.size), mesh.devices.shape), -1)
    for number, (name, leaf) in enumerate(zip(_names(tree), jax.tree.leaves(tree), strict=True)):
        split = {axis for part in leaf.sharding.spec for axis in _axes(part)}
        keys = [
            tuple(int(at) for at, axis in zip(place, mesh.axis_names, strict=True) if axis in split)
            for place in places
        ]
        for key in dict.fromkeys(keys):
            rows = [row for row, other in enumerate(keys) if other == key]
            found = Counter(int(sums[row, number]) for row in rows)
            if len(found) > 1:
                (usual, most), (_, next_most) = found.most_common(2)
                odd = {devices[row].process_index for row in rows if sums[row, number] != usual}
                if most == next_most:  # nobody knows who is right
                    odd = {devices[row].process_index for row in rows}
                return name, sorted(odd)
    return None


def _axes(part: Any) -> tuple[str, ...]:
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)


def find_not_finite(batch: Any) -> tuple[str, list[int]] | None:
    """The first array of a batch that is not finite on some processes but not on all; else None."""
    floats = {name: x for name, x in batch.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    for name, array in floats.items():
        mesh = array.sharding.mesh
        everywhere = PartitionSpec(mesh.axis_names)

        def finite(x: jax.Array) -> jax.Array:
            return jnp.isfinite(x).all()[None]

        program = jax.shard_map(
            finite, mesh=mesh, in_specs=array.sharding.spec, out_specs=everywhere, check_vma=False
        )
        rows = jax.jit(program, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
        devices = mesh.devices.reshape(-1)
        fine = np.asarray(rows)
        odd = sorted({devices[row].process_index for row in np.flatnonzero(~fine)})
        if odd and len(odd) < len({one.process_index for one in devices}):
            return name, odd
    return None
