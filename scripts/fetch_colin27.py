"""Fetch Colin27, the head of one man in MR (T1), with its brain as the mask, for segment_brain.py.

    python scripts/fetch_colin27.py OUT_DIR [--package=FILE.deb | --templates=DIR]

Debian's package `mricron-data` (16 MB) carries both, and so does an installed MRIcron, in
/usr/share/mricron/templates. It is fetched by `apt-get download`, which needs Debian, Ubuntu or the
like with its mirrors in reach; who has none takes mricron-data_1.2.20211006+dfsg-4_all.deb from any
mirror or another machine and passes --package. Both files are checked by their sha256. MRIcron is
under the BSD license, the atlas is for research, and neither lies in this repository.

`images/colin27.nii.gz` and `masks/colin27.nii.gz`, both of 2 mm, and `classes.json` are written.
An image's voxel is the mean of 8, a mask's is brain where half of the 8 are: its file is the same
head with all else set to 0.
"""

import argparse
import gzip
import hashlib
import json
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from debian_package import download, unpack

PACKAGE = "mricron-data"
FOLDER = "usr/share/mricron/templates"
FILES = {
    "ch2.nii.gz": "a009051127f64dc3dd554d5f5b589870ea72106d9642c21b4e7093e478cfc309",
    "ch2bet.nii.gz": "592a2d20abdf36eefcb540ca8958428040edffc1bc1a18ba1dcfbabac77c5dd1",
}


def fetch(folder: Path, package: Path | None = None, templates: Path | None = None) -> Path:
    """Writes the files into a folder; returns it.

    Raises:
      SystemExit: the package is not to be had, or the files are not what they were.
    """
    if templates is not None:
        found = {name: (templates / name).read_bytes() for name in FILES}
    else:
        with tempfile.TemporaryDirectory() as temporary:
            package = package or download(PACKAGE, Path(temporary))
            members = unpack(package, [f"{FOLDER}/{name}" for name in FILES])
            found = {name: members[f"{FOLDER}/{name}"] for name in FILES}
    for name, digest in FILES.items():
        if hashlib.sha256(found[name]).hexdigest() != digest:
            raise SystemExit(f"{name} is not the file that was checked: its sha256 differs")
    head, brain = (load(found[name]) for name in FILES)
    affine = nibabel.Nifti1Image.from_bytes(gzip.decompress(found["ch2.nii.gz"])).affine
    coarse = affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    coarse[:3, 3] += 0.5 * affine[:3, :3].sum(1)  # the middle of the 8 voxels
    image = np.rint(blocks(head).mean(-1)).astype(np.uint8)
    mask = (blocks(brain > 0).mean(-1) >= 0.5).astype(np.uint8)
    for kind, voxels in (("images", image), ("masks", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        volume = nibabel.Nifti1Image(voxels, coarse)
        volume.header.set_xyzt_units("mm")
        nibabel.save(volume, folder / kind / "colin27.nii.gz")
    (folder / "classes.json").write_text(json.dumps({"0": "outside", "1": "brain"}) + "\n")
    return folder


def load(packed: bytes) -> np.ndarray:
    """u8[181, 217, 181]."""
    return np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(packed)).dataobj)


def blocks(voxels: np.ndarray) -> np.ndarray:
    """[x, y, z] as [x / 2, y / 2, z / 2, 8]; an odd last plane is left out."""
    x, y, z = (side // 2 for side in voxels.shape)
    cut = voxels[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(x, y, z, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--package", type=Path, help="the .deb, instead of the download")
    parser.add_argument("--templates", type=Path, help="the folder of an installed MRIcron")
    arguments = parser.parse_args()
    print(f"wrote {fetch(arguments.out_dir, arguments.package, arguments.templates)}")


if __name__ == "__main__":
    main()
