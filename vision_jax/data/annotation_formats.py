"""One reader a format: what files of boxes state, and every problem in them.

The files may be hostile or merely broken. Readers bound what they read, take nothing from outside
the folders that the user named, and go on after a problem, so that all can be shown at once.
"""

import codecs
import gc
import json
import os
import re
import reprlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeGuard
from xml.etree import ElementTree

import numpy as np

try:
    import orjson
except ImportError:  # no wheel for this platform: slower, the same
    orjson = None  # type: ignore[assignment]

from vision_jax.data.decode import DamagedImageError, read_header
from vision_jax.data.folders import MOST_PARTS, Inside, leaves_its_folder, list_files
from vision_jax.data.sources import IMAGE_SUFFIXES, ArrayReader, TfdsReader, open_tfds
from vision_jax.errors import UserError
from vision_jax.files import MAX_INTEGER, expand, read_bytes, read_text, read_yaml

IMAGES = IMAGE_SUFFIXES - {".npy"}
MAX_JSON_BYTES = 2_000_000_000
MAX_SIDE = 1_000_000  # pixels
MAX_COORDINATE = 1e9
MAX_CLASSES = 100_000  # of a data.yaml that only counts them
THREADS = 8

YOLO_PLACE = "{file}: line {entry}"

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


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
        if not _is_text(path) or "\0" in path:
            self.complain("entry", place, f"file_name {_short(path)}: give the image's path")
            return None
        found, verdict = self.inside.locate(path, by_end=by_end)
        if verdict == "elsewhere":
            advice = f"use a path relative to {self.folder}, without `..`"
            self.complain("path", place, f"{_short(path)}: {advice}", path)
            return None
        if verdict == "outside":
            self.complain("path", place, f"{_short(path)} leads out of {self.folder}", path)
            return None
        if verdict == "missing":
            self.complain("missing", place, f"{_short(path)}: no such file in {self.folder}", path)
        if self._stated.setdefault(found, path) != path:
            both = f"{_short(self._stated[found])} and {_short(path)}"
            self.complain("path", place, f"{both} would both be {_short(found)}", path)
            return None
        return found


def one_line(text: str) -> UserError:
    return UserError(" ".join(text.splitlines()))  # names in hostile files may hold line breaks


def _short(value: Any) -> str:
    return reprlib.repr(value)


def read_lines(path: Path) -> list[str]:
    """Lines that aren't blank."""
    return [line for line in read_text(path).splitlines() if line.strip()]


def find_files(folder: Path, suffixes: Iterable[str]) -> list[str]:
    """Files inside the folder with one of the suffixes, relative to it, sorted; none hidden."""
    return sorted(list_files(folder, suffixes)[0])


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a text that can be written again; JSON can hold halves of characters."""
    try:
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _are_numbers(values: Any, count: int) -> bool:
    """Whether it is a list of that many finite numbers; true and false are none."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and -MAX_COORDINATE <= v <= MAX_COORDINATE for v in values)
    )


# --- JSON ---------------------------------------------------------------------------------------


def _drop_masks(entry: dict) -> dict:
    if entry.get("bbox"):
        entry.pop("segmentation", None)  # most of a COCO file
    return entry


def read_json(path: Path) -> Any:
    data = read_bytes(path, MAX_JSON_BYTES)
    has_masks = b'"segmentation"' in data
    try:
        if orjson and not has_masks:  # twice as fast, but it can't leave out what isn't needed
            with suppress(orjson.JSONDecodeError):  # a mark, UTF-16 and NaN are read below
                return orjson.loads(data)
        return json.loads(data, object_hook=_drop_masks if has_masks else None)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or "too little memory for it"
        raise UserError(f"{path}: not readable as JSON ({reason})") from error


