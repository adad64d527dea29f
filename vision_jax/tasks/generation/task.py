"""Generation as a run's task: images with classes, the loss, evaluation and samples.

python -m vision_jax.main --config=configs/generate_embedded.py
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax import processes
from vision_jax.data import latents
from vision_jax.data.captions import CaptionedSource, read_captioned
from vision_jax.data.fingerprint import hash_of_images
from vision_jax.data.pipeline import DamageLog, evaluation_batches, stream
from vision_jax.data.sources import Source, hold_out, read_source, split_source, take_classes
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError
from vision_jax.evaluation import MakeBatches
from vision_jax.files import expand, user_cache
from vision_jax.logging import RunLog, say, show_progress
from vision_jax.objective import Apply, Objective
from vision_jax.tasks import images, unlabelled
from vision_jax.tasks.api import Trained
from vision_jax.tasks.generation import figures, metrics, objective
from vision_jax.tasks.generation.autoencoder import Autoencoder, check_fits, read_autoencoder
from vision_jax.tasks.generation.captions import NOTHING, Tower, read_tower

best_is = "lowest"
reported = ("loss",)  # of an evaluation, in metrics.jsonl
curves = ()  # of shares between 0 and 1 there are none
whole = ()  # of a batch, what losses count over a whole update: each image's is its own
labels_images = False

RECIPES = ("mask", "quantize", "lora")  # that make sense without logits of classes
DRAWN = ("generated", "label")  # what a picture is made of
LEARNED = ("velocity", "image")  # what models predict that are trained here
SAMPLED = (*LEARNED, "noise")  # and those that make images


# Data -------------------------------------------------------------------------------------------


def read_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The training and the evaluation images, with the same class names, or with captions.

    Raises:
      UserError: what the sources refuse, or fewer training images than a batch has.
    """
    train, held_out = _read_captioned(config) if config.text.tower else _read_classes(config)
    return images.training_part(config, train, config.batch_size), held_out


def read_eval_source(config: ConfigDict, class_names: tuple[str, ...]) -> Source:
    """The evaluation images alone, for a finished run."""
    del class_names  # those that config.data.classes leaves, or all
    if config.text.tower:
        return (
            _captioned(config, config.data.eval) if config.data.eval else _read_captioned(config)[1]
        )
    if not config.data.eval:
        train = _classes(config, images.without_excluded(config, read_source(config.data.train)))
        return split_source(train, config.data.holdout, config.seed)[1]
    names = read_source(config.data.train).class_names
    return _classes(config, read_source(config.data.eval, class_names=names))


def _read_classes(config: ConfigDict) -> tuple[Source, Source]:
    train = images.without_excluded(config, read_source(config.data.train))
    if not config.data.eval:
        return split_source(_classes(config, train), config.data.holdout, config.seed)
    held_out = read_source(config.data.eval, class_names=train.class_names)
    return _classes(config, train), _classes(config, held_out)


def _classes(config: ConfigDict, source: Source) -> Source:
    return take_classes(source, config.data.classes) if config.data.classes else source


def _read_captioned(config: ConfigDict) -> tuple[Source, Source]:
    if config.data.classes:
        raise UserError("config.data.classes: with config.text.tower captions are learned: ()")
    train = images.without_excluded(config, _captioned(config, config.data.train))
    if config.data.eval:
        return train, _captioned(config, config.data.eval)
    return hold_out(train, config.data.holdout, config.seed)


def _captioned(config: ConfigDict, spec: str) -> Source:
    return read_captioned(
        spec,
        path_column=config.text.path_column,
        caption_column=config.text.caption_column,
        templates=config.text.templates,
    )


def announce(log: RunLog, workdir: Path, train: Source, held_out: Source) -> None:
    """Nothing more than the numbers of images and classes, which the loop tells."""
    del log, workdir, train, held_out


load_preprocessing = images.load_preprocessing


