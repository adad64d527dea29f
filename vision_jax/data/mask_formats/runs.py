"""Run-length encoded masks: lengths of runs, by turns outside and inside, from each tool's text.

COCO counts down columns, CVAT and Label Studio along rows. All begin outside.
"""

import re
from dataclasses import dataclass

import numpy as np

MOST_RUNS = 32_000_000  # half of the pixels of the largest image
_GROUPS = 7  # of 5 bits each, in COCO's text, of one length


@dataclass(frozen=True)
class Runs:
    """A mask inside of a box of an image.

    Attributes:
      lengths: i64[R] of the runs, outside first; their sum is height · width.
      top, left, height, width: the box, in pixels.
      columns: whether they go down the columns, and not along the rows.
    """

    lengths: np.ndarray
    top: int
    left: int
    height: int
    width: int
    columns: bool = False

    def pixels(self) -> np.ndarray:
        """bool[height, width]."""
        inside = np.arange(len(self.lengths)) % 2 == 1
        flat = np.repeat(inside, self.lengths)
        if self.columns:
            return flat.reshape(self.width, self.height).T
        return flat.reshape(self.height, self.width)


def parse_counts(counts: object, pixels: int) -> np.ndarray:
    """i64[R] lengths of COCO's `counts`, a list or its compressed text.

    Raises:
      ValueError: anything else, a negative length, or lengths whose sum is not `pixels`.
    """
    if isinstance(counts, list):
        if not all(type(count) is int and abs(count) < 2**53 for count in counts):
            raise ValueError("counts hold something else than whole numbers")
        lengths = np.array(counts, np.int64)
    elif isinstance(counts, str):
        lengths = _decompress(counts)
    else:
        raise ValueError("counts are neither a list nor text")
    return check_lengths(lengths, pixels)


def check_lengths(lengths: np.ndarray, pixels: int) -> np.ndarray:
    """The lengths i64[R], if none is negative and together they are so many pixels.

    Raises:
      ValueError: otherwise, or too many of them.
    """
    if len(lengths) > MOST_RUNS:
        raise ValueError(f"{len(lengths):,} runs are over the limit of {MOST_RUNS:,}")
    negative = np.flatnonzero(lengths < 0)
    if len(negative):
        raise ValueError(f"run {negative[0]} has the negative length {lengths[negative[0]]}")
    total = sum(lengths.tolist())  # in numbers that can't overflow
    if total != pixels:
        raise ValueError(f"the runs are {total:,} pixels together and not {pixels:,}")
    return lengths


def _decompress(text: str) -> np.ndarray:
    """COCO's text: 5 bits a character, low ones first; lengths from the third on are differences.

    As rleFrString of pycocotools 2.0.11, which checks nothing.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63:
        raise ValueError("counts hold characters that are none of COCO's, or none at all")
    ends = np.flatnonzero(codes & 32 == 0)
    if len(ends) == 0 or ends[-1] != len(codes) - 1:
        raise ValueError("counts break off inside of a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > _GROUPS:
        raise ValueError("counts hold a number of too many digits")
    place = np.arange(len(codes)) - np.repeat(starts, sizes)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * sizes), 0)  # the last one's highest bit is -1
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def parse_row_lengths(text: str, pixels: int) -> np.ndarray:
    """i64[R] lengths of CVAT's `rle`, whole numbers with commas.

    Raises:
      ValueError: as `parse_counts`.
    """
    numbers = re.split(r"\s*,\s*", text.strip())
    if not all(re.fullmatch(r"-?\d{1,15}", number) for number in numbers):
        raise ValueError("rle holds something else than whole numbers with commas")
    return check_lengths(np.array(numbers, np.int64), pixels)


def parse_brush(octets: object, pixels: int) -> np.ndarray:
    """i64[R] lengths of Label Studio's brush `rle`: of each pixel its red, green, blue and alpha.

    The list holds bytes of a stream of bits: how many values, the size of a value and of four kinds
    of lengths, and then blocks of one repeated value or of several plain ones (thi.ng/rle-pack). A
    pixel is inside where its alpha is not 0.

    Raises:
      ValueError: no bytes, values of other sizes, a stream that breaks off, or another number of
        pixels.
    """
    if not isinstance(octets, list) or not octets:
        raise ValueError("rle is no list of bytes")
    if not all(type(octet) is int and 0 <= octet < 256 for octet in octets):
        raise ValueError("rle holds numbers that are no bytes, such as -1")
    bits = "".join(f"{octet:08b}" for octet in octets)
    at = 0

    def read(count: int) -> int:
        nonlocal at
        if at + count > len(bits):
            raise ValueError("rle breaks off")
        at += count
        return int(bits[at - count : at], 2)

    values, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    if word != 8:
        raise ValueError(f"rle has values of {word} bits and not of 8")
    if values != 4 * pixels:
        raise ValueError(f"rle has {values:,} values and not 4 × {pixels:,}")
    ends: list[int] = []  # of runs of pixels, the first one outside
    inside = False

    def add(start: int, end: int, value: int) -> None:
        """Values start to end - 1 are `value`; alpha is each fourth."""
        nonlocal inside
        pixel = start // 4  # the first one whose alpha is at 4 · pixel + 3 ≥ start
        if 4 * pixel + 3 < end and (value != 0) != inside:
            ends.append(pixel)
            inside = not inside

    done = 0
    while done < values:
        repeated = read(1)
        end = done + 1 + read(sizes[read(2)])
        if end > values:
            raise ValueError("rle has more values than it says")
        if repeated:
            add(done, end, read(word))
        else:
            for place in range(done, end):
                add(place, place + 1, read(word))
        done = end
    return np.diff(np.array([0, *ends, pixels], np.int64))
