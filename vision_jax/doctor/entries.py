"""What the reader of annotations refused, sorted by its kind."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from vision_jax.data.annotation_formats.reading import Problem
from vision_jax.data.annotations import Annotations
from vision_jax.doctor.finding import EXAMPLES, Finding, Subject, few

_PROBLEMS: dict[str, tuple[str, str, str]] = {  # kind: (code, title, advice)
    "entry": (
        "unusable-entry",
        "entries with a value that is missing, of the wrong type or not finite",
        "correct or remove them; the examples say what each needs",
    ),
    "id": (
        "repeated-id",
        "ids or files that are given twice",
        "give each image, category and annotation its own id",
    ),
    "image": (
        "unknown-image",
        "boxes of images that the file doesn't list",
        "list the images, or remove the boxes; check that ids are numbers in both places",
    ),
    "category": (
        "undeclared-category",
        "boxes of categories that are not declared",
        "add the categories, or correct the ids",
    ),
    "path": (
        "path-outside",
        "paths that lead out of the images' folder",
        "use relative paths without `..`, and files rather than links",
    ),
    "missing": (
        "missing-file",
        "files that are named and not there",
        "check --images=DIR, and capital letters in names; or remove the entries",
    ),
    "size": (
        "conflicting-size",
        "entries that state another width or height than an earlier one of the same image",
        "correct them",
    ),
    "file": (
        "unreadable-annotation",
        "annotation files that can't be read",
        "write them again from their source",
    ),
}


def diagnose_problems(subject: Subject, problems: Sequence[Problem]) -> list[Finding]:
    """Findings of what the reader refused, one for each kind of problem."""
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        if problem.kind != "unreadable":  # the scan reports images
            by_kind[problem.kind].append(problem)
    entries = subject.annotations
    total = len(subject.paths) + (0 if entries is None else len(entries.box_image))
    rows = {path: row for row, path in enumerate(subject.paths)}
    findings = []
    for kind, found in by_kind.items():
        code, title, advice = _PROBLEMS[kind]
        if kind == "category" and entries is not None:
            shift = _off_by(entries, {problem.value for problem in found})
            if shift:
                code, title = "ids-off-by-one", f"category ids are off by one: {shift}"
                advice = "number boxes and categories alike; until then names are one too far"
            else:
                used = sorted({str(problem.value) for problem in found})
                title += f": {few(used)}"
        count, of, unit = len(found), total + len(found), "entries"
        if kind in ("category", "image") and entries is not None:
            of, unit = len(entries.box_image), "boxes"
        if code == "ids-off-by-one":
            count = of  # those whose ids happen to be declared are as wrong
        if kind == "image" and entries is not None:
            of += len(found)
        if kind == "missing":
            of, unit = max(len(subject.paths), len(found)), "files"
        examples = tuple(f"{p.place}: {p.text}" for p in found[:EXAMPLES])
        images = tuple(rows[p.value] for p in found[:EXAMPLES] if p.value in rows)
        if kind == "missing":
            images = ()
        findings.append(Finding(code, "error", title, count, of, unit, examples, advice, images))
    return findings


def _off_by(annotations: Annotations, undeclared: set[int | str]) -> str:
    """How used ids differ from declared ones, if by one throughout."""
    ids = annotations.category_ids
    declared = {i for i in ids if i not in undeclared}
    used = {ids[row] for row in np.unique(annotations.box_category)}
    if not declared or not all(isinstance(i, int) for i in (*declared, *used)):
        return ""
    for shift in (1, -1):
        if {i + shift for i in used if isinstance(i, int)} <= declared:
            return f"declared {_range(declared)}, used {_range(used)}"
    return ""


def _range(ids: Iterable[int | str]) -> str:
    numbers = sorted(int(i) for i in ids)
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
