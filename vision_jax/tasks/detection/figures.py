"""The pictures of a detector: confusion, and boxes on images, beside those of coco_figures.py."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw

from vision_jax.attacks.norms import show_epsilon
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.detection import DetectionSource
from vision_jax.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    draw_confusion,
    load_font,
    save_figure,
    shorten,
)
from vision_jax.tasks.coco_figures import class_color
from vision_jax.tasks.detection.metrics import CONFIDENT, Detections

MOST_PICTURES = 16
MOST_BOXES = 300  # drawn on an image, the best ones where they have scores
CELL, GAP = 400, 12  # pixels
LARGEST_LETTERS = 200  # pixels
COLORS = (BLUE, ORANGE, GREEN)  # of attacks


def draw_detection_confusion(
    matrix: np.ndarray,
    class_names: Sequence[str],
    path: str | Path,
    *,
    score: float = CONFIDENT,
    iou: float = 0.5,
) -> Path:
    """The confusion matrix of boxes as a PNG; the last row and column are background.

    Args:
      matrix: int[K + 1, K + 1] of `detection.confusion_matrix`, made with the same score and iou.
      class_names: K names.
    """
    boxes, false = int(matrix[:-1].sum()), int(matrix[-1].sum())
    right = np.trace(matrix) / max(boxes, 1)
    title = (
        f"{boxes:,} true boxes, {right:.1%} found and named right; {false:,} false alarms\n"
        f"(score ≥ {score:g}, IoU ≥ {iou:g})"
    )
    return draw_confusion(matrix, [*class_names, "(background)"], path, title=title)


def draw_detections(
    image: np.ndarray,
    boxes_xyxy_px: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    class_names: Sequence[str],
) -> np.ndarray:
    """The image with boxes, names and scores drawn on it.

    Lines and letters grow with the image. An image whose longer side has less than 480 pixels is
    enlarged by a whole factor first, so that its names can be read. At most 300 boxes are drawn,
    those of the highest scores, or the first.

    Args:
      image: u8[H, W, C].
      boxes_xyxy_px: f32[D, 4], in pixels of the image.
      labels: int[D].
      scores: f32[D], or None to write the names alone.
      class_names: K names.

    Returns:
      u8[f · H, f · W, 3], f the whole factor.
    """
    factor = math.ceil(480 / max(image.shape[:2]))
    picture = _picture(image)
    if factor > 1:
        picture = picture.resize(
            (factor * picture.width, factor * picture.height), Image.Resampling.BICUBIC
        )
    if scores is None:
        texts = [class_names[label] for label in labels]
    else:
        texts = [f"{class_names[k]} {s:.2f}" for k, s in zip(labels, scores, strict=True)]
    _annotate(picture, factor * np.asarray(boxes_xyxy_px), labels, texts, scores)
    return np.asarray(picture)


def draw_detection_grid(
    source: DetectionSource,
    detections: Detections,
    path: str | Path,
    *,
    rows: Sequence[int] | None = None,
    score: float = CONFIDENT,
) -> Path:
    """Pictures in pairs as a PNG: the true boxes on the left, the predicted beside them.

    Args:
      source: its images are decoded, those of `rows` alone.
      rows: images to draw, the first 16 of them; by default 16 evenly over the source. Those
        that can't be read are left out.
      score: predictions below it are left out.
    """
    if rows is None:
        count = min(len(source), MOST_PICTURES)
        rows = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)).tolist()
    pairs = []
    drawn = f", {MOST_BOXES} drawn"
    for row in rows[:MOST_PICTURES]:
        try:
            image = source[row]["image"]
        except DamagedImageError:
            continue  # the run's log has named it
        found = detections[(detections.index == row) & (detections.score >= score)]
        names = [source.class_names[label] for label in source.label[row]]
        truth = [n + " (crowd)" * bool(c) for n, c in zip(names, source.crowd[row], strict=True)]
        predicted = [
            f"{source.class_names[k]} {s:.2f}"
            for k, s in zip(found.label, found.score, strict=True)
        ]
        name = shorten(Path(source.paths[row]).name, 34)
        pairs.append(
            (
                _cell(image, source.boxes_xyxy_px[row], source.label[row], truth, None),
                f"{name}: {len(truth)} true{drawn * (len(truth) > MOST_BOXES)}",
                _cell(image, found.boxes_xyxy_px, found.label, predicted, found.score),
                f"{len(found)} predicted, score ≥ {score:g}{drawn * (len(found) > MOST_BOXES)}",
            )
        )
    return _save_pairs(pairs, Path(path))


def _cell(
    image: np.ndarray,
    boxes_xyxy_px: np.ndarray,
    labels: np.ndarray,
    texts: Sequence[str],
    scores: np.ndarray | None,
) -> Image.Image:
    picture = _picture(image)
    factor = CELL / max(picture.size)
    size = max(1, round(factor * picture.width)), max(1, round(factor * picture.height))
    scale = np.tile(np.array(size) / picture.size, 2)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    _annotate(picture, boxes_xyxy_px * scale, labels, texts, scores)
    return picture


def _annotate(
    picture: Image.Image,
    boxes_xyxy_px: np.ndarray,
    labels: np.ndarray,
    texts: Sequence[str],
    scores: np.ndarray | None,
) -> None:
    """Draws boxes, the best on top, and a tag at each where it covers no other tag if it can."""
    draw = ImageDraw.Draw(picture)
    letters = min(max(13, round(max(picture.size) / 60)), LARGEST_LETTERS)
    line = max(3, round(letters / 6))
    order = np.argsort(-scores, kind="stable") if scores is not None else np.arange(len(labels))
    order = order[:MOST_BOXES]
    boxes = np.clip(boxes_xyxy_px, 0, np.tile(np.array(picture.size) - 1, 2)).round().astype(int)
    for row in order[::-1]:
        x0, y0, x1, y1 = boxes[row].tolist()
        corners = (x0, y0, max(x0, x1), max(y0, y1))
        around = (corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1)
        draw.rectangle(around, outline="white", width=line + 2)  # seen on ground of any color
        draw.rectangle(corners, outline=class_color(int(labels[row])), width=line)
    tags: list[tuple[int, int, int, int]] = []
    font = load_font(letters)
    for row in order:
        text = shorten(texts[row], 32)
        width, height = math.ceil(draw.textlength(text, font)) + 6, letters + 5
        tags.append(_place(boxes[row].tolist(), width, height, picture.size, tags))
    for row, tag in reversed(list(zip(order, tags, strict=True))):
        color = class_color(int(labels[row]))
        draw.rectangle(tag, fill=color)
        ink = "black" if _luminance(color) > 0.18 else "white"
        draw.text((tag[0] + 3, tag[1] + 1), shorten(texts[row], 32), fill=ink, font=font)


def _place(
    box: list[int],
    width: int,
    height: int,
    size: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Corners of a tag: above the box, inside it, below it; left or right; else where it fits."""
    x0, y0, x1, y1 = box
    lefts = (x0, x1 - width)
    tops = (y0 - height, y0 + 1, y1 + 1, y1 - height)
    places = [
        (
            min(max(left, 0), max(size[0] - width - 1, 0)),
            min(max(top, 0), max(size[1] - height - 1, 0)),
        )
        for top in tops
        for left in lefts
    ]

    def covered(place: tuple[int, int]) -> int:
        """Pixels of other tags that a tag there covers."""
        return sum(
            max(0, min(place[0] + width, x1) - max(place[0], x0))
            * max(0, min(place[1] + height, y1) - max(place[1], y0))
            for x0, y0, x1, y1 in taken
        )

    left, top = min(places, key=covered)  # the first of the best
    return left, top, left + width, top + height


