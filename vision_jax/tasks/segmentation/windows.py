"""A large image window by window: scores averaged where windows overlap, and the best class.

Windows lie in rows, and what the next row does not reach is decided and forgotten, so that no more
scores are held than those of a strip of the image as high as a window.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

# (windows u8[n, h, w, C]) -> scores f[n, h, w, K]
ScoresOf = Callable[[np.ndarray], np.ndarray]


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side; the last one ends with it.

    Examples:
      >>> starts(10, 4, 3), starts(3, 4, 3)
      ([0, 3, 6], [0])
    """
    if side <= window:
        return [0]
    return [*range(0, side - window, stride), side - window]


def predict_by_windows(
    image: np.ndarray,
    scores_of: ScoresOf,
    *,
    window: int,
    stride: int,
    at_once: int,
    fill: Sequence[int],
) -> np.ndarray:
    """u8[H, W]: the class whose mean score over all windows that see a pixel is the largest.

    Args:
      image: u8[H, W, C].
      scores_of: always called with `at_once` windows, the last ones black where there are fewer.
      window: pixels a side.
      stride: pixels between windows, at most `window`.
      at_once: windows.
      fill: of the C channels, what stands beyond an image that is smaller than a window.
    """
    height, width = image.shape[:2]
    if min(height, width) < window:
        canvas = np.empty((max(height, window), max(width, window), image.shape[2]), np.uint8)
        canvas[:] = fill
        canvas[:height, :width] = image
        image = canvas
    tops, lefts = (starts(side, window, stride) for side in image.shape[:2])
    prediction = np.empty(image.shape[:2], np.uint8)
    strip = None
    for number, top in enumerate(tops):
        places = [(top, left) for left in lefts]
        for (_, left), scores in _scores_of_places(image, places, window, scores_of, at_once):
            if strip is None:
                strip = np.zeros((window, image.shape[1], scores.shape[-1]), np.float32)
                seen = np.zeros((window, image.shape[1], 1), np.float32)
            strip[:, left : left + window] += scores
            seen[:, left : left + window] += 1
        assert strip is not None
        done = (tops[number + 1] if number + 1 < len(tops) else top + window) - top
        prediction[top : top + done] = (strip[:done] / seen[:done]).argmax(-1)
        for array in (strip, seen):
            array[: window - done] = array[done:].copy()
            array[window - done :] = 0
    return prediction[:height, :width]


def predict_by_spread_windows(
    image: np.ndarray, scores_of: ScoresOf, *, at_once: int, size: tuple[int, int]
) -> np.ndarray:
    """u8[*size]: as few square windows as cover an image, of its height or width, evenly spread.

    Mean scores are interpolated to `size` bilinearly; then the largest is the class. Source:
    transformers 5.24, models/eomt/image_processing_eomt.py `merge_image_patches`.

    Args:
      image: u8[h, w, C], resized.
      scores_of: see `predict_by_windows`.
      at_once: windows.
      size: (height, width) of the image before it was resized.
    """
    height, width = image.shape[:2]
    window = min(height, width)
    along = spread(max(height, width), window)
    places = [(start, 0) if height > width else (0, start) for start in along]
    total: np.ndarray | None = None
    seen = np.zeros((height, width, 1), np.float32)
    for (top, left), scores in _scores_of_places(image, places, window, scores_of, at_once):
        if total is None:
            total = np.zeros((height, width, scores.shape[-1]), np.float32)
        part = (slice(top, top + window), slice(left, left + window))
        total[part] += scores
        seen[part] += 1
    assert total is not None
    total /= seen
    prediction = np.empty(size, np.uint8)
    (above, below, down), (before, after, right) = map(_neighbors, (height, width), size)
    for y in range(size[0]):  # row by row: at full size scores of many classes are large
        row = total[above[y]] * (1 - down[y]) + total[below[y]] * down[y]  # [w, K]
        row = row[before] * (1 - right[:, None]) + row[after] * right[:, None]
        prediction[y] = row.argmax(-1)
    return prediction


def spread(side: int, window: int) -> list[int]:
    """Where as few windows as cover a side begin, from its start to its end.

    Examples:
      >>> spread(10, 4), spread(4, 4)
      ([0, 3, 6], [0])
    """
    last = -(-side // window) - 1
    return [index * (side - window) // max(last, 1) for index in range(last + 1)]


def _neighbors(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(left neighbor i[new], right neighbor i[new], share f32[new] of the right one)."""
    centers = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    left = centers.astype(int)
    return left, np.minimum(left + 1, old - 1), (centers - left).astype(np.float32)


def _scores_of_places(
    image: np.ndarray,
    places: Sequence[tuple[int, int]],
    side: int,
    scores_of: ScoresOf,
    at_once: int,
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """((top, left), scores f[h, w, K]) of each square window of an image u8[H, W, C]."""
    for first in range(0, len(places), at_once):
        some = places[first : first + at_once]
        windows = np.zeros((at_once, side, side, image.shape[2]), np.uint8)
        for index, (top, left) in enumerate(some):
            windows[index] = image[top : top + side, left : left + side]
        yield from zip(some, scores_of(windows), strict=False)
