"""A large image window by window: scores averaged where windows overlap, and the best class.

Windows lie in rows, and what the next row does not reach is decided and forgotten, so that no more
scores are held than those of a strip of the image as high as a window, and of `at_once` windows.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

# (windows u8[n, h, w, C]) -> scores f[h, w, K] of each
ScoresOf = Callable[[np.ndarray], Iterable[np.ndarray]]
# of each of N lines the lines i[N] before and after it, and the share f32[N] of the latter
Neighbors = tuple[np.ndarray, np.ndarray, np.ndarray]


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
    for top, scores in _strips(image, 0, tops, lefts, window, scores_of, at_once):
        prediction[top : top + len(scores) - 1] = scores[1:].argmax(-1)
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
    window, axis = min(image.shape[:2]), int(image.shape[0] <= image.shape[1])
    along = spread(max(image.shape[:2]), window)
    prediction = np.empty(size, np.uint8)
    neighbors = [_neighbors(old, new) for old, new in zip(image.shape[:2], size, strict=True)]
    first = 0  # row or column of the prediction that is not decided yet
    for start, scores in _strips(image, axis, along, [0], window, scores_of, at_once):
        low, high, share = neighbors[axis]
        end = int(np.searchsorted(high, start + len(scores) - 1))  # high grows with its place
        decided = slice(first, end)
        here = list(neighbors)
        here[axis] = (low[decided] - start + 1, high[decided] - start + 1, share[decided])
        part = (decided, slice(None)) if axis == 0 else (slice(None), decided)
        _decide(prediction[part], np.moveaxis(scores, 0, axis), *here)
        first = end
    return prediction


def _decide(prediction: np.ndarray, scores: np.ndarray, rows: Neighbors, columns: Neighbors):
    """Writes the best class of scores f32[h, w, K] between their rows and columns, u8[H, W]."""
    before, after, right = columns
    for y, (above, below, down) in enumerate(zip(*rows, strict=True)):  # whole, K is too many
        row = scores[above] * (1 - down) + scores[below] * down  # [w, K]
        row = row[before] * (1 - right[:, None]) + row[after] * right[:, None]
        prediction[y] = row.argmax(-1)


def _strips(
    image: np.ndarray,
    axis: int,
    along: Sequence[int],
    across: Sequence[int],
    side: int,
    scores_of: ScoresOf,
    at_once: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, mean scores f32[1 + n, m, K]) of strip after strip of an image u8[H, W, C].

    A strip ends where the next windows along the axis begin. Its first line is the last one of the
    strip before. The array is good until the next strip is asked for.
    """
    places = [(a, b) if axis == 0 else (b, a) for a in along for b in across]
    windows = _scores_of_places(image, places, side, scores_of, at_once)
    total: np.ndarray | None = None
    for start, end in zip(along, [*along[1:], along[-1] + side], strict=True):
        for place, scores in itertools.islice(windows, len(across)):
            if total is None:
                shape = list(image.shape[:2])
                shape[axis] = side + 1
                total, seen = (  # in the image's layout, and its axis first
                    np.moveaxis(np.zeros((*shape, depth), np.float32), axis, 0)
                    for depth in (scores.shape[-1], 1)
                )
            at = place[1 - axis]
            total[1:, at : at + side] += np.moveaxis(scores, axis, 0)
            seen[1:, at : at + side] += 1
        assert total is not None
        done = end - start
        total[1 : done + 1] /= seen[1 : done + 1]
        yield start, total[: done + 1]
        for lines in (total, seen):
            lines[: side + 1 - done] = lines[done:]
            lines[side + 1 - done :] = 0


def spread(side: int, window: int) -> list[int]:
    """Where as few windows as cover a side begin, from its start to its end.

    Examples:
      >>> spread(10, 4), spread(4, 4)
      ([0, 3, 6], [0])
    """
    last = -(-side // window) - 1
    return [index * (side - window) // max(last, 1) for index in range(last + 1)]


def _neighbors(old: int, new: int) -> Neighbors:
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
