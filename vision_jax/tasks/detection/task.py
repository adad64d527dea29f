"""Detection as a run's task: its config's data, loss, evaluation and pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from vision_jax.config import write_json
from vision_jax.data.detection import (
    DetectionSource,
    check_boxes,
    detection_subset,
    images_alone,
    part_of,
    read_detection_source,
    split_detection_source,
)
from vision_jax.data.detection_pipeline import (
    make_detection_eval_batches,
    make_detection_train_iterator,
    note_crowded,
)
from vision_jax.data.detection_transforms import (
    DetectionAugmentation,
    DetectionPreprocessing,
    default_buckets,
)
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import printable
from vision_jax.evaluation import make_run_over, say_damaged
from vision_jax.logging import RunLog, say
from vision_jax.objective import Apply, Objective
from vision_jax.tasks import coco, images
from vision_jax.tasks.api import Trained
from vision_jax.tasks.detection import metrics, objective
from vision_jax.tasks.detection import robustness as under_attack
from vision_jax.tasks.detection.metrics import Detections

best_is = "highest"
# Of an evaluation, in metrics.jsonl.
reported = ("ap", "ap50", "ap75", "ar_100", "mean_iou_top1", "mean_iou_matched")

curves = ("ap", "ap50", "mean_iou_matched")  # of the former, in curves.png

whole = objective.WHOLE
labels_images = False

SHORT, LONGEST = 800, 1333  # DETR's sides in pixels
PICTURES = 12  # in predictions.png


def best_metric(config: ConfigDict) -> str:
    """Of an evaluation's summary, what the best checkpoint is best at."""
    del config
    return "ap"


# Data -------------------------------------------------------------------------------------------


def read_sources(config: ConfigDict) -> tuple[DetectionSource, DetectionSource]:
    """The training and the evaluation data, with the same classes."""
    data = config.data
    train = read_detection_source(data.train, data.images)
    if data.eval:
        train = _subset(config, train)
        return train, read_eval_source(config, train.class_names)
    train, held_out = split_detection_source(train, data.holdout, config.seed)
    return _subset(config, train), held_out


def _subset(config: ConfigDict, train: DetectionSource) -> DetectionSource:
    count = config.data.subset
    train = detection_subset(train, count, config.seed) if count else train
    return note_crowded(train, config.data.max_boxes)


def read_eval_source(config: ConfigDict, class_names: tuple[str, ...]) -> DetectionSource:
    """The evaluation data alone, for a finished run."""
    data = config.data
    if data.eval:
        images = data.eval_images or data.images
        return read_detection_source(data.eval, images, class_names=class_names)
    train = read_detection_source(data.train, data.images, class_names=class_names)
    return split_detection_source(train, data.holdout, config.seed)[1]


def announce(log: RunLog, workdir: Path, train: DetectionSource, held_out: DetectionSource) -> None:
    """Shows the map from the file's category ids to labels, and keeps it in categories.json."""
    counts = [
        np.bincount(source.label.values, minlength=len(train.class_names))
        for source in (train, held_out)
    ]
    rows = [
        (str(label), str(key), name, f"{counts[0][label]:,}", f"{counts[1][label]:,}")
        for label, (key, name) in enumerate(zip(train.category_ids, train.class_names, strict=True))
    ]
    columns = ("label", "category_id", "name", "boxes to train", "to evaluate")
    log.table("Classes", columns, rows)
    classes = zip(train.category_ids, train.class_names, strict=True)
    write_json(
        {
            "categories": [
                {"label": label, "category_id": key, "name": name}
                for label, (key, name) in enumerate(classes)
            ]
        },
        workdir / "categories.json",
    )
    log.wrote(workdir / "categories.json", "labels, the file's category ids, and names")


