import tracemalloc

import numpy as np
import pytest

from vision_jax.tasks.segmentation.windows import predict_by_windows, starts


def scores_of_pixels(windows):
    """Scores that depend on each pixel alone."""
    values = windows[..., 0].astype(np.float32)
    return np.stack([values, 255 - values, np.full_like(values, 100)], axis=-1)


@pytest.mark.parametrize("size", [(40, 50), (16, 16), (10, 61), (9, 7), (33, 16)])
@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 11), (16, 3)])
def test_pixels_that_are_seen_alone_are_as_in_the_whole_image(rng, size, window, stride):
    image = rng.integers(256, size=(*size, 3)).astype(np.uint8)
    found = predict_by_windows(
        image, scores_of_pixels, window=window, stride=stride, at_once=4, fill=(1, 2, 3)
    )
    assert (found == scores_of_pixels(image[None])[0].argmax(-1)).all()


def test_scores_are_means_over_all_windows_that_see_a_pixel(rng):
    """Of scores that depend on the window, added up naively over the whole image."""
    image = rng.integers(256, size=(37, 29, 1)).astype(np.uint8)

    def scores_of(windows):
        shade = windows.mean((1, 2, 3), keepdims=True)[..., 0]
        return np.stack([windows[..., 0] - shade, shade - windows[..., 0] * 0.9], axis=-1)

    total, seen = np.zeros((37, 29, 2)), np.zeros((37, 29, 1))
    for top in starts(37, 12, 7):
        for left in starts(29, 12, 7):
            part = (slice(top, top + 12), slice(left, left + 12))
            total[part] += scores_of(image[part][None])[0]
            seen[part] += 1
    found = predict_by_windows(image, scores_of, window=12, stride=7, at_once=3, fill=(0,))
    assert seen.min() == 1
    expected = total / seen
    sure = np.abs(expected[..., 0] - expected[..., 1]) > 1e-3
    assert (found == expected.argmax(-1))[sure].all()


def test_memory_grows_with_a_strip_and_not_with_the_image():
    """Eight times as high an image: but for the image and its mask nothing more is held."""
    peaks = []
    for height in (128, 1024):
        image = np.zeros((height, 128, 3), np.uint8)
        tracemalloc.start()
        predict_by_windows(image, scores_of_pixels, window=64, stride=32, at_once=1, fill=(0, 0, 0))
        peaks.append(tracemalloc.get_traced_memory()[1] - height * 128)
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
