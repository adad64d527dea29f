"""Slices of medical volumes with their masks, as training reads images: `volumes:DIR?OPTIONS`.

DIR holds images/ and masks/ (or nnU-Net's imagesTr/ and labelsTr/), and classes.json, as a folder
of images does. A volume is a NIfTI or NRRD file, a folder with the files of one DICOM series, or a
TIFF;
its mask has the same name, and is any of these on the same grid. Volumes in a folder of images/
belong to one patient, whose name is the folder's; else each is a patient. A split keeps patients
whole.

OPTIONS, with & between them:

    window=LOW:HIGH     which values become black and white; 1%:99% are percentiles of each volume
    plane=axial         or coronal, sagittal
    slices=FIRST:END    of each volume, END not among them, or several such with commas: parts of
                        one volume as sets of their own
    neighbors=1         the slices before and after as red and blue; 0 gives grey

Images are uint8: values below the window are 0, above it 255, and those between are rounded.
"""

import io
import os
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.folders import list_files
from vision_jax.data.masks import ClassTable, MaskedImages, find_table, read_class_table
from vision_jax.data.volumes import dicom, dicom_seg, nifti, nrrd, tiff
from vision_jax.data.volumes.volume import (
    PLANES,
    Grid,
    Volume,
    count_in_plane,
    in_plane,
    spacing_in_plane,
)
from vision_jax.errors import UserError, nearest
from vision_jax.files import expand

VOLUMES = "volumes:"
OPTIONS = ("window", "plane", "slices", "neighbors")
FOLDERS = (("images", "masks"), ("imagesTr", "labelsTr"), ("images", "labels"))
MASK_ENDINGS = ("", "_mask", "_seg", "_label", "_labels", "-label", "-seg")
CACHE_BYTES = 2**30  # the least room for volumes of 8 bits that are kept in memory
MOST_FRACTION = 1e-3  # by which a label may differ from a whole number
MOST_STEP = 0.1  # a scale factor below it says that labels were saved as real numbers
_PERCENTILE_VOXELS = 2_000_000
_NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"
_WINDOW = re.compile(rf"({_NUMBER})(%?):({_NUMBER})(%?)")
_FORMATS = (  # and else DICOM
    (nifti.SUFFIXES, nifti.read_nifti, nifti.read_nifti_grid),
    (nrrd.SUFFIXES, nrrd.read_nrrd, nrrd.read_nrrd_grid),
    (tiff.SUFFIXES, tiff.read_tiff, tiff.read_tiff_grid),
)
_SUFFIXES = (*(suffix for suffixes, *_ in _FORMATS for suffix in suffixes), ".dcm")


class Window(NamedTuple):
    """Which values become 0 and 255; `percent`: which percentiles of the volume."""

    low: float
    high: float
    percent: bool = False

    def write(self) -> str:
        sign = "%" * self.percent
        return f"{self.low:g}{sign}:{self.high:g}{sign}"


@dataclass(frozen=True)
class Options:
    window: Window | None = None
    plane: str = "axial"
    slices: tuple[tuple[int, int], ...] = ()
    neighbors: int = 0


@dataclass(frozen=True)
class Case:
    """A volume: its files, their state, its grid, and the patient that it is of."""

    name: str
    paths: tuple[Path, ...]
    state: int
    grid: Grid
    patient: str
    note: str = ""  # what was assumed


