"""Examines a data set before any training, and prints what is wrong, where, and what to do.

    python -m vision_jax.doctor annotations.json --images=DIR
    python -m vision_jax.doctor train.json --images=train --against=val.json --against_images=val
    python -m vision_jax.doctor data.yaml:train --against=data.yaml:val --figure=doctor.png
    python -m vision_jax.doctor folder_of_class_folders --quick

DATASET is what config.data.train takes: for detection COCO or plain JSON, a Pascal VOC or YOLO
folder, data.yaml:SPLIT, tfds:NAME/SPLIT, embedded: or composites:; for classification a folder of
class folders, .csv, .jsonl, tfds:, embedded: or cifar10:. Exit code 0: nothing wrong, 1: findings,
2: it can't be examined.
"""

import argparse
import contextlib
import json
import logging
import signal
import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vision_jax.data.annotation_formats import IMAGES, Problem, find_files
from vision_jax.data.annotations import Annotations, examine_annotations
from vision_jax.data.diagnosis import (
    Finding,
    Subject,
    compare,
    counted,
    diagnose_boxes,
    diagnose_categories,
    diagnose_classes,
    diagnose_images,
    diagnose_loose_files,
    diagnose_problems,
    diagnose_training,
)
from vision_jax.data.folders import splits_among
from vision_jax.data.scan import Reader, Scan, scan_images
from vision_jax.data.sources import (
    FileReader,
    MissingFileError,
    examine_source,
    open_tfds,
    read_source,
)
from vision_jax.errors import UserError, printable
from vision_jax.files import expand

