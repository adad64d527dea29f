"""NIfTI-1 and -2, plain or gzipped, by nibabel."""

from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data.volumes.volume import Grid, Volume, as_stored, check_size, orient, reading
from vision_jax.errors import UserError
from vision_jax.files import open_regular

SUFFIXES = (".nii", ".nii.gz")
MAX_FILE_BYTES = 2**31
MAX_OFFSET = 2**24  # bytes before the voxels; extensions of headers lie there
MAX_CHANNELS = 64
MAX_APART_MM = 1e-2  # between the two affines of a header, at the volume's corners
_UNITS = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}


def read_nifti(path: Path) -> Volume:
    """A volume with its voxels. Raises UserError, of one line, as `read_nifti_grid`."""
    with reading(path, "NIfTI"):
        image, grid, note, affine = _open(path)
        # Of the array: those of the header are no more what the file says.
        slope, intercept = image.dataobj.slope, image.dataobj.inter
        raw = np.asarray(image.dataobj.get_unscaled())
    raw = _channels_last(raw)
    stored, _ = orient(str(path), raw, affine, grid.oriented)
    return Volume(
        str(path),
        stored,
        grid,
        np.array(float(slope)),
        np.array(float(intercept)),
        note=note,
    )


def write_labels(path: Path, like: Path, labels: np.ndarray) -> None:
    """Writes labels u8[z, y, x] as NIfTI whose voxels lie, and are stored, as those of `like`.

    Raises:
      UserError: `like` can't be read.
    """
    with reading(like, "NIfTI"):
        image, grid, _, affine = _open(like)
    stored = np.ascontiguousarray(as_stored(labels, affine, grid.oriented))
    written = import_nibabel().Nifti1Image(stored, image.affine, image.header)
    _save_labels(path, written)


def write_labels_on(path: Path, grid: Grid, labels: np.ndarray) -> None:
    """Writes labels u8[z, y, x] on a grid as NIfTI; without a place where the grid states none."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine  # from left, back to right, front
    written = import_nibabel().Nifti1Image(np.ascontiguousarray(labels.transpose(2, 1, 0)), affine)
    code = int(grid.oriented)  # scanner's, or unknown
    written.set_sform(affine, code)
    written.set_qform(affine, code)
    written.header.set_xyzt_units("mm" if grid.measured else "unknown")
    _save_labels(path, written)


def _save_labels(path: Path, written: Any) -> None:
    written.header.set_data_dtype(np.uint8)
    written.header["descrip"] = b"labels predicted by a model: not a diagnosis"
    written.to_filename(path)


def read_nifti_grid(path: Path) -> tuple[Grid, str]:
    """(the grid, a note of what was assumed), of the header alone.

    Raises:
      UserError: no NIfTI, too large, of colors or complex numbers, of time, or with two affines
        that place it differently.
    """
    with reading(path, "NIfTI"):
        _, grid, note, _ = _open(path)
    return grid, note


def _open(path: Path) -> tuple[Any, Grid, str, np.ndarray]:
    nibabel = import_nibabel()
    open_regular(path, MAX_FILE_BYTES).close()
    name = str(path)
    image = nibabel.load(path, mmap=False)
    if not isinstance(image, nibabel.Nifti1Pair) or not name.endswith(SUFFIXES):
        raise UserError(f"{name}: not a NIfTI file of one part: save it as .nii.gz")
    header = image.header
    kind, shape = header.get_data_dtype(), tuple(int(side) for side in image.shape)
    if kind.kind not in "iuf":
        raise UserError(f"{name}: voxels of {kind}, which are no plain numbers: convert it")
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) < 3 or any(side != 1 for side in shape[3:-1]):
        raise UserError(f"{name}: {len(shape)} axes ({shape}): give one volume in a file")
    channels = shape[-1] if len(shape) > 3 else 1
    if channels > MAX_CHANNELS:
        raise UserError(f"{name}: {channels} volumes in one file: {MAX_CHANNELS} at most")
    check_size(name, shape[:3], kind.itemsize, channels)
    offset = float(header["vox_offset"])
    if not 0 <= offset <= MAX_OFFSET:
        raise UserError(f"{name}: its voxels begin at byte {offset:,.0f}: the header is damaged")
    _check_length(path, int(offset) + int(np.prod(shape)) * kind.itemsize)
    unit = header.get_xyzt_units()[0]
    note = f"{name}: states no unit, taken as mm" if unit == "unknown" else ""
    affine, oriented = _affine(name, header, image, shape[:3])
    if not oriented:
        note = f"{name}: states no orientation, taken as stored"
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])  # from right, front to left, back
    millimeters = np.diag([_UNITS.get(unit, 1.0)] * 3 + [1.0])
    affine = millimeters @ flip @ affine
    empty = np.broadcast_to(np.zeros((), np.uint8), shape[:3])
    _, grid = orient(name, empty, affine, oriented)
    return image, grid, note, affine


def _affine(name: str, header: Any, image: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    """(f64[4, 4], whether it is stated): the sform, else the qform; both must agree."""
    forms = []
    for get in (image.get_sform, image.get_qform):
        try:
            affine, code = get(coded=True)
        except Exception as error:  # a quaternion of no length
            raise UserError(f"{name}: its qform is no rotation ({error}): correct it") from error
        if affine is not None and code > 0:
            forms.append(np.asarray(affine, np.float64))
    if len(forms) == 2:
        corners = np.array(
            [[i, j, k, 1] for i in (0, shape[0]) for j in (0, shape[1]) for k in (0, shape[2])]
        ).T
        apart = np.abs((forms[0] - forms[1]) @ corners).max()
        if not apart <= MAX_APART_MM + 1e-4 * np.abs(forms[0][:3]).max():
            raise UserError(
                f"{name}: its sform and qform place it {apart:.3g} apart: set the wrong one to the"
                " other, as nibabel's set_qform(affine) does"
            )
    if forms:
        return forms[0], True
    return np.diag([*header.get_zooms()[:3], *(1.0,) * (4 - len(header.get_zooms()[:3]))]), False


def _check_length(path: Path, needed: int) -> None:
    """A plain file must hold its voxels; a gzipped one at a thousandth of them, zlib's most."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        zipped = file.read(2) == b"\x1f\x8b"
    if size < (needed / 1100 if zipped else needed):
        raise UserError(f"{path}: cut short: {size:,} bytes, and its header needs {needed:,}")


def _channels_last(raw: np.ndarray) -> np.ndarray:
    """[i, j, k] or [i, j, k, C]."""
    if raw.ndim == 2:
        return raw[..., None]
    if raw.ndim == 3:
        return raw
    raw = raw.reshape(*raw.shape[:3], raw.shape[-1])
    return raw[..., 0] if raw.shape[-1] == 1 else raw


def import_nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise UserError("NIfTI needs nibabel: pip install 'vision_jax[medical]'") from error
    nibabel.imageglobals.logger.setLevel(60)  # it says on the screen what it repairs in headers
    return nibabel
