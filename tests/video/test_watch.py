"""The command: what it writes, how it stops, and that it goes on."""

import datetime
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vision_jax import main
from vision_jax.errors import UserError
from vision_jax.loaded import load
from vision_jax.video import frames
from vision_jax.video.detect import make_detector, no_detections

av = pytest.importorskip("av")
watching = pytest.importorskip("watching")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return watching.write_video(tmp_path_factory.mktemp("video") / "walk.mp4")


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(watching.RULES)
    return path


def written(out):
    """What there is: bytes, and of a clip its frames and times.

    x264 gives other bytes for the same frames where its memory is not new, and the page holds them.
    """
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".mp4":
            with av.open(str(path)) as container:
                shown = [(frame.pts, frame.to_ndarray()) for frame in container.decode(video=0)]
            found[name] = [(pts, pixels.tobytes()) for pts, pixels in shown]
        else:
            found[name] = path.name if path.suffix == ".html" else path.read_bytes()
    return found


def events(out):
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_a_video_is_watched_to_its_end(video, rules, tmp_path, capsys):
    out = tmp_path / "out"
    assert watching.run(video, rules, out) == 0
    found = events(out)
    assert [one["event"] for one in found] == ["watch", "start", "end", "start", "end", "finish"]
    assert found[-1]["frames"] == 120
    assert found[1]["tracks"][0]["class"] == "square"
    middle = 2 * found[1]["tracks"][0]["box_xyxy_px"][0]
    assert middle == pytest.approx(watching.WIDTH - watching.SIDE, abs=24)
    printed = capsys.readouterr().out
    assert "walk.mp4 0:01." in printed
    assert "alarm 1 begins: walked_in: square 0.5" in printed
    assert "the end, after 120 frames and 2 alarms" in printed
    assert f"wrote {out / 'detections.jsonl'}, {out / 'events.jsonl'}" in printed
    assert {"clips/000002.mp4", "stills/000002.jpg", "index.html"} <= written(out).keys()
    again = tmp_path / "again"
    assert watching.run(video, rules, again) == 0
    assert written(again) == written(out)
    assert watching.run(video, rules, again, extra=["--rate=5"]) == 2
    assert "all frames, of content" in capsys.readouterr().err
    assert watching.run(video, rules, again) == 2  # it is complete
    assert "name another --out" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [7, *(pytest.param(n, marks=pytest.mark.long) for n in (0, 28))])
def test_a_signal_lets_the_same_command_go_on_to_the_same_bytes(
    video, rules, tmp_path, capsys, batch
):
    whole, cut, count = tmp_path / "whole", tmp_path / "cut", iter(range(1000))

    def stop(frames):
        if next(count) == batch:
            os.kill(os.getpid(), signal.SIGTERM)

    assert watching.run(video, rules, cut, each=stop) == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().err
    assert len((cut / "detections.jsonl").read_text().splitlines()) == 1 + 4 * (batch + 1)
    assert watching.run(video, rules, cut) == 0
    assert watching.run(video, rules, whole) == 0
    assert written(cut) == written(whole)


def test_a_log_is_not_ended_before_its_last_frame(video, rules, tmp_path, capsys):
    """By a flag, here; a file that lost its end would do the same."""
    count = iter(range(1000))

    def stop(frames):
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "out"
    assert watching.run(video, rules, out, each=stop) == 128 + signal.SIGTERM
    before = (out / "detections.jsonl").read_bytes(), (out / "events.jsonl").read_bytes()
    assert watching.run(video, rules, out, extra=["--frames=10"]) == 2
    assert "its log goes on to frame 31" in capsys.readouterr().err
    assert before == ((out / "detections.jsonl").read_bytes(), (out / "events.jsonl").read_bytes())
    assert watching.run(video, rules, out) == 0


