"""Accuracy and calibration of a classifier over a whole dataset, exact in float64.

The caller drops the padding rows first (`logits[mask]`, `labels[mask]`), so that every example
counts once. Everything here is numpy on the host.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vision_jax.errors import DivergedError, UserError, utf8
from vision_jax.evaluation import distinct_names

CALIBRATION_BINS = 15
ROWS_AT_ONCE = 4096  # 50 000 x 1000 logits in float64 at once would take 0.4 GB per intermediate


def summarize(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """The figures that are reported for a dataset, as plain numbers that JSON can hold.

    Classes are ranked by logit; among equal logits the lower class index ranks first, as argmax has
    it.

    Args:
      logits: f32[N, C], before the softmax; -inf is a class that cannot be.
      labels: int[N] in [0, C).
      class_names: C names. A name that occurs twice gets its index, "crane (134)", in `per_class`.

    Returns:
      top1, top5: shares in [0, 1]; top5 is of the best min(5, C).
      loss: mean negative log-likelihood in nats, of unsmoothed labels.
      ece: expected calibration error in [0, 1], 15 equal-width bins of the top-1 confidence, each
        open on the left and closed on the right (Guo et al. 2017, "On Calibration of Modern Neural
        Networks", eq. 3).
      per_class: accuracy by class name; None for a class without examples.
      count: N.

    Raises:
      UserError: no examples, a label out of range, or logits that are NaN or +inf.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] != len(class_names):
        raise ValueError(
            f"logits {logits.shape}, labels {labels.shape} and {len(class_names)} class names "
            "do not belong together"
        )
    count, classes = logits.shape
    if count == 0:
        raise UserError("evaluation: the dataset has no examples; check its split and paths")
    _check_range("label", labels, classes)

    chunks = [
        _score(logits[start : start + ROWS_AT_ONCE], labels[start : start + ROWS_AT_ONCE])
        for start in range(0, count, ROWS_AT_ONCE)
    ]
    nll, confidence, rank = (np.concatenate(column) for column in zip(*chunks, strict=True))
    correct = rank == 0

    examples = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[correct], minlength=classes)
    return {
        "top1": float(np.mean(correct)),
        "top5": float(np.mean(rank < 5)),
        "loss": float(np.mean(nll)),
        "ece": _expected_calibration_error(confidence, correct),
        "per_class": {
            name: float(hit / total) if total else None
            for name, hit, total in zip(distinct_names(class_names), hits, examples, strict=True)
        },
        "count": count,
    }


def confusion_matrix(
    predictions: np.ndarray, labels: np.ndarray, num_classes: int
) -> np.ndarray:  # i64[C, C]
    """How often each class was taken for each other: row = true class, column = predicted class.

    Args:
      predictions: int[N] in [0, num_classes).
      labels: int[N] in [0, num_classes).

    Examples:
      >>> confusion_matrix(np.array([1, 1, 0]), np.array([0, 1, 0]), 2).tolist()
      [[1, 1], [0, 1]]
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} differ")
    _check_range("prediction", predictions, num_classes)
    _check_range("label", labels, num_classes)
    cells = labels.astype(np.int64) * num_classes + predictions
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _score(
    logits: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # f64[n], f64[n], i64[n]
    """Of each example: negative log-likelihood, top-1 confidence, rank of its true class."""
    logits = logits.astype(np.float64)  # [n, C]
    top = logits.max(axis=1, keepdims=True)  # [n, 1]; NaN if any logit of the row is NaN
    damaged = int(np.sum(~np.isfinite(top)))
    if damaged:
        raise DivergedError(
            f"evaluation: the model's logits are not finite for {damaged} of {len(logits)} "
            "examples; its weights are damaged or its training diverged"
        )
    normalizer = np.exp(logits - top).sum(axis=1)  # [n], at least 1
    true = np.take_along_axis(logits, labels[:, None], axis=1)  # [n, 1]
    nll = np.log(normalizer) + (top - true)[:, 0]
    order = np.argsort(-logits, axis=1, kind="stable")  # [n, C]
    rank = np.argmax(order == labels[:, None], axis=1)
    return nll, 1.0 / normalizer, rank


def _expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """sum over bins of |accuracy - confidence| weighted by the bin's share of the examples."""
    inner_edges = np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS
    bins = np.searchsorted(inner_edges, confidence, side="left")  # an edge goes to the bin below
    gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _check_range(what: str, values: np.ndarray, classes: int) -> None:
    outside = values[(values < 0) | (values >= classes)]
    if outside.size:
        raise UserError(
            f"evaluation: {what} {outside[0]} is outside 0..{classes - 1}; "
            "the dataset and the model's head must have the same classes"
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities f64[N, C] of logits f[N, C]."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def best_classes(
    probabilities: np.ndarray, class_names: Sequence[str], count: int
) -> dict[str, Any]:
    """What is said of one image: its class, and the `count` most probable ones, for JSON.

    Examples:
      >>> best_classes(np.array([0.25, 0.75]), ("cat", "dog"), 5)["top"]
      [['dog', 0.75], ['cat', 0.25]]

    Args:
      probabilities: f[C].
      class_names: C names.
      count: of the classes listed, at most.
    """
    best = np.argsort(-probabilities, kind="stable")[: max(count, 1)]
    top = [[utf8(class_names[label]), float(probabilities[label])] for label in best]
    name, probability = top[0]
    return {
        "class": name,
        "label": int(best[0]),
        "probability": probability,
        "top": top[:count],
    }