# --- readers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VolumeReader:
    """Slices of volumes as images: slice rows[r] of case of[r]. Picklable.

    A grey volume gives three equal channels, or with `neighbors` the slice before, itself and the
    one after; other channels stay as they are.
    """

    folder: Path
    cases: tuple[Case, ...]
    of: np.ndarray  # i32[N]
    slice: np.ndarray  # i32[N]
    options: Options

    def read(self, row: int) -> np.ndarray:
        """uint8[H, W, C]. Raises DamagedImageError if the volume can't be read."""
        slices = self._slices(int(self.of[row]))
        at = int(self.slice[row])
        if slices.ndim == 4:
            return slices[at]
        steps = range(-self.options.neighbors, self.options.neighbors + 1)
        planes = [slices[min(max(at + step, 0), len(slices) - 1)] for step in steps]
        return np.stack(planes if len(planes) > 1 else planes * 3, -1)

    open = read

    def _slices(self, number: int) -> np.ndarray:
        """uint8[slices, H, W] or [slices, H, W, C] of a case."""
        case, options = self.cases[number], self.options
        key = (case.paths, case.state, options.window, options.plane)
        return _CACHE.get(key, lambda: to_bytes(_load_or_skip(case.paths), options))

    def encoded(self, row: int) -> bytes:
        bitmap = io.BytesIO()
        image = self.read(row)
        Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).save(bitmap, "bmp")
        return bitmap.getvalue()

    def example_name(self, row: int) -> str:
        return f"{self.folder / self.relative_name(row)}"

    def relative_name(self, row: int) -> str:
        case = self.cases[int(self.of[row])]
        return f"{case.name}[{self.options.plane} {self.slice[row]}]"

    def stamp(self, row: int) -> int:
        """A checksum of the sizes of the volume's files and of the options."""
        case = self.cases[int(self.of[row])]
        return _stamp(case.paths, case.state, (int(self.slice[row]), self.options))


@dataclass(frozen=True)
class VolumeMasks:
    """Masks of the same slices, whose values `table` names; by case but for the table."""

    images: VolumeReader
    paths: tuple[tuple[Path, ...], ...]
    states: tuple[int, ...]
    drawn_on_image: tuple[bool, ...]  # segmentation objects, which have the image's grid
    table: ClassTable

    def read(self, row: int) -> np.ndarray:
        number = int(self.images.of[row])
        paths, plane = self.paths[number], self.images.options.plane
        key = (paths, self.states[number], self.table, plane)
        labels = _CACHE.get(key, lambda: self._labels(number))
        return labels[int(self.images.slice[row])]

    def _labels(self, number: int) -> np.ndarray:
        case, name = self.images.cases[number], self.example_name_of(number)
        if self.drawn_on_image[number]:
            try:
                whole = dicom_seg.read_segmentation(self.paths[number][0], case.grid)
            except UserError as error:
                raise DamagedImageError(str(error)) from error
        else:
            volume = _load_or_skip(self.paths[number])
            case.grid.check_same(volume.grid, case.name, name)
            whole = whole_labels(volume)
        return in_plane(self.table.look_up(whole, name=name), self.images.options.plane)

    def example_name_of(self, number: int) -> str:
        return dicom.grid_name(self.paths[number])

    def stamp(self, row: int) -> int:
        table = (int(self.images.slice[row]), self.table.values, self.table.indices)
        number = int(self.images.of[row])
        return _stamp(self.paths[number], self.states[number], table)

    def example_name(self, row: int) -> str:
        plane, at = self.images.options.plane, self.images.slice[row]
        return f"{self.example_name_of(int(self.images.of[row]))}[{plane} {at}]"


def _state(paths: Sequence[Path]) -> int:
    """A number that changes where a file is written again, for what is kept in memory."""
    found = [path.stat() for path in paths]
    return zlib.crc32(repr([(one.st_size, one.st_mtime_ns) for one in found]).encode())


def _stamp(paths: tuple[Path, ...], state: int, meaning: object) -> int:
    return zlib.crc32(repr((_sizes(paths, state), meaning)).encode())


@lru_cache(maxsize=1024)
def _sizes(paths: tuple[Path, ...], state: int) -> list[int]:
    """In bytes; of a series of 300 files each of 300 slices would ask for all of them."""
    del state
    return [path.stat().st_size if path.is_file() else -1 for path in paths]


