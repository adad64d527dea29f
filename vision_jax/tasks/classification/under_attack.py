"""A classifier under attack and under corruption: accuracy and calibration, each with its n.

An example counts as robust where it is right both as it is and attacked, so no attack can raise the
accuracy. The model is the deterministic one of evaluation, its parameters are arguments of the
compiled programs, and epsilon is traced: one compilation an attack, whatever the epsilons.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vision_jax import machine, sharding
from vision_jax.attacks import gradient, losses, norms
from vision_jax.attacks.apgd import apgd
from vision_jax.attacks.autoattack import Version, autoattack
from vision_jax.attacks.examples import keys_of
from vision_jax.attacks.losses import LogitsOfImages
from vision_jax.attacks.norms import Norm
from vision_jax.data.corruptions import corrupt
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.pipeline import Damaged, DamageLog
from vision_jax.data.sources import Source
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.errors import UserError, nearest
from vision_jax.ops.images import to_float
from vision_jax.tasks.classification.metrics import summarize

Array = jax.Array
# (logits_of_images, images f[B, H, W, C], labels i32[B], keys[B], epsilon f32[]) -> images
Attack = Callable[[LogitsOfImages, Array, Array, Array, Array], Array]
# probe(logits_of_images, images f32[B, H, W, C], labels i32[B], index i32[B], *numbers) -> arrays
# by name, a row an example
Probe = Callable[..., Mapping[str, Array]]
Outputs = dict[str, np.ndarray]
ZERO = np.float32(0)
WATCH_STEPS = 20  # of PGD in an evaluation during training


@dataclass(frozen=True)
class Classifier:
    """What is attacked.

    Attributes:
      logits_fn: (*arguments, images f32[B, H, W, C] in [0, 1]) -> logits f[B, C].
      arguments: its parameters, on the devices.
      mesh: of the devices.
      batch_size: images at once, over all devices; rounded up to what they divide.
    """

    logits_fn: Callable[..., Array]
    arguments: tuple[Any, ...]
    mesh: Mesh
    batch_size: int

    @cached_property
    def logits(self) -> Callable[..., Array]:
        """(arguments, images) -> logits f32[B, C]: one program for whatever is classified."""

        def logits(arguments, images):
            return self.logits_fn(*arguments, images).astype(jnp.float32)

        return machine.jit(logits, out_shardings=sharding.replicated(self.mesh))


@dataclass(frozen=True)
class Examples:
    """Images as the model sees them, on the host.

    Attributes:
      images: u8[N, H, W, C], or f32 in [0, 1].
      labels: i32[N].
      index: i32[N], rows in their data set: an attack's draws come from (seed, index).
    """

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray

    def take(self, rows: np.ndarray) -> "Examples":
        """The examples at these rows, i[M] or bool[N]."""
        return Examples(self.images[rows], self.labels[rows], self.index[rows])


def read_examples(
    source: Source, preprocessing: Preprocessing, *, count: int, threads: int
) -> tuple[Examples, DamageLog]:
    """(`count` evenly spread examples of a source, 0 for all; those that are damaged).

    Raises:
      UserError: all of them are.
    """
    count = min(count or len(source), len(source))
    rows = np.unique(np.linspace(0, len(source) - 1, count).astype(int))

    damage = DamageLog()

    def load(row: int) -> np.ndarray | None:
        try:
            return eval_transform(source[row]["image"], preprocessing)
        except DamagedImageError as error:
            damage.record(0, [Damaged(row, source.example_name(row), str(error))])
            return None

    with ThreadPoolExecutor(threads) as pool:
        views = list(pool.map(load, rows.tolist()))
    sound = np.array([view is not None for view in views])
    if not sound.any():
        raise UserError(
            f"{source.name}: not one of {count} images could be read, first {damage.lines[0]}"
        )
    images = np.stack([view for view in views if view is not None])
    kept = rows[sound]
    labels = np.asarray(source.labels)[kept].astype(np.int32)
    return Examples(images, labels, kept.astype(np.int32)), damage


def make_over(classifier: Classifier, probe: Probe) -> Callable[..., Outputs]:
    """A function (examples, *numbers) -> outputs of a probe over all of them, compiled once.

    Of its keywords, `advance` is called after each batch, and `leave_out` are outputs that stay on
    the devices.
    """

    def program(arguments, images, labels, index, *numbers):
        logits_of_images = partial(classifier.logits_fn, *arguments)
        return probe(logits_of_images, to_float(images), labels, index, *numbers)

    return _over(
        classifier, machine.jit(program, out_shardings=sharding.replicated(classifier.mesh))
    )


def make_classify(
    classifier: Classifier, attack: Attack | None, *, norm: Norm, seed: int
) -> Callable[..., Outputs]:
    """The same, of "logits" f32[N, C] of "image" f32[N, H, W, C], attacked within one number,
    epsilon; and "size" f32[N], the norm of the perturbation. Without an attack images are as they
    are.

    Adversarial examples are classified by a program of its own, the same with any attack or none
    (`Classifier.logits`).
    """
    split = sharding.batch_sharding(classifier.mesh)

    def move(arguments, images, labels, index, epsilon):
        images = to_float(images)
        if attack is None:
            return images
        logits_of_images = partial(classifier.logits_fn, *arguments)
        return attack(
            logits_of_images, images, labels, keys_of(jax.random.key(seed), index), epsilon
        )

    def compare(images, seen):
        return {"size": norms.size(seen - to_float(images), norm).reshape(-1), "image": seen}

    moving = machine.jit(move, out_shardings=split)
    comparing = machine.jit(compare, out_shardings=sharding.replicated(classifier.mesh))

    def program(arguments, images, labels, index, epsilon=ZERO):
        seen = moving(arguments, images, labels, index, epsilon)
        return {"logits": classifier.logits(arguments, seen), **comparing(images, seen)}

    return _over(classifier, program)


def _over(classifier: Classifier, program: Callable[..., Mapping[str, Array]]):
    devices = classifier.mesh.size
    size = -(-classifier.batch_size // devices) * devices
    split = sharding.batch_sharding(classifier.mesh)

    def run(
        examples: Examples,
        *numbers: float,
        advance: Callable[[], None] = lambda: None,
        leave_out: Collection[str] = (),
    ) -> Outputs:
        parts = []
        for start in range(0, len(examples.labels), size):
            rows = np.arange(start, min(start + size, len(examples.labels)))
            full = examples.take(np.resize(rows, size))  # the last batch: filled up with repeats
            placed = (
                sharding.place(array, split) for array in (full.images, full.labels, full.index)
            )
            found = program(classifier.arguments, *placed, *map(np.float32, numbers))
            kept = {name: array for name, array in found.items() if name not in leave_out}
            parts.append({k: array[: len(rows)] for k, array in jax.device_get(kept).items()})
            advance()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return run


# Attacks ----------------------------------------------------------------------------------------


def _fgsm(norm, steps, restarts, logits_of_images, images, labels, keys, epsilon):
    del steps, restarts
    loss = losses.make_untargeted(logits_of_images, labels)
    return gradient.fgsm(loss, images, keys, epsilon=epsilon, norm=norm)


def _pgd(norm, steps, restarts, logits_of_images, images, labels, keys, epsilon, **more):
    return gradient.pgd(
        losses.make_untargeted(logits_of_images, labels),
        images,
        keys,
        epsilon=epsilon,
        step_size=gradient.STEP_SHARE * epsilon / steps,
        steps=steps,
        norm=norm,
        restarts=restarts,
        **more,
    )


def _apgd(loss, norm, steps, restarts, logits_of_images, images, labels, keys, epsilon):
    loss_of_images = losses.make_untargeted(logits_of_images, labels, loss)
    return apgd(
        loss_of_images, images, keys, epsilon=epsilon, norm=norm, steps=steps, restarts=restarts
    )


ATTACKS: dict[str, Callable[..., Array]] = {
    "fgsm": _fgsm,
    "pgd": _pgd,
    "mifgsm": partial(_pgd, momentum=1.0, random_start=False),
    "difgsm": partial(_pgd, momentum=1.0, diversity=0.5),
    "apgd-ce": partial(_apgd, losses.cross_entropy),
    "apgd-dlr": partial(_apgd, losses.dlr),
}


def make_attack(name: str, *, norm: Norm, steps: int, restarts: int) -> Attack:
    """One of ATTACKS with its settings.

    Raises:
      UserError: no such attack.
    """
    if name not in ATTACKS:
        raise UserError(f"config.robustness.attacks: unknown `{name}`{nearest(name, [*ATTACKS])}")
    return partial(ATTACKS[name], norm, steps, restarts)


# Figures ----------------------------------------------------------------------------------------


def figures(
    logits: np.ndarray, labels: np.ndarray, right: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """Accuracy, calibration and number of examples, for JSON.

    Args:
      logits: f32[N, C], under attack or corruption.
      labels: i32[N].
      right: bool[N], which count as right.
      class_names: C names.
    """
    summary = summarize(logits, labels, class_names)
    return {
        "accuracy": float(right.mean()),
        "ece": summary["ece"],
        "loss": summary["loss"],
        "count": len(labels),
    }


def under_attacks(
    attacked: Mapping[str, Callable[..., Outputs]],
    examples: Examples,
    class_names: Sequence[str],
    clean: np.ndarray,
    epsilons: Sequence[float],
    *,
    norm: Norm,
    advance: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    """Figures of each attack at each epsilon, and of the worst of all attacks, example by example.

    Args:
      attacked: from `make_classify`, of each attack.
      clean: bool[N], which examples are right as they are.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in attacked}
    worst = [clean.copy() for _ in epsilons]
    for name, classify in attacked.items():
        for place, epsilon in enumerate(epsilons):
            found = classify(examples, epsilon, advance=advance, leave_out=("image",))
            right = clean & (found["logits"].argmax(-1) == examples.labels)
            worst[place] &= right
            record = figures(found["logits"], examples.labels, right, class_names)
            # Rounding of x + delta - x is what may be above epsilon.
            record |= {"epsilon": epsilon, "largest": float(found["size"].max())}
            results[name].append(record)
            say(line(f"{name} {norms.show_epsilon(epsilon, norm)}", record))
    if len(attacked) > 1:
        results["all"] = [
            {"epsilon": epsilon, "accuracy": float(right.mean()), "count": len(right)}
            for epsilon, right in zip(epsilons, worst, strict=True)
        ]
        for record in results["all"]:
            say(line(f"all of them {norms.show_epsilon(record['epsilon'], norm)}", record))
    return results


