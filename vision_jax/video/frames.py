"""Frames of a video with the times at which they are shown."""

from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Frame(NamedTuple):
    """A frame as it is shown.

    Attributes:
      index: its place in the order in which the frames are shown, from 0. What is skipped counts.
      time: seconds since the first frame, exact; later than that of the frame before it.
      pixels: u8[H, W, 3], red, green, blue, upright.
    """

    index: int
    time: Fraction
    pixels: np.ndarray
