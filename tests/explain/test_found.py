"""What is written of boxes and regions, and which of them are right."""

import json
import weakref
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vision_jax.data.detection import read_detection_source
from vision_jax.explain import found
from vision_jax.explain.classes import Subject
from vision_jax.explain.detections import Boxes
from vision_jax.explain.found import Explained, Part
from vision_jax.explain.part_sources import match_boxes, match_regions
from vision_jax.explain.parts import Wanted
from vision_jax.explain.regions import Regions

SUBJECT = Subject(None, {}, ("cat", "dog"), None, "weights")


def part(score, right):
    figures = {"pointing": float(right), "inside": 0.5}
    return Part(
        0, score, np.eye(6, dtype=bool), np.array([0.0, 0, 6, 6]), right,
        {"saliency": np.eye(6)}, {"saliency": figures, "random": figures},
    )  # fmt: skip


@pytest.fixture
def images(tmp_path, monkeypatch):
    """(a function that fakes what is found, a source of 40 images)."""
    monkeypatch.setattr(found, "detects", lambda model: True)

    def fake(parts_of):
        def run(source, damage, truth):
            for row in range(len(source)):
                yield Explained(row, np.zeros((6, 6, 3), np.uint8), parts_of(row))

        monkeypatch.setattr(found, "make_run", lambda *_: run)

    names = [f"{row}.png" for row in range(40)]
    source = SimpleNamespace(name="photos", example_name=names.__getitem__)
    return fake, type("Source", (SimpleNamespace,), {"__len__": lambda self: 40})(**vars(source))


def test_of_a_data_set_only_what_is_shown_is_kept(tmp_path, images, monkeypatch):
    fake, source = images
    given, most = [], []
    scores = np.random.default_rng(3).permutation(80) / 100

    def parts_of(row):
        most.append(sum(one() is not None for one in given))
        both = part(scores[2 * row], True), part(scores[2 * row + 1], False)
        given.extend(map(weakref.ref, both))
        return both

    fake(parts_of)
    found.explain_dataset(SUBJECT, source, ["saliency"], tmp_path, wanted=Wanted(), seed=0)
    assert max(most) <= 2 * found.SHOWN + 4  # and those of the images at hand
    record = json.loads((tmp_path / "explanations.json").read_text())
    assert (record["count"], record["right"], record["wrong"]) == (40, 40, 40)
    expected = sorted(scores[1::2], reverse=True)[: found.SHOWN]
    assert [one["score"] for one in record["confident_errors"]] == expected


def test_what_is_kept_of_a_part_does_not_keep_its_batch(rng):
    maps = {"saliency": {"map": rng.random((2, 3, 6, 8)), "pointing": np.ones((2, 3))}}
    boxes = Boxes(*(np.zeros((2, 3)) for _ in range(3)), np.zeros((2, 3, 4)))
    batch = {"image": np.zeros((2, 6, 8, 3), np.uint8), "size": np.array([[4, 5]] * 2),
             "index": np.arange(2)}  # fmt: skip
    one = found._part((maps, np.zeros((2, 3, 6, 8), bool), boxes), batch, 1, 2, True)
    np.testing.assert_array_equal(one.maps["saliency"], maps["saliency"]["map"][1, 2, :4, :5])
    view = found._explained(batch, 1, [one]).view
    assert view.shape == (4, 5, 3)
    assert all(array.base is None for array in (one.maps["saliency"], one.inside, view))


@pytest.mark.parametrize("dataset", [False, True])
def test_where_nothing_is_found_the_report_says_so(tmp_path, images, capsys, dataset):
    fake, source = images
    fake(lambda row: ())
    explain = found.explain_dataset if dataset else found.explain_images
    explain(SUBJECT, source, ["saliency"], tmp_path, wanted=Wanted(least=0.7), seed=0)
    record = json.loads((tmp_path / "explanations.json").read_text())
    if not dataset:
        assert [one["parts"] for one in record["images"]] == [[]] * 40
        assert (tmp_path / "explanations.html").read_text().count("nothing is found") == 40
    assert record["methods"] == {}
    assert "nothing has a score of 0.7 or more" in capsys.readouterr().out


def test_boxes_in_a_crowd_of_their_class_do_not_count(tmp_path):
    """As in COCO's evaluation: a crowd makes no box right, and excuses those that lie in it."""
    Image.new("RGB", (100, 50)).save(tmp_path / "0.png")
    crowd = {"id": 2, "image_id": 1, "category_id": 1, "bbox": [50, 0, 50, 50], "area": 2500}
    (tmp_path / "boxes.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "0.png", "width": 100, "height": 50}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {**crowd, "id": 1, "bbox": [0, 0, 20, 20], "area": 400, "iscrowd": 0},
            {**crowd, "iscrowd": 1},
        ],
    }))  # fmt: skip
    source = read_detection_source(str(tmp_path / "boxes.json"))
    batch = {
        "boxes_cxcywh_01": np.array([[[0.1, 0.2, 0.2, 0.4]]], np.float32),
        "label": np.array([[0]]), "target_mask": np.array([[True]]), "mask": np.array([True]),
        "index": np.array([0]), "original_size": np.array([[50, 100]]),
    }  # fmt: skip
    boxes = jnp.array([[[0.0, 0, 0.2, 0.4], [0.6, 0.1, 0.7, 0.3], [0.6, 0.1, 0.7, 0.3],
                        [0.3, 0.0, 0.65, 1.0], [0.0, 0, 0.2, 0.39]]])  # fmt: skip
    labels = jnp.array([[0, 0, 1, 0, 0]])
    scores = jnp.array([[0.9, 0.8, 0.7, 0.6, 0.5]])
    parts = Boxes(jnp.zeros((1, 5), int), labels, scores, boxes)
    _, right, ignored = match_boxes(parts, None, batch, source)
    assert right.tolist() == [[True, False, False, False, False]]
    assert ignored.tolist() == [[False, True, False, False, False]]


def test_ignored_pixels_of_a_region_do_not_count():
    label = np.zeros((1, 4, 6), np.uint8)
    label[0, :, 3:] = 255
    label[0, :2, :3] = 1
    batch = {"label": label, "size": np.array([[4, 6]])}
    inside = np.zeros((1, 3, 4, 6), bool)
    inside[0, 0, :2] = True  # the region, and twice as far into what is not known
    inside[0, 1, :, 4:] = True  # nothing but that
    inside[0, 2, 2:, :3] = True  # of another class
    ones = jnp.ones((1, 3))
    parts = Regions(jnp.zeros((1, 3), int), jnp.ones((1, 3), int), ones, jnp.asarray(inside))
    measured, right, ignored = match_regions(parts, inside, batch, None)
    assert right.tolist() == [[True, False, False]]
    assert ignored.tolist() == [[False, True, False]]
    np.testing.assert_array_equal(measured.inside[0, 0], label[0] == 1)


@pytest.mark.parametrize("view", ["windows", "pad"])
def test_a_segmenter_of_windows_is_said_to_see_another_view(monkeypatch, capsys, view):
    monkeypatch.setattr(found.of_parts, "make_find_parts", lambda *_: None)
    monkeypatch.setattr(found.of_parts, "make_explain", lambda *_: None)
    monkeypatch.setattr(found, "detects", lambda model: False)
    preprocessing = SimpleNamespace(view=view)
    found.make_run(Subject(None, {}, ("cat",), preprocessing, "weights"), [], Wanted(), 0)
    assert ("squashed into one window" in capsys.readouterr().out.replace("\n", " ")) == (
        view == "windows"
    )
