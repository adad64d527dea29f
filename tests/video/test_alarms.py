"""Alarms: what fires, what doesn't, how often, and what holds of random tracks."""

import re
from fractions import Fraction

import numpy as np
import pytest
import scenes

from vision_jax.video import alarms, events, track
from vision_jax.video.rules import check, parse_rules

INSIDE = '[rules.lawn]\nkind = "inside"\nzone = "lawn"\nclasses = ["person"]\n'


def rules_of(text, start=""):
    return check(parse_rules(start + text + scenes.FIELD, "rules", scenes.NAMES), scenes.SIZE)


def watch(text, frames, times=None, start=""):
    """(event, frame, tracks) of all events, the source's end included."""
    rules = rules_of(text, start)
    progress, said = events.begin(), []
    for i, (found, time) in enumerate(zip(frames, times or scenes.times(len(frames)), strict=True)):
        logged = events.Logged(i, time, *found)
        progress, _, raised = events.step(rules, progress, logged)
        said += raised
    return said + events.finish(rules, progress)[:-1]


def starts(said):
    return [(one["rule"], one["frame"]) for one in said if one["event"] == "start"]


def people(*ways):
    """Frames of several walks of equal length; None where somebody is hidden."""
    return [scenes.found(*[row for row in rows if row]) for rows in zip(*ways, strict=True)]


def test_a_person_who_walks_through_fires_once():
    said = watch(INSIDE, people(scenes.walk((50, 300), (100, 0), 70)))
    begun, ended = said
    assert (begun["event"], ended["event"], ended["cut"]) == ("start", "end", False)
    assert 15 <= begun["frame"] <= 17  # x is 200 at frame 15, and 500 at frame 45
    assert ended["frame"] == 46 + 6  # it is 12 pixels outside at frame 47, the first clear one
    assert ended["seconds"] == ended["time"] - begun["time"]
    assert (begun["tracks"][0]["class"], ended["tracks"]) == ("person", [1])


@pytest.mark.parametrize("score", [0.3, 0.95])
def test_one_false_box_never_fires(score):
    """300 pixels away in the zone, alone, beside the person, or while the person is hidden."""
    far = (400, 300, 30, 80, score, 0)
    person = scenes.walk((100, 300), (0, 0), 40)
    for on in ("", "on = [1, 1]\n"):
        for hidden in (False, True):
            frames = people(person)
            frames[20] = scenes.found(far) if hidden else scenes.found(person[20], far)
            assert watch(INSIDE + on, frames) == []
    alone = [scenes.found() for _ in range(40)]
    alone[20] = scenes.found(far)
    assert watch(INSIDE, alone) == []
    twice = [scenes.found(far) if i in (10, 11) else scenes.found() for i in range(40)]
    assert watch(INSIDE, twice) == []
    thrice = [
        scenes.found((400, 300, 30, 80, 0.9, 0)) if i < 20 else scenes.found() for i in range(40)
    ]
    assert starts(watch(INSIDE, thrice)) == [("lawn", 3)]  # two frames to confirm it, two of three


def test_a_box_that_flickers_at_the_edge_fires_once(rng):
    """Its foot is on both sides of the edge, now and then it is gone, for 200 frames."""
    frames = []
    for i in range(200):
        x = 200 + rng.choice([-6, 6]) + rng.normal(0, 2)
        gone = rng.random() < 0.2 and i > 5
        frames.append(scenes.found() if gone else scenes.found((x, 300, 30, 80, 0.6, 0)))
    assert len(starts(watch(INSIDE + "on = [1, 1]\noff = 12\n", frames))) == 1
    always = [scenes.found((200 + 12 * (i % 2) - 6, 300, 30, 80, 0.6, 0)) for i in range(200)]
    assert len(starts(watch(INSIDE, always))) <= 1
    blinks = [
        scenes.found((250, 300, 30, 80, 0.6, 0)) if i % 4 else scenes.found() for i in range(200)
    ]
    assert len(starts(watch(INSIDE, blinks))) == 1


