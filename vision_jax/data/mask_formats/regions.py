"""Regions of images, polygons and runs, and the pixels that they cover.

Polygons cover the pixels that COCO's own tool gives them: hotcoco's rasterizer, which is equal to
pycocotools' in all of 2,000 drawn cases and no slower (tests/data/test_regions.py). Corners are in
pixels from the image's upper left corner.
"""

import math
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from hotcoco import mask as coco_mask

from vision_jax.data.annotation_formats.reading import Reading, one_line
from vision_jax.data.annotation_formats.values import are_numbers, short
from vision_jax.data.decode import MAX_PIXELS, DamagedImageError, read_size
from vision_jax.data.mask_formats.runs import Runs
from vision_jax.data.masks import IGNORED, MAX_CLASSES
from vision_jax.data.segments import Segments, encode, make_segments
from vision_jax.errors import UserError

BACKGROUND = "background"
IGNORED_NAMES = frozenset({"__ignore__"})  # LabelMe's
_BACKGROUND_NAMES = frozenset({BACKGROUND, "_background_", "__background__"})
MOST_WORK = 2**36  # pixels of an image times its regions: half a minute
MOST_LENGTH = 4_000_000  # pixels along all edges of one polygon; its rasterizer takes 20 bytes each
ELLIPSE_CORNERS = 360


class RegionReading(Reading):
    """Regions in the making, and the problems met so far."""

    def __init__(self, spec: str, folder: Path, entry_form: str, files: Iterable[str] = ()):
        super().__init__(spec, folder, entry_form, files)
        self.rank = array("i")
        self.area = array("d")
        self.corners, self.ring_ends, self.region_ends = array("d"), array("q"), array("q")
        self.runs: dict[int, Runs] = {}
        self.left_out: dict[str, int] = {}  # what -> how many

    def leave_out(self, what: str, count: int = 1) -> None:
        """Counts what is no region, such as shapes without an area."""
        self.left_out[what] = self.left_out.get(what, 0) + count

    def add_polygons(
        self,
        image: int,
        category: int,
        rings: Iterable[Sequence[float]],
        entry: int,
        *,
        crowd: bool = False,
        rank: int = 0,
        area: float = math.nan,
    ) -> None:
        """A region that is the union of polygons, each x, y, x, y, ... in pixels."""
        for ring in rings:
            self.corners.extend(ring)
            self.ring_ends.append(len(self.corners))
        self._add(image, category, entry, crowd, rank, area)

    def add_runs(
        self,
        image: int,
        category: int,
        runs: Runs,
        entry: int,
        *,
        crowd: bool = False,
        rank: int = 0,
        area: float = math.nan,
    ) -> None:
        self.runs[len(self.rank)] = runs
        self._add(image, category, entry, crowd, rank, area)

    def _add(
        self, image: int, category: int, entry: int, crowd: bool, rank: int, area: float
    ) -> None:
        self.box_image.append(image)
        self.box_category.append(category)
        self.entries.append(entry)
        self.crowd.append(crowd)
        self.rank.append(rank)
        self.area.append(area)
        self.region_ends.append(len(self.ring_ends))


