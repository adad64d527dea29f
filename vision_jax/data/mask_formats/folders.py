"""Folders of images and masks, whose files have the same name, but for the ending."""

from pathlib import Path

from vision_jax.data.folders import list_files, list_folders
from vision_jax.data.masks import (
    MASK_SUFFIXES,
    FileMasks,
    MaskedImages,
    find_table,
    read_class_table,
)
from vision_jax.data.sources import IMAGE_SUFFIXES, FileReader
from vision_jax.errors import UserError

IMAGE_FOLDERS = ("images", "image", "JPEGImages", "img", "imgs")
MASK_FOLDERS = ("masks", "mask", "annotations", "labels", "SegmentationClass", "label")
MASK_ENDINGS = ("", "_mask", "_masks", "_label", "_labels", "_seg", "_gt", "_L")


def read_folder(
    folder: Path, masks: Path | None, classes: Path | None, reduce_zero: bool
) -> MaskedImages:
    """Lists the pairs, and reads the table of classes, but no pixel.

    Args:
      folder: with images/ and masks/ in it, or images/SPLIT with masks/SPLIT beside it.
      masks: folder of the masks, None to find it.
      classes: file of the classes, None to find it.
      reduce_zero: masks count classes from 1 and are 0 where there is none (ADE20K).

    Raises:
      UserError: what is missing, or two masks of one name.
    """
    images, masks = _find_folders(folder, masks)
    table = read_class_table(classes or find_table(folder, images, masks))
    table = table.reduced() if reduce_zero else table
    image_paths, _ = list_files(images, IMAGE_SUFFIXES, follow_links=True)
    mask_paths, others = list_files(masks, MASK_SUFFIXES, follow_links=True)
    if not image_paths:
        raise UserError(f"{images}: no image in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if not mask_paths:
        lossy = list_files(masks, (".jpg", ".jpeg"))[0] if others else []
        advice = ": JPEG changes classes at every edge: save masks as PNG" if lossy else ""
        raise UserError(f"{masks}: no mask in it ({', '.join(sorted(MASK_SUFFIXES))}){advice}")
    by_stem: dict[str, str] = {}
    for path in mask_paths:
        first = by_stem.setdefault(_stem(path), path)
        if first != path:
            raise UserError(f"{masks}: {first} and {path} are of one name: leave one of them")
    pairs: list[tuple[str, str]] = []
    alone: list[str] = []
    for path in image_paths:
        found = [by_stem[name] for end in MASK_ENDINGS if (name := _stem(path) + end) in by_stem]
        if found:
            pairs.append((path, found[0]))
        else:
            alone.append(path)
    if not pairs:
        raise UserError(
            f"{masks}: no mask has the name of an image, such as {_stem(alone[0])}.png for"
            f" {images / alone[0]}: rename the masks"
        )
    notes = []
    if alone:
        notes.append(f"{len(alone):,} images without a mask left out, the first {alone[0]}")
    idle = len(mask_paths) - len({mask for _, mask in pairs})
    if idle:
        notes.append(f"{idle:,} masks without an image left out")
    return MaskedImages(
        str(folder),
        table.class_names,
        FileReader(images, tuple(image for image, _ in pairs)),
        FileMasks(masks, tuple(mask for _, mask in pairs), table),
        len(pairs),
        note=f"{folder}: {'; '.join(notes)}" if notes else "",
    )


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _find_folders(folder: Path, masks: Path | None) -> tuple[Path, Path]:
    """(of images, of masks): stated, inside the folder, or beside it by its name."""
    names, _ = list_folders(folder)
    own = [name for name in IMAGE_FOLDERS if name in names]
    of_masks = [name for name in MASK_FOLDERS if name in names]
    images = folder / own[0] if own and (masks or of_masks) else folder
    if masks is not None:
        if not masks.is_dir():
            raise UserError(f"{masks}: no such folder: give the one of the masks")
        return images, masks
    if own and of_masks:
        return images, folder / of_masks[0]
    parts = folder.absolute().parts
    for at in reversed(range(len(parts))):
        if parts[at] in IMAGE_FOLDERS:
            for name in MASK_FOLDERS:
                beside = Path(*parts[:at], name, *parts[at + 1 :])
                if beside.is_dir():
                    return folder, beside
    hint = f" (it has {', '.join(names[:5])})" if names else ""
    raise UserError(
        f"{folder}: no images/ and masks/ in it{hint}: name the folders so, or give the masks'"
        " folder as config.data.masks"
    )
