"""Images with boxes: one `DetectionSource` for every format, cleaned, by random access.

`read_detection_source` is the one entry. A specification is one of

    FILE.json                         COCO, or the plain JSON of one box an entry
    FOLDER                            of Pascal VOC .xml files, or YOLO's images/ and labels/
    data.yaml                         YOLO's
    tfds:NAME/SPLIT[@DATA_DIR]        prepared as array_record; read without TensorFlow
    embedded:aerial/SPLIT             aerial photos with boxes of trees, train or test
    composites:SPLIT/SEED/COUNT[/SIZE]  generated from a seed, train or test

data/annotations.py reads these as they are written. Here boxes become corners inside the image,
and category ids of any kind become labels 0 to K - 1.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data.annotations import Annotations, read_annotations
from vision_jax.data.decode import DamagedImageError, read_size
from vision_jax.data.sources import FileReader, Reader, balanced_subset
from vision_jax.errors import UserError
from vision_jax.files import expand


@dataclass(frozen=True)
class Ragged(Sequence[np.ndarray]):
    """A sequence of arrays of different lengths, in one: item i is values[offsets[i]:offsets[i+1]].

    `offsets` i64[N + 1]. 860,000 boxes cost what their numbers cost.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class StatedBoxes:
    """Boxes as a file states them: past the edge of their image, beside it or without a width.

    Of image i: boxes_xywh_px[i] f64[S, 4] (left, top, width, height), label[i] i32[S], crowd[i]
    bool[S], area[i] f64[S].
    """

    boxes_xywh_px: Ragged
    label: Ragged
    crowd: Ragged
    area: Ragged


@dataclass(frozen=True)
class DetectionSource:
    """Images with boxes by random access: `source[i]`, 0 ≤ i < len(source). Picklable.

    What is known without reading an image, of image i:
      sizes[i]: i32[2] (height, width), (0, 0) if neither the annotations nor the file tell it.
      boxes_xyxy_px[i]: f64[T, 4], inside the image and not empty.
      label[i]: i32[T] into `class_names`. crowd[i]: bool[T]. area[i]: f64[T], as the file says.
      image_ids[i], paths[i]: as the file writes them.

    `category_ids` are the file's ids by label, for results files; the class's name where the file
    lacks the class. `rows` i64[N] are the positions of the images in what `reader` reads, so that a
    part of a source is a source. `note` says what was left out, for the log ("" if nothing was).
    `stated` are the boxes before they were clipped and some left out, by which COCO's AP goes (see
    `as_stated`); None if they are the same.

    Boxes are in pixels of the stated width and height. Images are upright by EXIF, unless their
    stated size fits only the file as it is stored: then the boxes were drawn on that, and the
    image stays as it is stored. So boxes are never turned, and results fit the annotation file.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int | str, ...]
    image_ids: tuple[int | str, ...]
    paths: tuple[str, ...]
    sizes: np.ndarray
    boxes_xyxy_px: Ragged
    label: Ragged
    crowd: Ragged
    area: Ragged
    rows: np.ndarray
    reader: Reader
    note: str = ""
    stated: StatedBoxes | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The image and its T boxes.

        {"image": uint8[H, W, C], "boxes_xyxy_px": f32[T, 4], "label": i32[T], "crowd": bool[T],
        "area": f32[T], "index": i32 = i}. Raises DamagedImageError if the image can't be read, or
        is not of the size that the annotations state.
        """
        return {
            "image": self._read(i),
            "boxes_xyxy_px": self.boxes_xyxy_px[i].astype(np.float32),
            "label": self.label[i],
            "crowd": self.crowd[i],
            "area": self.area[i].astype(np.float32),
            "index": np.int32(i),
        }

    def example_name(self, i: int) -> str:
        """What to call image i in messages."""
        return self.reader.example_name(int(self.rows[i]))

    def _read(self, i: int) -> np.ndarray:
        row = int(self.rows[i])
        height, width = (int(side) for side in self.sizes[i])
        image = self.reader.read(row)
        turned = width != height and image.shape[:2] == (width, height)
        if turned and isinstance(self.reader, FileReader):
            image = self.reader.read(row, upright=False)
        if height and image.shape[:2] != (height, width):
            raise DamagedImageError(
                f"{self.example_name(i)}: the annotations say {width} × {height} pixels and the"
                f" image has {image.shape[1]} × {image.shape[0]}: correct the annotations"
            )
        return image


def read_detection_source(
    spec: str, images: str | Path | None = None, *, class_names: tuple[str, ...] | None = None
) -> DetectionSource:
    """Read the boxes that `spec` (see the top of this file) names, but no image yet.

    `images` is the folder of the images, by default the annotation file's own. With `class_names`
    (a training source's, or a checkpoint's) labels become positions in that tuple, by name. Raises
    UserError for what is missing, damaged or unknown.
    """
    if not spec:
        raise UserError("no data: set config.data.train to a COCO annotation file, for example")
    annotations = read_annotations(spec, expand(images) if images else None)
    return make_detection_source(annotations, class_names=class_names)