@contextmanager
def without_collector() -> Iterator[None]:
    """No search for cycles of references: a million small dicts have none, and it takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def outline(content: Any) -> str:
    if not isinstance(content, dict):
        return "a list" if isinstance(content, list) else _short(content)
    return ", ".join(_short(key) for key in list(content)[:8]) or "nothing"


def _get_id(entry: dict, key: str) -> int | str | None:
    value = entry.get(key)
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # pandas writes whole numbers so
    if type(value) is int:
        return value if -MAX_INTEGER <= value < MAX_INTEGER else None
    return value if _is_text(value) else None


def _get_size(entry: dict) -> tuple[int, int] | None:
    """(height, width), 0 where not stated, None where it can't be meant."""
    height, width = entry.get("height"), entry.get("width")
    if type(height) is type(width) is int and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE:
        return height, width
    size = []
    for key in ("height", "width"):
        value = entry.get(key)
        if value is None:
            value = 0
        elif type(value) not in (int, float) or not 0 < value <= MAX_SIDE or value != int(value):
            return None
        size.append(int(value))
    return size[0], size[1]


def _size_fault(entry: Mapping[str, Any]) -> str:
    stated = f"width {_short(entry.get('width'))}, height {_short(entry.get('height'))}"
    return f"{stated}: give whole numbers of pixels up to {MAX_SIDE:,}"


def _dicts(reading: Reading, path: Path, content: dict, key: str) -> Iterator[tuple[str, dict]]:
    """(place, entry) of each entry that is an object."""
    for i, entry in enumerate(content[key]):
        place = f"{path}: {key}[{i}]"
        if isinstance(entry, dict):
            yield place, entry
        else:
            reading.complain("entry", place, f"{_short(entry)} is no object")


def _read_categories(reading: Reading, path: Path, content: dict) -> frozenset[int | str]:
    """The ids that are declared."""
    if content.get("categories") is None:
        return frozenset()
    if not isinstance(content["categories"], list):
        raise UserError(f"{path}: `categories` is no list")
    for place, entry in _dicts(reading, path, content, "categories"):
        category_id, name, parent = (
            _get_id(entry, "id"),
            entry.get("name"),
            entry.get("supercategory"),
        )
        if category_id is None or not _is_text(name):
            reading.complain("entry", place, "needs `id`, a number or text, and `name`, a text")
        elif category_id in reading.categories:
            reading.complain("id", place, f"id {_short(category_id)} is given twice", category_id)
        else:
            reading.category(category_id, name, parent if _is_text(parent) else "")
    return frozenset(reading.categories)


def _find_images(path: Path, names: Iterable[Any]) -> Path:
    """Beside the file, or where COCO and common tools keep images, judged by the first few."""
    parent = path.parent
    known = [
        n for n in (name for name, _ in zip(names, range(20), strict=False)) if isinstance(n, str)
    ]
    part = path.stem.rpartition("_")[2]  # instances_train2017
    for folder in (
        parent,
        parent / "images",
        parent / "data",  # FiftyOne's, beside labels.json
        parent.parent / part,
        parent.parent / "images" / part,
        parent.parent / "images",
    ):
        inside = Inside(folder)
        if any(n and "\0" not in n and inside.locate(n)[1] == "found" for n in known):
            return folder
    return parent


def read_coco(spec: str, path: Path, content: dict, images: Path | None) -> Reading:
    entries, boxes = content["images"], content["annotations"]
    folder = images or _find_images(
        path, (e.get("file_name") for e in entries if isinstance(e, dict))
    )
    reading = Reading(spec, folder, "{file}: annotations[{entry}]", [str(path)])
    declared = _read_categories(reading, path, content)
    skipped: set[int | str] = set()  # images that are declared but unusable
    for place, entry in _dicts(reading, path, content, "images"):
        image_id, size = _get_id(entry, "id"), _get_size(entry)
        if image_id is None:
            reading.complain("entry", place, f"id {_short(entry.get('id'))}: give a number or text")
            continue
        if image_id in reading.images or image_id in skipped:
            reading.complain("id", place, f"id {_short(image_id)} is given twice", image_id)
            continue
        if size is None:
            reading.complain("entry", place, _size_fault(entry))
        file_name = reading.check_path(place, entry.get("file_name"))
        if file_name is None:
            skipped.add(image_id)
        else:
            reading.add_image(image_id, file_name, *(size or (0, 0)))
    if not _add_sound_boxes(reading, boxes, declared):
        _add_boxes(reading, path, boxes, declared, skipped)
    return reading


