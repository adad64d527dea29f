"""What image files are, read in threads: sizes, orientations, contents to compare, damage."""

import hashlib
import io
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
    read_image_file,
)
from vision_jax.data.sources import ArrayReader, FileReader, TfdsReader

Reader = ArrayReader | FileReader | TfdsReader
THREADS = 8
SIDE = 16  # of a thumbnail
# Two images are nearly the same if their thumbnails, standardized, differ by no more than this:
# re-encoding and resizing mostly stay below; of 1,000 × 4,000 pairs of clothes on black none does.
MOST_RMS, MOST_ANYWHERE = 0.1, 0.5
MOST_NEAR = 256  # images that one is compared with
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
    data = _read_encoded(reader, row)
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


def _read_encoded(reader: Reader, row: int) -> bytes:
    """An image's file as bytes; of an array, what a file of it would hold."""
    if isinstance(reader, TfdsReader):
        return reader.data_source[row]["image"]
    if isinstance(reader, ArrayReader):
        bitmap = io.BytesIO()
        Image.fromarray(reader.read(row)).save(bitmap, "bmp")
        return bitmap.getvalue()
    return read_image_file(reader.example_name(row))


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
    other_rows, other_values = _standardize(other)
    if not len(rows) or not len(other_rows):
        return []
    # In a tree of few dimensions distances are no larger, so that no pair within reach is missed.
    axes = np.linalg.svd(other_values[:: len(other_values) // 2000 + 1], full_matrices=False)[2][
        :12
    ]
    reach = MOST_RMS * SIDE * (1 + 1e-6)
    tree = cKDTree(other_values @ axes.T)
    pairs = []
    for i, value in enumerate(values @ axes.T):
        # Of a still camera's pictures all are near each other: the nearest ones are enough.
        near = tree.query(value, k=min(MOST_NEAR, len(other_rows)), distance_upper_bound=reach)[1]
        near = np.atleast_1d(near)
        near = near[near < len(other_rows)]
        if len(near):
            difference = np.abs(other_values[near] - values[i])  # [near, 256]
            rms = np.sqrt((difference**2).mean(1))
            rms[difference.max(1) > MOST_ANYWHERE] = np.inf
            best = int(rms.argmin())
            if rms[best] <= MOST_RMS:
                pairs.append((int(rows[i]), int(other_rows[near[best]])))
    return pairs


def _standardize(scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """(rows, f32[rows, 256] of mean 0 and variance 1) of the thumbnails that have contrast."""
    values = scan.thumbnails.astype(np.float32)
    values -= values.mean(1, keepdims=True)
    deviation = values.std(1)
    rows = np.flatnonzero(deviation >= LEAST_CONTRAST)
    return rows, values[rows] / deviation[rows, None]
