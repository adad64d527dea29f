"""Cityscapes' folders: leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY, ids to the 19 train ids.

Of each image gtFine has *_labelIds.png, the id of each pixel's class, and *_instanceIds.png, where
a pixel of a thing is 1,000 times that id plus the number of the thing. Where it is the id alone,
the class is stuff, or the pixel is of several things that nobody told apart, "cargroup" in
*_polygons.json. Source: cityscapesScripts 2.2, preparation/json2instanceImg.py.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vision_jax.data.decode import read_image_file
from vision_jax.data.folders import list_files, list_folders
from vision_jax.data.masks import IGNORED, ClassTable, FileMasks, MaskedImages, decode_mask
from vision_jax.data.segments import SegmentData, Segments, segments_of_map
from vision_jax.data.sources import FileReader
from vision_jax.errors import UserError
from vision_jax.files import read_json

IMAGES, MASKS = "leftImg8bit", "gtFine"
LABELS, INSTANCES, POLYGONS = "_labelIds.png", "_instanceIds.png", "_polygons.json"
CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)
# By train id; all other ids, from 0 (unlabeled) to 33, are no class of the benchmark.
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
MOST_ID = 33
FIRST_THING = 24  # of the ids; those up to the last are of things, 29 and 30 among them
OF_A_CLASS = 1000  # numbers of things


def read_cityscapes(spec: str, root: Path, split: str) -> MaskedImages:
    """Lists a split, and reads no pixel.

    Raises:
      UserError: no such split, or an image without its mask.
    """
    images, masks, cities = _find(spec, root, split)
    values = tuple(range(MOST_ID + 1))
    indices = tuple(IDS.index(value) if value in IDS else IGNORED for value in values)
    table = ClassTable("Cityscapes' table of ids", CLASSES, values, indices)
    return MaskedImages(
        spec,
        CLASSES,
        FileReader(root, tuple(images)),
        FileMasks(root, tuple(masks), table),
        len(images),
        np.unique(cities, return_inverse=True)[1] if cities else None,
        segments=SegmentData(
            InstanceIds(root, tuple(mask.removesuffix(LABELS) for mask in masks), table),
            tuple(name for name, number in zip(CLASSES, IDS, strict=True) if number < FIRST_THING),
            image_ids=tuple(Path(path).name.removesuffix(f"_{IMAGES}.png") for path in images),
            category_ids=dict(zip(CLASSES, IDS, strict=True)),
        ),
    )


def _find(spec: str, root: Path, split: str) -> tuple[list[str], list[str], list[str]]:
    """(images, masks, cities) of a split, paths relative to `root`."""
    images = root / IMAGES
    if not images.is_dir() or not (root / MASKS).is_dir():
        raise UserError(
            f"{spec}: {root} holds no {IMAGES}/ and {MASKS}/: unpack both archives there"
        )
    splits = list_folders(images)[0]
    if split not in splits:
        raise UserError(f"{spec}: {images} has no {split!r}; it has {', '.join(splits[:5])}")
    end, other = f"_{IMAGES}.png", f"_{MASKS}{LABELS}"
    found = [p for p in list_files(images / split, (".png",))[0] if p.endswith(end)]
    labelled = {p for p in list_files(root / MASKS / split, (".png",))[0] if p.endswith(other)}
    masks = [path.removesuffix(end) + other for path in found]
    missing = [mask for mask in masks if mask not in labelled]
    if missing:
        raise UserError(
            f"{root / MASKS / split / missing[0]}: no such file, nor {len(missing) - 1:,} others:"
            " each image needs its labelIds"
        )
    return (
        [f"{IMAGES}/{split}/{path}" for path in found],
        [f"{MASKS}/{split}/{path}" for path in masks],
        [path.partition("/")[0] for path in found],
    )


@dataclass(frozen=True)
class InstanceIds:
    """Segments out of *_instanceIds.png.

    Attributes:
      folder: of the paths.
      stems: paths of an image's files in gtFine, up to what tells them apart.
      table: of the ids.
    """

    folder: Path
    stems: tuple[str, ...]
    table: ClassTable

    def segments(self, row: int) -> Segments:
        """Of every id or number that has a pixel; of ids that are no class the label is 255.

        Raises:
          DamagedImageError: the file can't be read.
          UserError: a value that is no id, nor a number of a thing.
        """
        name = str(self.folder / (self.stems[row] + INSTANCES))
        value = decode_mask(read_image_file(name), name=name)
        known = np.unique(value).astype(np.int64)
        number = np.where(known < OF_A_CLASS, known, known // OF_A_CLASS)
        strange = (number > MOST_ID) | ((known >= OF_A_CLASS) & (number < FIRST_THING))
        if strange.any():
            raise UserError(
                f"{name}: the value {known[strange][0]} is no id of Cityscapes, 0 to {MOST_ID}, nor"
                f" 1,000 times one of a thing, {FIRST_THING} to {MOST_ID}, and its number"
            )
        label = self.table.look_up(number, name=name)
        crowd = (number >= FIRST_THING) & (known < OF_A_CLASS)
        return segments_of_map(value, known.tolist(), label.tolist(), crowd.tolist())

    def stamp(self, row: int) -> int:
        """The file's size in bytes, -1 without one: what tells an edit of things alone."""
        path = self.folder / (self.stems[row] + INSTANCES)
        return path.stat().st_size if path.is_file() else -1

    def segment_labels(self, row: int) -> np.ndarray:
        """u8[S] by *_polygons.json: what others hide is counted too.

        Raises:
          UserError: there is no such file, or it is another.
        """
        path = self.folder / (self.stems[row] + POLYGONS)
        content = read_json(path)
        objects = content.get("objects") if isinstance(content, dict) else None
        if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
            raise UserError(f"{path}: no list `objects`: unpack Cityscapes' gtFine again")
        names = [one.get("label") for one in objects]
        return np.array([CLASSES.index(name) for name in names if name in CLASSES], np.uint8)