def _add_sound_boxes(reading: Reading, entries: list, declared: frozenset[int | str]) -> bool:
    """Adds all boxes at once, column by column, if none of them is faulty or unusual in its types.

    A tenth of `_add_boxes`' time, which adds the same.
    """
    if not _of(entries, dict):
        return False
    keys = ("bbox", "image_id", "category_id", "area", "iscrowd", "id")
    boxes, image_ids, category_ids, area, crowd, own_ids = (_column(entries, key) for key in keys)
    if not _of(boxes, list) or set(map(len, boxes)) - {4}:
        return False
    numbers = list(chain.from_iterable(boxes))
    sound = (
        _of(numbers, int, float)
        and _of(area, int, float, type(None))
        and _of(image_ids, int, str)
        and _of(category_ids, int, str)
        and (_of(own_ids, type(None)) or _are_distinct(own_ids))
        and _of(crowd, int, bool, type(None))
        and set(crowd) <= {0, 1, None}
    )
    if not sound:
        return False
    images = list(map(reading.images.get, image_ids))
    used = dict.fromkeys(category_ids)
    try:
        xywh = np.fromiter(numbers, np.float64, len(numbers)).reshape(-1, 4)
        areas = np.array(area, np.float64)  # None becomes NaN
    except OverflowError:
        return False
    unknown = np.array([value is None for value in area]) if None in area else np.zeros(0, np.intp)
    areas[unknown] = xywh[unknown, 2] * xywh[unknown, 3]
    if (
        None in images
        or (declared and not used.keys() <= declared)
        or any(_get_id({"id": i}, "id") is None for i in used)
        or not (np.abs(xywh) <= MAX_COORDINATE).all()
        or not (np.abs(areas) <= 1e18).all()
    ):
        return False
    row_of = {i: reading.category(i) for i in used}
    for column, values in (
        (reading.box_image, np.array(images, np.int32)),
        (reading.box_category, np.array([row_of[i] for i in category_ids], np.int32)),
        (reading.entries, np.arange(len(entries), dtype=np.int32)),
        (reading.boxes, xywh),
        (reading.area, areas),
    ):
        column.frombytes(values.tobytes())
    reading.crowd.extend(map(bool, crowd))
    return True


def _column(entries: list[dict], key: str) -> list:
    """The key's value in each entry, None where it is missing."""
    try:
        return list(map(itemgetter(key), entries))
    except KeyError:
        return [entry.get(key) for entry in entries]


def _of(values: Iterable[Any], *types: type) -> bool:
    return set(map(type, values)) <= set(types)


def _are_distinct(ids: Sequence[Any]) -> bool:
    return _of(ids, int, str) and len(set(ids)) == len(ids)


def _add_boxes(
    reading: Reading,
    path: Path,
    entries: list,
    declared: frozenset[int | str],
    skipped: set[int | str],
) -> None:
    """Adds the boxes one by one, and says of each what is wrong with it."""
    seen: set[int | str] = set()
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            reading.complain("entry", f"{path}: annotations[{i}]", f"{_short(entry)} is no object")
            continue
        box, area, crowd = entry.get("bbox"), entry.get("area"), entry.get("iscrowd")
        if box is None or box == []:
            box = _box_of_polygons(entry.get("segmentation")) or box
        image_id, category_id = _get_id(entry, "image_id"), _get_id(entry, "category_id")
        fault = None
        if not _are_numbers(box, 4):
            fault = f"bbox {_short(box)}: give 4 finite numbers: left, top, width, height"
        elif area is not None and not (type(area) in (int, float) and -1e18 <= area <= 1e18):
            fault = f"area {_short(area)}: give a finite number, or leave it out"
        elif crowd not in (0, 1, None):
            fault = f"iscrowd {_short(crowd)}: give 0 or 1"
        elif image_id is None:
            fault = f"image_id {_short(entry.get('image_id'))}: give a number or text"
        elif category_id is None:
            fault = f"category_id {_short(entry.get('category_id'))}: give a number or text"
        if fault or image_id is None or category_id is None or not isinstance(box, list):
            reading.complain("entry", f"{path}: annotations[{i}]", fault or "")
            continue
        own_id = entry.get("id")
        if own_id is not None and type(own_id) in (int, str):
            if own_id in seen:
                text = f"id {_short(own_id)} is given twice"
                reading.complain("id", f"{path}: annotations[{i}]", text, own_id)
            seen.add(own_id)
        if image_id not in reading.images:
            if image_id not in skipped:
                text = f"image_id {_short(image_id)} is not in `images`"
                reading.complain("image", f"{path}: annotations[{i}]", text, image_id)
            continue
        _check_category(reading, f"{path}: annotations[{i}]", category_id, declared)
        image, category = reading.images[image_id], reading.category(category_id)
        reading.add_box(image, category, box, i, area, bool(crowd))


