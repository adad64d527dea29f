"""Pretraining as a run's task: images without labels, the loss, evaluation and pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import FileReader, Source
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.errors import UserError, printable
from vision_jax.evaluation import make_run_over
from vision_jax.logging import RunLog, say
from vision_jax.objective import Apply, Objective
from vision_jax.tasks import images
from vision_jax.tasks.api import Trained
from vision_jax.tasks.pretraining import metrics, objective
from vision_jax.tasks.pretraining.robustness import refuse

best_metric = "loss"  # what the best checkpoint is best at
best_is = "lowest"
reported = ("loss", "spread")  # of an evaluation, in metrics.jsonl
curves = ("loss",)  # of the former, in curves.png
whole = ()  # of a batch, what losses count over a whole update: each image's is its own
labels_images = False

SHOWN = 8  # pictures in reconstructions.png
RECIPES = ("lora",)  # that make sense without labels


# Data -------------------------------------------------------------------------------------------


read_sources = images.read_unlabelled_sources
read_eval_source = images.read_unlabelled_eval_source


def announce(log: RunLog, workdir: Path, train: Source, held_out: Source) -> None:
    """Nothing more than the numbers of images, which the loop tells."""
    del log, workdir, train, held_out


make_preprocessing = images.make_preprocessing
load_preprocessing = images.load_preprocessing
batch_shapes = images.batch_shapes


def training_data(
    config: ConfigDict,
    source: Source,
    preprocessing: Preprocessing,
    damage: DamageLog,
    first_batch: int = 0,
) -> grain.DatasetIterator:
    """Endless batches of this process, from `first_batch` on.

    Raises:
      UserError: images smaller than what the model takes.
    """
    images.check_sizes(source, preprocessing)
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
    """What training minimizes: the error of the hidden patches.

    Raises:
      UserError: a model that reconstructs nothing, or a recipe that needs labels.
    """
    del mesh
    others = [name for name in config.recipes if name not in RECIPES]
    if others:
        raise UserError(
            f"config.recipes: {others[0]} is not for images without labels: take lora alone, or "
            "none"
        )
    return objective.make_objective(apply, assemble, _hidden(config, model, predicts))


def _hidden(config: ConfigDict, model: Any, predicts: str) -> objective.Task:
    if predicts != "pixels":
        raise UserError(
            f"config.task pretraining takes a ViT, and this model is a {type(model).__name__}: set "
            "config.model.variant to b/16, say, or config.model.weights to a ViT's"
        )
    rows, columns = model.grid
    hidden = int(config.mae.mask_ratio * rows * columns)
    if not 0 < int(rows * columns * (1 - config.mae.mask_ratio)) < rows * columns:
        raise UserError(
            f"config.mae.mask_ratio {config.mae.mask_ratio:g}: of {rows} x {columns} patches it "
            f"hides {hidden}: some must be hidden and some visible"
        )
    return objective.Task(
        patch_size=model.patch_size,
        patches=rows * columns,
        mean=tuple(model.mean),
        std=tuple(model.std),
        mask_ratio=config.mae.mask_ratio,
        normalize=config.mae.normalize,
    )


def make_outputs(
    config: ConfigDict, model: Any, predicts: str, apply: Apply, assemble: Callable[..., Any]
) -> Callable[..., Mapping[str, jax.Array]]:
    """What evaluation needs of a batch."""
    return objective.make_outputs(apply, assemble, _hidden(config, model, predicts))


@dataclass(frozen=True)
class Pictures:
    """Some evaluation images and their reconstruction.

    Attributes:
      index: i[n], rows in the source.
      predicted: f[n, N, D].
      hidden: f[n, N].
    """

    index: np.ndarray
    predicted: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """The reconstruction of a whole dataset.

    Attributes:
      summary: see metrics.summarize.
      pictures: of some images.
      damaged: names of images that could not be read and are not counted.
      warn_after: updates after which a constant reconstruction is warned of.
    """

    summary: dict[str, Any]
    pictures: Pictures
    damaged: tuple[str, ...]
    warn_after: int

    def line(self) -> str:
        """The summary for the screen."""
        shown = [name for name in reported if self.summary[name] is not None]
        text = "  ".join(f"{name} {self.summary[name]:.4f}" for name in shown)
        skipped = f"  ({len(self.damaged)} damaged skipped)" if self.damaged else ""
        return f"evaluation on {self.summary['count']} images: {text}{skipped}"

    def lines(self) -> list[str]:
        """No more than that: there are no classes."""
        return []

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """A constant reconstruction."""
        del history
        return metrics.diagnose(self.summary, step, self.warn_after)


def make_evaluate(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: Source,
    preprocessing: Preprocessing,
) -> Callable[..., Evaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source.

    Which patches are hidden follows from an image's row, so that the result depends neither on the
    batch size nor on the run.
    """

    def scores(*arguments: Any) -> dict[str, jax.Array]:  # the pixels of all images are too many
        outputs = outputs_fn(*arguments)
        names = ("loss", "spread", "target_spread", "mask", "index")
        return {name: outputs[name] for name in names}

    batches = images.make_batches(config, preprocessing)
    run_over = make_run_over(scores, mesh, batches, batch_size=config.evaluate.batch_size)
    draw = _make_pictures(config, outputs_fn, mesh, source, preprocessing)

    def evaluate(trainable, frozen, model_state) -> Evaluation:
        found, damaged = run_over(source, trainable, frozen, model_state)
        summary = metrics.summarize(found["loss"], found["spread"], found["target_spread"])
        pictures = draw(trainable, frozen, model_state)
        return Evaluation(summary, pictures, damaged, config.evaluate.warn_after)

    return evaluate


