"""Segmentation as a run's task: its config's data, loss, evaluation and pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax import sharding, steps
from vision_jax.config import write_json
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.masks import IGNORED
from vision_jax.data.pipeline import Damaged, DamageLog
from vision_jax.data.segmentation import (
    SegmentationSource,
    images_to_segment,
    read_segmentation_source,
    segmentation_subset,
    split_segmentation_source,
)
from vision_jax.data.segmentation_pipeline import (
    make_segmentation_eval_batches,
    make_segmentation_train_iterator,
)
from vision_jax.data.segmentation_transforms import (
    SegmentationAugmentation,
    SegmentationPreprocessing,
    segmentation_eval_transform,
)
from vision_jax.data.segments import PANOPTIC, SEMANTIC
from vision_jax.data.volumes.source import VOLUMES, VolumeReader, is_volume
from vision_jax.errors import UserError, printable
from vision_jax.evaluation import make_run_batches, none_read
from vision_jax.logging import RunLog, say
from vision_jax.objective import Apply, Objective
from vision_jax.tasks import images
from vision_jax.tasks.api import Trained
from vision_jax.tasks.segmentation import cases, objective, predictions, segments
from vision_jax.tasks.segmentation import robustness as under_attack
from vision_jax.tasks.segmentation.cases import CaseTally
from vision_jax.tasks.segmentation.metrics import Tally
from vision_jax.tasks.segmentation.predictions import Predicted
from vision_jax.tasks.segmentation.segments import SegmentEvaluation
from vision_jax.tasks.segmentation.windows import predict_by_spread_windows, predict_by_windows

best_is = "highest"
# Of an evaluation, in metrics.jsonl.
reported = (
    "miou",
    "pixel_accuracy",
    "mean_dice",
    "boundary_iou",
    "miou_foreground",
    "foreground_iou",
    "objects",
    "objects_true",
    *segments.REPORTED,
)

# Of the former, in curves.png.
curves = ("miou", "pixel_accuracy", "boundary_iou", *segments.CURVES)

whole = objective.WHOLE
labels_images = False

PICTURES = 6  # in predictions.png
MOST_MASKS = 200  # that are read to tell the classes' shares of pixels


def best_metric(config: ConfigDict) -> str:
    """Of an evaluation's summary, what the best checkpoint is best at: by config.data.targets."""
    return segments.BEST.get(config.data.targets, "miou")


# Data -------------------------------------------------------------------------------------------


def read_sources(config: ConfigDict) -> tuple[SegmentationSource, SegmentationSource]:
    """The training and the evaluation data, with the same classes."""
    data = config.data
    train = _read(config, data.train, data.masks, data.images)
    _check_counts(config, train)
    if data.eval:
        return _subset(config, train), read_eval_source(config, train.class_names)
    train, held_out = split_segmentation_source(train, data.holdout, config.seed)
    return _subset(config, train), held_out


def _read(config, spec, masks, images, class_names=None) -> SegmentationSource:
    return read_segmentation_source(
        spec,
        masks,
        images=images,
        classes=config.data.classes,
        reduce_zero=config.data.reduce_zero,
        class_names=class_names,
        targets=config.data.targets,
        stuff=config.data.stuff,
    )


def _check_counts(config: ConfigDict, train: SegmentationSource) -> None:
    """Every image's segments must have room in a batch."""
    most = config.data.max_segments
    if config.data.targets == SEMANTIC:
        return
    for i in range(len(train)):
        count = int(train.segment_counts(i).sum())
        if count > most:
            raise UserError(
                f"{train.example_name(i)}: {count} segments, and config.data.max_segments is"
                f" {most}: raise it, and the model's num_queries with it"
            )


def _subset(config: ConfigDict, train: SegmentationSource) -> SegmentationSource:
    count = config.data.subset
    return segmentation_subset(train, count, config.seed) if count else train


def read_eval_source(config: ConfigDict, class_names: tuple[str, ...]) -> SegmentationSource:
    """The evaluation data alone, for a finished run."""
    data = config.data
    if data.eval:
        images = data.eval_images or data.images
        return _read(config, data.eval, data.eval_masks, images, class_names)
    train = _read(config, data.train, data.masks, data.images, class_names)
    return split_segmentation_source(train, data.holdout, config.seed)[1]


