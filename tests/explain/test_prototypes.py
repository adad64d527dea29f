"""The nearest training images, against scikit-learn's meaning of it and in files."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from PIL import Image

from vision_jax import main, train
from vision_jax.config import load_config
from vision_jax.data.fingerprint import take_fingerprint
from vision_jax.data.sources import ArrayReader, FileReader, Source, read_source
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError
from vision_jax.explain import prototypes
from vision_jax.explain.trained import trained_on
from vision_jax.models.families import build_model, initialize
from vision_jax.ops.probe import unit
from vision_jax.tasks.api import find_task
from vision_jax.trees.quantized import Int8


def test_the_nearest_are_those_of_plain_distances(rng, monkeypatch):
    """In float64, one by one; some rows can't be read, some are the same."""
    monkeypatch.setattr(prototypes, "CHUNK", 7)
    features = unit(rng.standard_normal((50, 6)).astype(np.float32))
    features[9] = features[30]
    features[[3, 40]] = np.nan
    labels = rng.integers(0, 5, 50)
    wanted = features[30] if rng.random() < 0.5 else unit(rng.random((1, 6), np.float32))[0]
    rows, distances, of_classes = prototypes.nearest(features, labels, wanted, count=8)

    wide = features.astype(np.float64)
    plain = {
        row: 1 - wide[row] @ wanted / np.linalg.norm(wide[row]) / np.linalg.norm(wanted)
        for row in range(50)
        if row not in (3, 40)
    }
    ordered = sorted(plain.values())
    assert [round(plain[row], 5) for row in rows.tolist()] == [round(x, 5) for x in ordered[:8]]
    for row, value in plain.items():
        np.testing.assert_allclose(distances[row], value, atol=1e-6)
    assert sorted(labels[of_classes]) == sorted(set(labels[list(plain)]))
    for row in of_classes:
        least = min(value for other, value in plain.items() if labels[other] == labels[row])
        np.testing.assert_allclose(plain[int(row)], least, atol=1e-6)
    assert (np.diff(distances[of_classes]) >= 0).all()


@pytest.mark.long
def test_they_are_scikit_learns(rng):
    neighbors = pytest.importorskip("sklearn.neighbors")
    features = unit(rng.standard_normal((3000, 32)).astype(np.float32))
    wanted = unit(rng.standard_normal((4, 32)).astype(np.float32))
    theirs = neighbors.NearestNeighbors(n_neighbors=9, metric="cosine", algorithm="brute")
    distances, rows = theirs.fit(features.astype(np.float64)).kneighbors(wanted.astype(np.float64))
    for image in range(4):
        ours, found, _ = prototypes.nearest(features, np.zeros(3000, int), wanted[image], count=9)
        assert ours.tolist() == rows[image].tolist()
        np.testing.assert_allclose(found[ours], distances[image], atol=1e-6)


MODELS = {
    "vit": {"num_classes": 3, "image_size": (16, 16), "patch_size": 8, "width": 8, "depth": 1,
            "num_heads": 2, "mlp_width": 8},
    "resnet": {"num_classes": 3, "depths": (1,), "widths": (8,), "stem_width": 8,
               "block": "basic"},
}  # fmt: skip

SIZE = Preprocessing(
    image_size=(16, 16),
    mean=(0, 0, 0),
    std=(1, 1, 1),
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="center",
)


