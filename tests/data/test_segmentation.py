import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.masks import IGNORED, ArrayMasks, MaskedImages
from vision_jax.data.nuclei import inside_and_edge
from vision_jax.data.segmentation import (
    make_segmentation_source,
    read_segmentation_source,
    segmentation_part,
    segmentation_subset,
    split_segmentation_source,
)
from vision_jax.data.sources import ArrayReader
from vision_jax.errors import UserError


def make_folder(folder, rng, count=3, *, images="images", masks="masks", names=("a", "b"), end=""):
    """`count` images of different sizes with masks of two classes: their masks."""
    (folder / images).mkdir(parents=True)
    (folder / masks).mkdir(parents=True)
    made = []
    for i in range(count):
        shape = (4 + i, 6)
        pixels = rng.integers(256, size=(*shape, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / images / f"{i}.png")
        mask = rng.choice([0, 1, 255], size=shape).astype(np.uint8)
        Image.fromarray(mask).save(folder / masks / f"{i}{end}.png")
        made.append(mask)
    (folder / "classes.json").write_text(json.dumps(names))
    return made


@pytest.mark.parametrize(
    ("images", "masks", "end", "spec"),
    [
        ("images", "masks", "", ""),
        ("images/train", "masks/train", "", "images/train"),
        ("JPEGImages", "SegmentationClass", "", ""),
        ("img", "label", "_L", ""),
        ("images/training", "annotations/training", "", "images/training"),
    ],
)
def test_folders(tmp_path, rng, images, masks, end, spec):
    made = make_folder(tmp_path, rng, images=images, masks=masks, end=end)
    source = read_segmentation_source(str(tmp_path / spec))
    assert source.class_names == ("a", "b")
    assert len(source) == 3
    for i, mask in enumerate(made):
        assert source[i]["mask"].dtype == np.uint8
        assert source[i]["mask"].tolist() == mask.tolist()
        assert source[i]["image"].shape == (*mask.shape, 3)
        assert source.example_name(i).endswith(f"{i}.png")
    assert pickle.loads(pickle.dumps(source))[2]["mask"].tolist() == made[2].tolist()


def test_classes_of_another_order(tmp_path, rng):
    made = make_folder(tmp_path, rng)
    source = read_segmentation_source(str(tmp_path), class_names=("x", "b", "a"))
    of = np.full(256, IGNORED)
    of[:2] = [2, 1]
    assert source[0]["mask"].tolist() == of[made[0]].tolist()
    with pytest.raises(UserError, match="class 'b' is not among"):
        read_segmentation_source(str(tmp_path), class_names=("a",))


def test_reduce_zero(tmp_path, rng):
    made = make_folder(tmp_path, rng, names=("a",))
    source = read_segmentation_source(str(tmp_path), reduce_zero=True)
    assert source.class_names == ("a",)
    expected = np.where(made[1] == 1, 0, 255)
    assert source[1]["mask"].tolist() == expected.tolist()


def test_a_value_outside_the_table_stops_by_name(tmp_path, rng):
    make_folder(tmp_path, rng, names=("a",))
    Image.fromarray(np.full((4, 6), 7, np.uint8)).save(tmp_path / "masks" / "0.png")
    source = read_segmentation_source(str(tmp_path))
    with pytest.raises(UserError, match=r"0\.png: 24 pixels of the value 7") as error:
        source[0]
    assert not isinstance(error.value, DamagedImageError)


def test_a_mask_of_another_size_is_damaged(tmp_path, rng):
    make_folder(tmp_path, rng)
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "masks" / "0.png")
    with pytest.raises(DamagedImageError, match="6 × 4 pixels and its mask 5 × 4"):
        read_segmentation_source(str(tmp_path))[0]


def test_a_photo_that_exif_turns(tmp_path, rng):
    """The mask tells by its size whether it was drawn on the upright photo or the stored one."""
    make_folder(tmp_path, rng)
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png", exif=exif)
    assert read_segmentation_source(str(tmp_path))[0]["image"].tolist() == pixels.tolist()
    Image.fromarray(np.zeros((6, 4), np.uint8)).save(tmp_path / "masks" / "0.png")
    turned = np.rot90(pixels, -1)
    assert read_segmentation_source(str(tmp_path))[0]["image"].tolist() == turned.tolist()


