import dataclasses
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.annotations import Annotations
from vision_jax.data.decode import DamagedImageError
from vision_jax.data.detection import (
    detection_subset,
    make_detection_source,
    part_of,
    read_detection_source,
    split_detection_source,
)
from vision_jax.errors import UserError


def annotations(folder, sizes, boxes, *, categories=((1, "cat", ""),), crowd=None, **changes):
    """`boxes`: (image, category, left, top, width, height) each; paths are 0.png, 1.png, ..."""
    table = np.array(boxes, np.float64).reshape(-1, 6)
    ids, names, parents = zip(*categories, strict=True)
    fields = {
        "name": "boxes.json",
        "folder": Path(folder),
        "paths": tuple(f"{i}.png" for i in range(len(sizes))),
        "sizes": np.array(sizes, np.int32).reshape(-1, 2),
        "image_ids": tuple(100 + i for i in range(len(sizes))),
        "category_ids": ids,
        "category_names": names,
        "supercategories": parents,
        "box_image": table[:, 0].astype(np.int32),
        "box_category": table[:, 1].astype(np.int32),
        "boxes_xywh_px": table[:, 2:],
        "area": table[:, 4] * table[:, 5],
        "crowd": np.zeros(len(table), bool) if crowd is None else np.array(crowd, bool),
        "files": ("boxes.json",),
        "entries": np.arange(len(table), dtype=np.int32),
        "entry_form": "{file}: annotations[{entry}]",
    }
    return Annotations(**(fields | changes))


def write_images(rng, folder, sizes, exif=None):
    for i, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        header = Image.Exif()
        if exif and exif[i]:
            header[0x0112] = exif[i]
        Image.fromarray(pixels).save(folder / f"{i}.png", exif=header)


def test_items_and_what_is_known_without_them(tmp_path, rng):
    sizes = [(20, 30), (40, 10), (8, 8)]
    write_images(rng, tmp_path, sizes)
    boxes = [(1, 0, 1, 2, 3, 4), (0, 1, 5, 6, 7, 8), (1, 1, 0, 0, 10, 40), (0, 0, 0.5, 0.25, 1, 2)]
    categories = ((7, "cat", "animal"), ("x", "dog", "animal"))
    crowd = [False, True, False, False]
    source = make_detection_source(
        annotations(tmp_path, sizes, boxes, categories=categories, crowd=crowd)
    )
    assert len(source) == 3
    assert source.note == ""
    item = source[0]
    shapes = {key: (value.shape, value.dtype.name) for key, value in item.items()}
    assert shapes == {
        "image": ((20, 30, 3), "uint8"),
        "boxes_xyxy_px": ((2, 4), "float32"),
        "label": ((2,), "int32"),
        "crowd": ((2,), "bool"),
        "area": ((2,), "float32"),
        "index": ((), "int32"),
    }
    assert item["boxes_xyxy_px"].tolist() == [[5, 6, 12, 14], [0.5, 0.25, 1.5, 2.25]]
    assert item["label"].tolist() == [1, 0]
    assert item["crowd"].tolist() == [True, False]
    assert item["area"].tolist() == [56, 2]
    assert [len(label) for label in source.label] == [2, 2, 0]
    assert source[2]["boxes_xyxy_px"].shape == (0, 4)
    assert source.boxes_xyxy_px[1].dtype == np.float64
    assert source.boxes_xyxy_px[-1].shape == (0, 4)
    with pytest.raises(IndexError):
        source.label[3]
    assert (source.class_names, source.category_ids) == (("cat", "dog"), (7, "x"))
    assert source.image_ids == (100, 101, 102)
    assert source.example_name(1) == str(tmp_path / "1.png")
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy[1]["image"], source[1]["image"])


