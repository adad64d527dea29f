"""The most that a file or a config may ask for: every size out of a header or JSON is held to it.

A number costs nothing to write, and what is built by it may cost a machine's memory. Published
models stay far below each bound.
"""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from vision_jax.files import MAX_ARRAY_DIMENSIONS

BLOCKS = 512  # of a model, all its stages together
CHANNELS = 2**12  # of an image
SIDE = 2**14  # pixels of an image
WINDOW = 64  # cells along a window's side: its bias is indexed by all pairs of its cells
CELLS = 10_000  # that are indexed by all their pairs, where a whole grid has such a bias
SIZE = 2**22  # any other whole number: classes, widths, queries
LARGEST = 3.4e38  # number in float32

_BOUNDS = {"in_channels": CHANNELS, "image_size": SIDE, "windows": WINDOW}


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Checks a tensor's shape from a header.

    Raises:
      ValueError: sizes that are no sizes, or more axes than any model's tensor has.
    """
    if len(shape) > MAX_ARRAY_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} axes: {MAX_ARRAY_DIMENSIONS} at most")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{name} has the shape {shape}")


def check_argument(name: str, value: Any, kind: Any) -> None:
    """Checks an argument of a model, from wherever it came.

    Args:
      name: of the argument, which decides its bound.
      value: as read.
      kind: the annotation of the model's field; `Any` takes everything.

    Raises:
      ValueError: another type, not finite, negative or beyond the bound, with a reason that reads
        after "NAME VALUE".
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if kind is int:
        bound = BLOCKS if "depth" in name else _BOUNDS.get(name, SIZE)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("is no whole number")
        if not 0 <= value <= bound:
            raise ValueError(f"is not from 0 to {bound}")
    elif kind is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError("is no number")
        if not abs(value) < LARGEST:  # NaN is not, either
            raise ValueError("is not finite")
    elif origin is Literal:
        if value not in inner:
            raise ValueError(f"is none of {', '.join(map(str, inner))}")
    elif origin is tuple:
        whole = isinstance(value, tuple | list)
        if not whole or (inner[-1] is not ... and len(value) != len(inner)):
            raise ValueError("is no such list of numbers")
        if len(value) > BLOCKS:
            raise ValueError(f"has more than {BLOCKS} entries")
        for entry in value:
            check_argument(name, entry, inner[0])
        if name == "depths" and sum(value) > BLOCKS:
            raise ValueError(f"are more than {BLOCKS} blocks")
    elif origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return
        listed = isinstance(value, tuple | list)
        kinds = [one for one in inner if (get_origin(one) is tuple) == listed]
        check_argument(name, value, (kinds or inner)[0])
    elif not isinstance(value, kind):
        raise ValueError(f"is no {kind.__name__}")
