"""Examines a data set before any training, and prints what is wrong, where, and what to do.

    python -m vision_jax.doctor annotations.json --images=DIR
    python -m vision_jax.doctor train.json --images=train --against=val.json --against_images=val
    python -m vision_jax.doctor data.yaml:train --against=data.yaml:val --figure=doctor.png
    python -m vision_jax.doctor folder_of_class_folders --quick
    python -m vision_jax.doctor folder_of_images --unlabelled --exclude=exclude.json
    python -m vision_jax.doctor folder --segmentation --against=other_folder

DATASET is what config.data.train takes: for detection COCO or plain JSON, a Pascal VOC or YOLO
folder, data.yaml:SPLIT, tfds:NAME/SPLIT, embedded: or composites:; for classification a folder of
class folders, .csv, .jsonl, .tar and .parquet shards, tfds:, embedded: or cifar10:; with
--unlabelled any of these, and any folder of images; with --segmentation a folder with images/ and
masks/, and the files of regions of docs/segmentation_data.md. Exit code 0: nothing wrong, 1:
findings, 2: it can't be examined.
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vision_jax.data.segmentation import SegmentationSource, read_segmentation_source
from vision_jax.doctor.duplicates import diagnose_duplicates, write_excluded
from vision_jax.doctor.examine import examine, with_classes_of
from vision_jax.doctor.finding import counted
from vision_jax.doctor.images import diagnose_loose_files
from vision_jax.doctor.report import MARKS, report
from vision_jax.doctor.scan import near_duplicates
from vision_jax.doctor.splits import compare
from vision_jax.errors import UserError, printable
from vision_jax.files import expand
from vision_jax.flags import make_parser, run

FOUND = 1  # exit code
UNBROKEN = 10_000  # columns where no terminal folds: a path in a file or a pipe stays in one piece


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that are reported in any case
    return run(lambda: _run(_parse(arguments)), "such a data set; is a file damaged?")


def _run(flags: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if not console.is_terminal:  # whatever COLUMNS says: a machine for tests may set it
        console.width = UNBROKEN
    progress = Console(stderr=True)
    written = (flags.json, flags.figure, flags.exclude)
    for path in filter(None, written):  # before the work, not after it
        if not path.parent.is_dir() or path.is_dir():
            raise UserError(f"{path}: can't be written: name a file in a folder that is there")
    if flags.against_images and not flags.against:
        raise UserError("--against_images goes with --against: give the other split, or leave it")
    if flags.quick and (flags.duplicates or flags.exclude):
        raise UserError("--quick reads no pixels, by which duplicates are found: leave it out")
    how = {"unlabelled": flags.unlabelled, "quick": flags.quick, "console": progress}
    subject, findings = examine(
        flags.dataset, flags.images, segmentation=_masks(flags, flags.images, flags.masks), **how
    )
    other = None
    if flags.against:
        reads = _masks(flags, flags.against_images, flags.against_masks)
        other, _ = examine(flags.against, flags.against_images, segmentation=reads, **how)
        if (subject.annotations is None) != (other.annotations is None):
            raise UserError(f"{flags.dataset} and {flags.against}: only one of them has boxes")
        if not flags.unlabelled:
            other = with_classes_of(subject, other, flags.against)
        findings += compare(subject, other)
    for flag, folder, one in (
        ("--images", flags.images, subject),
        ("--against_images", flags.against_images, other),
    ):
        if folder and one is not None and one.annotations is None and not flags.segmentation:
            raise UserError(f"{flag} is for boxes, and {one.name} has classes: leave it out")
    findings += diagnose_loose_files(subject, other)
    if flags.exclude and subject.annotations is not None:
        raise UserError("--exclude is for images with classes or without labels: leave it out")
    excluded = 0
    if flags.duplicates or flags.exclude:
        kept_of = near_duplicates(subject.scan)
        findings += diagnose_duplicates(subject, kept_of)
    if flags.exclude:
        excluded = write_excluded(subject, kept_of, other, flags.exclude)
    order = list(MARKS)
    findings.sort(
        key=lambda finding: (order.index(finding.level), -finding.count / max(finding.of, 1))
    )
    if flags.json:
        told = [asdict(finding) | {"training": finding.training} for finding in findings]
        content = {"dataset": flags.dataset, "findings": told}
        flags.json.write_text(json.dumps(content, indent=1) + "\n")
    if flags.figure:
        from vision_jax.doctor.figure import draw_diagnosis

        draw_diagnosis(subject, findings, flags.figure)
    console.print(report(subject, other, findings, quick=flags.quick))
    for path in filter(None, (flags.json, flags.figure)):
        console.print(Text(printable(f"wrote {path}")), soft_wrap=True)
    if flags.exclude:
        found = counted(excluded, "images")
        text = f"wrote {flags.exclude}, {found} to leave out: set config.data.exclude to it"
        console.print(Text(printable(text)), soft_wrap=True)
    return FOUND if any(finding.level != "information" for finding in findings) else 0


def _masks(
    flags: argparse.Namespace, images: Path | None, masks: Path | None
) -> Callable[[str], SegmentationSource] | None:
    """What reads images and masks as training does, with --segmentation."""
    if not flags.segmentation:
        given = {"masks": masks, "classes": flags.classes, "reduce_zero": flags.reduce_zero}
        if wrong := [name for name, value in given.items() if value]:
            raise UserError(f"--{wrong[0]} goes with --segmentation: give both, or neither")
        return None
    if flags.unlabelled:
        raise UserError("--segmentation looks at masks, and --unlabelled at none: leave one out")
    return lambda spec: read_segmentation_source(
        spec, masks, images=images, classes=flags.classes, reduce_zero=flags.reduce_zero
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m vision_jax.doctor", __doc__)
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
    parser.add_argument(
        "--unlabelled", action="store_true", help="look at the images alone, of any folder too"
    )
    parser.add_argument(
        "--segmentation", action="store_true", help="look at images and their masks"
    )
    parser.add_argument("--masks", type=expand, help="their folder, as config.data.masks")
    parser.add_argument(
        "--against_masks", type=expand, help="the folder of the other split's masks"
    )
    parser.add_argument(
        "--classes", type=expand, help="the table of the masks' values, as config.data.classes"
    )
    parser.add_argument(
        "--reduce_zero",
        action="store_true",
        help="masks count classes from 1, and 0 is none, as config.data.reduce_zero",
    )
    parser.add_argument(
        "--duplicates", action="store_true", help="look for nearly equal images inside of DATASET"
    )
    parser.add_argument(
        "--exclude",
        type=expand,
        help="write the nearly equal ones, of DATASET and of both splits, for config.data.exclude",
    )
    parser.add_argument("--json", type=expand, help="write the findings to this file")
    parser.add_argument("--figure", type=expand, help="draw examples and distributions to this PNG")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