def make_preprocessing(
    config: ConfigDict, own: Mapping[str, Any], arguments: Mapping[str, Any]
) -> DetectionPreprocessing:
    """How images are prepared: as the config says, else as the weights (`own`) were used to.

    Square where the model has an image size, which is config.model.image_size or its own, and where
    the weights were used to squares and the config says no other sides. Letterboxed images come on
    a square, one for each side of config.data.shorts.
    """
    data = config.data
    rule = own.get("rule") or "detr"
    buckets: tuple[tuple[int, int], ...]
    side = (config.model.image_size,) * 2 if config.model.image_size else None
    side = side or arguments.get("image_size")
    if not side and own.get("square") and not (data.short or data.longest):
        side = (own["short"],) * 2
    if rule == "letterbox":
        short = longest = int(side[0]) if side else data.short or own["short"]
        buckets = tuple((edge, edge) for edge in sorted({short, *data.shorts}))
    elif side:
        short = longest = int(side[0])
        buckets = ((short, short),)
    else:
        short = data.short or own.get("short") or SHORT
        longest = data.longest or own.get("longest") or LONGEST
        buckets = default_buckets(short, longest, data.buckets)
    return DetectionPreprocessing(
        short=short,
        longest=longest,
        square=bool(side) and rule != "letterbox",
        interpolation=data.interpolation or own.get("interpolation") or "bilinear",
        mean=arguments["mean"],
        std=arguments["std"],
        buckets=buckets,
        rule=rule,
    )


def load_preprocessing(record: Mapping[str, Any]) -> DetectionPreprocessing:
    """From its fields in model.json."""
    return DetectionPreprocessing(**record)


def training_data(
    config: ConfigDict,
    source: DetectionSource,
    preprocessing: DetectionPreprocessing,
    damage: DamageLog,
    first_batch: int = 0,
) -> grain.DatasetIterator:
    """Endless batches of this process, from `first_batch` on."""
    check_boxes(source)
    data = config.data
    return make_detection_train_iterator(
        source,
        preprocessing=preprocessing,
        augmentation=DetectionAugmentation(
            shorts=() if preprocessing.square else data.shorts,
            flip=data.flip,
            crop=data.crop,
            brightness=data.brightness,
            contrast=data.contrast,
            saturation=data.saturation,
            mosaic=data.mosaic,
            mosaic_scale=data.mosaic_scale,
            mixup=data.mixup,
            plain_from=config.total_steps - data.plain_steps,
        ),
        max_boxes=data.max_boxes,
        **images.stream_arguments(config, damage, first_batch),
    )


def batch_shapes(config: ConfigDict, preprocessing: DetectionPreprocessing) -> dict[str, Any]:
    """ShapeDtypeStructs of a training batch of the largest canvas, over all processes."""
    size, boxes = config.batch_size, config.data.max_boxes
    canvas = max(preprocessing.buckets, key=lambda bucket: bucket[0] * bucket[1])
    return {
        "image": jax.ShapeDtypeStruct((size, *canvas, len(preprocessing.mean)), np.uint8),
        "size": jax.ShapeDtypeStruct((size, 2), np.int32),
        "boxes_cxcywh_01": jax.ShapeDtypeStruct((size, boxes, 4), np.float32),
        "label": jax.ShapeDtypeStruct((size, boxes), np.int32),
        "target_mask": jax.ShapeDtypeStruct((size, boxes), np.bool_),
        "mask": jax.ShapeDtypeStruct((size,), np.bool_),
        "index": jax.ShapeDtypeStruct((size,), np.int32),
    }


# Loss and evaluation ----------------------------------------------------------------------------


def make_objective(
    config: ConfigDict,
    model: Any,
    predicts: str,
    apply: Apply,
    assemble: Callable[..., Any],
    mesh: Mesh,
) -> Objective:
    """What training minimizes: the loss of what the model predicts."""
    del mesh
    return _make_objective(config, model, predicts, apply, assemble)


def _make_objective(
    config: ConfigDict,
    model: Any,
    predicts: str,
    apply: Apply,
    assemble: Callable[..., Any],
    *,
    alone: bool = False,
) -> Objective:
    """The same, or of each image alone."""
    prediction = objective.PREDICTIONS[predicts]
    loss = _make_loss(config, model, predicts, alone=alone)
    return objective.make_objective(
        apply, assemble, loss=loss, targets=prediction.targets, counted=prediction.counted
    )


def _make_loss(
    config: ConfigDict, model: Any, predicts: str, *, alone: bool = False
) -> objective.Loss:
    loss = config.loss
    return objective.PREDICTIONS[predicts].make_loss(
        model,
        max_boxes=config.data.max_boxes,
        last_from=config.total_steps - config.data.plain_steps,
        no_object_weight=loss.no_object_weight,
        alone=alone,
        class_cost=loss.class_cost,
        l1_cost=loss.l1_cost,
        giou_cost=loss.giou_cost,
        class_weight=loss.class_weight,
        l1_weight=loss.l1_weight,
        giou_weight=loss.giou_weight,
    )


