"""Why a run of several processes ends: one line, from what is known of each process.

A pure function of reports, so that each fault can be tested without one.
"""

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, fields

from vision_jax.errors import printable
from vision_jax.hosts.board import BAD_INPUT, DATA, NOTHING, QUICK, STOPPED, UNFORESEEN, WORDS

SILENCE = 25.0  # seconds without a sign of life, after which a process or its machine is lost
STANDSTILL = 10.0  # seconds that a process may be stopped
GRACE = 2.0  # seconds for others to say more after the first failure
CONSEQUENCE = SILENCE + 5.0  # of those whose failure may be that of another
LONG = 1800.0  # seconds of compiling, evaluating, saving that others wait
TIMES_USUAL = 10  # a step may take as many times what steps take

# Exit codes. Launchers run the same command again after all of them but BAD.
BAD = 2  # bad input: the same again would end the same
LOST = 75  # sysexits.h's EX_TEMPFAIL: one process or machine was lost or failed, the run resumes

# What collectives and JAX's own service say when somebody else has gone.
_OF_OTHERS = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|coordination|unavailable|deadline_exceeded"
    r"|heartbeat|socket closed|broken pipe|barrier|aborted",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Report:
    """What is known of a process. Ages are in seconds, of the machine that measures them.

    Attributes:
      host: its machine's name.
      silent: since its supervisor was last heard.
      closed: the supervisor's connection has ended.
      still: since the process last said that it lives.
      state: of the process by the kernel: "T" is stopped; "" unknown.
      step: that it works at.
      phase: of board.py.
      age: of the phase.
      usual: of a step, 0 before one was seen.
      patience: that others have with it.
      kind: why it ends, of board.py.
      text: its reason.
      code: exit code once it has ended, negative for a signal; None while it lives.
      ended: since it failed or ended.
    """

    host: str
    silent: float = 0.0
    closed: bool = False
    still: float = 0.0
    state: str = ""
    step: int = 0
    phase: int = 0
    age: float = 0.0
    usual: float = 0.0
    patience: float = 40.0
    kind: int = NOTHING
    text: str = ""
    code: int | None = None
    ended: float = 0.0

    @property
    def fine(self) -> bool:
        """It has ended as it should: done, or saved after a signal."""
        return (
            self.code is not None and self.kind == NOTHING and (self.code == 0 or self.code > 128)
        )

    @property
    def place(self) -> str:
        return f"at step {self.step}, {WORDS[self.phase]}" if self.step else WORDS[self.phase]


@dataclass(frozen=True)
class Verdict:
    """The end of a run.

    Attributes:
      line: host, step and cause.
      code: exit code of all.
      process: whose failure it is; -1 for nobody's alone.
    """

    line: str
    code: int
    process: int


def find_cause(reports: Mapping[int, Report]) -> Verdict | None:
    """Why all must end now, or None: they go on, or more may be known soon.

    Examples:
      >>> find_cause({0: Report("a"), 1: Report("b", step=7, phase=4, closed=True)}).line
      'process 1 (b) is lost: its connection closed; it was at step 7, computing'
    """
    return _lost(reports) or _failed(reports) or _stuck(reports) or _slow(reports)


def _name(process: int, report: Report) -> str:
    return f"process {process} ({report.host})"


def _lost(reports: Mapping[int, Report]) -> Verdict | None:
    """Killed, or its machine gone: whatever others say is its consequence."""
    for process, one in reports.items():
        was = f"it was {one.place}"
        if one.code is not None and one.code < 0:
            name = _signal(-one.code)
            code = 128 - one.code if -one.code in (signal.SIGTERM, signal.SIGINT) else LOST
            hint = " (out of memory?)" if -one.code == signal.SIGKILL else ""
            if one.kind == NOTHING and -one.code != signal.SIGABRT:
                line = f"{_name(process, one)} was killed by {name}{hint}; {was}"
                return Verdict(line, code, process)
        elif one.closed and one.code is None:
            line = f"{_name(process, one)} is lost: its connection closed; {was}"
            return Verdict(line, LOST, process)
        elif one.silent > SILENCE and not one.fine:
            line = f"{_name(process, one)} is lost: no sign of life for {one.silent:.0f} s; {was}"
            return Verdict(line, LOST, process)
    return None