def announce(
    log: RunLog, workdir: Path, train: SegmentationSource, held_out: SegmentationSource
) -> None:
    """Shows the classes' shares of the pixels, of some masks where there are many.

    Of segments it shows how many each class has.
    """
    del workdir
    if train.targets != SEMANTIC:
        found = [
            np.sum([source.segment_counts(i) for i in range(len(source))], axis=0)
            for source in (train, held_out)
        ]
        rows = [
            (str(label), name, *(f"{count[label]:,}" for count in found))
            for label, name in enumerate(train.class_names)
        ]
        log.table("Segments", ("label", "name", "to train", "to evaluate"), rows)
        return
    counts = [_count_pixels(source) for source in (train, held_out)]
    rows = [
        (str(label), name, *(f"{count[label] / max(count[:-1].sum(), 1):.2%}" for count in counts))
        for label, name in enumerate(train.class_names)
    ]
    shares = [f"{count[-1] / max(count.sum(), 1):.2%}" for count in counts]
    rows.append((str(IGNORED), "(ignored, of all pixels)", *shares))
    log.table("Classes", ("label", "name", "pixels to train", "to evaluate"), rows)


def _count_pixels(source: SegmentationSource) -> np.ndarray:
    """i64[K + 1]: pixels of each class and of none, in up to MOST_MASKS masks.

    Raises:
      UserError: a mask with a value that is no class, or not one pixel of a class.
    """
    classes = len(source.class_names)
    counts = np.zeros(classes + 1, np.int64)
    for i in np.unique(np.linspace(0, len(source) - 1, MOST_MASKS).astype(int)):
        try:
            found = np.bincount(source.mask(int(i)).reshape(-1), minlength=IGNORED + 1)
        except DamagedImageError:
            continue  # it is skipped, counted and named when its turn comes
        counts += np.append(found[:classes], found[IGNORED])
    if counts[-1] and not counts[:-1].any():
        raise UserError(
            f"{source.name}: not one pixel of its masks has a class, all are ignored: check the"
            " table of classes"
        )
    return counts


def make_preprocessing(
    config: ConfigDict, own: Mapping[str, Any], arguments: Mapping[str, Any]
) -> SegmentationPreprocessing | None:
    """How images are prepared: as the config says, else as the weights (`own`) were used to.

    None where nothing says how large training's crops are.
    """
    data = config.data
    side = config.model.image_size
    size = (side, side) if side else arguments.get("image_size") or own.get("image_size")
    if not size:
        return None
    return SegmentationPreprocessing(
        image_size=tuple(size),
        mean=arguments["mean"],
        std=arguments["std"],
        interpolation=data.interpolation or own.get("interpolation") or "bilinear",
        view=data.view or own.get("view") or "original",
    )


def load_preprocessing(record: Mapping[str, Any]) -> SegmentationPreprocessing:
    """From its fields in model.json."""
    return SegmentationPreprocessing(**record)


def training_data(
    config: ConfigDict,
    source: SegmentationSource,
    preprocessing: SegmentationPreprocessing,
    damage: DamageLog,
    first_batch: int = 0,
) -> grain.DatasetIterator:
    """Endless batches of this process, from `first_batch` on."""
    data = config.data
    return make_segmentation_train_iterator(
        source,
        preprocessing=preprocessing,
        augmentation=SegmentationAugmentation(
            scale=data.scale,
            flip=data.flip,
            turn=data.turn,
            brightness=data.brightness,
            contrast=data.contrast,
            saturation=data.saturation,
        ),
        **images.stream_arguments(config, damage, first_batch),
        most_segments=data.max_segments,
    )


