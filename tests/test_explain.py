"""`vision_jax explain`: what it writes, and what it refuses."""

import json
import re

import numpy as np
import pytest
import runs
from PIL import Image

from vision_jax import main
from vision_jax.explain import page
from vision_jax.explain.methods import METHODS

FEW = "saliency,grad_cam,attention_rollout"


@pytest.fixture
def photos(tmp_path, rng):
    """Two photos, one with a name that would be a tag, and a file that is no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "<b onload=alert(1)>.png"):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name)
    (folder / "c.png").write_bytes(b"no image")
    return folder


def explain(*arguments):
    return main.main(["explain", *map(str, arguments)])


@pytest.mark.long
def test_images_are_explained_in_pictures_a_record_and_a_page(photos, tmp_path, capsys):
    out = tmp_path / "out"
    weights = runs.inputs() / "weights.safetensors"
    assert explain(weights, "--images", photos, f"--methods={FEW}", f"--out={out}") == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "explanations.json").read_text())
    assert set(record["methods"]) == {*FEW.split(","), "random"}
    assert [one["file"] for one in record["images"]] == [
        str(photos / name) for name in ("<b onload=alert(1)>.png", "a.png")
    ]
    assert len(record["damaged"]) == 1
    assert "c.png" in record["damaged"][0]
    for one in record["images"]:
        assert one["predicted"] == one["explained"]
        for name, figures in one["methods"].items():
            assert all(np.isfinite(value) for value in figures.values())
            assert ("rank_correlation" in figures) == (name != "random")
        with Image.open(out / one["picture"]) as picture:
            assert picture.size == (4 * 190, 220)
    text = (out / "explanations.html").read_text()
    assert len(re.findall(r'src="data:image/webp;base64,', text)) == 2 * (1 + 2 * 3)
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<b onload" not in text
    assert "&lt;b onload=alert(1)&gt;" in text
    assert f"wrote 2 pictures into {out}" in printed.replace("\n", "")
    for name in ("explanations.json", "explanations.html"):
        assert f"wrote {out / name}" in printed.replace("\n", "")


@pytest.mark.long
def test_a_run_is_explained_over_its_own_data(tmp_path, capsys):
    out = tmp_path / "out"
    workdir = runs.finished()
    assert explain(workdir, "--dataset", "--limit=12", "--checkpoint=last", f"--out={out}") == 0
    record = json.loads((out / "explanations.json").read_text())
    assert record["count"] == 12
    assert set(record["methods"]) == {"integrated_gradients", "random"}
    assert abs(record["methods"]["integrated_gradients"]["completeness"]) < 1
    assert sum(one["count"] for one in record["per_class"].values()) == 12
    assert set(record["per_class"]) == set(runs.CLASSES)
    wrong = record["confident_errors"]
    assert len(wrong) == min(round(12 * (1 - record["top1"])), 12)
    assert all(one["predicted"] != one["class"] for one in wrong)
    certain = [one["probability"] for one in wrong]
    assert certain == sorted(certain, reverse=True)
    text = (out / "explanations.html").read_text()
    taken = [one["count"] for one in record["per_class"].values()]  # images of these predictions
    assert text.count("<figure>") == sum(count > 0 for count in taken) + 3 * len(wrong)
    assert "the mean over the images it takes for each class" in text
    capsys.readouterr()


@pytest.mark.long
def test_bad_requests_are_answered_in_one_line(photos, capsys):
    weights = runs.inputs() / "weights.safetensors"
    for arguments, answer in (
        ((weights, "--images", photos, "--methods=gradcam"), "did you mean `grad_cam`"),
        ((weights, "--images", photos, "--class=LABEL_9"), "no class 'LABEL_9'"),
        ((weights, "--images", photos / "c.png", "--methods=saliency"), "c.png"),
        ((weights, "--images", photos / "none"), "there is no file"),
        ((weights, "--dataset"), "--dataset=DATA"),
        ((weights, "--dataset", "--class=LABEL_1"), "--class goes with --images"),
        ((weights, "--images", photos, "--limit=3"), "--limit"),
        ((weights,), "required"),
        (("embedded:nanodet_coco", "--images", photos), "explain takes classifiers"),
    ):
        assert explain(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert answer in error


def test_heat_is_shown_where_it_is(rng):
    image = rng.integers(0, 256, (6, 8, 3), np.uint8)
    heat = -np.ones((6, 8))
    heat[2, 5] = 3
    shown = page.to_rgba(heat)
    assert np.argwhere(shown[..., 3]).tolist() == [[2, 5]]
    over = page.overlay(image, heat)
    grey = image.mean(-1).round().astype(int)
    others = np.ones((6, 8), bool)
    others[2, 5] = False
    assert abs(over[others].astype(int) - grey[others][:, None]).max() <= 1
    assert not page.to_rgba(np.full((2, 2), np.nan))[..., 3].any()
    assert set(METHODS) >= set(FEW.split(","))
