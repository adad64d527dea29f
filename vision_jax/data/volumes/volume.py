"""A volume: values on a grid in the patient, in one orientation, and the grid's place in mm.

The axes of `stored` are (z, y, x): z towards the head, y towards the back, x towards the patient's
left, as radiologists look at slices and as DICOM counts. Planes, seen as pictures [H, W]:

    axial      slices from feet to head; front on top, the patient's right on the left side
    coronal    slices from front to back; head on top, the patient's right on the left side
    sagittal   slices from right to left; head on top, front on the left side

A volume that is oblique keeps its own planes, which are called by the nearest of these.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from vision_jax.errors import UserError

PLANES = ("axial", "coronal", "sagittal")
MAX_VOXELS = 2**28  # 512 × 512 × 1,024
MAX_VOLUME_BYTES = 2**31
MAX_SIDE = 2**14
MAX_SHEAR = 1e-3  # cosine between two axes
MAX_SHIFT = 0.1  # voxels by which a mask may lie beside its image


@dataclass(frozen=True)
class Grid:
    """Where voxels lie, as far as the file tells.

    Attributes:
      shape: (z, y, x), in the orientation above.
      affine: f64[4, 4] from (x, y, z) indices to mm towards the left, the back and the head.
      oriented: whether the file states the orientation; else axes are as stored.
      measured: whether it states the spacing; else a voxel is taken as 1 mm.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    oriented: bool = True
    measured: bool = True

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Between voxels along z, y and x."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(0)).tolist()
        return z, y, x

    @property
    def voxel_ml(self) -> float | None:
        """None where the file states no spacing."""
        return float(np.prod(self.spacing_mm)) / 1000 if self.measured else None

    def check_same(self, other: "Grid", name: str, other_name: str) -> None:
        """Raises UserError unless both grids are of one shape and place."""
        if self.shape != other.shape:
            raise UserError(
                f"{other_name}: {_sizes(other.shape)} voxels, and its image {name} has"
                f" {_sizes(self.shape)}: resample the mask to the image's grid"
            )
        if not (self.oriented and other.oriented):
            return
        z, y, x = (side - 1 for side in self.shape)
        corners = np.array([[i, j, k, 1] for i in (0, x) for j in (0, y) for k in (0, z)]).T
        apart = np.abs((self.affine - other.affine) @ corners).max()
        if apart > MAX_SHIFT * min(self.spacing_mm):
            raise UserError(
                f"{other_name}: lies up to {apart:.3g} mm beside its image {name}: resample the"
                " mask to the image's grid"
            )


@dataclass(frozen=True)
class Volume:
    """Voxels [z, y, x] or [z, y, x, C], as stored; `values` scales them.

    Attributes:
      stored: as the file holds them, in the orientation above.
      slope, intercept: f64[z], or f64[] where they are the same for all slices.
      inverted: whether low values are bright (MONOCHROME1, WhiteIsZero).
      color: whether channels are red, green and blue of 8 bits.
    """

    name: str
    stored: np.ndarray
    grid: Grid
    slope: np.ndarray
    intercept: np.ndarray
    inverted: bool = False
    color: bool = False
    note: str = ""

    def values(self, z: slice | None = None) -> np.ndarray:
        """Values of some axial slices: as stored where nothing scales them, else f64."""
        z = z or slice(None)
        slope, intercept = self.slope, self.intercept
        if slope.ndim:
            slope, intercept = slope[z], intercept[z]
        stored = self.stored[z]
        if (slope == 1).all() and (intercept == 0).all():
            return stored
        shape = (-1, *(1,) * (stored.ndim - 1)) if slope.ndim else ()
        return stored * slope.reshape(shape) + intercept.reshape(shape)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever a library raises of a damaged file, which is nearly every type, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200].replace(str(path), "it")
        raise UserError(
            f"{path}: not readable as {what} ({reason or type(error).__name__})"
        ) from error


