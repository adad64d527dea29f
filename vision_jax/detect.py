"""Detection as a run's task: from what its config says to data, loss, evaluation and pictures.

classify.py answers the same calls for classification (setup.Task).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from vision_jax.attacks import norms
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
from vision_jax.errors import UserError, printable, utf8
from vision_jax.evaluate import detection as evaluation
from vision_jax.evaluate import detection_figures as figures
from vision_jax.evaluate import detection_robustness as robust
from vision_jax.evaluate.detection import Detections
from vision_jax.evaluate.robustness import show_epsilon
from vision_jax.evaluate.run import make_run_over
from vision_jax.logging import RunLog, say
from vision_jax.models.families import family_of
from vision_jax.ops import detection_losses
from vision_jax.ops.detection_outputs import sigmoid_detections, softmax_detections
from vision_jax.recipes.objective import Objective
from vision_jax.tasks import classification, detection

if TYPE_CHECKING:
    from vision_jax.setup import Trained

best_metric = "ap"  # what the best checkpoint is best at
# Of an evaluation, in metrics.jsonl.
reported = ("ap", "ap50", "ap75", "ar_100", "mean_iou_top1", "mean_iou_matched")

curves = ("ap", "ap50", "mean_iou_matched")  # of the former, in curves.png

# Of a batch, what the loss of a micro-batch counts over all of its update (steps.make_train_step).
whole = ("target_mask", "mask")

SHORT, LONGEST = 800, 1333  # DETR's sides in pixels
PICTURES = 12  # in predictions.png
LONGEST_STEM = 200  # bytes of a file name in the names of pictures


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
    the weights were used to squares and the config says no other sides.
    """
    data = config.data
    side = (config.model.image_size,) * 2 if config.model.image_size else None
    side = side or arguments.get("image_size")
    if not side and own.get("square") and not (data.short or data.longest):
        side = (own["short"],) * 2
    if side:
        short = longest = int(side[0])
        buckets: tuple[tuple[int, int], ...] = ((short, short),)
    else:
        short = data.short or own.get("short") or SHORT
        longest = data.longest or own.get("longest") or LONGEST
        buckets = default_buckets(short, longest, data.buckets)
    return DetectionPreprocessing(
        short=short,
        longest=longest,
        square=bool(side),
        interpolation=data.interpolation or own.get("interpolation") or "bilinear",
        mean=arguments["mean"],
        std=arguments["std"],
        buckets=buckets,
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
        batch_size=config.batch_size // jax.process_count(),
        preprocessing=preprocessing,
        augmentation=DetectionAugmentation(
            shorts=() if preprocessing.square else data.shorts,
            flip=data.flip,
            crop=data.crop,
            brightness=data.brightness,
            contrast=data.contrast,
            saturation=data.saturation,
        ),
        max_boxes=data.max_boxes,
        seed=config.seed,
        num_threads=data.threads,
        num_workers=data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        first_batch=first_batch,
        max_damaged=data.max_damaged,
        damage_log=damage,
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
    config: ConfigDict, model: Any, apply: classification.Apply, assemble: Callable[..., Any]
) -> Objective:
    """What training lowers: the set loss that the model's head is made for."""
    return detection.make_objective(apply, assemble, set_loss=_make_set_loss(config, model))


def _make_set_loss(config: ConfigDict, model: Any, *, alone: bool = False) -> detection.SetLoss:
    loss = config.loss
    weights = {
        "class_cost": loss.class_cost,
        "l1_cost": loss.l1_cost,
        "giou_cost": loss.giou_cost,
        "class_weight": loss.class_weight,
        "l1_weight": loss.l1_weight,
        "giou_weight": loss.giou_weight,
        "alone": alone,
    }
    if config.data.max_boxes > model.num_queries:
        raise UserError(
            f"config.data.max_boxes {config.data.max_boxes}: the model has {model.num_queries} "
            "queries, and each finds one box at most: lower it"
        )

    def set_loss(outputs, batch):
        targets = (batch["label"], batch["boxes_cxcywh_01"], batch["target_mask"], batch["mask"])
        predicted = (outputs["logits"], outputs["boxes_cxcywh_01"])
        counted = tuple(batch["whole"][name] for name in whole) if "whole" in batch else None
        if family_of(model) == "detr":
            return detection_losses.detr_loss(
                *predicted,
                *targets,
                **weights,
                whole=counted,
                no_object_weight=loss.no_object_weight,
            )
        return detection_losses.sigmoid_detr_loss(
            *predicted,
            *targets,
            **weights,
            whole=counted,
            encoder_logits=outputs["encoder_logits"],
            encoder_boxes_cxcywh_01=outputs["encoder_boxes_cxcywh_01"],
            groups=outputs["logits"].shape[2] // model.num_queries,  # one in evaluation
        )

    return set_loss


