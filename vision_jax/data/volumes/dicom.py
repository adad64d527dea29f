"""DICOM: a series of files in a folder, or one file of several frames, by pydicom.

Values are those of the modality: Rescale Slope and Intercept, or the Modality LUT, applied.
MONOCHROME1, where low values are bright, is kept as stored and marked; YBR and palettes become RGB;
bits above Bits Stored, where old files keep overlays, are cleared.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data.volumes.volume import Grid, Volume, check_size, orient, reading
from vision_jax.errors import UserError
from vision_jax.files import open_regular

MAX_FILE_BYTES = 2**31
MAX_DEFLATED_BYTES = 2**21  # which may grow a thousandfold
MAX_FRAMES = 4096
MAX_FILES = 20_000  # of a series
MAX_DEPTH = 1.02  # the largest step between slices by the smallest one
_DEFLATED = "1.2.840.10008.1.2.1.99"
_GREYS = ("MONOCHROME1", "MONOCHROME2")
_COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")


@dataclass(frozen=True)
class Header:
    """What places one file of a series. `position` and `axes` are None where not stated."""

    path: Path
    series: str
    number: int
    shape: tuple[int, int, int]  # frames, rows, columns
    spacing_mm: tuple[float, float]  # of rows, columns
    thickness_mm: float
    position: tuple[float, ...] | None
    axes: tuple[float, ...] | None
    color: bool
    stated_spacing: bool = True


def read_dicom(paths: Sequence[Path]) -> Volume:
    """The volume of a series' files. Raises UserError, of one line, as `read_dicom_grid`."""
    headers, grid, note, affine = _open(paths)
    color = headers[0].color
    frames, rows, columns = headers[0].shape
    pieces = [_read_pixels(header.path) for header in headers]
    kinds = {piece.stored.dtype for piece in pieces}
    kind = np.result_type(*kinds)
    count = frames * len(pieces)
    shape = (count, rows, columns, 3) if color else (count, rows, columns)
    stored = np.empty(shape, kind)  # bounded by _open
    for i, piece in enumerate(pieces):
        try:
            stored[i * frames : (i + 1) * frames] = piece.stored.reshape(frames, *shape[1:])
        except ValueError as error:
            raise UserError(
                f"{headers[i].path}: its pixels are not of its header's size"
            ) from error
    inverted = {piece.inverted for piece in pieces}
    if len(inverted) > 1:
        raise UserError(f"{grid_name(paths)}: MONOCHROME1 and MONOCHROME2 in one series")
    rest = (3,) if color else ()
    ijk, _ = orient(grid_name(paths), stored.transpose(2, 1, 0, *rest), affine, grid.oriented)
    slope = np.repeat([piece.slope for piece in pieces], frames)
    intercept = np.repeat([piece.intercept for piece in pieces], frames)
    if len(set(slope.tolist())) == len(set(intercept.tolist())) == 1:
        slope, intercept = slope[0], intercept[0]
    elif grid.oriented and not _slices_lie_along_z(affine):
        raise UserError(f"{grid_name(paths)}: slices that are not axial are scaled differently")
    elif grid.oriented and affine[2, 2] < 0:
        slope, intercept = slope[::-1], intercept[::-1]
    return Volume(
        grid_name(paths),
        ijk,
        grid,
        np.asarray(slope),
        np.asarray(intercept),
        inverted.pop(),
        color,
        note,
    )


def _slices_lie_along_z(affine: np.ndarray) -> bool:
    return int(np.abs(affine[:3, 2]).argmax()) == 2


def grid_name(paths: Sequence[Path]) -> str:
    return str(paths[0] if len(paths) == 1 else paths[0].parent)


def read_dicom_grid(paths: Sequence[Path]) -> tuple[Grid, str]:
    """(the grid, a note of what was assumed), of the headers alone.

    Raises:
      UserError: no DICOM, no pixels, several series, slices that are missing, twice, or of several
        sizes, a tilted gantry, or too many voxels.
    """
    _, grid, note, _ = _open(paths)
    return grid, note


def _open(paths: Sequence[Path]) -> tuple[list[Header], Grid, str, np.ndarray]:
    name = grid_name(paths)
    if len(paths) > MAX_FILES:
        raise UserError(f"{name}: {len(paths):,} files: {MAX_FILES:,} at most in a series")
    headers = [_read_header(path) for path in paths]
    series = sorted({header.series for header in headers})
    if len(series) > 1:
        raise UserError(
            f"{name}: {len(series)} series in one folder, {series[0]} and {series[1]} for two:"
            " give each a folder of its own"
        )
    first = headers[0]
    for other in headers[1:]:
        if (other.shape, other.color) != (first.shape, first.color) or first.shape[0] > 1:
            raise UserError(
                f"{other.path}: {other.shape} frames, rows and columns, and {first.path} has"
                f" {first.shape}: slices of one series are of one size"
            )
    kind = 3 if first.color else 4
    check_size(name, (first.shape[0] * len(headers), *first.shape[1:]), kind)
    note = "" if first.stated_spacing else f"{name}: states no pixel spacing, taken as 1 mm"
    if any(h.position is None or h.axes is None for h in headers) or first.shape[0] > 1:
        if len(headers) > 1:
            headers.sort(key=lambda h: h.number)
            if len({h.number for h in headers}) < len(headers):
                raise UserError(f"{name}: slices without a position, and a number twice")
        depth = first.thickness_mm
        affine = np.diag([first.spacing_mm[1], first.spacing_mm[0], depth, 1.0])
        oriented = False
        note = f"{name}: states no position of its slices, taken in the order of their numbers"
    else:
        headers, affine = _stack(name, headers)
        oriented = True
    count = first.shape[0] * len(headers)
    empty = np.broadcast_to(np.zeros((), np.uint8), (first.shape[2], first.shape[1], count))
    _, grid = orient(name, empty, affine, oriented)
    return headers, replace(grid, measured=first.stated_spacing), note, affine