@dataclass(frozen=True)
class Regions:
    """M regions of N images, in the order of the files. Picklable.

    Attributes:
      name: the specification, for messages.
      folder: of the images; `paths` are relative to it, and lie inside it.
      sizes: i32[N, 2] (height, width) as the file states them, 0 where it states none.
      class_names: of the labels; pixels of no region have the label `unlabelled`.
      unlabelled: 0, a class named background, unless the file declares one itself.
      image, label: i32[M] row in `paths`; u8[M], 255 where the region is of no class.
      crowd: bool[M], which regions are several things in one, and ignored pixels.
      area: f64[M] in pixels as the file states it, NaN where it doesn't.
      order: i64[M] regions by image, and of one image in the order in which they are painted.
      starts: i64[N + 1] where each image begins in `order`.
      corners, ring_ends, region_ends: f64, i64, i64[M]: rings are corners[end before : end], and
        regions rings[end before : end].
      runs: by region, where it is no polygon.
      note: what was left out, for the log ("" if nothing was).
    """

    name: str
    folder: Path
    paths: tuple[str, ...]
    sizes: np.ndarray
    class_names: tuple[str, ...]
    unlabelled: int
    image: np.ndarray
    label: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    corners: np.ndarray
    ring_ends: np.ndarray
    region_ends: np.ndarray
    runs: dict[int, Runs]
    note: str = ""

    def read(self, row: int) -> np.ndarray:
        """u8[H, W]: labels of image `row`, later regions over earlier ones.

        The size is the stated one; where there is none, the image's in its header.

        Raises:
          DamagedImageError: more pixels, or more regions of them, than can be painted.
        """
        size, regions = self._of_image(row)
        mask = np.full(size, self.unlabelled, np.uint8)
        for region in regions:
            self._paint(mask, row, region, IGNORED if self.crowd[region] else self.label[region])
        return mask

    def segments(self, row: int) -> Segments:
        """Each region by itself, below those that are painted later; raises as `read`."""
        size, regions = self._of_image(row)

        def runs_of(region: int) -> dict[str, Any]:
            if region not in self.runs:
                pieces = [coco_mask.fr_poly(ring, *size) for ring in self._rings(region)]
                return coco_mask.merge(pieces)
            mask = np.zeros(size, np.uint8)
            self._paint(mask, row, region, 1)
            return encode([mask])[0]

        return make_segments(
            [runs_of(region) for region in regions],
            size,
            self.label[regions],
            crowd=self.crowd[regions],
            area=self.area[regions],
        )

    def segment_labels(self, row: int) -> np.ndarray:
        """u8[S] of the regions that are no crowd, by no pixel."""
        regions = self.order[self.starts[row] : self.starts[row + 1]]
        return self.label[regions[~self.crowd[regions]]]

    def _of_image(self, row: int) -> tuple[tuple[int, int], list[int]]:
        """(height, width) and the regions, the first to be painted first."""
        height, width = self.sizes[row].tolist()
        if not height or not width:
            height, width = read_size(str(self.folder / self.paths[row]))
        regions = self.order[self.starts[row] : self.starts[row + 1]].tolist()
        if height * width > MAX_PIXELS or height * width * len(regions) > MOST_WORK:
            raise DamagedImageError(
                f"{self.paths[row]}: {len(regions):,} regions of an image of {width} × {height}"
                " pixels: cut it into tiles"
            )
        return (height, width), regions

    def _paint(self, mask: np.ndarray, row: int, region: int, value: int) -> None:
        height, width = mask.shape
        if region not in self.runs:
            mask[rasterize(self._rings(region), height, width)] = value
            return
        runs = self.runs[region]
        if runs.top + runs.height > height or runs.left + runs.width > width:
            raise DamagedImageError(
                f"{self.paths[row]}: a mask in {self.name} reaches out of its {width} × {height}"
                " pixels: correct it"
            )
        box = mask[runs.top : runs.top + runs.height, runs.left : runs.left + runs.width]
        box[runs.pixels()] = value

    def example_name(self, row: int) -> str:
        return f"{self.name}: regions of {self.paths[row]}"

    def stamp(self, row: int) -> int:
        """A checksum of the regions."""
        value = zlib.crc32(repr((self.class_names, self.sizes[row].tolist())).encode())
        for region in self.order[self.starts[row] : self.starts[row + 1]].tolist():
            label = IGNORED if self.crowd[region] else self.label[region]
            value = zlib.crc32(bytes([label]), value)
            if region in self.runs:
                runs = self.runs[region]
                value = zlib.crc32(np.asarray(runs.lengths).tobytes(), value)
                value = zlib.crc32(repr((runs.top, runs.left, runs.height)).encode(), value)
            else:
                value = zlib.crc32(repr(self._rings(region)).encode(), value)
        return value

    def _rings(self, region: int) -> list[list[float]]:
        first = self.region_ends[region - 1] if region else 0
        ends = self.ring_ends[max(first - 1, 0) : self.region_ends[region]].tolist()
        ends = ends if first else [0, *ends]
        return [self.corners[a:b].tolist() for a, b in pairwise(ends)]


