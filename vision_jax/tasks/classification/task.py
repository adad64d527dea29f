"""Classification as a run's task: its config's data, loss, evaluation and pictures."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.config import write_json
from vision_jax.data.joined import join
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import Source, read_source, split_source, subset
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.errors import UserError, printable, utf8
from vision_jax.evaluation import make_run_over, say_damaged
from vision_jax.logging import RunLog, say
from vision_jax.objective import Apply, Objective
from vision_jax.tasks import images
from vision_jax.tasks.api import Trained
from vision_jax.tasks.classification import objective, purification
from vision_jax.tasks.classification import robustness as under_attack
from vision_jax.tasks.classification.metrics import (
    best_classes,
    confusion_matrix,
    softmax,
    summarize,
)
from vision_jax.tasks.classification.under_attack import find_overfitting, make_watch

best_is = "highest"
# Of an evaluation, in metrics.jsonl; the last two in adversarial training.
reported = ("top1", "top5", "loss", "ece", "fgsm_top1", "pgd_top1")

curves = ("top1",)  # of the former, in curves.png

whole = ()  # of a batch, what losses count over a whole update: each image's is its own

labels_images = True

GRID = 40  # pictures in predictions.png
SHOWN, LISTED = 3, 5  # most probable classes of a file, on the screen and in predictions.json


def best_metric(config: ConfigDict) -> str:
    """Of an evaluation's summary, what the best checkpoint is best at."""
    del config
    return "top1"


# Data -------------------------------------------------------------------------------------------


