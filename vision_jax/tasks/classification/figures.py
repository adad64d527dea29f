"""The pictures of a classifier: predictions, and what attacks and corruptions make of it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vision_jax.figures import BLUE, GREEN, INK, ORANGE, RED, save_figure, shorten

COLORS = (BLUE, ORANGE, GREEN, "#8e5ea2", "#888888", "#b8860b")
MOST_EXAMPLES = 8
MOST_IMAGES = 64


def draw_predictions(
    images: np.ndarray,
    labels: np.ndarray | None,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    path: str | Path,
) -> Path:
    """A grid of images, each with its predicted class and its probability, as a PNG.

    Right predictions are green and wrong ones red, with the true class below; without labels all
    are blue. At most the first 64 images are drawn.

    Args:
      images: u8[N, H, W, C].
      labels: int[N], or None where the truth is unknown.
      probabilities: f32[N, C].
      class_names: C names.
    """
    shown = min(len(images), MOST_IMAGES)
    columns = max(1, min(8, shown, math.ceil(math.sqrt(1.6 * shown))))
    rows = max(1, math.ceil(shown / columns))
    figure = Figure(figsize=(1.75 * columns, 2.2 * rows), dpi=120, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells[shown:]:
        cell.set_axis_off()
    for index, cell in enumerate(cells[:shown]):
        image = images[index]
        if image.shape[2] != 3:  # grey, or the first of many channels in color
            image = image[..., :3] if image.shape[2] > 3 else image[..., :1].repeat(3, axis=2)
        tiny = min(image.shape[:2]) < 100  # pixels of such images are shown as squares
        cell.imshow(image, interpolation="nearest" if tiny else "antialiased")
        predicted = int(np.argmax(probabilities[index]))
        text = f"{shorten(class_names[predicted])}  {probabilities[index, predicted]:.0%}"
        color = BLUE
        if labels is not None:
            true = int(labels[index])
            color = GREEN if predicted == true else RED
            text += f"\ntrue: {shorten(class_names[true])}"
        cell.set_title(text, fontsize=8, color=color, parse_math=False, linespacing=1.3, pad=4)
        cell.set(xticks=[], yticks=[])
        for spine in cell.spines.values():
            spine.set(color=color, linewidth=2)
    return save_figure(figure, path)


def draw_robustness(
    record: Mapping[str, Any],
    examples: Mapping[str, Any] | None,
    class_names: Sequence[str],
    path: str | Path,
) -> Path:
    """Accuracy by epsilon, accuracy by corruption, and adversarial examples, as a PNG.

    Args:
      record: as robustness.json has it.
      examples: "attack" and "epsilon" (text), "image" and "adversarial" f32[N, H, W, C] in [0, 1],
        "label" i32[N], "before" and "after" f[N, C] (probabilities); None without attacks.
      class_names: C names.
    """
    shown = min(len(examples["label"]), MOST_EXAMPLES) if examples else 0
    figure = Figure(figsize=(15, 4.6 + (5.6 if shown else 0)), dpi=120, layout="constrained")
    above: Any = figure
    below: Any = None
    if shown:
        above, below = figure.subfigures(2, 1, height_ratios=(4.6, 5.6))  # type: ignore[misc]
    curves, table = above.subplots(1, 2)
    _draw_curves(curves, record)
    _draw_corruptions(table, record)
    if below is not None and examples is not None:
        _draw_examples(below.subplots(3, shown, squeeze=False), examples, class_names, below)
    return save_figure(figure, path)


def _draw_curves(axes: Axes, record: Mapping[str, Any]) -> None:
    unit = 255 if record["norm"] == "linf" else 1
    clean = record["clean"]["accuracy"]
    for (name, rows), color in zip(record["attacks"].items(), COLORS * 3, strict=False):
        points = [(0.0, clean), *sorted((row["epsilon"], row["accuracy"]) for row in rows)]
        x, y = zip(*points, strict=True)
        line = "--" if name == "all" else "-"
        label = "all of them" if name == "all" else name
        axes.plot(
            [unit * e for e in x], [100 * a for a in y], line, marker="o", color=color, label=label
        )
    ensemble = record.get("autoattack")
    if ensemble:
        axes.plot(
            unit * ensemble["epsilon"], 100 * ensemble["accuracy"], "*", color=RED, markersize=14,
            label=f"AutoAttack {ensemble['version']}",
        )  # fmt: skip
    axes.plot(0, 100 * clean, "s", color=INK, label=f"clean {clean:.2%}")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("accuracy, %")
    axes.set_xlabel("epsilon" + (" × 255" if unit == 255 else "") + f" ({record['norm']})")
    axes.set_title(
        f"Under attack, {record['images']:,} images", loc="left", fontsize=11, fontweight="bold",
        color=INK,
    )  # fmt: skip
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _draw_corruptions(axes: Axes, record: Mapping[str, Any]) -> None:
    corruptions = record["corruptions"]
    title = "No corruptions"
    if corruptions:
        severities = [row["severity"] for row in next(iter(corruptions.values()))]
        values = np.array([[row["accuracy"] for row in rows] for rows in corruptions.values()])
        axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            axes.text(
                column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8,
                color="white" if abs(value - 0.5) > 0.35 else INK,
            )  # fmt: skip
        axes.set_xticks(range(len(severities)), [str(s) for s in severities])
        names = [name.replace("_", " ") for name in corruptions]
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_xlabel("severity")
        title = f"Under corruption: mean accuracy {record['mean_corruption_accuracy']:.2%}"
    else:
        axes.set_axis_off()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)


def _draw_examples(
    cells: np.ndarray, examples: Mapping[str, Any], class_names: Sequence[str], figure: Any
) -> None:
    change = examples["adversarial"] - examples["image"]
    factor = 0.5 / max(float(np.abs(change).max()), 1e-12)
    figure.suptitle(
        f"{examples['attack']}, epsilon {examples['epsilon']}: images, perturbations × "
        f"{factor:.3g} around grey, adversarial examples",
        x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK,
    )  # fmt: skip
    rows = (
        (examples["image"], examples["before"]),
        (0.5 + factor * change, None),
        (examples["adversarial"], examples["after"]),
    )
    for row, (images, probabilities) in zip(cells, rows, strict=True):
        for index, cell in enumerate(row):
            image = np.clip(images[index], 0, 1)
            if image.shape[2] != 3:
                image = image[..., :3] if image.shape[2] > 3 else image[..., :1].repeat(3, axis=2)
            cell.imshow(
                image, interpolation="nearest" if min(image.shape[:2]) < 100 else "antialiased"
            )
            cell.set(xticks=[], yticks=[])
            color = INK
            if probabilities is not None:
                predicted = int(np.argmax(probabilities[index]))
                color = GREEN if predicted == examples["label"][index] else RED
                text = f"{shorten(class_names[predicted], 16)}  {probabilities[index].max():.0%}"
                cell.set_title(text, fontsize=8, color=color, parse_math=False, pad=4)
            for spine in cell.spines.values():
                spine.set(color=color, linewidth=2 if probabilities is not None else 0.5)
