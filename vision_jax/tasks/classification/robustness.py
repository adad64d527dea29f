"""A finished classifier under attacks and corruptions, and whether the attacks can be trusted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from vision_jax.attacks import norms
from vision_jax.attacks.autoattack import Version
from vision_jax.config import write_json
from vision_jax.data import corruptions as corruption_names
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.sources import Source
from vision_jax.errors import UserError, printable
from vision_jax.logging import show_progress
from vision_jax.tasks import gradient_attacks
from vision_jax.tasks.api import Trained
from vision_jax.tasks.classification import objective, purification
from vision_jax.tasks.classification import under_attack as robust
from vision_jax.tasks.classification.metrics import softmax
from vision_jax.tasks.classification.self_check import check_gradients


def find_surrogate(
    folder: Path, trained: Trained, restore_other: Callable[[Path], Trained]
) -> Trained:
    """The run in `folder`, whose attacks are carried over.

    Raises:
      UserError: there is none, or it sees other images or classes.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"config.robustness.transfer_from: {folder} holds no run")
    other = restore_other(folder)
    for name in ("class_names", "preprocessing"):
        if getattr(other, name) != getattr(trained, name):
            raise UserError(f"config.robustness.transfer_from: {folder} has another {name}")
    return other


@dataclass(frozen=True)
class Settings(gradient_attacks.Settings):
    """What is measured and how: a config's section robustness.

    Attributes:
      corruptions: names (see data.corruptions.find_names), () for none.
      severities: of each, 1 to 5.
      autoattack: its version: standard, plus, rand; or off.
      autoattack_epsilon: its largest norm.
      self_check: look for signs of gradient masking.
      purify: a generator before the classifier.
      threads: that decode and corrupt images.
    """

    corruptions: Sequence[str]
    severities: Sequence[int]
    autoattack: Version | Literal["off"]
    autoattack_epsilon: float
    self_check: bool
    purify: purification.Settings
    threads: int


