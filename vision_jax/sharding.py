"""Which device holds what: one mesh, one rule for batches, one list of rules for parameters.

Every array is born with its sharding and keeps it; `jit` inserts the communication. The mesh has
two axes. Both split the batch; `fsdp` splits parameters and optimizer state too, so
{data: 8, fsdp: 1} is data parallelism, {data: 1, fsdp: 8} is fully sharded, and one CPU is
{data: 1, fsdp: 1}.

A third axis, `tensor`, is there if it is asked for. It splits the computation of layers: devices
along it have the same images, and each its share of the heads, of an MLP's hidden channels and of
the classes, by the rules that a model states (`tensor_rules`). Activations between branches are
whole on each, and summed up behind a pair of split layers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vision_jax.errors import UserError
from vision_jax.trees import parted, paths
from vision_jax.trees.leaf import Params, leaves, map_leaves, roles
from vision_jax.trees.parted import INPUTS, TensorRule

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
BATCH = PartitionSpec((DATA, FSDP))

Rules = Sequence[tuple[str, tuple[str | None, ...]]]

# Below this many elements a parameter is replicated: a gather would cost more than it saves.
SMALLEST_SHARDED = 2**14


def make_mesh(data: int, fsdp: int, tensor: int = 1, slices: int = 1) -> Mesh:
    """A (data, fsdp) mesh over all devices, or (data, fsdp, tensor).

    Args:
      data, fsdp: -1 in at most one of them takes what is left.
      tensor: devices beside each other, of one process.
      slices: groups of devices whose links within are fast, such as TPU slices; `data` goes over
        them, and `fsdp` and `tensor` stay within one. See `hybrid_devices`.

    Raises:
      UserError: sizes that don't multiply to the number of devices, or slices that aren't there.
    """
    count = jax.device_count()
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = count // max(-data * fsdp * tensor, 1)
    if min(*sizes, tensor) < 1 or sizes[0] * sizes[1] * tensor != count:
        third = f", tensor={tensor}" if tensor != 1 else ""
        raise UserError(
            f"mesh: data={data}, fsdp={fsdp}{third} does not fit {count} devices; "
            "their product must be that number, or one of them -1"
        )
    names = [DATA, FSDP]
    if tensor > 1:
        if jax.local_device_count() % tensor:
            raise UserError(
                f"mesh: tensor={tensor} must divide the {jax.local_device_count()} devices of a "
                "process: devices along it have the same images"
            )
        names, sizes = [*names, TENSOR], [*sizes, tensor]
    if slices != 1:
        devices = hybrid_devices(jax.devices(), sizes, slices)
        return Mesh(devices, tuple(names), axis_types=(AxisType.Auto,) * len(names))
    # Automatic axes: newer JAX makes explicit ones by default, which changes what arrays carry.
    return jax.make_mesh(tuple(sizes), tuple(names), axis_types=(AxisType.Auto,) * len(names))


def hybrid_devices(devices: Sequence[Any], sizes: Sequence[int], slices: int) -> np.ndarray:
    """The devices of a mesh of these sizes, whose first axis alone goes over slices.

    Args:
      devices: all of them, with `process_index`, and `slice_index` where a platform has slices;
        where it has not, or one only, the devices of a process are a slice.
      sizes: of the axes, `data` first.
      slices: how many there are.

    Raises:
      UserError: there are others, or `data` does not divide among them.
    """
    own = {getattr(device, "slice_index", None) for device in devices}
    by_process = None in own or len(own) == 1
    count = len({device.process_index for device in devices} if by_process else own)
    if slices != count or sizes[0] % slices:
        raise UserError(
            f"mesh.slices={slices}: there are {count} {'processes' if by_process else 'slices'}, "
            f"and mesh.data={sizes[0]}, which goes over them, must be a multiple"
        )
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, *[1] * (len(sizes) - 1))
    try:
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, process_is_granule=by_process
        )
    except ValueError as error:  # slices of several sizes
        raise UserError(f"mesh.slices={slices}: {error}") from None


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(
    params: Params,
    mesh: Mesh,
    rules: Rules = (),
    *,
    strict: bool = True,
    tensor: "TensorLayout | None" = None,
) -> dict[str, NamedSharding]:
    """A sharding for each array by path: the first rule that matches the path, else the default.

    The default splits the largest axis that `fsdp` divides, of those that `tensor` leaves. What
    takes the kernel's place in a structured leaf goes by the kernel's path.

    Args:
      params: a tree of anything with .shape, or such things by path.
      mesh: from `make_mesh`.
      rules: (path regex, one mesh axis or None per array axis), for example
        [(".*mlp/fc1/kernel", (None, "fsdp"))]; each must match something.
      strict: False takes rules that match nothing, too.
      tensor: from `tensor_layout`, of these params.

    Raises:
      UserError: a rule that matches nothing, or axes that the mesh or the parameter has not.
    """
    names = {path: role.rule_path for path, role in roles(params).items()}
    patterns = [pattern for pattern, _ in rules]
    paths.select(names.values(), patterns, field="config.sharding_rules", strict=strict)
    size = mesh.shape[FSDP]

    def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        for pattern, axes in rules:
            if re.fullmatch(pattern, names[path]):
                return _checked_spec(names[path], shape, axes, mesh)
        placed = (tensor or TensorLayout()).spec(path, len(shape))
        divisible = [
            axis for axis, length in enumerate(shape) if length % size == 0 and not placed[axis]
        ]
        if size > 1 and divisible and np.prod(shape) >= SMALLEST_SHARDED:
            placed[max(divisible, key=lambda axis: shape[axis])] = FSDP
        return PartitionSpec(*placed) if any(placed) else PartitionSpec()

    return {
        path: NamedSharding(mesh, spec(path, leaf.shape))
        for path, leaf in paths.flatten(params).items()
    }


def _checked_spec(path: str, shape: tuple[int, ...], axes: Any, mesh: Mesh) -> PartitionSpec:
    sizes = {None: 1, **mesh.shape}
    if (
        not isinstance(axes, tuple)
        or len(axes) > len(shape)
        or any(not isinstance(axis, str | None) or axis not in sizes for axis in axes)
        or len({axis for axis in axes if axis}) < sum(axis is not None for axis in axes)
        or any(length % sizes[axis] for length, axis in zip(shape, axes, strict=False))
    ):
        raise UserError(
            f"config.sharding_rules: {path} {shape} cannot be split as {axes!r}: give one of "
            f"{', '.join(map(repr, mesh.axis_names))} and None for each of its axes, and the mesh "
            "must divide them"
        )
    return PartitionSpec(*axes)


# The tensor axis ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorLayout:
    """What of a model's parameters the axis `tensor` splits.

    Attributes:
      axes: the axis of each array that is split, from its end, by path.
      parts: how many kernels lie beside each other in those that are stored by inputs and used by
        outputs, by the leaf's path (see trees/parted.py).
      notes: what a rule would split, and the mesh cannot.
      split: see `parted.part`.
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    split: parted.Split = lambda array, take: take(array)

    def spec(self, path: str, rank: int) -> list[str | None]:
        """A mesh axis or None for each axis of an array."""
        placed: list[str | None] = [None] * rank
        if path in self.axes:
            placed[self.axes[path]] = TENSOR
        return placed

    def enter(self, params: Params, prefix: str = "", but: str = "") -> Params:
        """The tree, or the subtree under `prefix`, as layers use it: fused kernels in parts.

        `but`: regular expression of paths that are left as they are.
        """

        def one(path: str, leaf: Any) -> Any:
            count = self.parts.get(prefix + path)
            if count is None or re.fullmatch(but, prefix + path):
                return leaf
            return parted.part(leaf, count, self.split)

        return map_leaves(one, params) if self.parts else params


