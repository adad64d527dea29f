"""Volumes out of NIfTI, DICOM and TIFF: values, orientation, masks, and headers that lie.

NRRD: test_nrrd.py. SimpleITK and OpenCV as independent readers: tests/parity/test_volumes.py.
"""

import gzip
import hashlib
import importlib.util
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.segmentation import read_segmentation_source, split_segmentation_source
from vision_jax.data.volumes import source as volumes
from vision_jax.data.volumes.volume import Grid, as_stored, from_plane, in_plane, orient
from vision_jax.doctor.__main__ import main as doctor
from vision_jax.errors import UserError

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
tifffile = pytest.importorskip("tifffile")
dicom_files = pytest.importorskip("dicom_files")
dicom, series = dicom_files.dicom, dicom_files.series

SHAPE = (6, 5, 4)  # x, y, z, all different
RAS = np.diag([2.0, 3.0, 4.0, 1.0])  # mm to the right, front and head


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.setattr(volumes, "_CACHE", volumes._Cache(2**28))


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = RAS, **header) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def poke(path: Path, offset: int, data: bytes) -> None:
    """Writes over bytes of a header, gzipped or not."""
    packed = path.suffix == ".gz"
    content = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))


def dataset_of(folder: Path, image: np.ndarray, mask: np.ndarray, **how) -> Path:
    nifti(folder / "images/one.nii.gz", image, **how)
    nifti(folder / "masks/one.nii.gz", mask, **how)
    (folder / "classes.json").write_text(json.dumps({"0": "outside", "1": "brain"}))
    return folder


# --- orientation --------------------------------------------------------------------------------


def test_each_of_48_orientations(rng):
    """The same anatomy, whatever order and direction a file stores it in."""
    anatomy = rng.integers(0, 1000, (4, 5, 6))  # z to the head, y to the back, x to the left
    spacing = {"x": 2.0, "y": 3.0, "z": 4.0}
    codes = {"L": ("x", 1), "R": ("x", -1), "P": ("y", 1), "A": ("y", -1), "S": ("z", 1)}
    codes["I"] = ("z", -1)
    seen = 0
    for first in codes:
        for second in codes:
            for third in codes:
                axes = [codes[c] for c in (first, second, third)]
                if len({name for name, _ in axes}) < 3:
                    continue
                stored = anatomy.transpose(*("zyx".index(name) for name, _ in axes))
                affine = np.eye(4)
                affine[:3, :3] = 0
                origin = np.array([-7.0, 11.0, 13.0])
                for column, (name, sign) in enumerate(axes):
                    row = "xyz".index(name)
                    affine[row, column] = sign * spacing[name]
                    if sign < 0:
                        stored = np.flip(stored, column)
                        origin[row] += spacing[name] * (stored.shape[column] - 1)
                affine[:3, 3] = origin
                found, grid = orient("x", stored, affine, True)
                assert np.array_equal(found, anatomy)
                assert np.array_equal(as_stored(found, affine, True), stored)
                assert grid.spacing_mm == (4.0, 3.0, 2.0)
                assert np.allclose(grid.affine[:3, 3], [-7, 11, 13])
                seen += 1
    assert seen == 48


def test_planes_go_there_and_back(rng):
    voxels = rng.integers(0, 9, (4, 5, 6, 2))
    for plane, shape in (("axial", (4, 5, 6)), ("coronal", (5, 4, 6)), ("sagittal", (6, 4, 5))):
        slices = in_plane(voxels, plane)
        assert slices.shape[:3] == shape
        assert np.array_equal(from_plane(slices, plane), voxels)
    assert np.array_equal(in_plane(voxels, "coronal")[2, 0], voxels[-1, 2])  # head on top
    assert np.array_equal(in_plane(voxels, "sagittal")[1, 0, 3], voxels[-1, 3, 1])


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (np.zeros((4, 4)), "no size"),
        (np.full((4, 4), np.nan), "no size"),
        (np.eye(4) + np.eye(4, k=1) * 0.3, "right angles"),
    ],
)
def test_bad_affines(affine, reason):
    with pytest.raises(UserError, match=reason):
        orient("x", np.zeros(SHAPE), affine, True)


# --- NIfTI --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["u1", "i2", "<u2", ">i2", "i4", "f4", "f8", "i8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_values(kind, suffix, tmp_path, rng):
    """As stored, turned from right, front, head to back and left."""
    array = rng.integers(0, 200, SHAPE).astype(kind)
    path = tmp_path / f"a{suffix}"
    image = nibabel.Nifti1Image(array, RAS, dtype=array.dtype)
    nibabel.save(image, path)
    volume = volumes.load_volume([path])
    assert np.array_equal(volume.values(), array[::-1, ::-1].T)
    assert volume.values().dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    assert volume.grid.spacing_mm == (4.0, 3.0, 2.0)


def test_scaled_values(tmp_path, rng):
    array = rng.integers(-900, 900, SHAPE).astype(np.int16)
    path = nifti(tmp_path / "a.nii", array)
    poke(path, 112, np.array([0.5, -10], "<f4").tobytes())
    values = volumes.load_volume([path]).values()
    assert np.array_equal(values, array[::-1, ::-1].T * 0.5 - 10)


