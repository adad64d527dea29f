"""A finished classifier under attacks and corruptions, and whether the attacks can be trusted."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from vision_jax.attacks import norms
from vision_jax.attacks.autoattack import Version
from vision_jax.attacks.norms import Norm
from vision_jax.config import write_json
from vision_jax.data import corruptions as corruption_names
from vision_jax.data.sources import Source
from vision_jax.errors import UserError
from vision_jax.logging import show_progress
from vision_jax.tasks.api import Trained
from vision_jax.tasks.classification import objective
from vision_jax.tasks.classification import under_attack as robust
from vision_jax.tasks.classification.metrics import softmax
from vision_jax.tasks.classification.self_check import Finding, check_gradients


def measure(
    workdir: Path,
    trained: Trained,
    source: Source,
    surrogate: Trained | None,
    *,
    attacks: Sequence[str],
    norm: Norm,
    epsilons: Sequence[float],
    steps: int,
    restarts: int,
    corruptions: Sequence[str],
    severities: Sequence[int],
    autoattack: Version | Literal["off"],
    autoattack_epsilon: float,
    self_check: bool,
    images: int,
    batch_size: int,
    threads: int,
    seed: int,
) -> dict[str, Any]:
    """Lines on the screen, robustness.json and robustness.png.

    Args:
      workdir: where files are written.
      trained: the run's model with its parameters.
      source: images that are attacked.
      surrogate: another run, whose attacks the self-check carries over.
      attacks: see under_attack.make_attack.
      norm: of what epsilons measure, in pixels from 0 to 1.
      epsilons: the largest norms, growing.
      steps: of each attack but fgsm.
      restarts: random restarts of each attack but fgsm.
      corruptions: names (see data.corruptions.find_names), () for none.
      severities: of each, 1 to 5.
      autoattack: its version: standard, plus, rand; or off.
      autoattack_epsilon: its largest norm.
      self_check: look for signs of gradient masking.
      images: so many, evenly spread; 0 takes all.
      batch_size: images at once.
      threads: that decode and corrupt images.
      seed: of all draws.

    Returns:
      What robustness.json holds.

    Raises:
      UserError: an unknown attack or corruption, or bad input.
    """
    names = corruption_names.find_names(corruptions, "config.robustness.corruptions")
    made = {
        name: robust.make_attack(name, norm=norm, steps=steps, restarts=restarts)
        for name in attacks
    }
    classifier = _classifier(trained, batch_size)
    make_classify = partial(robust.make_classify, classifier, norm=norm, seed=seed)
    seen = make_classify(None)
    attacked = {name: make_classify(attack) for name, attack in made.items()}
    class_names = trained.class_names
    examples, damaged = robust.read_examples(
        source, trained.preprocessing, count=images, threads=threads
    )
    count = len(examples.labels)
    passes = 1 + len(made) * len(epsilons) + len(names) * len(severities)
    first = jax.process_index() == 0
    with show_progress(passes * -(-count // batch_size), show=first) as (advance, say):
        say(f"step {trained.step}, {count} images, {norm}")
        for name in damaged:
            say(f"skipped a damaged image: {name}")
        logits = seen(examples, advance=advance, leave_out=("image",))["logits"]
        clean = logits.argmax(-1) == examples.labels
        record: dict[str, Any] = {
            "step": trained.step,
            "images": count,
            "norm": norm,
            "clean": robust.figures(logits, examples.labels, clean, class_names),
        }
        say(robust.line("clean", record["clean"]))
        record["attacks"] = robust.under_attacks(
            attacked,
            examples,
            class_names,
            clean,
            epsilons,
            norm=norm,
            advance=advance,
            say=say,
        )
        if autoattack != "off":
            record["autoattack"] = robust.under_autoattack(
                classifier,
                seen,
                examples,
                class_names,
                version=autoattack,
                norm=norm,
                epsilon=autoattack_epsilon,
                seed=seed,
                say=say,
            )
        record["corruptions"] = robust.under_corruptions(
            seen,
            examples,
            class_names,
            names,
            severities,
            seed=seed,
            threads=threads,
            advance=advance,
            say=say,
        )
        if names:
            mean = robust.mean_accuracy(record["corruptions"])
            record["mean_corruption_accuracy"] = mean
            say(f"  mean over corruptions        accuracy {mean:.4f}  n={count}")
        if self_check and epsilons:
            exact = partial(_classifier, batch_size=batch_size, exact=True)
            findings = check_gradients(
                exact(trained),
                examples,
                norm=norm,
                epsilon=max(epsilons),
                seed=seed,
                surrogate=exact(surrogate) if surrogate else None,
            )
            record["self_check"] = _report_findings(findings, say)
    pictures = _adversarial_pictures(seen, attacked, examples, clean, record)
    if first:
        from vision_jax.tasks.classification.figures import draw_robustness  # matplotlib

        write_json(record, workdir / "robustness.json")
        draw_robustness(record, pictures, class_names, workdir / "robustness.png")
        print(f"wrote {workdir / 'robustness.json'}")
        print(f"wrote {workdir / 'robustness.png'}")
    return record


def _classifier(trained: Trained, batch_size: int, *, exact: bool = False) -> robust.Classifier:
    """What is attacked; if `exact` in float32, whatever the run computes in."""
    apply = trained.exact_apply if exact else trained.apply
    logits_fn = objective.make_logits(apply, trained.assemble)
    return robust.Classifier(logits_fn, trained.arguments, trained.mesh, batch_size)


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


def _report_findings(
    findings: Sequence[Finding], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The checks for gradient masking, on the screen and for JSON."""
    flagged = [finding for finding in findings if finding.flagged]
    say(f"self-check: {len(flagged)} of {len(findings)} checks find signs of gradient masking")
    for finding in findings:
        mark = "DOUBT" if finding.flagged else "ok"
        say(f"  {mark:5} {finding.name:15} {finding.what}  n={finding.count}")
    return [dataclasses.asdict(finding) | {"flagged": finding.flagged} for finding in findings]


def _adversarial_pictures(
    classify: Callable[..., robust.Outputs],
    attacked: Mapping[str, Callable[..., robust.Outputs]],
    examples: robust.Examples,
    clean: np.ndarray,
    record: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Some examples that are right, and what the last attack makes of them.

    At the smallest epsilon that fools at least half of all that are right, else the largest.
    """
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
    some = examples.take(
        right[np.unique(np.linspace(0, len(right) - 1, MOST_EXAMPLES).astype(int))]
    )
    before, after = classify(some), attacked[name](some, epsilon)
    return {
        "attack": name,
        "epsilon": norms.show_epsilon(epsilon, record["norm"]),
        "image": before["image"],
        "adversarial": after["image"],
        "label": some.labels,
        "before": softmax(before["logits"]),
        "after": softmax(after["logits"]),
    }