def batch_shapes(config: ConfigDict, preprocessing: SegmentationPreprocessing) -> dict[str, Any]:
    """ShapeDtypeStructs of a training batch, over all processes."""
    size, crop = config.batch_size, preprocessing.image_size
    label = {"label": jax.ShapeDtypeStruct((size, *crop), np.uint8)}
    if config.data.targets != SEMANTIC:
        most = config.data.max_segments
        label = {
            "label": jax.ShapeDtypeStruct((size, most), np.int32),
            "masks": jax.ShapeDtypeStruct((size, most, *crop), np.uint8),
        }
    return {
        "image": jax.ShapeDtypeStruct((size, *crop, len(preprocessing.mean)), np.uint8),
        **label,
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
    prediction = objective.find_prediction(predicts)
    _check_targets(config, predicts)
    loss = config.loss
    made = prediction.make_loss(
        model,
        alone=alone,
        pixel_weight=loss.pixel_weight,
        dice_weight=loss.dice_weight,
        focal_gamma=loss.focal_gamma,
        class_weights=loss.class_weights,
        balance=loss.balance,
        auxiliary_weight=loss.auxiliary_weight,
        class_weight=loss.class_weight,
        mask_weight=loss.mask_weight,
        mask_dice_weight=loss.mask_dice_weight,
        no_object_weight=loss.no_object_weight,
        points=loss.points,
        most_segments=0 if config.data.targets == SEMANTIC else config.data.max_segments,
    )
    return objective.make_objective(apply, assemble, loss=made, draws=prediction.draws)


def make_outputs(
    config: ConfigDict, model: Any, predicts: str, apply: Apply, assemble: Callable[..., Any]
) -> Callable[..., Mapping[str, jax.Array]]:
    """What evaluation needs of a batch."""
    settings = config.evaluate
    targets = config.data.targets
    if targets == SEMANTIC:
        return objective.PixelOutputs(apply, assemble, objective.find_prediction(predicts).scores)
    _check_targets(config, predicts)
    return objective.SegmentOutputs(
        *(apply, assemble, tuple(model.image_size), targets, settings.score, settings.overlap)
    )


def _check_targets(config: ConfigDict, predicts: str) -> None:
    if config.data.targets != SEMANTIC and predicts != "mask_set":
        raise UserError(
            f"config.data.targets={config.data.targets}: the model predicts a class of each pixel:"
            " take one that finds masks, such as config.model.variant=eomt_small_640"
        )


@dataclass(frozen=True)
class Evaluation:
    """What was found in a whole dataset.

    Attributes:
      summary: see metrics.Tally.summarize.
      confusion: i64[K, K], row = label, column = prediction, in pixels.
      examples: some images with label and prediction, for figures.
      class_names: K names.
      damaged: lines, with the reason, of images that could not be read.
      warn_after: updates after which constant predictions are warned of.
      cases: a report of each volume, where images are slices of volumes.
    """

    summary: dict[str, Any]
    confusion: np.ndarray
    examples: tuple[dict[str, Any], ...]
    class_names: tuple[str, ...]
    damaged: tuple[str, ...]
    warn_after: int
    cases: tuple[dict[str, Any], ...] = ()

    def line(self) -> str:
        """The summary for the screen."""
        known = [name for name in reported if self.summary.get(name) is not None]
        text = "  ".join(f"{name} {_number(self.summary[name])}" for name in known)
        there, all_of_them = self.summary["classes"]
        skipped = f"  ({len(self.damaged)} damaged skipped)" if self.damaged else ""
        return (
            f"evaluation on {self.summary['count']} images: {text}  (means of {there} of"
            f" {all_of_them} classes){skipped}"
        )

    def lines(self) -> list[str]:
        """Each class."""
        width = max(len(printable(name)) for name in self.summary["per_class"])
        return [
            f"  {printable(name):{width}}  iou {_number(found['iou'])}"
            f"  dice {_number(found['dice'])}  boundary iou {_number(found['boundary_iou'])}"
            f"  {found['pixels']:,} pixels"
            for name, found in self.summary["per_class"].items()
        ]

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """One class for all pixels, once there was time to learn more."""
        del history
        if step < self.warn_after or (self.confusion.sum(1) > 0).sum() < 2:
            return []
        found = np.flatnonzero(self.confusion.sum(0))
        if len(found) > 1:
            return []
        return [
            f"after {step} updates every pixel is predicted as {self.class_names[found[0]]!r}: if"
            " it is the most frequent class, weigh classes by config.loss.balance=frequency or add"
            " config.loss.dice_weight=1; else lower config.optim.lr"
        ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def make_evaluate(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: SegmentationSource,
    preprocessing: SegmentationPreprocessing,
) -> Callable[..., Evaluation | SegmentEvaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source."""
    targets = config.data.targets
    if targets != SEMANTIC:
        find_all = _make_find_all(config, outputs_fn, mesh, preprocessing)
        warn_after = config.evaluate.warn_after
        return segments.make_evaluate(find_all, source, targets=targets, warn_after=warn_after)
    predict_all = _make_predict_all(config, outputs_fn, mesh, preprocessing)
    _make_tally(config, source.class_names)  # which refuses names of no class
    shown = set(np.unique(np.linspace(0, len(source) - 1, PICTURES).astype(int)).tolist())

    def evaluate(*arguments: Any) -> Evaluation:
        damage, tally = DamageLog(), _make_tally(config, source.class_names)
        examples = []
        volumes = CaseTally(source) if isinstance(source.reader, VolumeReader) else None
        for row, prediction, label in predict_all(source, damage, *arguments):
            tally.add(prediction, label)
            if volumes is not None:
                volumes.add(row, prediction, label)
            if row in shown:
                examples.append({"row": row, "label": label, "prediction": prediction})
        if not tally.images:
            raise none_read(source, damage)
        return Evaluation(
            tally.summarize(),
            tally.confusion,
            tuple(sorted(examples, key=lambda one: one["row"])),
            source.class_names,
            damage.lines,
            config.evaluate.warn_after,
            () if volumes is None else volumes.reports(),
        )

    return evaluate


def _make_find_all(config, outputs_fn, mesh, preprocessing, least=0.0):
    if config.evaluate.window or preprocessing.view == "windows":
        raise UserError(
            f"config.data.targets={config.data.targets}: segments are found in whole images: set"
            " config.data.view=squash, and config.evaluate.window=0"
        )
    run = _make_run_batches(config, outputs_fn, mesh=mesh, preprocessing=preprocessing)
    return segments.make_find_all(run, config.data.targets, least)


def _make_tally(config: ConfigDict, class_names: tuple[str, ...]) -> Tally:
    settings = config.evaluate
    return Tally(
        class_names,
        background=settings.background,
        objects=settings.objects,
        least_pixels=settings.least_pixels,
        boundaries=settings.boundaries,
    )


def _make_predict_all(
    config: ConfigDict, outputs_fn: Any, mesh: Mesh, preprocessing: SegmentationPreprocessing
) -> Callable[..., Iterator[Predicted]]:
    """A function (source, damage log, trainable, frozen, model_state) -> predictions, one by one.

    Of whole images, or window by window where config.evaluate.window or the view says so.
    """
    if config.evaluate.window or preprocessing.view == "windows":
        return _make_predict_by_windows(config, outputs_fn, mesh, preprocessing)
    run = _make_run_batches(config, outputs_fn, mesh=mesh, preprocessing=preprocessing)

    def predict_all(source, damage, *arguments) -> Iterator[Predicted]:
        for batch in run(source, damage, *arguments):
            for place in np.flatnonzero(batch["mask"]):
                yield (
                    int(batch["index"][place]),
                    batch["prediction"][place],
                    batch["label"][place],
                )

    return predict_all


def _make_run_batches(config, outputs_fn, *, mesh, preprocessing, batch_size=None):
    make_batches = partial(
        make_segmentation_eval_batches,
        preprocessing=preprocessing,
        num_threads=config.data.threads,
        unit=jax.device_count(),
    )
    batch_size = batch_size or config.evaluate.batch_size
    read = None
    squashed = preprocessing.view in ("squash", "pad", "windows")
    if preprocessing.view == "pad" and isinstance(outputs_fn, objective.Outputs):
        outputs_fn = replace(outputs_fn, padded=preprocessing.image_size[0])
    if squashed and isinstance(outputs_fn, objective.Outputs):
        # All images have one size, masks many: the model is compiled apart from what reads it.
        outputs_fn, read = outputs_fn.of_model, outputs_fn.read
    return make_run_batches(outputs_fn, mesh, make_batches, batch_size=batch_size, read=read)


def _make_predict_by_windows(config, outputs_fn, mesh, preprocessing):
    settings = config.evaluate
    spread = preprocessing.view == "windows" and not settings.window
    if preprocessing.view != "original" and not spread:
        raise UserError(
            f"config.evaluate.window: images are resized to {preprocessing.image_size} here: set"
            " config.data.view=original, or window to 0"
        )
    stride = settings.stride or -(-settings.window * 2 // 3)
    if not spread and stride > settings.window:
        raise UserError(
            f"config.evaluate.stride {stride}: windows of {settings.window} pixels would leave"
            " pixels out: use at most that"
        )
    devices = jax.device_count()
    at_once = -(-settings.batch_size // devices) * devices
    step = steps.make_eval_step(outputs_fn, shardings=sharding.replicated(mesh))
    place = sharding.make_batch_placer(mesh)
    share = at_once // jax.process_count()
    own = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    fill = [round(255 * value) for value in preprocessing.mean]

    def predict_all(source, damage, *arguments) -> Iterator[Predicted]:
        def scores_of(windows):
            return jax.device_get(step(*arguments, place({"image": windows[own]}))["scores"])

        whole = replace(preprocessing, view="short" if spread else "original")
        for row in range(len(source)):
            try:
                example = source[row]
                image = segmentation_eval_transform(example["image"], whole)
            except DamagedImageError as error:
                damage.record(0, [Damaged(row, source.example_name(row), str(error))])
                continue
            damage.record(1, [])
            if spread:
                prediction = predict_by_spread_windows(
                    image, scores_of, at_once=at_once, size=example["image"].shape[:2]
                )
            else:
                prediction = predict_by_windows(
                    image,
                    scores_of,
                    window=settings.window,
                    stride=stride,
                    at_once=at_once,
                    fill=fill,
                )
            yield row, prediction, example["mask"]

    return predict_all


# Results ----------------------------------------------------------------------------------------


def write_results(
    config: ConfigDict,
    workdir: Path,
    result: Evaluation | SegmentEvaluation,
    source: SegmentationSource,
    preprocessing: SegmentationPreprocessing,
) -> dict[str, str]:
    """Numbers and pictures of an evaluation; returns {file: what it is}."""
    from vision_jax.figures import draw_confusion  # matplotlib, only where something is drawn
    from vision_jax.tasks.segmentation import figures

    del preprocessing
    if isinstance(result, SegmentEvaluation):
        return segments.write_results(workdir, result, source, config.evaluate.score)
    names, files = source.class_names, {}
    if result.cases:
        for report in result.cases:
            report["pictures"] = [source.reader.read(place) for *_, place in report["strip"]]
        cases.write_cases(result.cases, workdir / "cases")
        files["cases"] = "each volume: ml, its largest part and slices; not a diagnosis"
        if len(names) == 2:
            result.summary["best_window"] = _best_window(config, source)
    write_json(result.summary, workdir / "evaluation.json")
    draw_confusion(
        result.confusion,
        names,
        workdir / "confusion.png",
        title=f"{result.summary['pixels']:,} pixels, {result.summary['pixel_accuracy']:.2%} right",
    )
    examples = [
        {**one, "image": source[one["row"]]["image"], "name": source.example_name(one["row"])}
        for one in result.examples
    ]
    figures.draw_segmentation_grid(examples, names, workdir / "predictions.png")
    return {
        "evaluation.json": "all numbers of the last evaluation",
        "confusion.png": "which class was taken for which, in pixels",
        "predictions.png": "images with true and predicted masks, and where they differ",
    } | files


def _best_window(config: ConfigDict, source: SegmentationSource) -> dict[str, Any]:
    """What intensities alone reach: the best window of the training slices, on these."""
    low, high = cases.best_window(cases.grey_counts(read_sources(config)[0]))
    iou = cases.window_iou(cases.grey_counts(source), low, high)
    say(
        f"for comparison, the window of grey levels {low} to {high}, the best one on the training"
        f" slices: iou {iou:.4f} of {source.class_names[1]!r}"
    )
    return {"low": low, "high": high, "iou": iou}


# Prediction -------------------------------------------------------------------------------------


def predict(config: ConfigDict, names: Sequence[str], trained: Trained, out: Path) -> None:
    """A mask of each file: OUT/masks/NAME.png, drawn in OUT/overlays/, and OUT/predictions.json.

    Masks are palette PNGs of the image's own size, whose values are class indices. Where the model
    was trained on volumes, they are OUT/masks/NAME.nii.gz (or .tif), and OUT/cases/ has reports.

    Args:
      config: the run's.
      names: of image files, or of volumes.
      trained: the model.
      out: where to write.

    Raises:
      UserError: none of the files can be read.
    """
    outputs_fn = make_outputs(
        config, trained.model, trained.predicts, trained.apply, trained.assemble
    )
    if config.data.targets != SEMANTIC:
        _predict_segments(config, names, trained, outputs_fn, out)
        return
    run = _make_predict_all(config, outputs_fn, trained.mesh, trained.preprocessing)

    def predict_all(source, damage):
        return run(source, damage, *trained.arguments)

    class_names = trained.class_names
    on_volumes = config.data.train.startswith(VOLUMES)
    if on_volumes or any(is_volume(Path(name)) for name in names):
        predictions.predict_volumes(names, class_names, predict_all, out, config.data.train)
        return
    counter = make_counter(config, class_names)
    predictions.predict_images(names, class_names, predict_all, out, counter)


def make_counter(
    config: ConfigDict, class_names: tuple[str, ...]
) -> Callable[[np.ndarray], int] | None:
    """Counts the objects of a mask u8[H, W]; None where config.evaluate.objects is empty."""
    tally = _make_tally(config, class_names)
    return tally.count_objects if config.evaluate.objects else None


def _predict_segments(
    config: ConfigDict, names: Sequence[str], trained: Trained, outputs_fn: Any, out: Path
) -> None:
    find_all = _make_find_all(
        config, outputs_fn, trained.mesh, trained.preprocessing, config.evaluate.score
    )
    stuff = _stuff_of(config, trained.class_names)
    source = images_to_segment(names, trained.class_names, stuff)
    segments.predict(find_all, source, trained.arguments, out, config.data.targets)


def _stuff_of(config: ConfigDict, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Classes without instances, as the config says, or else the data."""
    if config.data.targets != PANOPTIC:
        return ()
    if config.data.stuff:
        return tuple(name for name in class_names if name in config.data.stuff)
    try:
        return read_eval_source(config, class_names).stuff
    except UserError as error:
        raise UserError(
            "config.data.stuff: name the classes without instances, which the data would say if"
            f" they could be read: {error}"
        ) from error


# Robustness -------------------------------------------------------------------------------------


def robustness(
    config: ConfigDict,
    workdir: Path,
    trained: Trained,
    restore_other: Callable[[Path], Trained],
) -> dict[str, Any]:
    """mIoU under attack by epsilon (see robustness.py): what robustness.json holds.

    Args:
      config: the run's, with its section robustness.
      workdir: where files are written.
      trained: the run.
      restore_other: not used: no attack is carried over from another run.
    """
    del restore_other
    if config.data.targets != SEMANTIC:
        raise UserError(
            f"config.data.targets={config.data.targets}: robustness is of classes of pixels alone"
        )
    if config.evaluate.window:
        raise UserError(
            "config.evaluate.window: attacks are on whole images, and windows see parts of them:"
            " set it to 0 for robustness"
        )
    preprocessing = trained.preprocessing
    if preprocessing.view == "pad":
        preprocessing = replace(preprocessing, view="squash")
    return under_attack.measure(
        workdir,
        trained,
        read_eval_source(config, trained.class_names),
        attacked=_make_objective(
            config, trained.model, trained.predicts, trained.apply, trained.assemble, alone=True
        ),
        make_run_batches=partial(
            _make_run_batches, config, mesh=trained.mesh, preprocessing=preprocessing
        ),
        make_tally=partial(_make_tally, config, trained.class_names),
        settings=images.attack_settings(config),
    )
