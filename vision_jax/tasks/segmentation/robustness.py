"""A segmenter under attack: mIoU by epsilon, and masks before and after.

Attacks maximize the training loss of each image, over all of its counted pixels. Whole images are
attacked, as the model is given them. One compilation an attack and size, whatever the epsilons.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vision_jax.attacks import gradient, norms
from vision_jax.attacks.norms import Norm
from vision_jax.config import write_json
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.segmentation import SegmentationSource, segmentation_part
from vision_jax.errors import UserError, nearest
from vision_jax.logging import say
from vision_jax.objective import Objective
from vision_jax.tasks.api import Trained
from vision_jax.tasks.segmentation import objective
from vision_jax.tasks.segmentation.metrics import Tally

ATTACKS = ("fgsm", "pgd")
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
    attacks: Sequence[str],
    norm: Norm,
    epsilons: Sequence[float],
    steps: int,
    restarts: int,
    images: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """mIoU under attack by epsilon: lines on the screen, robustness.json and robustness.png.

    Args:
      workdir: where files are written.
      trained: the run.
      source: images that are attacked, or chosen of.
      attacked: whose loss of an image does not depend on the others of its batch.
      make_run_batches: (outputs_fn, batch_size=) -> as evaluation.make_run_batches.
      make_tally: an empty count.
      attacks: of ATTACKS.
      norm: of what epsilons measure.
      epsilons: the largest norms, growing.
      steps: of pgd.
      restarts: of pgd.
      images: so many, evenly spread; 0 takes all.
      batch_size: images at once.
      seed: of the attacks' draws.

    Returns:
      What robustness.json holds.

    Raises:
      UserError: an unknown attack, or bad input.
    """
    count = min(images or len(source), len(source))
    kept = np.zeros(len(source), bool)
    kept[np.linspace(0, len(source) - 1, count).astype(int)] = True
    source = segmentation_part(source, kept)
    trainable, frozen, model_state = trained.arguments
    scores = objective.find_prediction(trained.predicts).scores

    def make_run(attack):
        outputs_of = objective.make_adversarial_outputs(
            attacked, scores=scores, attack=attack, seed=seed
        )

        def outputs_fn(*arguments):
            outputs = dict(outputs_of(*arguments))
            change = outputs["adversarial"] - outputs["image"]
            return {**outputs, "size": norms.size(change, norm).reshape(-1)}

        return make_run_batches(outputs_fn, batch_size=batch_size)

    def rows_of(run, epsilon):
        state = (model_state, np.float32(epsilon), source.rows.astype(np.int32))
        for batch in run(source, DamageLog(), trainable, frozen, state):
            for place in np.flatnonzero(batch["mask"]):
                yield {name: array[place] for name, array in batch.items()}

    def measure_one(run, name: str, epsilon: float) -> dict[str, Any]:
        tally, largest = make_tally(), 0.0
        for row in rows_of(run, epsilon):
            tally.add(row["prediction"], row["label"])
            largest = max(largest, float(row["size"]))
        summary = tally.summarize()
        if not jax.process_index():
            say(line(name, summary))
        return {what: summary[what] for what in FIGURES} | {
            "epsilon": epsilon,
            "largest": largest,
        }

    made = {
        name: make_run(make_attack(name, norm=norm, steps=steps, restarts=restarts))
        for name in attacks
    }
    plain = make_run(no_attack)
    clean = measure_one(plain, "clean", 0.0)
    record: dict[str, Any] = {"images": clean["count"], "norm": norm, "clean": clean}
    record["attacks"] = {
        name: [measure_one(run, f"{name} {norms.show_epsilon(e, norm)}", e) for e in epsilons]
        for name, run in made.items()
    }
    pictures = []
    if made and epsilons:
        both = zip(rows_of(plain, 0.0), rows_of(made[attacks[-1]], epsilons[-1]), strict=True)
        for before, after in both:
            pictures.append(
                {
                    "image": after["image"],
                    "adversarial": after["adversarial"],
                    "before": before["prediction"],
                    "after": after["prediction"],
                }
            )
            if len(pictures) == PICTURES:
                break
    if jax.process_index() == 0:
        from vision_jax.tasks.segmentation.figures import draw_robustness  # matplotlib

        write_json(record, workdir / "robustness.json")
        draw_robustness(record, pictures, trained.class_names, workdir / "robustness.png")
        say(f"wrote {workdir / 'robustness.json'}")
        say(f"wrote {workdir / 'robustness.png'}")
    return record


def make_attack(name: str, *, norm: Norm, steps: int, restarts: int) -> Callable[..., jax.Array]:
    """One of ATTACKS: (loss, images, keys, epsilon=) -> images.

    Raises:
      UserError: no such attack.
    """
    if name == "fgsm":
        return partial(gradient.fgsm, norm=norm)
    if name != "pgd":
        raise UserError(
            f"config.robustness.attacks: a segmenter's are fgsm and pgd, not `{name}`"
            f"{nearest(name, ATTACKS)}"
        )

    def pgd(loss, images, keys, *, epsilon):
        step_size = gradient.STEP_SHARE * epsilon / steps
        return gradient.pgd(
            loss, images, keys, epsilon=epsilon, step_size=step_size, steps=steps, norm=norm,
            restarts=restarts,
        )  # fmt: skip

    return pgd


def no_attack(loss, images, keys, **threat_model):
    """The images as they are."""
    del loss, keys, threat_model
    return images


def line(name: str, record: Mapping[str, Any]) -> str:
    """The figures of an attack, for the screen."""
    values = ((what, record[what]) for what in ("miou", "pixel_accuracy"))
    text = "  ".join(f"{what} {'-' if value is None else f'{value:.4f}'}" for what, value in values)
    return f"  {name:16} {text}  n={record['count']}"