FOUND, BAD_INPUT = 1, 2  # exit codes
EXAMPLES = 3  # printed of each finding
MARKS = {"error": ("✗", "bold red"), "warning": ("!", "bold yellow"), "information": ("·", "cyan")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that are reported in any case
    try:
        return _run(_parse(sys.argv[1:] if arguments is None else arguments))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except MemoryError:
        print("error: not enough memory for such a data set; is a file damaged?", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return BAD_INPUT


def _run(flags: argparse.Namespace) -> int:
    console = Console(highlight=False)
    progress = Console(stderr=True)
    for path in filter(None, (flags.json, flags.figure)):  # before the work, not after it
        if not path.parent.is_dir() or path.is_dir():
            raise UserError(f"{path}: can't be written: name a file in a folder that is there")
    if flags.against_images and not flags.against:
        raise UserError("--against_images goes with --against: give the other split, or leave it")
    subject, findings = examine(flags.dataset, flags.images, quick=flags.quick, console=progress)
    other = None
    if flags.against:
        other, _ = examine(flags.against, flags.against_images, quick=flags.quick, console=progress)
        if (subject.annotations is None) != (other.annotations is None):
            raise UserError(f"{flags.dataset} and {flags.against}: only one of them has boxes")
        other = _with_classes_of(subject, other, flags.against)
        findings += compare(subject, other)
    for flag, folder, one in (
        ("--images", flags.images, subject),
        ("--against_images", flags.against_images, other),
    ):
        if folder and one is not None and one.annotations is None:
            raise UserError(f"{flag} is for boxes, and {one.name} has classes: leave it out")
    findings += diagnose_loose_files(subject, other)
    order = list(MARKS)
    findings.sort(
        key=lambda finding: (order.index(finding.level), -finding.count / max(finding.of, 1))
    )
    if flags.json:
        told = [asdict(finding) | {"training": finding.training} for finding in findings]
        content = {"dataset": flags.dataset, "findings": told}
        flags.json.write_text(json.dumps(content, indent=1) + "\n")
    if flags.figure:
        from vision_jax.evaluate.diagnosis_figure import draw_diagnosis

        draw_diagnosis(subject, findings, flags.figure)
    console.print(_report(subject, other, findings, quick=flags.quick))
    for path in filter(None, (flags.json, flags.figure)):
        console.print(Text(printable(f"wrote {path}")), soft_wrap=True)
    return FOUND if any(finding.level != "information" for finding in findings) else 0


def examine(
    spec: str, images: Path | None = None, *, quick: bool = False, console: Console | None = None
) -> tuple[Subject, list[Finding]]:
    """Everything that is found in one data set. Raises UserError where nothing can be read.

    With `quick` only headers of the images are read: images in both splits and damage behind the
    headers stay unseen. `console` shows progress.
    """
    if not spec:
        raise UserError("no data set is named: give what config.data.train takes")
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
    return spec.startswith("cifar10:") or spec.endswith((".csv", ".jsonl"))


def _are_class_folders(path: Path) -> bool:
    """Whether it is folders of images, not named as splits; other files may lie among them."""
    if not path.is_dir() or ((path / "images").is_dir() and (path / "labels").is_dir()):
        return False
    images, others = find_files(path, IMAGES), find_files(path, {".json", ".xml", ".yaml", ".yml"})
    tops = {name.partition("/")[0] for name in images if "/" in name}
    beside = {name.partition("/")[0] for name in others if "/" in name}
    return bool(images) and (
        not others or (len(tops) > 1 and beside <= tops and not splits_among(tops))
    )


def _with_classes_of(subject: Subject, other: Subject, spec: str) -> Subject:
    """Another split of classes, labelled as training would label it, where it would take it."""
    if other.annotations is None:
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
    reader = source.reader
    paths = (
        reader.paths
        if isinstance(reader, FileReader)
        else tuple(reader.example_name(int(row)) for row in source.rows)
    )
    subject = Subject(
        spec,
        reader,
        paths,
        source.class_names,
        np.stack([np.arange(len(source)), source.labels], 1),
        _scan(spec, reader, len(source), (), quick, console),
        labels=source.labels,
    )
    problems = [
        Problem("missing" if isinstance(error, MissingFileError) else "entry", *_place(str(error)))
        for error in errors
    ]
    return subject, [
        *diagnose_problems(subject, problems),
        *diagnose_classes(subject),
        *diagnose_images(subject),
    ]


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
    quiet = console is None or not console.is_terminal
    columns = (
        TextColumn("reading images of {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
    )
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet)
    with bar:
        task = bar.add_task(escape(printable(name)), total=count)
        return scan_images(reader, count, quick=quick, skip=skip, advance=lambda: bar.advance(task))


def _report(
    subject: Subject, other: Subject | None, findings: Sequence[Finding], *, quick: bool
) -> Group:
    parts: list[Text | Padding] = [_heading(subject)]
    if other is not None:
        parts.append(_heading(other))
    for finding in findings:
        mark, style = MARKS[finding.level]
        count = f"{finding.count:,} of {counted(finding.of, finding.unit)}"
        count += f", {_percent(finding.count, finding.of)} %"
        count += "; training refuses" * (finding.training == "refuses")
        lines = [(6, example, "dim") for example in finding.examples[:EXAMPLES]]
        more = finding.count - len(lines)
        lines += [(6, f"… and {more:,} more", "dim")] * (more > 0 and bool(lines))
        parts += [Text(), Text.assemble((f"{mark} {finding.code}", style), f": {count}")]
        for indent, line, look in ((2, finding.title, ""), *lines, (2, f"→ {finding.advice}", "")):
            text = Text(str(UserError(line)), style=look, overflow="fold")  # names hold anything
            parts.append(Padding(text, (0, 0, 0, indent), expand=False))
    levels = [finding.level for finding in findings]
    counts = [(levels.count(level), level) for level in ("error", "warning")]
    bad = [f"{count} {level}{'s' * (count > 1)}" for count, level in counts if count]
    if bad:
        verdict = Text(f"Found: {' and '.join(bad)}.", "bold red")
        if any(finding.training == "refuses" for finding in findings):
            verdict.append(" Training refuses such data.")
    else:
        verdict = Text("Nothing is wrong with it, as far as can be seen.", "bold green")
    if quick:
        verdict.append(" Only headers were read (--quick): no search for images in both splits.")
    return Group(*parts, Text(), verdict)


def _heading(subject: Subject) -> Text:
    counts = [counted(len(subject.paths), "images")]
    if subject.annotations is not None:
        counts.append(counted(len(subject.annotations.box_image), "boxes"))
    counts.append(counted(len(subject.class_names), "classes"))
    return Text.assemble((printable(subject.name), "bold"), f": {', '.join(counts)}")


def _percent(count: int, total: int) -> str:
    """A share for people: 100 only of all, 0 only of nothing.

    >>> [_percent(*pair) for pair in ((3, 3), (999, 1000), (2, 3), (1, 30), (1, 10**6), (0, 3))]
    ['100', '99.9', '67', '3.3', 'below 0.01', '0']
    """
    share = 100 * count / max(total, 1)
    if count >= total > 0:
        return "100"
    if share >= 99:
        return f"{min(share, 99.9):.1f}"
    if share >= 10:
        return f"{share:.0f}"
    return f"{share:.2g}" if share >= 0.01 or not count else "below 0.01"


class _Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line, like every other bad input."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m vision_jax.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dataset", metavar="DATASET", help="what config.data.train takes")
    parser.add_argument(
        "--images", type=expand, help="the folder of the images, as config.data.images"
    )
    parser.add_argument(
        "--against", help="the other split, to find images in both, and classes that drift"
    )
    parser.add_argument(
        "--against_images", type=expand, help="the folder of the other split's images"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="read only the images' headers: no duplicates, no damage",
    )
    parser.add_argument("--json", type=expand, help="write the findings to this file")
    parser.add_argument("--figure", type=expand, help="draw examples and distributions to this PNG")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
