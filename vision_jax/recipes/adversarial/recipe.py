"""Adversarial training as a recipe: the fields of a config's section, checked and applied."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vision_jax.config import updates_a_step
from vision_jax.errors import UserError
from vision_jax.objective import Objective
from vision_jax.recipes.adversarial import objective as adversarial
from vision_jax.recipes.recipe import Recipe, StepOptions, Student, mixed_targets


@dataclass(frozen=True)
class Adversarial(Recipe):
    """Training against attacks.

    Attributes:
      method: of adversarial.METHODS.
      threat_model: what an attack may change.
      beta: of trades and mart.
      weight_epsilon: of adversarial weight perturbation; 0 for none.
      accumulate: micro-batches of an update.
      mixed: the field, if any, by which targets have several classes.
      updates: a step, several in free training.
    """

    method: str
    threat_model: adversarial.ThreatModel
    beta: float
    weight_epsilon: float
    accumulate: int
    mixed: str
    updates: int

    def check(self, student: Student) -> None:
        """Raises UserError for what the method can't be combined with."""
        method, threat_model = f"config.adversarial.method {self.method}", self.threat_model
        if threat_model.norm == "linf" and threat_model.epsilon > 1:
            raise UserError(
                f"config.adversarial.epsilon is {threat_model.epsilon:g}, and images are in "
                "[0, 1]: 8 of 255 levels are 0.0314"
            )
        if self.method in ("trades", "mart") and not student.labels_images:
            raise UserError(
                f"{method} compares the classes' probabilities of whole images, and config.task is "
                f"{student.task}: use pgd"
            )
        if self.method == "mart" and self.mixed:
            raise UserError(
                f"{method} weighs the probability of the one true class, and config.{self.mixed} "
                "makes targets of several: set it to 0, or use trades"
            )
        if self.method == "free" and self.accumulate > 1:
            raise UserError(
                f"{method} updates after each backward pass, and config.optim.accumulate is for "
                "one update after several: set it to 1"
            )

    def transform(self, objective: Objective, student: Student) -> Objective:
        """The objective of adversarial training."""
        del student
        return adversarial.make_adversarial(
            objective,
            self.method,
            self.threat_model,
            beta=self.beta,
            weight_epsilon=self.weight_epsilon,
        )

    @property
    def step(self) -> StepOptions:  # type: ignore[override]
        """Free training replays each batch."""
        if self.updates == 1:
            return StepOptions()
        return StepOptions(replay=adversarial.make_replay(self.threat_model, self.updates))


def make(fields: Mapping[str, Any]) -> Adversarial:
    """The recipe of a config's section adversarial."""
    section = {
        name.removeprefix("adversarial."): value
        for name, value in fields.items()
        if name.startswith("adversarial.")
    }
    method = section["method"]
    steps = {"fast": 1, "free": 1}.get(method, section["steps"])
    usual = {"fast": 1.25, "free": 1.0}.get(method, 2.5 / steps)
    threat_model = adversarial.ThreatModel(
        section["norm"],
        section["epsilon"],
        step_size=section["step_size"] or usual,
        steps=steps,
        warmup_steps=section["warmup_steps"],
    )
    return Adversarial(
        method,
        threat_model,
        section["beta"],
        section["weight_epsilon"],
        accumulate=fields["optim.accumulate"],
        mixed=mixed_targets(fields, "label_smoothing", "mixup", "cutmix"),
        updates=updates_a_step(fields),
    )
