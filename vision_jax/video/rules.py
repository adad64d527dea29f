"""When to raise an alarm: zones, lines and rules, read from a TOML file.

    start = 2026-12-01T18:00:00      # when the first frame was taken; schedules need it
    time_zone = "Europe/Berlin"      # of `start` and of the schedules

    [zones.lawn]
    unit = "fraction"                # of the frame's width and height; or "pixel"
    polygon = [[0.1, 0.5], [0.6, 0.5], [0.6, 0.9], [0.1, 0.9]]

    [lines.gate]
    unit = "pixel"
    from = [100, 300]
    to = [100, 500]

    [rules.intruder]
    kind = "inside"                  # also "cross", "crowd" and "absent"
    zone = "lawn"
    classes = ["person"]
    schedule = ["mon-fri 20:00-06:00", "sat,sun"]

What else a rule may say are the fields of `Rule`. Nothing in the file is ignored: a word that isn't
known, a rule that can't ever be true and a zone that isn't in the frame are errors.
"""

import dataclasses
import datetime
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from vision_jax.errors import UserError, nearest
from vision_jax.files import read_text
from vision_jax.video.geometry import Point, area, crossing_edges
from vision_jax.video.schedule import Span, find_time_zone, parse_span
from vision_jax.video.track import Settings

MAX_RULES = 1_000  # and as many zones and lines
MAX_POINTS = 200  # of a polygon
MAX_ALL_POINTS = 10_000  # of all polygons
YEARS = range(1900, 9000)  # of a start: all times after it have a date
MAX_FRAMES = 10_000  # that a rule looks back
MAX_COUNT = 1_000  # tracks: as many boxes of a frame are logged
KINDS = ("inside", "cross", "crowd", "absent")
UNITS = ("pixel", "fraction")


@dataclass(frozen=True)
class Zone:
    """A polygon: what is within an odd number of its turns is inside."""

    name: str
    unit: str
    polygon: tuple[Point, ...]


@dataclass(frozen=True)
class Line:
    """A line from one point to another; left and right are those of who walks along it."""

    name: str
    unit: str
    start: Point
    end: Point


def _number(low: float, high: float = math.inf) -> dict[str, Any]:
    """A field's bounds, which are allowed."""
    return {"low": low, "high": high}


def _one_of(*words: str) -> dict[str, Any]:
    return {"words": words}


