"""Tracks and rules to alarms: pure, with no clock but the frames' times.

Each rule says of each track, or of all, whether it is true now, in two ways: `surely`, of boxes
that are in this frame, which is what an alarm begins by, and `perhaps`, with the predictions of
tracks that are hidden, boxes of low scores and those just outside, which is what it goes on by. So
nothing that was only predicted raises an alarm, and nobody ends one by walking behind a tree.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from vision_jax.video.geometry import Point, distance_to_edge, is_inside, segments_meet, side
from vision_jax.video.rules import Rule, Rules, wall_time
from vision_jax.video.schedule import in_schedule
from vision_jax.video.track import Track

MAX_TRACKS = 100  # that an alarm names
EVERYBODY = 0  # the track of an alarm that is its rule's; ids begin at 1

Key = tuple[str, int]  # a rule's name, and a track's id or EVERYBODY


class Evidence(NamedTuple):
    """What speaks for an alarm.

    Attributes:
      frames: the last of them in which the rule was surely true, bit 0 the last one.
      since: seconds at which it first was; None if it isn't.
      clear: frames in a row in which it wasn't, not even perhaps.
    """

    frames: int
    since: Fraction | None
    clear: int


class Path(NamedTuple):
    """Of a track and a rule of kind "cross".

    Attributes:
      point: where the track was last seen clearly on one side of the line; None before that.
      left: frames in which a crossing still counts.
    """

    point: Point | None
    left: int


class Alarm(NamedTuple):
    """Of a rule, or of a rule and a track.

    Attributes:
      number: of the alarm that is on; 0 if none is.
      began: seconds.
      clear: frames in a row in which the rule wasn't true.
      ended: seconds at which the one before did; None if there was none.
      tracks: ids that took part.
    """

    number: int
    began: Fraction
    clear: int
    ended: Fraction | None
    tracks: tuple[int, ...]


class State(NamedTuple):
    """Between two frames.

    Attributes:
      next_number: of the next alarm.
      evidence: by rule and track.
      paths: by rule and track.
      alarms: by rule and track, or EVERYBODY.
    """

    next_number: int
    evidence: Mapping[Key, Evidence]
    paths: Mapping[Key, Path]
    alarms: Mapping[Key, Alarm]


class Said(NamedTuple):
    """What a rule says of a track, or of everybody, in a frame."""

    surely: bool
    perhaps: bool
    tracks: Sequence[Track]


NO_EVIDENCE = Evidence(0, None, 0)
NO_ALARM = Alarm(0, Fraction(0), 0, None, ())


def init() -> State:
    """Nothing has been seen."""
    return State(1, {}, {}, {})


def update(
    rules: Rules, state: State, tracks: Sequence[Track], frame: int, time: Fraction
) -> tuple[State, list[dict[str, Any]]]:
    """One frame.

    Args:
      rules: of `rules.check`.
      state: of the frame before.
      tracks: of this frame, of `track.update`.
      frame: its index.
      time: its seconds, not before the last one's.

    Returns:
      (state, events as in events.jsonl, in order): alarms that begin and end here.
    """
    now = wall_time(rules, time)
    paths: dict[Key, Path] = {}
    evidence: dict[Key, Evidence] = {}
    alarms: dict[Key, Alarm] = {}
    events: list[dict[str, Any]] = []
    number = state.next_number
    for rule in rules.rules:
        open_now = in_schedule(rule.schedule, now)
        begun: dict[int, list[Track]] = {}  # by whose alarm it is
        going: set[int] = set()
        for whose, said in _said(rules, rule, open_now, tracks, state.paths, paths):
            key = rule.name, whose
            known = _learn(rule, state.evidence.get(key, NO_EVIDENCE), said, time)
            evidence[key] = known
            owner = whose if rule.per == "track" else EVERYBODY
            if said.perhaps:
                going.add(owner)
            if said.surely and _is_enough(rule, known, time):
                begun.setdefault(owner, []).extend(said.tracks)
        owners = {whose for name, whose in state.alarms if name == rule.name}
        for owner in sorted(owners | set(begun)):
            key = rule.name, owner
            alarm = state.alarms.get(key, NO_ALARM)
            taking_part = begun.get(owner, [])
            if alarm.number:
                alarm, ended = _go_on(rule, alarm, owner in going, taking_part, time)
                if ended:
                    events.append(_end(rule, ended, frame, time, rules, cut=False))
            elif owner in begun and _is_cool(rule, alarm, time):
                alarm = Alarm(number, time, 0, alarm.ended, _ids((), taking_part))
                number += 1
                events.append(_start(rule, alarm, taking_part, frame, time, rules))
                for track in taking_part if rule.kind == "cross" else ():  # one crossing, one alarm
                    crossed = rule.name, track.id
                    paths[crossed] = paths[crossed]._replace(left=0)
                    evidence[crossed] = NO_EVIDENCE
            if alarm.number or _is_remembered(rule, alarm, owner, tracks, time):
                alarms[key] = alarm
    return State(number, evidence, paths, alarms), events


def finish(
    rules: Rules, state: State, frame: int, time: Fraction
) -> tuple[State, list[dict[str, Any]]]:
    """The end of a source, after its last frame: alarms that are on end as ones that were cut."""
    order = {rule.name: rule for rule in rules.rules}
    on = sorted((alarm.number, key) for key, alarm in state.alarms.items() if alarm.number)
    events = [_end(order[key[0]], state.alarms[key], frame, time, rules, cut=True) for _, key in on]
    return State(state.next_number, {}, {}, {}), events


def _said(
    rules: Rules,
    rule: Rule,
    open_now: bool,
    tracks: Sequence[Track],
    before: Mapping[Key, Path],
    paths: dict[Key, Path],
) -> Iterator[tuple[int, Said]]:
    """(a track's id or EVERYBODY, what the rule says of it); writes the tracks' ways to `paths`."""
    counted: list[Track] = []  # in this frame, for sure
    there: list[Track] = []
    for track in tracks:
        if track.label not in rule.labels:
            continue
        if rule.kind == "cross":
            key = rule.name, track.id
            path = _walk(rules, rule, track, before.get(key))
            paths[key] = path
            inside = near = path.left > 0
        else:
            inside, near = _is_in_zone(rules, rule, track)
        perhaps = open_now and near and _is_at_speed(rules, rule, track)
        surely = perhaps and inside and track.unseen == 0 and _is_large(rule, track)
        counted += [track] if surely else []
        there += [track] if perhaps else []
        if rule.kind in ("inside", "cross"):
            yield track.id, Said(surely, perhaps, [track])
    if rule.kind == "crowd":
        enough = len(counted) >= rule.count
        yield EVERYBODY, Said(enough, len(there) >= rule.count, counted)
    elif rule.kind == "absent":  # turned around: for sure if not even perhaps somebody is there
        surely = open_now and len(there) < rule.count
        yield EVERYBODY, Said(surely, open_now and len(counted) < rule.count, there)


def _learn(rule: Rule, known: Evidence, said: Said, time: Fraction) -> Evidence:
    frames = ((known.frames << 1) | said.surely) & ((1 << rule.on[1]) - 1)
    clear = 0 if said.perhaps else known.clear + 1
    since = known.since
    if clear >= rule.off:
        frames, since = 0, None
    elif since is None and said.surely:
        since = time
    return Evidence(frames, since, clear)


def _is_enough(rule: Rule, known: Evidence, time: Fraction) -> bool:
    long = known.since is not None and time - known.since >= rule.dwell
    return long and known.frames.bit_count() >= rule.on[0]


def _is_cool(rule: Rule, alarm: Alarm, time: Fraction) -> bool:
    return alarm.ended is None or time - alarm.ended >= rule.cooldown


def _go_on(
    rule: Rule, alarm: Alarm, going: bool, tracks: Sequence[Track], time: Fraction
) -> tuple[Alarm, Alarm | None]:
    """(an alarm that is on, a frame later; itself if it ends here)."""
    clear = 0 if going else alarm.clear + 1
    alarm = alarm._replace(clear=clear, tracks=_ids(alarm.tracks, tracks))
    if clear < rule.off:
        return alarm, None
    return NO_ALARM._replace(ended=time), alarm


def _is_remembered(
    rule: Rule, alarm: Alarm, owner: int, tracks: Sequence[Track], time: Fraction
) -> bool:
    """Whether an alarm that is off still matters: it is cooling, and its track not gone."""
    there = owner == EVERYBODY or any(track.id == owner for track in tracks)
    return there and not _is_cool(rule, alarm, time)


def _walk(rules: Rules, rule: Rule, track: Track, before: Path | None) -> Path:
    """A track's way past a line, whose crossing counts for as many frames as the rule looks at."""
    before = before or Path(None, 0)
    if track.unseen > 0:  # it is known where it went when it is seen again
        return before
    line = rules.lines[rule.line]
    point = point_of(rules, rule, track)
    new = side(line.start, line.end, point)  # times the line's length
    left = max(before.left - 1, 0)
    if abs(new) <= rule.margin * _size(track) * math.dist(line.start, line.end):
        return Path(before.point, left)  # on the line: not yet across
    if before.point and (side(line.start, line.end, before.point) < 0) != (new < 0):
        watched = rule.direction in ("both", "right" if new > 0 else "left")
        crossed = segments_meet(before.point, point, line.start, line.end)
        left = rule.on[1] if watched and crossed else 0
    return Path(point, left)


def point_of(rules: Rules, rule: Rule, track: Track) -> Point:
    """The point of a track's box that a rule asks for, at least half a pixel within the frame."""
    assert rules.size is not None
    height, width = rules.size
    left, top, right, bottom = track.box_xyxy_px
    y = bottom if rule.point == "foot" else (top + bottom) / 2
    return min(max((left + right) / 2, 0.5), width - 0.5), min(max(y, 0.5), height - 0.5)


def _is_in_zone(rules: Rules, rule: Rule, track: Track) -> tuple[bool, bool]:
    """(whether a track is in the zone, whether it is or is near to it)."""
    if not rule.zone:
        return True, True
    polygon, point = rules.zones[rule.zone].polygon, point_of(rules, rule, track)
    if is_inside(polygon, point):
        return True, True
    return False, distance_to_edge(polygon, point) <= rule.margin * _size(track)


def _size(track: Track) -> float:
    left, top, right, bottom = track.box_xyxy_px
    return math.sqrt((right - left) * (bottom - top))


def _is_at_speed(rules: Rules, rule: Rule, track: Track) -> bool:
    assert rules.size is not None
    height, width = rules.size if rule.unit == "fraction" else (1, 1)
    x, y = track.velocity_px
    speed = ((x / width) ** 2 + (y / height) ** 2) ** 0.5
    return (not rule.faster or speed > rule.faster) and speed < rule.slower


def _is_large(rule: Rule, track: Track) -> bool:
    left, top, right, bottom = track.box_xyxy_px
    large = right - left >= rule.min_width and bottom - top >= rule.min_height
    return large and track.score >= rule.score


def _ids(known: tuple[int, ...], tracks: Sequence[Track]) -> tuple[int, ...]:
    new = [track.id for track in tracks if track.id not in known]
    return (known + tuple(new))[:MAX_TRACKS]


def _start(
    rule: Rule, alarm: Alarm, tracks: Sequence[Track], frame: int, time: Fraction, rules: Rules
) -> dict[str, Any]:
    return {
        "event": "start",
        "number": alarm.number,
        "rule": rule.name,
        "kind": rule.kind,
        **({"zone": rule.zone} if rule.zone else {}),
        **({"line": rule.line} if rule.line else {}),
        **_when(frame, time, rules),
        "score": max((track.score for track in tracks), default=None),
        "tracks": [
            {
                "id": track.id,
                "class": rules.class_names[track.label],
                "score": track.score,
                "box_xyxy_px": list(track.box_xyxy_px),
            }
            for track in tracks[:MAX_TRACKS]
        ],
    }


def _end(
    rule: Rule, alarm: Alarm, frame: int, time: Fraction, rules: Rules, *, cut: bool
) -> dict[str, Any]:
    return {
        "event": "end",
        "number": alarm.number,
        "rule": rule.name,
        **_when(frame, time, rules),
        "seconds": time - alarm.began,
        "cut": cut,
        "tracks": list(alarm.tracks),
    }


def _when(frame: int, time: Fraction, rules: Rules) -> dict[str, Any]:
    wall = wall_time(rules, time)
    clock = {"clock": wall.isoformat(timespec="milliseconds")} if wall else {}
    return {"frame": frame, "time": time, **clock}
