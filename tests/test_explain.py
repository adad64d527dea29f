"""`vision_jax explain`: what it writes, and what it refuses."""

import json
import re
from pathlib import Path

import detection_runs
import numpy as np
import pytest
import runs
import segmentation_runs
from PIL import Image

import vision_jax
from vision_jax import main
from vision_jax.explain import classes, page
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
    asked = (workdir, "--dataset", "--limit=12", "--checkpoint=last", f"--out={out}")
    assert explain(*asked, "--baseline=blurred") == 0
    record = json.loads((out / "explanations.json").read_text())
    assert record["baseline"] == "blurred"
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
def test_the_boxes_of_a_detector_are_explained(photos, tmp_path, capsys):
    """Each by itself, in pixels of its file; a class by its name; and nothing found is said."""
    out, weights = tmp_path / "out", tmp_path / "detector.safetensors"
    detection_runs.write_detector(
        weights, family="yolox", arguments=dict(detection_runs.YOLOX["model__arguments"])
    )
    few = ("--methods=layer_cam,saliency", "--most=2", f"--out={out}")
    assert explain(weights, "--images", photos, *few) == 0
    printed = capsys.readouterr().out.replace("\n", "")
    record = json.loads((out / "explanations.json").read_text())
    assert set(record["methods"]) == {"layer_cam", "saliency", "random"}
    assert len(record["images"]) == 2
    for one in record["images"]:
        assert 1 <= len(one["parts"]) <= 2
        for part in one["parts"]:
            left, top, right, bottom = part["box_xyxy_px"]
            assert 0 <= left < right <= 24
            assert 0 <= top < bottom <= 20
            figures = part["methods"]["layer_cam"]
            assert set(figures) == {"pointing", "inside", "shuffled_pointing", "rank_correlation"}
            with Image.open(out / part["picture"]) as picture:
                assert picture.size == (3 * 190, 220)
    count = sum(len(one["parts"]) for one in record["images"])
    text = (out / "explanations.html").read_text()
    assert text.count("<figure>") == 3 * count
    assert "<b onload" not in text
    assert f"wrote {count} pictures into {out}: boxes of 2 images" in printed
    name = record["images"][0]["parts"][0]["name"]
    assert explain(weights, "--images", photos, f"--class={name}", *few) == 0
    record = json.loads((out / "explanations.json").read_text())
    assert {part["name"] for one in record["images"] for part in one["parts"]} == {name}
    capsys.readouterr()
    assert explain(weights, "--images", photos, "--least-score=1", *few) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "nothing has a score of 1 or more: lower --least-score" in printed
    record = json.loads((out / "explanations.json").read_text())
    assert [one["parts"] for one in record["images"]] == [[], []]


@pytest.mark.long
def test_the_regions_of_a_segmenter_are_explained_and_measured_by_the_true_ones(tmp_path, capsys):
    out, workdir = tmp_path / "out", segmentation_runs.finished()
    few = ("--methods=layer_cam,grad_cam", "--least-score=0", f"--out={out}")
    images = sorted((segmentation_runs.data() / "test/images").iterdir())[:2]
    assert explain(workdir, "--images", *images, *few) == 0
    record = json.loads((out / "explanations.json").read_text())
    for one in record["images"]:
        shares = [part["share_of_pixels"] for part in one["parts"]]
        assert shares == sorted(shares, reverse=True)
        np.testing.assert_allclose(sum(shares), 1)  # all classes are among them
    capsys.readouterr()
    assert explain(workdir, "--dataset", *few) == 0  # of six updates
    assert "parts that are found is in the truth" in capsys.readouterr().out.replace("\n", " ")
    record = json.loads((out / "explanations.json").read_text())
    assert record["right"] == 0 < record["wrong"]
    assert len(record["confident_errors"]) == min(record["wrong"], 12)

    # Where the truth is what the model says, but for one class of one image, all else is right.
    loaded = vision_jax.load(workdir)
    said = []
    for kind in ("images", "masks"):
        (tmp_path / "said" / kind).mkdir(parents=True)
    for path in images:
        view = loaded.preprocess(path)
        (mask,) = np.asarray(loaded.apply(loaded.variables, view)["logits"]).argmax(-1)
        said.append(mask.astype(np.uint8))
        (tmp_path / "said/images" / path.name).write_bytes(path.read_bytes())
    first = int(np.bincount(said[0].reshape(-1)).argmax())
    said[0][said[0] == first] = (first + 1) % 3
    for path, mask in zip(images, said, strict=True):
        Image.fromarray(mask).save(tmp_path / "said/masks" / path.name)
    names = json.dumps(list(loaded.class_names))
    (tmp_path / "said/classes.json").write_text(names)
    assert explain(workdir, f"--dataset={tmp_path / 'said'}", *few) == 0
    record = json.loads((out / "explanations.json").read_text())
    assert record["count"] == 2
    assert record["right"] == sum(one["count"] for one in record["per_class"].values()) >= 3
    wrong = [(one["image"], one["name"]) for one in record["confident_errors"]]
    assert any(name == loaded.class_names[first] for _, name in wrong)
    assert {Path(image).name for image, _ in wrong} == {images[0].name}
    capsys.readouterr()


