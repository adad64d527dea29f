"""The search: rung by rung, and at each rung unit by unit.

    config, space, seed --> values of the trials --> groups --> units of at most `together` trials
    for each rung: for each unit: its trials' states, from the rung before --steps--> to this rung
    what goes on from a rung is a function of all trials' figures there

A unit is claimed by the process that works on it, others take the next one and wait at the rung for
all. Everything is a function of (config, space, settings): a killed search goes on from each unit's
last checkpoint, and ends with the same figures. This loop is not train.py's: it has no end of its
own, its figures are of many trials, and its result is a workdir with which train.py goes on.

    WORKDIR/search.json                     the settings, and at the end the results
    WORKDIR/journal.jsonl, WORKDIR/locks        see journal.py
    WORKDIR/units/UNIT/RUNG/checkpoints     the state of the unit's trials
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vision_jax import machine, sharding, steps
from vision_jax.checkpoints import Checkpoints, last_complete_step, restore_newest, set_aside
from vision_jax.config import fields, read_json, write_json
from vision_jax.data.fingerprint import digest, take_fingerprint
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.logging import explain_write_errors
from vision_jax.run.prepare import Run, prepare
from vision_jax.search.journal import Found, Journal, claimed
from vision_jax.search.schedule import Curve, Schedule, make_schedule
from vision_jax.search.space import Range, describe_space, draw_trials
from vision_jax.search.stack import Stack, begin
from vision_jax.search.trial import (
    RANK,
    Group,
    Values,
    make_groups,
    trained_bytes,
    trial_config,
)
from vision_jax.tasks.api import Task, find_task

SETTINGS_FILE = "search.json"
SECONDS_BETWEEN_LOOKS = 0.5  # at what other processes have done
Watch = Callable[["Search"], None]  # called whenever there are new figures


@dataclass(frozen=True)
class Settings:
    """What a search does, beside its config and space.

    Attributes:
      trials: how many, at most.
      sampler: one of space.SAMPLERS.
      scheduler: one of schedule.SCHEDULERS.
      rungs, keep: see schedule.make_schedule.
      seed: of the draws.
      together: the most trials of one program.
    """

    trials: int = 32
    sampler: str = "random"
    scheduler: str = "none"
    rungs: int = 2
    keep: float = 1 / 3
    seed: int = 0
    together: int = 16


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
    """

    config: ConfigDict
    space: Mapping[str, Range]
    settings: Settings
    out: Path

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
        """Of each trial, by field, as drawn."""
        settings = self.settings
        return draw_trials(self.space, settings.trials, settings.sampler, settings.seed)

    @cached_property
    def schedule(self) -> Schedule:
        """When trials are compared."""
        own = self.settings
        return make_schedule(
            own.scheduler, self.config.total_steps, own.rungs, own.keep, self.task.best_is, own.seed
        )

    @cached_property
    def groups(self) -> list[Group]:
        """The trials that share a program."""
        return make_groups(self.config, self.values, self.prepare)

    @cached_property
    def units(self) -> list[Unit]:
        """The trials whose states lie together."""
        most = self.settings.together
        return [
            Unit(f"{number}_{start // most}", group, group.trials[start : start + most])
            for number, group in enumerate(self.groups)
            for start in range(0, len(group.trials), most)
        ]

    @cached_property
    def journal(self) -> Journal:
        """What has been done."""
        return Journal(self.out)

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
        key = group.trials, *changed.values()
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


# Running ------------------------------------------------------------------------------------------


def run(search: Search, watch: Watch = lambda search: None) -> None:
    """Trains all trials, as far as other processes don't; returns when all are done.

    Raises:
      UserError: the folder holds another search, or a trial that cannot be trained.
    """
    keep_settings(search)
    programs = _Programs(search)
    for rung in range(len(search.schedule.rungs)):
        while left := _left(search, rung):
            for unit in left:
                with claimed(search.out, unit.name) as ours:
                    if ours and unit in _left(search, rung):
                        _run_unit(search, programs, unit, rung, watch)
            if _left(search, rung):
                time.sleep(SECONDS_BETWEEN_LOOKS)


def _left(search: Search, rung: int) -> list[Unit]:
    """The units whose trials have not all come to a rung."""
    found = search.journal.read()
    alive = search.survivors(found, rung)
    return [
        unit
        for unit in search.units
        if (unit.name, rung) not in found.done and alive & set(unit.members)
    ]