@dataclass(frozen=True)
class Rule:
    """What raises an alarm.

    A track counts if it has one of the classes, at least the score and the size, a speed in the
    bounds, and its point in the zone. "inside" is true while a track counts; "crowd" while at least
    `count` do, "absent" while fewer do; "cross" when one has crossed the line.

    An alarm begins when this was true in `on[0]` of the last `on[1]` frames (of one track, for
    "inside" and "cross") and for `dwell` seconds, interruptions of fewer than `off` frames aside.
    It ends after `off` frames in a row in which it wasn't; a hidden track is taken to go on. For
    `cooldown` seconds after that no other begins.

    Attributes:
      name: of its table.
      kind: of KINDS.
      zone: a zone's name; "" is the whole frame.
      line: a line's name, for "cross".
      direction: in which the line is crossed: "left" and "right" are where the track comes to.
      classes: names of the detector's classes; () is all of them.
      point: of the box, that is in the zone or not: "foot" is the middle of its lower edge.
      margin: how far from its zone a track that was in it may be and count as hardly gone, in roots
        of its box's area; and how far from a line one must be to have crossed it. So nobody who
        stands on an edge, and whose box trembles, comes and goes.
      score: least score of a track's last box.
      unit: of the sizes and speeds below: pixels, or shares of the frame's width and height.
      min_width, min_height: least sides of a box.
      faster, slower: bounds of the speed of a box's center, units a second; both are left out at
        their defaults.
      count: tracks, for "crowd" and "absent".
      dwell: seconds.
      on: (k, n), frames.
      off: frames in a row.
      cooldown: seconds.
      schedule: parts of the week in which the rule holds; () is always.
      per: "rule", or "track": each track has alarms of its own. That of "cross" is "track" if it
        isn't given, and of the others "rule"; "crowd" and "absent" have no other.
      labels: i of the classes, which `read_rules` fills in.
    """

    name: str
    kind: str = field(metadata=_one_of(*KINDS))
    zone: str = ""
    line: str = ""
    direction: str = field(default="both", metadata=_one_of("left", "right", "both"))
    classes: tuple[str, ...] = ()
    point: str = field(default="foot", metadata=_one_of("foot", "center"))
    margin: float = field(default=0.25, metadata=_number(0, 100))
    score: float = field(default=0.3, metadata=_number(0, 1))
    unit: str = field(default="pixel", metadata=_one_of(*UNITS))
    min_width: float = field(default=0.0, metadata=_number(0))
    min_height: float = field(default=0.0, metadata=_number(0))
    faster: float = field(default=0.0, metadata=_number(0))
    slower: float = field(default=math.inf, metadata=_number(0))
    count: int = field(default=1, metadata=_number(1, MAX_COUNT))
    dwell: Fraction = field(default=Fraction(0), metadata=_number(0, 1e7))
    on: tuple[int, int] = (2, 3)
    off: int = field(default=6, metadata=_number(1, MAX_FRAMES))
    cooldown: Fraction = field(default=Fraction(0), metadata=_number(0, 1e7))
    schedule: tuple[Span, ...] = ()
    per: str = field(default="", metadata=_one_of("rule", "track"))
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rules:
    """All that a file says.

    Attributes:
      zones, lines: by name.
      rules: in the file's order.
      tracking: of its table [tracking].
      start: when the first frame was taken, with its time zone; None if the file doesn't say.
      time_zone: of the schedules; "" is that of `start`.
      class_names: the detector's.
      size: (height, width) of the frames; None before `check`, after which all zones, lines, sizes
        and speeds are in pixels.
    """

    zones: Mapping[str, Zone]
    lines: Mapping[str, Line]
    rules: tuple[Rule, ...]
    tracking: Settings
    start: datetime.datetime | None
    time_zone: str
    class_names: tuple[str, ...]
    size: tuple[int, int] | None = None


def read_rules(path: Path, class_names: Sequence[str]) -> Rules:
    """Reads a file.

    Args:
      path: of it.
      class_names: of the detector, by label.

    Raises:
      UserError: no such file, no TOML, or something in it that isn't known or can't be.
    """
    return parse_rules(read_text(path), str(path), class_names)


def parse_rules(text: str, what: str, class_names: Sequence[str]) -> Rules:
    """`read_rules` of a file's text; `what` names it in errors."""
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{what} is no TOML: {error}") from error
    try:
        return _parse(content, tuple(class_names))
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _parse(content: dict[str, Any], class_names: tuple[str, ...]) -> Rules:
    _known("the file", content, ("start", "time_zone", "tracking", "zones", "lines", "rules"))
    zones = {name: _zone(name, one) for name, one in _tables(content, "zones")}
    if sum(len(zone.polygon) for zone in zones.values()) > MAX_ALL_POINTS:
        raise UserError(f"all zones together have more than {MAX_ALL_POINTS} points")
    lines = {name: _line(name, one) for name, one in _tables(content, "lines")}
    rules = tuple(
        _rule(name, one, zones, lines, class_names) for name, one in _tables(content, "rules")
    )
    if not rules:
        raise UserError("there are no rules: add a table such as [rules.intruder]")
    tracking = content.get("tracking", {})
    if not isinstance(tracking, dict):
        raise UserError("`tracking` is no table")
    names = [one.name for one in dataclasses.fields(Settings)]
    _known("[tracking]", tracking, names)
    for name, value in tracking.items():
        whole = name in ("confirm", "lost_frames")
        _check_number(f"[tracking] {name}", value, 0 if name != "confirm" else 1, 1e6, whole)
    settings = dataclasses.replace(Settings(), **tracking)
    if settings.low > settings.high:
        raise UserError("[tracking]: `low` is higher than `high`")
    for name in ("jump", "position", "speed", "acceleration"):
        if not getattr(settings, name):
            raise UserError(f"[tracking] {name} is 0, of which no track could go on")
    if settings.growth < 1:
        raise UserError("[tracking] growth is below 1, of which no track could go on")
    zone_name = content.get("time_zone", "")
    if not isinstance(zone_name, str):
        raise UserError('`time_zone` is no text such as "Europe/Berlin"')
    return Rules(
        zones,
        lines,
        rules,
        settings,
        _start(content.get("start"), zone_name),
        zone_name,
        class_names,
    )


