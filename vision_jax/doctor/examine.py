"""Everything that is found in one data set, whichever kind it is."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vision_jax.data.annotation_formats.reading import IMAGES, Problem, find_files
from vision_jax.data.annotations import Annotations, examine_annotations
from vision_jax.data.folders import splits_among
from vision_jax.data.mask_formats.files import examine_regions, is_of_regions
from vision_jax.data.segmentation import SegmentationSource
from vision_jax.data.shards import are_shards, holds_shards
from vision_jax.data.sources import (
    FileReader,
    MissingFileError,
    Reader,
    Source,
    examine_source,
    open_tfds,
    read_source,
    read_unlabelled,
)
from vision_jax.doctor.boxes import diagnose_boxes
from vision_jax.doctor.classes import diagnose_categories, diagnose_classes
from vision_jax.doctor.entries import diagnose_problems
from vision_jax.doctor.finding import Finding, Subject
from vision_jax.doctor.images import diagnose_images
from vision_jax.doctor.masks import diagnose_masks, scan_masks
from vision_jax.doctor.scan import Scan, scan_images
from vision_jax.doctor.training import diagnose_training
from vision_jax.errors import UserError, printable
from vision_jax.files import expand


def examine(
    spec: str,
    images: Path | None = None,
    *,
    unlabelled: bool = False,
    segmentation: Callable[[str], SegmentationSource] | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> tuple[Subject, list[Finding]]:
    """Everything that is found in one data set. Raises UserError where nothing can be read.

    With `unlabelled` the images alone, as pretraining takes them; with `segmentation`, which reads
    `spec` as training would, images and masks. With `quick` only headers of the
    images are read: images in both splits and damage behind the headers stay unseen. `console`
    shows progress.
    """
    if not spec:
        raise UserError("no data set is named: give what config.data.train takes")
    if unlabelled:
        return _examine_images(spec, read_unlabelled(spec), (), quick, console)
    if segmentation is not None:
        return _examine_masks(spec, images, segmentation, quick, console)
    if not _has_classes(spec):
        try:
            annotations, problems = examine_annotations(spec, images)
        except UserError:
            if not spec.startswith("embedded:") and not _are_class_folders(expand(spec)):
                raise
        else:
            return _examine_boxes(annotations, problems, quick, console)
    return _examine_classes(spec, quick, console)


def _has_classes(spec: str) -> bool:
    """Whether a specification by itself says that it labels whole images."""
    if spec.startswith("tfds:"):
        return "label" in open_tfds(spec)[0]
    return spec.startswith("cifar10:") or spec.endswith((".csv", ".jsonl")) or are_shards(spec)


def _are_class_folders(path: Path) -> bool:
    """Whether it is folders of images, not named as splits; other files may lie among them."""
    if not path.is_dir() or ((path / "images").is_dir() and (path / "labels").is_dir()):
        return False
    if holds_shards(path):
        return True
    images, others = find_files(path, IMAGES), find_files(path, {".json", ".xml", ".yaml", ".yml"})
    tops = {name.partition("/")[0] for name in images if "/" in name}
    beside = {name.partition("/")[0] for name in others if "/" in name}
    return bool(images) and (
        not others or (len(tops) > 1 and beside <= tops and not splits_among(tops))
    )


def with_classes_of(subject: Subject, other: Subject, spec: str) -> Subject:
    """Another split of classes, labelled as training would label it, where it would take it."""
    if other.annotations is None and other.pixels is None:
        with contextlib.suppress(UserError):  # the comparison tells which classes are unknown
            source = read_source(spec, class_names=subject.class_names)
            labels = source.labels
            shown = np.stack([np.arange(len(labels)), labels], 1)
            return replace(other, class_names=source.class_names, labels=labels, shown=shown)
    return other


def _examine_boxes(
    annotations: Annotations, problems: Sequence[Problem], quick: bool, console: Console | None
) -> tuple[Subject, list[Finding]]:
    missing = {problem.value for problem in problems if problem.kind == "missing"}
    skip = {row for row, path in enumerate(annotations.paths) if path in missing}
    count = len(annotations.category_ids)
    pairs = np.unique(annotations.box_image.astype(np.int64) * count + annotations.box_category)
    subject = Subject(
        annotations.name,
        annotations.reader,
        annotations.paths,
        annotations.category_names,
        np.stack([pairs // max(count, 1), pairs % max(count, 1)], 1),
        _scan(annotations.name, annotations.reader, len(annotations.paths), skip, quick, console),
        annotations,
    )
    undeclared = {problem.value for problem in problems if problem.kind == "category"}
    complete = not any(
        problem.kind in ("entry", "image", "file", "unreadable") for problem in problems
    )
    findings = [
        *diagnose_problems(subject, problems),
        *diagnose_categories(subject, undeclared),
        *diagnose_boxes(subject, complete=complete),
        *diagnose_images(subject),
    ]
    return subject, findings + diagnose_training(subject, findings)


def _examine_classes(
    spec: str, quick: bool, console: Console | None
) -> tuple[Subject, list[Finding]]:
    source, errors = examine_source(spec)
    problems = [
        Problem("missing" if isinstance(error, MissingFileError) else "entry", *_place(str(error)))
        for error in errors
    ]
    return _examine_images(spec, source, problems, quick, console)


def _examine_images(
    spec: str, source: Source, problems: Sequence[Problem], quick: bool, console: Console | None
) -> tuple[Subject, list[Finding]]:
    reader, count = source.reader, len(source)
    labelled = bool(source.class_names)
    subject = Subject(
        spec,
        reader,
        tuple(map(reader.relative_name, range(count))),
        source.class_names,
        np.stack([np.arange(count), source.labels], 1)[: count * labelled],
        _scan(spec, reader, count, (), quick, console),
        labels=source.labels,
    )
    return subject, [
        *diagnose_problems(subject, problems),
        *(diagnose_classes(subject) if labelled else ()),
        *diagnose_images(subject),
    ]


def _examine_masks(
    spec: str,
    images: Path | None,
    read: Callable[[str], SegmentationSource],
    quick: bool,
    console: Console | None,
) -> tuple[Subject, list[Finding]]:
    try:
        source = read(spec)
    except UserError:
        problems = examine_regions(spec, images) if is_of_regions(spec) else []
        if not problems:
            raise
        nothing = Scan((), {}, (), np.zeros((0, 256), np.uint8))
        reader = FileReader(images or Path(), ())
        subject = Subject(spec, reader, (), (), np.zeros((0, 2), np.int64), nothing)
        return subject, diagnose_problems(subject, problems)
    count, classes = len(source), len(source.class_names)
    scan = _scan(spec, source.reader, count, (), quick, console)
    none = np.zeros((count, classes + 1), np.int64)
    with _progress(f"masks of {spec}", count, console) as advance:
        masks = None if quick else scan_masks(source, advance)
    pixels = none if masks is None else masks.pixels
    subject = Subject(
        spec,
        source.reader,
        tuple(map(source.reader.relative_name, source.rows.tolist())),
        source.class_names,
        np.argwhere(pixels[:, :classes] > 0),
        scan,
        labels=np.zeros(count, np.int32),
        pixels=pixels,
    )
    found = [] if masks is None else diagnose_masks(subject, masks, scan)
    if source.note:
        found.append(
            Finding(
                "reading-notes",
                "information",
                "what reading leaves out or assumes",
                1,
                1,
                "notes",
                (source.note,),
                "see if it was meant so",
            )
        )
    return subject, found + diagnose_images(subject)


def _place(message: str) -> tuple[str, str]:
    """FILE:LINE and the rest of a message."""
    place, _, text = message.partition(": ")
    return place, text


def _scan(
    name: str,
    reader: Reader,
    count: int,
    skip: Collection[int],
    quick: bool,
    console: Console | None,
) -> Scan:
    with _progress(f"images of {name}", count, console) as advance:
        return scan_images(reader, count, quick=quick, skip=skip, advance=advance)


@contextlib.contextmanager
def _progress(what: str, count: int, console: Console | None) -> Iterator[Callable[[], object]]:
    """Shows a bar on a terminal; gives what to call after each of `count` things."""
    quiet = console is None or not console.is_terminal
    columns = (TextColumn("reading {task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet)
    with bar:
        task = bar.add_task(escape(printable(what)), total=count)
        yield lambda: bar.advance(task)
