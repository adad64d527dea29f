"""Self-distillation as a run's task: images without labels, the loss, evaluation and pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import Source, read_source
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError, printable
from vision_jax.logging import say
from vision_jax.objective import Apply, Objective
from vision_jax.ops.multi_crop import Crop, most_masked
from vision_jax.tasks import images, unlabelled
from vision_jax.tasks.api import Trained
from vision_jax.tasks.self_distillation import metrics, objective
from vision_jax.tasks.self_distillation.robustness import refuse

best_metric = "knn"  # what the best checkpoint is best at; without labels there is none
best_is = "highest"
reported = ("knn", "rank")  # of an evaluation, in metrics.jsonl
curves = ("knn",)  # of the former, in curves.png
whole = ()  # of a batch, what losses count over a whole update: each image's is its own
labels_images = False

DRAWN = ("patch_tokens",)  # what a picture is made of


# Data -------------------------------------------------------------------------------------------


def read_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The training images without labels, and the evaluation images, with labels if they count.

    Raises:
      UserError: what the sources refuse, or fewer training images than a batch has.
    """
    train, held_out = unlabelled.read_sources(config)
    return train, _with_labels(config, held_out)


def read_eval_source(config: ConfigDict, class_names: tuple[str, ...]) -> Source:
    """The evaluation data alone, for a finished run."""
    return _with_labels(config, unlabelled.read_eval_source(config, class_names))


def _with_labels(config: ConfigDict, held_out: Source) -> Source:
    if not config.dino.neighbors:
        return held_out
    if not config.data.eval:
        raise UserError(
            "config.dino.neighbors asks the labels of config.data.eval: set it to images with "
            "labels, or config.dino.neighbors to 0"
        )
    return read_source(config.data.eval)


announce = unlabelled.announce
make_preprocessing = images.make_preprocessing
load_preprocessing = images.load_preprocessing


def training_data(
    config: ConfigDict,
    source: Source,
    preprocessing: Preprocessing,
    damage: DamageLog,
    first_batch: int = 0,
) -> grain.DatasetIterator:
    """Endless batches of this process, from `first_batch` on: squares that views are cropped from.

    Raises:
      UserError: images smaller than what the model takes.
    """
    unlabelled.check_sizes(source, preprocessing)
    square = _square(config, preprocessing)
    return images.make_training_batches(config, source, square, damage, first_batch)


def batch_shapes(config: ConfigDict, preprocessing: Preprocessing) -> dict[str, Any]:
    """ShapeDtypeStructs of a training batch, over all processes."""
    return images.batch_shapes(config, _square(config, preprocessing))


def _square(config: ConfigDict, preprocessing: Preprocessing) -> Preprocessing:
    """The largest central square of an image, of config.dino.view_size pixels."""
    side = config.dino.view_size
    size = (side, side) if side else preprocessing.image_size
    return replace(preprocessing, image_size=size, crop_pct=1.0)


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


def make_outputs(
    config: ConfigDict, model: Any, predicts: str, apply: Apply, assemble: Callable[..., Any]
) -> Callable[..., Mapping[str, jax.Array]]:
    """What evaluation needs of a batch: the teacher's features."""
    del config, model, predicts
    return objective.make_outputs(apply, assemble)


@dataclass(frozen=True)
class Evaluation(unlabelled.Evaluation):
    """The features of a whole dataset."""

    reported: ClassVar[tuple[str, ...]] = reported

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """A rank that falls; what training itself tells is said while it trains."""
        ranks = [r["eval/rank"] for r in history if "eval/rank" in r and r["step"] < step]
        found = metrics.diagnose_rank([*ranks, self.summary["rank"]])
        return [found] if found else []


def make_evaluate(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: Source,
    preprocessing: Preprocessing,
) -> Callable[..., Evaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source."""

    run_over = unlabelled.make_pass(config, outputs_fn, mesh, preprocessing, ("token", "label"))
    draw = unlabelled.make_pictures(config, outputs_fn, mesh, source, preprocessing, DRAWN)

    def evaluate(trainable, frozen, model_state) -> Evaluation:
        found, damaged = run_over(source, trainable, frozen, model_state)
        summary = metrics.summarize(
            np.asarray(found["token"], np.float32),
            found["label"],
            num_classes=len(source.class_names),
            neighbors=config.dino.neighbors,
        )
        return Evaluation(summary, draw(trainable, frozen, model_state), damaged)

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
    del config
    if not len(result.pictures["index"]):
        return {}
    _draw(workdir / "patches.png", source, result.pictures, preprocessing)
    return {"patches.png": "images, and the main components of their patches as colors"}


def _draw(
    path: Path, source: Source, pictures: unlabelled.Outputs, preprocessing: Preprocessing
) -> None:
    from vision_jax.tasks.self_distillation import figures  # matplotlib, only where it draws

    views = unlabelled.read_views(source, pictures["index"], preprocessing)
    tokens = np.asarray(pictures["patch_tokens"], np.float32)
    height, width = preprocessing.image_size
    patches = tokens.shape[1]
    rows = round((patches * height / width) ** 0.5)
    colors = figures.color_patches(tokens, (rows, patches // rows))
    figures.draw_patches(views, colors, path)


def predict(config: ConfigDict, names: Sequence[str], trained: Trained, out: Path) -> None:
    """The first files' patches in a picture, and which of the others each file is most like.

    Args:
      config: the run's.
      names: of image files.
      trained: the model.
      out: where patches.png is written.

    Raises:
      UserError: none of the files can be read.
    """
    mesh, preprocessing, source = trained.mesh, trained.preprocessing, unlabelled.source_of(names)
    outputs_fn = make_outputs(
        config, trained.model, trained.predicts, trained.apply, trained.assemble
    )
    size = min(len(names), config.evaluate.batch_size)
    run_over = unlabelled.make_pass(config, outputs_fn, mesh, preprocessing, ("token",), size)
    found, damaged = run_over(source, *trained.arguments)
    draw = unlabelled.make_pictures(config, outputs_fn, mesh, source, preprocessing, DRAWN)
    pictures = draw(*trained.arguments)
    if jax.process_index():
        return
    _say_neighbors(names, found["index"], np.asarray(found["token"], np.float64))
    unlabelled.say_skipped(damaged)
    if len(pictures["index"]):
        out.mkdir(parents=True, exist_ok=True)
        _draw(out / "patches.png", source, pictures, preprocessing)
        say(f"wrote {out / 'patches.png'}")


def _say_neighbors(names: Sequence[str], index: np.ndarray, features: np.ndarray) -> None:
    """The most similar other file of each."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -2)
    width = max(len(printable(names[row])) for row in index)
    for row, own in zip(index, similarity, strict=True):
        other = int(own.argmax())
        like = "alone" if len(index) == 1 else f"like {printable(names[index[other]])}"
        cosine = "" if len(index) == 1 else f"  cosine {own[other]:.4f}"
        say(f"{printable(names[row]):{width}}  {like}{cosine}")


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
