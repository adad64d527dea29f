import colorsys
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vision_jax.data import composites
from vision_jax.data.composites import (
    CLASS_NAMES,
    MAX_OBJECTS,
    check,
    make_composite,
    read_pieces,
    write_composites,
)
from vision_jax.data.detection import read_detection_source
from vision_jax.errors import UserError


def test_an_image_is_a_function_of_split_seed_and_index():
    first = make_composite("train", 3, 7, size=96)
    make_composite("train", 3, 8, size=96)
    again = make_composite("train", 3, 7, size=96)
    assert first.image.shape == (96, 96, 3)
    assert first.image.dtype == np.uint8
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.boxes_xyxy_px, again.boxes_xyxy_px)
    others = [("test", 3, 7), ("train", 4, 7), ("train", 3, 8)]
    assert all((make_composite(*other, size=96).image != first.image).any() for other in others)


def test_the_splits_share_no_piece():
    train, test = read_pieces("train"), read_pieces("test")
    assert np.bincount(train.labels).tolist() == [400] * len(CLASS_NAMES)
    assert np.bincount(test.labels).tolist() == [100] * len(CLASS_NAMES)
    for a, b in ((train.garments, test.garments), (train.grounds, test.grounds)):
        assert not {one.tobytes() for one in a} & {one.tobytes() for one in b}


def test_a_box_is_the_extent_of_what_was_pasted():
    for index in range(60):
        composite = make_composite("train", 0, index, size=128, max_objects=1)
        rng = np.random.default_rng((0, 0, index))
        ground = composites._ground(read_pieces("train"), rng, 128)
        rows, columns = np.nonzero((composite.image != ground).any(axis=-1))
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert composite.boxes_xyxy_px.tolist() == [extent]


def test_objects_of_all_classes_lie_inside_and_apart():
    labels, counts = set(), set()
    for index in range(60):
        composite = make_composite("test", 0, index, size=64)
        boxes = composite.boxes_xyxy_px
        assert boxes.dtype == composite.labels.dtype == np.int32
        assert (boxes >= 0).all()
        assert (boxes <= 64).all()
        longest = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
        assert (longest >= 0.27 * 64).all()
        assert (longest <= 0.75 * 64).all()  # 0.55 of the side, turned by 20 degrees
        for i, box in enumerate(boxes):
            for other in boxes[:i]:
                sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
                areas = np.prod(box[2:] - box[:2]), np.prod(other[2:] - other[:2])
                assert np.prod(np.maximum(sides, 0)) <= 0.1 * min(areas)
        labels |= set(composite.labels.tolist())
        counts.add(len(boxes))
    assert labels == set(range(len(CLASS_NAMES)))
    assert counts == set(range(1, MAX_OBJECTS + 1))


def test_coco_files_hold_the_composites(tmp_path):
    path = write_composites(tmp_path, "test", count=5, seed=2, size=64)
    content = json.loads(path.read_text())
    assert [c["name"] for c in content["categories"]] == list(CLASS_NAMES)
    for index, entry in enumerate(content["images"]):
        composite = make_composite("test", 2, index, size=64)
        assert (entry["height"], entry["width"]) == (64, 64)
        pixels = np.asarray(Image.open(tmp_path / entry["file_name"]))
        np.testing.assert_array_equal(pixels, composite.image)
        own = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        assert boxes == composite.boxes_xyxy_px.tolist()
        assert [a["category_id"] - 1 for a in own] == composite.labels.tolist()
        assert [a["area"] for a in own] == [a["bbox"][2] * a["bbox"][3] for a in own]


def test_plain_files_hold_one_box_an_image_in_its_entry(tmp_path):
    path = write_composites(tmp_path, "train", count=4, seed=0, size=64, plain=True)
    content = json.loads(path.read_text())
    assert content["categories"] == [{"id": 1, "name": "garment"}]
    assert len({entry["file_name"] for entry in content["images"]}) == 4
    for index, entry in enumerate(content["images"]):
        composite = make_composite("train", 0, index, size=64, max_objects=1)
        corners = [entry[side] for side in ("xmin", "ymin", "xmax", "ymax")]
        assert [corners] == composite.boxes_xyxy_px.tolist()
        assert entry["category_id"] == 1


