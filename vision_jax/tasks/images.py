"""What tasks on whole images share: how an image is prepared, and the batches of images.

Of images without labels also the sources, and which images are too small to learn from.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.pipeline import DamageLog, make_eval_batches, make_train_iterator
from vision_jax.data.sources import Source, hold_out, leave_out, read_unlabelled, subset
from vision_jax.data.transforms import Preprocessing, complete_crop, size_of
from vision_jax.errors import UserError

TRIED = 16  # images whose size is looked at before training


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
    """The training images that config.data.exclude leaves."""
    return leave_out(train, config.data.exclude) if config.data.exclude else train


# Images without labels --------------------------------------------------------------------------


def read_unlabelled_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The training and the evaluation images, without labels.

    Raises:
      UserError: what the sources refuse, or fewer training images than a batch has.
    """
    train = _read_unlabelled(config)
    if config.data.eval:
        held_out = read_unlabelled(config.data.eval)
    else:
        train, held_out = hold_out(train, config.data.holdout, config.seed)
    if config.data.subset:
        train = subset(train, config.data.subset, config.seed)
    if len(train) < config.batch_size:
        raise UserError(
            f"{train.name}: {len(train)} images to train on are fewer than a batch of "
            f"{config.batch_size}, which would hold some twice: add images, or set "
            "config.batch_size"
        )
    return train, held_out


def read_unlabelled_eval_source(config: ConfigDict, class_names: tuple[str, ...]) -> Source:
    """The evaluation images alone, for a finished run."""
    del class_names  # none
    if config.data.eval:
        return read_unlabelled(config.data.eval)
    return hold_out(_read_unlabelled(config), config.data.holdout, config.seed)[1]


def _read_unlabelled(config: ConfigDict) -> Source:
    return without_excluded(config, read_unlabelled(config.data.train))


def check_sizes(source: Source, preprocessing: Preprocessing) -> None:
    """Enlarged images have no detail to learn from: refused if all that are tried are so.

    Raises:
      UserError: images smaller than what the model takes.
    """
    height, width = preprocessing.image_size
    largest = (0, 0)
    for row in np.unique(np.linspace(0, len(source) - 1, TRIED).astype(int)):
        try:
            size = size_of(source.open(int(row))["image"])
        except DamagedImageError:  # counted and named when its turn comes
            continue
        if size[0] >= height and size[1] >= width:
            return
        largest = max(largest, size, key=min)
    if largest != (0, 0):
        raise UserError(
            f"{source.name}: images of {largest[0]} x {largest[1]} pixels are smaller than the "
            f"model's {height} x {width}, and enlarged ones have no detail to learn from: set "
            "config.model.image_size to at most "
            f"{min(largest)}, a multiple of the patch, or take larger images"
        )
