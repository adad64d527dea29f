"""Files that hold many images each: which ones a pattern means, and one image's bytes of one.

    FOLDER/train-{0000..0127}.tar     each of these must be there
    FOLDER/train-*.parquet            those that are there, in sorted order
    FOLDER/one.tar

A shard is read by random access and never unpacked. It is what it was when it was listed, or an
error: sizes and times of change are compared whenever it is opened.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vision_jax.data.folders import splits_among
from vision_jax.errors import UserError
from vision_jax.files import expand, open_regular

SUFFIXES = (".tar", ".parquet")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_SHARDS = 1_000_000  # a slip of the pen in braces must not make 10¹² names


@dataclass(frozen=True)
class Shard:
    """A file as it was when it was listed: its size in bytes and when it was changed.

    `name` is its path in the folder that all shards of the data set are in.
    """

    path: str
    name: str
    size: int
    changed_ns: int

    def open(self) -> BinaryIO:
        """The file, opened to read.

        Raises:
          UserError: it is gone, or has changed since.
        """
        file = open_regular(self.path)
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns) != (self.size, self.changed_ns):
            file.close()
            raise UserError(
                f"{self.path} has changed since this run listed what is in it: start the command "
                "again"
            )
        return file


def are_shards(spec: str) -> bool:
    """Whether a specification by its form names shards."""
    return _without_column(spec)[0].endswith((*SUFFIXES, *COMPRESSED))


def holds_shards(folder: Path) -> bool:
    """Whether shards lie in a folder itself."""
    return bool(_shards_in(folder))


def _shards_in(folder: Path) -> list[str]:
    names = (name for name in os.listdir(folder) if name.endswith(SUFFIXES) and name[0] != ".")
    return sorted(str(folder / name) for name in names)


def find_shards(spec: str) -> tuple[list[Shard], str]:
    """(the shards that a pattern or a folder names, in order; the column named behind them or "").

    Raises:
      UserError: none is there, one of braces is missing, several splits in one folder, compressed
        or mixed kinds.
    """
    pattern, column = _without_column(spec)
    if pattern.endswith(COMPRESSED):
        raise UserError(
            f"{spec}: compressed shards can't be read at random: unpack each to a .tar, for example"
            " with gunzip"
        )
    path = expand(pattern)
    if path.is_dir():
        names = _shards_in(path)
        _refuse_splits(spec, names)
    elif path.exists():
        names = [str(path)]
    else:
        names = []
        for name in expand_braces(str(path)):
            found = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
            if not found:
                raise UserError(f"{spec}: there is no {name}: check the folder and the numbers")
            names += found
        if set("*?[") & set(pattern):
            _refuse_splits(spec, names)
    if len({Path(name).suffix for name in names}) > 1:
        raise UserError(
            f"{spec}: .tar and .parquet together: name one kind, {names[0]} for example"
        )
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names])
    return [_list(name, folder) for name in dict.fromkeys(names)], column


def _without_column(spec: str) -> tuple[str, str]:
    """("a/*.parquet", "label") of a/*.parquet:label."""
    match = re.fullmatch(r"(.*\.parquet):([^/\\]+)", spec, re.DOTALL)
    return (match[1], match[2]) if match else (spec, "")


def _list(path: str, folder: str) -> Shard:
    with open_regular(path) as file:
        found = os.fstat(file.fileno())
    return Shard(path, os.path.relpath(path, folder), found.st_size, found.st_mtime_ns)


def _refuse_splits(spec: str, names: Sequence[str]) -> None:
    """What matches by chance must not mix training and test images."""
    kinds = {re.sub(r"\d.*", "", Path(name).stem): name for name in names}
    splits = splits_among(kinds)
    if len(splits) > 1:
        folder, suffix = os.path.dirname(kinds[splits[0]]), Path(kinds[splits[0]]).suffix
        one, other = (f"{folder}/{split}*{suffix}" for split in splits[:2])
        raise UserError(
            f"{spec}: shards of several splits: name one of them, {one} to train on and {other} to "
            "evaluate on"
        )


def expand_braces(pattern: str) -> Iterator[str]:
    """As a shell's braces: {a,b}, {00..12} with leading zeros kept, one after the other.

    Raises:
      UserError: more than `MAX_SHARDS` names.

    Examples:
      >>> list(expand_braces("{a,b}-{08..10}.tar"))
      ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
      >>> list(expand_braces("{1}{.tar"))
      ['{1}{.tar']
    """
    parts = re.split(r"(\{[^{}]*\})", pattern)
    choices = [_choices(part) for part in parts]
    count = 1
    for choice in choices:
        count *= len(choice)
        if count > MAX_SHARDS:
            raise UserError(f"{pattern}: names more than {MAX_SHARDS:,} shards: check its braces")
    return map("".join, itertools.product(*choices))


def _choices(part: str) -> Sequence[str]:
    numbers = re.fullmatch(r"\{(\d{1,18})\.\.(\d{1,18})\}", part)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if last - first >= MAX_SHARDS:
            raise UserError(f"{part}: names more than {MAX_SHARDS:,} shards: check its braces")
        width = max(map(len, numbers.groups())) * any(n[0] == "0" for n in numbers.groups())
        return [f"{i:0{width}}" for i in range(first, last + 1)] or [part]
    if part.startswith("{") and "," in part:
        return part[1:-1].split(",")
    return [part]
