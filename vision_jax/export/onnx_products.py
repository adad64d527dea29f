"""Products as nodes of ONNX, convolutions and what runs along them; and whole functions as one."""

import math
from collections.abc import Mapping

import numpy as np

from vision_jax.errors import UserError
from vision_jax.export.onnx_graph import DTYPES, Operator

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
            return _whole_numbers(graph, _integer_product(graph, left, right))
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
    if len(left_sum) != 1 or len(free[0]) != 1:
        left = graph.reshape(left, (*batch, rows, summed))
    if len(left_sum) != 1 or len(free[1]) != 1:
        right = graph.reshape(right, (*batch, summed, columns))
    product = graph.op("MatMul", left, right)
    if not len(free[0]) == len(free[1]) == 1:
        product = graph.reshape(product, equation.outvars[0].aval.shape)
    return _typed(graph, product, equation)


def _is_int8(equation):
    return equation.invars[0].aval.dtype == np.int8


def _integer_product(graph, left, right):
    """Of whole numbers -127 ... 127 in float32 and a kernel in int8.

    Runtimes that know the pattern multiply integers, each the pair of types that it is fast with;
    onnxruntime takes ten times as long for MatMulInteger of int8 by int8 (x86, November 2026).
    """
    one, zero = np.array(1, np.float32), np.array(0, np.int8)
    known = isinstance(left, np.ndarray)  # of no image
    rows = left if known else graph.op("QuantizeLinear", *_unrounded(graph, left), zero)
    pair = (graph.op("DequantizeLinear", values, one) for values in (rows, right))
    return graph.op("MatMul", *pair)


def _unrounded(graph, whole):
    """(x, step) of whole numbers round(x / step), which QuantizeLinear divides and rounds."""
    one = np.array(1, np.float32)
    if not (rounded := graph.made_by("Round", whole)):
        return whole, one
    (levels,) = rounded.inputs
    # Of calibrated inputs: min(127, max(-127, x / step)).
    below = graph.made_by("Min", levels)
    above = graph.made_by("Max", below.inputs[1]) if below else None
    quotient = graph.made_by("Div", above.inputs[1]) if above else None
    if below is None or above is None or quotient is None:
        return levels, one
    step, bounds = quotient.inputs[1], (above.inputs[0], below.inputs[0])
    if not all(isinstance(known, np.ndarray) and known.ndim == 0 for known in (step, *bounds)):
        return levels, one
    return graph.op("Clip", quotient.inputs[0], *(bound * step for bound in bounds)), step


def _whole_numbers(graph, value):
    """Where float32 holds what is an int32 in JAX: nothing has to be cast later."""
    graph.sums.add(value)
    return value


def scaled_outputs(graph, left, right):
    """A product of integers times a number for each output, which its kernel takes; None else."""
    product, steps = (left, right) if isinstance(right, np.ndarray) else (right, left)
    if not isinstance(steps, np.ndarray) or not graph.is_sum(product):
        return None
    made = graph.made_by("MatMul", product)
    if made is None:  # a convolution's
        return None
    rows, kernel = made.inputs
    values = graph.made[kernel].inputs[0]
    if steps.shape != (1,) * (steps.ndim - 1) + values.shape[1:]:
        return None
    return graph.op("MatMul", rows, graph.op("DequantizeLinear", values, steps.reshape(-1), axis=1))


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
    found = graph.transpose(found, np.argsort(numbers.out_spec).tolist())
    return _whole_numbers(graph, found) if _is_int8(equation) else found


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


# Whole functions ----------------------------------------------------------------------------------


def _layer_norm(graph, params, values, equation):
    x, scale, bias, epsilon = values
    return graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=float(epsilon))


def _gelu(approximate: str) -> Operator:
    return lambda graph, params, values, equation: graph.op(
        "Gelu", *values, approximate=approximate
    )


def _softmax(graph, params, values, equation):
    return graph.op("Softmax", *values, axis=-1)


PRODUCTS: Mapping[str, Operator] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _max_pool,
    "vision_jax.layer_norm": _layer_norm,
    "vision_jax.gelu": _gelu("none"),
    "vision_jax.gelu_tanh": _gelu("tanh"),
    "vision_jax.softmax": _softmax,
}
