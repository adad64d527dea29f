"""COCO's regions: `segmentation` of instances, and the PNGs of its panoptic form."""

import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data.annotation_formats.coco import add_images
from vision_jax.data.annotation_formats.json_file import find_images, read_categories
from vision_jax.data.annotation_formats.values import get_id, short
from vision_jax.data.decode import DamagedImageError, decode_image, read_image_file
from vision_jax.data.folders import Inside
from vision_jax.data.mask_formats.regions import RegionReading, polygon_fault
from vision_jax.data.mask_formats.runs import Runs, parse_counts
from vision_jax.data.masks import IGNORED, MAX_CLASSES
from vision_jax.data.segments import Segments, segments_of_map
from vision_jax.errors import UserError

MOST_AREA = 1e15  # pixels that are believed


def read_instances(spec: str, path: Path, content: dict, images: Path | None) -> RegionReading:
    """Polygons and runs by category. Crowds are ignored pixels where no other region is."""
    folder = images or _images_of(path, content)
    reading = RegionReading(spec, folder, "{file}: annotations[{entry}]", [str(path)])
    declared = read_categories(reading, path, content)
    skipped = add_images(reading, path, content)
    for i, entry in enumerate(content["annotations"]):
        place = f"{path}: annotations[{i}]"
        found = _links(reading, place, entry, declared, skipped)
        if found is None:
            continue
        image, category = found
        crowd = entry.get("iscrowd")
        if crowd not in (0, 1, None):
            reading.complain("entry", place, f"iscrowd {short(crowd)}: give 0 or 1")
            continue
        size, stated = reading.sizes[image], entry.get("segmentation")
        area = entry.get("area")
        area = float(area) if type(area) in (int, float) and abs(area) < MOST_AREA else math.nan
        rank = 0 if crowd else 1  # below the others
        if isinstance(stated, dict):
            try:
                runs = _runs(stated, size)
            except ValueError as error:
                reading.complain("entry", place, f"segmentation: {error}")
                continue
            reading.add_runs(image, category, runs, i, crowd=bool(crowd), rank=rank, area=area)
        elif isinstance(stated, list) and stated:
            fault = next(filter(None, (polygon_fault(ring, *size) for ring in stated)), "")
            if fault:
                reading.complain("entry", place, f"segmentation: {fault}")
                continue
            reading.add_polygons(
                image, category, stated, i, crowd=bool(crowd), rank=rank, area=area
            )
        else:
            reading.complain("entry", place, "has no segmentation: give polygons or runs (RLE)")
    return reading


def _images_of(path: Path, content: dict) -> Path:
    return find_images(path, (e.get("file_name") for e in content["images"] if isinstance(e, dict)))


def _links(
    reading: RegionReading,
    place: str,
    entry: Any,
    declared: frozenset[int | str],
    skipped: set[int | str],
) -> tuple[int, int] | None:
    """(row of the image, row of the category) of an annotation, None where there is none."""
    if not isinstance(entry, dict):
        reading.complain("entry", place, f"{short(entry)} is no object")
        return None
    image_id, category_id = get_id(entry, "image_id"), get_id(entry, "category_id")
    if image_id is None or category_id is None:
        key = "image_id" if image_id is None else "category_id"
        reading.complain("entry", place, f"{key} {short(entry.get(key))}: give a number or text")
        return None
    if image_id not in reading.images:
        if image_id not in skipped:
            text = f"image_id {short(image_id)} is not in `images`"
            reading.complain("image", place, text, image_id)
        return None
    reading.check_category(place, category_id, declared)
    return reading.images[image_id], reading.category(category_id)


def _runs(stated: dict, size: tuple[int, int]) -> Runs:
    """Raises ValueError if it is not a mask of an image of this size (0, 0 where unknown)."""
    own = stated.get("size")
    if not (isinstance(own, list) and len(own) == 2 and all(type(n) is int and n > 0 for n in own)):
        raise ValueError(f"size {short(own)}: give height and width")
    height, width = own
    if all(size) and (height, width) != size:
        raise ValueError(f"size {short(own)}, and the image is stated as {list(size)}")
    return Runs(parse_counts(stated.get("counts"), height * width), 0, 0, height, width, True)


