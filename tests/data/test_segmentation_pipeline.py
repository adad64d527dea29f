import itertools

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.masks import IGNORED, ArrayMasks, MaskedImages
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.segmentation import make_segmentation_source, read_segmentation_source
from vision_jax.data.segmentation_pipeline import (
    make_segmentation_eval_batches,
    make_segmentation_train_iterator,
)
from vision_jax.data.segmentation_transforms import (
    SegmentationAugmentation,
    SegmentationPreprocessing,
    random_window,
    resize_mask,
    segmentation_eval_transform,
    segmentation_train_transform,
    view_window,
)
from vision_jax.errors import UserError

PREPROCESSING = SegmentationPreprocessing((12, 8), (0.5, 0.25, 0.75), (0.2,) * 3)
STILL = SegmentationAugmentation(scale=(1.0, 1.0), flip=False)


class Images:
    """Images whose pixels are their masks', thrice; some are damaged."""

    def __init__(self, masks, damaged=()):
        self.masks, self.damaged = masks, damaged

    def read(self, row):
        if row in self.damaged:
            raise DamagedImageError(f"image {row}: damaged")
        return np.repeat(self.masks[row][..., None], 3, axis=2)

    open = read

    def example_name(self, row):
        return f"image {row}"


def source_of(rng, sizes, damaged=()):
    masks = tuple(rng.integers(20, size=size).astype(np.uint8) for size in sizes)
    names = tuple(f"c{k}" for k in range(20))
    found = MaskedImages("drawn", names, Images(masks, damaged), ArrayMasks("m", masks), len(masks))
    return make_segmentation_source(found)


@pytest.mark.parametrize(
    "augmentation",
    [
        SegmentationAugmentation(),
        SegmentationAugmentation(scale=(1.0, 1.0), turn=True),
        SegmentationAugmentation(scale=(0.2, 4.0), turn=True),
    ],
)
def test_masks_stay_in_step_and_are_never_interpolated(rng, augmentation):
    """Of an image that is its mask, with nearest resampling: the same in each pixel."""
    nearest = SegmentationPreprocessing((12, 8), (1.0,) * 3, (0.2,) * 3, "nearest")
    for _ in range(60):
        size = tuple(rng.integers(4, 40, size=2))
        mask = rng.integers(20, size=size).astype(np.uint8)
        image = np.repeat(mask[..., None], 3, axis=2)
        view, label = segmentation_train_transform(
            image, mask, rng, preprocessing=nearest, augmentation=augmentation
        )
        assert view.shape == (12, 8, 3)
        assert label.shape == (12, 8)
        assert (view == label[..., None]).all()  # the mean color is 255 here
        assert set(np.unique(label)) <= {*np.unique(mask), IGNORED}


def test_beyond_the_image_is_the_mean_color_and_255(rng):
    image = np.full((4, 4, 3), 9, np.uint8)
    view, label = view_window(
        image, np.full((4, 4), 3, np.uint8), (-4, -2, 12, 8), (12, 8), PREPROCESSING
    )
    inside = np.zeros((12, 8), bool)
    inside[4:8, 2:6] = True
    assert (label == np.where(inside, 3, IGNORED)).all()
    assert (view[inside] == 9).all()
    assert (view[~inside] == [128, 64, 191]).all()


def test_windows_are_anywhere_they_fit(rng):
    found = np.array([random_window((20, 9), (8.4, 12), rng) for _ in range(400)])
    assert (found[:, 2:] == [8, 12]).all()
    assert found[:, :2].min(0).tolist() == [0, -3]
    assert found[:, :2].max(0).tolist() == [12, 0]


def test_a_mask_is_resized_by_the_pixels_at_its_centers(rng):
    mask = rng.integers(9, size=(7, 10)).astype(np.uint8)
    rows, columns = (
        np.floor((np.arange(new) + 0.5) * old / new).astype(int) for new, old in ((5, 7), (23, 10))
    )
    assert (resize_mask(mask, (5, 23)) == mask[rows[:, None], columns[None]]).all()


def take(source, count, **changes):
    arguments = {
        "batch_size": 4,
        "preprocessing": PREPROCESSING,
        "augmentation": SegmentationAugmentation(turn=True, brightness=0.2),
        "seed": 3,
        "num_threads": 2,
        "max_damaged": 0.5,
    }
    return list(
        itertools.islice(make_segmentation_train_iterator(source, **arguments | changes), count)
    )


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_functions_of_seed_and_step(rng):
    source = source_of(rng, [(20, 30), (9, 9), (15, 40)], damaged=(1,))
    log = DamageLog()
    whole = take(source, 4, damage_log=log)
    assert log.names == ("image 1",)
    assert_same(take(source, 2, first_batch=2, num_threads=1), whole[2:])
    halves = [take(source, 4, batch_size=2, process_index=i, process_count=2) for i in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name][:2], parts[0][name])
            np.testing.assert_array_equal(batch[name][2:], parts[1][name])
    assert not np.array_equal(take(source, 1, seed=4)[0]["image"], whole[0]["image"])


