"""What a run says and writes while it goes: the screen, metrics.jsonl and TensorBoard events.

`open_log` gives a `RunLog`; on processes other than the first (`show=False`) it is silent and
touches no file. `metrics.jsonl` has one JSON object a line, `{"step": 10, "time": 1700000000.0,
"train/loss": 0.7}`, with the time in seconds since 1970. JSON has no NaN or infinity: these are
written as the strings "NaN", "Infinity" and "-Infinity", and `read_metrics` gives floats back.
"""

import contextlib
import errno
import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import IO, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from vision_jax.errors import UserError, printable
from vision_jax.event_file import EventFile

SECONDS_BETWEEN_LINES = 10.0  # of progress, when the output is not a terminal
WIDTH_WITHOUT_TERMINAL = 120
STEPS_OF_THE_RATE = 101  # whose median is the present rate
PARAMETER_COLUMNS = ("parameters", "arrays", "numbers", "size", "share")


def open_log(workdir: str | Path, *, resume_step: int, show: bool = True) -> "RunLog":
    """Starts or continues the log of a run in `workdir` (made if absent).

    Args:
      resume_step: the step of the checkpoint that this run continues from. What an interrupted run
        logged after it is dropped, for it will be logged again. 0 starts from nothing, and drops
        everything.
      show: False on processes other than the first.

    Raises:
      UserError: `workdir` cannot be written, or its device is full.
    """
    workdir = Path(workdir)
    if not show:
        return RunLog(workdir, metrics=None, events=None, console=None)
    metrics_path, events_path = workdir / "metrics.jsonl", workdir / "tensorboard"
    with explain_write_errors(workdir):
        events_path.mkdir(parents=True, exist_ok=True)
        _drop_after(metrics_path, resume_step)
        metrics = metrics_path.open("a", encoding="utf-8")
        events = EventFile(events_path, resume_step + 1 if resume_step else 0)

    log = RunLog(workdir, metrics=metrics, events=events, console=_console())
    log.wrote(metrics_path, "metrics, one JSON object a line")
    log.wrote(events_path, "the same metrics for TensorBoard")
    return log


class RunLog:
    """The log of one run; made by `open_log`, ended by `close`."""

    def __init__(
        self,
        workdir: Path,
        *,
        metrics: IO[str] | None,
        events: EventFile | None,
        console: Console | None,
    ):
        self._workdir = workdir
        self._metrics = metrics
        self._events = events
        self._console = console
        self._written: dict[str, str] = {}  # path -> what it is

    def say(self, text: str) -> None:
        """Prints a line; above the progress bar, if there is one."""
        if self._console:
            self._console.print(Text(_lines(text)), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Prints a table, columns of numbers aligned to the right; an empty row draws a line."""
        if not self._console:
            return
        self._console.print(_table(title, columns, rows), "")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends named numbers to metrics.jsonl and to the TensorBoard events, and flushes both.

        Args:
          values: anything that `float()` takes, by name, as `train/loss`.

        Raises:
          UserError: the device is full.
        """
        if self._metrics is None or self._events is None:
            return
        now = time.time()
        floats = {name: float(value) for name, value in values.items()}
        with explain_write_errors(self._workdir):
            self._metrics.write(_line({"step": int(step), "time": now} | floats))
            self._metrics.flush()
            self._events.scalars(int(step), floats, now)

    @contextlib.contextmanager
    def progress(self, total: int, completed: int = 0) -> Iterator["Meter"]:
        """Shows how far a loop is: a bar on a terminal, else a line now and then.

        Args:
          total: the last step.
          completed: the step from which the loop starts.
        """
        if self._console is None:
            yield Meter(total, lambda step, text: None)
        elif self._console.is_terminal:
            bar = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                expand=True,
            )
            with bar:
                task = bar.add_task("", total=total, completed=completed, figures="compiling ...")
                yield Meter(
                    total, lambda step, text: bar.update(task, completed=step, figures=text)
                )
        else:
            yield Meter(total, self._line_now_and_then(total))

    def _line_now_and_then(self, total: int) -> Callable[[int, str], None]:
        last_time = -math.inf

        def show(step: int, text: str) -> None:
            nonlocal last_time
            if step >= total or time.monotonic() - last_time >= SECONDS_BETWEEN_LINES:
                last_time = time.monotonic()
                self.say(f"step {step}/{total}  {text}")

        return show

    def wrote(self, path: str | Path, what: str) -> None:
        """Remembers a file or folder for the list that `close` prints."""
        self._written[str(path)] = what

    def close(self) -> None:
        """Prints the path of everything that was written, and closes the files."""
        if self._metrics is None or self._events is None:
            return
        self.say("Files written:")
        width = max(map(len, self._written), default=0)
        for path, what in self._written.items():
            self.say(f"  {path:{width}}  {what}")
        with explain_write_errors(self._workdir):
            try:
                self._metrics.close()
            finally:
                self._events.close()


