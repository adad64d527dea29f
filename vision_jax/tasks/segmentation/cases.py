"""A report of each volume: how many ml of each class, their largest part, and a strip of slices.

Volumes in ml are of the slices that were evaluated. What a trained model measures is not a
diagnosis, and every report says so.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from vision_jax.config import write_json
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.masks import IGNORED
from vision_jax.data.segmentation import SegmentationSource
from vision_jax.data.volumes.source import VolumeReader, spacing_of

SENTENCE = "Measured by a trained model: this is not a diagnosis, and not fit for clinical use."
STRIP = 8  # slices in a picture
MOST_PICTURES = 50  # cases that are drawn; all are written as JSON
GREYS = 256
MOST_SLICES = 400  # of the training data, that the best window is chosen on
_LONGEST_STEM = 100


class CaseTally:
    """Gathers the slices of one volume after the other; what is kept of each is its report.

    Args:
      source: slices of volumes, each volume's one after the other.
      truth: whether there are labels; else reports have "labels" u8[S, H, W] as predicted.
    """

    def __init__(self, source: SegmentationSource, *, truth: bool = True):
        self._truth = truth
        assert isinstance(source.reader, VolumeReader)
        self._source, self._reader = source, source.reader
        self._slices: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        self._number = -1
        self._reports: list[dict[str, Any]] = []

    def add(self, row: int, prediction: np.ndarray, label: np.ndarray) -> None:
        """A slice, u8[H, W] both."""
        place = int(self._source.rows[row])
        number = int(self._reader.of[place])
        if number != self._number:
            self._finish()
            self._number = number
        self._slices[int(self._reader.slice[place])] = (prediction, label, place)

    def reports(self) -> tuple[dict[str, Any], ...]:
        """Of all volumes, as `_report` makes them."""
        self._finish()
        return tuple(self._reports)

    def _finish(self) -> None:
        if self._slices:
            self._reports.append(self._report())
        self._slices = {}

    def _report(self) -> dict[str, Any]:
        """What JSON can hold, and "strip": slices for the picture."""
        numbers = sorted(self._slices)
        first, last = numbers[0], numbers[-1]
        height, width = self._slices[first][0].shape
        shape = (last - first + 1, height, width)  # slices that are missing part what they part
        prediction, label = np.full(shape, IGNORED, np.uint8), np.full(shape, IGNORED, np.uint8)
        for number in numbers:
            prediction[number - first], label[number - first], _ = self._slices[number]
        case = self._reader.cases[self._number]
        names = self._source.class_names
        truth = label if self._truth else None
        shown = [numbers[i] for i in np.linspace(0, len(numbers) - 1, STRIP).round().astype(int)]
        return {
            "case": case.name,
            "patient": case.patient,
            "warning": SENTENCE,
            "plane": self._reader.options.plane,
            "slices": [first, last],
            "slices_evaluated": len(numbers),
            "assumed": case.note,
            "spacing_mm": list(spacing_of(self._reader, self._number)),
            "classes": measure_classes(prediction, truth, names, case.grid.voxel_ml),
            "strip": [self._slices[number] for number in dict.fromkeys(shown)],
        } | ({} if self._truth else {"labels": prediction})


def measure_classes(
    prediction: np.ndarray,
    label: np.ndarray | None,
    class_names: Sequence[str],
    voxel_ml: float | None,
) -> dict[str, dict[str, Any]]:
    """Of each class but the first: voxels, ml, Dice, parts that hang together, the largest one.

    Parts hang together by sides, across slices too. Voxels whose label is 255 count nowhere.

    Args:
      prediction: u8[S, H, W].
      label: u8[S, H, W], None where there is no truth, and nothing is said of it.
      class_names: of the classes, the first one being what is around.
      voxel_ml: the volume of a voxel; None where it is not known, and no ml is.
    """
    counted = np.ones(prediction.shape, bool) if label is None else label != IGNORED
    measured: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(class_names[1:], start=1):
        ours = (prediction == k) & counted
        parts, count = ndimage.label(ours)
        sizes = np.bincount(parts.ravel())[1:]
        here, largest = int(ours.sum()), int(sizes.max(initial=0))
        found = {
            "voxels": here,
            "volume_ml": None if voxel_ml is None else here * voxel_ml,
            "parts": int(count),
            "largest_part_ml": None if voxel_ml is None else largest * voxel_ml,
            "largest_part_share": largest / here if here else None,
        }
        if label is not None:
            theirs = (label == k) & counted
            there, both = int(theirs.sum()), int((ours & theirs).sum())
            found |= {
                "true_voxels": there,
                "true_volume_ml": None if voxel_ml is None else there * voxel_ml,
                "dice": 2 * both / (here + there) if here + there else None,
            }
        measured[name] = found
    return measured


def write_cases(reports: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """NAME.json and NAME.png of each case in a folder that is made.

    Args:
      reports: with "pictures", the images u8[H, W, C] of the slices in "strip".
      folder: where to write.
    """
    from vision_jax.tasks.segmentation import figures  # matplotlib

    folder.mkdir(exist_ok=True)
    for number, report in enumerate(reports):
        stem = f"{number:04d}_{re.sub(r'[^A-Za-z0-9.-]', '_', str(report['case']))[:_LONGEST_STEM]}"
        drawn = ("strip", "labels", "pictures")
        record = {key: value for key, value in report.items() if key not in drawn}
        write_json(record, folder / f"{stem}.json")
        if number < MOST_PICTURES:
            strip = [
                (picture, label, prediction)
                for picture, (prediction, label, _) in zip(
                    report["pictures"], report["strip"], strict=True
                )
            ]
            figures.draw_case(record, strip, folder / f"{stem}.png")


# --- the baseline -------------------------------------------------------------------------------


def grey_counts(source: SegmentationSource) -> np.ndarray:
    """i64[2, 256]: pixels outside (class 0) and inside (the others), by grey level.

    The level is the middle channel's, which is the slice itself where neighbors lie beside it.
    """
    counts = np.zeros((2, GREYS), np.int64)
    for i in np.unique(np.linspace(0, len(source) - 1, MOST_SLICES).astype(int)).tolist():
        try:
            example = source[i]
        except DamagedImageError:
            continue
        image, mask = example["image"], example["mask"]
        grey = image[..., image.shape[2] // 2]
        for inside in (0, 1):
            chosen = ((mask > 0) == bool(inside)) & (mask != IGNORED)
            counts[inside] += np.bincount(grey[chosen], minlength=GREYS)
    return counts


def best_window(counts: np.ndarray) -> tuple[int, int]:
    """(low, high): taking all pixels from level low to high as inside has the highest IoU."""
    below = np.concatenate([np.zeros((2, 1), np.int64), np.cumsum(counts, 1)], 1)  # [2, 257]
    within = below[:, None, 1:] - below[:, :-1, None]  # [2, low, high]
    iou = within[1] / np.maximum(counts[1].sum() + within[0], 1)
    iou[np.tril_indices(GREYS, -1)] = -1.0  # high below low
    low, high = np.unravel_index(int(iou.argmax()), iou.shape)
    return int(low), int(high)


def window_iou(counts: np.ndarray, low: int, high: int) -> float:
    """The IoU of the pixels from level low to high with those inside."""
    outside, inside = counts[:, low : high + 1].sum(1)
    return float(inside / max(counts[1].sum() + outside, 1))