@pytest.mark.parametrize("most", [1, 2, 5, 7])
def test_labels_with_a_scale_factor_are_rounded(most, tmp_path, rng):
    """As nibabel saves float labels in 8 bits: 1 comes back as 1.00000002, or as 0.996."""
    labels = rng.integers(0, most + 1, SHAPE)
    labels[0, 0, 0] = most
    image = nibabel.Nifti1Image(labels.astype(np.float32), RAS)
    image.set_data_dtype(np.uint8)
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = volumes.load_volume([tmp_path / "a.nii.gz"])
    assert not np.array_equal(volume.values(), labels[::-1, ::-1].T)
    found = volumes.whole_labels(volume)
    assert found.dtype == np.uint8
    assert np.array_equal(found, labels[::-1, ::-1].T)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0.4, "interpolated"),
        (np.nan, "is no label"),
        (-1, "labels from -1"),
        (7e4, "to 70000"),
    ],
)
def test_values_that_are_no_labels(value, reason, tmp_path):
    labels = np.zeros(SHAPE, np.float32)
    labels[1, 2, 3] = value
    volume = volumes.load_volume([nifti(tmp_path / "a.nii", labels)])
    with pytest.raises(UserError, match=reason):
        volumes.whole_labels(volume)


def test_units_and_orientation_that_are_not_stated(tmp_path):
    array = np.zeros(SHAPE, np.uint8)
    path = nifti(tmp_path / "a.nii", array)
    poke(path, 123, bytes([1]))  # meters
    assert volumes.load_volume([path]).grid.spacing_mm == (4000.0, 3000.0, 2000.0)
    poke(path, 123, bytes([0]))
    assert "no unit" in volumes.load_volume([path]).note
    poke(path, 252, bytes(4))  # both codes
    volume = volumes.load_volume([path])
    assert "no orientation" in volume.note
    assert not volume.grid.oriented
    assert volume.grid.spacing_mm == (4.0, 3.0, 2.0)


def test_forms_that_disagree(tmp_path):
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), RAS)
    image.set_sform(RAS, 1)
    moved = RAS.copy()
    moved[0, 3] = 5
    image.set_qform(moved, 1)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(UserError, match="sform and qform place it 5 apart"):
        volumes.load_volume([tmp_path / "a.nii"])
    image.set_qform(RAS, 1)
    nibabel.save(image, tmp_path / "b.nii")
    assert volumes.load_volume([tmp_path / "b.nii"]).grid.oriented


def shape_bytes(*sides: int) -> bytes:
    return np.array([len(sides), *sides, *[1] * (7 - len(sides))], "<i2").tobytes()


