"""CVAT's own XML, "for images" 1.1: polygons, masks, boxes and ellipses, turned ones turned."""

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from vision_jax.data.annotation_formats.values import (
    get_size,
    is_text,
    short,
    size_fault,
    to_number,
)
from vision_jax.data.annotation_formats.xml_file import parse_xml
from vision_jax.data.mask_formats.regions import (
    RegionReading,
    ellipse,
    polygon_fault,
    rectangle,
    turned,
)
from vision_jax.data.mask_formats.runs import Runs, parse_row_lengths
from vision_jax.errors import UserError
from vision_jax.files import read_bytes

MAX_XML_BYTES = 200_000_000
_WITHOUT_AREA = {"polyline": "polylines", "points": "points", "tag": "tags", "cuboid": "cuboids"}


def read_cvat(spec: str, path: Path, images: Path) -> RegionReading:
    """Shapes are painted by z_order and then in the order of the file, as the tool shows them.

    Raises:
      UserError: no XML, or of another root.
    """
    try:
        data = read_bytes(path, MAX_XML_BYTES)
        root = parse_xml(data, "annotations", 'export it as "CVAT for images 1.1"')
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not readable as XML ({error})") from error
    reading = RegionReading(spec, images, "{file}: shape {entry}", [str(path)])
    if root.find("track") is not None:
        raise UserError(f'{path}: holds tracks of a video: export it as "CVAT for images 1.1"')
    for element in root.iterfind("meta//labels/label/name"):
        if is_text(name := (element.text or "").strip()):
            reading.category(name, name)
    declared = frozenset(reading.categories)
    for number, element in enumerate(root.iterfind("image")):
        place = f"{path}: image {number}"
        size = get_size({key: to_number(element.get(key)) for key in ("height", "width")})
        if size is None or not all(size):
            reading.complain("entry", place, size_fault(element.attrib))
            continue
        image = reading.check_path(place, element.get("name"), by_end=True)
        if image is None:
            continue
        row = reading.add_image(image, image, *size)
        for i, shape in enumerate(element, start=1):
            label = (shape.get("label") or "").strip()
            if shape.tag in _WITHOUT_AREA or shape.tag == "skeleton":
                kind = _WITHOUT_AREA.get(shape.tag, "skeletons")
                reading.leave_out(kind)
                continue
            if not is_text(label):
                reading.complain("entry", f"{place}: shape {i}", "needs `label`, a text")
                continue
            reading.check_category(f"{place}: shape {i}", label, declared)
            try:
                _add(reading, row, reading.category(label, label), shape, i)
            except ValueError as error:
                reading.complain("entry", f"{place}: shape {i}", str(error))
    return reading


def _add(
    reading: RegionReading, row: int, category: int, shape: ElementTree.Element, i: int
) -> None:
    """Adds a shape. Raises ValueError for what is none."""
    height, width = reading.sizes[row]
    (rank,) = _whole(shape, ("z_order",), 0)
    if shape.tag == "mask":
        upper, first, rows, columns = _whole(shape, ("top", "left", "height", "width"))
        if min(upper, first) < 0 or not (
            0 < rows <= height - upper and 0 < columns <= width - first
        ):
            raise ValueError(
                f"mask at {first}, {upper} of {columns} × {rows} pixels: not in its image"
            )
        lengths = parse_row_lengths(shape.get("rle") or "", rows * columns)
        reading.add_runs(row, category, Runs(lengths, upper, first, rows, columns), i, rank=rank)
        return
    (degrees,) = _numbers(shape, ("rotation",), 0.0)
    if shape.tag == "polygon":
        points = [point.split(",") for point in (shape.get("points") or "").split(";")]
        numbers = [to_number(value) for point in points for value in point]
        if any(len(point) != 2 for point in points) or None in numbers:
            raise ValueError(f"points {short(shape.get('points'))}: give x,y;x,y;...")
        ring = [number for number in numbers if number is not None]
    elif shape.tag == "box":
        left, top, right, bottom = _numbers(shape, ("xtl", "ytl", "xbr", "ybr"))
        center = ((left + right) / 2, (top + bottom) / 2)
        ring = turned(rectangle(left, top, right, bottom), center, degrees)
    elif shape.tag == "ellipse":
        cx, cy, rx, ry = _numbers(shape, ("cx", "cy", "rx", "ry"))
        ring = ellipse(cx, cy, rx, ry, degrees)
    else:
        raise ValueError(f"<{shape.tag}> is not known here")
    fault = polygon_fault(ring, height, width)
    if fault:
        raise ValueError(fault)
    reading.add_polygons(row, category, [ring], i, rank=rank)


def _numbers(
    element: ElementTree.Element, keys: Sequence[str], default: float | None = None
) -> list[float]:
    found: list[float] = []
    for key in keys:
        text = element.get(key)
        number = default if text is None else to_number(text)
        if number is None or not abs(number) < 1e9:
            raise ValueError(f"{key} {short(text)}: give a number")
        found.append(number)
    return found


def _whole(
    element: ElementTree.Element, keys: Sequence[str], default: float | None = None
) -> list[int]:
    numbers = _numbers(element, keys, default)
    if any(number != int(number) for number in numbers):
        raise ValueError(f"{', '.join(keys)}: give whole numbers")
    return [int(number) for number in numbers]