def _box_of_polygons(polygons: Any) -> list[float] | None:
    """(left, top, width, height) around COCO's polygons, lists of x, y, x, y, ...; None of others.

    As pycocotools' loadRes derives a missing bbox.
    """
    if not isinstance(polygons, list) or not polygons:
        return None
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return None
        if not _are_numbers(polygon, len(polygon)):
            return None
    x = [value for polygon in polygons for value in polygon[0::2]]
    y = [value for polygon in polygons for value in polygon[1::2]]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _check_category(
    reading: Reading, place: str, category_id: int | str, declared: frozenset[int | str]
) -> None:
    if declared and category_id not in declared:
        text = f"category_id {_short(category_id)} is not in `categories`"
        reading.complain("category", place, text, category_id)


def read_plain(spec: str, path: Path, content: dict, images: Path | None) -> Reading:
    """An entry without a box and a category is an image without boxes."""
    entries = content["images"]
    names = (e.get("file_name") for e in entries if isinstance(e, dict))
    reading = Reading(
        spec, images or _find_images(path, names), "{file}: images[{entry}]", [str(path)]
    )
    declared = _read_categories(reading, path, content)
    for i, entry in enumerate(entries):
        place = f"{path}: images[{i}]"
        if not isinstance(entry, dict):
            reading.complain("entry", place, f"{_short(entry)} is no object")
            continue
        name, size = entry.get("file_name"), _get_size(entry)
        if size is None:
            reading.complain("entry", place, _size_fault(entry))
        if isinstance(name, str) and name in reading.images:
            row = reading.images[name]
            if size is not None and size != reading.sizes[row]:
                text = f"another width or height than an earlier entry of {_short(name)} has"
                reading.complain("size", place, text, name)
        elif (path_inside := reading.check_path(place, name)) is None:
            continue
        else:
            row = reading.add_image(str(name), path_inside, *(size or (0, 0)))
        corners = [entry.get(key) for key in _CORNERS]
        if all(value is None for value in [*corners, entry.get("category_id")]):
            continue
        category_id = _get_id(entry, "category_id")
        if not _are_numbers(corners, 4):
            text = f"xmin, ymin, xmax, ymax {_short(corners)}: give 4 finite numbers"
            reading.complain("entry", place, text)
        elif category_id is None:
            text = f"category_id {_short(entry.get('category_id'))}: give a number or text"
            reading.complain("entry", place, text)
        else:
            _check_category(reading, place, category_id, declared)
            reading.add_box(row, reading.category(category_id), _from_corners(corners), i)
    return reading


def _from_corners(corners: Sequence[Any]) -> tuple[float, float, float, float]:
    left, top, right, bottom = corners
    return left, top, right - left, bottom - top


# --- Pascal VOC ---------------------------------------------------------------------------------


class _WithoutDoctype(ElementTree.TreeBuilder):
    """A document type can define entities, which expand, or name files; annotations need none."""

    def doctype(self, name: str, public_id: str | None, system: str | None) -> None:
        raise ValueError("has a DOCTYPE, which annotations don't need: remove it")


# Decoders for what writers really mean by these names, after https://encoding.spec.whatwg.org
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}
_MULTI_BYTE = frozenset(
    {"gb2312", "gbk", "gb18030", "hz", "big5", "big5hkscs", "cp950", "shift_jis", "cp932"}
    | {"shift_jisx0213", "shift_jis_2004", "euc_jp", "iso2022_jp", "euc_kr", "cp949", "johab"}
)


