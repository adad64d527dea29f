"""AP and AR against pycocotools, by way of the files that are written for it."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from detection_cases import make_detections, make_truth, random_case
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vision_jax.data.detection import DetectionSource, read_detection_source
from vision_jax.tasks.detection import metrics as detection
from vision_jax.tasks.detection.metrics import Detections

NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip


def _pycocotools(truth: Path, results: Path) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        if json.loads(results.read_text()):
            found = coco.loadRes(str(results))
        else:  # loadRes fails on an empty list
            found = COCO()
            found.dataset = {**coco.dataset, "annotations": []}
            found.createIndex()
        evaluator = COCOeval(coco, found, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def _assert_equal(detections: Detections, source: DetectionSource, folder: Path) -> None:
    theirs = _pycocotools(
        detection.write_coco(folder / "truth.json", source),
        detection.write_results(folder / "results.json", detections, source),
    )
    order = np.argsort(np.array(source.category_ids))  # pycocotools ranks classes by id
    precision, recall = detection.coco_curves(detections, source)
    np.testing.assert_allclose(precision[:, :, order], theirs.eval["precision"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(recall[:, order], theirs.eval["recall"], rtol=0, atol=1e-12)
    ours = detection.summarize(detections, source)
    stats = [-1 if ours[name] is None else ours[name] for name in NAMES]
    np.testing.assert_allclose(stats, theirs.stats, rtol=0, atol=1e-12)
    for position, label in enumerate(order):
        curve = theirs.eval["precision"][:, :, position, 0, 2]
        ap = ours["per_class"][source.class_names[label]]
        if (curve > -1).any():
            assert ap == pytest.approx(curve[curve > -1].mean(), rel=0, abs=1e-12)
        else:
            assert ap is None


def test_random_cases_equal_pycocotools(tmp_path: Path) -> None:
    seen = {"crowd": 0, "none": 0, "no class": 0, "over 100": 0, "ap": 0, "empty": 0}
    for seed in range(120):
        detections, source = random_case(seed)
        _assert_equal(detections, source, tmp_path)
        seen["crowd"] += any(crowd.any() for crowd in source.crowd)
        seen["none"] += not len(detections)
        seen["empty"] += any(not len(label) for label in source.label)
        figures = detection.summarize(detections, source)
        seen["no class"] += None in figures["per_class"].values()
        seen["ap"] += bool(figures["ap"])
        cells = np.stack([detections.index, detections.label], axis=1)
        _, counts = np.unique(cells, axis=0, return_counts=True)
        seen["over 100"] += bool((counts > 100).any())
    assert min(seen.values()) >= 10, seen  # each kind did occur


def test_a_file_with_odd_boxes_equals_pycocotools_on_that_file(tmp_path: Path) -> None:
    """Boxes past the edge, beside the image, of no width or a negative one, areas that are none."""
    names = [f"{row}.png" for row in range(6)]
    for name in names:
        Image.new("RGB", (160, 120)).save(tmp_path / name)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        ids = [f"im{9 - row}" if seed % 3 else row for row in range(6)]
        truth, rows = [], []
        for number in range(24):
            x, y, w, h = rng.uniform((-30, -30, 5, 5), (140, 100, 60, 60))
            found = np.array([x, y, x + w, y + h]) + rng.normal(0, 2.5, 4)
            if number % 2:
                found = np.clip(found, 0, [160, 120, 160, 120])
            x, w, h = {0: (x, 0.0, h), 1: (210.0, w, h), 2: (x, -w, h), 3: (x, w, 1e6)}.get(
                kind := int(rng.integers(0, 9)), (x, w, h)
            )
            area = float(rng.choice([0, -3, 10, 5000, 1e12])) if kind == 5 else w * h
            truth.append(
                {"id": number + 1, "image_id": ids[number // 4], "category_id": number % 2 + 1,
                 "bbox": [x, y, w, h], "area": area, "iscrowd": int(kind == 4)}
            )  # fmt: skip
            if (found[2:] > found[:2] + 1).all():
                rows.append((number // 4, number % 2, float(rng.random()), found.tolist()))
        content = {
            "images": [
                {"id": key, "file_name": name, "width": 160, "height": 120}
                for key, name in zip(ids, names, strict=True)
            ],
            "categories": [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}],
            "annotations": truth,
        }
        (tmp_path / "odd.json").write_text(json.dumps(content))
        source, detections = (
            read_detection_source(str(tmp_path / "odd.json")),
            make_detections(rows),
        )
        _assert_equal(detections, source, tmp_path)  # on the files written here
        theirs = _pycocotools(tmp_path / "odd.json", tmp_path / "results.json")
        precision, recall = detection.coco_curves(detections, source)
        np.testing.assert_array_equal(precision, theirs.eval["precision"])
        np.testing.assert_array_equal(recall, theirs.eval["recall"])


def test_a_class_has_more_than_100_detections_in_an_image(tmp_path: Path) -> None:
    """The right box is the 101st: COCO doesn't count it."""
    _, source = next(case for seed in range(99) if len((case := random_case(seed))[1].label[0]) > 1)
    true = source.boxes_xyxy_px[0][0].tolist()
    rows = [(0, int(source.label[0][0]), 0.9 - 0.001 * d, [0, 0, 1, 1]) for d in range(100)]
    for last in (0.95, 0.1):
        detections = make_detections([*rows, (0, int(source.label[0][0]), last, true)])
        _assert_equal(detections, source, tmp_path)