def make_preprocessing(
    config: ConfigDict, own: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Preprocessing | None:
    """How images are prepared, or how latents lie: image_size is in their cells then.

    Raises:
      UserError: a size in pixels that is not of whole cells.
    """
    made, around = images.make_preprocessing(config, own, arguments), _autoencoder(config)
    if made is None or around is None or not config.model.image_size:
        return made
    cells, more = divmod(config.model.image_size, around.cell)
    if more:
        raise UserError(
            f"config.model.image_size {config.model.image_size}: latents have cells of "
            f"{around.cell} pixels a side: take a multiple"
        )
    return replace(made, image_size=(cells, cells))


def batch_shapes(config: ConfigDict, preprocessing: Preprocessing) -> dict[str, Any]:
    """ShapeDtypeStructs of a training batch, over all processes."""
    shapes = images.batch_shapes(config, preprocessing)
    if config.latents.autoencoder:
        del shapes["image"]
    return shapes | {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), np.float32)
        for name, shape in _stored_shapes(config, preprocessing).items()
    }


def _stored_shapes(config: ConfigDict, preprocessing: Preprocessing) -> dict[str, tuple[int, ...]]:
    """Of the arrays of an example that are computed before training."""
    around, tower = _autoencoder(config), _tower(config)
    of_image = {} if around is None else around.shapes(preprocessing.image_size)
    return of_image if tower is None else of_image | {"caption": (2, tower.width)}


def made_with(config: ConfigDict) -> tuple[tuple[str, str], ...]:
    """(origin, sha256) of the frozen weights around the model."""
    around, tower = _autoencoder(config), _tower(config)
    found = () if around is None else ((around.weights.origin, around.weights.sha256),)
    return found if tower is None else (*found, *tower.made_with)


def _autoencoder(config: ConfigDict) -> Autoencoder | None:
    """Whose latents are learned."""
    if not config.latents.autoencoder:
        return None
    return read_autoencoder(
        config.latents.autoencoder,
        allow_pickle=config.model.allow_pickle,
        field="config.latents.autoencoder",
    )


def _tower(config: ConfigDict) -> Tower | None:
    """Whose captions are learned."""
    if not config.text.tower:
        return None
    return read_tower(
        config.text.tower, config.text.tokenizer, allow_pickle=config.model.allow_pickle
    )


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

    Latents and captions are encoded before the first one, those that are not in the cache.

    Raises:
      UserError: views that can't be encoded once for all, or what the cache refuses.
    """
    if config.latents.autoencoder and config.data.crop != "none":
        raise UserError(
            f"config.data.crop {config.data.crop}: latents are encoded once, of whole images: set "
            "it to none"
        )
    stored = _stored(config, source, preprocessing, flips=config.data.flip)
    if not config.latents.autoencoder:
        return images.make_training_batches(config, stored, preprocessing, damage, first_batch)
    load = latents.LoadForTraining(cast(latents.StoredSource, stored), config.data.flip)
    return stream(stored, load, **images.stream_arguments(config, damage, first_batch))


def _stored(
    config: ConfigDict, source: Source, preprocessing: Preprocessing, *, flips: bool
) -> Source:
    """The source with its images' latents and its captions' embeddings, where these are learned.

    What is not in the cache is computed now.
    """
    around, tower = _autoencoder(config), _tower(config)
    if around is None and tower is None:
        return source
    place = expand(config.latents.cache) if config.latents.cache else user_cache("latents")
    shared: dict[str, Any] = {"most_bytes": 1e9 * config.latents.max_gb, "say": say}

    def store() -> tuple[latents.Latents | None, latents.Embeddings | None]:
        of_images = of_captions = None
        if around is not None:
            pixels = around.pixels(preprocessing)
            identity = {
                **around.identity,
                "preprocessing": asdict(pixels),
                "images": hash_of_images(source),
                "flips": flips,
            }
            of_images = latents.store_latents(
                place,
                source,
                preprocessing=pixels,
                encode=around.encoded,
                shapes=around.shapes(preprocessing.image_size),
                flips=flips,
                identity=identity,
                num_threads=config.data.threads,
                show_progress=show_progress,
                **shared,
            )
        if tower is not None and isinstance(source, CaptionedSource):
            of_captions = latents.store_embeddings(
                place,
                source.captions,
                nothing=NOTHING,
                embed=tower.embed,
                width=tower.width,
                identity=tower.identity,
                **shared,
            )
        return of_images, of_captions

    # The first process encodes; where its folder is not theirs, the others do.
    found = processes.together(lambda: store() if jax.process_index() == 0 else None)
    return latents.with_stored(source, *(found or store()))


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
    check_fits(_autoencoder(config), model, "config.latents.autoencoder")
    _check_captions(_tower(config), model)
    others = [name for name in config.recipes if name not in RECIPES]
    if others:
        raise UserError(
            f"config.recipes: {others[0]} is not for a generator: take "
            f"{', '.join(RECIPES)}, or none"
        )
    return objective.make_objective(apply, assemble, make_task(config, model, predicts))


def _check_captions(tower: Tower | None, model: Any) -> None:
    """Raises UserError where the model doesn't take what the tower says of a caption."""
    wanted = 0 if tower is None else tower.width
    own = getattr(model, "caption_width", 0)
    if tower is None and own:
        raise UserError("config.text.tower: this generator learns captions: name their tower")
    if own != wanted:
        raise UserError(
            f"config.text.tower: its captions are {wanted} numbers, and the generator takes {own}: "
            f'add ("caption_width", {wanted}) to config.model.arguments'
        )