HEADERS = {
    "huge": (40, shape_bytes(32_000, 32_000, 32_000), "over the limit"),
    "many channels": (40, shape_bytes(6, 5, 4, 1, 3000), "3000 volumes"),
    "time": (40, shape_bytes(6, 5, 2, 2, 2), "axes"),
    "negative": (40, shape_bytes(-6, 5, 4), ""),
    "empty": (40, shape_bytes(0, 5, 4), ""),
    "longer than the file": (40, shape_bytes(600, 500, 400), "cut short"),
    "no such dimension": (40, np.array([99, 6, 5, 4], "<i2").tobytes(), ""),
    "complex": (70, np.array([32, 64], "<i2").tobytes(), "no plain numbers"),
    "colors": (70, np.array([128, 24], "<i2").tobytes(), "no plain numbers"),
    "unknown type": (70, np.array([77, 8], "<i2").tobytes(), ""),
    "far offset": (108, np.array([3e9], "<f4").tobytes(), ""),
    "NaN offset": (108, np.array([np.nan], "<f4").tobytes(), ""),
    "before the header": (108, np.array([-400], "<f4").tobytes(), ""),
    "no spacing": (280, np.zeros(12, "<f4").tobytes(), "no size"),
    "NaN affine": (280, np.full(12, np.nan, "<f4").tobytes(), ""),
    "another magic": (344, b"abcd", ""),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name, suffix, tmp_path):
    offset, data, reason = HEADERS[name]
    path = nifti(tmp_path / f"a{suffix}", np.zeros(SHAPE, np.uint8))
    poke(path, offset, data)
    if name == "longer than the file" and suffix == ".nii.gz":
        reason = "cut short"
    with pytest.raises(UserError, match=reason or None) as error:
        volumes.load_volume([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gzip_that_is_cut(tmp_path, rng):
    path = nifti(tmp_path / "a.nii.gz", rng.integers(0, 99, (40, 40, 40)).astype(np.int16))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"damaged gzip|not readable"):
        volumes.load_volume([path])


# --- DICOM --------------------------------------------------------------------------------------


def test_a_series(tmp_path, rng):
    array = rng.integers(-500, 500, (4, 5, 6)).astype(np.int16)
    paths = series(tmp_path, array, RescaleSlope=2, RescaleIntercept=-1024)
    volume = volumes.load_volume(sorted(paths))
    assert np.array_equal(volume.values(), array * 2.0 - 1024)
    assert volume.grid.spacing_mm == (4.0, 3.0, 2.0)
    assert np.allclose(volume.grid.affine[:3, 3], [-10, -20, 0])


def test_a_series_from_head_to_feet_whose_slices_have_their_own_scale(tmp_path, rng):
    """As of PET. Rows go to the front: the image is upside down in the file."""
    array = rng.integers(0, 500, (4, 5, 6)).astype(np.uint16)
    for z in range(4):
        dicom(
            tmp_path / f"{z}.dcm",
            array[z, ::-1],
            -4.0 * z,
            RescaleSlope=z + 1,
            ImageOrientationPatient=[1, 0, 0, 0, -1, 0],
        )
    volume = volumes.load_volume(sorted(tmp_path.glob("*.dcm")))
    assert np.array_equal(volume.values(), (array * np.arange(1, 5)[:, None, None])[::-1])


def test_overlays_in_high_bits_are_cleared(tmp_path, rng):
    """Bits above those stored, of unsigned numbers, and the sign of signed ones."""
    array = rng.integers(0, 2**12, (4, 5)).astype(np.uint16)
    overlay = rng.integers(0, 16, (4, 5)).astype(np.uint16) << 12
    bits = {"BitsStored": 12, "HighBit": 11}
    path = dicom(tmp_path / "a.dcm", array | overlay, **bits)
    assert np.array_equal(volumes.load_volume([path]).values()[0], array)
    signed = array.astype(np.int16) - 2048
    path = dicom(tmp_path / "b.dcm", (signed & 0xFFF).astype(np.int16), **bits)
    assert np.array_equal(volumes.load_volume([path]).values()[0], signed)


def test_monochrome1_is_shown_dark_where_it_is_large(tmp_path):
    array = np.array([[0, 100], [200, 255]], np.uint8)
    path = dicom(tmp_path / "a.dcm", array, PhotometricInterpretation="MONOCHROME1")
    volume = volumes.load_volume([path])
    assert np.array_equal(volume.values()[0], array)
    assert np.array_equal(volumes.to_bytes(volume, volumes.Options())[0], 255 - array)


def test_colors(tmp_path, rng):
    """YBR of gray is gray; a palette is looked up."""
    rgb = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    more = {"SamplesPerPixel": 3, "PlanarConfiguration": 0}
    path = dicom(tmp_path / "a.dcm", rgb, PhotometricInterpretation="RGB", **more)
    volume = volumes.load_volume([path])
    assert np.array_equal(volumes.to_bytes(volume, volumes.Options())[0], rgb)
    grey = np.full((4, 5, 3), 128, np.uint8)
    grey[..., 0] = rgb[..., 0]
    path = dicom(tmp_path / "b.dcm", grey, PhotometricInterpretation="YBR_FULL", **more)
    found = volumes.load_volume([path]).stored[0]
    assert np.array_equal(found, np.repeat(rgb[..., :1], 3, -1))
    table = rng.integers(0, 2**16, (3, 256)).astype(np.uint16)
    palette = {}
    for name, values in zip(("Red", "Green", "Blue"), table, strict=True):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = values.tobytes()
    index = rgb[..., 0].copy()
    path = dicom(tmp_path / "c.dcm", index, PhotometricInterpretation="PALETTE COLOR", **palette)
    found = volumes.load_volume([path]).stored[0]
    assert np.array_equal(found, (table[:, index] >> 8).transpose(1, 2, 0))


def test_frames_and_missing_positions(tmp_path, rng):
    frames = rng.integers(0, 99, (3, 4, 5)).astype(np.uint8)
    path = dicom(tmp_path / "a.dcm", frames[0], NumberOfFrames=3, PixelData=frames.tobytes() + b"")
    volume = volumes.load_volume([path])
    assert np.array_equal(volume.values(), frames)
    assert "no position" in volume.note
    paths = series(tmp_path / "b", frames, ImagePositionPatient=None)
    assert np.array_equal(volumes.load_volume(paths).values(), frames)
    assert volumes.load_volume(paths).grid.measured
    path = dicom(tmp_path / "c.dcm", frames[0], PixelSpacing=None)
    assert not volumes.load_volume([path]).grid.measured


SERIES = {
    "a slice is missing": lambda d, a: (d / "002.dcm").unlink(),
    "two images at one place": lambda d, a: dicom(d / "9.dcm", a[0], 4.0),
    "2 series in one folder": lambda d, a: dicom(d / "9.dcm", a[0], 90, SeriesInstanceUID="9"),
    "slices of one series are of one size": lambda d, a: dicom(d / "9.dcm", a[0, :3], 16.0),
    "turned or spaced": lambda d, a: dicom(d / "9.dcm", a[0], 16, PixelSpacing=[1, 1]),
    "gantry tilt": lambda d, a: [
        dicom(d / f"{z:03}.dcm", a[z], z, ImagePositionPatient=[0, z, z * 4]) for z in range(1, 5)
    ],
    "image orientation is none": lambda d, a: [
        dicom(d / f"{z:03}.dcm", a[z], z, ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
        for z in range(1, 5)
    ],
    "not a DICOM file": lambda d, a: (d / "9.dcm").write_bytes(b"x" * 500),
    "has no pixels": lambda d, a: dicom(d / "004.dcm", a[0], 0.0, PixelData=None),
    "MONOCHROME1 and MONOCHROME2": lambda d, a: dicom(
        d / "004.dcm", a[0], 0.0, PhotometricInterpretation="MONOCHROME1"
    ),
}


@pytest.mark.parametrize("reason", SERIES)
def test_series_that_are_no_volume(reason, tmp_path, rng):
    array = rng.integers(0, 99, (5, 4, 5)).astype(np.uint8)
    series(tmp_path, array[:4])
    if reason in ("gantry tilt", "image orientation is none"):
        for path in tmp_path.glob("*.dcm"):
            path.unlink()
    SERIES[reason](tmp_path, array)
    with pytest.raises(UserError, match=reason) as error:
        volumes.load_volume(sorted(tmp_path.glob("*.dcm")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"Rows": 60_000, "Columns": 60_000}, "over the limit"),
        ({"NumberOfFrames": 10_000_000}, "frames"),
        ({"NumberOfFrames": -3}, "frames"),
        ({"Rows": None}, "lacks rows"),
        ({"Rows": 0}, "no voxels"),
        ({"Rows": 400}, "can't be read"),
        ({"BitsStored": 40}, "bits"),
        ({"BitsStored": 4, "HighBit": 7}, "bits"),
        ({"BitsAllocated": 12}, "is not read here"),
        ({"SamplesPerPixel": 9}, "is not read here"),
        ({"PhotometricInterpretation": "HSV"}, "is not read here"),
        ({"RescaleSlope": 0}, "Rescale Slope 0"),
        ({"Modality": "SEG"}, "segmentation object is no image"),
        ({"PixelData": b"12"}, "can't be read"),
    ],
)
def test_hostile_dicom(values, reason, tmp_path):
    path = dicom(tmp_path / "a.dcm", np.zeros((4, 5), np.uint8), **values)
    with pytest.raises(UserError, match=reason) as error:
        volumes.load_volume([path])
    assert "\n" not in str(error.value)


