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
from vision_jax.data.sources import ASSETS
from vision_jax.errors import UserError

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
