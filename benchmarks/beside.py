"""This package beside a peer: each in a process of its own, by turns. Every table here is made so.

A job has sides, a side is a process: it builds a model, takes its first step, and then takes some
steps whenever it is its turn. Both sides have the same weights, which the peer draws and writes and
ours reads, and the same batch; their first losses must agree before anything is timed. A third
process multiplies two matrices between the turns: the machine's own peak, by JAX, at the same
moment.

CPU time is that of all threads of the side's process, and of processes of its own, so it can be
read where other programs run beside it; wall time can't. Memory is the process's own, by the
kernel's count. `first` is building the program and taking the first step, with nothing cached.
Ratios are the peer's over ours: above 1 we are faster.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

# ("ours.train", keywords): a function of this folder. "environment" among them is the process's.
Call = tuple[str, Mapping[str, Any]]
OURS, MATMUL = "ours", "matmul"
GRACE = 20  # seconds that a turn which has begun may go on for
LIBRARIES = ("jax", "torch", "timm", "transformers", "peft", "torchattacks")
COLUMNS = (
    f"{'side':12}{'CPU-s':>9}{'±':>6}{'wall':>9}{'ratio':>7}{'(of turns)':>13}"
    f"{'GFLOP':>8}{'of peak':>9}{'GB':>7}{'first':>7}{'programs':>9}"
)


@dataclass(frozen=True)
class Side:
    """What a process measures, made by the function that a Call names.

    Attributes:
      step: one step, waited for; its loss, or another number that is the same on all sides.
      facts: what there is to say of it after its steps: flops, trainable, programs ...
    """

    step: Callable[[], float]
    facts: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Job:
    """Attributes:
    name: for people.
    ours: our side.
    peers: the others by name. The first writes the weights.
    tolerance: relative, of the first step's loss.
    """

    name: str
    ours: Call
    peers: Mapping[str, Call]
    tolerance: float = 1e-3


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
      peers: the kinds to measure beside; the first of each job is always there.
      threads: of each side; 0 for all cores.
      rounds: turns of each side.
      seconds: of a turn, at least.
      clock: "cpu" or, where another device computes, "wall": what ratios are of.
      together: sides compile at the same time.
      until: time.monotonic() at which everything ends.
    """

    peers: Sequence[str] = ()
    threads: int = 1
    rounds: int = 7
    seconds: float = 1.0
    clock: str = "cpu"
    together: bool = False
    until: float = float("inf")


# The same batch for every side --------------------------------------------------------------------


def images(count: int, size: int, channels: int = 3) -> np.ndarray:
    """u8[B, H, W, C] of noise in 16 x 16 patches: flat enough that activations stay tame."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 16, 16, channels), np.uint8)
    rows = np.arange(size) * 16 // size
    return coarse[:, rows][:, :, rows]


def labels(count: int, classes: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, classes, count)


def boxes(count: int, each: int = 7) -> np.ndarray:
    """cxcywh of the image's sides, f32[B, each, 4]."""
    center, size = np.random.default_rng(2).uniform(0.3, 0.6, (2, count, each, 2))
    return np.concatenate([center, size], -1).astype(np.float32)


