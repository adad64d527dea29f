"""Files from outside, which may be hostile: opened without waiting, read within bounds.

Everything that a user names and everything that lies in a folder goes through here. What can't be
read, or would take more time or memory than a sound file does, is a UserError of one line. The
bounds of all readers are the constants below. At the end: files of ours, written whole or not at
all.
"""

import codecs
import errno
import json
import math
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any, BinaryIO, cast

import numpy as np
import yaml
from numpy.lib import format as npy

from vision_jax.errors import UserError

MAX_JSON_BYTES = 16 * 2**20  # a config is a few kB, the index of a large model's shards a few MB
MAX_TEXT_BYTES = 10_000_000  # an XML file, a label file, a list of names
MAX_LIST_BYTES = 1_000_000_000  # a .csv or .jsonl of paths and labels
MAX_YAML_BYTES = 1_000_000  # its parser is slow
MAX_ARRAY_BYTES = 4 * 2**30  # one array of a data set's .npz; CIFAR-10's largest has 154 MB
MAX_COMPRESSION = 200  # of an array over 64 MiB
MAX_ARRAY_DIMENSIONS = 32  # NumPy 1 has no more, NumPy 2 has 64
MAX_DEPTH = 64  # of lists and objects in one another
MAX_INTEGER = 2**63  # what any array, index or size can hold
MAX_YAML_NODES = 100_000  # with everything that an alias repeats
MAX_YAML_NUMBER = 64  # characters

DRAFT = ".draft"  # after the name of a file or folder that is being written
LOCK = "lock"  # in a draft that is one process's own
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL)

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def expand(path: str | os.PathLike[str]) -> Path:
    """A path whose ~ or ~user is replaced, where there is such a home."""
    return Path(os.path.expanduser(path))


