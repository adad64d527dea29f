"""JAX's primitives as nodes of ONNX: those that the exported graphs are made of, and no others.

Where the two differ at an edge, the node is written so that it does what JAX does: division and
remainders of integers, shifts, rounding, reductions of booleans, slices and indices at the border.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax

from vision_jax.errors import UserError
from vision_jax.export.onnx_graph import DTYPES, Graph, Operator, Value


def _same(kind: str) -> Operator:
    """An operation that is the same in both."""
    return lambda graph, params, values, equation: graph.op(kind, *values)


def _bool_or(kind: str, of_bools: str) -> Operator:
    """Of booleans another operation.

    What is known comes first: of NaN and a number OpenVINO's Max and Min take the second.
    """

    def write(graph, params, values, equation):
        bools = equation.invars[0].aval.dtype == np.bool_
        known_first = sorted(values, key=lambda value: isinstance(value, str))
        return graph.op(of_bools if bools else kind, *known_first)

    return write


def _passed(graph: Graph, params: Any, values: Sequence[Value], equation: Any) -> list[Value]:
    return list(values)


def _ne(graph, params, values, equation):
    return graph.op("Not", graph.op("Equal", *values))


def _rsqrt(graph, params, values, equation):
    return graph.op("Reciprocal", graph.op("Sqrt", *values))


def _square(graph, params, values, equation):
    return graph.op("Mul", values[0], values[0])


def _integer_pow(graph, params, values, equation):
    return graph.op("Pow", values[0], np.array(params["y"], equation.invars[0].aval.dtype))


def _div(graph, params, values, equation):
    """Of whole numbers toward zero: OpenVINO does so at run time, and where it folds, downward."""
    if not np.issubdtype(equation.outvars[0].aval.dtype, np.integer):
        return graph.op("Div", *values)
    sign = graph.op("Mul", *(graph.op("Sign", value) for value in values))
    return graph.op("Mul", sign, graph.op("Div", *(graph.op("Abs", value) for value in values)))


def _rem(graph, params, values, equation):
    """Of the dividend's sign; of whole numbers not by Mod, which OpenVINO has in float32."""
    if not np.issubdtype(equation.outvars[0].aval.dtype, np.integer):
        return graph.op("Mod", *values, fmod=1)
    quotient = _div(graph, params, values, equation)
    return graph.op("Sub", values[0], graph.op("Mul", quotient, values[1]))


def _shift(graph, params, values, equation):
    """Downward, of negative numbers too: BitShift has none of these, and Div goes toward zero."""
    if not isinstance(values[1], np.ndarray):
        raise UserError("ONNX: a shift by what is computed")
    unit = (1 << values[1].astype(np.int64)).astype(equation.invars[0].aval.dtype)
    rest = graph.op("Mod", values[0], unit)  # never negative
    return graph.op("Div", graph.op("Sub", values[0], rest), unit)


def _round(graph, params, values, equation):
    if params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        raise UserError("ONNX: rounding of halves away from zero")
    return graph.op("Round", *values)


def _convert(graph, params, values, equation):
    """Of what is rounded to int8 the float32 stays: products below take it as they need it."""
    dtype = np.dtype(params["new_dtype"])
    if dtype == np.int8:
        return values[0]
    if dtype == np.uint8:
        raise UserError("ONNX: a cast to uint8, whose borders runtimes treat each in its own way")
    return graph.cast(values[0], dtype)


def _select(graph, params, values, equation):
    which, *cases = values
    if len(cases) != 2:
        raise UserError("ONNX: a choice among more than two")
    return graph.op("Where", which, cases[1], cases[0])


def _branch(graph, params, values, equation):
    """A branch that is known, or both and a choice."""
    which, *given = values
    branches = params["branches"]
    if isinstance(which, np.ndarray):
        return graph.walk(branches[int(np.clip(which, 0, len(branches) - 1))], given)
    if len(branches) != 2:
        raise UserError("ONNX: a choice among more than two")
    first, second = (graph.walk(branch, given) for branch in branches)
    there = graph.cast(which, np.bool_)
    pairs = zip(first, second, strict=True)
    return [graph.op("Where", there, two, one) for one, two in pairs]


def _clamp(graph, params, values, equation):
    low, x, high = values
    return graph.op("Min", high, graph.op("Max", low, x))


# Shapes -------------------------------------------------------------------------------------------


def _broadcast(graph, params, values, equation):
    shape = equation.outvars[0].aval.shape
    placed = [1] * len(shape)
    for axis, at in enumerate(params["broadcast_dimensions"]):
        placed[at] = equation.invars[0].aval.shape[axis]
    value = graph.reshape(values[0], placed)
    if placed == list(shape):
        return value
    return graph.op("Expand", value, graph.ints(shape))


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


# Products -----------------------------------------------------------------------------------------


