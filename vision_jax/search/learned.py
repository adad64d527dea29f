"""Samplers that learn from earlier trials: Optuna's, asked and told in batches.

    seed --ask--> values of a batch --train--> figures --tell, ask--> values of the next batch ...

Optuna's storage keeps trials, but not how far a sampler has drawn random numbers, so a study that
is loaded again draws others. Here nothing but the search's own journal is stored: a sampler made
anew of the same seed, asked and told the same again, is in the same state.
"""

import importlib
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from vision_jax.errors import UserError
from vision_jax.search.space import Choice, Range, Uniform, draw

# (Optuna's class, the packages that it imports when it first draws)
SAMPLERS = {
    "optuna:tpe": ("TPESampler", ()),
    "optuna:gp": ("GPSampler", ("torch",)),
    "optuna:cmaes": ("CmaEsSampler", ("cmaes",)),
}


class Learner(Protocol):
    """A sampler whose draws depend on the figures of earlier trials."""

    def ask(self, count: int) -> list[dict[str, Any]]:
        """The values of so many new trials, by field."""

    def tell(self, figures: Sequence[float | None]) -> None:
        """The metric of each trial that was asked for last; None of one that was not finite."""


def make_learner(
    name: str, space: Mapping[str, Range], seed: int, best_is: Literal["highest", "lowest"]
) -> Learner:
    """The sampler of a name in SAMPLERS.

    - optuna:tpe: tree-structured Parzen estimators (Bergstra et al. 2011); for any space.
    - optuna:gp: a Gaussian process with expected improvement; it needs PyTorch.
    - optuna:cmaes: CMA-ES (Hansen 2016) over the numbers; choices are drawn at random.

    Args:
      name: of the sampler.
      space: the ranges.
      seed: of its draws.
      best_is: what the metric's best is.

    Raises:
      UserError: a package that is not installed, or a space that is not for this sampler.
    """
    if name == "optuna:cmaes" and sum(isinstance(x, Uniform) for x in space.values()) < 2:
        raise UserError(
            "--sampler=optuna:cmaes needs at least two ranges of numbers in --space: "
            "take optuna:tpe"
        )
    return _Optuna(name, space, seed, best_is)


class _Optuna:
    """A sampler of Optuna's over a study in memory."""

    def __init__(
        self,
        name: str,
        space: Mapping[str, Range],
        seed: int,
        best_is: Literal["highest", "lowest"],
    ):
        kind, packages = SAMPLERS[name]
        # What CMA-ES and the process draw at random, choices, it would warn of.
        quiet = {} if kind == "TPESampler" else {"warn_independent_sampling": False}
        try:
            import optuna

            for package in packages:
                importlib.import_module(package)
        except ImportError as error:
            extra = "optuna,torch" if "torch" in packages else "optuna"
            raise UserError(
                f"--sampler={name}: {error}: pip install 'vision_jax[{extra}]'"
            ) from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = getattr(optuna.samplers, kind)(seed=seed, **quiet)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        known = optuna.study.StudyDirection
        direction = known.MAXIMIZE if best_is == "highest" else known.MINIMIZE
        self._study = optuna.create_study(sampler=sampler, direction=direction)
        # To TPE a pruned trial is worse than all that have a figure. The others look at figures
        # alone, and one that has failed is forgotten: they are told the worst so far.
        self._pruned = optuna.trial.TrialState.PRUNED
        self._of_lost = None if kind == "TPESampler" else min if best_is == "highest" else max
        self._told: list[float] = []
        self._space = space
        self._asked: list[Any] = []

    def ask(self, count: int) -> list[dict[str, Any]]:
        """The values of so many new trials; each sees those drawn before it."""
        self._asked, drawn = [], []
        for _ in range(count):
            trial = self._study.ask()
            drawn.append(draw(self._space, partial(_suggest, trial)))
            self._asked.append(trial)
        return drawn

    def tell(self, figures: Sequence[float | None]) -> None:
        """The metric of each trial that was asked for last."""
        self._told += [figure for figure in figures if figure is not None]
        worst = self._of_lost(self._told) if self._of_lost and self._told else None
        for trial, figure in zip(self._asked, figures, strict=True):
            known = worst if figure is None else figure
            if known is None:
                self._study.tell(trial, state=self._pruned)
            else:
                self._study.tell(trial, known)


def _suggest(trial: Any, name: str, one: Uniform | Choice) -> Any:
    if isinstance(one, Choice):  # by place: Optuna's values are numbers and words alone
        return one.values[trial.suggest_categorical(name, range(len(one.values)))]
    if isinstance(one.low, int):
        return trial.suggest_int(name, one.low, one.high, log=one.log)
    return one.held(trial.suggest_float(name, one.low, one.high, log=one.log))
