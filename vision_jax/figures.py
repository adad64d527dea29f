"""What the pictures of all tasks share: curves, confusion, rows of images, names that fit, files.

Figures are made as objects and drawn by Agg: no window, no global state, safe in any thread.
"""

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import ImageFont

from vision_jax.errors import printable

BLUE, ORANGE, GREEN, RED, INK = "#2a6fbb", "#e07b39", "#2e8b57", "#c0392b", "#333333"
MOST_COUNTS = 20  # classes up to which the confusion matrix has its counts written in
MOST_NAMES = 60  # classes up to which it has their names at its sides


def draw_curves(
    records: Sequence[Mapping[str, Any]], path: str | Path, metrics: Sequence[str] = ("top1",)
) -> Path:
    """Loss, metrics of the evaluations and learning rate over the steps, as a PNG.

    Args:
      records: as `logging.read_metrics` gives them. Drawn are `train/loss`, `eval/loss`,
        `eval/NAME` of each metric, `eval/rank` and `train/learning_rate`, as far as there are any;
        values that are not finite are left out.
      metrics: shares in [0, 1]; the first one's best is written above.
    """
    figure = Figure(figsize=(13, 3.8), dpi=120, layout="constrained")
    loss, shares, rate = figure.subplots(1, 3, sharex=True)

    steps, values = _series(records, "train/loss")
    if len(steps):
        loss.plot(steps, values, color=BLUE, alpha=0.25, linewidth=1)
        loss.plot(steps, _smooth(values), color=BLUE, linewidth=2, label="training, smoothed")
    _plot_points(loss, *_series(records, "eval/loss"), label="evaluation")
    _dress(loss, "Loss", "nats per image" if metrics == ("top1",) else "")

    for name, color in zip(metrics, (ORANGE, BLUE, GREEN), strict=False):
        steps, values = _series(records, f"eval/{name}")
        label = name.replace("_", " ")
        _plot_points(shares, steps, 100 * values, label=label, color=color)
        if len(steps) and name == metrics[0]:
            best = int(np.argmax(values))
            text = f"best {label} {values[best]:.2%} at step {steps[best]:,}"
            shares.set_title(text, loc="right", fontsize=9, color=INK)
    _dress(shares, "Evaluation", "%")
    steps, values = _series(records, "eval/rank")
    if len(steps):
        ranks = shares.twinx()
        ranks.plot(steps, values, color=INK, linestyle=":", linewidth=1.5)
        ranks.set_ylabel("rank of the features (dotted)", color=INK)
        ranks.spines["top"].set_visible(False)

    rate.plot(*_series(records, "train/learning_rate"), color=GREEN, linewidth=2)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    rate.set_ylim(bottom=0)
    _dress(rate, "Learning rate", "")
    return save_figure(figure, path)


def draw_rows(rows: Mapping[str, np.ndarray], path: str | Path) -> Path:
    """Rows of pictures under each other as a PNG.

    Args:
      rows: f[N, h, w, C] in [0, 1] of each row by its title, N at least 1, the same in all.
      path: of the file.
    """
    count = len(next(iter(rows.values())))
    size = (1.7 * count + 0.3, 1.7 * len(rows) + 0.5)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    cells = figure.subplots(len(rows), count, squeeze=False)
    for row, (title, pictures) in zip(cells, rows.items(), strict=True):
        row[0].set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        for cell, picture in zip(row, pictures, strict=True):
            if picture.shape[2] != 3:  # grey, or the first of many channels in color
                several = picture.shape[2] > 3
                picture = picture[..., :3] if several else picture[..., :1].repeat(3, axis=2)
            tiny = min(picture.shape[:2]) < 100  # pixels of such images are shown as squares
            cell.imshow(picture, interpolation="nearest" if tiny else "antialiased")
            cell.set(xticks=[], yticks=[])
            for spine in cell.spines.values():
                spine.set(color=INK, linewidth=0.5)
    return save_figure(figure, path)


