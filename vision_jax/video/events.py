"""What was seen and raised, as JSON lines that survive a kill, a full disk and other rules later.

    OUT/detections.jsonl   what the detector found in each frame, and nothing else
    OUT/rules.toml         the rules, as they were given
    OUT/events.jsonl       what follows from these two: alarms that began and ended

A frame's line is written before what it raises, and is on the disk before an event is. Events are a
function of the frames' lines and the rules, so that a log that was cut anywhere is completed by
computing them again, and `replay` gives the same bytes. Boxes and scores are rounded as they are
written before they are used. Numbers have fixed decimals; times of frames are exact fractions.
"""

import contextlib
import datetime
import hashlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vision_jax.errors import UserError
from vision_jax.files import (
    DRAFT,
    lock_file,
    open_regular,
    parse_json,
    read_bytes,
    write_whole,
)
from vision_jax.video import alarms, track
from vision_jax.video.lines import append, fixed, to_json, whole_lines, writing
from vision_jax.video.rules import YEARS, Rules, check, read_rules, wall_time
from vision_jax.video.schedule import in_schedule

VERSION = 1
DETECTIONS, RULES, EVENTS = "detections.jsonl", "rules.toml", "events.jsonl"
MAX_BOXES = 1_000  # of a frame; distances of all pairs are held at once
MAX_SECONDS = 10**9  # of a frame's time
BOX_DECIMALS, SCORE_DECIMALS = 2, 4  # of pixels; of scores


class Head(NamedTuple):
    """What a log is of.

    Attributes:
      source: its name, without what is secret of it.
      size: (height, width) of the frames.
      class_names: of the detector, by label.
      start: when the first frame was taken, ISO 8601 with its offset from UTC; "" if nobody knows.
      settings: what decides the boxes: the model, the least score, the rate.
    """

    source: str
    size: tuple[int, int]
    class_names: tuple[str, ...]
    start: str = ""
    settings: str = ""


class Logged(NamedTuple):
    """A frame's line.

    Attributes:
      frame: its index.
      time: seconds since the first one.
      boxes_xyxy_px: f64[N, 4].
      scores: f64[N].
      labels: i64[N].
    """

    frame: int
    time: Fraction
    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class Progress(NamedTuple):
    """Between two frames.

    Attributes:
      frame: index of the last one; -1 before the first.
      time: its seconds.
      frames: how many there were.
      tracking: of `track`.
      alarms: of `alarms`.
    """

    frame: int
    time: Fraction
    frames: int
    tracking: track.State
    alarms: alarms.State


def begin() -> Progress:
    """Before the first frame."""
    return Progress(-1, Fraction(0), 0, track.init(), alarms.init())


def step(
    rules: Rules, progress: Progress, logged: Logged
) -> tuple[Progress, list[track.Track], list[dict[str, Any]]]:
    """A frame: (progress, tracks, events). The rules are of `rules.check`."""
    tracking, tracks = track.update(progress.tracking, logged, logged.time, rules.tracking)
    raised, events = alarms.update(rules, progress.alarms, tracks, logged.frame, logged.time)
    after = Progress(logged.frame, logged.time, progress.frames + 1, tracking, raised)
    return after, tracks, events


def finish(rules: Rules, progress: Progress) -> list[dict[str, Any]]:
    """The events of a source's end."""
    _, events = alarms.finish(rules, progress.alarms, progress.frame, progress.time)
    end = {"frame": progress.frame, "time": progress.time, "frames": progress.frames}
    return [*events, {"event": "finish", **end}]


def frame_line(index: int, time: Fraction, found: track.Found) -> str:
    """A frame's line, without its end."""
    boxes = np.asarray(found.boxes_xyxy_px, np.float64).reshape(-1, 4)[:MAX_BOXES].tolist()
    scores = np.asarray(found.scores, np.float64)[:MAX_BOXES].tolist()
    labels = np.asarray(found.labels)[:MAX_BOXES].tolist()
    rows = ", ".join(
        f"[{', '.join(fixed(side, BOX_DECIMALS) for side in box)},"
        f" {fixed(score, SCORE_DECIMALS)}, {label}]"
        for box, score, label in zip(boxes, scores, labels, strict=True)
        if np.isfinite((*box, score)).all()
    )
    return f'{{"frame": {index}, "time": "{time}", "found": [{rows}]}}'