def test_what_is_left_out_is_said(tmp_path, rng):
    make_folder(tmp_path, rng)
    (tmp_path / "masks" / "1.png").rename(tmp_path / "masks" / "9.png")
    source = read_segmentation_source(str(tmp_path))
    assert len(source) == 2
    assert "1 images without a mask left out, the first 1.png" in source.note
    assert "1 masks without an image" in source.note


def test_folders_that_are_none_are_refused(tmp_path, rng):
    made = tmp_path / "made"
    make_folder(made, rng)
    (tmp_path / "empty").mkdir()
    jpeg = tmp_path / "jpeg"
    make_folder(jpeg, rng)
    for path in (jpeg / "masks").iterdir():
        path.rename(path.with_suffix(".jpg"))
    other = tmp_path / "other"
    make_folder(other, rng)
    for path in (other / "masks").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    for spec, options, words in (
        ("", {}, "no data"),
        ("nowhere", {}, "no such folder"),
        ("empty", {}, "no images/ and masks/"),
        ("jpeg", {}, "save masks as PNG"),
        ("other", {}, "no mask has the name of an image"),
        ("made", {"masks": tmp_path / "none"}, "no such folder"),
        ("made", {"classes": tmp_path / "none.json"}, "none.json"),
    ):
        with pytest.raises(UserError, match=words) as error:
            read_segmentation_source(str(tmp_path / spec) if spec else "", **options)
        assert "\n" not in str(error.value)
    (made / "classes.json").unlink()
    with pytest.raises(UserError, match="which value of the masks is which class"):
        read_segmentation_source(str(made))


def arrays(count, groups=None):
    images = np.zeros((count, 2, 2), np.uint8)
    masks = ArrayMasks("m", tuple(np.zeros((2, 2), np.uint8) for _ in range(count)))
    found = MaskedImages("m", ("a", "b"), ArrayReader("m", images), masks, count, groups)
    return make_segmentation_source(found)


def test_splits_and_subsets(rng):
    source = arrays(20)
    train, held_out = split_segmentation_source(source, 0.25, 3)
    assert sorted([*train.rows, *held_out.rows]) == list(range(20))
    assert len(held_out) == 5
    small, large = (set(segmentation_subset(source, n, 1).rows.tolist()) for n in (4, 9))
    assert small < large
    assert segmentation_part(train, np.arange(15) == 3).rows.tolist() == [train.rows[3]]
    with pytest.raises(UserError, match="one image can't be split"):
        split_segmentation_source(arrays(1), 0.5, 0)


def test_a_split_keeps_groups_whole(rng):
    groups = rng.integers(5, size=40) * 10
    train, held_out = split_segmentation_source(arrays(40, groups), 0.3, int(rng.integers(99)))
    assert len(held_out)
    assert len(train)
    assert not set(train.groups.tolist()) & set(held_out.groups.tolist())
    with pytest.raises(UserError, match="one group"):
        split_segmentation_source(arrays(4, np.zeros(4, int)), 0.5, 0)


def test_nuclei():
    train, test = (
        read_segmentation_source(f"embedded:nuclei/{part}") for part in ("train", "test")
    )
    assert train.class_names == ("background", "inside", "edge")
    assert train[0]["image"].shape == (512, 384, 3)
    assert test[0]["mask"].shape == (512, 128)
    assert set(np.unique(test[0]["mask"])) == {0, 1, 2}
    with pytest.raises(UserError, match="nuclei/tset"):
        read_segmentation_source("embedded:nuclei/tset")


def test_edges_part_what_touches():
    instances = np.zeros((6, 8), int)
    instances[:4, :4], instances[:4, 4:] = 1, 2
    found = inside_and_edge(instances, 1)
    assert found[0].tolist() == [1, 1, 1, 2, 2, 1, 1, 1]
    assert found[3].tolist() == [2] * 8
    assert found[4].tolist() == [0] * 8
    assert inside_and_edge(instances, 2)[0].tolist() == [1, 1, 2, 2, 2, 2, 1, 1]


def test_edges_are_what_erosion_takes_away(rng):
    """Of each instance alone, by scipy."""
    from scipy import ndimage

    instances = ndimage.zoom(rng.integers(4, size=(5, 6)), 6, order=0)
    for reach in (1, 2, 3):
        expected = np.where(instances > 0, 2, 0)
        for value in (1, 2, 3):
            mask = np.pad(instances == value, 8, mode="edge")
            expected[ndimage.binary_erosion(mask, iterations=reach)[8:-8, 8:-8]] = 1
        assert inside_and_edge(instances, reach).tolist() == expected.tolist()