@pytest.mark.parametrize(
    ("count", "seed", "size", "message"),
    [
        (1, 0, 32, "size 32: use 64 to 256"),
        (1, 0, 300, "size 300"),
        (0, 0, 128, "0 images: use 1 to 81380"),
        (10**7, 0, 128, "images: use 1 to 81380"),
        (1, -1, 128, "seed -1"),
    ],
)
def test_what_cannot_be_is_refused(count, seed, size, message):
    with pytest.raises(UserError, match=message):
        check(count, seed, size, "composites:x")


def test_the_command_writes_or_says_why_not(tmp_path):
    command = [sys.executable, "-m", "vision_jax.data.composites", f"--out={tmp_path}"]
    done = subprocess.run([*command, "--count=2", "--size=64"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "train" / "000001.png").is_file()
    done = subprocess.run([*command, "--count=2", "--size=9"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: composites: size 9: use 64 to 256 pixels\n"


def test_a_specification_reads_them_as_any_source():
    source = read_detection_source("composites:test/2/5/64")
    assert source.class_names == CLASS_NAMES
    assert source.category_ids == tuple(range(1, 9))
    assert len(source) == 5
    assert source.note == ""
    assert source.example_name(3) == "composites:test/2/5/64[3]"
    for index in range(5):
        composite = make_composite("test", 2, index, size=64)
        example = source[index]
        np.testing.assert_array_equal(example["image"], composite.image)
        np.testing.assert_array_equal(example["boxes_xyxy_px"], composite.boxes_xyxy_px)
        np.testing.assert_array_equal(example["label"], composite.labels)
        assert source.sizes[index].tolist() == [64, 64]
    assert read_detection_source("composites:train/0/1").sizes.tolist() == [[64, 64]]


def test_files_and_specification_are_one_data_set(tmp_path):
    write_composites(tmp_path, "train", count=3, seed=1, size=64)
    files = read_detection_source(str(tmp_path / "train.json"))
    memory = read_detection_source("composites:train/1/3/64")
    assert files.class_names == memory.class_names
    assert files.category_ids == memory.category_ids
    assert files.image_ids == memory.image_ids
    for index in range(3):
        for name, value in files[index].items():
            np.testing.assert_array_equal(value, memory[index][name], err_msg=name)


def test_plain_files_read_as_one_class(tmp_path):
    write_composites(tmp_path, "train", count=3, seed=0, size=64, plain=True)
    source = read_detection_source(str(tmp_path / "train.json"))
    assert source.class_names == ("garment",)
    for index in range(3):
        composite = make_composite("train", 0, index, size=64, max_objects=1)
        np.testing.assert_array_equal(source[index]["boxes_xyxy_px"], composite.boxes_xyxy_px)
        np.testing.assert_array_equal(source[index]["image"], composite.image)


@pytest.mark.parametrize(
    "spec",
    ["", "train", "train/0", "valid/0/5", "train/0/5/64/1", "train/-1/5", "train/a/5", "train/0/²"],
)
def test_a_specification_that_is_none_says_how_to_write_it(spec):
    with pytest.raises(UserError, match="write composites:SPLIT/SEED/COUNT"):
        read_detection_source(f"composites:{spec}")
    with pytest.raises(UserError, match="size 512: use 64 to 256"):
        read_detection_source("composites:train/0/5/512")


def test_classes_have_hues_of_their_own():
    """As the documentation says: color alone tells the class."""
    pieces, rng = read_pieces("train"), np.random.default_rng(0)
    for label in np.repeat(np.arange(8), 10):
        garment = pieces.garments[rng.choice(np.flatnonzero(pieces.labels == label))]
        colors, _ = composites._dress_up(garment, int(label), rng, 96)
        hue, _, _ = colorsys.rgb_to_hsv(*np.asarray(colors).mean(axis=(0, 1)))
        assert round(8 * hue) % 8 == label
