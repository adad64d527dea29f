"""How well masks agree, over a whole set: IoU, Dice, accuracy, boundaries, counted objects.

All is counted in pixels over the set first and divided once at the end, so nothing depends on how
images were put into batches, and a large image counts for more than a small one. Pixels whose label
is 255 count nowhere. A class that neither labels nor predictions have is no number and is left out
of means, which say of how many classes they are. Numpy on the host, exact whole numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from vision_jax.data.masks import IGNORED
from vision_jax.errors import UserError
from vision_jax.evaluation import distinct_names

BOUNDARY_SHARE = 0.02  # of the diagonal, how far a boundary reaches inside (Cheng et al. 2021)


class Tally:
    """What is counted over a set, image by image; see `summarize`.

    Attributes:
      class_names: of the K classes.
      confusion: i64[K, K], row = label, column = prediction.
      boundary: i64[2, K], intersection and union of boundaries.
      objects: of each image (predicted, true) numbers of objects; empty if none are counted.
      images: how many.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        background: str = "",
        objects: str = "",
        least_pixels: int = 1,
        boundaries: bool = True,
    ):
        """
        Args:
          class_names: K names.
          background: name of the class that is not foreground; "" for none.
          objects: name of the class whose connected parts are counted, and parts of the foreground
            that have none of it, where there is a background; "" for none.
          least_pixels: smaller parts are not counted.
          boundaries: whether boundary IoU is measured, which takes as long as all the rest.

        Raises:
          UserError: a name of no class.
        """
        self.class_names = tuple(class_names)
        self._background = find_class(background, class_names, "evaluate.background")
        self._objects = find_class(objects, class_names, "evaluate.objects")
        self._least_pixels = least_pixels
        self._boundaries = boundaries
        count = len(self.class_names)
        self.confusion = np.zeros((count, count), np.int64)
        self.boundary = np.zeros((2, count), np.int64)
        self.objects: list[tuple[int, int]] = []
        self.images = 0

    def add(self, prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Count an image, u8[H, W] both; returns its own confusion matrix."""
        found = confusion_matrix(prediction, label, len(self.class_names))
        self.confusion += found
        self.images += 1
        if self._boundaries:
            self.boundary += boundary_counts(prediction, label, len(self.class_names))
        if self._objects is not None:
            ours, theirs = (
                self.count_objects(np.where(label == IGNORED, IGNORED, one))
                for one in (prediction, label)
            )
            self.objects.append((ours, theirs))
        return found

    def count_objects(self, mask: np.ndarray) -> int:
        """How many objects u8[H, W] shows: see `count_objects`; 0 if none are to be counted."""
        if self._objects is None:
            return 0
        around = None
        if self._background is not None:
            around = (mask != self._background) & (mask != IGNORED)
        return count_objects(mask == self._objects, around, self._least_pixels)

    def summarize(self) -> dict[str, Any]:
        """Figures that JSON can hold; None where there is none.

        miou: mean IoU of the classes that occur; `classes` says how many of how many.
        pixel_accuracy: share of the counted pixels that are right.
        mean_dice: 2 TP / (2 TP + FP + FN), mean likewise. boundary_iou: likewise.
        miou_foreground, foreground_iou: of all classes but the background, and of all of these as
          one.
        objects, objects_true: connected parts of a class in predictions and labels.
        per_class: iou, dice, boundary_iou, pixels (labelled) by name.
        count: images; pixels: that were counted.

        Raises:
          UserError: not one counted pixel.
        """
        if not self.confusion.sum():
            raise UserError(
                f"evaluation: not one of the pixels of {self.images} masks has a class: check the"
                " table of classes"
            )
        iou, dice = iou_of(self.confusion), dice_of(self.confusion)
        with np.errstate(invalid="ignore", divide="ignore"):
            boundary = self.boundary[0] / self.boundary[1]  # NaN where there is none
        names = distinct_names(self.class_names)
        summary: dict[str, Any] = {
            "miou": _mean(iou),
            "pixel_accuracy": float(np.trace(self.confusion) / self.confusion.sum()),
            "mean_dice": _mean(dice),
            "boundary_iou": _mean(boundary),
            "miou_foreground": None,
            "foreground_iou": None,
            "objects": None,
            "objects_true": None,
            "classes": [int(np.isfinite(iou).sum()), len(iou)],
            "per_class": {
                name: {
                    "iou": _number(iou[k]),
                    "dice": _number(dice[k]),
                    "boundary_iou": _number(boundary[k]),
                    "pixels": int(self.confusion[k].sum()),
                }
                for k, name in enumerate(names)
            },
            "count": self.images,
            "pixels": int(self.confusion.sum()),
        }
        if self._background is not None:
            others = np.arange(len(iou)) != self._background
            merged = np.zeros((2, 2), np.int64)
            np.add.at(merged, (others[:, None] * 1, others[None, :] * 1), self.confusion)
            summary["miou_foreground"] = _mean(iou[others])
            summary["foreground_iou"] = _number(iou_of(merged)[1])
        if self.objects:
            summary["objects"], summary["objects_true"] = np.sum(self.objects, axis=0).tolist()
        return summary


def find_class(name: str, class_names: Sequence[str], field: str) -> int | None:
    """The index of a class, None for no name.

    Raises:
      UserError: no such class.
    """
    if not name:
        return None
    if name not in class_names:
        few = ", ".join(class_names[:5]) + (", …" if len(class_names) > 5 else "")
        raise UserError(f"config.{field} {name!r}: there is no such class among {few}")
    return list(class_names).index(name)


def confusion_matrix(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """i64[K, K] of masks of one shape: row = label, column = prediction; 255 counts nowhere.

    Examples:
      >>> confusion_matrix(np.array([[0, 1, 1]]), np.array([[0, 0, 255]]), 2).tolist()
      [[1, 1], [0, 0]]
    """
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ")
    counted = label != IGNORED
    pairs = label[counted].astype(np.int64) * num_classes + prediction[counted]
    found = np.bincount(pairs, minlength=num_classes**2)
    if len(found) > num_classes**2:
        raise UserError(f"evaluation: a label or a prediction is not below {num_classes}")
    return found.reshape(num_classes, num_classes)


def iou_of(confusion: np.ndarray) -> np.ndarray:
    """f64[K], TP / (TP + FP + FN); NaN of a class that is nowhere."""
    true = np.diag(confusion)
    with np.errstate(invalid="ignore", divide="ignore"):
        return true / (confusion.sum(0) + confusion.sum(1) - true)


def dice_of(confusion: np.ndarray) -> np.ndarray:
    """f64[K], 2 TP / (2 TP + FP + FN); NaN of a class that is nowhere."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * np.diag(confusion) / (confusion.sum(0) + confusion.sum(1))


def boundary_of(mask: np.ndarray, reach: int) -> np.ndarray:
    """bool[H, W]: the pixels of a mask that are at most `reach` steps from its outside.

    Steps go to any of eight neighbors; beyond the image is outside. The reference erodes `reach`
    times by 3 x 3 with a border of zeros, which is the same.
    """
    inside = ndimage.minimum_filter(
        mask.astype(np.uint8), size=2 * reach + 1, mode="constant", cval=0
    )
    return mask & (inside == 0)


def boundary_counts(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """i64[2, K]: intersection and union of each class's boundaries.

    Boundary IoU (Cheng et al. 2021, https://arxiv.org/abs/2103.16562): the IoU of the pixels of
    both masks that are within 2 % of the image's diagonal from their masks' contours, at least one
    pixel. Where the label is 255 neither mask is.
    """
    counts = np.zeros((2, num_classes), np.int64)
    reach = max(round(BOUNDARY_SHARE * float(np.hypot(*label.shape))), 1)
    counted = label != IGNORED
    for k in np.union1d(np.unique(prediction[counted]), np.unique(label[counted])):
        ours, theirs = (boundary_of((mask == k) & counted, reach) for mask in (prediction, label))
        counts[:, k] = (ours & theirs).sum(), (ours | theirs).sum()
    return counts


def count_objects(mask: np.ndarray, around: np.ndarray | None = None, least_pixels: int = 1) -> int:
    """How many parts of bool[H, W] hang together by sides.

    Examples:
      >>> count_objects(np.array([[1, 0, 1], [1, 0, 0]], bool))
      2

    Args:
      mask: of the objects, or of their insides.
      around: bool[H, W] of all that is foreground: a part of it without any of the mask, such as an
        object that is nothing but edge, is one too.
      least_pixels: smaller parts are none.
    """
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())[1:]
    count = int((sizes >= least_pixels).sum())
    if around is not None:
        wider, _ = ndimage.label(around)
        sizes = np.bincount(wider.ravel())
        sizes[np.unique(wider[mask])] = 0
        count += int((sizes[1:] >= max(least_pixels, 1)).sum())
    return count


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
