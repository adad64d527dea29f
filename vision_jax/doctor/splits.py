"""Two splits of one data set: images in both, classes that differ, drift.

Drift is the one statistical criterion: with ALPHA it alarms on one clean pair of splits in 1,000.
"""

from collections import Counter
from contextlib import suppress

import numpy as np
from scipy.stats import hypergeom

from vision_jax.data.volumes.source import VolumeReader, spacing_of
from vision_jax.doctor.finding import EXAMPLES, Finding, Subject, few
from vision_jax.doctor.scan import same_files, similar_images
from vision_jax.doctor.training import as_training_reads
from vision_jax.errors import UserError

ALPHA = 0.001  # of alarming on two clean splits
LEAST_GAP_MM = 8.0  # between slices of one volume in two splits
LEAST_DRIFT = 1.5  # ratio of shares below which a drift, however certain, does no harm


def compare(one: Subject, other: Subject) -> list[Finding]:
    """Images in both splits, classes that differ, and drift of classes."""
    findings = []
    equal = same_files(one.scan, other.scan)
    seen = {row for row, _ in equal}
    alike = [pair for pair in similar_images(one.scan, other.scan) if pair[0] not in seen]
    for code, title, pairs in (
        ("leak", "images that are in both splits, byte for byte", equal),
        ("near-leak", "images that are in both splits, re-encoded, resized or nearly so", alike),
    ):
        if pairs:
            some = pairs[:EXAMPLES]
            findings.append(
                Finding(
                    code,
                    "error" if code == "leak" else "warning",
                    title,
                    len(pairs),
                    len(one.paths),
                    "images",
                    tuple(f"{one.image(a)} is {other.image(b)}" for a, b in some),
                    "remove them from one: evaluation on them measures memory",
                    tuple(a for a, _ in some),
                    (-1,) * len(some),
                )
            )
    if isinstance(one.reader, VolumeReader) and isinstance(other.reader, VolumeReader):
        findings += _shared_volumes(one.reader, other.reader)
    known = one.class_names
    if one.annotations is not None:
        with suppress(UserError):  # which one's own findings tell
            known = as_training_reads(one).class_names
    # Of boxes only those that are there need a class; of images' classes each declared one.
    needed = other.class_names if other.annotations is None else tuple(_shown_names(other))
    unknown = sorted(set(needed) - set(known))
    if unknown:
        findings.append(
            Finding(
                "unknown-class",
                "error",
                f"classes of {other.name} that {one.name} doesn't declare: {few(unknown)}",
                len(unknown),
                len(other.class_names),
                "classes",
                tuple(unknown[:EXAMPLES]),
                "give both the same classes, spelled alike",
            )
        )
    return findings + _drift(one, other, set(unknown))


def _shared_volumes(one: VolumeReader, other: VolumeReader) -> list[Finding]:
    """Slices of one volume that lie near each other, and patients in both splits."""
    paths = {case.paths: number for number, case in enumerate(other.cases)}
    shared = {n: paths[case.paths] for n, case in enumerate(one.cases) if case.paths in paths}
    near: list[str] = []
    leaked: list[int] = []
    for number, twin in shared.items():
        rows = np.flatnonzero(one.of == number)
        here, there = one.slice[rows], other.slice[other.of == twin]
        step = spacing_of(one, number)[0]
        if one.options.plane == other.options.plane:
            apart = np.abs(here[:, None] - there).min(1) * step
        else:
            apart = np.zeros(len(here))
        close = rows[apart < LEAST_GAP_MM]
        leaked += close.tolist()
        if len(close):
            name = one.relative_name(int(close[0]))
            near.append(f"{name} and others: {apart.min():g} mm from a slice of the other split")
    findings = []
    if leaked:
        findings.append(
            Finding(
                "volume-leak",
                "error",
                f"slices less than {LEAST_GAP_MM:g} mm from a slice of the same volume in the other"
                " split",
                len(leaked),
                len(one.of),
                "images",
                tuple(near[:EXAMPLES]),
                "neighbors are nearly copies: split by patient, or leave a gap between blocks",
                tuple(leaked[:EXAMPLES]),
                (-1,) * len(leaked[:EXAMPLES]),
            )
        )
    apart_in = {one.cases[number].patient for number in shared}
    patients = {case.patient for case in one.cases}
    both = sorted((patients & {case.patient for case in other.cases}) - apart_in)
    if both:
        findings.append(
            Finding(
                "patient-leak",
                "error",
                "patients that are in both splits, by the names of their folders or files",
                len(both),
                len(patients),
                "patients",
                tuple(both[:EXAMPLES]),
                "move each to one split; if other patients are meant, name them otherwise",
            )
        )
    if shared and not leaked:
        findings.append(
            Finding(
                "one-volume",
                "information",
                "volumes of which both splits have slices, with a gap between",
                len(shared),
                len(one.cases),
                "volumes",
                tuple(one.cases[number].name for number in list(shared)[:EXAMPLES]),
                'call what is measured so "within one patient": it tells nothing of others',
            )
        )
    return findings


def _shown_names(subject: Subject) -> Counter[str]:
    """In how many images each class is shown."""
    return Counter(subject.class_names[c] for c in subject.shown[:, 1])


def _drift(one: Subject, other: Subject, left_out: set[str]) -> list[Finding]:
    """Classes whose share of images differs by Fisher's exact test, corrected for their number.

    The image is the unit: boxes of one image come together, and a test that counts them as
    independent alarms on crowded scenes.
    """
    here, there = _shown_names(one), _shown_names(other)
    names = sorted((set(here) | set(there)) - left_out)
    n, m = len(one.paths), len(other.paths)
    if not names or not n or not m:
        return []
    a = np.array([here[name] for name in names])
    b = np.array([there[name] for name in names])
    lower = hypergeom.cdf(a, n + m, a + b, n)
    upper = hypergeom.sf(a - 1, n + m, a + b, n)
    p = np.minimum(1, 2 * np.minimum(lower, upper) * len(names))
    low, high = np.minimum(a / n, b / m), np.maximum(a / n, b / m)
    drifted = [i for i in np.argsort(p) if p[i] <= ALPHA and high[i] >= LEAST_DRIFT * low[i]]
    if not drifted:
        return []
    return [
        Finding(
            "class-drift",
            "warning",
            f"classes whose share of images differs between the splits (p ≤ {ALPHA:g}, corrected)",
            len(drifted),
            len(names),
            "classes",
            tuple(
                f"{names[i]!r}: in {a[i] / n:.1%} of {n:,} images and {b[i] / m:.1%} of {m:,}"
                f" (p = {p[i]:.1g})"
                for i in drifted[:EXAMPLES]
            ),
            "split at random, or by what the model will meet",
        )
    ]
