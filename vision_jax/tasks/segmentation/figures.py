"""The pictures of a segmenter: masks over images, where they are wrong, confusion.

A class has the same color in every picture, by its index: from a palette that can be told apart
with any color vision as far as it goes (Okabe and Ito 2008, https://jfly.uni-koeln.de/color/), then
hues a golden angle apart. What is ignored stays as the image is.
"""

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw
from scipy import ndimage

from vision_jax.attacks import norms
from vision_jax.data.masks import IGNORED
from vision_jax.data.segments import Segments
from vision_jax.figures import BLUE, GREEN, INK, ORANGE, load_font, save_figure, shorten

FIRST = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
GOLDEN = 0.618033988749895  # of a turn
OPACITY = 0.5
GREY_WEIGHTS = (0.299, 0.587, 0.114)
WRONG, RIGHT = (213, 94, 0), (230, 230, 230)
MOST_LISTED = 24  # classes in a legend
MOST_NAMED = 100  # segments whose names are written
LEAST_SIDE = 480  # pixels of the longer side of a picture with names
COLORS = (BLUE, ORANGE, GREEN)  # of attacks


def palette(count: int) -> np.ndarray:
    """u8[count, 3], a color for each class."""
    colors = [to_rgb(color) for color in FIRST[:count]]
    for index in range(len(colors), count):
        value = 0.95 if index % 2 else 0.65
        colors.append(colorsys.hsv_to_rgb(index * GOLDEN % 1, 0.75, value))
    return np.round(255 * np.array(colors)).astype(np.uint8).reshape(count, 3)


def overlay(
    image: np.ndarray, mask: np.ndarray, colors: np.ndarray, nothing: int = IGNORED
) -> np.ndarray:
    """u8[H, W, 3] of an image u8[H, W, C] with its mask i[H, W] half over it.

    Under the mask the image is grey (Rec. 601), so that hues are the classes' alone: a blue thing
    of a green class would else look like another class. Pixels of `nothing` keep their colors.
    """
    base = to_color(image).astype(np.float32)
    counted = mask != nothing
    painted = colors[np.where(counted, mask, 0)]
    grey = (base @ np.array(GREY_WEIGHTS, np.float32))[..., None]  # [H, W, 1]
    mixed = (1 - OPACITY) * grey + OPACITY * painted
    return np.where(counted[..., None], mixed, base).round().astype(np.uint8)


def error_map(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """u8[H, W, 3]: wrong pixels orange, right ones light, ignored ones white."""
    picture = np.full((*label.shape, 3), 255, np.uint8)
    picture[(label != IGNORED) & (prediction == label)] = RIGHT
    picture[(label != IGNORED) & (prediction != label)] = WRONG
    return picture


def to_color(image: np.ndarray) -> np.ndarray:
    """u8[H, W, 3] of any number of channels: grey three times, the first three of many."""
    return image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)


def draw_segmentation_grid(
    examples: Sequence[Mapping[str, Any]], class_names: Sequence[str], path: str | Path
) -> Path:
    """Rows of image, true mask, predicted mask and errors, as a PNG.

    Args:
      examples: "image" u8[H, W, C], "label" and "prediction" u8[H, W], "name".
      class_names: K names.
      path: of the file.
    """
    colors = palette(len(class_names))
    figure = Figure(figsize=(13, 3.3 * len(examples) + 0.8), dpi=100, layout="constrained")
    cells = figure.subplots(len(examples), 4, squeeze=False)
    for row, example in zip(cells, examples, strict=True):
        image, label, prediction = (example[name] for name in ("image", "label", "prediction"))
        counted = label != IGNORED
        right = (prediction == label)[counted].mean() if counted.any() else 0.0
        pictures = (
            (to_color(image), shorten(Path(example["name"]).name, 40)),
            (overlay(image, label, colors), "true"),
            (overlay(image, prediction, colors), "predicted"),
            (error_map(prediction, label), f"{right:.1%} of its pixels right"),
        )
        for cell, (picture, title) in zip(row, pictures, strict=True):
            cell.imshow(picture)
            cell.set_title(title, loc="left", fontsize=9, color=INK, parse_math=False)
            cell.set_axis_off()
    _add_legend(
        figure, [e[name] for e in examples for name in ("label", "prediction")], class_names
    )
    return save_figure(figure, path)


