"""Annotations in the making, the problems met so far, and the files that they are read from."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_jax.data.annotation_formats.values import is_text, short
from vision_jax.data.folders import Inside, list_files
from vision_jax.data.sources import IMAGE_SUFFIXES, ArrayReader, TfdsReader
from vision_jax.errors import UserError
from vision_jax.files import read_text

IMAGES = IMAGE_SUFFIXES - {".npy"}


@dataclass(frozen=True)
class Problem:
    """One thing that makes annotations unusable.

    `kind`: "entry" (a value is missing, of the wrong type or not finite), "id" (given twice),
    "image" or "category" (an id that isn't declared), "path" (leads out of the folder), "missing"
    (no such image file), "size" (stated twice, differently), "file" (one of many can't be read) or
    "unreadable" (an image, which training skips and counts like any damaged one). `value` is the id
    or path in question.
    """

    kind: str
    place: str
    text: str
    value: Any = None


class Reading:
    """Annotations in the making, and the problems met so far."""

    def __init__(self, spec: str, folder: Path, entry_form: str, files: Iterable[str] = ()):
        self.spec, self.folder, self.entry_form, self.files = spec, folder, entry_form, list(files)
        self.problems: list[Problem] = []
        self.records: TfdsReader | ArrayReader | None = None
        self.paths: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.images: dict[int | str, int] = {}  # id -> row
        self.categories: dict[int | str, int] = {}
        self.names: list[tuple[str, str]] = []  # and supercategories
        self.box_image, self.box_category, self.entries = array("i"), array("i"), array("i")
        self.boxes, self.area = array("d"), array("d")
        self.crowd = bytearray()
        self.inside = Inside(folder)
        self._stated: dict[str, str] = {}  # path -> how the file spells it

    def complain(self, kind: str, place: str, text: str, value: Any = None) -> None:
        self.problems.append(Problem(kind, place, text, value))

    def add_image(self, image_id: int | str, path: str, height: int, width: int) -> int:
        self.images[image_id] = len(self.paths)
        self.paths.append(path)
        self.sizes.append((height, width))
        return len(self.paths) - 1

    def category(self, category_id: int | str, name: str | None = None, parent: str = "") -> int:
        """The category's row; a new one, named by its id unless named, where there is none."""
        if category_id not in self.categories:
            self.categories[category_id] = len(self.names)
            self.names.append((str(category_id) if name is None else name, parent))
        return self.categories[category_id]

    def add_box(
        self,
        image: int,
        category: int,
        box: Sequence[float],
        entry: int,
        area: float | None = None,
        crowd: bool = False,
    ) -> None:
        self.box_image.append(image)
        self.box_category.append(category)
        self.boxes.extend(box)
        self.entries.append(entry)
        self.area.append(box[2] * box[3] if area is None else area)
        self.crowd.append(crowd)

    def check_path(self, place: str, path: Any, *, by_end: bool = False) -> str | None:
        """The path of what `path` means, if it stays inside the folder; see `Inside.locate`.

        A path of the right form is one whether or not there is such a file.
        """
        if not is_text(path) or "\0" in path:
            self.complain("entry", place, f"file_name {short(path)}: give the image's path")
            return None
        found, verdict = self.inside.locate(path, by_end=by_end)
        if verdict == "elsewhere":
            advice = f"use a path relative to {self.folder}, without `..`"
            self.complain("path", place, f"{short(path)}: {advice}", path)
            return None
        if verdict == "outside":
            self.complain("path", place, f"{short(path)} leads out of {self.folder}", path)
            return None
        if verdict == "missing":
            self.complain("missing", place, f"{short(path)}: no such file in {self.folder}", path)
        if self._stated.setdefault(found, path) != path:
            both = f"{short(self._stated[found])} and {short(path)}"
            self.complain("path", place, f"{both} would both be {short(found)}", path)
            return None
        return found

    def check_category(
        self, place: str, category_id: int | str, declared: frozenset[int | str]
    ) -> None:
        if declared and category_id not in declared:
            text = f"category_id {short(category_id)} is not in `categories`"
            self.complain("category", place, text, category_id)


def one_line(text: str) -> UserError:
    return UserError(" ".join(text.splitlines()))  # names in hostile files may hold line breaks


def read_lines(path: Path) -> list[str]:
    """Lines that aren't blank."""
    return [line for line in read_text(path).splitlines() if line.strip()]


def find_files(folder: Path, suffixes: Iterable[str]) -> list[str]:
    """Files inside the folder with one of the suffixes, relative to it, sorted; none hidden."""
    return sorted(list_files(folder, suffixes)[0])
