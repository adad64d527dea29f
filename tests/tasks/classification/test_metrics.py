"""Each figure against its definition, written out example by example in plain Python."""

import json
import math

import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.tasks.classification.metrics import confusion_matrix, softmax, summarize


def _names(count: int) -> list[str]:
    return [f"class {index}" for index in range(count)]


def _reference(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Python floats, one example at a time; the bins of Guo et al. as (low, high]."""
    losses, confidences, hits, hits5 = [], [], [], []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        top = max(row)
        normalizer = math.fsum(math.exp(value - top) for value in row)
        losses.append(math.log(normalizer) + top - row[label])
        confidences.append(1 / normalizer)
        ranking = sorted(range(len(row)), key=lambda index: (-row[index], index))
        hits.append(ranking[0] == label)
        hits5.append(label in ranking[:5])
    count, ece = len(losses), 0.0
    for bin_index in range(15):
        members = [
            index
            for index in range(count)
            if bin_index / 15 < confidences[index] <= (bin_index + 1) / 15
        ]
        if members:
            accuracy = sum(hits[index] for index in members) / len(members)
            confidence = math.fsum(confidences[index] for index in members) / len(members)
            ece += len(members) / count * abs(accuracy - confidence)
    return {
        "top1": sum(hits) / count,
        "top5": sum(hits5) / count,
        "loss": math.fsum(losses) / count,
        "ece": ece,
    }


@pytest.mark.parametrize(("count", "classes"), [(1, 2), (300, 3), (5000, 12)])
def test_equals_the_definitions(count: int, classes: int, rng: np.random.Generator) -> None:
    logits = rng.normal(0, 3, (count, classes)).astype(np.float32)
    labels = rng.integers(0, classes, count).astype(np.int32)
    logits[np.arange(count), labels] += 1.5
    summary = summarize(logits, labels, _names(classes))
    for name, value in _reference(logits, labels).items():
        assert summary[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name
    assert summary["count"] == count
    for index, name in enumerate(_names(classes)):
        own = [int(np.argmax(row)) == index for row in logits[labels == index]]
        assert summary["per_class"][name] == (sum(own) / len(own) if own else None)


def test_is_json_of_plain_numbers() -> None:
    summary = summarize(np.zeros((2, 3), np.float32), np.array([0, 1], np.int32), ["a", "b", "c"])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert all(type(summary[name]) is float for name in ("top1", "top5", "loss", "ece"))
    assert type(summary["count"]) is int


def test_ties_rank_the_lower_class_first() -> None:
    logits = np.zeros((7, 7), np.float32)
    summary = summarize(logits, np.arange(7), _names(7))
    assert summary["top1"] == pytest.approx(1 / 7)
    assert summary["top5"] == pytest.approx(5 / 7)
    assert summary["per_class"]["class 0"] == 1.0
    assert summary["loss"] == pytest.approx(math.log(7), rel=1e-15)


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    logits = np.array([[1000.0, 0.0], [1000.0, 0.0]], np.float32)
    assert summarize(logits, np.array([0, 0]), ["a", "b"])["loss"] == 0.0
    summary = summarize(logits, np.array([1, 1]), ["a", "b"])
    assert summary["loss"] == 1000.0
    assert summary["ece"] == 1.0


def test_confidence_of_exactly_one_is_in_the_last_bin() -> None:
    logits = np.array([[1000.0, 0.0], [3.0, 0.0]])  # the second: 0.953, in (14/15, 1] as well
    confidence = 1 / (1 + math.exp(-3))
    summary = summarize(logits, np.array([0, 1]), ["a", "b"])
    assert summary["ece"] == pytest.approx(abs(1.0 - 1.0 - confidence) / 2, rel=1e-14)
    both = summarize(logits, np.array([1, 0]), ["a", "b"])  # gaps of -1 and 1 - 0.953 add up
    assert both["ece"] == pytest.approx(confidence / 2, rel=1e-14)


@pytest.mark.parametrize(("other", "same_bin"), [(0.30, True), (0.35, False)])
def test_confidence_on_an_edge_belongs_to_the_bin_below(other: float, same_bin: bool) -> None:
    """1/3 = 5/15 exactly; 0.30 lies in (4/15, 5/15] and 0.35 in (5/15, 6/15]."""
    edge = [0.0, 0.0, 0.0, -math.inf, -math.inf]
    rest = (1 - other) / 4
    logits = np.array([edge, np.log([other, rest, rest, rest, rest])])
    summary = summarize(logits, np.array([0, 1]), _names(5))  # the first right, the second wrong
    first, second = 1 - 1 / 3, 0 - other
    expected = abs(first + second) / 2 if same_bin else (abs(first) + abs(second)) / 2
    assert summary["ece"] == pytest.approx(expected, rel=1e-12)


def test_absent_and_doubly_named_classes() -> None:
    summary = summarize(np.eye(3), np.array([0, 1, 1]), ["crane", "bird", "crane"])
    assert summary["per_class"] == {"crane (0)": 1.0, "bird": 0.5, "crane (2)": None}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_logits_are_refused(bad: float) -> None:
    logits = np.zeros((4, 3))
    logits[2, 1] = bad
    with pytest.raises(UserError, match="1 of 4 examples"):
        summarize(logits, np.zeros(4, int), _names(3))


def test_unusable_input_is_refused() -> None:
    with pytest.raises(UserError, match="no examples"):
        summarize(np.zeros((0, 3)), np.zeros(0, int), _names(3))
    with pytest.raises(UserError, match=r"label 3 is outside 0\.\.2"):
        summarize(np.zeros((2, 3)), np.array([0, 3]), _names(3))
    with pytest.raises(ValueError, match="do not belong together"):
        summarize(np.zeros((2, 3)), np.array([0, 1]), _names(4))


def test_confusion_matrix_counts_rows_by_truth(rng: np.random.Generator) -> None:
    predictions = rng.integers(0, 5, 400).astype(np.int32)
    labels = rng.integers(0, 5, 400).astype(np.int32)
    expected = [[0] * 7 for _ in range(7)]
    for prediction, label in zip(predictions, labels, strict=True):
        expected[label][prediction] += 1
    matrix = confusion_matrix(predictions, labels, 7)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == expected
    with pytest.raises(UserError, match="prediction -1 is outside"):
        confusion_matrix(np.array([-1]), np.array([0]), 2)


def test_confusion_matrix_of_small_integers_does_not_overflow() -> None:
    labels = np.full(3, 200, np.uint8)
    assert confusion_matrix(labels, labels, 201)[200, 200] == 3


def test_softmax():
    logits = np.array([[1000.0, 1000.0], [0.0, np.log(3)]])
    np.testing.assert_allclose(softmax(logits), [[0.5, 0.5], [0.25, 0.75]], rtol=1e-12)
