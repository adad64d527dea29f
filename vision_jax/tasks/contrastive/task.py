"""Contrastive learning as a run's task: images without labels, the loss, evaluation, pictures."""

from collections.abc import Callable
from typing import Any

import grain
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import Source
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError
from vision_jax.objective import Apply, Objective
from vision_jax.ops.multi_crop import SIMCLR_STRENGTHS, Crop
from vision_jax.tasks import features, images, unlabelled
from vision_jax.tasks.contrastive import metrics, objective

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
    side = config.contrastive.view_size
    return features.training_squares(config, source, preprocessing, damage, first_batch, side=side)


def batch_shapes(config: ConfigDict, preprocessing: Preprocessing) -> dict[str, Any]:
    """ShapeDtypeStructs of a training batch, over all processes."""
    return features.shapes_of_squares(config, preprocessing, side=config.contrastive.view_size)


# Loss and evaluation ----------------------------------------------------------------------------


def make_objective(
    config: ConfigDict,
    model: Any,
    predicts: str,
    apply: Apply,
    assemble: Callable[..., Any],
    mesh: Mesh,
) -> Objective:
    """What training minimizes: how hard it is to tell an image's views from those of others.

    Raises:
      UserError: a model that is no ViT, views that don't fit it, one image alone, or a recipe that
        needs labels.
    """
    del mesh
    unlabelled.check_recipes(config)
    settings = config.contrastive
    count = config.batch_size // config.optim.accumulate
    if predicts != "projections":
        raise UserError(
            "config.task contrastive takes a ViT, and this model is a "
            f"{type(model).__name__}: set config.model.variant to s/16, say, or "
            "config.model.weights to a ViT's"
        )
    if model.image_size[0] != model.image_size[1]:
        raise UserError(f"views are square, and the model takes {model.image_size} pixels")
    if settings.jitter and model.in_channels != 3:
        raise UserError(
            f"config.contrastive.jitter changes colors, and the model takes {model.in_channels} "
            "channels: set it to 0"
        )
    if count < 2:
        raise UserError(
            f"config.batch_size {config.batch_size}, of which the loss compares {count}: an image "
            "is told from others, so take at least 2 at a time"
        )
    views = Crop(
        size=model.image_size[0],
        scale=settings.scale,
        blurred=(settings.blurred,) * 2,
        solarized=(0.0, 0.0),
        sigmas=settings.blur,
        jitter=settings.jitter,
        strengths=SIMCLR_STRENGTHS,
    )
    watch = metrics.Watch(
        images=count,
        temperature=settings.temperature,
        warn_after=config.evaluate.warn_after,
        warmup_steps=config.optim.warmup_steps,
        stop=settings.stop,
    )
    temperature = settings.temperature
    return objective.make_objective(
        apply, assemble, views=views, temperature=temperature, watch=watch
    )


make_outputs = features.make_outputs
make_evaluate = features.make_evaluate


# Results ----------------------------------------------------------------------------------------


write_results = features.write_results
predict = features.predict
robustness = unlabelled.robustness
