"""Make the embedded `vision_jax/data/assets/fashion_mnist.npz`.

    python scripts/make_fashion_mnist_subset.py FOLDER

FOLDER holds the four idx.gz files of Fashion-MNIST (Xiao et al., arXiv 1708.07747) as Debian's
package `dataset-fashion-mnist` installs them (/usr/share/datasets/fashion-mnist; without root:
`dpkg -x PACKAGE.deb FOLDER`). Kept are the first 400 of each class of the training split and the
first 100 of each class of the test split, in the original order. Each file's sha256 is checked.
"""

import argparse
import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

# fmt: off
SHA256 = {
    "train-images-idx3-ubyte.gz":
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz":
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz":
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz":
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
CLASS_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip
ASSET = Path(__file__).parents[1] / "vision_jax" / "data" / "assets" / "fashion_mnist.npz"


def read_idx(path: Path) -> np.ndarray:
    """An idx file: magic 0x0000 08 rank, big-endian sizes, then the bytes."""
    compressed = path.read_bytes()
    found = hashlib.sha256(compressed).hexdigest()
    if found != SHA256[path.name]:
        raise SystemExit(f"{path}: its sha256 is {found}, not {SHA256[path.name]}")
    data = gzip.decompress(compressed)
    rank = data[3]
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions, ascending, of the first `count` examples of each class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder

    arrays = {"class_names": np.array(CLASS_NAMES)}
    for split, prefix, count in (("train", "train", 400), ("test", "t10k", 100)):
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        kept = first_of_each_class(labels, count)
        arrays[f"{split}_images"] = images[kept]
        arrays[f"{split}_labels"] = labels[kept].astype(np.int32)
    np.savez_compressed(ASSET, **arrays)
    print(f"{ASSET.name}: sha256 {hashlib.sha256(ASSET.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
