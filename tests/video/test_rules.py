"""Rules: what a file may say, what is refused, and where things lie."""

import datetime
from fractions import Fraction

import numpy as np
import pytest
import scenes

from vision_jax.errors import UserError
from vision_jax.video.geometry import area, is_inside, segments_meet
from vision_jax.video.rules import check, parse_rules, read_rules, wall_time
from vision_jax.video.schedule import in_schedule, parse_span

RULE = '[rules.one]\nkind = "inside"\nzone = "lawn"\n'
GATE = '[rules.one]\nkind = "cross"\nline = "gate"\n'
CROWD = '[rules.one]\nkind = "crowd"\n'


def ready(text, size=scenes.SIZE):
    return check(parse_rules(text, "rules.toml", scenes.NAMES), size)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(
        'start = 2026-12-01T18:00:00\ntime_zone = "Europe/Berlin"\n[tracking]\nhigh = 0.3\n'
        '[zones.half]\nunit = "fraction"\npolygon = [[0, 0.5], [1, 0.5], [1, 1], [0, 1]]\n'
        '[rules.one]\nkind = "inside"\nzone = "half"\nclasses = ["dog", "person"]\n'
        'unit = "fraction"\nmin_height = 0.25\ndwell = 0.1\non = [3, 5]\n'
        'schedule = ["mon-fri 20:00-06:00", "sat,sun"]\n'
    )
    rules = check(read_rules(path, scenes.NAMES), (480, 640))
    (rule,) = rules.rules
    assert rules.zones["half"].polygon == ((0, 240), (640, 240), (640, 480), (0, 480))
    assert (rule.labels, rule.min_height, rule.dwell) == ((0, 2), 120, Fraction(1, 10))
    assert rules.tracking.high == 0.3
    assert rules.start.utcoffset() == datetime.timedelta(hours=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules = 3", "no tables"),
        ("", "no rules"),
        ("[rules.one", "is no TOML"),
        (RULE.replace("lawn", "lown") + scenes.FIELD, "no zone `lown`: did you mean `lawn`"),
        (RULE.replace("zone", "zome") + scenes.FIELD, "`zome`, which isn't known: did you mean"),
        (RULE.replace("inside", "insid") + scenes.FIELD, "did you mean `inside`"),
        (RULE + 'classes = ["persom"]' + scenes.FIELD, "no class `persom`: did you mean `person`"),
        (RULE + "classes = []" + scenes.FIELD, "is empty"),
        (RULE + "score = 1.5" + scenes.FIELD, "from 0 to 1"),
        (RULE + "score = nan" + scenes.FIELD, "give a number"),
        (RULE + "on = [4, 3]" + scenes.FIELD, "4 of 3 frames are never true"),
        (RULE + "off = 0" + scenes.FIELD, "from 1"),
        (RULE + "off = true" + scenes.FIELD, "whole number"),
        (RULE + "count = 2" + scenes.FIELD, "`count` is of crowd and absent"),
        (RULE + "faster = 9\nslower = 3" + scenes.FIELD, "no speed is above 9 and below 3"),
        (RULE + "min_height = 481" + scenes.FIELD, "no box has"),
        (RULE + 'schedule = ["20:00-20:00"]' + scenes.FIELD, "is never"),
        (RULE + 'schedule = ["08:00-12:00 13:00-17:00"]' + scenes.FIELD, "two of a kind"),
        (RULE + 'schedule = ["mon tue"]' + scenes.FIELD, "two of a kind"),
        (RULE + 'schedule = ["mon-fry"]' + scenes.FIELD, "`fry` is no day: did you mean `fri`"),
        (RULE + 'schedule = ["25:00-26:00"]' + scenes.FIELD, "no times of a day"),
        (RULE + 'schedule = ["sat"]' + scenes.FIELD, "add start = "),
        ('[rules.one]\nkind = "cross"\n' + scenes.FIELD, "has no `line`"),
        ("start = 2026-12-01T18:00:00\n" + RULE + scenes.FIELD, "has no time zone"),
        ('time_zone = "Europe/Berlim"\n' + RULE + scenes.FIELD, "did you mean `Europe/Berlin`"),
        ("start = 9999-12-31T23:59:30Z\n" + RULE + scenes.FIELD, "not from 1900 to 8999"),
        ("start = 0001-01-01T00:00:00+10:00\n" + RULE + scenes.FIELD, "not from 1900 to 8999"),
        ("[tracking]\nhigh = 0.05\n" + RULE + scenes.FIELD, "`low` is higher"),
        (RULE + scenes.FIELD.replace("500, 400", "641, 400"), "(641, 400) lies outside of the"),
        (RULE + scenes.FIELD.replace("pixel", "fraction", 1), 'did you mean unit = "pixel"'),
        (RULE + "min_height = 401" + scenes.FIELD, "zone `lawn` lies where no foot of boxes of"),
        (GATE + scenes.FIELD.replace("300", "0"), "line `gate` lies where no foot of boxes in"),
        (GATE + "min_width = 600" + scenes.FIELD, "line `gate` lies where no foot of boxes of 600"),
        (CROWD + "count = 1001" + scenes.FIELD, "from 1 to 1000"),
    ],
)  # fmt: skip
def test_what_is_refused(text, words):
    with pytest.raises(UserError) as raised:
        ready(text)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("polygon", "unit", "words"),
    [
        ("[[0, 0], [1, 1], [1, 0], [0, 1]]", "fraction", "cross each other"),
        ("[[0, 0], [1, 0]]", "fraction", "3 to 200 points"),
        ("[[0, 0], [9, 9], [18, 18]]", "pixel", "is empty"),
        ("[[0, 0], [1, 0], [1, 1]]", "pixel", 'did you mean unit = "fraction"'),
        ("[[0, 0], [1, 0], [1, inf]]", "fraction", "give a number"),
        ("[[0, 0], [1, 0], 3]", "fraction", "a point is [x, y]"),
        ("[[0, 0], [1, 0], [1, -0.1]]", "fraction", "(1, -0.1) lies outside"),
    ],
)
def test_polygons_that_are_none(polygon, unit, words):
    with pytest.raises(UserError, match=r"zone `lawn`") as raised:
        ready(f'{RULE}[zones.lawn]\nunit = "{unit}"\npolygon = {polygon}\n')
    assert words in str(raised.value)


