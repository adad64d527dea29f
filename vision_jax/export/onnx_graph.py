"""A traced JAX program as a graph of ONNX: values, sizes that are open, and the walk over both.

What depends on parameters alone is computed here and stored; what depends on the images becomes
nodes, by onnx_elements.py, onnx_shapes.py and onnx_products.py.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from onnx import TensorProto, helper, numpy_helper

from vision_jax import platform
from vision_jax.errors import UserError

OPSET = 20
LARGEST_FOLDED = 4096  # elements that a constant may grow to, where its inputs are smaller
DTYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # where primitives that call keep what they call

Value = str | np.ndarray  # of a graph: a name, or an array that is known
Operator = Callable[["Graph", Mapping[str, Any], Sequence[Value], Any], Any]


class Made(NamedTuple):
    """How a value was made: of what kind of node, by which values and attributes."""

    kind: str
    inputs: Sequence[Value]
    attributes: Mapping[str, Any]


class Graph:
    """Nodes in the making.

    Args:
      operators: by primitive, or by name of a whole function (see platform.whole): (graph, the
        primitive's parameters, values, equation) -> a value, or a list of them.
      images: name of the input.
      image_dims: the symbolic dimensions of the images, by place.
    """

    def __init__(self, operators: Mapping[str, Operator], images: str, image_dims: Sequence[Any]):
        self.operators, self.images = operators, images
        self.nodes: list[Any] = []
        self.made: dict[str, Made] = {}
        self.sums: set[str] = set()  # of products of integers, which float32 holds
        self.stored: list[Any] = []
        self._names: dict[Any, str] = {}
        self._places = {str(dim): at for at, dim in enumerate(image_dims) if type(dim) is not int}

    def op(self, kind: str, *inputs: Value, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or the names."""
        names = [f"{kind}_{len(self.nodes)}_{index}" for index in range(outputs)]
        given = [self.name(value) for value in inputs]
        self.nodes.append(helper.make_node(kind, given, names, **attributes))
        self.made.update(dict.fromkeys(names, Made(kind, inputs, attributes)))
        return names[0] if outputs == 1 else names

    def name(self, value: Value) -> str:
        """A value as a node takes it; an array is stored, once."""
        if isinstance(value, str):
            return value
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._names:
            self._names[key] = f"stored_{len(self.stored)}"
            self.stored.append(numpy_helper.from_array(value, self._names[key]))
        return self._names[key]

    def finish(self, outputs: Mapping[str, Value]) -> tuple[list[Any], list[Any]]:
        """The nodes and the stored arrays that outputs need, which get these names."""
        for name, value in outputs.items():
            self.nodes.append(helper.make_node("Identity", [self.name(value)], [name]))
        needed, nodes = set(outputs), []
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.output):
                needed.update(node.input)
                nodes.append(node)
        return nodes[::-1], [array for array in self.stored if array.name in needed]

    def made_by(self, kind: str, value: Value) -> Made | None:
        """How the value was made, if by a node of this kind."""
        made = self.made.get(value) if isinstance(value, str) else None
        return made if made is not None and made.kind == kind else None

    def is_sum(self, value: Value) -> bool:
        """Whether it is an int32 in JAX that float32 holds here."""
        return isinstance(value, str) and value in self.sums

    def cast(self, value: Value, dtype: Any) -> Value:
        """As another type; a kernel in int8 is stored as it is."""
        if isinstance(value, np.ndarray) and value.dtype != np.int8:
            return value.astype(dtype)
        return self.op("Cast", value, to=DTYPES[np.dtype(dtype).name])

    def ints(self, values: Sequence[Any]) -> Value:
        """i64[n] of numbers and symbolic dimensions."""
        if all(isinstance(value, int | np.integer) for value in values):
            return np.array(values, np.int64)
        parts = [self.dim(value) for value in values]
        return self.op("Concat", *parts, axis=0)

    def dim(self, value: Any) -> Value:
        """i64[1] of a number or a symbolic dimension."""
        if isinstance(value, int | np.integer):
            return np.array([value], np.int64)
        if str(value) not in self._names:
            self._names[str(value)] = self._compute(ast.parse(str(value), mode="eval").body)
        return self._names[str(value)]

    def _compute(self, node: ast.expr) -> Any:
        """Of an expression of the images' dimensions, such as 4*b + floordiv(h, 2)."""
        kinds: dict[Any, str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
        calls = {"floordiv": "Div", "mod": "Mod", "max": "Max", "min": "Min"}
        if isinstance(node, ast.Name) and node.id in self._places:
            at = np.array([self._places[node.id]], np.int64)
            return self.op("Gather", self.op("Shape", self.images), at)
        if isinstance(node, ast.Constant):
            return np.array([node.value], np.int64)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self.op("Neg", self._compute(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in kinds:
            parts = (self._compute(part) for part in (node.left, node.right))
            return self.op(kinds[type(node.op)], *parts)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls:
            return self.op(calls[node.func.id], *map(self._compute, node.args))
        raise UserError(f"an open size of {ast.unparse(node)}: give --image-size and --batch")

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """In another shape, of which any may be symbolic."""
        open_ = [at for at, side in enumerate(shape) if not isinstance(side, int)]
        if isinstance(value, np.ndarray):
            return value.reshape(shape)
        if len(open_) == 1 and 0 not in shape:
            shape = [-1 if at == open_[0] else side for at, side in enumerate(shape)]
        return self.op("Reshape", value, self.ints(shape))

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Axes in another order."""
        if list(order) == sorted(order):
            return value
        if isinstance(value, np.ndarray):
            return value.transpose(order)
        return self.op("Transpose", value, perm=list(order))

    def walk(self, closed: Any, inputs: Sequence[Value]) -> list[Value]:
        """The program's outputs.

        Raises:
          UserError: a primitive that there is no function for.
        """
        program = closed.jaxpr if hasattr(closed, "consts") else closed
        known: dict[Any, Value] = {}
        constants = [np.asarray(x) for x in getattr(closed, "consts", ())]
        for variables, values in ((program.constvars, constants), (program.invars, inputs)):
            known.update(zip(variables, values, strict=True))

        def read(variable: Any) -> Value:
            if isinstance(variable, core.Literal):
                return np.asarray(variable.val, variable.aval.dtype)  # type: ignore[attr-defined]
            return known[variable]

        for equation in program.eqns:
            found = self._apply(equation, [read(variable) for variable in equation.invars])
            known.update(zip(equation.outvars, found, strict=True))
        return [read(variable) for variable in program.outvars]

    def _apply(self, equation: Any, values: Sequence[Value]) -> Sequence[Value]:
        name, params = equation.primitive.name, equation.params
        inner = next((params[key] for key in INNER if key in params), None)
        if inner is not None and name not in ("scan", "while"):
            whole = self.operators.get(params.get("name", "")) if _is_whole(equation) else None
            if whole is None or not any(isinstance(value, str) for value in values):
                return self.walk(inner, values)
            return [whole(self, params, values, equation)]
        if (folded := _fold(equation, values)) is not None:
            return folded
        if name not in self.operators:
            raise UserError(
                f"ONNX: there is no way to write JAX's `{name}` here; export to stablehlo"
            )
        found = self.operators[name](self, params, values, equation)
        return found if isinstance(found, list) else [found]


def _is_whole(equation: Any) -> bool:
    """Whether it calls a function that may be one operation here: see platform.whole."""
    float32 = equation.outvars[0].aval.dtype == np.float32
    return float32 and str(equation.params.get("name", "")).startswith(platform.WHOLE)


def _fold(equation: Any, values: Sequence[Value]) -> Sequence[Value] | None:
    """The outputs, where all inputs are known and none grows large."""
    if equation.primitive.name == "dim_as_value" or any(isinstance(x, str) for x in values):
        return None
    if any(variable.aval.dtype == np.int8 for variable in equation.invars):
        return None  # a kernel, which stays small
    shapes = [variable.aval.shape for variable in equation.outvars]
    if any(not isinstance(side, int) for shape in shapes for side in shape):
        return None
    given = sum(value.size for value in values if isinstance(value, np.ndarray))
    if sum(int(np.prod(shape)) for shape in shapes) > max(given, LARGEST_FOLDED):
        return None
    wide = any(
        "64" in str(variable.aval.dtype) for variable in (*equation.invars, *equation.outvars)
    )
    with jax.enable_x64(wide), jax.ensure_compile_time_eval():
        found = equation.primitive.bind(*values, **equation.params)
    several = equation.primitive.multiple_results
    return [np.asarray(x) for x in (found if several else [found])]
