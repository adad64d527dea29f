"""A data set under examination, and one kind of defect that is found in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vision_jax.data.annotations import Annotations
from vision_jax.data.sources import Reader
from vision_jax.doctor.scan import Scan

EXAMPLES = 20  # kept of each finding

Level = Literal["error", "warning", "information"]
Training = Literal["refuses", "leaves out", "trains"]

# What training does with a data set of which this is found: it refuses all of it, leaves out (or
# cuts) what is concerned and says so, or trains on everything.
TRAINING: dict[str, Training] = {
    "unusable-entry": "refuses",
    "repeated-id": "refuses",
    "unknown-image": "refuses",
    "undeclared-category": "refuses",
    "ids-off-by-one": "refuses",
    "path-outside": "refuses",
    "missing-file": "refuses",
    "conflicting-size": "refuses",
    "unreadable-annotation": "refuses",
    "repeated-name": "refuses",
    "unknown-class": "refuses",
    "nothing-to-learn": "refuses",
    "unreadable-image": "leaves out",
    "wrong-size": "leaves out",
    "swapped-corners": "leaves out",
    "zero-area": "leaves out",
    "outside-image": "leaves out",
    "root-class": "leaves out",
    "pixels-for-shares": "leaves out",
    "corners-as-sizes": "leaves out",
    "relative-units": "trains",
    "conflicting-labels": "trains",
    "leak": "trains",
    "near-leak": "trains",
    "repeated-box": "trains",
    "exif-rotation": "trains",
    "labels-off-by-one": "trains",
    "single-class": "trains",
    "class-drift": "trains",
    "no-boxes": "trains",
    "id-holes": "trains",
    "unused-class": "trains",
    "imbalance": "trains",
    "not-referenced": "trains",
    "repeated-image": "trains",
    "near-duplicate": "trains",
    "volume-leak": "trains",
    "patient-leak": "trains",
    "one-volume": "trains",
    "reading-notes": "trains",
    "mask-values": "refuses",
    "unreadable-mask": "leaves out",
    "mask-size": "leaves out",
    "swapped-palette": "trains",
    "one-class-alone": "trains",
    "only-background": "trains",
    "class-shares": "trains",
    "rare-class": "trains",
    "nothing-ignored": "trains",
}


@dataclass(frozen=True)
class Finding:
    """One kind of defect: `count` of `of` `unit`s, what is the matter and what to do.

    `code` is its stable name. An "error" stops training or makes it learn what is false, a
    "warning" probably harms it, and "information" is no defect by itself. `examples` name files
    and entries; `images` and `boxes` are rows, for pictures (a box of -1 is none).
    """

    code: str
    level: Level
    title: str
    count: int
    of: int
    unit: str
    examples: tuple[str, ...]
    advice: str
    images: tuple[int, ...] = ()
    boxes: tuple[int, ...] = ()

    @property
    def training(self) -> Training:
        """What training does with such a data set."""
        return TRAINING[self.code]


@dataclass(frozen=True)
class Subject:
    """A data set under examination: N images, C classes.

    `shown` (image, class) rows i64[P, 2] say which classes an image shows, each once. `declared`
    are the names of the classes that count as such. Of masks `pixels` i64[N, C + 1] are those of
    each class and, last, of none.
    """

    name: str
    reader: Reader
    paths: tuple[str, ...]
    class_names: tuple[str, ...]
    shown: np.ndarray
    scan: Scan
    annotations: Annotations | None = None
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    pixels: np.ndarray | None = None

    def image(self, row: int) -> str:
        return self.paths[row]


_IRREGULAR = {"entries": "entry", "categories": "category", "classes": "class", "boxes": "box"}


def counted(count: int, unit: str) -> str:
    """

    Examples:
      >>> counted(1, "boxes"), counted(2000, "images")
      ('1 box', '2,000 images')
    """
    return f"{count:,} {_IRREGULAR.get(unit, unit.removesuffix('s')) if count == 1 else unit}"


def few(names: Sequence[str]) -> str:
    """The first five of them."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
