"""Parquet files with images in a column, as the datasets library and Hugging Face's hub have them.

The column is a struct of `bytes` and `path`, or binary. Rows are read by row groups, which hold a
hundred images or a thousand: those in use are kept, within a bound, and training shuffles so that
each is read once an epoch (`BlockOrder` of order.py).
"""

import itertools
import json
import os
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vision_jax.data.decode import DamagedImageError, Picture, decode_picture
from vision_jax.data.shards import Shard
from vision_jax.errors import UserError, nearest

KEPT_BYTES = 512 * 2**20  # of row groups in a process; two windows of the shuffle
MAX_GROUP_BYTES = 2**30  # of images, unpacked
MAX_METADATA_BYTES = 100_000_000
IMAGES = ("image", "img", "picture", "jpg", "png")  # a column of images is one of these, if several
LABELS = ("label", "class", "class_name", "category", "labels")
CAPTIONS = ("caption", "text", "txt")


@dataclass(frozen=True)
class ParquetReader:
    """Images of a column by row, over all files.

    Attributes:
      shards: the files.
      column: what to read, "image.bytes" or "image".
      groups: of each row group the file and its number in there.
      starts: of each row group the first row, over all files, and the number of rows at the end.
      sizes: i64[G], bytes of each row group's images in the file.
    """

    shards: tuple[Shard, ...]
    column: str
    groups: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    sizes: np.ndarray

    def read(self, row: int) -> np.ndarray:
        return np.asarray(self.open(row))

    def open(self, row: int) -> Picture:
        return decode_picture(self.encoded(row), name=self.example_name(row))

    def encoded(self, row: int) -> bytes:
        """The bytes of the image's file."""
        block = self._block(row)
        (shard, group), first, end = self.groups[block], *self.starts[block : block + 2]
        cells = _KEPT.take(self.shards[shard], group, self.column)
        if len(cells) != end - first:
            raise DamagedImageError(
                f"{self.example_name(row)}: its row group has not {end - first:,} rows, as is "
                "stated: fetch the file again"
            )
        cell = cells[row - first]
        if not cell.is_valid:
            raise DamagedImageError(
                f"{self.example_name(row)}: no image in `{self.column}`: store its bytes, not its "
                "path alone"
            )
        return cell.as_py()

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        """The row group of each row, over all files: an index into `sizes`."""
        return np.searchsorted(np.array(self.starts), rows, side="right") - 1

    def _block(self, row: int) -> int:
        return bisect_right(self.starts, row) - 1

    def example_name(self, row: int) -> str:
        shard, place = self._place(row)
        return f"{shard.path}[{place}]"

    def relative_name(self, row: int) -> str:
        shard, place = self._place(row)
        return f"{shard.name}[{place}]"

    def stamp(self, row: int) -> int:
        return int(self.sizes[self._block(row)])

    def _place(self, row: int) -> tuple[Shard, int]:
        """The file and the row in it."""
        number = self.groups[self._block(row)][0]
        return self.shards[number], row - self.starts[bisect_left(self.groups, (number, 0))]


class _Kept:
    """The row groups read last, of all readers of the process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[Shard, int, str], Any] = OrderedDict()
        self._bytes = 0

    def take(self, shard: Shard, group: int, column: str) -> Any:
        """An array of binary cells, or None where a cell is empty."""
        key = (shard, group, column)
        with self._lock:  # threads that need the same group wait for one of them to read it
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
            cells = _read_group(shard, group, column)
            self._groups[key] = cells
            self._bytes += cells.nbytes
            while self._bytes > KEPT_BYTES and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes
            return cells


_KEPT = _Kept()


def _read_group(shard: Shard, group: int, column: str) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    with _open(shard) as file:
        try:
            read = file.read_row_group(group, columns=[column], use_threads=False).column(0)
            if pa.types.is_struct(read.type):
                read = pc.struct_field(read, "bytes")
            return pa.concat_arrays(read.cast(pa.large_binary()).chunks)
        except (pa.ArrowException, OSError) as error:
            raise DamagedImageError(
                f"{shard.path}: row group {group} can't be read ({_reason(error)}): fetch the file "
                "again"
            ) from error


# A table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """What `read_table` found.

    Attributes:
      reader: of the images.
      texts: of each row the asked column, as texts or whole numbers; None where nothing is.
      names: the classes that whole numbers mean, where the file says them.
    """

    reader: ParquetReader
    texts: list[str | int | None]
    names: tuple[str, ...] | None


def read_table(
    spec: str, shards: Sequence[Shard], named: str, columns: Sequence[str] | None
) -> Table:
    """Images by row and a column beside them, of labels or captions; no image is read.

    Args:
      spec: for messages.
      shards: the files, whose columns must agree.
      named: the column that the user named, or "".
      columns: else the first of these that is there; None for no column.

    Raises:
      UserError: pyarrow is not installed; damaged files; no column of images, or several; no such
        column beside them.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(f"{spec}: run `pip install 'vision_jax[parquet]'` to read it") from error
    blocks: list[tuple[int, int, int, int]] = []
    texts: list[str | int | None] = []
    found: tuple[str, str, tuple[str, ...] | None] | None = None
    for number, shard in enumerate(shards):
        with _open(shard) as file:
            schema = file.schema_arrow
            image = _image_column(shard, schema)
            beside = "" if columns is None else _beside(shard, schema, named, columns)
            known = image, beside, _class_names(schema, beside)
            if found is not None and known != found:
                raise UserError(
                    f"{shard.path}: other columns or classes than {shards[0].path}: name files of "
                    "one data set"
                )
            found = known
            blocks += [(number, *group) for group in _groups(shard, file, image)]
            if beside:
                try:
                    texts += file.read(columns=[beside], use_threads=False).column(0).to_pylist()
                except (pa.ArrowException, OSError, ValueError) as error:  # texts that are no UTF-8
                    raise _damaged(shard, error) from error
                if len(texts) != sum(block[2] for block in blocks):
                    raise _damaged(shard, ValueError(f"`{beside}` has other rows than `{image}`"))
    counts = [block[2] for block in blocks]
    if found is None or not sum(counts):
        raise UserError(f"{spec}: no rows in it: name a file that has some")
    reader = ParquetReader(
        tuple(shards),
        found[0],
        tuple((block[0], block[1]) for block in blocks),
        tuple(itertools.accumulate(counts, initial=0)),
        np.array([block[3] for block in blocks], np.int64),
    )
    return Table(reader, texts, found[2])


