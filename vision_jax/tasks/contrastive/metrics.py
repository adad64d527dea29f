"""The signs of a collapse of contrastive learning in the metrics of training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vision_jax.tasks.collapse import AGREE, RATE, UNIFORM

HOT = 2.0  # a temperature at which even the best views are hardly told from others


@dataclass(frozen=True)
class Watch:
    """What a collapse would be of, and when it is looked for.

    Attributes:
      images: of a batch, or of a micro-batch.
      temperature: of the loss.
      warn_after: updates before anything is said.
      warmup_steps: of the learning rate, in which nothing need be learned yet.
      stop: whether a collapse ends the run.
    """

    names: ClassVar[tuple[str, ...]] = ("loss", "agreement", "projection_spread")
    section: ClassVar[str] = "contrastive"

    images: int
    temperature: float
    warn_after: int
    warmup_steps: int
    stop: bool

    def diagnose(self, means: Mapping[str, float], step: int) -> str:
        """What has collapsed, and why it may have, of metrics that are means; "" if nothing has.

        Examples:
          >>> watch = Watch(32, 0.5, 100, 50, False)
          >>> watch.diagnose({"loss": 3.1, "agreement": 0.8, "projection_spread": 0.9}, 400)
          ''
          >>> watch.diagnose({"loss": 4.14, "agreement": 1.0, "projection_spread": 0.001}, 400)[:50]
          'collapse: the projections of all images agree (spr'
        """
        most = math.log(2 * self.images - 1)
        if means["projection_spread"] < AGREE:
            found = f"(spread {means['projection_spread']:.4f}, {self._at(means['loss'], most)})"
            return f"collapse: the projections of all images agree {found}: {RATE}"
        if step < self.warmup_steps + self.warn_after or means["loss"] < UNIFORM * most:
            return ""
        cause = (
            "two views of an image have too little in common: set config.contrastive.scale to "
            "larger crops, or config.contrastive.jitter lower"
        )
        if self.temperature > HOT:
            cause = (
                f"the temperature {self.temperature:g} is too high: set "
                "config.contrastive.temperature to 0.5 or less"
            )
        elif means["agreement"] > 1 - AGREE:
            cause = RATE
        return f"collapse: views are not told apart ({self._at(means['loss'], most)}): {cause}"

    def _at(self, loss: float, most: float) -> str:
        return f"loss {loss:.4f}, log(2N - 1) {most:.4f}"
