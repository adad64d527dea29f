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
        for left, scores in _scores_along(image[top : top + window], lefts, scores_of, at_once):
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


def _scores_along(
    row: np.ndarray, lefts: Sequence[int], scores_of: ScoresOf, at_once: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(left, scores f[h, w, K]) of each window of a row u8[h, W, C]."""
    side = len(row)
    for first in range(0, len(lefts), at_once):
        some = lefts[first : first + at_once]
        windows = np.zeros((at_once, side, side, row.shape[2]), np.uint8)
        for place, left in enumerate(some):
            windows[place] = row[:, left : left + side]
        yield from zip(some, scores_of(windows), strict=False)
