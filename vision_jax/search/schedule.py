"""Schedulers: to which step trials go together, and which of them go on from there.

At a rung, a step that all trials of the search have reached or ended at, a scheduler looks at their
figures. Nothing is decided by who came first, so that a search is the same after any kill and on
any number of processes: the halving is the synchronous one of Jamieson and Talwalkar 2016,
https://arxiv.org/abs/1502.07943, whose rungs ASHA takes asynchronously.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, Literal

import numpy as np

from vision_jax.errors import UserError
from vision_jax.search.space import MOST_TRIALS, Range, Uniform

SCHEDULERS = ("none", "halving", "median", "population")
FACTORS = (0.8, 1.25)  # by which a population's numbers are changed
SHOWN = 8  # steps in a message
SHARE_REPLACED = 0.25  # of a population, the worst, by as many of the best

Curve = Mapping[int, float]  # the best metric by step


@dataclass(frozen=True)
class Schedule:
    """When and how a search chooses.

    Attributes:
      name: one of SCHEDULERS.
      rungs: the steps, in their order; the last one ends the search.
      keep: of halving, the share that goes on.
      best_is: whether a trial's best figure is its highest or lowest.
      seed: of the search.
    """

    name: str
    rungs: tuple[int, ...]
    keep: float
    best_is: Literal["highest", "lowest"]
    seed: int

    def rank(self, curves: Mapping[int, Curve], step: int) -> list[int]:
        """The trials that have a figure at a step, the best first; of equal ones the first drawn.

        Examples:
          >>> schedule = make_schedule("none", 9, 1, 0.5, "highest", 0)
          >>> schedule.rank({0: {9: 0.1}, 1: {9: 0.7}, 2: {9: 0.7}, 3: {3: 0.9}}, 9)
          [1, 2, 0]
        """
        sign = -1 if self.best_is == "highest" else 1
        there = [trial for trial, curve in curves.items() if step in curve]
        return sorted(there, key=lambda trial: (sign * curves[trial][step], trial))

    def survivors(self, curves: Mapping[int, Curve], rung: int) -> list[int]:
        """The trials that go on from a rung, in the order of their numbers.

        Args:
          curves: of all trials, as far as they went; those that were lost have no figure there.
          rung: its place in `rungs`.
        """
        ranked = self.rank(curves, self.rungs[rung])
        if self.name == "halving":
            ranked = ranked[: math.ceil(self.keep * len(ranked) - 1e-9)]
        elif self.name == "median":
            ranked = self._above_median(curves, ranked, self.rungs[rung])
        return sorted(ranked)

    def _above_median(
        self, curves: Mapping[int, Curve], trials: Sequence[int], step: int
    ) -> list[int]:
        """Those whose best figure so far is no worse than the median of all means so far.

        (Golovin et al. 2017, "Google Vizier", section 3.2.2.)
        """
        sign = 1 if self.best_is == "highest" else -1

        def so_far(trial: int) -> list[float]:
            return [sign * value for at, value in curves[trial].items() if at <= step]

        if not trials:
            return []
        middle = median(mean(so_far(trial)) for trial in trials)
        return [trial for trial in trials if max(so_far(trial)) >= middle]

    def exploit(
        self,
        curves: Mapping[int, Curve],
        rung: int,
        members: Sequence[int],
        numbers: Mapping[int, Mapping[str, Any]],
        space: Mapping[str, Range],
    ) -> tuple[dict[int, int], dict[int, dict[str, Any]]]:
        """What a population does at a rung (Jaderberg et al. 2017, arXiv:1711.09846).

        The worst quarter takes the states and numbers of the best quarter, pair by pair, and
        changes the numbers: each is multiplied by 0.8 or 1.25 within its range. Whole numbers,
        those of a choice and of a `when` are taken over. A trial without a figure there is among
        the worst.

        Args:
          curves, rung: as above.
          members: trials that may copy each other.
          numbers: of each of them, by field.
          space: of the search.

        Returns:
          (whose state each of them takes, its numbers from here on)
        """
        ranked = self.rank({trial: curves.get(trial, {}) for trial in members}, self.rungs[rung])
        if not ranked:
            return {trial: trial for trial in members}, {t: dict(numbers[t]) for t in members}
        ranked = [*ranked, *(trial for trial in members if trial not in ranked)]
        count = int(SHARE_REPLACED * len(ranked))
        sources = {trial: trial for trial in members}
        changed = {trial: dict(numbers[trial]) for trial in members}
        for best, worst in zip(ranked[:count], reversed(ranked), strict=False):
            sources[worst] = best
            rng = np.random.default_rng([self.seed, MOST_TRIALS + 1, rung, worst])
            changed[worst] = {
                name: _perturbed(value, space[name], rng) for name, value in numbers[best].items()
            }
        return sources, changed


def _perturbed(value: Any, of: Range, rng: np.random.Generator) -> Any:
    factor = FACTORS[int(rng.integers(2))]
    if not isinstance(of, Uniform) or not isinstance(value, float):
        return value
    return of.held(value * factor)


def make_schedule(
    name: str, total: int, rungs: int, keep: float, best_is: Literal["highest", "lowest"], seed: int
) -> Schedule:
    """The schedule of a search.

    Args:
      name: one of SCHEDULERS.
      total: steps of a trial.
      rungs: at which trials are compared before the end; of halving each but the last is at `keep`
        of the next, of the others they are equally spaced.
      keep: of halving, the share of the trials that goes on.
      best_is: see Schedule.
      seed: of the search.

    Examples:
      >>> make_schedule("halving", 90, 2, 1 / 3, "highest", 0).rungs
      (10, 30, 90)
      >>> make_schedule("median", 90, 2, 1 / 3, "highest", 0).rungs
      (30, 60, 90)

    Raises:
      UserError: numbers that make no schedule.
    """
    if name not in SCHEDULERS:
        raise UserError(f"--scheduler is {name!r}: it must be one of {', '.join(SCHEDULERS)}")
    if rungs < 1:
        raise UserError(f"--rungs is {rungs}: it must be at least 1")
    if not 0 < keep < 1:
        raise UserError(f"--keep is {keep:g}: it must be a share between 0 and 1, such as 0.5")
    if name != "none" and rungs >= total:
        raise UserError(f"--rungs is {rungs}: it must be below config.total_steps, {total}")
    if name == "none":
        steps = [total]
    elif name == "halving":
        steps = [round(total * keep**power) for power in range(rungs, -1, -1)]
    else:
        steps = [round(total * part / (rungs + 1)) for part in range(1, rungs + 2)]
    if steps[0] < 1 or len(set(steps)) < len(steps):
        more = ", ..." * (len(steps) > SHOWN)
        raise UserError(
            f"--rungs is {rungs}, and config.total_steps {total}: rungs would be at steps "
            f"{', '.join(map(str, steps[:SHOWN]))}{more}: take fewer"
        )
    return Schedule(name, tuple(steps), keep, best_is, seed)
