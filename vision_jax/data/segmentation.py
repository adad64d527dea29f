"""Images with masks: one `SegmentationSource` for every format, by random access.

`read_segmentation_source` is the one entry. A specification is one of

    FOLDER                      with images/ and masks/ in it, or images/SPLIT with masks/SPLIT
                                beside it; files of the same name, but for the ending
    FILE.json                   COCO instances, COCO panoptic, LabelMe, Label Studio
    FOLDER                      of LabelMe's JSON files
    FILE.xml                    CVAT for images 1.1
    cityscapes:DIR/SPLIT        leftImg8bit/ and gtFine/ in DIR
    volumes:DIR[?OPTIONS]       NIfTI, DICOM and deep TIFF: see data/volumes/source.py
    embedded:nuclei/SPLIT       a micrograph of cell nuclei, train or test
    driving:SPLIT/SEED/COUNT[/SIZE]  street scenes drawn from a seed, train or test

What the values of a folder's masks mean says a table of classes (data/masks.py), classes.json or
classes.csv in the folder, or above it; data/mask_formats/ reads the files that name regions.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data import driving
from vision_jax.data.decode import DamagedImageError, read_size
from vision_jax.data.mask_formats.files import is_of_regions, read_regions
from vision_jax.data.mask_formats.folders import read_folder
from vision_jax.data.masks import IGNORED, MAX_CLASSES, ArrayMasks, MaskedImages, MaskReader
from vision_jax.data.nuclei import EMBEDDED, read_nuclei
from vision_jax.data.segments import (
    INSTANCE,
    SEMANTIC,
    SegmentData,
    Segments,
    flatten,
    make_segments,
)
from vision_jax.data.sources import FileReader, Reader
from vision_jax.data.volumes.source import VOLUMES, VolumeReader, read_volumes
from vision_jax.errors import UserError, nearest
from vision_jax.files import expand


@dataclass(frozen=True)
class SegmentationSource:
    """Images with masks by random access: `source[i]`, 0 ≤ i < len(source). Picklable.

    `masks` gives class indices by its own table, which `relabel` u8[256] turns into positions in
    `class_names`; None leaves them. `rows` i64[N] are the positions of the examples in what
    `reader` and `masks` read, so that a part of a source is a source. `groups` i64[N], if any, are
    what belongs together, such as the slices of a patient's volume: a split keeps each whole.
    `note` says what was left out when the source was read, for the log ("" if nothing was).

    `targets` (segments.TARGETS) say what an example has: a mask of classes, or segments out of
    `segment_data`, whose classes of stuff are among `class_names`.

    Images are upright by EXIF, unless their mask's size fits only the file as it is stored: then
    the mask was drawn on that, and the image stays as it is stored. Masks are never turned.
    """

    name: str
    class_names: tuple[str, ...]
    rows: np.ndarray
    reader: Reader
    masks: MaskReader
    relabel: np.ndarray | None = None
    groups: np.ndarray | None = None
    note: str = ""
    targets: str = SEMANTIC
    segment_data: SegmentData | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"image": u8[H, W, C], "mask": u8[H, W] of class indices, 255 ignored, "index": i32 = i}.

        Of other targets than semantic ones "segments" in place of the mask.

        Raises:
          DamagedImageError: image or mask can't be read, or they differ in size.
          UserError: the mask has a value that is no class.
        """
        truth: np.ndarray | Segments
        if self.targets == SEMANTIC:
            name, truth = "mask", self.mask(i)
            height, width = truth.shape
        else:
            name, truth = "segments", self.segments(i)
            height, width = truth.size
        row = int(self.rows[i])
        image = self.reader.read(row)
        turned = height != width and image.shape[:2] == (width, height)
        if turned and isinstance(self.reader, FileReader):
            image = self.reader.read(row, upright=False)
        if image.shape[:2] != (height, width):
            raise DamagedImageError(
                f"{self.example_name(i)}: the image has {image.shape[1]} × {image.shape[0]} pixels"
                f" and its mask {width} × {height}: save the mask at the image's size"
            )
        return {"image": image, name: truth, "index": np.int32(i)}

    def mask(self, i: int) -> np.ndarray:
        """u8[H, W], the mask alone; raises as `source[i]`."""
        mask = self.masks.read(int(self.rows[i]))
        return mask if self.relabel is None else self.relabel[mask]

    def segments(self, i: int) -> Segments:
        """The image's instances, or its panoptic segments; raises as `source[i]`."""
        data = self.segment_data
        assert data is not None
        found = data.reader.segments(int(self.rows[i]))
        relabel = np.arange(256, dtype=np.uint8) if self.relabel is None else self.relabel
        found = replace(found, label=relabel[found.label])
        if self.targets == INSTANCE:
            return found[found.label != IGNORED]
        place = self.class_names.index
        around = None if data.around is None else place(data.around)
        return flatten(found, [place(name) for name in data.stuff], around)

    def segment_counts(self, i: int) -> np.ndarray:
        """i64[K]: how many targets the image may have of each class, by no pixel."""
        data = self.segment_data
        assert data is not None
        label = data.reader.segment_labels(int(self.rows[i]))
        label = label if self.relabel is None else self.relabel[label]
        counts = np.bincount(label[label != IGNORED], minlength=len(self.class_names))
        for name in data.stuff:
            at = self.class_names.index(name)
            counts[at] = min(counts[at] + (name == data.around), 1)
        return counts

    @property
    def stuff(self) -> tuple[str, ...]:
        """Names of the classes without instances."""
        return () if self.segment_data is None else self.segment_data.stuff

    def image_id(self, i: int) -> int | str:
        """Of image i, as its file states it; else its row."""
        ids = () if self.segment_data is None else self.segment_data.image_ids
        row = int(self.rows[i])
        return ids[row] if ids else row

    def category_ids(self) -> list[int | str]:
        """By label, as the file states them; else from 1 on."""
        ids = {} if self.segment_data is None else self.segment_data.category_ids
        return [ids.get(name, label) for label, name in enumerate(self.class_names, start=1)]

    def example_name(self, i: int) -> str:
        """What to call image i in messages."""
        return self.reader.example_name(int(self.rows[i]))


