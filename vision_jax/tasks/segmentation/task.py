"""Segmentation as a run's task: its config's data, loss, evaluation and pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.data.pipeline import DamageLog
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
)
from vision_jax.data.segments import PANOPTIC, SEMANTIC
from vision_jax.data.volumes.source import VOLUMES, is_volume
from vision_jax.errors import UserError
from vision_jax.evaluation import make_run_batches
from vision_jax.logging import RunLog, say
from vision_jax.objective import Apply, Objective
from vision_jax.tasks import images
from vision_jax.tasks.api import Trained
from vision_jax.tasks.segmentation import cases, objective, pixels, predictions, segments
from vision_jax.tasks.segmentation import robustness as under_attack
from vision_jax.tasks.segmentation.inference import (
    PredictAll,
    predict_whole,
    predict_window_by_window,
)
from vision_jax.tasks.segmentation.metrics import Tally
from vision_jax.tasks.segmentation.pixels import Evaluation
from vision_jax.tasks.segmentation.segments import SegmentEvaluation

best_is = "highest"
reported = (*pixels.REPORTED, *segments.REPORTED)  # of an evaluation, in metrics.jsonl
curves = (*pixels.CURVES, *segments.CURVES)  # of the former, in curves.png
whole = objective.WHOLE
labels_images = False


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
    if train.targets == SEMANTIC:
        columns = ("label", "name", "pixels to train", "to evaluate")
        log.table("Classes", columns, pixels.class_shares(train, held_out))
    else:
        columns = ("label", "name", "to train", "to evaluate")
        log.table("Segments", columns, segments.class_counts(train, held_out))


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
    prediction = objective.find_prediction(predicts)
    settings = config.evaluate
    targets = config.data.targets
    if targets == SEMANTIC:
        return objective.PixelOutputs(
            apply, assemble, prediction.scores, batch_axis=prediction.batch_axis
        )
    _check_targets(config, predicts)
    return objective.SegmentOutputs(
        *(apply, assemble, tuple(model.image_size), targets, settings.score, settings.overlap),
        batch_axis=prediction.batch_axis,
    )


def _check_targets(config: ConfigDict, predicts: str) -> None:
    if config.data.targets != SEMANTIC and predicts != "mask_set":
        raise UserError(
            f"config.data.targets={config.data.targets}: the model predicts a class of each pixel:"
            " take one that finds masks, such as config.model.variant=eomt_small_640"
        )


def make_evaluate(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: SegmentationSource,
    preprocessing: SegmentationPreprocessing,
) -> Callable[..., Evaluation | SegmentEvaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source."""
    targets, warn_after = config.data.targets, config.evaluate.warn_after
    if targets != SEMANTIC:
        find_all = _make_find_all(config, outputs_fn, mesh, preprocessing)
        return segments.make_evaluate(find_all, source, targets=targets, warn_after=warn_after)
    predict_all = _make_predict_all(config, outputs_fn, mesh, preprocessing)
    make_tally = partial(_make_tally, config, source.class_names)
    make_tally()  # which refuses names of no class
    return pixels.make_evaluate(predict_all, make_tally, source, warn_after=warn_after)


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
) -> PredictAll:
    """Of whole images, or window by window where config.evaluate.window or the view says so."""
    settings = config.evaluate
    if not settings.window and preprocessing.view != "windows":
        run = _make_run_batches(config, outputs_fn, mesh=mesh, preprocessing=preprocessing)
        return predict_whole(run)
    if settings.window and preprocessing.view != "original":
        raise UserError(
            f"config.evaluate.window: images are resized to {preprocessing.image_size} here: set"
            " config.data.view=original, or window to 0"
        )
    stride = settings.stride or -(-settings.window * 2 // 3)
    if settings.window and stride > settings.window:
        raise UserError(
            f"config.evaluate.stride {stride}: windows of {settings.window} pixels would leave"
            " pixels out: use at most that"
        )
    return predict_window_by_window(
        *(outputs_fn, mesh, preprocessing),
        window=settings.window,
        stride=stride,
        batch_size=settings.batch_size,
    )


def make_batches(
    config: ConfigDict, preprocessing: SegmentationPreprocessing
) -> Callable[..., Iterator[Any]]:
    """Makes the batches of an evaluation without windows (see evaluation.MakeBatches)."""
    return partial(
        make_segmentation_eval_batches,
        preprocessing=preprocessing,
        num_threads=config.data.threads,
        unit=jax.device_count(),
    )


def _make_run_batches(config, outputs_fn, *, mesh, preprocessing, batch_size=None):
    batches = make_batches(config, preprocessing)
    batch_size = batch_size or config.evaluate.batch_size
    read = None
    squashed = preprocessing.view in ("squash", "pad", "windows")
    if preprocessing.view == "pad" and isinstance(outputs_fn, objective.Outputs):
        outputs_fn = replace(outputs_fn, padded=preprocessing.image_size[0])
    if squashed and isinstance(outputs_fn, objective.Outputs):
        # All images have one size, masks many: the model is compiled apart from what reads it.
        outputs_fn, read = outputs_fn.of_model, outputs_fn.read_rows
    return make_run_batches(outputs_fn, mesh, batches, batch_size=batch_size, read=read)


# Results ----------------------------------------------------------------------------------------


def write_results(
    config: ConfigDict,
    workdir: Path,
    result: Evaluation | SegmentEvaluation,
    source: SegmentationSource,
    preprocessing: SegmentationPreprocessing,
) -> dict[str, str]:
    """Numbers and pictures of an evaluation; returns {file: what it is}."""
    del preprocessing
    if isinstance(result, SegmentEvaluation):
        return segments.write_results(workdir, result, source, config.evaluate.score)
    return pixels.write_results(workdir, result, source, partial(_best_window, config, source))


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
