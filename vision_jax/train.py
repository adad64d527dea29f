"""The training loop. There is one, and this is it.

    config -> data, model, parameters -> step -> loop -> evaluation, figures, adapter, merged model

Everything written goes to the workdir. Running the same command again continues from the last
checkpoint: the order of the data and all keys are functions of (seed, step), so an interrupted run
ends with parameters bit-identical to those of an uninterrupted one.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vision_jax import machine, memory, processes, replicas, sharding, steps, store
from vision_jax.checkpoints import (
    Checkpoints,
    complete_steps,
    last_complete_step,
    restore_frozen,
    restore_newest,
    set_aside,
)
from vision_jax.config import check_ranges, fields
from vision_jax.convert import remarks
from vision_jax.data.fingerprint import (
    Fingerprint,
    describe_changes,
    digest,
    read_fingerprint,
    take_fingerprint,
)
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import DivergedError, UserError
from vision_jax.logging import (
    PARAMETER_COLUMNS,
    Meter,
    RunLog,
    open_log,
    read_metrics,
    say,
    summarize_parameters,
)
from vision_jax.run import continuation, workdirs
from vision_jax.run.description import Description, find_shrinking, load_description
from vision_jax.run.parameters import backbone_prefix, head_warnings
from vision_jax.run.prepare import Run, prepare
from vision_jax.run.results import write_results
from vision_jax.steps import Flat
from vision_jax.tasks.api import Sampled, find_task

STEPS_BETWEEN_AGREEMENTS = 8  # of several processes on whether to stop: they wait for each other


def run(config: ConfigDict, workdir: Path, start_from: Path | None = None) -> int:
    """Trains, or continues, and evaluates; returns the process's exit code.

    The seven parts stand below in this order.

    Args:
      config: of the run.
      workdir: its folder.
      start_from: the folder of another run, with whose weights a new one begins.

    Raises:
      UserError: bad input, before anything in the workdir is touched, or a run that cannot go on.
    """
    with ExitStack() as resources:  # closes what is open, whatever happens
        facts = _find_facts(config, workdir, start_from, resources)
        prepared, origin = _prepare_run(facts)
        begin = _make_arrays(prepared, facts, origin)
        del origin  # and with it the old run's arrays
        program = _make_program(prepared, facts, begin)
        log, checkpoints = _open_workdir(prepared, facts, begin, resources)
        # Told at once: to close what is open may wait for the others.
        with processes.told(), memory.explained(fields(config)):
            end = _train(prepared, facts, begin, program, log, checkpoints)
            if end.signal:
                return 128 + end.signal
            _finish(prepared, facts, begin, program, log, end)
    return 0


# 1. The facts: what the workdir holds, and the data. ----------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What there is before anything is made.

    Attributes:
      config: of the run.
      workdir: its folder.
      start_from: the folder of another run, or None.
      lock: on the workdir; None on all processes but the first.
      held: the config of the run that the workdir holds and that goes on, or None.
      train_source: the data.
      eval_source: the data of evaluation.
      fingerprint: of the training data.
      notes: what the user should know, gathered until there is a log.
      copy: of the workdir in a store; None without one, and on all processes but the first.
    """

    config: ConfigDict
    workdir: Path
    start_from: Path | None
    lock: workdirs.Lock | None
    held: ConfigDict | None
    train_source: Any
    eval_source: Any
    fingerprint: Fingerprint
    notes: list[str]
    copy: store.Store | None


def _find_facts(
    config: ConfigDict, workdir: Path, start_from: Path | None, resources: ExitStack
) -> _Facts:
    check_ranges(config)
    first = jax.process_index() == 0
    lock = processes.together(
        lambda: resources.enter_context(workdirs.locked(workdir)) if first else None
    )
    copy, fetched = processes.together(
        lambda: _fetch(config, workdir, resources) if first else (None, [])
    )
    held = workdirs.read_held(config, workdir, last_complete_step(workdir))
    train_source, eval_source = find_task(config.task).read_sources(config)
    fingerprint = take_fingerprint(train_source)
    notes = fetched + (workdirs.check_records(workdir) if held is not None else [])
    return _Facts(
        config, workdir, start_from, lock, held, train_source, eval_source, fingerprint, notes, copy
    )