def read_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The training and the evaluation data, with the same class names."""
    train = images.without_excluded(config, read_source(config.data.train))
    if config.data.eval:
        held_out = read_source(config.data.eval, class_names=train.class_names)
    else:
        train, held_out = split_source(train, config.data.holdout, config.seed)
    return _with_extra(config, images.training_part(config, train)), held_out


def _with_extra(config: ConfigDict, train: Source) -> Source:
    """The training images, with those of config.data.extra where the task has that field."""
    if "extra" not in config.data:
        return train
    if not config.data.extra:
        if config.data.extra_count:
            raise UserError("config.data.extra_count: nothing is extra: set config.data.extra")
        return train
    extra = read_source(config.data.extra, class_names=train.class_names)
    if config.data.extra_count:
        extra = subset(extra, config.data.extra_count, config.seed)
    return join(train, extra)


def read_eval_source(config: ConfigDict, class_names: tuple[str, ...]) -> Source:
    """The evaluation data alone, for a finished run."""
    if config.data.eval:
        return read_source(config.data.eval, class_names=class_names)
    train = read_source(config.data.train, class_names=class_names)
    train = images.without_excluded(config, train)
    return split_source(train, config.data.holdout, config.seed)[1]


def announce(log: RunLog, workdir: Path, train: Source, held_out: Source) -> None:
    """Nothing more than the numbers of images and classes, which the loop tells."""
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
    """Endless batches of this process, from `first_batch` on."""
    channels = len(preprocessing.mean)
    if config.augment.policy != "none" and channels != 3:
        raise UserError(
            f"config.augment.policy: {config.augment.policy} changes colors, and the model takes "
            f"{channels} channels: set it to none"
        )
    return images.make_training_batches(
        config, source, preprocessing, damage, first_batch, config.data.balance
    )


# Loss and evaluation ----------------------------------------------------------------------------


def make_objective(
    config: ConfigDict,
    model: Any,
    predicts: str,
    apply: Apply,
    assemble: Callable[..., Any],
    mesh: Mesh,
) -> Objective:
    """What training minimizes: cross-entropy, of augmented images and smoothed labels."""
    del predicts, mesh  # classes
    augment = config.augment
    return objective.make_objective(
        apply,
        assemble,
        num_classes=model.num_classes,
        label_smoothing=augment.label_smoothing,
        policy=augment.policy,
        policy_ops=augment.ops,
        policy_magnitude=augment.magnitude,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        erasing=augment.erasing,
        class_weights=config.loss.class_weights,
    )


def make_outputs(
    config: ConfigDict, model: Any, predicts: str, apply: Apply, assemble: Callable[..., Any]
) -> Callable[..., Mapping[str, jax.Array]]:
    """What evaluation needs of a batch."""
    del config, model, predicts  # classes
    return objective.make_outputs(apply, assemble)


@dataclass(frozen=True)
class Evaluation:
    """Logits over a whole dataset, in its order, and their summary.

    Attributes:
      logits: f32[N, C].
      labels: i32[N].
      index: i32[N], rows in the source.
      summary: see evaluate.classification.summarize; besides "fgsm_top1" and "pgd_top1", the top-1
        of "attacked" images under these attacks, None where nothing was attacked.
      damaged: lines, with the reason, of images that could not be read and are not among the N.
    """

    logits: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    summary: dict[str, Any]
    damaged: tuple[str, ...]

    def line(self) -> str:
        """The summary for the screen."""
        text = "  ".join(f"{name} {self.summary[name]:.4f}" for name in self._measured)
        skipped = f"  ({len(self.damaged)} damaged skipped)" if self.damaged else ""
        return f"evaluation on {self.summary['count']} images: {text}{skipped}"

    def lines(self) -> list[str]:
        """The accuracy of each class."""
        rows = self.summary["per_class"].items()
        width = max(len(name) for name, _ in rows)
        return [
            f"  {name:{width}}  {'no images' if accuracy is None else f'{accuracy:.4f}'}"
            for name, accuracy in rows
        ]

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """Catastrophic overfitting of adversarial training."""
        name = "eval/pgd_top1"
        if "pgd_top1" not in self._measured:
            return []
        records = [r for r in history if name in r and r["step"] < step]
        fgsm, pgd = (
            [*(r[f"eval/{name}"] for r in records), self.summary[name]]
            for name in ("fgsm_top1", "pgd_top1")
        )
        found = find_overfitting(fgsm, pgd, self.summary["attacked"])
        if found is None:
            return []
        return [
            f"catastrophic overfitting: since step {records[found]['step']} top-1 under PGD fell "
            f"from {pgd[found]:.3f} to {pgd[-1]:.3f} while under FGSM it rose from "
            f"{fgsm[found]:.3f} to {fgsm[-1]:.3f}; take --checkpoint=best of a run with "
            "config.adversarial.method=pgd, more steps or a smaller epsilon"
        ]

    @property
    def _measured(self) -> list[str]:
        return [name for name in reported if self.summary[name] is not None]


make_batches = images.make_batches


def make_evaluate(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: Source,
    preprocessing: Preprocessing,
) -> Callable[..., Evaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source.

    Padding rows are dropped by their mask, so each image counts once and the result does not depend
    on the batch size.
    """
    run_over = make_run_over(
        outputs_fn,
        mesh,
        images.make_batches(config, preprocessing),
        batch_size=config.evaluate.batch_size,
    )

    attack = _make_attack(config, outputs_fn, mesh, source, preprocessing)

    def evaluate(trainable, frozen, model_state) -> Evaluation:
        found, damage = run_over(source, trainable, frozen, model_state)
        summary = summarize(found["logits"], found["label"], source.class_names)
        summary |= attack(trainable, frozen, model_state)
        return Evaluation(found["logits"], found["label"], found["index"], summary, damage.lines)

    return evaluate