def make_outputs(
    config: ConfigDict, model: Any, predicts: str, apply: Apply, assemble: Callable[..., Any]
) -> Callable[..., Mapping[str, jax.Array]]:
    """What evaluation needs of a batch."""
    del config, model
    return objective.make_outputs(
        apply, assemble, postprocess=objective.PREDICTIONS[predicts].postprocess
    )


@dataclass(frozen=True)
class Evaluation:
    """What was found in a whole dataset, and its summary.

    Attributes:
      detections: in pixels of the original images.
      source: the images that could be read.
      summary: see evaluate.detection.summarize.
      damaged: lines, with the reason, of images that could not be read and are not in `source`.
      warn_after: updates after which empty or constant predictions are warned of.
    """

    detections: Detections
    source: DetectionSource
    summary: dict[str, Any]
    damaged: tuple[str, ...]
    warn_after: int

    def line(self) -> str:
        """The summary for the screen."""
        text = "  ".join(f"{name} {_number(self.summary[name])}" for name in reported)
        skipped = f"  ({len(self.damaged)} damaged skipped)" if self.damaged else ""
        return f"evaluation on {self.summary['count']} images: {text}{skipped}"

    def lines(self) -> list[str]:
        """The rest of COCO's twelve numbers, and AP of each class."""
        areas = [f"{what}_{area}" for what in ("ap", "ar") for area in coco.AREAS[1:]]
        rows = [(name, self.summary[name]) for name in ("ar_1", "ar_10", *areas)]
        rows += [(f"ap of {name}", value) for name, value in self.summary["per_class"].items()]
        width = max(len(name) for name, _ in rows)
        return [f"  {name:{width}}  {_number(value)}" for name, value in rows]

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """Why AP may stay at 0, once there was time to learn."""
        if step < self.warn_after:
            return []
        name = "eval/mean_iou_matched"
        ious = [record[name] for record in history if name in record and record["step"] < step]
        ious.append(self.summary["mean_iou_matched"])
        return metrics.diagnose(self.detections, self.source, iou_history=ious)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def make_evaluate(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: DetectionSource,
    preprocessing: DetectionPreprocessing,
) -> Callable[..., Evaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source."""
    run_over = _make_run_over(config, outputs_fn, mesh, preprocessing)

    def evaluate(trainable, frozen, model_state) -> Evaluation:
        found, damage = run_over(source, trainable, frozen, model_state)
        return _evaluation(config, source, found, damage)

    return evaluate


def _evaluation(config, source, found, damage) -> Evaluation:
    read = np.zeros(len(source), bool)
    read[found["index"]] = True
    seen = source if read.all() else part_of(source, read)
    found["index"] = np.cumsum(read)[found["index"]].astype(np.int32) - 1  # rows of `seen`
    detections = metrics.collect_detections([found])
    summary = metrics.summarize(detections, seen)
    return Evaluation(detections, seen, summary, damage.lines, config.evaluate.warn_after)


def make_batches(
    config: ConfigDict, preprocessing: DetectionPreprocessing
) -> Callable[..., Iterator[Any]]:
    """Makes the batches of an evaluation (see evaluation.MakeBatches)."""
    return partial(
        make_detection_eval_batches,
        preprocessing=preprocessing,
        max_boxes=config.data.max_boxes,
        num_threads=config.data.threads,
    )


def _make_run_over(config, outputs_fn, mesh, preprocessing, batch_size=None):
    batches = make_batches(config, preprocessing)
    batch_size = batch_size or config.evaluate.batch_size
    return make_run_over(outputs_fn, mesh, batches, batch_size=batch_size)


# Results ----------------------------------------------------------------------------------------


def write_results(
    config: ConfigDict,
    workdir: Path,
    result: Evaluation,
    source: DetectionSource,
    preprocessing: DetectionPreprocessing,
) -> dict[str, str]:
    """Numbers, COCO results and pictures of an evaluation; returns {file: what it is}."""
    from vision_jax.tasks.coco_figures import draw_precision_recall
    from vision_jax.tasks.detection import figures  # matplotlib, only where something is drawn

    del source, preprocessing
    detections, seen, score = result.detections, result.source, config.evaluate.score
    names = seen.class_names
    write_json(result.summary, workdir / "evaluation.json")
    metrics.write_results(workdir / "results.json", detections, seen)
    precision, _ = metrics.coco_curves(detections, seen)
    draw_precision_recall(precision, names, workdir / "precision_recall.png")
    matrix = metrics.confusion_matrix(detections, seen, score=score)
    figures.draw_detection_confusion(matrix, names, workdir / "confusion.png", score=score)
    rows = np.unique(np.linspace(0, len(seen) - 1, PICTURES).astype(int))
    figures.draw_detection_grid(
        seen, detections, workdir / "predictions.png", rows=rows.tolist(), score=score
    )
    return {
        "evaluation.json": "all numbers of the last evaluation",
        "results.json": "its boxes as a COCO results file",
        "precision_recall.png": "precision by recall of each class",
        "confusion.png": "found, missed and mistaken, by class",
        "predictions.png": "images with predicted and true boxes",
    }


# Prediction -------------------------------------------------------------------------------------


def predict(config: ConfigDict, names: Sequence[str], trained: Trained, out: Path) -> None:
    """Boxes of each file: drawn into OUT/predictions/NAME.png, and all in OUT/predictions.json.

    Args:
      config: the run's.
      names: of image files.
      trained: the model.
      out: where to write.

    Raises:
      UserError: none of the files can be read.
    """
    from vision_jax.tasks.detection import figures  # matplotlib, only where something is drawn

    class_names = trained.class_names
    outputs_fn = make_outputs(
        config, trained.model, trained.predicts, trained.apply, trained.assemble
    )
    run_over = _make_run_over(config, outputs_fn, trained.mesh, trained.preprocessing)
    source = images_alone(names, class_names)
    found, damage = run_over(source, *trained.arguments)
    if jax.process_index():
        return
    every = metrics.collect_detections([found])
    every = every[every.score >= config.evaluate.score]
    folder = out / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    width = max(len(printable(name)) for name in names)
    record: dict[int, dict[str, Any]] = {}
    for index in found["index"]:
        rows = np.flatnonzero(every.index == index)
        best = every[rows[np.argsort(-every.score[rows], kind="stable")]]
        boxes = metrics.describe_boxes(best, class_names)
        record[int(index)] = {"boxes": boxes}
        text = "  ".join(f"{box['name']} {box['score']:.2f}" for box in boxes[:5])
        more = f"  and {len(boxes) - 5} more" if len(boxes) > 5 else ""
        say(f"{printable(names[index]):{width}}  {text or 'nothing'}{more}")
        image = source[int(index)]["image"]
        picture = figures.draw_detections(
            image, best.boxes_xyxy_px, best.label, best.score, class_names
        )
        Image.fromarray(picture).save(folder / images.file_name(index, Path(names[index]).stem))
    say_damaged(damage.lines)
    write_json(images.list_files(names, record, damage, boxes=[]), out / "predictions.json")
    say(f"wrote {out / 'predictions.json'}")
    say(f"wrote {folder}, boxes that score at least {config.evaluate.score:g}")


# Robustness -------------------------------------------------------------------------------------


def robustness(
    config: ConfigDict,
    workdir: Path,
    trained: Trained,
    restore_other: Callable[[Path], Trained],
) -> dict[str, Any]:
    """AP under attack by epsilon (see robustness.py): what robustness.json holds.

    Args:
      config: the run's, with its section robustness.
      workdir: where files are written.
      trained: the run.
      restore_other: not used: no attack is carried over from another run.
    """
    del restore_other
    return under_attack.measure(
        workdir,
        trained,
        read_eval_source(config, trained.class_names),
        attacked=_make_objective(
            config, trained.model, trained.predicts, trained.apply, trained.assemble, alone=True
        ),
        make_run_over=partial(
            _make_run_over, config, mesh=trained.mesh, preprocessing=trained.preprocessing
        ),
        evaluate=partial(_evaluation, config),
        settings=images.attack_settings(config),
        score=config.evaluate.score,
    )