def segmentation(path: Path, labels: np.ndarray, **values) -> Path:
    """A segmentation object of [z, y, x] on the grid of `series`, a frame for each slice."""
    dataset_class, sequence = pydicom.Dataset, pydicom.Sequence
    frames, masks = [], []
    for z in reversed(range(len(labels))):
        for number in np.unique(labels[z][labels[z] > 0]).tolist():
            frame, place, segment = dataset_class(), dataset_class(), dataset_class()
            place.ImagePositionPatient = [-10, -20, 4.0 * z]
            segment.ReferencedSegmentNumber = number
            frame.PlanePositionSequence = sequence([place])
            frame.SegmentIdentificationSequence = sequence([segment])
            frames.append(frame)
            masks.append(labels[z] == number)
    shared, axes, measures = dataset_class(), dataset_class(), dataset_class()
    axes.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing = [3.0, 2.0]
    shared.PlaneOrientationSequence = sequence([axes])
    shared.PixelMeasuresSequence = sequence([measures])
    bits = np.packbits(np.array(masks).ravel(), bitorder="little").tobytes()
    own = {
        "Modality": "SEG", "SegmentationType": "BINARY", "NumberOfFrames": len(frames),
        "SharedFunctionalGroupsSequence": sequence([shared]), "PixelData": bits + bits[:0],
        "PerFrameFunctionalGroupsSequence": sequence(frames), "BitsAllocated": 1, "BitsStored": 1,
        "HighBit": 0, "PixelSpacing": None, "ImagePositionPatient": None,
        "ImageOrientationPatient": None,
    }  # fmt: skip
    if len(bits) % 2:
        own["PixelData"] = bits + bytes(1)
    return dicom(path, labels[0].astype(np.uint8), **(own | values))


def test_segmentation_objects(tmp_path, rng):
    """Frames in any order, of slices that are not empty, laid on the image's grid."""
    array = rng.integers(0, 99, (4, 5, 6)).astype(np.uint8)
    labels = np.where(array > 70, 2, np.where(array < 20, 1, 0))
    labels[1] = 0
    series(tmp_path / "images/p1/scan", array)
    path = segmentation(tmp_path / "masks/p1/scan.dcm", labels)
    (tmp_path / "classes.json").write_text('["outside", "dark", "bright"]')
    for plane in ("axial", "coronal"):
        source = read_segmentation_source(f"volumes:{tmp_path}?plane={plane}")
        found = np.stack([source[i]["mask"] for i in range(len(source))])
        assert np.array_equal(from_plane(found, plane), labels)
    path.unlink()
    segmentation(tmp_path / "masks/p1/scan/1.dcm", labels)
    assert read_segmentation_source(f"volumes:{tmp_path}")[0]["mask"].max() == 2
    with pytest.raises(UserError, match="it belongs into masks/"):
        volumes.load_volume([tmp_path / "masks/p1/scan/1.dcm"])


