"""NRRD: one volume in a file with its header, raw or gzipped; headers by pynrrd."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vision_jax.data.volumes.volume import Grid, Volume, check_size, orient, reading
from vision_jax.errors import UserError
from vision_jax.files import open_regular

SUFFIXES = (".nrrd",)
MAX_FILE_BYTES = 2**31
MAX_HEADER_BYTES = 2**16
_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **{"float": "f4", "double": "f8"},
}
# How the space's axes lie to ours: left, back, head.
_SPACES = {
    **dict.fromkeys(("left-posterior-superior", "lps"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (-1.0, -1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "las"), (1.0, -1.0, 1.0)),
}


class _Header(NamedTuple):
    shape: tuple[int, int, int]
    kind: np.dtype
    offset: int
    zipped: bool
    affine: np.ndarray  # f64[4, 4] from (i, j, k) to mm towards left, back and head
    oriented: bool
    grid: Grid
    note: str


def read_nrrd(path: Path) -> Volume:
    """A volume with its voxels. Raises UserError, of one line, as `read_nrrd_grid`."""
    with reading(path, "NRRD"):
        header = _open(path)
        size = int(np.prod(header.shape)) * header.kind.itemsize
        with open_regular(path, MAX_FILE_BYTES) as file:
            file.seek(header.offset)
            content = _unpack(path, file, size) if header.zipped else file.read(size)
        if len(content) != size:
            raise UserError(f"{path}: cut short: {len(content):,} of {size:,} bytes of voxels")
        raw = np.frombuffer(content, header.kind).reshape(header.shape, order="F")
        raw = raw.astype(header.kind.newbyteorder("="), copy=False)
        stored, _ = orient(str(path), raw, header.affine, header.oriented)
    return Volume(str(path), stored, header.grid, np.array(1.0), np.array(0.0), note=header.note)


def read_nrrd_grid(path: Path) -> tuple[Grid, str]:
    """(the grid, a note of what was assumed), of the header alone.

    Raises:
      UserError: no NRRD, voxels in another file or packed otherwise than by gzip, other than three
        axes, no plain numbers, too many voxels, or a space that is not the patient's.
    """
    with reading(path, "NRRD"):
        header = _open(path)
    return header.grid, header.note


def _open(path: Path) -> _Header:
    name = str(path)
    with open_regular(path, MAX_FILE_BYTES) as file:
        start = file.read(MAX_HEADER_BYTES)
    if not start.startswith(b"NRRD000"):
        raise UserError(f"{name}: not a NRRD file: it does not begin with NRRD000")
    ends = [at + len(end) for end in (b"\n\n", b"\r\n\r\n") if (at := start.find(end)) >= 0]
    if not ends:
        raise UserError(f"{name}: its header has no end within {MAX_HEADER_BYTES:,} bytes")
    offset = min(ends)
    fields = _import_nrrd().read_header(start[:offset].splitlines(keepends=True))
    for key in ("data file", "datafile", "line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(key):
            raise UserError(f"{name}: its voxels are elsewhere ({key}): save it as one .nrrd file")
    encoding, kind = str(fields.get("encoding", "")).lower(), str(fields.get("type", ""))
    if encoding not in ("raw", "gzip", "gz"):
        raise UserError(f"{name}: encoding {encoding!r}: save it raw or with gzip")
    if kind.lower() not in _TYPES:
        raise UserError(f"{name}: voxels of type {kind!r}, which is not read: give plain numbers")
    shape = tuple(int(side) for side in fields["sizes"])
    if len(shape) != 3 or fields.get("dimension") != 3:
        raise UserError(f"{name}: {len(shape)} axes {shape}: give one volume in a file")
    number = np.dtype(_TYPES[kind.lower()])
    check_size(name, shape, number.itemsize)
    endian = str(fields.get("endian", "little")).lower()
    if endian not in ("little", "big"):
        raise UserError(f"{name}: endian {fields['endian']!r}: give little or big")
    affine, oriented, measured = _place(name, fields)
    empty = np.broadcast_to(np.zeros((), np.uint8), shape)
    _, grid = orient(name, empty, affine, oriented)
    note = "" if oriented else f"{name}: states no orientation, taken as stored"
    grid = Grid(grid.shape, grid.affine, grid.oriented, measured)
    zipped = encoding != "raw"
    return _Header(
        shape,
        number.newbyteorder("<" if endian == "little" else ">"),
        offset,
        zipped,
        affine,
        oriented,
        grid,
        note,
    )


def _place(name: str, fields: Any) -> tuple[np.ndarray, bool, bool]:
    """(affine, whether the orientation is stated, and the spacing)."""
    affine = np.eye(4)
    directions = fields.get("space directions")
    if directions is None:
        spacings = np.asarray(fields.get("spacings", (np.nan,) * 3), float)
        if spacings.shape != (3,) or not np.isfinite(spacings).all():
            return affine, False, False
        return np.diag([*spacings, 1.0]), False, True
    space = str(fields.get("space", "")).lower()
    if space not in _SPACES:
        raise UserError(
            f"{name}: space {space!r} does not say where left, back and head are: give"
            f" {', '.join(key for key in _SPACES if '-' in key)}"
        )
    units = {str(unit).strip('"').lower() for unit in fields.get("space units", ())}
    if units - {"mm", "millimeter", "millimeters", ""}:
        raise UserError(f"{name}: space units {sorted(units)}: give mm")
    turn = np.diag(_SPACES[space])
    affine[:3, :3] = turn @ np.asarray(directions, float).T
    affine[:3, 3] = turn @ np.asarray(fields.get("space origin", (0.0,) * 3), float)
    return affine, True, True


def _unpack(path: Path, file: Any, size: int) -> bytes:
    """gzip's content, of which no more than `size` bytes are unpacked."""
    unpacker, parts, left = zlib.decompressobj(wbits=31), [], size
    while left and (packed := unpacker.unconsumed_tail or file.read(2**20)):
        part = unpacker.decompress(packed, left)
        parts.append(part)
        left -= len(part)
        if unpacker.eof:
            break
    return b"".join(parts)


def _import_nrrd() -> Any:
    try:
        import nrrd
    except ImportError as error:
        raise UserError("NRRD needs pynrrd: pip install 'vision_jax[medical]'") from error
    return nrrd