# --- panoptic -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PanopticMasks:
    """Masks of N images in PNGs whose colors are numbers of segments: R + 256 G + 65,536 B.

    Attributes:
      folder, paths: of the PNGs.
      ids, labels: of each image its segments i64[S], sorted, and their labels u8[S].
      crowds: likewise bool[S].
      class_names: all categories, things and stuff. The segment 0 is of no class: ignored.
      stuff: of them those whose `isthing` is 0.
    """

    folder: Path
    paths: tuple[str, ...]
    ids: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    crowds: tuple[np.ndarray, ...]
    class_names: tuple[str, ...]
    stuff: tuple[str, ...]

    def example_name(self, row: int) -> str:
        return str(self.folder / self.paths[row])

    def stamp(self, row: int) -> int:
        """A checksum of what the JSON says of the PNG, and of its size in bytes."""
        try:
            size = os.stat(self.folder / self.paths[row]).st_size
        except OSError:  # it is skipped, counted and named when its turn comes
            size = -1
        value = zlib.crc32(repr((self.paths[row], size, self.class_names)).encode())
        return zlib.crc32(self._plain(row).tobytes(), zlib.crc32(self.ids[row].tobytes(), value))

    def _plain(self, row: int) -> np.ndarray:
        """Labels u8[S], of crowds 255."""
        return np.where(self.crowds[row], np.uint8(IGNORED), self.labels[row])

    def read(self, row: int) -> np.ndarray:
        """u8[H, W]. Raises DamagedImageError: no PNG, or a segment that the JSON does not list."""
        labels = np.concatenate([[np.uint8(IGNORED)], self._plain(row)])
        return labels.astype(np.uint8)[self._places(row)]

    def segments(self, row: int) -> Segments:
        """Those that have a pixel; raises as `read`."""
        known = range(1, len(self.ids[row]) + 1)
        labels, crowds = self.labels[row].tolist(), self.crowds[row].tolist()
        return segments_of_map(self._places(row), known, labels, crowds)

    def segment_labels(self, row: int) -> np.ndarray:
        """u8[S] of those that are no crowd."""
        return self.labels[row][~self.crowds[row]]

    def _places(self, row: int) -> np.ndarray:
        """i[H, W]: 0 in no segment, else the place in `ids` from 1 on."""
        name = self.example_name(row)
        color = decode_image(read_image_file(name), name=name).astype(np.int64)
        segment = color @ np.array([1, 256, 65_536])  # [H, W]
        found, place = np.unique(segment, return_inverse=True)
        ids = np.concatenate([[0], self.ids[row]])
        at = np.minimum(np.searchsorted(ids, found), len(ids) - 1)
        unknown = found[ids[at] != found]
        if len(unknown):
            raise DamagedImageError(
                f"{name}: {len(unknown)} segments that segments_info does not list, such as"
                f" {unknown[0]}"
            )
        return at[place].reshape(segment.shape)


def is_panoptic(content: dict) -> bool:
    entries = content["annotations"]
    return any(isinstance(e, dict) and "segments_info" in e for e in entries[:20])


def read_panoptic(
    spec: str, path: Path, content: dict, images: Path | None
) -> tuple[RegionReading, PanopticMasks]:
    """(images in the order of the file, what reads their masks).

    PNGs lie in a folder named as the JSON file, beside it, or beside the JSON file itself. Images
    without an annotation are left out by `paths` of the masks being "".
    """
    reading = RegionReading(
        spec, images or _images_of(path, content), "{file}: annotations[{entry}]", [str(path)]
    )
    declared = read_categories(reading, path, content)
    skipped = add_images(reading, path, content)
    if len(reading.names) > MAX_CLASSES:
        raise UserError(f"{path}: {len(reading.names)} categories: {MAX_CLASSES} fit into a mask")
    own = path.parent / path.stem
    folder = own if own.is_dir() else path.parent
    inside = Inside(folder)
    count = len(reading.paths)
    files, none = [""] * count, np.zeros(0, np.int64)
    ids, labels = [none] * count, [none.astype(np.uint8)] * count
    crowds = [none.astype(bool)] * count
    for i, entry in enumerate(content["annotations"]):
        place = f"{path}: annotations[{i}]"
        image_id = get_id(entry, "image_id") if isinstance(entry, dict) else None
        if image_id is None:
            reading.complain("entry", place, "needs `image_id`, a number or text")
            continue
        if image_id not in reading.images:
            if image_id not in skipped:
                text = f"image_id {short(image_id)} is not in `images`"
                reading.complain("image", place, text, image_id)
            continue
        row, name = reading.images[image_id], entry.get("file_name")
        segments: dict[int, tuple[int, bool]] = {}
        if files[row]:
            reading.complain("id", place, f"image_id {short(image_id)} is given twice", image_id)
            continue
        if not isinstance(name, str) or "\0" in name or not name:
            reading.complain("entry", place, f"file_name {short(name)}: give the PNG's path")
            continue
        found, verdict = inside.locate(name)
        if verdict != "found":
            reading.complain("path", place, f"{short(name)}: no such file in {folder}", name)
            continue
        files[row] = found
        stated = entry.get("segments_info")
        for segment in stated if isinstance(stated, list) else ():
            number = segment.get("id") if isinstance(segment, dict) else None
            category = get_id(segment, "category_id") if isinstance(segment, dict) else None
            if type(number) is not int or not 0 < number < 2**24 or category is None:
                text = f"segments_info: {short(segment)}: needs `id` and `category_id`"
                reading.complain("entry", place, text)
                continue
            if number in segments:
                reading.complain("id", place, f"segment {number} is given twice", number)
                continue
            reading.check_category(place, category, declared)
            label = reading.category(category)
            segments[number] = min(label, IGNORED), bool(segment.get("iscrowd"))
        order = sorted(segments)
        ids[row] = np.array(order, np.int64)
        labels[row] = np.array([segments[number][0] for number in order], np.uint8)
        crowds[row] = np.array([segments[number][1] for number in order], bool)
    names = tuple(name for name, _ in reading.names)
    stuff = tuple(
        names[reading.categories[category]]
        for entry in content.get("categories") or ()
        if isinstance(entry, dict)
        and entry.get("isthing") == 0
        and (category := get_id(entry, "id")) in reading.categories
    )
    return reading, PanopticMasks(
        folder, tuple(files), tuple(ids), tuple(labels), tuple(crowds), names, stuff
    )
