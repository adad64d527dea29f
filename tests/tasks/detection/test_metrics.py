"""Figures worked out by hand, the files, and the guard against AP 0. pycocotools: tests/parity."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from detection_cases import make_detections, make_truth, random_case
from PIL import Image

from vision_jax.data.detection import DetectionSource, Ragged, read_detection_source
from vision_jax.errors import UserError
from vision_jax.tasks.detection import metrics as detection
from vision_jax.tasks.detection.metrics import Detections, diagnose

NOTHING = make_detections([])


def test_truth_past_the_edge_is_measured_as_its_file_states_it(tmp_path: Path) -> None:
    """28 of 50 pixels of its width are in the image: an IoU of .56, above two of ten thresholds."""
    boxes = [[-22, 10, 50, 50], [300, 10, 20, 20], [10, 10, 0, 9]]
    content = {
        "images": [{"id": "a", "file_name": "a.png", "width": 200, "height": 100}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": "a", "category_id": 3, "bbox": box, "area": 1, "iscrowd": 0}
            for i, box in enumerate(boxes, start=1)
        ],
    }
    found = make_detections([(0, 0, 0.9, [0, 10, 28, 60])])
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    for count in (1, 2, 3):  # those that no image shows are missed
        part = {**content, "annotations": content["annotations"][:count]}
        (tmp_path / "truth.json").write_text(json.dumps(part))
        source = read_detection_source(str(tmp_path / "truth.json"))
        figures = detection.summarize(found, source)
        recalls = {1: 101, 2: 51, 3: 34}[count]  # of 101 up to 1 / count
        assert figures["ap"] == pytest.approx(0.2 * recalls / 101, abs=1e-12)
        assert figures["ar_100"] == pytest.approx(0.2 / count, abs=1e-12)
        assert figures["mean_iou_matched"] == pytest.approx(0.56 / count, abs=1e-12)
        assert figures["true_boxes"] == count
        assert detection.confusion_matrix(found, source).tolist() == [[1, count - 1], [0, 0]]
        written = json.loads(detection.write_coco(tmp_path / "again.json", source).read_text())
        assert [entry["bbox"] for entry in written["annotations"]] == boxes[:count]
        np.testing.assert_array_equal(source.boxes_xyxy_px.values, [[0, 10, 28, 60]])  # to train


def test_perfect_and_half_right() -> None:
    source = make_truth([[[0, 0, 40, 40], [50, 50, 60, 60]], []], [[0, 1], []])
    perfect = [(0, 0, 0.9, [0, 0, 40, 40]), (0, 1, 0.8, [50, 50, 60, 60])]
    figures = detection.summarize(make_detections(perfect), source)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ar_1", "mean_iou_matched"):
        assert figures[name] == pytest.approx(1, abs=1e-12), name
    assert figures["ap_large"] is None
    assert figures["ar_large"] is None
    assert figures["mean_iou_top1"] is None  # no image with one box
    counts = [figures[name] for name in ("count", "true_boxes", "crowds", "detections")]
    assert counts == [2, 2, 0, 2]

    half = make_detections([perfect[0], (0, 0, 0.95, [50, 50, 60, 60])])  # a dog taken for a cat
    figures = detection.summarize(half, source)
    assert figures["per_class"] == {"cat": pytest.approx(0.5, abs=1e-12), "dog": 0}
    assert figures["ap"] == pytest.approx(0.25, abs=1e-12)
    assert figures["mean_iou_matched"] == pytest.approx(0.5, abs=1e-12)


def test_iou_between_the_thresholds() -> None:
    """An IoU of 0.6 is right at 3 thresholds of 10 (.5, .55, .6)."""
    source = make_truth([[[0, 0, 100, 50]]], [[1]])
    figures = detection.summarize(make_detections([(0, 1, 0.7, [0, 0, 60, 50])]), source)
    assert (figures["ap50"], figures["ap75"]) == (pytest.approx(1, abs=1e-12), 0)
    assert figures["ap"] == pytest.approx(0.3, abs=1e-12)
    assert figures["per_class"] == {"cat": None, "dog": pytest.approx(0.3, abs=1e-12)}
    assert figures["mean_iou_top1"] == pytest.approx(0.6, abs=1e-12)
    assert figures["mean_iou_matched"] == pytest.approx(0.6, abs=1e-12)


def test_mean_ious() -> None:
    """Top-1 has one box an image and no class; matched has classes, a score limit, and misses."""
    box, half = [0, 0, 10, 10], [0, 0, 5, 10]
    source = make_truth(
        [[box], [box], [box], [box, [50, 50, 60, 60]], [], [box, box]],
        [[0], [0], [0], [0, 0], [], [0, 0]],
        crowds=[[False], [False], [False], [False, False], [], [False, True]],
    )
    rows = [
        (0, 1, 0.9, half), (0, 0, 0.8, box),  # top-1: 0.5 of the wrong class; matched 1
        (1, 0, 0.29, box),  # top-1: 1; matched: too low a score
        # image 2: nothing, 0 in both
        (3, 0, 0.9, half), (3, 0, 0.4, box), (3, 0, 0.8, [50, 50, 60, 55]),  # matched: 1 and 0.5
        (4, 0, 0.9, box),
        (5, 0, 0.9, box),  # beside a crowd: no one-box image; matched 1
    ]  # fmt: skip
    figures = detection.summarize(make_detections(rows), source)
    assert figures["mean_iou_top1"] == pytest.approx((0.5 + 1 + 0) / 3, abs=1e-12)
    assert figures["mean_iou_matched"] == pytest.approx((1 + 0 + 0 + 1 + 0.5 + 1) / 6, abs=1e-12)


def test_no_truth_and_no_detections() -> None:
    empty = make_truth([[], []], [[], []])
    for detections in (NOTHING, make_detections([(1, 0, 0.5, [0, 0, 1, 1])])):
        figures = detection.summarize(detections, empty)
        assert figures["ap"] is figures["ar_100"] is figures["mean_iou_matched"] is None
        assert figures["per_class"] == {"cat": None, "dog": None}
    figures = detection.summarize(NOTHING, make_truth([[[0, 0, 9, 9]]], [[0]]))
    assert [figures[k] for k in ("ap", "ar_100", "mean_iou_top1", "mean_iou_matched")] == [0] * 4
    with pytest.raises(UserError, match="no images"):
        detection.summarize(NOTHING, make_truth([], []))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((2, 0, 0.5, [0, 0, 1, 1]), "image 2 is outside 0..1"),
        ((-1, 0, 0.5, [0, 0, 1, 1]), "image -1 is outside"),
        ((0, 2, 0.5, [0, 0, 1, 1]), "label 2 is outside 0..1"),
        ((0, 0, np.nan, [0, 0, 1, 1]), "1 of 2 predicted boxes or scores are not finite"),
        ((0, 0, 0.5, [0, 0, np.inf, 1]), "1 of 2 predicted boxes or scores are not finite"),
    ],
)
def test_bad_rows_are_refused(row: tuple, message: str, tmp_path: Path) -> None:
    source = make_truth([[[0, 0, 1, 1]], []], [[0], []])
    detections = make_detections([(0, 0, 0.5, [0, 0, 1, 1]), row])
    for call in (detection.summarize, detection.confusion_matrix, diagnose):
        with pytest.raises(UserError, match=message):
            call(detections, source)
    with pytest.raises(UserError, match=message):
        detection.write_results(tmp_path / "results.json", detections, source)


def test_confusion_counts_misses_false_alarms_and_crowds() -> None:
    crowd = [100, 0, 200, 100]
    source = make_truth(
        [[[0, 0, 10, 10], [20, 0, 30, 10], crowd], []], [[0, 1, 0], []],
        crowds=[[False, False, True], []],
    )  # fmt: skip
    rows = [
        (0, 0, 0.9, [0, 0, 10, 10]),  # cat as cat
        (0, 1, 0.8, [0, 0, 10, 9]),  # second box on it: false alarm
        (0, 0, 0.7, [120, 10, 130, 20]),  # in the crowd: doesn't count
        (0, 1, 0.2, [20, 0, 30, 10]),  # below the score, so the dog is missed
        (1, 1, 0.6, [0, 0, 10, 10]),  # false alarm
    ]
    matrix = detection.confusion_matrix(make_detections(rows), source)
    assert matrix.tolist() == [[1, 0, 0], [0, 0, 1], [0, 2, 0]]
    matrix = detection.confusion_matrix(make_detections(rows), source, score=0.1)
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 2, 0]]
    swapped = make_detections([(0, 1, 0.9, [0, 0, 10, 10]), (0, 0, 0.9, [20, 0, 30, 10])])
    assert detection.confusion_matrix(swapped, source).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_confusion_rows_add_up() -> None:
    for seed in range(20):
        detections, source = random_case(seed)
        matrix = detection.confusion_matrix(detections, source, score=0)
        labels = np.concatenate([k[~c] for k, c in zip(source.label, source.crowd, strict=True)])
        classes = len(source.class_names)
        assert matrix[:-1].sum(axis=1).tolist() == np.bincount(labels, minlength=classes).tolist()
        predicted = np.bincount(detections.label, minlength=classes)
        assert (matrix[:, :-1].sum(axis=0) <= predicted).all()
        if not any(crowd.any() for crowd in source.crowd):
            assert matrix[:, :-1].sum(axis=0).tolist() == predicted.tolist()


def test_files_have_the_annotation_files_ids(tmp_path: Path) -> None:
    source = make_truth([[], [[1.5, 2, 4, 8]]], [[], [1]], crowds=[[], [True]])
    source = replace(source, category_ids=(17, "dög"), image_ids=(np.int64(900), "b"))
    detections = make_detections([(1, 1, 0.1, [1.5, 2, 4, 8]), (0, 0, 0.5, [0, 0, 3, 3])])
    results = detection.write_results(tmp_path / "results.json", detections, source)
    score = float(np.float32(0.1))  # the float32 itself, not its shortest decimal
    assert json.loads(results.read_text(encoding="utf-8")) == [
        {"image_id": "b", "category_id": "dög", "bbox": [1.5, 2, 2.5, 6], "score": score},
        {"image_id": 900, "category_id": 17, "bbox": [0, 0, 3, 3], "score": 0.5},
    ]
    truth = json.loads(detection.write_coco(tmp_path / "t.json", source).read_text("utf-8"))
    assert truth["images"][0] == {"id": 900, "file_name": "0.jpg", "height": 100, "width": 200}
    assert truth["categories"] == [{"id": 17, "name": "cat"}, {"id": "dög", "name": "dog"}]
    assert truth["annotations"] == [
        {"id": 1, "image_id": "b", "category_id": "dög", "bbox": [1.5, 2, 2.5, 6], "area": 15,
         "iscrowd": 1}
    ]  # fmt: skip
    empty = detection.write_results(tmp_path / "none.json", NOTHING, source)
    assert json.loads(empty.read_text()) == []


def test_collected_rows_leave_out_padding() -> None:
    assert len(detection.collect_detections([])) == 0
    batch = {
        "index": np.array([4, 7, 0]),
        "mask": np.array([True, True, False]),
        "score": np.array([[0.5, 0.0], [0.25, np.nan], [1, 1]], np.float32),
        "label": np.array([[1, 2], [3, 4], [5, 6]]),
        "boxes_xyxy_px": np.arange(24, dtype=np.float32).reshape(3, 2, 4),
    }
    both = detection.collect_detections([batch, batch])
    assert both.index.tolist() == [4, 7, 7] * 2
    assert both.label.tolist() == [1, 3, 4] * 2
    assert both.boxes_xyxy_px[1].tolist() == [8, 9, 10, 11]
    assert np.isnan(both.score[2])  # kept, so that evaluation refuses it


# The guard


def _dataset(classes: int = 4, images: int = 12, seed: int = 0) -> DetectionSource:
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 60, (images, 2, 2))
    boxes = np.concatenate([corner, corner + random.uniform(10, 40, (images, 2, 2))], axis=2)
    labels = random.integers(0, classes, (images, 2))
    names = tuple(f"class {label}" for label in range(classes))
    return make_truth(boxes.tolist(), labels.tolist(), names)


def _predict(source: DetectionSource, *, noise: float = 2.0, shift: int = 0) -> Detections:
    """Twenty boxes an image as a detector gives them: near the truth, and low-scoring others."""
    random = np.random.default_rng(1)
    classes = len(source.class_names)
    rows = []
    for image, (boxes, labels) in enumerate(zip(source.boxes_xyxy_px, source.label, strict=True)):
        for box, label in zip(boxes, labels, strict=True):
            near = box + random.normal(0, noise, 4)
            rows.append((image, (int(label) + shift) % classes, random.uniform(0.3, 1), near))
        for _ in range(18):
            corner = random.uniform(0, 60, 2)
            other = [*corner, *(corner + random.uniform(5, 40, 2))]
            rows.append((image, int(random.integers(classes)), random.uniform(0, 0.2), other))
    return make_detections(rows)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_healthy_predictions_raise_no_alarm(classes: int, seed: int) -> None:
    source = _dataset(classes, seed=seed)
    assert diagnose(_predict(source), source, iou_history=(0.1, 0.5, 0.52)) == []
    assert diagnose(_predict(source, noise=8), source, iou_history=(0.72, 0.721, 0.722)) == []
    few = make_truth([source.boxes_xyxy_px[0]], [source.label[0]], source.class_names)
    assert diagnose(_predict(few), few) == []


def test_truth_that_never_moves_or_has_almost_one_class_is_no_alarm() -> None:
    fixed = make_truth([[[10, 10, 50, 50]]] * 12, [[0]] * 12)
    assert diagnose(_predict(fixed, noise=0.1), fixed) == []
    random = np.random.default_rng(0)
    centered = random.normal([30, 30, 70, 70], 5, (12, 1, 4))  # IoU 0.5 to 0.8 with each other
    centered = make_truth(centered.tolist(), [[0]] * 12)
    assert diagnose(_predict(centered), centered) == []
    lone = make_truth([[[i, i, i + 30, i + 40]] for i in range(30)], [[0]] * 28 + [[1]] * 2)
    predicted = _predict(lone)
    assert diagnose(replace(predicted, label=np.zeros_like(predicted.label)), lone) == []


def _only(messages: list[str], start: str) -> str:
    assert len(messages) == 1, messages
    assert messages[0].startswith(start)
    assert "\n" not in messages[0]
    return messages[0]


def test_empty_predictions() -> None:
    source = _dataset()
    low = _predict(source)
    for detections in (NOTHING, replace(low, score=low.score * 0.04)):
        text = _only(diagnose(detections, source), "no predictions")
        assert "too few steps" in text
        assert "no boxes in the training data" in text


def test_no_true_boxes() -> None:
    source = make_truth([[], [[0, 0, 9, 9]]], [[], [0]], crowds=[[], [True]])
    assert "training data" in _only(diagnose(NOTHING, source), "no true boxes in 2 images")


def test_constant_predictions() -> None:
    """The same queries win in every image and give the same relative boxes, up to a little."""
    source = _dataset()
    random = np.random.default_rng(2)
    queries, scores = random.uniform(0, 50, (20, 2)), random.uniform(0.1, 0.9, 20)
    rows = [
        (i, int(q % 4), scores[q], np.r_[corner, corner + 40] + random.normal(0, 0.2, 4))
        for i in range(len(source))
        for q, corner in enumerate(queries)
    ]
    text = _only(diagnose(make_detections(rows), source), "constant predictions")
    assert "learning rate" in text
    assert "frozen backbone" in text


def test_constant_predictions_in_images_of_different_sizes() -> None:
    """A box at 10-50 % of every image is constant though its pixels differ."""
    source = _dataset()
    sizes = np.random.default_rng(0).integers(100, 1000, (len(source), 2)).astype(np.int32)
    scale = sizes[:, [1, 0, 1, 0]] / [200, 100, 200, 100]
    boxes = Ragged(
        source.boxes_xyxy_px.values * scale.repeat(2, axis=0), source.boxes_xyxy_px.offsets
    )
    source = replace(source, sizes=sizes, boxes_xyxy_px=boxes)
    rows = [
        (i, label, 0.9, np.array([0.1, 0.1, 0.5, 0.5]) * sizes[i][[1, 0, 1, 0]])
        for i in range(len(source))
        for label in range(2)
    ]
    _only(diagnose(make_detections(rows), source), "constant predictions")


def test_a_single_class() -> None:
    source = _dataset()
    right = _predict(source)
    one = replace(right, label=np.where(right.score > 0.25, 2, right.label))  # others score less
    text = _only(diagnose(one, source), "one class only")
    assert "`class 2`" in text
    assert "re-initialized" in text
    assert "off by one" in text


def test_labels_off_by_one() -> None:
    source = _dataset(classes=20, images=20)
    for shift in (1, -1):
        text = _only(diagnose(_predict(source, shift=shift), source), "right boxes, wrong classes")
        assert f"labels off by one: the predicted is the true one {shift:+d}" in text
    random = np.random.default_rng(0)
    shuffled = _predict(source, shift=7)
    text = _only(diagnose(shuffled, source), "right boxes, wrong classes")
    assert "off by one" not in text
    assert diagnose(replace(shuffled, boxes_xyxy_px=random.permutation(shuffled.boxes_xyxy_px)),
                    source) == []  # fmt: skip


def test_iou_that_does_not_move() -> None:
    source = _dataset()
    detections = _predict(source)
    text = _only(diagnose(detections, source, iou_history=(0.1, None, 0.102, 0.1)), "matched IoU")
    assert "0.100 to 0.100 in 3 evaluations" in text
    for history in ((0.1, 0.1), (0.1, 0.12, 0.14), (None, None, None)):
        assert diagnose(detections, source, iou_history=history) == []