def test_boxes_whose_points_reach_a_zone_are_not_refused():
    """By a hair: the lawn ends at 400, 80 pixels above the lower edge, the gate stands at 300."""
    for text in (
        RULE + "min_height = 399",
        RULE + 'min_height = 479\npoint = "center"',
        RULE + "min_width = 639",
        GATE + "min_width = 599",
        GATE + 'min_height = 479\npoint = "center"',
    ):
        ready(text + scenes.FIELD)
    whole = "polygon = [[0, 0], [1, 0], [1, 1], [0, 1]]\n"
    for point in ("foot", "center"):
        sides = f'min_height = 1.0\nmin_width = 1.0\npoint = "{point}"\n'
        text = f'{RULE}unit = "fraction"\n{sides}[zones.lawn]\nunit = "fraction"\n{whole}'
        ready(text)


def test_points_in_polygons_are_those_of_matplotlib(rng):
    from matplotlib.path import Path

    angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
    points = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(20, 200, (9, 1)) + 250
    asked = rng.uniform(0, 500, (500, 2))
    ours = [is_inside([tuple(p) for p in points], tuple(one)) for one in asked]
    np.testing.assert_array_equal(ours, Path(points).contains_points(asked))
    inside = np.mean(
        [is_inside([tuple(p) for p in points], tuple(p)) for p in rng.uniform(0, 500, (9000, 2))]
    )
    assert abs(area([tuple(p) for p in points]) - inside * 500**2) < 0.03 * 500**2


def test_segments():
    assert segments_meet((0, 0), (2, 2), (0, 2), (2, 0))
    assert not segments_meet((0, 0), (2, 2), (3, 0), (3, 9))
    assert not segments_meet((0, 0), (2, 2), (0, 1), (1, 2))


def test_schedules_over_midnight_and_by_day():
    spans = [parse_span("here", "fri 22:00-06:00"), parse_span("here", "sun-mon 12:00-13:00")]
    asked = {
        "2026-12-04T21:59": False,  # a Friday
        "2026-12-04T22:00": True,
        "2026-12-05T05:59": True,
        "2026-12-05T06:00": False,
        "2026-12-05T22:00": False,
        "2026-12-04T05:00": False,
        "2026-12-06T12:30": True,
        "2026-12-07T12:59": True,
        "2026-12-08T12:30": False,
    }
    for text, answer in asked.items():
        assert in_schedule(spans, datetime.datetime.fromisoformat(text)) is answer, text
    assert in_schedule((), None)


def test_the_clock_goes_on_where_summer_time_ends():
    text = 'start = 2026-10-25T02:30:00+02:00\ntime_zone = "Europe/Berlin"\n'
    rules = ready(text + RULE + scenes.FIELD)
    later = wall_time(rules, Fraction(3600))
    assert later.isoformat() == "2026-10-25T02:30:00+01:00"
