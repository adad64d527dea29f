"""Texts for models of images and texts."""

import numpy as np


def sample_tokens(count: int, length: int, vocab_size: int) -> np.ndarray:
    """Texts i64[B, L], the same in every call."""
    return np.random.default_rng(0).integers(0, vocab_size, (count, length))
