"""What a search leaves: the table of its trials, and the best one as an ordinary run.

WORKDIR/trials.csv     a line for each trial: its values, how far it came, its figures
WORKDIR/search.json    the settings, and the same table
WORKDIR/best           the workdir of the best trial, with its last checkpoint: train.py goes on
"""

import csv
import io
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from vision_jax import train
from vision_jax.checkpoints import Checkpoints, last_complete_step, restore_newest
from vision_jax.checksums import read_checksums
from vision_jax.config import read_json, write_json
from vision_jax.data.fingerprint import take_fingerprint
from vision_jax.errors import UserError
from vision_jax.files import write_whole
from vision_jax.logging import open_log
from vision_jax.run import workdirs
from vision_jax.search.drive import SETTINGS_FILE
from vision_jax.search.journal import Found
from vision_jax.search.search import Search
from vision_jax.search.space import describe_space
from vision_jax.search.trial import cut, trial_config

TABLE_FILE, BEST = "trials.csv", "best"
CURVES, PARALLEL, PARETO, PAGE = "curves.png", "parallel.png", "pareto.png", "search.html"


@dataclass(frozen=True)
class Row:
    """A trial in the table.

    Attributes:
      trial: its number.
      place: 1 for the best; 0 for one that did not come to the end.
      state: "finished", "stopped" by the scheduler, "running" or "not finite".
      step: the last one with figures.
      values: by field; of a population those that it ended with.
      figures: of the last evaluation.
      bytes: of what trains.
    """

    trial: int
    place: int
    state: str
    step: int
    values: Mapping[str, Any]
    figures: Mapping[str, float]
    bytes: int


def make_table(search: Search, found: Found) -> list[Row]:
    """A row for each trial, in the order of their numbers."""
    curves, rungs = search.curves(found), search.schedule.rungs
    places = {t: place for place, t in enumerate(search.schedule.rank(curves, rungs[-1]), 1)}
    values, rows = search.final_values(found), []
    for trial in range(len(search.values)):
        evaluations = found.evaluations.get(trial, {})
        step = max(evaluations, default=0)
        if trial in places:
            state = "finished"
        elif found.lost.get(trial, 0) > step:
            state = "not finite"
        else:
            state = "stopped" if step in rungs else "running"
        rows.append(
            Row(
                trial,
                places.get(trial, 0),
                state,
                step,
                values[trial],
                evaluations.get(step, {}),
                search.bytes_of(trial, values[trial]),
            )
        )
    return rows


def find_best(search: Search, rows: list[Row]) -> Row:
    """The best of those that came to the end.

    Raises:
      UserError: none did.
    """
    if best := next((row for row in rows if row.place == 1), None):
        return best
    raise UserError(
        "no trial came to the end: each had a loss or gradient that was not finite; lower the "
        "rates of --space, or set config.optim.clip_norm"
    )


def write_table(search: Search, found: Found, rows: list[Row]) -> None:
    """trials.csv and search.json."""
    fields, names = list(search.space), list(figure_names(search, rows))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "place", "state", "step", *fields, *names, "trained_bytes"])
    for row in rows:
        own = [row.values[name] for name in fields] + [row.figures.get(n, "") for n in names]
        table.writerow([row.trial, row.place or "", row.state, row.step, *own, row.bytes])
    write_whole(text.getvalue().encode(), search.out / TABLE_FILE)
    record = read_json(search.out / SETTINGS_FILE)
    record |= {
        "groups": [{"trials": group.trials, "numbers": group.numbers} for group in search.groups],
        "trials": [vars(row) for row in rows],
        "cpu_seconds": {str(trial): found.seconds[trial] for trial in sorted(found.seconds)},
    }
    write_json(record, search.out / SETTINGS_FILE)


def figure_names(search: Search, rows: list[Row]) -> list[str]:
    """The figures of the evaluations, the one that counts first."""
    there = {name for row in rows for name in row.figures}
    return [name for name in dict.fromkeys((search.metric, *search.task.reported)) if name in there]


# The best trial -----------------------------------------------------------------------------------


def finish_best(search: Search, found: Found, best: Row) -> int:
    """Makes the best trial an ordinary run, and finishes that; returns its exit code."""
    workdir = search.out / BEST
    config = trial_config(search.config, best.values)
    if "model.safetensors" in read_checksums(workdir):  # which a run writes last
        return 0
    if last_complete_step(workdir) is None:
        _write_workdir(search, found, best, workdir)
    return train.run(config, workdir)


