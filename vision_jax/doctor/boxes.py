"""What is wrong with boxes, each kind with a criterion that clean sets don't meet.

Criteria are logical (a box with a negative width) wherever one exists.
"""

from dataclasses import dataclass

import numpy as np

from vision_jax.data.annotation_formats.yolo import YOLO_PLACE
from vision_jax.data.annotations import Annotations
from vision_jax.data.sources import TfdsReader
from vision_jax.doctor.finding import EXAMPLES, Finding, Level, Subject
from vision_jax.doctor.scan import Scan

OVERHANG_PX = 1.0  # rounding, and pixels that count from 1
OVERHANG_SHARE = 0.05  # of a side, from which a box is evidence for corners written as sizes


def diagnose_boxes(subject: Subject, *, complete: bool) -> list[Finding]:
    """Everything about boxes' numbers. `complete`: no entry was left out, so none is missing."""
    annotations = subject.annotations
    assert annotations is not None
    sizes = _sizes(annotations, subject.scan)[annotations.box_image]  # [M, 2]
    defects = _find_defects(annotations, sizes)
    away = int(defects.away.sum())
    kinds: list[tuple[str, Level, str, np.ndarray, str]] = [
        (
            "swapped-corners",
            "error",
            "boxes of negative width or height: the corners are swapped",
            defects.negative,
            "write the smaller coordinate first; or xmax and ymax hold a width and height",
        ),
        (
            "zero-area",
            "warning",
            "boxes of no area",
            defects.empty,
            "remove them; training leaves them out",
        ),
        (
            "relative-units",
            "error",
            "boxes in shares of the image where the format has pixels",
            defects.relative,
            "multiply by the image's width and height",
        ),
        (
            "pixels-for-shares",
            "error",
            "boxes in pixels where the format has shares of the image",
            defects.pixels,
            "divide by the image's width and height",
        ),
        (
            "corners-as-sizes",
            "error",
            "boxes that end outside the image, but fit as corners: xyxy written as xywh"
            + (" (as all boxes fit, probably throughout)" if defects.corners_everywhere else ""),
            defects.corners,
            "write left, top, width, height",
        ),
        (
            "outside-image",
            "warning",
            f"boxes that reach over the image's border by more than {OVERHANG_PX:g} px"
            + (f", {away:,} of them wholly outside" if away else ""),
            defects.over,
            "check the stated sizes and the boxes; training cuts them at the border",
        ),
        (
            "repeated-box",
            "warning",
            "boxes that repeat another of the same image, class and place",
            _repeated(annotations),
            "remove them: one of each pair can't be detected again",
        ),
    ]
    findings = [
        _finding(annotations, sizes, code, level, title, found, advice)
        for code, level, title, found, advice in kinds
        if found.any()
    ]
    return findings + _images_without_boxes(annotations, complete)


@dataclass(frozen=True)
class _Defects:
    """Which of M boxes have which defect, bool[M] each.

    `away` are those of `over` that lie wholly outside; with `corners_everywhere` each box of the
    set would be one as corners too.
    """

    negative: np.ndarray
    empty: np.ndarray
    relative: np.ndarray
    pixels: np.ndarray
    corners: np.ndarray
    over: np.ndarray
    away: np.ndarray
    corners_everywhere: bool


def _find_defects(annotations: Annotations, sizes: np.ndarray) -> _Defects:
    """Of boxes in images of i32[M, 2] (height, width), 0 where unknown; a box has one defect."""
    x, y, w, h = annotations.boxes_xywh_px.T
    height, width = sizes.T.astype(float)
    known = height > 0
    shares = annotations.entry_form == YOLO_PLACE or isinstance(annotations.records, TfdsReader)

    negative = (w < 0) | (h < 0)
    empty = ~negative & ((w == 0) | (h == 0))
    whole = ~negative & ~empty
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond_x = np.maximum(-x, x + w - width)
        beyond_y = np.maximum(-y, y + h - height)
        far = np.maximum(beyond_x / width, beyond_y / height) > OVERHANG_SHARE

    # Another unit than the format's: pixels for shares, or shares for pixels.
    large = (np.maximum(w, x) > 2 * width) | (np.maximum(h, y) > 2 * height)
    pixels = whole & known & shares & large
    relative = whole & ~np.full(len(x), shares) & (w * h < 1)
    relative &= (np.abs(annotations.boxes_xywh_px - 0.5) <= 0.5).all(1)

    # What reaches over the border is corners written as sizes where most of it fits as such.
    over = whole & known & ~relative & ~pixels & (np.maximum(beyond_x, beyond_y) > OVERHANG_PX)
    fits = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1) & (x >= -1) & (y >= -1)
    evidence = over & far
    told = not shares and (evidence & fits).sum() >= max(3, 0.5 * evidence.sum())
    corners = over & fits & told
    over &= ~corners
    everywhere = bool(corners.any() and fits[whole & ~relative].all())
    away = over & ((beyond_x >= w) | (beyond_y >= h))
    return _Defects(negative, empty, relative, pixels, corners, over, away, everywhere)


def _finding(
    annotations: Annotations,
    sizes: np.ndarray,
    code: str,
    level: Level,
    title: str,
    found: np.ndarray,
    advice: str,
) -> Finding:
    rows = np.flatnonzero(found)[:EXAMPLES]
    examples = tuple(f"{annotations.place(m)}: {_describe(annotations, m, sizes)}" for m in rows)
    images = tuple(int(annotations.box_image[m]) for m in rows)
    boxes = tuple(int(m) for m in rows)
    count, total = int(found.sum()), len(found)
    return Finding(code, level, title, count, total, "boxes", examples, advice, images, boxes)


def _images_without_boxes(annotations: Annotations, complete: bool) -> list[Finding]:
    count = len(annotations.paths)
    bare = np.flatnonzero(np.bincount(annotations.box_image, minlength=count) == 0)
    if not len(bare):
        return []
    many = complete and len(bare) >= count / 2
    return [
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
    ]


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
