"""Evaluation and prediction of segments: instances, or panoptic ones (data/segments.py).

It takes the place of what task.py does with masks of classes, where config.data.targets says so.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from hotcoco import mask as coco_mask
from PIL import Image

from vision_jax.config import write_json
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.segmentation import SegmentationSource
from vision_jax.data.segments import INSTANCE, PANOPTIC, Segments, make_segments
from vision_jax.errors import printable, utf8
from vision_jax.evaluation import none_read, say_damaged
from vision_jax.logging import say
from vision_jax.tasks import images
from vision_jax.tasks.segmentation import segment_metrics as metrics

BEST = {INSTANCE: "ap", PANOPTIC: "pq"}  # of a summary, what the best checkpoint is best at
# Of a summary, in metrics.jsonl.
REPORTED = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_100"),
    *(f"{name}{part}" for part in ("", "_things", "_stuff") for name in ("pq", "sq", "rq")),
)
CURVES = ("ap", "ap50", "pq", "pq_things", "pq_stuff")
MOST_INSTANCES = 100  # of an image that are kept, those of the highest scores, as COCO does
PICTURES = 6  # in predictions.png
LISTED = 5  # segments of a file on the screen


def instance_segments(
    score: np.ndarray,
    label: np.ndarray,
    mask_bits: np.ndarray,
    size: tuple[int, int],
    least: float = 0.0,
) -> Segments:
    """Instances of an image, the highest score first.

    Args:
      score: f[Q], 0 of what has no pixel.
      label: i[Q].
      mask_bits: u8[Q, H, ceil(W / 8)], as ops.mask_outputs gives them.
      size: (H, W).
      least: scores below it are left out.
    """
    order = np.argsort(-score, kind="stable")[:MOST_INSTANCES]
    kept = [q for q in order if score[q] >= least and score[q] > 0]
    return make_segments(
        (np.unpackbits(mask_bits[q], axis=1, count=size[1]).view(bool) for q in kept),
        size,
        label[kept],
        score=score[kept].astype(np.float64),
    )


def panoptic_segments(
    numbers: np.ndarray, score: np.ndarray, label: np.ndarray, stuff: Collection[int]
) -> Segments:
    """Segments of an image in the order of queries, those of a class of stuff as one.

    Such a segment has the score of its first query.

    Args:
      numbers: i[H, W], a query or -1.
      score: f[Q].
      label: i[Q].
      stuff: class indices.
    """
    kept = [int(q) for q in np.unique(numbers) if q >= 0]
    first: dict[int, int] = {}
    for q in kept:
        first.setdefault(int(label[q]), q)
    segment = {q: first[int(label[q])] if label[q] in stuff else q for q in kept}
    of_query = np.full(len(score) + 1, -1)  # and -1 of none
    of_query[kept] = [segment[q] for q in kept]
    merged, alone = of_query[numbers], sorted(set(segment.values()))
    return make_segments(
        (merged == q for q in alone),
        (numbers.shape[0], numbers.shape[1]),
        label[alone],
        score=score[alone].astype(np.float64),
    )


Found = Iterator[tuple[int, Segments]]


def make_find_all(
    run: Callable[..., Iterator[Mapping[str, np.ndarray]]], targets: str, least: float = 0.0
) -> Callable[..., Found]:
    """A function (source, damage log, trainable, frozen, model_state) -> (row, what was found).

    Args:
      run: likewise to outputs of each batch, those of objective.SegmentOutputs.
      targets: of data.segments.TARGETS.
      least: instances of a lower score are left out.
    """

    def find_all(source: SegmentationSource, damage: DamageLog, *arguments: Any) -> Found:
        stuff = [source.class_names.index(name) for name in source.stuff]
        for batch in run(source, damage, *arguments):
            for place in np.flatnonzero(batch["mask"]):
                score, label = batch["score"][place], batch["label"][place]
                if targets == INSTANCE:
                    bits = batch["mask_bits"][place]
                    size = (bits.shape[1], int(batch["width"][place]))
                    found = instance_segments(score, label, bits, size, least)
                else:
                    found = panoptic_segments(batch["segments"][place], score, label, stuff)
                yield int(batch["index"][place]), found

    return find_all


# Evaluation -------------------------------------------------------------------------------------


def class_counts(*sources: SegmentationSource) -> list[tuple[str, ...]]:
    """Rows (label, name, how many segments of the class each source has)."""
    found = [
        np.sum([source.segment_counts(i) for i in range(len(source))], axis=0) for source in sources
    ]
    return [
        (str(label), name, *(f"{count[label]:,}" for count in found))
        for label, name in enumerate(sources[0].class_names)
    ]


@dataclass(frozen=True)
class SegmentEvaluation:
    """What was found in a whole dataset.

    Attributes:
      summary: see segment_metrics.summarize_instances and summarize_panoptic.
      found: segments by row of the source, in the order of the images' ids.
      truth: likewise.
      damaged: lines, with the reason, of images that could not be read.
      warn_after: updates after which it is warned of nothing being found.
      targets: of data.segments.TARGETS.
    """

    summary: dict[str, Any]
    found: Mapping[int, Segments]
    truth: Mapping[int, Segments]
    damaged: tuple[str, ...]
    warn_after: int
    targets: str

    @property
    def pairs(self) -> list[metrics.Pair]:
        """What was found with the truth, image by image."""
        return [(found, self.truth[row]) for row, found in self.found.items()]

    def line(self) -> str:
        """The summary for the screen."""
        known = [name for name in REPORTED if self.summary.get(name) is not None]
        text = "  ".join(f"{name} {self.summary[name]:.4f}" for name in known)
        skipped = f"  ({len(self.damaged)} damaged skipped)" if self.damaged else ""
        count = f"evaluation on {self.summary['count']} images"
        if self.targets == INSTANCE:
            true = self.summary["true_instances"]
            return f"{count} with {true:,} instances: {text}{skipped}"
        there, all_of_them = self.summary["classes"]
        return f"{count}: {text}  (means of {there} of {all_of_them} classes){skipped}"

    def lines(self) -> list[str]:
        """Each class."""
        width = max(len(printable(name)) for name in self.summary["per_class"])

        def show(found: Any) -> str:
            if not isinstance(found, Mapping):
                return f"ap {_number(found)}"
            values = (f"{name} {_number(found[name])}" for name in ("pq", "sq", "rq"))
            counts = f"{found['tp']} found, {found['fn']} missed, {found['fp']} false"
            return f"{'  '.join(values)}  {counts}"

        return [
            f"  {printable(name):{width}}  {show(found)}"
            for name, found in self.summary["per_class"].items()
        ]

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """Nothing found, once there was time to learn."""
        del history
        if step < self.warn_after or not any(len(one) for one in self.truth.values()):
            return []
        if self.summary[BEST[self.targets]]:
            return []
        return [
            f"after {step} updates not one segment is found: raise total_steps or config.optim.lr,"
            " and look at config.loss.no_object_weight: queries that say nothing are the safe guess"
        ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def make_evaluate(
    find_all: Callable[..., Found], source: SegmentationSource, *, targets: str, warn_after: int
) -> Callable[..., SegmentEvaluation]:
    """A function (trainable, frozen, model_state) -> SegmentEvaluation over the whole source."""

    def evaluate(*arguments: Any) -> SegmentEvaluation:
        damage = DamageLog()
        found = dict(find_all(source, damage, *arguments))
        if not found:
            raise none_read(source, damage)
        ids = np.array([source.image_id(row) for row in found])
        rows = [list(found)[i] for i in np.argsort(ids, kind="stable")]
        found = {row: found[row] for row in rows}
        truth = {row: source.segments(row) for row in rows}
        pairs = [(found[row], truth[row]) for row in rows]
        if targets == INSTANCE:
            summary = metrics.summarize_instances(pairs, source.class_names)
        else:
            summary = metrics.summarize_panoptic(pairs, source.class_names, source.stuff)
        return SegmentEvaluation(summary, found, truth, damage.lines, warn_after, targets)

    return evaluate


# Files ------------------------------------------------------------------------------------------


def coco_results(
    segments: Segments, image_id: int | str, category_ids: Sequence[int | str]
) -> list[dict[str, Any]]:
    """Rows of a COCO results file: image_id, category_id, segmentation (RLE), bbox and score."""
    assert segments.score is not None
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[segments.label[i]],
            "segmentation": {"size": list(segments.size), "counts": runs["counts"].decode()},
            "bbox": coco_mask.to_bbox(runs).tolist(),
            "score": float(segments.score[i]),
        }
        for i, runs in enumerate(segments.masks)
    ]


def panoptic_annotation(
    segments: Segments,
    image_id: int | str,
    path: Path,
    category_ids: Sequence[int | str],
    stuff: Collection[int],
) -> dict[str, Any]:
    """Writes a COCO panoptic PNG; returns its annotation. Segments are numbered from 1 on."""
    number = segments.map() + 1  # 0 of none
    color = np.stack([number & 255, number >> 8 & 255, number >> 16], axis=-1).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(color).save(path)
    scores = [None] * len(segments) if segments.score is None else segments.score.tolist()
    return {
        "image_id": image_id,
        "file_name": path.name,
        "segments_info": [
            {
                "id": i + 1,
                "category_id": category_ids[segments.label[i]],
                "isthing": int(segments.label[i] not in stuff),
                "iscrowd": 0,
                "area": int(segments.area[i]),
                "bbox": [int(value) for value in coco_mask.to_bbox(runs)],
                "score": scores[i],
            }
            for i, runs in enumerate(segments.masks)
        ],
    }


def write_segments(
    folder: Path,
    found: Mapping[int, Segments],
    source: SegmentationSource,
    targets: str,
    name_of: Callable[[int], str],
) -> dict[str, str]:
    """results.json of instances, or panoptic.json with panoptic/*.png; {file: what it is}.

    Args:
      folder: which is there.
      found: by row.
      source: of these rows, whose ids the files have.
      targets: of data.segments.TARGETS.
      name_of: names the PNG of a row.
    """
    ids = source.category_ids()
    if targets == INSTANCE:
        every = [
            one for r in sorted(found) for one in coco_results(found[r], source.image_id(r), ids)
        ]
        (folder / "results.json").write_text(json.dumps(every))
        return {"results.json": "instances as a COCO results file, masks in RLE"}
    stuff = [source.class_names.index(name) for name in source.stuff]
    annotations = [
        panoptic_annotation(
            found[row], source.image_id(row), folder / "panoptic" / name_of(row), ids, stuff
        )
        for row in sorted(found)
    ]
    categories = [
        {"id": ids[k], "name": name, "isthing": int(k not in stuff)}
        for k, name in enumerate(source.class_names)
    ]
    listed = [
        {
            "id": source.image_id(row),
            "file_name": utf8(Path(source.example_name(row)).name),
            "height": found[row].size[0],
            "width": found[row].size[1],
        }
        for row in sorted(found)
    ]
    content = {"images": listed, "categories": categories, "annotations": annotations}
    write_json(content, folder / "panoptic.json")
    return {"panoptic.json": "segments in COCO's panoptic form, with the PNGs in panoptic/"}


def write_results(
    workdir: Path, result: SegmentEvaluation, source: SegmentationSource, score: float
) -> dict[str, str]:
    """Numbers, COCO's files and pictures of an evaluation; returns {file: what it is}.

    Args:
      workdir: the run's.
      result: of the evaluation.
      source: that was evaluated.
      score: instances of a lower one are not drawn.
    """
    from vision_jax.tasks.coco_figures import draw_precision_recall
    from vision_jax.tasks.segmentation import figures  # matplotlib, only where something is drawn

    files = {
        "evaluation.json": "all numbers of the last evaluation",
        "predictions.png": "images with true and predicted segments",
    }
    write_json(result.summary, workdir / "evaluation.json")
    if result.targets == INSTANCE:
        precision, _ = metrics.mask_curves(result.pairs, source.class_names)
        path = workdir / "precision_recall.png"
        draw_precision_recall(precision, source.class_names, path, things="masks")
        files[path.name] = "precision by recall of each class"
    rows = sorted(result.found)
    shown = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, PICTURES).astype(int))]
    figures.draw_segment_grid(
        [
            {
                "image": source[row]["image"],
                "truth": result.truth[row],
                "found": above(result.found[row], score, result.targets),
                "name": source.example_name(row),
            }
            for row in shown
        ],
        source.class_names,
        workdir / "predictions.png",
    )
    return files | write_segments(
        workdir, result.found, source, result.targets, lambda row: f"{row:06d}.png"
    )


def above(segments: Segments, score: float, targets: str) -> Segments:
    """Instances of at least that score; panoptic segments all, which were chosen by it."""
    if targets == PANOPTIC or segments.score is None:
        return segments
    return segments[segments.score >= score]


def predict(
    find_all: Callable[..., Found],
    source: SegmentationSource,
    arguments: Sequence[Any],
    out: Path,
    targets: str,
) -> None:
    """The segments of each file: drawn in OUT/overlays/, COCO's files, and OUT/predictions.json.

    Args:
      find_all: of the model.
      source: images without truth.
      arguments: of the model.
      out: where to write.
      targets: of data.segments.TARGETS.

    Raises:
      UserError: none of the files can be read.
    """
    from vision_jax.tasks.segmentation import figures  # matplotlib, only where something is drawn

    damage, found, writes = DamageLog(), {}, not jax.process_index()
    names = [source.example_name(row) for row in range(len(source))]
    width = max(len(printable(name)) for name in names)

    def name_of(row: int) -> str:
        return images.file_name(row, Path(names[row]).stem)

    for row, segments in find_all(source, damage, *arguments):
        found[row] = segments
        if not writes:
            continue
        said = figures.describe(segments, source.class_names)
        more = f", and {len(said) - LISTED} more" if len(said) > LISTED else ""
        text = ", ".join(map(printable, said[:LISTED])) or "nothing"
        say(f"{printable(names[row]):{width}}  {text}{more}")
        picture = figures.draw_segments(source.reader.read(row), segments, source.class_names)
        (out / "overlays").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(out / "overlays" / name_of(row))
    if not found:
        raise none_read(source, damage)
    if not writes:
        return
    say_damaged(damage.lines)
    files, ids = write_segments(out, found, source, targets, name_of), source.category_ids()
    records = {row: _record(one, source.class_names) for row, one in found.items()}
    listed = [
        {"id": source.image_id(row), **record}
        for row, record in enumerate(images.list_files(names, records, damage))
    ]
    classes = {str(ids[k]): name for k, name in enumerate(source.class_names)}
    write_json({"classes": classes, "images": listed}, out / "predictions.json")
    for name in ("predictions.json", *files, "overlays"):
        say(f"wrote {out / name}")


def _record(segments: Segments, class_names: Sequence[str]) -> dict[str, Any]:
    scores = [] if segments.score is None else segments.score.tolist()
    listed = zip(segments.label, scores, segments.area, strict=True)
    return {
        "height": segments.size[0],
        "width": segments.size[1],
        "segments": [
            {"class": class_names[label], "score": score, "pixels": int(area)}
            for label, score, area in listed
        ],
    }
