"""What a run's training data was when it began, to be compared when it goes on.

Of each example the name, the size of its file in bytes and a checksum of its annotations: whatever
is added, removed or relabelled shows, and so does an edited file whose size has changed. For an
image in a Parquet file the size is that of its row group. Files are not read: 100,000 of them take
a second.
"""

import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data.captions import CaptionedSource
from vision_jax.data.detection import DetectionSource
from vision_jax.data.segmentation import SegmentationSource
from vision_jax.data.sources import ArrayReader, FileReader, Source
from vision_jax.errors import UserError
from vision_jax.files import write_whole

MAX_BYTES = 2**30  # of a fingerprint; ten million images have as many

Fingerprint = dict[str, list[Any]]  # "name", "size" and "annotations", each with an entry a row


def take_fingerprint(source: Source | DetectionSource | SegmentationSource) -> Fingerprint:
    """Of the source's examples, in their order."""
    reader, rows = source.reader, source.rows.tolist()
    names, sizes = [reader.relative_name(row) for row in rows], [reader.stamp(row) for row in rows]
    if isinstance(source, CaptionedSource):
        tokens = np.zeros((len(source.captions), 0)) if source.tokens is None else source.tokens
        annotations = [
            zlib.crc32(source.captions[row].encode(), zlib.crc32(tokens[row].tobytes()))
            for row in rows
        ]
    elif isinstance(source, SegmentationSource):
        annotations = [source.masks.stamp(row) for row in rows]
        of_things = getattr(source.segment_data and source.segment_data.reader, "stamp", None)
        if of_things is not None:  # in files of their own, which the masks' stamps don't show
            annotations = [
                zlib.crc32(b"%d %d" % (of_things(row), one))
                for row, one in zip(rows, annotations, strict=True)
            ]
    elif isinstance(source, Source):
        annotations = source.labels.tolist()
    else:
        parts = (source.boxes_xyxy_px, source.label, source.crowd, source.sizes)
        annotations = [_checksum(one) for one in zip(*parts, strict=True)]
    return {"name": names, "size": sizes, "annotations": annotations}


def _checksum(arrays: tuple[np.ndarray, ...]) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(array.tobytes(), value)
    return value


def digest(fingerprint: Fingerprint) -> str:
    """sha256 of a fingerprint, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()


def describe_changes(before: Fingerprint, now: Fingerprint) -> str:
    """What differs, with the first name of each kind, or "".

    Examples:
      >>> before = {"name": ["a", "b"], "size": [1, 2], "annotations": [0, 0]}
      >>> describe_changes(before, {"name": ["b", "c"], "size": [3, 2], "annotations": [0, 0]})
      "1 added ('c'), 1 removed ('a'), 1 edited ('b')"
    """
    if before == now:
        return ""
    old, new = _by_name(before), _by_name(now)
    kinds = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "edited": [name for name in new if name in old and old[name][0] != new[name][0]],
        "annotated otherwise": [
            name for name in new if name in old and old[name][1] != new[name][1]
        ],
    }
    found = [f"{len(names):,} {kind} ({names[0]!r})" for kind, names in kinds.items() if names]
    return ", ".join(found) or "the same examples in another order, or some of them more often"


def _by_name(fingerprint: Fingerprint) -> dict[str, tuple[Any, Any]]:
    columns = (fingerprint[name] for name in ("name", "size", "annotations"))
    return {name: (size, annotations) for name, size, annotations in zip(*columns, strict=True)}


def write_fingerprint(fingerprint: Fingerprint, path: Path) -> None:
    """Writes it, whole or not at all."""
    write_whole(gzip.compress(json.dumps(fingerprint).encode(), 1, mtime=0), path)


def read_fingerprint(path: Path) -> Fingerprint | None:
    """Reads what `write_fingerprint` wrote; None where there is no file.

    Raises:
      UserError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with gzip.open(path) as file:
            found = json.loads(file.read(MAX_BYTES))
        _by_name(found)
    except Exception as error:  # gzip, zlib, JSON and what is no table raise many types
        raise UserError(f"{path} is damaged: {error}") from error
    return found


def hash_of_images(source: Source) -> str:
    """sha256 of what tells a source's images from all others, 64 hexadecimal digits.

    Of image files that is where each one lies, its size and when it was changed; of files of many
    images the same, and the image's place in there. What is in memory or anywhere else is read.
    """
    reader = source.reader
    found = hashlib.sha256(f"{source.name}\n{getattr(reader, 'column', '')}\n".encode())
    for shard in getattr(reader, "shards", ()):
        found.update(f"{_state(shard.path)}\n".encode())
    folder = reader.folder.resolve() if isinstance(reader, FileReader) else None
    for row, label in zip(source.rows.tolist(), source.labels.tolist(), strict=True):
        if folder is not None:
            what = _state(folder / reader.relative_name(row))
        elif hasattr(reader, "shards"):
            what = f"{row} {reader.example_name(row)}"
        elif isinstance(reader, ArrayReader):
            what = hashlib.sha256(reader.images[row].tobytes()).hexdigest()
        else:
            what = hashlib.sha256(reader.encoded(row)).hexdigest()
        found.update(f"{label} {what}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def _state(path: str | Path) -> str:
    """Where a file lies, and what changes with it, ctime too: copies and archives set mtime."""
    whole = os.path.abspath(path)
    try:
        state = os.stat(whole)
    except OSError:  # it is skipped, counted and named when its turn comes
        return f"{whole!r} gone"
    return f"{whole!r} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