def _parse_xml(data: bytes) -> ElementTree.Element:
    """Expat knows UTF-8, UTF-16 and encodings of one byte; declared ones of several are decoded.

    A text that declares UTF-16 and is none was saved in UTF-8 afterwards, as .NET's writers do.
    """
    text: str | bytes = data
    declared = re.match(rb"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([\w.:-]{1,40})[\"']", data)
    if declared:
        name = codecs.lookup(declared[1].decode()).name
        if name in _MULTI_BYTE:
            try:
                text = data.decode(name)
            except UnicodeDecodeError:
                text = data.decode(_SUPERSETS.get(name, name))
        elif name == "utf-16":
            text = data.decode()
    root = ElementTree.fromstring(text, ElementTree.XMLParser(target=_WithoutDoctype()))
    if root.tag.lower() != "annotation":
        raise ValueError(f"its root is <{root.tag}> and not <annotation>: export it as Pascal VOC")
    return root


def read_voc(spec: str, names: Sequence[str], folder: Path, images: Path) -> Reading:
    """XML files `names` in `folder`; an image is found by the XML file's name, else by `filename`.

    Either may lie in another folder of the set (images/ and annotations/, data/ and labels/), where
    only one image has the name.

    The format counts pixels from 1 and includes the last. A set with a coordinate of 0 can't mean
    that (many tools write plain coordinates) and is read without the shift.
    """
    reading = Reading(spec, images, "{file}: object {entry}")
    by_stem: dict[str, list[str]] = {}
    by_last: dict[str, list[str]] = {}  # part of the stem
    for path in find_files(images, IMAGES):
        stem = os.path.splitext(path)[0]
        by_stem.setdefault(stem, []).append(path)
        by_last.setdefault(os.path.basename(stem), []).append(path)
    objects: list[tuple[int, str, tuple[float, float, float, float], int, bool]] = []
    inside = Inside(folder)
    for name in names:
        place, stem = str(folder / name), os.path.splitext(name)[0]
        if stem in reading.images:
            reading.complain("id", spec, f"{_short(stem)} is listed twice", stem)
            continue
        if leaves_its_folder(name) or inside.find(name) is None:
            reading.complain("path", place, f"leads out of {folder}", name)
            continue
        try:
            root = _parse_xml(read_bytes(folder / name))
        except UserError as error:
            reading.complain("file", place, str(error).removeprefix(f"{place}: "))
            continue
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            reading.complain("file", place, f"not readable as XML ({error})")
            continue
        stated = (root.findtext("filename") or "").strip()
        last = re.split(r"[\\/]", stated)[-1]
        found = by_stem.get(stem) or by_stem.get(os.path.splitext(last)[0]) or [stated]
        alike = by_last.get(os.path.basename(stem), [])
        if found == [stated] and len(alike) == 1 and reading.inside.find(stated) is False:
            found = alike
        named = next((path for path in found if os.path.basename(path) == last), found[0])
        image = reading.check_path(place, named, by_end=True)
        if image is None:
            continue
        row = reading.add_image(stem, image, *_voc_size(reading, place, root))
        reading.files.append(place)
        for i, element in enumerate(root.findall("object"), start=1):
            label = (element.findtext("name") or "").strip()
            corners = [_to_number(element.findtext(f"bndbox/{key}")) for key in _CORNERS]
            if not label or not _are_numbers(corners, 4):
                text = "needs `name` and `bndbox` with finite xmin, ymin, xmax, ymax"
                reading.complain("entry", f"{place}: object {i}", text)
                continue
            difficult = (element.findtext("difficult") or "").strip() == "1"
            objects.append((row, label, _from_corners(corners), i, difficult))
    for label in sorted({label for _, label, *_ in objects}):
        reading.category(label)
    shift = 0 if any(min(box[:2]) < 1 for _, _, box, *_ in objects) else 1
    for row, label, (left, top, width, height), i, difficult in objects:
        box = (left - shift, top - shift, width + shift, height + shift)
        reading.add_box(row, reading.category(label), box, i, crowd=difficult)
    return reading


