"""Pretraining as a run's task: images without labels, the loss, evaluation and pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import Source
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError, printable
from vision_jax.evaluation import say_damaged
from vision_jax.logging import say
from vision_jax.objective import Apply, Objective
from vision_jax.tasks import features, images, unlabelled
from vision_jax.tasks.api import Trained
from vision_jax.tasks.pretraining import metrics, objective

best_is = "lowest"
reported = ("loss", "spread", *features.REPORTED)  # of an evaluation, in metrics.jsonl
curves = features.OF_LABELS  # of the former, in curves.png
whole = ()  # of a batch, what losses count over a whole update: each image's is its own
labels_images = False

DRAWN = ("predicted", "hidden")  # what a picture is made of


# Data -------------------------------------------------------------------------------------------


read_sources = unlabelled.read_sources
read_eval_source = unlabelled.read_eval_source
announce = unlabelled.announce
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
    """Endless batches of this process, from `first_batch` on.

    Raises:
      UserError: images smaller than what the model takes.
    """
    unlabelled.check_sizes(source, preprocessing)
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
    unlabelled.check_recipes(config)
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
class Evaluation(unlabelled.Pictured):
    """The reconstruction of a whole dataset.

    Attributes:
      warn_after: updates after which a constant reconstruction is warned of.
    """

    reported: ClassVar[tuple[str, ...]] = reported

    warn_after: int

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

    scores = ("loss", "spread", "target_spread")
    names = (*scores, "token", "label")
    run_over = unlabelled.make_pass(config, outputs_fn, mesh, preprocessing, names)
    of_features = features.make_summarize(config, outputs_fn, mesh, source, preprocessing)
    draw = unlabelled.make_pictures(config, outputs_fn, mesh, source, preprocessing, DRAWN)

    def evaluate(*arguments: Any) -> Evaluation:
        found, damage = run_over(source, *arguments)
        summary = metrics.summarize(*(found[name] for name in scores))
        summary |= of_features(found, *arguments)
        pictures = draw(*arguments)
        return Evaluation(summary, damage.lines, pictures, config.evaluate.warn_after)

    return evaluate


# Results ----------------------------------------------------------------------------------------


def write_results(
    config: ConfigDict,
    workdir: Path,
    result: Evaluation,
    source: Source,
    preprocessing: Preprocessing,
) -> dict[str, str]:
    """Pictures of an evaluation; returns {file: what it is}."""
    if not len(result.pictures["index"]):
        return {}
    _draw(config, workdir / "reconstructions.png", source, result.pictures, preprocessing)
    return {"reconstructions.png": "images, what is visible of them, and the reconstruction"}


def _draw(
    config: ConfigDict,
    path: Path,
    source: Source,
    pictures: unlabelled.Outputs,
    preprocessing: Preprocessing,
) -> None:
    from vision_jax.tasks.pretraining import figures  # matplotlib, only where something is drawn

    views = images.read_views(source, pictures["index"], preprocessing)
    visible, made = figures.reconstruct(
        views,
        pictures["predicted"],
        pictures["hidden"],
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
    mesh, preprocessing, source = trained.mesh, trained.preprocessing, images.source_of(names)
    outputs_fn = make_outputs(
        config, trained.model, trained.predicts, trained.apply, trained.assemble
    )
    size = min(len(names), config.evaluate.batch_size)
    run_over = unlabelled.make_pass(config, outputs_fn, mesh, preprocessing, ("loss",), size)
    found, damage = run_over(source, *trained.arguments)
    draw = unlabelled.make_pictures(config, outputs_fn, mesh, source, preprocessing, DRAWN)
    pictures = draw(*trained.arguments)
    if jax.process_index():
        return
    width = max(len(printable(name)) for name in names)
    for row, loss in zip(found["index"], found["loss"], strict=True):
        say(f"{printable(names[row]):{width}}  loss {loss:.4f}")
    say_damaged(damage.lines)
    if len(pictures["index"]):
        out.mkdir(parents=True, exist_ok=True)
        _draw(config, out / "reconstructions.png", source, pictures, preprocessing)
        say(f"wrote {out / 'reconstructions.png'}")


robustness = unlabelled.robustness