def _make_pictures(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: Source,
    preprocessing: Preprocessing,
) -> Callable[..., Pictures]:
    """A function (trainable, frozen, model_state) -> evenly spread images, reconstructed."""
    rows = np.unique(np.linspace(0, len(source) - 1, SHOWN).astype(int))
    part = replace(source, labels=source.labels[rows], rows=source.rows[rows])
    batches = images.make_batches(config, preprocessing)
    run_over = make_run_over(outputs_fn, mesh, batches, batch_size=len(part))

    def draw(trainable, frozen, model_state) -> Pictures:
        try:
            found, _ = run_over(part, trainable, frozen, model_state)
        except UserError:  # not one of these can be read
            return Pictures(rows[:0], np.zeros((0, 0, 0)), np.zeros((0, 0)))
        return Pictures(rows[found["index"]], found["predicted"], found["hidden"])

    return draw


# Results ----------------------------------------------------------------------------------------


def write_results(
    config: ConfigDict,
    workdir: Path,
    result: Evaluation,
    source: Source,
    preprocessing: Preprocessing,
) -> dict[str, str]:
    """Pictures of an evaluation; returns {file: what it is}."""
    if not len(result.pictures.index):
        return {}
    views = [
        eval_transform(source.open(int(row))["image"], preprocessing)
        for row in result.pictures.index
    ]
    _draw(config, workdir / "reconstructions.png", np.stack(views), result.pictures, preprocessing)
    return {"reconstructions.png": "images, what is visible of them, and the reconstruction"}


def _draw(
    config: ConfigDict,
    path: Path,
    views: np.ndarray,
    pictures: Pictures,
    preprocessing: Preprocessing,
) -> None:
    from vision_jax.tasks.pretraining import figures  # matplotlib, only where something is drawn

    visible, made = figures.reconstruct(
        views,
        pictures.predicted,
        pictures.hidden,
        mean=preprocessing.mean,
        std=preprocessing.std,
        normalized=config.mae.normalize,
    )
    figures.draw_reconstructions(views, visible, made, path)


def predict(config: ConfigDict, names: Sequence[str], trained: Trained, out: Path) -> None:
    """The loss of each file on the screen, and the first ones' reconstruction in a picture.

    Args:
      config: the run's.
      names: of image files.
      trained: the model.
      out: where reconstructions.png is written.

    Raises:
      UserError: none of the files can be read.
    """
    count = len(names)
    reader = FileReader(Path(), tuple(names))
    source = Source("--images", (), np.zeros(count, np.int32), np.arange(count), reader)
    outputs_fn = make_outputs(
        config, trained.model, trained.predicts, trained.apply, trained.assemble
    )

    def kept(*arguments: Any) -> dict[str, jax.Array]:
        outputs = outputs_fn(*arguments)
        return {name: outputs[name] for name in ("loss", "mask", "index")}

    batches = images.make_batches(config, trained.preprocessing)
    size = min(count, config.evaluate.batch_size)
    run_over = make_run_over(kept, trained.mesh, batches, batch_size=size)
    found, damaged = run_over(source, *trained.arguments)
    draw = _make_pictures(config, outputs_fn, trained.mesh, source, trained.preprocessing)
    pictures = draw(*trained.arguments)
    if jax.process_index():
        return
    width = max(len(printable(name)) for name in names)
    for row, loss in zip(found["index"], found["loss"], strict=True):
        say(f"{printable(names[row]):{width}}  loss {loss:.4f}")
    for name in damaged:
        say(f"skipped, it can't be read: {printable(name)}")
    rows = [int(row) for row in pictures.index]
    if not rows:
        return
    views = [eval_transform(source.open(row)["image"], trained.preprocessing) for row in rows]
    path = out / "reconstructions.png"
    out.mkdir(parents=True, exist_ok=True)
    _draw(config, path, np.stack(views), pictures, trained.preprocessing)
    say(f"wrote {path}")


# Robustness -------------------------------------------------------------------------------------


def robustness(
    config: ConfigDict,
    workdir: Path,
    trained: Trained,
    restore_other: Callable[[Path], Trained],
) -> dict[str, Any]:
    """Raises UserError: attacks and corruptions are of what a model predicts for labels."""
    del config, trained, restore_other
    refuse(workdir)