def draw_segments(image: np.ndarray, segments: Segments, class_names: Sequence[str]) -> np.ndarray:
    """u8[f · H, f · W, 3]: each segment in a color of its own, with its edge, class and score.

    An image whose longer side has less than 480 pixels is enlarged by a whole factor f, so that
    names can be read. Names are of the 100 largest segments.

    Args:
      image: u8[H, W, C].
      segments: of the image. Later ones lie over earlier ones, or high scores over low ones.
      class_names: K names.
    """
    if segments.score is not None:
        segments = segments[np.argsort(segments.score, kind="stable")]
    factor = math.ceil(LEAST_SIDE / max(image.shape[:2]))
    image, number = (x.repeat(factor, 0).repeat(factor, 1) for x in (image, segments.map()))
    colors = palette(max(len(segments), 1))
    painted = overlay(image, number, colors, nothing=-1)
    near = ndimage.grey_dilation(number, (3, 3)) != ndimage.grey_erosion(number, (3, 3))
    edge = near & (number >= 0)
    painted[edge] = colors[number[edge]]
    picture = Image.fromarray(painted)
    draw = ImageDraw.Draw(picture)
    font = load_font(max(11, round(max(picture.size) / 70)))
    texts = describe(segments, class_names)
    for i in np.argsort(-segments.area, kind="stable")[:MOST_NAMED]:
        inside = np.pad(number == i, 1)
        if inside.any():
            depth = ndimage.distance_transform_cdt(inside)[1:-1, 1:-1]
            y, x = np.unravel_index(int(depth.argmax()), depth.shape)
            place = (int(x), int(y))
            draw.text(
                place,
                shorten(texts[i], 32),
                font=font,
                anchor="mm",
                fill="white",
                stroke_width=2,
                stroke_fill="black",
            )
    return np.asarray(picture)


def describe(segments: Segments, class_names: Sequence[str]) -> list[str]:
    """The class of each segment, with its score where it has one."""
    names = [class_names[label] for label in segments.label]
    if segments.score is None:
        return names
    return [f"{name} {score:.2f}" for name, score in zip(names, segments.score, strict=True)]


def draw_segment_grid(
    examples: Sequence[Mapping[str, Any]], class_names: Sequence[str], path: str | Path
) -> Path:
    """Rows of image, true segments and predicted ones, as a PNG.

    Args:
      examples: "image" u8[H, W, C], "truth" and "found" Segments, "name".
      class_names: K names.
      path: of the file.
    """
    figure = Figure(figsize=(13, 4.4 * len(examples)), dpi=100, layout="constrained")
    cells = figure.subplots(len(examples), 3, squeeze=False)
    for row, example in zip(cells, examples, strict=True):
        image, truth, found = (example[name] for name in ("image", "truth", "found"))
        pictures = (
            (to_color(image), shorten(Path(example["name"]).name, 40)),
            (draw_segments(image, truth, class_names), f"{len(truth)} true"),
            (draw_segments(image, found, class_names), f"{len(found)} predicted"),
        )
        for cell, (picture, title) in zip(row, pictures, strict=True):
            cell.imshow(picture)
            cell.set_title(title, loc="left", fontsize=9, color=INK, parse_math=False)
            cell.set_axis_off()
    return save_figure(figure, path)


def _add_legend(figure: Any, masks: Sequence[np.ndarray], class_names: Sequence[str]) -> None:
    """The colors of the classes in these masks u8[H, W], below the pictures."""
    colors = palette(len(class_names))
    used = sorted({k for mask in masks for k in np.unique(mask) if k != IGNORED})
    handles = [
        Patch(color=colors[k] / 255, label=shorten(class_names[k])) for k in used[:MOST_LISTED]
    ]
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 6) or 1, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """u8[H, W, 3] for a picture, of levels f32[h, w, C]: what the model saw, at a mask's size."""
    picture = Image.fromarray(to_color(image).astype(np.uint8))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.NEAREST))