def _dot(graph, params, values, equation):
    """As a product of matrices: axes of the batch first, the summed ones last and first."""
    (left_sum, right_sum), (left_batch, right_batch) = params["dimension_numbers"]
    shapes = [variable.aval.shape for variable in equation.invars]
    left, right = values
    plain = not left_batch and len(shapes[1]) == 2 and len(left_sum) == 1
    if plain and left_sum[0] == len(shapes[0]) - 1:
        if right_sum[0] == 1:
            right = graph.transpose(right, (1, 0))
        if _is_int8(equation):
            return _integer_product(graph, left, right)
        return _typed(graph, graph.op("MatMul", left, right), equation)
    free = [
        [axis for axis in range(len(shape)) if axis not in (*batch, *summed)]
        for shape, batch, summed in zip(
            shapes, (left_batch, right_batch), (left_sum, right_sum), strict=True
        )
    ]
    batch = [shapes[0][axis] for axis in left_batch]
    rows, columns = (
        math.prod(shape[axis] for axis in axes) for shape, axes in zip(shapes, free, strict=True)
    )
    summed = math.prod(shapes[0][axis] for axis in left_sum)
    left = graph.transpose(left, (*left_batch, *free[0], *left_sum))
    right = graph.transpose(right, (*right_batch, *right_sum, *free[1]))
    product = graph.op(
        "MatMul",
        graph.reshape(left, (*batch, rows, summed)),
        graph.reshape(right, (*batch, summed, columns)),
    )
    return _typed(graph, graph.reshape(product, equation.outvars[0].aval.shape), equation)


def _is_int8(equation):
    return equation.invars[0].aval.dtype == np.int8


def _integer_product(graph, left, right):
    """Of whole numbers -127 ... 127 in float32 and a kernel in int8.

    Runtimes that know the pattern multiply integers, each the pair of types that it is fast with;
    onnxruntime takes ten times as long for MatMulInteger of int8 by int8 (x86, November 2026).
    """
    one, zero = np.array(1, np.float32), np.array(0, np.int8)
    known = isinstance(left, np.ndarray)  # of no image
    rows = left if known else graph.op("QuantizeLinear", left, one, zero)
    pair = (graph.op("DequantizeLinear", values, one, zero) for values in (rows, right))
    return graph.op("MatMul", *pair)


def _typed(graph, value, equation):
    dtype = equation.outvars[0].aval.dtype
    return value if equation.invars[0].aval.dtype == dtype else graph.cast(value, dtype)


def _convolution(graph, params, values, equation):
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
        raise UserError("ONNX: a transposed convolution")
    sides = [side for pair in zip(*params["padding"], strict=True) for side in pair]
    if min(sides) < 0:
        raise UserError("ONNX: a convolution that cuts its input")
    images = graph.transpose(values[0], numbers.lhs_spec)
    kernel = graph.transpose(values[1], numbers.rhs_spec)
    if _is_int8(equation):  # exact in float32; of integers onnxruntime takes five times as long
        kernel = graph.op("Cast", kernel, to=DTYPES["float32"])
    found = graph.op(
        "Conv",
        images,
        kernel,
        strides=list(params["window_strides"]),
        pads=sides,
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )
    return graph.transpose(found, np.argsort(numbers.out_spec).tolist())


def _max_pool(graph, params, values, equation):
    window, strides = params["window_dimensions"], params["window_strides"]
    around = params["padding"]
    dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
    if len(window) != 4 or window[0] != 1 or window[3] != 1 or dilated:
        raise UserError("ONNX: a maximum of other windows than of images")
    if any(map(any, around)):
        raise UserError("ONNX: a padded maximum; pad first")
    found = graph.op(
        "MaxPool",
        graph.transpose(values[0], (0, 3, 1, 2)),
        kernel_shape=list(window[1:3]),
        strides=list(strides[1:3]),
    )
    return graph.transpose(found, (0, 2, 3, 1))


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


OPERATORS: Mapping[str, Operator] = {
    **{
        name: _same(kind)
        for name, kind in {
            "add": "Add",
            "sub": "Sub",
            "mul": "Mul",
            "neg": "Neg",
            "abs": "Abs",
            "sign": "Sign",
            "floor": "Floor",
            "ceil": "Ceil",
            "exp": "Exp",
            "log": "Log",
            "sqrt": "Sqrt",
            "sin": "Sin",
            "cos": "Cos",
            "tanh": "Tanh",
            "erf": "Erf",
            "logistic": "Sigmoid",
            "pow": "Pow",
            "eq": "Equal",
            "lt": "Less",
            "le": "LessOrEqual",
            "gt": "Greater",
            "ge": "GreaterOrEqual",
        }.items()
    },
    "max": _bool_or("Max", "Or"),
    "min": _bool_or("Min", "And"),
    "and": _bool_or("BitwiseAnd", "And"),
    "or": _bool_or("BitwiseOr", "Or"),
    "not": _bool_or("BitwiseNot", "Not"),
    "ne": _ne,
    "rsqrt": _rsqrt,
    "square": _square,
    "integer_pow": _integer_pow,
    "div": _div,
    "rem": _rem,
    "shift_right_arithmetic": _shift,
    "round": _round,
    "convert_element_type": _convert,
    "select_n": _select,
    "clamp": _clamp,
    "cond": _branch,
    "copy": _passed,
    "stop_gradient": _passed,
    "optimization_barrier": _passed,
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
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _max_pool,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}
