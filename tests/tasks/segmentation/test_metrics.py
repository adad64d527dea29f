import numpy as np
import pytest
from scipy import ndimage

from vision_jax.errors import UserError
from vision_jax.tasks.segmentation.metrics import (
    Tally,
    boundary_counts,
    boundary_of,
    confusion_matrix,
    count_objects,
)

NAMES = ("sky", "road", "car", "bus")


def draw(rng, count=4, classes=4, absent=3):
    """Pairs of prediction and label of several sizes; a class is in no label."""
    pairs = []
    for _ in range(count):
        size = tuple(rng.integers(8, 30, size=2))
        label = ndimage.zoom(rng.integers(absent, size=(5, 5)), np.array(size) / 5, order=0)
        label = label.astype(np.uint8)
        label[rng.random(label.shape) < 0.1] = 255
        prediction = np.where(rng.random(label.shape) < 0.7, label, rng.integers(classes))
        prediction[prediction == 255] = 0
        pairs.append((prediction.astype(np.uint8), label))
    return pairs


def test_iou_by_ten_lines(rng):
    """Over the set, 255 left out, a class that is nowhere left out of the mean."""
    pairs = draw(rng)
    tally = Tally(NAMES)
    for pair in pairs:
        tally.add(*pair)
    found = tally.summarize()
    predicted, true = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    predicted, true = predicted[true != 255], true[true != 255]
    ious, dices = [], []
    for k in range(4):
        both, either = (
            ((predicted == k) & (true == k)).sum(),
            ((predicted == k) | (true == k)).sum(),
        )
        if either:
            ious.append(both / either)
            dices.append(2 * both / ((predicted == k).sum() + (true == k).sum()))
    np.testing.assert_allclose(found["miou"], np.mean(ious), rtol=1e-12)
    np.testing.assert_allclose(found["mean_dice"], np.mean(dices), rtol=1e-12)
    np.testing.assert_allclose(found["pixel_accuracy"], (predicted == true).mean(), rtol=1e-12)
    assert found["classes"] == [len(ious), 4]
    assert found["pixels"] == len(true)


def test_a_class_that_is_nowhere_is_no_number_and_one_that_is_predicted_alone_is_zero():
    tally = Tally(NAMES)
    tally.add(np.array([[0, 2]], np.uint8), np.array([[0, 0]], np.uint8))
    found = tally.summarize()
    assert [one["iou"] for one in found["per_class"].values()] == [0.5, None, 0.0, None]
    assert found["miou"] == 0.25
    assert found["classes"] == [2, 4]


def test_no_order_and_no_grouping_of_images_matters(rng):
    pairs = draw(rng)
    summaries = []
    for order in (range(4), reversed(range(4))):
        tally = Tally(NAMES, background="sky", objects="car")
        for i in order:
            tally.add(*pairs[i])
        summaries.append(tally.summarize())
    assert summaries[0] == summaries[1]


def test_foreground_is_all_but_the_background():
    tally = Tally(NAMES, background="sky")
    label = np.array([[0, 1, 2, 2]], np.uint8)
    tally.add(np.array([[0, 2, 2, 0]], np.uint8), label)
    found = tally.summarize()
    assert found["foreground_iou"] == 2 / 3  # road taken for car is foreground still
    assert found["miou_foreground"] == np.mean([0, 1 / 3])


def test_boundaries_are_what_repeated_erosion_takes_away(rng):
    """The reference erodes by 3 x 3 with a border of zeros."""
    mask = ndimage.zoom(rng.integers(2, size=(6, 7)), 5, order=0).astype(bool)
    for reach in (1, 2, 4):
        eroded = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=reach, border_value=0)
        assert (boundary_of(mask, reach) == (mask & ~eroded)).all()


def test_boundary_iou_of_a_shifted_square():
    """Reach is 2 % of the diagonal: 1 pixel of 50 by 50."""
    label, prediction = np.zeros((2, 50, 50), np.uint8)
    label[10:20, 10:20] = 1
    prediction[10:20, 11:21] = 1
    both, either = boundary_counts(prediction, label, 2)[:, 1]
    ring = {(y, x) for y in range(10, 20) for x in range(10, 20) if {y, x} & {10, 19}}
    moved = {(y, x + 1) for y, x in ring}
    assert (both, either) == (len(ring & moved), len(ring | moved))
    same = boundary_counts(label, label, 2)
    assert (same[0] == same[1]).all()


def test_ignored_pixels_count_nowhere(rng):
    (prediction, label) = draw(rng, count=1)[0]
    label[:4] = 255
    changed = prediction.copy()
    changed[:4] = 3
    for count in (confusion_matrix, boundary_counts):
        assert (count(prediction, label, 4) == count(changed, label, 4)).all()


def test_objects():
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1], [2, 0, 1, 0, 1]])
    assert count_objects(mask == 1) == 3
    assert count_objects(mask == 1, least_pixels=2) == 2
    assert count_objects(mask == 1, mask > 0) == 4  # 2 is nothing but edge
    tally = Tally(NAMES[:3], background="sky", objects="road")
    tally.add(mask.astype(np.uint8), (mask == 1).astype(np.uint8))
    found = tally.summarize()
    assert (found["objects"], found["objects_true"]) == (4, 3)


def test_what_cannot_be_counted():
    with pytest.raises(UserError, match=r"config.evaluate.objects 'cat': there is no such class"):
        Tally(NAMES, objects="cat")
    tally = Tally(NAMES)
    tally.add(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8))
    with pytest.raises(UserError, match="not one of the pixels of 1 masks has a class"):
        tally.summarize()
    with pytest.raises(ValueError, match="differ"):
        confusion_matrix(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), 2)
    with pytest.raises(UserError, match="not below 2"):
        confusion_matrix(np.full((2, 2), 3, np.uint8), np.full((2, 2), 1, np.uint8), 2)