def test_boxes_are_clipped_and_empty_ones_left_out(tmp_path, rng):
    """Random boxes against the same rules written for one box."""
    sizes = rng.integers(5, 60, (20, 2))
    table = np.column_stack(
        [rng.integers(0, 20, 400), np.zeros(400), rng.uniform(-30, 60, (400, 4))]
    )
    table[rng.integers(0, 400, 9), rng.integers(2, 6, 9)] = np.nan
    table[rng.integers(0, 400, 9), rng.integers(2, 6, 9)] = np.inf
    source = make_detection_source(annotations(tmp_path, sizes, table))
    left_out = 0
    expected: list[list] = [[] for _ in sizes]
    for image, _, x, y, w, h in table:
        height, width = sizes[int(image)]
        box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
        if np.isfinite([x, y, w, h]).all() and box[2] > box[0] and box[3] > box[1]:
            expected[int(image)].append(box)
        else:
            left_out += 1
    for own, boxes in zip(source.boxes_xyxy_px, expected, strict=True):
        assert own.tolist() == boxes
    assert 0 < left_out < 400
    assert f"{left_out} of 400 boxes left out of training: empty in the image, " in source.note
    assert ", the first bo" in source.note
    # For evaluation they are as they were written, of a part of the source too.
    finite = table[np.isfinite(table).all(1)]
    for kept in (np.ones(20, bool), rng.random(20) < 0.5):
        stated = part_of(source, kept).stated
        for own, image in zip(stated.boxes_xywh_px, np.flatnonzero(kept), strict=True):
            np.testing.assert_array_equal(own, finite[finite[:, 0] == image, 2:])


def test_a_root_without_boxes_is_no_class(tmp_path):
    categories = ((0, "pets", "none"), (1, "cat", "pets"), (2, "dog", "pets"), (5, "cow", "cow"))
    boxes = [(0, 2, 1, 1, 2, 2)]
    source = make_detection_source(annotations(tmp_path, [(9, 9)], boxes, categories=categories))
    assert source.class_names == ("cat", "dog", "cow")  # unused classes stay
    assert source.category_ids == (1, 2, 5)
    assert source.label[0].tolist() == [1]
    assert "classes 'pets' left out" in source.note
    # With a box the root is a class. And the root may bear its child's name.
    boxes.append((0, 0, 1, 1, 2, 2))
    source = make_detection_source(annotations(tmp_path, [(9, 9)], boxes, categories=categories))
    assert source.class_names == ("pets", "cat", "dog", "cow")
    twins = ((0, "cat", "none"), (1, "cat", "cat"))
    source = make_detection_source(
        annotations(tmp_path, [(9, 9)], [(0, 1, 1, 1, 2, 2)], categories=twins)
    )
    assert (source.class_names, source.category_ids) == (("cat",), (1,))


def test_labels_map_by_name_and_back(tmp_path, rng):
    ids = rng.permutation(1000)[:12].tolist()
    categories = tuple((key, f"class {key}", "") for key in ids)
    table = [(0, c, 1, 1, 2, 2) for c in rng.integers(0, 12, 50)]
    made = annotations(tmp_path, [(9, 9)], table, categories=categories)
    source = make_detection_source(made)
    assert [source.category_ids[k] for k in source.label[0]] == [ids[row[1]] for row in table]
    names = tuple(rng.permutation([*source.class_names, "another"]).tolist())
    mapped = make_detection_source(made, class_names=names)
    assert mapped.class_names == names
    assert [mapped.category_ids[k] for k in mapped.label[0]] == [ids[row[1]] for row in table]
    assert mapped.category_ids[names.index("another")] == "another"
    lacking = source.class_names[table[0][1]]
    with pytest.raises(UserError, match=f"class '{lacking}' is not among the 12 classes"):
        make_detection_source(made, class_names=tuple(n for n in names if n != lacking))
    double = (*categories, ("z", f"class {ids[3]}", ""))
    with pytest.raises(UserError, match=f"{ids[3]} and 'z' are both named"):
        make_detection_source(annotations(tmp_path, [(9, 9)], table, categories=double))


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match=r"set config\.data\.train"):
        read_detection_source("")
    with pytest.raises(UserError, match="no images are listed"):
        make_detection_source(annotations(tmp_path, [], []))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif(tmp_path, orientation, rng):
    """Boxes fit what is read, whether they were drawn on the upright or on the stored image."""
    write_images(rng, tmp_path, [(6, 10)], [orientation])
    stored = np.asarray(Image.open(tmp_path / "0.png"))
    turned = orientation >= 5
    box = [(0, 0, 1, 2, 3, 4)]
    on_stored = make_detection_source(annotations(tmp_path, [(6, 10)], box))
    assert np.array_equal(on_stored[0]["image"], stored) == (turned or orientation == 1)
    assert on_stored[0]["image"].shape == (6, 10, 3)
    if turned:
        on_upright = make_detection_source(annotations(tmp_path, [(10, 6)], box))
        assert on_upright[0]["image"].shape == (10, 6, 3)
    else:
        wrong = make_detection_source(annotations(tmp_path, [(10, 6)], box))
        with pytest.raises(DamagedImageError, match="say 6 × 10 pixels and the image has 10 × 6"):
            wrong[0]
    unknown = make_detection_source(annotations(tmp_path, [(0, 0)], box))
    assert unknown.sizes.tolist() == ([[10, 6]] if turned else [[6, 10]])
    assert unknown[0]["image"].shape[:2] == tuple(unknown.sizes[0])