@pytest.mark.long
@pytest.mark.parametrize("kills", [20])
def test_kill_9_at_any_moment_loses_nothing(rules, tmp_path, kills, request):
    video = watching.write_video(tmp_path / "walk.mp4", 280)
    out, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = [str(one) for one in (video, rules, out, request.config.option.seed, kills)]
    program = Path(watching.__file__)
    result = subprocess.run(
        [sys.executable, program, *arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) == kills
    assert watching.run(video, rules, whole) == 0
    assert written(out) == written(whole)


def test_several_sources_have_a_folder_each_and_the_bytes_of_one_alone(video, rules, tmp_path):
    short = watching.write_video(tmp_path / "short.mp4", 30)
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, pixels in enumerate(watching.pictures(9)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    both, one = tmp_path / "both", tmp_path / "one"
    assert watching.run([video, short, short, folder], rules, both, extra=["--folder-rate=10"]) == 0
    assert {path.name for path in both.iterdir()} == {"walk", "short", "short_2", "frames"}
    for source, name in ((video, "walk"), (short, "short_2"), (folder, "frames")):
        extra = ["--folder-rate=10"] if source == folder else []
        assert watching.run(source, rules, one / name, extra=extra) == 0
        assert written(both / name) == written(one / name)


def test_so_many_frames_seconds_and_a_rate(video, rules, tmp_path):
    for name, flags, kept in (
        ("a", ["--frames=10"], list(range(10))),
        ("b", ["--duration=0.5"], list(range(5))),
        ("c", ["--rate=5", "--frames=4"], [0, 2, 4, 6]),
    ):
        assert watching.run(video, rules, tmp_path / name, extra=flags) == 0
        lines = (tmp_path / name / "detections.jsonl").read_text().splitlines()[1:-1]
        assert [json.loads(line)["frame"] for line in lines] == kept


def test_a_rule_that_could_not_be_met_is_named_at_the_end(video, rules, tmp_path, capsys):
    out = tmp_path / "out"
    assert watching.run(video, rules, out, extra=["--frames=1"]) == 0
    said = "note: rule `walked_in` could not be met: it wants 2 frames, and there were 1"
    assert said in capsys.readouterr().err
    for arguments in (["watch", "--replay", f"--out={out}"], ["review", str(out)]):
        assert main.main(arguments) == 0
        assert said in "".join(capsys.readouterr())


def test_a_file_that_is_cut_is_watched_as_far_as_it_goes(rules, tmp_path, capsys):
    whole = watching.write_video(tmp_path / "whole.avi")
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[:12_000])
    assert watching.run(cut, rules, tmp_path / "out") == 1
    assert "note: " in capsys.readouterr().err
    assert events(tmp_path / "out")[-1]["event"] == "finish"
    assert 10 < events(tmp_path / "out")[-1]["frames"] < 120


def test_replay_gives_the_same_bytes(video, rules, tmp_path):
    out = tmp_path / "out"
    assert watching.run(video, rules, out) == 0
    before = written(out)
    (out / "events.jsonl").unlink()
    assert main.main(["watch", "--replay", f"--out={out}"]) == 0
    assert written(out) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out=x"], "name a SOURCE to watch"),
        (["a.mp4", "--out=x"], "--model is missing"),
        (["a.mp4", "--out=x", "--model=y"], "--rules is missing"),
        (["a.mp4", "--out=x", "--model=y", "--rules=z", "--score=2"], "--score=2"),
        (["a.mp4", "--out=x", "--model=y", "--rules=z", "--rate=1e9"], "'1e9' is no number"),
        (["a.mp4", "--out=x", "--model=y", "--rules=z"], "a.mp4: can't be read"),
        (["http://a/b", "--out=x", "--model=y", "--rules=z"], "not fetched"),
        (["a.mp4", "--replay", "--out=x"], "name a SOURCE to watch, or --replay"),
        (["a.mp4", f"--out={__file__}/x", "--model=y", "--rules=z"], "--out: "),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main.main(["watch", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_rules_for_another_detector_are_refused(video, rules, tmp_path, capsys):
    rules.write_text(watching.RULES.replace('"square"', '"squares"'))
    assert watching.run(video, rules, tmp_path / "out") == 2
    assert "squares" in capsys.readouterr().err


def test_each_start_of_a_live_source_has_a_folder(video, rules, tmp_path, monkeypatch):
    """A camera whose watcher starts again, twice within a second."""
    opened, began = frames.Stream.__init__, []

    def live(self, name, _, *arguments, **keywords):
        before = datetime.datetime.now().astimezone()
        opened(self, name, False, *arguments, **keywords)
        assert before <= self.began <= datetime.datetime.now().astimezone()
        began.append(self.began.isoformat())
        self.live = True

    monkeypatch.setattr(frames.Stream, "__init__", live)
    for _ in range(3):
        assert watching.run(video, rules, tmp_path / "out", extra=["--frames=6"]) == 0
    folders = sorted((tmp_path / "out").iterdir())
    assert len(folders) == 3
    for folder in folders:
        first = events(folder)[0]
        assert first["start"] in began  # and not when the detector was ready
        assert first["start"].replace("-", "").replace(":", "")[:15] == folder.name[:15]
        assert events(folder)[-1]["frames"] == 6


def test_another_video_of_the_same_name_is_not_gone_on_with(rules, tmp_path, capsys):
    path = watching.write_video(tmp_path / "cam.mp4")

    def stop(frames):
        os.kill(os.getpid(), signal.SIGTERM)

    assert watching.run(path, rules, tmp_path / "out", each=stop) == 128 + signal.SIGTERM
    watching.write_video(path, 60)
    assert watching.run(path, rules, tmp_path / "out") == 2
    assert "name another --out" in capsys.readouterr().err


@pytest.mark.long
def test_two_streams_share_one_compiled_model(rules, tmp_path):
    """A detector of the zoo; a program more for each stream would be one more compilation."""
    loaded = load("embedded:nanodet_coco")
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compiled.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    detector = make_detector(loaded, 2, 0.3)
    before = len(compiled)
    assert before >= 1
    rng = np.random.default_rng(0)
    seen = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((48, 96), (97, 33), (480, 640))]
    for count in (1, 2, 3):
        assert len(detector.run(seen[:count])) == count
    detector.run(seen[::-1])
    assert len(compiled) == before


@pytest.mark.long
def test_boxes_are_those_of_predict(tmp_path):
    """By batches of several rows, an empty row among them."""
    loaded = load("embedded:nanodet_coco")
    detector = make_detector(loaded, 4, 0.05)
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(5):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        pictures.append(np.asarray(coarse.resize((320, 240))))
    for pixels, found in zip(pictures, detector.run(pictures), strict=True):
        given = loaded.preprocess(pixels)
        outputs = loaded.apply(loaded.variables, given.images, given.pixel_mask)
        wanted = jax.device_get(loaded.postprocess(outputs, given.sizes))
        kept = wanted["score"][0] >= 0.05
        np.testing.assert_allclose(found.scores, wanted["score"][0][kept], rtol=1e-4, atol=1e-5)
        boxes = np.clip(wanted["boxes_xyxy_px"][0][kept], 0, [320, 240, 320, 240])
        np.testing.assert_allclose(found.boxes_xyxy_px, boxes, atol=1e-2)


def test_a_classifier_is_no_detector():
    with pytest.raises(UserError, match="finds no boxes"):
        make_detector(load("embedded:vit_cifar10"), 1, 0.3)


def test_nothing_found_is_empty():
    found = no_detections()
    assert (found.boxes_xyxy_px.shape, found.scores.shape, found.labels.dtype) == (
        (0, 4),
        (0,),
        np.int32,
    )
