"""LabelMe's JSON: a file an image, `shapes` that are painted in their order."""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data.annotation_formats.reading import Reading, read_lines
from vision_jax.data.annotation_formats.values import get_size, is_text, short, size_fault
from vision_jax.data.decode import decode_image
from vision_jax.data.mask_formats.regions import (
    RegionReading,
    are_points,
    ellipse,
    polygon_fault,
    rectangle,
)
from vision_jax.data.mask_formats.runs import Runs
from vision_jax.errors import UserError
from vision_jax.files import read_json

MAX_JSON_BYTES = 200_000_000  # it may hold the image too
_WITHOUT_AREA = frozenset({"point", "points", "line", "linestrip"})


def is_labelme(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def read_labelme(spec: str, folder: Path, names: Sequence[str], images: Path) -> RegionReading:
    """JSON files `names` in `folder`; `imagePath` is relative to the file, or has its name alone.

    Labels are numbered by name, or in the order of labels.txt in the folder. `__ignore__` is no
    class, and points and lines, which have no area, are left out and counted.
    """
    reading = RegionReading(spec, images, "{file}: shapes[{entry}]")
    shapes: list[tuple[int, str, dict, int]] = []
    for name in names:
        place = str(folder / name)
        try:
            content = read_json(folder / name, MAX_JSON_BYTES)
        except UserError as error:
            reading.complain("file", place, str(error).removeprefix(f"{place}: "))
            continue
        if not is_labelme(content):
            reading.complain("file", place, "not LabelMe's: it has no list `shapes`")
            continue
        stated = {"height": content.get("imageHeight"), "width": content.get("imageWidth")}
        size = get_size(stated)
        if size is None:
            reading.complain("entry", place, size_fault(stated))
            continue
        image = _image_of(reading, place, name, content.get("imagePath"))
        if image is None:
            continue
        row = reading.add_image(name, image, *size)
        reading.files.append(place)
        for i, shape in enumerate(content["shapes"]):
            if not isinstance(shape, dict) or not is_text(shape.get("label")):
                reading.complain("entry", f"{place}: shapes[{i}]", "needs `label`, a text")
            else:
                shapes.append((row, place, shape, i))
    listed = folder / "labels.txt"
    order = [line.strip() for line in read_lines(listed)] if listed.is_file() else []
    found = {shape["label"] for _, _, shape, _ in shapes}
    unknown = sorted(found - set(order)) if order else []
    if unknown:
        reading.complain("category", str(listed), f"{short(unknown[0])} is not listed in it")
    for label in order or sorted(found):
        if label:
            reading.category(label, label)
    for row, place, shape, i in shapes:
        try:
            _add(reading, row, shape, i)
        except (UserError, ValueError) as error:
            reading.complain("entry", f"{place}: shapes[{i}]", str(error))
    return reading


def _image_of(reading: Reading, place: str, name: str, stated: Any) -> str | None:
    if not is_text(stated):
        reading.complain("entry", place, f"imagePath {short(stated)}: give the image's path")
        return None
    parent = name.rpartition("/")[0]
    near = f"{parent}/{stated}" if parent else stated
    if "\0" not in near and reading.inside.locate(near, by_end=True)[1] == "found":
        stated = near
    return reading.check_path(place, stated, by_end=True)


def _add(reading: RegionReading, row: int, shape: dict, i: int) -> None:
    """Adds a shape. Raises ValueError or UserError for what is none."""
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    category = reading.category(shape["label"], shape["label"])
    size = reading.sizes[row]
    if not isinstance(kind, str):
        raise ValueError(f"shape_type {short(kind)}: not known here")
    if kind in _WITHOUT_AREA:
        reading.leave_out(kind.removesuffix("s") + "s")
        return
    if not are_points(points):
        raise ValueError(f"points {short(points)}: give a list of [x, y]")
    flat = [value for point in points for value in point]
    wanted = {"rectangle": 2, "circle": 2, "mask": 2, "oriented_rectangle": 4}.get(kind)
    if wanted and len(points) != wanted:
        raise ValueError(f"a {kind} has {wanted} points, and not {len(points)}")
    if kind == "mask":
        reading.add_runs(row, category, _decode(shape.get("mask"), flat, size), i)
        return
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        corners = rectangle(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        flat = [value for corner in corners for value in corner]
    elif kind == "circle":
        (x, y), (px, py) = points
        radius = float(np.hypot(px - x, py - y))
        flat = ellipse(x, y, radius, radius)
    elif kind not in ("polygon", "oriented_rectangle"):
        raise ValueError(f"shape_type {short(kind)}: not known here")
    fault = polygon_fault(flat, *size)
    if fault:
        raise ValueError(fault)
    reading.add_polygons(row, category, [flat], i)


def _decode(text: Any, box: list[float], size: tuple[int, int]) -> Runs:
    """The mask in a PNG in base64, whose box's corners are pixels and both inside."""
    if not isinstance(text, str):
        raise ValueError("a mask needs `mask`, a PNG in base64")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"mask is not in base64 ({error})") from None
    inside = decode_image(data, name="mask")[..., 0] > 0
    left, top, right, bottom = (int(value) for value in box)
    height, width = inside.shape
    if (bottom - top + 1, right - left + 1) != (height, width):
        raise ValueError(f"mask of {width} × {height} pixels in a box of another size")
    fits = left >= 0 and top >= 0 and (not all(size) or (bottom < size[0] and right < size[1]))
    if not fits:
        raise ValueError("mask that reaches out of its image")
    flat = inside.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    starts = [0, 0] if flat[0] else [0]
    lengths = np.diff(np.concatenate([starts, ends, [flat.size]]))
    return Runs(lengths.astype(np.int64), top, left, height, width)
