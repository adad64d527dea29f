"""A classifier explained over a data set: what it looks at in each class, and its worst errors."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import Source
from vision_jax.errors import utf8
from vision_jax.explain import measures, page
from vision_jax.explain.classes import Explained, Run, Subject, explain_all, make_run, record_of
from vision_jax.explain.page import Picture
from vision_jax.explain.prototypes import Near, Prototypes
from vision_jax.explain.report import Report, open_report

ERRORS = 12  # of a data set, the most confident ones that are shown
CLASSES = 100  # of a data set, the most frequent predictions that are shown


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
    baseline: str = "mean",
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
    run = make_run(subject, methods, seed, baseline=baseline)
    means, damage = explain_all(run, source, None, take)
    true_class = _explained_as(run, source, wrong)
    with open_report(out, f"What {subject.origin} looks at in {source.name}") as report:
        _add_classes(report, looked, names, method)
        for one, as_true in zip(wrong, true_class, strict=True):
            name = source.example_name(one.row)
            own = {"image": utf8(name), "class": utf8(names[one.label])}
            found, rows = near.find(name, one.view)
            report.add_record({**own, **record_of(one, names), **found})
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
            "baseline": baseline,
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
