"""A detector under attack: AP by epsilon, and boxes before and after.

Attacks maximize the loss of each image. What is trained to find what is decided anew at each
step; no gradient passes through it. One compilation an attack and canvas, whatever the epsilons.
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
from vision_jax.data.detection import DetectionSource, part_of
from vision_jax.errors import UserError, nearest
from vision_jax.logging import say
from vision_jax.objective import Objective
from vision_jax.tasks.api import Evaluation, Trained
from vision_jax.tasks.detection import objective

ATTACKS = ("fgsm", "pgd")
PICTURES = 4


def measure(
    workdir: Path,
    trained: Trained,
    source: DetectionSource,
    *,
    attacked: Objective,
    make_run_over: Callable[..., Callable[..., Any]],
    evaluate: Callable[..., Evaluation],
    attacks: Sequence[str],
    norm: Norm,
    epsilons: Sequence[float],
    steps: int,
    restarts: int,
    images: int,
    batch_size: int,
    seed: int,
    score: float,
) -> dict[str, Any]:
    """AP under attack by epsilon: lines on the screen, robustness.json and robustness.png.

    Args:
      workdir: where files are written.
      trained: the run.
      source: images that are attacked, or chosen of.
      attacked: whose loss of an image does not depend on the others of its batch.
      make_run_over: (outputs_fn, batch_size=) -> as evaluation.make_run_over.
      evaluate: (source, outputs over it, names of damaged images) -> Evaluation.
      attacks: of ATTACKS.
      norm: of what epsilons measure.
      epsilons: the largest norms, growing.
      steps: of pgd.
      restarts: of pgd.
      images: so many, evenly spread; 0 takes all.
      batch_size: images at once.
      seed: of the attacks' draws.
      score: boxes below it are not drawn.

    Returns:
      What robustness.json holds.

    Raises:
      UserError: an unknown attack, or bad input.
    """
    count = min(images or len(source), len(source))
    kept = np.zeros(len(source), bool)
    kept[np.linspace(0, len(source) - 1, count).astype(int)] = True
    source = part_of(source, kept)
    trainable, frozen, model_state = trained.arguments

    def make_adversarial(attack):
        postprocess = objective.PREDICTIONS[trained.predicts].postprocess
        return objective.make_adversarial_outputs(
            attacked, postprocess=postprocess, attack=attack, seed=seed
        )

    def make_measure(attack):
        outputs_of = make_adversarial(attack)

        def outputs_fn(*arguments):  # whole images stay on the device
            outputs = dict(outputs_of(*arguments))
            change = outputs.pop("adversarial") - outputs.pop("image")
            return {**outputs, "size": norms.size(change, norm).reshape(-1)}

        run_over = make_run_over(outputs_fn, batch_size=batch_size)

        def measure(name: str, epsilon: float) -> dict[str, Any]:
            state = (model_state, np.float32(epsilon), source.rows.astype(np.int32))
            found, damaged = run_over(source, trainable, frozen, state)
            summary = evaluate(source, found, damaged).summary
            figures_of = {name: summary[name] for name in ("ap", "ap50", "ap75", "count")}
            if not jax.process_index():
                say(line(name, figures_of))
            return figures_of | {"epsilon": epsilon, "largest": float(found["size"].max())}

        return measure

    made = {name: make_attack(name, norm=norm, steps=steps, restarts=restarts) for name in attacks}
    clean = make_measure(no_attack)("clean", 0.0)
    record: dict[str, Any] = {"images": clean["count"], "norm": norm, "clean": clean}
    record["attacks"] = {
        name: [measure(f"{name} {norms.show_epsilon(e, norm)}", e) for e in epsilons]
        for name, measure in ((name, make_measure(attack)) for name, attack in made.items())
    }
    pictures = []
    if made and epsilons:
        outputs_of = make_adversarial(made[attacks[-1]])
        pictures = _adversarial_pictures(
            outputs_of, make_run_over, trained.arguments, source, epsilons[-1]
        )
    if jax.process_index() == 0:
        from vision_jax.tasks.detection.figures import draw_robustness  # matplotlib

        write_json(record, workdir / "robustness.json")
        draw_robustness(
            record, pictures, trained.class_names, workdir / "robustness.png", score=score
        )
        say(f"wrote {workdir / 'robustness.json'}")
        say(f"wrote {workdir / 'robustness.png'}")
    return record


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


def make_attack(name: str, *, norm: Norm, steps: int, restarts: int) -> Callable[..., jax.Array]:
    """One of ATTACKS: (loss, images, keys, epsilon=, pixel_mask=) -> images.

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

    def pgd(loss, images, keys, *, epsilon, pixel_mask):
        step_size = gradient.STEP_SHARE * epsilon / steps
        return gradient.pgd(
            loss, images, keys, epsilon=epsilon, step_size=step_size, steps=steps, norm=norm,
            restarts=restarts, pixel_mask=pixel_mask,
        )  # fmt: skip

    return pgd


def no_attack(loss, images, keys, **threat_model):
    """The images as they are."""
    del loss, keys, threat_model
    return images


def line(name: str, record: Mapping[str, Any]) -> str:
    """The figures of an attack, for the screen."""
    values = ((what, record[what]) for what in ("ap", "ap50", "ap75"))
    text = "  ".join(f"{what} {'-' if value is None else f'{value:.4f}'}" for what, value in values)
    return f"  {name:16} {text}  n={record['count']}"
