"""Which format a file or folder of regions has, by what it holds.

FILE.json            COCO instances; COCO panoptic (segments_info, with its folder of PNGs);
                     Label Studio's list of tasks; one file of LabelMe
FOLDER               of LabelMe's JSON files, one an image
FILE.xml             CVAT for images 1.1
cityscapes:DIR/SPLIT leftImg8bit/ and gtFine/ in DIR
"""

from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from vision_jax.data.annotation_formats.json_file import outline, read_json, without_collector
from vision_jax.data.annotation_formats.reading import Problem, find_files
from vision_jax.data.mask_formats.cityscapes import read_cityscapes
from vision_jax.data.mask_formats.coco import is_panoptic, read_instances, read_panoptic
from vision_jax.data.mask_formats.cvat import read_cvat
from vision_jax.data.mask_formats.label_studio import is_label_studio, read_label_studio
from vision_jax.data.mask_formats.labelme import MAX_JSON_BYTES, is_labelme, read_labelme
from vision_jax.data.mask_formats.regions import RegionReading, check, finish
from vision_jax.data.masks import TABLE_FILES, MaskedImages
from vision_jax.data.segments import SegmentData
from vision_jax.data.sources import FileReader
from vision_jax.errors import UserError
from vision_jax.files import expand
from vision_jax.files import read_json as read_json_file

CITYSCAPES = "cityscapes:"


def is_of_regions(spec: str) -> bool:
    """Whether it is one of the formats at the top, by its name or, of a folder, its first JSON."""
    path = expand(spec)
    if spec.startswith(CITYSCAPES) or path.suffix.lower() in (".json", ".xml"):
        return True
    if not path.is_dir():
        return False
    names = (entry for entry in sorted(path.glob("*.json")) if entry.name not in TABLE_FILES)
    for file in islice(names, 3):
        with suppress(UserError):
            return is_labelme(read_json_file(file, MAX_JSON_BYTES))
    return False


def read_regions(spec: str, images: Path | None = None) -> MaskedImages:
    """Reads what `spec` names, but no pixel; `images` is the folder of the images.

    Raises:
      UserError: what is missing or of another format; one line with the first few of all problems.
    """
    if spec.startswith(CITYSCAPES):
        return _read_cityscapes(spec)
    with without_collector():
        reading, masks = _read(spec, images)
        check(reading)
        return masks or _of_regions(reading)


def examine_regions(spec: str, images: Path | None = None) -> list[Problem]:
    """Every problem of the file, for the doctor. Raises UserError if it can't be read at all."""
    if spec.startswith(CITYSCAPES):
        _read_cityscapes(spec)
        return []
    with without_collector():
        return _read(spec, images)[0].problems


def _of_regions(reading: RegionReading) -> MaskedImages:
    regions = finish(reading)
    reader = FileReader(regions.folder, regions.paths)
    count, around = len(regions.paths), regions.class_names[regions.unlabelled]
    return MaskedImages(
        regions.name,
        regions.class_names,
        reader,
        regions,
        count,
        note=regions.note,
        segments=SegmentData(regions, (around,), around, tuple(reading.images), ids_of(reading)),
    )


def _read(spec: str, images: Path | None) -> tuple[RegionReading, MaskedImages | None]:
    path = expand(spec)
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder of images")
    if path.is_dir():
        names = find_files(path, (".json",))
        if not names:
            raise UserError(f"{spec}: no JSON of LabelMe in it")
        return read_labelme(spec, path, names, images or path), None
    if not path.is_file():
        raise UserError(f"{spec}: no such file: give JSON or XML of regions")
    if path.suffix.lower() == ".xml":
        usual = path.parent / "images"
        return read_cvat(spec, path, images or (usual if usual.is_dir() else path.parent)), None
    content = read_json(path, masks=True)
    lists = ("images", "annotations")
    if isinstance(content, dict) and all(isinstance(content.get(key), list) for key in lists):
        if is_panoptic(content):
            return _read_panoptic(spec, path, content, images)
        return read_instances(spec, path, content, images), None
    if is_label_studio(content):
        usual = path.parent / "images"
        folder = images or (usual if usual.is_dir() else path.parent)
        return read_label_studio(spec, path, content, folder), None
    if is_labelme(content):
        return read_labelme(spec, path.parent, [path.name], images or path.parent), None
    raise UserError(
        f"{path}: no regions: COCO has the lists `images`, `annotations` and `categories`, LabelMe"
        f" has `shapes`, and Label Studio's is a list of tasks; this has {outline(content)}"
    )


def _read_panoptic(
    spec: str, path: Path, content: dict, images: Path | None
) -> tuple[RegionReading, MaskedImages]:
    reading, masks = read_panoptic(spec, path, content, images)
    kept = [row for row, png in enumerate(masks.paths) if png]
    left_out = len(masks.paths) - len(kept)
    masks = replace(
        masks,
        paths=tuple(masks.paths[row] for row in kept),
        ids=tuple(masks.ids[row] for row in kept),
        labels=tuple(masks.labels[row] for row in kept),
        crowds=tuple(masks.crowds[row] for row in kept),
    )
    return reading, MaskedImages(
        spec,
        masks.class_names,
        FileReader(Path(reading.folder), tuple(reading.paths[row] for row in kept)),
        masks,
        len(kept),
        note=f"{spec}: {left_out:,} images without annotation left out" if left_out else "",
        segments=SegmentData(
            masks,
            masks.stuff,
            None,
            tuple(np.array(list(reading.images), object)[kept]),
            ids_of(reading),
        ),
    )


def ids_of(reading: RegionReading) -> dict[str, int | str]:
    """Ids of the categories by name."""
    return {reading.names[row][0]: key for key, row in reading.categories.items()}


def _read_cityscapes(spec: str) -> MaskedImages:
    path = expand(spec.removeprefix(CITYSCAPES))
    return read_cityscapes(spec, path.parent, path.name)
