"""What tasks share: how whole images are prepared, their batches, and what all read in a config."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from vision_jax.data.pipeline import DamageLog, make_eval_batches, make_train_iterator
from vision_jax.data.sources import Source, leave_out
from vision_jax.data.transforms import Preprocessing, complete_crop
from vision_jax.tasks.gradient_attacks import Settings


def make_preprocessing(
    config: ConfigDict, own: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Preprocessing | None:
    """How images are prepared: as the config says, else as the weights (`own`) were used to.

    None without a size: the architecture takes any, and nobody has said one.
    """
    size = (config.model.image_size,) * 2 if config.model.image_size else None
    size = size or arguments.get("image_size") or own.get("image_size")
    if not size:
        return None
    crop = complete_crop(own, size)
    return Preprocessing(
        image_size=tuple(size),
        mean=arguments["mean"],
        std=arguments["std"],
        interpolation=config.data.interpolation or own.get("interpolation") or "bicubic",
        **crop | ({"crop_pct": config.data.crop_pct} if config.data.crop_pct else {}),
    )


def load_preprocessing(record: Mapping[str, Any]) -> Preprocessing:
    """From its fields in model.json."""
    return Preprocessing(**record)


# Batches ----------------------------------------------------------------------------------------


def make_training_batches(
    config: ConfigDict,
    source: Source,
    preprocessing: Preprocessing,
    damage: DamageLog,
    first_batch: int,
) -> grain.DatasetIterator:
    """Endless batches of this process, from `first_batch` on."""
    return make_train_iterator(
        source,
        preprocessing=preprocessing,
        crop=config.data.crop,
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        **stream_arguments(config, damage, first_batch),
    )


def stream_arguments(config: ConfigDict, damage: DamageLog, first_batch: int) -> dict[str, Any]:
    """What every task's training batches take alike (see data.pipeline.make_train_iterator)."""
    return {
        "batch_size": config.batch_size // jax.process_count(),
        "seed": config.seed,
        "num_threads": config.data.threads,
        "num_workers": config.data.workers,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "first_batch": first_batch,
        "max_damaged": config.data.max_damaged,
        "damage_log": damage,
    }


def batch_shapes(config: ConfigDict, preprocessing: Preprocessing) -> dict[str, Any]:
    """ShapeDtypeStructs of a training batch, over all processes."""
    size = config.batch_size
    shape = (size, *preprocessing.image_size, len(preprocessing.mean))
    return {
        "image": jax.ShapeDtypeStruct(shape, np.uint8),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
        "index": jax.ShapeDtypeStruct((size,), np.int32),
        "mask": jax.ShapeDtypeStruct((size,), np.bool_),
    }


def make_batches(config: ConfigDict, preprocessing: Preprocessing) -> Callable[..., Iterator[Any]]:
    """Makes the batches of an evaluation (see evaluation.MakeBatches)."""
    return partial(make_eval_batches, preprocessing=preprocessing, num_threads=config.data.threads)


def without_excluded(config: ConfigDict, train: Source) -> Source:
    """The training images that config.data.exclude leaves, if the task has that field."""
    leaves_out = "exclude" in config.data and config.data.exclude
    return leave_out(train, config.data.exclude) if leaves_out else train


# Robustness -------------------------------------------------------------------------------------


def attack_settings(config: ConfigDict) -> Settings:
    """The section robustness, as far as it is of gradient attacks."""
    settings = config.robustness
    return Settings(
        attacks=settings.attacks,
        norm=settings.norm,
        epsilons=sorted(settings.epsilons),
        steps=settings.steps,
        restarts=settings.restarts,
        images=settings.images,
        batch_size=settings.batch_size,
        seed=config.seed,
    )