def read_segmentation_source(
    spec: str,
    masks: str | Path | None = None,
    *,
    images: str | Path | None = None,
    classes: str | Path | None = None,
    reduce_zero: bool = False,
    class_names: tuple[str, ...] | None = None,
    targets: str = SEMANTIC,
    stuff: Collection[str] = (),
) -> SegmentationSource:
    """Read the list of images and masks that `spec` (see the top of this file) names, and no pixel.

    Args:
      spec: of the data.
      masks: folder of the masks, by default found beside the images.
      images: folder of the images of a file that names regions, by default found beside it.
      classes: file of the classes, by default found in the folder or above it.
      reduce_zero: masks count classes from 1 and are 0 where there is none (ADE20K).
      class_names: a training source's, or a checkpoint's: class indices become positions in them,
        by name.
      targets: of segments.TARGETS.
      stuff: classes without instances; () for those that the file says.

    Raises:
      UserError: what is missing, empty or unknown.
    """
    if not spec:
        raise UserError("no data: set config.data.train to a folder with images/ and masks/")
    found = _read(
        spec,
        expand(masks) if masks else None,
        expand(images) if images else None,
        expand(classes) if classes else None,
        reduce_zero,
        targets,
    )
    return make_segmentation_source(found, class_names=class_names, targets=targets, stuff=stuff)


def _read(
    spec: str,
    masks: Path | None,
    images: Path | None,
    classes: Path | None,
    reduce_zero: bool,
    targets: str,
) -> MaskedImages:
    """By the reader of its format, of which each has a line here."""
    if spec.startswith(EMBEDDED):
        return read_nuclei(spec, targets)
    if spec.startswith(driving.DRIVING):
        images_of, drawn = driving.read_scenes(spec)
        named = driving.CLASS_NAMES
        masks_of = ArrayMasks(spec, drawn)
        return MaskedImages(spec, named, images_of, masks_of, len(drawn), note=driving.NOTE)
    if spec.startswith(VOLUMES):
        return read_volumes(spec, masks, classes)
    if masks is None and is_of_regions(spec):
        return read_regions(spec, images)
    path = expand(spec)
    if not path.is_dir():
        raise UserError(f"{spec}: no such folder: give one with images/ and masks/ in it")
    return read_folder(path, masks, classes, reduce_zero)


def make_segmentation_source(
    found: MaskedImages,
    *,
    class_names: tuple[str, ...] | None = None,
    targets: str = SEMANTIC,
    stuff: Collection[str] = (),
) -> SegmentationSource:
    """Number the classes: what every reader of a format ends with.

    Args:
      found: by the reader of a format.
      class_names: what class indices become positions in, by name; None for the reader's own.
      targets: of segments.TARGETS. Instances are of classes that are no stuff.
      stuff: classes without instances; () for those that the reader says.

    Raises:
      UserError: no image, a class that `class_names` has not, or a format without instances.
    """
    name, own = found.name, found.class_names
    data = _segment_data(found, targets, stuff)
    if not found.count:
        raise UserError(f"{name}: no images are listed: add images")
    if not 0 < len(own) <= MAX_CLASSES or len(set(own)) < len(own):
        raise UserError(f"{name}: {len(own)} classes: give 1 to {MAX_CLASSES}, each name once")
    relabel = None
    wanted = list(own)
    if targets == INSTANCE and data is not None:
        wanted = [one for one in own if one not in data.stuff]
        data = replace(data, stuff=(), around=None)
    class_names = tuple(wanted) if class_names is None else class_names
    if class_names != own:
        position = {class_name: i for i, class_name in enumerate(class_names)}
        relabel = np.full(256, IGNORED, np.uint8)
        for index, class_name in enumerate(own):
            if class_name not in wanted:
                continue
            if class_name not in position:
                few = ", ".join(class_names[:5]) + (", …" if len(class_names) > 5 else "")
                raise UserError(
                    f"{name}: class {class_name!r} is not among the {len(class_names)} classes"
                    f" ({few}): rename it, or make it null to ignore it"
                )
            relabel[index] = position[class_name]
    return SegmentationSource(
        name,
        class_names,
        np.arange(found.count),
        found.reader,
        found.masks,
        relabel,
        found.groups,
        found.note,
        targets,
        data,
    )