def _voc_size(reading: Reading, place: str, root: ElementTree.Element) -> tuple[int, int]:
    texts = {key: root.findtext(f"size/{key}") or "0" for key in ("height", "width")}
    numbers = {key: _to_number(text) for key, text in texts.items()}
    stated = {k: float("nan") if n is None else n or None for k, n in numbers.items()}  # 0: unknown
    size = _get_size(stated)
    if size is None:
        reading.complain("entry", place, _size_fault(texts))
    return size or (0, 0)


def _to_number(text: str | None) -> float | None:
    """None where it isn't a number; may be infinite or NaN."""
    try:
        return None if text is None or "_" in text else float(text)
    except ValueError:
        return None


# --- YOLO ---------------------------------------------------------------------------------------


def labels_of(images: Path) -> Path:
    """The folder or file's counterpart: the last folder `images` on its path becomes `labels`."""
    parts = list(images.parts)
    for i in reversed(range(len(parts))):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts)


def read_yolo_folder(spec: str, images: Path, labels: Path, root: Path) -> Reading:
    """Images and labels of the same relative names."""
    paths = find_files(images, IMAGES)
    stems = {os.path.splitext(path)[0] for path in paths}
    names = _find_names((root, labels, images.parent, images.parent.parent))
    reading = _read_yolo(spec, images, paths, labels, [_as_label(path) for path in paths], names)
    for name in find_files(labels, {".txt"}):
        if os.path.splitext(name)[0] not in stems and _holds_rows(labels / name):
            text = f"labels without an image in {images}"
            reading.complain("missing", str(labels / name), text, name)
    return reading


def _holds_rows(file: Path) -> bool:
    """Whether a text that lies among the labels is one of them, and no list of names or notes."""
    if file.name == "classes.txt":
        return False
    try:
        rows = read_lines(file)
    except UserError:
        return True
    return all(len(row.split()) >= 5 and _to_number(row.split()[0]) is not None for row in rows)


def _as_label(path: str) -> str:
    return os.path.splitext(path)[0] + ".txt"


def read_yolo_yaml(spec: str, images: Path | None) -> Reading:
    """Folders and lists that data.yaml names, if they are inside its own folder or `images`."""
    text, split = spec, "train"
    if not text.endswith((".yaml", ".yml")):
        text, _, split = spec.rpartition(":")
    path = expand(text)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content = _load_yaml(path)
    root = images or path.parent
    inside = Inside(root)
    places = content.get(split)
    places = [places] if isinstance(places, str) else places
    if not isinstance(places, list) or not places or not all(isinstance(p, str) for p in places):
        known = ", ".join(k for k in ("train", "val", "test") if content.get(k)) or "none of them"
        raise UserError(
            f"{path}: `{split}` names no folder of images; of train, val, test: {known}"
        )
    base = content.get("path") if images is None else None
    paths: list[str] = []
    for place in places:
        tries = (root / t for t in _readings(place, base if isinstance(base, str) else ""))
        found = next((p for p in tries if inside.holds(p) and p.exists()), None)
        if found is None:
            raise one_line(
                f"{path}: {split}: {_short(place)} is not in {root}: give the folder that it is"
                " relative to as the images' folder"
            )
        start = os.path.relpath(found if found.is_dir() else found.parent, root)
        names = find_files(found, IMAGES) if found.is_dir() else read_lines(found)
        for name in names:
            stated = os.path.normpath(os.path.join(start, name.strip()))
            paths.append(inside.locate(stated, by_end=True)[0])
    labels = [
        os.path.relpath(
            labels_of(Path(os.path.abspath(root / _as_label(p)))), os.path.abspath(root)
        )
        for p in paths
    ]
    names = _yaml_names(path, content)
    return _read_yolo(spec, root, paths, root, labels, names, _count_keypoints(path, content))


def _readings(place: str, base: str) -> Iterator[str]:
    """What a place in data.yaml can mean inside its folder, the likeliest first.

    Ultralytics' `path` + place; the place alone; Roboflow's ../train/images for train/images; and
    an absolute place on another machine by as many of its last parts as there are.
    """
    if base:
        yield os.path.join(base, place)
    yield place
    parts = [part for part in re.split(r"[\\/]", place) if part not in ("", ".")]
    if ".." in parts:
        yield "/".join(parts[len(parts) - parts[::-1].index("..") :]) or place
    elif leaves_its_folder(place):
        for i in range(max(len(parts) - MOST_PARTS, 0), len(parts)):
            if parts[i:] != ["images"]:  # any split's
                yield "/".join(parts[i:])
    else:
        yield "/".join(parts)


