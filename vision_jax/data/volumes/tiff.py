"""TIFF of 8 to 64 bits and any number of channels, single or a stack of slices, by tifffile."""

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data.volumes.volume import MAX_VOLUME_BYTES, Grid, Volume, check_size, reading
from vision_jax.errors import UserError
from vision_jax.files import open_regular

SUFFIXES = (".tif", ".tiff")
MAX_FILE_BYTES = 2**31
MAX_PAGES = 65_536
MAX_CHANNELS = 4096
_GROWTH = 1032  # of deflate, at most
_DEFLATE = (8, 32946)
_PLAIN = ("MINISWHITE", "MINISBLACK", "RGB", "SEPARATED", "CFA", "LINEAR_RAW")
_SLICES, _CHANNELS = "ZIQ", "CS"


def read_tiff(path: Path) -> Volume:
    """[z, H, W] or [z, H, W, C] as the file counts; one slice where there is no stack.

    Axes are those that OME and ImageJ files state; unnamed pages are slices. WhiteIsZero is kept as
    stored and marked.

    Raises:
      UserError: as `read_tiff_grid`, or data that can't be read exactly.
    """
    tifffile = _import_tifffile()
    open_regular(path, MAX_FILE_BYTES).close()
    with _reading(path), tifffile.TiffFile(path) as tiff:
        series, grid = _open(path, tiff)
        _check_deflated(path, series)
        stored = np.asarray(series.asarray())
        axes, inverted = series.axes, series.keyframe.photometric.name == "MINISWHITE"
    if stored.shape != series.shape:
        raise UserError(f"{path}: its pixels are not of its header's size")
    return Volume(
        str(path),
        _arrange(stored, axes),
        grid,
        np.array(1.0),
        np.array(0.0),
        inverted,
        note=_NOTE.format(path),
    )


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Writes labels u8[z, y, x] as a stack of pages, a slice each."""
    _import_tifffile().imwrite(path, labels, photometric="minisblack", compression="deflate")


_NOTE = "{}: a TIFF states no place in mm that is read here: a pixel is taken as 1 mm"


def read_tiff_grid(path: Path) -> tuple[Grid, str]:
    """(the grid of unknown place, a note), of the headers alone.

    Raises:
      UserError: no TIFF, several images of different sizes, time, palettes and other codings of
        color than RGB, complex numbers, or too many pixels.
    """
    tifffile = _import_tifffile()
    open_regular(path, MAX_FILE_BYTES).close()
    with _reading(path), tifffile.TiffFile(path) as tiff:
        return _open(path, tiff)[1], _NOTE.format(path)


def _open(path: Path, tiff: Any) -> tuple[Any, Grid]:
    if len(tiff.pages) > MAX_PAGES:
        raise UserError(f"{path}: {len(tiff.pages):,} pages: {MAX_PAGES:,} at most")
    series = tiff.series[0]
    page, axes, shape = series.keyframe, series.axes, tuple(int(s) for s in series.shape)
    kind = np.dtype(series.dtype)
    photometric = getattr(page.photometric, "name", str(page.photometric))
    if any(not other.keyframe.is_reduced for other in tiff.series[1:]):  # but for thumbnails
        raise UserError(f"{path}: {len(tiff.series)} separate images in one file: split it")
    if kind.kind not in "biuf" or photometric not in _PLAIN:
        raise UserError(f"{path}: {photometric} of {kind}: save it as plain numbers or RGB")
    sizes = dict(zip(axes, shape, strict=True))
    known = {*"YX", *_SLICES, *_CHANNELS}
    other = [axis for axis in axes if axis not in known and sizes[axis] > 1]
    slices = [axis for axis in axes if axis in _SLICES and sizes[axis] > 1]
    channels = [axis for axis in axes if axis in _CHANNELS and sizes[axis] > 1]
    if other or len(slices) > 1 or len(channels) > 1 or not {"Y", "X"} <= set(axes):
        raise UserError(f"{path}: axes {axes} of {shape}: give slices, channels, rows and columns")
    depth = sizes[slices[0]] if slices else 1
    count = sizes[channels[0]] if channels else 1
    if count > MAX_CHANNELS:
        raise UserError(f"{path}: {count:,} channels: {MAX_CHANNELS:,} at most")
    check_size(str(path), (depth, sizes["Y"], sizes["X"]), kind.itemsize, count)
    return series, Grid((depth, sizes["Y"], sizes["X"]), np.eye(4), False, False)


def _arrange(stored: np.ndarray, axes: str) -> np.ndarray:
    """[z, y, x] or, of several channels, [z, y, x, C]."""
    order = sorted(range(len(axes)), key=lambda i: _rank(axes[i]))
    turned = stored.transpose(order)
    ranks = [_rank(axes[i]) for i in order]
    shape = [1, 1, 1, 1]
    for rank, side in zip(ranks, turned.shape, strict=True):
        shape[rank] *= side
    turned = turned.reshape(shape)
    return turned[..., 0] if shape[3] == 1 else turned


def _rank(axis: str) -> int:
    return {"Y": 1, "X": 2, "C": 3, "S": 3}.get(axis, 0)


def _check_deflated(path: Path, series: Any) -> None:
    """Segments that could grow past the bound are unpacked up to it, and no further."""
    if int(series.keyframe.compression) not in _DEFLATE:
        return
    largest = series.nbytes
    with open_regular(path) as file:
        for page in filter(None, series.pages):
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                if count * _GROWTH <= MAX_VOLUME_BYTES:
                    continue
                file.seek(offset)
                if len(zlib.decompressobj().decompress(file.read(count), largest + 1)) > largest:
                    raise UserError(f"{path}: a segment unpacks to more than the whole image has")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with reading(path, "TIFF"):
            yield
    except UserError as error:
        if "imagecodecs" in str(error):
            advice = "its compression needs another package: pip install imagecodecs"
            raise UserError(f"{path}: {advice}") from error
        raise


def _import_tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise UserError("deep TIFF needs tifffile: pip install 'vision_jax[medical]'") from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it reports damage on the screen
    return tifffile