def make_detection_source(
    annotations: Annotations, *, class_names: tuple[str, ...] | None = None
) -> DetectionSource:
    """Clean the boxes and number the classes; see `DetectionSource` and `read_detection_source`.

    A category that labels no box and is the supercategory of another one is no class. Boxes are
    clipped to the image; what is empty then, or not finite, is left out, which `note` counts.
    `stated` keeps them for evaluation, but for numbers that are not finite.
    """
    name, count = annotations.name, len(annotations.paths)
    if not count:
        raise UserError(f"{name}: no images are listed: add images")
    reader = annotations.reader
    sizes = _known_sizes(annotations.sizes, reader)
    label_of, names, category_ids, roots = _number_classes(annotations, class_names)
    xywh = annotations.boxes_xywh_px
    limit = np.where(sizes > 0, sizes, np.inf)[annotations.box_image][:, [1, 0, 1, 0]]  # [M, 4]
    with np.errstate(invalid="ignore", over="ignore"):  # infinite numbers are left out below
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        boxes = np.clip(corners, 0, limit)
    finite = np.isfinite(xywh).all(1)
    kept = finite & (boxes[:, 2:] > boxes[:, :2]).all(1)
    by_image = np.argsort(annotations.box_image, kind="stable")

    def ragged(values: np.ndarray, of_box: np.ndarray) -> Ragged:
        order = by_image[of_box[by_image]]
        counts = np.bincount(annotations.box_image[order], minlength=count)
        return Ragged(values[order], _offsets(counts))

    label, crowd, area = label_of[annotations.box_category], annotations.crowd, annotations.area
    left_out = [f"classes {', '.join(map(repr, roots))} left out: roots without boxes"] * bool(
        roots
    )
    if not kept.all():
        first = annotations.place(int(np.flatnonzero(~kept)[0]))
        left_out.append(
            f"{(~kept).sum()} of {len(kept)} boxes left out of training: empty in the image, the"
            f" first {first}"
        )
    return DetectionSource(
        name,
        names,
        category_ids,
        annotations.image_ids,
        annotations.paths,
        sizes,
        ragged(boxes, kept),
        ragged(label, kept),
        ragged(crowd, kept),
        ragged(area, kept),
        np.arange(count),
        reader,
        f"{name}: {'; '.join(left_out)}" if left_out else "",
        StatedBoxes(*(ragged(values, finite) for values in (xywh, label, crowd, area))),
    )


def as_stated(source: DetectionSource) -> DetectionSource:
    """The source with all boxes as their file states them, in corners: the truth of evaluation.

    COCO's AP counts a box that no image shows as missed, and takes the IoU with all of a box.
    """
    if source.stated is None:
        return source
    xywh, label, crowd, area = vars(source.stated).values()
    corners = np.concatenate([xywh.values[:, :2], xywh.values[:, :2] + xywh.values[:, 2:]], axis=1)
    boxes = Ragged(corners, xywh.offsets)
    return replace(source, boxes_xyxy_px=boxes, label=label, crowd=crowd, area=area)


def check_boxes(source: DetectionSource) -> None:
    """Raises UserError if there is not one box: training would learn to find nothing."""
    if not len(source.label.values):
        count = len(source)
        raise UserError(f"{source.name}: not one box in {count} images: nothing to learn")


def images_alone(names: Sequence[str], class_names: Sequence[str]) -> DetectionSource:
    """Image files without boxes, to predict; `names` are paths. None of them is read yet."""
    none = Ragged(np.zeros(0, np.int32), np.zeros(len(names) + 1, np.int64))
    reader = FileReader(Path(), tuple(names))
    return DetectionSource(
        "--images",
        tuple(class_names),
        tuple(class_names),
        tuple(names),
        tuple(names),
        _known_sizes(np.zeros((len(names), 2)), reader),
        replace(none, values=np.zeros((0, 4))),
        none,
        replace(none, values=np.zeros(0, bool)),
        replace(none, values=np.zeros(0)),
        np.arange(len(names)),
        reader,
    )


def split_detection_source(
    source: DetectionSource, holdout: float, seed: int
) -> tuple[DetectionSource, DetectionSource]:
    """(train, held out): the share `holdout` of the images, rounded, but 1 to all less 1.

    Images are grouped by the rarest class in them, and each group gives its share as nearly as
    whole images can. Both keep the order of the source. A function of the boxes and the seed.
    Raises UserError unless 0 < holdout < 1 and there are two images.
    """
    if not 0 < holdout < 1:
        raise UserError(f"holdout {holdout}: use a share between 0 and 1, say 0.1")
    total = len(source)
    if total < 2:
        raise UserError(f"{source.name}: one image can't be split: give a separate evaluation set")
    share = min(max(round(holdout * total), 1), total - 1) / total
    rng = np.random.default_rng(seed)
    by_group = np.lexsort([rng.random(total), _rarest_class(source)])
    # Evenly spaced along the groups: exactly the share in all, and nearly so in each group.
    at = np.floor(share * np.arange(total + 1) + rng.random()).astype(np.int64)
    held_out = np.zeros(total, bool)
    held_out[by_group[np.diff(at) > 0]] = True
    return part_of(source, ~held_out), part_of(source, held_out)


