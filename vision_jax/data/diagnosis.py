"""What is wrong with a data set, each kind with a criterion that clean sets don't meet.

Criteria are logical (a box with a negative width) wherever one exists. The statistical one, drift
between splits, states its significance: with ALPHA it alarms on one clean pair of splits in 1,000.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from scipy.stats import hypergeom

from vision_jax.data.annotation_formats import IMAGES, YOLO_PLACE, Problem, find_files
from vision_jax.data.annotations import Annotations
from vision_jax.data.detection import DetectionSource, check_boxes, make_detection_source
from vision_jax.data.scan import Reader, Scan, repeated_files, same_files, similar_images
from vision_jax.data.sources import FileReader, TfdsReader
from vision_jax.errors import UserError

ALPHA = 0.001  # of alarming on two clean splits
LEAST_DRIFT = 1.5  # ratio of shares below which a drift, however certain, does no harm
OVERHANG_PX = 1.0  # rounding, and pixels that count from 1
OVERHANG_SHARE = 0.05  # of a side, from which a box is evidence for corners written as sizes
EXAMPLES = 20  # kept of each finding
IMBALANCE = 50

Level = Literal["error", "warning", "information"]
Training = Literal["refuses", "leaves out", "trains"]

# What training does with a data set of which this is found: it refuses all of it, leaves out (or
# cuts) what is concerned and says so, or trains on everything.
TRAINING: dict[str, Training] = {
    "unusable-entry": "refuses",
    "repeated-id": "refuses",
    "unknown-image": "refuses",
    "undeclared-category": "refuses",
    "ids-off-by-one": "refuses",
    "path-outside": "refuses",
    "missing-file": "refuses",
    "conflicting-size": "refuses",
    "unreadable-annotation": "refuses",
    "repeated-name": "refuses",
    "unknown-class": "refuses",
    "nothing-to-learn": "refuses",
    "unreadable-image": "leaves out",
    "wrong-size": "leaves out",
    "swapped-corners": "leaves out",
    "zero-area": "leaves out",
    "outside-image": "leaves out",
    "root-class": "leaves out",
    "pixels-for-shares": "leaves out",
    "corners-as-sizes": "leaves out",
    "relative-units": "trains",
    "conflicting-labels": "trains",
    "leak": "trains",
    "near-leak": "trains",
    "repeated-box": "trains",
    "exif-rotation": "trains",
    "labels-off-by-one": "trains",
    "single-class": "trains",
    "class-drift": "trains",
    "no-boxes": "trains",
    "id-holes": "trains",
    "unused-class": "trains",
    "imbalance": "trains",
    "not-referenced": "trains",
    "repeated-image": "trains",
}


@dataclass(frozen=True)
class Finding:
    """One kind of defect: `count` of `of` `unit`s, what is the matter and what to do.

    `code` is its stable name. An "error" stops training or makes it learn what is false, a
    "warning" probably harms it, and "information" is no defect by itself. `examples` name files
    and entries; `images` and `boxes` are rows, for pictures (a box of -1 is none).
    """

    code: str
    level: Level
    title: str
    count: int
    of: int
    unit: str
    examples: tuple[str, ...]
    advice: str
    images: tuple[int, ...] = ()
    boxes: tuple[int, ...] = ()

    @property
    def training(self) -> Training:
        """What training does with such a data set."""
        return TRAINING[self.code]


@dataclass(frozen=True)
class Subject:
    """A data set under examination: N images, C classes.

    `shown` (image, class) rows i64[P, 2] say which classes an image shows, each once. `declared`
    are the names of the classes that count as such.
    """

    name: str
    reader: Reader
    paths: tuple[str, ...]
    class_names: tuple[str, ...]
    shown: np.ndarray
    scan: Scan
    annotations: Annotations | None = None
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def image(self, row: int) -> str:
        return self.paths[row]


_IRREGULAR = {"entries": "entry", "categories": "category", "classes": "class", "boxes": "box"}


def counted(count: int, unit: str) -> str:
    """
    >>> counted(1, "boxes"), counted(2000, "images")
    ('1 box', '2,000 images')
    """
    return f"{count:,} {_IRREGULAR.get(unit, unit.removesuffix('s')) if count == 1 else unit}"


# --- annotation files ---------------------------------------------------------------------------

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
    """What the reader refused."""
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
                title += f": {_few(used)}"
        count, of, unit = len(found), total + len(found), "entries"
        if kind in ("category", "image"):
            of, unit = len(entries.box_image) if entries is not None else 0, "boxes"
        if code == "ids-off-by-one":
            count = of  # those whose ids happen to be declared are as wrong
        if kind == "image":
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


# --- categories ---------------------------------------------------------------------------------


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


def _balance(names: Sequence[str], counts: np.ndarray, unit: str) -> list[Finding]:
    findings = []
    unused = [name for name, count in zip(names, counts, strict=True) if not count]
    if unused and len(unused) < len(names):
        findings.append(
            Finding(
                "unused-class",
                "information",
                f"classes that label nothing: {_few(unused)}",
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


# --- boxes --------------------------------------------------------------------------------------


def diagnose_boxes(subject: Subject, *, complete: bool) -> list[Finding]:
    """Everything about boxes' numbers. `complete`: no entry was left out, so none is missing."""
    annotations = subject.annotations
    assert annotations is not None
    x, y, w, h = annotations.boxes_xywh_px.T
    sizes = _sizes(annotations, subject.scan)[annotations.box_image]  # [M, 2]
    height, width = sizes.T.astype(float)
    known = height > 0
    shares = annotations.entry_form == YOLO_PLACE or isinstance(annotations.records, TfdsReader)
    total = len(x)

    def finding(code: str, level: Level, title: str, found: np.ndarray, advice: str) -> list:
        rows = np.flatnonzero(found)[:EXAMPLES]
        if not len(rows):
            return []
        examples = tuple(
            f"{annotations.place(m)}: {_describe(annotations, m, sizes)}" for m in rows
        )
        images = tuple(int(annotations.box_image[m]) for m in rows)
        boxes = tuple(int(m) for m in rows)
        count = int(found.sum())
        return [Finding(code, level, title, count, total, "boxes", examples, advice, images, boxes)]

    negative = (w < 0) | (h < 0)
    empty = ~negative & ((w == 0) | (h == 0))
    whole = ~negative & ~empty
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond_x = np.maximum(-x, x + w - width)
        beyond_y = np.maximum(-y, y + h - height)
        far = np.maximum(beyond_x / width, beyond_y / height) > OVERHANG_SHARE
        pixels = (
            whole
            & known
            & shares
            & ((np.maximum(w, x) > 2 * width) | (np.maximum(h, y) > 2 * height))
        )
    relative = whole & ~np.full(total, shares) & (w * h < 1)
    relative &= (np.abs(annotations.boxes_xywh_px - 0.5) <= 0.5).all(1)
    over = whole & known & ~relative & ~pixels & (np.maximum(beyond_x, beyond_y) > OVERHANG_PX)
    fits = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1) & (x >= -1) & (y >= -1)
    evidence = over & far
    told = not shares and (evidence & fits).sum() >= max(3, 0.5 * evidence.sum())
    corners = over & fits & told
    over &= ~corners
    as_corners = whole & ~relative
    everywhere = corners.any() and bool(fits[as_corners].all())
    away = over & ((beyond_x >= w) | (beyond_y >= h))
    findings = [
        *finding(
            "swapped-corners",
            "error",
            "boxes of negative width or height: the corners are swapped",
            negative,
            "write the smaller coordinate first; or xmax and ymax hold a width and height",
        ),
        *finding(
            "zero-area",
            "warning",
            "boxes of no area",
            empty,
            "remove them; training leaves them out",
        ),
        *finding(
            "relative-units",
            "error",
            "boxes in shares of the image where the format has pixels",
            relative,
            "multiply by the image's width and height",
        ),
        *finding(
            "pixels-for-shares",
            "error",
            "boxes in pixels where the format has shares of the image",
            pixels,
            "divide by the image's width and height",
        ),
        *finding(
            "corners-as-sizes",
            "error",
            "boxes that end outside the image, but fit as corners: xyxy written as xywh"
            + (" (as all boxes fit, probably throughout)" if everywhere else ""),
            corners,
            "write left, top, width, height",
        ),
        *finding(
            "outside-image",
            "warning",
            f"boxes that reach over the image's border by more than {OVERHANG_PX:g} px"
            + (f", {away.sum():,} of them wholly outside" if away.any() else ""),
            over,
            "check the stated sizes and the boxes; training cuts them at the border",
        ),
        *finding(
            "repeated-box",
            "warning",
            "boxes that repeat another of the same image, class and place",
            _repeated(annotations),
            "remove them: one of each pair can't be detected again",
        ),
    ]
    count = len(annotations.paths)
    bare = np.flatnonzero(np.bincount(annotations.box_image, minlength=count) == 0)
    if len(bare):
        many = complete and len(bare) >= count / 2
        findings.append(
            Finding(
                "no-boxes",
                "warning" if many else "information",
                "images without boxes",
                len(bare),
                count,
                "images",
                tuple(annotations.paths[i] for i in bare[:EXAMPLES]),
                "right for pictures of background; else look for lost annotations",
                tuple(int(i) for i in bare[:EXAMPLES]),
                (-1,) * min(len(bare), EXAMPLES),
            )
        )
    return findings


