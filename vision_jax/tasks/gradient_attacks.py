"""What detectors and segmenters share under attack: FGSM and PGD on the loss of each image.

One compilation an attack and size of images, whatever the epsilons.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.attacks import gradient, norms
from vision_jax.attacks.examples import keys_of
from vision_jax.attacks.norms import Norm
from vision_jax.config import write_json
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError, nearest
from vision_jax.evaluation import Examples, announce, say_damaged
from vision_jax.logging import say
from vision_jax.objective import Batch, Objective

ATTACKS = ("fgsm", "pgd")

# (loss of images, images f[B, H, W, C], keys[B], epsilon=, pixel_mask= of padded ones) -> images
Attack = Callable[..., jax.Array]


@dataclass(frozen=True)
class Settings:
    """What images are attacked by: of a config's section robustness.

    Attributes:
      attacks: by name.
      norm: of what epsilons measure, in pixels from 0 to 1.
      epsilons: the largest norms, growing.
      steps: of each attack but fgsm.
      restarts: random restarts of each attack but fgsm.
      images: so many, evenly spread; 0 takes all.
      batch_size: images at once.
      seed: of all draws.
    """

    attacks: Sequence[str]
    norm: Norm
    epsilons: Sequence[float]
    steps: int
    restarts: int
    images: int
    batch_size: int
    seed: int


def choose(count: int, most: int) -> np.ndarray:
    """bool[count]: at most so many rows, evenly spread; 0 chooses all.

    Examples:
      >>> choose(5, 2).astype(int).tolist()
      [1, 0, 0, 0, 1]
    """
    chosen = np.zeros(count, bool)
    chosen[np.linspace(0, count - 1, min(most or count, count)).astype(int)] = True
    return chosen


def make_adversarial_outputs(
    objective: Objective,
    *,
    read: Callable[[Any, Batch], Mapping[str, jax.Array]],
    attack: Attack,
    seed: int,
):
    """The outputs of images that are changed to maximize the objective's losses.

    (trainable, frozen, (model_state, epsilon f32[], rows i32[N]), batch) -> what `read` gives, and
    "image" and "adversarial" f32[B, H, W, C]. An image's random draws come from the seed and
    rows[index], its place in the whole data, and from nothing of the batch.

    Args:
      objective: its losses of an image must not depend on other images: made with `alone`.
      read: (the model's outputs, batch) -> what is found in them.
      attack: see `make_attack`.
      seed: of the draws.
    """

    def outputs_fn(trainable, frozen, state, batch: Batch):
        model_state, epsilon, rows = state
        key = jax.random.key(seed)
        view = objective.prepare(trainable, frozen, model_state, batch, key)

        def outputs_of_images(images):
            seen = {**view, "image": images}
            return objective.forward(trainable, frozen, model_state, seen, key, train=False)[0]

        def loss(images):
            losses, _ = objective.criterion(trainable, outputs_of_images(images), view)
            return losses, jnp.zeros(losses.shape, bool)

        keys = keys_of(key, rows[batch["index"]])
        padded = {name: view[name] for name in ("pixel_mask",) if name in view}
        adversarial = attack(loss, view["image"], keys, epsilon=epsilon, **padded)
        found = read(outputs_of_images(adversarial), batch)
        return {**found, "image": view["image"], "adversarial": adversarial}

    return outputs_fn


def make_attack(name: str, what: str, *, norm: Norm, steps: int, restarts: int) -> Attack:
    """One of ATTACKS on a model that is called `what`.

    Raises:
      UserError: no such attack.
    """
    if name == "fgsm":
        return partial(gradient.fgsm, norm=norm)
    if name != "pgd":
        raise UserError(
            f"config.robustness.attacks: a {what}'s are fgsm and pgd, not `{name}`"
            f"{nearest(name, ATTACKS)}"
        )

    def pgd(loss, images, keys, *, epsilon, **padded):
        step_size = gradient.STEP_SHARE * epsilon / steps
        return gradient.pgd(
            loss, images, keys, epsilon=epsilon, step_size=step_size, steps=steps, norm=norm,
            restarts=restarts, **padded,
        )  # fmt: skip

    return pgd


def no_attack(loss, images, keys, **threat_model):
    """The images as they are."""
    del loss, keys, threat_model
    return images


def measure(
    workdir: Path,
    settings: Settings,
    *,
    source: Examples,
    what: str,
    make_measure: Callable[[Attack], Callable[[float, DamageLog], dict[str, Any]]],
    shown: Sequence[str],
    make_pictures: Callable[[Attack, float], Sequence[Any]],
    draw: Callable[[Mapping[str, Any], Sequence[Any], Path], None],
) -> dict[str, Any]:
    """Figures by attack and epsilon: lines on the screen, robustness.json and robustness.png.

    Args:
      workdir: where files are written.
      settings: the attacks.
      source: of the images that are attacked.
      what: the model is called.
      make_measure: attack -> ((epsilon, the damaged images that are met) -> figures, with "count"
        and "largest", the largest norm).
      shown: of the figures, those on the screen.
      make_pictures: (the last attack, the largest epsilon) -> what `draw` takes.
      draw: (the record, pictures, path of a PNG).

    Returns:
      What robustness.json holds.

    Raises:
      UserError: an unknown attack, or bad input.
    """
    made = {
        name: make_attack(
            name, what, norm=settings.norm, steps=settings.steps, restarts=settings.restarts
        )
        for name in settings.attacks
    }
    first, damage = not jax.process_index(), DamageLog()
    if first:
        announce(source)

    def measure_one(measure_at, name: str, epsilon: float) -> dict[str, Any]:
        found = measure_at(epsilon, damage)
        if first:
            say(line(name, found, shown))
        return found | {"epsilon": epsilon}

    clean = measure_one(make_measure(no_attack), "clean", 0.0)
    if first:
        say_damaged(damage.lines)
    record: dict[str, Any] = {"images": clean["count"], "norm": settings.norm, "clean": clean}
    record["attacks"] = {
        name: [
            measure_one(measure_at, f"{name} {norms.show_epsilon(e, settings.norm)}", e)
            for e in settings.epsilons
        ]
        for name, measure_at in ((name, make_measure(attack)) for name, attack in made.items())
    }
    drawn = bool(made and settings.epsilons)
    pictures = make_pictures([*made.values()][-1], settings.epsilons[-1]) if drawn else []
    if first:
        write_json(record, workdir / "robustness.json")
        draw(record, pictures, workdir / "robustness.png")
        say(f"wrote {workdir / 'robustness.json'}")
        say(f"wrote {workdir / 'robustness.png'}")
    return record


def line(name: str, record: Mapping[str, Any], shown: Sequence[str]) -> str:
    """The figures of an attack, for the screen."""
    values = ((what, record[what]) for what in shown)
    text = "  ".join(f"{what} {'-' if value is None else f'{value:.4f}'}" for what, value in values)
    return f"  {name:16} {text}  n={record['count']}"
