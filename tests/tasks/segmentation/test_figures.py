"""Pictures of masks: hues are the classes alone, whatever is below; the legend names all shown."""

import numpy as np
import pytest

from vision_jax.data.masks import IGNORED
from vision_jax.tasks.segmentation import figures


def test_a_class_looks_the_same_over_things_of_any_hue(rng):
    colors = figures.palette(3)
    mask = rng.integers(0, 3, (5, 7)).astype(np.uint8)
    red, blue = np.zeros((2, 5, 7, 3), np.uint8)
    red[..., 0], blue[..., 2] = 57, 150  # 17.04 and 17.10
    over_red, over_blue = (figures.overlay(image, mask, colors) for image in (red, blue))
    assert np.abs(over_red.astype(int) - over_blue.astype(int)).max() <= 1
    expected = 0.5 * 0.299 * 57 + 0.5 * colors[mask].astype(float)
    np.testing.assert_allclose(over_red, expected, atol=0.51)


def test_ignored_pixels_keep_their_colors(rng):
    image = rng.integers(0, 256, (4, 6, 3)).astype(np.uint8)
    mask = np.full((4, 6), IGNORED, np.uint8)
    np.testing.assert_array_equal(figures.overlay(image, mask, figures.palette(2)), image)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, none of which is saved."""
    found = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: found.append(figure))
    return found


def names_of(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_the_legend_names_what_was_predicted_too(drawn, tmp_path):
    label, prediction = np.zeros((2, 4, 4), np.uint8)
    label[0], prediction[1] = IGNORED, 2
    example = {
        "image": np.zeros((4, 4, 3), np.uint8),
        "label": label,
        "prediction": prediction,
        "name": "a.png",
    }
    figures.draw_segmentation_grid([example], ("ground", "disk", "square"), tmp_path / "x.png")
    assert names_of(drawn[0].legends[0]) == ["ground", "square"]


def test_what_a_model_saw_is_drawn_at_its_masks_size(drawn, tmp_path, rng):
    """With data.view=squash images under attack have the model's size; there were no pictures."""
    point = {"miou": 0.5, "pixel_accuracy": 0.6, "epsilon": 8 / 255}
    record = {"images": 1, "norm": "linf", "clean": point, "attacks": {"fgsm": [point]}}
    image = rng.random((4, 4, 3)).astype(np.float32)
    before, after = np.zeros((2, 8, 12), np.uint8)
    after[:, 6:] = 1
    picture = {"image": image, "adversarial": image[::-1], "before": before, "after": after}
    figures.draw_robustness(record, [picture], ("ground", "disk"), tmp_path / "x.png")
    _, below = drawn[0].subfigs
    assert [cell.get_title(loc="left") for cell in below.axes] == [
        "image", "predicted", "fgsm 8/255", "predicted then"]  # fmt: skip
    plain = np.round(255 * image).astype(np.uint8)
    for cell, expected in ((below.axes[0], plain), (below.axes[2], plain[::-1])):
        shown = np.asarray(cell.get_images()[0].get_array())
        np.testing.assert_array_equal(shown, expected.repeat(2, axis=0).repeat(3, axis=1))
    assert names_of(below.legends[0]) == ["ground", "disk"]