@contextlib.contextmanager
def show_progress(
    total: int, *, what: str = "batches", show: bool = True
) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """(advance, say) for what takes long: a bar on a terminal, and lines above it.

    Args:
      total: how often `advance` will be called.
      what: the things that are counted.
      show: False for silence, on other processes than the first.
    """
    console = Console(quiet=not show, highlight=False, soft_wrap=True)
    bar = Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(what),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total)
        yield (
            lambda: bar.advance(task),
            lambda text: bar.console.print(_lines(text), markup=False),
        )


class Meter:
    """Turns the figures of a step into one line of text, with the time left.

    The time left is the steps left at the median of the last ones' times, and as many pauses as
    there have been so far. What is compiled is left out: the first step, which ends before the
    clock starts, other steps that take much longer than most, and the longest of the pauses, which
    is the first evaluation.
    """

    def __init__(self, total: int, show: Callable[[int, str], None]):
        self._total = total
        self._show = show
        self._begun: int | None = None  # the first step that was shown
        self._last = (0, 0.0)  # the latest one, and when
        self._paused = False
        self._steps: deque[float] = deque(maxlen=STEPS_OF_THE_RATE)  # seconds of each
        self._pauses: list[float] = []  # seconds of each

    def update(
        self, step: int, loss: float, learning_rate: float, images_per_second: float
    ) -> None:
        """Shows that `step` steps are done."""
        text = f"loss {loss:.4f}  lr {learning_rate:.2e}  {images_per_second:,.0f} images/s"
        now = time.monotonic()
        if self._begun is None:
            self._begun = step
        elif step > self._last[0]:
            seconds, count = now - self._last[1], step - self._last[0]
            if self._paused:
                self._pauses.append(max(seconds - count * self._of_a_step(), 0.0))
            else:
                self._steps.append(seconds / count)
        self._last, self._paused = (step, now), False
        if self._steps:
            counted = sum(self._pauses) - max(self._pauses, default=0.0)
            pauses = counted / max(len(self._pauses) - 1, 1) * len(self._pauses)
            a_step = self._of_a_step() + pauses / max(step - self._begun, 1)
            text += f"  {_clock((self._total - step) * a_step)} left"
        self._show(step, text)

    def pause(self) -> None:
        """What has happened since the last step, an evaluation say, is no part of the next one."""
        self._paused = True

    def _of_a_step(self) -> float:
        return median(self._steps) if self._steps else 0.0


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a line that a killed run left half written is left
    out, and the strings that stand for NaN and infinities become floats."""
    records = []
    for line in Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # of JSON and of UTF-8
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                numbers = {name: _number(value) for name, value in record.items()}
                records.append({n: value for n, value in numbers.items() if _is_number(value)})
    return records


def summarize_parameters(
    trainable: Mapping[str, Any], frozen: Mapping[str, Any]
) -> list[tuple[str | int, ...]]:
    """Rows for a table with `PARAMETER_COLUMNS`: what trains and what is frozen, each with its sum.

    Arrays whose paths differ only in the number of a block, and that have the same shape and dtype,
    share a row: `block_*/attn/qkv/kernel`, 12 x [192, 576]. The share is of all numbers.

    Args:
      trainable: arrays (or anything with a shape and a dtype) by path.
      frozen: the other parameters, by path.
    """
    everything = sum(map(_size, [*trainable.values(), *frozen.values()]))
    rows: list[tuple[str | int, ...]] = []
    for part, status in ((trainable, "trainable"), (frozen, "frozen")):
        rows.append((status, f"{len(part)} arrays", *_sums(part.values(), everything)))
        for paths in _groups(part):
            shape = str(list(part[paths[0]].shape))
            arrays = shape if len(paths) == 1 else f"{len(paths)} x {shape}"
            sums = _sums([part[path] for path in paths], everything)
            rows.append((f"  {_common_name(paths)}", arrays, *sums))
        rows.append(())
    return rows


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table without any run's log; see RunLog.table."""
    _console().print(_table(title, columns, rows), "")