def diagnose_training(subject: Subject, findings: Sequence[Finding]) -> list[Finding]:
    """What training itself says, where it would refuse for a reason that is not told yet."""
    if any(finding.training == "refuses" for finding in findings):
        return []
    try:
        check_boxes(_as_training_reads(subject))
    except UserError as error:
        count = len(subject.paths)
        text = str(error).removeprefix(f"{subject.name}: ").partition(":")[0]
        advice = "look for lost annotations, and for boxes outside of their images"
        return [Finding("nothing-to-learn", "error", text, count, count, "images", (), advice)]
    return []


def _as_training_reads(subject: Subject) -> DetectionSource:
    """The same images and boxes, cleaned and numbered. Raises UserError where training does."""
    annotations = subject.annotations
    assert annotations is not None
    sizes = annotations.sizes.copy()
    for row, header in enumerate(subject.scan.headers):  # which need not be read once more
        if header is not None and not sizes[row].all():
            sizes[row] = header.upright_size
    return make_detection_source(replace(annotations, sizes=sizes))


def _sizes(annotations: Annotations, scan: Scan) -> np.ndarray:
    """i32[N, 2] (height, width) as stated, else as decoded; 0 if unknown or in contradiction."""
    sizes = annotations.sizes.copy()
    for row, header in enumerate(scan.headers):
        if header is not None:
            if not sizes[row].all():
                sizes[row] = header.upright_size
            elif tuple(sizes[row]) not in (header.upright_size, (header.height, header.width)):
                sizes[row] = 0  # a finding of its own, not one for each box
    return sizes


