"""What image files are, read in threads: sizes, orientations, contents to compare, damage."""

import hashlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from vision_jax.data.decode import (
    DamagedImageError,
    Header,
    decode_array,
    decode_thumbnail,
    read_header,
)
from vision_jax.data.sources import FileReader, Reader

THREADS = 8
SIDE = 16  # of a thumbnail
# Two images are nearly the same if their thumbnails, standardized, differ by no more than this:
# re-encoding and resizing mostly stay below; of 1,000 × 4,000 pairs of clothes on black none does.
MOST_RMS, MOST_ANYWHERE = 0.1, 0.5
MOST_NEAR = 256  # images that one is compared with
MOST_NEAR_ONE = 4096  # inside of one set, where the first of many alike stands for all of them
DIMENSIONS = 12  # of the tree
LEAST_CONTRAST = 4.0  # grey levels; what is flatter is like every other flat image


@dataclass(frozen=True)
class Scan:
    """Of N images: `headers`, None where unreadable; `errors` by row says why.

    `digests` are of the files' bytes, None where not read; there `thumbnails` u8[N, 256] are 0.
    """

    headers: tuple[Header | None, ...]
    errors: dict[int, str]
    digests: tuple[bytes | None, ...]
    thumbnails: np.ndarray


def scan_images(
    reader: Reader,
    count: int,
    *,
    quick: bool = False,
    skip: Collection[int] = (),
    advance: Callable[[], object] = lambda: None,
) -> Scan:
    """Read images 0 to count - 1 but those in `skip`; `advance` is called after each.

    With `quick` only headers are read: no digests, no thumbnails, and damage behind the header
    stays unseen.
    """

    def look(row: int) -> tuple[Header | None, str, bytes | None, np.ndarray | None]:
        try:
            return (None, "", None, None) if row in skip else _look(reader, row, quick)
        except DamagedImageError as error:
            return None, str(error), None, None
        finally:
            advance()

    with ThreadPoolExecutor(THREADS) as pool:
        seen = list(pool.map(look, range(count)))
    thumbnails = np.zeros((count, SIDE * SIDE), np.uint8)
    for row, (*_, thumbnail) in enumerate(seen):
        if thumbnail is not None:
            thumbnails[row] = thumbnail.ravel()
    headers, errors, digests, _ = zip(*seen, strict=True) if seen else ((), (), (), ())
    return Scan(headers, {row: e for row, e in enumerate(errors) if e}, digests, thumbnails)


def _look(
    reader: Reader, row: int, quick: bool
) -> tuple[Header, str, bytes | None, np.ndarray | None]:
    name = reader.example_name(row)
    if quick and isinstance(reader, FileReader) and not name.endswith(".npy"):
        return read_header(Path(name)), "", None, None
    data = reader.encoded(row)
    if name.endswith(".npy"):
        image = decode_array(data, name=name)
        height, width = image.shape[:2]
        grey = Image.fromarray(image.mean(2).astype(np.uint8))
        thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
        return Header(height, width, 1), "", hashlib.sha256(data).digest(), thumbnail
    header = read_header(data, name=name)
    if quick:
        return header, "", None, None
    thumbnail = decode_thumbnail(data, name=name, side=SIDE)
    return header, "", hashlib.sha256(data).digest(), thumbnail


def same_files(one: Scan, other: Scan) -> list[tuple[int, int]]:
    """(row, row of the other) of files with the same bytes; each row of `one` once."""
    rows = {digest: row for row, digest in reversed(list(enumerate(other.digests))) if digest}
    return [(row, rows[digest]) for row, digest in enumerate(one.digests) if digest in rows]


def repeated_files(scan: Scan) -> list[tuple[int, int]]:
    """(row, earlier row) of files with the same bytes."""
    return [(row, first) for row, first in same_files(scan, scan) if row != first]


def similar_images(one: Scan, other: Scan) -> list[tuple[int, int]]:
    """(row, nearest row of the other) of images that differ no more than by re-encoding."""
    rows, values = _standardize(one)
    near = _Near(*_standardize(other))
    pairs = []
    for row, value in zip(rows, values, strict=True):
        # Of a still camera's pictures all are near each other: the nearest ones are enough.
        found = near(value, MOST_NEAR)
        if len(found):
            pairs.append((int(row), int(found[0])))
    return pairs


def near_duplicates(scan: Scan) -> dict[int, int]:
    """{row: an earlier row that is kept} of images that are nearly one of those that are kept.

    In the order of the rows each image that is not near a kept one is kept itself, so nothing is
    left out whose like is not there. Files with the same bytes are near, flat ones too.
    """
    kept_of = dict(repeated_files(scan))
    rows, values = _standardize(scan)
    first = np.array([row not in kept_of for row in rows.tolist()], bool)
    rows, values = rows[first], values[first]
    near = _Near(rows, values)
    for row, value in zip(rows.tolist(), values, strict=True):
        if row not in kept_of:
            for other in near(value, MOST_NEAR_ONE).tolist():
                if other > row:
                    kept_of.setdefault(other, row)
    return {row: kept_of.get(kept, kept) for row, kept in sorted(kept_of.items())}


class _Near:
    """Finds the images that are nearly a given one, in time that hardly grows with their number.

    Args:
      rows: i64[N].
      values: f32[N, 256], standardized thumbnails.
    """

    def __init__(self, rows: np.ndarray, values: np.ndarray):
        self._rows, self._values = rows, values
        if len(rows):
            # In a tree of few dimensions distances are no larger, so that no pair within reach is
            # missed.
            some = values[:: len(values) // 2000 + 1]
            self._axes = np.linalg.eigh(some.T @ some)[1][:, -DIMENSIONS:].T  # the main ones
            self._tree = cKDTree(values @ self._axes.T)

    def __call__(self, value: np.ndarray, most: int) -> np.ndarray:
        """Rows, the nearest first, among the `most` that are nearest in the tree."""
        count = len(self._rows)
        if not count:
            return self._rows
        reach = MOST_RMS * SIDE * (1 + 1e-6)
        point, most = self._axes @ value, min(most, count)
        _, near = self._tree.query(point, k=most, distance_upper_bound=reach)
        near = np.atleast_1d(near)
        near = near[near < count]
        difference = np.abs(self._values[near] - value)  # [near, 256]
        rms = np.sqrt((difference**2).mean(1))
        within = (rms <= MOST_RMS) & (difference.max(1, initial=0) <= MOST_ANYWHERE)
        return self._rows[near[within][rms[within].argsort(kind="stable")]]


def _standardize(scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """(rows, f32[rows, 256] of mean 0 and variance 1) of the thumbnails that have contrast."""
    values = scan.thumbnails.astype(np.float32)
    values -= values.mean(1, keepdims=True)
    deviation = values.std(1)
    rows = np.flatnonzero(deviation >= LEAST_CONTRAST)
    return rows, values[rows] / deviation[rows, None]