@contextlib.contextmanager
def live_table() -> Iterator[Callable[[str, Sequence[str], Sequence[Sequence[Any]]], None] | None]:
    """A function (title, columns, rows) that shows a table in place of its last one.

    None where the output is no terminal.
    """
    console = _console()
    if not console.is_terminal:
        yield None
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda *table: live.update(_table(*table), refresh=True)


def say(text: str) -> None:
    """Prints a line without any run's log: names in it can't reach the terminal raw."""
    print(printable(text), flush=True)


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    return console


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
    )
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows if row and row[index] != ""]
        numeric = all(re.match(r"[-+]?[0-9.]", _cell(cell)) for cell in cells)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        if row:
            table.add_row(*(Text(_cell(cell)) for cell in row))
        else:
            table.add_section()
    return table


@contextlib.contextmanager
def explain_write_errors(workdir: str | Path) -> Iterator[None]:
    """Turns what the operating system says about a failed write into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the device that holds {workdir}; "
                "free some and run the same command again to resume"
            ) from error
        raise UserError(
            f"cannot write in {workdir}: {error.strerror or error}; choose another --workdir"
        ) from error


def _drop_after(metrics_path: Path, resume_step: int) -> None:
    """Leaves in metrics.jsonl what was logged up to `resume_step`; nothing if that is 0."""
    if not metrics_path.exists():
        return
    kept = [record for record in read_metrics(metrics_path) if 0 < resume_step >= record["step"]]
    draft = metrics_path.with_suffix(".jsonl.draft")
    with draft.open("w", encoding="utf-8") as file:
        for record in kept:
            file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(metrics_path)  # atomic: a kill leaves the old file or the new one


def _line(record: Mapping[str, float]) -> str:
    """A record as strict JSON and a newline."""
    # json.dumps of a float that is not finite gives NaN, Infinity or -Infinity: here as a string.
    values = {
        name: value if math.isfinite(value) else json.dumps(value) for name, value in record.items()
    }
    return json.dumps(values, allow_nan=False) + "\n"


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    """Whole numbers with thousands separators, others with four digits, the rest as text."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if _is_number(value) else printable(str(value))


def _lines(text: str) -> str:
    """`printable`, line by line."""
    return "\n".join(map(printable, text.split("\n")))


def _clock(seconds: float) -> str:
    """

    Examples:
      >>> _clock(3723.4)
      '1:02:03'
    """
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}"


def _groups(arrays: Mapping[str, Any]) -> list[list[str]]:
    """Paths in their order, those together that differ only in numbers: `block_0`, `block_1`."""
    groups: dict[Any, list[str]] = {}
    for path, array in arrays.items():
        numberless = re.sub(r"_\d+(?=/)", "_*", path)
        groups.setdefault((numberless, tuple(array.shape), str(array.dtype)), []).append(path)
    return list(groups.values())


def _common_name(paths: Sequence[str]) -> str:
    """One name for paths of as many parts; a part in which they differ gets a star for its number.

    Examples:
      >>> _common_name(["stage_1/block_0/kernel", "stage_1/block_1/kernel"])
      'stage_1/block_*/kernel'
    """
    parts = zip(*(path.split("/") for path in paths), strict=True)
    return "/".join(
        part[0] if len(set(part)) == 1 else re.sub(r"_\d+$", "_*", part[0]) for part in parts
    )


def _size(array: Any) -> int:
    return math.prod(array.shape)


def _sums(arrays: Iterable[Any], everything: int) -> tuple[int, str, str]:
    """Of arrays: how many numbers, how much memory, and their share of `everything`."""
    arrays = list(arrays)
    numbers = sum(map(_size, arrays))
    octets = sum(_size(array) * np.dtype(array.dtype).itemsize for array in arrays)
    return numbers, human_size(octets), f"{numbers / everything:.2%}" if everything else ""


def human_size(octets: float) -> str:
    """

    Examples:
      >>> human_size(3 * 2**20)
      '3.0 MiB'
    """
    if octets < 1024:
        return f"{octets} B"
    power = min(4, int(math.log2(octets)) // 10)
    return f"{octets / 1024**power:.1f} {'KMGT'[power - 1]}iB"