def rasterize(rings: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """bool[height, width] of polygons x, y, x, y, ... in pixels, their union, as pycocotools."""
    pieces = [coco_mask.fr_poly(ring, height, width) for ring in rings]
    return coco_mask.decode(coco_mask.merge(pieces)).view(bool)


def polygon_fault(ring: Any, height: int, width: int) -> str:
    """Why x, y, x, y, ... is no polygon of an image of that size (0: unknown); "" if it is one.

    Coordinates may lie outside of the image, but no farther than its longer side.
    """
    if not isinstance(ring, list | tuple) or len(ring) % 2 or len(ring) < 6:
        return f"polygon {short(ring)}: give x and y of 3 corners at least"
    # Sums, smallest and largest are C's loops: a COCO file has 860,000 polygons.
    if not set(map(type, ring)) <= {int, float} or not math.isfinite(_sum(ring)):
        return f"polygon {short(ring)}: give finite numbers"
    side = max(height, width) or 100_000
    if min(ring) < -side - 1 or max(ring) > 2 * side + 1:
        return f"polygon {short(ring)}: reaches farther outside of the image than its size"
    if len(ring) / 2 * (3 * side + 2) > MOST_LENGTH:
        xy = np.array(ring, np.float64).reshape(-1, 2)
        length = np.abs(xy - np.roll(xy, 1, axis=0)).max(1).sum()
        if length > MOST_LENGTH:
            return f"polygon of {len(xy):,} corners: its edges are {length:,.0f} pixels together"
    return ""


def _sum(numbers: Sequence[float]) -> float:
    """Infinite or NaN where one of them is, or where they are too large to be meant."""
    try:
        return float(sum(numbers))
    except OverflowError:  # of a whole number
        return math.inf


def are_points(points: Any) -> TypeGuard[list[list[float]]]:
    """Whether it is a list of [x, y], finite numbers."""
    return isinstance(points, list) and all(are_numbers(point, 2) for point in points)


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> list[float]:
    """x, y, x, y, ... of a polygon of 360 corners, turned clockwise about its center."""
    angle = np.arange(ELLIPSE_CORNERS) * (2 * np.pi / ELLIPSE_CORNERS)
    return turned(np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1), (x, y), degrees)


def turned(corners: Any, about: tuple[float, float], degrees: float) -> list[float]:
    """x, y, x, y, ... of corners [n, 2] turned clockwise, as seen on a screen, about a point."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    x, y = (np.asarray(corners, np.float64) - about).T
    xy = np.stack([x * cosine - y * sine, x * sine + y * cosine], 1) + about
    return xy.ravel().tolist()


def rectangle(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    """Its four corners, clockwise from the upper left one."""
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def finish(reading: RegionReading) -> Regions:
    """Numbers the classes, and orders the regions.

    Raises:
      UserError: one line with the first few problems, or too many classes.
    """
    check(reading)
    names = [name for name, _ in reading.names]
    own = [name for name in names if name not in IGNORED_NAMES]
    background = next((name for name in own if name.lower() in _BACKGROUND_NAMES), None)
    class_names = tuple(dict.fromkeys(own if background else [BACKGROUND, *own]))
    if len(class_names) > MAX_CLASSES:
        raise UserError(
            f"{reading.spec}: {len(class_names)} classes, and a mask of 8 bits has room for"
            f" {MAX_CLASSES}: merge some"
        )
    background = background or BACKGROUND
    position = {name: label for label, name in enumerate(class_names)}
    label_of = np.array([position.get(name, IGNORED) for name in names], np.uint8)
    label = label_of[np.array(reading.box_category, np.intp)] if names else np.zeros(0, np.uint8)
    image = np.array(reading.box_image, np.int32)
    counts = np.bincount(image, minlength=len(reading.paths))
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in sorted(reading.left_out.items()))
    return Regions(
        reading.spec,
        Path(reading.folder),
        tuple(reading.paths),
        np.array(reading.sizes, np.int32).reshape(-1, 2),
        class_names,
        position[background],
        image,
        label,
        np.array(reading.crowd, bool),
        np.array(reading.area, np.float64),
        np.lexsort([np.array(reading.rank, np.int32), image]),  # which is stable
        np.concatenate([[0], np.cumsum(counts)]),
        np.array(reading.corners, np.float64),
        np.array(reading.ring_ends, np.int64),
        np.array(reading.region_ends, np.int64),
        reading.runs,
        f"{reading.spec}: left out: {left_out}" if left_out else "",
    )


def check(reading: Reading) -> None:
    """Raises UserError, one line with the first few of all problems, or if there is no image."""
    problems = [problem for problem in reading.problems if problem.kind != "unreadable"]
    if problems:
        first = "; ".join(f"{p.place}: {p.text}" for p in problems[:3])
        more = f"; and {len(problems) - 3:,} more problems" if len(problems) > 3 else ""
        raise one_line(first + more)
    if not reading.paths:
        raise UserError(f"{reading.spec}: lists no images")
