"""Truth and detections made from a seed, with all that COCO evaluation can stumble over."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.detection import DetectionSource, Ragged
from vision_jax.tasks.detection.metrics import Detections


class GreyReader:
    """Images of one grey, all of one size; those of `damaged` can't be read."""

    def __init__(self, size: tuple[int, int], damaged: tuple[int, ...] = ()) -> None:
        self.size, self.damaged = size, damaged

    def read(self, row: int) -> np.ndarray:
        if row in self.damaged:
            raise DamagedImageError(f"{self.example_name(row)} is damaged")
        return np.full((*self.size, 3), 128, np.uint8)

    def example_name(self, row: int) -> str:
        return f"{row}.jpg"


def make_truth(
    boxes: Sequence[Any],
    labels: Sequence[Any],
    class_names: tuple[str, ...] = ("cat", "dog"),
    *,
    crowds: Sequence[Any] | None = None,
    size: tuple[int, int] = (100, 200),
    damaged: tuple[int, ...] = (),
    **changes: Any,
) -> DetectionSource:
    """A source from nested lists: of each image its boxes (x0, y0, x1, y1) and labels."""
    offsets = np.concatenate([[0], np.cumsum([len(some) for some in labels], dtype=np.int64)])

    def ragged(rows: Sequence[Any], like: np.ndarray) -> Ragged:
        arrays = [np.asarray(some, like.dtype).reshape(-1, *like.shape[1:]) for some in rows]
        return Ragged(np.concatenate([like, *arrays]), offsets)

    corners = ragged(boxes, np.zeros((0, 4)))
    area = np.prod(corners.values[:, 2:] - corners.values[:, :2], axis=1)
    crowd = [[False] * len(some) for some in labels] if crowds is None else crowds
    source = DetectionSource(
        name="made",
        class_names=class_names,
        category_ids=tuple(range(1, len(class_names) + 1)),
        image_ids=tuple(range(len(labels))),
        paths=tuple(f"{row}.jpg" for row in range(len(labels))),
        sizes=np.tile(np.array(size, np.int32), (len(labels), 1)),
        boxes_xyxy_px=corners,
        label=ragged(labels, np.zeros(0, np.int32)),
        crowd=ragged(crowd, np.zeros(0, bool)),
        area=Ragged(area, offsets),
        rows=np.arange(len(labels)),
        reader=GreyReader(size, damaged),
    )
    return replace(source, **changes)


def make_detections(rows: list[tuple[int, int, float, list[float]]]) -> Detections:
    """Detections from (image, label, score, box)."""
    return Detections(
        np.array([row[0] for row in rows], np.int32),
        np.array([row[1] for row in rows], np.int32),
        np.array([row[2] for row in rows], np.float32),
        np.array([row[3] for row in rows], np.float32).reshape(-1, 4),
    )


def random_case(seed: int) -> tuple[Detections, DetectionSource]:
    """Crowds, tied scores, empty images, areas on COCO's bounds, up to 300 detections an image,
    classes without truth, huge boxes and boxes without area, ids with gaps and out of order."""
    random = np.random.default_rng(seed)
    images, classes = int(random.integers(1, 10)), int(random.integers(1, 5))
    seen = max(1, classes - int(random.integers(0, 2)))  # further classes have no truth
    scale = float(random.choice([50, 200, 640, 5000, 1e6]))
    coarse = bool(random.random() < 0.5)  # corners on a grid: many equal IoUs
    most_true, most_found = int(random.choice([0, 2, 10])), int(random.choice([0, 5, 30, 300]))

    def boxes(count: int) -> np.ndarray:
        corner = random.random((count, 2)) * scale
        side = random.random((count, 2)) * scale * random.choice([0.05, 0.2, 0.6, 2], (count, 1))
        side[random.random((count, 2)) < 0.03] = 0
        both = np.concatenate([corner, corner + side], axis=1)
        return np.round(both / 8) * 8 if coarse else both

    truth: dict[str, list[np.ndarray]] = {"boxes": [], "label": [], "crowd": [], "area": []}
    rows: list[tuple[int, int, float, list[float]]] = []
    for image in range(images):
        count = int(random.integers(0, most_true + 1)) if random.random() < 0.8 else 0
        true = boxes(count).astype(np.float32).astype(np.float64)
        label = random.integers(0, seen, count)
        area = (true[:, 2] - true[:, 0]) * (true[:, 3] - true[:, 1])
        if random.random() < 0.3:
            limits = [0, 1023.9999999, 1024, 1024.0000001, 9216, 9216.0000001, 1e10, 1e11]
            area = random.choice(limits, count)
        for name, column in zip(
            truth, (true, label, random.random(count) < 0.2, area), strict=True
        ):
            truth[name].append(column)
        found = int(random.integers(0, most_found + 1))
        guess, guessed = boxes(found), random.integers(0, classes, found)
        if count:  # most detections lie near a true box, some exactly on it
            near = random.integers(0, count, found)
            side = np.tile(true[near, 2:] - true[near, :2], 2)
            shift = random.choice([0, 0.02, 0.1, 0.3], (found, 1)) * random.normal(size=(found, 4))
            on = random.random(found) < 0.7
            guess[on] = (true[near] + shift * side)[on]
            guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2])
            guessed = np.where(on & (random.random(found) < 0.9), label[near], guessed)
        score = random.random(found)
        if seed % 2:
            score = np.round(score, 1)  # ties, within an image and across
        rows += [(image, int(guessed[d]), float(score[d]), guess[d].tolist()) for d in range(found)]
    ids = [int(key) for key in random.permutation(10 * images)[:images]]
    detections = make_detections(rows)
    source = make_truth(
        truth["boxes"],
        truth["label"],
        tuple(f"class {label}" for label in range(classes)),
        crowds=truth["crowd"],
        category_ids=tuple(int(key) for key in random.permutation(90)[:classes]),
        image_ids=tuple(str(key) for key in ids) if seed % 5 == 4 else tuple(ids),
    )
    area = replace(source.area, values=np.concatenate([np.zeros(0), *truth["area"]]))
    return detections[random.permutation(len(detections))], replace(source, area=area)
