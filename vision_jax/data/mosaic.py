"""Mosaic and mixup of images with boxes on the host, as YOLOX trains with them.

Ge et al. 2021, https://arxiv.org/abs/2107.08430, section 2.1; the geometry is pixeltable-yolox
0.4.3's, data/datasets/mosaicdetection.py and data/data_augment.py, resampled by Pillow. Boxes are
f64[T, 4] corners x, y, x, y in pixels.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vision_jax.data.detection_transforms import (
    DetectionPreprocessing,
    flip_boxes,
    flip_image,
    resize_image,
    resized_size,
    scale_boxes,
)

GREY = 114  # of 255, where no image is
LEAST = 1.0  # pixels of a side, below which a box is lost
DEGREES, TRANSLATE, SHEAR = 10.0, 0.1, 2.0  # at most, either way; a share of the side; degrees
MIXUP_SCALE = (0.5, 1.5)

Example = tuple[np.ndarray, np.ndarray, np.ndarray]  # uint8[H, W, C], boxes f64[T, 4], i32[T]


def mosaic(
    examples: Sequence[Example],
    rng: np.random.Generator,
    *,
    preprocessing: DetectionPreprocessing,
    side: int,
    scale: tuple[float, float],
) -> Example:
    """Four images around a random point of a canvas of twice the side, then moved and cut.

    Each is resized to fit the side. The whole is turned by up to 10 degrees, sheared by up to 2,
    scaled and shifted by up to a tenth of the side, and its upper left square of the side is taken.

    Args:
      examples: four of them, of as many channels.
      rng: of all draws.
      preprocessing: how an image is resized.
      side: of the result, in pixels.
      scale: from which the scale is drawn.
    """
    across, down = (int(rng.uniform(0.5, 1.5) * side) for _ in range(2))
    canvas = np.full((2 * side, 2 * side, examples[0][0].shape[2]), GREY, np.uint8)
    boxes, labels = [], []
    for index, example in enumerate(examples):
        image, found, label = _resized(example, preprocessing, side)
        height, width = image.shape[:2]
        left = across - width if index % 2 == 0 else across
        top = down - height if index < 2 else down
        # What lies beyond the canvas is cut off.
        rows = slice(max(top, 0), min(top + height, 2 * side))
        columns = slice(max(left, 0), min(left + width, 2 * side))
        canvas[rows, columns] = image[
            rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]
        boxes.append(np.clip(found + np.array([left, top, left, top]), 0, 2 * side))
        labels.append(label)
    matrix = _draw_affine(rng, side, scale)
    picture = _warp(canvas, matrix, side)
    moved = _move(np.concatenate(boxes), matrix, side)
    return _kept(picture, moved, np.concatenate(labels))


def mixup(
    example: Example,
    other: Example,
    rng: np.random.Generator,
    *,
    preprocessing: DetectionPreprocessing,
) -> Example:
    """The mean of a square image and another one of a random scale, mirrored half of the time.

    A larger one is cut at random, a smaller one lies at the upper left on black.
    """
    image, boxes, labels = example
    side = image.shape[0]
    own = max(int(side * rng.uniform(*MIXUP_SCALE)), 1)
    found, found_boxes, found_labels = _resized(other, preprocessing, own)
    square = np.full((own, own, image.shape[2]), GREY, np.uint8)
    square[: found.shape[0], : found.shape[1]] = found
    if rng.random() < 0.5:
        square, found_boxes = flip_image(square), flip_boxes(found_boxes, own)
    top, left = (int(rng.integers(max(own - side, 0) + 1)) for _ in range(2))
    view = np.zeros_like(image)
    seen = square[top : top + side, left : left + side]
    view[: seen.shape[0], : seen.shape[1]] = seen
    mixed = ((image.astype(np.uint16) + view) // 2).astype(np.uint8)
    found_boxes = np.clip(found_boxes - [left, top, left, top], 0, side)
    every = np.concatenate([boxes, found_boxes])
    return _kept(mixed, every, np.concatenate([labels, found_labels]))


def _resized(example: Example, preprocessing: DetectionPreprocessing, side: int) -> Example:
    image, boxes, labels = example
    old = image.shape[0], image.shape[1]
    new = resized_size(old, preprocessing, side)
    resized = resize_image(image, new, preprocessing.interpolation)
    return resized, scale_boxes(boxes, old, new), labels


def _draw_affine(rng: np.random.Generator, side: int, scale: tuple[float, float]) -> np.ndarray:
    """f64[2, 3]: where a point (x, y, 1) of the canvas goes."""
    angle, shear_x, shear_y = (
        math.radians(rng.uniform(-most, most)) for most in (DEGREES, SHEAR, SHEAR)
    )
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    turn *= rng.uniform(*scale)
    shear = np.array([[1, math.tan(shear_y)], [math.tan(shear_x), 1]])
    shift = rng.uniform(-TRANSLATE, TRANSLATE, (2, 1)) * side
    return np.concatenate([shear @ turn, shift], axis=1)


def _warp(image: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
    """uint8[H, W, C] -> uint8[side, side, C], grey where nothing comes from the image."""
    inverse = np.linalg.inv(np.concatenate([matrix, [[0, 0, 1]]]))[:2]  # Pillow asks where from
    channels = [
        Image.fromarray(plane).transform(
            (side, side),
            Image.Transform.AFFINE,
            inverse.ravel().tolist(),
            Image.Resampling.BILINEAR,
            fillcolor=GREY,
        )
        for plane in np.moveaxis(image, 2, 0)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


def _move(boxes: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
    """The upright hulls of the moved boxes, cut at the border."""
    corners = boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]  # [T, 4, 2]
    moved = corners @ matrix[:, :2].T + matrix[:, 2]
    hulls = np.concatenate([moved.min(axis=1), moved.max(axis=1)], axis=1)
    return np.clip(hulls, 0, side)


def _kept(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> Example:
    """Without the boxes of which next to nothing is left."""
    left = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) > LEAST
    return image, boxes[left], labels[left]