def make_outputs(
    config: ConfigDict, model: Any, apply: classification.Apply, assemble: Callable[..., Any]
) -> Callable[..., Mapping[str, jax.Array]]:
    """What evaluation needs of a batch."""
    del config
    return detection.make_outputs(apply, assemble, find=_find_of(model))


def _find_of(model: Any) -> detection.Find:
    return softmax_detections if family_of(model) == "detr" else sigmoid_detections


@dataclass(frozen=True)
class Evaluation:
    """What was found in a whole dataset, and its summary.

    Attributes:
      detections: in pixels of the original images.
      source: the images that could be read.
      summary: see evaluate.detection.summarize.
      damaged: names of images that could not be read and are not in `source`.
      patience: updates after which predictions must have become something.
    """

    detections: Detections
    source: DetectionSource
    summary: dict[str, Any]
    damaged: tuple[str, ...]
    patience: int

    def line(self) -> str:
        """The summary for the screen."""
        text = "  ".join(f"{name} {_number(self.summary[name])}" for name in reported)
        skipped = f"  ({len(self.damaged)} damaged skipped)" if self.damaged else ""
        return f"evaluation on {self.summary['count']} images: {text}{skipped}"

    def lines(self) -> list[str]:
        """The rest of COCO's twelve numbers, and AP of each class."""
        areas = [f"{what}_{area}" for what in ("ap", "ar") for area in evaluation.AREAS[1:]]
        rows = [(name, self.summary[name]) for name in ("ar_1", "ar_10", *areas)]
        rows += [(f"ap of {name}", value) for name, value in self.summary["per_class"].items()]
        width = max(len(name) for name, _ in rows)
        return [f"  {name:{width}}  {_number(value)}" for name, value in rows]

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """Why AP may stay at 0, once there was time to learn."""
        if step < self.patience:
            return []
        name = "eval/mean_iou_matched"
        ious = [record[name] for record in history if name in record and record["step"] < step]
        ious.append(self.summary["mean_iou_matched"])
        return evaluation.diagnose(self.detections, self.source, iou_history=ious)


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
        found, damaged = run_over(source, trainable, frozen, model_state)
        return _evaluation(config, source, found, damaged)

    return evaluate


def _evaluation(config, source, found, damaged) -> Evaluation:
    read = np.zeros(len(source), bool)
    read[found["index"]] = True
    seen = source if read.all() else part_of(source, read)
    found["index"] = np.cumsum(read)[found["index"]].astype(np.int32) - 1  # rows of `seen`
    detections = evaluation.collect_detections([found])
    summary = evaluation.summarize(detections, seen)
    return Evaluation(detections, seen, summary, damaged, config.evaluate.patience)


def _make_run_over(config, outputs_fn, mesh, preprocessing, batch_size=None):
    make_batches = partial(
        make_detection_eval_batches,
        preprocessing=preprocessing,
        max_boxes=config.data.max_boxes,
        num_threads=config.data.threads,
    )
    batch_size = batch_size or config.evaluate.batch_size
    return make_run_over(outputs_fn, mesh, make_batches, batch_size=batch_size)


# Results ----------------------------------------------------------------------------------------