def _start(value: Any, zone_name: str) -> datetime.datetime | None:
    zone = find_time_zone(zone_name) if zone_name else None
    if value is None:
        return None
    if not isinstance(value, datetime.datetime):
        raise UserError("`start` is no date with a time, such as 2026-12-01T18:00:00+01:00")
    if value.year not in YEARS:
        raise UserError(f"`start` is in the year {value.year}, and not from 1900 to 8999")
    if value.tzinfo is None:
        if zone is None:
            raise UserError(
                "`start` has no time zone: write 2026-12-01T18:00:00+01:00, or add"
                ' time_zone = "Europe/Berlin"'
            )
        return value.replace(tzinfo=zone)
    return value.astimezone(zone) if zone else value


def _tables(content: Mapping[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    found = content.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
        raise UserError(f"`{name}` has no tables of names, such as [{name}.first]")
    if len(found) > MAX_RULES:
        raise UserError(f"there are {len(found)} {name}: {MAX_RULES} at most")
    return list(found.items())


def _known(where: str, table: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in table:
        if name not in names:
            raise UserError(f"{where} has `{name}`, which isn't known{nearest(name, names)}")


def _needs(where: str, table: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in table:
            raise UserError(f"{where} has no `{name}`")


def _check_number(where: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}: give a {'whole ' if whole else ''}number")
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise UserError(f"{where} is {value}: it is {bounds}")


def _word(where: str, value: Any, words: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in words:
        near = nearest(value, words) if isinstance(value, str) else ""
        raise UserError(f"{where} is {value!r}, and none of {', '.join(words)}{near}")
    return value


def _point(where: str, value: Any) -> Point:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{where} is {value!r}: a point is [x, y]")
    for number in value:
        _check_number(where, number, -1e9, 1e9)
    return float(value[0]), float(value[1])


def _zone(name: str, table: dict[str, Any]) -> Zone:
    where = f"zone `{name}`"
    _known(where, table, ("unit", "polygon"))
    _needs(where, table, ("unit", "polygon"))
    polygon = table["polygon"]
    if not isinstance(polygon, list) or not 3 <= len(polygon) <= MAX_POINTS:
        raise UserError(f"{where}: its `polygon` has not 3 to {MAX_POINTS} points [x, y]")
    points = tuple(_point(f"{where}: a point", one) for one in polygon)
    if crossing := crossing_edges(points):
        raise UserError(
            f"{where}: its edges after the points {crossing[0]} and {crossing[1]} cross each other:"
            " give the points in the order in which one walks around it"
        )
    return Zone(name, _word(f"{where}: `unit`", table["unit"], UNITS), points)


def _line(name: str, table: dict[str, Any]) -> Line:
    where = f"line `{name}`"
    _known(where, table, ("unit", "from", "to"))
    _needs(where, table, ("unit", "from", "to"))
    start, end = (_point(f"{where}: `{key}`", table[key]) for key in ("from", "to"))
    if start == end:
        raise UserError(f"{where} begins where it ends: nothing crosses it")
    return Line(name, _word(f"{where}: `unit`", table["unit"], UNITS), start, end)


_OF_KIND = {  # fields that mean something for some kinds alone
    "line": ("cross",),
    "direction": ("cross",),
    "count": ("crowd", "absent"),
    "dwell": ("inside", "crowd", "absent"),
    "per": ("inside", "cross"),
}


def _rule(
    name: str,
    table: dict[str, Any],
    zones: Mapping[str, Zone],
    lines: Mapping[str, Line],
    class_names: tuple[str, ...],
) -> Rule:
    where = f"rule `{name}`"
    fields = {
        one.name: one for one in dataclasses.fields(Rule) if one.name not in ("name", "labels")
    }
    _known(where, table, list(fields))
    _needs(where, table, ("kind",))
    kind = _word(f"{where}: `kind`", table["kind"], KINDS)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if kind not in _OF_KIND.get(key, KINDS):
            raise UserError(
                f"{where}: `{key}` is of {' and '.join(_OF_KIND[key])}, and not of {kind}"
            )
        values[key] = _value(f"{where}: `{key}`", fields[key], value, zones, lines)
    if kind == "cross":
        _needs(where, table, ("line",))
    labels = []
    for one in values.get("classes", ()):
        if one not in class_names:
            raise UserError(
                f"{where}: the detector has no class `{one}`{nearest(one, class_names)}"
            )
        labels.append(class_names.index(one))
    rule = Rule(
        name,
        **{"per": "track" if kind == "cross" else "rule", **values},
        labels=tuple(sorted(labels or range(len(class_names)))),
    )
    if rule.faster >= rule.slower:
        raise UserError(f"{where}: no speed is above {rule.faster:g} and below {rule.slower:g}")
    return rule


def _value(
    where: str,
    of: "dataclasses.Field[Any]",
    value: Any,
    zones: Mapping[str, Zone],
    lines: Mapping[str, Line],
) -> Any:
    """A rule's field as it is kept."""
    if "words" in of.metadata:
        return _word(where, value, of.metadata["words"])
    if "low" in of.metadata:
        _check_number(where, value, of.metadata["low"], of.metadata["high"], of.type is int)
        return Fraction(str(value)) if of.type is Fraction else value  # 0.1 is a tenth
    if of.name in ("zone", "line"):
        names = list(zones if of.name == "zone" else lines)
        if not isinstance(value, str) or value not in names:
            near = nearest(value, names) if isinstance(value, str) else ""
            raise UserError(f"{where}: there is no {of.name} `{value}`{near}")
        return value
    if not isinstance(value, list):
        raise UserError(f"{where} is {value!r}: give a list")
    if of.name == "on":
        if len(value) != 2:
            raise UserError(f"{where} is {value!r}: give [k, n], k of the last n frames")
        for one in value:
            _check_number(where, one, 1, MAX_FRAMES, whole=True)
        if value[0] > value[1]:
            raise UserError(f"{where}: {value[0]} of {value[1]} frames are never true")
        return tuple(value)
    if not value:
        raise UserError(f"{where} is empty: leave it out for all")
    if not all(isinstance(one, str) for one in value):
        raise UserError(f"{where} is {value!r}: give a list of text")
    return tuple(parse_span(where, one) for one in value) if of.name == "schedule" else tuple(value)


def check(rules: Rules, size: tuple[int, int], start: datetime.datetime | None = None) -> Rules:
    """Rules for frames of a size, with everything in pixels.

    Args:
      rules: as read.
      size: (height, width) of the frames, in pixels.
      start: when the first frame was taken, where the source knows (a camera: now); what the file
        says goes first.

    Raises:
      UserError: a zone or line that isn't in the frame, or a rule that can't ever be true.
    """
    height, width = size
    start = rules.start or start
    if start is not None and rules.time_zone:
        start = start.astimezone(find_time_zone(rules.time_zone))
    zones = {
        name: dataclasses.replace(
            zone, unit="pixel", polygon=_in_frame(f"zone `{name}`", zone.unit, zone.polygon, size)
        )
        for name, zone in rules.zones.items()
    }
    for name, zone in zones.items():
        if area(zone.polygon) < 1:
            raise UserError(f"zone `{name}` is empty: it has less than a pixel's area")
    lines = {}
    for name, line in rules.lines.items():
        ends = _in_frame(f"line `{name}`", line.unit, (line.start, line.end), size)
        lines[name] = Line(name, "pixel", *ends)
    ready = []
    for rule in rules.rules:
        across, down = (width, height) if rule.unit == "fraction" else (1, 1)
        low, high = rule.min_width * across, rule.min_height * down
        if low > width or high > height:
            raise UserError(
                f"rule `{rule.name}`: no box has {low:g} x {high:g} pixels in frames of"
                f" {width} x {height}"
            )
        if rule.schedule and start is None:
            raise UserError(
                f"rule `{rule.name}` has a `schedule`, but nothing says when the first frame was"
                " taken: add start = 2026-12-01T18:00:00+01:00 at the top of the file"
            )
        ready.append(dataclasses.replace(rule, min_width=low, min_height=high))
        _check_reach(ready[-1], zones, lines, size)
    return dataclasses.replace(
        rules, zones=zones, lines=lines, rules=tuple(ready), start=start, size=size
    )


def _check_reach(
    rule: Rule, zones: Mapping[str, Zone], lines: Mapping[str, Line], size: tuple[int, int]
) -> None:
    """Whether boxes in the frame that are large enough have their points in a zone, or pass a line.

    Raises:
      UserError: none has.
    """
    height, width = size
    left, top = max(rule.min_width / 2, 0.5), max(rule.min_height / 2, 0.5)  # alarms.point_of
    right, bottom = width - left, height - top
    if rule.point == "foot":
        top, bottom = min(max(rule.min_height, 0.5), height - 0.5), height - 0.5
    places = [(f"zone `{rule.zone}`", zones[rule.zone].polygon)] if rule.zone else []
    if rule.line:
        line = lines[rule.line]
        places.append((f"line `{rule.line}`", (line.start, line.end)))
    for name, points in places:
        x, y = ([point[axis] for point in points] for axis in (0, 1))
        inner = 1e-9 if rule.line else 0  # a line is crossed by points on both of its sides
        beside = max(x) < left + inner or min(x) > right - inner
        if beside or max(y) < top + inner or min(y) > bottom - inner:
            sizes = f" of {rule.min_width:g} x {rule.min_height:g} pixels and more"
            boxes = f"boxes{sizes if rule.min_width or rule.min_height else ''}"
            raise UserError(
                f"rule `{rule.name}`: {name} lies where no {rule.point} of {boxes} in a frame of"
                f" {width} x {height} comes"
            )


def _in_frame(
    where: str, unit: str, points: Sequence[Point], size: tuple[int, int]
) -> tuple[Point, ...]:
    height, width = size
    small = all(0 <= x <= 1 and 0 <= y <= 1 for x, y in points)
    if unit == "pixel" and small:
        raise UserError(f'{where} is within one pixel: did you mean unit = "fraction"?')
    across, down = (width, height) if unit == "fraction" else (1, 1)
    scaled = tuple((x * across, y * down) for x, y in points)
    for (x, y), (u, v) in zip(points, scaled, strict=True):
        if not (0 <= u <= width and 0 <= v <= height):
            pixels = unit == "fraction" and all(
                0 <= x <= width and 0 <= y <= height for x, y in points
            )
            raise UserError(
                f"{where}: its point ({x:g}, {y:g}) lies outside of the frame of {width} x {height}"
                " pixels" + (': did you mean unit = "pixel"?' if pixels else "")
            )
    return scaled


def wall_time(rules: Rules, time: Fraction) -> datetime.datetime | None:
    """The clock's time of a frame, where it is known; seconds are rounded to millionths.

    Elapsed time is added in UTC, so that an hour that a clock repeats or leaves out is right.
    """
    if rules.start is None:
        return None
    passed = datetime.timedelta(microseconds=round(time * 1_000_000))
    return (rules.start.astimezone(datetime.UTC) + passed).astimezone(rules.start.tzinfo)
