"""Cityscapes' folders: leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY, ids to the 19 train ids."""

from pathlib import Path

from vision_jax.data.folders import list_files, list_folders
from vision_jax.errors import UserError

IMAGES, MASKS = "leftImg8bit", "gtFine"
CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)
# By train id; all other ids, from 0 (unlabeled) to 33, are no class of the benchmark.
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
MOST_ID = 33


def find_cityscapes(spec: str, root: Path, split: str) -> tuple[list[str], list[str], list[str]]:
    """(images, masks, cities) of a split, paths relative to `root`.

    Raises:
      UserError: no such split, or an image without its mask.
    """
    images = root / IMAGES
    if not images.is_dir() or not (root / MASKS).is_dir():
        raise UserError(
            f"{spec}: {root} holds no {IMAGES}/ and {MASKS}/: unpack both archives there"
        )
    splits = list_folders(images)[0]
    if split not in splits:
        raise UserError(f"{spec}: {images} has no {split!r}; it has {', '.join(splits[:5])}")
    end, other = f"_{IMAGES}.png", f"_{MASKS}_labelIds.png"
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
