"""Files of JSON lines, of which a kill or a full disk leaves whole lines and maybe half a one."""

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from vision_jax.errors import UserError, utf8
from vision_jax.files import open_regular

MAX_LINE = 4 * 2**20  # bytes
DECIMALS = 3  # of numbers
TIME_DECIMALS = 6  # of seconds


def to_json(value: Any) -> str:
    """JSON of which the same numbers are the same bytes; a Fraction is one of seconds.

    Examples:
      >>> to_json({"time": Fraction(1, 3), "score": 0.1 + 0.2, "box": [1.0, -0.0001]})
      '{"time": 0.333333, "score": 0.300, "box": [1.000, 0.000]}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)}: {to_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_json, value)) + "]"
    if isinstance(value, Fraction):
        return fixed(value, TIME_DECIMALS)
    if isinstance(value, float):
        return fixed(value, DECIMALS)
    return json.dumps(utf8(value) if isinstance(value, str) else value)


def fixed(value: float | Fraction, decimals: int) -> str:
    if isinstance(value, Fraction):
        whole = round(value * 10**decimals)  # exact
        units, rest = divmod(abs(whole), 10**decimals)
        return f"{'-' if whole < 0 else ''}{units}.{rest:0{decimals}d}"
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def whole_lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(its number, a whole line without its end, bytes up to its end); a last half one is left."""
    with open_regular(path) as file:
        done = 0
        for number in itertools.count(1):
            line = file.readline(MAX_LINE)
            if not line.endswith(b"\n"):
                if len(line) == MAX_LINE:
                    raise UserError(f"{path}: line {number} is longer than {MAX_LINE} bytes")
                return
            done += len(line)
            yield number, line[:-1], done


def lines_from(path: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    """(a whole line without its end, the offset after it), from such an offset on."""
    with open_regular(path) as file:
        file.seek(offset)
        while (line := file.readline(MAX_LINE)).endswith(b"\n"):
            offset += len(line)
            yield line[:-1], offset


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, on the disk when it returns; half a line before it is cut off."""
    with writing(path.parent), path.open("a+b", buffering=0) as file:
        start = max(file.seek(0, os.SEEK_END) - MAX_LINE, 0)
        file.seek(start)
        last = file.read()
        if last and not last.endswith(b"\n"):  # of a kill: cut it off
            file.truncate(start + last.rfind(b"\n") + 1)
        append(file, line.encode())
        os.fsync(file.fileno())


def append(file: BinaryIO, line: bytes) -> None:
    rest = memoryview(line + b"\n")
    while rest:  # of a full disk a part may fit; the rest then raises
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns what the system says about a failed write into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the device that holds {out}: what is written stays; free some"
                " and run the same command again to go on"
            ) from error
        raise UserError(f"cannot write in {out}: {error.strerror or error}") from error