def test_hidden_for_ten_frames_neither_ends_nor_repeats_an_alarm():
    way = scenes.walk((220, 300), (20, 0), 80)
    hidden = [row if not 30 <= i < 40 else None for i, row in enumerate(way)]
    said = watch(INSIDE, people(hidden))
    assert [one["event"] for one in said] == ["start", "end"]
    assert said[1]["tracks"] == [1]


def test_a_prediction_raises_nothing():
    """Somebody disappears on the way to the zone."""
    way = scenes.walk((100, 300), (80, 0), 60)
    assert watch(INSIDE, people([row if i < 11 else None for i, row in enumerate(way)])) == []


def test_classes_sizes_scores_and_points():
    car = scenes.walk((300, 300), (0, 0), 20, label=1)
    assert watch(INSIDE, people(car)) == []
    person = scenes.walk((300, 300), (0, 0), 20, score=0.5)
    assert starts(watch(INSIDE + "min_height = 70\nscore = 0.45\n", people(person)))
    assert watch(INSIDE + "min_height = 90\n", people(person)) == []
    assert watch(INSIDE + "score = 0.6\n", people(person)) == []
    low = scenes.walk((300, 430), (0, 0), 20)  # the foot below the zone, the center in it
    assert watch(INSIDE, people(low)) == []
    assert starts(watch(INSIDE + 'point = "center"\n', people(low)))


def test_dwell_in_seconds_at_any_rate_and_over_short_interruptions():
    for rate in (5, 10, 25):
        way = scenes.walk((300, 300), (0, 0), 12 * rate, rate)
        ((_, frame),) = starts(
            watch(INSIDE + "dwell = 5\n", people(way), scenes.times(len(way), rate))
        )
        assert abs(frame / rate - 5) <= 0.5  # after the frames that confirm the track
    passing = scenes.walk((150, 300), (100, 0), 60)
    assert watch(INSIDE + "dwell = 5\n", people(passing)) == []
    blinks = [row if i % 5 else None for i, row in enumerate(scenes.walk((300, 300), (0, 0), 90))]
    assert len(starts(watch(INSIDE + "dwell = 5\n", people(blinks)))) == 1


