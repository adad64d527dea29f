"""WebDataset shards: tar files of images with their labels and captions beside them.

Files whose names agree up to the first dot of their last part and which stand one after the other
are a sample: cat/0001.jpg, cat/0001.cls, cat/0001.json, cat/0001.txt. A shard's headers are read
once, and where each image lies is kept; images are then read by random access, as files of a folder
are. Nothing is ever unpacked, so names that lead elsewhere lead nowhere.

Source: the webdataset library 1.0.2, tariterators.py `base_plus_ext` and `group_by_keys`.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vision_jax.data.decode import (
    MAX_BYTES,
    DamagedImageError,
    Picture,
    decode_array,
    decode_picture,
)
from vision_jax.data.shards import Shard
from vision_jax.errors import UserError
from vision_jax.files import parse_json, read_json, write_whole

MAX_HEADER_BYTES = 2**20  # of the long names and attributes before a file
MAX_BESIDE_BYTES = 2**20  # of a label or caption
KEPT_FROM = 2_000  # files in a shard: fewer are listed again in less than a tenth of a second
MAX_INDEX_BYTES = 2**30
LABELS = ("label", "class", "class_name", "category")  # in a sample's .json
CAPTIONS = ("caption", "text")
VERSION = 1  # of the kept indices


@dataclass
class Index:
    """A shard's N samples that have an image, in their order.

    Attributes:
      names: of the images.
      offsets: where their bytes begin.
      sizes: how many there are.
      labels: as the .cls or .json says it, None where neither does.
      captions: the .txt, or the .json's, None likewise.
      without_image: how many samples have none.
      ended: whether the shard has tar's end mark, which one that is cut between two files lacks.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str | int | None] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    without_image: int = 0
    ended: bool = True


@dataclass(frozen=True)
class TarReader:
    """Images in tar files by row: `names` in `shards[shard[row]]`, offsets and sizes in bytes."""

    shards: tuple[Shard, ...]
    names: tuple[str, ...]
    shard: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def read(self, row: int) -> np.ndarray:
        return np.asarray(self.open(row))

    def open(self, row: int) -> Picture:
        name, data = self.example_name(row), self.encoded(row)
        decode = decode_array if name.endswith(".npy") else decode_picture
        return decode(data, name=name)

    def encoded(self, row: int) -> bytes:
        """The bytes of the image's file."""
        size, shard = int(self.sizes[row]), self.shards[self.shard[row]]
        if size > MAX_BYTES:
            raise DamagedImageError(
                f"{self.example_name(row)}: {size:,} bytes, over the limit of {MAX_BYTES:,}"
            )
        with shard.open() as file:
            file.seek(int(self.offsets[row]))
            return file.read(size)

    def example_name(self, row: int) -> str:
        return f"{self.shards[self.shard[row]].path}/{self.names[row]}"

    def relative_name(self, row: int) -> str:
        return f"{self.shards[self.shard[row]].name}/{self.names[row]}"

    def stamp(self, row: int) -> int:
        return int(self.sizes[row])


@dataclass(frozen=True)
class Listed:
    """What `list_tars` found, by row."""

    reader: TarReader
    labels: list[str | int | None]
    captions: list[str | None]
    note: str


def list_tars(shards: Sequence[Shard], image_suffixes: frozenset[str]) -> Listed:
    """The samples of all shards. Indices of large shards are kept in the user's cache folder.

    Raises:
      UserError: a shard that is damaged, cut short, holds links or devices, a sample with a file
        twice or several images, or without any image.
    """
    indices = [_index(shard, image_suffixes) for shard in shards]
    for shard, index in zip(shards, indices, strict=True):
        if not index.names:
            raise UserError(
                f"{shard.path}: no image in it: its images end in "
                f"{', '.join(sorted(image_suffixes))}; leave this shard out, or pack it again"
            )
    without = sum(index.without_image for index in indices)
    open_ended = [shard.path for shard, i in zip(shards, indices, strict=True) if not i.ended]
    notes = [f"{without:,} samples without an image ignored"] * bool(without)
    if open_ended:
        notes.append(
            f"{open_ended[0]}: no end mark: it may have been cut short ({len(open_ended)} of "
            f"{len(shards)} shards)"
        )
    counts = [len(index.names) for index in indices]
    reader = TarReader(
        tuple(shards),
        tuple(name for index in indices for name in index.names),
        np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        np.concatenate([np.array(index.offsets, np.int64) for index in indices]),
        np.concatenate([np.array(index.sizes, np.int64) for index in indices]),
    )
    labels = [label for index in indices for label in index.labels]
    captions = [caption for index in indices for caption in index.captions]
    return Listed(reader, labels, captions, "; ".join(notes))


# An index -----------------------------------------------------------------------------------------


