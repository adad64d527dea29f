"""AP against epsilon of a finished detector: figures, files, and what is refused."""

import json

import detection_runs
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.run.restore import restore
from vision_jax.tasks.detection import robustness as robust
from vision_jax.tasks.detection import task as detect
from vision_jax.tasks.detection.figures import draw_robustness


@pytest.fixture(scope="module")
def restored():
    return restore(detection_runs.tiny_config(), detection_runs.finished(), "last")


def robustness(restored, workdir, **fields):
    config = detection_runs.tiny_config(
        **{f"robustness__{name}": value for name, value in fields.items()}
    )
    return detect.robustness(config, workdir, restored.trained, lambda folder: restored.trained)


@pytest.mark.long
def test_figures_of_each_epsilon_and_a_picture(restored, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(robust, "PICTURES", 2)
    capsys.readouterr()
    epsilons = (0.05, 0.01)
    fields = {"images": 5, "batch_size": 8, "attacks": ("pgd",), "steps": 2, "norm": "l2"}
    record = robustness(restored, tmp_path, epsilons=epsilons, **fields)
    assert record == json.loads((tmp_path / "robustness.json").read_text())
    assert record["images"] == record["clean"]["count"] == 5
    assert record["clean"]["largest"] == 0
    rows = record["attacks"]["pgd"]
    assert [row["epsilon"] for row in rows] == [0.01, 0.05]
    for row in rows:
        assert 0.9 * row["epsilon"] < row["largest"] < 1.0001 * row["epsilon"]
    assert (tmp_path / "robustness.png").stat().st_size > 20_000
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["clean", "pgd", "pgd", "wrote", "wrote"]
    assert lines[1].endswith("n=5")


def test_an_unknown_attack_is_refused(restored, tmp_path):
    with pytest.raises(UserError, match="a detector's are fgsm and pgd, not `fgms`: did you mean"):
        robustness(restored, tmp_path, attacks=("fgms",))


def test_a_picture_without_boxes_or_classes_that_are_found(tmp_path):
    clean = {"ap": None, "ap50": None, "ap75": None, "count": 1}
    record = {"images": 1, "norm": "linf", "clean": clean, "attacks": {}}
    draw_robustness(record, [], (), tmp_path / "none.png", score=0.5)
    assert " ".join(robust.line("clean", clean).split()) == "clean ap - ap50 - ap75 - n=1"
    image = np.full((9, 7, 1), 0.25, np.float32)
    found = {
        "image": image,
        "adversarial": image + 1 / 255,
        "score": np.zeros(1, np.float32),
        "label": np.zeros(1, np.int32),
        "boxes_xyxy_px": np.zeros((1, 4), np.float32),
    }
    record["attacks"] = {"fgsm": [clean | {"epsilon": 1 / 255, "largest": 1 / 255}]}
    path = draw_robustness(record, [(found, found)], ("a",), tmp_path / "a.png", score=0.5)
    assert path.stat().st_size > 5_000