@pytest.fixture
def photos(tmp_path, rng):
    """12 images of three classes, of which the sixth is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    names = [f"{row}.png" for row in range(12)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name)
    (folder / "5.png").write_bytes(b"no image")
    reader = FileReader(folder, tuple(names))
    return Source("photos", ("a", "b", "c"), np.arange(12) % 3, np.arange(12), reader)


@pytest.mark.long(but=("resnet",))
@pytest.mark.parametrize("family", MODELS)
def test_features_are_what_the_head_is_given_and_are_computed_once(
    family, photos, tmp_path, rng, monkeypatch, capsys
):
    model = build_model(family, **MODELS[family])
    variables = initialize(model, jax.random.key(int(rng.integers(2**31))), (16, 16))
    params = {**variables["params"]}
    kernel = jnp.asarray(rng.standard_normal(params["head"]["kernel"].shape), jnp.float32)
    params["head"] = {"kernel": kernel, "bias": jnp.asarray(rng.random(3), jnp.float32)}
    variables = {**variables, "params": params}
    given = (model, variables, photos, SIZE, tmp_path)
    found = prototypes.make_prototypes(*given, count=4)
    assert "features-" in capsys.readouterr().out
    assert np.isnan(found.features).all(1).tolist() == [row == 5 for row in range(12)]

    view = found.view(8)
    logits = model.apply(variables, jnp.asarray(view[None], jnp.float32) / 255)
    head = variables["params"]["head"]
    raw = np.asarray(
        model.clone(num_classes=0).apply(variables, jnp.asarray(view[None], jnp.float32) / 255)
    )
    ours = raw @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(ours, logits, atol=1e-4)
    np.testing.assert_allclose(found.features[8], raw[0] / np.linalg.norm(raw), atol=1e-5)

    near = found.find(view)
    assert near.same == near.nearest[0]
    assert near.same.row == 8
    assert len(near.nearest) == 4
    assert [one.label for one in near.of_classes if one.row == 8] == [2]
    assert {one.label for one in near.of_classes} == {0, 1, 2}
    other = view.copy()
    other[3:9] = 255 - other[3:9]
    assert found.find(other).same is None
    other = view.copy()
    other[0, 0, 0] ^= 1  # as near as can be, and not the same
    assert found.find(other).same is None

    monkeypatch.setattr(prototypes, "_write_features", None)  # it is not called again
    again = prototypes.make_prototypes(*given, count=4)
    np.testing.assert_array_equal(again.features, found.features)
    changed = jax.tree.map(lambda x: x + 1, variables)
    with pytest.raises(TypeError):
        prototypes.make_prototypes(model, changed, *given[2:], count=4)
    relabelled = Source(photos.name, photos.class_names, photos.labels[::-1].copy(),
                        photos.rows, photos.reader)  # fmt: skip
    with pytest.raises(TypeError):
        prototypes.make_prototypes(*given[:2], relabelled, *given[3:], count=4)


def test_a_training_image_is_found_however_many_are_as_near(photos, rng):
    """Features that have collapsed: all are equally near."""
    views = rng.integers(0, 256, (12, 16, 16, 3), np.uint8)
    pixels = np.array([prototypes.hash_of_pixels(view) for view in views], np.uint64)
    ones = np.ones((12, 1), np.float32)
    found = prototypes.Prototypes(photos, None, ones, pixels, lambda views: ones[:1], 2)
    near = found.find(views[7])
    assert [one.row for one in near.nearest] == [0, 1]
    assert near.same == prototypes.Neighbor(7, 1, 0.0)
    assert found.find(views[7] ^ 1).same is None


def bitmaps(folder, rng):
    """Two classes of bitmaps, which have names and sizes in bytes like those of any other call."""
    for name in ("bee/0.bmp", "bee/1.bmp", "cat/0.bmp", "cat/1.bmp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name)
    return folder


def test_data_of_equal_names_and_sizes_is_told_apart(tmp_path, rng, monkeypatch):
    """Another folder, the same one by another name, and a file that was written over."""
    one, other = (bitmaps(tmp_path / name, rng) for name in ("one", "other"))
    first = prototypes.hash_of_images(read_source(str(one)))
    assert first != prototypes.hash_of_images(read_source(str(other)))
    assert first == prototypes.hash_of_images(read_source(str(one)))
    path = one / "cat/1.bmp"
    before = path.stat()
    path.write_bytes((other / "cat/1.bmp").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as an archive does
    assert path.stat().st_size == before.st_size
    assert first != prototypes.hash_of_images(read_source(str(one)))

    images = rng.integers(0, 256, (4, 8, 8), np.uint8)
    found = set()
    for change in (0, 1):
        held = ArrayReader("npz", images ^ np.uint8(change))
        source = Source("npz", ("a",), np.zeros(4, int), np.arange(4), held)
        found.add(prototypes.hash_of_images(source))
    assert len(found) == 2


def test_two_folders_of_equal_names_and_sizes_have_features_of_their_own(tmp_path, rng):
    model = build_model("vit", **MODELS["vit"])
    variables = initialize(model, jax.random.key(int(rng.integers(2**31))), (16, 16))
    views = {}
    for name in ("one", "other"):
        source = read_source(str(bitmaps(tmp_path / name, rng)))
        found = prototypes.make_prototypes(model, variables, source, SIZE, tmp_path, count=1)
        views[name] = found.view(2)
        assert found.find(views[name]).same.row == found.find(views[name]).nearest[0].row == 2
    assert found.find(views["one"]).same is None
    assert len(list(tmp_path.glob("features-*.npy"))) == 2


def test_a_runs_training_images_are_those_of_when_it_began(tmp_path, rng):
    """A class added since shifts no label, and what was held out stays so."""
    folder = bitmaps(tmp_path / "data", rng)
    names = ("bee", "cat")
    began = replace(read_source(str(folder)), rows=np.array([0, 2, 3]), labels=np.array([0, 1, 1]))
    before = json.loads(json.dumps(take_fingerprint(began)))
    found, changes = trained_on(read_source(str(folder)), names, before)
    assert (found.rows.tolist(), found.labels.tolist(), changes) == ([0, 2, 3], [0, 1, 1], "")

    (folder / "ant").mkdir()
    (folder / "bee/0.bmp").rename(folder / "ant/0.bmp")
    (folder / "cat/0.bmp").write_bytes(b"other")
    Image.new("RGB", (16, 16)).save(folder / "cat/2.bmp")
    found, changes = trained_on(read_source(str(folder)), names, before)
    assert [found.reader.relative_name(row) for row in found.rows] == ["cat/0.bmp", "cat/1.bmp"]
    assert found.labels.tolist() == [1, 1]
    assert found.class_names == names
    assert changes == "1 removed ('bee/0.bmp'), 1 edited ('cat/0.bmp')"
    with pytest.raises(UserError, match="none of the images that the run was trained on"):
        trained_on(read_source(str(folder)), names, {"name": [], "size": [], "annotations": []})


def test_the_hash_has_what_leaves_are_set_to(rng):
    values = jnp.asarray(rng.integers(-127, 128, (4, 3)), jnp.int8)
    leaves = [Int8(values, jnp.ones(3), None, dynamic) for dynamic in (False, True, True)]
    found = [prototypes.hash_of({"params": {"kernel": leaf}}) for leaf in leaves]
    assert found[0] != found[1] == found[2]


@pytest.mark.long
def test_a_run_shows_the_nearest_of_its_training_images(tmp_path, capsys, rng):
    """And flags the one that it was trained on."""
    workdir = runs.finished()
    config = load_config(str(workdir / "config.json"), {})
    trained = find_task(config.task).read_sources(config)[0]
    known, new = tmp_path / "known.png", tmp_path / "new.png"
    Image.fromarray(np.asarray(trained[3]["image"])).save(known)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(new)
    out = tmp_path / "out"
    arguments = ["explain", str(workdir), "--images", str(known), str(new)]
    arguments += ["--methods=saliency", "--prototypes=2", f"--out={out}"]
    assert main.main(arguments) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"1 of 2 images are training images, the same pixels, first {known}" in printed
    record = json.loads((out / "explanations.json").read_text())
    assert record["prototypes"]["training_images"] == [str(known)]
    assert record["prototypes"]["count"] == len(trained)
    first, second = (one["prototypes"] for one in record["images"])
    assert first["is_training_image"]
    assert not second["is_training_image"]
    assert first["nearest"][0]["class"] == trained.class_names[trained.labels[3]]
    assert first["nearest"][0]["distance"] < 1e-5
    assert len(second["nearest"]) == 2
    text = (out / "explanations.html").read_text()
    assert text.count("Nearest training images") == 2
    assert text.count("THE SAME IMAGE") == text.count("Nearest of a class")  # in both rows, once

    assert main.main([*arguments, "--dataset"]) == 2
    capsys.readouterr()
    for more, answer in (
        (["--train=elsewhere", "--prototypes=0"], "--train goes with it"),
        (["--prototypes=-1"], "--prototypes: give 1 or more"),
    ):
        assert main.main([*arguments, *more]) == 2
        assert answer in capsys.readouterr().err
    weights = runs.inputs() / "weights.safetensors"
    assert main.main(["explain", str(weights), *arguments[2:]]) == 2
    assert "--train=DATA" in capsys.readouterr().err


@pytest.mark.long
def test_a_class_added_after_training_changes_nothing(tmp_path, capsys, rng):
    """Nor does the split of today's images: what was held out is none of the training images."""
    data, out = tmp_path / "data", tmp_path / "out"
    for number in range(24):
        path = data / f"{'bcd'[number % 3]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    own = {"data__train": data, "data__eval": "", "data__holdout": 0.5, "total_steps": 2}
    config = runs.tiny_config(**own)
    train_source = find_task(config.task).read_sources(config)[0]
    assert train.run(config, tmp_path / "run") == 0
    arguments = ["explain", str(tmp_path / "run"), "--images", str(data), f"--out={out}"]
    arguments += ["--methods=saliency", "--prototypes=3"]
    records = []
    for _ in range(2):
        capsys.readouterr()
        assert main.main(arguments) == 0
        assert "has changed since" not in capsys.readouterr().out
        record = json.loads((out / "explanations.json").read_text())
        trained = {train_source.example_name(row) for row in range(len(train_source))}
        assert set(record["prototypes"]["training_images"]) == trained
        known = {one["file"]: one["prototypes"] for one in record["images"]}
        records.append({name: known[name] for name in known if "added" not in Path(name).name})
        for name, found in records[-1].items():
            for near in found["nearest"]:
                assert near["class"] == Path(near["image"]).parent.name
            assert found["is_training_image"] == (name in trained)
        for name in ("a/added_0.png", "a/added_1.png", "b/added_2.png", "b/added_3.png"):
            (data / name).parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(data / name)
    assert len(records[0]) == 24
    assert records[0].keys() == records[1].keys()
    path = data / "gone.png"
    Path(train_source.example_name(0)).rename(path)
    arguments[3] = str(path)
    assert main.main(arguments) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "has changed since the run began: 1 removed" in printed