def _fetch(
    config: ConfigDict, workdir: Path, resources: ExitStack
) -> tuple[store.Store | None, list[str]]:
    """(the run's folder in a store, what it has of this run and the workdir lacked)."""
    if not config.store:
        return None, []
    last = last_complete_step(workdir)
    workdirs.read_held(config, workdir, last)  # another run's workdir is left alone
    copy = store.Store(config.store, say)
    resources.callback(copy.close)
    found = copy.fetch(workdir, last, lambda folder, step: workdirs.read_held(config, folder, step))
    return copy, found


# 2. The model, its recipes and its optimizer: the run's own, another run's, or new. ---------------


def _prepare_run(facts: _Facts) -> tuple[Run, continuation.Origin | None]:
    """(the prepared run, the other run that it begins with)."""
    config, workdir, start_from = facts.config, facts.workdir, facts.start_from
    origin = None
    if facts.held is not None:
        recorded = load_description(workdir / workdirs.MODEL_FILE)
        workdirs.check_origin(start_from, recorded.started_from, workdir)
        _check_same_data(facts.train_source, facts.fingerprint, recorded, workdir)
        adapter = workdirs.kept_adapter(config, workdir)
        prepared = prepare(config, description=recorded, adapter=adapter)
        _check_same_teachers(recorded, prepared.description)
    elif start_from is not None:
        origin = continuation.read_origin(config, start_from, workdir)
        facts.notes.extend(origin.notes)
        described = continuation.describe(config, origin, facts.train_source.class_names)
        adapter = workdirs.kept_adapter(config, start_from)
        prepared = prepare(config, description=described, adapter=adapter)
    else:
        prepared = prepare(config, facts.train_source.class_names)
    processes.check_equal("data, model or weights", _seen_by_all(facts, prepared.description))
    _ = prepared.stored  # opened now: a file of another run is refused before anything else
    return prepared, origin


def _seen_by_all(facts: _Facts, description: Description) -> dict[str, Any]:
    """What a process of several must see like the others, by name."""
    if jax.process_count() == 1:
        return {}
    seen: dict[str, Any] = {}
    of_evaluation = take_fingerprint(facts.eval_source)
    for source, fingerprint, name in (
        (facts.train_source, facts.fingerprint, "data.train"),
        (facts.eval_source, of_evaluation, "data.eval"),
    ):
        seen[f"{name}: number of examples"] = len(source)
        seen[f"{name}: class names"] = source.class_names
        for column, words in (
            ("name", "names in their order"),
            ("size", "sizes of files"),
            ("annotations", "annotations"),
        ):
            seen[f"{name}: {words} (sha256)"] = digest({column: fingerprint[column]})[:16]
    return {**seen, **asdict(description)}


def _check_same_data(
    source: Any, fingerprint: Fingerprint, description: Description, workdir: Path
) -> None:
    """Raises UserError if the order of the data could be another one than when the run began."""
    before = read_fingerprint(workdir / workdirs.DATA_FILE)
    changes = describe_changes(before, fingerprint) if before is not None else ""
    if source.class_names != description.class_names:
        changes = "other classes" + (f"; {changes}" if changes else "")
    if changes:
        raise UserError(
            f"{source.name} has changed since this run began: {changes}. Bring it back as it was, "
            f"or give another --workdir, where --from={workdir} begins with this run's weights"
        )


def _check_same_teachers(recorded: Description, now: Description) -> None:
    for (origin, sha256), (_, found) in zip(recorded.teachers, now.teachers, strict=True):
        if found != sha256:
            raise UserError(
                f"{origin} has changed since this run began (sha256 {found[:16]}, was "
                f"{sha256[:16]}): start in another --workdir"
            )


# 3. The parameters: restored, taken over from another run, or imported and initialized. -----------


@dataclass(frozen=True)
class _Begin:
    """Where training begins.

    Attributes:
      step: how many are done.
      state: what the first step takes, and with it the buffers of its arrays.
      frozen: arrays by path.
      lines: where the arrays came from, for the log.
    """

    step: int
    state: steps.TrainState
    frozen: Flat
    lines: Sequence[str]


