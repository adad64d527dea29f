"""A detector under attack: AP by epsilon, and boxes before and after.

Attacks maximize the loss of each image. What is trained to find what is decided anew at each
step; no gradient passes through it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.attacks import norms
from vision_jax.data.detection import DetectionSource, part_of
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.objective import Objective
from vision_jax.tasks import gradient_attacks
from vision_jax.tasks.api import Evaluation, Trained
from vision_jax.tasks.detection import objective

SHOWN = ("ap", "ap50", "ap75")  # on the screen
PICTURES = 4


def measure(
    workdir: Path,
    trained: Trained,
    source: DetectionSource,
    *,
    attacked: Objective,
    make_run_over: Callable[..., Callable[..., Any]],
    evaluate: Callable[..., Evaluation],
    settings: gradient_attacks.Settings,
    score: float,
) -> dict[str, Any]:
    """AP under attack by epsilon (see gradient_attacks.measure, also for what is raised).

    Args:
      workdir: where files are written.
      trained: the run.
      source: images that are attacked, or chosen of.
      attacked: whose loss of an image does not depend on the others of its batch.
      make_run_over: (outputs_fn, batch_size=) -> as evaluation.make_run_over.
      evaluate: (source, outputs over it, the damaged images) -> Evaluation.
      settings: the attacks.
      score: boxes below it are not drawn.
    """
    source = part_of(source, gradient_attacks.choose(len(source), settings.images))
    trainable, frozen, model_state = trained.arguments
    read = objective.make_read(objective.PREDICTIONS[trained.predicts].postprocess)

    def make_adversarial(attack):
        return gradient_attacks.make_adversarial_outputs(
            attacked, read=read, attack=attack, seed=settings.seed
        )

    def make_measure(attack):
        outputs_of = make_adversarial(attack)

        def outputs_fn(*arguments):  # whole images stay on the device
            outputs = dict(outputs_of(*arguments))
            change = outputs.pop("adversarial") - outputs.pop("image")
            return {**outputs, "size": norms.size(change, settings.norm).reshape(-1)}

        run_over = make_run_over(outputs_fn, batch_size=settings.batch_size)

        def measure_at(epsilon: float, damage: DamageLog) -> dict[str, Any]:
            state = (model_state, np.float32(epsilon), source.rows.astype(np.int32))
            found, met = run_over(source, trainable, frozen, state)
            damage.update(met)
            summary = evaluate(source, found, met).summary
            return {name: summary[name] for name in (*SHOWN, "count")} | {
                "largest": float(found["size"].max())
            }

        return measure_at

    def make_pictures(attack, epsilon):
        outputs_of = make_adversarial(attack)
        return _adversarial_pictures(outputs_of, make_run_over, trained.arguments, source, epsilon)

    def draw(record, pictures, path):
        from vision_jax.tasks.detection.figures import draw_robustness  # matplotlib

        draw_robustness(record, pictures, trained.class_names, path, score=score)

    return gradient_attacks.measure(
        workdir,
        settings,
        source=source,
        what="detector",
        make_measure=make_measure,
        shown=SHOWN,
        make_pictures=make_pictures,
        draw=draw,
    )


def _adversarial_pictures(outputs_of, make_run_over, arguments, source, epsilon):
    """Of some images what is found before and after, with boxes in pixels of what the model sees.

    [(outputs of the plain image, outputs of its adversarial example)], each of one image: "image"
    and "adversarial" f32[h, w, C], "score" f32[N], "label" i32[N], "boxes_xyxy_px" f32[N, 4].
    """

    def outputs_fn(*arguments):
        *before, batch = arguments
        return {
            **outputs_of(*before, {**batch, "original_size": batch["size"]}),
            "size": batch["size"],
        }

    run_over = make_run_over(outputs_fn, batch_size=1)
    trainable, frozen, model_state = arguments
    pairs = []
    for row in np.unique(np.linspace(0, len(source) - 1, PICTURES).astype(int)):
        one = part_of(source, np.arange(len(source)) == row)
        pair = []
        for size in (0.0, epsilon):
            state = (model_state, np.float32(size), one.rows.astype(np.int32))
            try:
                found, _ = run_over(one, trainable, frozen, state)
            except UserError:
                break  # it is damaged
            height, width = found["size"][0]
            pair.append({name: array[0] for name, array in found.items()})
            for name in ("image", "adversarial"):
                pair[-1][name] = pair[-1][name][:height, :width]
        else:
            pairs.append(pair)
    return pairs