def test_segmentation_objects_that_do_not_fit(tmp_path, rng):
    labels = np.zeros((4, 5, 6), int)
    labels[2, 1:3, 1:3] = 1
    grid = volumes.load_volume(series(tmp_path / "image", labels.astype(np.uint8))).grid
    empty = pydicom.Dataset()
    for values, reason in (
        ({"SegmentationType": "FRACTIONAL"}, "of type FRACTIONAL"),
        ({"SegmentationType": None}, r"of type \(none\)"),
        ({"NumberOfFrames": 3}, "3 frames, and 1 of them"),
        ({"NumberOfFrames": 10**9}, "frames"),
        ({"Rows": 60_000, "Columns": 60_000}, "over the limit"),
        ({"SharedFunctionalGroupsSequence": None}, "does not say where it lies"),
        ({"PerFrameFunctionalGroupsSequence": pydicom.Sequence([empty])}, "of no segment"),
        ({"PixelData": b""}, "can't be read"),
    ):
        path = segmentation(tmp_path / "a.dcm", labels, **values)
        with pytest.raises(UserError, match=reason) as error:
            volumes.dicom_seg.read_segmentation(path, grid)
        assert "\n" not in str(error.value)
    path = segmentation(tmp_path / "a.dcm", labels)
    assert np.array_equal(volumes.dicom_seg.read_segmentation(path, grid), labels)
    for moved, reason in ((0.5, "does not lie on the grid"), (60, "outside of its image")):
        affine = grid.affine.copy()
        affine[0, 3] += moved
        with pytest.raises(UserError, match=reason):
            volumes.dicom_seg.read_segmentation(path, Grid(grid.shape, affine))
    with pytest.raises(UserError, match="states no place"):
        volumes.dicom_seg.read_segmentation(path, Grid(grid.shape, grid.affine, False))


@pytest.mark.long
def test_pydicoms_own_files():
    """All of them read, or refused in one line."""
    root = Path(pydicom.__file__).parent / "data"
    read = 0
    reasons = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix in (".dcm", ""):
            try:
                volumes.dicom.read_dicom([path])
                read += 1
            except UserError as error:
                reasons.append(str(error))
    refused = len(reasons)
    assert not [reason for reason in reasons if "\n" in reason]
    assert read >= 80
    assert refused >= 60  # without pixels, most of them


# --- TIFF ---------------------------------------------------------------------------------------


LAYOUTS = [
    ("u1", (7, 9), {}), ("u2", (7, 9), {}), ("i2", (7, 9), {}), ("u4", (7, 9), {}),
    ("f4", (7, 9), {}), ("f8", (7, 9), {}),
    ("u2", (7, 9, 3), {"photometric": "rgb"}),
    ("u2", (3, 7, 9), {"photometric": "rgb", "planarconfig": "separate"}),
    ("u2", (7, 9, 5), {"photometric": "minisblack", "planarconfig": "contig"}),
    ("u2", (5, 7, 9), {"photometric": "minisblack", "planarconfig": "separate"}),
    ("u2", (4, 7, 9), {"photometric": "minisblack"}),
    ("u2", (7, 9), {"photometric": "miniswhite"}),
    ("u2", (33, 49), {"tile": (16, 16), "compression": "deflate"}),
    ("u2", (33, 49), {"rowsperstrip": 5, "compression": "deflate", "predictor": False}),
]  # fmt: skip


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x[0]}-{x[1]}-{len(x[2])}")
def test_tiff_layouts(layout, order, tmp_path, rng):
    kind, shape, how = layout
    array = rng.integers(0, 120, shape).astype(kind)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, byteorder=order, **how)
    volume = volumes.load_volume([path])
    expected = array
    if how.get("planarconfig") == "separate":
        expected = np.moveaxis(array, 0, -1)
    expected = (
        expected if how.get("photometric") == "minisblack" and shape[0] == 4 else (expected[None])
    )
    assert np.array_equal(volume.values(), expected)
    assert volume.inverted == (how.get("photometric") == "miniswhite")


def test_tiffs_that_are_refused(tmp_path, rng):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        for _ in range(2):
            tiff.write(np.zeros((4, 5), np.uint8), metadata=None)
            tiff.write(np.zeros((6, 7), np.uint8), metadata=None)
    found = []
    for write, reason in (
        (lambda: None, ""),
        (lambda: tifffile.imwrite(path, np.zeros((4, 5), "c8")), "complex"),
        (lambda: path.write_bytes(b"II*\0" + b"\xff" * 60), "not readable"),
        (lambda: path.write_bytes(b"MM\0*"), "not readable"),
        (lambda: path.write_bytes(b""), "not readable"),
        (lambda: tifffile.imwrite(path, np.zeros((2, 3, 2, 4, 5), "u1"), imagej=True), "axes"),
        (
            lambda: tifffile.imwrite(
                path, np.zeros((4, 5), "u1"), colormap=np.zeros((3, 256), "u2"), photometric=3
            ),
            "PALETTE",
        ),
    ):
        write()
        with pytest.raises(UserError, match=reason or None) as error:
            volumes.load_volume([path])
        found.append(str(error.value))
    assert not [text for text in found if "\n" in text]


def test_a_tiff_that_claims_a_huge_image(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((4, 5), np.uint8))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["ImageWidth"].overwrite(16_000)
        tiff.pages[0].tags["ImageLength"].overwrite(60_000)
    with pytest.raises(UserError, match="over the limit"):
        volumes.load_volume([path])


# --- as data ------------------------------------------------------------------------------------