def make_evaluate_all(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: Source,
    preprocessing: Preprocessing,
) -> Callable[..., list[Callable[[], Evaluation]]] | None:
    """`make_evaluate` of several models at once, as a search has them.

    Outputs have an axis of models after their first. The function takes the places of those that
    are asked for, too, and gives a list of what makes the Evaluation of each: it raises
    DivergedError for itself alone. None where evaluation attacks, which it does model by model.
    """
    if "adversarial" in config.recipes and config.adversarial.watch:
        return None

    def shared(trainable, frozen, model_state, batch):
        found = outputs_fn(trainable, frozen, model_state, batch)
        return {**found, **{name: batch[name] for name in ("label", "mask", "index")}}

    run_over = make_run_over(
        shared,
        mesh,
        images.make_batches(config, preprocessing),
        batch_size=config.evaluate.batch_size,
    )

    def evaluate(trainable, frozen, model_state, places: Sequence[int]):
        found, damage = run_over(source, trainable, frozen, model_state)
        labels, index = found["label"], found["index"]
        attack = {"fgsm_top1": None, "pgd_top1": None, "attacked": 0}

        def make(place: int) -> Evaluation:
            logits = found["logits"][:, place]
            summary = summarize(logits, labels, source.class_names) | attack
            return Evaluation(logits, labels, index, summary, damage.lines)

        return [partial(make, place) for place in places]

    return evaluate


def _make_attack(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: Source,
    preprocessing: Preprocessing,
) -> Callable[..., dict[str, Any]]:
    """A function (trainable, frozen, model_state) -> top-1 of a few images under attack."""
    settings = config.adversarial
    if "adversarial" not in config.recipes or not settings.watch:
        return lambda *_: {"fgsm_top1": None, "pgd_top1": None, "attacked": 0}
    part = subset(source, min(settings.watch, len(source)), config.seed)
    watched = make_watch(outputs_fn, norm=settings.norm, epsilon=settings.epsilon, seed=config.seed)
    run_over = make_run_over(
        watched,
        mesh,
        images.make_batches(config, preprocessing),
        batch_size=min(config.evaluate.batch_size, len(part)),
    )

    def attack(trainable, frozen, model_state) -> dict[str, Any]:
        found, _ = run_over(part, trainable, frozen, model_state)
        shares = {f"{name}_top1": float(found[name].mean()) for name in ("fgsm", "pgd")}
        return {**shares, "attacked": len(found["pgd"])}

    return attack


# Results ----------------------------------------------------------------------------------------


def write_results(
    config: ConfigDict,
    workdir: Path,
    result: Evaluation,
    source: Source,
    preprocessing: Preprocessing,
) -> dict[str, str]:
    """Pictures of an evaluation; returns {file: what it is}."""
    from vision_jax.figures import draw_confusion  # matplotlib, only where something is drawn

    del config
    _draw_predictions(workdir / "predictions.png", preprocessing, result, source)
    matrix = confusion_matrix(result.logits.argmax(-1), result.labels, len(source.class_names))
    draw_confusion(matrix, source.class_names, workdir / "confusion.png")
    return {
        "predictions.png": "images with true and predicted class and probability",
        "confusion.png": "counts by true and predicted class",
    }


def _draw_predictions(
    path: Path, preprocessing: Preprocessing, result: Evaluation, source: Source
) -> None:
    """A grid of evenly spread examples of the evaluation data, as the model sees them."""
    from vision_jax.tasks.classification import figures  # matplotlib

    rows = np.unique(np.linspace(0, len(result.labels) - 1, GRID).astype(int))
    views = [eval_transform(source[int(result.index[row])]["image"], preprocessing) for row in rows]
    figures.draw_predictions(
        np.stack(views),
        result.labels[rows],
        softmax(result.logits[rows]),
        source.class_names,
        path,
    )