@contextmanager
def _open(shard: Shard) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile, closed at the end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with shard.open() as opened:
        try:
            file = pq.ParquetFile(
                opened,
                thrift_string_size_limit=MAX_METADATA_BYTES,
                thrift_container_size_limit=MAX_METADATA_BYTES,
            )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(shard, error) from error
        try:
            yield file
        except UnicodeDecodeError as error:  # names of columns, which are decoded as they are asked
            raise _damaged(shard, error) from error


def _damaged(shard: Shard, error: Exception) -> UserError:
    what = f"a damaged or truncated Parquet file ({_reason(error)})" if shard.size else "empty"
    return UserError(f"{shard.path}: {what}: fetch it again, or leave it out")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _groups(shard: Shard, file: Any, image: str) -> list[tuple[int, int, int]]:
    """(number, rows, bytes of the images in the file) of each row group that has rows."""
    metadata = file.metadata
    leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    leaf = leaves.index(image)
    found = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunk = group.column(leaf)
        if chunk.total_uncompressed_size > MAX_GROUP_BYTES:
            raise UserError(
                f"{shard.path}: row group {number} holds {chunk.total_uncompressed_size:,} bytes of"
                f" images, over the limit of {MAX_GROUP_BYTES:,}: write it with row_group_size=100"
            )
        if group.num_rows:
            found.append((number, group.num_rows, chunk.total_compressed_size))
    return found


def _image_column(shard: Shard, schema: Any) -> str:
    """ "image" of a binary column, "image.bytes" of a struct."""
    import pyarrow as pa

    found: dict[str, str] = {}
    for column in schema:
        if pa.types.is_struct(column.type):
            inner = {part.name: part.type for part in column.type}
            if _is_binary(inner.get("bytes")):
                found[column.name] = f"{column.name}.bytes"
        elif _is_binary(column.type):
            found[column.name] = column.name
    named = [name for name in IMAGES if name in found] or list(found)
    columns = ", ".join(f"{column.name} ({column.type})" for column in schema)[:500]
    if not found:
        raise UserError(
            f"{shard.path}: no column of images, which are binary or a struct with `bytes`; its "
            f"columns: {columns}"
        )
    if len(named) > 1 and named[0] not in IMAGES:
        raise UserError(
            f"{shard.path}: several columns may be the images: rename one of "
            f"{', '.join(found)} to `image`"
        )
    return found[named[0]]


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _beside(shard: Shard, schema: Any, named: str, columns: Sequence[str]) -> str:
    """The name of the column of labels or captions, which holds texts or whole numbers."""
    import pyarrow as pa

    kinds = {column.name: column.type for column in schema}
    fits = {
        name
        for name, kind in kinds.items()
        if pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        or (pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type))
    }  # fmt: skip
    name = named or next((name for name in columns if name in kinds), "")
    if name in fits:
        return name
    others = f"those of texts or whole numbers: {', '.join(sorted(fits)) or 'none'}"
    if name in kinds:
        raise UserError(f"{shard.path}: `{name}` holds {kinds[name]}; {others}")
    if named:
        raise UserError(f"{shard.path}: no column `{name}`{nearest(name, list(kinds))}; {others}")
    raise UserError(
        f"{shard.path}: no column {columns[0]}: name it behind the file, as in "
        f"{os.path.basename(shard.path)}:{min(fits, default='COLUMN')}; {others}"
    )


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """Of a ClassLabel, as the datasets library writes it into the file's metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (TypeError, KeyError, ValueError, RecursionError):
        return None
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if good and len(set(names)) == len(names) else None