def _load_yaml(path: Path) -> dict:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a YOLO data set's YAML: needs `train`, `val` and `names`")
    return content


def _yaml_names(path: Path, content: dict) -> list[str]:
    """`names`, a list or a map from 0, 1, ...; else `nc` classes, named as Ultralytics does."""
    names, count = content.get("names"), content.get("nc")
    if names is None and type(count) is int and 0 < count <= MAX_CLASSES:
        return [f"class_{i}" for i in range(count)]
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        by_number = {int(key): name for key, name in names.items()}
        names = [by_number[i] for i in range(len(names))]
    if not isinstance(names, list) or not all(_is_text(str(n)) for n in names):
        raise UserError(f"{path}: `names` is no list of names, and no map from 0, 1, ... to names")
    if type(count) is int and count != len(names):
        raise UserError(
            f"{path}: `nc` is {count} and `names` has {len(names)}: correct one of them"
        )
    return [str(name) for name in names]


def _count_keypoints(path: Path, content: dict) -> int:
    """How many numbers follow the box in each row, by `kpt_shape`, [points, 2 or 3]."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not _are_numbers(shape, 2) or shape[0] not in range(1, 1000) or shape[1] not in (2, 3):
        raise UserError(f"{path}: kpt_shape {_short(shape)}: give [number of points, 2 or 3]")
    return int(shape[0] * shape[1])


def _find_names(folders: Iterable[Path]) -> list[str]:
    for folder in folders:
        for name in ("data.yaml", "dataset.yaml"):
            if (folder / name).is_file():
                return _yaml_names(folder / name, _load_yaml(folder / name))
        for name in ("classes.txt", "obj.names"):  # labelImg's and Label Studio's; CVAT's
            if (folder / name).is_file():
                return [line.strip() for line in read_lines(folder / name)]
    return []


def _read_yolo(
    spec: str,
    folder: Path,
    paths: Sequence[str],
    label_folder: Path,
    labels: Sequence[str],
    names: Sequence[str],
    keypoints: int = 0,
) -> Reading:
    """Rows `class cx cy w h`, in shares of the upright image; no label file, no boxes.

    Rows `class x y x y x y ...` are polygons, of which the boxes around are taken. `keypoints`
    numbers follow the box, where data.yaml says so.

    `paths` are relative to `folder`, and `labels` of the same length to `label_folder`. Without
    `names`, classes are named by their numbers.
    """
    reading = Reading(spec, folder, YOLO_PLACE)
    for i, name in enumerate(names):
        reading.category(i, name)
    declared = frozenset(reading.categories)
    used = []
    for path, label in zip(paths, labels, strict=True):
        if path in reading.images:
            reading.complain("id", spec, f"{_short(path)} is listed twice", path)
        elif reading.check_path(spec, path) is not None:
            reading.add_image(path, path, 0, 0)
            used.append(label)
    reading.files = [str(label_folder / label) for label in used]
    missing = {problem.value for problem in reading.problems if problem.kind == "missing"}
    files = [None if p in missing else folder / p for p in reading.paths]
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(_header_size, files))
    inside = Inside(label_folder)
    boxes = []  # (image, class, shares, line)
    for row, (label, size) in enumerate(zip(used, sizes, strict=True)):
        found = inside.find(label)
        if found is None:
            reading.complain("path", reading.files[row], f"leads out of {label_folder}", label)
        if isinstance(size, str):
            reading.complain("unreadable", reading.files[row], size, reading.paths[row])
        elif size is not None:
            reading.sizes[row] = size
            if found:
                rows = _yolo_rows(reading, reading.files[row], keypoints)
                boxes += [(row, *values) for values in rows]
    for category in sorted({category for _, category, *_ in boxes}):  # by number where not declared
        reading.category(category)
    for row, category, (cx, cy, w, h), line in boxes:
        _check_category(reading, f"{reading.files[row]}: line {line}", category, declared)
        height, width = reading.sizes[row]
        box = ((cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height)
        reading.add_box(row, reading.category(category), box, line)
    return reading


def _header_size(file: Path | None) -> tuple[int, int] | str | None:
    """(height, width) upright, why it can't be known, or None where there is no file."""
    try:
        return None if file is None else read_header(file).upright_size
    except DamagedImageError as error:
        return str(error)


