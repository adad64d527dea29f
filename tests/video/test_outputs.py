"""Stills, clips, the annotated video and the page, looked at in a browser; marks to a data set."""

import json
from fractions import Fraction

import browser
import numpy as np
import pytest
import scenes
from PIL import Image

from vision_jax.errors import UserError
from vision_jax.video import clips, events, feedback, page
from vision_jax.video.outputs import Wanted
from vision_jax.video.track import Track

STILLS_ALONE = Wanted(Fraction(0), Fraction(0))


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    """A watched folder with stills and a page."""
    out = tmp_path_factory.mktemp("stills")
    rules, said = scenes.watch(out, wanted=STILLS_ALONE)
    return out, rules, said


def starts(out):
    return [one for one in page.read_events(out) if one["event"] == "start"]


def test_a_still_is_the_frame_in_which_an_alarm_began(stills):
    out, _, said = stills
    begun = starts(out)
    assert [one["rule"] for one in begun] == ["lawn", "gate", "gate"]
    assert said[0].endswith(f"{len(begun)} stills")
    for one in begun:
        image = np.asarray(Image.open(out / clips.still_name(one["number"]))).astype(int)
        left, top, right, bottom = one["tracks"][0]["box_xyxy_px"]
        x, y = int((left + right) / 2), int((top + bottom) / 2)
        color = image[y - 5 : y + 5, x - 5 : x + 5].mean((0, 1))
        person = one["tracks"][0]["class"] == "person"
        assert np.abs(color - ((200, 40, 40) if person else (40, 160, 60))).max() < 12


def test_clips_and_the_annotated_video(tmp_path):
    av = pytest.importorskip("av", reason="the extra video")
    wanted = Wanted(Fraction(1), Fraction(2), annotated=True)
    for name in ("one", "two"):
        _, said = scenes.watch(tmp_path / name, wanted=wanted)
    files = ["annotated.mp4", *(clips.clip_name(n) for n in (1, 2, 3)), page.PAGE]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert not list(tmp_path.rglob("*.draft"))
    assert any("3 clips" in line for line in said)

    begun = starts(tmp_path / "one")
    for one in begun:
        with av.open(tmp_path / "one" / clips.clip_name(one["number"])) as video:
            times = [frame.time for frame in video.decode(video=0)]
        before = min(one["time"], 1.0)
        assert times[0] == 0
        assert len(times) == round(before * 10) + min(20, 59 - one["frame"]) + 1
        np.testing.assert_allclose(np.diff(times), 0.1, atol=1e-4)
    with av.open(tmp_path / "one" / clips.ANNOTATED) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 60
    zone = frames[0][250, 196:205].astype(int)  # its left edge at x = 200 is yellow
    assert (zone[:, 0] - zone[:, 2]).max() > 60


def test_frames_that_are_kept_stay_within_their_bytes(tmp_path):
    """As they are if they fit, else as JPEG; ten a second at most."""
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    recorder = clips.Recorder(tmp_path, before=Fraction(1000), after=Fraction(0), most=200_000)
    for i in range(200):
        recorder.frame(noise, Fraction(i, 10), [])
        assert recorder.held <= 200_000
        assert recorder.held == sum(map(len, (kept for _, kept in recorder.ring)))
    assert 3 < len(recorder.ring) < 60
    short = clips.Recorder(tmp_path, before=Fraction(1), after=Fraction(0))
    for i in range(200):
        short.frame(noise, Fraction(i, 25), [])
        assert short.held == sum(kept.nbytes for _, kept in short.ring)
    assert 9 <= len(short.ring) <= 11


def test_what_was_stopped_leaves_no_half_clip(tmp_path):
    pytest.importorskip("av", reason="the extra video")
    noise = np.zeros((64, 64, 3), np.uint8)
    raised = [{"event": "start", "number": 1}]
    with clips.Recorder(tmp_path) as recorder:
        recorder.frame(noise, Fraction(0), raised)
        left = tmp_path / clips.clip_name(2)
        left.with_name(f"{left.name}.draft").write_bytes(b"of a kill")
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["000002.mp4.draft"]
    with clips.Recorder(tmp_path) as recorder:
        recorder.frame(noise, Fraction(0), raised)
        recorder.finish()
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["000001.mp4"]


