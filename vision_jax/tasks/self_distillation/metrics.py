"""The signs of a collapse of self-distillation in the metrics of training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vision_jax.tasks.collapse import AGREE, RATE, UNIFORM

FEW = 0.05  # share of log K below which the choices of a whole batch are one
HARD = 0.01  # share of log K below which a choice knows no doubt


@dataclass(frozen=True)
class Watch:
    """What a collapse would be of, and when it is looked for.

    Attributes:
      prototypes: K.
      warn_after: updates before anything is said.
      warmup_steps: of the learning rate, in which nothing need be learned yet.
      student_temperature: of its softmax.
      teacher_temperature: of its softmax, after the warm-up.
      centering: "center" or "sinkhorn".
      center_momentum: of the moving center.
      stop: whether a collapse ends the run.
    """

    names: ClassVar[tuple[str, ...]] = (
        "dino",
        "teacher_entropy",
        "batch_entropy",
        "feature_spread",
    )
    section: ClassVar[str] = "dino"

    prototypes: int
    warn_after: int
    warmup_steps: int
    student_temperature: float
    teacher_temperature: float
    centering: str
    center_momentum: float
    stop: bool

    def diagnose(self, means: Mapping[str, float], step: int) -> str:
        """What has collapsed, and why it may have, of metrics that are means; "" if nothing has.

        Examples:
          >>> watch = Watch(16, 100, 50, 0.1, 0.04, "center", 0.9, False)
          >>> healthy = {"dino": 2.0, "teacher_entropy": 1.0, "batch_entropy": 2.5}
          >>> watch.diagnose({**healthy, "feature_spread": 0.5}, 400)
          ''
          >>> watch.diagnose({**healthy, "feature_spread": 0.001}, 400)[:45]
          'collapse: the features of all images agree (s'
        """
        most = math.log(self.prototypes)
        sure, used = means["teacher_entropy"], means["batch_entropy"]
        if used < FEW * most:
            cause = RATE
            if self.centering == "center" and self.center_momentum >= 1:
                cause = "the center does not move: set config.dino.center_momentum to 0.9"
            return f"collapse: the teacher chooses the same of all (entropy {used:.3f}): {cause}"
        if means["feature_spread"] < AGREE:
            spread = means["feature_spread"]
            return f"collapse: the features of all images agree (spread {spread:.4f}): {RATE}"
        if sure < HARD * most:
            return (
                f"collapse: the teacher knows no doubt (entropy {sure:.4f}): its temperature is "
                "too low: set config.dino.teacher_temperature to 0.04 or more"
            )
        warm = step >= self.warmup_steps + self.warn_after
        if warm and sure > UNIFORM * most and means["dino"] > UNIFORM * most:
            cause = "its temperature is too high: set config.dino.teacher_temperature lower"
            if self.teacher_temperature >= self.student_temperature:
                cause = (
                    f"its temperature {self.teacher_temperature:g} is not below the student's "
                    f"{self.student_temperature:g}: set config.dino.teacher_temperature to 0.04"
                )
            return (
                f"collapse: the teacher makes no choice (loss {means['dino']:.4f}, log K "
                f"{most:.4f}): {cause}"
            )
        return ""
