"""What tasks on images without labels share: sources, passes over images, pictures of some.

A task takes what it shares with others by its name in the protocol, tasks/api.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import (
    Source,
    hold_out,
    read_source,
    read_unlabelled,
    split_source,
    subset,
)
from vision_jax.data.transforms import Preprocessing, size_of
from vision_jax.errors import UserError
from vision_jax.evaluation import MakeBatches, make_run_over
from vision_jax.logging import RunLog
from vision_jax.tasks import images
from vision_jax.tasks.api import Trained

Outputs = Mapping[str, np.ndarray]

TRIED = 16  # images whose size is looked at before training
SHOWN = 8  # images in a picture of some
RECIPES = ("quantize", "lora")  # that make sense without labels

# Sources ----------------------------------------------------------------------------------------


def read_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The training images without labels, and the evaluation images, with labels for a probe.

    Raises:
      UserError: what the sources refuse, or fewer training images than a batch has.
    """
    train = _read_training(config)
    labelled = read_labelled(config)
    if labelled is not None:
        held_out = labelled[1]
    elif config.data.eval:
        held_out = read_unlabelled(config.data.eval)
    else:
        train, held_out = hold_out(train, config.data.holdout, config.seed)
    return images.training_part(config, train, config.batch_size), held_out


def read_labelled(config: ConfigDict) -> tuple[Source, Source] | None:
    """(labelled images that a probe learns from, those that it is tested on), None without any.

    The latter are `data.eval`, or where there is none a share of the former.
    """
    if not config.probe.data:
        return None
    learn = read_source(config.probe.data)
    if config.data.eval:
        test = read_source(config.data.eval, class_names=learn.class_names)
    else:
        learn, test = split_source(learn, config.data.holdout, config.seed)
    if config.probe.subset:
        learn = subset(learn, config.probe.subset, config.seed)
    return learn, test


def read_eval_source(config: ConfigDict, class_names: tuple[str, ...]) -> Source:
    """The evaluation images alone, for a finished run."""
    del class_names  # none of training
    labelled = read_labelled(config)
    if labelled is not None:
        return labelled[1]
    if config.data.eval:
        return read_unlabelled(config.data.eval)
    return hold_out(_read_training(config), config.data.holdout, config.seed)[1]


def _read_training(config: ConfigDict) -> Source:
    return images.without_excluded(config, read_unlabelled(config.data.train))


def announce(log: RunLog, workdir: Path, train: Source, held_out: Source) -> None:
    """Nothing more than the numbers of images, which the loop tells."""
    del log, workdir, train, held_out


def check_sizes(source: Source, preprocessing: Preprocessing) -> None:
    """Enlarged images have no detail to learn from: refused if all that are tried are so.

    Raises:
      UserError: images smaller than what the model takes.
    """
    height, width = preprocessing.image_size
    largest = (0, 0)
    for row in _spread(len(source), TRIED):
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


def _spread(count: int, most: int) -> np.ndarray:
    """i[n]: at most so many rows, evenly spread over all."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def check_recipes(config: ConfigDict, what: str = "images without labels") -> None:
    """Raises UserError for a recipe that needs labels, which `what` has not."""
    others = [name for name in config.recipes if name not in RECIPES]
    if others:
        raise UserError(
            f"config.recipes: {others[0]} is not for {what}: take mask, quantize, lora, or none"
        )


# Evaluation -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What is found over a whole dataset.

    Attributes:
      reported: of the summary, what goes to metrics.jsonl.
      counted: what the summary's "count" is of.
      summary: figures by name.
      damaged: lines, with the reason, of images that could not be read and are not counted.
    """

    reported: ClassVar[tuple[str, ...]] = ()
    counted: ClassVar[str] = "images"

    summary: dict[str, Any]
    damaged: tuple[str, ...]

    def line(self) -> str:
        """The summary for the screen."""
        shown = [name for name in self.reported if self.summary[name] is not None]
        text = "  ".join(f"{name} {self.summary[name]:.4f}" for name in shown)
        skipped = f"  ({len(self.damaged)} damaged skipped)" if self.damaged else ""
        return f"evaluation on {self.summary['count']} {self.counted}: {text}{skipped}"

    def lines(self) -> list[str]:
        """No more than that: there are no classes."""
        return []


@dataclass(frozen=True)
class Pictured(Evaluation):
    """An evaluation with something to draw.

    Attributes:
      pictures: outputs of some images, with "index" i[n], their rows in the source.
    """

    pictures: Outputs


def make_pass(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    preprocessing: Preprocessing,
    names: Sequence[str],
    batch_size: int = 0,
    batches: MakeBatches | None = None,
) -> Callable[..., tuple[dict[str, np.ndarray], DamageLog]]:
    """`evaluation.make_run_over` of some outputs alone: all of all images may be too many.

    Args:
      config: of the run.
      outputs_fn: a batch's outputs, "mask" and "index" among them.
      mesh: of the devices.
      preprocessing: of the images.
      names: of the outputs that are kept, besides these two.
      batch_size: 0 takes the config's.
      batches: of the images; None makes those of `preprocessing`.
    """

    def kept(*arguments: Any) -> dict[str, jax.Array]:
        outputs = outputs_fn(*arguments)
        return {name: outputs[name] for name in (*names, "mask", "index")}

    batches = batches or images.make_batches(config, preprocessing)
    return make_run_over(kept, mesh, batches, batch_size=batch_size or config.evaluate.batch_size)


def make_pictures(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: Source,
    preprocessing: Preprocessing,
    names: Sequence[str],
    batches: MakeBatches | None = None,
) -> Callable[..., Outputs]:
    """A function (trainable, frozen, model_state) -> outputs of evenly spread images.

    Beside the named ones there is "index" i[n], rows in the source, n 0 if none can be read.
    """
    rows = _spread(len(source), SHOWN)
    part = replace(source, labels=source.labels[rows], rows=source.rows[rows])
    run_over = make_pass(config, outputs_fn, mesh, preprocessing, names, len(part), batches)

    def draw(trainable, frozen, model_state) -> Outputs:
        try:
            found, _ = run_over(part, trainable, frozen, model_state)
        except UserError:  # not one of these can be read
            return {"index": rows[:0]}
        return {**found, "index": rows[found["index"]]}

    return draw


# Robustness -------------------------------------------------------------------------------------


def robustness(
    config: ConfigDict,
    workdir: Path,
    trained: Trained,
    restore_other: Callable[[Path], Trained],
) -> dict[str, Any]:
    """Raises UserError: attacks and corruptions are of what a model predicts for labels."""
    del config, trained, restore_other
    raise UserError(
        f"robustness is of a model that predicts labels, and {workdir} holds a pretraining run: "
        f"fine-tune it first, with config.model.weights={workdir}"
    )