def user_cache(name: str) -> Path:
    """A folder for what can be made again, in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vision_jax" / name


def open_regular(path: str | os.PathLike[str], largest: int | None = None) -> BinaryIO:
    """Opens a regular file to read bytes; never waits, as opening a named pipe would.

    Raises:
      UserError: no such file, none that may be read, a folder, pipe, socket or device, or one of
        more than `largest` bytes.
    """
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
        found = os.fstat(descriptor)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:  # a null character, half a surrogate pair
        raise UserError(f"{path!r}: can't be the name of a file ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        kind = next((kind for test, kind in _KINDS if test(found.st_mode)), "something else")
        raise UserError(f"{path}: can't be read (it is {kind} and not a file)")
    if largest is not None and found.st_size > largest:
        os.close(descriptor)
        raise UserError(f"{path}: over the limit of {largest:,} bytes")
    return cast(BinaryIO, os.fdopen(descriptor, "rb"))


def read_bytes(path: str | os.PathLike[str], largest: int = MAX_TEXT_BYTES) -> bytes:
    """All bytes of a regular file.

    Raises:
      UserError: as `open_regular`, or more than `largest` bytes.
    """
    with open_regular(path, largest) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1)  # `largest` takes room for as many bytes first
            if len(data) > size:  # it grew, or the system says no size, as of those in /proc
                data += file.read(largest + 1 - len(data))
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror})") from error
    if len(data) > largest:  # it grew
        raise UserError(f"{path}: over the limit of {largest:,} bytes")
    return data


def read_text(path: str | os.PathLike[str], largest: int = MAX_TEXT_BYTES) -> str:
    """A regular file in UTF-8, or in UTF-16 with a byte-order mark.

    Raises:
      UserError: as `read_bytes`, or another encoding.
    """
    try:
        return decode_text(read_bytes(path, largest))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error})") from error


def decode_text(data: bytes) -> str:
    """UTF-8 with or without a byte-order mark, and UTF-16 with one, as Windows' editors write it.

    Raises:
      UnicodeDecodeError: anything else.
    """
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return data.decode("utf-16" if data.startswith(marks) else "utf-8-sig")


def read_json(path: str | os.PathLike[str], largest: int = MAX_JSON_BYTES) -> Any:
    """A regular file's JSON, checked as `parse_json` does.

    Raises:
      UserError: as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, largest), str(path))


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON of moderate depth, whole numbers below 2⁶³ and texts that can be written again.

    Of a key that is given twice the last value counts. `what` names the text in errors.

    Raises:
      UserError: anything else.
    """
    try:
        content = json.loads(text, parse_int=_integer)
        _check(content)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = _reason(error)
        raise UserError(f"{what}: not readable as JSON ({reason})") from error
    return content


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else MAX_INTEGER
    if not -MAX_INTEGER <= value < MAX_INTEGER:
        raise ValueError(f"the number {digits[:24]}{'…' * (len(digits) > 24)} is out of range")
    return value


def _check(content: Any) -> None:
    """Raises ValueError where JSON goes too deep, or holds half of a surrogate pair."""
    level = [content]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode()  # a UnicodeEncodeError is a ValueError
            elif isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
    if level:
        raise ValueError(f"lists and objects lie more than {MAX_DEPTH} deep in one another")


def read_yaml(path: str | os.PathLike[str], largest: int = MAX_YAML_BYTES) -> Any:
    """A regular file's YAML, by a loader that makes plain values only.

    Raises:
      UserError: as `read_bytes`; no YAML; aliases that repeat more than `MAX_YAML_NODES` values.
    """
    data = read_bytes(path, largest)
    try:
        return yaml.load(data, _Loader)
    except Exception as error:  # a tag on a value that it doesn't fit raises nearly every type
        raise UserError(f"{path}: not readable as YAML ({_reason(error)})") from error


class _Loader(yaml.SafeLoader):
    """Counts values as if each alias were written out, and refuses endless numbers.

    Ten lines of aliases of aliases are a billion values to whoever walks through them; a number in
    base 60 (1:30:00) takes time that grows with the square of its length.
    """

    def __init__(self, stream: bytes):
        super().__init__(stream)
        self._count = 0
        self._sizes: dict[int, int] = {}  # id of a node -> values in it

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        before = self._count
        node = super().compose_node(parent, index)
        if alias and id(node) not in self._sizes:
            raise yaml.YAMLError("an alias stands inside of what it repeats")
        self._count += self._sizes[id(node)] if alias else 1
        self._sizes.setdefault(id(node), self._count - before)
        if self._count > MAX_YAML_NODES:
            raise yaml.YAMLError(f"more than {MAX_YAML_NODES:,} values, repeated ones counted")
        text = isinstance(node, yaml.ScalarNode) and node.tag.endswith((":str", ":binary"))
        if isinstance(node, yaml.ScalarNode) and not text and len(node.value) > MAX_YAML_NUMBER:
            raise yaml.YAMLError(f"a number of more than {MAX_YAML_NUMBER} characters")
        return node


def read_arrays(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of a .npz file by name; sizes are checked by their headers before anything is read.

    Raises:
      UserError: as `open_regular`; damaged or no .npz file; an array that is missing, holds Python
        objects, has more than `MAX_ARRAY_DIMENSIONS` dimensions or `MAX_ARRAY_BYTES`.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return {name: _read_array(archive, name) for name in names}
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # zipfile, zlib, lzma and NumPy raise a dozen types on damage
            raise UserError(f"{path}: damaged or no .npz file ({_reason(error)})") from error


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    if f"{name}.npy" not in archive.namelist():
        held = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist()[:8])
        raise UserError(f"has no array `{name}`; it holds {held or 'nothing'}")
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise UserError(f"`{name}` holds Python objects, which could run code")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != entry.file_size - file.tell():
            raise ValueError(f"`{name}` has not the size that its header says")
        if len(shape) > MAX_ARRAY_DIMENSIONS or size > MAX_ARRAY_BYTES:
            raise UserError(
                f"`{name}` has {len(shape)} dimensions and {size:,} bytes, over the limits of"
                f" {MAX_ARRAY_DIMENSIONS} and {MAX_ARRAY_BYTES:,}"
            )
        if size > 2**26 and size > MAX_COMPRESSION * entry.compress_size:
            raise UserError(f"`{name}` grows more than {MAX_COMPRESSION} times when unpacked")
        array = np.empty(math.prod(shape), dtype)
        octets = array.view(np.uint8).data
        done = 0
        while count := file.readinto(octets[done : done + 2**20]):  # type: ignore[attr-defined]
            done += count
        if done < size or file.read(1):  # at the end of an entry zipfile compares its checksum
            raise ValueError(f"`{name}` is cut short")
    if dtype.kind == "U":
        for text in array.tolist():  # raises where its numbers are no characters
            text.encode()
    return array.reshape(shape, order="F" if fortran else "C")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def lock_file(file: int | IO[bytes], *, wait: bool = False) -> bool | None:
    """Locks a file that was opened to write until it is closed, or its process ends.

    Args:
      file: or its descriptor.
      wait: until nobody else holds it.

    Returns:
      Whether it is locked now: False if another process holds it. None where there are no locks:
      on Windows, and on some file systems.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def write_whole(content: bytes, path: Path) -> None:
    """Writes a file, whole or not at all. What a kill leaves, the next call writes over."""
    draft = path.with_name(path.name + DRAFT)
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, to be filled and moved there; what is left of it is removed.

    What a kill leaves, the next call for the same path removes.
    """
    folder = path.with_name(f".{path.name}{DRAFT}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def own_draft_folder(path: Path) -> Iterator[Path]:
    """As `draft_folder`, but one for each call: several processes may write to one place at once.

    What a kill leaves, the next call for the same path removes: nobody holds its lock any more.
    Where there are no locks it stays.
    """
    for left in path.parent.glob(f".{path.name}.*{DRAFT}"):
        with suppress(OSError), (left / LOCK).open("r+b") as file:
            if lock_file(file):
                shutil.rmtree(left)
    folder = Path(mkdtemp(DRAFT, f".{path.name}.", path.parent))
    try:
        with (folder / f"{LOCK}{DRAFT}").open("wb") as file:
            if lock_file(file):
                Path(file.name).rename(folder / LOCK)  # one that is there is held, or left over
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
