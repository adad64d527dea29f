"""Checksums of files that a run reads again: one flipped bit is never silent.

A file's checksum is the SHA-256 of the sums of its pages: each 4 KiB page is summed as 512
little-endian 64-bit words, modulo 2^64, and what is left at the end goes in as it is. A flipped bit
changes its page's sum by a power of two, so it always shows, and so do pages that were lost, zeroed
or swapped. Plain SHA-256 would take as long as restoring the state does; the sums pass at the speed
of memory (`python -m benchmarks.checksums`).
"""

import errno
import hashlib
import json
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vision_jax import files
from vision_jax.config import write_json
from vision_jax.errors import UserError

CHECKSUMS_FILE = "checksums.json"
PAGE = 4096  # bytes that share a sum
PIECE = 2**24  # bytes of a file that a thread sums at once
MADV_POPULATE_READ = 22  # of Linux; Python has no name for it
THREADS = min(4, os.cpu_count() or 1)


class DamagedFileError(UserError):
    """A file that is not what was written."""


def checksum(path: Path, pool: ThreadPoolExecutor) -> str:
    """BYTES:SHA-256 of a file, see above.

    The file must not shrink meanwhile.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
      ...     _ = (Path(folder) / "file").write_bytes(b"abc")
      ...     checksum(Path(folder) / "file", pool)[:12]
      '3:ba7816bf8f'
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        whole = size - size % PAGE
        pieces = ((file.fileno(), at, min(PIECE, whole - at)) for at in range(0, whole, PIECE))
        for sums in pool.map(_sum_pages, pieces):
            digest.update(sums.tobytes())
        file.seek(whole)
        digest.update(file.read())
    return f"{size}:{digest.hexdigest()}"


def _sum_pages(piece: tuple[int, int, int]) -> np.ndarray:
    """Of (file descriptor, offset, bytes): the sum of each page, u64[bytes / PAGE]."""
    descriptor, offset, size = piece
    with mmap.mmap(descriptor, size, offset=offset, access=mmap.ACCESS_READ) as view:
        _read_ahead(view)
        words = np.frombuffer(view, "<u8").reshape(-1, PAGE // 8)
        sums = np.add.reduce(words, axis=1)
        del words  # the view cannot be closed while it is looked at
    return sums


def _read_ahead(view: mmap.mmap) -> None:
    """Has the kernel read the file here, where a failing disk is an error and no fatal signal."""
    if sys.platform == "linux":
        try:
            view.madvise(MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # before Linux 5.14
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from error


def write_checksums(
    folder: Path, names: Iterable[str] | None = None, *, kept: Mapping[str, str] | None = None
) -> None:
    """Writes FOLDER/checksums.json: of `names`, which are relative to it, or of all files in it.

    Of names without a file nothing is written. `kept` are checksums that are known already.
    """
    names = _files(folder) if names is None else names
    with ThreadPoolExecutor(THREADS) as pool:
        found = {name: checksum(folder / name, pool) for name in names if (folder / name).is_file()}
    save_checksums({**(kept or {}), **found}, folder)


def save_checksums(found: Mapping[str, str], folder: Path) -> None:
    """Writes FOLDER/checksums.json, with a checksum of its own."""
    write_json({**found, CHECKSUMS_FILE: _seal(found)}, folder / CHECKSUMS_FILE)


def _seal(found: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def verify_checksums(folder: Path, *, only: str = "", part: int = 0, parts: int = 1) -> bool:
    """Compares the files of a folder with its checksums.json.

    Args:
      folder: of the files.
      only: what names begin with, of the files that are looked at.
      part, parts: of several processes each takes a part of the files.

    Returns:
      Whether there are checksums: a folder of an older version has none.

    Raises:
      DamagedFileError: a file is missing or not what was written; it is named.
    """
    for name in changed_files(folder, only=only, part=part, parts=parts):
        there = (folder / name).is_file()
        reason = "is not what was written: its checksum differs" if there else "is missing"
        raise DamagedFileError(f"{folder / name} {reason}")
    return (folder / CHECKSUMS_FILE).is_file()


def changed_files(folder: Path, *, only: str = "", part: int = 0, parts: int = 1) -> Iterator[str]:
    """Names of files that are missing or not as the folder's checksums.json says.

    Raises:
      DamagedFileError: checksums.json itself is damaged.
    """
    expected = read_checksums(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        for number, (name, value) in enumerate(sorted(expected.items())):
            if number % parts != part or not name.startswith(only):
                continue
            path = folder / name
            try:
                whole = path.is_file() and checksum(path, pool) == value
            except OSError:  # the disk fails
                whole = False
            if not whole:
                yield name


def read_checksums(folder: Path) -> dict[str, str]:
    """What checksums.json says, by name; nothing where there is none.

    Raises:
      DamagedFileError: it is damaged.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return {}
    try:
        found = files.read_json(path)
    except UserError as error:
        raise DamagedFileError(str(error)) from error
    if not isinstance(found, dict) or found.pop(CHECKSUMS_FILE, "") != _seal(found):
        raise DamagedFileError(f"{path} is damaged: its own checksum differs")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in found):
        raise DamagedFileError(f"{path} is damaged: it names files outside of its folder")
    return found


def _files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path != folder / CHECKSUMS_FILE
    )