def keep_settings(search: Search) -> None:
    """Writes what the search is, or compares it with what the folder holds.

    Raises:
      UserError: the folder holds another search, or somebody else's files.
    """
    record = {
        "config": search.config.to_dict(),
        "space": describe_space(search.space),
        "settings": asdict(search.settings),
        "sha256": {
            "data": digest(take_fingerprint(search.sources(search.config)[0])),
            "weights": search.prepare(search.config).description.sha256,
        },
    }
    path = search.out / SETTINGS_FILE
    with explain_write_errors(search.out):
        search.out.mkdir(parents=True, exist_ok=True)
        if (search.out / "config.json").exists():
            raise UserError(f"{search.out} holds a run: give the search another --workdir")
        if not path.exists():
            with claimed(search.out, "settings", wait=True):
                if not path.exists():
                    write_json(record, path)
    held = read_json(path)
    for name, now in _json(record).items():
        if held.get(name) != now:
            differing = _differing(held.get(name), now)
            raise UserError(
                f"{search.out} holds another search ({name}: {differing}): give this one another "
                "--workdir, or remove that folder"
            )


def _json(record: Mapping[str, Any]) -> dict[str, Any]:
    """As `read_json` gives what `write_json` wrote."""
    if isinstance(record, dict):
        return {name: _json(value) for name, value in record.items()}
    return tuple(map(_json, record)) if isinstance(record, list | tuple) else record  # type: ignore