def under_autoattack(
    classifier: Classifier,
    classify: Callable[..., Outputs],
    examples: Examples,
    class_names: Sequence[str],
    *,
    version: Version,
    norm: Norm,
    epsilon: float,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Figures of AutoAttack, with the share that stood after each of its attacks.

    Args:
      classify: from `make_classify`, without an attack.
    """

    def logits_fn(arguments, images, keys=None):
        del keys  # a finished model draws nothing, for "rand" neither
        return classifier.logits_fn(*arguments, images)

    images = examples.images
    verdicts = autoattack(
        logits_fn,
        classifier.arguments,
        images.astype(np.float32) / 255 if images.dtype == np.uint8 else images,
        examples.labels,
        epsilon=epsilon,
        norm=norm,
        version=version,
        batch_size=classifier.batch_size,
        mesh=classifier.mesh,
        index=examples.index,
        seed=seed,
        report=lambda name, done, rounds, left: say(
            f"  autoattack {name} {done}/{rounds}: {left:.4f} stand"
        ),
    )
    attacked = replace(examples, images=verdicts.images.astype(np.float32))
    logits = classify(attacked, leave_out=("image",))["logits"]
    record = {
        "version": version,
        "epsilon": epsilon,
        **figures(logits, examples.labels, verdicts.robust, class_names),
        "after": verdicts.accuracy,
    }
    say(line(f"autoattack {version} {norms.show_epsilon(epsilon, norm)}", record))
    return record


def under_corruptions(
    classify: Callable[..., Outputs],
    examples: Examples,
    class_names: Sequence[str],
    names: Sequence[str],
    severities: Sequence[int],
    *,
    seed: int,
    threads: int,
    advance: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    """Figures of each corruption at each severity.

    Args:
      classify: from `make_classify`, without an attack.
      examples: u8, as the model sees them.
      threads: that corrupt images.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ThreadPoolExecutor(threads) as pool:
        for name in names:
            for severity in severities:
                change = partial(corrupt, name=name, severity=severity, seed=seed)
                images = np.stack(list(pool.map(change, examples.images, examples.index.tolist())))
                corrupted = replace(examples, images=images)
                logits = classify(corrupted, advance=advance, leave_out=("image",))["logits"]
                right = logits.argmax(-1) == examples.labels
                record = figures(logits, examples.labels, right, class_names)
                results[name].append({"severity": severity, **record})
                say(line(f"{name} {severity}", record))
    return results


def mean_accuracy(corruptions: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """Over all corruptions and severities."""
    return float(np.mean([record["accuracy"] for rows in corruptions.values() for record in rows]))


def line(name: str, record: Mapping[str, Any]) -> str:
    """A figure for the screen, with its n."""
    text = f"  {name:28} accuracy {record['accuracy']:.4f}"
    text += f"  ece {record['ece']:.4f}" if "ece" in record else ""
    return f"{text}  n={record['count']}"


# In training ------------------------------------------------------------------------------------


def make_watch(
    outputs_fn: Callable[..., Mapping[str, Array]],
    *,
    norm: Literal["linf", "l2"],
    epsilon: float,
    seed: int,
) -> Callable[..., dict[str, Array]]:
    """Evaluation under attack: which images are classified right, before and after.

    (trainable, frozen, model_state, batch) -> {"fgsm": bool[B], "pgd": bool[B], "mask", "index"},
    of FGSM and of PGD with 20 steps from a random start.

    Args:
      outputs_fn: the model (see objective.make_outputs).
      norm: of the perturbations.
      epsilon: their radius.
      seed: of the random starts.
    """

    def watched(trainable, frozen, model_state, batch):
        images, labels = to_float(batch["image"]), batch["label"]

        def logits_of_images(images):
            return outputs_fn(trainable, frozen, model_state, {**batch, "image": images})["logits"]

        loss = losses.make_untargeted(logits_of_images, labels)
        one_step = gradient.fgsm(loss, images, norm=norm, epsilon=epsilon)
        many_steps = gradient.pgd(
            loss,
            images,
            keys_of(jax.random.key(seed), batch["index"]),
            norm=norm,
            epsilon=epsilon,
            step_size=2.5 * epsilon / WATCH_STEPS,
            steps=WATCH_STEPS,
        )
        clean = ~loss(images)[1]
        right = {"fgsm": clean & ~loss(one_step)[1], "pgd": clean & ~loss(many_steps)[1]}
        return {**right, "mask": batch["mask"], "index": batch["index"]}

    return watched


def find_overfitting(fgsm: Sequence[float], pgd: Sequence[float], count: int) -> int | None:
    """Catastrophic overfitting: PGD's accuracy fell while FGSM's rose (Wong et al. 2020).

    Args:
      fgsm: accuracy at each evaluation on the same `count` images, the last one now.
      pgd: the same under PGD.
      count: of images, which says how much of a fall is chance.

    Returns:
      The evaluation since which it fell, the best one under PGD; or None.
    """
    best = max(range(len(pgd)), key=pgd.__getitem__)
    variance = sum(share * (1 - share) / count for share in (pgd[best], pgd[-1]))
    fell = pgd[best] - pgd[-1] > 3 * math.sqrt(variance)  # more than other images would explain
    return best if fell and fgsm[-1] > fgsm[best] else None
