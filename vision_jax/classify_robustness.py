"""A finished classifier under attacks and corruptions, and whether the attacks can be trusted.

What evaluate.robustness measures, as the section robustness of a run's config asks for it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vision_jax.config import write_json
from vision_jax.data import corruptions
from vision_jax.data.sources import Source
from vision_jax.errors import UserError
from vision_jax.evaluate import robustness as robust
from vision_jax.evaluate.classification import softmax
from vision_jax.evaluate.robustness_figure import MOST_EXAMPLES, draw_robustness
from vision_jax.evaluate.self_check import check_gradients
from vision_jax.logging import show_progress
from vision_jax.tasks import classification

if TYPE_CHECKING:
    from vision_jax.setup import Trained


def measure(
    config: ConfigDict,
    workdir: Path,
    trained: "Trained",
    source: Source,
    restore_other: Callable[[Path], "Trained"],
) -> dict[str, Any]:
    """Lines on the screen, robustness.json and robustness.png.

    Args:
      config: the run's, with its section robustness.
      workdir: where files are written.
      trained: the run.
      source: images that are attacked.
      restore_other: another run from its folder: config.robustness.transfer_from.

    Returns:
      What robustness.json holds.

    Raises:
      UserError: an unknown attack or corruption, or bad input.
    """
    settings = config.robustness
    norm, epsilons, seed = settings.norm, sorted(settings.epsilons), config.seed
    names = corruptions.find_names(settings.corruptions, "config.robustness.corruptions")
    attacks = {
        name: robust.make_attack(name, norm=norm, steps=settings.steps, restarts=settings.restarts)
        for name in settings.attacks
    }
    surrogate = None
    if settings.transfer_from:
        surrogate = _surrogate(Path(settings.transfer_from), trained, restore_other)
    classifier = _classifier(trained, settings.batch_size)
    make_classify = partial(robust.make_classify, classifier, norm=norm, seed=seed)
    seen = make_classify(None)
    attacked = {name: make_classify(attack) for name, attack in attacks.items()}
    class_names = trained.description.class_names
    examples, damaged = robust.read_examples(
        source,
        trained.description.preprocessing,
        count=settings.images,
        threads=config.data.threads,
    )
    count, severities = len(examples.labels), settings.severities
    passes = 1 + len(attacks) * len(epsilons) + len(names) * len(severities)
    first = jax.process_index() == 0
    with show_progress(passes * -(-count // settings.batch_size), show=first) as (advance, say):
        say(f"step {int(trained.state.step)}, {count} images, {norm}")
        for name in damaged:
            say(f"skipped a damaged image: {name}")
        logits = seen(examples, advance=advance, leave_out=("image",))["logits"]
        clean = logits.argmax(-1) == examples.labels
        record: dict[str, Any] = {
            "step": int(trained.state.step),
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
        if settings.autoattack != "off":
            record["autoattack"] = robust.under_autoattack(
                classifier,
                seen,
                examples,
                class_names,
                version=settings.autoattack,
                norm=norm,
                epsilon=settings.autoattack_epsilon,
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
            threads=config.data.threads,
            advance=advance,
            say=say,
        )
        if names:
            mean = robust.mean_accuracy(record["corruptions"])
            record["mean_corruption_accuracy"] = mean
            say(f"  mean over corruptions        accuracy {mean:.4f}  n={count}")
        if settings.self_check and epsilons:
            record["self_check"] = _self_check(config, trained, surrogate, examples, say)
    pictures = _attacked_pictures(seen, attacked, examples, clean, record)
    if first:
        write_json(record, workdir / "robustness.json")
        draw_robustness(record, pictures, class_names, workdir / "robustness.png")
        print(f"wrote {workdir / 'robustness.json'}")
        print(f"wrote {workdir / 'robustness.png'}")
    return record


def _classifier(trained: "Trained", batch_size: int, *, exact: bool = False) -> robust.Classifier:
    """What is attacked; if `exact` in float32, whatever the run computes in."""
    apply = trained.exact_apply if exact else trained.apply
    logits_fn = classification.make_logits(apply, trained.assemble)
    return robust.Classifier(logits_fn, trained.arguments, trained.mesh, batch_size)


def _surrogate(
    folder: Path, trained: "Trained", restore_other: Callable[[Path], "Trained"]
) -> "Trained":
    """The run whose attacks are carried over."""
    if not (folder / "config.json").is_file():
        raise UserError(f"config.robustness.transfer_from: {folder} holds no run")
    other = restore_other(folder)
    for name in ("class_names", "preprocessing"):
        if getattr(other.description, name) != getattr(trained.description, name):
            raise UserError(f"config.robustness.transfer_from: {folder} has another {name}")
    return other


def _self_check(
    config: ConfigDict,
    trained: "Trained",
    surrogate: "Trained | None",
    examples: robust.Examples,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The checks for masked gradients at the largest epsilon."""
    settings = config.robustness
    exact = partial(_classifier, batch_size=settings.batch_size, exact=True)
    findings = check_gradients(
        exact(trained),
        examples,
        norm=settings.norm,
        epsilon=max(settings.epsilons),
        seed=config.seed,
        surrogate=exact(surrogate) if surrogate else None,
    )
    flagged = [finding for finding in findings if finding.flagged]
    say(f"self-check: {len(flagged)} of {len(findings)} checks find signs of masked gradients")
    for finding in findings:
        mark = "DOUBT" if finding.flagged else "ok"
        say(f"  {mark:5} {finding.name:15} {finding.what}  n={finding.count}")
    return [dataclasses.asdict(finding) | {"flagged": finding.flagged} for finding in findings]


def _attacked_pictures(
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
        "epsilon": robust.show_epsilon(epsilon, record["norm"]),
        "image": before["image"],
        "attacked": after["image"],
        "label": some.labels,
        "before": softmax(before["logits"]),
        "after": softmax(after["logits"]),
    }
