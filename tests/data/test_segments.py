"""Segments out of every format that tells instances apart, and as targets of training."""

import json

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.fingerprint import describe_changes, take_fingerprint
from vision_jax.data.masks import IGNORED
from vision_jax.data.segmentation import read_segmentation_source
from vision_jax.data.segmentation_pipeline import make_segmentation_train_iterator, pad_segments
from vision_jax.data.segmentation_transforms import (
    SegmentationAugmentation,
    SegmentationPreprocessing,
    segmentation_train_transform,
)
from vision_jax.data.segments import encode, encode_map, flatten, make_segments
from vision_jax.errors import UserError

SIZE = (20, 24)


def box(top, left, bottom, right, size=SIZE):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def ring(top, left, bottom, right):
    return [left, top, right, top, right, bottom, left, bottom]


def runs_of(mask):
    """COCO's uncompressed run lengths."""
    flat = mask.T.reshape(-1).astype(np.int8)
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([*([0] if flat[0] else []), 0, *ends, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": lengths}


@pytest.fixture
def coco(tmp_path):
    """Two cats that overlap, one in RLE, and a crowd of dogs."""
    Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(tmp_path / "a.png")
    crowd = box(0, 0, 20, 4)
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "area": 30, "bbox": [0, 0, 1, 1],
             "segmentation": [ring(2, 3, 10, 12)], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1],
             "segmentation": runs_of(box(6, 8, 16, 20)), "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 5, "bbox": [0, 0, 1, 1],
             "segmentation": runs_of(crowd), "iscrowd": 1},
        ],
    }  # fmt: skip
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return path


def test_instances_of_coco_overlap_and_keep_what_the_file_says(coco):
    source = read_segmentation_source(str(coco), targets="instance")
    assert source.class_names == ("cat", "dog")
    found = source[0]["segments"]
    order = [0, 1, 2]  # crowds are painted first
    assert found.label.tolist() == [1, 0, 0]
    assert found.crowd.tolist() == [True, False, False]
    assert found.area.tolist() == [80, 30, 120]  # stated, or counted
    wanted = [box(0, 0, 20, 4), box(2, 3, 10, 12), box(6, 8, 16, 20)]
    np.testing.assert_array_equal(found.pixels()[order], wanted)
    assert source.image_id(0) == 7
    assert source.category_ids() == [3, 5]
    assert source.segment_counts(0).tolist() == [2, 0]


def test_panoptic_targets_of_coco_do_not_overlap(coco):
    source = read_segmentation_source(str(coco), targets="panoptic")
    assert source.class_names == ("background", "cat", "dog")
    assert source.stuff == ("background",)
    found = source[0]["segments"]
    assert found.pixels().sum(0).max() == 1
    by_label = {
        (int(k), bool(c)): m
        for k, c, m in zip(found.label, found.crowd, found.pixels(), strict=True)
    }
    np.testing.assert_array_equal(by_label[2, True], box(0, 0, 20, 4) & ~box(2, 3, 10, 12))
    cats = found.pixels()[found.label == 1]
    np.testing.assert_array_equal(cats[1], box(6, 8, 16, 20))
    np.testing.assert_array_equal(cats[0], box(2, 3, 10, 12) & ~box(6, 8, 16, 20))
    np.testing.assert_array_equal(by_label[0, False], ~found.pixels()[found.label > 0].any(0))
    assert source.segment_counts(0).tolist() == [1, 2, 0]


def test_stuff_of_the_config_is_one_segment(coco):
    source = read_segmentation_source(str(coco), targets="panoptic", stuff=("cat",))
    assert source.stuff == ("background", "cat")
    found = source[0]["segments"]
    assert (found.label == 1).sum() == 1
    assert source.segment_counts(0).tolist() == [1, 1, 0]
    only = read_segmentation_source(str(coco), targets="instance", stuff=("cat",))
    assert only.class_names == ("dog",)
    assert only[0]["segments"].crowd.tolist() == [True]


