"""How long COCO evaluation takes, beside pycocotools on the same truth and detections.

    python -m benchmarks.coco_evaluation                       # 5,000 images, 500,000 detections
    python -m benchmarks.coco_evaluation --images=500

Needs pycocotools (the `parity` extra). The data is generated: 80 classes, 7 true boxes an image on
average and 1 % crowds; a fifth of the detections lie near a true box. Both sides start from arrays
in memory and end with precision and recall; pycocotools gets its lists of dicts ready-made. Prints
CPU- and wall-clock seconds, their ratio, and the largest difference in the precision and recall.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vision_jax.data.detection import DetectionSource, Ragged
from vision_jax.data.sources import ArrayReader
from vision_jax.tasks.detection.metrics import Detections, coco_curves, summarize

CLASSES = 80


def generate(images: int, found: int, seed: int) -> tuple[Detections, DetectionSource]:
    """Detections, `found` an image, and a source without images."""
    random = np.random.default_rng(seed)
    counts = random.poisson(7, images)
    corner = random.uniform(0, 500, (counts.sum(), 2))
    side = np.exp(random.uniform(2, 5.5, (counts.sum(), 2)))
    boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32).astype(np.float64)
    label = random.integers(0, CLASSES, len(boxes)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    source = DetectionSource(
        name="generated",
        class_names=tuple(f"class {k}" for k in range(CLASSES)),
        category_ids=tuple(range(CLASSES)),
        image_ids=tuple(range(images)),
        paths=tuple(f"{row}.jpg" for row in range(images)),
        sizes=np.tile(np.array([[480, 640]], np.int32), (images, 1)),
        boxes_xyxy_px=Ragged(boxes, offsets),
        label=Ragged(label, offsets),
        crowd=Ragged(random.random(len(boxes)) < 0.01, offsets),
        area=Ragged(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), offsets),
        rows=np.arange(images),
        reader=ArrayReader("generated", np.zeros((0, 1, 1), np.uint8)),  # nothing is decoded
    )

    index = np.repeat(np.arange(images, dtype=np.int32), found)
    corner = random.uniform(0, 500, (len(index), 2))
    guess = np.concatenate([corner, corner + np.exp(random.uniform(2, 5.5, corner.shape))], axis=1)
    guessed = random.integers(0, CLASSES, len(index)).astype(np.int32)
    near = (random.random(len(index)) < 0.2) & (counts[index] > 0)
    true = (offsets[index] + random.integers(0, np.maximum(counts[index], 1)))[near]
    scale = np.tile(boxes[true, 2:] - boxes[true, :2], 2)
    guess[near] = boxes[true] + 0.1 * scale * random.normal(size=(len(true), 4))
    guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2])
    guessed[near] = label[true]
    score = random.random(len(index)).astype(np.float32)
    return Detections(index, guessed, score, guess.astype(np.float32)), source


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU-seconds, seconds, and what the function returned."""
    cpu, wall = time.process_time(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = function()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def dicts(
    detections: Detections, source: DetectionSource
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same as pycocotools takes it; category ids are labels, and so rank alike."""

    def xywh(box: np.ndarray) -> list[float]:
        x, y, right, bottom = (float(value) for value in box)
        return [x, y, right - x, bottom - y]

    annotations = [
        {"image_id": i, "category_id": int(k), "bbox": xywh(b), "area": float(a), "iscrowd": int(c)}
        for i in range(len(source))
        for k, b, a, c in zip(
            source.label[i], source.boxes_xyxy_px[i], source.area[i], source.crowd[i], strict=True
        )
    ]
    truth = {
        "images": [{"id": i} for i in range(len(source))],
        "categories": [{"id": k, "name": name} for k, name in enumerate(source.class_names)],
        "annotations": [{"id": n, **a} for n, a in enumerate(annotations, start=1)],
    }
    columns = detections.index, detections.label, detections.boxes_xyxy_px, detections.score
    return truth, [
        {"image_id": int(i), "category_id": int(k), "bbox": xywh(b), "score": float(s)}
        for i, k, b, s in zip(*columns, strict=True)
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="an image")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    detections, source = generate(flags.images, flags.detections, flags.seed)
    truth, results = dicts(detections, source)

    def pycocotools() -> tuple[np.ndarray, np.ndarray]:
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        return evaluator.eval["precision"], evaluator.eval["recall"]

    cpu, wall, (precision, recall) = timed(lambda: coco_curves(detections, source))
    all_cpu, all_wall, figures = timed(lambda: summarize(detections, source))
    their_cpu, their_wall, theirs = timed(pycocotools)
    apart = max(np.abs(precision - theirs[0]).max(), np.abs(recall - theirs[1]).max())
    true_boxes = figures["true_boxes"]
    print(
        f"{flags.images:,} images, {true_boxes:,} true boxes, {len(detections):,} detections, "
        f"AP {figures['ap']:.4f}"
    )
    print(f"{'':32}{'CPU-s':>8}{'s':>8}")
    print(f"{'pycocotools':32}{their_cpu:8.2f}{their_wall:8.2f}")
    print(f"{'vision_jax, curves':32}{cpu:8.2f}{wall:8.2f}")
    print(f"{'vision_jax, all of summarize':32}{all_cpu:8.2f}{all_wall:8.2f}")
    print(
        f"curves: {their_cpu / cpu:.0f} times less CPU, {their_wall / wall:.0f} times faster; "
        f"largest difference {apart:.1e}"
    )


if __name__ == "__main__":
    main()
