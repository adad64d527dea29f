"""What a value in an annotation file may be: texts, numbers, ids, sizes, corners."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from vision_jax.files import MAX_INTEGER

MAX_SIDE = 1_000_000  # pixels
MAX_COORDINATE = 1e9

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def short(value: Any) -> str:
    return reprlib.repr(value)


def is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a text that can be written again; JSON can hold halves of characters."""
    try:
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def are_numbers(values: Any, count: int) -> bool:
    """Whether it is a list of that many finite numbers; true and false are none."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and -MAX_COORDINATE <= v <= MAX_COORDINATE for v in values)
    )


def to_number(text: str | None) -> float | None:
    """None where it isn't a number; may be infinite or NaN."""
    try:
        return None if text is None or "_" in text else float(text)
    except ValueError:
        return None


def get_id(entry: dict, key: str) -> int | str | None:
    value = entry.get(key)
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # pandas writes whole numbers so
    if type(value) is int:
        return value if -MAX_INTEGER <= value < MAX_INTEGER else None
    return value if is_text(value) else None


def get_size(entry: dict) -> tuple[int, int] | None:
    """(height, width), 0 where not stated, None where it can't be meant."""
    height, width = entry.get("height"), entry.get("width")
    if type(height) is type(width) is int and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE:
        return height, width
    size = []
    for key in ("height", "width"):
        value = entry.get(key)
        if value is None:
            value = 0
        elif type(value) not in (int, float) or not 0 < value <= MAX_SIDE or value != int(value):
            return None
        size.append(int(value))
    return size[0], size[1]


def size_fault(entry: Mapping[str, Any]) -> str:
    stated = f"width {short(entry.get('width'))}, height {short(entry.get('height'))}"
    return f"{stated}: give whole numbers of pixels up to {MAX_SIDE:,}"


def from_corners(corners: Sequence[Any]) -> tuple[float, float, float, float]:
    left, top, right, bottom = corners
    return left, top, right - left, bottom - top
