"""What a search has done, on disk, and who does what: several processes share one folder.

    WORKDIR/journal.jsonl     one JSON object a line, appended and synced
    WORKDIR/locks/NAME        held by the process that works on NAME

No database: a claim is a lock of the operating system's, which it lets go when its process dies. A
line that a killed process left half written is left out; each line begins on a line of its own, so
that the next one is whole all the same. Records are functions of the search, so that work done
twice, after a kill, says the same twice.
"""

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vision_jax.files import lock_file
from vision_jax.logging import explain_write_errors


@dataclass
class Found:
    """What a journal says.

    Attributes:
      evaluations: {trial: {step: {name: value}}}.
      training: the same of the steps' metrics.
      lost: {trial: the step whose loss or gradient was not finite}.
      done: (unit, rung) of what has been done.
      seconds: {trial: CPU time of its share}; not the same of every start.
      drawn: {trial: its values by field}, of a sampler that learns.
    """

    evaluations: dict[int, dict[int, dict[str, float]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    training: dict[int, dict[int, dict[str, float]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    lost: dict[int, int] = field(default_factory=dict)
    done: set[tuple[str, int]] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    drawn: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Journal:
    """The journal of a search in a folder.

    Attributes:
      out: the folder.
    """

    out: Path

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.out / "journal.jsonl"

    def scores(self, event: str, step: int, scores: Mapping[int, Mapping[str, float]]) -> None:
        """Adds numbers of trials at a step; the event is "evaluation", "training" or "lost"."""
        trials = {str(trial): dict(values) for trial, values in scores.items()}
        self._append({"event": event, "step": step, "trials": trials})

    def done(self, unit: str, rung: int, trials: list[int], seconds: float) -> None:
        """Adds that a unit's checkpoint of a rung is on the disk, and its CPU time."""
        self._append(
            {"event": "done", "unit": unit, "rung": rung, "members": trials, "cpu_seconds": seconds}
        )

    def drawn(self, values: Mapping[int, Mapping[str, Any]]) -> None:
        """Adds the values of trials that a sampler that learns has drawn."""
        self._append({"event": "drawn", "trials": {str(t): dict(own) for t, own in values.items()}})

    def _append(self, record: Mapping[str, Any]) -> None:
        line = f"\n{json.dumps(record, allow_nan=False)}\n".encode()
        with explain_write_errors(self.out), self.path.open("ab", buffering=0) as file:
            lock_file(file, wait=True)  # on file systems of the network an append is no unit
            file.seek(0, os.SEEK_END)
            while line:  # of a full disk a part may fit; the rest then raises
                line = line[file.write(line) :]
            os.fsync(file.fileno())

    def read(self) -> Found:
        """All of it, in any order."""
        found = Found()
        if not self.path.is_file():
            return found
        for line in self.path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # of JSON and of UTF-8: half a line
                record = json.loads(line)
                if isinstance(record, dict):
                    _add(found, record)
        return found


def _add(found: Found, record: dict[str, Any]) -> None:
    event, step = record.get("event"), record.get("step", 0)
    if event == "done":
        found.done.add((record["unit"], record["rung"]))
        for trial in record["members"]:
            found.seconds[trial] += record["cpu_seconds"] / len(record["members"])
        return
    for trial, values in record.get("trials", {}).items():
        if event == "lost":
            found.lost[int(trial)] = min(step, found.lost.get(int(trial), step))
        elif event == "drawn":
            found.drawn[int(trial)] = values
        elif event in ("evaluation", "training"):
            into = found.evaluations if event == "evaluation" else found.training
            into[int(trial)][step] = values


@contextlib.contextmanager
def claimed(out: Path, name: str, wait: bool = False) -> Iterator[bool]:
    """Whether this process works on NAME: no other one does as long as this lasts.

    Args:
      out: the search's folder.
      name: of what is claimed.
      wait: until nobody else does; then it is True.
    """
    folder = out / "locks"
    with explain_write_errors(out):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("ab")
    with file:
        yield lock_file(file, wait=wait) is not False  # a system without locks has one process
