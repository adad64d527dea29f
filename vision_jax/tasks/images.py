"""What tasks share: how whole images are prepared, their batches, and what all read in a config."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from vision_jax.data.pipeline import DamageLog, make_eval_batches, make_train_iterator
from vision_jax.data.sources import FileReader, Source, leave_out, subset
from vision_jax.data.transforms import Preprocessing, complete_crop, eval_transform
from vision_jax.errors import UserError, utf8
from vision_jax.tasks.gradient_attacks import Settings

LONGEST_STEM = 200  # bytes of a file name in the names of pictures


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
    balance: float = 0.0,
) -> grain.DatasetIterator:
    """Endless batches of this process, from `first_batch` on."""
    return make_train_iterator(
        source,
        preprocessing=preprocessing,
        crop=config.data.crop,
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        balance=balance,
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


def training_part(config: ConfigDict, train: Source, least: int = 0) -> Source:
    """As many of the training images as config.data.subset says.

    Raises:
      UserError: fewer than `least`, those of a batch where it would else hold some twice.
    """
    if config.data.subset:
        train = subset(train, config.data.subset, config.seed)
    if len(train) < least:
        raise UserError(
            f"{train.name}: {len(train)} images to train on are fewer than a batch of {least}, "
            "which would hold some twice: add images, or set config.batch_size"
        )
    return train


# Files of predict -------------------------------------------------------------------------------


def source_of(names: Sequence[str]) -> Source:
    """Image files by their names."""
    count = len(names)
    reader = FileReader(Path(), tuple(names))
    return Source("--images", (), np.zeros(count, np.int32), np.arange(count), reader)


def read_views(source: Source, rows: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """u8[n, H, W, C]: images as evaluation sees them."""
    return np.stack([eval_transform(source.open(int(r))["image"], preprocessing) for r in rows])


def list_files(
    names: Sequence[str],
    found: Mapping[int, Mapping[str, Any]],
    damage: DamageLog,
    **of_damaged: Any,
) -> list[dict[str, Any]]:
    """A record of each file in the order given: what was found, or why it could not be read.

    Args:
      names: of the files.
      found: records by place among the names.
      damage: the files that could not be read.
      of_damaged: what their records have besides.
    """
    reasons = damage.by_row
    return [
        {"file": utf8(name)}
        | (
            dict(found[row])
            if row in found
            else {**of_damaged, "error": utf8(reasons.get(row, "can't be read"))}
        )
        for row, name in enumerate(names)
    ]


def file_name(row: int, stem: str, suffix: str = ".png") -> str:
    """Of what is written of a file: numbered, since two folders may have the same names.

    Examples:
      >>> file_name(3, "a photo")
      '0003_a_photo.png'
    """
    safe = re.sub(r"[^\w.-]", "_", utf8(stem)).encode()[:LONGEST_STEM]
    return f"{row:04d}_{safe.decode(errors='ignore')}{suffix}"


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