def _make_arrays(prepared: Run, facts: _Facts, origin: continuation.Origin | None) -> _Begin:
    if facts.held is not None:
        workdir = facts.workdir
        step, state, of_state = restore_newest(workdir, prepared.abstract_state)
        frozen, of_frozen = restore_frozen(workdir, prepared.parameters.abstract()[1])
        facts.notes.extend([*of_state, *of_frozen])
        checkpoint = (workdir / "checkpoints" / str(step)).absolute()
        return _Begin(step, state, frozen, [f"resumed at step {step} from {checkpoint}"])
    if origin is not None:
        state, frozen, of_optimizer = continuation.make_state(prepared, origin)
        started_from = prepared.description.started_from
        return _Begin(0, state, frozen, [f"parameters: those of {started_from}; {of_optimizer}"])
    state, frozen, fresh = prepared.make_arrays()
    return _Begin(0, state, frozen, list(_describe_weights(prepared, fresh)))


def _describe_weights(prepared: Run, fresh: Sequence[str]) -> Iterator[str]:
    """Where a new run's parameters came from, and what a user should know of it."""
    yield from (f"note: {note}" for note in prepared.parameters.tensor.notes)
    weights, description = prepared.weights, prepared.description
    if weights is None:
        yield "parameters: random initialization"
        return
    yield f"parameters: {weights.origin} (sha256 {weights.sha256[:16]})"
    yield from remarks(weights, description.assumed)
    if (shrinking := find_shrinking(prepared.config, weights)) is not None:
        yield f"taken of them: {shrinking.line()}"
    if prefix := backbone_prefix(weights, prepared.model):
        yield f"the weights are those of {prefix}*; {len(fresh)} other arrays begin at random"
    else:
        yield f"re-initialized as config.model.reinitialize says: {', '.join(fresh) or 'none'}"
    for warning in head_warnings(weights, prepared.model, description, fresh, prepared.parameters):
        yield f"warning: {warning}"


# 4. The step, compiled at its first call, and its batches. ----------------------------------------


@dataclass(frozen=True)
class _Program:
    """What the loop calls.

    Attributes:
      train_step: (state, batch) -> (state, metrics); the state is donated.
      next_batch: the batch of the step of this number, on the devices; to be called in their order.
      evaluate: state -> Evaluation.
      damage: the damaged images that were met.
      fixed: what the step takes beside the state and the batch.
    """

    train_step: Callable[[steps.TrainState, Any], tuple[steps.TrainState, steps.Metrics]]
    next_batch: Callable[[int], dict[str, jax.Array]]
    evaluate: Callable[[steps.TrainState], Any]
    damage: DamageLog
    fixed: Flat


def _make_program(prepared: Run, facts: _Facts, begin: _Begin) -> _Program:
    damage = DamageLog()
    data = prepared.training_data(facts.train_source, damage, begin.step)
    stored, place = prepared.stored, sharding.make_batch_placer(prepared.mesh)
    frozen = begin.frozen
    fixed = {**frozen, **prepared.place_beside()}
    compiled = machine.compile_apart(prepared.make_train_step(), _tell_memory)
    run_evaluation = prepared.make_evaluate(facts.eval_source)

    def train_step(state: steps.TrainState, batch: Any) -> tuple[steps.TrainState, steps.Metrics]:
        return compiled(state, fixed, batch)

    def next_batch(step: int) -> dict[str, jax.Array]:
        return place({**next(data), **(stored(step) if stored else {})})

    def evaluate(state: steps.TrainState) -> Any:
        trained, statistics = steps.averaged(state)
        return run_evaluation(trained, frozen, statistics)

    return _Program(train_step, next_batch, evaluate, damage, fixed)


def _tell_memory(step: Any, *arguments: Any) -> None:
    if jax.process_index() == 0:
        say(memory.reserved(step, *arguments))


# 5. The workdir, which is written to from here on. ------------------------------------------------


def _open_workdir(
    prepared: Run, facts: _Facts, begin: _Begin, resources: ExitStack
) -> tuple[RunLog, Checkpoints]:
    config, workdir, held, lock = facts.config, facts.workdir, facts.held, facts.lock
    first, task, notes = jax.process_index() == 0, prepared.task, facts.notes
    if lock is not None:
        lock.used = True
        notes.extend([lock.note] if lock.note else [])
        workdirs.remove_drafts(workdir)
    if held is not None:
        notes.extend(processes.together(lambda: set_aside(workdir, begin.step) if first else []))
    if facts.copy is not None:
        facts.copy.begin(workdir, complete_steps)
    checkpoints = resources.enter_context(
        closing(Checkpoints(workdir, task.best_metric(config), task.best_is))
    )
    if held is None:
        checkpoints.save_frozen(begin.frozen)
    if first:
        description, adapter = prepared.description, None if held else prepared.adapter
        workdirs.write_records(workdir, config, held, description, facts.fingerprint, adapter)
    log = resources.enter_context(closing(open_log(workdir, resume_step=begin.step, show=first)))
    _say_beginning(log, prepared, facts, begin)
    return log, checkpoints


