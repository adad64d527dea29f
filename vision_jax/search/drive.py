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

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from vision_jax import machine, sharding, steps
from vision_jax.checkpoints import Checkpoints, last_complete_step, restore_newest, set_aside
from vision_jax.config import read_json, write_json
from vision_jax.data.fingerprint import digest, take_fingerprint
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.logging import explain_write_errors, say
from vision_jax.memory import is_out_of_memory
from vision_jax.search import memory
from vision_jax.search.journal import Found, claimed
from vision_jax.search.search import Search, Unit
from vision_jax.search.space import MOST_TRIALS, describe_space
from vision_jax.search.stack import begin
from vision_jax.search.trial import RANK, Group, Values, trial_config

SETTINGS_FILE = "search.json"
SECONDS_BETWEEN_LOOKS = 0.5  # at what other processes have done
Watch = Callable[[Search], None]  # called whenever there are new figures


def run(search: Search, watch: Watch = lambda search: None) -> None:
    """Trains all trials, as far as other processes don't; returns when all are done.

    Raises:
      UserError: the folder holds another search, or a trial that cannot be trained.
    """
    keep_settings(search)
    programs = _Programs(search)
    draw(search)
    while True:
        for rung in range(len(search.schedule.rungs)):
            while left := _left(search, rung):
                for unit in left:
                    with claimed(search.out, unit.name) as ours:
                        if ours and unit in _left(search, rung):
                            _run_unit(search, programs, unit, rung, watch)
                if _left(search, rung):
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        if not draw(search):
            return


def draw(search: Search) -> bool:
    """Draws what a sampler that learns can draw by now; whether there are new trials.

    Raises:
      UserError: it draws others than it has drawn, so that it is another version.
    """
    with claimed(search.out, "draw", wait=True):
        found = search.journal.read()
        if not search.draw(found):
            return False
        drawn = dict(enumerate(search.values))
        for trial, values in found.drawn.items():
            if trial in drawn and (now := json.loads(json.dumps(drawn[trial]))) != values:
                raise UserError(
                    f"{search.out}: trial {trial} was drawn by another version of "
                    f"{search.settings.sampler} ({_differing(values, now)}): go on with that "
                    "version, or give the search another --workdir"
                )
        if new := {trial: own for trial, own in drawn.items() if trial not in found.drawn}:
            search.journal.drawn(new)
    return True


def _left(search: Search, rung: int) -> list[Unit]:
    """The units whose trials have not all come to a rung."""
    found = search.journal.read()
    alive = search.survivors(found, rung)
    return [
        unit
        for unit in search.units
        if (unit.name, rung) not in found.done and alive & set(unit.members)
    ]


def settle(search: Search) -> Search:
    """The search with as many trials at once as the device has room for.

    How many that is stands in the folder from then on: what is free later changes nothing.

    Raises:
      UserError: see keep_settings.
    """
    keep_settings(search)
    with claimed(search.out, "memory", wait=True), explain_write_errors(search.out):
        held = read_json(search.out / SETTINGS_FILE)
        if "at_once" not in held:
            search.draw(Found())
            held["at_once"] = memory.fitting(search, memory.room())
            write_json(held, search.out / SETTINGS_FILE)
    return search.with_at_once(held["at_once"])


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
    if (search.out / "config.json").exists():
        raise UserError(f"{search.out} holds a run: give the search another --workdir")
    with explain_write_errors(search.out):
        search.out.mkdir(parents=True, exist_ok=True)
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
        self._frozen: tuple[Any, Any] = (None, None)
        self._evaluate: dict[Any, Any] = {}
        self._steps: dict[Any, Any] = {}
        self._most: dict[int, int] = {}

    def begin(self, unit: Unit, trials: Sequence[int]) -> tuple[steps.TrainState, Any]:
        """(the first state of these trials, frozen arrays with those of recipes)."""
        stack, values = self._search.stack(unit.group), self._search.values
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
        if self._frozen[0] != unit.group.trials[0]:
            _, frozen = self.begin(unit, unit.members[:1])
            self._frozen = (unit.group.trials[0], frozen)
        return self._frozen[1]

    def evaluate(self, group: Group) -> Any:
        """See Stack.make_evaluate."""
        if group.trials[0] not in self._evaluate:
            source = self._search.sources(group.config)[1]
            self._evaluate[group.trials[0]] = self._search.stack(group).make_evaluate(source)
        return self._evaluate[group.trials[0]]

    def step(self, group: Group) -> Any:
        """The compiled step of a group."""
        if group.trials[0] not in self._steps:
            stack = self._search.stack(group)
            most = self._most.get(group.trials[0], self._search.at_once)
            if most is None or most >= self._search.settings.together:
                program = stack.step
            else:
                program = stack.step_by(most)
            self._steps[group.trials[0]] = machine.compile_apart(program)
        return self._steps[group.trials[0]]

    def halve(self, unit: Unit) -> int | None:
        """Makes a group's step take half as many trials at once; how many, or None below one."""
        first = unit.group.trials[0]
        most = self._most.get(first, min(len(unit.members), self._search.at_once or MOST_TRIALS))
        most //= 2
        if not most:
            return None
        self._most[first] = most
        self._steps.pop(first, None)
        return most


def _run_unit(search: Search, programs: _Programs, unit: Unit, rung: int, watch: Watch) -> None:
    """Takes a unit's surviving trials from one rung to the next.

    Where the device has not the memory, they go on from the last checkpoint in halves.
    """
    while True:
        try:
            return _try_unit(search, programs, unit, rung, watch)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error) or (most := programs.halve(unit)) is None:
                raise
        machine.give_back_memory()  # here the arrays of the failed try are gone
        say(f"the device's memory is full: trials of unit {unit.name} go on {most} at a time")


def _try_unit(search: Search, programs: _Programs, unit: Unit, rung: int, watch: Watch) -> None:
    clock = time.process_time()
    found = search.journal.read()
    alive = search.survivors(found, rung)
    trials = [trial for trial in unit.members if trial in alive]
    sources, values = search.numbers_at(found, unit, rung)
    stack, folder = search.stack(unit.group), search.folder(unit, rung)
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
    stack, journal, end = search.stack(unit.group), search.journal, search.schedule.rungs[rung]
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
