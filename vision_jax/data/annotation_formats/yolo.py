"""YOLO: a text file an image, a row a box, in shares of the image; names in a YAML."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vision_jax.data.annotation_formats.reading import (
    IMAGES,
    Reading,
    find_files,
    one_line,
    read_lines,
)
from vision_jax.data.annotation_formats.values import are_numbers, is_text, short, to_number
from vision_jax.data.decode import DamagedImageError, read_header
from vision_jax.data.folders import MOST_PARTS, Inside, leaves_its_folder
from vision_jax.errors import UserError
from vision_jax.files import expand, read_text, read_yaml

MAX_CLASSES = 100_000  # of a data.yaml that only counts them
THREADS = 8

YOLO_PLACE = "{file}: line {entry}"


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
    return all(len(row.split()) >= 5 and to_number(row.split()[0]) is not None for row in rows)


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
        # Unlike Path.exists, os.path's answers no to a name that is too long to be a file's.
        found = next((p for p in tries if inside.holds(p) and os.path.exists(p)), None)
        if found is None:
            raise one_line(
                f"{path}: {split}: {short(place)} is not in {root}: give the folder that it is"
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
    if not isinstance(names, list) or not all(is_text(str(n)) for n in names):
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
    if not are_numbers(shape, 2) or shape[0] not in range(1, 1000) or shape[1] not in (2, 3):
        raise UserError(f"{path}: kpt_shape {short(shape)}: give [number of points, 2 or 3]")
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
            reading.complain("id", spec, f"{short(path)} is listed twice", path)
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
        reading.check_category(f"{reading.files[row]}: line {line}", category, declared)
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
        values: list[Any] = [to_number(word) for word in words]
        place, count = f"{file}: line {line}", len(values)
        is_polygon = not keypoints and count >= 7 and count % 2 == 1
        right = count == 5 + keypoints or count == 5 or is_polygon
        if not are_numbers(values, count) or values[0] < 0 or values[0] != int(values[0]):
            right = False
        if not right:
            text = f"{short(' '.join(words))}: give `class cx cy w h`, a whole number and 4 finite"
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