def detection_subset(source: DetectionSource, count: int, seed: int) -> DetectionSource:
    """`count` random images in the source's order, the classes in equal parts as far as possible.

    An image counts for the rarest class in it. Subsets of one seed are nested. Raises UserError if
    the source has fewer images.
    """
    if not 0 < count <= len(source):
        raise UserError(f"{source.name}: a subset of {count}: use 1 to {len(source)}")
    return part_of(source, balanced_subset(_rarest_class(source), count, seed))


def part_of(source: DetectionSource, kept: np.ndarray) -> DetectionSource:
    """The images for which `kept` bool[N] is true, in their order."""
    places = np.flatnonzero(kept)

    def part(ragged: Ragged) -> Ragged:
        counts = np.diff(ragged.offsets)
        return Ragged(ragged.values[np.repeat(kept, counts)], _offsets(counts[kept]))

    stated = source.stated
    return replace(
        source,
        image_ids=tuple(source.image_ids[i] for i in places),
        paths=tuple(source.paths[i] for i in places),
        sizes=source.sizes[kept],
        boxes_xyxy_px=part(source.boxes_xyxy_px),
        label=part(source.label),
        crowd=part(source.crowd),
        area=part(source.area),
        rows=source.rows[kept],
        stated=stated and StatedBoxes(*map(part, vars(stated).values())),
    )


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _rarest_class(source: DetectionSource) -> np.ndarray:
    """i64[N]: of each image the label that the fewest boxes of the source have, K if no box."""
    classes = len(source.class_names)
    counts = np.bincount(source.label.values, minlength=classes)
    order = np.argsort(counts, kind="stable")  # rarest first
    rank = np.empty(classes + 1, np.int64)
    rank[order], rank[classes] = np.arange(classes), classes
    rarest = np.full(len(source), classes, np.int64)
    image = np.repeat(np.arange(len(source)), np.diff(source.label.offsets))
    np.minimum.at(rarest, image, rank[source.label.values])
    return rarest


def _known_sizes(stated: np.ndarray, reader: Reader) -> np.ndarray:
    """The stated sizes; those that are not stated are read from the files' headers."""
    sizes = stated.astype(np.int32)  # a copy
    for row in np.flatnonzero((stated <= 0).any(1)):
        try:
            if isinstance(reader, FileReader):
                sizes[row] = read_size(reader.example_name(int(row)))
            else:
                sizes[row] = reader.read(int(row)).shape[:2]
        except DamagedImageError:
            sizes[row] = 0  # it is skipped, counted and named when its turn comes
    return sizes


def _number_classes(
    annotations: Annotations, class_names: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...], tuple[int | str, ...], list[str]]:
    """(label of each category i32[C], class names, category id of each label, roots left out)."""
    spec, names = annotations.name, annotations.category_names
    used = np.bincount(annotations.box_category, minlength=len(names)) > 0
    parents = Counter(annotations.supercategories)
    root = [
        not used[c] and parents[names[c]] > (annotations.supercategories[c] == names[c])
        for c in range(len(names))
    ]
    own = [c for c in range(len(names)) if not root[c]]
    first: dict[str, int] = {}
    for c in own:
        if first.setdefault(names[c], c) != c:
            one, other = annotations.category_ids[first[names[c]]], annotations.category_ids[c]
            raise UserError(
                f"{spec}: the categories {one!r} and {other!r} are both named {names[c]!r}: rename"
                " one, or give both the same id"
            )
    if class_names is None:
        class_names = tuple(names[c] for c in own)
        if not class_names:
            raise UserError(f"{spec}: no categories: list the classes in it")
    position = {name: label for label, name in enumerate(class_names)}
    label_of = np.full(len(names), -1, np.int32)
    for c in own:
        if names[c] in position:
            label_of[c] = position[names[c]]
        elif used[c]:
            few = ", ".join(class_names[:5]) + (", …" if len(class_names) > 5 else "")
            raise UserError(
                f"{spec}: class {names[c]!r} is not among the {len(class_names)} classes ({few}):"
                " rename or remove it"
            )
    category_ids = tuple(
        annotations.category_ids[first[name]] if name in first else name for name in class_names
    )
    return label_of, class_names, category_ids, [names[c] for c in range(len(names)) if root[c]]
