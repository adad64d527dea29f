"""A micrograph of cell nuclei that comes with the package: `embedded:nuclei/train` and `test`."""

import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vision_jax.data.masks import ArrayMasks, MaskedImages
from vision_jax.data.segments import SEMANTIC, SegmentData, Segments, segments_of_map
from vision_jax.data.sources import ASSETS, ArrayReader
from vision_jax.errors import UserError, nearest

EMBEDDED = "embedded:"
NUCLEI = ("background", "inside", "edge")
TILE = 128  # pixels a side of the squares of a micrograph whose instances are wanted
EDGE = 2  # pixels, of a nucleus: enough for two that touch to be told apart


def read_nuclei(spec: str, targets: str) -> MaskedImages:
    """A micrograph and the three classes of its pixels: nuclei touch, and edges part them.

    Of other targets than semantic ones the classes are background and nucleus, and the micrograph
    is in squares: models that find masks see a whole image at once, of one size.

    Raises:
      UserError: another name.
    """
    known = ("nuclei/train", "nuclei/test")
    rest = spec.partition(":")[2]
    if rest not in known:
        raise UserError(f"{spec}: there is no {rest!r}{nearest(rest, known)}")
    split = rest.partition("/")[2]
    image, nuclei = (
        np.asarray(Image.open(ASSETS / "nuclei" / f"{split}_{kind}.png"))
        for kind in ("image", "nuclei")
    )
    if targets == SEMANTIC:
        masks = ArrayMasks(spec, (inside_and_edge(nuclei),))
        return MaskedImages(spec, NUCLEI, ArrayReader(spec, image[None]), masks, 1)
    images, numbers = (_squares(whole, TILE) for whole in (image, nuclei))
    numbered, around = NumberedMasks(spec, tuple(numbers)), NUCLEI[0]
    return MaskedImages(
        spec,
        (around, "nucleus"),
        ArrayReader(spec, images),
        numbered,
        len(images),
        segments=SegmentData(numbered, (around,), around),
    )


def _squares(whole: np.ndarray, side: int) -> np.ndarray:
    """[N, side, side, ...] of [H, W, ...], row by row; H and W are multiples."""
    rows, columns = (length // side for length in whole.shape[:2])
    parts = whole.reshape(rows, side, columns, side, *whole.shape[2:]).swapaxes(1, 2)
    return parts.reshape(rows * columns, side, side, *whole.shape[2:])


@dataclass(frozen=True)
class NumberedMasks:
    """Instances of one class in memory, numbered i[H, W] each; class 0 is where the number is 0."""

    name: str
    numbers: tuple[np.ndarray, ...]

    def read(self, row: int) -> np.ndarray:
        return (self.numbers[row] > 0).astype(np.uint8)

    def segments(self, row: int) -> Segments:
        known = self._known(row)
        return segments_of_map(self.numbers[row], known, [1] * len(known), [False] * len(known))

    def segment_labels(self, row: int) -> np.ndarray:
        return np.ones(len(self._known(row)), np.uint8)

    def _known(self, row: int) -> list[int]:
        found = np.unique(self.numbers[row])
        return found[found > 0].tolist()

    def example_name(self, row: int) -> str:
        return f"{self.name}[{row}]"

    def stamp(self, row: int) -> int:
        return zlib.crc32(self.numbers[row].tobytes())


def inside_and_edge(instances: np.ndarray, reach: int = EDGE) -> np.ndarray:
    """u8[H, W]: 0 outside, 1 inside and 2 at the edge of instances i[H, W], of which 0 is none.

    The edge are an instance's pixels from which at most `reach` steps, up, down, left or right,
    lead to another value; beyond the image nothing is another value.
    """
    edge = np.zeros(instances.shape, bool)
    values = np.pad(instances, 1, mode="edge")
    for _ in range(reach):
        padded = np.pad(edge, 1)
        near = [
            (values[rows, columns] != instances) | padded[rows, columns]
            for rows, columns in (
                (slice(None, -2), slice(1, -1)),
                (slice(2, None), slice(1, -1)),
                (slice(1, -1), slice(None, -2)),
                (slice(1, -1), slice(2, None)),
            )
        ]
        edge = np.logical_or.reduce(near)
    return np.where(instances == 0, 0, np.where(edge, 2, 1)).astype(np.uint8)
