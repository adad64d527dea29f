"""Precision over recall of boxes and of masks, and the colors of classes.

A class has the same color in every picture: by its label, from a palette that can be told apart
with any color vision (Okabe and Ito 2008, https://jfly.uni-koeln.de/color/); its name is always
written beside it, since colors repeat from the eighth class on.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vision_jax.figures import INK, save_figure, shorten
from vision_jax.tasks.coco import IOU_THRESHOLDS

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
MOST_CURVES = 8  # classes up to which each has its own labeled curve


def class_color(label: int) -> str:
    """The color of a class in every picture, as #rrggbb."""
    return PALETTE[label % len(PALETTE)]


def draw_precision_recall(
    precision: np.ndarray, class_names: Sequence[str], path: str | Path, *, things: str = "boxes"
) -> Path:
    """Precision over recall at IoU 0.5 and 0.75, each class and their mean, as a PNG.

    Of more than 8 classes the three with the best and the three with the worst AP are named.

    Args:
      precision: f64[10, 101, K, 4, 3], as `coco.figures` takes it.
      class_names: K names.
      path: of the file.
      things: what is found, in the plural.
    """
    figure = Figure(figsize=(15, 4.8), dpi=120, layout="constrained")
    for axes, threshold in zip(figure.subplots(1, 2, sharey=True), (0, 5), strict=True):
        curves = precision[threshold, :, :, 0, 2].T  # [K, 101]
        title = f"IoU ≥ {IOU_THRESHOLDS[threshold]:g}"
        _plot_curves(axes, curves, class_names, things)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.set_xlabel(f"recall: share of the true {things} that are found")
        axes.set(xlim=(0, 1), ylim=(0, 1.03))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"precision: share of the found {things} that are right")
    return save_figure(figure, path)


def _plot_curves(axes: Axes, curves: np.ndarray, class_names: Sequence[str], things: str) -> None:
    present = np.flatnonzero((curves > -1).all(axis=1))  # classes that have true boxes
    if not len(present):
        axes.text(0.5, 0.5, f"no true {things}", ha="center", color=INK, transform=axes.transAxes)
        return
    recall = np.linspace(0, 1, curves.shape[1])
    ap = curves.mean(axis=1)
    ranked = present[np.argsort(-ap[present], kind="stable")]
    named = ranked if len(ranked) <= MOST_CURVES else np.concatenate([ranked[:3], ranked[-3:]])
    for label in ranked:
        if label not in named:
            axes.plot(recall, curves[label], color="#bbbbbb", linewidth=1.2)
    for label in named:
        text = f"{ap[label]:.3f}  {shorten(class_names[label])}"
        style = ("-", "--", "-.", ":")[int(label) // len(PALETTE) % 4]
        color = class_color(int(label))
        axes.plot(recall, curves[label], style, color=color, linewidth=1.8, label=text)
    if len(present) > 1:
        text = f"{ap[present].mean():.3f}  mean of {len(present)} classes"
        axes.plot(recall, curves[present].mean(axis=0), color=INK, linewidth=3, label=text)
    legend = axes.legend(
        title="AP", frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1),
        alignment="left",
    )  # fmt: skip
    for entry in legend.get_texts():
        entry.set_parse_math(False)