def test_evaluation_data_have_the_classes_of_training(coco):
    names = ("dog", "mouse", "cat")
    source = read_segmentation_source(str(coco), targets="instance", class_names=names)
    assert source[0]["segments"].label.tolist() == [0, 2, 2]
    with pytest.raises(UserError, match="class 'cat' is not among"):
        read_segmentation_source(str(coco), targets="instance", class_names=("dog",))


def test_panoptic_files_say_things_stuff_crowds_and_void(tmp_path):
    number = np.zeros(SIZE, np.int64)
    number[:8], number[8:14], number[14:, :10] = 70_000, 3, 9
    number[14:, 10:18] = 12
    color = np.stack([number & 255, number >> 8 & 255, number >> 16], -1).astype(np.uint8)
    (tmp_path / "pan").mkdir()
    Image.fromarray(color).save(tmp_path / "pan/a.png")
    Image.fromarray(color).save(tmp_path / "a.jpg")
    kinds = [("sky", 0), ("cat", 1)]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": i, "name": n, "isthing": t} for i, (n, t) in enumerate(kinds)],
        "annotations": [
            {"image_id": 1, "file_name": "a.png", "segments_info": [
                {"id": 70_000, "category_id": 0}, {"id": 3, "category_id": 1},
                {"id": 9, "category_id": 1}, {"id": 12, "category_id": 1, "iscrowd": 1},
            ]},
        ],
    }  # fmt: skip
    (tmp_path / "pan.json").write_text(json.dumps(content))
    panoptic = read_segmentation_source(str(tmp_path / "pan.json"), targets="panoptic")
    assert panoptic.stuff == ("sky",)
    found = panoptic[0]["segments"]
    assert sorted(found.label.tolist()) == [0, 1, 1, 1]
    assert found.crowd.sum() == 1
    np.testing.assert_array_equal(found.map() < 0, box(14, 18, 20, 24))
    things = read_segmentation_source(str(tmp_path / "pan.json"), targets="instance")
    assert things.class_names == ("cat",)
    assert things[0]["segments"].label.tolist() == [0, 0, 0]
    semantic = read_segmentation_source(str(tmp_path / "pan.json"))
    assert set(np.unique(semantic.mask(0))) == {0, 1, IGNORED}


def test_labelme_and_what_has_no_instances(tmp_path):
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "a.png")
    shapes = [
        {"label": name, "shape_type": "rectangle", "points": [[2, 2], [9, 9]]}
        for name in ("cat", "cat", "__ignore__")
    ]
    content = {"imagePath": "a.png", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    (tmp_path / "a.json").write_text(json.dumps({**content, "shapes": shapes}))
    source = read_segmentation_source(str(tmp_path / "a.json"), targets="instance")
    assert source.class_names == ("cat",)
    assert len(source[0]["segments"]) == 2
    with pytest.raises(UserError, match=r"config\.data\.stuff 'cut'.*`cat`"):
        read_segmentation_source(str(tmp_path / "a.json"), targets="panoptic", stuff=("cut",))
    with pytest.raises(UserError, match="every class is stuff"):
        read_segmentation_source(str(tmp_path / "a.json"), targets="instance", stuff=("cat",))
    for kind in ("images", "masks"):
        (tmp_path / "f" / kind).mkdir(parents=True)
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "f" / kind / "a.png")
    (tmp_path / "f/classes.json").write_text('["a", "b"]')
    with pytest.raises(UserError, match=r"no instances, which config\.data\.targets=panoptic"):
        read_segmentation_source(str(tmp_path / "f"), targets="panoptic")


def test_flattening_any_segments(rng):
    """Against pixels painted one by one."""
    for _ in range(30):
        count = int(rng.integers(0, 6))
        masks = rng.random((count, *SIZE)) < 0.4
        label, crowd = rng.integers(0, 4, count), rng.random(count) < 0.2
        label[rng.random(count) < 0.1] = IGNORED
        around = 0 if rng.random() < 0.5 else None
        found = flatten(make_segments(masks, SIZE, label, crowd=crowd), [0, 1], around)
        pixels = found.pixels()
        assert pixels.sum(0).max(initial=0) <= 1
        top = np.full(SIZE, -1)
        for i, mask in enumerate(masks):
            top[mask] = i
        for y, x in np.ndindex(SIZE):
            here = np.flatnonzero(pixels[:, y, x])
            i = top[y, x]
            if around is None if i < 0 else label[i] == IGNORED:
                assert not len(here)
            else:
                assert found.label[here[0]] == (around if i < 0 else label[i])
                assert found.crowd[here[0]] == (i >= 0 and crowd[i])
        for kind in (0, 1):
            assert ((found.label == kind) & ~found.crowd).sum() <= 1


