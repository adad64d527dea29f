"""Which device holds what: one mesh, one rule for batches, one list of rules for parameters.

Every array is born with its sharding and keeps it; `jit` inserts the communication. The mesh has
two axes. Both split the batch; `fsdp` splits parameters and optimizer state too, so
{data: 8, fsdp: 1} is data parallelism, {data: 1, fsdp: 8} is fully sharded, and one CPU is
{data: 1, fsdp: 1}.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vision_jax.errors import UserError
from vision_jax.trees import paths
from vision_jax.trees.leaf import Params, roles

DATA, FSDP = "data", "fsdp"
BATCH = PartitionSpec((DATA, FSDP))

Rules = Sequence[tuple[str, tuple[str | None, ...]]]

# Below this many elements a parameter is replicated: a gather would cost more than it saves.
SMALLEST_SHARDED = 2**14


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A (data, fsdp) mesh over all devices; -1 in at most one place takes what is left.

    Raises:
      UserError: sizes that don't multiply to the number of devices.
    """
    count = jax.device_count()
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = count // max(-data * fsdp, 1)
    if min(sizes) < 1 or sizes[0] * sizes[1] != count:
        raise UserError(
            f"mesh: data={data}, fsdp={fsdp} does not fit {count} devices; "
            "their product must be that number, or one of them -1"
        )
    # Automatic axes: newer JAX makes explicit ones by default, which changes what arrays carry.
    return jax.make_mesh(tuple(sizes), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(
    params: Params, mesh: Mesh, rules: Rules = (), *, strict: bool = True
) -> dict[str, NamedSharding]:
    """A sharding for each array by path: the first rule that matches the path, else the default.

    The default splits the largest axis that `fsdp` divides. What takes the kernel's place in a
    structured leaf goes by the kernel's path.

    Args:
      params: a tree of anything with .shape, or such things by path.
      mesh: from `make_mesh`.
      rules: (path regex, one mesh axis or None per array axis), for example
        [(".*mlp/fc1/kernel", (None, "fsdp"))]; each must match something.
      strict: False takes rules that match nothing, too.

    Raises:
      UserError: a rule that matches nothing, or axes that the mesh or the parameter has not.
    """
    names = {path: role.rule_path for path, role in roles(params).items()}
    patterns = [pattern for pattern, _ in rules]
    paths.select(names.values(), patterns, field="config.sharding_rules", strict=strict)

    def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        for pattern, axes in rules:
            if re.fullmatch(pattern, path):
                return _checked_spec(path, shape, axes, mesh)
        size = mesh.shape[FSDP]
        divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
        if size == 1 or not divisible or np.prod(shape) < SMALLEST_SHARDED:
            return PartitionSpec()
        largest = max(divisible, key=lambda axis: shape[axis])
        return PartitionSpec(*(FSDP if axis == largest else None for axis in range(len(shape))))

    return {
        path: NamedSharding(mesh, spec(names[path], leaf.shape))
        for path, leaf in paths.flatten(params).items()
    }


def _checked_spec(path: str, shape: tuple[int, ...], axes: Any, mesh: Mesh) -> PartitionSpec:
    sizes = {None: 1, **mesh.shape}
    if (
        not isinstance(axes, tuple)
        or len(axes) > len(shape)
        or any(axis not in sizes for axis in axes)
        or any(length % sizes[axis] for length, axis in zip(shape, axes, strict=False))
    ):
        raise UserError(
            f"config.sharding_rules: {path} {shape} cannot be split as {axes!r}: give one of "
            f"{DATA!r}, {FSDP!r} and None for each of its axes, and the mesh must divide them"
        )
    return PartitionSpec(*axes)


def gather_in(loss_fn: Any, parameters: Mapping[str, NamedSharding], but: str = "") -> Any:
    """`loss_fn` with each parameter that `fsdp` splits gathered where it is used.

    Left to itself the partitioner may move activations instead, since parameters are split by axes
    that products run over. Gathered parameters are not kept for the backward pass, which gathers
    them again, and a gradient is reduced to the part that its device has.

    Args:
      loss_fn: a steps.LossFn.
      parameters: from `parameter_shardings`.
      but: regular expression of paths that are left to the partitioner: those of a loop over
        layers, before which all would be gathered at once.
    """
    split = {
        path: place
        for path, place in parameters.items()
        if FSDP in place.spec and not re.fullmatch(but, path)
    }
    if not split:
        return loss_fn

    def gather(flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {p: _gather(x, split[p]) if p in split else x for p, x in flat.items()}

    def gathered(trainable: Any, frozen: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return loss_fn(gather(trainable), gather(frozen), model_state, batch, key)

    return jax.checkpoint(gathered, policy=_kept)


def _kept(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Whether the backward pass finds a result: neither gathered arrays nor casts of them."""
    inner = getattr(parameters.get("call_jaxpr"), "eqns", ())
    gathers = any(one.primitive.name == "sharding_constraint" for one in inner)
    return not gathers and primitive.name not in ("sharding_constraint", "convert_element_type")


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(array: jax.Array, place: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, NamedSharding(place.mesh, PartitionSpec()))


_gather.defvjp(
    lambda array, place: (_gather(array, place), None),
    lambda place, _, gradient: (jax.lax.with_sharding_constraint(gradient, place),),
)


def state_shardings(abstract: Any, parameters: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings of a train state: whatever is keyed by a parameter's path is laid out like it.

    Optimizer state repeats the parameters' dict, so a leaf under the key `head/bias` belongs to
    that parameter; a leaf of another rank (a count, a factored statistic) is replicated.
    """

    def sharding(keys: Any, leaf: Any) -> NamedSharding:
        for key in keys:
            like = parameters.get(getattr(key, "key", None))  # type: ignore[arg-type]
            if like is not None and len(like.spec) <= leaf.ndim:
                return like
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts a host array, equal on all processes, on the devices; each takes its own slice only."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def make_batch_placer(mesh: Mesh) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
    """A function from this process's part of a batch to the global, sharded batch."""
    sharding = batch_sharding(mesh)
    return lambda batch: {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
