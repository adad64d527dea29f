"""search: many trials of a config in one program; the best one becomes a run.

WORKDIR/trials.csv     values and figures of each trial
WORKDIR/search.json    the settings and the same table
WORKDIR/best           the best trial, an ordinary workdir
WORKDIR/search.html    pictures and the table in one page
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vision_jax import cost
from vision_jax.config import check_ranges, fields
from vision_jax.errors import UserError
from vision_jax.logging import human_size, live_table, print_table, say
from vision_jax.search import drive, learned, memory, report
from vision_jax.search.journal import Found, claimed
from vision_jax.search.schedule import SCHEDULERS
from vision_jax.search.search import Search, Settings
from vision_jax.search.space import SAMPLERS, describe_space, read_space

SHOWN = 10  # trials in the table on the screen


def run(
    config: ConfigDict,
    workdir: Path,
    space: str | None,
    trials: int | None,
    sampler: str | None,
    scheduler: str | None,
    rungs: int | None,
    keep: float | None,
    seed: int | None,
    together: int | None,
    plan: bool | None,
) -> int:
    """Searches, or goes on searching; returns the exit code.

    Raises:
      UserError: a space or settings that make no search, or a folder that holds another one.
    """
    check_ranges(config)
    if not space:
        raise UserError("--space is missing: a file with get_space(); see docs/search.md")
    _check_used(scheduler or Settings.scheduler, {"rungs": rungs, "keep": keep})
    given = {
        "trials": trials, "sampler": sampler, "scheduler": scheduler, "rungs": rungs, "keep": keep,
        "seed": seed, "together": together,
    }  # fmt: skip
    settings = Settings(**{n: value for n, value in given.items() if value is not None})  # type: ignore[arg-type]
    _check(settings)
    search = Search(config, read_space(space, config), settings, workdir)
    _ = search.schedule, search.values  # refused before anything is read
    if plan:
        search.draw(Found())
        if together is None:
            search = search.with_at_once(memory.fitting(search, memory.room()))
            search.draw(Found())
        for line in plan_lines(search):
            say(line)
        return 0
    return _run(drive.settle(search) if together is None else search)


def _check_used(scheduler: str, given: Mapping[str, float | None]) -> None:
    """Refuses flags that a scheduler would not look at."""
    for name, users in (("rungs", SCHEDULERS[1:]), ("keep", ("halving",))):
        if given[name] is not None and scheduler in SCHEDULERS and scheduler not in users:
            raise UserError(
                f"--{name} is of --scheduler={' or '.join(users)}, and this is {scheduler}: leave "
                "it out, or name another scheduler"
            )


def _check(settings: Settings) -> None:
    if settings.sampler not in (samplers := (*SAMPLERS, *learned.SAMPLERS)):
        raise UserError(
            f"--sampler is {settings.sampler!r}: it must be one of {', '.join(samplers)}"
        )
    if settings.sampler in learned.SAMPLERS and settings.scheduler != "none":
        raise UserError(
            f"--scheduler={settings.scheduler} compares trials that are drawn beforehand, and "
            f"--sampler={settings.sampler} draws them by what earlier ones came to: leave one out"
        )
    if settings.together < 1:
        raise UserError(f"--together is {settings.together}: it must be at least 1")
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"--seed is {settings.seed}: it must be at least 0 and below 2**32")


def _run(search: Search) -> int:
    drive.keep_settings(search)
    drive.draw(search)
    for name, words in describe_space(search.space).items():
        say(f"{name}: {words}")
    for line in _group_lines(search):
        say(line)
    with live_table() as show:
        drive.run(search, _Watch(show))
    with claimed(search.out, "end") as ours:
        if not ours:
            say(f"another process writes the results to {search.out}")
            return 0
        found = search.journal.read()
        rows = report.make_table(search, found)
        report.write_table(search, found, rows)
        best = report.find_best(search, rows)
        print_table(*_table(search, rows))
        say(f"trial {best.trial} is the best: {report.words_of(best.values)}")
        code = report.finish_best(search, found, best)
        files = report.write_pictures(search, found, rows, best)
        say(f"wrote {search.out / report.TABLE_FILE}, values and figures of each trial")
        say(f"wrote {search.out / drive.SETTINGS_FILE}, the settings and the same table")
        for name, what in files.items():
            say(f"wrote {search.out / name}, {what}")
        say(f"wrote {search.out / report.BEST}, the best trial: a workdir of a finished run")
    return code


class _Watch:
    """Shows how the search stands whenever there are new figures: a table, or a line."""

    def __init__(self, show: Callable[..., None] | None):
        self._show = show
        self._said: tuple[int, int] = (0, 0)

    def __call__(self, search: Search) -> None:
        curves = search.curves(search.journal.read())
        reached = {trial: max(curve) for trial, curve in curves.items() if curve}
        if not reached:
            return
        best = search.schedule.rank({t: {0: curves[t][step]} for t, step in reached.items()}, 0)[0]
        figures = sum(map(len, curves.values()))
        if (figures, best) == self._said:
            return
        self._said = (figures, best)
        done = sum(step == search.config.total_steps for step in reached.values())
        if self._show is not None:
            self._show(*_table(search, report.make_table(search, search.journal.read())))
            return
        say(
            f"{done} of {len(curves)} trials finished, {len(reached)} begun; best so far: trial "
            f"{best}, {search.metric} {curves[best][reached[best]]:.4f} at step {reached[best]}"
        )


def _table(
    search: Search, rows: list[report.Row]
) -> tuple[str, Sequence[str], Sequence[Sequence[Any]]]:
    """(title, columns, rows) of the best trials, those that came farthest first."""
    names, sign = report.figure_names(search, rows), 1 if search.task.best_is == "lowest" else -1

    def order(row: report.Row) -> tuple[float, ...]:
        figure = row.figures.get(search.metric, math.inf * sign)
        return not row.place, row.place, -row.step, sign * figure, row.trial

    done = sum(bool(row.place) for row in rows)
    return (
        f"The best of {len(rows)} trials, {done} of them finished",
        ("trial", "state", "step", *names, *search.space),
        [
            (
                row.trial, row.state, row.step, *(row.figures.get(name, "") for name in names),
                *(report.word_of(row.values[name]) for name in search.space),
            )
            for row in sorted(rows, key=order)[:SHOWN]
        ],
    )  # fmt: skip


# The plan -----------------------------------------------------------------------------------------


def _group_lines(search: Search) -> list[str]:
    """Which trials share a program."""
    lines, less = [], search.at_once
    bound = less is not None and less < search.settings.together
    at_once = f", by memory {less} at a time" if bound else ""
    for number, group in enumerate(search.groups):
        fixed = [n for n in search.space if n not in group.numbers]
        values = fields(group.config)
        own = ", ".join(f"{name} {report.word_of(values[name])}" for name in fixed)
        lines.append(
            f"program {number}: {len(group.trials)} trials side by side, at most "
            f"{search.settings.together}{at_once}, over {', '.join(group.numbers) or 'nothing'}"
            + (f"; {own}" if own else "")
        )
    return lines


def _of_room(taken: int) -> str:
    """How that compares with what a step may take on this machine."""
    room = memory.room()
    if room is None:
        return ""
    return f", and there is room for {human_size(room)}"


def plan_lines(search: Search) -> list[str]:
    """What the search would cost, known before anything runs: each program is compiled."""
    lines = [f"{name}: {words}" for name, words in describe_space(search.space).items()]
    lines += _group_lines(search)
    whole = alone = 0.0
    for number, group in enumerate(search.groups):
        stack = search.stack(group)
        run = stack.run
        frozen = run.parameters.abstract()[1] | run.abstract_beside()
        single = run.make_train_step().lower(run.abstract_state, frozen, run.abstract_batch())
        one = cost.count(single.compile()).flops
        chunks = [len(unit.members) for unit in search.units if unit.group.trials == group.trials]
        counted = {}
        for count in set(chunks):
            compiled = stack.lower(count).compile()
            taken = memory.step_bytes(compiled)
            counted[count] = cost.count(compiled).flops
            lines.append(
                f"program {number}: a step of {count} trials {counted[count] / 1e9:,.2f} GFLOP, of "
                f"{count} runs {count * one / 1e9:,.2f} ({counted[count] / (count * one):.2f}); "
                f"memory of a device {human_size(taken)}{_of_room(taken)}"
            )
        whole += sum(counted[count] for count in chunks)
        alone += sum(chunks) * one
    steps = search.config.total_steps
    drawn, trials = len(search.values), search.settings.trials
    if search.settings.sampler in learned.SAMPLERS and drawn < trials:
        whole, alone = whole * trials / drawn, alone * trials / drawn
        lines.append(f"the first {drawn} of {trials} trials; the others count as much each")
    lines.append(
        f"all trials up to step {steps}: {whole * steps / 1e12:,.2f} TFLOP, as runs "
        f"{alone * steps / 1e12:,.2f} ({whole / alone:.2f}), without evaluations"
    )
    if len(ends := search.schedule.rungs) > 1:
        at = ", ".join(map(str, ends[:-1]))
        lines.append(f"trials are compared at steps {at}, and those that end there cost no more")
    return lines