def _segment_data(found: MaskedImages, targets: str, stuff: Collection[str]) -> SegmentData | None:
    """What the targets are made of, with the classes of stuff that are asked for; None of masks.

    Raises:
      UserError: the format has no instances, names of no class, or no class of things.
    """
    if targets == SEMANTIC:
        return None
    data = found.segments
    if data is None:
        raise UserError(
            f"{found.name}: names the class of each pixel, and no instances, which config.data"
            f".targets={targets} needs: give COCO instances or panoptic JSON, LabelMe, CVAT,"
            " Label Studio or Cityscapes, or take semantic targets"
        )
    for one in stuff:
        if one not in found.class_names:
            raise UserError(
                f"{found.name}: config.data.stuff {one!r} is none of its classes"
                f"{nearest(one, list(found.class_names))}"
            )
    around = [] if data.around is None else [data.around]
    listed = tuple(dict.fromkeys([*around, *stuff])) if stuff else data.stuff
    if set(listed) >= set(found.class_names):
        raise UserError(f"{found.name}: every class is stuff: instances need a class of things")
    return replace(data, stuff=listed)


def split_segmentation_source(
    source: SegmentationSource, holdout: float, seed: int
) -> tuple[SegmentationSource, SegmentationSource]:
    """(train, held out): the share `holdout` of the images, rounded, but 1 to all less 1.

    Of a source with groups whole groups, as many as come nearest to the share. Both keep the order
    of the source. A function of the number of images, the groups and the seed.

    Raises:
      UserError: unless 0 < holdout < 1 and there are two images, or two groups.
    """
    if not 0 < holdout < 1:
        raise UserError(f"holdout {holdout}: use a share between 0 and 1, say 0.1")
    groups = np.arange(len(source)) if source.groups is None else source.groups
    names, of_image = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        what = "one image" if source.groups is None else "one group of images that belong together"
        raise UserError(
            f"{source.name}: {what} can't be split: give a separate evaluation set, config.data"
            ".eval"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    sizes = np.cumsum(np.bincount(of_image)[order])[:-1]  # held out, of 1 to all less 1 groups
    kept = int(np.argmin(np.abs(sizes - holdout * len(source)))) + 1
    held_out = np.isin(of_image, order[:kept])
    return segmentation_part(source, ~held_out), segmentation_part(source, held_out)


def segmentation_subset(source: SegmentationSource, count: int, seed: int) -> SegmentationSource:
    """`count` random images in the source's order; subsets of one seed are nested.

    Raises:
      UserError: the source has fewer images.
    """
    if not 0 < count <= len(source):
        raise UserError(f"{source.name}: a subset of {count}: use 1 to {len(source)}")
    kept = np.zeros(len(source), bool)
    kept[np.random.default_rng(seed).permutation(len(source))[:count]] = True
    return segmentation_part(source, kept)


def segmentation_part(source: SegmentationSource, kept: np.ndarray) -> SegmentationSource:
    """The images for which `kept` bool[N] is true, in their order."""
    groups = source.groups if source.groups is None else source.groups[kept]
    return replace(source, rows=source.rows[kept], groups=groups)


@dataclass(frozen=True)
class NoMasks:
    """Of images without masks: all ignored, each of its image's size."""

    reader: Reader

    def read(self, row: int) -> np.ndarray:
        if isinstance(self.reader, FileReader):
            size = read_size(self.reader.example_name(row))
        else:
            size = self.reader.read(row).shape[:2]
        return np.full(size, IGNORED, np.uint8)

    def segments(self, row: int) -> Segments:
        height, width = self.read(row).shape
        return make_segments([], (height, width), [])

    def segment_labels(self, row: int) -> np.ndarray:
        del row
        return np.zeros(0, np.uint8)

    def example_name(self, row: int) -> str:
        return self.reader.example_name(row)

    def stamp(self, row: int) -> int:
        del row
        return 0


def images_to_segment(
    names: Sequence[str], class_names: Sequence[str], stuff: tuple[str, ...] = ()
) -> SegmentationSource:
    """Image files without masks, to predict; `names` are paths. None of them is read yet.

    Args:
      names: of the files.
      class_names: of the classes.
      stuff: of these, those without instances.
    """
    reader = FileReader(Path(), tuple(names))
    masks = NoMasks(reader)
    found = MaskedImages("--images", tuple(class_names), reader, masks, len(names))
    return replace(make_segmentation_source(found), segment_data=SegmentData(masks, stuff))


def slices_to_segment(reader: VolumeReader, class_names: Sequence[str]) -> SegmentationSource:
    """Slices of volumes without masks, to predict. None of them is read yet."""
    count = len(reader.slice)
    found = MaskedImages("--images", tuple(class_names), reader, NoMasks(reader), count)
    return make_segmentation_source(found)
