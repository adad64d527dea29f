"""JAX's primitives of single numbers as nodes of ONNX, where the exported graphs have them.

Where the two differ at an edge, the node is written so that it does what JAX does: division and
remainders of integers, shifts, rounding, booleans.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax

from vision_jax.errors import UserError
from vision_jax.export.onnx_graph import Graph, Operator, Value
from vision_jax.export.onnx_products import scaled_outputs


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


def _mul(graph, params, values, equation):
    return scaled_outputs(graph, *values) or graph.op("Mul", *values)


def _convert(graph, params, values, equation):
    """Of what is rounded to int8 the float32 stays: products take it as they need it."""
    dtype = np.dtype(params["new_dtype"])
    if dtype == np.int8 or (dtype == np.float32 and graph.is_sum(values[0])):
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


ELEMENTS: Mapping[str, Operator] = {
    **{
        name: _same(kind)
        for name, kind in {
            "add": "Add",
            "sub": "Sub",
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
    "mul": _mul,
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
}
