"""Images and texts as a run's task: captions and tokens, the loss, evaluation and pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vision_jax.data import captions
from vision_jax.data.captions import CaptionedSource
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import Source, hold_out, read_source, subset
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError, printable
from vision_jax.evaluation import make_run_over, say_damaged
from vision_jax.files import write_whole
from vision_jax.logging import RunLog, say
from vision_jax.objective import Apply, Objective
from vision_jax.tasks import images, unlabelled
from vision_jax.tasks.api import Trained
from vision_jax.tasks.image_text import metrics, objective

best_is = "highest"
reported = (  # of an evaluation, in metrics.jsonl
    "recall",
    *(f"{name}_{k}" for name in ("image_to_text", "text_to_image") for k in metrics.DEPTHS),
    "zero_shot",
)
curves = ("recall", "zero_shot")  # of the former, in curves.png
whole = ()  # of a batch, what losses count over a whole update: a micro-batch is a batch of its own
labels_images = False

SHOWN = 6  # pictures in captions.png
NEAREST = 2  # captions of each


def best_metric(config: ConfigDict) -> str:
    """Of an evaluation's summary, what the best checkpoint is best at."""
    del config
    return "recall"


# Data -------------------------------------------------------------------------------------------


def read_sources(config: ConfigDict) -> tuple[CaptionedSource, CaptionedSource]:
    """The training and the held-out images with their captions, tokenized.

    Raises:
      UserError: what the sources and the tokenizer refuse, or fewer pairs than a batch has.
    """
    train, held_out = _read_both(config)
    if config.data.subset:
        train = subset(train, config.data.subset, config.seed)
    if len(train) < config.batch_size:
        raise UserError(
            f"{train.name}: {len(train)} pairs to train on are fewer than a batch of "
            f"{config.batch_size}: add images, or set config.batch_size"
        )
    tokenizer = _make_tokenizer(config, train)
    length = config.text.length
    return captions.tokenized(train, tokenizer, length), captions.tokenized(
        held_out, tokenizer, length
    )


def read_eval_source(config: ConfigDict, class_names: tuple[str, ...]) -> CaptionedSource:
    """The held-out pairs, for a finished run, whose tokenizer may need the training captions."""
    del class_names  # none
    if config.text.tokenizer and config.data.eval:
        tokenizer = captions.load_tokenizer(config.text.tokenizer)
        return captions.tokenized(_read(config, config.data.eval), tokenizer, config.text.length)
    return read_sources(config)[1]


def _read(config: ConfigDict, spec: str) -> CaptionedSource:
    return captions.read_captioned(
        spec,
        path_column=config.text.path_column,
        caption_column=config.text.caption_column,
        templates=config.text.templates,
    )


def _read_both(config: ConfigDict) -> tuple[Any, Any]:
    train = images.without_excluded(config, _read(config, config.data.train))
    if config.data.eval:
        return train, _read(config, config.data.eval)
    return hold_out(train, config.data.holdout, config.seed)


def _make_tokenizer(config: ConfigDict, train: CaptionedSource) -> Any:
    if config.text.tokenizer:
        return captions.load_tokenizer(config.text.tokenizer)
    own = [train.caption(row) for row in range(len(train))]
    return captions.train_tokenizer(own, config.text.vocab_size)


def announce(log: RunLog, workdir: Path, train: CaptionedSource, held_out: CaptionedSource) -> None:
    """The tokenizer in the workdir, whosever it is."""
    del held_out
    write_whole(train.tokenizer.encode(), workdir / captions.TOKENIZER_FILE)
    log.wrote(workdir / captions.TOKENIZER_FILE, "the tokenizer of the captions")


make_preprocessing = images.make_preprocessing
load_preprocessing = images.load_preprocessing


def training_data(
    config: ConfigDict,
    source: CaptionedSource,
    preprocessing: Preprocessing,
    damage: DamageLog,
    first_batch: int = 0,
) -> grain.DatasetIterator:
    """Endless batches of this process, from `first_batch` on; a damaged image takes its caption."""
    return images.make_training_batches(config, source, preprocessing, damage, first_batch)


def batch_shapes(config: ConfigDict, preprocessing: Preprocessing) -> dict[str, Any]:
    """ShapeDtypeStructs of a training batch, over all processes."""
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.text.length), np.int32)
    return images.batch_shapes(config, preprocessing) | {"tokens": tokens}


# Loss and evaluation ----------------------------------------------------------------------------


def make_objective(
    config: ConfigDict,
    model: Any,
    predicts: str,
    apply: Apply,
    assemble: Callable[..., Any],
    mesh: Mesh,
) -> Objective:
    """What training minimizes: the sigmoid loss of all pairs of a batch.

    Raises:
      UserError: a model that has no text tower, tokens that it doesn't take, or a recipe that needs
        labels.
    """
    unlabelled.check_recipes(config, "images and texts")
    _check(config, model, predicts)
    watch = metrics.Watch(
        pairs=config.batch_size // config.optim.accumulate,
        warn_after=config.evaluate.warn_after,
        warmup_steps=config.optim.warmup_steps,
        stop=config.text.stop,
    )
    return objective.make_objective(apply, assemble, mesh, watch)


