"""Names, ids and counts of classes: of boxes as categories, of whole images as labels."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from vision_jax.doctor.finding import EXAMPLES, Finding, Subject, counted, few

IMBALANCE = 50  # the largest class is so many times the smallest one


def diagnose_categories(subject: Subject, undeclared: set[int | str]) -> list[Finding]:
    """Roots, names given twice, and as information holes, unused classes and imbalance."""
    annotations = subject.annotations
    assert annotations is not None
    rows = [i for i, c in enumerate(annotations.category_ids) if c not in undeclared]
    names, parents = annotations.category_names, annotations.supercategories
    counts = np.bincount(annotations.box_category, minlength=len(names))
    children = Counter(parents[i] for i in rows)
    roots = [i for i in rows if not counts[i] and children[names[i]] > (parents[i] == names[i])]
    findings = []
    if roots:
        findings.append(
            Finding(
                "root-class",
                "warning",
                "categories that label nothing and are the parent of others",
                len(roots),
                len(rows),
                "categories",
                tuple(f"{names[i]!r}, id {annotations.category_ids[i]}" for i in roots[:EXAMPLES]),
                "it is no class; training leaves it out, but remove it, as other tools count it",
            )
        )
    by_name: dict[str, list[int]] = defaultdict(list)
    for i in rows:
        if i not in roots:
            by_name[names[i]].append(i)
    twice = {name: found for name, found in by_name.items() if len(found) > 1}
    if twice:
        examples = tuple(
            f"{name!r}: ids {', '.join(str(annotations.category_ids[i]) for i in found)}"
            for name, found in list(twice.items())[:EXAMPLES]
        )
        findings.append(
            Finding(
                "repeated-name",
                "error",
                "categories that share a name",
                sum(len(found) for found in twice.values()),
                len(rows),
                "categories",
                examples,
                "rename them, or give all their boxes one id",
            )
        )
    numbers = sorted(c for i in rows if isinstance(c := annotations.category_ids[i], int))
    if numbers and len(numbers) == len(rows):
        holes = numbers[-1] - numbers[0] + 1 - len(numbers)
        if holes:
            findings.append(
                Finding(
                    "id-holes",
                    "information",
                    f"category ids from {numbers[0]} to {numbers[-1]} leave out"
                    f" {counted(holes, 'numbers')}",
                    holes,
                    holes + len(numbers),
                    "ids",
                    (),
                    "nothing: labels are numbered without holes, and the map is saved",
                )
            )
    own = [i for i in rows if i not in roots]
    return findings + _balance([names[i] for i in own], counts[own], "boxes")


def diagnose_classes(subject: Subject) -> list[Finding]:
    """Numbers that begin at 1, and as information unused classes and imbalance."""
    names = subject.class_names
    counts = np.bincount(subject.labels, minlength=len(names))
    findings = []
    if len(names) > 1 and names[0] == "0" and not counts[0] and (counts[1:] > 0).all():
        findings.append(
            Finding(
                "labels-off-by-one",
                "warning",
                "labels begin at 1: class 0 has no image",
                len(subject.labels),
                len(subject.labels),
                "labels",
                (f"labels {names[1]} to {names[-1]}",),
                "subtract 1 from each, or use names",
            )
        )
        names, counts = names[1:], counts[1:]
    if np.count_nonzero(counts) == 1:
        (only,) = (name for name, count in zip(names, counts, strict=True) if count)
        findings.append(
            Finding(
                "single-class",
                "warning",
                f"one class has all images: {only}",
                len(subject.labels),
                len(subject.labels),
                "images",
                (subject.paths[0],),
                "there is nothing to tell it from; is the folder above meant?",
            )
        )
    return findings + _balance(names, counts, "images")


def _balance(names: Sequence[str], counts: np.ndarray, unit: str) -> list[Finding]:
    findings = []
    unused = [name for name, count in zip(names, counts, strict=True) if not count]
    if unused and len(unused) < len(names):
        findings.append(
            Finding(
                "unused-class",
                "information",
                f"classes that label nothing: {few(unused)}",
                len(unused),
                len(names),
                "classes",
                tuple(unused[:EXAMPLES]),
                "remove them if they are not in the evaluation set either",
            )
        )
    used = counts[counts > 0]
    if len(used) > 1 and used.max() >= IMBALANCE * used.min():
        order = sorted((c, n) for n, c in zip(names, counts.tolist(), strict=True) if c)
        findings.append(
            Finding(
                "imbalance",
                "information",
                f"the largest class has {used.max() / used.min():,.0f} times the smallest's {unit}",
                sum(c * IMBALANCE <= int(used.max()) for c, _ in order),
                len(names),
                "classes",
                tuple(f"{n!r}: {c:,} {unit}" for c, n in (*order[:3], order[-1])),
                "judge such a set by the metric of each class, and look at the small ones",
            )
        )
    return findings
