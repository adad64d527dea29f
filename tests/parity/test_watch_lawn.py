"""The street video watched by the real NanoDet: one alarm, of somebody who does walk on the lawn.

The video (96 MB, of Debian's opencv-doc) is downloaded; skipped where there is no apt.
"""

import json

import fetched
import pytest
import runs

from vision_jax import main

pytest.importorskip("av")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return fetched.fetch("fetch_street_video", tmp_path_factory.mktemp("street"))


@pytest.mark.long
@pytest.mark.parametrize("score", [0.3, 0.4, 0.5])
def test_one_alarm_of_a_person_on_the_lawn(video, tmp_path, score, capsys):
    out, rules = tmp_path / "lawn", tmp_path / "rules.toml"
    text = (runs.ROOT / "configs" / "watch_lawn.toml").read_text()
    rules.write_text(f"{text}\n[tracking]\nhigh = {score}\n")
    arguments = ["--model=embedded:nanodet_coco", f"--rules={rules}", f"--out={out}"]
    assert main.main(["watch", str(video), *arguments, f"--score={score}"]) == 0
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    begun = [event for event in events if event["event"] == "start"]
    assert events[-1]["frames"] == 795
    assert len(begun) == 1
    assert 500 <= begun[0]["frame"] <= 530
    assert {track["class"] for track in begun[0]["tracks"]} == {"person"}
    assert "1 alarms" in capsys.readouterr().out
    if score == 0.5:  # the same bytes again
        again = [*arguments[:-1], f"--out={tmp_path / 'again'}", "--clips=0"]
        assert main.main(["watch", str(video), *again, f"--score={score}"]) == 0
        for name in ("detections.jsonl", "events.jsonl", "stills/000001.jpg"):
            assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