def _describe(annotations: Annotations, box: int, sizes: np.ndarray) -> str:
    x, y, w, h = (f"{value:.6g}" for value in annotations.boxes_xywh_px[box])
    height, width = sizes[box]
    path = annotations.paths[annotations.box_image[box]]
    return f"left {x}, top {y}, width {w}, height {h} in {path} ({width} × {height})"


def _repeated(annotations: Annotations) -> np.ndarray:
    """bool[M]: the same numbers as an earlier box of the same image and category."""
    keys = (annotations.box_image, annotations.box_category, *annotations.boxes_xywh_px.T)
    order = np.lexsort(keys)  # stable: of equal boxes the earliest comes first
    same = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        same &= key[order[1:]] == key[order[:-1]]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = same
    return repeated & ~annotations.crowd


# --- image files --------------------------------------------------------------------------------


def diagnose_images(subject: Subject) -> list[Finding]:
    """Damage, stated sizes, rotation, files that nothing refers to, the same image twice."""
    scan, total = subject.scan, len(subject.paths)

    def finding(
        code: str, level: Level, title: str, found: Sequence[tuple[int, str]], advice: str
    ) -> list[Finding]:
        if not found:
            return []
        some = found[:EXAMPLES]
        rows = tuple(row for row, _ in some)
        texts = tuple(text for _, text in some)
        none = (-1,) * len(rows)
        return [Finding(code, level, title, len(found), total, "images", texts, advice, rows, none)]

    turned, wrong = [], []
    if subject.annotations is not None:
        for row, header in enumerate(scan.headers):
            stated = tuple(int(side) for side in subject.annotations.sizes[row])
            if header is None or 0 in stated or stated == header.upright_size:
                continue
            says = f"{subject.image(row)}: states {stated[1]} × {stated[0]}"
            height, width = header.upright_size
            if stated == (header.height, header.width):
                turned.append((row, f"{says}, turned by EXIF it is {width} × {height}"))
            else:
                wrong.append((row, f"{says}, is {width} × {height}"))
    findings = [
        *finding(
            "unreadable-image",
            "error",
            "images that can't be read",
            [(row, text) for row, text in sorted(scan.errors.items())],
            "get them again, or remove them; training skips and counts them",
        ),
        *finding(
            "wrong-size",
            "error",
            "images whose stated width and height are not the file's",
            wrong,
            "correct the sizes; if images were resized, boxes must be too",
        ),
        *finding(
            "exif-rotation",
            "warning",
            "photos that EXIF turns, with the width and height of the unturned file",
            turned,
            "see if boxes fit the turned or the unturned photo, and save photos upright",
        ),
    ]
    pairs = repeated_files(scan)
    if subject.annotations is None:
        clash = [(a, b) for a, b in pairs if subject.labels[a] != subject.labels[b]]
        names = subject.class_names
        findings += finding(
            "conflicting-labels",
            "error",
            "images that are there twice, in different classes",
            [
                (
                    a,
                    f"{subject.image(a)} ({names[subject.labels[a]]}) is {subject.image(b)}"
                    f" ({names[subject.labels[b]]})",
                )
                for a, b in clash
            ],
            "keep each in one class",
        )
        apart = set(clash)
        pairs = [pair for pair in pairs if pair not in apart]
    return findings + finding(
        "repeated-image",
        "information",
        "images that are there twice, byte for byte",
        [(a, f"{subject.image(a)} is {subject.image(b)}") for a, b in pairs],
        "harmless inside one split unless their annotations differ",
    )


