"""A classifier explained: the class of each image.

files --preprocess--> views --model--> class --explainer--> maps and figures --report--> files
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.attacks.examples import keys_of
from vision_jax.attacks.gradient import pgd
from vision_jax.attacks.losses import make_untargeted
from vision_jax.attacks.norms import show_epsilon
from vision_jax.data.pipeline import DamageLog, make_eval_batches
from vision_jax.data.sources import Source
from vision_jax.errors import UserError, utf8
from vision_jax.explain import explainer
from vision_jax.explain.explainer import Figures, Maps, Means
from vision_jax.explain.forward import Forward, class_targets
from vision_jax.explain.page import Picture
from vision_jax.explain.prototypes import Near, Prototypes
from vision_jax.explain.report import open_report, pictures_of, run_through, write_picture
from vision_jax.logging import say
from vision_jax.models import families
from vision_jax.ops.images import to_float
from vision_jax.tasks.images import file_name

BATCH = 16  # images at once
THREADS = 2
ATTACK, STEPS = 3, 20  # of PGD: the number of its draws among those of the seed, and its steps


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
      attacked: the same of its adversarial example, explained as what the model takes that for.
    """

    row: int
    view: np.ndarray
    label: int
    explained: int
    probabilities: np.ndarray
    maps: Maps
    figures: Figures
    attacked: "Explained | None" = None

    @property
    def predicted(self) -> int:
        """The most probable class."""
        return int(self.probabilities.argmax())


Batch = Mapping[str, np.ndarray]
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


def make_run(
    subject: Subject,
    methods: Sequence[str],
    seed: int,
    *,
    epsilon: float = 0.0,
    baseline: str = "mean",
) -> Run:
    """Without labels the maps are of the class that the model finds.

    The last batch is filled up, so that each program is compiled once.

    Args:
      subject: the model.
      methods: of methods.METHODS.
      seed: of all that is drawn.
      epsilon: of the adversarial examples that are explained besides, in linf and units of the
        pixels; 0 for none.
      baseline: of explainer.BASELINES.
    """
    size = tuple(subject.preprocessing.image_size)
    explain = explainer.make_explainer(
        Forward(subject.model), methods, size=size, seed=seed, baseline=baseline
    )
    variables = jax.tree.map(jnp.asarray, dict(subject.variables))
    apply = families.make_apply(subject.model)

    def logits_of(variables, images):
        outputs, _ = apply(
            variables["params"], variables.get("batch_stats", {}), images, train=False, keys={}
        )
        return outputs["logits"].astype(jnp.float32)

    @jax.jit
    def classify(variables, images):
        return jax.nn.softmax(logits_of(variables, images))

    @jax.jit
    def attack(variables, images, labels, index):
        keys = keys_of(jax.random.fold_in(jax.random.key(seed), ATTACK), index)
        loss = make_untargeted(partial(logits_of, variables), labels)
        step = 2.5 * epsilon / STEPS  # as Madry et al. 2018 take it
        return pgd(loss, images, keys, epsilon=epsilon, step_size=step, steps=STEPS)

    def look(batch: Batch, images: jax.Array, labels: jax.Array | None) -> Iterator[Explained]:
        """What is said of each image of a batch, which are f[B, H, W, C]."""
        probabilities, index = classify(variables, images), jnp.asarray(batch["index"])
        if labels is None:
            labels = probabilities.argmax(-1).astype(jnp.int32)
        found, views, probabilities, labels = jax.device_get(
            (
                explain(variables, images, class_targets(labels), index),
                images,
                probabilities,
                labels,
            )
        )
        for place in np.flatnonzero(batch["mask"]).tolist():
            yield Explained(
                int(batch["index"][place]),
                np.round(255 * views[place]).astype(np.uint8),
                int(batch["label"][place]),
                int(labels[place]),
                probabilities[place],
                *explainer.one_of(found, place),
            )

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
            labels = None
            if wanted is not None:
                labels = jnp.asarray(wanted[np.maximum(batch["index"], 0)], jnp.int32)
            if not epsilon:
                yield from look(batch, images, labels)
                continue
            predicted = classify(variables, images).argmax(-1)
            attacked = attack(variables, images, predicted, jnp.asarray(batch["index"]))
            both = (look(batch, images, labels), look(batch, attacked, None))
            for one, other in zip(*both, strict=True):
                yield replace(one, attacked=other)

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
    epsilon: float = 0.0,
    baseline: str = "mean",
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
      epsilon, baseline: see `make_run`.

    Raises:
      UserError: none of the images can be read.
    """
    names = subject.class_names
    near = Near(prototypes, names)
    under_attack = UnderAttack(epsilon, names)
    wanted = None if label is None else np.full(len(source), label)
    with open_report(out, f"What {subject.origin} looks at") as report:

        def take(one: Explained) -> None:
            name = source.example_name(one.row)
            path = out / file_name(one.row, Path(name).stem)
            write_picture(one.view, one.maps, path)
            own = {"file": utf8(name), "picture": path.name}
            found, rows = near.find(name, one.view)
            attacked, more = under_attack.find(one)
            report.add_record({**own, **record_of(one, names), **attacked, **found})
            heading = f"{one.row + 1}. {Path(name).name}: {_classes(one, names)}"
            pictures = {"": pictures_of(one.view, one.maps, one.figures)}
            report.add_section(heading, {**pictures, **more, **rows})

        run = make_run(subject, methods, seed, epsilon=epsilon, baseline=baseline)
        means, damage = explain_all(run, source, wanted, take)
        record = {
            "model": subject.origin,
            "class_names": [utf8(name) for name in names],
            "seed": seed,
            "baseline": baseline,
            "damaged": [utf8(line) for line in damage.lines],
            **under_attack.record(),
            **near.record(),
        }
        near.warn()
        under_attack.say()
        report.finish("images", record, means.figures())
    say(f"wrote {means.count} pictures into {out}: the image, then each method's map")


def record_of(one: Explained, class_names: Sequence[str]) -> dict[str, Any]:
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


class UnderAttack:
    """The adversarial examples beside the images, for the JSON and the pages."""

    def __init__(self, epsilon: float, class_names: Sequence[str]) -> None:
        self._epsilon, self._names = epsilon, class_names
        self._means, self._fooled = Means(), 0

    def find(self, one: Explained) -> tuple[dict[str, Any], dict[str, list[Picture]]]:
        """(what the JSON has, a row of pictures) of an image; both may be empty."""
        other = one.attacked
        if other is None:
            return {}, {}
        self._means.add(other.figures)
        self._fooled += other.predicted != one.predicted
        title = f"Under attack ({self._attack}): {_classes(other, self._names)}"
        record = {"attacked": record_of(other, self._names)}
        return record, {title: pictures_of(other.view, other.maps, other.figures)}

    def record(self) -> dict[str, Any]:
        """What the JSON has of all."""
        if not self._epsilon:
            return {}
        attack = {"attack": f"PGD-{STEPS}", "norm": "linf", "epsilon": self._epsilon}
        found = {"fooled": self._fooled, "methods": self._means.figures()}
        return {"under_attack": {**attack, **found}}

    def say(self) -> None:
        """How many are taken for something else."""
        if self._epsilon:
            say(
                f"under attack ({self._attack}) {self._fooled} of {self._means.count} images are "
                "taken for another class"
            )

    @property
    def _attack(self) -> str:
        return f"PGD-{STEPS}, {show_epsilon(self._epsilon, 'linf')}"
