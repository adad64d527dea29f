"""The pictures open, have a sensible size, and show the colors that carry the message."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from vision_jax import figures
from vision_jax.tasks.classification.figures import draw_predictions


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def _has(pixels: np.ndarray, color: str) -> bool:
    wanted = np.round(255 * np.array(to_rgb(color)))
    return bool((np.abs(pixels - wanted).max(axis=-1) <= 1).any())


def test_curves_show_what_was_logged(tmp_path: Path) -> None:
    records = [
        {"step": step, "train/loss": 2 / step, "train/learning_rate": 1e-3} for step in range(1, 50)
    ]
    records[3]["train/loss"] = math.nan
    records[4]["train/loss"] = math.inf
    training = _pixels(figures.draw_curves(records, tmp_path / "training.png"))
    assert _has(training, figures.BLUE)
    assert _has(training, figures.GREEN)
    assert not _has(training, figures.ORANGE)
    evaluated = [*records, {"step": 49, "eval/loss": 0.3, "eval/top1": 0.9}]
    assert _has(_pixels(figures.draw_curves(evaluated, tmp_path / "both.png")), figures.ORANGE)


def test_curves_of_nothing(tmp_path: Path) -> None:
    pixels = _pixels(figures.draw_curves([], tmp_path / "curves.png"))
    assert not _has(pixels, figures.BLUE)


def test_series_are_in_order_and_keep_the_later_of_two() -> None:
    records = [{"step": 2, "x": 1.0}, {"step": 1, "x": 3.0}, {"step": 2, "x": 5.0}, {"step": 3}]
    steps, values = figures._series(records, "x")
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [3.0, 5.0]


def test_smoothing_keeps_a_constant_and_follows_short_series() -> None:
    np.testing.assert_allclose(figures._smooth(np.full(300, 0.7)), 0.7, rtol=1e-12)
    np.testing.assert_array_equal(figures._smooth(np.array([3.0, 1.0])), [3.0, 1.0])


@pytest.mark.parametrize(
    ("labels", "present", "absent"),
    [
        ([0, 0], [figures.GREEN], [figures.RED, figures.BLUE]),
        ([1, 1], [figures.RED], [figures.GREEN, figures.BLUE]),
        ([0, 1], [figures.GREEN, figures.RED], [figures.BLUE]),
        (None, [figures.BLUE], [figures.GREEN, figures.RED]),
    ],
)
def test_predictions_are_colored_by_truth(
    tmp_path: Path, labels: list[int] | None, present: list[str], absent: list[str]
) -> None:
    images = np.full((2, 28, 28, 3), 200, np.uint8)
    probabilities = np.array([[0.8, 0.2], [0.6, 0.4]], np.float32)
    truth = None if labels is None else np.array(labels)
    path = tmp_path / "predictions.png"
    assert draw_predictions(images, truth, probabilities, ["cat", "dog"], path) == path
    pixels = _pixels(path)
    assert all(_has(pixels, color) for color in present)
    assert not any(_has(pixels, color) for color in absent)


def test_tiny_images_are_enlarged_without_blur(tmp_path: Path) -> None:
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[0, ::2, 1::2] = image[0, 1::2, ::2] = (255, 0, 255)
    pixels = _pixels(draw_predictions(image, None, np.ones((1, 1)), ["checks"], tmp_path / "p.png"))
    magenta = (pixels == (255, 0, 255)).all(axis=-1).sum()
    black = (pixels == 0).all(axis=-1).sum()
    assert magenta > 10_000
    assert abs(int(magenta) - int(black)) < 0.1 * magenta


@pytest.mark.long
def test_many_images_and_names_that_look_like_formulas(tmp_path: Path) -> None:
    images = np.zeros((100, 8, 8, 3), np.uint8)
    names = ["$\\broken{", "a very long name " * 20]
    probabilities = np.tile([[0.3, 0.7]], (100, 1))
    labels = np.zeros(100, int)
    pixels = _pixels(draw_predictions(images, labels, probabilities, names, tmp_path / "p.png"))
    assert max(pixels.shape) < 3000
    matrix = np.array([[3, 1], [0, 0]])
    _pixels(figures.draw_confusion(matrix, names, tmp_path / "c.png"))


@pytest.mark.long
@pytest.mark.parametrize("classes", [2, 10, 45, 1000])
def test_confusion_of_any_size(tmp_path: Path, classes: int) -> None:
    matrix = np.eye(classes, dtype=np.int64) * 9
    matrix[0, 1] = 1
    matrix[classes - 1] = 0  # a class without examples
    names = [f"class {index}" for index in range(classes)]
    pixels = _pixels(figures.draw_confusion(matrix, names, tmp_path / "confusion.png"))
    assert 400 < min(pixels.shape[:2]) <= max(pixels.shape[:2]) < 2000


@pytest.mark.long
def test_pyplot_and_its_global_state_stay_out() -> None:
    code = "import sys, vision_jax.figures; print('matplotlib.pyplot' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "False"
