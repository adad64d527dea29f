"""How well segments agree over a set: mask AP of instances, panoptic quality of all.

Both are hotcoco's: AP and AR are bit-identical to pycocotools', and PQ, SQ and RQ (Kirillov et al.
2019, https://arxiv.org/abs/1801.00868) to panopticapi's, crowds and pixels of no segment included
(tests/parity/test_segment_metrics.py). Images count in the order of their ids, as there, so that
ties of scores across images are broken alike. Numpy on the host.
"""

from collections.abc import Collection, Sequence
from typing import Any

import hotcoco
import numpy as np

from vision_jax.data.segments import Segments
from vision_jax.evaluation import distinct_names
from vision_jax.tasks import coco

Pair = tuple[Segments, Segments]  # found, with scores, and true ones
KINDS = {"": "All", "_things": "Things", "_stuff": "Stuff"}


def mask_curves(
    pairs: Sequence[Pair], class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:  # f64[10, 101, K, 4, 3], f64[10, K, 4, 3]
    """Precision at each recall, and the highest recall, as `tasks.coco.figures` takes them.

    Of an image those found count in the order of their scores, among equal ones of their places.

    Args:
      pairs: of each image.
      class_names: K names.
    """
    truth = hotcoco.COCO(_dataset([true for _, true in pairs], class_names, range(0)))
    rows = [
        {
            "image_id": number,
            "category_id": int(found.label[i]) + 1,
            "segmentation": found.masks[i],
            "score": score,
        }
        for number, (found, _) in enumerate(pairs, start=1)
        for i, score in enumerate([] if found.score is None else found.score.tolist())
    ]
    evaluator = hotcoco.COCOeval(truth, truth.load_res(rows), "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    assert evaluator.eval is not None
    return evaluator.eval["precision"], evaluator.eval["recall"]


def summarize_instances(pairs: Sequence[Pair], class_names: Sequence[str]) -> dict[str, Any]:
    """The figures of `tasks.coco.figures`, and count (images), true_instances, crowds, instances.

    Args:
      pairs: of each image.
      class_names: K names.
    """
    crowds = sum(int(true.crowd.sum()) for _, true in pairs)
    return {
        **coco.figures(*mask_curves(pairs, class_names), class_names),
        "count": len(pairs),
        "true_instances": sum(len(true) for _, true in pairs) - crowds,
        "crowds": crowds,
        "instances": sum(len(found) for found, _ in pairs),
    }


def summarize_panoptic(
    pairs: Sequence[Pair], class_names: Sequence[str], stuff: Collection[str]
) -> dict[str, Any]:
    """Panoptic quality, in all of its parts; None where there is nothing to measure.

    pq, sq, rq: means over the classes that occur, `classes` says of how many of how many; with
    _things and _stuff over these alone. per_class: pq, sq, rq, tp, fp, fn by name. count: images.

    Args:
      pairs: of each image; segments of one do not overlap.
      class_names: K names.
      stuff: names of classes without instances.
    """
    things = [k for k, name in enumerate(class_names) if name not in stuff]
    both = [[pair[i] for pair in pairs] for i in (0, 1)]
    found, truth = (hotcoco.COCO(_dataset(some, class_names, things)) for some in both)
    evaluator = hotcoco.panoptic.PanopticEval(truth, found)
    evaluator.evaluate()
    results = evaluator.results()
    summary: dict[str, Any] = {}
    for suffix, kind in KINDS.items():
        part = results[kind]
        summary |= {f"{n}{suffix}": part[n] if part["n"] else None for n in ("pq", "sq", "rq")}
    summary["classes"] = [results["All"]["n"], len(class_names)]
    summary["per_class"] = {}
    for label, name in enumerate(distinct_names(class_names), start=1):
        one = results["per_class"][label]
        counts = {n: int(one[n]) for n in ("tp", "fp", "fn")}
        values = {n: one[n] if any(counts.values()) else None for n in ("pq", "sq", "rq")}
        summary["per_class"][name] = values | counts
    return summary | {"count": len(pairs)}


def _dataset(
    segments: Sequence[Segments], class_names: Sequence[str], things: Collection[int]
) -> dict[str, Any]:
    """As COCO's JSON; images and categories are numbered from 1."""
    annotations = [
        {
            "image_id": number,
            "category_id": int(one.label[i]) + 1,
            "iscrowd": int(one.crowd[i]),
            "area": float(one.area[i]),
            "bbox": hotcoco.mask.to_bbox(one.masks[i]).tolist(),
            "segmentation": one.masks[i],
        }
        for number, one in enumerate(segments, start=1)
        for i in range(len(one))
    ]
    return {
        "images": [
            {"id": number, "height": one.size[0], "width": one.size[1]}
            for number, one in enumerate(segments, start=1)
        ],
        "categories": [
            {"id": label + 1, "name": str(name), "isthing": int(label in things)}
            for label, name in enumerate(class_names)
        ],
        "annotations": [{"id": i, **one} for i, one in enumerate(annotations, start=1)],
    }
