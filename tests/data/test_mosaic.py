"""Mosaics and mixed images: boxes stay on what they are of, and the draws are the seed's."""

import numpy as np
import pytest

from vision_jax.data import mosaic
from vision_jax.data.detection_transforms import DetectionPreprocessing

SIDE = 96
PREPROCESSING = DetectionPreprocessing(
    short=SIDE,
    longest=SIDE,
    square=False,
    rule="letterbox",
    interpolation="bilinear_aliased",
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    buckets=((SIDE, SIDE),),
)
COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255]])


def example(rng, label):
    """A dark image of random shape with one bright rectangle of the label's color."""
    height, width = rng.integers(60, 140, 2)
    image = np.full((height, width, 3), 20, np.uint8)
    top, left = rng.integers(5, 20, 2)
    bottom, right = height - rng.integers(5, 20), width - rng.integers(5, 20)
    image[top:bottom, left:right] = COLORS[label]
    box = np.array([[left, top, right, bottom]], np.float64)
    return image, box, np.array([label], np.int32)


def check(image, boxes, labels, share):
    """Most pixels well inside of a box have its color, and none outside of all boxes does."""
    for box, label in zip(boxes, labels, strict=True):
        left, top, right, bottom = box
        if min(right - left, bottom - top) < 12:
            continue
        inner = image[int(top) + 4 : int(bottom) - 4, int(left) + 4 : int(right) - 4]
        bright = COLORS[label] > 0
        agrees = (inner[..., bright] > 100).all(-1) & (inner[..., ~bright] < 100).all(-1)
        assert agrees.mean() > share, (box, label)


@pytest.mark.parametrize("seed", range(6))
def test_boxes_follow_their_pixels(seed, monkeypatch):
    """Turned by less than usual, so that a box's hull is nearly all its own."""
    monkeypatch.setattr(mosaic, "DEGREES", 1.0)
    rng = np.random.default_rng(seed)
    four = [example(rng, label) for label in range(4)]
    image, boxes, labels = mosaic.mosaic(
        four, rng, preprocessing=PREPROCESSING, side=SIDE, scale=(0.8, 1.2)
    )
    assert image.shape == (SIDE, SIDE, 3)
    assert image.dtype == np.uint8
    assert len(boxes) == len(labels) >= 1
    assert (boxes >= 0).all()
    assert (boxes <= SIDE).all()
    check(image, boxes, labels, 0.8)
    colors = {tuple(color) for color in COLORS[labels]}
    for label, color in enumerate(COLORS[:4]):  # what has no box is not to be seen
        seen = (np.abs(image.astype(int) - color).max(-1) < 30).sum()
        assert tuple(color) in colors or seen < 40, label


@pytest.mark.parametrize("seed", range(4))
def test_mixing_adds_the_other_images_boxes(seed):
    rng = np.random.default_rng(seed)
    plain = (np.full((SIDE, SIDE, 3), 100, np.uint8), np.zeros((0, 4)), np.zeros(0, np.int32))
    image, boxes, labels = mosaic.mixup(plain, example(rng, 4), rng, preprocessing=PREPROCESSING)
    assert labels.tolist() == [4]
    doubled = np.clip(2 * image.astype(int) - 100, 0, 255).astype(np.uint8)
    check(doubled, boxes, labels, 0.95)


def test_the_seed_decides_and_boxes_do_not():
    """The same draws whether or not images have boxes."""
    made = []
    for kept in (slice(None), slice(0)):
        rng = np.random.default_rng(3)
        four = [example(np.random.default_rng(i), i) for i in range(4)]
        four = [(image, boxes[kept], labels[kept]) for image, boxes, labels in four]
        image, _, _ = mosaic.mosaic(
            four, rng, preprocessing=PREPROCESSING, side=SIDE, scale=(0.5, 1.5)
        )
        made.append((image, rng.random()))
    np.testing.assert_array_equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]