def test_slices_as_images(tmp_path, rng):
    """Windowed, with masks in step, in each plane; percentiles; neighbors; a part."""
    image = rng.integers(-1000, 1000, SHAPE).astype(np.int16)
    mask = (image > 0).astype(np.uint8)
    folder = dataset_of(tmp_path, image, mask)
    spec = f"volumes:{folder}?window=-500:500"
    source = pickle.loads(pickle.dumps(read_segmentation_source(spec)))
    assert source.class_names == ("outside", "brain")
    assert len(source) == SHAPE[2]
    lps = image[::-1, ::-1].T
    expected = np.rint(np.clip((lps + 500.0) / 1000, 0, 1) * 255)
    for z in range(4):
        example = source[z]
        assert np.array_equal(example["image"], np.repeat(expected[z, ..., None], 3, -1))
        assert np.array_equal(example["mask"], lps[z] > 0)
    assert source.example_name(2).endswith("images/one[axial 2]")
    coronal = read_segmentation_source(f"{spec}&plane=coronal&slices=1:4&neighbors=1")
    assert len(coronal) == 3
    assert np.array_equal(coronal[0]["image"][..., 0], expected[::-1, 0])
    assert np.array_equal(coronal[0]["image"][..., 2], expected[::-1, 2])
    assert np.array_equal(coronal[0]["mask"], lps[::-1, 1] > 0)
    parts = read_segmentation_source(f"{spec}&slices=0:1,2:4")
    assert parts.reader.slice.tolist() == [0, 2, 3]
    stamps = [part.stamp(row) for part in (parts.reader, parts.masks) for row in range(3)]
    assert len(set(stamps)) == 6
    percent = read_segmentation_source(f"volumes:{folder}?window=10%:90%")
    low, high = np.percentile(image, [10, 90])
    expected = np.rint(np.clip((lps - low) / (high - low), 0, 1) * 255)
    assert np.array_equal(percent[1]["image"][..., 0], expected[1])
    with pytest.raises(UserError, match="say which become black and white"):
        read_segmentation_source(f"volumes:{folder}")[0]


def test_patients_stay_whole(tmp_path, rng):
    for patient, scan in (("a", "1"), ("a", "2"), ("b", "1"), ("c", "1")):
        for kind in ("images", "masks"):
            voxels = rng.integers(0, 2, SHAPE).astype(np.uint8)
            nifti(tmp_path / kind / patient / f"{scan}.nii.gz", voxels)
    (tmp_path / "classes.json").write_text('["outside", "brain"]')
    source = read_segmentation_source(f"volumes:{tmp_path}")
    assert len(source) == 16
    for seed in range(5):
        train, held_out = split_segmentation_source(source, 0.3, seed)
        apart = [
            {source.reader.cases[source.reader.of[row]].patient for row in part.rows}
            for part in (train, held_out)
        ]
        assert not apart[0] & apart[1]


def test_a_series_with_a_nifti_mask(tmp_path, rng):
    """The grids agree though one file counts from the right and the other from the left."""
    array = rng.integers(0, 99, (4, 5, 6)).astype(np.uint8)
    series(tmp_path / "images/p1/scan", array)
    affine = np.diag([-2.0, -3.0, 4.0, 1.0])
    affine[:3, 3] = [10, 20, 0]
    labels = (array > 50).astype(np.uint8)
    nifti(tmp_path / "masks/p1/scan.nii.gz", labels.T, affine)
    (tmp_path / "classes.json").write_text('["outside", "brain"]')
    source = read_segmentation_source(f"volumes:{tmp_path}")
    assert np.array_equal(source[2]["mask"], labels[2])
    assert np.array_equal(source[2]["image"][..., 1], array[2])
    affine[0, 3] = 12
    nifti(tmp_path / "masks/p1/scan.nii.gz", labels.T, affine)
    with pytest.raises(UserError, match="2 mm beside its image"):
        read_segmentation_source(f"volumes:{tmp_path}")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("windw=0:1", "did you mean `window`"),
        ("window=5:1", "a low and a higher"),
        ("window=1", "LOW:HIGH"),
        ("window=0%:9", "LOW:HIGH"),
        ("window=0%:101%", "a low and a higher"),
        ("window=0:1e40", "a low and a higher"),
        ("plane=oblique", "axial, coronal"),
        ("slices=3:3", "FIRST:END"),
        ("slices=-1:3", "FIRST:END"),
        ("slices=0:2,1:3", "each after the one before"),
        ("slices=0:99", "has 4 axial slices"),
        ("neighbors=2", "0 or 1"),
    ],
)
def test_bad_options(query, reason, tmp_path):
    folder = dataset_of(tmp_path, np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8))
    with pytest.raises(UserError, match=reason):
        read_segmentation_source(f"volumes:{folder}?{query}")


def test_masks_that_do_not_fit(tmp_path):
    image = np.zeros(SHAPE, np.uint8)
    folder = dataset_of(tmp_path, image, image[:-1])
    with pytest.raises(UserError, match=r"4 × 5 × 5 voxels, and its image .* has 4 × 5 × 6"):
        read_segmentation_source(f"volumes:{folder}")
    nifti(folder / "masks/one.nii.gz", image + 7)
    with pytest.raises(UserError, match="120 pixels of the value 7"):
        read_segmentation_source(f"volumes:{folder}")[0]
    (folder / "masks/one.nii.gz").rename(folder / "masks/two.nii.gz")
    with pytest.raises(UserError, match="no mask has the name"):
        read_segmentation_source(f"volumes:{folder}")
    with pytest.raises(UserError, match="no such folder"):
        read_segmentation_source(f"volumes:{folder}/none")


