"""COCO numbers of a detector over a dataset, its results file, and why its AP may be 0.

Everything here is numpy on the host, and decodes no image. AP and AR are hotcoco's, which are
bit-identical to pycocotools' (tests/parity/test_detection_evaluation.py); IoU alone is what
the simplest tutorials report.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np

from vision_jax.data.detection import DetectionSource, Ragged, StatedBoxes, as_stated
from vision_jax.errors import DivergedError, UserError, utf8
from vision_jax.tasks import coco

CONFIDENT = 0.3  # score from which a prediction counts as made, outside AP and AR


@dataclass(frozen=True)
class Detections:
    """What a detector found in a dataset: one row a box, in pixels of the original image.

    Among equal scores in one image the earlier row ranks first.
    """

    index: np.ndarray  # i32[D], row of the image in its source
    label: np.ndarray  # i32[D], contiguous class
    score: np.ndarray  # f32[D]
    boxes_xyxy_px: np.ndarray  # f32[D, 4]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: np.ndarray) -> "Detections":
        """The rows of a mask or an index array."""
        return Detections(
            self.index[rows], self.label[rows], self.score[rows], self.boxes_xyxy_px[rows]
        )


def collect_detections(batches: Iterable[Mapping[str, Any]]) -> Detections:
    """The rows of fixed-shape batches, without padding images and without boxes of no score.

    Args:
      batches: each with index i32[B], mask bool[B], and as ops/detection_outputs.py gives them
        score f32[B, N], label i32[B, N], boxes_xyxy_px f32[B, N, 4].
    """
    parts = []
    for batch in batches:
        keep = np.asarray(batch["mask"])[:, None] & ~(np.asarray(batch["score"]) <= 0)  # [B, N]
        index = np.broadcast_to(np.asarray(batch["index"])[:, None], keep.shape)
        columns = index, *(np.asarray(batch[k]) for k in ("label", "score", "boxes_xyxy_px"))
        parts.append([column[keep] for column in columns])
    if not parts:
        return Detections(
            np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32),
            np.zeros((0, 4), np.float32),
        )  # fmt: skip
    return Detections(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def describe_boxes(found: Detections, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """What is said of one image: its boxes by falling score, for JSON.

    Args:
      found: rows of the image.
      class_names: by label.
    """
    best = found[np.argsort(-found.score, kind="stable")]
    columns = best.label.tolist(), best.score.tolist(), best.boxes_xyxy_px.tolist()
    return [
        {"name": utf8(class_names[label]), "label": label, "score": score, "box_xyxy_px": box}
        for label, score, box in zip(*columns, strict=True)
    ]


def coco_curves(
    detections: Detections, source: DetectionSource
) -> tuple[np.ndarray, np.ndarray]:  # f64[10, 101, K, 4, 3], f64[10, K, 4, 3]
    """Precision at each recall in 0, 0.01 ... 1, and the highest recall, of every class.

    The axes are those of `coco.figures`, as in pycocotools 2.0.11's `COCOeval.eval`; -1 where a
    class has no true box in the range of areas. Images rank by their file's id, as there, so that
    ties in scores across images give the same AP. True boxes are as the file states them, past an
    image's edge or beside it too.

    Raises:
      UserError: a row that points outside the source, or a score or box that is not finite.
    """
    _check(detections, source)
    ids = np.asarray(source.image_ids)
    rank = np.empty(len(ids), np.int64)
    rank[np.argsort(ids, kind="stable")] = np.arange(len(ids))
    truth = _truth(source)
    reference = hotcoco.COCO.from_arrays(
        [{"id": row} for row in range(len(ids))],
        [{"id": row, "name": name} for row, name in enumerate(source.class_names)],
        rank[_image_of_box(truth)], truth.label.values, truth.boxes_xywh_px.values,
        area=truth.area.values, iscrowd=truth.crowd.values,
    )  # fmt: skip
    rows = np.concatenate(
        [
            rank[detections.index][:, None],
            _xywh(detections.boxes_xyxy_px),
            np.asarray(detections.score, np.float64)[:, None],
            detections.label[:, None],
        ],
        axis=1,
    )  # [D, 7]
    evaluator = hotcoco.COCOeval(reference, reference.load_res(rows), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    curves = evaluator.eval
    assert curves is not None
    return curves["precision"], curves["recall"]


def summarize(detections: Detections, source: DetectionSource) -> dict[str, Any]:
    """The figures that are reported for a dataset, as plain numbers that JSON can hold.

    A figure that has nothing to be measured on (COCO's -1) is None.

    Returns:
      ap: mean over classes and the IoU thresholds .5, .55 ... .95 of the average precision with 101
        recalls and up to 100 detections a class and image; ap50, ap75 at one threshold; ap_small,
        ap_medium, ap_large by the truth's `area` (bounds 32² and 96² pixels).
      ar_1, ar_10, ar_100: mean highest recall with so many detections; ar_small, ar_medium,
        ar_large with 100.
      per_class: ap by class name; a name that occurs twice gets its index.
      mean_iou_top1: over images with exactly one true box, the IoU of the best-scoring box with it,
        whatever its class; 0 where there is none.
      mean_iou_matched: over all true boxes, the IoU of the box of the same class that is matched
        to it, 0 where there is none. Boxes that score less than 0.3 take no part; pairs are made by
        falling IoU, each box once.
      count: images; true_boxes and crowds (regions that only excuse false positives); detections.

    Raises:
      UserError: no images, a row that points outside the source, or values that are not finite.
    """
    if not len(source):
        raise UserError("evaluation: the dataset has no images; check its split and paths")
    figures = coco.figures(*coco_curves(detections, source), source.class_names)
    source = as_stated(source)
    top1, matched = _mean_ious(detections, source)
    crowds = int(source.crowd.values.sum())
    return {
        **figures,
        "mean_iou_top1": top1,
        "mean_iou_matched": matched,
        "count": len(source),
        "true_boxes": len(source.label.values) - crowds,
        "crowds": crowds,
        "detections": len(detections),
    }


def confusion_matrix(
    detections: Detections, source: DetectionSource, *, score: float = CONFIDENT, iou: float = 0.5
) -> np.ndarray:  # i64[K + 1, K + 1]
    """How often each class was found, missed, and taken for each other or for background.

    Row = true class, column = predicted class, the last of each = background: misses stand in the
    last column, false alarms in the last row. Pairs are made by falling IoU whatever the class,
    each box once; an unpaired prediction of which the share `iou` lies in a crowd doesn't count.

    Args:
      score: predictions below it are left out.
      iou: least overlap of a pair.
    """
    _check(detections, source)
    source = as_stated(source)
    background = len(source.class_names)
    matrix = np.zeros((background + 1, background + 1), np.int64)
    confident = detections[detections.score >= score]
    for row, found in enumerate(_rows_by_image(confident, len(source))):
        overlap, excused = _overlaps(confident.boxes_xyxy_px[found], source, row)
        predicted, true = confident.label[found], source.label[row][~source.crowd[row]]
        d, t = _match(np.where(overlap >= iou, overlap, 0))
        np.add.at(matrix, (true[t], predicted[d]), 1)
        matrix[:, background] += np.bincount(np.delete(true, t), minlength=background + 1)
        false = excused < iou
        false[d] = False
        matrix[background] += np.bincount(predicted[false], minlength=background + 1)
    return matrix


def write_results(path: str | Path, detections: Detections, source: DetectionSource) -> Path:
    """A COCO results file: a JSON list of image_id, category_id, bbox (x, y, w, h) and score.

    Ids are those of the annotation file. Numbers are exact: evaluating the file anywhere gives what
    `summarize` gives.
    """
    _check(detections, source)
    columns = (
        detections.index.tolist(),
        detections.label.tolist(),
        _xywh(detections.boxes_xyxy_px).tolist(),
        np.asarray(detections.score, np.float64).tolist(),
    )
    rows = (
        {
            "image_id": _plain(source.image_ids[index]),
            "category_id": _plain(source.category_ids[label]),
            "bbox": box,
            "score": score,
        }
        for index, label, box, score in zip(*columns, strict=True)
    )
    return _write_list(Path(path), "[\n", rows, "\n]\n")


def write_coco(path: str | Path, source: DetectionSource) -> Path:
    """The truth of any source as a COCO annotation file; annotations are numbered from 1."""
    truth = _truth(source)
    head = {
        "images": [
            {"id": _plain(key), "file_name": str(name), "height": int(h), "width": int(w)}
            for key, name, (h, w) in zip(source.image_ids, source.paths, source.sizes, strict=True)
        ],
        "categories": [
            {"id": _plain(key), "name": name}
            for key, name in zip(source.category_ids, source.class_names, strict=True)
        ],
    }
    columns = (
        _image_of_box(truth).tolist(),
        truth.label.values.tolist(),
        truth.boxes_xywh_px.values.tolist(),
        truth.area.values.tolist(),
        truth.crowd.values.tolist(),
    )
    rows = (
        {
            "id": number,
            "image_id": _plain(source.image_ids[i]),
            "category_id": _plain(source.category_ids[k]),
            "bbox": box,
            "area": size,
            "iscrowd": int(is_crowd),
        }
        for number, (i, k, box, size, is_crowd) in enumerate(zip(*columns, strict=True), start=1)
    )
    start = json.dumps(head, ensure_ascii=False)[:-1] + ', "annotations": [\n'
    return _write_list(Path(path), start, rows, "\n]}\n")


def diagnose(
    detections: Detections, source: DetectionSource, *, iou_history: Sequence[float | None] = ()
) -> list[str]:
    """What is wrong with predictions whose AP stays near 0: one line each, causes named.

    Of each image the best-scoring boxes are looked at, as many as it has true boxes (1 to 5).
    Nothing is said of what the truth itself is like: always the same box, or always one class.

    Args:
      iou_history: `mean_iou_matched` of the evaluations so far, this one last.
    """
    _check(detections, source)
    labels = source.label.values[~source.crowd.values]
    if not len(labels):
        return [
            f"no true boxes in {len(source):,} images: check the annotation file, the split and "
            "the category map; is the training data empty too?"
        ]
    best = _best(detections, source)
    if not (best.score >= 0.05).any():
        return [
            f"no predictions: no box scores 0.05 or more in any of {len(source):,} images; likely "
            "too few steps, a learning rate that is too low, wrong normalization, or no boxes in "
            "the training data"
        ]
    messages = []
    sizes = np.asarray(source.sizes, np.float64)[:, [1, 0, 1, 0]]  # [N, 4], w h w h
    predicted = [best.boxes_xyxy_px[rows] for rows in _rows_by_image(best, len(source))]
    same = _sameness(predicted, sizes)
    if same >= 0.9 and _sameness(source.boxes_xyxy_px, sizes) < 0.8:
        messages.append(
            f"constant predictions: the same boxes in every image (IoU {same:.2f} from one to the "
            "next); likely a learning rate that is too high, too few steps, a frozen backbone with "
            "random weights, or wrong normalization"
        )
    only = int(best.label[0])
    others = int(np.sum(labels != only))
    if (best.label == only).all() and others >= max(5, 0.1 * len(labels)):
        messages.append(
            f"one class only: every image's best boxes are `{source.class_names[only]}`, and "
            f"{others:,} of {len(labels):,} true boxes are not; likely a head that was not "
            "re-initialized for these classes, labels off by one, too few steps, or a learning "
            "rate that is too high"
        )
    messages += _wrong_classes(best, source)
    values = [value for value in iou_history if value is not None]
    if len(values) >= 3 and max(values) - min(values) < 0.01 and max(values) < 0.3:
        messages.append(
            f"matched IoU does not move: {values[0]:.3f} to {values[-1]:.3f} in {len(values)} "
            "evaluations; likely a learning rate that is far too low or too high, a frozen "
            "backbone with random weights, wrong normalization, or no boxes in the training data"
        )
    return messages


def _wrong_classes(best: Detections, source: DetectionSource) -> list[str]:
    """Boxes that are right while their classes are wrong: a broken map, not a broken model."""
    pairs = []
    for row, found in enumerate(_rows_by_image(best, len(source))):
        overlap, _ = _overlaps(best.boxes_xyxy_px[found], source, row)
        d, t = _match(np.where(overlap >= 0.5, overlap, 0))
        true = source.label[row][~source.crowd[row]]
        pairs.append(np.stack([best.label[found][d], true[t]], axis=1))
    predicted, true = np.concatenate(pairs).T
    if len(true) < max(10, 0.3 * len(source.label.values)) or np.mean(predicted == true) > 0.1:
        return []
    shifts, counts = np.unique(predicted.astype(int) - true, return_counts=True)
    text = f"right boxes, wrong classes: {np.mean(predicted == true):.0%} of {len(true):,} agree"
    if counts.max() >= 0.8 * len(true) and abs(shifts[np.argmax(counts)]) == 1:
        text += f"; labels off by one: the predicted is the true one {shifts[counts.argmax()]:+d}"
    return [text + "; check the map of category ids, and that the head was made for these classes"]


def _sameness(boxes: Sequence[np.ndarray], sizes: np.ndarray) -> float:
    """Mean IoU, in relative units, of each box with the nearest of the next image that has any."""
    known = np.all(sizes > 0, axis=1)  # an image that can't be read may have no size
    rows = [row for row, some in enumerate(boxes) if len(some) and known[row]][:100]
    nearest = [
        _iou(boxes[a] / sizes[a], boxes[b] / sizes[b]).max(axis=1) for a, b in pairwise(rows)
    ]
    return float(np.mean(np.concatenate(nearest))) if nearest else 0.0


def _best(detections: Detections, source: DetectionSource) -> Detections:
    """Of each image as many of the best-scoring rows as it has true boxes, 1 to 5."""
    keep = [
        rows[np.argsort(-detections.score[rows], kind="stable")][: np.clip(len(label), 1, 5)]
        for rows, label in zip(
            _rows_by_image(detections, len(source)), source.label, strict=True
        )
    ]  # fmt: skip
    return detections[np.concatenate(keep)]


def _mean_ious(
    detections: Detections, source: DetectionSource
) -> tuple[float | None, float | None]:
    """mean_iou_top1 and mean_iou_matched of `summarize`."""
    top1: list[float] = []
    matched, total = 0.0, 0
    for row, found in enumerate(_rows_by_image(detections, len(source))):
        true = source.label[row][~source.crowd[row]]
        total += len(true)
        if not len(true):
            continue
        if len(true) == 1 == len(source.label[row]):
            best = found[np.argmax(detections.score[found])][None] if len(found) else found
            overlap, _ = _overlaps(detections.boxes_xyxy_px[best], source, row)
            top1.append(float(overlap.sum()))
        found = found[detections.score[found] >= CONFIDENT]
        overlap, _ = _overlaps(detections.boxes_xyxy_px[found], source, row)
        overlap = np.where(detections.label[found][:, None] == true, overlap, 0)
        matched += float(overlap[_match(overlap)].sum())
    return float(np.mean(top1)) if top1 else None, matched / total if total else None


def _match(overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # i64[P], i64[P]
    """Pairs (row, column) by falling overlap, each row and column at most once, overlaps > 0."""
    rows, columns = np.nonzero(overlap > 0)
    pairs: dict[int, int] = {}  # column of each row
    taken: set[int] = set()
    for position in np.argsort(-overlap[rows, columns], kind="stable"):
        row, column = int(rows[position]), int(columns[position])
        if row not in pairs and column not in taken:
            pairs[row] = column
            taken.add(column)
    return np.array(list(pairs), np.int64), np.array(list(pairs.values()), np.int64)


def _overlaps(
    boxes_xyxy_px: np.ndarray, source: DetectionSource, row: int
) -> tuple[np.ndarray, np.ndarray]:  # f64[D, T], f64[D]
    """IoU with the true boxes of an image, and the largest share that lies in one of its crowds."""
    crowd = source.crowd[row]
    true = source.boxes_xyxy_px[row]
    excused = _iou(boxes_xyxy_px, true[crowd], crowd=True).max(axis=1, initial=0)
    return _iou(boxes_xyxy_px, true[~crowd]), excused


def _iou(a_xyxy: np.ndarray, b_xyxy: np.ndarray, *, crowd: bool = False) -> np.ndarray:  # f64[A, B]
    """Pairwise IoU; of crowds the share of `a` that lies in `b`; 0 for boxes without area."""
    return hotcoco.primitives.bbox_iou(_xywh(a_xyxy), _xywh(b_xyxy), np.full(len(b_xyxy), crowd))


def _xywh(boxes_xyxy: np.ndarray) -> np.ndarray:  # f64[N, 4]
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _truth(source: DetectionSource) -> StatedBoxes:
    """What COCO's numbers are measured against."""
    if source.stated is not None:
        return source.stated
    boxes = source.boxes_xyxy_px
    xywh = Ragged(_xywh(boxes.values), boxes.offsets)
    return StatedBoxes(xywh, source.label, source.crowd, source.area)


def _image_of_box(truth: StatedBoxes) -> np.ndarray:  # i64[M]
    return np.repeat(np.arange(len(truth.label)), np.diff(truth.label.offsets))


def _rows_by_image(detections: Detections, images: int) -> Iterator[np.ndarray]:
    """The rows of each image, in their order."""
    order = np.argsort(detections.index, kind="stable")
    edges = np.searchsorted(detections.index[order], np.arange(images + 1))
    return (order[start:end] for start, end in pairwise(edges))


def _check(detections: Detections, source: DetectionSource) -> None:
    shapes = [np.shape(column) for column in (detections.index, detections.label, detections.score)]
    if set(shapes) != {(len(detections),)} or (
        np.shape(detections.boxes_xyxy_px) != (len(detections), 4)
    ):
        raise ValueError(f"columns {shapes}, {np.shape(detections.boxes_xyxy_px)} differ")
    for what, values, count in (
        ("image", detections.index, len(source)),
        ("label", detections.label, len(source.class_names)),
    ):
        outside = values[(values < 0) | (values >= count)]
        if outside.size:
            raise UserError(
                f"evaluation: {what} {outside[0]} is outside 0..{count - 1}; the predictions and "
                "the dataset must have the same images and classes"
            )
    finite = np.isfinite(detections.boxes_xyxy_px).all(axis=1) & np.isfinite(detections.score)
    if not finite.all():
        raise DivergedError(
            f"evaluation: {int(np.sum(~finite)):,} of {len(finite):,} predicted boxes or scores "
            "are not finite; the model's weights are damaged or its training diverged"
        )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _write_list(path: Path, start: str, rows: Iterable[dict[str, Any]], end: str) -> Path:
    """JSON with a row a line: half a million of them as one string would be 100 MB twice."""
    with path.open("w", encoding="utf-8") as file:
        file.write(start)
        for number, row in enumerate(rows):
            file.write((",\n" if number else "") + json.dumps(row, ensure_ascii=False))
        file.write(end)
    return path