def crowd(count: int, each: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(boxes_xyxy_px f32[B, N, 4] around a few places, scores f32[B, N], labels i64[B, N])."""
    rng = np.random.default_rng(3)
    places = rng.uniform(0, 640, (count, each // 10 + 1, 2))
    center = places[:, rng.integers(places.shape[1], size=each)] + rng.normal(
        0, 8, (count, each, 2)
    )
    size = rng.uniform(20, 120, (count, each, 2)) / 2
    boxes = np.concatenate([center - size, center + size], -1).astype(np.float32)
    score = rng.uniform(size=(count, each)).astype(np.float32)
    return boxes, score, rng.integers(0, classes, (count, each))


# A side's process ---------------------------------------------------------------------------------


class Worker:
    """A side, seen from outside."""

    def __init__(self, call: Call, folder: Path):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, call, folder), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, *arguments: Any, until: float = float("inf")) -> Any:
        """What the process answers.

        Raises:
          RuntimeError: it failed, or was not ready in time.
        """
        self.begin(what, *arguments)
        return self.answer(until)

    def begin(self, what: str, *arguments: Any) -> None:
        """Asks, and leaves the answer for later."""
        self._pipe.send((what, arguments))

    def answer(self, until: float = float("inf")) -> Any:
        left = until - time.monotonic()
        if left < 1e6 and not self._pipe.poll(max(left, 0)):
            raise RuntimeError("not ready in time")
        try:
            good, found = self._pipe.recv()
        except EOFError:
            raise RuntimeError("its process ended, perhaps for lack of memory") from None
        if not good:
            raise RuntimeError(found)
        return found

    def close(self) -> None:
        """Lets the process end, and ends it if it does something else."""
        self._pipe.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()


def _serve(pipe: Any, call: Call, folder: Path) -> None:
    """The life of a side: built when it starts, then one answer for each question."""

    def build() -> dict[str, Callable[..., Any]]:
        name, keywords = call[0], dict(call[1])
        os.environ.update(keywords.pop("environment", {}))
        one_heap = keywords.pop("one_heap", True)
        module, function = name.split(".")
        if module.endswith("ours"):
            from vision_jax import machine

            machine.keep_memory(one_heap)  # as every command does, before JAX is imported
        made = getattr(importlib.import_module(f"benchmarks.{module}"), function)(
            folder, **keywords
        )
        return {
            "steps": partial(_timed, made.step),
            "facts": made.facts,
            "forget": _forget_peak,
        }

    answers: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            found = None
            if not answers:
                answers = build()
            else:
                question = pipe.recv()
                found = answers[question[0]](*question[1])
            pipe.send((True, found))
        except EOFError:
            return
        except Exception as error:
            pipe.send((False, "".join(traceback.format_exception(error))))
            return


def _timed(step: Callable[[], float], times: int) -> dict[str, Any]:
    """CPU and wall seconds of a step, pages that the system filled for it, and its value."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, cpu = time.perf_counter(), _cpu()
    for _ in range(times):
        value = step()
    found = {"wall": time.perf_counter() - wall, "cpu": _cpu() - cpu}
    found["faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    each = {name: figure / times for name, figure in found.items()}
    return {**each, "value": value, "peak_bytes": _peak_bytes()}


def _cpu() -> float:
    """CPU seconds of this process, and of its own ones that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _peak_bytes() -> int:
    """The most memory that the process has held, by the kernel's count; 0 where it has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _forget_peak() -> None:
    """From here on the kernel's count of the most memory begins anew."""
    with suppress(OSError):  # else the peak is that of the whole life
        Path("/proc/self/clear_refs").write_text("5")


# A job --------------------------------------------------------------------------------------------


@contextmanager
def matmul(options: Options, call: Call = ("ours.matmul", {})) -> Iterator[Worker]:
    """The process that measures the machine's peak beside the jobs of a table."""
    set_threads(options.threads)
    worker = Worker(call, Path())
    try:
        worker.answer()
        worker.ask("steps", 1)
        yield worker
    finally:
        worker.close()


def set_threads(threads: int) -> None:
    """For the processes that begin from here on."""
    if threads:
        for name in ("NPROC", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(threads)  # NPROC: of XLA's CPU client


def measure(job: Job, options: Options, peak: Worker) -> list[dict[str, Any]]:
    """A record for each side, ours first.

    Raises:
      RuntimeError: our side, or the one that writes the weights, failed, or they differ.
    """
    peers = [n for i, n in enumerate(job.peers) if i == 0 or n in options.peers]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:

        def start(call: Call) -> Worker:
            worker = Worker(call, Path(name))
            stack.callback(worker.close)
            return worker

        sides = {peers[0]: start(job.peers[peers[0]])}
        sides[peers[0]].answer(options.until)  # the weights are written
        sides |= {OURS: start(job.ours)} | {n: start(job.peers[n]) for n in peers[1:]}
        for side in (OURS, *peers[1:]):
            sides[side].answer(options.until)
        sides = {side: sides[side] for side in (OURS, *peers)}
        first, failed = {}, {}
        for worker in sides.values() if options.together else ():
            worker.begin("steps", 1)
        for side, worker in sides.items():
            if not options.together:
                worker.begin("steps", 1)
            try:
                first[side] = worker.answer(options.until)
            except RuntimeError as error:
                if side in (OURS, peers[0]):
                    raise
                failed[side] = str(error).strip().splitlines()[-1]
        _check_equal(job, {side: found["value"] for side, found in first.items()})

        times = {}
        for side in first:
            again = sides[side].ask("steps", 1, until=options.until)
            times[side] = max(1, round(options.seconds / max(again["wall"], 1e-9)))
            sides[side].ask("forget")
        turns: dict[str, list[dict[str, Any]]] = {side: [] for side in (*first, MATMUL)}
        for number in range(options.rounds):
            if number and time.monotonic() > options.until:
                break
            for side in first:
                taken = sides[side].ask("steps", times[side], until=options.until + GRACE)
                turns[side].append(taken)
            turns[MATMUL].append(peak.ask("steps", 3))
        facts = {side: sides[side].ask("facts") for side in first}
    _check_same("trainable", {n: f["trainable"] for n, f in facts.items() if "trainable" in f})
    flops = peak.ask("facts")["flops"]
    rate = flops / statistics.median(turn[options.clock] for turn in turns[MATMUL])
    return [
        _record(job, side, first[side], turns, options.clock, rate) | facts[side] for side in first
    ] + [{"job": job.name, "side": side, "error": error} for side, error in failed.items()]


def _record(job, side, first, turns, clock, peak) -> dict[str, Any]:
    def of(name: str, figure: str) -> list[float]:
        return [turn[figure] for turn in turns[name]]

    own, ours = of(side, clock), of(OURS, clock)
    middle = statistics.median(own)
    wall = statistics.median(of(side, "wall"))
    ratios = [theirs / one for theirs, one in zip(own, ours, strict=True)]
    return {
        "job": job.name,
        "side": side,
        "clock": clock,
        "cpu": statistics.median(of(side, "cpu")),
        "wall": wall,
        "spread": (max(own) - min(own)) / 2 / middle,
        "ratio": middle / statistics.median(ours),
        "ratios": (min(ratios), max(ratios)),
        "ratio_wall": wall / statistics.median(of(OURS, "wall")),
        "images_per_second": job.ours[1]["batch_size"] / middle,
        "faults": statistics.median(of(side, "faults")),
        "peak_bytes": max(of(side, "peak_bytes")),
        "peak_flops": peak,
        "seconds": middle,
        "first_cpu": first["cpu"],
        "first_wall": first["wall"],
        "first_peak_bytes": first["peak_bytes"],
        "value": first["value"],
        "rounds": len(own),
    }


def _check_equal(job: Job, values: Mapping[str, float]) -> None:
    """Raises RuntimeError if a side computes something else than ours."""
    own = values[OURS]
    for side, value in values.items():
        if not abs(value - own) <= job.tolerance * max(abs(own), abs(value)):
            raise RuntimeError(f"{side} finds {value:.6g} where ours finds {own:.6g}")


def _check_same(what: str, values: Mapping[str, Any]) -> None:
    if len(set(values.values())) > 1:
        raise RuntimeError(f"{what} differs: {dict(values)}")


# The command of a table ---------------------------------------------------------------------------


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags of every table."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--jobs", nargs="+", default=[""], help="those whose name has one of these")
    made.add_argument("--peers", nargs="+", default=[], help="besides eager: compile, channels")
    made.add_argument("--threads", type=int, default=1, help="of each side; 0 takes all cores")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--seconds", type=float, default=1.0, help="of a side's turn, at least")
    made.add_argument("--json", type=Path, help="also write the records here, after each job")
    made.add_argument("--small", action="store_true", help="tiny models: whether it works at all")
    return made


def run(jobs: Sequence[Job], flags: argparse.Namespace) -> int:
    """Measures and prints; 1 if a job failed."""
    options = Options(flags.peers, flags.threads, flags.rounds, flags.seconds)
    report = Report(flags.json, threads=flags.threads)
    with matmul(options) as peak:
        for job in jobs:
            if any(word in job.name for word in flags.jobs):
                report.add(job.name, lambda job=job: measure(job, options, peak))
    return report.failed


@dataclass
class Report:
    """The table on the screen and the records in a file."""

    path: Path | None = None
    threads: int = 1
    records: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0

    def __post_init__(self) -> None:
        print(f"{machine_line(self.threads)}\n\n{COLUMNS}")

    def add(self, name: str, measured: Callable[[], list[dict[str, Any]]]) -> None:
        """Measures a job and says what it found, or why it failed; the next one goes on."""
        print(name, flush=True)
        try:
            found = measured()
        except RuntimeError as error:
            self.failed = 1
            print(f"  failed: {str(error).strip()}", flush=True)
            found = [{"job": name, "error": str(error).strip().splitlines()[-1]}]
        for record in found:
            if "side" in record:
                print(line(record), flush=True)
        self.say(found)

    def say(self, found: Sequence[Mapping[str, Any]]) -> None:
        self.records += map(dict, found)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            about = {"machine": machine_line(self.threads), "records": self.records}
            self.path.write_text(json.dumps(about, indent=1) + "\n")


def line(record: Mapping[str, Any]) -> str:
    """A row of the table."""
    if "error" in record:
        return f"  {record['side']:10}  left out: {record['error'][:90]}"
    low, high = record["ratios"]
    flops, programs = record.get("flops"), record.get("programs")
    share = flops / record["seconds"] / record["peak_flops"] if flops else 0
    return (
        f"  {record['side']:10}{record['cpu']:9.4f}{record['spread']:6.0%}"
        f"{record['wall']:9.4f}{record['ratio']:7.2f}{f'{low:.2f}-{high:.2f}':>13}"
        f"{f'{flops / 1e9:.2f}' if flops else '':>8}{f'{share:.0%}' if flops else '':>9}"
        f"{record.get('device_bytes', record['peak_bytes']) / 1e9:7.2f}"
        f"{record['first_cpu']:7.1f}{programs if programs else '':>9}"
    )


def machine_line(threads: int) -> str:
    """What it ran on and with."""
    libraries = []
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            libraries.append(f"{name} {version(name)}")
    cores = len(os.sched_getaffinity(0))
    used = f"{threads} thread{'s' * (threads > 1)}" if threads else "all threads"
    return f"{platform.machine()}, {used} of {cores} cores; {', '.join(libraries)}"
