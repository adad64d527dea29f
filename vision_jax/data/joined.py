"""Two sources of the same classes as one: images of a user, and others beside them."""

from dataclasses import dataclass, replace

import numpy as np

from vision_jax.data.decode import Picture
from vision_jax.data.sources import Reader, Source


@dataclass(frozen=True)
class JoinedReader:
    """The rows of `first`, then those of `second`.

    Attributes:
      first: of rows 0 to `count` - 1.
      second: of rows from `count` on.
      count: larger than every row of `first`.
    """

    first: Reader
    second: Reader
    count: int

    def _of(self, row: int) -> tuple[Reader, int]:
        return (self.first, row) if row < self.count else (self.second, row - self.count)

    def open(self, row: int) -> Picture:
        reader, own = self._of(row)
        return reader.open(own)

    def read(self, row: int) -> np.ndarray:
        reader, own = self._of(row)
        return reader.read(own)

    def encoded(self, row: int) -> bytes:
        reader, own = self._of(row)
        return reader.encoded(own)

    def example_name(self, row: int) -> str:
        reader, own = self._of(row)
        return reader.example_name(own)

    def relative_name(self, row: int) -> str:
        reader, own = self._of(row)
        return reader.relative_name(own)

    def stamp(self, row: int) -> int:
        reader, own = self._of(row)
        return reader.stamp(own)


def join(first: Source, second: Source) -> Source:
    """The examples of both, the first ones first; both have the same class names."""
    if first.class_names != second.class_names:
        raise ValueError(f"{first.class_names} and {second.class_names} are not the same classes")
    count = int(first.rows.max()) + 1
    return replace(
        first,
        name=f"{first.name} and {second.name}",
        labels=np.concatenate([first.labels, second.labels]),
        rows=np.concatenate([first.rows, second.rows + count]),
        reader=JoinedReader(first.reader, second.reader, count),
        note="; ".join(note for note in (first.note, second.note) if note),
    )