def draw_confusion(
    matrix: np.ndarray, class_names: Sequence[str], path: str | Path, *, title: str | None = None
) -> Path:
    """A confusion matrix as a PNG: counts, colored by their share of the true class.

    Counts are written in up to 20 classes, and names up to 60; beyond, the axes count classes.

    Args:
      matrix: int[C, C], row = true class, column = predicted class.
      class_names: C names.
      title: by default the number of images and the share that is right.
    """
    classes = len(matrix)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)  # [C, C], 0 in absent rows
    side = float(np.clip(2.5 + 0.55 * classes, 4.5, 12))
    figure = Figure(figsize=(side + 0.8, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    color = PowerNorm(0.5, vmin=0, vmax=1)  # a class confused in 1 % of its images is to be seen
    picture = axes.imshow(shares, cmap="Blues", norm=color, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)

    if classes <= MOST_COUNTS:
        for row, column in np.ndindex(classes, classes):
            if matrix[row, column]:
                ink = "white" if shares[row, column] > 0.3 else INK
                text = f"{matrix[row, column]:,}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    if classes <= MOST_NAMES:
        names = [shorten(name) for name in class_names]
        size = 9 if classes <= MOST_COUNTS else 6
        axes.set_xticks(
            range(classes), names, rotation=45, ha="right", rotation_mode="anchor",
            fontsize=size, parse_math=False,
        )  # fmt: skip
        axes.set_yticks(range(classes), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    correct = np.trace(matrix) / max(int(matrix.sum()), 1)
    title = title or f"{int(matrix.sum()):,} images, {correct:.2%} right"
    axes.set_title(title, fontsize=11, color=INK)
    axes.spines[:].set_visible(False)
    return save_figure(figure, path)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric; of a step that was logged twice, the later value."""
    values = {
        record["step"]: record[name]
        for record in records
        if name in record and math.isfinite(record[name])
    }
    steps = sorted(values)
    return np.array(steps, int), np.array([values[step] for step in steps], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over a twentieth of the points, without the pull of its start."""
    keep = 1 - 1 / max(1, len(values) / 20)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return np.array(smoothed)


def _plot_points(
    axes: Axes, steps: np.ndarray, values: np.ndarray, *, label: str, color: str = ORANGE
) -> None:
    if len(steps):
        axes.plot(steps, values, color=color, marker="o", markersize=5, linewidth=1.5, label=label)


def _dress(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing logged", ha="center", color=INK, transform=axes.transAxes)
    elif len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=9)


def shorten(name: str, most: int = 20) -> str:
    """The name on one line, cut with an ellipsis where it is too long for a figure.

    Whoever gives it to matplotlib says parse_math=False: to a name, $ is no mathematics.
    """
    name = printable(name[: 4 * most])
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as it comes with matplotlib: Latin, Greek, Cyrillic, Arabic and more."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def draw_errors(kernels: Mapping[str, tuple[float, str]], path: str | Path) -> Path:
    """The error that quantizing each kernel alone makes, as bars, the largest first, as a PNG.

    Args:
      kernels: by path, the relative error of the outputs, and why it stays in float: "" if it does
        not.
      path: of the file.
    """
    order = sorted(kernels, key=lambda name: kernels[name][0])[-MOST_NAMES:]
    figure = Figure(figsize=(9, 0.8 + 0.2 * len(order)), dpi=120, layout="constrained")
    axes = figure.subplots()
    reasons = sorted({kernels[name][1] for name in order})
    colors = dict(zip(reasons, (BLUE, ORANGE, RED, GREEN), strict=False))
    for reason in reasons:
        names = [name for name in order if kernels[name][1] == reason]
        places = [order.index(name) for name in names]
        errors = [max(kernels[name][0], 1e-9) for name in names]
        axes.barh(places, errors, color=colors[reason], label=reason or "quantized")
    axes.set_yticks(range(len(order)), order, fontsize=7)
    axes.set_xscale("log")
    axes.legend(frameon=False, loc="lower right")
    axes.set_title("Relative error of the outputs, each kernel alone in few bits", loc="left")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def draw_ranks(kernels: Mapping[str, tuple[float, float, int]], path: str | Path) -> Path:
    """What each kernel costs before and after it was factored, as bars, as a PNG.

    Args:
      kernels: by path, in the order of the model: multiplications before and after, and the rank of
        its factors, 0 of one that stays whole.
      path: of the file.
    """
    shown = dict(sorted(kernels.items(), key=lambda item: -item[1][0])[:MOST_NAMES])
    order = [name for name in kernels if name in shown][::-1]
    figure = Figure(figsize=(9, 0.8 + 0.2 * len(order)), dpi=120, layout="constrained")
    axes = figure.subplots()
    places = range(len(order))
    axes.barh(places, [kernels[name][0] for name in order], color="#d5dde6", label="before")
    after = axes.barh(places, [kernels[name][1] for name in order], color=BLUE, label="after")
    ranks = [f" rank {rank}" if (rank := kernels[name][2]) else " whole" for name in order]
    axes.bar_label(after, ranks, fontsize=7, color=INK)
    axes.set_yticks(places, order, fontsize=7)
    axes.legend(frameon=False, loc="lower right")
    axes.set_title("Multiplications of each kernel, of one image", loc="left")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG on white."""
    path = Path(path)
    with warnings.catch_warnings():  # of names in scripts that the font lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(path, format="png", facecolor="white")
    return path
