"""Segments of an image: instances of things, and regions of stuff, each with a mask of its own.

Masks are COCO's run lengths, {"size": [H, W], "counts": bytes}, as hotcoco's and pycocotools'
`encode` give them. TARGETS say which segments a task is about:

    instance    things alone, each a segment; they may overlap
    panoptic    every pixel in one segment at most: things, and each class of stuff as a whole
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from hotcoco import mask as coco_mask

SEMANTIC, INSTANCE, PANOPTIC = TARGETS = ("semantic", "instance", "panoptic")
IGNORED = 255  # in a mask: the pixel has no class, and neither loss nor metric counts it
Runs = dict[str, Any]


@dataclass(frozen=True)
class Segments:
    """S segments of an image of (height, width) `size`, in the order in which they are painted.

    Attributes:
      size: of the image in pixels.
      label: u8[S], class indices; 255 is of no class.
      crowd: bool[S], several things in one mask: it excuses predictions and is no target.
      area: f64[S] in pixels, as a file states it, by which COCO parts small from large.
      masks: S run lengths.
      score: f64[S] of predictions, None of the truth.
    """

    size: tuple[int, int]
    label: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    masks: tuple[Runs, ...]
    score: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: np.ndarray) -> "Segments":
        """Those of a mask or an index array."""
        places = np.arange(len(self))[rows]
        return replace(
            self,
            label=self.label[places],
            crowd=self.crowd[places],
            area=self.area[places],
            masks=tuple(self.masks[i] for i in places),
            score=None if self.score is None else self.score[places],
        )

    def pixels(self) -> np.ndarray:
        """bool[S, H, W]."""
        if not self.masks:
            return np.zeros((0, *self.size), bool)
        return coco_mask.decode(list(self.masks)).transpose(2, 0, 1).view(bool)

    def map(self) -> np.ndarray:
        """i32[H, W]: the last segment painted over each pixel, counted from 0, or -1."""
        painted = np.full(self.size, -1, np.int32)
        for number, runs in enumerate(self.masks):
            painted[coco_mask.decode(runs).view(bool)] = number
        return painted


class SegmentReader(Protocol):
    """What segments are read from, by row. Picklable; threads share it."""

    def segments(self, row: int) -> Segments:
        """All of an image, labels being its own class indices.

        Raises:
          DamagedImageError: it can't be read.
        """

    def segment_labels(self, row: int) -> np.ndarray:
        """u8[S] of those that are no crowd, without reading any pixel."""


@dataclass(frozen=True)
class SegmentData:
    """What a format that tells instances apart says of them. Picklable.

    Attributes:
      reader: of the segments.
      stuff: names of classes without instances.
      around: the one of these that pixels of no region have, None where files name all.
      image_ids: by row, as the file states them; () for rows.
      category_ids: by class name; {} for class indices from 1 on.
    """

    reader: SegmentReader
    stuff: tuple[str, ...] = ()
    around: str | None = None
    image_ids: tuple[int | str, ...] = ()
    category_ids: Mapping[str, int | str] = field(default_factory=dict)


def encode(masks: Iterable[np.ndarray]) -> tuple[Runs, ...]:
    """Run lengths of masks bool[H, W]."""
    return tuple(coco_mask.encode(np.asfortranarray(mask)) for mask in masks)


def encode_map(numbers: np.ndarray, known: Collection[int]) -> dict[int, Runs]:
    """Run lengths of each number that a map i[H, W] has a pixel of, in one pass over the map.

    Args:
      numbers: the map.
      known: which numbers.
    """
    height, width = numbers.shape
    flat = numbers.T.reshape(-1)  # COCO counts down the columns
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    order = np.argsort(flat[starts], kind="stable")
    ordered = flat[starts][order]
    found = {}
    for number in known:
        first, last = np.searchsorted(ordered, (number, number + 1))
        if first < last:
            own = order[first:last]
            bounds = np.stack([starts[own], ends[own]], 1).reshape(-1)  # outside, inside, outside
            lengths = np.diff(bounds, prepend=0).tolist()
            rest = [flat.size - int(bounds[-1])] if bounds[-1] < flat.size else []
            counts = {"size": [height, width], "counts": lengths + rest}
            found[number] = coco_mask.fr_py_objects(counts, height, width)
    return found


def make_segments(
    masks: Iterable[np.ndarray | Runs],
    size: tuple[int, int],
    label: Iterable[int],
    *,
    crowd: Iterable[bool] | None = None,
    area: np.ndarray | None = None,
    score: np.ndarray | None = None,
) -> Segments:
    """Segments of masks bool[H, W] each, or of run lengths.

    Args:
      masks: S.
      size: (height, width).
      label: S class indices.
      crowd: none by default.
      area: where a file states it, NaN where it doesn't; by default the masks' pixels.
      score: of predictions.
    """
    runs = tuple(one if isinstance(one, dict) else encode([one])[0] for one in masks)
    pixels = np.array([coco_mask.area(one) for one in runs], np.float64)
    return Segments(
        size,
        np.array(list(label), np.uint8),
        np.zeros(len(runs), bool) if crowd is None else np.array(list(crowd), bool),
        pixels if area is None else np.where(np.isnan(area), pixels, area),
        runs,
        score,
    )


def segments_of_map(
    numbers: np.ndarray, known: Sequence[int], label: Sequence[int], crowd: Sequence[bool]
) -> Segments:
    """Segments of a map of their numbers i[H, W], those that have a pixel.

    Args:
      numbers: what is not among `known` is in no segment.
      known: numbers of segments.
      label: of the same segments.
      crowd: likewise.
    """
    runs = encode_map(numbers, known)
    kept = [i for i, number in enumerate(known) if number in runs]
    return make_segments(
        [runs[known[i]] for i in kept],
        (numbers.shape[0], numbers.shape[1]),
        [label[i] for i in kept],
        crowd=[crowd[i] for i in kept],
    )


def flatten(segments: Segments, stuff: Collection[int], around: int | None) -> Segments:
    """Panoptic segments of any: the upper one has a pixel, and stuff of a class is one segment.

    Args:
      segments: in the order in which they are painted.
      stuff: class indices.
      around: the class of what no segment covers, one of stuff; None for none.
    """
    numbers = np.arange(len(segments))
    plain = segments.label != IGNORED
    for label in stuff:
        same = (segments.label == label) & ~segments.crowd
        numbers[same] = numbers[same].min(initial=len(numbers))
    labels, crowds = segments.label.tolist(), segments.crowd.tolist()
    painted = segments.map()
    merged = np.where(painted < 0, -1, numbers[painted] if len(numbers) else -1)
    known = [i for i in dict.fromkeys(numbers.tolist()) if plain[i]]
    if around is not None:
        same_class = [i for i in known if labels[i] == around and not crowds[i]]
        number = same_class[0] if same_class else len(labels)
        merged[painted < 0] = number
        if not same_class:
            known, labels, crowds = [*known, number], [*labels, around], [*crowds, False]
    return segments_of_map(merged, known, [labels[i] for i in known], [crowds[i] for i in known])
