"""Classes of pixels: how many a dataset has, what was found in it, and what is written of that.

segments.py is the same of instances and panoptic segments.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.config import write_json
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.masks import IGNORED
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.segmentation import SegmentationSource
from vision_jax.data.volumes.source import VolumeReader
from vision_jax.errors import UserError, printable
from vision_jax.evaluation import none_read
from vision_jax.tasks.segmentation import cases
from vision_jax.tasks.segmentation.inference import PredictAll
from vision_jax.tasks.segmentation.metrics import Tally

# Of a summary, in metrics.jsonl.
REPORTED = (
    "miou",
    "pixel_accuracy",
    "mean_dice",
    "boundary_iou",
    "miou_foreground",
    "foreground_iou",
    "objects",
    "objects_true",
)
CURVES = ("miou", "pixel_accuracy", "boundary_iou")
PICTURES = 6  # in predictions.png
MOST_MASKS = 200  # that are read to tell the classes' shares of pixels


def class_shares(*sources: SegmentationSource) -> list[tuple[str, ...]]:
    """Rows (label, name, share of the pixels of each source), the last one of what is ignored.

    Shares of classes are of the pixels that have one. Of a source with many masks some are read.

    Raises:
      UserError: a mask with a value that is no class, or not one pixel of a class.
    """
    counts = [_count_pixels(source) for source in sources]
    rows = [
        (str(label), name, *(f"{count[label] / max(count[:-1].sum(), 1):.2%}" for count in counts))
        for label, name in enumerate(sources[0].class_names)
    ]
    shares = [f"{count[-1] / max(count.sum(), 1):.2%}" for count in counts]
    return [*rows, (str(IGNORED), "(ignored, of all pixels)", *shares)]


def _count_pixels(source: SegmentationSource) -> np.ndarray:
    """i64[K + 1]: pixels of each class and of none, in up to MOST_MASKS masks."""
    classes = len(source.class_names)
    counts = np.zeros(classes + 1, np.int64)
    for i in np.unique(np.linspace(0, len(source) - 1, MOST_MASKS).astype(int)):
        try:
            found = np.bincount(source.mask(int(i)).reshape(-1), minlength=IGNORED + 1)
        except DamagedImageError:
            continue  # it is skipped, counted and named when its turn comes
        counts += np.append(found[:classes], found[IGNORED])
    if counts[-1] and not counts[:-1].any():
        raise UserError(
            f"{source.name}: not one pixel of its masks has a class, all are ignored: check the"
            " table of classes"
        )
    return counts


@dataclass(frozen=True)
class Evaluation:
    """What was found in a whole dataset.

    Attributes:
      summary: see metrics.Tally.summarize.
      confusion: i64[K, K], row = label, column = prediction, in pixels.
      examples: some images with label and prediction, for figures.
      class_names: K names.
      damaged: lines, with the reason, of images that could not be read.
      warn_after: updates after which constant predictions are warned of.
      cases: a report of each volume, where images are slices of volumes.
    """

    summary: dict[str, Any]
    confusion: np.ndarray
    examples: tuple[dict[str, Any], ...]
    class_names: tuple[str, ...]
    damaged: tuple[str, ...]
    warn_after: int
    cases: tuple[dict[str, Any], ...] = ()

    def line(self) -> str:
        """The summary for the screen."""
        known = [name for name in REPORTED if self.summary.get(name) is not None]
        text = "  ".join(f"{name} {_number(self.summary[name])}" for name in known)
        there, all_of_them = self.summary["classes"]
        skipped = f"  ({len(self.damaged)} damaged skipped)" if self.damaged else ""
        return (
            f"evaluation on {self.summary['count']} images: {text}  (means of {there} of"
            f" {all_of_them} classes){skipped}"
        )

    def lines(self) -> list[str]:
        """Each class."""
        width = max(len(printable(name)) for name in self.summary["per_class"])
        return [
            f"  {printable(name):{width}}  iou {_number(found['iou'])}"
            f"  dice {_number(found['dice'])}  boundary iou {_number(found['boundary_iou'])}"
            f"  {found['pixels']:,} pixels"
            for name, found in self.summary["per_class"].items()
        ]

    def warnings(self, step: int, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """One class for all pixels, once there was time to learn more."""
        del history
        if step < self.warn_after or (self.confusion.sum(1) > 0).sum() < 2:
            return []
        found = np.flatnonzero(self.confusion.sum(0))
        if len(found) > 1:
            return []
        return [
            f"after {step} updates every pixel is predicted as {self.class_names[found[0]]!r}: if"
            " it is the most frequent class, weigh classes by config.loss.balance=frequency or add"
            " config.loss.dice_weight=1; else lower config.optim.lr"
        ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def make_evaluate(
    predict_all: PredictAll,
    make_tally: Callable[[], Tally],
    source: SegmentationSource,
    *,
    warn_after: int,
) -> Callable[..., Evaluation]:
    """A function (trainable, frozen, model_state) -> Evaluation over the whole source.

    Args:
      predict_all: of the model.
      make_tally: an empty one of the source's classes.
      source: that is evaluated.
      warn_after: updates after which constant predictions are warned of.
    """
    shown = set(np.unique(np.linspace(0, len(source) - 1, PICTURES).astype(int)).tolist())

    def evaluate(*arguments: Any) -> Evaluation:
        damage, tally = DamageLog(), make_tally()
        examples = []
        volumes = cases.CaseTally(source) if isinstance(source.reader, VolumeReader) else None
        for row, prediction, label in predict_all(source, damage, *arguments):
            tally.add(prediction, label)
            if volumes is not None:
                volumes.add(row, prediction, label)
            if row in shown:
                examples.append({"row": row, "label": label, "prediction": prediction})
        if not tally.images:
            raise none_read(source, damage)
        return Evaluation(
            tally.summarize(),
            tally.confusion,
            tuple(sorted(examples, key=lambda one: one["row"])),
            source.class_names,
            damage.lines,
            warn_after,
            () if volumes is None else volumes.reports(),
        )

    return evaluate


def write_results(
    workdir: Path,
    result: Evaluation,
    source: SegmentationSource,
    best_window: Callable[[], Mapping[str, Any]],
) -> dict[str, str]:
    """Numbers and pictures of an evaluation; returns {file: what it is}.

    Args:
      workdir: the run's.
      result: of the evaluation.
      source: that was evaluated.
      best_window: what intensities alone reach, of volumes of one class and what is around.
    """
    from vision_jax.figures import draw_confusion  # matplotlib, only where something is drawn
    from vision_jax.tasks.segmentation import figures

    names, files = source.class_names, {}
    if result.cases:
        for report in result.cases:
            report["pictures"] = [source.reader.read(place) for *_, place in report["strip"]]
        cases.write_cases(result.cases, workdir / "cases")
        files["cases"] = "each volume: ml, its largest part and slices; not a diagnosis"
        if len(names) == 2:
            result.summary["best_window"] = best_window()
    write_json(result.summary, workdir / "evaluation.json")
    draw_confusion(
        result.confusion,
        names,
        workdir / "confusion.png",
        title=f"{result.summary['pixels']:,} pixels, {result.summary['pixel_accuracy']:.2%} right",
    )
    examples = [
        {**one, "image": source[one["row"]]["image"], "name": source.example_name(one["row"])}
        for one in result.examples
    ]
    figures.draw_segmentation_grid(examples, names, workdir / "predictions.png")
    return {
        "evaluation.json": "all numbers of the last evaluation",
        "confusion.png": "which class was taken for which, in pixels",
        "predictions.png": "images with true and predicted masks, and where they differ",
    } | files