def parse_frame(line: bytes, what: str, classes: int) -> Logged:
    """A frame's line; `what` names it in errors."""
    record = parse_json(line, what)
    try:
        found = record["found"]
        if len(found) > MAX_BOXES:
            raise UserError(f"{what}: {len(found)} boxes in a frame, over {MAX_BOXES}")
        rows = np.array(found, np.float64).reshape(len(found), 6)
        top, _, bottom = record["time"][:64].partition("/")
        time = Fraction(int(top), int(bottom or 1))
        index = record["frame"]
        labels = rows[:, 5].astype(np.int64)
        sound = isinstance(index, int) and index >= 0 and np.isfinite(rows).all()
        if (
            not sound
            or not 0 <= time <= MAX_SECONDS
            or (labels < 0).any()
            or (labels >= classes).any()
        ):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{what} is no frame of a log") from error
    return Logged(index, time, rows[:, :4], rows[:, 4], labels)


def _head_line(head: Head) -> str:
    content = {"version": VERSION, **head._asdict()}
    return to_json({k: list(v) if isinstance(v, tuple) else v for k, v in content.items()})


def _parse_head(line: bytes, path: Path) -> Head:
    record = parse_json(line, f"{path}: its first line")
    try:
        if record["version"] != VERSION:
            raise UserError(f"{path} has version {record['version']}: this program reads {VERSION}")
        height, width = record["size"]
        names = tuple(record["class_names"])
        head = Head(
            record["source"], (height, width), names, record["start"], record.get("settings", "")
        )
        text = [head.source, head.start, head.settings, *names]
        if not all(isinstance(one, str) for one in text):
            raise ValueError
        if not all(isinstance(one, int) and 0 < one <= 2**16 for one in head.size):
            raise ValueError
        start = datetime.datetime.fromisoformat(head.start) if head.start else None
        if start and (start.tzinfo is None or start.year not in YEARS):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is no log of what was seen: its first line says no more"
        ) from error
    return head


def read_head(out: Path) -> Head:
    """The first line of OUT/detections.jsonl.

    Raises:
      UserError: there is none.
    """
    path = out / DETECTIONS
    for _, line, _ in whole_lines(path):
        return _parse_head(line, path)
    raise UserError(f"{path} has no whole line: nothing was seen yet")


def read_frames(out: Path) -> Generator[Logged, None, None]:
    """The frames of a log, in order, up to where it ends or was cut."""
    path = out / DETECTIONS
    classes, last = 0, -1
    for number, line, _ in whole_lines(path):
        if number == 1:
            classes = len(_parse_head(line, path).class_names)
        elif line != END:
            logged = parse_frame(line, f"{path}: line {number}", classes)
            if logged.frame <= last:
                raise UserError(f"{path}: line {number} is of a frame before the one above it")
            last = logged.frame
            yield logged


END = b'{"end": true}'


def _has_ended(out: Path) -> bool:
    path = out / DETECTIONS
    with open_regular(path) as file:
        file.seek(max(path.stat().st_size - len(END) - 2, 0))
        return file.read().endswith(b"\n" + END + b"\n")


def load_rules(out: Path, path: Path | None = None) -> Rules:
    """Rules for a log, checked: those of its folder, or of another file.

    Raises:
      UserError: there is no log, or what `read_rules` and `check` say.
    """
    head = read_head(out)
    start = datetime.datetime.fromisoformat(head.start) if head.start else None
    return check(read_rules(path or out / RULES, head.class_names), head.size, start)


def events_of(out: Path, rules: Rules) -> Iterator[str]:
    """Lines of events.jsonl, without their ends, of what OUT/detections.jsonl and rules say."""
    yield _first_event(read_head(out), rules)
    progress = begin()
    for logged in read_frames(out):
        progress, _, raised = step(rules, progress, logged)
        yield from map(to_json, raised)
    if _has_ended(out):
        yield from map(to_json, finish(rules, progress))