def _stack(name: str, headers: list[Header]) -> tuple[list[Header], np.ndarray]:
    """(headers in the order of their slices, f64[4, 4] from (column, row, slice) to mm)."""
    axes = np.array([h.axes for h in headers])  # [N, 6]
    positions = np.array([h.position for h in headers])  # [N, 3]
    spacing = np.array([h.spacing_mm for h in headers])
    if np.abs(axes - axes[0]).max() > 1e-3 or np.abs(spacing - spacing[0]).max() > 1e-3:
        raise UserError(f"{name}: its slices are turned or spaced differently: a localizer in it?")
    along_row, along_column = axes[0, :3], axes[0, 3:]
    normal = np.cross(along_row, along_column)
    if not 0.99 < np.linalg.norm(normal) < 1.01:
        raise UserError(f"{name}: its image orientation is none: {axes[0].tolist()}")
    depth = positions @ normal
    order = np.argsort(depth, kind="stable")
    steps = np.diff(depth[order])
    step = headers[0].thickness_mm
    if len(steps):
        if steps.min() < 1e-3:
            at = headers[order[int(steps.argmin())]].path
            raise UserError(f"{name}: two images at one place, such as {at}: one volume at a time")
        step = float(np.median(steps))
        if steps.max() > MAX_DEPTH * steps.min() + 1e-2:
            at = headers[order[int(steps.argmax())]].path
            raise UserError(
                f"{name}: {steps.max():.3g} mm after {at} and {steps.min():.3g} mm elsewhere: a"
                " slice is missing"
            )
        moved = positions[order[-1]] - positions[order[0]]
        aside = np.linalg.norm(moved - normal * (moved @ normal))
        if aside > MAX_DEPTH - 1 and aside > 1e-3 * np.linalg.norm(moved):
            raise UserError(f"{name}: its slices are pushed aside (gantry tilt): resample it")
    affine = np.eye(4)
    affine[:3, 0] = along_row * spacing[0, 1]
    affine[:3, 1] = along_column * spacing[0, 0]
    affine[:3, 2] = normal * step
    affine[:3, 3] = positions[order[0]]
    return [headers[i] for i in order], affine


def _read_header(path: Path) -> Header:
    with reading(path, "DICOM"):  # elements are read when they are asked for
        return _make_header(path, load_dataset(path, pixels=False))