def test_too_many_damaged_images_end_it(rng):
    source = source_of(rng, [(20, 30)] * 2, damaged=(0,))
    with pytest.raises(UserError, match="1 of 2 images were found damaged"):
        take(source, 2, max_damaged=0.1)


@pytest.mark.parametrize("view", ["original", "squash"])
def test_evaluation_sees_every_image_once_in_batches_of_one_size(rng, view):
    sizes = [(20, 30), (20, 30), (9, 9), (20, 30), (20, 30), (20, 30), (5, 6)]
    source = source_of(rng, sizes, damaged=(3,))
    preprocessing = SegmentationPreprocessing((12, 8), (0.5,) * 3, (0.2,) * 3, view=view)
    log = DamageLog()
    found = {
        processes: [
            list(
                make_segmentation_eval_batches(
                    source,
                    batch_size=2 // processes,
                    preprocessing=preprocessing,
                    num_threads=2,
                    process_index=i,
                    process_count=processes,
                    damage_log=log,
                )
            )
            for i in range(processes)
        ]
        for processes in (1, 2)
    }
    seen = []
    for batch in found[1][0]:
        size = batch["label"].shape[1:]
        assert batch["image"].shape[1:3] == (size if view == "original" else (12, 8))
        for row, counted in enumerate(batch["mask"]):
            index = int(batch["index"][row])
            if counted:
                seen.append(index)
                np.testing.assert_array_equal(batch["label"][row], source[index]["mask"])
                expected = segmentation_eval_transform(source[index]["image"], preprocessing)
                np.testing.assert_array_equal(batch["image"][row], expected)
            else:
                assert index == -1
                assert (batch["label"][row] == IGNORED).all()
    assert seen == [0, 1, 2, 4, 5, 6]
    assert log.names == ("image 3",)
    for batch, *rows in zip(found[1][0], *found[2], strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], np.concatenate([r[name] for r in rows]))


def test_files_of_one_size_share_a_batch_wherever_they_are(rng, tmp_path):
    """And a size that one image has costs one row, or as many as there are devices."""
    sizes = [(9, 7), (20, 30), (9, 7), (20, 30), (5, 6), (9, 7), (9, 7), (9, 7)]
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i, size in enumerate(sizes):
        pixels = rng.integers(2, size=size).astype(np.uint8)
        for kind in ("images", "masks"):
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "classes.json").write_text('["a", "b"]')
    (tmp_path / "images" / "7.png").write_bytes(b"no image")
    source = read_segmentation_source(str(tmp_path))
    for unit, rows in ((1, [1, 4, 2]), (2, [2, 4, 2])):
        batches = list(
            make_segmentation_eval_batches(
                source, batch_size=4, preprocessing=PREPROCESSING, num_threads=1, unit=unit
            )
        )
        assert [len(batch["mask"]) for batch in batches] == rows
        found = [i for batch in batches for i in batch["index"][batch["mask"]]]
        assert sorted(found) == [0, 1, 2, 3, 4, 5, 6]
        for batch in batches:
            for row in np.flatnonzero(batch["mask"]):
                expected = source[int(batch["index"][row])]["mask"]
                np.testing.assert_array_equal(batch["label"][row], expected)


def test_preprocessing_that_makes_no_sense():
    for changes, words in (
        ({"view": "wide"}, "preprocessing view"),
        ({"interpolation": "cubic"}, "preprocessing interpolation"),
        ({"image_size": (0, 4)}, "positive"),
        ({"std": (0.0,) * 3}, "no normalization"),
    ):
        fields = {"image_size": (4, 4), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        with pytest.raises(UserError, match=words):
            SegmentationPreprocessing(**fields | changes)


def test_an_image_that_a_resized_short_side_makes_endless_is_refused():
    image = np.zeros((1, 3000, 3), np.uint8)
    fields = {"image_size": (8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "view": "short"}
    with pytest.raises(DamagedImageError, match="1 x 3000 pixels would be 8 x 24000"):
        segmentation_eval_transform(image, SegmentationPreprocessing(**fields))
    with pytest.raises(UserError, match="windows are squares"):
        SegmentationPreprocessing(**fields | {"view": "windows", "image_size": (8, 9)})