def test_ties_across_images_rank_by_the_files_id(tmp_path: Path) -> None:
    """AP depends on the order of tied images; ours is pycocotools' whatever the source's order."""
    values = set()
    for ids in ((1, 2), (2, 1), ("b", "a")):
        source = make_truth([[[0, 0, 10, 10]]] * 2, [[0]] * 2, image_ids=ids)
        detections = make_detections([(0, 0, 0.5, [0, 0, 10, 10]), (1, 0, 0.5, [30, 30, 40, 40])])
        _assert_equal(detections, source, tmp_path)
        values.add(detection.summarize(detections, source)["ap"])
    assert len(values) == 2


def test_annotation_id_0_is_unmatched_in_pycocotools_so_files_start_at_1(tmp_path: Path) -> None:
    source = make_truth([[[0, 0, 10, 10]]], [[0]])
    detections = make_detections([(0, 0, 0.5, [0, 0, 10, 10])])
    _assert_equal(detections, source, tmp_path)
    assert detection.summarize(detections, source)["ap"] == pytest.approx(1)
    content = json.loads((tmp_path / "truth.json").read_text())
    content["annotations"][0]["id"] = 0
    (tmp_path / "truth.json").write_text(json.dumps(content))
    assert _pycocotools(tmp_path / "truth.json", tmp_path / "results.json").stats[0] == 0


def _random_file(random: np.random.Generator) -> tuple[dict, list[tuple]]:
    """A COCO annotation file as people write them, two decimals and ids with gaps, and
    detections (image id, category id, score, box) near its boxes."""
    images = [int(key) for key in random.permutation(100)[: random.integers(1, 8)]]
    categories = [int(key) for key in random.permutation(90)[: random.integers(1, 5)]]
    annotations, found = [], []
    for image in images:
        for _ in range(random.integers(0, 6)):
            corner, side = random.uniform(0, 300, 2).round(2), random.uniform(1, 300, 2).round(2)
            category = int(random.choice(categories))
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": category,
                "bbox": [*corner.tolist(), *side.tolist()], "iscrowd": int(random.random() < 0.1),
                "area": float(side.prod() * random.uniform(0.4, 1)),  # of a mask
            })  # fmt: skip
            for _ in range(random.integers(0, 4)):
                noise = random.choice([0, 0.05, 0.2]) * random.normal(size=(2, 2)) * side
                box = np.concatenate([corner, corner + side]) + noise.ravel()
                box[2:] = np.maximum(box[2:], box[:2])
                found.append((image, category, round(random.random(), 1), box.tolist()))
    return {
        "images": [
            {"id": key, "file_name": f"{key}.jpg", "height": 600, "width": 600} for key in images
        ],
        "categories": [{"id": key, "name": f"category {key}"} for key in categories],
        "annotations": annotations,
    }, found


def test_an_annotation_file_gives_what_pycocotools_makes_of_it(tmp_path: Path) -> None:
    """The file is read here on its own, with its ids from 0, which pycocotools can't do."""
    for key in range(100):
        Image.new("L", (600, 600)).save(tmp_path / f"{key}.jpg")
    for seed in range(30):
        content, found = _random_file(np.random.default_rng(seed))
        truth = tmp_path / "truth.json"
        zero = [{**entry, "id": entry["id"] - 1} for entry in content["annotations"]]
        truth.write_text(json.dumps({**content, "annotations": zero}))
        source = read_detection_source(str(truth), tmp_path)
        images = {key: row for row, key in enumerate(source.image_ids)}
        labels = {key: label for label, key in enumerate(source.category_ids)}
        detections = make_detections([(images[i], labels[k], *rest) for i, k, *rest in found])
        ours = detection.summarize(detections, source)
        truth.write_text(json.dumps(content))
        results = detection.write_results(tmp_path / "results.json", detections, source)
        stats = [-1 if ours[name] is None else ours[name] for name in NAMES]
        theirs = _pycocotools(truth, results).stats
        np.testing.assert_allclose(stats, theirs, rtol=0, atol=1e-12)