def test_masks_go_with_the_image_through_the_augmentation(rng):
    """A stack of masks is what each of them is alone; pixels are never interpolated."""
    image = rng.integers(0, 256, (31, 45, 3), np.uint8)
    masks = (rng.random((4, 31, 45)) < 0.5).astype(np.uint8)
    preprocessing = SegmentationPreprocessing((16, 24), (0.5,) * 3, (0.5,) * 3)
    augmentation = SegmentationAugmentation((0.3, 2.0), True, True)
    for seed in rng.integers(2**32, size=20):
        seen, stack = segmentation_train_transform(
            *(image, masks, np.random.default_rng(seed)),
            preprocessing=preprocessing,
            augmentation=augmentation,
        )
        assert stack.shape == (4, 16, 24)
        for mask, one in zip(masks, stack, strict=True):
            again, alone = segmentation_train_transform(
                *(image, mask, np.random.default_rng(seed)),
                preprocessing=preprocessing,
                augmentation=augmentation,
            )
            np.testing.assert_array_equal(again, seen)
            np.testing.assert_array_equal(np.where(alone == IGNORED, 0, alone), one)


def test_training_batches_are_padded_and_leave_crowds_out(coco):
    source = read_segmentation_source(str(coco), targets="instance")
    preprocessing = SegmentationPreprocessing((16, 16), (0.5,) * 3, (0.5,) * 3)
    batches = make_segmentation_train_iterator(
        source, batch_size=3, preprocessing=preprocessing,
        augmentation=SegmentationAugmentation((0.4, 0.5)), seed=0, num_threads=1,
        max_damaged=0.0, most_segments=5,
    )  # fmt: skip
    batch = next(batches)
    assert batch["label"].shape == (3, 5)
    assert batch["masks"].shape == (3, 5, 16, 16)
    there = batch["label"] >= 0
    np.testing.assert_array_equal(batch["masks"].any((2, 3)), there)
    assert set(batch["label"][there]) == {0}  # the dogs are a crowd
    with pytest.raises(UserError, match=r"2 segments: raise config\.data\.max_segments, 1"):
        pad_segments(np.zeros(2, np.uint8), np.ones((2, 4, 4), np.uint8), 1)


def test_nuclei_in_squares():
    parts = [
        read_segmentation_source(f"embedded:nuclei/{split}", targets="instance")
        for split in ("train", "test")
    ]
    assert [len(part) for part in parts] == [12, 4]
    for part in parts:
        assert part.class_names == ("nucleus",)
        one = part[0]
        assert one["image"].shape == (128, 128, 3)
        assert one["segments"].pixels().sum(0).max() == 1
    whole = read_segmentation_source("embedded:nuclei/test")
    inside = np.concatenate([parts[1].mask(i) != IGNORED for i in range(4)])
    np.testing.assert_array_equal(inside, whole.mask(0) > 0)


# --- Cityscapes ---------------------------------------------------------------------------------

PERSON, CAR, CARAVAN, ROAD, SKY = 24, 26, 29, 7, 23