def make_task(
    config: ConfigDict, model: Any, predicts: str, *, known: Sequence[str] = LEARNED, **more: Any
) -> objective.Task:
    """What is learned, of a run's config and its model.

    Args:
      config: of the run.
      model: the generator.
      predicts: of its family.
      known: what its outputs may be.
      **more: further attributes of the task.

    Raises:
      UserError: a model that makes no images, or none by flow matching.
    """
    del predicts
    outputs: Any = getattr(model, "predicts", "")
    if outputs not in known:
        trained = outputs in SAMPLED and " is not trained here, but vision_jax generate takes it"
        raise UserError(
            "config.task generation takes a transformer that predicts velocities or images, and "
            f"this model, a {type(model).__name__}{trained or ', does not'}: set "
            "config.model.variant, say to jit_b_16"
        )
    around = _autoencoder(config)
    more = {
        "scales": None if around is None else around.scales,
        "captions": model.caption_width > 0,
        **more,
    }
    return objective.Task(
        predicts=outputs,
        num_classes=model.num_classes,
        shape=(*model.image_size, model.in_channels),
        time_mean=config.flow.time_mean,
        time_std=config.flow.time_std,
        unconditional=config.flow.unconditional,
        **more,
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
    around = _autoencoder(config)
    source = _stored(config, source, preprocessing, flips=False)
    batches = _make_batches(config, preprocessing)
    run_over = unlabelled.make_pass(
        config, outputs_fn, mesh, preprocessing, ("loss",), batches=batches
    )
    draw = unlabelled.make_pictures(config, outputs_fn, mesh, source, preprocessing, DRAWN, batches)

    def evaluate(*arguments: Any) -> Evaluation:
        found, damage = run_over(source, *arguments)
        summary = metrics.summarize(found["loss"])
        pictures = draw(*arguments)
        if around is not None and len(pictures["index"]):
            pictures = {**pictures, "generated": around.decoded(pictures["generated"])}
        return Evaluation(summary, damage.lines, pictures)

    return evaluate


def _make_batches(config: ConfigDict, preprocessing: Preprocessing) -> MakeBatches:
    """Makes the batches of an evaluation (see evaluation.MakeBatches)."""
    shapes = _stored_shapes(config, preprocessing)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    if not config.latents.autoencoder:
        return partial(images.make_batches(config, preprocessing), beside=zeros)

    def make_batches(source: latents.StoredSource, **given: Any) -> Any:
        load = latents.LoadForEvaluation(source, {**zeros, "label": np.int32(0)})
        return evaluation_batches(source, load, num_threads=config.data.threads, **given)

    return make_batches


# Results ----------------------------------------------------------------------------------------


def write_results(
    config: ConfigDict,
    workdir: Path,
    result: Evaluation,
    source: Source,
    preprocessing: Preprocessing,
) -> dict[str, str]:
    """Pictures of all evaluations, beside real ones; returns {file: what it is}."""
    if not len(result.pictures["index"]):
        return {}
    around = _autoencoder(config)
    seen = preprocessing if around is None else around.pixels(preprocessing)
    figures.draw_progress(workdir, images.read_views(source, result.pictures["index"], seen))
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
