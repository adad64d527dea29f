"""Numbers of channels on their way through a jaxpr; see groups.py for what they are for.

Trace follows them equation by equation, and keeps the pairs of numbers that an equation makes one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from jax.extend import core
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

FIXED = 0  # the number of what can't be taken away

_ELEMENTWISE = {
    *("abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type", "copy"),
    *("cos", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt"),
    *("integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul"),
    *("ne", "neg", "nextafter", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt"),
    *("select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
    *("add_any"),
}
_REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
    *("argmax", "argmin"),
}
_WINDOWS = {"reduce_window", "reduce_window_max", "reduce_window_sum"}


@dataclass(frozen=True)
class Value:
    """What is known of the entries of an array.

    Attributes:
      factors: arrays of numbers, of the array's rank, 1 long where they say nothing; no two have
        an axis in common.
      varies: further axes along which the values differ, of which nothing is known.
    """

    factors: tuple[np.ndarray, ...] = ()
    varies: frozenset[int] = frozenset()


class Trace:
    """Numbers that were given, and pairs of them that are one."""

    def __init__(self) -> None:
        self.count = FIXED + 1
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.mixed: list[np.ndarray] = []

    def fresh(self, count: int) -> np.ndarray:
        self.count += count
        return np.arange(self.count - count, self.count)

    def join(self, a: Any, b: Any) -> None:
        pair = np.broadcast_arrays(a, b)
        self.pairs.append((pair[0].ravel(), pair[1].ravel()))

    def fix(self, value: Value) -> None:
        for factor in value.factors:
            self.join(factor, FIXED)

    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """(class of each number, numbers over which something takes a mean)."""
        first, second = (
            np.concatenate([np.zeros(0, int), *(pair[side] for pair in self.pairs)])
            for side in (0, 1)
        )
        graph = coo_array((np.ones(len(first)), (first, second)), (self.count, self.count))
        mixed = np.unique(np.concatenate([np.zeros(0, int), *map(np.ravel, self.mixed)]))
        return connected_components(graph, directed=False)[1], mixed

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[Value], inputs: Sequence[Value]
    ) -> list[Value]:
        """The outputs of a jaxpr."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(atom: Any) -> Value:
            return constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            if any(value.factors for value in operands):
                outputs = self.apply(equation, operands)
            else:
                outputs = self.unlabelled(equation, operands)
            known |= zip(equation.outvars, outputs, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def unlabelled(self, equation: core.JaxprEqn, operands: list[Value]) -> list[Value]:
        """Of a constant that is spread over an axis all values along it are the same."""
        if equation.primitive.name in (*_ELEMENTWISE, *_MOVES, "reshape"):
            return self.apply(equation, operands)
        return [make_value((), long_axes(_shape(atom))) for atom in equation.outvars]

    def apply(self, equation: core.JaxprEqn, operands: list[Value]) -> list[Value]:
        """The outputs of one equation."""
        name, params = equation.primitive.name, equation.params
        shapes = [_shape(atom) for atom in equation.invars]
        out = _shape(equation.outvars[0])
        inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params), None)
        if name in ("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint") or (
            name.startswith("custom_") and inner is not None
        ):
            if isinstance(inner, core.ClosedJaxpr):
                return self.run(inner.jaxpr, [constant(c) for c in inner.consts], operands)
            assert inner is not None
            return self.run(inner, [], operands)
        if name == "optimization_barrier":
            return operands
        if name in _ELEMENTWISE:
            return [self.elementwise([v for v, s in zip(operands, shapes, strict=True) if s])]
        if name in _MOVES:
            return [self.move(operands[0], shapes[0], _MOVES[name](params, out))]
        if name == "split":
            ends = np.cumsum(params["sizes"])
            return [
                self.move(operands[0], shapes[0], _Slice(params["axis"], end - size, end))
                for end, size in zip(ends, params["sizes"], strict=True)
            ]
        if name == "concatenate":
            return [self.concatenate(operands, shapes, params["dimension"])]
        if name in _REDUCTIONS:
            return [self.reduce(operands[0], params["axes"], mixes=True)]
        if name == "dot_general":
            return [self.dot(operands, shapes, params["dimension_numbers"])]
        if name == "conv_general_dilated":
            return [self.convolve(operands, shapes, params)]
        if (kept := _passing(name, params, shapes)) is not None:
            return [self.pass_on(operands[0], kept, out)]
        if name in ("gather", "scatter", "scatter-add"):
            return [self.index(name, operands, shapes, params, out)]
        for value in operands:
            self.fix(value)
        return [make_value((), long_axes(_shape(atom))) for atom in equation.outvars]

    def elementwise(self, operands: Sequence[Value]) -> Value:
        """What is at the same place is one."""
        varies = frozenset[int]().union(*(value.varies for value in operands))
        factors: list[np.ndarray] = []
        for factor in (factor for value in operands for factor in value.factors):
            for other in [one for one in factors if _axes(one) & _axes(factor)]:
                factors = [one for one in factors if one is not other]
                factor = self._merge(factor, other)
            factors.append(factor)
        for factor in factors:
            self._hold(factor, varies & _axes(factor))
        return make_value(factors, varies)

    def _merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        for wide, narrow in ((a, b), (b, a)):
            # One scale for all heads, of a head's channels: whole heads go, and none of it.
            if _axes(narrow) < _axes(wide) and min(_axes(wide)) not in _axes(narrow):
                self._hold(wide, _axes(narrow))
                self.join(narrow, FIXED)
                return wide
        self.join(a, b)
        return np.broadcast_arrays(a, b)[0]

    def _hold(self, factor: np.ndarray, axes: frozenset[int]) -> None:
        """Nothing may go along these axes but whole: of the factor that has others, these stay."""
        if axes == _axes(factor) and axes:
            self.join(factor, FIXED)
        elif axes:
            self.join(factor, _first(factor, axes))

    def move(
        self, value: Value, shape: Sequence[int], function: Callable[[np.ndarray], np.ndarray]
    ) -> Value:
        """What only changes places."""

        def moved(factor: np.ndarray) -> np.ndarray:
            return _compress(function(np.broadcast_to(factor, shape)))

        factors = [moved(factor) for factor in value.factors]
        known = frozenset[int]().union(*map(_axes, factors))
        varies = frozenset[int]().union(
            *(
                _axes(moved(along(np.arange(shape[axis]), axis, len(shape))))
                for axis in value.varies
            )
        )
        whole = self.elementwise([make_value([factor], frozenset()) for factor in factors])
        return make_value(whole.factors, varies - known)

    def concatenate(
        self, operands: Sequence[Value], shapes: Sequence[Sequence[int]], axis: int
    ) -> Value:
        if not any(axis in _axes(factor) for value in operands for factor in value.factors):
            whole = self.elementwise([make_value(v.factors, v.varies - {axis}) for v in operands])
            return make_value(whole.factors, whole.varies | {axis})
        parts = []
        for value, shape in zip(operands, shapes, strict=True):
            part = np.full((1,) * len(shape), FIXED)
            for factor in value.factors:
                if _axes(factor) == {axis}:
                    part = factor
                else:
                    self.join(factor, FIXED)
            sides = [shape[axis] if side == axis else 1 for side in range(len(shape))]
            parts.append(np.broadcast_to(part, sides))
        varies = frozenset[int]().union(*(value.varies for value in operands))
        return make_value([np.concatenate(parts, axis)], varies)

    def reduce(self, value: Value, axes: Sequence[int], mixes: bool) -> Value:
        """Sums, and what contracts: over a part of the axes of a factor, what is summed is one."""
        gone, factors = frozenset(axes), []
        for factor in value.factors:
            inside = _axes(factor) & gone
            if inside == _axes(factor):
                self.mixed += [factor] if mixes else []
            else:
                self._hold(factor, inside)
                factors.append(np.squeeze(_first(factor, inside), tuple(gone)))
        left = [axis for axis in range(1 + max(value.varies, default=0)) if axis not in gone]
        varies = frozenset(left.index(axis) for axis in value.varies - gone)
        return make_value(factors, varies)

    def dot(self, operands: Sequence[Value], shapes: Any, numbers: Any) -> Value:
        """A product at each place of all axes, and the sum over the contracted ones."""
        contracted, batch = numbers
        free = [
            [axis for axis in range(len(shape)) if axis not in (*contracted[side], *batch[side])]
            for side, shape in enumerate(shapes)
        ]
        shared = len(batch[0]) + len(contracted[0])
        rank = shared + len(free[0]) + len(free[1])
        placed = []
        for side, value in enumerate(operands):
            start = shared + (len(free[0]) if side else 0)
            places = {axis: place for place, axis in enumerate((*batch[side], *contracted[side]))}
            places |= {axis: start + place for place, axis in enumerate(free[side])}
            placed.append(_place(value, places, rank))
        return self.reduce(self.elementwise(placed), range(len(batch[0]), shared), mixes=False)

    def convolve(self, operands: Sequence[Value], shapes: Any, params: Any) -> Value:
        """Its channels, as a product; the axes of space vary."""
        spec, groups = params["dimension_numbers"], params["feature_group_count"]
        (inputs,), (outputs, own) = (
            [self._channels(value, shape, axis) for axis in spec_axes]
            for value, shape, spec_axes in zip(
                operands, shapes, (spec.lhs_spec[1:2], spec.rhs_spec[:2]), strict=True
            )
        )
        if groups == 1 or len(own) > 1:
            # Each group has inputs of its own, numbered alike: one goes out of each.
            self.join(inputs.reshape(groups, -1), own)
            self.join(outputs.reshape(groups, -1), outputs.reshape(groups, -1)[:1])
        else:
            self.join(inputs[:, None], outputs.reshape(groups, -1))
        rank = len(shapes[0])
        varies = frozenset((spec.out_spec[0], *spec.out_spec[2:]))
        return make_value([along(outputs, spec.out_spec[1], rank)], varies)

    def _channels(self, value: Value, shape: Sequence[int], axis: int) -> np.ndarray:
        """i64[n]: the numbers along one axis, FIXED where there are none."""
        for factor in value.factors:
            if axis in _axes(factor) and len(_axes(factor)) > 1:
                self.join(factor, FIXED)
        own = next((factor for factor in value.factors if _axes(factor) == {axis}), None)
        return np.full(shape[axis], FIXED) if own is None else own.reshape(-1)

    def pass_on(self, value: Value, kept: frozenset[int], out: Sequence[int]) -> Value:
        """Through what leaves the axes `kept` as they are, and touches the others."""
        factors = [factor for factor in value.factors if _axes(factor) <= kept]
        for factor in value.factors:
            if not _axes(factor) <= kept:
                self.join(factor, FIXED)
        return make_value(factors, (value.varies & kept) | (long_axes(out) - kept))

    def index(
        self, name: str, operands: Sequence[Value], shapes: Any, params: Any, out: Sequence[int]
    ) -> Value:
        """Gather and scatter: axes that are whole in each slice go on."""
        numbers, shape = params["dimension_numbers"], shapes[0]
        if name == "scatter" and not (operands[2].factors or operands[2].varies):
            return make_value(
                operands[0].factors, long_axes(shape)
            )  # one constant, wherever it is put
        gathers = name == "gather"
        gone = (
            (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
            if gathers
            else (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        )
        windows = numbers.offset_dims if gathers else numbers.update_window_dims
        sliced = [axis for axis in range(len(shape)) if axis not in gone]
        sizes = params["slice_sizes"] if gathers else None
        places = {  # axis of the operand -> axis of the slices
            axis: place
            for axis, place in zip(sliced, windows, strict=True)
            if (sizes[axis] if sizes else shapes[2][place]) == shape[axis]
        }
        if gathers:
            passed = self.pass_on(operands[0], frozenset(places), shape)
            placed = _place(
                make_value(passed.factors, passed.varies & places.keys()), places, len(out)
            )
            return make_value(
                placed.factors, placed.varies | (long_axes(out) - set(places.values()))
            )
        back = {place: axis for axis, place in places.items()}
        updates = self.pass_on(operands[2], frozenset(back), shapes[2])
        updates = _place(
            make_value(updates.factors, updates.varies & back.keys()), back, len(shape)
        )
        whole = self.elementwise([self.pass_on(operands[0], frozenset(places), shape), updates])
        return make_value(whole.factors, whole.varies | (long_axes(shape) - places.keys()))


# What only moves entries: from an equation's parameters and output shape to what it does.
_MOVES: Mapping[str, Callable[[Any, Any], Callable[[np.ndarray], np.ndarray]]] = {
    "reshape": lambda params, out: lambda x: x.reshape(out),
    "squeeze": lambda params, out: lambda x: x.reshape(out),
    "expand_dims": lambda params, out: lambda x: x.reshape(out),
    "tile": lambda params, out: lambda x: np.tile(x, params["reps"]),
    "transpose": lambda params, out: lambda x: x.transpose(params["permutation"]),
    "rev": lambda params, out: lambda x: np.flip(x, params["dimensions"]),
    "broadcast_in_dim": lambda params, out: (
        lambda x: _broadcast(x, params["broadcast_dimensions"], out)
    ),
    "slice": lambda params, out: (
        lambda x: x[
            tuple(
                slice(*bounds)
                for bounds in zip(
                    params["start_indices"],
                    params["limit_indices"],
                    params["strides"] or (1,) * x.ndim,
                    strict=True,
                )
            )
        ]
    ),
}


@dataclass(frozen=True)
class _Slice:
    axis: int
    start: int
    stop: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


def _passing(name: str, params: Any, shapes: Any) -> frozenset[int] | None:
    """The axes that a primitive leaves as they are; None: it is not one of these."""
    every = frozenset(range(len(shapes[0])))
    if name in _WINDOWS:
        return frozenset(axis for axis in every if params["window_dimensions"][axis] == 1)
    if name == "pad":
        return frozenset(axis for axis in every if not any(params["padding_config"][axis]))
    if name in ("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"):
        return every - {params["axis"]}
    return None


def make_value(factors: Sequence[np.ndarray], varies: frozenset[int] | set[int]) -> Value:
    known = frozenset[int]().union(*map(_axes, factors))
    return Value(tuple(factors), frozenset(varies) - known)


def constant(array: Any) -> Value:
    array = np.asarray(array)
    return make_value((), _axes(_compress(array)))


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape  # type: ignore[no-any-return]


def _axes(factor: np.ndarray) -> frozenset[int]:
    return long_axes(factor.shape)


def long_axes(shape: Sequence[int]) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(shape) if size > 1)


def along(ids: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return ids.reshape((1,) * axis + (-1,) + (1,) * (rank - axis - 1))


def _compress(array: np.ndarray) -> np.ndarray:
    """1 long along the axes where all is the same."""

    def shorten(array: np.ndarray, axis: int) -> np.ndarray:
        first = array.take([0], axis) if array.shape[axis] else array
        return first if array.shape[axis] > 1 and (array == first).all() else array

    return reduce(shorten, range(array.ndim), array)


def _first(factor: np.ndarray, axes: frozenset[int]) -> np.ndarray:
    for axis in axes:
        factor = factor.take([0], axis)
    return factor


def _place(value: Value, places: Mapping[int, int], rank: int) -> Value:
    """With its axes at other places of an array of another rank."""

    def placed(factor: np.ndarray) -> np.ndarray:
        order = sorted(places, key=places.__getitem__)
        gone = [axis for axis in range(factor.ndim) if axis not in places]
        moved = factor.transpose(order + gone).reshape([factor.shape[axis] for axis in order])
        sides = dict(zip(sorted(places.values()), moved.shape, strict=True))
        return moved.reshape([sides.get(axis, 1) for axis in range(rank)])

    varies = frozenset(places[axis] for axis in value.varies)
    return make_value([placed(factor) for factor in value.factors], varies)


def _broadcast(x: np.ndarray, axes: Sequence[int], out: Sequence[int]) -> np.ndarray:
    sides = dict(zip(axes, x.shape, strict=True))
    return np.broadcast_to(x.reshape([sides.get(axis, 1) for axis in range(len(out))]), out)