def _say_beginning(log: RunLog, prepared: Run, facts: _Facts, begin: _Begin) -> None:
    workdir, train_source, eval_source = facts.workdir, facts.train_source, facts.eval_source
    for note in facts.notes:
        log.say(f"warning: {note}")
    for source in (train_source, eval_source):
        classes = f", {len(source.class_names)} classes" if source.class_names else ""
        log.say(f"data: {source.name}, {len(source)} images{classes}")
        if source.note:
            log.say(f"data: {source.note}")
    for line in begin.lines:
        log.say(line)
    for recipe in prepared.recipes:
        for line in recipe.lines():
            log.say(line)
    log.wrote(workdir / "config.json", "every field of this run's config")
    log.wrote(workdir / "model.json", "architecture, preprocessing and class names")
    log.wrote(workdir / "train_data.json.gz", "names and sizes of the training data")
    log.wrote(workdir / "checksums.json", "of these and of the results")
    if begin.frozen:
        log.wrote(workdir / "frozen", "the frozen parameters")
    log.wrote(workdir / "checkpoints", "the last and the best state")
    if prepared.config.store:
        log.wrote(prepared.config.store, "a copy of this folder")
    if jax.process_index() == 0:
        prepared.task.announce(log, workdir, train_source, eval_source)
    rows = summarize_parameters(*prepared.parameters.abstract())
    log.table("Parameters", PARAMETER_COLUMNS, rows)


# 6. The loop. -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _End:
    """Where training ended.

    Attributes:
      step: how many are done.
      state: after them.
      result: the last Evaluation; None if none was made here.
      signal: the one that stopped it early, 0 for none.
    """

    step: int
    state: steps.TrainState
    result: Any
    signal: int


