"""DICOM segmentation objects as masks: frames of 1 bit that say where in the patient they lie.

An object holds a frame for each slice and segment that is not empty, in any order; its labels are
the numbers of the segments. They are laid on the grid of the image that they were drawn on.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data.volumes.dicom import load_dataset, numbers_of, pixels_of
from vision_jax.data.volumes.volume import Grid, check_size, reading
from vision_jax.errors import UserError

MAX_FRAMES = 65_536
MAX_SEGMENTS = 65_535
MAX_APART = 0.1  # voxels between a frame's pixels and the image's


def is_segmentation(path: Path) -> bool:
    """Whether a DICOM file is a segmentation object. Raises UserError for what is none."""
    with reading(path, "DICOM"):
        return str(load_dataset(path, pixels=False).get("Modality", "")) == "SEG"


def read_segmentation(path: Path, grid: Grid) -> np.ndarray:
    """Labels u16[z, y, x] on the grid of the image, 0 where there is no segment.

    Where segments overlap, the one with the highest number is kept.

    Raises:
      UserError: fractional segments, frames that do not say where they lie, or lie beside the grid.
    """
    with reading(path, "DICOM"):
        return _read(path, grid)


def _read(path: Path, grid: Grid) -> np.ndarray:
    if not grid.oriented:
        raise UserError(f"{path}: its image states no place, on which segments could be laid")
    dataset = load_dataset(path, pixels=True)
    kind = str(dataset.get("SegmentationType", ""))
    if kind not in ("BINARY", "LABELMAP"):
        raise UserError(f"{path}: a segmentation of type {kind or '(none)'}: export it as BINARY")
    rows, columns, count = (
        int((numbers_of(dataset, key, 1) or (0,))[0])
        for key in ("Rows", "Columns", "NumberOfFrames")
    )
    if not 0 < count <= MAX_FRAMES:
        raise UserError(f"{path}: {count} frames: 1 to {MAX_FRAMES:,}")
    check_size(str(path), (rows, columns), 2, count)
    shared = _first(dataset, "SharedFunctionalGroupsSequence")
    frames = list(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    if len(frames) != count:
        raise UserError(f"{path}: {count} frames, and {len(frames)} of them say what they are")
    masks = pixels_of(path, dataset).reshape(count, rows, columns)
    segments = [_segment(frame) for frame in frames] if kind == "BINARY" else [1] * count
    labels = np.zeros(grid.shape, np.uint16)
    into = np.linalg.inv(grid.affine)
    for i in np.argsort(segments, kind="stable").tolist():
        if not 0 < segments[i] <= MAX_SEGMENTS:
            raise UserError(f"{path}: frame {i} is of no segment")
        at = masks[i] > 0
        if not at.any():
            continue
        origin, along_column, along_row = _place(path, i, frames[i], shared, into)
        row, column = np.nonzero(at)
        x, y, z = origin[:, None] + row * along_column[:, None] + column * along_row[:, None]
        inside = (x >= 0) & (y >= 0) & (z >= 0) & (z < labels.shape[0])
        inside &= (y < labels.shape[1]) & (x < labels.shape[2])
        if not inside.all():
            raise UserError(f"{path}: frame {i} has pixels outside of its image: another image's?")
        labels[z, y, x] = segments[i] if kind == "BINARY" else masks[i][at]
    return labels


def _place(
    path: Path, i: int, frame: Any, shared: Any, into: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """i64[3] each, in voxels x, y, z: the frame's first pixel, and a step down and right."""
    position = _numbers(frame, shared, "PlanePositionSequence", "ImagePositionPatient", 3)
    axes = _numbers(frame, shared, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = _numbers(frame, shared, "PixelMeasuresSequence", "PixelSpacing", 2)
    if position is None or axes is None or spacing is None:
        raise UserError(f"{path}: frame {i} does not say where it lies: convert it to NIfTI")
    steps = np.array(
        [
            [*position, 1.0],
            [*(spacing[0] * np.array(axes[3:])), 0.0],
            [*(spacing[1] * np.array(axes[:3])), 0.0],
        ]
    )
    found = (into @ steps.T)[:3].T  # [3, 3] in voxels
    whole = np.rint(found)
    if np.abs(found - whole).max() > MAX_APART or np.abs(whole).max() > 2**20:
        raise UserError(
            f"{path}: frame {i} does not lie on the grid of its image: resample it, or give the"
            " image that it was drawn on"
        )
    return tuple(whole.astype(np.int64))  # type: ignore[return-value]


def _numbers(frame: Any, shared: Any, group: str, key: str, count: int) -> tuple[float, ...] | None:
    """Of the frame itself, or of all frames."""
    for place in (frame, shared):
        held = None if place is None else _first(place, group)
        if held is not None and (found := numbers_of(held, key, count)) is not None:
            return found
    return None


def _segment(frame: Any) -> int:
    held = _first(frame, "SegmentIdentificationSequence")
    found = None if held is None else numbers_of(held, "ReferencedSegmentNumber", 1)
    return int(found[0]) if found else 0


def _first(dataset: Any, key: str) -> Any:
    held = dataset.get(key)
    return held[0] if held else None
