"""Features of held-out images, and the signs of a collapse in the metrics of training."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.errors import UserError
from vision_jax.ops.probe import CHUNK, TEMPERATURE
from vision_jax.ops.self_distillation import effective_rank

RANKED = 2048  # images of which the rank is computed, evenly spread


def summarize(
    features: np.ndarray, labels: np.ndarray, *, num_classes: int, neighbors: int
) -> dict[str, Any]:
    """The figures of a dataset, as plain numbers that JSON can hold.

    Args:
      features: f[N, D].
      labels: i[N].
      num_classes: C.
      neighbors: k of the nearest neighbors; 0 asks none.

    Returns:
      knn: top-1 by the nearest others among the N (see `leave_one_out`), or None.
      rank: see ops.self_distillation.effective_rank.
      count: N.

    Raises:
      UserError: features that are not finite.
    """
    bad = int(np.sum(~np.isfinite(features).all(1)))
    if bad:
        raise UserError(
            f"evaluation: the features are not finite for {bad} of {len(features)} images; the "
            "weights are damaged or training diverged"
        )
    rows = np.unique(np.linspace(0, len(features) - 1, min(RANKED, len(features))).astype(int))
    knn = None
    if neighbors and len(features) > 1:
        found = leave_one_out(features, labels, num_classes=num_classes, neighbors=neighbors)
        knn = float((found == labels).mean())
    return {
        "knn": knn,
        "rank": float(effective_rank(jnp.asarray(features[rows], jnp.float32))),
        "count": len(features),
    }


def leave_one_out(
    features: np.ndarray, labels: np.ndarray, *, num_classes: int, neighbors: int
) -> np.ndarray:
    """Classes i[N] by the votes of each image's nearest others, as ops.probe.knn_predict votes.

    So one labelled set is enough.
    """
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    unit = jnp.asarray(features / np.maximum(norm, 1e-12), jnp.float32)
    classes, most = jnp.asarray(labels, jnp.int32), min(neighbors, len(features) - 1)

    @jax.jit
    def predict(rows):  # i32[n]
        similarity = unit[rows] @ unit.T
        similarity = jnp.where(rows[:, None] == jnp.arange(len(unit))[None], -2, similarity)
        similarity, nearest = jax.lax.top_k(similarity, most)  # [n, k]
        weights = jnp.exp((similarity - similarity[:, :1]) / TEMPERATURE)
        votes = jax.nn.one_hot(classes[nearest], num_classes) * weights[..., None]
        return votes.sum(1).argmax(-1)

    size = min(CHUNK, len(features))
    starts = range(0, len(features), size)
    parts = [np.arange(start, start + size) % len(features) for start in starts]
    return np.concatenate([predict(part) for part in parts])[: len(features)]


# Collapse -----------------------------------------------------------------------------------------

WINDOW = 50  # updates over which metrics are averaged
UNIFORM = 0.998  # share of log K from which on a choice among K is none
FEW = 0.05  # share of log K below which the choices of a whole batch are one
HARD = 0.01  # share of log K below which a choice knows no doubt
AGREE = 0.01  # spread below which features of all images are the same
FALLEN = 0.5  # share of the highest rank
FALLING = 3  # evaluations in a row


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

    prototypes: int
    warn_after: int
    warmup_steps: int
    student_temperature: float
    teacher_temperature: float
    centering: str
    center_momentum: float
    stop: bool

    def begin(self) -> "_Watching":
        """A function (updates done, metrics) -> warnings; each kind of collapse is named once."""
        return _Watching(self)

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
        rate = "the rate is too high: try a tenth of config.optim.lr"
        if used < FEW * most:
            cause = rate
            if self.centering == "center" and self.center_momentum >= 1:
                cause = "the center does not move: set config.dino.center_momentum to 0.9"
            return f"collapse: the teacher chooses the same of all (entropy {used:.3f}): {cause}"
        if means["feature_spread"] < AGREE:
            spread = means["feature_spread"]
            return f"collapse: the features of all images agree (spread {spread:.4f}): {rate}"
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


class _Watching:
    """A run that is watched: the last metrics, and what was said of it."""

    def __init__(self, watch: Watch):
        self._watch = watch
        self._last: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._said: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The warnings after a step.

        Raises:
          UserError: the same, where a collapse is to end the run.
        """
        self._last.append(metrics)
        if step < self._watch.warn_after or len(self._last) < WINDOW:
            return []
        names = ("dino", "teacher_entropy", "batch_entropy", "feature_spread")
        means = {name: sum(m[name] for m in self._last) / WINDOW for name in names}
        found = self._watch.diagnose(means, step)
        kind = found.partition(" (")[0]
        if not found or kind in self._said:
            return []
        self._said.add(kind)
        if self._watch.stop:
            raise UserError(f"step {step}: {found}; in a new run (config.dino.stop ended this one)")
        return [found]


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
        "apart becomes less; try a lower config.optim.lr, or config.dino.koleo_weight 0.1"
    )
