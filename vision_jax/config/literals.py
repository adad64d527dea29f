"""Values as people type them: Python's literals, and arithmetic on their numbers."""

import ast
import operator
import warnings
from collections.abc import Callable
from typing import Any

LONGEST = 100_000  # characters of a value
LARGEST = 2**63  # a whole number, on the way too
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def read_literal(text: str) -> Any:
    """The text, number, truth value, None, tuple or list (as a tuple) that `text` spells.

    Examples:
      >>> read_literal("(1/255, 2e-3, 'head/.*', True)")
      (0.00392156862745098, 0.002, 'head/.*', True)

    Raises:
      ValueError: it spells none, or takes numbers beyond 2**63.
    """
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    try:
        with warnings.catch_warnings(action="ignore"):  # of the backslashes in regexes
            return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ArithmeticError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _value(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=bool() | str() | float() | None as value):
            return value
        case ast.Constant(value=int() as value):
            return _bounded(value)
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(map(_value, parts))
        case ast.Name(id=name) if name.lower() in ("true", "false"):
            return name.lower() == "true"
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_number(operand)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            a, b = _number(left), _number(right)
            if isinstance(op, ast.Pow) and abs(b) > 64:
                raise ValueError("a power beyond 64")
            return _bounded(OPERATORS[type(op)](a, b))
    raise ValueError("no literal")


def _number(node: ast.AST) -> int | float:
    value = _value(node)
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is no number")
    return value


def _bounded(value: Any) -> int | float:
    if type(value) not in (int, float):  # a root of a negative number is complex
        raise ValueError(f"{value!r} is no number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"a number beyond {LARGEST}")
    return value