def cityscapes(folder, instances, objects=()):
    """A split of one image with these instanceIds; its specification."""
    stem = "aachen_000000_000019"
    for top, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        (folder / top / "train/aachen").mkdir(parents=True, exist_ok=True)
        ids = np.where(instances < 1000, instances, instances // 1000).astype(np.uint8)
        Image.fromarray(ids).save(folder / top / "train/aachen" / f"{stem}_{end}.png")
    truth = folder / "gtFine/train/aachen"
    Image.fromarray(instances.astype(np.uint16)).save(truth / f"{stem}_gtFine_instanceIds.png")
    content = {"objects": [{"label": name, "polygon": []} for name in objects]}
    (truth / f"{stem}_gtFine_polygons.json").write_text(json.dumps(content))
    return f"cityscapes:{folder}/train"


def test_cityscapes_tells_things_apart(tmp_path, rng):
    """Every segment by its definition, in a map of random values."""
    values = [0, 4, ROAD, SKY, PERSON, CAR, CARAVAN, 24_000, 24_007, 26_001, 26_002, 29_003, 33_000]
    numbers = rng.choice(values, SIZE)
    spec = cityscapes(tmp_path, numbers, ["road", "cargroup", "car", "car", "caravan", "person"])
    source = read_segmentation_source(spec, targets="instance")
    things = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    assert source.class_names == things
    assert source.category_ids() == [24, 25, 26, 27, 28, 31, 32, 33]
    assert source.image_id(0) == "aachen_000000_000019"
    assert source.segment_counts(0).tolist() == [1, 0, 2, 0, 0, 0, 0, 0]
    found = source[0]["segments"]
    wanted = {  # value -> label, crowd
        PERSON: (0, True), CAR: (2, True), 24_000: (0, False), 24_007: (0, False),
        26_001: (2, False), 26_002: (2, False), 33_000: (7, False),
    }  # fmt: skip
    assert len(found) == len(wanted)
    for label, crowd, mask in zip(found.label, found.crowd, found.pixels(), strict=True):
        (value,) = np.unique(numbers[mask])
        assert (int(label), bool(crowd)) == wanted[int(value)]
        np.testing.assert_array_equal(mask, numbers == value)

    whole = read_segmentation_source(spec, targets="panoptic")
    assert len(whole.class_names) == 19
    assert whole.stuff == whole.class_names[:11]
    found = whole[0]["segments"]
    assert len(found) == len(wanted) + 2
    covered = found.pixels().sum(0)
    np.testing.assert_array_equal(covered, ~np.isin(numbers, (0, 4, CARAVAN, 29_003)))
    assert whole.segment_counts(0).tolist() == [1, *[0] * 10, 1, 0, 2, *[0] * 5]


def test_edits_of_things_alone_are_another_data_set(tmp_path):
    numbers = np.full(SIZE, 24_000)
    found = {}
    for name, last in (("first", 24_000), ("again", 24_000), ("edited", 24_001)):
        numbers[-1] = last
        spec = cityscapes(tmp_path, numbers)
        for targets in ("semantic", "instance"):
            source = read_segmentation_source(spec, targets=targets)
            found[name, targets] = take_fingerprint(source)
    assert found["first", "instance"] == found["again", "instance"]
    changes = describe_changes(found["first", "instance"], found["edited", "instance"])
    assert changes.startswith("1 annotated otherwise ('")
    assert describe_changes(found["first", "semantic"], found["edited", "semantic"]) == ""


def test_cityscapes_that_are_none(tmp_path):
    for value in (34, 7_001, 23_000, 34_000, 65_535):
        spec = cityscapes(tmp_path, np.full(SIZE, value))
        with pytest.raises(UserError, match=f"the value {value} is no id of Cityscapes"):
            read_segmentation_source(spec, targets="panoptic").segments(0)
    polygons = next(tmp_path.rglob("*_polygons.json"))
    for text in ("{", "[]", '{"objects": 3}', '{"objects": [3]}'):
        polygons.write_text(text)
        with pytest.raises(UserError, match=r"_polygons\.json"):
            read_segmentation_source(spec, targets="panoptic").segment_counts(0)


def test_the_runs_of_a_map_are_those_of_its_masks(rng):
    for _ in range(20):
        size = tuple(rng.integers(1, 9, 2))
        numbers = rng.integers(0, rng.integers(1, 6), size).astype(rng.choice(["u2", "i4", "i8"]))
        found = encode_map(numbers, range(1, 7))
        assert sorted(found) == sorted(set(numbers[numbers > 0].tolist()))
        for number, runs in found.items():
            assert runs == encode([numbers == number])[0]
