"""A classifier explained: the class of each image, or what it looks at over a data set.

files --preprocess--> views --model--> class --explainer--> maps and figures --report--> files
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.data.pipeline import DamageLog, make_eval_batches
from vision_jax.data.sources import Source
from vision_jax.errors import UserError, utf8
from vision_jax.explain import explainer, measures, page
from vision_jax.explain.explainer import Figures, Maps, Means
from vision_jax.explain.forward import Forward, class_targets
from vision_jax.explain.page import Picture
from vision_jax.explain.prototypes import Neighbor, Prototypes
from vision_jax.explain.report import (
    Report,
    open_report,
    pictures_of,
    run_through,
    write_picture,
)
from vision_jax.logging import say
from vision_jax.models import families
from vision_jax.ops.images import to_float
from vision_jax.tasks.images import file_name

BATCH = 16  # images at once
THREADS = 2
ERRORS = 12  # of a data set, the most confident ones that are shown
CLASSES = 100  # of a data set, the most frequent predictions that are shown


@dataclass(frozen=True)
class Subject:
    """What is explained.

    Attributes:
      model: a flax module, of a classifier here, of a detector or a segmenter in found.py.
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
      maps: by method.
      figures: by method, and of RANDOM: see explainer.make_explainer.
    """

    row: int
    view: np.ndarray
    label: int
    explained: int
    probabilities: np.ndarray
    maps: Maps
    figures: Figures

    @property
    def predicted(self) -> int:
        """The most probable class."""
        return int(self.probabilities.argmax())


# (source, damage log, labels of its rows or None) -> what is said of each image, in order.
Run = Callable[[Source, DamageLog, np.ndarray | None], Iterator[Explained]]


def choose_methods(subject: Subject, asked: Sequence[str]) -> list[str]:
    """The methods asked for, or all that the model can be explained by.

    Raises:
      UserError: no such method, or one that needs attention which the model has not; no classifier.
    """
    family = families.family_of(subject.model)
    if families.FAMILIES[family].predicts != "classes" or not subject.class_names:
        raise UserError(
            f"{subject.origin}: explain takes classifiers, detectors and segmenters, "
            f"and this is a {family}"
        )
    size = subject.preprocessing.image_size
    return explainer.choose_methods(Forward(subject.model), subject.variables, size, asked)


def make_run(subject: Subject, methods: Sequence[str], seed: int) -> Run:
    """Without labels the maps are of the class that the model finds.

    The last batch is filled up, so that each program is compiled once.
    """
    size = tuple(subject.preprocessing.image_size)
    explain = explainer.make_explainer(Forward(subject.model), methods, size=size, seed=seed)
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
                (explain(variables, images, class_targets(labels), index), probabilities, labels)
            )
            for place in np.flatnonzero(batch["mask"]).tolist():
                yield Explained(
                    int(batch["index"][place]),
                    batch["image"][place],
                    int(batch["label"][place]),
                    int(labels[place]),
                    probabilities[place],
                    *explainer.one_of(found, place),
                )

    return run


def explain_all(
    run: Run,
    source: Source,
    wanted: np.ndarray | None,
    take: Callable[[Explained], None],
) -> tuple[Means, DamageLog]:
    """Gives each image to `take` as it comes: none is kept here.

    Raises:
      UserError: none of the images can be read.
    """
    means = Means()

    def measured(one: Explained) -> None:
        means.add(one.figures)
        take(one)

    damage = run_through(source, lambda damage: run(source, damage, wanted), measured)
    return means, damage


# Images -----------------------------------------------------------------------------------------


def explain_images(
    subject: Subject,
    source: Source,
    methods: Sequence[str],
    out: Path,
    *,
    label: int | None,
    seed: int,
    prototypes: Prototypes | None = None,
) -> None:
    """Writes a row of pictures for each image, and a report of them.

    Args:
      subject: the model.
      source: image files.
      methods: of methods.METHODS.
      out: the folder, which is there.
      label: the class to explain; None for the most probable one of each image.
      seed: of what is drawn.
      prototypes: the training images, to show the nearest of each image.

    Raises:
      UserError: none of the images can be read.
    """
    names = subject.class_names
    near = Near(prototypes, names)
    wanted = None if label is None else np.full(len(source), label)
    with open_report(out, f"What {subject.origin} looks at") as report:

        def take(one: Explained) -> None:
            name = source.example_name(one.row)
            path = out / file_name(one.row, Path(name).stem)
            write_picture(one.view, one.maps, path)
            own = {"file": utf8(name), "picture": path.name}
            found, rows = near.find(name, one.view)
            report.add_record({**own, **_record_of(one, names), **found})
            heading = f"{one.row + 1}. {Path(name).name}: {_classes(one, names)}"
            report.add_section(heading, {"": pictures_of(one.view, one.maps, one.figures), **rows})

        means, damage = explain_all(make_run(subject, methods, seed), source, wanted, take)
        record = {
            "model": subject.origin,
            "class_names": [utf8(name) for name in names],
            "seed": seed,
            "damaged": [utf8(line) for line in damage.lines],
            **near.record(),
        }
        near.warn()
        report.finish("images", record, means.figures())
    say(f"wrote {means.count} pictures into {out}: the image, then each method's map")


def _record_of(one: Explained, class_names: Sequence[str]) -> dict[str, Any]:
    """What the JSON has of an image."""
    return {
        "predicted": utf8(class_names[one.predicted]),
        "probability": float(one.probabilities.max()),
        "explained": utf8(class_names[one.explained]),
        "methods": one.figures,
    }


def _classes(one: Explained, class_names: Sequence[str]) -> str:
    best = f"{class_names[one.predicted]} {one.probabilities.max():.3f}"
    if one.explained == one.predicted:
        return best
    return f"{best}; explained is {class_names[one.explained]}"


# A data set -------------------------------------------------------------------------------------


class Looked:
    """What the model looks at in the images that it takes for one class: sums over them.

    Each image's heat counts alike.
    """

    def __init__(self, view: np.ndarray) -> None:
        height, width = view.shape[:2]
        self.count = 0
        self._view = np.zeros((height, width, 3), np.float32)
        self._heat = np.zeros((height, width), np.float32)

    def add(self, view: np.ndarray, heat: np.ndarray) -> None:
        """An image u8[H, W, C] and the map f[H, W] of what was looked at."""
        heat = np.maximum(heat, 0)
        self.count += 1
        self._view += page.to_rgb(view)
        self._heat += heat / max(heat.sum(), np.finfo(np.float32).tiny)

    @property
    def view(self) -> np.ndarray:
        """The mean image u8[H, W, 3]."""
        return (self._view / self.count).round().astype(np.uint8)

    @property
    def heat(self) -> np.ndarray:
        """The mean map f[H, W]."""
        return self._heat / self.count

    @property
    def in_the_middle(self) -> float:
        """The share of the heat in the middle quarter."""
        height, width = self._heat.shape
        box = jnp.array([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]])
        middle = measures.box_pixels(box, (height, width))
        return float(measures.share_inside(jnp.asarray(self.heat)[None], middle)[0])


def explain_dataset(
    subject: Subject,
    source: Source,
    methods: Sequence[str],
    out: Path,
    *,
    seed: int,
    prototypes: Prototypes | None = None,
) -> None:
    """Writes what the model looks at in each class, and its most confident errors explained.

    The first method makes the maps. Files and arguments: see `explain_images`.

    Raises:
      UserError: none of the images can be read.
    """
    names, method = subject.class_names, methods[0]
    near = Near(prototypes, names)
    looked: dict[int, Looked] = {}
    wrong: list[Explained] = []  # the most confident first

    def take(one: Explained) -> None:
        looked.setdefault(one.predicted, Looked(one.view)).add(one.view, one.maps[method])
        if one.predicted != one.label:
            errors["count"] += 1
            wrong.append(one)
            wrong.sort(key=lambda one: -one.probabilities.max())
            del wrong[ERRORS:]

    errors = {"count": 0}
    run = make_run(subject, methods, seed)
    means, damage = explain_all(run, source, None, take)
    true_class = _explained_as(run, source, wrong)
    with open_report(out, f"What {subject.origin} looks at in {source.name}") as report:
        _add_classes(report, looked, names, method)
        for one, as_true in zip(wrong, true_class, strict=True):
            name = source.example_name(one.row)
            own = {"image": utf8(name), "class": utf8(names[one.label])}
            found, rows = near.find(name, one.view)
            report.add_record({**own, **_record_of(one, names), **found})
            image = page.to_rgb(one.view)
            report.add_section(
                f"{name}: {names[one.predicted]} by {one.probabilities.max():.3f}, but it is "
                f"{names[one.label]}",
                {
                    "": [
                        Picture("image", [], image),
                        Picture(f"for {names[one.predicted]}", [method], image, one.maps[method]),
                        Picture(f"for {names[one.label]}", [method], image, as_true.maps[method]),
                    ],
                    **rows,
                },
            )
        record = {
            "model": subject.origin,
            "data": source.name,
            "seed": seed,
            "count": means.count,
            "top1": 1 - errors["count"] / means.count,
            "per_class": {
                utf8(name): {
                    "count": looked[label].count if label in looked else 0,
                    "heat_in_the_middle": looked[label].in_the_middle if label in looked else None,
                }
                for label, name in enumerate(names)
            },
            "damaged": [utf8(line) for line in damage.lines],
            **near.record(),
        }
        near.warn()
        report.finish("confident_errors", record, means.figures())


def _add_classes(
    report: Report, looked: Mapping[int, Looked], names: Sequence[str], method: str
) -> None:
    """The mean image and map of each class, of very many those that are found most."""
    most = sorted(looked, key=lambda label: -looked[label].count)[:CLASSES]
    heading = f"Where it looks, the mean over the images it takes for each class ({method})"
    if len(looked) > CLASSES:
        heading += f", the {CLASSES} most frequent of {len(looked)}"
    pictures = [
        Picture(
            names[label],
            [
                f"{looked[label].count} images",
                f"{looked[label].in_the_middle:.0%} of the heat in the middle",
            ],
            looked[label].view,
            looked[label].heat,
        )
        for label in sorted(most)
    ]
    report.add_section(heading, {"": pictures})


def _explained_as(run: Run, source: Source, wrong: Sequence[Explained]) -> list[Explained]:
    """The images again, with maps of their true classes."""
    if not wrong:
        return []
    rows = np.array([one.row for one in wrong])
    part = replace(source, labels=source.labels[rows], rows=source.rows[rows])
    return list(run(part, DamageLog(), np.array([one.label for one in wrong])))


# Prototypes -------------------------------------------------------------------------------------


class Near:
    """The training images nearest to those that are explained, for the JSON and the pages."""

    def __init__(self, prototypes: Prototypes | None, class_names: Sequence[str]) -> None:
        self._prototypes, self._names = prototypes, class_names
        self._asked = 0
        self._same: list[tuple[str, str]] = []  # images that are training images

    def find(self, name: str, view: np.ndarray) -> tuple[dict[str, Any], dict[str, list[Picture]]]:
        """(what the JSON has, rows of pictures) of the image u8[H, W, C]; both may be empty."""
        if self._prototypes is None:
            return {}, {}
        self._asked += 1
        prototypes, found = self._prototypes, self._prototypes.find(view)
        if found.same is not None:
            self._same.append((name, prototypes.source.example_name(found.same)))
        rows = {"Nearest training images": found.nearest, "Nearest of a class": found.of_classes}
        record = {
            "nearest": [self._record(one) for one in found.nearest],
            "nearest_of_classes": [self._record(one) for one in found.of_classes],
            "is_training_image": found.same is not None,
        }
        pictures = {
            title: [self._picture(one, one.row == found.same) for one in own]
            for title, own in rows.items()
        }
        return {"prototypes": record}, pictures

    def record(self) -> dict[str, Any]:
        """What the JSON has of all."""
        if self._prototypes is None:
            return {}
        source = self._prototypes.source
        record = {
            "data": source.name,
            "count": len(source),
            "distance": "1 - cosine of the features that the head is given",
            "training_images": [utf8(name) for name, _ in self._same],
        }
        return {"prototypes": record}

    def warn(self) -> None:
        """Says which images the model was trained on."""
        if self._same:
            name, trained = self._same[0]
            say(
                f"warning: {len(self._same)} of {self._asked} images are training images, the same "
                f"pixels, first {name}: {trained}. What the model says of them is no evidence"
            )

    def _record(self, one: Neighbor) -> dict[str, Any]:
        assert self._prototypes is not None
        return {
            "image": utf8(self._prototypes.source.example_name(one.row)),
            "class": utf8(self._names[one.label]),
            "distance": one.distance,
        }

    def _picture(self, one: Neighbor, same: bool) -> Picture:
        assert self._prototypes is not None
        name = Path(self._prototypes.source.example_name(one.row)).name
        lines = [f"distance {one.distance:.4f}", name]
        lines += ["THE SAME IMAGE: the model was trained on it"] if same else []
        return Picture(self._names[one.label], lines, page.to_rgb(self._prototypes.view(one.row)))