def _check(config: ConfigDict, model: Any, predicts: str) -> None:
    if predicts != "pairs":
        raise UserError(
            f"config.task image_text takes a ViT, and this model is a {type(model).__name__}: set "
            "config.model.variant to b/16, say, or config.model.weights to a ViT's"
        )
    if model.text_length != config.text.length:
        raise UserError(
            f"config.text.length {config.text.length}, and the model takes {model.text_length} "
            f'tokens: set config.text.length to that, or ("text_length", {config.text.length}) in '
            "config.model.arguments"
        )
    if config.text.tokenizer:
        tokenizer = captions.load_tokenizer(config.text.tokenizer)
        size, what = tokenizer.get_vocab_size(), f"{config.text.tokenizer} has"
    else:
        size, what = config.text.vocab_size, "config.text.vocab_size asks for"
    if size > model.vocab_size:
        raise UserError(
            f"{what} {size} tokens, and the model takes {model.vocab_size}: set "
            f'("vocab_size", {size}) in config.model.arguments, or take another tokenizer'
        )


def make_outputs(
    config: ConfigDict, model: Any, predicts: str, apply: Apply, assemble: Callable[..., Any]
) -> Callable[..., Mapping[str, jax.Array]]:
    """What evaluation needs of a batch: the features of its images or of its tokens."""
    del config, model, predicts
    return objective.make_outputs(apply, assemble)


@dataclass(frozen=True)
class Evaluation(unlabelled.Evaluation):
    """The retrieval of a whole dataset: metrics.summarize and "zero_shot", or None.

    Attributes:
      shown: i[n], rows of some images.
      captions: of each of these, the nearest.
    """

    reported: ClassVar[tuple[str, ...]] = reported
    counted: ClassVar[str] = "pairs"

    shown: np.ndarray
    captions: tuple[tuple[str, ...], ...]

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """None: what training itself tells is said while it trains."""
        del step, history
        return []