def _differing(before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{before!r}, and here {now!r}"
    name = next(n for n in [*now, *before] if before.get(n) != now.get(n))
    return f"{name} {_differing(before.get(name), now.get(name))}"


class _Programs:
    """The compiled programs of a search's groups; arrays of the latest group alone."""

    def __init__(self, search: Search):
        self._search = search
        self._stacks: dict[tuple[int, ...], Stack] = {}
        self._frozen: tuple[Any, Any] = (None, None)
        self._evaluate: dict[Any, Any] = {}
        self._steps: dict[Any, Any] = {}

    def stack(self, group: Group) -> Stack:
        """The program of a group."""
        if group.trials not in self._stacks:
            run = self._search.prepare(group.config)
            self._stacks[group.trials] = Stack(run, group.numbers)
        return self._stacks[group.trials]

    def begin(self, unit: Unit, trials: Sequence[int]) -> tuple[steps.TrainState, Any]:
        """(the first state of these trials, frozen arrays with those of recipes)."""
        stack, values = self.stack(unit.group), self._search.values
        ranks = [values[t].get(RANK) if RANK in stack.names else None for t in trials]
        runs = {
            rank: stack.run
            if rank in (None, unit.group.config.lora.rank)
            else self._search.prepare(trial_config(unit.group.config, {RANK: rank}))
            for rank in dict.fromkeys(ranks)
        }
        return begin(stack, runs, ranks)

    def frozen(self, unit: Unit) -> Any:
        """The frozen arrays of a group."""
        if self._frozen[0] != unit.group.trials:
            _, frozen = self.begin(unit, unit.members[:1])
            self._frozen = (unit.group.trials, frozen)
        return self._frozen[1]

    def evaluate(self, group: Group) -> Any:
        """See Stack.make_evaluate."""
        if group.trials not in self._evaluate:
            source = self._search.sources(group.config)[1]
            self._evaluate[group.trials] = self.stack(group).make_evaluate(source)
        return self._evaluate[group.trials]

    def step(self, group: Group) -> Any:
        """The compiled step of a group."""
        if group.trials not in self._steps:
            self._steps[group.trials] = machine.compile_apart(self.stack(group).step)
        return self._steps[group.trials]


def _run_unit(search: Search, programs: _Programs, unit: Unit, rung: int, watch: Watch) -> None:
    """Takes a unit's surviving trials from one rung to the next."""
    clock = time.process_time()
    found = search.journal.read()
    alive = search.survivors(found, rung)
    trials = [trial for trial in unit.members if trial in alive]
    sources, values = search.numbers_at(found, unit, rung)
    stack, folder = programs.stack(unit.group), search.folder(unit, rung)
    frozen = programs.frozen(unit)
    first = search.schedule.rungs[rung - 1] if rung else 0
    if last_complete_step(folder) is not None:
        _, state, notes = restore_newest(folder, stack.abstract(len(trials)))
        set_aside(folder, int(state.step))
        del notes
    elif rung == 0:
        state, _ = programs.begin(unit, trials)
    else:
        before = search.folder(unit, rung - 1)
        earlier = search.survivors(found, rung - 1)
        rows = [trial for trial in unit.members if trial in earlier]
        _, state, _ = restore_newest(before, stack.abstract(len(rows)))
        state = stack.take(state, [rows.index(sources[trial]) for trial in trials])
    lost = {t for t in trials if first < found.lost.get(t, 0) <= int(state.step)}
    with closing(Checkpoints(folder, search.metric, search.task.best_is)) as checkpoints:
        _train(
            search, programs, unit, trials, [values[t] for t in trials], lost, state, frozen, rung,
            checkpoints, watch,
        )  # fmt: skip
        checkpoints.wait()
    search.journal.done(unit.name, rung, trials, time.process_time() - clock)
    if rung:
        shutil.rmtree(search.folder(unit, rung - 1), ignore_errors=True)
    watch(search)


def _train(
    search: Search,
    programs: _Programs,
    unit: Unit,
    trials: Sequence[int],
    values: Sequence[Values],
    lost: set[int],
    state: steps.TrainState,
    frozen: Any,
    rung: int,
    checkpoints: Checkpoints,
    watch: Watch,
) -> None:
    """The steps up to a rung, their figures in the journal, and the state there."""
    stack, journal, end = programs.stack(unit.group), search.journal, search.schedule.rungs[rung]
    config, run = stack.run.config, stack.run
    source = search.sources(config)[0]
    every = config.evaluate.every or -(-len(source) // config.batch_size)
    train_step, fixed = programs.step(unit.group), {**frozen, **run.place_beside()}
    numbers, place, stored = stack.numbers(values), sharding.make_batch_placer(run.mesh), run.stored
    step = int(state.step)
    data = run.training_data(source, DamageLog(), step)

    def next_batch() -> dict[str, jax.Array]:
        return place({**next(data), **(stored(step) if stored else {})})

    def report(at: int, metrics: Mapping[str, jax.Array]) -> None:
        read = {name: np.asarray(value) for name, value in metrics.items()}
        new = [
            row for row, trial in enumerate(trials) if not read["finite"][row] and trial not in lost
        ]
        if new:
            lost.update(trials[row] for row in new)
            journal.scores("lost", at, {trials[row]: {} for row in new})
        if at % config.log_every == 0:
            names = [name for name in read if name != "finite"]
            journal.scores(
                "training",
                at,
                {
                    trial: {name: float(read[name][row]) for name in names}
                    for row, trial in enumerate(trials)
                    if trial not in lost
                },
            )

    batch = next_batch() if step < end else {}
    pending: tuple[int, Any] | None = None
    while step < end:
        state, metrics = train_step(state, fixed, batch, numbers)
        step += 1
        if pending is not None:
            report(*pending)
        pending = (step, metrics)
        evaluating = step % every == 0 or step == end
        if evaluating or step % config.checkpoint_every == 0:
            report(*pending)
            pending = None
            machine.give_back_memory()
            if evaluating:
                _evaluate(search, programs, unit, trials, lost, state, frozen, numbers, step)
                watch(search)
            checkpoints.save(step, state, None)
            machine.give_back_memory()
        if step < end:
            batch = next_batch()
            machine.wait_on_cpu(metrics)


def _evaluate(
    search: Search,
    programs: _Programs,
    unit: Unit,
    trials: Sequence[int],
    lost: set[int],
    state: steps.TrainState,
    frozen: Any,
    numbers: Mapping[str, Any],
    step: int,
) -> None:
    places = [place for place, trial in enumerate(trials) if trial not in lost]
    results = programs.evaluate(unit.group)(state, frozen, numbers, places) if places else []
    if new := [trials[place] for place, x in zip(places, results, strict=True) if x is None]:
        lost.update(new)
        search.journal.scores("lost", step, {trial: {} for trial in new})
    names = {*search.task.reported, search.metric}
    scores = {
        trials[place]: {
            name: float(value)
            for name in sorted(names)
            if (value := result.summary.get(name)) is not None
        }
        for place, result in zip(places, results, strict=True)
        if result is not None
    }
    search.journal.scores("evaluation", step, scores)