def _yolo_rows(
    reading: Reading, file: str, keypoints: int
) -> Iterator[tuple[int, list[float], int]]:
    """(class, shares, line number) of each row that is right."""
    try:
        text = read_text(file)
    except UserError as error:
        reading.complain("file", file, str(error).removeprefix(f"{file}: "))
        return
    rows = [(line, row.split()) for line, row in enumerate(text.splitlines(), start=1)]
    mixed = len({min(len(words), 6) for _, words in rows if words}) > 1
    for line, words in rows:
        if not words:
            continue
        values: list[Any] = [_to_number(word) for word in words]
        place, count = f"{file}: line {line}", len(values)
        is_polygon = not keypoints and count >= 7 and count % 2 == 1
        right = count == 5 + keypoints or count == 5 or is_polygon
        if not _are_numbers(values, count) or values[0] < 0 or values[0] != int(values[0]):
            right = False
        if not right:
            text = f"{_short(' '.join(words))}: give `class cx cy w h`, a whole number and 4 finite"
            text += " ones" + "; a sixth, a confidence or an angle, is no label's" * (count == 6)
            reading.complain("entry", place, text)
        elif is_polygon and mixed:
            text = "a polygon beside boxes, of which readers make different things: export boxes"
            reading.complain("entry", place, text)
        elif is_polygon:
            x, y = values[1::2], values[2::2]
            left, top, width, height = min(x), min(y), max(x) - min(x), max(y) - min(y)
            yield int(values[0]), [left + width / 2, top + height / 2, width, height], line
        else:
            yield int(values[0]), values[1:5], line


# --- tfds ---------------------------------------------------------------------------------------


def read_tfds(spec: str) -> Reading:
    """Boxes and image headers in one pass over the records; pixels are not decoded."""
    import tensorflow_datasets as tfds

    features, records = open_tfds(spec)
    objects = features.get("objects")
    inner = getattr(objects, "feature", None)  # of a Sequence
    inner = dict(inner.items()) if isinstance(inner, tfds.features.FeaturesDict) else {}
    if (
        not isinstance(features.get("image"), tfds.features.Image)
        or not isinstance(inner.get("bbox"), tfds.features.BBoxFeature)
        or not isinstance(inner.get("label"), tfds.features.ClassLabel)
    ):
        raise UserError(
            f"{spec}: needs the features `image` and `objects`, a sequence of `bbox` and `label`;"
            f" it has {', '.join(features)}"
        )
    reading = Reading(spec, Path(), "{file}: objects[{entry}]")
    for i, name in enumerate(inner["label"].names):
        reading.category(i, name)
    reading.records = reader = TfdsReader(spec, records)
    for row in range(len(records)):
        record, place = records[row], reader.example_name(row)
        reading.files.append(place)
        try:
            height, width = read_header(record["image"], name=place).upright_size
        except DamagedImageError as error:
            reading.complain("unreadable", place, str(error).removeprefix(f"{place}: "), place)
            height, width = 0, 0
        image_id: int | str = int(record["image/id"]) if "image/id" in features else row
        if image_id in reading.images:
            reading.complain("id", place, f"image/id {image_id} is given twice", image_id)
            image_id = f"row {row}"
        reading.add_image(image_id, place, height, width)
        found = record["objects"]
        shares = np.asarray(found["bbox"], np.float64).reshape(-1, 4)
        boxes = shares[:, [1, 0, 3, 2]] * (width, height, width, height)
        for i, box in enumerate(boxes.tolist()):
            label = int(found["label"][i])
            if not _are_numbers(box, 4) or label < 0:
                reading.complain("entry", f"{place}: objects[{i}]", "bbox or label is not given")
                continue
            crowd = bool(found["is_crowd"][i]) if "is_crowd" in found else False
            area = float(found["area"][i]) if "area" in found else None
            reading.add_box(row, label, _from_corners(box), i, area, crowd)
    return reading
