"""Generation as a run's task: images with classes, the loss, evaluation and samples.

python -m vision_jax.main --config=configs/generate_embedded.py
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import Source, read_source, split_source, subset, take_classes
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError
from vision_jax.logging import RunLog
from vision_jax.objective import Apply, Objective
from vision_jax.tasks import images, unlabelled
from vision_jax.tasks.api import Trained
from vision_jax.tasks.generation import figures, metrics, objective

best_is = "lowest"
reported = ("loss",)  # of an evaluation, in metrics.jsonl
curves = ()  # of shares between 0 and 1 there are none
whole = ()  # of a batch, what losses count over a whole update: each image's is its own
labels_images = False

RECIPES = ("mask", "quantize", "lora")  # that make sense without logits of classes
DRAWN = ("generated", "label")  # what a picture is made of


# Data -------------------------------------------------------------------------------------------


def read_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The training and the evaluation images, with the same class names.

    Raises:
      UserError: what the sources refuse, or fewer training images than a batch has.
    """
    train = images.without_excluded(config, read_source(config.data.train))
    if config.data.eval:
        names = train.class_names
        train = _classes(config, train)
        held_out = _classes(config, read_source(config.data.eval, class_names=names))
    else:
        train, held_out = split_source(_classes(config, train), config.data.holdout, config.seed)
    if config.data.subset:
        train = subset(train, config.data.subset, config.seed)
    if len(train) < config.batch_size:
        raise UserError(
            f"{train.name}: {len(train)} images to train on are fewer than a batch of "
            f"{config.batch_size}, which would hold some twice: add images, or set "
            "config.batch_size"
        )
    return train, held_out


def read_eval_source(config: ConfigDict, class_names: tuple[str, ...]) -> Source:
    """The evaluation images alone, for a finished run."""
    del class_names  # those that config.data.classes leaves, or all
    if not config.data.eval:
        train = _classes(config, images.without_excluded(config, read_source(config.data.train)))
        return split_source(train, config.data.holdout, config.seed)[1]
    names = read_source(config.data.train).class_names
    return _classes(config, read_source(config.data.eval, class_names=names))


def _classes(config: ConfigDict, source: Source) -> Source:
    return take_classes(source, config.data.classes) if config.data.classes else source


def announce(log: RunLog, workdir: Path, train: Source, held_out: Source) -> None:
    """Nothing more than the numbers of images and classes, which the loop tells."""
    del log, workdir, train, held_out


make_preprocessing = images.make_preprocessing
load_preprocessing = images.load_preprocessing
batch_shapes = images.batch_shapes


def best_metric(config: ConfigDict) -> str:
    """Of an evaluation's summary, what the best checkpoint is best at."""
    del config
    return "loss"


def training_data(
    config: ConfigDict,
    source: Source,
    preprocessing: Preprocessing,
    damage: DamageLog,
    first_batch: int = 0,
) -> grain.DatasetIterator:
    """Endless batches of this process, from `first_batch` on."""
    return images.make_training_batches(config, source, preprocessing, damage, first_batch)


# Loss and evaluation ----------------------------------------------------------------------------


def make_objective(
    config: ConfigDict,
    model: Any,
    predicts: str,
    apply: Apply,
    assemble: Callable[..., Any],
    mesh: Mesh,
) -> Objective:
    """What training minimizes: the error of the velocity from noise to the images.

    Raises:
      UserError: a model that makes no images, or a recipe that needs logits of classes.
    """
    del mesh
    others = [name for name in config.recipes if name not in RECIPES]
    if others:
        raise UserError(
            f"config.recipes: {others[0]} is not for a generator: take "
            f"{', '.join(RECIPES)}, or none"
        )
    return objective.make_objective(apply, assemble, make_task(config, model, predicts))