def predict(config: ConfigDict, names: Sequence[str], trained: Trained, out: Path) -> None:
    """The most probable classes of each file on the screen, all in OUT/predictions.json and .csv.

    Also a grid of pictures, OUT/predict.png. What can't be read is named in the JSON with the
    reason.

    Args:
      config: the run's.
      names: of image files.
      trained: the model.
      out: where to write.

    Raises:
      UserError: none of the files can be read.
    """
    from vision_jax.tasks.classification import figures  # matplotlib

    outputs_fn = make_outputs(
        config, trained.model, trained.predicts, trained.apply, trained.assemble
    )
    source = images.source_of(names)
    batches = images.make_batches(config, trained.preprocessing)
    size = min(len(names), config.evaluate.batch_size)
    run_over = make_run_over(outputs_fn, trained.mesh, batches, batch_size=size)
    found, damage = run_over(source, *trained.arguments)
    if jax.process_index():
        return
    probabilities, rows = softmax(found["logits"]), found["index"]
    views = images.read_views(source, rows[:GRID], trained.preprocessing)
    out.mkdir(parents=True, exist_ok=True)
    _say_classes([names[row] for row in rows], probabilities, trained.class_names)
    say_damaged(damage.lines)
    _write_predictions(names, rows, probabilities, damage, trained.class_names, out)
    path = out / "predict.png"
    figures.draw_predictions(views, None, probabilities[:GRID], trained.class_names, path)
    say(f"wrote {out / 'predictions.json'}, each file with its class and all probabilities")
    say(f"wrote {out / 'predictions.csv'}, the same as a table")
    say(f"wrote {path}")


def _say_classes(
    names: Sequence[str], probabilities: np.ndarray, class_names: Sequence[str]
) -> None:
    """The most probable classes of each file."""
    width = max(len(printable(name)) for name in names)
    for name, row in zip(names, probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:SHOWN]
        text = "  ".join(f"{class_names[index]} {row[index]:.3f}" for index in best)
        say(f"{printable(name):{width}}  {text}")


def _write_predictions(
    names: Sequence[str],
    rows: np.ndarray,
    probabilities: np.ndarray,
    damage: DamageLog,
    class_names: Sequence[str],
    out: Path,
) -> None:
    """predictions.json of all files, predictions.csv of those that could be read."""
    shown = list(map(utf8, class_names))
    record: dict[int, dict[str, Any]] = {}
    for row, own in zip(rows.tolist(), probabilities, strict=True):
        record[row] = best_classes(own, class_names, LISTED) | {"probabilities": own.tolist()}
    listed = images.list_files(names, record, damage)
    write_json({"class_names": shown, "images": listed}, out / "predictions.json")
    with open(out / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "class", "probability", *shown])
        for row, one in record.items():
            first = (one["class"], one["probability"])
            table.writerow([utf8(names[row]), *first, *one["probabilities"]])


# Robustness -------------------------------------------------------------------------------------


def robustness(
    config: ConfigDict,
    workdir: Path,
    trained: Trained,
    restore_other: Callable[[Path], Trained],
) -> dict[str, Any]:
    """Under attacks and corruptions (see robustness.py): what robustness.json holds.

    Args:
      config: the run's, with its section robustness.
      workdir: where files are written.
      trained: the run.
      restore_other: another run from its folder, for attacks that transfer.
    """
    settings = config.robustness
    surrogate = None
    if settings.transfer_from:
        surrogate = under_attack.find_surrogate(
            Path(settings.transfer_from), trained, restore_other
        )
    wanted = under_attack.Settings(
        **vars(images.attack_settings(config)),
        corruptions=settings.corruptions,
        severities=settings.severities,
        autoattack=settings.autoattack,
        autoattack_epsilon=settings.autoattack_epsilon,
        self_check=settings.self_check,
        purify=purification.Settings(
            settings.purify,
            settings.purify_strength,
            settings.purify_steps,
            settings.purify_draws,
        ),
        threads=config.data.threads,
    )
    generator = None
    if settings.purify:
        folder = Path(settings.purify)
        if not (folder / "config.json").is_file():
            raise UserError(f"config.robustness.purify: {folder} holds no run: name a generator's")
        generator = restore_other(folder)
        purification.check_generator(generator, trained, settings.purify)
    source = read_eval_source(config, trained.class_names)
    return under_attack.measure(workdir, trained, source, surrogate, wanted, generator)