def test_unreadable_files_are_found_when_they_are_read(tmp_path):
    (tmp_path / "0.png").write_bytes(b"nothing")
    source = make_detection_source(annotations(tmp_path, [(0, 0)], [(0, 0, 5, 5, 1000, 1)]))
    assert source.sizes.tolist() == [[0, 0]]
    assert source.boxes_xyxy_px[0].tolist() == [[5, 5, 1005, 6]]  # a miss for evaluation
    with pytest.raises(DamagedImageError, match=r"0\.png"):
        source[0]


def many(folder, count: int, classes: int = 3):
    """Box widths tell which image it is."""
    table = [(i, c, 0, 0, i + 1, 1) for i in range(count) for c in range(classes) if (i + c) % 4]
    categories = tuple((c, str(c), "") for c in range(classes))
    return make_detection_source(
        annotations(folder, [(9, count)] * count, table, categories=categories)
    )


def assert_consistent(part):
    for i, image_id in enumerate(part.image_ids):
        assert part.paths[i] == f"{image_id - 100}.png"
        assert part.rows[i] == image_id - 100
        assert set(part.boxes_xyxy_px[i][:, 2]) <= {image_id - 99}
        assert len(part.label[i]) == len(part.area[i]) == len(part.boxes_xyxy_px[i])


def test_splits(tmp_path):
    source = many(tmp_path, 50)
    train, held_out = split_detection_source(source, 0.2, seed=3)
    assert (len(train), len(held_out)) == (40, 10)
    assert sorted(train.image_ids + held_out.image_ids) == list(source.image_ids)
    for part in (train, held_out):
        assert_consistent(part)
        assert list(part.image_ids) == sorted(part.image_ids)
    again = split_detection_source(source, 0.2, seed=3)[1]
    other = split_detection_source(source, 0.2, seed=4)[1]
    assert again.image_ids == held_out.image_ids != other.image_ids
    assert len(split_detection_source(source, 0.001, seed=0)[1]) == 1
    assert len(split_detection_source(source, 0.999, seed=0)[0]) == 1
    with pytest.raises(UserError, match="use a share between 0 and 1"):
        split_detection_source(source, 1.0, seed=0)


def test_a_rare_class_is_in_both_parts(tmp_path):
    table = [(i, 0, 1, 1, 2, 2) for i in range(100)] + [(i, 1, 1, 1, 2, 2) for i in range(10)]
    categories = ((0, "common", ""), (1, "rare", ""))
    source = make_detection_source(
        annotations(tmp_path, [(9, 9)] * 100, table, categories=categories)
    )
    for seed in range(20):
        parts = split_detection_source(source, 0.2, seed)
        assert [int((part.label.values == 1).sum()) for part in parts] == [8, 2]
    half = detection_subset(source, 20, seed=0)
    assert (half.label.values == 1).sum() == 10


def test_subsets_are_nested(tmp_path):
    source = many(tmp_path, 30)
    parts = [set(detection_subset(source, count, seed=1).image_ids) for count in (1, 7, 20, 30)]
    assert [len(part) for part in parts] == [1, 7, 20, 30]
    assert all(a < b for a, b in itertools.pairwise(parts))
    assert_consistent(detection_subset(source, 11, seed=2))
    with pytest.raises(UserError, match="a subset of 31: use 1 to 30"):
        detection_subset(source, 31, seed=0)


def test_fields_are_pinned():
    """Other modules read these."""
    names = [field.name for field in dataclasses.fields(many(Path("."), 2))]
    assert names == [
        "name", "class_names", "category_ids", "image_ids", "paths", "sizes", "boxes_xyxy_px",
        "label", "crowd", "area", "rows", "reader", "note", "stated",
    ]  # fmt: skip