class _Cache:
    """Arrays that were used last, of bounded size in all. Threads wait for each other's reading."""

    def __init__(self, largest: int):
        self._largest, self._size = largest, 0
        self._held: OrderedDict[object, np.ndarray] = OrderedDict()
        self._failed: dict[object, str] = {}  # so that each slice does not try again
        self._lock = threading.Lock()

    def get(self, key: object, load: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            if key in self._failed:
                raise DamagedImageError(self._failed[key])
            try:
                array = load()
            except DamagedImageError as error:
                self._failed[key] = str(error)
                raise
            self._held[key] = array
            self._size += array.nbytes
            while self._size > self._largest and len(self._held) > 1:
                _, gone = self._held.popitem(last=False)
                self._size -= gone.nbytes
            return array


def _room() -> int:
    """Bytes that volumes may take in memory: a quarter of it, a GiB at least."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not told by this system
        physical = 0
    return max(CACHE_BYTES, physical // 4)


_CACHE = _Cache(_room())


# --- values -------------------------------------------------------------------------------------


def load_volume(paths: Sequence[Path]) -> Volume:
    """A volume by the kind of its files. Raises UserError for what can't be read exactly."""
    for suffixes, read, _ in _FORMATS:
        if paths[0].name.lower().endswith(suffixes):
            return read(paths[0])
    return dicom.read_dicom(paths)


def _load_or_skip(paths: Sequence[Path]) -> Volume:
    """`load_volume`, of which a failure concerns these files alone: they are skipped, counted."""
    try:
        return load_volume(paths)
    except UserError as error:
        raise DamagedImageError(str(error)) from error


def _load_grid(paths: Sequence[Path]) -> tuple[Grid, str]:
    for suffixes, _, read_grid in _FORMATS:
        if paths[0].name.lower().endswith(suffixes):
            return read_grid(paths[0])
    return dicom.read_dicom_grid(paths)


def to_bytes(volume: Volume, options: Options) -> np.ndarray:
    """uint8[slices, H, W] or [slices, H, W, C] of a volume in a plane, by the window.

    Raises:
      UserError: numbers of more than 8 bits without a window, or a volume without a range.
    """
    stored, window = volume.stored, options.window
    if volume.color or (window is None and stored.dtype == np.uint8 and (volume.slope == 1).all()):
        plain = in_plane(stored, options.plane)
        return np.ascontiguousarray(255 - plain if volume.inverted else plain)
    if window is None:
        some = np.asarray(volume.values(slice(len(stored) // 2, len(stored) // 2 + 1)), float)
        raise UserError(
            f"{volume.name}: holds numbers from {np.nanmin(some):g} to {np.nanmax(some):g} in its"
            " middle slice: say which become black and white, such as ?window=-160:240 or"
            " ?window=1%:99%"
        )
    low, high = window.low, window.high
    if window.percent:
        step = max(1, stored.size // _PERCENTILE_VOXELS)
        some = np.concatenate(
            [np.asarray(values, np.float64).ravel()[::step] for values in _slabs(volume)]
        )
        some = some[np.isfinite(some)]
        if not len(some):
            raise UserError(f"{volume.name}: not one number in it that is finite")
        low, high = np.percentile(some, [window.low, window.high]).tolist()
    if not high > low:
        raise UserError(
            f"{volume.name}: the window {window.write()} is {low:g} to {high:g}, which is none:"
            " give a wider one"
        )
    scaled = np.empty(stored.shape, np.uint8)
    for z, values in enumerate(_slabs(volume)):
        share = (np.asarray(values, np.float64) - low) / (high - low)
        share = np.nan_to_num(share, nan=0.0, posinf=1.0, neginf=0.0)
        scaled[z] = np.rint(np.clip(share, 0, 1) * 255)[0]
    if volume.inverted:
        np.subtract(255, scaled, out=scaled)
    return np.ascontiguousarray(in_plane(scaled, options.plane))


def _slabs(volume: Volume) -> Iterator[np.ndarray]:
    """Values [1, y, x, ...] of each axial slice."""
    return (volume.values(slice(z, z + 1)) for z in range(len(volume.stored)))


def whole_labels(volume: Volume) -> np.ndarray:
    """Labels [z, y, x] as whole numbers, u8 where they fit.

    Labels that were saved with a scale factor come back as 1.00000002, or as 0.996 where 8 bits
    hold no nearer number: they are rounded, by as much as that factor explains.

    Raises:
      UserError: several channels, values that are not whole, negative or above 65,535.
    """
    if volume.stored.ndim != 3:
        raise UserError(f"{volume.name}: {volume.stored.shape[3]} channels: a mask has one")
    whole = np.empty(volume.stored.shape, np.uint16)
    step = float(np.abs(volume.slope).max())
    most = max(MOST_FRACTION, 0.51 * step if step < MOST_STEP else 0.0)
    for z, values in enumerate(_slabs(volume)):
        rounded = values
        if values.dtype.kind == "f":
            rounded = np.rint(values)
            apart = np.abs(values - rounded)
            if not (apart <= most).all():
                strange = values[~(apart <= most)][0]
                raise UserError(
                    f"{volume.name}: the value {strange:g} is no label: masks hold whole numbers;"
                    " was it interpolated?"
                )
        if rounded.min() < 0 or rounded.max() > 65_535:
            raise UserError(
                f"{volume.name}: labels from {rounded.min():g} to {rounded.max():g}: give 0 to"
                " 65,535"
            )
        whole[z] = rounded[0]
    return whole.astype(np.uint8) if whole.max() < 256 else whole


# --- folders ------------------------------------------------------------------------------------


def parse_spec(spec: str) -> tuple[Path, Options]:
    """(the folder, its options). Raises UserError for an unknown option, or another value."""
    place, _, query = spec.removeprefix(VOLUMES).partition("?")
    options = Options()
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")  # percent signs are themselves
        if key not in OPTIONS:
            raise UserError(f"{spec}: the option {key!r}{nearest(key, OPTIONS)}")
        options = _with(options, spec, key, value)
    return expand(place), options


def _with(options: Options, spec: str, key: str, value: str) -> Options:
    if key == "window":
        match = _WINDOW.fullmatch(value)
        if not match or match[2] != match[4]:
            raise UserError(f"{spec}: window={value}: give LOW:HIGH, or LOW%:HIGH%")
        window = Window(float(match[1]), float(match[3]), bool(match[2]))
        fits = window.low < window.high and abs(window.high) < 1e30 and abs(window.low) < 1e30
        if not fits or (window.percent and not 0 <= window.low < window.high <= 100):
            raise UserError(f"{spec}: window={value}: give a low and a higher number")
        return replace(options, window=window)
    if key == "plane":
        if value not in PLANES:
            raise UserError(f"{spec}: plane={value}: give one of {', '.join(PLANES)}")
        return replace(options, plane=value)
    if key == "slices":
        if not re.fullmatch(r"\d{1,6}:\d{1,6}(,\d{1,6}:\d{1,6}){0,99}", value):
            raise UserError(f"{spec}: slices={value}: give FIRST:END, such as 0:90 or 0:40,60:90")
        edges = [int(number) for number in re.split("[:,]", value)]
        if any(a > b or (a == b and i % 2 == 0) for i, (a, b) in enumerate(pairwise(edges))):
            raise UserError(f"{spec}: slices={value}: give FIRST:END, each after the one before")
        return replace(options, slices=tuple(zip(edges[::2], edges[1::2], strict=True)))
    if value not in ("0", "1"):
        raise UserError(f"{spec}: neighbors={value}: give 0 or 1")
    return replace(options, neighbors=int(value))


def read_volumes(spec: str, masks: Path | None, classes: Path | None) -> MaskedImages:
    """Headers of all volumes and masks that `spec` names, and no voxel.

    Raises:
      UserError: what is missing, damaged or unlike its mask in shape or place.
    """
    folder, options = parse_spec(spec)
    images, masks = _find_folders(folder, masks)
    table = read_class_table(classes or find_table(folder, images, masks))
    of_images, of_masks = _list_volumes(images), _list_volumes(masks, alone=True)
    if not of_images:
        raise UserError(
            f"{images}: no volume in it: give .nii.gz, .nrrd, folders of DICOM, or .tif"
        )
    cases: list[Case] = []
    mask_paths: list[tuple[Path, ...]] = []
    mask_states: list[int] = []
    drawn_on_image: list[bool] = []
    alone: list[str] = []
    notes: list[str] = []
    for name, paths in of_images.items():
        stem = re.sub(r"_0000$", "", name)  # nnU-Net's number of a channel
        found = [of_masks[stem + end] for end in MASK_ENDINGS if stem + end in of_masks]
        if not found:
            alone.append(name)
            continue
        grid, note = _load_grid(paths)
        drawn = found[0][0].suffix.lower() == ".dcm" and dicom_seg.is_segmentation(found[0][0])
        if drawn and len(found[0]) > 1:
            raise UserError(f"{found[0][0].parent}: {len(found[0])} files: one segmentation only")
        if not drawn:
            mask_grid, _ = _load_grid(found[0])
            grid.check_same(mask_grid, str(images / name), dicom.grid_name(found[0]))
        if not grid.oriented and options.plane != "axial":
            raise UserError(
                f"{images / name}: states no orientation, so plane={options.plane} is unknown:"
                " leave it out"
            )
        notes += [note] * bool(note)
        patient = name.partition("/")[0]
        cases.append(Case(name, tuple(paths), _state(paths), grid, patient, note))
        mask_paths.append(tuple(found[0]))
        mask_states.append(_state(found[0]))
        drawn_on_image.append(drawn)
    if not cases:
        raise UserError(f"{masks}: no mask has the name of a volume, such as {alone[0]}")
    if alone:
        notes.append(f"{len(alone):,} volumes without a mask left out, the first {alone[0]}")
    of, at = _rows(spec, cases, options)
    reader = VolumeReader(images, tuple(cases), of, at, options)
    patients = sorted({case.patient for case in cases})
    number = np.array([patients.index(case.patient) for case in cases])
    shown = notes[:3] + [f"and {len(notes) - 3} more notes"] * (len(notes) > 3)
    return MaskedImages(
        spec,
        table.class_names,
        reader,
        VolumeMasks(reader, tuple(mask_paths), tuple(mask_states), tuple(drawn_on_image), table),
        len(of),
        number[of],
        "; ".join(shown),
    )


def volume_alone(path: Path, trained_on: str) -> VolumeReader:
    """All slices of a file, or of a folder's DICOM series, as those of the training, to predict.

    Raises:
      UserError: no volume, a damaged one, or a model that was not trained on volumes.
    """
    if not trained_on.startswith(VOLUMES):
        raise UserError(f"{path}: a volume, and the model was trained on images: give images")
    if not path.is_dir() and not path.name.lower().endswith(_SUFFIXES):
        raise UserError(
            f"{path}: no volume, and the model was trained on volumes: give .nii.gz, .nrrd, a"
            " folder of DICOM, or .tif"
        )
    options = replace(parse_spec(trained_on)[1], slices=())
    inside = list_files(path, (".dcm",))[0] if path.is_dir() else ()
    paths = tuple(path / name for name in inside) or (path,)
    grid, note = _load_grid(paths)
    if not grid.oriented and options.plane != "axial":
        raise UserError(f"{path}: states no orientation, so plane={options.plane} is unknown")
    suffix = next((end for end in _SUFFIXES if path.name.lower().endswith(end)), "")
    name = path.name[: len(path.name) - len(suffix)] or path.resolve().name
    case = Case(name, paths, _state(paths), grid, name, note)
    return VolumeReader(path.parent, (case,), *_rows(str(path), (case,), options), options)


def find_volumes(folder: Path) -> list[Path]:
    """The volumes that lie in a folder, by name; of DICOM's the folder that they lie in."""
    found: dict[Path, None] = {}
    for name in list_files(folder, _SUFFIXES)[0]:
        path = folder / name
        found[path.parent if name.lower().endswith(".dcm") else path] = None
    return [*found]


def is_volume(path: Path) -> bool:
    """Whether it is one of what only volumes are: a folder, NIfTI, NRRD or DICOM."""
    return path.is_dir() or path.name.lower().endswith((*nifti.SUFFIXES, *nrrd.SUFFIXES, ".dcm"))


def write_labels(folder: Path, stem: str, reader: VolumeReader, labels: np.ndarray) -> Path:
    """Writes labels u8[z, y, x] of a reader's one volume; returns the file.

    A NIfTI file's are stored and placed as it is, those of a TIFF are a TIFF, and those of others
    NIfTI on their grid.
    """
    [case] = reader.cases
    name = case.paths[0].name.lower()
    if name.endswith(tiff.SUFFIXES):
        path = folder / f"{stem}.tif"
        tiff.write_labels(path, labels)
        return path
    path = folder / f"{stem}.nii.gz"
    if name.endswith(nifti.SUFFIXES):
        nifti.write_labels(path, case.paths[0], labels)
    else:
        nifti.write_labels_on(path, case.grid, labels)
    return path


def _rows(spec: str, cases: Sequence[Case], options: Options) -> tuple[np.ndarray, np.ndarray]:
    """(case i32[N], slice i32[N]) of all slices that are asked for."""
    of, at = [], []
    for number, case in enumerate(cases):
        count = count_in_plane(case.grid, options.plane)
        for first, end in options.slices or ((0, count),):
            if end > count:
                raise UserError(
                    f"{spec}: slices={first}:{end}, and {case.name} has {count} {options.plane}"
                    " slices"
                )
            of.append(np.full(end - first, number, np.int32))
            at.append(np.arange(first, end, dtype=np.int32))
    return np.concatenate(of), np.concatenate(at)


def _find_folders(folder: Path, masks: Path | None) -> tuple[Path, Path]:
    if masks is not None and not masks.is_dir():
        raise UserError(f"{masks}: no such folder: give the one of the masks")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give one with images/ and masks/ in it")
    for images, own in FOLDERS:
        if (folder / images).is_dir() and (masks or (folder / own).is_dir()):
            return folder / images, masks or folder / own
    raise UserError(f"{folder}: no images/ and masks/ in it, nor imagesTr/ and labelsTr/")


def _list_volumes(folder: Path, *, alone: bool = False) -> dict[str, list[Path]]:
    """Files by the name of the volume: a file's without its suffix, of DICOM the folder's.

    With `alone` a DICOM file is one by its own name too, as segmentation objects are.
    """
    found: dict[str, list[Path]] = {}
    for path in list_files(folder, _SUFFIXES)[0]:
        suffix = next(end for end in _SUFFIXES if path.lower().endswith(end))
        name = path[: -len(suffix)]
        if suffix == ".dcm":
            name = path.rpartition("/")[0] or name
        paths = found.setdefault(name, [])
        if paths and (suffix != ".dcm" or paths[0].suffix.lower() != ".dcm"):
            raise UserError(f"{folder}: {paths[0].name} and {path} are of one name: leave one")
        paths.append(folder / path)
        if alone and suffix == ".dcm":
            found.setdefault(path[: -len(suffix)], [folder / path])
    return found


def spacing_of(reader: VolumeReader, case: int) -> tuple[float, float, float]:
    """Mm between slices, rows and columns of a case, in the reader's plane."""
    return spacing_in_plane(reader.cases[case].grid, reader.options.plane)
