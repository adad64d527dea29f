import tracemalloc

import numpy as np
import pytest

from vision_jax.tasks.segmentation.windows import (
    predict_by_spread_windows,
    predict_by_windows,
    spread,
    starts,
)


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


def bilinear(old, new):
    """(left neighbor, right neighbor, share of the right one), without align_corners."""
    centers = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    left = centers.astype(int)
    return left, np.minimum(left + 1, old - 1), (centers - left).astype(np.float32)


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((40, 13), (97, 32)),  # high, enlarged
        ((13, 40), (32, 97)),  # wide
        ((13, 27), (7, 9)),  # made smaller
        ((61, 13), (61, 13)),
        ((13, 13), (20, 31)),
        ((14, 13), (5, 40)),  # windows all but the same
    ],
)
def test_spread_windows_are_those_of_the_whole_image(rng, image, size, at_once):
    """To the last bit: all scores at once, and then enlarged."""
    pixels = rng.integers(256, size=(*image, 3)).astype(np.uint8)
    mix = rng.normal(size=(3, 5)).astype(np.float32)

    def scores_of(windows):
        shade = windows.mean((1, 2, 3), dtype=np.float32).reshape(-1, 1, 1, 1)
        assert len(windows) == at_once
        return np.sin(windows @ mix + shade)

    side = min(image)
    total, seen = np.zeros((*image, 5), np.float32), np.zeros((*image, 1), np.float32)
    for start in spread(max(image), side):
        top, left = (start, 0) if image[0] > image[1] else (0, start)
        part = (slice(top, top + side), slice(left, left + side))
        total[part] += scores_of(np.repeat(pixels[part][None], at_once, 0))[0]
        seen[part] += 1
    total /= seen
    (above, below, down), (before, after, right) = map(bilinear, image, size)
    rows = total[above] * (1 - down[:, None, None]) + total[below] * down[:, None, None]
    whole = rows[:, before] * (1 - right[:, None]) + rows[:, after] * right[:, None]
    found = predict_by_spread_windows(pixels, scores_of, at_once=at_once, size=size)
    np.testing.assert_array_equal(found, whole.argmax(-1))


def by_windows(image):
    predict_by_windows(image, scores_of_pixels, window=64, stride=32, at_once=1, fill=(0, 0, 0))


def by_spread_windows(image):
    predict_by_spread_windows(image, scores_of_pixels, at_once=1, size=image.shape[:2])


@pytest.mark.parametrize(
    ("predict", "shape"),
    [
        (by_windows, (-1, 128)),
        (by_spread_windows, (-1, 128)),
        (by_spread_windows, (128, -1)),
    ],
)
def test_memory_grows_with_a_strip_and_not_with_the_image(predict, shape):
    """Five times as long an image: but for the image and its mask nothing more is held.

    All scores of the longer one would be 1.5 MiB.
    """
    peaks = []
    for long in (192, 1024):
        image = np.zeros((*(long if side < 0 else side for side in shape), 3), np.uint8)
        tracemalloc.start()
        predict(image)
        peaks.append(tracemalloc.get_traced_memory()[1] - long * 128)
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
