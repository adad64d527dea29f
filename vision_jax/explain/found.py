"""A detector or a segmenter explained: the boxes or regions that it finds in images.

files --preprocess--> views --model--> parts --parts.make_explain--> maps and figures --> files
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import utf8
from vision_jax.explain import measures, page
from vision_jax.explain import parts as of_parts
from vision_jax.explain.classes import Subject
from vision_jax.explain.explainer import RANDOM, Figures, Maps, Means
from vision_jax.explain.page import Picture
from vision_jax.explain.part_sources import (
    Batch,
    detection_batches,
    detects,
    match_boxes,
    match_regions,
    segmentation_batches,
)
from vision_jax.explain.parts import Wanted
from vision_jax.explain.report import (
    open_report,
    pictures_of,
    run_through,
    write_picture,
)
from vision_jax.logging import say
from vision_jax.ops.images import to_float
from vision_jax.tasks.images import file_name

SHOWN = 12  # of a data set, the most confident parts that are nothing, and of those that are right


@dataclass(frozen=True)
class Part:
    """A box or a region with what the methods say of it.

    Attributes:
      label: of its class.
      score: see detections.Boxes and regions.Regions.
      inside: bool[H, W], its pixels in the view.
      box_xyxy_px: f[4] of a box, in pixels of the image's file; None of a region.
      right: whether it is in the truth, if that is known.
      maps: by method.
      figures: by method, see parts.make_explain, and of RANDOM.
    """

    label: int
    score: float
    inside: np.ndarray
    box_xyxy_px: np.ndarray | None
    right: bool
    maps: Maps
    figures: Figures


@dataclass(frozen=True)
class Explained:
    """An image: its row in the source, u8[H, W, C] as the model sees it, and what it found."""

    row: int
    view: np.ndarray
    parts: tuple[Part, ...]


# (source, damage log, whether its truth is what maps are measured by) -> images, in order.
Run = Callable[[Any, DamageLog, bool], Iterator[Explained]]


def make_run(subject: Subject, methods: Sequence[str], wanted: Wanted, seed: int) -> Run:
    """How the images of a source are explained.

    Figures are by the part that the model finds or, where the truth is asked for, by the true box
    or region of a part that is right; other parts have figures by themselves.
    """
    find = of_parts.make_find_parts(subject.model, wanted)
    explain = of_parts.make_explain(subject.model, methods, seed)
    variables = jax.tree.map(jnp.asarray, dict(subject.variables))
    # Not compiled as one: leaves of one shape share a program.
    shuffled = measures.shuffled(variables, jax.random.fold_in(jax.random.key(seed), 2))
    batches = detection_batches if detects(subject.model) else segmentation_batches
    if getattr(subject.preprocessing, "view", None) == "windows":
        say(
            "warning: this model is evaluated in windows along the long side; here it sees each "
            "image whole, squashed into one window, and may find other regions"
        )

    def run(source: Any, damage: DamageLog, truth: bool) -> Iterator[Explained]:
        for batch in batches(subject.preprocessing, source, damage):
            images, sizes = to_float(jnp.asarray(batch["image"])), jnp.asarray(batch["size"])
            canvas = images.shape[1], images.shape[2]
            parts = find(variables, images, sizes)
            score = np.where(batch["mask"][:, None], parts.score, 0)
            measured, right = parts, np.zeros(score.shape, bool)
            inside = of_parts.inside_of(parts, sizes, canvas)
            if truth:
                match = match_boxes if detects(subject.model) else match_regions
                measured, right, ignored = match(parts, inside, batch, source)
                score = np.where(ignored, 0, score)
            found = {}
            if (score > 0).any():
                by = of_parts.inside_of(measured, sizes, canvas)
                index = jnp.asarray(batch["index"])
                found = explain(variables, shuffled, images, sizes, parts, by, index)
                found[RANDOM] = of_parts.chance(by, sizes)
            known = jax.device_get((found, inside, parts))
            for place in np.flatnonzero(batch["mask"]).tolist():
                rows = np.flatnonzero(score[place] > 0).tolist()
                yield _explained(batch, place, [
                    _part(known, batch, place, number, bool(right[place, number]))
                    for number in rows
                ])  # fmt: skip

    return run


def _explained(batch: Batch, place: int, parts: Sequence[Part]) -> Explained:
    height, width = batch["size"][place]
    view = batch["image"][place, :height, :width].copy()
    return Explained(int(batch["index"][place]), view, tuple(parts))


def _part(known: Any, batch: Batch, place: int, number: int, right: bool) -> Part:
    """One of a batch's parts, without the padding of its image.

    Arrays are copies: what is kept of a part must not keep its batch.
    """
    found, inside, parts = known
    height, width = batch["size"][place]
    maps: Maps = {}
    figures: Figures = {}
    for name, own in found.items():
        if "map" in own:
            maps[name] = own["map"][place, number, :height, :width].copy()
        figures[name] = {
            figure: float(values[place, number])
            for figure, values in own.items()
            if figure != "map"
        }
    box = None
    if "original_size" in batch:
        rows, columns = batch["original_size"][place]
        box = parts.xyxy_01[place, number] * np.array([columns, rows] * 2)
    return Part(
        int(parts.label[place, number]),
        float(parts.score[place, number]),
        inside[place, number, :height, :width].copy(),
        box,
        right,
        maps,
        figures,
    )


# Files ------------------------------------------------------------------------------------------


def explain_images(
    subject: Subject,
    source: Any,
    methods: Sequence[str],
    out: Path,
    *,
    wanted: Wanted,
    seed: int,
) -> None:
    """Writes a row of pictures for each part of each image, and a report of them.

    Args:
      subject: the model.
      source: image files.
      methods: see parts.choose_methods.
      out: the folder, which is there.
      wanted: which parts.
      seed: of what is drawn.

    Raises:
      UserError: none of the images can be read.
    """
    names, means, count = subject.class_names, Means(), 0
    run = make_run(subject, methods, wanted, seed)
    with open_report(out, f"What {subject.origin} looks at", "parts") as report:

        def take(one: Explained) -> None:
            nonlocal count
            name = source.example_name(one.row)
            record: list[dict[str, Any]] = []
            rows: dict[str, list[Picture]] = {}
            for number, part in enumerate(one.parts, 1):
                path = out / file_name(one.row, f"{Path(name).stem}_{number}")
                write_picture(one.view, part.maps, path, part.inside)
                record.append({**_record_of(part, names), "picture": path.name})
                rows[f"{number}. {_named(part, names)}"] = _pictures_of(one, part)
                means.add(part.figures)
            report.add_record({"file": utf8(name), "parts": record})
            heading = f"{one.row + 1}. {Path(name).name}"
            nothing = {"nothing is found": [Picture("image", [], page.to_rgb(one.view))]}
            report.add_section(heading, rows or nothing)
            count += 1

        damage = run_through(source, lambda damage: run(source, damage, False), take)
        record = {
            "model": subject.origin,
            "class_names": [utf8(name) for name in names],
            "seed": seed,
            "damaged": [utf8(line) for line in damage.lines],
        }
        report.finish("images", record, means.figures())
    _warn_of_none(means, wanted)
    what = "boxes" if detects(subject.model) else "regions"
    say(f"wrote {means.count} pictures into {out}: {what} of {count} images, by each method")


def explain_dataset(
    subject: Subject,
    source: Any,
    methods: Sequence[str],
    out: Path,
    *,
    wanted: Wanted,
    seed: int,
) -> None:
    """Measures maps of what is right by the truth, and shows the most confident errors.

    Files and arguments: see `explain_images`.

    Raises:
      UserError: none of the images can be read.
    """
    names, means, images = subject.class_names, Means(), 0
    run = make_run(subject, methods, wanted, seed)
    classes: dict[int, Means] = {}
    errors = 0
    # Images with one part each, as others would be kept with it.
    wrong: list[Explained] = []  # the most confident first
    shown: list[Explained] = []  # of what is right, the first

    def take(one: Explained) -> None:
        nonlocal images, errors
        images += 1
        for part in one.parts:
            if part.right:
                means.add(part.figures)
                classes.setdefault(part.label, Means()).add(part.figures)
                shown.append(replace(one, parts=(part,)))
                del shown[SHOWN:]
            else:
                errors += 1
                wrong.append(replace(one, parts=(part,)))
                wrong.sort(key=lambda one: -one.parts[0].score)
                del wrong[SHOWN:]

    damage = run_through(source, lambda damage: run(source, damage, True), take)
    title = f"What {subject.origin} looks at in {source.name}"
    with open_report(out, title, "parts") as report:
        for title, kept in (("not in the truth", wrong), ("right", shown)):
            for one in kept:
                name, part = source.example_name(one.row), one.parts[0]
                if kept is wrong:
                    report.add_record({"image": utf8(name), **_record_of(part, names)})
                heading = f"{Path(name).name}, {title}: {_named(part, names)}"
                report.add_section(heading, {"": _pictures_of(one, part)})
        record = {
            "model": subject.origin,
            "data": source.name,
            "seed": seed,
            "count": images,
            "right": means.count,
            "wrong": errors,
            "per_class": {
                utf8(name): {
                    "count": classes[label].count if label in classes else 0,
                    "pointing": {
                        method: own["pointing"] for method, own in classes[label].figures().items()
                    }
                    if label in classes
                    else {},
                }
                for label, name in enumerate(names)
            },
            "damaged": [utf8(line) for line in damage.lines],
        }
        report.finish("confident_errors", record, means.figures())
    _warn_of_none(means, wanted, errors)


def _warn_of_none(means: Means, wanted: Wanted, wrong: int = 0) -> None:
    """Says why there are no figures, if there are none."""
    if means.count:
        return
    if wrong:
        say(
            f"warning: none of the {wrong} parts that are found is in the truth, by which maps are "
            "measured: train the model further, or explain some images with --images"
        )
        return
    what = "nothing" if wanted.label is None else "nothing of that class"
    say(f"warning: {what} has a score of {wanted.least:g} or more: lower --least-score")


def _named(part: Part, names: Sequence[str]) -> str:
    return f"{names[part.label]} {part.score:.3f}"


def _pictures_of(one: Explained, part: Part) -> list[Picture]:
    return pictures_of(one.view, part.maps, part.figures, part.inside)


def _record_of(part: Part, names: Sequence[str]) -> dict[str, Any]:
    """What the JSON has of a part."""
    where: dict[str, Any] = {"share_of_pixels": float(part.inside.mean())}
    if part.box_xyxy_px is not None:
        where = {"box_xyxy_px": [float(side) for side in part.box_xyxy_px]}
    return {
        "name": utf8(names[part.label]),
        "score": part.score,
        **where,
        "methods": part.figures,
    }
