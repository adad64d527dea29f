"""How far the levels of int8 should reach, from a histogram of magnitudes."""

import jax
import jax.numpy as jnp
import numpy as np

BINS = 2048
LEVELS = 127  # of int8, on each side of zero
OBSERVERS = ("absmax", "percentile", "mse")


def count_magnitudes(x: jax.Array, largest: jax.Array) -> jax.Array:
    """i32[BINS]: how many |x| fall into each equal part of 0 ... largest; f[...], f[]."""
    unit = jnp.abs(x).astype(jnp.float32).reshape(-1) / jnp.where(largest > 0, largest, 1)
    bins = jnp.clip((unit * BINS).astype(jnp.int32), 0, BINS - 1)
    return jnp.zeros(BINS, jnp.int32).at[bins].add(1)


def find_range(
    counts: np.ndarray, largest: float, observer: str, percentile: float = 99.99
) -> float:
    """The magnitude that level 127 stands for; beyond it inputs are clipped.

    Args:
      counts: i[BINS] of `count_magnitudes`.
      largest: the end of its last bin.
      observer: "absmax", the largest; "percentile", what so many percent of magnitudes lie below;
        "mse", what makes the mean squared error of rounding and clipping least, of the ends of
        bins.
      percentile: of the second.

    Examples:
      >>> counts = np.zeros(BINS, int)
      >>> counts[1023], counts[-1] = 99_999, 1
      >>> [find_range(counts, 2.0, name) for name in ("absmax", "percentile")]
      [2.0, 1.0]
    """
    ends = largest * np.arange(1, BINS + 1) / BINS
    if observer == "absmax" or not largest:  # nothing but zeros
        return float(largest)
    if observer == "percentile":
        share = np.cumsum(counts) / counts.sum()
        return float(ends[np.searchsorted(share, percentile / 100)])
    middles = ends - ends[0] / 2
    candidates = ends[LEVELS::8]  # shorter ones have less than a bin for a level
    candidates = np.append(candidates, ends[-1])
    steps = candidates[:, None] / LEVELS
    rounded = np.clip(np.round(middles / steps), 0, LEVELS) * steps
    errors = (counts * np.square(rounded - middles)).sum(1)
    return float(candidates[errors.argmin()])