def _save_pairs(
    pairs: Sequence[tuple[Image.Image, str, Image.Image, str]], path: Path
) -> Path:  # fmt: skip
    """Pairs under their captions, two pairs a row where there are many."""
    across = 2 if len(pairs) > 2 else 1
    font, caption = load_font(14), 24
    lines = [pairs[start : start + across] for start in range(0, len(pairs), across)]
    heights = [max(pair[0].height for pair in line) + caption + GAP for line in lines]
    width = across * (2 * CELL + GAP // 3 + 2 * GAP) + GAP
    canvas = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw, top = ImageDraw.Draw(canvas), GAP
    for line, height in zip(lines, heights, strict=True):
        for column, (truth, truth_text, found, found_text) in enumerate(line):
            left = GAP + column * (2 * CELL + GAP // 3 + 2 * GAP)
            for picture, text in ((truth, truth_text), (found, found_text)):
                draw.text((left, top), text, fill=INK, font=font)
                canvas.paste(picture, (left, top + caption))
                left += CELL + GAP // 3
        top += height
    canvas.save(path, format="PNG")
    return path


def _picture(image: np.ndarray) -> Image.Image:
    """In color: grey repeated, or the first three of more channels."""
    channels = image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)
    return Image.fromarray(channels)


def _luminance(color: str) -> float:
    """Relative luminance of #rrggbb in [0, 1] (WCAG 2.2)."""
    red, green, blue = (
        (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
        for value in (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


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
      pictures: of each image what is found (plain, adversarial): "image" and "adversarial"
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
    """Three rows: images with boxes, perturbations around grey, adversarial examples with boxes."""
    changes = [after["adversarial"] - after["image"] for _, after in pictures]
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
    return draw_detections(_bytes(found["adversarial"]), boxes, labels, scores, class_names)


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