@pytest.mark.long
def test_adversarial_examples_are_explained_beside_the_images(
    photos, tmp_path, monkeypatch, capsys
):
    """Within the ball, less sure of the class, and each with maps of what it is taken for."""
    pairs = []
    add = classes.UnderAttack.find

    def watched(self, one):
        pairs.append(one)
        return add(self, one)

    monkeypatch.setattr(classes.UnderAttack, "find", watched)
    out = tmp_path / "out"
    weights = runs.inputs() / "weights.safetensors"
    asked = (weights, "--images", photos, "--methods=saliency", "--attack=4/255", f"--out={out}")
    assert explain(*asked) == 0
    record = json.loads((out / "explanations.json").read_text())
    for one, said in zip(pairs, record["images"], strict=True):
        moved = abs(one.attacked.view.astype(int) - one.view).max()
        assert 0 < moved <= 4
        assert one.attacked.probabilities[one.predicted] < one.probabilities[one.predicted]
        assert one.attacked.explained == one.attacked.predicted
        assert (one.attacked.maps["saliency"] != one.maps["saliency"]).any()
        assert said["attacked"]["methods"] == one.attacked.figures
    fooled = sum(one.attacked.predicted != one.predicted for one in pairs)
    assert record["under_attack"]["fooled"] == fooled
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"(PGD-20, 4/255) {fooled} of 2 images are taken for another class" in printed
    text = (out / "explanations.html").read_text()
    assert text.count("Under attack (PGD-20, 4/255)") == 2
    assert text.count("<figure>") == 2 * 2 * 2


@pytest.mark.long
def test_bad_requests_are_answered_in_one_line(photos, capsys):
    weights = runs.inputs() / "weights.safetensors"
    for arguments, answer in (
        ((weights, "--images", photos, "--methods=gradcam"), "did you mean `grad_cam`"),
        ((weights, "--images", photos, "--class=LABEL_9"), "no class 'LABEL_9'"),
        ((weights, "--images", photos / "c.png", "--methods=saliency"), "c.png"),
        ((weights, "--images", photos / "none"), "there is no file"),
        ((weights, "--dataset"), "--dataset=DATA"),
        ((weights, "--images", photos, "--attack=8"), "'8' is no radius in (0, 1]"),
        ((weights, "--dataset", "--attack=8/255"), "--attack goes with --images"),
        ((weights, "--dataset", "--class=LABEL_1"), "--class goes with --images"),
        ((weights, "--images", photos, "--limit=3"), "--limit"),
        ((weights,), "required"),
        ((weights, "--images", photos, "--most=3"), "--most is of the boxes and regions"),
        (("embedded:nanodet_coco", "--images", photos, "--most=0"), "--most: give 1 to 50"),
        (("embedded:nanodet_coco", "--images", photos, "--prototypes=3"), "are of classifiers"),
        (("embedded:nanodet_coco", "--images", photos, "--train=x"), "--train goes with it"),
        (("embedded:nanodet_coco", "--images", photos, "--least-score=2"), "give 0 to 1"),
        (("embedded:nanodet_coco", "--images", photos, "--methods=rollout"), "take saliency"),
        (
            ("embedded:nanodet_coco", "--images", photos, "--methods=attention_relevance"),
            "no method 'attention_relevance' of parts that a nanodet finds",
        ),
        (("embedded:nanodet_coco", "--images", photos, "--class=dogg"), "did you mean `dog`"),
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
