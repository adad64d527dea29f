"""Points, lines and polygons in the plane of a frame: x to the right, y down."""

import itertools
import math
from collections.abc import Sequence

Point = tuple[float, float]


def side(start: Point, end: Point, point: Point) -> float:
    """Above 0 to the right of who walks from `start` to `end`, below 0 to the left; y is down."""
    return (end[0] - start[0]) * (point[1] - start[1]) - (end[1] - start[1]) * (point[0] - start[0])


def segments_meet(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether the segments ab and cd cross; what only touches or lies within the other doesn't."""
    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def area(points: Sequence[Point]) -> float:
    """Of a polygon that doesn't cross itself."""
    pairs = zip(points, (*points[1:], points[0]), strict=True)
    return abs(sum(x * v - u * y for (x, y), (u, v) in pairs)) / 2


def is_inside(points: Sequence[Point], point: Point) -> bool:
    """Whether a point is within a polygon.

    Examples:
      >>> triangle = [(0, 0), (2, 0), (2, 2)]
      >>> is_inside(triangle, (1.5, 1.0)), is_inside(triangle, (0, 1))
      (True, False)
    """
    x, y = point
    inside = False
    for (a, b), (c, d) in zip(points, (*points[1:], points[0]), strict=True):
        if (b > y) != (d > y) and x < a + (y - b) * (c - a) / (d - b):
            inside = not inside
    return inside


def distance_to_edge(points: Sequence[Point], point: Point) -> float:
    """Of a point from the nearest of a polygon's edges.

    Examples:
      >>> distance_to_edge([(0, 0), (2, 0), (2, 2)], (1.0, -3.0))
      3.0
    """
    x, y = point
    least = math.inf
    for (a, b), (c, d) in zip(points, (*points[1:], points[0]), strict=True):
        along = (x - a) * (c - a) + (y - b) * (d - b)
        share = along / ((c - a) ** 2 + (d - b) ** 2 or 1.0)
        share = min(max(share, 0.0), 1.0)
        least = min(least, math.hypot(x - a - share * (c - a), y - b - share * (d - b)))
    return least


def crossing_edges(points: Sequence[Point]) -> tuple[int, int] | None:
    """Numbers of two edges that have a point in common and aren't neighbours, from 1; or None."""
    count = len(points)
    for i, j in itertools.combinations(range(count), 2):
        if j - i in (1, count - 1):
            continue
        ends = points[i], points[(i + 1) % count], points[j], points[(j + 1) % count]
        if segments_meet(*ends):
            return i + 1, j + 1
    return None