def measure(
    workdir: Path,
    trained: Trained,
    source: Source,
    surrogate: Trained | None,
    settings: Settings,
    generator: Trained | None = None,
) -> dict[str, Any]:
    """Lines on the screen, robustness.json and robustness.png.

    Args:
      workdir: where files are written.
      trained: the run's model with its parameters.
      source: images that are attacked.
      surrogate: another run, whose attacks the self-check carries over.
      settings: what is measured and how.
      generator: that purifies images before the classifier.

    Returns:
      What robustness.json holds.

    Raises:
      UserError: an unknown attack or corruption, or bad input.
    """
    names = corruption_names.find_names(settings.corruptions, "config.robustness.corruptions")
    settings = replace(settings, corruptions=names)
    subject, damage = _read_subject(trained, source, settings)
    count = len(subject.examples.labels)
    passes = (
        1 + len(settings.attacks) * len(settings.epsilons) + len(names) * len(settings.severities)
    )
    first = jax.process_index() == 0
    batches = passes * -(-count // settings.batch_size)
    with show_progress(batches, show=first) as (advance, say):
        say(f"data: {source.name}; step {trained.step}, {count} images, {settings.norm}")
        for line in damage.lines:
            say(f"skipped a damaged image: {printable(line)}")
        clean, of_clean = _measure_clean(subject, advance, say)
        record = {
            "step": trained.step,
            "images": count,
            "norm": settings.norm,
            "clean": of_clean,
            **_measure_attacked(subject, clean, settings, advance, say),
            **_measure_corrupted(subject, settings, advance, say),
        }
        if generator is not None:
            record["purified"] = purification.under_purification(
                subject.classifier,
                subject.classify,
                generator,
                settings.purify,
                _make_attacks(settings),
                subject.examples,
                settings.epsilons,
                norm=settings.norm,
                seed=settings.seed,
                say=say,
            )
        if settings.self_check and settings.epsilons:
            record["self_check"] = _check_masking(trained, surrogate, subject, settings, say)
    pictures = _adversarial_pictures(subject, clean, record)
    if first:
        _write(record, pictures, subject.class_names, workdir)
    return record


@dataclass(frozen=True)
class _Subject:
    """What is measured: a classifier, and the images that it is measured on.

    Attributes:
      classifier: what is attacked.
      classify: its outputs for examples as they are (see under_attack.make_classify).
      attacked: the same under each attack, by its name.
      examples: the images.
      class_names: by label.
    """

    classifier: robust.Classifier
    classify: Callable[..., robust.Outputs]
    attacked: Mapping[str, Callable[..., robust.Outputs]]
    examples: robust.Examples
    class_names: tuple[str, ...]


def _read_subject(
    trained: Trained, source: Source, settings: Settings
) -> tuple[_Subject, DamageLog]:
    """(the subject, the damaged images that are left out)."""
    attacks = _make_attacks(settings)
    classifier = _classifier(trained, settings.batch_size)
    make_classify = partial(
        robust.make_classify, classifier, norm=settings.norm, seed=settings.seed
    )
    examples, damage = robust.read_examples(
        source, trained.preprocessing, count=settings.images, threads=settings.threads
    )
    attacked = {name: make_classify(attack) for name, attack in attacks.items()}
    classify = make_classify(None)
    return _Subject(classifier, classify, attacked, examples, trained.class_names), damage


def _make_attacks(settings: Settings) -> dict[str, robust.Attack]:
    make = partial(
        robust.make_attack, norm=settings.norm, steps=settings.steps, restarts=settings.restarts
    )
    return {name: make(name) for name in settings.attacks}


def _measure_clean(
    subject: _Subject, advance: Callable[[], None], say: Callable[[str], None]
) -> tuple[np.ndarray, dict[str, Any]]:
    """(bool[N], which examples are right as they are; the figures)."""
    examples = subject.examples
    logits = subject.classify(examples, advance=advance, leave_out=("image",))["logits"]
    clean = logits.argmax(-1) == examples.labels
    figures = robust.figures(logits, examples.labels, clean, subject.class_names)
    say(robust.line("clean", figures))
    return clean, figures


def _measure_attacked(
    subject: _Subject,
    clean: np.ndarray,
    settings: Settings,
    advance: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """{"attacks": ..., "autoattack": ...}, the latter if it is wanted."""
    record: dict[str, Any] = {
        "attacks": robust.under_attacks(
            subject.attacked,
            subject.examples,
            subject.class_names,
            clean,
            settings.epsilons,
            norm=settings.norm,
            advance=advance,
            say=say,
        )
    }
    if settings.autoattack != "off":
        record["autoattack"] = robust.under_autoattack(
            subject.classifier,
            subject.classify,
            subject.examples,
            subject.class_names,
            version=settings.autoattack,
            norm=settings.norm,
            epsilon=settings.autoattack_epsilon,
            seed=settings.seed,
            say=say,
        )
    return record


def _measure_corrupted(
    subject: _Subject,
    settings: Settings,
    advance: Callable[[], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """{"corruptions": ..., "mean_corruption_accuracy": ...}, the latter if there are any."""
    found = robust.under_corruptions(
        subject.classify,
        subject.examples,
        subject.class_names,
        settings.corruptions,
        settings.severities,
        seed=settings.seed,
        threads=settings.threads,
        advance=advance,
        say=say,
    )
    if not settings.corruptions:
        return {"corruptions": found}
    mean = robust.mean_accuracy(found)
    say(f"  mean over corruptions        accuracy {mean:.4f}  n={len(subject.examples.labels)}")
    return {"corruptions": found, "mean_corruption_accuracy": mean}


def _check_masking(
    trained: Trained,
    surrogate: Trained | None,
    subject: _Subject,
    settings: Settings,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The checks for gradient masking, on the screen and for JSON."""
    exact = partial(_classifier, batch_size=settings.batch_size, exact=True)
    findings = check_gradients(
        exact(trained),
        subject.examples,
        norm=settings.norm,
        epsilon=max(settings.epsilons),
        seed=settings.seed,
        surrogate=exact(surrogate) if surrogate else None,
    )
    flagged = [finding for finding in findings if finding.flagged]
    say(f"self-check: {len(flagged)} of {len(findings)} checks find signs of gradient masking")
    for finding in findings:
        mark = "DOUBT" if finding.flagged else "ok"
        say(f"  {mark:5} {finding.name:15} {finding.what}  n={finding.count}")
    return [asdict(finding) | {"flagged": finding.flagged} for finding in findings]


def _classifier(trained: Trained, batch_size: int, *, exact: bool = False) -> robust.Classifier:
    """What is attacked; if `exact` in float32, whatever the run computes in."""
    apply = trained.exact_apply if exact else trained.apply
    logits_fn = objective.make_logits(apply, trained.assemble)
    return robust.Classifier(logits_fn, trained.arguments, trained.mesh, batch_size)


def _adversarial_pictures(
    subject: _Subject, clean: np.ndarray, record: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Some examples that are right, and what the last attack makes of them.

    At the smallest epsilon that fools at least half of all that are right, else the largest.
    """
    attacked = subject.attacked
    if not attacked or not clean.any():
        return None
    from vision_jax.tasks.classification.figures import MOST_EXAMPLES  # matplotlib

    name = list(attacked)[-1]
    rows = record["attacks"][name]
    if not rows:
        return None
    half = [row["epsilon"] for row in rows if row["accuracy"] <= clean.mean() / 2]
    epsilon = half[0] if half else rows[-1]["epsilon"]
    right = np.flatnonzero(clean)
    some = subject.examples.take(
        right[np.unique(np.linspace(0, len(right) - 1, MOST_EXAMPLES).astype(int))]
    )
    before, after = subject.classify(some), attacked[name](some, epsilon)
    return {
        "attack": name,
        "epsilon": norms.show_epsilon(epsilon, record["norm"]),
        "image": before["image"],
        "adversarial": after["image"],
        "label": some.labels,
        "before": softmax(before["logits"]),
        "after": softmax(after["logits"]),
    }


def _write(
    record: dict[str, Any],
    pictures: dict[str, Any] | None,
    class_names: Sequence[str],
    workdir: Path,
) -> None:
    from vision_jax.tasks.classification.figures import draw_robustness  # matplotlib

    write_json(record, workdir / "robustness.json")
    draw_robustness(record, pictures, class_names, workdir / "robustness.png")
    print(f"wrote {workdir / 'robustness.json'}")
    print(f"wrote {workdir / 'robustness.png'}")
