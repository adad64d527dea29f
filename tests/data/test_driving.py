"""Street scenes drawn from a seed."""

import numpy as np
import pytest

from vision_jax.data import driving
from vision_jax.data.segmentation import read_segmentation_source
from vision_jax.errors import UserError


def test_a_scene_is_a_function_of_its_arguments():
    first = driving.make_scene("train", 3, 5, size=64)
    again = driving.make_scene("train", 3, 5, size=64)
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for other in (("test", 3, 5), ("train", 4, 5), ("train", 3, 6)):
        assert (driving.make_scene(*other, size=64).mask != first.mask).any()


def test_scenes_hold_all_classes_where_they_belong(rng):
    source = read_segmentation_source("driving:train/0/40")
    assert source.class_names == driving.CLASS_NAMES
    assert "no measure of quality" in source.note
    masks = np.stack([source[i]["mask"] for i in range(len(source))])
    images = np.stack([source[i]["image"] for i in range(len(source))])
    assert masks.shape == (40, 96, 96)
    assert images.shape == (40, 96, 96, 3)
    shares = np.bincount(masks.ravel(), minlength=8) / masks.size
    assert (shares > 0.002).all()
    assert shares[driving.ROAD] > 0.15
    rows = [np.nonzero(masks == k)[1].mean() for k in range(8)]
    assert rows[driving.SKY] < rows[driving.BUILDING] < rows[driving.CAR] < rows[driving.ROAD]
    # Light and color vary, so that no threshold tells the classes apart.
    sky = [image[mask == driving.SKY].mean() for image, mask in zip(images, masks, strict=True)]
    assert np.ptp(sky) > 40


@pytest.mark.parametrize(
    "rest", ["", "train", "train/0", "valid/0/5", "train/x/5", "train/0/0", "train/0/5/9999",
             "train/0/5/96/1", "train/0/999999999"],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_in_one_line(rest):
    with pytest.raises(UserError, match=f"driving:{rest}") as error:
        read_segmentation_source(f"driving:{rest}")
    assert "\n" not in str(error.value)