def _train(
    prepared: Run,
    facts: _Facts,
    begin: _Begin,
    program: _Program,
    log: RunLog,
    checkpoints: Checkpoints,
) -> _End:
    config, step, state, result = facts.config, begin.step, begin.state, None
    figures = _figures_up_to(step, prepared, facts.workdir)
    evaluate_every = config.evaluate.every or -(-len(facts.train_source) // config.batch_size)
    stop = _Stop()
    processes.at(step + 1, processes.START)
    processes.have_patience(config.hosts.patience)
    held = machine.MemoryWatch()
    with stop.watched(), log.progress(config.total_steps, completed=step) as progress:
        make_watch = prepared.plain_objective.make_watch
        watch = make_watch() if make_watch is not None else None
        report = _Reporter(log, progress, config.batch_size, config.log_every, watch)
        if step == 0 and isinstance(prepared.task, Sampled):
            _report_evaluation(log, prepared, facts.workdir, step, program.evaluate(state))
        batch = program.next_batch(step) if step < config.total_steps else {}
        shapes: set[Any] = set()  # of batches that the step is compiled for
        copies = _Copies(config.hosts.compare_every, program.fixed, state)
        pending = None  # the last step and its metrics, read while the next one computes
        while step < config.total_steps and not _has_stalled(figures, prepared):
            shape = tuple((name, batch[name].shape) for name in sorted(batch))
            processes.at(step + 1, processes.STEP if shape in shapes else processes.COMPILE)
            shapes.add(shape)
            state, metrics = program.train_step(state, batch)
            step += 1
            processes.at(step, processes.WAIT)
            if pending is not None:
                copies.check()
                with copies.explained(state):
                    report(*pending)
            pending = (step, metrics)
            copies.start(step, state, batch)
            checkpoints.check()
            held.check()

            finished = step == config.total_steps
            stopping = step % stop.every == 0 and stop.requested()
            # Also before stopping: the resumed run would not know this step's result.
            evaluating = finished or step % evaluate_every == 0
            if stopping or evaluating or step % config.checkpoint_every == 0:
                with copies.explained(state):
                    report(*pending)  # a state that is not finite is never saved
                processes.at(step, processes.COMPARE)
                copies.start(step, state, batch, now=True)
                copies.check()  # nor one that is not the same everywhere
                pending, measured = None, None
                machine.give_back_memory()
                if evaluating:
                    processes.at(step, processes.EVALUATE)
                    result = program.evaluate(state)
                    measured = _report_evaluation(log, prepared, facts.workdir, step, result)
                    figures += (measured or {}).values()
                processes.at(step, processes.SAVE)
                checkpoints.save(step, state, measured)
                machine.give_back_memory()
                report.restart_clock()
            if stopping:
                break
            if not finished:  # while the device computes
                processes.at(step + 1, processes.DATA)
                batch = program.next_batch(step)
                processes.at(step + 1, processes.READY)
                machine.wait_on_cpu(metrics)

    processes.at(step, processes.SAVE)
    _report_damage(log, program.damage, len(facts.train_source))
    checkpoints.wait()
    if step < config.total_steps and not stop.requested():
        log.say(
            f"stopped at step {step}: {config.evaluate.stop_after} evaluations in a row without a "
            "better figure (config.evaluate.stop_after)"
        )
    if stop.requested():
        log.say(
            f"stopped by {signal.Signals(stop.signal).name} at step {step}; the state is saved. "
            "Run the same command again to resume."
        )
    return _End(step, state, result, stop.signal)


def _figures_up_to(step: int, prepared: Run, workdir: Path) -> list[float]:
    """The figure that counts of each evaluation that a resumed run has made, in their order."""
    if step == 0 or not prepared.config.evaluate.stop_after:
        return []
    name = f"eval/{prepared.task.best_metric(prepared.config)}"
    records = read_metrics(workdir / "metrics.jsonl")
    made = {r["step"]: r[name] for r in records if name in r and 0 < r["step"] <= step}
    return [made[at] for at in sorted(made)]


def _has_stalled(figures: Sequence[float], prepared: Run) -> bool:
    """Whether the best of the figures is as many evaluations ago as config.evaluate.stop_after."""
    patience = prepared.config.evaluate.stop_after
    if not patience or len(figures) <= patience:
        return False
    best = max(figures) if prepared.task.best_is == "highest" else min(figures)
    return len(figures) - 1 - list(figures).index(best) >= patience


def _report_evaluation(
    log: RunLog, prepared: Run, workdir: Path, step: int, result: Any
) -> dict[str, float] | None:
    """Shows and logs an evaluation; returns the number by which the best checkpoint is kept."""
    history = read_metrics(workdir / "metrics.jsonl") if jax.process_index() == 0 else []
    values = ((name, result.summary.get(name)) for name in prepared.task.reported)
    log.scalars(step, {f"eval/{n}": v for n, v in values if v is not None})
    log.say(f"step {step}: {result.line()}")
    for warning in result.warnings(step, history):
        log.say(f"warning: {warning}")
    if isinstance(prepared.task, Sampled) and jax.process_index() == 0:
        for file, what in prepared.task.write_samples(workdir, step, result).items():
            log.wrote(workdir / file, what)
    name = prepared.task.best_metric(prepared.config)
    best = result.summary[name]
    return None if best is None else {name: best}


def _report_damage(log: RunLog, damage: DamageLog, images: int) -> None:
    for line in damage.lines:
        log.say(f"skipped a damaged image: {line}")
    if damage.count:
        log.say(f"{damage.count} of {images} training images are damaged")


class _Copies:
    """Compares the copies of all arrays now and then; in a run of one process nothing."""

    def __init__(self, every: int, fixed: Flat, state: steps.TrainState):
        """Compares them before the first step, too."""
        self._every, self._fixed = every if jax.process_count() > 1 else 0, fixed
        self._sums: tuple[int, Any] | None = None  # of the latest comparison, that nobody has read
        self._batch: Any = None  # of the step whose metrics nobody has read
        if self._every:
            tree = self._tree(state)
            self._compare = replicas.make_compare(tree)
            self._layout = jax.tree.map(replicas.Layout, tree)
            self.start(int(state.step), state, None, now=True)
            self.check()

    def _tree(self, state: steps.TrainState) -> Any:
        return {"frozen": self._fixed, "state": state}

    def start(self, step: int, state: steps.TrainState, batch: Any, *, now: bool = False) -> None:
        """Starts to compare the state after this step, if it is its turn; waits for nothing."""
        if self._every:
            self._batch = batch
            if now or step % self._every == 0:
                self._sums = (step, self._compare(self._tree(state)))

    def check(self) -> None:
        """Reads what was started.

        Raises:
          UserError: a copy differs.
        """
        if self._sums is not None:
            (step, sums), self._sums = self._sums, None
            processes.check_replicas(step, self._layout, sums)

    @contextmanager
    def explained(self, state: steps.TrainState) -> Iterator[None]:
        """What is not finite is one process's, if its copies or its batch are not as the others'.

        All processes come here together: they have the same metrics.
        """
        try:
            yield
        except DivergedError as error:
            if self._every:
                batch = self._batch
                self.start(int(state.step), state, None, now=True)
                self.check()
                processes.check_finite(batch, str(error))
            raise


class _Reporter:
    """Reads the metrics of a step, which waits for it, and shows and logs them."""

    def __init__(
        self,
        log: RunLog,
        progress: Meter,
        batch_size: int,
        every: int,
        watch: Callable[[int, Mapping[str, float]], list[str]] | None = None,
    ):
        self._watch = watch
        self._log = log
        self._progress = progress
        self._batch_size = batch_size
        self._every = every
        self._since: tuple[int, float] | None = None  # compilation is left out of the rate
        self._rate = 0.0

    def __call__(self, step: int, metrics: steps.Metrics) -> None:
        """Reports one step.

        Raises:
          DivergedError: its loss or gradient is not finite: the step itself has changed nothing.
          UserError: the objective's watch ends the run.
        """
        values = {name: float(value) for name, value in metrics.items()}
        now = time.monotonic()
        if self._since is None:
            self._since = (step, now)
        elif step > self._since[0]:
            since, then = self._since
            self._rate = self._batch_size * (step - since) / max(now - then, 1e-9)
        finite = values.pop("finite")
        self._progress.update(step, values["loss"], values["learning_rate"], self._rate)
        if step % self._every == 0 or not finite:
            record = {f"train/{name}": value for name, value in values.items()}
            self._log.scalars(step, {**record, "train/images_per_second": self._rate})
        if not finite:
            text = ", ".join(f"{name} {value:g}" for name, value in sorted(values.items()))
            raise DivergedError(
                f"step {step} is not finite ({text}): lower config.optim.lr or set "
                "config.optim.clip_norm, in a new run; --from begins it with the last checkpoint "
                "of this one, which is from before that step"
            )
        for warning in self._watch(step, values) if self._watch is not None else ():
            self._log.say(f"warning: step {step}: {warning}")

    def restart_clock(self) -> None:
        """Leaves what has just happened, an evaluation say, out of the rate."""
        self._since = None
        self._progress.pause()


class _Stop:
    """Turns the first SIGTERM or Ctrl-C into a request to stop; the second one ends the process."""

    def __init__(self) -> None:
        self.signal = 0
        self.every = 1 if jax.process_count() == 1 else STEPS_BETWEEN_AGREEMENTS

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handles the signals inside, restores the old handlers outside."""
        watched = (signal.SIGTERM, signal.SIGINT)
        try:
            before = {number: signal.signal(number, self._receive) for number in watched}
        except ValueError:  # not the main thread, as in a notebook's worker: nothing to handle
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether to stop; all processes ask together and get the same answer."""
        if jax.process_count() == 1:
            return bool(self.signal)
        wanted = np.asarray(multihost_utils.process_allgather(np.int32(self.signal)))
        self.signal = int(wanted.max())
        return bool(self.signal)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)


# 7. The results. ----------------------------------------------------------------------------------


def _finish(
    prepared: Run, facts: _Facts, begin: _Begin, program: _Program, log: RunLog, end: _End
) -> None:
    result = end.result
    processes.at(end.step, processes.RESULTS)
    if result is None:  # this workdir was finished before
        result = program.evaluate(end.state)
        log.say(f"step {end.step}: {result.line()}")
    write_results(prepared, facts.workdir, log, end.state, begin.frozen, result, facts.eval_source)
