"""The doctor's sheet: distributions of boxes and classes, and examples of each finding."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vision_jax.data.decode import DamagedImageError
from vision_jax.doctor.finding import Finding, Subject
from vision_jax.figures import BLUE, INK, RED, save_figure, shorten

COLUMNS = 4
MOST_FINDINGS = 12
MOST_CLASSES = 20
MOST_BOXES = 200  # of one image, those in question before the others
LONGEST_SIDE = 800  # of an image as it is kept for drawing


def draw_diagnosis(subject: Subject, findings: Sequence[Finding], path: str | Path) -> Path:
    """Histograms of box sizes and shapes, class counts, and up to 4 images of each finding.

    Boxes in question are red, the others of the image blue. Writes a PNG.
    """
    pictures = []  # (finding, rows of images that can be read)
    for finding in findings:
        rows = [row for row in dict.fromkeys(finding.images) if row not in subject.scan.errors]
        pictures += [(finding, rows[:COLUMNS])] * bool(rows)
    pictures = pictures[:MOST_FINDINGS]
    figure = Figure(figsize=(13, 3.4 * (1 + len(pictures))), dpi=100, layout="constrained")
    top, *parts = figure.subfigures(1 + len(pictures), 1, squeeze=False).ravel()
    grid = top.add_gridspec(1, 4)
    if subject.annotations is None:
        _draw_classes(top.add_subplot(grid[0, :]), subject)
    else:
        _draw_sizes(top.add_subplot(grid[0, 0]), subject)
        _draw_shapes(top.add_subplot(grid[0, 1]), subject)
        _draw_classes(top.add_subplot(grid[0, 2:]), subject)
    for part, (finding, rows) in zip(parts, pictures, strict=True):
        title = f"{finding.code}: {finding.count:,} of {finding.of:,} {finding.unit}"
        part.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
        for axes, row in zip(part.subplots(1, COLUMNS), [*rows, *[None] * COLUMNS], strict=False):
            axes.set_axis_off()
            if row is not None:
                _draw_image(axes, subject, row, finding)
    return save_figure(figure, path)


def _draw_image(axes: Axes, subject: Subject, row: int, finding: Finding) -> None:
    title = shorten(subject.paths[row], 40)
    try:
        image = subject.reader.read(row)
    except DamagedImageError:  # behind its header, where only that was read
        axes.set_title(title, fontsize=8, color=INK, parse_math=False)
        axes.text(0.5, 0.5, "can't be read", ha="center", color=RED, transform=axes.transAxes)
        return
    height, width = image.shape[:2]
    step = math.ceil(max(height, width) / LONGEST_SIDE)
    small = image[::step, ::step, : 3 if image.shape[2] == 3 else 1].copy()
    axes.imshow(small, cmap="gray", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    annotations = subject.annotations
    own: Any = [] if annotations is None else np.flatnonzero(annotations.box_image == row)
    drawn = sorted(own, key=lambda box: box not in finding.boxes)[:MOST_BOXES]
    if len(drawn) < len(own):
        title += f"\n{len(drawn)} of its {len(own):,} boxes"
    axes.set_title(title, fontsize=8, color=INK, parse_math=False)
    if annotations is None:
        return
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    for box in drawn:
        x, y, w, h = annotations.boxes_xywh_px[box]
        color, line = (RED, 2.0) if box in finding.boxes else (BLUE, 1.0)
        for edge, extra in (("white", 1.5), (color, 0.0)):
            axes.add_patch(
                Rectangle((x, y), w, h, fill=False, edgecolor=edge, linewidth=line + extra)
            )
        if box in finding.boxes:  # seen whole, unless it lies too far away
            left, right = min(left, x, x + w), max(right, x, x + w)
            top, bottom = min(top, y, y + h), max(bottom, y, y + h)
    axes.set_xlim(max(left, -width), min(right, 2 * width))
    axes.set_ylim(min(bottom, 2 * height), max(top, -height))


def _draw_sizes(axes: Axes, subject: Subject) -> None:
    assert subject.annotations is not None
    w, h = subject.annotations.boxes_xywh_px[:, 2:].T
    sides = np.sqrt((w * h)[(w > 0) & (h > 0)])
    if len(sides):
        edges = np.geomspace(max(sides.min(), 1e-3), sides.max() * 1.001 + 1e-3, 40)
        axes.hist(sides, edges.tolist(), color=BLUE)
        axes.set_xscale("log")
    for side in (32, 96):  # COCO's limits of small and large
        axes.axvline(side, color=INK, linewidth=0.8, linestyle=":")
    _dress(axes, "Box size: √area in pixels", "boxes")


def _draw_shapes(axes: Axes, subject: Subject) -> None:
    assert subject.annotations is not None
    w, h = subject.annotations.boxes_xywh_px[:, 2:].T
    shapes = np.log2((w[(w > 0) & (h > 0)]) / h[(w > 0) & (h > 0)])
    axes.hist(np.clip(shapes, -4, 4), np.linspace(-4, 4, 41).tolist(), color=BLUE)
    axes.set_xticks([-4, -2, 0, 2, 4], ["1:16", "1:4", "1:1", "4:1", "16:1"])
    _dress(axes, "Box shape: width to height", "boxes")


def _draw_classes(axes: Axes, subject: Subject) -> None:
    annotations = subject.annotations
    labels = subject.labels if annotations is None else annotations.box_category
    counts = np.bincount(labels, minlength=len(subject.class_names))
    if subject.pixels is not None:
        counts = subject.pixels[:, :-1].sum(0)
    order = np.argsort(-counts, kind="stable")[:MOST_CLASSES]
    axes.bar(range(len(order)), counts[order], color=BLUE)
    names = [shorten(subject.class_names[i], 14) for i in order]
    axes.set_xticks(range(len(order)), names, rotation=40, ha="right", fontsize=8, parse_math=False)
    rest = len(counts) - len(order)
    title = f"The largest {len(order)} classes of {len(counts):,}" if rest else "Classes"
    unit = "images" if annotations is None else "boxes"
    _dress(axes, title, unit if subject.pixels is None else "pixels")


def _dress(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
