"""Truth and detections made from a seed, with all that COCO evaluation can stumble over."""

from dataclasses import dataclass

import numpy as np

from vision_jax.evaluate.detection import Detections


@dataclass(frozen=True)
class TruthArrays:
    """The truth of a detection source, without its images."""

    boxes_xyxy_px: list[np.ndarray]
    label: list[np.ndarray]
    crowd: list[np.ndarray]
    area: list[np.ndarray]
    sizes: np.ndarray
    class_names: tuple[str, ...]
    category_ids: tuple[int | str, ...]
    image_ids: tuple[int | str, ...]
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image_ids)


def make_truth(
    boxes: list[list[list[float]]],
    labels: list[list[int]],
    class_names: tuple[str, ...] = ("cat", "dog"),
    crowds: list[list[bool]] | None = None,
    size: tuple[int, int] = (100, 200),
) -> TruthArrays:
    """A source from nested lists: of each image its boxes (x0, y0, x1, y1) and labels."""
    arrays = [np.array(some, np.float32).reshape(-1, 4) for some in boxes]
    return TruthArrays(
        boxes_xyxy_px=arrays,
        label=[np.array(some, np.int32) for some in labels],
        crowd=[np.array(some, bool) for some in crowds or [[False] * len(k) for k in labels]],
        area=[(some[:, 2] - some[:, 0]) * (some[:, 3] - some[:, 1]) for some in arrays],
        sizes=np.tile(np.array(size, np.int32), (len(boxes), 1)),
        class_names=class_names,
        category_ids=tuple(range(1, len(class_names) + 1)),
        image_ids=tuple(range(len(boxes))),
        paths=tuple(f"{row}.jpg" for row in range(len(boxes))),
    )


def make_detections(rows: list[tuple[int, int, float, list[float]]]) -> Detections:
    """Detections from (image, label, score, box)."""
    return Detections(
        np.array([row[0] for row in rows], np.int32),
        np.array([row[1] for row in rows], np.int32),
        np.array([row[2] for row in rows], np.float32),
        np.array([row[3] for row in rows], np.float32).reshape(-1, 4),
    )


def random_case(seed: int) -> tuple[Detections, TruthArrays]:
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
    return detections[random.permutation(len(detections))], TruthArrays(
        truth["boxes"], truth["label"], truth["crowd"], truth["area"],
        sizes=np.full((images, 2), round(scale)),
        class_names=tuple(f"class {label}" for label in range(classes)),
        category_ids=tuple(int(key) for key in random.permutation(90)[:classes]),
        image_ids=tuple(str(key) for key in ids) if seed % 5 == 4 else tuple(ids),
        paths=tuple(f"{row}.jpg" for row in range(images)),
    )  # fmt: skip