def write_results(
    config: ConfigDict,
    workdir: Path,
    result: Evaluation,
    source: DetectionSource,
    preprocessing: DetectionPreprocessing,
) -> dict[str, str]:
    """Numbers, COCO results and pictures of an evaluation; returns {file: what it is}."""
    del source, preprocessing
    detections, seen, score = result.detections, result.source, config.evaluate.score
    names = seen.class_names
    write_json(result.summary, workdir / "evaluation.json")
    evaluation.write_results(workdir / "results.json", detections, seen)
    precision, _ = evaluation.coco_curves(detections, seen)
    figures.draw_precision_recall(precision, names, workdir / "precision_recall.png")
    matrix = evaluation.confusion_matrix(detections, seen, score=score)
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


# Robustness -------------------------------------------------------------------------------------


def robustness(
    config: ConfigDict,
    workdir: Path,
    trained: "Trained",
    restore_other: Callable[[Path], "Trained"],
) -> dict[str, Any]:
    """AP under attack by epsilon: lines on the screen, robustness.json and robustness.png.

    Attacks raise the set loss of each image. The matching is made anew at each step; no gradient
    passes through it. One compilation an attack and canvas, whatever the epsilons.

    Args:
      config: the run's, with its section robustness.
      workdir: where files are written.
      trained: the run.
      restore_other: not used: no attack is carried over from another run.

    Returns:
      What robustness.json holds.

    Raises:
      UserError: an unknown attack, or bad input.
    """
    del restore_other
    settings = config.robustness
    norm, epsilons = settings.norm, sorted(settings.epsilons)
    model, mesh, preprocessing = trained.model, trained.mesh, trained.description.preprocessing
    class_names = trained.description.class_names
    source = read_eval_source(config, class_names)
    count = min(settings.images or len(source), len(source))
    kept = np.zeros(len(source), bool)
    kept[np.linspace(0, len(source) - 1, count).astype(int)] = True
    source = part_of(source, kept)
    objective = detection.make_objective(
        trained.apply, trained.assemble, set_loss=_make_set_loss(config, model, alone=True)
    )
    trainable, frozen, model_state = trained.arguments

    def make_attacked(attack):
        return detection.make_attacked_outputs(
            objective, find=_find_of(model), attack=attack, seed=config.seed
        )

    def make_measure(attack):
        attacked = make_attacked(attack)

        def outputs_fn(*arguments):  # whole images stay on the device
            outputs = dict(attacked(*arguments))
            change = outputs.pop("attacked") - outputs.pop("image")
            return {**outputs, "size": norms.size(change, norm).reshape(-1)}

        run_over = _make_run_over(config, outputs_fn, mesh, preprocessing, settings.batch_size)

        def measure(name: str, epsilon: float) -> dict[str, Any]:
            state = (model_state, np.float32(epsilon), source.rows.astype(np.int32))
            found, damaged = run_over(source, trainable, frozen, state)
            summary = _evaluation(config, source, found, damaged).summary
            figures_of = {name: summary[name] for name in ("ap", "ap50", "ap75", "count")}
            if not jax.process_index():
                say(robust.line(name, figures_of))
            return figures_of | {"epsilon": epsilon, "largest": float(found["size"].max())}

        return measure

    attacks = {
        name: robust.make_attack(name, norm=norm, steps=settings.steps, restarts=settings.restarts)
        for name in settings.attacks
    }
    clean = make_measure(robust.no_attack)("clean", 0.0)
    record: dict[str, Any] = {"images": clean["count"], "norm": norm, "clean": clean}
    record["attacks"] = {
        name: [measure(f"{name} {show_epsilon(e, norm)}", e) for e in epsilons]
        for name, measure in ((name, make_measure(attack)) for name, attack in attacks.items())
    }
    pictures = []
    if attacks and epsilons:
        pictures = _attacked_pictures(
            config, make_attacked(attacks[settings.attacks[-1]]), trained.arguments, source, mesh,
            preprocessing, epsilons[-1],
        )  # fmt: skip
    if jax.process_index() == 0:
        write_json(record, workdir / "robustness.json")
        robust.draw_robustness(
            record, pictures, class_names, workdir / "robustness.png", score=config.evaluate.score
        )
        say(f"wrote {workdir / 'robustness.json'}")
        say(f"wrote {workdir / 'robustness.png'}")
    return record


