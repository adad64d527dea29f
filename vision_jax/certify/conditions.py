"""Times and classes for models that make images."""

import numpy as np


def sample_conditions(count: int, num_classes: int, predicts: str) -> tuple[np.ndarray, np.ndarray]:
    """(times f64[B], classes i64[B]), the same in every call; the last class is none.

    Times are steps of 0 to 999 for a model that predicts noise, and from 0 to 1 for others.
    """
    rng = np.random.default_rng(0)
    steps, parts = rng.integers(0, 1000, count).astype(np.float64), rng.random(count)
    labels = rng.integers(0, num_classes + 1, count)
    labels[-1] = num_classes
    return steps if predicts == "noise" else parts, labels