def check_size(name: str, shape: Sequence[int], itemsize: int, channels: int = 1) -> None:
    """Raises UserError, by a header's sizes, for a volume that has none or too many voxels."""
    if len(shape) == 0 or min(shape) < 1:
        raise UserError(f"{name}: no voxels: its header says {_sizes(shape)}")
    voxels = 1
    for side in shape:
        voxels *= int(side)
    if (
        max(shape) > MAX_SIDE
        or voxels > MAX_VOXELS
        or voxels * itemsize * channels > (MAX_VOLUME_BYTES)
    ):
        raise UserError(
            f"{name}: {_sizes(shape)} voxels of {itemsize * channels} bytes, over the limit of"
            f" {MAX_VOXELS:,} voxels and {MAX_VOLUME_BYTES:,} bytes: cut or resample it"
        )


def _sizes(shape: Sequence[int]) -> str:
    return " × ".join(str(side) for side in shape)


def orient(
    name: str, stored: np.ndarray, affine: np.ndarray, oriented: bool
) -> tuple[np.ndarray, Grid]:
    """Turns and mirrors an array [i, j, k] or [i, j, k, C] to [z, y, x]; a view, no copy.

    Args:
      name: for errors.
      stored: as the file indexes it, of which `affine` tells the place.
      affine: f64[4, 4] from (i, j, k) to mm towards left, back and head.
      oriented: whether the file states the affine; else the array is transposed alone.

    Raises:
      UserError: an affine that is not finite, singular or sheared.
    """
    axes = affine[:3, :3]
    lengths = np.sqrt((axes**2).sum(0))
    if not np.isfinite(affine).all() or not (lengths > 1e-6).all() or lengths.max() > 1e6:
        raise UserError(f"{name}: its voxels have no size: correct the header's spacing and affine")
    cosines = (axes / lengths).T @ (axes / lengths) - np.eye(3)
    if np.abs(cosines).max() > MAX_SHEAR:
        raise UserError(f"{name}: its axes are not at right angles: resample it to a grid that is")
    rest = range(3, stored.ndim)
    if not oriented:
        return stored.transpose(2, 1, 0, *rest), Grid(stored.shape[2::-1], affine, False)
    order, mirrored = _directions(affine)
    turned = stored.transpose(*order, *rest)  # [x, y, z]
    columns = affine[:, [*order, 3]].copy()
    for axis in mirrored:
        turned = np.flip(turned, axis)
        columns[:3, 3] += columns[:3, axis] * (turned.shape[axis] - 1)
        columns[:3, axis] *= -1
    zyx = turned.transpose(2, 1, 0, *rest)
    return zyx, Grid(zyx.shape[:3], columns, True)


def as_stored(zyx: np.ndarray, affine: np.ndarray, oriented: bool) -> np.ndarray:
    """[i, j, k] of [z, y, x]: `orient` undone, by the same affine."""
    xyz = zyx.transpose(2, 1, 0)
    if not oriented:
        return xyz
    order, mirrored = _directions(affine)
    return np.flip(xyz, mirrored).transpose(np.argsort(order))


def _directions(affine: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(which of i, j, k runs along x, y and z, which of x, y, z run the other way)."""
    unit = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(0))
    # The assignment that agrees most.
    order = max(permutations(range(3)), key=lambda p: sum(abs(unit[a, p[a]]) for a in range(3)))
    return order, tuple(axis for axis in range(3) if unit[axis, order[axis]] < 0)


def in_plane(voxels: np.ndarray, plane: str) -> np.ndarray:
    """[slices, H, W] or [slices, H, W, C] of [z, y, x, ...], as the top of this file says."""
    if plane == "axial":
        return voxels
    upright = voxels[::-1]  # head first
    if plane == "coronal":
        return np.moveaxis(upright, 1, 0)  # [y, z, x]
    return np.moveaxis(upright, 2, 0)  # [x, z, y]


def from_plane(slices: np.ndarray, plane: str) -> np.ndarray:
    """`in_plane` undone: [z, y, x, ...]."""
    if plane == "axial":
        return slices
    return np.moveaxis(slices, 0, 1 if plane == "coronal" else 2)[::-1]


def spacing_in_plane(grid: Grid, plane: str) -> tuple[float, float, float]:
    """Mm between slices, rows and columns."""
    z, y, x = grid.spacing_mm
    return {"axial": (z, y, x), "coronal": (y, z, x), "sagittal": (x, z, y)}[plane]


def count_in_plane(grid: Grid, plane: str) -> int:
    """How many slices there are."""
    z, y, x = grid.shape
    return {"axial": z, "coronal": y, "sagittal": x}[plane]