def test_a_damaged_volume_is_skipped(tmp_path, rng):
    """Its voxels, that is; a header that can't be read stops all."""
    image = rng.integers(0, 200, (30, 30, 4)).astype(np.uint8)
    folder = dataset_of(tmp_path, image, (image > 99).astype(np.uint8))
    path = folder / "images/one.nii.gz"
    source = read_segmentation_source(f"volumes:{folder}")
    path.write_bytes(path.read_bytes()[:2000])
    for z in range(2):
        with pytest.raises(DamagedImageError, match=r"one\.nii\.gz"):
            source[z]


def test_the_doctor_says_when_a_split_leaks(tmp_path, rng, capsys):
    big = rng.integers(0, 200, (16, 16, 40)).astype(np.uint8)
    folder = dataset_of(tmp_path / "x", big, (big > 99).astype(np.uint8))  # 4 mm a slice

    def says(first: str, second: str) -> str:
        one, other = (f"volumes:{folder}?slices={part}" for part in (first, second))
        doctor([one, "--segmentation", f"--against={other}"])
        return " ".join(capsys.readouterr().out.split())

    assert "volume-leak: 11 of 20 images" in says("0:20", "10:40")
    assert "volume-leak: 1 of 20 images" in says("0:20", "20:40")
    clean = says("0:20", "24:40")
    assert "volume-leak" not in clean
    assert "one-volume: 1 of 1 volume" in clean
    for patient in ("a", "b"):
        for part in ("p", "q"):
            for kind, voxels in (("images", big), ("masks", (big > 99).astype(np.uint8))):
                noise = rng.integers(0, 200, big.shape).astype(np.uint8)
                voxels = noise if kind == "images" else voxels
                nifti(tmp_path / part / kind / patient / f"{part}.nii.gz", voxels)
            (tmp_path / part / "classes.json").write_text('["outside", "brain"]')
    doctor([f"volumes:{tmp_path}/p", "--segmentation", f"--against=volumes:{tmp_path}/q"])
    assert "patient-leak: 2 of 2 patients" in " ".join(capsys.readouterr().out.split())


def test_files_that_are_written_again_are_read_again(tmp_path, rng):
    """In one process, as in a notebook; what is kept in memory is of bounded size."""
    voxels = rng.integers(0, 200, SHAPE).astype(np.uint8)
    folder = dataset_of(tmp_path, voxels, np.zeros(SHAPE, np.uint8))
    assert not read_segmentation_source(f"volumes:{folder}")[0]["mask"].any()
    nifti(folder / "masks/one.nii.gz", np.ones(SHAPE, np.uint8))
    nifti(folder / "images/one.nii.gz", voxels + 1)
    again = read_segmentation_source(f"volumes:{folder}")[0]
    assert again["mask"].all()
    assert np.array_equal(again["image"][..., 0], (voxels[::-1, ::-1].T + 1)[0])
    small = volumes._Cache(100)
    for i in range(5):
        assert small.get(i, lambda i=i: np.full(60, i, np.uint8))[0] == i
    assert small._size == 60


def test_a_file_of_an_image_is_what_it_shows(tmp_path, rng):
    folder = dataset_of(
        tmp_path, rng.integers(0, 200, SHAPE).astype(np.uint8), np.zeros(SHAPE, np.uint8)
    )
    reader = read_segmentation_source(f"volumes:{folder}").reader
    with Image.open(io.BytesIO(reader.encoded(1))) as image:
        assert np.array_equal(np.asarray(image), reader.read(1))
    assert reader.stamp(0) != reader.stamp(1)


@pytest.mark.parametrize("kind", ["dicom", "nrrd", "nifti"])
def test_predicted_labels_lie_where_the_volume_does(kind, tmp_path, rng):
    """As NIfTI of the same grid, found among the volumes of a folder."""
    voxels = rng.integers(0, 255, (3, 5, 4)).astype(np.uint8)
    folder = tmp_path / "in"
    folder.mkdir()
    if kind == "dicom":
        (folder / "scan.v2").mkdir()
        series(folder / "scan.v2", voxels.astype(np.int16))
    elif kind == "nrrd":
        axes = np.array([[0, 0, 2.5], [0, -1.5, 0], [0.5, 0, 0]])
        place = {"space": "RAS", "space directions": axes, "space origin": [1, 2, 3]}
        pytest.importorskip("nrrd").write(str(folder / "scan.v2.nrrd"), voxels, header=place)
    else:
        nifti(folder / "scan.v2.nii.gz", voxels, np.diag([-2.0, 1.0, 3.0, 1.0]))
    [path] = volumes.find_volumes(folder)
    assert volumes.is_volume(path)
    reader = volumes.volume_alone(path, "volumes:elsewhere?window=0:255&slices=1:2")
    [case] = reader.cases
    assert case.name == "scan.v2"
    assert len(reader.slice) == case.grid.shape[0]
    labels = rng.integers(0, 3, case.grid.shape).astype(np.uint8)
    written = volumes.load_volume([volumes.write_labels(tmp_path, "0000_scan", reader, labels)])
    np.testing.assert_array_equal(written.values(), labels)
    np.testing.assert_allclose(written.grid.affine, case.grid.affine, atol=1e-5)
    assert written.grid.oriented