def _make_header(path: Path, dataset: Any) -> Header:
    name = str(path)
    try:
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        frames = int(dataset.get("NumberOfFrames") or 1)
        samples, bits = int(dataset.SamplesPerPixel), int(dataset.BitsAllocated)
        photometric = str(dataset.PhotometricInterpretation)
    except Exception as error:
        raise UserError(
            f"{name}: no image: it lacks rows, columns or the form of its pixels (it is"
            f" {_kind(dataset)})"
        ) from error
    if str(dataset.get("Modality", "")) == "SEG" or bits == 1:
        raise UserError(f"{name}: a segmentation object is no image: it belongs into masks/")
    if photometric not in (*_GREYS, *_COLORS) or samples not in (1, 3) or bits not in (8, 16, 32):
        raise UserError(f"{name}: {photometric} of {samples} × {bits} bits is not read here")
    if not 0 < frames <= MAX_FRAMES:
        raise UserError(f"{name}: {frames} frames: {MAX_FRAMES} at most")
    check_size(name, (frames, rows, columns), bits // 8, samples)
    spacing = numbers_of(dataset, "PixelSpacing", 2) or numbers_of(dataset, "ImagerPixelSpacing", 2)
    thickness = numbers_of(dataset, "SliceThickness", 1) or (1.0,)
    valid = spacing is not None and min(spacing) > 0
    position = numbers_of(dataset, "ImagePositionPatient", 3)
    axes = numbers_of(dataset, "ImageOrientationPatient", 6)
    number = numbers_of(dataset, "InstanceNumber", 1) or (0,)
    return Header(
        path,
        str(dataset.get("SeriesInstanceUID", "")),
        int(number[0]),
        (frames, rows, columns),
        (spacing[0], spacing[1]) if valid and spacing else (1.0, 1.0),
        thickness[0] if thickness[0] > 0 else 1.0,
        position,
        axes,
        photometric not in _GREYS,
        valid,
    )


def numbers_of(dataset: Any, key: str, count: int) -> tuple[float, ...] | None:
    """So many finite numbers of an element, None where it has none."""
    try:
        value = dataset.get(key)
        values = [value] if count == 1 else list(value)
        numbers = tuple(float(v) for v in values)
    except Exception:  # missing, empty, no numbers: pydicom raises many types
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


@dataclass(frozen=True)
class Pixels:
    """Of one file: [frames, H, W] or [frames, H, W, 3], and what scales them."""

    stored: np.ndarray
    slope: float
    intercept: float
    inverted: bool


def _read_pixels(path: Path) -> Pixels:
    """The pixels of one file. Raises UserError for what can't be read exactly."""
    with reading(path, "DICOM"):
        return _make_pixels(path, load_dataset(path, pixels=True))


def _make_pixels(path: Path, dataset: Any) -> Pixels:
    pixels = _import_pydicom().pixels
    name = str(path)
    if "PixelData" not in dataset:
        kind = "float pixels" if "FloatPixelData" in dataset else _kind(dataset)
        raise UserError(f"{name}: has no pixels (it is {kind})")
    photometric = str(dataset.PhotometricInterpretation)
    allocated, stored, high = (
        int((numbers_of(dataset, key, 1) or (-1,))[0])
        for key in ("BitsAllocated", "BitsStored", "HighBit")
    )
    if not 0 < stored <= allocated or high not in (-1, stored - 1):
        raise UserError(
            f"{name}: {stored} of {allocated} bits, the highest number {high}: not read here"
        )
    array = pixels_of(path, dataset)
    if photometric == "PALETTE COLOR":
        array = pixels.apply_color_lut(array, dataset)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if photometric not in _GREYS:
        depth = array.dtype.itemsize * 8 if photometric == "PALETTE COLOR" else stored
        if array.dtype.kind != "u" or array.shape[-1] not in (3, 4) or not 8 <= depth <= 16:
            raise UserError(f"{name}: {photometric} of {array.dtype} is not read here")
        return Pixels((array[..., :3] >> (depth - 8)).astype(np.uint8), 1.0, 0.0, False)
    array = _clear_overlays(array, stored)
    if "ModalityLUTSequence" in dataset:
        raise UserError(f"{name}: a Modality LUT scales its values: convert it to NIfTI")
    slope = numbers_of(dataset, "RescaleSlope", 1) or (1.0,)
    intercept = numbers_of(dataset, "RescaleIntercept", 1) or (0.0,)
    if slope[0] == 0:
        raise UserError(f"{name}: Rescale Slope 0: every value would be the same")
    return Pixels(array, slope[0], intercept[0], photometric == "MONOCHROME1")


def pixels_of(path: Path, dataset: Any) -> np.ndarray:
    """Decoded, and YBR as RGB. Raises UserError for what pydicom and Pillow can't decode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _import_pydicom().pixels.pixel_array(dataset)
    except Exception as error:  # decoders raise nearly every type on damaged or unknown data
        syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
        method = getattr(syntax, "name", syntax)
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: its pixels, {method}, can't be read: decompress them, as dcmconv or gdcmconv"
            f" --raw do ({reason})"
        ) from error


def _clear_overlays(array: np.ndarray, bits: int) -> np.ndarray:
    """Clears bits above those stored, and repeats the sign of signed numbers."""
    above = array.dtype.itemsize * 8 - bits
    if above == 0 or array.dtype.kind not in "iu":
        return array
    if array.dtype.kind == "i":
        return (array << above) >> above
    return array & array.dtype.type((1 << bits) - 1)


def load_dataset(path: Path, *, pixels: bool) -> Any:
    """pydicom's. Raises UserError for what has no mark of DICOM, and whatever pydicom raises."""
    pydicom = _import_pydicom()
    name = str(path)
    with open_regular(path, MAX_FILE_BYTES) as file:
        size = file.seek(0, 2)
        file.seek(128)
        if file.read(4) != b"DICM":
            raise UserError(f"{name}: not a DICOM file: it lacks the mark DICM after 128 bytes")
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            meta = pydicom.filereader.read_file_meta_info(path)
            deflated = str(meta.get("TransferSyntaxUID", "")) == _DEFLATED
            if deflated and size > MAX_DEFLATED_BYTES:
                raise UserError(f"{name}: deflated, of more than {MAX_DEFLATED_BYTES:,} bytes")
            return pydicom.dcmread(file, stop_before_pixels=not pixels)


def _kind(dataset: Any) -> str:
    uid = dataset.get("SOPClassUID")
    return str(getattr(uid, "name", uid) or "of no stated kind")


def _import_pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise UserError("DICOM needs pydicom: pip install 'vision_jax[medical]'") from error
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it reports damage on the screen
    return pydicom
