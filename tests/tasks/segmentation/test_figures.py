"""Pictures of masks: hues are the classes alone, whatever is below; the legend names all shown."""

import numpy as np

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


def test_the_legend_names_what_was_predicted_too(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(
        figures,
        "save_figure",
        lambda figure, path: found.update(
            names=[text.get_text() for text in figure.legends[0].get_texts()]
        ),
    )
    label, prediction = np.zeros((2, 4, 4), np.uint8)
    label[0], prediction[1] = IGNORED, 2
    example = {
        "image": np.zeros((4, 4, 3), np.uint8),
        "label": label,
        "prediction": prediction,
        "name": "a.png",
    }
    figures.draw_segmentation_grid([example], ("ground", "disk", "square"), tmp_path / "x.png")
    assert found["names"] == ["ground", "square"]