def diagnose_loose_files(subject: Subject, other: Subject | None) -> list[Finding]:
    """Image files in the folder that neither annotations nor the other split's refer to."""
    if not isinstance(subject.reader, FileReader) or subject.annotations is None:
        return []
    folder = subject.reader.folder
    known = {os.path.normpath(folder / path) for path in subject.paths}
    if other is not None and isinstance(other.reader, FileReader):
        known |= {os.path.normpath(other.reader.folder / path) for path in other.paths}
    loose = [p for p in find_files(folder, IMAGES) if os.path.normpath(folder / p) not in known]
    if not loose:
        return []
    return [
        Finding(
            "not-referenced",
            "information",
            "image files in the folder that no annotation refers to",
            len(loose),
            len(loose) + len(subject.paths),
            "files",
            tuple(loose[:EXAMPLES]),
            "right if they belong to another split; else they are not trained on",
        )
    ]


# --- classification -----------------------------------------------------------------------------


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


# --- two splits ---------------------------------------------------------------------------------


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
    known = one.class_names
    if one.annotations is not None:
        with suppress(UserError):  # which one's own findings tell
            known = _as_training_reads(one).class_names
    # Of boxes only those that are there need a class; of images' classes each declared one.
    needed = other.class_names if other.annotations is None else tuple(_shown_names(other))
    unknown = sorted(set(needed) - set(known))
    if unknown:
        findings.append(
            Finding(
                "unknown-class",
                "error",
                f"classes of {other.name} that {one.name} doesn't declare: {_few(unknown)}",
                len(unknown),
                len(other.class_names),
                "classes",
                tuple(unknown[:EXAMPLES]),
                "give both the same classes, spelled alike",
            )
        )
    return findings + _drift(one, other, set(unknown))


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


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
