"""A detector under attack: which attacks there are, and the picture of its AP against epsilon."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vision_jax.attacks import gradient
from vision_jax.attacks.norms import Norm
from vision_jax.errors import UserError, nearest
from vision_jax.evaluate.detection_figures import draw_detections
from vision_jax.evaluate.figures import BLUE, GREEN, INK, ORANGE, save_figure
from vision_jax.evaluate.robustness import STEP_SHARE, show_epsilon

ATTACKS = ("fgsm", "pgd")
PICTURES = 4
COLORS = (BLUE, ORANGE, GREEN)


def make_attack(name: str, *, norm: Norm, steps: int, restarts: int) -> Callable[..., jax.Array]:
    """One of ATTACKS: (loss, images, keys, epsilon=, pixels=) -> images.

    Raises:
      UserError: no such attack.
    """
    if name == "fgsm":
        return partial(gradient.fgsm, norm=norm)
    if name != "pgd":
        raise UserError(
            f"config.robustness.attacks: a detector's are fgsm and pgd, not `{name}`"
            f"{nearest(name, ATTACKS)}"
        )

    def pgd(loss, images, keys, *, epsilon, pixels):
        step_size = STEP_SHARE * epsilon / steps
        return gradient.pgd(
            loss, images, keys, epsilon=epsilon, step_size=step_size, steps=steps, norm=norm,
            restarts=restarts, pixels=pixels,
        )  # fmt: skip

    return pgd


def no_attack(loss, images, keys, **threat):
    """The images as they are."""
    del loss, keys, threat
    return images


def line(name: str, record: Mapping[str, Any]) -> str:
    """The figures of an attack, for the screen."""
    values = ((what, record[what]) for what in ("ap", "ap50", "ap75"))
    text = "  ".join(f"{what} {'-' if value is None else f'{value:.4f}'}" for what, value in values)
    return f"  {name:16} {text}  n={record['count']}"


def draw_robustness(
    record: Mapping[str, Any],
    pictures: Sequence[Sequence[Mapping[str, np.ndarray]]],
    class_names: Sequence[str],
    path: str | Path,
    *,
    score: float,
) -> Path:
    """AP and AP50 by epsilon, and boxes on images before and after, as a PNG.

    Args:
      record: as robustness.json has it.
      pictures: of each image what is found (plain, attacked): "image" and "attacked"
        f32[h, w, C] in [0, 1], "score" f32[N], "label" i32[N], "boxes_xyxy_px" f32[N, 4].
      class_names: K names.
      score: boxes below it are not drawn.
    """
    lower = 10.5 if pictures else 0
    figure = Figure(figsize=(14, 4.4 + lower), dpi=100, layout="constrained")
    upper: Any = figure
    if pictures:
        parts: Any = figure.subfigures(2, 1, height_ratios=(4.4, lower))
        upper, below = parts
        _draw_pictures(below, pictures, class_names, record, score)
    unit = 255 if record["norm"] == "linf" else 1
    for axes, what in zip(upper.subplots(1, 2), ("ap", "ap50"), strict=True):
        for (name, rows), color in zip(record["attacks"].items(), COLORS, strict=False):
            points = [(0.0, record["clean"][what]), *((r["epsilon"], r[what]) for r in rows)]
            x, y = np.array(points, float).T  # None, where there is no true box, is no point
            axes.plot(unit * x, y, marker="o", color=color, label=name)
        clean = np.array([record["clean"][what]], float)
        axes.plot([0.0], clean, "s", color=INK, label="clean")
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("epsilon" + (" × 255" if unit == 255 else "") + f" ({record['norm']})")
        title = f"{what.upper()} under attack, {record['images']:,} images"
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return save_figure(figure, path)


def _draw_pictures(figure, pictures, class_names, record, score) -> None:
    """Three rows: images with boxes, perturbations around grey, attacked images with boxes."""
    changes = [after["attacked"] - after["image"] for _, after in pictures]
    factor = 0.5 / max(max(float(np.abs(change).max()) for change in changes), 1e-12)
    name, rows = list(record["attacks"].items())[-1]
    figure.suptitle(
        f"{name}, epsilon {show_epsilon(rows[-1]['epsilon'], record['norm'])}: boxes that score "
        f"{score:g} or more before, the perturbation × {factor:.3g} around grey, boxes after",
        x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK,
    )  # fmt: skip
    cells = figure.subplots(3, len(pictures), squeeze=False)
    for column, change, pair in zip(cells.T, changes, pictures, strict=True):
        for cell, image in zip(
            column,
            (
                _with_boxes(pair[0], class_names, score),
                _bytes(0.5 + factor * change[..., :3]),
                _with_boxes(pair[1], class_names, score),
            ),
            strict=True,
        ):
            cell.imshow(image)
            cell.set_axis_off()


def _with_boxes(found: Mapping[str, np.ndarray], class_names: Sequence[str], score: float):
    kept = found["score"] >= score
    boxes, labels, scores = (found[k][kept] for k in ("boxes_xyxy_px", "label", "score"))
    return draw_detections(_bytes(found["attacked"]), boxes, labels, scores, class_names)


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
