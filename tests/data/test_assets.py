import hashlib
import json
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from vision_jax import load
from vision_jax.convert.read import embedded_names
from vision_jax.data.decode import decode_image
from vision_jax.data.detection import read_detection_source
from vision_jax.data.sources import ASSETS, read_source, take_classes
from vision_jax.errors import UserError
from vision_jax.generate import measures, samples
from vision_jax.models.families import make_apply
from vision_jax.ops.fidelity import frechet_distance
from vision_jax.tasks.generation import objective

AERIAL = ASSETS / "aerial"


def test_aerial_tiles_are_the_ones_described():
    files = sorted(AERIAL.iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert digest in (ASSETS / "README.md").read_text()
    listed = []
    for split, tiles, boxes in (("train", 98, 827), ("test", 20, 307)):
        content = json.loads((AERIAL / f"{split}.json").read_text())
        assert (len(content["images"]), len(content["annotations"])) == (tiles, boxes)
        listed += [entry["file_name"] for entry in content["images"]]
        images = {entry["id"] for entry in content["images"]}
        assert {a["image_id"] for a in content["annotations"]} <= images
        bbox = np.array([a["bbox"] for a in content["annotations"]])
        assert (bbox[:, :2] >= 0).all()
        assert (bbox[:, 2:] >= 4).all()
        assert (bbox[:, :2] + bbox[:, 2:] <= 256).all()
    assert sorted(listed) == [path.name for path in files if path.suffix == ".jpg"]
    for name in listed:
        assert decode_image((AERIAL / name).read_bytes(), name=name).shape == (256, 256, 3)


def test_nuclei_are_the_ones_described():
    files = sorted((ASSETS / "nuclei").iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert digest in (ASSETS / "README.md").read_text()
    counts = [
        len(np.unique(np.asarray(Image.open(ASSETS / "nuclei" / f"{split}_nuclei.png")))) - 1
        for split in ("train", "test")
    ]
    assert counts == [102, 30]


@pytest.mark.parametrize("name", embedded_names())
def test_embedded_weights_are_the_ones_described(name):
    digest = hashlib.sha256((ASSETS / f"{name}.safetensors").read_bytes()).hexdigest()
    assert digest in (ASSETS / "README.md").read_text()


def test_the_embedded_detector_knows_the_classes_of_coco():
    loaded = load("embedded:nanodet_coco")
    assert len(loaded.class_names) == 80
    assert loaded.class_names[:3] == ("person", "bicycle", "car")
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.variables["params"])) == 3_788_628


@pytest.fixture(scope="module")
def generator():
    """(the embedded generator, the held-out images of its classes, its task, how it samples)."""
    loaded = load("embedded:fashion_generator")
    source = take_classes(read_source("embedded:fashion_mnist/test"), loaded.class_names)
    task = objective.Task("image", 8, (28, 28, 3), time_mean=-0.6, time_std=1.0, unconditional=0.1)
    sampling = objective.Sampling("heun", 10, 1.5, (0.0, 1.0), 1.0, seed=0)
    return loaded, source, task, sampling


@pytest.mark.long
def test_the_embedded_generator_has_the_loss_that_its_run_ended_with(generator):
    loaded, source, task, sampling = generator
    assert not {"sneaker", "bag"} & set(loaded.class_names)
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.variables["params"])) == 751_251
    outputs = objective.make_outputs(make_apply(loaded.model), lambda p: p, task, sampling)
    batch = {
        "image": np.stack(pictures(source)),
        "label": np.asarray(source.labels, np.int32),
        "index": np.arange(len(source), dtype=np.int32),
        "mask": np.ones(len(source), bool),
    }
    loss = jax.jit(lambda p: outputs(p, {}, {}, batch)["loss"])(loaded.variables["params"])
    assert float(loss.mean()) == pytest.approx(0.1276, abs=2e-4)


@pytest.mark.long
def test_what_the_embedded_generator_makes_is_near_to_real_images(generator):
    """Of 160 images, 10 steps: 6.8 where it was measured; other platforms round otherwise."""
    loaded, source, task, sampling = generator
    index = np.arange(160, dtype=np.int32)
    made_by = samples.Generator(
        loaded.model, loaded.variables, loaded.class_names, task, sampling, loaded.preprocess
    )
    batches = samples.make_images(made_by, samples.Wanted(index % 8, index), 80)
    features = measures.make_features(load("embedded:vit_cifar10"), loaded.preprocess)
    made, real = (features(x) for x in (list(np.concatenate(list(batches))), pictures(source)))
    assert frechet_distance(real[::5], real) < 2.5  # of so many real ones
    assert frechet_distance(made, real) < 8.5


def pictures(source):
    return [source[row]["image"] for row in range(len(source))]


def test_aerial_splits_share_no_photo():
    photos = {}
    for split in ("train", "test"):
        content = json.loads((AERIAL / f"{split}.json").read_text())
        # PHOTO_TOP_LEFT.jpg
        photos[split] = Counter(e["file_name"].rsplit("_", 2)[0] for e in content["images"])
    assert sorted(photos["train"].values()) == [4, 4, 90]
    assert sorted(photos["test"].values()) == [20]
    assert not photos["train"].keys() & photos["test"].keys()


def test_aerial_tiles_read_as_any_source():
    for split, tiles, boxes in (("train", 98, 827), ("test", 20, 307)):
        source = read_detection_source(f"embedded:aerial/{split}")
        assert (len(source), len(source.label.values)) == (tiles, boxes)
        assert source.class_names == ("tree",)
        assert source.note == ""
        assert source[0]["image"].shape == (256, 256, 3)
    for spec in ("embedded:aerial", "embedded:aerial/", "embedded:../assets/aerial/train"):
        with pytest.raises(UserError, match="use one of embedded:aerial/test, embedded:aerial/tr"):
            read_detection_source(spec)