def test_the_cooldown_counts_from_the_end():
    way = scenes.walk((300, 300), (0, 0), 600)
    visits = [row if (i // 50) % 2 else None for i, row in enumerate(way)]
    times = [one["time"] for one in watch(INSIDE, people(visits)) if one["event"] == "start"]
    assert len(times) == 6
    said = watch(INSIDE + "cooldown = 10.0\n", people(visits))
    begun = [one["time"] for one in said if one["event"] == "start"]
    ended = [one["time"] for one in said if one["event"] == "end"]
    assert 2 <= len(begun) < 6
    assert all(b - e >= 10 for e, b in zip(ended, begun[1:], strict=False))


@pytest.mark.parametrize("direction", ["left", "right", "both"])
def test_lines_have_directions(direction):
    """The gate at x = 300 is walked down, so that the east is at its left."""
    east = scenes.walk((250, 300), (50, 0), 30)
    west = scenes.walk((350, 300), (-50, 0), 30)
    rule = f'[rules.gate]\nkind = "cross"\nline = "gate"\ndirection = "{direction}"\n'
    assert bool(starts(watch(rule, people(east)))) == (direction != "right")
    assert bool(starts(watch(rule, people(west)))) == (direction != "left")
    below = scenes.walk((250, 479), (50, 0), 30)
    assert bool(starts(watch(rule, people(below)))) == (direction != "right")


def test_each_track_crosses_once_and_hidden_crossings_count():
    rule = '[rules.gate]\nkind = "cross"\nline = "gate"\n'
    one, two = scenes.walk((250, 200), (50, 0), 40), scenes.walk((240, 400), (50, 0), 40)
    said = watch(rule, people(one, two))
    assert [t["id"] for e in said if e["event"] == "start" for t in e["tracks"]] == [1, 2]
    jitter = [scenes.found((300 + 4 * (-1) ** i, 300, 30, 80, 0.9, 0)) for i in range(60)]
    assert len(starts(watch(rule, jitter))) <= 1
    hidden = [row if not 5 <= i < 15 else None for i, row in enumerate(one)]
    assert starts(watch(rule, people(hidden))) == [("gate", 16)]  # two of three frames later


def test_crowds_and_absence():
    ways = [scenes.walk((220 + 60 * k, 300), (0, 0), 60) for k in range(4)]
    crowd = '[rules.crowd]\nkind = "crowd"\nzone = "lawn"\ncount = 4\n'
    assert watch(crowd, people(*ways[:3])) == []
    begun = watch(crowd, people(*ways))[0]
    assert len(begun["tracks"]) == 4
    # One is lost and comes back under another id: two tracks are one person.
    again = [row if i < 20 or i > 25 else None for i, row in enumerate(ways[0])]
    moved = [(*(row[0] + 80, 380), *row[2:]) if i > 25 else row for i, row in enumerate(ways[0])]
    twin = [a and m for a, m in zip(again, moved, strict=True)]
    assert watch(crowd.replace("4", "3"), people(twin, ways[3])) == []

    absent = '[rules.guard]\nkind = "absent"\nzone = "lawn"\ndwell = 3\n'
    guard = ways[0]
    assert watch(absent, people(guard))[:1] == []
    leaves = people([row if i < 20 else None for i, row in enumerate(guard + guard)])
    ((_, frame),) = starts(watch(absent, leaves))
    assert frame == 19 + 21 + 30  # 2 s until the track ends, and 3 s of absence
    nobody = [scenes.found() for _ in range(60)]
    assert starts(watch(absent, nobody)) == [("guard", 30)]


def test_speed():
    fast, slow = scenes.walk((210, 200), (80, 0), 30), scenes.walk((210, 390), (5, 0), 30)
    for text, expected in (("faster = 40\n", 1), ("slower = 40\n", 2)):
        said = watch(INSIDE + text, people(fast, slow))
        assert said[0]["tracks"][0]["id"] == expected or len(said[0]["tracks"]) == 1
        (track_,) = {t for one in said if one["event"] == "end" for t in one["tracks"]}
        assert track_ == expected
    shares = 'unit = "fraction"\nfaster = 0.0625\n'  # of 640 pixels: 40
    assert {t for e in watch(INSIDE + shares, people(fast, slow)) for t in ids(e)} == {1}


def ids(event):
    return [t if isinstance(t, int) else t["id"] for t in event["tracks"]]


def test_schedules():
    way = people(scenes.walk((300, 300), (0, 0), 100))
    start = "start = 2026-12-04T21:59:55+00:00\n"  # a Friday
    said = watch(INSIDE + 'schedule = ["fri 22:00-06:00"]\n', way, start=start)
    assert starts(said) == [("lawn", 51)]  # 22:00:00 is frame 50, two of three
    assert said[0]["clock"] == "2026-12-04T22:00:00.100+00:00"
    assert watch(INSIDE + 'schedule = ["sat"]\n', way, start=start) == []


def random_tracks(rng, frames):
    """Tracks of a drunken tracker: they come, go, hide, jump and change their scores."""
    alive, next_id = {}, 1
    for _ in range(frames):
        for key in [k for k in alive if rng.random() < 0.03]:
            del alive[key]
        if len(alive) < 5 and rng.random() < 0.2:
            alive[next_id] = rng.uniform((0, 0), (640, 480))
            next_id += 1
        tracks = []
        for key, place in alive.items():
            place = place + rng.normal(0, 40 if rng.random() < 0.1 else 4, 2)
            alive[key] = place
            box = (place[0] - 15, place[1] - 80, place[0] + 15, place[1])
            tracks.append(
                track.Track(
                    id=key,
                    box_xyxy_px=tuple(map(float, box)),
                    label=int(rng.integers(0, 2)),
                    score=float(rng.random()),
                    age=1.0,
                    unseen=float(rng.random() < 0.2),
                    velocity_px=tuple(map(float, rng.normal(0, 30, 2))),
                )
            )
        yield tracks


RANDOM = """
[rules.inside]
kind = "inside"
zone = "lawn"
score = 0.3
on = [2, 4]
off = 3
cooldown = 1.5
[rules.each]
kind = "inside"
zone = "lawn"
per = "track"
on = [3, 9]
off = 2
cooldown = 0.7
dwell = 0.3
[rules.gate]
kind = "cross"
line = "gate"
off = 4
cooldown = 2
[rules.gate_of_all]
kind = "cross"
line = "gate"
per = "rule"
off = 1
[rules.crowd]
kind = "crowd"
zone = "lawn"
count = 2
cooldown = 0.5
[rules.absent]
kind = "absent"
zone = "lawn"
off = 2
[rules.fast]
kind = "inside"
faster = 30
"""


def is_surely(rules, rule, tracks):
    """Whether any track counts in this frame by itself, written from the rule's words alone."""

    def counts(t, sure):
        x, y = (t.box_xyxy_px[0] + t.box_xyxy_px[2]) / 2, t.box_xyxy_px[3]
        x, y = np.clip(x, 0.5, 639.5), np.clip(y, 0.5, 479.5)
        inside = not rule.zone or (200 < x < 500 and 100 < y < 400)
        quick = np.hypot(*t.velocity_px) > rule.faster or not rule.faster
        return inside and quick and (not sure or (t.unseen == 0 and t.score >= rule.score))

    if rule.kind == "crowd":
        return sum(counts(t, True) for t in tracks) >= rule.count
    if rule.kind == "absent":
        return sum(counts(t, False) for t in tracks) < rule.count
    return any(counts(t, True) for t in tracks)


def test_what_holds_of_random_tracks(rng):
    """Of each alarm: clear frames and the cooldown between two, evidence at each start."""
    rules = rules_of(RANDOM)
    state, said, history = alarms.init(), [], []
    time = Fraction(0)
    clock = []
    for i, tracks in enumerate(random_tracks(rng, 1500)):
        time += Fraction(int(rng.integers(1, 5)), 20)
        clock.append(time)
        history.append(tracks)
        state, raised = alarms.update(rules, state, tracks, i, time)
        said += raised
        assert len(state.evidence) <= len(rules.rules) * 6
    by_rule = {rule.name: rule for rule in rules.rules}
    assert {one["rule"] for one in said} == set(by_rule)
    numbers = [one["number"] for one in said if one["event"] == "start"]
    assert numbers == list(range(1, len(numbers) + 1))
    open_now, last_end = {}, {}
    for one in said:
        rule = by_rule[one["rule"]]
        if one["event"] == "start":
            owner = (rule.name, one["tracks"][0]["id"] if rule.per == "track" else 0)
            assert owner not in open_now.values()
            open_now[one["number"]] = owner
            if owner in last_end:
                frame, ended = last_end[owner]
                assert one["time"] - ended >= rule.cooldown
                assert one["frame"] > frame
            if rule.kind != "cross":
                recent = range(max(one["frame"] - rule.on[1] + 1, 0), one["frame"] + 1)
                sure = [is_surely(rules, rule, history[i]) for i in recent]
                assert sum(sure) >= rule.on[0], one
                assert sure[-1]
        else:
            last_end[open_now.pop(one["number"])] = (one["frame"], one["time"])
            if rule.kind != "cross" and rule.per == "rule" and not one["cut"]:
                clear = range(one["frame"] - rule.off + 1, one["frame"] + 1)
                assert not any(is_surely(rules, rule, history[i]) for i in clear), one


def test_alarms_hardly_depend_on_the_rate_of_frames(rng):
    """Seconds of dwell and cooldown are seconds; what is counted in frames is that many later."""
    way = scenes.walk((100, 300), (30, 0), 600, 30)
    found = {}
    for step in (1, 3, 6):
        frames = people(way)[::step]
        said = watch(INSIDE + "dwell = 3\n", frames, scenes.times(600, 30)[::step])
        ((begun, ended),) = [tuple(said)]
        found[step] = (float(begun["time"]), float(ended["time"]))
    for step, (begun, ended) in found.items():
        assert abs(begun - found[1][0]) <= 4 * step / 30
        assert abs(ended - found[1][1]) <= 7 * step / 30


def test_numbers_in_events_have_fixed_decimals():
    said = watch(INSIDE, people(scenes.walk((50, 300), (100, 0), 70)))
    for one in said:
        text = events.to_json(one)
        assert re.findall(r"\d+\.(\d+)", text)
        assert {len(part) for part in re.findall(r"\d+\.(\d+)", text)} <= {3, 6}
