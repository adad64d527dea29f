"""A segmenter under attack: mIoU by epsilon, and masks before and after.

Attacks maximize the training loss of each image, over all of its counted pixels. Whole images are
attacked, as the model is given them.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.attacks import norms
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.segmentation import SegmentationSource, segmentation_part
from vision_jax.objective import Objective
from vision_jax.tasks import gradient_attacks
from vision_jax.tasks.api import Trained
from vision_jax.tasks.segmentation import objective
from vision_jax.tasks.segmentation.metrics import Tally

PICTURES = 3
FIGURES = ("miou", "pixel_accuracy", "mean_dice", "foreground_iou", "count")


def measure(
    workdir: Path,
    trained: Trained,
    source: SegmentationSource,
    *,
    attacked: Objective,
    make_run_batches: Callable[..., Callable[..., Any]],
    make_tally: Callable[[], Tally],
    settings: gradient_attacks.Settings,
) -> dict[str, Any]:
    """mIoU under attack by epsilon (see gradient_attacks.measure, also for what is raised).

    Args:
      workdir: where files are written.
      trained: the run.
      source: images that are attacked, or chosen of.
      attacked: whose loss of an image does not depend on the others of its batch.
      make_run_batches: (outputs_fn, batch_size=) -> as evaluation.make_run_batches.
      make_tally: an empty count.
      settings: the attacks.
    """
    source = segmentation_part(source, gradient_attacks.choose(len(source), settings.images))
    trainable, frozen, model_state = trained.arguments
    scores = objective.find_prediction(trained.predicts).scores

    @functools.cache  # pictures are of programs that were compiled for the figures
    def make_rows_of(attack):
        outputs_of = gradient_attacks.make_adversarial_outputs(
            attacked, read=objective.make_read(scores), attack=attack, seed=settings.seed
        )

        def outputs_fn(*arguments):
            outputs = dict(outputs_of(*arguments))
            change = outputs["adversarial"] - outputs["image"]
            return {**outputs, "size": norms.size(change, settings.norm).reshape(-1)}

        run = make_run_batches(outputs_fn, batch_size=settings.batch_size)

        def rows_of(epsilon, damage):
            state = (model_state, np.float32(epsilon), source.rows.astype(np.int32))
            for batch in run(source, damage, trainable, frozen, state):
                for place in np.flatnonzero(batch["mask"]):
                    yield {name: array[place] for name, array in batch.items()}

        return rows_of

    def make_measure(attack):
        rows_of = make_rows_of(attack)

        def measure_at(epsilon: float, damage: DamageLog) -> dict[str, Any]:
            tally, largest = make_tally(), 0.0
            for row in rows_of(epsilon, damage):
                tally.add(row["prediction"], row["label"])
                largest = max(largest, float(row["size"]))
            summary = tally.summarize()
            return {what: summary[what] for what in FIGURES} | {"largest": largest}

        return measure_at

    def make_pictures(attack, epsilon):
        plain, adversarial = (
            make_rows_of(made)(size, DamageLog())
            for made, size in ((gradient_attacks.no_attack, 0.0), (attack, epsilon))
        )
        return [
            {
                "image": after["image"],
                "adversarial": after["adversarial"],
                "before": before["prediction"],
                "after": after["prediction"],
            }
            for before, after in itertools.islice(zip(plain, adversarial, strict=True), PICTURES)
        ]

    def draw(record, pictures, path):
        from vision_jax.tasks.segmentation.figures import draw_robustness  # matplotlib

        draw_robustness(record, pictures, trained.class_names, path)

    return gradient_attacks.measure(
        workdir,
        settings,
        source=source,
        what="segmenter",
        make_measure=make_measure,
        shown=("miou", "pixel_accuracy"),
        make_pictures=make_pictures,
        draw=draw,
    )