def make_evaluate(
    config: ConfigDict,
    outputs_fn: Callable[..., Mapping[str, jax.Array]],
    mesh: Mesh,
    source: CaptionedSource,
    preprocessing: Preprocessing,
) -> Callable[..., Evaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source.

    The images of config.text.zero_shot are classified by the nearest class, whose features are the
    mean of those of its prompts.
    """
    batch_size = config.evaluate.batch_size
    batches = images.make_batches(config, preprocessing)
    of_images = make_run_over(outputs_fn, mesh, batches, batch_size=batch_size)
    of_texts = _make_text_features(outputs_fn, mesh, batch_size)
    tokens, plain = source.tokens, replace(source, tokens=None)  # a caption has no image's batch
    assert tokens is not None
    labelled = read_source(config.text.zero_shot) if config.text.zero_shot else None
    prompts = None
    if labelled is not None:
        names = _class_names(config, labelled.class_names)
        tokenizer = captions.read_tokenizer(source.tokenizer)
        prompts = captions.tokenize(tokenizer, _prompts(config, names), config.text.length)

    def classify(arguments: tuple[Any, ...]) -> float | None:
        if labelled is None or prompts is None:
            return None
        found, _ = of_images(labelled, *arguments)
        classes = metrics.class_features(
            of_texts(prompts, arguments), len(prompts) // len(config.text.templates)
        )
        chosen = (found["features"] @ classes.T).argmax(1)
        return float((chosen == labelled.labels[found["index"]]).mean())

    def evaluate(trainable, frozen, model_state) -> Evaluation:
        arguments = (trainable, frozen, model_state)
        found, damage = of_images(plain, *arguments)
        rows, image = found["index"], found["features"]
        text = of_texts(tokens[source.rows[rows]], arguments)
        own = [source.caption(row) for row in rows]
        summary = metrics.summarize(image, text, [source.example_name(row) for row in rows], own)
        shown = np.unique(np.linspace(0, len(rows) - 1, SHOWN).astype(int))
        nearest = tuple(_nearest(one, text, own, NEAREST) for one in image[shown])
        summary["zero_shot"] = classify(arguments)
        return Evaluation(summary, damage.lines, rows[shown], nearest)

    return evaluate


def _class_names(config: ConfigDict, own: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(config.text.classes) or own
    if len(names) != len(own):
        raise UserError(
            f"config.text.classes names {len(names)} classes, and {config.text.zero_shot} has "
            f"{len(own)}: {', '.join(own[:5])}"
        )
    return names


def _prompts(config: ConfigDict, names: Sequence[str]) -> list[str]:
    """Of each class all templates, one class after the other."""
    return [t.replace("{}", name) for name in names for t in config.text.templates]


def _nearest(image: np.ndarray, text: np.ndarray, own: list[str], count: int) -> tuple[str, ...]:
    """The nearest different captions of an image's features f[D]."""
    order = np.argsort(-(text @ image), kind="stable")
    return tuple(dict.fromkeys(own[i] for i in order))[:count]


def _make_text_features(
    outputs_fn: Callable[..., Mapping[str, jax.Array]], mesh: Mesh, batch_size: int
) -> Callable[[np.ndarray, tuple[Any, ...]], np.ndarray]:
    """A function (tokens i32[N, L], arguments) -> features f[N, D]."""
    run_over = make_run_over(outputs_fn, mesh, _text_batches, batch_size=batch_size)

    def features(tokens: np.ndarray, arguments: tuple[Any, ...]) -> np.ndarray:
        return run_over(_Texts(tokens), *arguments)[0]["features"]

    return features


@dataclass(frozen=True)
class _Texts:
    """Tokens i32[N, L] as `make_run_over` takes a source."""

    tokens: np.ndarray
    name: str = "captions"

    def __len__(self) -> int:
        return len(self.tokens)


def _text_batches(
    source: _Texts,
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
    damage_log: DamageLog,
) -> Iterator[dict[str, np.ndarray]]:
    """Every text once, as make_eval_batches does it with images."""
    del damage_log
    step = batch_size * process_count
    for start in range(0, len(source), step):
        rows = np.arange(start + process_index, start + step, process_count, dtype=np.int32)
        there = rows < len(source)
        tokens = source.tokens[np.where(there, rows, 0)]
        yield {"tokens": tokens, "mask": there, "index": np.where(there, rows, -1).astype(np.int32)}


# Results ----------------------------------------------------------------------------------------


def write_results(
    config: ConfigDict,
    workdir: Path,
    result: Evaluation,
    source: CaptionedSource,
    preprocessing: Preprocessing,
) -> dict[str, str]:
    """Some images and their nearest captions; returns {file: what it is}."""
    del config
    _draw(workdir / "captions.png", source, result.shown, result.captions, preprocessing)
    return {"captions.png": "held-out images, and the captions that are nearest to each"}


def _draw(
    path: Path,
    source: Source,
    rows: np.ndarray,
    texts: Sequence[Sequence[str]],
    preprocessing: Preprocessing,
) -> None:
    from vision_jax.tasks.image_text import figures  # matplotlib, only where it draws

    views = images.read_views(source, rows, preprocessing)
    figures.draw_captions(views, texts, path)


def predict(config: ConfigDict, names: Sequence[str], trained: Trained, out: Path) -> None:
    """Of each file the nearest classes on the screen, and of the first ones in a picture.

    Args:
      config: the run's; its text.classes, or else the classes of text.zero_shot, are what files are
        compared with.
      names: of image files.
      trained: the model.
      out: where captions.png is written.

    Raises:
      UserError: no classes, or none of the files can be read.
    """
    classes = tuple(config.text.classes)
    if not classes and config.text.zero_shot:
        classes = read_source(config.text.zero_shot).class_names
    if not classes:
        raise UserError(
            "config.text.classes is empty: name what images are to be compared with, "
            "--config.text.classes=\"('cat', 'dog')\""
        )
    tokenizer = _make_tokenizer(config, _tokenizer_source(config))
    outputs_fn = make_outputs(
        config, trained.model, trained.predicts, trained.apply, trained.assemble
    )
    source = images.source_of(names)
    batches = images.make_batches(config, trained.preprocessing)
    size = min(len(names), config.evaluate.batch_size)
    run_over = make_run_over(outputs_fn, trained.mesh, batches, batch_size=size)
    found, damage = run_over(source, *trained.arguments)
    of_texts = _make_text_features(outputs_fn, trained.mesh, config.evaluate.batch_size)
    prompts = captions.tokenize(tokenizer, _prompts(config, classes), config.text.length)
    text = metrics.class_features(of_texts(prompts, trained.arguments), len(classes))
    if jax.process_index():
        return
    scale, bias = (found[name][0] for name in ("logit_scale", "logit_bias"))
    logits = scale * (found["features"] @ text.T) + bias
    width = max(len(printable(name)) for name in names)
    said = []
    for row, own_logits in zip(found["index"], logits, strict=True):
        best = np.argsort(-own_logits, kind="stable")[:NEAREST]
        words = [f"{classes[i]} {1 / (1 + np.exp(-own_logits[i])):.4f}" for i in best]
        said.append(words)
        say(f"{printable(names[row]):{width}}  {'  '.join(map(printable, words))}")
    say_damaged(damage.lines)
    rows = found["index"][:SHOWN]
    out.mkdir(parents=True, exist_ok=True)
    _draw(out / "captions.png", source, rows, said[:SHOWN], trained.preprocessing)
    say(f"wrote {out / 'captions.png'}")


def _tokenizer_source(config: ConfigDict) -> Any:
    """The training captions, where a tokenizer is to be trained again."""
    if config.text.tokenizer:
        return None
    train, _ = _read_both(config)
    return subset(train, config.data.subset, config.seed) if config.data.subset else train


robustness = unlabelled.robustness