def _attacked_pictures(config, attacked, arguments, source, mesh, preprocessing, epsilon):
    """Of some images what is found before and after, with boxes in pixels of what the model sees.

    [(outputs of the plain image, outputs of the attacked one)], each of one image: "image" and
    "attacked" f32[h, w, C], "score" f32[N], "label" i32[N], "boxes_xyxy_px" f32[N, 4].
    """

    def outputs_fn(*arguments):
        *before, batch = arguments
        return {
            **attacked(*before, {**batch, "original_size": batch["size"]}),
            "size": batch["size"],
        }

    run_over = _make_run_over(config, outputs_fn, mesh, preprocessing, 1)
    trainable, frozen, model_state = arguments
    pairs = []
    for row in np.unique(np.linspace(0, len(source) - 1, robust.PICTURES).astype(int)):
        one = part_of(source, np.arange(len(source)) == row)
        pair = []
        for size in (0.0, epsilon):
            state = (model_state, np.float32(size), one.rows.astype(np.int32))
            try:
                found, _ = run_over(one, trainable, frozen, state)
            except UserError:
                break  # it is damaged
            height, width = found["size"][0]
            pair.append({name: array[0] for name, array in found.items()})
            for name in ("image", "attacked"):
                pair[-1][name] = pair[-1][name][:height, :width]
        else:
            pairs.append(pair)
    return pairs


def predict(
    config: ConfigDict,
    names: Sequence[str],
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    arguments: tuple[Any, Any, Any],
    mesh: Mesh,
    preprocessing: DetectionPreprocessing,
    class_names: Sequence[str],
    out: Path,
) -> None:
    """Boxes of each file: drawn into OUT/predictions/NAME.png, and all in OUT/predictions.json.

    Args:
      config: the run's.
      names: of image files.
      outputs_fn: the model (see `make_outputs`).
      arguments: what `outputs_fn` takes before the batch.
      mesh: of the devices.
      preprocessing: of the images.
      class_names: by label.
      out: where to write.

    Raises:
      UserError: none of the files can be read.
    """
    source = images_alone(names, class_names)
    found, damaged = _make_run_over(config, outputs_fn, mesh, preprocessing)(source, *arguments)
    if jax.process_index():
        return
    every = evaluation.collect_detections([found])
    every = every[every.score >= config.evaluate.score]
    folder = out / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    width = max(len(printable(name)) for name in names)
    record: list[dict[str, Any]] = []
    for index in found["index"]:
        rows = np.flatnonzero(every.index == index)
        best = every[rows[np.argsort(-every.score[rows], kind="stable")]]
        boxes = [
            {"name": utf8(class_names[label]), "label": label, "score": score, "box_xyxy_px": box}
            for label, score, box in zip(
                best.label.tolist(), best.score.tolist(), best.boxes_xyxy_px.tolist(), strict=True
            )
        ]
        record.append({"file": utf8(names[index]), "boxes": boxes})
        text = "  ".join(f"{box['name']} {box['score']:.2f}" for box in boxes[:5])
        more = f"  and {len(boxes) - 5} more" if len(boxes) > 5 else ""
        say(f"{printable(names[index]):{width}}  {text or 'nothing'}{more}")
        image = source[int(index)]["image"]
        picture = figures.draw_detections(
            image, best.boxes_xyxy_px, best.label, best.score, class_names
        )
        stem = re.sub(r"[^\w.-]", "_", utf8(Path(names[index]).stem)).encode()[:LONGEST_STEM]
        name = f"{index:04d}_{stem.decode(errors='ignore')}.png"
        Image.fromarray(picture).save(folder / name)
    for name in damaged:
        say(f"skipped a damaged image: {name}")
    unread = sorted({*range(len(names))} - {*map(int, found["index"])})
    record += [{"file": utf8(names[i]), "boxes": [], "error": "can't be read"} for i in unread]
    write_json(record, out / "predictions.json")
    say(f"wrote {out / 'predictions.json'}")
    say(f"wrote {folder}, boxes that score at least {config.evaluate.score:g}")