def unmet(out: Path, rules: Rules) -> list[str]:
    """Why rules that raised nothing in all of a log couldn't have: a line for each, for a person.

    No frame was in its schedule; the log is shorter than it wants; nothing of its classes was
    found, or nothing that is sure or large enough. Of "absent" only the first two.

    Args:
      out: the folder of a log and its events.
      rules: of `rules.check`.
    """
    lines = (
        parse_json(line, f"{out / EVENTS}: line {i}") for i, line, _ in whole_lines(out / EVENTS)
    )
    raised = {one["rule"] for one in lines if one["event"] == "start"}
    left = [rule for rule in rules.rules if rule.name not in raised]
    frames = dict.fromkeys([rule.name for rule in left], 0)  # in its schedule
    found = {rule.name: np.zeros(3, np.int64) for rule in left}  # of its classes; sure; large, too
    time = Fraction(0)
    for logged in read_frames(out) if left else ():
        time, now = logged.time, wall_time(rules, logged.time)
        for rule in left:
            if not in_schedule(rule.schedule, now):
                continue
            frames[rule.name] += 1
            own = np.isin(logged.labels, rule.labels)
            sure = own & (logged.scores >= max(rule.score, rules.tracking.high))
            sides = logged.boxes_xyxy_px[:, 2:] - logged.boxes_xyxy_px[:, :2]
            large = sure & (sides >= (rule.min_width, rule.min_height)).all(1)
            found[rule.name] += own.sum(), sure.sum(), large.sum()
    said = []
    for rule in left:
        owned, certain, big = found[rule.name].tolist()
        why = ""
        if rule.schedule and not frames[rule.name]:
            begin, end = wall_time(rules, Fraction(0)), wall_time(rules, time)
            why = (
                f"no frame is in its schedule: they are of {begin:%a %F %H:%M} to {end:%a %F %H:%M}"
            )
        elif frames[rule.name] < rule.on[0]:
            why = f"it wants {rule.on[0]} frames, and there were {frames[rule.name]}"
        elif time < rule.dwell:
            why = f"it wants {float(rule.dwell):g} seconds, and there were {float(time):g}"
        elif rule.kind != "absent" and not big:
            what = "nothing of its classes" if rule.classes else "nothing"
            if owned:
                what += f" with a score of {max(rule.score, rules.tracking.high):g} or more"
            if certain:
                what += f" had {rule.min_width:g} x {rule.min_height:g} pixels or more"
            why = what if certain else f"{what} was found"
        said += [f"rule `{rule.name}` could not be met: {why}"] if why else []
    return said


def _first_event(head: Head, rules: Rules) -> str:
    said = repr((rules.zones, rules.lines, rules.rules, rules.tracking, rules.time_zone))
    start = rules.start.isoformat() if rules.start else ""
    return to_json({
        "event": "watch",
        "version": VERSION,
        "source": head.source,
        "size": list(head.size),
        "start": start,
        "rules": hashlib.sha256(said.encode()).hexdigest()[:16],
    })  # fmt: skip


def replay(out: Path, rules: Path | None = None, to: Path | None = None) -> Path:
    """Computes the events of a log again, and writes them whole.

    Args:
      out: the folder of the log.
      rules: a file of other rules; those of the log by default, which give the same bytes.
      to: another folder, where the log is copied to, with the rules. Other rules need one: what was
        raised, and may have been sent, stays as it is.

    Returns:
      The file of events.

    Raises:
      UserError: what `load_rules` says; `to` has another log; this one is being written.
    """
    checked = load_rules(out, rules)
    other = to is not None and to.resolve() != out.resolve()
    if rules is not None and not other:
        raise UserError(
            f"other rules have events of their own, and {out} keeps those that were raised: name"
            " another folder for them, --to=DIR"
        )
    folder = to if to is not None and other else out
    with _held(out) if not other else contextlib.nullcontext():
        lines = "".join(f"{line}\n" for line in events_of(out, checked))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if other:
            _copy_log(out, folder, rules or out / RULES)
        with writing(folder):
            write_whole(lines.encode(), folder / EVENTS)
    return folder / EVENTS


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """While nobody writes a log."""
    with writing(out), (out / DETECTIONS).open("r+b") as file:
        if lock_file(file) is False:
            raise UserError(f"a process writes the log of {out}: replay it when it has ended")
        yield


def _copy_log(out: Path, to: Path, rules: Path) -> None:
    """The frames of a log and some rules to another folder."""
    path = to / DETECTIONS
    if path.exists() and read_head(to) != read_head(out):
        raise UserError(f"{to} has the log of {read_head(to).source}: name another folder")
    if not path.exists() and (to / EVENTS).exists():
        raise UserError(f"{to} has events of something else: name another folder")
    draft = path.with_name(f"{DETECTIONS}{DRAFT}")
    with writing(to):
        write_whole(read_bytes(rules), to / RULES)
        with draft.open("wb") as file:
            for _, line, _ in whole_lines(out / DETECTIONS):
                append(file, line)
        draft.replace(path)


