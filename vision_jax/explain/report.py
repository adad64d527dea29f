"""Images, or a data set, explained in files: pictures, one JSON of figures, one page to look at.

files --preprocess--> views --model--> class --methods--> maps --measures--> figures --> files
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vision_jax.config import write_json
from vision_jax.data.pipeline import DamageLog, make_eval_batches
from vision_jax.data.sources import Source
from vision_jax.errors import UserError, utf8
from vision_jax.evaluation import say_damaged
from vision_jax.explain import measures, page
from vision_jax.explain.classifier import RANDOM, make_explain_classifier, survivors
from vision_jax.explain.forward import Forward
from vision_jax.explain.methods import METHODS, find_method
from vision_jax.explain.page import Picture
from vision_jax.figures import save_figure
from vision_jax.files import write_whole
from vision_jax.logging import print_table, say, show_progress
from vision_jax.models import families
from vision_jax.ops.images import to_float
from vision_jax.tasks.images import file_name

BATCH = 16  # images at once
THREADS = 2
ERRORS = 12  # of a data set, the most confident ones that are shown
RECORD, PAGE = "explanations.json", "explanations.html"


@dataclass(frozen=True)
class Subject:
    """What is explained.

    Attributes:
      model: a classifier's flax module.
      variables: its arrays.
      class_names: by label.
      preprocessing: of its images.
      origin: where it came from, for the files.
    """

    model: Any
    variables: Mapping[str, Any]
    class_names: tuple[str, ...]
    preprocessing: Any
    origin: str


@dataclass(frozen=True)
class Explained:
    """One image with what the methods say of it.

    Attributes:
      row: in its source.
      view: u8[H, W, C], as the model sees it.
      label: the true one, if it is known.
      explained: the class that the maps are of.
      probabilities: f[C].
      maps: f[H, W] by method.
      figures: by method, and of RANDOM: see classifier.make_explain_classifier.
    """

    row: int
    view: np.ndarray
    label: int
    explained: int
    probabilities: np.ndarray
    maps: Mapping[str, np.ndarray]
    figures: Mapping[str, Mapping[str, float]]

    @property
    def predicted(self) -> int:
        """The most probable class."""
        return int(self.probabilities.argmax())


def choose_methods(subject: Subject, asked: Sequence[str]) -> list[str]:
    """The methods asked for, or all that the model can be explained by.

    Raises:
      UserError: no such method, or one that needs attention which the model has not; no classifier.
    """
    family = families.family_of(subject.model)
    if families.FAMILIES[family].predicts != "classes" or not subject.class_names:
        raise UserError(f"{subject.origin}: explain takes classifiers, and this is a {family}")
    forward = Forward(subject.model)
    size = subject.preprocessing.image_size
    images = jax.ShapeDtypeStruct((1, *size, subject.model.in_channels), jnp.float32)
    of_attention = [name for name in METHODS if name.startswith("attention")]
    for name in asked:
        find_method(name)
        if name in of_attention:
            forward.attention_taps(subject.variables, images)
    if asked:
        return list(dict.fromkeys(asked))
    try:
        forward.attention_taps(subject.variables, images)
    except UserError:
        return [name for name in METHODS if name not in of_attention]
    return list(METHODS)


def make_explain_source(
    subject: Subject, methods: Sequence[str], seed: int
) -> Callable[..., Iterator[Explained]]:
    """A function (source, damage log, labels of the rows or None) -> what is said of each image.

    Without labels the maps are of the class that the model finds. The last batch is filled up, so
    that each program is compiled once.
    """
    size = tuple(subject.preprocessing.image_size)
    explain = make_explain_classifier(Forward(subject.model), methods, size=size, seed=seed)
    variables = jax.tree.map(jnp.asarray, dict(subject.variables))
    apply = families.make_apply(subject.model)

    @jax.jit
    def classify(variables, images):
        outputs, _ = apply(
            variables["params"], variables.get("batch_stats", {}), images, train=False, keys={}
        )
        return jax.nn.softmax(outputs["logits"].astype(jnp.float32))

    def run(source: Source, damage: DamageLog, wanted: np.ndarray | None) -> Iterator[Explained]:
        batches = make_eval_batches(
            source,
            batch_size=min(BATCH, len(source)),
            preprocessing=subject.preprocessing,
            num_threads=THREADS,
            damage_log=damage,
        )
        for batch in batches:
            images = to_float(jnp.asarray(batch["image"]))
            probabilities = classify(variables, images)
            labels = probabilities.argmax(-1).astype(jnp.int32)
            if wanted is not None:
                labels = jnp.asarray(wanted[np.maximum(batch["index"], 0)], jnp.int32)
            index = jnp.asarray(batch["index"])
            found, probabilities, labels = jax.device_get(
                (explain(variables, images, labels, index), probabilities, labels)
            )
            for place in np.flatnonzero(batch["mask"]).tolist():
                own = {
                    name: {figure: values[place] for figure, values in found[name].items()}
                    for name in (*methods, RANDOM)
                }
                maps = {name: figures.pop("map") for name, figures in own.items() if name != RANDOM}
                yield Explained(
                    int(batch["index"][place]),
                    batch["image"][place],
                    int(batch["label"][place]),
                    int(labels[place]),
                    probabilities[place],
                    maps,
                    {
                        name: {figure: float(value) for figure, value in figures.items()}
                        for name, figures in own.items()
                    },
                )

    return run


def explain_images(
    subject: Subject,
    source: Source,
    methods: Sequence[str],
    out: Path,
    *,
    label: int | None,
    seed: int,
) -> None:
    """Writes a row of pictures for each image, OUT/explanations.json and OUT/explanations.html.

    Args:
      subject: the model.
      source: image files.
      methods: of methods.METHODS.
      out: the folder, which is there.
      label: the class to explain; None for the most probable one of each image.
      seed: of what is drawn.

    Raises:
      UserError: none of the images can be read.
    """
    damage = DamageLog()
    run = make_explain_source(subject, methods, seed)
    wanted = None if label is None else np.full(len(source), label)
    found: list[Explained] = []
    with show_progress(len(source), what="images") as (advance, _):
        for one in run(source, damage, wanted):
            found.append(one)
            advance()
    if not found:
        raise UserError(f"--images: none of them could be read, first {damage.lines[0]}")
    say_damaged(damage.lines)
    names = [source.example_name(one.row) for one in found]
    figures = mean_figures(found)
    pictures = [
        out / file_name(one.row, Path(name).stem) for name, one in zip(names, found, strict=True)
    ]
    for path, one in zip(pictures, found, strict=True):
        write_picture(one, path)
    record = {
        "model": subject.origin,
        "class_names": [utf8(name) for name in subject.class_names],
        "seed": seed,
        "methods": figures,
        "survive_random_weights": survivors(figures),
        "images": [
            {"file": utf8(name), "picture": path.name, **record_of(one, subject.class_names)}
            for name, path, one in zip(names, pictures, found, strict=True)
        ],
        "damaged": [utf8(line) for line in damage.lines],
    }
    sections = {
        f"{index + 1}. {Path(name).name}: {_classes(one, subject.class_names)}": pictures_of(one)
        for index, (name, one) in enumerate(zip(names, found, strict=True))
    }
    title = f"What {subject.origin} looks at"
    _finish(record, title, figures, sections, out)
    say(f"wrote {len(pictures)} pictures, {pictures[0]} and on: the image, then each method's map")


def explain_dataset(
    subject: Subject, source: Source, methods: Sequence[str], out: Path, *, seed: int
) -> None:
    """Writes what the model looks at in each class, and its most confident errors explained.

    The first method makes the maps. Files and arguments: see `explain_images`.

    Raises:
      UserError: none of the images can be read.
    """
    damage = DamageLog()
    run = make_explain_source(subject, methods, seed)
    found: list[Explained] = []
    with show_progress(len(source), what="images") as (advance, _):
        for one in run(source, damage, None):
            found.append(one)
            advance()
    if not found:
        raise UserError(f"{source.name}: none of its images could be read, {damage.lines[0]}")
    say_damaged(damage.lines)
    figures, names = mean_figures(found), subject.class_names
    wrong = sorted(
        (one for one in found if one.predicted != one.label),
        key=lambda one: -one.probabilities.max(),
    )[:ERRORS]
    true_class = _explained_as(run, source, wrong)
    looked = {names[label]: _looked_at(found, label, methods[0]) for label in range(len(names))}
    record = {
        "model": subject.origin,
        "data": source.name,
        "seed": seed,
        "count": len(found),
        "top1": float(np.mean([one.predicted == one.label for one in found])),
        "methods": figures,
        "survive_random_weights": survivors(figures),
        "per_class": {
            utf8(name): {"count": count, "heat_in_the_middle": middle}
            for name, (_, _, count, middle) in looked.items()
        },
        "confident_errors": [
            {
                "image": utf8(source.example_name(one.row)),
                "class": utf8(names[one.label]),
                **record_of(one, names),
            }
            for one in wrong
        ],
        "damaged": [utf8(line) for line in damage.lines],
    }
    sections: dict[str, Sequence[Picture]] = {
        f"Where it looks, the mean over the images it takes for each class ({methods[0]})": [
            Picture(
                name, [f"{count} images", f"{middle:.0%} of the heat in the middle"], view, heat
            )
            for name, (view, heat, count, middle) in looked.items()
            if count
        ]
    }
    for one, as_true in zip(wrong, true_class, strict=True):
        heading = (
            f"{source.example_name(one.row)}: {names[one.predicted]} by "
            f"{one.probabilities.max():.3f}, but it is {names[one.label]}"
        )
        sections[heading] = [
            Picture("image", [], page.to_rgb(one.view)),
            Picture(f"for {names[one.predicted]}", [methods[0]], page.to_rgb(one.view),
                    one.maps[methods[0]]),
            Picture(f"for {names[one.label]}", [methods[0]], page.to_rgb(one.view),
                    as_true.maps[methods[0]]),
        ]  # fmt: skip
    _finish(record, f"What {subject.origin} looks at in {source.name}", figures, sections, out)


def _explained_as(
    run: Callable[..., Iterator[Explained]], source: Source, wrong: Sequence[Explained]
) -> list[Explained]:
    """The images again, with maps of their true classes."""
    if not wrong:
        return []
    rows = np.array([one.row for one in wrong])
    part = replace(source, labels=source.labels[rows], rows=source.rows[rows])
    return list(run(part, DamageLog(), np.array([one.label for one in wrong])))


def _looked_at(
    found: Sequence[Explained], label: int, method: str
) -> tuple[np.ndarray, np.ndarray, int, float | None]:
    """(mean view u8[H, W, 3], mean heat f[H, W], images, share of the heat in the middle quarter).

    Each image's heat counts alike.
    """
    own = [one for one in found if one.predicted == label]  # whose maps are of this class
    if not own:
        return np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1)), 0, None
    heats = np.stack([np.maximum(one.maps[method], 0) for one in own])
    heats /= np.maximum(heats.sum((1, 2), keepdims=True), np.finfo(np.float32).tiny)
    view = np.mean([page.to_rgb(one.view) for one in own], axis=0).round().astype(np.uint8)
    height, width = view.shape[:2]
    box = jnp.array([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]])
    mean = heats.mean(0)
    return view, mean, len(own), float(measures.share_inside(jnp.asarray(mean)[None], box)[0])


def mean_figures(found: Sequence[Explained]) -> dict[str, dict[str, float]]:
    """By method the mean of each figure over the images."""
    return {
        name: {
            figure: float(np.mean([one.figures[name][figure] for one in found]))
            for figure in figures
        }
        for name, figures in found[0].figures.items()
    }


def record_of(one: Explained, class_names: Sequence[str]) -> dict[str, Any]:
    """What the JSON has of an image."""
    return {
        "predicted": utf8(class_names[one.predicted]),
        "probability": float(one.probabilities.max()),
        "explained": utf8(class_names[one.explained]),
        "methods": one.figures,
    }


def pictures_of(one: Explained) -> list[Picture]:
    """The image, and the maps over it with their figures."""
    image = page.to_rgb(one.view)
    return [
        Picture("image", [], image),
        *(
            Picture(
                name.replace("_", " "),
                [f"{figure.replace('_', ' ')} {value:.3f}" for figure, value in own.items()],
                image,
                one.maps[name],
            )
            for name, own in one.figures.items()
            if name != RANDOM
        ),
    ]


def write_picture(one: Explained, path: Path) -> None:
    """The image and the maps over it beside each other, as a PNG."""
    image = page.to_rgb(one.view)
    row = {"image": image}
    row |= {name: page.overlay(image, heat) for name, heat in one.maps.items()}
    figure = Figure(figsize=(1.9 * len(row), 2.2), dpi=100, layout="constrained")
    cells = figure.subplots(1, len(row), squeeze=False)[0]
    for cell, (name, picture) in zip(cells, row.items(), strict=True):
        cell.imshow(picture, interpolation="nearest")
        cell.set_title(name.replace("_", " "), fontsize=9)
        cell.set_axis_off()
    save_figure(figure, path)


def _classes(one: Explained, class_names: Sequence[str]) -> str:
    best = f"{class_names[one.predicted]} {one.probabilities.max():.3f}"
    if one.explained == one.predicted:
        return best
    return f"{best}; explained is {class_names[one.explained]}"


def _finish(
    record: Mapping[str, Any],
    title: str,
    figures: Mapping[str, Mapping[str, float]],
    sections: Mapping[str, Sequence[Picture]],
    out: Path,
) -> None:
    """Says the figures, and writes JSON and page."""
    columns = ["method", "insertion", "deletion", "ROAD", "completeness error", "random weights"]
    flagged = survivors(figures)
    rows = [
        [
            name.replace("_", " "),
            *(f"{own[figure]:.3f}" for figure in ("insertion", "deletion", "road")),
            f"{own['completeness']:.1e}" if "completeness" in own else "",
            (
                f"{own['rank_correlation']:.2f}" + (" SURVIVES" if name in flagged else "")
                if "rank_correlation" in own
                else ""
            ),
        ]
        for name, own in figures.items()
    ]
    print_table("Figures, the mean over the images", columns, rows)
    for name in flagged:
        say(
            f"warning: {name} says nearly the same of a model with shuffled weights (rank "
            f"correlation {figures[name]['rank_correlation']:.2f}): it shows the image, not what "
            "the model has learned"
        )
    notes = [
        "Insertion (higher is better) and deletion (lower) are areas under the class's probability "
        "while the most relevant pixels come or go; ROAD (higher) is the difference of its "
        "probability without the least and without the most relevant pixels. Random weights: rank "
        f"correlation with the map of the model with shuffled weights; from {measures.SURVIVES} on "
        "a map does not explain the model."
    ]
    write_json(record, out / RECORD)
    write_whole(page.write_page(title, notes, (columns, rows), sections).encode(), out / PAGE)
    say(f"wrote {out / RECORD}, all figures")
    say(f"wrote {out / PAGE}, the maps beside each other")