def _index(shard: Shard, image_suffixes: frozenset[str]) -> Index:
    """The kept one where the shard is still the same, else a new one."""
    place = os.path.abspath(shard.path)
    about = {
        "version": VERSION,
        "shard": place,
        "size": shard.size,
        "changed_ns": shard.changed_ns,
        "suffixes": sorted(image_suffixes),
    }
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:32]
    path = Path(base) / "vision_jax" / "shards" / f"{name}.json"
    with suppress(UserError, KeyError, TypeError):  # none is kept, or not as we write it
        kept = read_json(path, MAX_INDEX_BYTES)
        if kept["about"] == about:
            return Index(**kept["index"])
    index, files = _read_index(shard, image_suffixes)
    if files >= KEPT_FROM:
        with suppress(OSError, UnicodeEncodeError):  # a folder that can't be written costs the time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(json.dumps({"about": about, "index": vars(index)}).encode(), path)
    return index


def _read_index(shard: Shard, image_suffixes: frozenset[str]) -> tuple[Index, int]:
    """(the index, how many files are in the shard) by one pass over its headers."""
    index, count, key = Index(), 0, None
    sample: dict[str, tuple[str, int, int]] = {}  # extension -> name, offset, size
    with shard.open() as file:
        for member in _members(shard, file):
            count += 1
            own_key, extension = _split(member.name)
            if not extension:
                continue
            if own_key != key:
                _add(index, shard, file, sample, image_suffixes)
                key, sample = own_key, {}
            if extension in sample:
                raise UserError(f"{shard.path}/{member.name}: is in it twice: pack the shard again")
            sample[extension] = (member.name, member.offset_data, member.size)
        index.ended = bool(file.read(1))
        _add(index, shard, file, sample, image_suffixes)
    return index, count


def _split(name: str) -> tuple[str, str]:
    """(the sample's key, the extension in lower case) of a file's name; "" where it has none.

    Examples:
      >>> _split("a.b/cat.01.JPG"), _split("a/notes"), _split("a/.hidden.jpg")
      (('a.b/cat', '01.jpg'), ('a/notes', ''), ('a/', ''))
    """
    folder, slash, name = name.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _add(
    index: Index,
    shard: Shard,
    file: BinaryIO,
    sample: dict[str, tuple[str, int, int]],
    image_suffixes: frozenset[str],
) -> None:
    """Adds a sample's image, label and caption to the index."""
    if not sample:
        return
    images = [extension for extension in sample if f".{extension}" in image_suffixes]
    if len(images) > 1:  # arrays beside an image are features of it, mostly
        images = [extension for extension in images if extension != "npy"]
    if not images:
        index.without_image += 1
        return
    name, offset, size = sample[images[0]]
    if len(images) > 1:
        raise UserError(
            f"{shard.path}/{name}: its sample has several images ({', '.join(images)}): pack one "
            "image a sample"
        )
    texts = {
        kind: _read_text(shard, file, *sample[kind])
        for kind in ("cls", "json", "txt")
        if kind in sample
    }
    record: Any = {}
    with suppress(UserError):  # what can't be read says nothing: whoever needs it asks for it
        record = parse_json(texts.get("json", "{}"), name)
    record = record if isinstance(record, dict) else {}
    label = texts["cls"] if "cls" in texts else _first(record, LABELS)
    caption = texts["txt"] if "txt" in texts else _first(record, CAPTIONS)
    index.names.append(name)
    index.offsets.append(offset)
    index.sizes.append(size)
    usable = isinstance(label, str | int) and not isinstance(label, bool)
    index.labels.append(label if usable else None)
    index.captions.append(caption if isinstance(caption, str) else None)


def _first(record: dict[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if name in record), None)


def _read_text(shard: Shard, file: BinaryIO, name: str, offset: int, size: int) -> str:
    if size > MAX_BESIDE_BYTES:
        raise UserError(f"{shard.path}/{name}: over the limit of {MAX_BESIDE_BYTES:,} bytes")
    file.seek(offset)
    return file.read(size).decode("utf-8-sig", "replace").strip()


class _Headers:
    """A file of which only little is read at once: headers, and long names in front of them."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _members(shard: Shard, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar.

    tarfile takes a damaged header in the middle for the end: what stands there must be tar's mark.
    """
    try:
        with tarfile.TarFile(fileobj=_Headers(file), errorlevel=0) as tar:  # type: ignore[arg-type]
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.isdir():
                    continue
                if not 0 <= member.size <= shard.size - member.offset_data:
                    raise tarfile.ReadError(f"{member.name} is cut")
                if not member.isreg() or member.issparse():
                    raise UserError(
                        f"{shard.path}/{member.name}: a link, device or sparse file: pack plain "
                        "files alone, with tar --dereference"
                    )
                yield member
            end = tar.offset
    except UserError:
        raise
    except Exception as error:  # tarfile raises many types on damaged headers
        raise _damaged(shard, " ".join(str(error).split())) from error
    file.seek(end)
    if (block := file.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        reason = "a header is cut" if len(block) < tarfile.BLOCKSIZE else "no header"
        raise _damaged(shard, f"{reason} at byte {end:,}")
    file.seek(end)


def _damaged(shard: Shard, reason: str) -> UserError:
    if not shard.size:
        return UserError(f"{shard.path}: an empty file: fetch the shard again, or leave it out")
    return UserError(
        f"{shard.path}: a damaged or truncated tar file ({reason}): fetch the shard again, or "
        "leave it out"
    )
