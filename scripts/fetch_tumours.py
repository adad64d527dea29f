"""Fetch four patients with a tumour and its mask, for configs/segment_tumour.py.

    python scripts/fetch_tumours.py OUT_DIR [--package=FILE.tar.gz]

Two heads in MR and two chests in CT are test data of PyRadiomics 3.0.1 (BSD-3), in its source
package (34 MB) alone. pip downloads it from the index that it is set up with, checks its sha256,
and then runs the package's setup.py for its metadata; who does not want that gets the file in
another way and passes it, whose sha256 is checked too. Nothing of it lies in this repository.

`OUT_DIR/brain` and `OUT_DIR/lung` are each a folder for `volumes:`, with the patients 1 and 2.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "pyradiomics==3.0.1"
DIGEST = "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5"
DATA = "pyradiomics-3.0.1/data"
KINDS = {"image": "images", "label": "masks"}
PATIENTS = ("brain1", "brain2", "lung1", "lung2")


def fetch(folder: Path, package: Path | None = None) -> Path:
    """Writes the files into a folder; returns it.

    Raises:
      SystemExit: the package is not to be had, or another one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file = package or download(Path(temporary))
        if hashlib.sha256(file.read_bytes()).hexdigest() != DIGEST:
            raise SystemExit(f"{file} is not the package that was checked: its sha256 differs")
        with tarfile.open(file) as archive:
            for patient in PATIENTS:
                for kind, place in KINDS.items():
                    member = archive.extractfile(f"{DATA}/{patient}_{kind}.nrrd")
                    assert member is not None
                    path = folder / patient[:-1] / place / f"{patient}.nrrd"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(member.read())
    for part in sorted({patient[:-1] for patient in PATIENTS}):
        classes = {"0": "around", "1": "tumor"}
        (folder / part / "classes.json").write_text(json.dumps(classes) + "\n")
    return folder


def download(folder: Path) -> Path:
    """The source package, by the pip of this Python."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{DIGEST}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary=:all:", "--no-build-isolation", "--dest", str(folder)]
    result = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True)
    files = [*folder.glob("pyradiomics*.tar.gz")]
    if result.returncode or not files:
        reason = (result.stderr.strip().splitlines() or ["no file"])[-1]
        raise SystemExit(
            f"pip could not deliver {PACKAGE} ({reason}): pip install setuptools numpy, or get"
            " pyradiomics-3.0.1.tar.gz and pass --package=FILE"
        )
    return files[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--package", type=Path, help="the .tar.gz, instead of the download")
    arguments = parser.parse_args()
    print(f"wrote {fetch(arguments.out_dir, arguments.package)}")


if __name__ == "__main__":
    main()
