"""What a compiled program costs, read from its optimized HLO: no run, no clock.

XLA's own `cost_analysis` counts the body of a loop once; a scan over layers, micro-batches or
attack steps then looks almost free. Here each body counts as often as XLA says that it runs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5}  # other types have their bits in their name

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]")


@dataclass(frozen=True)
class Cost:
    """Attributes:
    flops: of the matrix products and convolutions, on one device; a multiplication and an addition
      are two. Positions of a convolution that only see padding don't count.
    collectives: {name: (how many, bytes that one device receives in all)}. In a loop whose turns
      depend on data, such as a matching's, they count once.
    """

    flops: float
    collectives: dict[str, tuple[int, float]] = field(default_factory=dict)


def count(compiled: Any) -> Cost:
    """The cost of one call of a compiled function (jax.stages.Compiled).

    Raises:
      ValueError: a loop over products whose number of turns depends on data.
    """
    return count_text(compiled.as_text())


def count_text(text: str) -> Cost:
    """The same, from the text of an optimized HLO module."""
    computations, entry = _computations(text)

    @cache
    def total(name: str) -> tuple[float, dict[str, int], dict[str, float]]:
        flops, number, size = 0.0, defaultdict[str, int](int), defaultdict[str, float](float)
        shapes: dict[str, str] = {}
        for instruction, shape, op, rest in computations[name]:
            shapes[instruction] = shape
            if op == "dot":
                flops += _dot_flops(shape, rest, shapes)
            elif op == "convolution":
                flops += _convolution_flops(shape, rest, shapes)
            kind = op.removesuffix("-start")
            if kind in COLLECTIVES:
                number[kind] += 1
                size[kind] += _bytes(shape if kind == op else shape.rpartition(", ")[2])
                continue  # what an all-reduce applies is no product
            turns = _turns(op, rest)
            for called in _called(rest):
                inner = total(called)
                if turns is None and inner[0]:
                    raise ValueError(f"{instruction}: nobody knows how often this loop turns")
                flops += (turns or 0) * inner[0]
                for collective, times in inner[1].items():
                    number[collective] += (turns or 1) * times
                    size[collective] += (turns or 1) * inner[2][collective]
        return flops, number, size

    flops, number, size = total(entry)
    return Cost(flops, {name: (number[name], size[name]) for name in sorted(number)})


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """{name: [(instruction, shape, opcode, the rest of its line)]}, and the entry's name."""
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
            computations[name] = []
        elif name and (found := _INSTRUCTION.match(line)):
            computations[name].append((found[1], found[2], found[3], found[4]))
    return computations, entry


def _called(rest: str) -> Iterator[str]:
    """Names of the computations that an instruction runs; of a conditional, all branches."""
    for one, several in _CALLED.findall(rest):
        yield from [one] if one else re.findall(r"[\w.\-]+", several)


def _turns(op: str, rest: str) -> int | None:
    """How often an instruction runs what it calls; None of a loop that depends on data."""
    if op != "while":
        return 1
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
    return int(known[1]) if known else None


def _sides(shape: str) -> list[int]:
    found = _SHAPE.search(shape)
    return [int(side) for side in found[2].split(",") if side] if found else []


def _bytes(shape: str) -> float:
    """Of an array, or of all arrays of a tuple."""
    total = 0.0
    for kind, sides in _SHAPE.findall(shape):
        bits = re.search(r"\d+", kind)
        each = BYTES.get(kind, int(bits[0]) / 8 if bits else 0)
        total += each * math.prod(int(side) for side in sides.split(",") if side)
    return total


def _operands(rest: str, shapes: dict[str, str]) -> list[list[int]]:
    """Sides of the first two operands."""
    names = re.findall(r"%([\w.\-]+)", rest)[:2]
    return [_sides(shapes[name]) for name in names]


def _dot_flops(shape: str, rest: str, shapes: dict[str, str]) -> float:
    left = _operands(rest, shapes)[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2.0 * math.prod(_sides(shape)) * math.prod(left[axis] for axis in axes)


def _convolution_flops(shape: str, rest: str, shapes: dict[str, str]) -> float:
    left, right = _operands(rest, shapes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels is not None, rest
    out = _sides(shape)
    window = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def per_axis(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * (len(out) - 2)

    pairs = 1
    for axis, stride, pad, spread, dilation in zip(
        range(len(out) - 2),
        per_axis("stride", "1"),
        per_axis("pad", "0_0"),
        per_axis("lhs_dilate", "1"),
        per_axis("rhs_dilate", "1"),
        strict=True,
    ):
        size = left[labels[1].index(str(axis))]
        low = int(pad.split("_")[0])
        pairs *= sum(
            place % int(spread) == 0 and 0 <= place < (size - 1) * int(spread) + 1
            for position in range(out[labels[3].index(str(axis))])
            for tap in range(right[labels[2].index(str(axis))])
            for place in [position * int(stride) + tap * int(dilation) - low]
        )
    # The kernel's input features are already those of one group.
    features = right[labels[2].index("i")]
    return 2.0 * pairs * features * out[labels[3].index("b")] * out[labels[3].index("f")]
