"""The signs of a collapse, where a model has learned to tell nothing apart: when, and what to say.

What each loss's signs are stands beside it, in its task's metrics.py.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import jax
import jax.numpy as jnp

from vision_jax.errors import UserError

WINDOW = 50  # updates over which metrics are averaged
UNIFORM = 0.998  # share of log K from which on a choice among K is none
AGREE = 0.01  # spread below which features of all images are the same
FALLEN = 0.5  # share of the highest rank
FALLING = 3  # evaluations in a row
RATE = "the rate is too high: try a tenth of config.optim.lr"


class Watch(Protocol):
    """What a collapse of a loss would be.

    Attributes:
      names: of the metrics that tell.
      section: of the config's fields that the loss has, with `stop`.
      warn_after: updates before anything is said.
      stop: whether a collapse ends the run.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def section(self) -> str: ...
    @property
    def warn_after(self) -> int: ...
    @property
    def stop(self) -> bool: ...
    def diagnose(self, means: Mapping[str, float], step: int) -> str:
        """What has collapsed, and why it may have, of metrics that are means; "" if nothing has."""


class Watching:
    """A run that is watched: the last metrics, and what was said of it."""

    def __init__(self, watch: Watch):
        self._watch = watch
        self._last: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._said: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The warnings after a step; each kind of collapse is named once.

        Raises:
          UserError: the same, where a collapse is to end the run.
        """
        watch = self._watch
        self._last.append(metrics)
        if step < watch.warn_after or len(self._last) < WINDOW:
            return []
        means = {name: sum(m[name] for m in self._last) / WINDOW for name in watch.names}
        found = watch.diagnose(means, step)
        kind = found.partition(" (")[0]
        if not found or kind in self._said:
            return []
        self._said.add(kind)
        if watch.stop:
            field = f"config.{watch.section}.stop"
            raise UserError(f"step {step}: {found}; in a new run ({field} ended this one)")
        return [found]


def spread(features: jax.Array) -> jax.Array:
    """How far unit vectors f[V, B, D] are from each other: 0 where all agree, 1 without a trend."""
    unit = features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return jnp.sqrt(jnp.maximum(1 - (unit.mean(1) ** 2).sum(-1), 0)).mean()


def diagnose_rank(ranks: Sequence[float]) -> str:
    """What to say of the ranks of a run's evaluations, the last one last; "" if nothing.

    Examples:
      >>> diagnose_rank([9.0, 12.0, 11.0, 12.0])
      ''
      >>> diagnose_rank([12.0, 9.0, 6.0, 3.0])[:24]
      'the rank of the features'
    """
    last = list(ranks[-FALLING - 1 :])
    falling = len(last) > FALLING and all(a > b for a, b in pairwise(last))
    if not falling or last[-1] > FALLEN * max(ranks):
        return ""
    return (
        f"the rank of the features falls, from {max(ranks):.1f} to {last[-1]:.1f}: what they tell "
        "apart becomes less; try a lower config.optim.lr"
    )
