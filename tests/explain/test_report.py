"""The files of explanations: written as they come, in pages, with nothing kept."""

import json
import re
import weakref

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.pipeline import Damaged
from vision_jax.errors import UserError
from vision_jax.explain import classes, dataset, page, report
from vision_jax.explain.classes import Explained, Subject
from vision_jax.tasks.images import source_of

SUBJECT = Subject(None, {}, ("cat", "<dog>"), None, "weights")


def explained(rng, row):
    figures = {"insertion": float(rng.random()), "deletion": 0.25, "road": 0.5}
    return Explained(
        row,
        rng.integers(0, 256, (12, 8, 3), np.uint8),
        row % 2,
        0,
        np.array([0.75, 0.25]),
        {"saliency": rng.random((12, 8))},
        {"saliency": {**figures, "rank_correlation": 0.1}, "random": figures},
    )


def fake_run(monkeypatch, rng, damaged=()):
    """Explanations out of thin air; returns those that were given, by weak reference."""
    given = []

    def run(source, damage, wanted):
        for row in range(len(source)):
            if row in damaged:
                damage.record(0, [Damaged(row, source.example_name(row), "no image")])
                continue
            one = explained(rng, row)
            given.append(weakref.ref(one))
            yield one

    monkeypatch.setattr(classes, "make_run", lambda *_, **__: run)
    return given


def images(count):
    return source_of([f"folder/{row}.png" for row in range(count)])


def test_many_images_are_pages_that_lead_to_each_other(tmp_path, monkeypatch, rng, capsys):
    monkeypatch.setattr(report, "PER_PAGE", 3)
    given = fake_run(monkeypatch, rng, damaged=(4,))
    older = tmp_path / "explanations_4.html"
    older.write_text("of an earlier report")
    kept = []
    section = page.make_section

    def watched(*arguments):
        kept.append(sum(one() is not None for one in given))
        return section(*arguments)

    monkeypatch.setattr(page, "make_section", watched)
    classes.explain_images(SUBJECT, images(9), ["saliency"], tmp_path, label=None, seed=0)
    assert max(kept) <= 2  # the one that comes and, in a loop's variable, the one before
    printed = capsys.readouterr().out.replace("\n", "")
    assert "explanations_1.html to explanations_3.html, 3 images each" in printed
    assert not older.exists()

    record = json.loads((tmp_path / "explanations.json").read_text())
    assert [one["file"] for one in record["images"]] == [
        f"folder/{row}.png" for row in range(9) if row != 4
    ]
    assert record["damaged"] == ["folder/4.png: no image"]
    mean = np.mean([one["methods"]["saliency"]["insertion"] for one in record["images"]])
    np.testing.assert_allclose(record["methods"]["saliency"]["insertion"], mean, rtol=1e-12)
    for one in record["images"]:
        with Image.open(tmp_path / one["picture"]) as picture:
            picture.load()

    first = (tmp_path / "explanations.html").read_text()
    assert first.count("<table>") == 1
    assert "<figure>" not in first
    found = []
    for name in ("explanations_1.html", "explanations_2.html", "explanations_3.html"):
        text = (tmp_path / name).read_text()
        anchors = re.findall(r'<h2 id="([\w-]+)">', text)
        found += anchors
        assert re.findall(rf'href="{name}#([\w-]+)"', first) == anchors
        assert 'href="explanations.html"' in text
        assert not re.search(r'src="(?!data:)', text)
        assert "&lt;dog&gt;" not in text
    assert len(found) == len(set(found)) == 8
    second = (tmp_path / "explanations_2.html").read_text()
    assert re.findall(r'href="(\w+\.html)"', second) == [
        "explanations.html", "explanations_1.html", "explanations_3.html",
    ]  # fmt: skip
    last = (tmp_path / "explanations_3.html").read_text()
    assert "explanations_4.html" not in last
    assert list(tmp_path.glob(".*")) == []  # no draft is left


def test_few_images_are_one_page(tmp_path, monkeypatch, rng):
    fake_run(monkeypatch, rng)
    classes.explain_images(SUBJECT, images(3), ["saliency"], tmp_path, label=None, seed=0)
    assert [path.name for path in tmp_path.glob("*.html")] == ["explanations.html"]
    text = (tmp_path / "explanations.html").read_text()
    assert text.count("<figure>") == 3 * 2
    assert "href=" not in text


def test_without_a_sound_image_nothing_is_written(tmp_path, monkeypatch, rng):
    fake_run(monkeypatch, rng, damaged=(0, 1))
    with pytest.raises(UserError, match=r"none of them could be read, first folder/0.png"):
        classes.explain_images(SUBJECT, images(2), ["saliency"], tmp_path, label=None, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_is_summed_up_image_by_image(tmp_path, monkeypatch, rng):
    """Means, the share that is right and the most confident errors, against plain sums."""
    drawn = []

    def run(source, damage, wanted):
        for row in range(len(source)):
            one = explained(rng, int(source.rows[row]))
            p = float(rng.random())
            label = int(rng.integers(2))
            one = Explained(
                row, one.view, label, label, np.array([p, 1 - p]), one.maps, one.figures
            )
            if wanted is None:
                drawn.append(one)
            yield one

    monkeypatch.setattr(dataset, "make_run", lambda *_, **__: run)
    monkeypatch.setattr(dataset, "ERRORS", 4)
    dataset.explain_dataset(SUBJECT, images(30), ["saliency"], tmp_path, seed=0)
    record = json.loads((tmp_path / "explanations.json").read_text())
    wrong = [one for one in drawn if one.predicted != one.label]
    assert record["count"] == 30
    np.testing.assert_allclose(record["top1"], 1 - len(wrong) / 30)
    certain = sorted((one.probabilities.max() for one in wrong), reverse=True)[:4]
    assert [one["probability"] for one in record["confident_errors"]] == certain
    for label, name in enumerate(SUBJECT.class_names):
        own = [one for one in drawn if one.predicted == label]
        heat = np.mean([one.maps["saliency"] / one.maps["saliency"].sum() for one in own], axis=0)
        assert record["per_class"][name]["count"] == len(own)
        np.testing.assert_allclose(
            record["per_class"][name]["heat_in_the_middle"], heat[3:9, 2:6].sum(), rtol=1e-5
        )


def test_large_pictures_are_shrunk_and_small_ones_are_not(rng):
    import base64
    import io

    def shown(pixels):
        address = page.make_section(1, "x", {"": [page.Picture("image", [], pixels)]}).html
        held = re.findall(r'src="data:image/webp;base64,([^"]+)"', address)[0]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(held))))

    small = rng.integers(0, 256, (8, 12, 3), np.uint8)
    np.testing.assert_array_equal(shown(small), small)
    assert shown(rng.integers(0, 256, (1000, 500, 3), np.uint8)).shape == (384, 192, 3)
