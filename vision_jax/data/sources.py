"""Where labelled images come from: one `Source` for all of them, read by random access.

`read_source` is the one entry. A specification is one of

    embedded:fashion_mnist/train      4,000 images in the package; /test has 1,000
    cifar10:DIR/train                 DIR holds cifar10.npz, see scripts/fetch_cifar10.py; /test
    tfds:NAME/SPLIT[@DATA_DIR]        prepared as array_record; read without TensorFlow
    FOLDER                            one folder of images per class
    FILE.csv                          a header `path,label`, paths relative to the file's folder
    FILE.jsonl                        {"path": ..., "label": ...} a line
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data.decode import MAX_BYTES, decode_image
from vision_jax.errors import UserError

ASSETS = Path(__file__).parent / "assets"
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_INTEGER_LABEL = 1_000_000  # a typing error in one label must not make 10¹² classes


@dataclass(frozen=True)
class Source:
    """Labelled images by random access: `source[i]`, 0 ≤ i < len(source). Picklable.

    `labels` int32[N] are known without reading an image. `rows` int64[N] are the positions of the
    examples in what `reader` reads, so that a part of a source is a source. `note` says what was
    left out when the source was read, for the log ("" if nothing was).
    """

    name: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    rows: np.ndarray
    reader: "ArrayReader | FileReader | TfdsReader"
    note: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"image": uint8[H, W, 3], "label": int32, "index": int32 = i}.

        Raises DamagedImageError if the image can't be read.
        """
        image = self.reader.read(int(self.rows[i]))
        return {"image": image, "label": self.labels[i], "index": np.int32(i)}

    def example_name(self, i: int) -> str:
        """What to call example i in messages: its path, or the data set and its position."""
        return self.reader.example_name(int(self.rows[i]))


def read_source(spec: str, *, class_names: tuple[str, ...] | None = None) -> Source:
    """Read the list of examples that `spec` (see the top of this file) names, but no image yet.

    With `class_names` (a training source's, or a checkpoint's) labels are positions in that tuple:
    labels are matched by name. Raises UserError for what is missing, empty, unknown or out of range.
    """
    kind, _, rest = spec.partition(":")
    if kind == "embedded":
        return _read_npz(spec, ASSETS, rest, class_names)
    if kind == "cifar10":
        return _read_cifar10(spec, rest, class_names)
    raise UserError(f"{spec}: unknown data")


def _read_cifar10(spec: str, rest: str, class_names: tuple[str, ...] | None) -> Source:
    folder, _, split = rest.rpartition("/")
    if not (Path(folder) / "cifar10.npz").is_file():
        raise UserError(
            f"{spec}: there is no {Path(folder) / 'cifar10.npz'}:"
            f" run `python scripts/fetch_cifar10.py {folder}`"
        )
    return _read_npz(spec, Path(folder), f"cifar10/{split}", class_names)


@dataclass(frozen=True)
class ArrayReader:
    """Images in memory: uint8[N, H, W] grey or uint8[N, H, W, 3]."""

    name: str
    images: np.ndarray

    def read(self, row: int) -> np.ndarray:
        image = self.images[row]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)

    def example_name(self, row: int) -> str:
        return f"{self.name}[{row}]"


def _read_npz(spec: str, folder: Path, rest: str, class_names: tuple[str, ...] | None) -> Source:
    """`rest` is STEM/SPLIT; the file holds SPLIT_images, SPLIT_labels and class_names."""
    stem, _, split = rest.partition("/")
    path = folder / f"{stem}.npz"
    if split not in ("train", "test") or not path.is_file():
        known = [f"{p.stem}/{s}" for p in sorted(folder.glob("*.npz")) for s in ("train", "test")]
        raise UserError(f"{spec}: no such data; there is {', '.join(known)}")
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        own_names = tuple(str(name) for name in arrays["class_names"])
    labels, class_names = _map_by_name(spec, labels, own_names, class_names)
    return Source(spec, class_names, labels, np.arange(len(labels)), ArrayReader(spec, images))


def _map_by_name(
    spec: str,
    labels: np.ndarray,
    own_names: tuple[str, ...],
    class_names: tuple[str, ...] | None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels into `own_names` become labels into `class_names`, where these are given."""
    if class_names is None:
        return labels.astype(np.int32), own_names
    position = {name: i for i, name in enumerate(class_names)}
    unknown = [name for name in own_names if name not in position]
    if unknown:
        raise UserError(
            f"{spec}: class {unknown[0]!r} is not among the {len(class_names)} classes of the"
            f" model ({_few(class_names)}): rename or remove it"
        )
    table = np.array([position[name] for name in own_names], np.int32)
    return table[labels], class_names


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