def _write_workdir(search: Search, found: Found, best: Row, workdir: Path) -> None:
    config = trial_config(search.config, best.values)
    prepared, (source, _) = search.prepare(config), search.sources(config)
    _, frozen, _ = prepared.make_arrays()
    state = jax.tree.map(
        jax.device_put, read_state(search, found, best.trial, prepared), prepared.shardings
    )
    with workdirs.locked(workdir) as lock:
        lock.used = True
        history = _history(found, best.trial)
        with closing(open_log(workdir, resume_step=0)) as log:
            for step, values in sorted(history.items()):
                log.scalars(step, values)
        checkpoints = Checkpoints(workdir, search.metric, search.task.best_is)
        with closing(checkpoints):
            checkpoints.save_frozen(frozen)
            fingerprint = take_fingerprint(source)
            workdirs.write_records(
                workdir, config, None, prepared.description, fingerprint, prepared.adapter
            )
            checkpoints.save(best.step, state, {search.metric: best.figures[search.metric]})
            checkpoints.wait()


def read_state(search: Search, found: Found, trial: int, prepared: Any) -> Any:
    """A trial's state at the end of its unit, with the shapes of its run alone."""
    unit = next(unit for unit in search.units if trial in unit.members)
    rung = max(rung for name, rung in found.done if name == unit.name)
    alive = search.survivors(found, rung)
    rows = [member for member in unit.members if member in alive]
    stack = search.stack(unit.group)
    _, state, _ = restore_newest(search.folder(unit, rung), stack.abstract(len(rows)))
    return cut(stack.row(state, rows.index(trial)), prepared.abstract_state)


def _history(found: Found, trial: int) -> dict[int, dict[str, float]]:
    """What metrics.jsonl has of a trial, by step."""
    history: dict[int, dict[str, float]] = {}
    for prefix, records in (("train", found.training), ("eval", found.evaluations)):
        for step, values in records.get(trial, {}).items():
            own = {f"{prefix}/{name}": value for name, value in values.items()}
            history.setdefault(step, {}).update(own)
    return history


# Pictures and the page ----------------------------------------------------------------------------


def write_pictures(search: Search, found: Found, rows: list[Row], best: Row) -> dict[str, str]:
    """PNGs and the page that holds them; returns {file: what it is}."""
    from vision_jax.search import figures  # matplotlib, only where something is drawn

    out, metric = search.out, search.metric
    curves = search.curves(found)
    figures.draw_curves(curves, best.trial, metric, out / CURVES)
    pictures = {f"{metric} by step": out / CURVES}
    measured = [row for row in rows if row.figures.get(metric) is not None]
    scores = [row.figures[metric] for row in measured]
    highest = search.task.best_is == "highest"
    figures.draw_parallel(
        [row.values for row in measured], scores, metric, out / PARALLEL, highest=highest
    )
    pictures["Values of all trials: the better, the nearer to orange, the best one thick"] = (
        out / PARALLEL
    )
    finished = [row for row in measured if row.place]
    costs: dict[str, list[float]] = {
        "bytes of what trains": [row.bytes for row in finished],
        "CPU seconds of its share": [found.seconds.get(row.trial, 0.0) for row in finished],
    }
    if all("pgd_top1" in row.figures for row in finished):
        costs["-top-1 under PGD"] = [-row.figures["pgd_top1"] for row in finished]
    figures.draw_pareto(
        costs,
        [row.figures[metric] for row in finished],
        [row.trial for row in finished],
        metric,
        out / PARETO,
        highest=highest,
    )
    pictures["Finished trials; on the line those that no other beats in both"] = out / PARETO
    _write_page(search, rows, best, pictures)
    return {
        CURVES: f"{metric} by step of each trial",
        PARALLEL: "a line for each trial through its values",
        PARETO: f"{metric} against bytes, CPU time and, where it is measured, robust accuracy",
        PAGE: "all of it in one page",
    }


def _write_page(search: Search, rows: list[Row], best: Row, pictures: dict[str, Path]) -> None:
    from vision_jax.search import figures

    names = figure_names(search, rows)
    order = sorted(rows, key=lambda row: (not row.place, row.place, -row.step, row.trial))
    settings = search.settings
    figures.write_page(
        search.out / PAGE,
        title=f"Search of {len(rows)} trials",
        lines=[
            f"The best is trial {best.trial} with {search.metric} "
            f"{best.figures[search.metric]:.4f}: {words_of(best.values)}. Its run is in "
            f"{search.out / BEST}.",
            f"Sampler {settings.sampler}, scheduler {settings.scheduler}, seed {settings.seed}; "
            f"{search.config.total_steps} steps.",
            *(f"{name}: {words}" for name, words in describe_space(search.space).items()),
        ],
        columns=["trial", "place", "state", "step", *names, *search.space, "bytes"],
        rows=[
            [
                str(row.trial), str(row.place or ""), row.state, str(row.step),
                *(word_of(row.figures.get(name, "")) for name in names),
                *(word_of(row.values[name]) for name in search.space), f"{row.bytes:,}",
            ]
            for row in order
        ],
        classes=["best" if row is best else "" if row.place else "out" for row in order],
        pictures=pictures,
    )  # fmt: skip


def words_of(values: Mapping[str, Any]) -> str:
    """Values of a trial in a line."""
    return ", ".join(f"{name} {word_of(value)}" for name, value in values.items())


def word_of(value: Any) -> str:
    """A value for people, floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
