"""The pictures open, and show the colors of the classes where the boxes are and nowhere else."""

from pathlib import Path

import numpy as np
import pytest
from detection_cases import make_detections, make_truth, random_case
from matplotlib.colors import to_rgb
from PIL import Image

from vision_jax import figures
from vision_jax.tasks import coco_figures
from vision_jax.tasks.detection import figures as drawing
from vision_jax.tasks.detection import metrics as detection


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def _where(pixels: np.ndarray, color: str) -> np.ndarray:
    return np.abs(pixels - np.round(255 * np.array(to_rgb(color)))).max(axis=-1) <= 1


def test_boxes_lie_where_they_belong() -> None:
    image = np.full((500, 600, 3), 128, np.uint8)
    kept = image.copy()
    boxes, scores = np.array([[100.0, 200, 300, 400]]), np.array([0.5])
    drawn = drawing.draw_detections(image, boxes, np.array([1]), scores, ("cat", "dog"))
    np.testing.assert_array_equal(image, kept)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    colored = _where(drawn, coco_figures.class_color(1))
    for edge in (colored[200, 100:301], colored[400, 100:301], colored[200:401, 100]):
        assert edge.all()
    assert colored[200:401, 300].all()
    changed = (drawn != 128).any(axis=-1)
    assert not changed[210:390, 110:290].any()  # nothing inside
    assert changed[175:198, 101:150].any()  # the name above
    changed[170:402, 99:302] = False
    assert not changed.any()


def test_small_images_are_enlarged_and_grey_ones_drawn_in_color() -> None:
    image = np.full((50, 100, 1), 128, np.uint8)
    boxes, one = np.array([[50.0, 20, 90, 40]]), np.array([0])
    drawn = drawing.draw_detections(image, boxes, one, None, ("a very long name " * 5,))
    assert drawn.shape == (250, 500, 3)
    colored = _where(drawn, coco_figures.class_color(0))
    assert colored[100:201, 250].all()
    assert colored[200, 250:451].all()
    many = drawing.draw_detections(image.repeat(5, axis=2), boxes, one, None, ("a",))
    assert many.shape == (250, 500, 3)


@pytest.mark.parametrize("box", [[-50, -50, 1000, 900], [590, 490, 590, 490], [700, 600, 800, 700]])
def test_boxes_outside_and_without_area(box: list[float]) -> None:
    image = np.full((500, 600, 3), 128, np.uint8)
    drawn = drawing.draw_detections(image, np.array([box], float), np.array([0]), None, ("cat",))
    assert _where(drawn, coco_figures.class_color(0)).any()


def test_the_better_of_two_equal_boxes_is_on_top_and_tags_do_not_cover_each_other() -> None:
    image = np.full((500, 600, 3), 128, np.uint8)
    boxes = np.array([[100.0, 200, 300, 400]] * 4)
    labels = np.arange(4)
    scores = np.array([0.2, 0.9, 0.3, 0.4])
    names = ("one class", "two class", "three class", "four class")
    drawn = drawing.draw_detections(image, boxes, labels, scores, names)
    assert _where(drawn, coco_figures.class_color(1))[230:370, 100].all()
    areas = [_where(drawn, coco_figures.class_color(label)).sum() for label in (0, 2, 3)]
    assert min(areas) > 1000  # a tag each; its box is hidden below the best


def test_nothing_is_drawn_without_boxes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (500, 600, 3), np.uint8)
    none = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)
    np.testing.assert_array_equal(drawing.draw_detections(image, *none, ("cat",)), image)


def test_grid_has_truth_on_the_left_and_predictions_on_the_right(tmp_path: Path) -> None:
    source = make_truth([[[20, 20, 60, 60]]] * 3, [[0], [0], [1]], damaged=(1,))
    detections = make_detections([
        (0, 1, 0.9, [20, 20, 60, 60]),
        (0, 0, 0.29, [0, 0, 9, 9]),  # too low a score
        (2, 1, 0.9, [20, 20, 60, 60]),
    ])  # fmt: skip
    pixels = _pixels(drawing.draw_detection_grid(source, detections, tmp_path / "grid.png"))
    height, width = pixels.shape[:2]
    half = width // 2
    first, second = pixels[: height // 2], pixels[height // 2 :]  # two rows: one can't be read
    cat, dog = coco_figures.class_color(0), coco_figures.class_color(1)
    assert [_where(first[:, :half], c).any() for c in (cat, dog)] == [True, False]
    assert [_where(first[:, half:], c).any() for c in (cat, dog)] == [False, True]
    assert [_where(second[:, :half], c).any() for c in (cat, dog)] == [False, True]
    assert [_where(second[:, half:], c).any() for c in (cat, dog)] == [False, True]
    alone = _pixels(drawing.draw_detection_grid(source, detections, tmp_path / "a.png", rows=[2]))
    assert alone.shape[0] < height
    damaged = drawing.draw_detection_grid(source, detections, tmp_path / "d.png", rows=[1])
    assert (_pixels(damaged) == 255).all()


@pytest.mark.parametrize("classes", [1, 2, 30])
def test_curves_of_the_classes(classes: int, tmp_path: Path) -> None:
    precision = np.full((10, 101, classes, 4, 3), 0.5)
    precision += 0.015 * np.arange(classes)[:, None, None]
    names = ["$odd_{name}$", *(f"class {label}" for label in range(1, classes))]
    path = coco_figures.draw_precision_recall(precision, names, tmp_path / "curves.png")
    pixels = _pixels(path)
    assert _where(pixels, coco_figures.class_color(0)).sum() > 500
    unnamed = _where(pixels, "#bbbbbb")[:, :600].sum(axis=1) > 300  # long grey lines
    assert unnamed.any() == (classes > coco_figures.MOST_CURVES)
    assert _where(pixels, figures.INK)[:, :600].sum(axis=1).max() > 300 or classes == 1


def test_curves_without_truth(tmp_path: Path) -> None:
    precision = np.full((10, 101, 2, 4, 3), -1.0)
    pixels = _pixels(coco_figures.draw_precision_recall(precision, "ab", tmp_path / "curves.png"))
    assert not _where(pixels, coco_figures.class_color(0)).any()


def test_confusion(tmp_path: Path) -> None:
    detections, source = random_case(3)
    matrix = detection.confusion_matrix(detections, source)
    path = tmp_path / "confusion.png"
    pixels = _pixels(drawing.draw_detection_confusion(matrix, source.class_names, path))
    assert min(pixels.shape[:2]) >= 400


def test_neighboring_classes_can_be_told_apart_without_red_and_green() -> None:
    """The palette as deuteranopes see it (Viénot et al. 1999: red and green merge)."""
    assert len(set(coco_figures.PALETTE)) == len(coco_figures.PALETTE)
    linear = np.array([to_rgb(color) for color in coco_figures.PALETTE]) ** 2.2
    seen = np.stack([linear[:, 0] * 0.29275 + linear[:, 1] * 0.70725, linear[:, 2]], axis=1)
    seen = seen ** (1 / 2.2)
    apart = np.abs(seen[:, None] - seen[None]).max(axis=-1) + np.eye(len(seen))
    assert apart.min() > 0.1
