"""Street scenes with exact masks, drawn from a seed: `driving:SPLIT/SEED/COUNT[/SIZE]`.

A road runs to a vanishing point between pavements, houses and trees; cars stand on it and persons
beside it, as large as their distance says; lane marks lie on it. All have random colors, light and
grain. No scene is a photograph: a segmenter that fails here is broken, one that does well has shown
nothing about streets, and its mIoU is no measure of quality.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from vision_jax.data.composites import check
from vision_jax.data.sources import ArrayReader
from vision_jax.errors import UserError

DRIVING = "driving:"
SPLITS = ("train", "test")
CLASS_NAMES = ("sky", "building", "vegetation", "sidewalk", "road", "lane", "car", "person")
SKY, BUILDING, VEGETATION, SIDEWALK, ROAD, LANE, CAR, PERSON = range(len(CLASS_NAMES))
DEFAULT_SIZE = 96  # pixels a side
MOST_CARS, MOST_PERSONS = 4, 4
NOTE = "drawn from a seed: a score on such scenes is no measure of quality on photographs"
# Mean colors, and how far the one of a scene may lie from it.
_COLORS = np.array(
    [
        *((135, 175, 220), (140, 115, 100), (70, 110, 55), (150, 145, 140)),
        *((85, 85, 90), (225, 220, 200), (120, 60, 70), (110, 80, 110)),
    ],
    np.float64,
)
_APART = np.array([35, 45, 25, 20, 18, 20, 95, 70], np.float64)
_GRAIN = np.array([3, 12, 22, 8, 7, 6, 6, 10], np.float64)  # standard deviation of pixels
_WIDE = 1.6  # of the road at the bottom, in widths of the image, at most

Point = tuple[float, float]


class Scene(NamedTuple):
    """`image` u8[S, S, 3] and `mask` u8[S, S] of CLASS_NAMES."""

    image: np.ndarray
    mask: np.ndarray


class _Canvas:
    """Shapes of classes, the later over the earlier; each has a shade of its own."""

    def __init__(self, size: int, rng: np.random.Generator):
        self._mask, self._shade = (Image.new(mode, (size, size)) for mode in ("L", "L"))
        self._drawn = [ImageDraw.Draw(picture) for picture in (self._mask, self._shade)]
        self._rng, self._number = rng, 0
        self._colors = np.zeros((256, 3))

    def _next(self, label: int, dark: float) -> int:
        self._number = min(self._number + 1, 255)
        own = _COLORS[label] + self._rng.uniform(-1, 1, 3) * _APART[label]
        self._colors[self._number] = own * dark
        return self._number

    def polygon(self, label: int, points: Sequence[Point], dark: float = 1.0) -> None:
        for draw, value in zip(self._drawn, (label, self._next(label, dark)), strict=True):
            draw.polygon(points, fill=value)

    def ellipse(self, label: int, box: tuple[float, float, float, float], dark=1.0) -> None:
        for draw, value in zip(self._drawn, (label, self._next(label, dark)), strict=True):
            draw.ellipse(box, fill=value)

    def scene(self) -> Scene:
        mask, shade = np.asarray(self._mask), np.asarray(self._shade)
        above, below = self._rng.uniform(0.5, 1.25) + self._rng.uniform(-0.12, 0.12, 2)
        light = np.linspace(above, below, len(mask))
        image = self._colors[shade] * light[:, None, None]
        grain = self._rng.normal(size=mask.shape) * _GRAIN[mask]
        image = np.clip(np.rint(image + grain[..., None]), 0, 255)
        return Scene(image.astype(np.uint8), mask.copy())


@dataclass(frozen=True)
class _Road:
    """A plane to the horizon: at depth t, from 0 far to 1 near, it is `left` to `right` wide."""

    point: Point  # where it vanishes
    left: float  # at the image's lower edge
    right: float
    size: int

    def at(self, share: float, t: float) -> Point:
        """The place at a share of the width, 0 left and 1 right, and a depth."""
        x, y = self.point
        along = self.left + share * (self.right - self.left)
        return x + (along - x) * t, y + (self.size - y) * t

    def strip(self, first: float, last: float, near: float = 1.0, far: float = 0.0) -> list[Point]:
        """Between two shares and two depths."""
        return [self.at(first, far), self.at(last, far), self.at(last, near), self.at(first, near)]


def make_scene(split: str, seed: int, index: int, *, size: int) -> Scene:
    """Scene `index` of a split, a pure function of its arguments."""
    rng = np.random.default_rng((SPLITS.index(split), seed, index))
    canvas = _Canvas(size, rng)
    horizon = size * rng.uniform(0.3, 0.5)
    middle = size * rng.uniform(0.3, 0.7)
    width = size * rng.uniform(0.8, _WIDE)
    left = size / 2 - width * rng.uniform(0.35, 0.65)
    road = _Road((middle, horizon), left, left + width, size)
    canvas.polygon(SKY, [(0, 0), (size, 0), (size, size), (0, size)])
    canvas.polygon(VEGETATION, [(0, horizon), (size, horizon), (size, size), (0, size)])
    _draw_sides(canvas, rng, horizon, size)
    canvas.polygon(SIDEWALK, road.strip(-0.3, 1.3))
    canvas.polygon(ROAD, road.strip(0, 1))
    for share in (0.03, 0.5, 0.97):
        dashes = rng.integers(4, 8) if share == 0.5 else 1
        edges = np.linspace(0.12, 1, 2 * dashes) ** 1.5 if dashes > 1 else np.array([0.05, 1])
        for far, near in edges.reshape(-1, 2):
            canvas.polygon(LANE, road.strip(share - 0.012, share + 0.012, near, far))
    things = [(CAR, rng.uniform(0.15, 0.85)) for _ in range(rng.integers(MOST_CARS + 1))]
    things += [
        (PERSON, rng.choice([rng.uniform(-0.28, -0.05), rng.uniform(1.05, 1.28)]))
        for _ in range(rng.integers(MOST_PERSONS + 1))
    ]
    depths = np.sort(rng.uniform(0.15, 0.9, len(things)))
    for t, order in zip(depths, rng.permutation(len(things)), strict=True):  # the near ones last
        label, share = things[order]
        draw = _draw_car if label == CAR else _draw_person
        draw(canvas, rng, road.at(share, t), width * t)
    return canvas.scene()


def _draw_sides(canvas: _Canvas, rng: np.random.Generator, horizon: float, size: int) -> None:
    """Houses and crowns of trees along the horizon."""
    x = 0.0
    while x < size:
        wide, high = size * rng.uniform(0.08, 0.25), horizon * rng.uniform(0.15, 0.9)
        kind = rng.random()
        if kind < 0.5:
            top = horizon - high
            corners = [(x, top), (x + wide, top), (x + wide, horizon), (x, horizon)]
            canvas.polygon(BUILDING, corners)
        elif kind < 0.8:
            canvas.ellipse(VEGETATION, (x, horizon - high * 0.8, x + wide, horizon + 0.02 * size))
        x += wide * rng.uniform(0.7, 1.3)


def _draw_car(canvas: _Canvas, rng: np.random.Generator, place: Point, road: float) -> None:
    """A body, a cabin and tires, on a place of a road that is so wide there."""
    x, y = place
    wide = road * rng.uniform(0.16, 0.22)
    high, cabin = wide * rng.uniform(0.35, 0.5), wide * rng.uniform(0.25, 0.35)
    a, b = x - wide / 2, x + wide / 2
    canvas.polygon(
        CAR,
        [(a + 0.15 * wide, y - high), (a + 0.25 * wide, y - high - cabin),
         (b - 0.25 * wide, y - high - cabin), (b - 0.15 * wide, y - high)],
        0.45,
    )  # fmt: skip
    canvas.polygon(CAR, [(a, y - high), (b, y - high), (b, y - 0.1 * high), (a, y - 0.1 * high)])
    for start in (a, b - 0.2 * wide):
        tire = [(start, y - 0.2 * high), (start + 0.2 * wide, y - 0.2 * high),
                (start + 0.2 * wide, y), (start, y)]  # fmt: skip
        canvas.polygon(CAR, tire, 0.2)


def _draw_person(canvas: _Canvas, rng: np.random.Generator, place: Point, road: float) -> None:
    """Legs, a body and a head."""
    x, y = place
    high = road * rng.uniform(0.2, 0.28)
    wide = high * rng.uniform(0.24, 0.32)
    a, b = x - wide / 2, x + wide / 2
    hip, neck = y - 0.45 * high, y - 0.83 * high
    canvas.polygon(PERSON, [(a + 0.1 * wide, hip), (b - 0.1 * wide, hip), (b, y), (a, y)], 0.6)
    canvas.polygon(PERSON, [(a, neck), (b, neck), (b, hip), (a, hip)])
    canvas.ellipse(PERSON, (x - 0.3 * wide, y - high, x + 0.3 * wide, neck + 0.02 * high), 1.4)


def read_scenes(spec: str) -> tuple[ArrayReader, tuple[np.ndarray, ...]]:
    """(images, masks) of `driving:SPLIT/SEED/COUNT[/SIZE]`.

    Raises:
      UserError: another specification.
    """
    split, *numbers = spec.removeprefix(DRIVING).split("/")
    known = all(text.isascii() and text.isdecimal() and len(text) <= 9 for text in numbers)
    if split not in SPLITS or not known or len(numbers) not in (2, 3):
        raise UserError(
            f"{spec}: give driving:SPLIT/SEED/COUNT[/SIZE], such as driving:train/0/200, where"
            " SPLIT is train or test"
        )
    seed, count, size = (*map(int, numbers), DEFAULT_SIZE)[:3]
    check(count, seed, size, spec)
    scenes = [make_scene(split, seed, index, size=size) for index in range(count)]
    images, masks = zip(*scenes, strict=True)
    return ArrayReader(spec, np.stack(images)), tuple(masks)
