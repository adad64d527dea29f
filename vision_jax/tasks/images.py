"""What tasks on whole images share: how an image is prepared, and the batches of images."""

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
        batch_size=config.batch_size // jax.process_count(),
        preprocessing=preprocessing,
        crop=config.data.crop,
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        seed=config.seed,
        num_threads=config.data.threads,
        num_workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        first_batch=first_batch,
        max_damaged=config.data.max_damaged,
        damage_log=damage,
    )


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