@dataclass
class Log:
    """Both files of a folder, being written; a context manager.

    Attributes:
      out: the folder.
      detections: its file.
      events: its file.
      classes: how many the detector has.
    """

    out: Path
    detections: BinaryIO
    events: BinaryIO
    classes: int
    synced: bool = True

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which was told already
            os.fsync(self.detections.fileno())
        self.detections.close()
        self.events.close()

    def frame(self, index: int, time: Fraction, found: track.Found) -> Logged:
        """Writes a frame's line, and gives it as written, which is what tracks are made of."""
        line = frame_line(index, time, found).encode()
        with writing(self.out):
            append(self.detections, line)
        self.synced = False
        return parse_frame(line, "a frame", self.classes)

    def raised(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Writes events, each of which is on the disk when the next is written."""
        self.lines([to_json(event) for event in events])

    def lines(self, lines: Sequence[str]) -> None:
        """Writes lines of events, after the frames that they are of."""
        with writing(self.out):
            if lines and not self.synced:
                os.fsync(self.detections.fileno())
                self.synced = True
            for line in lines:
                append(self.events, line.encode())
                os.fsync(self.events.fileno())

    def end(self, rules: Rules, progress: Progress) -> list[dict[str, Any]]:
        """Writes that the source has ended, and the events of that, which it gives."""
        with writing(self.out):
            append(self.detections, END)
        self.synced = False
        events = finish(rules, progress)
        self.raised(events)
        return events


def open_log(out: Path, head: Head, rules: Rules, rules_text: str) -> tuple[Log, Progress]:
    """Begins a log, or goes on with one that was cut: (it, where it stands).

    Frames up to `progress.frame` are in it already. Of a log that was cut, what was half written is
    cut off, and events that are missing are added.

    Args:
      out: a folder, made if it isn't there.
      head: of the source.
      rules: of `rules.check`.
      rules_text: of their file.

    Raises:
      UserError: the folder holds a log of something else, of other rules or one that is complete;
        another process writes it; the disk is full.
    """
    path = out / DETECTIONS
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        log = Log(
            out,
            path.open("ab", buffering=0),
            (out / EVENTS).open("ab", buffering=0),
            len(head.class_names),
        )
    try:
        if lock_file(log.detections) is False:
            raise UserError(f"another process writes {path}: name another --out")
        return log, _take_up(log, head, rules, rules_text)
    except BaseException:
        log.__exit__(None, None, None)
        raise


def _take_up(log: Log, head: Head, rules: Rules, rules_text: str) -> Progress:
    path = log.out / DETECTIONS
    whole = 0
    for _, _, whole in whole_lines(path):  # noqa: B007  the last one
        pass
    if not whole:
        if (log.out / EVENTS).stat().st_size:
            raise UserError(
                f"{log.out} has events, but not the frames that they are of, {DETECTIONS}: name"
                " another --out"
            )
        with writing(log.out):
            log.detections.truncate(0)
            write_whole(rules_text.encode(), log.out / RULES)
            append(log.detections, _head_line(head).encode())
            _sync_folder(log.out)
        log.synced = False
        log.lines([_first_event(head, rules)])
        return begin()
    if (there := read_head(log.out)) != head:
        same = there.source == head.source
        what, this = (there.settings, head.settings) if same else (there.source, head.source)
        raise UserError(f"{path} is of {what}, and not of this {this}: name another --out")
    if _has_ended(log.out):
        _complete(log, head, rules)
        raise UserError(
            f"{path} is complete: name another --out, or use --replay, or `review` for its page"
        )
    with writing(log.out):
        log.detections.truncate(whole)
    return _complete(log, head, rules)


def _complete(log: Log, head: Head, rules: Rules) -> Progress:
    """Adds the events that are missing; gives where the frames' lines end."""
    path = log.out / EVENTS
    known = iter(whole_lines(path))
    whole = 0
    cut = False

    def add(lines: Sequence[str]) -> None:
        nonlocal whole, cut
        for line in lines:
            number, said, end = next(known, (0, b"", whole))
            if not number:
                if not cut:
                    with writing(log.out):
                        log.events.truncate(whole)
                    cut = True
                log.lines([line])
            elif said != line.encode():
                raise UserError(
                    f"{path}: line {number} isn't what these rules say: name another --out, or use"
                    " --replay"
                )
            whole = end

    add([_first_event(head, rules)])
    progress = begin()
    for logged in read_frames(log.out):
        progress, _, raised = step(rules, progress, logged)
        add([to_json(event) for event in raised])
    if _has_ended(log.out):
        add([to_json(event) for event in finish(rules, progress)])
    if not cut:
        with writing(log.out):
            log.events.truncate(whole)
    return progress


def _sync_folder(folder: Path) -> None:
    """So that new files have their names after a power cut."""
    with contextlib.suppress(OSError):  # systems on which folders can't be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