def tensor_layout(params: Params, mesh: Mesh, rules: Sequence[TensorRule] | None) -> TensorLayout:
    """The layout of a model's parameters by its rules; nothing is split by a mesh without the axis.

    A fused kernel is split by its inputs, and turned where it is used: of its outputs each device
    needs some of each part. What takes a kernel's place in a structured leaf is split where it has
    the kernel's inputs, or outputs, as an axis.

    Args:
      params: a tree of anything with .shape.
      mesh: from `make_mesh`.
      rules: of the model; None: it has none.

    Raises:
      UserError: a mesh with the axis, and nothing that it splits.
    """
    size = mesh.shape.get(TENSOR, 1)
    if size == 1:
        return TensorLayout()
    axes, counts, notes = {}, {}, []
    for path, leaf in leaves(params).items():
        rule = next((rule for rule in rules or () if re.fullmatch(rule.paths, path)), None)
        if rule is None:
            continue
        length = leaf.shape[rule.axis] // rule.parts
        units = rule.units or length
        if units % size or length % size:
            what = "heads" if rule.units else "numbers"
            notes.append(f"{path}: mesh.tensor={size} does not divide its {units} {what}: whole")
            continue
        axis = rule.axis
        if rule.parts > 1:
            counts[path], axis = rule.parts, INPUTS
        for name, array in paths.flatten(leaf).items():
            shape = array.shape
            has_axis = len(shape) >= -axis and shape[axis] == leaf.shape[axis]
            if has_axis and shape[axis] % size == 0:
                axes[f"{path}/{name}" if name else path] = axis
    if not axes:
        reason = notes[0] if notes else "this model has no rules for it"
        raise UserError(f"mesh.tensor={size} splits nothing: {reason}; set mesh.tensor=1")

    def lay_out(array: jax.Array, *axes: str | None) -> jax.Array:
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.lax.with_sharding_constraint(array, place)

    def split(take: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
        taken = take(array)
        if taken.ndim == 3:  # [in, P, out / P]: the gradient goes back the way that this came
            taken = lay_out(taken, TENSOR)
        return lay_out(taken, *[None] * (taken.ndim - 1), TENSOR)

    def split_outputs(array: jax.Array, take: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return _linear(array, partial(split, take), jax.ShapeDtypeStruct(array.shape, array.dtype))

    return TensorLayout(axes, counts, tuple(notes), split_outputs)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _linear(array: jax.Array, function: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """function(array), as one operation to `_kept`, so that the backward pass does it again."""
    return function(array)


_linear.defvjp(
    lambda array, function, like: (_linear(array, function, like), None),
    lambda function, like, _, gradient: (
        jax.linear_transpose(function, like)(gradient)
        if jnp.issubdtype(like.dtype, jnp.inexact)
        else (None,)
    ),
)


# Fully sharded -----------------------------------------------------------------------------------


def make_gather(parameters: Mapping[str, NamedSharding]) -> Callable[..., dict[str, jax.Array]]:
    """A function (arrays by path, prefix) -> the same, whole over `fsdp`, for their use.

    Left to itself the partitioner may move activations instead, since parameters are split by axes
    that products run over. A gradient is reduced to the part that its device has.

    Args:
      parameters: from `parameter_shardings`; paths are those behind the prefix.
    """
    split = {path: place for path, place in parameters.items() if FSDP in place.spec}

    def gather(flat: Mapping[str, jax.Array], prefix: str = "") -> dict[str, jax.Array]:
        return {
            path: _gather(x, split[prefix + path]) if prefix + path in split else x
            for path, x in flat.items()
        }

    return gather


def gather_in(
    loss_fn: Any, parameters: Mapping[str, NamedSharding], but: str = "", *, keep: bool = False
) -> Any:
    """`loss_fn` with each parameter that `fsdp` splits gathered where it is used.

    Gathered parameters are not kept for the backward pass, which gathers them again.

    Args:
      loss_fn: a steps.LossFn.
      parameters: from `parameter_shardings`.
      but: regular expression of paths that are gathered elsewhere: in a loop over layers, one after
        the other.
      keep: those that are gathered here are kept. Of a model that recomputes what a loop computed,
        with the gathering in it: what is kept here would be kept of the loop too, since the outer
        one of two `jax.checkpoint` decides.
    """
    if not any(FSDP in place.spec for place in parameters.values()):
        return loss_fn
    own = {path: place for path, place in parameters.items() if not re.fullmatch(but, path)}
    gather = make_gather(own)

    def gathered(trainable: Any, frozen: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return loss_fn(gather(trainable), gather(frozen), model_state, batch, key)

    return gathered if keep else jax.checkpoint(gathered, policy=_kept)


def _kept(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Whether the backward pass finds a result: neither gathered arrays nor casts of them."""
    inner = getattr(parameters.get("call_jaxpr"), "eqns", ())
    gathers = any(one.primitive.name == "sharding_constraint" for one in inner)
    return not gathers and primitive.name not in ("sharding_constraint", "convert_element_type")


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(array: jax.Array, place: NamedSharding) -> jax.Array:
    used = PartitionSpec(*(None if axis == FSDP else axis for axis in place.spec))
    return jax.lax.with_sharding_constraint(array, NamedSharding(place.mesh, used))


_gather.defvjp(
    lambda array, place: (_gather(array, place), None),
    lambda place, _, gradient: (jax.lax.with_sharding_constraint(gradient, place),),
)


def state_shardings(abstract: Any, parameters: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Shardings of a train state: whatever is keyed by a parameter's path is laid out like it.

    Optimizer state repeats the parameters' dict, so a leaf under the key `head/bias` belongs to
    that parameter; a leaf of a lower rank (a count, a factored statistic) is replicated.
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