def _failed(reports: Mapping[int, Report]) -> Verdict | None:
    """The first that has failed by itself."""
    failed = {n: one for n, one in reports.items() if _has_failed(one)}
    if not failed:
        return None

    def rank(process: int) -> tuple[bool, bool, float]:
        one = failed[process]
        # An abort is seen after its connections have closed, of which the others may speak first.
        before = GRACE if _has_aborted(one) else 0.0
        return _may_be_of_others(one), one.kind != BAD_INPUT, -one.ended - before

    first = min(failed, key=rank)
    one = failed[first]
    complete = len(failed) == len(reports)
    if not complete and one.ended < (CONSEQUENCE if _may_be_of_others(one) else GRACE):
        return None
    text = one.text or f"ended with code {one.code}, {one.place}"
    code = 1
    if one.code is not None and one.code < 0:
        text, code = one.text or f"was ended by {_signal(-one.code)}, {one.place}", LOST
    elif _may_be_of_others(one):
        code = LOST
    alike = len(reports) > 1 and {other.text for other in reports.values()} == {text}
    named = bool(re.match(r"process \d+ \(", text))
    if one.kind == STOPPED:  # by Ctrl-C, say, before it could save
        code = one.code if one.code is not None and one.code > 128 else 128 + signal.SIGINT
    elif (
        one.kind == BAD_INPUT
    ):  # a disk, a memory: once a run trains, one host's trouble is no input
        code = LOST if one.step and (named or not alike) else BAD
    if alike or named:
        return Verdict(text, code, first)
    at = f", step {one.step}" if one.step else ""
    return Verdict(f"process {first} ({one.host}{at}): {text}", code, first)


def _has_failed(one: Report) -> bool:
    return one.kind != NOTHING or (one.code is not None and not one.fine)


def _has_aborted(one: Report) -> bool:
    return one.code is not None and -one.code == signal.SIGABRT and one.kind == NOTHING


def _may_be_of_others(one: Report) -> bool:
    speaks_of_others = one.kind == UNFORESEEN and bool(_OF_OTHERS.search(one.text))
    return _has_aborted(one) or speaks_of_others


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _stuck(reports: Mapping[int, Report]) -> Verdict | None:
    """Stopped, or one that says nothing any more."""
    for process, one in reports.items():
        if one.code is not None:
            continue
        if one.state == "T" and one.still > STANDSTILL:
            line = f"{_name(process, one)} is stopped (SIGSTOP) since {one.still:.0f} s"
        elif one.still > SILENCE:
            line = f"{_name(process, one)} does not answer since {one.still:.0f} s"
        else:
            continue
        return Verdict(f"{line}; it was {one.place}", LOST, process)
    return None


def _slow(reports: Mapping[int, Report]) -> Verdict | None:
    """The one that all others wait for; or all wait and nobody knows for whom."""
    living = {n: one for n, one in reports.items() if one.code is None}
    if len(reports) < 2 or not living:
        return None
    for process, one in reports.items():  # the others wait for one that has gone
        if (
            one.fine
            and one.ended > SILENCE + GRACE
            and all(o.age > SILENCE and o.phase in QUICK for o in living.values())
        ):
            behind, other = next(iter(living.items()))
            line = f"{_name(process, one)} has ended, and {_name(behind, other)} is {other.place}"
            return Verdict(line, LOST, process)
    last = min(living, key=lambda n: (living[n].step, living[n].phase))
    one = living[last]
    usual = max(o.usual for o in living.values())
    quick = one.phase in QUICK and usual > 0  # else nobody knows how long a step takes
    limit = max(one.patience, TIMES_USUAL * usual) if quick else LONG
    waiting = [o for o in living.values() if (o.step, o.phase) > (one.step, one.phase)]
    if waiting:  # as long as the one that has waited for the longest
        wait = min(one.age, max(o.age for o in waiting))
        if wait <= limit:
            return None
        line = f"{_name(last, one)} is slow: the others wait for {wait:.0f} s, it is {one.place}"
        return Verdict(f"{line} (config.hosts.patience)" if quick else line, LOST, last)
    if one.phase not in QUICK or one.phase == DATA or any(o.age <= limit for o in living.values()):
        return None  # all evaluate, compile or read: that may take hours
    line = (
        f"all processes wait for each other for {one.age:.0f} s, {one.place}: a device or the "
        "network hangs, or config.hosts.patience is too short"
    )
    return Verdict(line, LOST, -1)


def read_report(message: object) -> Report | None:
    """A report as another supervisor has sent it, or None if it is none."""
    if not isinstance(message, dict) or message.keys() != {f.name for f in fields(Report)}:
        return None
    floats = ("silent", "still", "age", "usual", "patience", "ended")
    whole = (("step", 2**63), ("phase", len(WORDS)), ("kind", STOPPED + 1))
    if not (
        all(isinstance(message[n], float | int) and 0 <= message[n] < 1e12 for n in floats)
        and all(type(message[n]) is int and 0 <= message[n] < most for n, most in whole)
        and all(isinstance(message[n], str) for n in ("host", "state", "text"))
        and message["closed"] is False
        and (message["code"] is None or type(message["code"]) is int)
    ):
        return None
    texts = {n: printable(message[n])[:most] for n, most in (("host", 100), ("text", 4096))}
    return Report(**{**message, **texts})


def read_verdict(message: object) -> Verdict | None:
    """A verdict as supervisor 0 has sent it, or None if it is none."""
    if not isinstance(message, dict) or message.keys() != {f.name for f in fields(Verdict)}:
        return None
    line, code, process = message["line"], message["code"], message["process"]
    if not isinstance(line, str) or type(code) is not int or type(process) is not int:
        return None
    return Verdict(printable(line), code if 0 < code < 256 else LOST, process)
