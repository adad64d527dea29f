"""JAX's primitives that move numbers, pick or sum them, as nodes of ONNX.

Slices and indices beyond a border, negative padding and reductions of booleans do what JAX does.
"""

from collections.abc import Mapping

import numpy as np

from vision_jax.errors import UserError
from vision_jax.export.onnx_graph import Operator

# Shapes -------------------------------------------------------------------------------------------


def _broadcast(graph, params, values, equation):
    shape = equation.outvars[0].aval.shape
    placed = [1] * len(shape)
    for axis, at in enumerate(params["broadcast_dimensions"]):
        placed[at] = equation.invars[0].aval.shape[axis]
    value = _kept(graph, values[0], placed, params) or graph.reshape(values[0], placed)
    if placed == list(shape):
        return value
    return graph.op("Expand", value, graph.ints(shape))


def _kept(graph, value, placed, params):
    """What was reduced, again with the axes that it lost, if that is what is asked for."""
    for kind in ("ReduceSum", "ReduceMax", "ReduceMin"):
        made = graph.made_by(kind, value)
        if made is None or made.attributes["keepdims"]:
            continue
        if isinstance(axes := made.inputs[1], np.ndarray):
            left = [at for at in range(len(placed)) if at not in axes]
            if list(params["broadcast_dimensions"]) == left:
                return graph.op(kind, *made.inputs, keepdims=1)
    return None


def _reshape(graph, params, values, equation):
    return graph.reshape(values[0], equation.outvars[0].aval.shape)


def _transpose(graph, params, values, equation):
    return graph.transpose(values[0], params["permutation"])


def _concatenate(graph, params, values, equation):
    return graph.op("Concat", *values, axis=params["dimension"])


def _stack(graph, params, values, equation):
    axis = params["axis"] if "axis" in params else params["dimension"]
    shape = list(equation.invars[0].aval.shape)
    shape.insert(axis, 1)
    return graph.op("Concat", *(graph.reshape(value, shape) for value in values), axis=axis)


def _tile(graph, params, values, equation):
    return graph.op("Tile", values[0], graph.ints(params["reps"]))


def _split(graph, params, values, equation):
    sizes = params["sizes"]
    found = graph.op("Split", values[0], graph.ints(sizes), outputs=len(sizes), axis=params["axis"])
    return found if isinstance(found, list) else [found]


def _cut(graph, value, starts, limits, strides):
    axes = np.arange(len(starts), dtype=np.int64)
    return graph.op("Slice", value, *map(graph.ints, (starts, limits)), axes, graph.ints(strides))


def _slice(graph, params, values, equation):
    starts, limits = params["start_indices"], params["limit_indices"]
    return _cut(graph, values[0], starts, limits, params["strides"] or [1] * len(starts))


def _reverse(graph, params, values, equation):
    axes = np.array(params["dimensions"], np.int64)
    first = np.full(len(axes), -1, np.int64)
    past = np.full(len(axes), np.iinfo(np.int64).min, np.int64)
    return graph.op("Slice", values[0], first, past, axes, first)


def _pad(graph, params, values, equation):
    low, high, inner = zip(*params["padding_config"], strict=True)
    if any(inner):
        raise UserError("ONNX: padding between elements")
    value = values[0]
    if min(*low, *high) < 0:  # which cuts
        shape = equation.invars[0].aval.shape
        limits = [side + min(after, 0) for side, after in zip(shape, high, strict=True)]
        value = _cut(graph, value, [max(-x, 0) for x in low], limits, [1] * len(shape))
    around = [max(x, 0) for x in (*low, *high)]
    return graph.op("Pad", value, graph.ints(around), values[1], mode="constant")


def _iota(graph, params, values, equation):
    shape, axis = equation.outvars[0].aval.shape, params["dimension"]
    side = graph.reshape(graph.dim(shape[axis]), ())
    zero, one = (np.array(number, np.int64) for number in (0, 1))
    line = graph.cast(graph.op("Range", zero, side, one), params["dtype"])
    placed = [shape[axis] if at == axis else 1 for at in range(len(shape))]
    return graph.op("Expand", graph.reshape(line, placed), graph.ints(shape))


def _dim_as_value(graph, params, values, equation):
    value = graph.reshape(graph.dim(params["dim"]), ())
    return graph.cast(value, equation.outvars[0].aval.dtype)


# Reductions ---------------------------------------------------------------------------------------


def _reduce(kind: str) -> Operator:
    def write(graph, params, values, equation):
        return graph.op(kind, values[0], graph.ints(params["axes"]), keepdims=0)

    return write


def _reduce_bools(kind: str) -> Operator:
    def write(graph, params, values, equation):
        numbers = graph.cast(values[0], np.uint8)
        return graph.cast(graph.op(kind, numbers, graph.ints(params["axes"]), keepdims=0), np.bool_)

    return write


