"""What tasks that learn features without labels share: how these are measured while they train.

Features are a batch's outputs "token" f[B, D], of whole images, and "patch_tokens" f[B, N, D]. With
`probe.data` labels tell what the frozen features are worth; without, their rank alone is told.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import Source
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import DivergedError, printable
from vision_jax.evaluation import say_damaged
from vision_jax.logging import say
from vision_jax.objective import Apply, Batch
from vision_jax.ops.images import to_float
from vision_jax.ops.probe import few_shot_predict, fit_logistic, knn_predict
from vision_jax.ops.self_distillation import effective_rank
from vision_jax.tasks import images, unlabelled
from vision_jax.tasks.api import Trained
from vision_jax.tasks.collapse import diagnose_rank

OF_LABELS = ("knn", "linear", "few_shot")  # shares of the images that are right
REPORTED = (*OF_LABELS, "rank")  # of an evaluation's summary

RANKED = 2048  # images of which the rank is computed, evenly spread
DRAWN = ("patch_tokens",)  # what a picture is made of

OutputsFn = Callable[..., Mapping[str, jax.Array]]


# Data -------------------------------------------------------------------------------------------


def training_squares(
    config: ConfigDict,
    source: Source,
    preprocessing: Preprocessing,
    damage: DamageLog,
    first_batch: int,
    *,
    side: int,
) -> grain.DatasetIterator:
    """Endless batches of this process, from `first_batch` on: squares that views are cropped from.

    They have `side` pixels; 0 takes the model's size.

    Raises:
      UserError: images smaller than what the model takes.
    """
    unlabelled.check_sizes(source, preprocessing)
    square = _square(preprocessing, side)
    return images.make_training_batches(config, source, square, damage, first_batch)


def shapes_of_squares(
    config: ConfigDict, preprocessing: Preprocessing, *, side: int
) -> dict[str, Any]:
    """ShapeDtypeStructs of a training batch, over all processes."""
    return images.batch_shapes(config, _square(preprocessing, side))


def _square(preprocessing: Preprocessing, side: int) -> Preprocessing:
    """The largest central square of an image."""
    size = (side, side) if side else preprocessing.image_size
    return replace(preprocessing, image_size=size, crop_pct=1.0)


# Figures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """How features are measured by labels; the names are those of the section `probe` of a config.

    Attributes:
      neighbors: k of the nearest neighbors; 0 asks none.
      strength: C of the logistic regression; 0 fits none.
      shots: labels of each class of a regression on few; 0 fits none.
      repeats: choices of these.
      seed: of the first choice.
    """

    neighbors: int
    strength: float
    shots: int
    repeats: int
    seed: int


@dataclass(frozen=True)
class Labelled:
    """Features f[N, D] with the labels i[N] of their images."""

    features: np.ndarray
    labels: np.ndarray


def measure(learn: Labelled, test: Labelled, num_classes: int, probe: Probe) -> dict[str, Any]:
    """Top-1 on the features of `test` of what is fitted to those of `learn`; None if not asked for.

    "knn" by the votes of the nearest, "linear" by logistic regression, "few_shot" by regression on
    few labels, the mean over their choices (see ops.probe).
    """
    given = (learn.features, learn.labels, test.features)

    def top1(predicted: np.ndarray) -> float:
        return float((predicted == test.labels).mean())

    found: dict[str, Any] = dict.fromkeys(OF_LABELS)
    if k := probe.neighbors:
        nearest = knn_predict(*given, num_classes=num_classes, neighbors=(k,))
        found["knn"] = top1(nearest[k])
    if probe.strength:
        fitted = fit_logistic(*given[:2], num_classes=num_classes, strength=probe.strength)
        found["linear"] = top1(fitted(test.features).argmax(-1))
    if probe.shots:
        seeds = range(probe.seed, probe.seed + probe.repeats)
        arguments: dict[str, Any] = {"num_classes": num_classes, "shots": probe.shots}
        chosen = [top1(few_shot_predict(*given, **arguments, seed=seed)) for seed in seeds]
        found["few_shot"] = float(np.mean(chosen))
    return found


def rank(features: np.ndarray) -> float:
    """The effective rank of features f[N, D] (see ops.self_distillation.effective_rank)."""
    rows = np.unique(np.linspace(0, len(features) - 1, min(RANKED, len(features))).astype(int))
    return float(effective_rank(jnp.asarray(features[rows], jnp.float32)))


def check_finite(features: np.ndarray) -> None:
    """Raises UserError for features f[N, D] that are not finite."""
    bad = int(np.sum(~np.isfinite(features).all(1)))
    if bad:
        raise DivergedError(
            f"evaluation: the features are not finite for {bad} of {len(features)} images; the "
            "weights are damaged or training diverged"
        )


# Evaluation -------------------------------------------------------------------------------------


def make_outputs(
    config: ConfigDict, model: Any, predicts: str, apply: Apply, assemble: Callable[..., Any]
) -> OutputsFn:
    """What evaluation needs of a batch: "token" f[B, D] and "patch_tokens" f[B, N, D].

    These are features before any head; the teacher's, where a run has one.
    """
    del config, model, predicts

    def outputs_fn(trainable, frozen, model_state, batch: Batch):
        params = assemble({**trainable, **frozen})
        outputs, _ = apply(params, model_state, to_float(batch["image"]), train=False, keys={})
        kept = {name: batch[name] for name in ("label", "mask", "index")}
        return {name: outputs[name] for name in ("token", "patch_tokens")} | kept

    return outputs_fn


@dataclass(frozen=True)
class Evaluation(unlabelled.Pictured):
    """The features of a whole dataset."""

    reported: ClassVar[tuple[str, ...]] = REPORTED

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """A rank that falls; what training itself tells is said while it trains."""
        ranks = [r["eval/rank"] for r in history if "eval/rank" in r and r["step"] < step]
        found = diagnose_rank([*ranks, self.summary["rank"]])
        return [found] if found else []


def make_summarize(
    config: ConfigDict,
    outputs_fn: OutputsFn,
    mesh: Mesh,
    source: Source,
    preprocessing: Preprocessing,
) -> Callable[..., dict[str, Any]]:
    """A function (outputs of the source, trainable, frozen, model_state) -> figures by name.

    These are REPORTED and "count". The outputs are those of `unlabelled.make_pass` with "token" and
    "label"; images that labels are learned from are passed over here.
    """
    labelled = unlabelled.read_labelled(config)
    run_over = unlabelled.make_pass(config, outputs_fn, mesh, preprocessing, ("token", "label"))
    settings = config.probe
    probe = Probe(
        neighbors=settings.neighbors,
        strength=settings.strength,
        shots=settings.shots,
        repeats=settings.repeats,
        seed=config.seed,
    )

    def of(found: Mapping[str, np.ndarray]) -> Labelled:
        features = np.asarray(found["token"], np.float32)
        check_finite(features)
        return Labelled(features, found["label"])

    def summarize(outputs, *arguments: Any) -> dict[str, Any]:
        test = of(outputs)
        found: dict[str, Any] = dict.fromkeys(OF_LABELS)
        if labelled is not None:
            learn = of(run_over(labelled[0], *arguments)[0])
            found = measure(learn, test, len(source.class_names), probe)
        return {**found, "rank": rank(test.features), "count": len(test.features)}

    return summarize


def make_evaluate(
    config: ConfigDict,
    outputs_fn: OutputsFn,
    mesh: Mesh,
    source: Source,
    preprocessing: Preprocessing,
) -> Callable[..., Evaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source."""
    run_over = unlabelled.make_pass(config, outputs_fn, mesh, preprocessing, ("token", "label"))
    summarize = make_summarize(config, outputs_fn, mesh, source, preprocessing)
    draw = unlabelled.make_pictures(config, outputs_fn, mesh, source, preprocessing, DRAWN)

    def evaluate(*arguments: Any) -> Evaluation:
        found, damage = run_over(source, *arguments)
        return Evaluation(summarize(found, *arguments), damage.lines, draw(*arguments))

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
    from vision_jax.tasks import patches  # matplotlib, only where something is drawn

    views = images.read_views(source, pictures["index"], preprocessing)
    tokens = np.asarray(pictures["patch_tokens"], np.float32)
    height, width = preprocessing.image_size
    rows = round((tokens.shape[1] * height / width) ** 0.5)
    colors = patches.color_patches(tokens, (rows, tokens.shape[1] // rows))
    patches.draw_patches(views, colors, path)


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
    mesh, preprocessing, source = trained.mesh, trained.preprocessing, images.source_of(names)
    outputs_fn = make_outputs(
        config, trained.model, trained.predicts, trained.apply, trained.assemble
    )
    size = min(len(names), config.evaluate.batch_size)
    run_over = unlabelled.make_pass(config, outputs_fn, mesh, preprocessing, ("token",), size)
    found, damage = run_over(source, *trained.arguments)
    draw = unlabelled.make_pictures(config, outputs_fn, mesh, source, preprocessing, DRAWN)
    pictures = draw(*trained.arguments)
    if jax.process_index():
        return
    _say_neighbors(names, found["index"], np.asarray(found["token"], np.float64))
    say_damaged(damage.lines)
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
