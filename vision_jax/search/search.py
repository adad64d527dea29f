"""What a search is: its inputs, and what follows from them and the journal. No step runs here.

    config, space, seed --> values of the trials --> groups --> units of at most `together` trials
    curves in the journal --> who goes on from a rung, with which state and numbers

A sampler that learns draws its trials in batches, each from the figures of those before: `draw`
adds what the journal allows. All else is a function of (config, space, settings).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from vision_jax.config import fields
from vision_jax.run.prepare import Run, prepare
from vision_jax.search import learned
from vision_jax.search.journal import Found, Journal
from vision_jax.search.learned import Learner
from vision_jax.search.schedule import Curve, Schedule, make_schedule
from vision_jax.search.space import Range, draw_trials, ends
from vision_jax.search.stack import Stack
from vision_jax.search.trial import (
    RANK,
    Group,
    Values,
    make_groups,
    trained_bytes,
    trial_config,
)
from vision_jax.tasks.api import Task, find_task

MOST_TOGETHER = 16  # unless it is asked for: more would share little more


@dataclass(frozen=True)
class Settings:
    """What a search does, beside its config and space.

    Attributes:
      trials: how many, at most.
      sampler: one of space.SAMPLERS or learned.SAMPLERS.
      scheduler: one of schedule.SCHEDULERS.
      rungs, keep: see schedule.make_schedule.
      seed: of the draws.
      together: the most trials of one program, and the trials of a batch of a sampler that learns.
    """

    trials: int = 32
    sampler: str = "random"
    scheduler: str = "none"
    rungs: int = 2
    keep: float = 1 / 3
    seed: int = 0
    together: int = MOST_TOGETHER


@dataclass(frozen=True)
class Unit:
    """Trials whose states lie in one checkpoint.

    Attributes:
      name: of its folder and its lock.
      group: the trials that share its program.
      members: its trials.
    """

    name: str
    group: Group
    members: tuple[int, ...]


@dataclass(frozen=True)
class Search:
    """A search, made of its inputs alone.

    Attributes:
      config: what the trials change.
      space: the ranges.
      settings: see there.
      out: its folder.
      at_once: the most trials that a step takes at a time, by memory; None for all of a unit. It
        changes rounding, and nothing that is drawn.
    """

    config: ConfigDict
    space: Mapping[str, Range]
    settings: Settings
    out: Path
    at_once: int | None = None

    @cached_property
    def task(self) -> Task:
        """Of all trials."""
        return find_task(self.config.task)

    @cached_property
    def metric(self) -> str:
        """By which trials are compared."""
        return self.task.best_metric(self.config)

    @cached_property
    def values(self) -> list[dict[str, Any]]:
        """Of each trial drawn so far, by field: of all, unless the sampler learns (see `draw`)."""
        own = self.settings
        if self._learner is not None:
            return []
        return draw_trials(self.space, own.trials, own.sampler, own.seed)

    @cached_property
    def _learner(self) -> Learner | None:
        own = self.settings
        if own.sampler not in learned.SAMPLERS:
            return None
        return learned.make_learner(own.sampler, self.space, own.seed, self.task.best_is)

    def draw(self, found: Found) -> bool:
        """Draws what a sampler that learns can draw by now; whether there are new trials.

        A batch is drawn when all of the one before have ended. Called with the same journal, a new
        search draws the same trials again.
        """
        before, own = len(self.values), self.settings
        while self._learner is not None and len(self.values) < own.trials:
            batch = range(len(self.values))[-own.together :]
            figures = [self._final_figure(found, trial) for trial in batch]
            if any(ended is False for ended in figures):
                break
            if figures:
                self._learner.tell(figures)
            self.values.extend(self._learner.ask(min(own.together, own.trials - len(self.values))))
        return len(self.values) > before

    def _final_figure(self, found: Found, trial: int) -> float | Literal[False] | None:
        """The metric at a trial's end, None without one; False before its end."""
        if trial in found.lost:
            return None
        last = found.evaluations.get(trial, {}).get(self.schedule.rungs[-1])
        return False if last is None else last.get(self.metric)

    @cached_property
    def schedule(self) -> Schedule:
        """When trials are compared."""
        own = self.settings
        return make_schedule(
            own.scheduler, self.config.total_steps, own.rungs, own.keep, self.task.best_is, own.seed
        )

    @property
    def groups(self) -> list[Group]:
        """The trials that share a program, so far; those to come may join them or be others."""
        count = len(self.values)
        if count not in self._groups:
            most_rank = None
            if self._learner is not None and RANK in self.space:  # so that a program stays the same
                most_rank = max(ends(self.space[RANK]))
            self._groups[count] = make_groups(
                self.config, self.values, self.prepare, most_rank, self._needed
            )
        return self._groups[count]

    @cached_property
    def _groups(self) -> dict[int, list[Group]]:
        return {}

    @cached_property
    def _needed(self) -> dict[Any, set[str]]:
        return {}

    @property
    def units(self) -> list[Unit]:
        """The trials whose states lie together: of a sampler that learns, those of a batch."""
        most = self.settings.together
        units = []
        for number, group in enumerate(self.groups):
            batches = [group.trials]
            if self._learner is not None:
                batches = [
                    tuple(own)
                    for _, own in itertools.groupby(group.trials, lambda trial: trial // most)
                ]
            parts = [own[at : at + most] for own in batches for at in range(0, len(own), most)]
            units += [Unit(f"{number}_{n}", group, part) for n, part in enumerate(parts)]
        return units

    @cached_property
    def journal(self) -> Journal:
        """What has been done."""
        return Journal(self.out)

    def with_at_once(self, count: int) -> "Search":
        """The search with a bound on trials at once; what was read and traced is kept."""
        changed = replace(self, at_once=count)
        vars(changed).update(_sources=self._sources, _needed=self._needed, _stacks=self._stacks)
        return changed

    @cached_property
    def _stacks(self) -> dict[int, Stack]:
        return {}

    def stack(self, group: Group) -> Stack:
        """The program of a group."""
        if group.trials[0] not in self._stacks:
            self._stacks[group.trials[0]] = Stack(self.prepare(group.config), group.numbers)
        return self._stacks[group.trials[0]]

    @cached_property
    def _sources(self) -> dict[str, tuple[Any, Any]]:
        return {}

    def sources(self, config: ConfigDict) -> tuple[Any, Any]:
        """The training and evaluation data of a config, read once."""
        key = repr([(n, x) for n, x in fields(config).items() if n.startswith(("data.", "seed"))])
        if key not in self._sources:
            self._sources[key] = self.task.read_sources(config)
        return self._sources[key]

    def prepare(self, config: ConfigDict) -> Run:
        """A run of a trial's or a group's config."""
        return prepare(config, self.sources(config)[0].class_names)

    @cached_property
    def _bytes(self) -> dict[Any, int]:
        return {}

    def bytes_of(self, trial: int, values: Values) -> int:
        """Bytes of what trains in a trial with these values: of its group and its rank."""
        group = next(group for group in self.groups if trial in group.trials)
        changed = {name: x for name, x in values.items() if name == RANK}
        key = group.trials[0], *changed.values()
        if key not in self._bytes:
            run = self.prepare(trial_config(group.config, changed))
            self._bytes[key] = trained_bytes(run)
        return self._bytes[key]

    # What the journal says --------------------------------------------------------------------

    def curves(self, found: Found) -> dict[int, Curve]:
        """The metric by step of each trial."""
        return {
            trial: {
                step: values[self.metric]
                for step, values in sorted(found.evaluations.get(trial, {}).items())
                if values.get(self.metric) is not None
            }
            for trial in range(len(self.values))
        }

    def survivors(self, found: Found, rung: int) -> set[int]:
        """The trials that run up to a rung."""
        if rung == 0 or self.schedule.name == "population":
            return set(range(len(self.values)))
        return set(self.schedule.survivors(self.curves(found), rung - 1))

    def numbers_at(
        self, found: Found, unit: Unit, rung: int
    ) -> tuple[dict[int, int], dict[int, dict[str, Any]]]:
        """What a unit's trials begin a rung with.

        Returns:
          (whose state of the rung before each takes, its values up to this rung)
        """
        sources = {trial: trial for trial in unit.members}
        values = {trial: dict(self.values[trial]) for trial in unit.members}
        if self.schedule.name != "population":
            return sources, values
        curves = self.curves(found)
        for earlier in range(rung):
            numbers = {t: {n: values[t][n] for n in unit.group.numbers} for t in unit.members}
            sources, changed = self.schedule.exploit(
                curves, earlier, unit.members, numbers, self.space
            )
            values = {trial: {**values[trial], **changed[trial]} for trial in unit.members}
        return sources, values

    def final_values(self, found: Found) -> dict[int, dict[str, Any]]:
        """The values that each trial ended with."""
        last = len(self.schedule.rungs) - 1
        return {
            trial: values
            for unit in self.units
            for trial, values in self.numbers_at(found, unit, last)[1].items()
        }

    def folder(self, unit: Unit, rung: int) -> Path:
        """Where a unit's checkpoints of a rung lie."""
        return self.out / "units" / unit.name / str(rung)