def test_predicted_labels_of_a_tiff_are_a_tiff(tmp_path, rng):
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, rng.integers(0, 2**16, (3, 5, 4)).astype(np.uint16))
    reader = volumes.volume_alone(path, "volumes:elsewhere?window=0:65535")
    labels = rng.integers(0, 3, (3, 5, 4)).astype(np.uint8)
    written = volumes.write_labels(tmp_path, "0000_stack", reader, labels)
    np.testing.assert_array_equal(tifffile.imread(written), labels)
    with pytest.raises(UserError, match="no volume, and the model was trained on volumes"):
        volumes.volume_alone(tmp_path / "photo.png", "volumes:elsewhere?window=0:9")
    with pytest.raises(UserError, match="the model was trained on images"):
        volumes.volume_alone(path, "folder")


def test_grids_know_their_volume():
    grid = Grid((4, 5, 6), np.diag([2.0, 3.0, 4.0, 1.0]))
    assert grid.voxel_ml == pytest.approx(0.024)
    assert Grid((4, 5, 6), np.eye(4), measured=False).voxel_ml is None


@pytest.mark.parametrize("package", ["nibabel", "nrrd", "pydicom", "tifffile"])
def test_a_package_that_is_missing(package, tmp_path, monkeypatch):
    """The line says what to install."""
    names = {"nibabel": "a.nii.gz", "nrrd": "a.nrrd", "pydicom": "a.dcm", "tifffile": "a.tif"}
    path = tmp_path / names[package]
    path.write_bytes(b"NRRD0004\n\n" + b"x" * 400)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'vision_jax\[medical\]'"):
        volumes.load_volume([path])


def test_the_script_that_fetches_a_head(tmp_path, rng, monkeypatch):
    """Out of a Debian package of our own: 8 voxels are one, in the same place."""
    monkeypatch.syspath_prepend(runs.ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("script", runs.ROOT / "scripts/fetch_colin27.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    head = rng.integers(0, 256, (9, 8, 7)).astype(np.uint8)
    brain = np.where(head > 128, head, 0).astype(np.uint8)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = [-4, -5, -6]
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, voxels in zip(script.FILES, (head, brain), strict=True):
            content = nifti(tmp_path / name, voxels, affine).read_bytes()
            monkeypatch.setitem(script.FILES, name, hashlib.sha256(content).hexdigest())
            entry = tarfile.TarInfo(f"./{script.FOLDER}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    package = tmp_path / "a.deb"
    parts = [(b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", None)]
    content = b"!<arch>\n"
    for name, own in parts:
        own = data.getvalue() if own is None else own
        content += name.ljust(48) + str(len(own)).encode().ljust(10) + b"`\n" + own
        content += b"\n" * (len(own) % 2)
    package.write_bytes(content)
    folder = script.fetch(tmp_path / "out", package)
    source = read_segmentation_source(f"volumes:{folder}")
    case = source.reader.cases[0]
    assert case.grid.shape == (3, 4, 4)
    assert np.allclose(case.grid.spacing_mm, 2)
    volume = volumes.load_volume(case.paths)
    corner = head[:2, :2, :2].mean()  # right, front and feet: the last of x and y here
    assert volume.values()[0, -1, -1] == np.rint(corner)
    assert np.allclose(case.grid.affine @ [3, 3, 0, 1], [3.5, 4.5, -5.5, 1])
    monkeypatch.setitem(script.FILES, "ch2.nii.gz", "0" * 64)
    with pytest.raises(SystemExit, match=r"ch2\.nii\.gz is not the file"):
        script.fetch(tmp_path / "again", package)
    for odd in (b"x", b"!<arch>\n"):
        package.write_bytes(odd)
        with pytest.raises(SystemExit, match=r"no Debian package|no data"):
            script.fetch(tmp_path / "again", package)


def test_the_script_that_fetches_tumors(tmp_path, monkeypatch):
    """Out of a package of our own: two folders of two patients; another package is refused."""
    spec = importlib.util.spec_from_file_location("script", runs.ROOT / "scripts/fetch_tumours.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    package = tmp_path / "package.tar.gz"
    with tarfile.open(package, "w:gz") as archive:
        for name in ("brain1", "brain2", "lung1", "lung2"):
            for kind in ("image", "label"):
                member = tarfile.TarInfo(f"pyradiomics-3.0.1/data/{name}_{kind}.nrrd")
                content = f"{name} {kind}".encode()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with pytest.raises(SystemExit, match="its sha256 differs"):
        script.fetch(tmp_path / "out", package)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(script, "DIGEST", hashlib.sha256(package.read_bytes()).hexdigest())
    script.fetch(tmp_path / "out", package)
    assert (tmp_path / "out/lung/masks/lung2.nrrd").read_bytes() == b"lung2 label"
    assert (tmp_path / "out/brain/images/brain1.nrrd").read_bytes() == b"brain1 image"
    assert json.loads((tmp_path / "out/brain/classes.json").read_text())["1"] == "tumor"