@pytest.mark.parametrize("size", [(48, 64), (720, 1280)])
def test_colors_of_a_video_are_the_frames(tmp_path, size):
    av = pytest.importorskip("av", reason="the extra video")
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, : size[1] // 2] = (40, 160, 60)
    pixels[:, size[1] // 2 :] = (200, 40, 40)
    writer = clips.VideoWriter(tmp_path / "a.mp4", size)
    writer.write(pixels, Fraction(0))
    writer.close()
    with av.open(tmp_path / "a.mp4") as video:
        frame = next(video.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (1, 1)
    shown = frame.to_ndarray(format="rgb24").astype(int)
    assert np.abs(shown - pixels)[8:-8, 8 : size[1] // 2 - 8].max() <= 6
    assert np.abs(shown - pixels)[8:-8, size[1] // 2 + 8 : -8].max() <= 6


def test_many_alarms_at_once_have_stills_and_some_clips(tmp_path):
    pytest.importorskip("av", reason="the extra video")
    noise = np.zeros((64, 64, 3), np.uint8)
    with clips.Recorder(tmp_path) as recorder:
        raised = [{"event": "start", "number": n} for n in range(1, 13)]
        recorder.frame(noise, Fraction(0), raised)
        recorder.frame(noise, Fraction(1), [])
        recorder.finish()
    assert len(list((tmp_path / "stills").iterdir())) == 12
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == clips.MAX_OPEN
    assert "4 alarms have none" in recorder.written()[-1]


def test_frames_of_odd_sizes_and_hostile_names_are_drawn():
    from vision_jax.video.rules import check, parse_rules

    names = ("a\x1b[31m\n", "b", "c")
    text = '[rules.all]\nkind = "inside"\n'
    rules = check(parse_rules(text, "rules", names), (37, 53))
    track = Track(1, (-5.0, -5.0, 60.0, 70.0), 0, 0.5, 1.0, 0.3, (0.0, 0.0))
    drawn = clips.annotate(np.zeros((37, 53, 3), np.uint8), rules, [track], [1], "text")
    assert drawn.shape == (37, 53, 3)
    assert drawn.any()


# The page ---------------------------------------------------------------------------------------


def test_nothing_in_a_log_ends_the_page_s_data(stills):
    out, rules, _ = stills
    text = (out / page.PAGE).read_text()
    data = text.partition('<script id="data" type="application/json">')[2].partition("</script>")[0]
    content = json.loads(data)
    assert "--ink: #1b1f24" in text.partition("</style>")[0]  # of pages.css
    assert "{{" not in text.replace(data, "")
    assert content["source"] == "made <up>"
    assert "<" not in data
    assert [one["rule"] for one in content["alarms"]] == ["lawn", "gate", "gate"]
    assert len(content["alarms"][0]["found"]) == 3  # the one of score 0.3 isn't shown
    assert [box["class"] for box in content["alarms"][0]["found"] if box["alarm"]] == ["person"]
    assert page.write_page(out, rules).read_text() == text


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


@pytest.mark.long
@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed")
def test_a_person_judges_alarms_and_exports_them(opened, tmp_path):
    pytest.importorskip("av", reason="the extra video")
    rules, _ = scenes.watch(tmp_path, wanted=Wanted(Fraction(1), Fraction(2)))
    opened.events.clear()
    opened.prefer("light")
    opened.open((tmp_path / page.PAGE).as_uri())
    opened.wait("document.querySelectorAll('article').length == 3")
    assert "made <up>" in opened.text()
    assert "3 alarms in 60 frames, 5.9 seconds" in opened.text()
    assert opened.run("document.querySelectorAll('#timeline .track button').length") == 3
    widths = opened.run("[...document.querySelectorAll('article img')].map(i => i.naturalWidth)")
    assert widths == [640] * 3
    for number in (1, 2, 3):
        boxes = f"document.querySelectorAll('#alarm-{number} rect.alarm').length"
        assert opened.run(boxes) == 1
    # The zone is drawn where it is: its polygon's corner on the screen, from the picture's own.
    x, y = opened.run(
        "(() => { const s = document.querySelector('#scene svg').getBoundingClientRect();"
        " const p = document.querySelector('#scene polygon').getBoundingClientRect();"
        " return [(p.left - s.left) / s.width, (p.top - s.top) / s.height]; })()"
    )
    assert abs(x - 200 / 640) < 0.01
    assert abs(y - 100 / 480) < 0.01
    length = (
        "(async () => { const v = document.querySelector('video'); v.preload = 'auto'; v.load();"
        " await new Promise((r, e) => { v.onloadedmetadata = r; v.onerror = e; });"
        " return v.duration; })()"
    )
    assert abs(opened.run(length) - 2.9) < 0.3
    opened.run("document.querySelector('article .mark[data-value=false]').click()")
    opened.run("document.querySelectorAll('article')[1].querySelector('.mark').click()")
    opened.run(
        "document.querySelectorAll('article')[1].querySelectorAll('rect.box')[2]"
        ".dispatchEvent(new MouseEvent('click', { bubbles: true }))"
    )
    assert "2 of 3 judged" in opened.text()
    opened.open("about:blank")
    opened.open((tmp_path / page.PAGE).as_uri())  # marks stay
    opened.wait("document.body.innerText.includes('2 of 3 judged')")
    assert opened.run("document.querySelectorAll('.track button.false').length") == 1
    opened.run("(f => { f.value = 'false'; f.dispatchEvent(new Event('change')); })($('filter'))")
    assert "1 shown" in opened.text()
    opened.run("document.querySelectorAll('.track button')[2].click()")
    opened.wait("document.querySelector('article.current h3').innerText.startsWith('3.')")
    marks = tmp_path / "marks.json"
    opened.say("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    opened.run("$('export').click()")
    opened.wait("true")
    wait_for(marks)
    made = feedback.write_coco(tmp_path, marks, tmp_path / "marked", rules)
    assert (made.images, made.taken_out) == (2, 2)
    bad = [e for e in opened.events if e[0] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert not bad
    asked = [e[1]["request"]["url"] for e in opened.events if e[0] == "Network.requestWillBeSent"]
    assert not [url for url in asked if url.startswith("http")]
    for scheme in ("light", "dark"):
        opened.prefer(scheme, 420, 900)
        assert opened.run("document.documentElement.scrollWidth") <= 420
        assert len(opened.picture()) > 10_000


def wait_for(path, seconds=30):
    import time

    end = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < end, f"{path} isn't there"
        time.sleep(0.05)


# Marks --------------------------------------------------------------------------------------------


def marks_of(out, *judged, **changes):
    begun = {one["number"]: one["frame"] for one in starts(out)}
    alarms = [
        {"number": n, "frame": begun.get(n, 0), "verdict": verdict, "wrong": wrong}
        for n, verdict, wrong in judged
    ]
    key = page.key_of(page.read_events(out))
    return {"version": 1, "key": key, "source": "a", "alarms": alarms, **changes}


def test_marks_become_coco(stills, tmp_path):
    out, rules, _ = stills
    marks = tmp_path / "marks.json"
    marks.write_text(json.dumps(marks_of(out, (1, "false", [0, 1, 2]), (2, "true", []))))
    made = feedback.write_coco(out, marks, tmp_path / "to", rules)
    assert (made.images, made.boxes, made.taken_out, made.negatives) == (2, 3, 3, 1)
    content = json.loads(made.path.read_text())
    assert [one["name"] for one in content["categories"]] == list(scenes.NAMES)
    for one in content["images"]:
        with Image.open(tmp_path / "to/images" / one["file_name"]) as image:
            assert image.size == (one["width"], one["height"]) == (640, 480)
    begun = starts(out)[1]
    logged = page.boxes_at(out, {begun["frame"]})[begun["frame"]]
    kept = logged.scores >= rules.tracking.high
    boxes = np.array([one["bbox"] for one in content["annotations"]])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(boxes, logged.boxes_xyxy_px[kept], atol=0.011)
    labels = [one["category_id"] - 1 for one in content["annotations"]]
    assert labels == logged.labels[kept].tolist()
    low = feedback.write_coco(out, marks, tmp_path / "low", rules, least=0.1)
    assert low.boxes == 5  # the unmarked ones of score 0.3, too


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "has no marks of the page"),
        ({"version": 2}, "has version 2"),
        ({"key": "another"}, "is of the log `another`"),
        ({"alarms": []}, "no alarm that was judged"),
        ({"alarms": [{"number": 99, "frame": 3, "verdict": "true", "wrong": []}]}, "no alarm 99"),
        ({"alarms": [{"number": 1, "verdict": "so", "wrong": []}]}, "has no marks"),
        ((1, "false", [77]), "has no box 77"),
        ((1, "false", ["a"]), "has no marks"),
    ],
)
def test_marks_that_are_none(stills, tmp_path, content, words):
    out, rules, _ = stills
    marks = tmp_path / "marks.json"
    if isinstance(content, tuple):
        content = marks_of(out, content)
    elif isinstance(content, dict):
        content = marks_of(out, **content)
    marks.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"marks\.json") as raised:
        feedback.write_coco(out, marks, tmp_path / "to", rules)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b'{"event": "start", "number": 1}',
        b'{"event": "finish", "frame": 1, "frames": 1, "time": NaN}',
        b'{"event": "end", "rule": "a", "number": [1], "frame": 1, "time": 1, "cut": true}',
        b'{"event": "end", "rule": "a", "number": 1, "frame": 1, "time": "x", "cut": true}',
        b'{"event": "finish", "frame": 1, "frames": 1, "time": 1e999}',
        b'{"event": "other"}',
        b"\xff",
        b'{"event": 3}',
    ],
)
def test_events_from_outside(tmp_path, line):
    (tmp_path / events.EVENTS).write_bytes(line + b"\n")
    with pytest.raises(UserError, match="line 1"):
        page.read_events(tmp_path)