def make_task(config: ConfigDict, model: Any, predicts: str) -> objective.Task:
    """What is learned, of a run's config and its model.

    Raises:
      UserError: a model that makes no images, or none by flow matching.
    """
    del predicts
    if getattr(model, "predicts", "") not in ("velocity", "image"):
        raise UserError(
            "config.task generation takes a transformer that predicts velocities or images, and "
            f"this model, a {type(model).__name__}, does not: set config.model.variant, "
            "say to jit_b_16"
        )
    return objective.Task(
        predicts=model.predicts,
        num_classes=model.num_classes,
        shape=(*model.image_size, model.in_channels),
        time_mean=config.flow.time_mean,
        time_std=config.flow.time_std,
        unconditional=config.flow.unconditional,
    )


def make_sampling(config: ConfigDict, **changed: Any) -> objective.Sampling:
    """How a run makes images, as its config says or, by keyword, otherwise."""
    section = config.sample
    own = {
        "method": section.method,
        "steps": section.steps,
        "guidance": section.guidance,
        "interval": tuple(section.interval),
        "shift": section.shift,
        "seed": objective.EVALUATION_SEED,
    }
    return objective.Sampling(**{**own, **changed})


def make_outputs(
    config: ConfigDict, model: Any, predicts: str, apply: Apply, assemble: Callable[..., Any]
) -> Callable[..., Mapping[str, jax.Array]]:
    """What evaluation needs of a batch."""
    task = make_task(config, model, predicts)
    return objective.make_outputs(apply, assemble, task, make_sampling(config))


@dataclass(frozen=True)
class Evaluation(unlabelled.Pictured):
    """The error of the velocity over a whole dataset, and some images that are made."""

    reported: ClassVar[tuple[str, ...]] = reported

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """None: a loss tells little of what the images look like, which samples.png shows."""
        del step, history
        return []


def make_evaluate(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: Source,
    preprocessing: Preprocessing,
) -> Callable[..., Evaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source.

    Noise and times follow from an image's row, so that the result depends neither on the batch
    size nor on the run.
    """
    run_over = unlabelled.make_pass(config, outputs_fn, mesh, preprocessing, ("loss",))
    draw = unlabelled.make_pictures(config, outputs_fn, mesh, source, preprocessing, DRAWN)

    def evaluate(*arguments: Any) -> Evaluation:
        found, damage = run_over(source, *arguments)
        summary = metrics.summarize(found["loss"])
        return Evaluation(summary, damage.lines, draw(*arguments))

    return evaluate


# Results ----------------------------------------------------------------------------------------


def write_results(
    config: ConfigDict,
    workdir: Path,
    result: Evaluation,
    source: Source,
    preprocessing: Preprocessing,
) -> dict[str, str]:
    """Pictures of all evaluations, beside real ones; returns {file: what it is}."""
    del config
    if not len(result.pictures["index"]):
        return {}
    views = images.read_views(source, result.pictures["index"], preprocessing)
    figures.draw_progress(workdir, views)
    return {"samples.png": "held-out images, and what was made of the same noise before and after"}


def write_samples(workdir: Path, step: int, result: Evaluation) -> dict[str, str]:
    """Pictures of one evaluation, of the same noise and classes as at other steps, for others.

    Step 0 shows what the model makes before any update: the base without its adapter.
    """
    if not len(result.pictures["index"]):
        return {}
    figures.write_strip(workdir, step, result.pictures["generated"])
    return {figures.FOLDER: "images made at each evaluation, of the same noise"}


def predict(config: ConfigDict, names: Sequence[str], trained: Trained, out: Path) -> None:
    """Raises UserError: a generator makes images, and finds nothing in them."""
    del config, names, trained, out
    raise UserError("predict is of a model that finds something in images: use vision_jax generate")


def robustness(
    config: ConfigDict,
    workdir: Path,
    trained: Trained,
    restore_other: Callable[[Path], Trained],
) -> dict[str, Any]:
    """Raises UserError: attacks and corruptions are of what a model predicts for labels."""
    del config, trained, restore_other
    raise UserError(f"robustness is of a model that predicts labels, and {workdir} makes images")
