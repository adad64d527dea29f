"""Self-distillation as a run's task: images without labels, the loss, evaluation and pictures."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grain
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import Source
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError
from vision_jax.objective import Apply, Objective
from vision_jax.ops.multi_crop import Crop, most_masked
from vision_jax.tasks import features, images, unlabelled
from vision_jax.tasks.self_distillation import metrics, objective

best_is = "highest"
reported = features.REPORTED  # of an evaluation, in metrics.jsonl
curves = features.OF_LABELS  # of the former, in curves.png
whole = ()  # of a batch, what losses count over a whole update: each image's is its own
labels_images = False


# Data -------------------------------------------------------------------------------------------


read_sources = unlabelled.read_sources
read_eval_source = unlabelled.read_eval_source
announce = unlabelled.announce
make_preprocessing = images.make_preprocessing
load_preprocessing = images.load_preprocessing


def best_metric(config: ConfigDict) -> str:
    """Of an evaluation's summary, what the best one is best at; None without labels."""
    del config
    return "knn"


def training_data(
    config: ConfigDict,
    source: Source,
    preprocessing: Preprocessing,
    damage: DamageLog,
    first_batch: int = 0,
) -> grain.DatasetIterator:
    """See features.training_squares."""
    side = config.dino.view_size
    return features.training_squares(config, source, preprocessing, damage, first_batch, side=side)


def batch_shapes(config: ConfigDict, preprocessing: Preprocessing) -> dict[str, Any]:
    """ShapeDtypeStructs of a training batch, over all processes."""
    return features.shapes_of_squares(config, preprocessing, side=config.dino.view_size)


# Loss and evaluation ----------------------------------------------------------------------------


def make_objective(
    config: ConfigDict,
    model: Any,
    predicts: str,
    apply: Apply,
    assemble: Callable[..., Any],
    mesh: Mesh,
) -> Objective:
    """What training minimizes: how far the student is from the teacher's choice of prototypes.

    Raises:
      UserError: a model that is no ViT, crops that don't fit it, or a recipe that needs labels.
    """
    del mesh
    unlabelled.check_recipes(config)
    settings = _settings(config, model, predicts)
    watch = metrics.Watch(
        prototypes=model.prototypes,
        warn_after=config.evaluate.warn_after,
        warmup_steps=config.optim.warmup_steps,
        student_temperature=config.dino.student_temperature,
        teacher_temperature=config.dino.teacher_temperature[1],
        centering=config.dino.centering,
        center_momentum=config.dino.center_momentum,
        stop=config.dino.stop,
    )
    return objective.make_objective(apply, assemble, settings, watch)


def _settings(config: ConfigDict, model: Any, predicts: str) -> objective.Settings:
    settings = config.dino
    _check(config, model, predicts)
    global_crops = Crop(
        size=model.image_size[0],
        scale=settings.global_scale,
        blurred=(1.0, 0.1),
        solarized=(0.0, settings.solarize),
        sigmas=settings.blur,
        jitter=settings.jitter,
    )
    local_crops = replace(
        global_crops,
        size=settings.local_size,
        scale=settings.local_scale,
        blurred=(0.5,) * settings.local_crops,
        solarized=(0.0,) * settings.local_crops,
    )
    return objective.Settings(
        global_crops=global_crops,
        local_crops=local_crops if settings.local_crops else None,
        grid=model.grid,
        student_temperature=settings.student_temperature,
        teacher_temperature=settings.teacher_temperature,
        temperature_steps=settings.temperature_steps,
        momentum=(config.optim.ema_decay, settings.final_momentum),
        total_steps=config.total_steps,
        centering=settings.centering,
        center_momentum=settings.center_momentum,
        frozen_steps=settings.frozen_steps,
        patch_weight=settings.patch_weight,
        masked_images=settings.masked_images,
        mask_ratio=settings.mask_ratio,
        koleo_weight=settings.koleo_weight,
    )


def _check(config: ConfigDict, model: Any, predicts: str) -> None:
    settings = config.dino
    if predicts != "prototypes":
        raise UserError(
            "config.task self_distillation takes a ViT, and this model is a "
            f"{type(model).__name__}: set config.model.variant to s/16, say, or "
            "config.model.weights to a ViT's"
        )
    if model.image_size[0] != model.image_size[1]:
        raise UserError(f"global crops are square, and the model takes {model.image_size} pixels")
    if settings.local_crops and settings.local_size % model.patch_size:
        raise UserError(
            f"config.dino.local_size {settings.local_size}: take a multiple of the patch, "
            f"{model.patch_size}"
        )
    if not config.optim.ema_decay:
        raise UserError("config.optim.ema_decay is the teacher's momentum: set it to 0.996, say")
    if settings.jitter and model.in_channels != 3:
        raise UserError(
            f"config.dino.jitter changes colors, and the model takes {model.in_channels} channels: "
            "set it to 0"
        )
    if settings.patch_weight and not most_masked(model.grid, settings.mask_ratio):
        rows, columns = model.grid
        raise UserError(
            f"config.dino.mask_ratio {settings.mask_ratio}: of {rows} x {columns} patches it masks "
            "none"
        )
    if settings.koleo_weight and config.batch_size // config.optim.accumulate < 2:
        raise UserError("config.dino.koleo_weight is of a batch of at least 2 images")


make_outputs = features.make_outputs
make_evaluate = features.make_evaluate


# Results ----------------------------------------------------------------------------------------


write_results = features.write_results
predict = features.predict
robustness = unlabelled.robustness