def draw_case(
    report: Mapping[str, Any],
    strip: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    path: str | Path,
) -> Path:
    """Slices of a volume from first to last: true and predicted, with the volumes, as a PNG.

    Args:
      report: of a case, as its JSON has it.
      strip: of each slice image u8[H, W, C], label and prediction u8[H, W].
      path: of the file.
    """
    colors = palette(len(report["classes"]) + 1)
    truth = all("dice" in found for found in report["classes"].values())
    rows = ("true", "predicted") if truth else ("predicted",)
    size = (1.7 * len(strip) + 0.4, 2.1 * len(rows) + 1)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    cells = figure.subplots(len(rows), len(strip), squeeze=False)
    _, row_mm, column_mm = report["spacing_mm"]
    for column, (image, label, prediction) in zip(cells.T, strip, strict=True):
        grey = image[..., image.shape[2] // 2, None]
        for cell, mask in zip(column, (label, prediction)[-len(rows) :], strict=True):
            shown = np.where(mask == 0, IGNORED, mask)  # what is around stays as the image is
            cell.imshow(overlay(grey, shown, colors), aspect=row_mm / column_mm)
            cell.set_axis_off()
    for cell, title in zip(cells[:, 0], rows, strict=True):
        cell.set_title(title, loc="left", fontsize=9, color=INK)
    lines = [
        f"{shorten(name)}: {_amount(found, '')}"
        + (f", true {_amount(found, 'true_')}" if truth else "")
        + ("" if found.get("dice") is None else f", Dice {found['dice']:.3f}")
        + (_parts(found) if found["parts"] else "")
        for name, found in list(report["classes"].items())[:MOST_LISTED]
    ]
    first, last = report["slices"]
    head = f"{shorten(report['case'], 60)}, {report['plane']} slices {first} to {last}"
    figure.suptitle("\n".join([head, *lines]), x=0.01, ha="left", fontsize=9, parse_math=False)
    figure.supxlabel(report["warning"], fontsize=9, color=INK)
    return save_figure(figure, path)


def _parts(found: Mapping[str, Any]) -> str:
    return f", {found['largest_part_share']:.1%} of it in the largest of {found['parts']:,} parts"


def _amount(found: Mapping[str, Any], which: str) -> str:
    """In ml, or in voxels where their size is not known."""
    ml = found[f"{which}volume_ml"]
    return f"{found[f'{which}voxels']:,} voxels" if ml is None else f"{ml:.1f} ml"


def draw_robustness(
    record: Mapping[str, Any],
    pictures: Sequence[Mapping[str, np.ndarray]],
    class_names: Sequence[str],
    path: str | Path,
) -> Path:
    """mIoU and accuracy by epsilon, and masks before and after, as a PNG.

    Args:
      record: as robustness.json has it.
      pictures: of images "image" and "adversarial" f32[h, w, C] in [0, 1], as the model is given
        them, "before" and "after" u8[H, W], of the mask's size.
      class_names: K names.
      path: of the file.
    """
    lower = 3.3 * len(pictures)
    strongest = ""
    for name, rows in record["attacks"].items():  # of the last, at its largest, are the pictures
        if rows:
            strongest = f"{name} {norms.show_epsilon(rows[-1]['epsilon'], record['norm'])}"
    figure = Figure(figsize=(13, 4.4 + lower), dpi=100, layout="constrained")
    upper: Any = figure
    if pictures:
        parts: Any = figure.subfigures(2, 1, height_ratios=(4.4, lower))
        upper, below = parts
        colors = palette(len(class_names))
        for row, found in zip(
            below.subplots(len(pictures), 4, squeeze=False), pictures, strict=True
        ):
            plain, attacked = (
                _resize(np.round(255 * np.clip(found[name], 0, 1)), found["before"].shape)
                for name in ("image", "adversarial")
            )
            for cell, picture, title in zip(
                row,
                (
                    plain,
                    overlay(plain, found["before"], colors),
                    attacked,
                    overlay(attacked, found["after"], colors),
                ),
                ("image", "predicted", strongest, "predicted then"),
                strict=True,
            ):
                cell.imshow(picture)
                cell.set_title(title, loc="left", fontsize=9, color=INK)
                cell.set_axis_off()
        masks = [found[name] for found in pictures for name in ("before", "after")]
        _add_legend(below, masks, class_names)
    unit = 255 if record["norm"] == "linf" else 1
    for axes, what in zip(upper.subplots(1, 2), ("miou", "pixel_accuracy"), strict=True):
        for (name, rows), color in zip(record["attacks"].items(), COLORS, strict=False):
            points = [(0.0, record["clean"][what]), *((r["epsilon"], r[what]) for r in rows)]
            x, y = np.array(points, float).T
            axes.plot(unit * x, y, marker="o", color=color, label=name)
        axes.plot([0.0], [record["clean"][what]], "s", color=INK, label="clean")
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("epsilon" + (" × 255" if unit == 255 else "") + f" ({record['norm']})")
        title = f"{what.replace('_', ' ')} under attack, {record['images']:,} images"
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return save_figure(figure, path)
