"""Parts of the week in which a rule holds."""

import datetime
import re
from collections.abc import Sequence
from typing import NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from vision_jax.errors import UserError, nearest

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_TIMES = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)")


class Span(NamedTuple):
    """A part of the week.

    Attributes:
      days: 0 is Monday; on which it begins.
      start: minute of the day at which it begins.
      end: minute at which it ends; of the next day if it isn't later than `start`.
    """

    days: tuple[int, ...]
    start: int
    end: int


def parse_span(where: str, text: str) -> Span:
    """Days, times, or both: "mon-fri 20:00-06:00"."""
    days: set[int] = set()
    start, end = 0, 24 * 60
    words = text.split()
    kinds = {bool(_TIMES.fullmatch(word)) for word in words}
    if len(words) == 2 and len(kinds) == 1:
        raise UserError(f"{where}: `{text}` has two of a kind: write them as two texts of the list")
    if not 1 <= len(words) <= 2:
        raise UserError(f"{where}: `{text}` is no time such as `mon-fri 20:00-06:00`")
    for word in words:
        if found := _TIMES.fullmatch(word):
            hours = [int(one) for one in found.groups()]
            start, end = hours[0] * 60 + hours[1], hours[2] * 60 + hours[3]
            if max(hours[1], hours[3]) > 59 or start >= 24 * 60 or end > 24 * 60:
                raise UserError(f"{where}: `{word}` are no times of a day")
            if start == end:
                raise UserError(f"{where}: `{word}` is never: leave it out for all of the day")
            continue
        for part in word.split(","):
            first, dash, last = part.partition("-")
            for day in (first, last) if dash else (first,):
                if day not in DAYS:
                    raise UserError(f"{where}: `{day}` is no day{nearest(day, DAYS)}")
            low, high = DAYS.index(first), DAYS.index(last or first)
            days |= {day % 7 for day in range(low, high + 1 + 7 * (high < low))}
    return Span(tuple(sorted(days or range(7))), start, end)


def in_schedule(schedule: Sequence[Span], now: datetime.datetime | None) -> bool:
    """Whether a clock's time is in one of the parts of the week; always if there are none."""
    if not schedule:
        return True
    assert now is not None  # check() wants a start
    minute = now.hour * 60 + now.minute
    for span in schedule:
        today, before = now.weekday() in span.days, (now.weekday() - 1) % 7 in span.days
        over_night = span.end <= span.start
        if today and span.start <= minute and (over_night or minute < span.end):
            return True
        if over_night and before and minute < span.end:
            return True
    return False


def find_time_zone(name: str) -> ZoneInfo:
    """A time zone by its name.

    Raises:
      UserError: there is none, or the system knows of none.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        near = nearest(name, sorted(available_timezones()))
        raise UserError(f"`time_zone`: {name} is no time zone{near}") from error
