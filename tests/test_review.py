"""review: from a watched folder to figures, and to a detector that trains on what was judged."""

import json

import detection_runs
import numpy as np
import pytest
import scenes

from vision_jax import train
from vision_jax.config import load_config
from vision_jax.logging import read_metrics
from vision_jax.main import main
from vision_jax.video import events, page
from vision_jax.video.evaluate import seen, tracks_of
from vision_jax.video.outputs import Wanted

STILLS_ALONE = Wanted(0, 0)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A folder with a log, stills and a page, not to be changed."""
    out = tmp_path_factory.mktemp("watched")
    scenes.watch(out, wanted=STILLS_ALONE)
    return out


def copy(out, to):
    """The folder's files in another one."""
    import shutil

    return shutil.copytree(out, to / "copy")


def marks_of(out, path):
    """A file of marks: every second alarm false, and three boxes wrong."""
    found = page.read_events(out)
    alarms = [
        {
            "number": one["number"],
            "frame": one["frame"],
            "verdict": "false" if one["number"] % 2 else "true",
            "wrong": [0, 1, 2] if one["number"] % 2 else [],
        }
        for one in found
        if one["event"] == "start"
    ]
    path.write_text(json.dumps({"version": 1, "key": page.key_of(found), "alarms": alarms}))
    return path


def test_alarms_are_listed_and_measured(watched, tmp_path, capsys):
    out = copy(watched, tmp_path)
    (out / page.PAGE).unlink()
    begun = next(one for one in page.read_events(out) if one["event"] == "start")
    true = tmp_path / "true.csv"
    start = begun["time"] - 0.4
    true.write_text(f"rule,start,end\nlawn,{start},{start + 4}\ngate,50,60\n")
    assert main(["review", str(out), f"--intervals={true}"]) == 0
    said = capsys.readouterr().out
    assert "3 alarms" in said
    assert "person 1" in said
    assert (out / page.PAGE).is_file()
    figures = json.loads((out / "evaluation.json").read_text())["alarms"]
    assert (figures["lawn"]["precision"], figures["lawn"]["recall"]) == (1, 1)
    assert figures["lawn"]["delay_median"] == pytest.approx(0.4)
    assert (figures["gate"]["right"], figures["gate"]["alarms"]) == (0, 2)


def test_tracks_are_measured(watched, tmp_path, capsys):
    pytest.importorskip("trackers", reason="the extra tracking")
    out = copy(watched, tmp_path)
    rules = events.load_rules(out)
    truth = tmp_path / "gt.txt"
    with truth.open("w") as file:
        for frame, boxes in seen(tracks_of(out, rules), [0]).items():
            for own, (left, top, right, bottom) in zip(*boxes, strict=True):
                row = (frame + 1, own, left, top, right - left, bottom - top, 1, 1, 1)
                file.write(",".join(map(str, row)) + "\n")
    assert main(["review", str(out), f"--truth={truth}", "--class=person"]) == 0
    figures = json.loads((out / "evaluation.json").read_text())["tracks"]
    assert [round(figures[name], 9) for name in ("mota", "idf1", "hota")] == [1, 1, 1]
    assert "hota" in capsys.readouterr().out
    assert main(["review", str(out), f"--truth={truth}", "--class=persom"]) == 2
    assert "did you mean `person`" in capsys.readouterr().err
    assert main(["review", str(out), f"--truth={out / 'tracks.txt'}", "--class=person"]) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--marks=marks.json"], "--marks and --out belong together"),
        (["--class=person"], "--class is of --truth"),
        (["--tolerance=-1"], "give seconds"),
        (["--webhook=ftp://a"], "--webhook"),
        (["--intervals=not_there.csv"], "not_there.csv"),
    ],
)
def test_flags_that_are_none(watched, flags, words, capsys):
    assert main(["review", str(watched), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_folder_without_a_log(tmp_path, capsys):
    assert main(["review", str(tmp_path)]) == 2
    assert "detections.jsonl" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("config", ["yolox_finetune", "detr_finetune"])
def test_a_detector_trains_on_what_was_judged(tmp_path, config, capsys):
    """The data set is taken as it is, negatives and all, and the loss is finite."""
    rules = "".join(
        f'[rules.after_{k}]\nkind = "inside"\nzone = "lawn"\n'
        f'classes = ["person"]\ndwell = {k / 5}\n'
        for k in range(9)
    )
    watched, out = tmp_path / "watched", tmp_path / "marked"
    scenes.watch(watched, wanted=STILLS_ALONE, text=rules + scenes.FIELD)
    marks = marks_of(watched, tmp_path / "marks.json")
    assert main(["review", str(watched), f"--marks={marks}", f"--out={out}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "9 images, 12 boxes, 15 taken out, 5 images without any" in said
    model = detection_runs.YOLOX if config == "yolox_finetune" else {}
    fields = {
        **model,
        "data__train": out / "annotations.json",
        "data__images": out / "images",
        "data__eval": out / "annotations.json",
        "data__eval_images": out / "images",
        "batch_size": 8,
        "total_steps": 1,
        "evaluate__every": 1,
        "evaluate__batch_size": 8,
    }
    if config == "yolox_finetune":
        fields |= {"data__mosaic": 0.0, "data__mixup": 0.0, "data__plain_steps": 0}
    path = detection_runs.runs.ROOT / f"configs/{config}.py"
    tiny = load_config(str(path), detection_runs.overrides(**fields))
    assert train.run(tiny, tmp_path / "run") == 0
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses
    assert np.isfinite(losses).all()
