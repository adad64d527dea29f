"""NRRD volumes: layouts beside SimpleITK's reader, and what is refused before it is read."""

import gzip

import numpy as np
import pytest

from vision_jax.data.volumes.nrrd import read_nrrd, read_nrrd_grid
from vision_jax.errors import UserError

nrrd = pytest.importorskip("nrrd")

HEADER = """NRRD0004
# a comment
type: short
dimension: 3
space: left-posterior-superior
sizes: 4 3 2
space directions: (0.5,0,0) (0,0.75,0) (0,0,2)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (10,20,30)
"""
VOXELS = np.arange(24, dtype="<i2")


def write(path, header=HEADER, voxels=None, changes=()):
    header += "\n"
    for old, new in changes:
        assert old in header
        header = header.replace(old, new)
    path.write_bytes(header.encode() + (VOXELS.tobytes() if voxels is None else voxels))
    return path


def test_a_volume_lies_as_its_header_says(tmp_path):
    volume = read_nrrd(write(tmp_path / "a.nrrd"))
    np.testing.assert_array_equal(volume.values(), VOXELS.reshape(2, 3, 4))
    assert volume.grid.spacing_mm == (2.0, 0.75, 0.5)
    np.testing.assert_array_equal(volume.grid.affine[:3, 3], [10, 20, 30])
    packed = write(
        tmp_path / "b.nrrd",
        voxels=gzip.compress(VOXELS.astype(">i2").tobytes()),
        changes=[("raw", "gzip"), ("little", "big"), ("\n", "\r\n")],
    )
    np.testing.assert_array_equal(read_nrrd(packed).values(), volume.values())


@pytest.mark.parametrize("space", ["right-anterior-superior", "LAS", "left-posterior-superior"])
def test_places_are_simpleitks(tmp_path, rng, space):
    """Any order and direction of the axes, by the place of each voxel in mm."""
    sitk = pytest.importorskip("SimpleITK")
    voxels = rng.integers(-3000, 3000, (5, 4, 3)).astype(np.int16)
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3) * rng.uniform(0.5, 3, 3)[:, None]
    place = {"space": space, "space directions": axes, "space origin": rng.normal(size=3) * 50}
    path = tmp_path / "a.nrrd"
    nrrd.write(str(path), voxels, header=place)
    found, image = read_nrrd(path), sitk.ReadImage(str(path))
    theirs = sitk.GetArrayFromImage(image)  # [k, j, i]
    for index in np.ndindex(*voxels.shape):
        mm = image.TransformIndexToPhysicalPoint([int(i) for i in index])
        x, y, z = np.rint(np.linalg.solve(found.grid.affine, [*mm, 1.0]))[:3].astype(int)
        assert found.values()[z, y, x] == theirs[index[::-1]] == voxels[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("NRRD0004", "XYZ")], "does not begin with NRRD"),
        ([("sizes: 4 3 2", "sizes: 4000000 3 2")], "over the limit"),
        ([("sizes: 4 3 2", "sizes: 0 3 2")], "no voxels"),
        ([("sizes: 4 3 2", "sizes: 4 3 9")], "cut short: 48 of 216 bytes"),
        ([("raw", "bzip2")], "encoding 'bzip2'"),
        ([("short", "block")], "type 'block'"),
        ([("raw\n", "raw\ndata file: ../secret.raw\n")], "voxels are elsewhere"),
        ([("raw\n", "raw\nbyte skip: -1\n")], "voxels are elsewhere"),
        ([("left-posterior-superior", "scanner-xyz")], "does not say where left"),
        ([("(0,0.75,0)", "(0,0,0)")], "have no size"),
        ([("(0,0.75,0)", "none")], "no size"),
        ([("(0,0.75,0)", "(0.4,0.75,0)")], "not at right angles"),
        ([("dimension: 3", "dimension: 2"), ("sizes: 4 3 2", "sizes: 12 2")], "2 axes"),
    ],
)
def test_what_is_refused_is_one_line(tmp_path, changes, message):
    path = write(tmp_path / "a.nrrd", changes=changes)
    with pytest.raises(UserError, match=message) as error:
        read_nrrd(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_headers_without_end_and_bombs_are_bounded(tmp_path):
    path = tmp_path / "a.nrrd"
    path.write_bytes(b"NRRD0004\n" + b"a: b\n" * 40_000)
    with pytest.raises(UserError, match="no end within 65,536 bytes"):
        read_nrrd_grid(path)
    bomb = gzip.compress(VOXELS.tobytes() + bytes(2**26))
    write(path, voxels=bomb, changes=[("raw", "gzip")])
    assert read_nrrd(path).stored.shape == (2, 3, 4)  # what follows is not unpacked
    write(path, voxels=gzip.compress(b"few"), changes=[("raw", "gzip")])
    with pytest.raises(UserError, match="cut short: 3 of 48 bytes"):
        read_nrrd(path)


def test_without_a_space_a_volume_is_as_stored(tmp_path):
    plain = [("space: left-posterior-superior\n", ""), ("space origin: (10,20,30)\n", "")]
    lines = "space directions: (0.5,0,0) (0,0.75,0) (0,0,2)\n"
    grid, note = read_nrrd_grid(
        write(tmp_path / "a.nrrd", changes=[*plain, (lines, "spacings: 0.5 0.75 2\n")])
    )
    assert (grid.oriented, grid.measured, grid.spacing_mm) == (False, True, (2.0, 0.75, 0.5))
    assert "states no orientation" in note
    grid, _ = read_nrrd_grid(write(tmp_path / "b.nrrd", changes=[*plain, (lines, "")]))
    assert (grid.oriented, grid.measured) == (False, False)