def _argmax(graph, params, values, equation):
    (axis,) = params["axes"]
    place = graph.op("ArgMax", values[0], axis=axis, keepdims=0, select_last_index=0)
    return graph.cast(place, params["index_dtype"])


def _cumsum(graph, params, values, equation):
    axis = np.array(params["axis"], np.int64)
    if equation.invars[0].aval.dtype == np.bool_:
        raise UserError("ONNX: a running sum of booleans")
    return graph.op("CumSum", values[0], axis, reverse=int(params["reverse"]))


def _top_k(graph, params, values, equation):
    axis = params.get("axis", params.get("operand_axis", -1))
    best, place = graph.op(
        "TopK", values[0], graph.ints([params["k"]]), outputs=2, axis=axis, largest=1, sorted=1
    )
    return [best, graph.cast(place, equation.outvars[1].aval.dtype)]


# Indices ------------------------------------------------------------------------------------------


def _gather(graph, params, values, equation):
    """Single places of some axes and all of the others; beyond the border the nearest place.

    JAX may give NaN there; no exported graph reads beyond.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    operand, places = values
    shape, place_shape = (variable.aval.shape for variable in equation.invars)
    indexed = list(numbers.start_index_map)
    batch = list(numbers.operand_batching_dims)
    if len(place_shape) == 1:
        found = _block(graph, operand, places, shape, indexed, sizes)
        return graph.reshape(found, equation.outvars[0].aval.shape)
    rest = [axis for axis in range(len(shape)) if axis not in (*batch, *indexed)]
    if any(sizes[axis] != 1 for axis in indexed) or any(
        sizes[axis] is not shape[axis] and sizes[axis] != shape[axis] for axis in rest
    ):
        raise UserError("ONNX: a gather of blocks")
    limits = np.array([1], np.int64)
    limits = graph.op("Sub", graph.ints([shape[axis] for axis in indexed]), limits)
    places = graph.op("Max", graph.cast(places, np.int64), np.zeros((), np.int64))
    places = graph.op("Min", places, limits)
    own = list(numbers.start_indices_batching_dims)
    others = [axis for axis in range(len(place_shape) - 1) if axis not in own]
    if not batch and len(indexed) == 1:
        flat = graph.reshape(places, place_shape[:-1])
        (axis,) = indexed
        found = graph.op("Gather", operand, flat, axis=axis)
        # [axes before, places, axes after]
        moved = list(range(axis, axis + len(others)))
        kept = [at for at in range(len(rest) + len(others)) if at not in moved]
    else:
        operand = graph.transpose(operand, (*batch, *indexed, *rest))
        places = graph.transpose(places, (*own, *others, len(place_shape) - 1))
        found = graph.op("GatherND", operand, places, batch_dims=len(batch))
        moved = list(range(len(own) + len(others)))
        order = np.argsort([*own, *others]).tolist()
        moved = [moved[at] for at in order]
        kept = list(range(len(moved), len(moved) + len(rest)))
    # Offset axes are the operand's in their order; of those with one place nothing is left here.
    offsets = [axis for axis in range(len(shape))
               if axis not in (*numbers.collapsed_slice_dims, *batch)]  # fmt: skip
    left = [at for at, axis in zip(sorted(numbers.offset_dims), offsets, strict=True)
            if axis in rest]  # fmt: skip
    where = dict(zip(left, kept, strict=True))
    free = iter(moved)
    final = []
    for at in range(len(equation.outvars[0].aval.shape)):
        if at in where:
            final.append(where[at])
        elif at not in numbers.offset_dims:
            final.append(next(free))
    return graph.reshape(graph.transpose(found, final), equation.outvars[0].aval.shape)


def _block(graph, operand, starts, shape, axes, sizes):
    """So many places along some axes, from `starts` on, which move where the border is too near."""
    block = graph.ints([sizes[axis] for axis in axes])
    last = graph.op("Sub", graph.ints([shape[axis] for axis in axes]), block)
    starts = graph.op("Max", graph.cast(starts, np.int64), np.zeros((), np.int64))
    starts = graph.op("Min", starts, last)
    ends = graph.op("Add", starts, block)
    return graph.op("Slice", operand, starts, ends, np.array(axes, np.int64))


def _dynamic_slice(graph, params, values, equation):
    operand, *starts = values
    shape, sizes = equation.invars[0].aval.shape, params["slice_sizes"]
    line = [graph.reshape(graph.cast(start, np.int64), (1,)) for start in starts]
    return _block(
        graph, operand, graph.op("Concat", *line, axis=0), shape, range(len(shape)), sizes
    )


SHAPES: Mapping[str, Operator] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "stack": _stack,
    "tile": _tile,
    "split": _split,
    "slice": _slice,
    "rev": _reverse,
    "pad": _pad,
    "iota": _iota,
    "dim_as_value": _dim_as_value,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_or": _reduce_bools("ReduceMax"),
    "reduce_and": _reduce_bools("ReduceMin"),
    "argmax": _argmax,
    "cumsum": _cumsum,
    "top_k": _top_k,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}
