"""Images that a generator made, and two sources as one."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.fingerprint import describe_changes, take_fingerprint
from vision_jax.data.joined import join
from vision_jax.data.sources import read_source, split_source, subset
from vision_jax.errors import UserError

CLASSES = ("cat", "dog", "owl")


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (value, 0, 0)).save(path)


@pytest.fixture
def run(tmp_path):
    """What `generate` leaves: two dogs and a cat, in the order in which they were made."""
    images = []
    for value, name in enumerate(["dog", "cat", "dog"]):
        file = f"{name}/{value:06d}.png"
        write_image(tmp_path / "run/generated" / file, 100 + value)
        images.append({"file": file, "class": name, "index": value})
    rewrite(tmp_path / "run", images)
    return tmp_path / "run"


def rewrite(run, images, **more):
    (run / "generated/manifest.json").write_text(json.dumps({**more, "images": images}))


@pytest.fixture
def real(tmp_path):
    for value, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "owl/1.png"]):
        write_image(tmp_path / "real" / name, value)
    return tmp_path / "real"


def test_a_generators_images_are_a_source(run):
    source = read_source(f"generated:{run}")
    assert source.class_names == ("cat", "dog")
    assert [source.class_names[label] for label in source.labels] == ["dog", "cat", "dog"]
    assert [int(source[i]["image"][0, 0, 0]) for i in range(3)] == [100, 101, 102]
    by_name = read_source(f"generated:{run}", class_names=CLASSES)
    assert by_name.labels.tolist() == [1, 0, 1]
    assert by_name.class_names == CLASSES
    assert read_source(f"generated:{run / 'generated'}").labels.tolist() == source.labels.tolist()


def test_images_that_are_made_anew_are_others(run):
    before = take_fingerprint(read_source(f"generated:{run}"))
    images = json.loads((run / "generated/manifest.json").read_text())["images"]
    rewrite(run, images, sampling={"seed": 7})
    changes = describe_changes(before, take_fingerprint(read_source(f"generated:{run}")))
    assert "3 added" in changes
    assert "3 removed" in changes


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "lists no images"),
        ("text", "lists no images"),
        ([{"file": "../../secret.png", "class": "cat"}], "use a path relative to"),
        ([{"file": "cat/9.png", "class": "cat"}], "no such file"),
        ([{"file": "cat/000001.png", "class": None}], "image 0 has no class"),
        ([{"file": "cat/000001.png", "class": "yak"}], "class 'yak' is not among the 3 classes"),
        ([{"class": "cat"}], "give the file's path"),
    ],
)
def test_a_manifest_that_is_none(run, images, message):
    rewrite(run, images)
    with pytest.raises(UserError, match=message) as caught:
        read_source(f"generated:{run}", class_names=CLASSES)
    assert "\n" not in str(caught.value)


def test_what_was_not_made_says_which_command_makes_it(tmp_path):
    with pytest.raises(UserError, match=f"vision_jax generate {tmp_path} --count=1000"):
        read_source(f"generated:{tmp_path}")


def test_two_sources_as_one(run, real):
    own = read_source(str(real))
    train = subset(own, 3, seed=0)  # not all rows, so places and rows differ
    extra = subset(read_source(f"generated:{run}", class_names=own.class_names), 2, seed=0)
    both = pickle.loads(pickle.dumps(join(train, extra)))
    assert len(both) == 5
    assert both.labels.tolist() == [*train.labels, *extra.labels]
    for i in range(5):
        part, at = (train, i) if i < 3 else (extra, i - 3)
        np.testing.assert_array_equal(both[i]["image"], part[at]["image"])
        assert both[i]["index"] == i
        assert both.example_name(i) == part.example_name(at)
    parts = [take_fingerprint(part) for part in (train, extra)]
    assert take_fingerprint(both) == {k: parts[0][k] + parts[1][k] for k in parts[0]}
    assert "manifest with sha256" in both.note
    assert both.blocks() is None
    with pytest.raises(ValueError, match="not the same classes"):
        join(own, read_source(f"generated:{run}"))


def test_none_of_them_is_held_out(run, real):
    import runs

    from vision_jax.tasks.classification.task import read_sources

    write_image(real / "owl/2.png", 9)
    config = runs.tiny_config(
        data__train=str(real), data__eval="", data__holdout=0.5, data__extra=f"generated:{run}"
    )
    train, held_out = read_sources(config)
    assert (len(train), len(held_out)) == (6, 3)
    assert len(read_sources(runs.tiny_config(**{
        "data__train": str(real), "data__eval": "", "data__holdout": 0.5,
        "data__extra": f"generated:{run}", "data__extra_count": 2}))[0]) == 5  # fmt: skip
    names = [held_out.example_name(i) for i in range(len(held_out))]
    assert not any("generated" in name for name in names)
    own = split_source(read_source(str(real)), 0.5, config.seed)[1]
    assert names == [own.example_name(i) for i in range(len(own))]  # the same as without
    with pytest.raises(UserError, match="extra_count: nothing is extra"):
        read_sources(runs.tiny_config(data__train=str(real), data__eval="", data__extra_count=2))
