"""COCO's AP and AR as plain figures, out of the curves of its evaluator: of boxes, and of masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vision_jax.evaluation import distinct_names

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = ("all", "small", "medium", "large")  # bounds of the last three: 32² and 96² pixels
MOST_DETECTIONS = (1, 10, 100)  # a class and an image


def figures(
    precision: np.ndarray, recall: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """ap, ap50, ap75, ap_small ... ar_1 ... ar_small ..., and ap of each class under per_class.

    What has nothing to be measured on, -1 in the curves, is None.

    Args:
      precision: f64[10, 101, K, 4, 3] over IOU_THRESHOLDS, recalls, classes, AREAS and
        MOST_DETECTIONS, as pycocotools' `COCOeval.eval` has it.
      recall: f64[10, K, 4, 3], the highest.
      class_names: K names; one that occurs twice gets its index.
    """
    per_class = [_mean(precision[:, :, label, 0, 2]) for label in range(precision.shape[2])]
    return {
        "ap": _mean(precision[..., 0, 2]),
        "ap50": _mean(precision[0, ..., 0, 2]),
        "ap75": _mean(precision[5, ..., 0, 2]),
        **{f"ap_{AREAS[a]}": _mean(precision[..., a, 2]) for a in (1, 2, 3)},
        **{f"ar_{most}": _mean(recall[..., 0, m]) for m, most in enumerate(MOST_DETECTIONS)},
        **{f"ar_{AREAS[a]}": _mean(recall[..., a, 2]) for a in (1, 2, 3)},
        "per_class": dict(zip(distinct_names(class_names), per_class, strict=True)),
    }


def _mean(values: np.ndarray) -> float | None:
    present = values[values > -1]
    return float(present.mean()) if present.size else None
