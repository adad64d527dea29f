"""Voxels of NIfTI, DICOM and TIFF against SimpleITK's and OpenCV's, or refused by name."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from vision_jax.data.volumes.dicom import _read_pixels, read_dicom
from vision_jax.data.volumes.nifti import read_nifti
from vision_jax.data.volumes.tiff import read_tiff
from vision_jax.errors import UserError

cv2 = pytest.importorskip("cv2")
nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
tifffile = pytest.importorskip("tifffile")
itk = pytest.importorskip("SimpleITK")

# What the two readers mean otherwise, each seen by hand.
INVERTED = {"6154", "6247", "6278"}  # MONOCHROME1, which SimpleITK turns around
# SimpleITK reads big-endian doses of 32 bits as little-endian, and mixes the bytes of RLE colors of
# 16 bits: the first bar of that file is red, as that of its twin of 8 bits, and here 0, 65280, 255.
WRONG_THERE = {"rtdose_expb.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_16bit_2frame.dcm"}


@pytest.mark.filterwarnings("ignore")
def test_pydicoms_files_equal_simpleitk():
    """Of all files in pydicom's wheel that hold an image: 80 and more equal, none that differs."""
    itk.ProcessObject_SetGlobalWarningDisplay(False)
    equal, refused = [], []
    for path in sorted((Path(pydicom.__file__).parent / "data").rglob("*")):
        if not path.is_file() or path.suffix not in (".dcm", ""):
            continue
        try:
            volume = read_dicom([path])
        except UserError as error:
            refused.append(str(error))
            continue
        try:
            expected = itk.GetArrayFromImage(itk.ReadImage(str(path)))
        except RuntimeError:  # deflated and 32-bit files of one frame
            continue
        pixels = _read_pixels(path)
        found = pixels.stored * pixels.slope + pixels.intercept
        expected = expected.astype(np.float64).reshape(found.shape)
        if path.name in INVERTED:
            assert volume.inverted
            assert np.ptp(found + expected) < 1e-9 * np.abs(found).max()
        elif path.name not in WRONG_THERE:
            assert np.array_equal(found, expected), path
            equal.append(path.name)
    assert len(equal) >= 80
    assert not [text for text in refused if "\n" in text]


@pytest.mark.parametrize("seed", range(20))
def test_nifti_equals_simpleitk(seed, tmp_path, rng):
    """Values and places, of random affines along the axes and oblique ones."""
    axes = rng.permutation(np.eye(3)) * rng.choice([-1, 1], 3)
    if seed % 2:
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        axes = axes @ turn
    affine = np.eye(4)
    affine[:3, :3] = axes * rng.uniform(0.5, 4, 3)
    affine[:3, 3] = rng.uniform(-90, 90, 3)
    array = rng.integers(-900, 900, (5, 6, 7)).astype(rng.choice(["i2", "i4", "f4"]))
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = read_nifti(tmp_path / "a.nii.gz")
    theirs = itk.ReadImage(str(tmp_path / "a.nii.gz"))
    values = volume.values()
    for z, y, x in itertools.product(*(range(0, side, 2) for side in values.shape)):
        place = (volume.grid.affine @ [x, y, z, 1])[:3]  # SimpleITK counts to the left and back too
        index = theirs.TransformPhysicalPointToIndex(place.tolist())
        assert theirs.GetPixel(index) == values[z, y, x]
        assert np.allclose(theirs.TransformIndexToPhysicalPoint(index), place, atol=1e-3)


KINDS = ("u1", "u2", "i2", "u4", "i4", "f4", "f8")
PLANES = ((None, ()), ("contig", (3,)), ("separate", (3,)), ("contig", (4,)))
CODINGS = (None, "deflate", "lzw", "packbits", "zstd")


@pytest.mark.filterwarnings("ignore")
def test_500_layouts_of_tiff(tmp_path, rng):
    """What was written comes back, whatever the layout; OpenCV agrees where it reads the kind."""
    path, compared, count = tmp_path / "a.tif", 0, 0
    for kind, (planar, channels), coding, order, tiled in itertools.product(
        KINDS, PLANES, CODINGS, "<>", (False, True)
    ):
        side = rng.integers(17, 60, 2).tolist()
        shape = (*channels, *side) if planar == "separate" else (*side, *channels)
        array = rng.integers(0, 120, shape).astype(kind)
        rgb = channels == (3,) and kind in ("u1", "u2")
        grey = rng.choice(["minisblack", "miniswhite"]) if kind[0] == "u" else "minisblack"
        how = {"photometric": "rgb" if rgb else grey, "compression": coding, "byteorder": order}
        how |= {"planarconfig": planar} if planar else {}
        how |= {"tile": (16, 16)} if tiled else {"rowsperstrip": int(rng.integers(1, 20))}
        if coding in ("deflate", "lzw", "zstd") and rng.integers(2):
            how["predictor"] = 3 if kind[0] == "f" else 2
        tifffile.imwrite(path, array, **how)
        volume = read_tiff(path)
        expected = np.moveaxis(array, 0, -1) if planar == "separate" else array
        assert np.array_equal(volume.values()[0], expected), how
        assert volume.inverted == (how["photometric"] == "miniswhite")
        count += 1
        theirs = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        simple = not channels or rgb
        if theirs is not None and theirs.dtype == array.dtype and simple and not volume.inverted:
            theirs = theirs[..., ::-1] if rgb else theirs
            if planar != "separate":  # which OpenCV reads as one plane
                assert np.array_equal(theirs, expected), how
                compared += 1
    assert count == 560
    assert compared >= 100
