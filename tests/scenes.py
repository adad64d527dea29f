"""Made-up scenes for the tests of vision_jax.video: boxes that walk, flicker, hide and jump."""

from collections import namedtuple
from fractions import Fraction

import numpy as np

Found = namedtuple("Found", "boxes_xyxy_px scores labels")
FIELD = """
[zones.lawn]
unit = "pixel"
polygon = [[200, 100], [500, 100], [500, 400], [200, 400]]

[lines.gate]
unit = "pixel"
from = [300, 0]
to = [300, 480]
"""
NAMES = ("person", "car", "dog")
SIZE = (480, 640)


def found(*rows):
    """Rows of (x, y of the foot, width, height, score, label)."""
    rows = np.array(rows, float).reshape(-1, 6)
    x, y, width, height, scores, labels = rows.T
    boxes = np.stack([x - width / 2, y - height, x + width / 2, y], 1)
    return Found(boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int32))


def walk(start, speed, frames, rate=10, score=0.8, label=0):
    """A person of 30 x 80 pixels: [(x, y, w, h, score, label)] of each frame."""
    return [
        (start[0] + speed[0] * i / rate, start[1] + speed[1] * i / rate, 30, 80, score, label)
        for i in range(frames)
    ]


def times(frames, rate=10):
    """Of frames at a constant rate."""
    return [Fraction(i, rate) for i in range(frames)]
