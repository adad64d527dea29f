"""Mask AP against pycocotools, panoptic quality against panopticapi, on the same segments."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vision_jax.data.segments import make_segments, segments_of_map
from vision_jax.tasks.segmentation import segment_metrics as metrics

CASES = 125  # of each part, four of which are all


def draw_pairs(rng, classes):
    """Blobs, some of them found more or less, some twice; crowds; stated areas; ties of scores."""
    pairs = []
    for _ in range(int(rng.integers(1, 5))):
        size = tuple(rng.integers(20, 140, 2).tolist())
        true = [blob(rng, size) for _ in range(int(rng.integers(0, 6)))]
        label, crowd = rng.integers(0, classes, len(true)), rng.random(len(true)) < 0.2
        area = np.where(rng.random(len(true)) < 0.3, rng.uniform(10, 20_000, len(true)), np.nan)
        found, kinds = [], []
        for mask, kind in zip(true, label, strict=True):
            for _ in range(int(rng.integers(0, 3))):
                found.append(np.roll(mask, rng.integers(-4, 5, 2), (0, 1)))
                kinds.append(kind if rng.random() < 0.8 else rng.integers(0, classes))
        for _ in range(int(rng.integers(0, 4))):
            found.append(blob(rng, size))
            kinds.append(rng.integers(0, classes))
        if rng.random() < 0.1:  # more than COCO's 100
            found, kinds = found * 40, kinds * 40
        score = np.round(rng.random(len(found)), int(rng.integers(1, 4)))
        truth = make_segments(true, size, label, crowd=crowd, area=area)
        pairs.append((make_segments(found, size, kinds, score=score), truth))
    return pairs


def blob(rng, size):
    y, x = np.mgrid[: size[0], : size[1]]
    center, radius = rng.uniform(0, size), rng.uniform(2, 70)
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 * rng.uniform(0.5, 2) < radius**2


def pycocotools_curves(pairs, names):
    truth = metrics._dataset([true for _, true in pairs], names, ())
    rows = [
        {
            "image_id": number,
            "category_id": int(found.label[i]) + 1,
            "segmentation": dict(found.masks[i]),
            "score": float(found.score[i]),
        }
        for number, (found, _) in enumerate(pairs, start=1)
        for i in range(len(found))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco, results = COCO(), COCO()
        coco.dataset = truth
        coco.createIndex()
        if rows:
            results = coco.loadRes(rows)
        else:  # loadRes fails on an empty list
            results.dataset = {**truth, "annotations": []}
            results.createIndex()
        evaluator = COCOeval(coco, results, "segm")
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


@pytest.mark.parametrize("part", range(4))
def test_mask_ap_equals_pycocotools(rng, part):
    seen = {"crowd": 0, "nothing found": 0, "nothing true": 0, "over 100": 0, "absent": 0}
    for _ in range(CASES):
        names = [f"c{k}" for k in range(int(rng.integers(1, 4)))]
        pairs = draw_pairs(rng, len(names))
        ours = metrics.mask_curves(pairs, names)
        for mine, theirs in zip(ours, pycocotools_curves(pairs, names), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        seen["crowd"] += any(true.crowd.any() for _, true in pairs)
        seen["nothing found"] += any(not len(found) for found, _ in pairs)
        seen["nothing true"] += any(not len(true) for _, true in pairs)
        seen["over 100"] += any(len(found) > 100 for found, _ in pairs)
        figures = metrics.summarize_instances(pairs, names)
        seen["absent"] += None in figures["per_class"].values()
        curve = ours[0][..., 0, 2]
        if (curve > -1).any():
            np.testing.assert_allclose(figures["ap"], curve[curve > -1].mean(), rtol=1e-12)
        else:
            assert figures["ap"] is None
    assert min(seen.values()) > 0, seen


def draw_maps(rng, classes):
    """Pairs of (numbers i[H, W], labels, crowds) of rectangles: found ones moved, or others."""
    pairs = []
    for _ in range(int(rng.integers(1, 4))):
        size = rng.integers(8, 30, 2)

        def draw(size=size):
            numbers = np.zeros(size, np.int64)
            for i in range(1, int(rng.integers(1, 8))):
                top, left = rng.integers(0, size)
                height, width = rng.integers(1, size)
                numbers[top : top + height, left : left + width] = i
            return numbers

        true = draw()
        label = rng.integers(0, classes, 8)
        crowd, crowded = np.zeros(8, bool), set()
        for i in np.unique(true[true > 0]):  # the reference knows one crowd of a class
            crowd[i] = rng.random() < 0.25 and label[i] not in crowded
            crowded |= {label[i]} if crowd[i] else set()
        found = true.copy() if rng.random() < 0.7 else draw()
        if rng.random() < 0.7:
            found = np.roll(found, rng.integers(-2, 3, 2), (0, 1))
        for numbers, chance in ((found, 0.3), (true, 0.2)):  # pixels of no segment
            if rng.random() < chance:
                numbers[rng.random(numbers.shape) < 0.2] = 0
        kinds = np.where(rng.random(8) < 0.8, label, rng.integers(0, classes, 8))
        pairs.append(((found, kinds, np.zeros(8, bool)), (true, label, crowd)))
    return pairs


def panopticapi_counts(evaluation, pairs, things, classes, folder):
    annotations = []
    for row, pair in enumerate(pairs):
        both = []
        for kind, (numbers, label, crowd) in zip(("found", "true"), pair, strict=True):
            color = np.stack([numbers, 0 * numbers, 0 * numbers], -1).astype(np.uint8)
            Image.fromarray(color).save(folder / kind / f"{row}.png")
            infos = [
                {
                    "id": int(i),
                    "category_id": int(label[i]),
                    "iscrowd": int(crowd[i]),
                    "area": int((numbers == i).sum()),
                }
                for i in np.unique(numbers)
                if i
            ]
            both.append({"image_id": row, "file_name": f"{row}.png", "segments_info": infos})
        annotations.append(both[::-1])
    categories = {k: {"id": k, "isthing": int(k in things)} for k in range(classes)}
    with contextlib.redirect_stdout(io.StringIO()):
        counts = evaluation.pq_compute_single_core(
            *(0, annotations, str(folder / "true"), str(folder / "found"), categories)
        )
    found = {}
    for suffix, kind in (("", None), ("_things", True), ("_stuff", False)):
        try:
            found[suffix] = counts.pq_average(categories, kind)[0]
        except ZeroDivisionError:  # it has none for no class
            found[suffix] = None
    return found, {k: vars(counts[k]) for k in range(classes)}


@pytest.mark.parametrize("part", range(4))
def test_panoptic_quality_equals_panopticapi(rng, part, tmp_path):
    evaluation = pytest.importorskip("panopticapi.evaluation")
    for kind in ("found", "true"):
        (tmp_path / kind).mkdir()
    seen = {"crowd": 0, "nothing": 0, "absent": 0, "pq": 0}
    for _ in range(CASES):
        classes = int(rng.integers(1, 5))
        things = [k for k in range(classes) if rng.random() < 0.5]
        pairs = draw_maps(rng, classes)
        wanted, counts = panopticapi_counts(evaluation, pairs, things, classes, tmp_path)
        names = [f"c{k}" for k in range(classes)]
        ours = metrics.summarize_panoptic(
            [tuple(segments_of_map(m, range(1, 8), k[1:], c[1:]) for m, k, c in p) for p in pairs],
            names,
            [names[k] for k in range(classes) if k not in things],
        )
        for suffix, figures in wanted.items():
            for name in ("pq", "sq", "rq"):
                value = ours[f"{name}{suffix}"]
                if figures is None:
                    assert value is None
                else:
                    np.testing.assert_allclose(value, figures[name], rtol=1e-12, atol=1e-15)
        for k, name in enumerate(names):
            one = ours["per_class"][name]
            assert [one[n] for n in ("tp", "fp", "fn")] == [
                counts[k][n] for n in ("tp", "fp", "fn")
            ]
            seen["absent"] += one["pq"] is None
        seen["crowd"] += any(true[2].any() for _, true in pairs)
        seen["nothing"] += any(not found[0].any() for found, _ in pairs)
        seen["pq"] += bool(ours["pq"])
    assert min(seen.values()) > 0, seen
