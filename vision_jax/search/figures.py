"""Pictures of a search, and the page that holds them: no file beside it, no script."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vision_jax.figures import BLUE, INK, ORANGE, save_figure

FAINT = "#9fb8d6"
FEW = 5  # different numbers of an axis that are all marked


def draw_curves(
    curves: Mapping[int, Mapping[int, float]], best: int, metric: str, path: Path
) -> Path:
    """The metric by step of each trial as a PNG, the best one in front.

    Args:
      curves: {trial: {step: value}}.
      best: the trial.
      metric: its name.
      path: of the file.
    """
    figure = Figure(figsize=(7.5, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for trial, curve in curves.items():
        if curve and trial != best:
            axes.plot(*zip(*sorted(curve.items()), strict=True), color=FAINT, linewidth=1)
            end = max(curve)
            axes.plot(end, curve[end], "o", color=FAINT, markersize=3)
    axes.plot(
        *zip(*sorted(curves[best].items()), strict=True),
        color=ORANGE,
        linewidth=2.5,
        label=f"trial {best}, the best",
    )
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_ylabel(metric)
    axes.legend(frameon=False)
    _dress(axes, f"{sum(map(bool, curves.values()))} trials")
    return save_figure(figure, path)


def draw_parallel(
    values: Sequence[Mapping[str, Any]],
    scores: Sequence[float],
    metric: str,
    path: Path,
    *,
    highest: bool = True,
) -> Path:
    """Parallel coordinates as a PNG: a line for each trial through its values to its metric.

    The better a trial, the nearer to orange; the best one's line is thick. Numbers above 0 that
    span more than a factor of 10 are on a logarithmic axis; others that are no numbers are in the
    order in which they occur.

    Args:
      values: of each trial, by field.
      scores: the metric of each.
      metric: its name.
      path: of the file.
      highest: the best metric is the highest, not the lowest.
    """
    names = list(values[0])
    columns = [_axis([own[name] for own in values]) for name in names] + [_axis(scores)]
    figure = Figure(figsize=(1.4 * len(columns) + 1, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    places = np.array([places for places, _ in columns])  # [fields + 1, trials]
    goodness = places[-1] if highest else 1 - places[-1]
    order = np.argsort(goodness, kind="stable")
    for trial in order:
        width = 3.0 if trial == order[-1] else 1.0
        color = _shade(goodness[trial])
        axes.plot(range(len(columns)), places[:, trial], color=color, linewidth=width)
    for index, (_, marks) in enumerate(columns):
        axes.axvline(index, color=INK, linewidth=0.8)
        for place, text in marks:
            axes.text(index + 0.03, place, text, fontsize=8, color=INK, va="center")
    heads = [name.replace(".", ".\n", 1) for name in (*names, metric)]
    axes.set_xticks(range(len(columns)), heads, fontsize=9, parse_math=False)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.6)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return save_figure(figure, path)


def _axis(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """(where each value stands in [0, 1], marks).

    Examples:
      >>> _axis([16, 4, 8, 4])[1]
      [(0.0, '4'), (0.3333333333333333, '8'), (1.0, '16')]
      >>> _axis(["adam", "sgd", "adam"])
      ([0.0, 1.0, 0.0], [(0.0, 'adam'), (1.0, 'sgd')])
    """
    if not all(isinstance(value, int | float) for value in values):
        distinct = list(dict.fromkeys(map(str, values)))
        span = max(len(distinct) - 1, 1)
        marks = [(index / span, text) for index, text in enumerate(distinct)]
        return [distinct.index(str(value)) / span for value in values], marks
    low, high = min(values), max(values)
    if low == high:
        return [0.5] * len(values), [(0.5, f"{low:.3g}")]
    log = low > 0 and high / low > 10
    scale = np.log if log else np.asarray
    places = (scale(np.array(values, float)) - scale(float(low))) / (
        scale(float(high)) - scale(float(low))
    )
    if len(distinct := sorted(set(values))) <= FEW:  # choices, which stand nowhere between
        stands = dict(zip(values, places.tolist(), strict=True))
        return places.tolist(), [(stands[value], f"{value:.3g}") for value in distinct]
    middle = np.sqrt(low * high) if log else (low + high) / 2
    marks = [(0.0, f"{low:.3g}"), (0.5, f"{middle:.3g}"), (1.0, f"{high:.3g}")]
    return places.tolist(), marks


def _shade(share: float) -> tuple[float, float, float, float]:
    """From faint blue to orange."""
    low, high = np.array([0.62, 0.72, 0.84]), np.array([0.88, 0.48, 0.22])
    red, green, blue = low + share**2 * (high - low)
    return float(red), float(green), float(blue), 0.35 + 0.65 * share


def draw_pareto(
    costs: Mapping[str, Sequence[float]],
    scores: Sequence[float],
    trials: Sequence[int],
    metric: str,
    path: Path,
    *,
    highest: bool = True,
) -> Path:
    """The metric against each cost as a PNG, with the trials that no other one beats in both.

    Args:
      costs: of each trial by the cost's name; what is to be high too, with a minus before.
      scores: the metric of each.
      trials: their numbers.
      metric: its name.
      path: of the file.
      highest: whether the metric is to be high.
    """
    figure = Figure(figsize=(4.6 * len(costs), 4), dpi=120, layout="constrained")
    for axes, (name, values) in zip(
        figure.subplots(1, len(costs), squeeze=False)[0], costs.items(), strict=True
    ):
        sign = -1 if name.startswith("-") else 1
        front = pareto_front(values, scores, highest)
        axes.plot(sign * np.array(values), scores, "o", color=FAINT, markersize=5)
        x = [sign * values[row] for row in front]
        axes.plot(x, [scores[row] for row in front], "o-", color=BLUE, markersize=6)
        for row in front:
            axes.annotate(
                str(trials[row]), (sign * values[row], scores[row]), fontsize=8, color=INK,
                xytext=(4, 4), textcoords="offset points",
            )  # fmt: skip
        axes.set_xlabel(name.removeprefix("-"))
        axes.set_ylabel(metric)
        _dress(axes, "")
    return save_figure(figure, path)


def pareto_front(
    costs: Sequence[float], scores: Sequence[float], highest: bool = True
) -> list[int]:
    """The rows that no other row beats in one and equals at least in the other, by rising cost.

    Examples:
      >>> pareto_front([1, 2, 3, 2], [0.5, 0.7, 0.6, 0.6])
      [0, 1]
    """
    sign = -1 if highest else 1
    order = sorted(range(len(costs)), key=lambda row: (costs[row], sign * scores[row]))
    front: list[int] = []
    for row in order:
        if not front or sign * scores[row] < sign * scores[front[-1]]:
            front.append(row)
    return front


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


# The page -----------------------------------------------------------------------------------------

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;"
    "color:#222}table{border-collapse:collapse;font-size:13px}td,th{padding:3px 10px;"
    "text-align:right;border-bottom:1px solid #ddd}th{color:#555}tr.best{background:#fdf1e7;"
    "font-weight:600}tr.out{color:#888}img{max-width:100%}div.wide{overflow-x:auto}"
)


def write_page(
    path: Path,
    *,
    title: str,
    lines: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    classes: Sequence[str],
    pictures: Mapping[str, Path],
) -> None:
    """One HTML file with a table and pictures, all inside of it.

    Args:
      path: of the file.
      title: above all.
      lines: below it.
      columns: the table's heads.
      rows: its cells, text.
      classes: of each row, "best", "out" or "".
      pictures: PNG files by their titles.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        f'<tr class="{kind}">{"".join(f"<td>{html.escape(cell)}</td>" for cell in row)}</tr>\n'
        for row, kind in zip(rows, classes, strict=True)
    )
    figures = "".join(
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">\n'
        for name, file in pictures.items()
    )
    text = "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n{text}{figures}"
        f'<h2>Trials</h2><div class="wide"><table><tr>{head}</tr>\n{body}</table></div></html>\n',
        encoding="utf-8",
    )
