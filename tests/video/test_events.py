"""The log: the same bytes each time, cut anywhere, killed, on a full disk, and from outside."""

import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import runs
import scenes
import watch_kills as kills

from vision_jax.errors import UserError
from vision_jax.video import events
from vision_jax.video.rules import check, parse_rules

TEXT = kills.RULES + scenes.FIELD
HEAD = events.Head("made up", scenes.SIZE, scenes.NAMES)


def ready(text=TEXT):
    return check(parse_rules(text, "rules", scenes.NAMES), scenes.SIZE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete log."""
    out = tmp_path_factory.mktemp("log")
    kills.write(out)
    return out


def parts(out):
    return [(out / name).read_bytes() for name in (events.DETECTIONS, events.EVENTS, events.RULES)]


def test_the_same_bytes_each_time_and_on_replay(whole, tmp_path):
    kills.write(tmp_path / "again")
    assert parts(whole) == parts(tmp_path / "again")
    lines = [json.loads(line) for line in parts(whole)[1].splitlines()]
    assert {one["event"] for one in lines} == {"watch", "start", "end", "finish"}
    assert len([one for one in lines if one["event"] == "start"]) > 5
    assert lines[-1]["frames"] == kills.FRAMES
    written = events.replay(whole, to=tmp_path / "replayed")
    assert parts(written.parent) == parts(whole)
    assert events.replay(tmp_path / "again").read_bytes() == parts(whole)[1]


def test_replay_takes_other_rules(whole, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text('[rules.dogs]\nkind = "inside"\nclasses = ["dog"]\n')
    to = tmp_path / "to"
    for _ in range(2):
        written = events.replay(whole, other, to)
        kinds = [json.loads(line)["event"] for line in written.read_text().splitlines()]
        assert kinds == ["watch", "finish"]
    assert [rule.name for rule in events.load_rules(to).rules] == ["dogs"]
    before = parts(whole)
    with pytest.raises(UserError, match="--to=DIR"):
        events.replay(whole, other)
    with pytest.raises(UserError, match="--to=DIR"):
        events.replay(whole, other, whole)
    assert parts(whole) == before
    log, _ = events.open_log(tmp_path / "other", HEAD._replace(source="b"), ready(), TEXT)
    with log:
        with pytest.raises(UserError, match="a process writes the log"):
            events.replay(tmp_path / "other")
        with pytest.raises(UserError, match="has the log of b"):
            events.replay(whole, other, tmp_path / "other")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ('schedule = ["sat"]', "no frame is in its schedule: they are of Tue 2026-12-01 18:00 to"),
        ('kind = "crowd"\ncount = 9\ndwell = 60', "it wants 60 seconds, and there were 29.9"),
        ("on = [400, 400]", "it wants 400 frames, and there were 300"),
        ('classes = ["dog"]', "nothing of its classes was found"),
        ('zone = "lawn"\nscore = 0.9', "nothing with a score of 0.9 or more was found"),
        (
            'classes = ["person"]\nmin_height = 81',
            "nothing of its classes with a score of 0.4 or more had 0 x 81 pixels or more",
        ),
        ('kind = "absent"\nzone = "lawn"\nschedule = ["sun"]', "no frame is in its schedule"),
        ('kind = "absent"\nclasses = ["dog"]', None),  # it is raised
        ('kind = "crowd"\ncount = 100', None),  # as many could have come
        ("faster = 10000", None),
    ],
)
def test_a_rule_that_could_not_be_met_is_named(whole, tmp_path, fields, why):
    other = tmp_path / "other.toml"
    kind = "" if "kind" in fields else 'kind = "inside"\n'
    start = "start = 2026-12-01T18:00:00Z\n"
    other.write_text(f"{start}[rules.one]\n{kind}{fields}\n{scenes.FIELD}")
    to = events.replay(whole, other, tmp_path / "to").parent
    said = events.unmet(to, events.load_rules(to))
    if why is None:
        assert said == []
    else:
        (line,) = said
        assert line.startswith(f"rule `one` could not be met: {why}")


def test_what_is_used_is_what_was_written(rng):
    boxes = rng.uniform(0, 500, (50, 4)).astype(np.float32)
    found = scenes.Found(boxes, rng.random(50).astype(np.float32), np.arange(50) % 3)
    line = events.frame_line(3, Fraction(1001, 30000), found)
    once = events.parse_frame(line.encode(), "a line", 3)
    assert events.frame_line(once.frame, once.time, once) == line
    assert np.abs(once.boxes_xyxy_px - boxes).max() <= 0.005 + 1e-9
    assert once.time == Fraction(1001, 30000)


def test_a_log_that_was_cut_anywhere_is_completed(whole, tmp_path, rng):
    """Both files at random bytes, as a kill leaves them: no events of frames that aren't there."""
    detections, said, rules = parts(whole)
    ends = np.cumsum([len(line) + 1 for line in detections.splitlines()])
    frames = {
        json.loads(line).get("frame", -1): end
        for line, end in zip(detections.splitlines(), ends, strict=True)
    }
    for number in range(2):
        out = tmp_path / str(number)
        out.mkdir()
        cut = int(rng.integers(ends[0], len(detections) - 20))
        allowed = 0
        for line in said.splitlines(keepends=True):
            one = json.loads(line)
            if one["event"] != "watch" and frames[one["frame"]] > cut:
                break
            allowed += len(line)
        (out / events.DETECTIONS).write_bytes(detections[:cut])
        (out / events.EVENTS).write_bytes(said[: int(rng.integers(0, allowed + 1))])
        (out / events.RULES).write_bytes(rules)
        replayed = events.replay(out, to=out / "replayed").read_bytes()
        assert said.startswith(replayed)
        kills.write(out)
        assert parts(out) == parts(whole)


def test_a_log_that_ended_gets_the_events_that_a_kill_left_out(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    said = (out / events.EVENTS).read_bytes()
    for left in (len(said) - 1, said[:-1].rfind(b"\n") - 5):
        (out / events.EVENTS).write_bytes(said[:left])
        with pytest.raises(UserError, match="is complete"):
            kills.write(out)
        assert parts(out) == parts(whole)


@pytest.mark.long
def test_kill_9_at_20_moments(tmp_path, request):
    environment = {
        **os.environ,
        "PYTHONPATH": str(runs.ROOT),
        "SEED": str(request.config.option.seed),
    }
    done = subprocess.run(
        [sys.executable, Path(kills.__file__), tmp_path / "out", tmp_path / "reference"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed at") == 20
    assert parts(tmp_path / "out") == parts(tmp_path / "reference")


def test_a_full_disk_is_one_line_and_what_is_written_stays(tmp_path, monkeypatch):
    """The system takes half of a line, and no more."""
    log, progress = events.open_log(tmp_path, HEAD, ready(), TEXT)

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 1000

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            written = self.file.write(bytes(data[: self.left]))
            self.left -= written
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    log.detections = Full(log.detections)

    def write(progress):
        with log:
            for i, time, found in kills.frames():
                progress, _, said = events.step(ready(), progress, log.frame(i, time, found))
                log.raised(said)

    with pytest.raises(UserError, match="no space left on the device") as raised:
        write(progress)
    assert "\n" not in str(raised.value)
    left = (tmp_path / events.DETECTIONS).read_bytes()
    assert not left.endswith(b"\n")
    assert len(list(events.read_frames(tmp_path))) == left.count(b"\n") - 1 > 0
    kills.write(tmp_path)
    kills.write(tmp_path / "reference")
    assert parts(tmp_path) == parts(tmp_path / "reference")


def test_folders_of_something_else(whole, tmp_path):
    with pytest.raises(UserError, match="is complete"):
        events.open_log(whole, HEAD, ready(), TEXT)
    begun = tmp_path / "begun"
    log, progress = events.open_log(begun, HEAD, ready(), TEXT)
    with log:
        with pytest.raises(UserError, match="another process writes"):
            events.open_log(begun, HEAD, ready(), TEXT)
        for i, time, found in kills.frames():
            progress, _, said = events.step(ready(), progress, log.frame(i, time, found))
            log.raised(said)
    other = HEAD._replace(source="another")
    with pytest.raises(UserError, match="is of made up, and not of this another"):
        events.open_log(begun, other, ready(), TEXT)
    changed = TEXT.replace("off = 2", "off = 3")
    with pytest.raises(UserError, match="isn't what these rules say"):
        events.open_log(begun, HEAD, ready(changed), changed)
    (begun / events.DETECTIONS).unlink()
    said = (begun / events.EVENTS).read_bytes()
    with pytest.raises(UserError, match="has events, but not the frames"):
        events.open_log(begun, HEAD, ready(), TEXT)
    assert (begun / events.EVENTS).read_bytes() == said
    with pytest.raises(UserError, match="can't be read"):
        events.read_head(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"[]",
        b'{"frame": 9, "time": "1/0", "found": []}',
        b'{"frame": 9, "time": 3, "found": []}',
        b'{"frame": 9, "time": "9999999999999", "found": []}',
        b'{"frame": 9, "time": "-1/2", "found": []}',
        b'{"frame": -1, "time": "3", "found": []}',
        b'{"frame": 9, "time": "3", "found": [[1, 2, 3, 4, 0.5]]}',
        b'{"frame": 9, "time": "3", "found": [[1, 2, 3, 4, 0.5, 7]]}',
        b'{"frame": 9, "time": "3", "found": [[1, 2, 3, 4, NaN, 0]]}',
        b'{"frame": 0, "time": "3", "found": []}',
        b"\xff\xfe",
    ],
)
def test_lines_from_outside(tmp_path, line):
    path = tmp_path / events.DETECTIONS
    first = b'{"version": 1, "source": "a", "size": [480, 640], "class_names": ["b"], "start": ""}'
    good = b'{"frame": 0, "time": "0", "found": []}'
    path.write_bytes(b"\n".join([first, good, line, b""]))
    with pytest.raises(UserError, match="line 3"):
        list(events.read_frames(tmp_path))
    path.write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"detections\.jsonl"):
        events.read_head(tmp_path)
