"""Pascal VOC: an XML file an image."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from vision_jax.data.annotation_formats.reading import IMAGES, Reading, find_files
from vision_jax.data.annotation_formats.values import (
    CORNERS,
    are_numbers,
    from_corners,
    get_size,
    short,
    size_fault,
    to_number,
)
from vision_jax.data.annotation_formats.xml_file import parse_xml
from vision_jax.data.folders import Inside, leaves_its_folder
from vision_jax.errors import UserError
from vision_jax.files import read_bytes


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
            reading.complain("id", spec, f"{short(stem)} is listed twice", stem)
            continue
        if leaves_its_folder(name) or inside.find(name) is None:
            reading.complain("path", place, f"leads out of {folder}", name)
            continue
        try:
            root = parse_xml(read_bytes(folder / name), "annotation", "export it as Pascal VOC")
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
            corners = [to_number(element.findtext(f"bndbox/{key}")) for key in CORNERS]
            if not label or not are_numbers(corners, 4):
                text = "needs `name` and `bndbox` with finite xmin, ymin, xmax, ymax"
                reading.complain("entry", f"{place}: object {i}", text)
                continue
            difficult = (element.findtext("difficult") or "").strip() == "1"
            objects.append((row, label, from_corners(corners), i, difficult))
    for label in sorted({label for _, label, *_ in objects}):
        reading.category(label)
    shift = 0 if any(min(box[:2]) < 1 for _, _, box, *_ in objects) else 1
    for row, label, (left, top, width, height), i, difficult in objects:
        box = (left - shift, top - shift, width + shift, height + shift)
        reading.add_box(row, reading.category(label), box, i, crowd=difficult)
    return reading


def _voc_size(reading: Reading, place: str, root: ElementTree.Element) -> tuple[int, int]:
    texts = {key: root.findtext(f"size/{key}") or "0" for key in ("height", "width")}
    numbers = {key: to_number(text) for key, text in texts.items()}
    stated = {k: float("nan") if n is None else n or None for k, n in numbers.items()}  # 0: unknown
    size = get_size(stated)
    if size is None:
        reading.complain("entry", place, size_fault(texts))
    return size or (0, 0)
