"""Label Studio's own JSON: polygons, brushes, rectangles and ellipses, turned as the tool does.

Its exports to COCO, YOLO and Pascal VOC lose the turn, or turn about the wrong point; this reads
the list of tasks that "JSON" exports. Positions are percent of the image. A rectangle is turned
clockwise about its upper left corner, an ellipse about its center.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from vision_jax.data.annotation_formats.values import get_size, is_text, short, size_fault
from vision_jax.data.mask_formats.regions import (
    RegionReading,
    are_points,
    ellipse,
    polygon_fault,
    rectangle,
    turned,
)
from vision_jax.data.mask_formats.runs import Runs, parse_brush

_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # put before the names of uploaded files
_KINDS = ("polygon", "rectangle", "ellipse", "brush")
_WITHOUT_AREA = {"keypoint": "keypoints", "vector": "vectors"}


def is_label_studio(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(task, dict) and "data" in task for task in content[:20])
    )


def read_label_studio(spec: str, path: Path, content: list, images: Path) -> RegionReading:
    """Of a task with several annotations the one that is marked as ground truth, else the first.

    Tasks without an annotation are left out.
    """
    reading = RegionReading(spec, images, "{file}: task {entry}", [str(path)])
    found: list[tuple[int, str, str, dict, int]] = []
    for number, task in enumerate(content):
        place = f"{path}: [{number}]"
        if not isinstance(task, dict):
            reading.complain("entry", place, f"{short(task)} is no object")
            continue
        results = _results(reading, task)
        if results is None:
            continue
        stated = {_size_of(result) for result in results if isinstance(result, dict)} - {None}
        sizes = {size for size in stated if size is not None}
        if len(sizes) > 1:
            reading.complain("size", place, "original_width and original_height differ in it")
            continue
        image = _image_of(reading, place, task.get("data"))
        if image is None:
            continue
        row = reading.add_image(number, image, *(next(iter(sizes), (0, 0))))
        for i, result in enumerate(results):
            where = f"{place}: result[{i}]"
            if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
                reading.complain("entry", where, "needs `value`, an object")
                continue
            kind = str(result.get("type")).removesuffix("labels")
            labels = result["value"].get(f"{kind}labels") or result["value"].get("labels")
            if kind in _WITHOUT_AREA:
                reading.leave_out(_WITHOUT_AREA[kind])
                continue
            if kind not in _KINDS or not labels:  # a choice, a rating, a region before its label
                continue
            if not isinstance(labels, list) or len(labels) != 1 or not is_text(labels[0]):
                reading.complain("entry", where, f"labels {short(labels)}: give one to each region")
                continue
            found.append((row, where, labels[0], result | {"kind": kind}, number))
    for label in sorted({label for _, _, label, _, _ in found}):
        reading.category(label, label)
    for row, where, label, result, number in found:
        try:
            _add(reading, row, reading.category(label), result, number)
        except ValueError as error:
            reading.complain("entry", where, str(error))
    return reading


def _results(reading: RegionReading, task: dict) -> list | None:
    """The regions of the task's annotation; None if it has none."""
    stated = task.get("annotations", task.get("completions"))
    annotations = [
        a
        for a in (stated if isinstance(stated, list) else ())
        if isinstance(a, dict) and isinstance(a.get("result"), list) and not a.get("was_cancelled")
    ]
    if not annotations:
        reading.leave_out("tasks without an annotation")
        return None
    truth = [a for a in annotations if a.get("ground_truth")]
    if len(annotations) > 1:
        kind = "annotations beside the first or the ground truth of their task"
        reading.leave_out(kind, len(annotations) - 1)
    return (truth or annotations)[0]["result"]


def _size_of(result: dict) -> tuple[int, int] | None:
    stated = {"height": result.get("original_height"), "width": result.get("original_width")}
    size = get_size(stated)
    return size if size and all(size) else None


def _image_of(reading: RegionReading, place: str, data: Any) -> str | None:
    """The image's path; `data` names it as a path, a link, or ?d= of a local file."""
    texts = [v for v in data.values() if is_text(v)] if isinstance(data, dict) else []
    if isinstance(data, dict) and is_text(data.get("image")):
        texts = [data["image"], *texts]
    for text in texts:
        for path in _paths(text):
            if "\0" not in path and reading.inside.locate(path, by_end=True)[1] == "found":
                return reading.check_path(place, path, by_end=True)
    stated = texts[0] if texts else data
    reading.complain("missing", place, f"data {short(stated)}: no such file in {reading.folder}")
    return None


def _paths(text: str) -> Iterator[str]:
    yield text
    try:
        link = urlsplit(text)
        local = parse_qs(link.query).get("d", [])
    except ValueError:
        return
    for path in (*local, unquote(link.path)):
        if path:
            yield path
            parent, _, name = path.rpartition("/")
            if _UPLOADED.match(name):
                yield f"{parent}/{_UPLOADED.sub('', name, count=1)}".lstrip("/")


def _add(reading: RegionReading, row: int, category: int, result: dict, entry: int) -> None:
    """Adds a region. Raises ValueError for what is none."""
    if _size_of(result) is None:
        stated = {"height": result.get("original_height"), "width": result.get("original_width")}
        raise ValueError(f"original size: {size_fault(stated)}")
    if result.get("image_rotation") not in (0, None):
        raise ValueError(
            f"image_rotation {short(result['image_rotation'])}: the image was turned in the tool:"
            " turn the file itself, and its regions with it"
        )
    height, width = reading.sizes[row]
    value, kind = result["value"], result["kind"]
    if kind == "brush":
        lengths = parse_brush(value.get("rle"), height * width)
        reading.add_runs(row, category, Runs(lengths, 0, 0, height, width), entry)
        return
    if kind == "polygon":
        points = value.get("points")
        if not are_points(points):
            raise ValueError(f"points {short(points)}: give a list of [x, y] in percent")
        ring = [v for x, y in points for v in (x * width / 100, y * height / 100)]
    else:
        keys = ("x", "y", "width", "height")
        keys = keys if kind == "rectangle" else ("x", "y", "radiusX", "radiusY")
        numbers = [value.get(key) for key in keys]
        degrees = value.get("rotation") or 0
        if not all(type(n) in (int, float) and abs(n) < 1e6 for n in (*numbers, degrees)):
            raise ValueError(f"{', '.join(keys)} {short(numbers)}: give numbers in percent")
        x, y, w, h = np.multiply(numbers, (width, height, width, height)) / 100
        if kind == "rectangle":
            ring = turned(rectangle(x, y, x + w, y + h), (x, y), degrees)
        else:
            ring = ellipse(x, y, w, h, degrees)
    fault = polygon_fault(ring, height, width)
    if fault:
        raise ValueError(fault)
    reading.add_polygons(row, category, [ring], entry)
