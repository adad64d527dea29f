import dataclasses
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from vision_jax.data import detection_transforms
from vision_jax.data.detection_transforms import (
    STRIP,
    DetectionAugmentation,
    DetectionPreprocessing,
    choose_bucket,
    color_jitter,
    crop_boxes,
    default_buckets,
    detection_eval_transform,
    detection_train_transform,
    fit,
    flip_boxes,
    flip_image,
    random_window,
    resize_image,
    resized_size,
    scale_boxes,
    to_cxcywh_01,
)
from vision_jax.errors import UserError
from vision_jax.ops.resize import bilinear_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def detr(short=800, longest=1333, count=8) -> DetectionPreprocessing:
    buckets = default_buckets(short, longest, count)
    return DetectionPreprocessing(short, longest, False, "bilinear", MEAN, STD, buckets)


# --- sizes --------------------------------------------------------------------------------------

# (height, width) → at (800, 1333), at (480, 640): transformers 5.23, get_size_with_aspect_ratio.
SIZES = {
    (480, 640): ((800, 1066), (480, 640)),
    (640, 480): ((1066, 800), (640, 480)),
    (427, 640): ((800, 1199), (427, 640)),
    (640, 427): ((1199, 800), (640, 427)),
    (800, 800): ((800, 800), (480, 480)),
    (333, 500): ((800, 1201), (426, 640)),
    (1, 1): ((800, 800), (480, 480)),
    (100, 1000): ((133, 1333), (64, 640)),
    (1200, 800): ((1200, 800), (640, 427)),
    (800, 1201): ((800, 1201), (426, 639)),
    (1333, 800): ((1333, 800), (640, 384)),
    (61, 1400): ((58, 1333), (28, 640)),
    (20, 500): ((53, 1333), (26, 640)),
    (3024, 4032): ((800, 1066), (480, 640)),
    (1065, 640): ((1331, 800), (640, 385)),
    (13, 17): ((800, 1046), (480, 627)),
}


@pytest.mark.parametrize("size", SIZES)
def test_resized_sizes(size):
    assert resized_size(size, detr()) == SIZES[size][0]
    assert resized_size(size, detr(480, 640)) == SIZES[size][1]
    assert resized_size(size, detr(480, 1333), 800) == SIZES[size][0]
    square = DetectionPreprocessing(384, 384, True, "bilinear", MEAN, STD, ((384, 384),))
    assert resized_size(size, square) == (384, 384)


def test_corners_of_the_rule():
    assert resized_size((300, 641), detr(480, 640)) == (300, 640)  # transformers: (300, 641)
    assert resized_size((641, 300), detr(480, 640)) == (640, 300)
    assert resized_size((1, 5000), detr()) == (1, 1333)
    assert resized_size((5000, 1), detr()) == (1333, 1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("short", "longest"), [(800, 1333), (480, 640), (97, 161), (64, 64)])
def test_default_buckets_hold_every_image(count, short, longest, rng):
    preprocessing = detr(short, longest, count)
    assert len(preprocessing.buckets) <= count
    assert len(set(preprocessing.buckets)) == len(preprocessing.buckets)
    assert all(side % 32 == 0 for bucket in preprocessing.buckets for side in bucket)
    for _ in range(500):
        least = int(rng.integers(1, 2000))
        size = least, int(least * rng.uniform(1, 10) ** rng.choice([0, 1, 2]))
        for turned in (size, size[::-1]):
            resized = resized_size(turned, preprocessing)
            assert max(resized) <= longest
            bucket = preprocessing.buckets[choose_bucket(resized, preprocessing.buckets)]
            assert fit(resized, bucket) == resized, (turned, resized, bucket)


def test_default_buckets():
    assert default_buckets(800, 1333, 4) == ((800, 1088), (1088, 800), (800, 1344), (1344, 800))
    assert default_buckets(800, 1333, 3) == ((800, 800), (800, 1344), (1344, 800))
    assert default_buckets(800, 1333, 1) == ((1344, 1344),)
    for arguments in ((800, 1333, 0), (800, 700, 4), (0, 10, 4)):
        with pytest.raises(UserError, match="buckets for"):
            default_buckets(*arguments)


def test_choice_of_bucket_and_fit(rng):
    for _ in range(500):
        buckets = [tuple(row) for row in rng.integers(10, 100, (5, 2)).tolist()]
        size = tuple(rng.integers(5, 120, 2).tolist())
        chosen = buckets[choose_bucket(size, buckets)]
        holding = [b for b in buckets if b[0] >= size[0] and b[1] >= size[1]]
        fitted = fit(size, chosen)
        if holding:
            assert math.prod(chosen) == min(map(math.prod, holding))
            assert fitted == size
        else:
            shrink = {b: max(size[0] / b[0], size[1] / b[1]) for b in buckets}
            assert shrink[chosen] == min(shrink.values())
            assert fitted[0] == chosen[0] or fitted[1] == chosen[1]
            for side, whole, limit in zip(fitted, size, chosen, strict=True):
                assert 1 <= side <= limit
                assert abs(side - whole / shrink[chosen]) <= max(0.5, 1 - whole / shrink[chosen])


def test_preprocessing_goes_through_json_and_checks_itself():
    preprocessing = detr()
    record = json.loads(json.dumps(dataclasses.asdict(preprocessing)))
    assert DetectionPreprocessing(**record) == preprocessing
    for changes, message in (
        ({"interpolation": "magic"}, "interpolation 'magic': use one of nearest"),
        ({"short": 0}, "short 0, longest 1333"),
        ({"short": 1400}, "use 0 < short ≤ longest"),
        ({"buckets": ()}, "use pairs"),
        ({"buckets": ((0, 32),)}, "use pairs"),
        ({"square": True}, r"square images of 800 need the bucket \(800, 800\)"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(preprocessing, **changes)
    for changes, message in (
        ({"shorts": (0,)}, "shorts"),
        ({"crop": 1.5}, "crop 1.5"),
        ({"crop_resize": ()}, "crop_resize"),
        ({"crop_size": (0.5, 0.4)}, "crop_size"),
        ({"contrast": 2.0}, "contrast 2.0: use 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            DetectionAugmentation(**changes)


# --- boxes --------------------------------------------------------------------------------------


def random_boxes(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * [width, height]
    return corners.reshape(-1, 4)


def test_box_algebra_is_exact(rng):
    """Clip, flip and scale against rational arithmetic, one box at a time."""
    for _ in range(20):
        height, width, new_h, new_w = (int(n) for n in rng.integers(20, 2000, 4))
        top, left = int(rng.integers(height // 2)), int(rng.integers(width // 2))
        h, w = int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))
        boxes = random_boxes(rng, 30, height, width)
        cropped = crop_boxes(boxes, (top, left, h, w))
        kept = (cropped[:, 2:] > cropped[:, :2]).all(1)
        ours = flip_boxes(scale_boxes(cropped[kept], (h, w), (new_h, new_w)), new_w)
        shares = to_cxcywh_01(ours, (new_h, new_w))
        expected = []
        for box in boxes.tolist():
            x1, y1, x2, y2 = (Fraction(number) for number in box)
            x1, x2 = (min(max(x - left, Fraction(0)), Fraction(w)) / w for x in (x1, x2))
            y1, y2 = (min(max(y - top, Fraction(0)), Fraction(h)) / h for y in (y1, y2))
            if x2 > x1 and y2 > y1:
                expected.append([1 - x2, y1, 1 - x1, y2])
        assert kept.sum() == len(expected)
        exact = np.array(expected, np.float64).reshape(-1, 4)
        scale = np.tile([new_w, new_h], 2)
        np.testing.assert_allclose(ours / scale, exact, rtol=0, atol=1e-13)
        centers = (exact[:, :2] + exact[:, 2:]) / 2, exact[:, 2:] - exact[:, :2]
        np.testing.assert_allclose(shares, np.concatenate(centers, 1), rtol=0, atol=6e-8)


AUGMENTATIONS = {
    "none": DetectionAugmentation(flip=False),
    "flip": DetectionAugmentation(),
    "crop": DetectionAugmentation(flip=False, crop=1.0),
    "all": DetectionAugmentation(crop=0.5, brightness=0.2, contrast=0.2, saturation=0.2),
}


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_boxes_follow_the_pixels(name, square, rng):
    """A box drawn as pixels: where it is after the augmentation, the transformed box says."""
    preprocessing = DetectionPreprocessing(
        64, 64 if square else 107, square, "bilinear", MEAN, STD, ((64, 64), (64, 128), (128, 64))
    )
    outcomes = set()
    for _ in range(150):
        height, width = (int(n) for n in rng.integers(30, 200, 2))
        left, top = int(rng.integers(width - 8)), int(rng.integers(height - 8))
        right, bottom = (
            int(rng.integers(left + 4, width + 1)),
            int(rng.integers(top + 4, height + 1)),
        )
        image = np.zeros((height, width, 3), np.uint8)
        image[top:bottom, left:right] = 255
        new, boxes, kept = detection_train_transform(
            image,
            np.array([[left, top, right, bottom]], np.float64),
            rng,
            preprocessing=preprocessing,
            augmentation=AUGMENTATIONS[name],
            short=int(rng.choice([40, 64])),
            canvas=preprocessing.buckets[0 if square else rng.integers(3)],
        )
        inside = new[..., 1] > new.max() / 2 if new.max() else np.zeros(new.shape[:2], bool)
        outcomes.add(bool(kept[0]))
        assert len(boxes) == kept.sum()
        if not kept[0]:
            assert not inside.any()
            continue
        x1, y1, x2, y2 = boxes[0]
        assert 0 <= x1 < x2 <= new.shape[1]
        assert 0 <= y1 < y2 <= new.shape[0]
        if not inside.any():
            assert min(x2 - x1, y2 - y1) < 1  # less than a pixel
            continue
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        seen = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        np.testing.assert_allclose(boxes[0], seen, rtol=0, atol=1)
    assert outcomes == ({True, False} if name in ("crop", "all") else {True})


def test_boxes_stay_valid_in_hard_cases(rng):
    """Slivers, boxes on the border and none at all: finite, inside, not empty, in order."""
    augmentation = DetectionAugmentation(crop=0.7)
    preprocessing = detr(32, 53, 4)
    for _ in range(300):
        height, width = (int(n) for n in rng.integers(1, 60, 2))
        boxes = random_boxes(rng, int(rng.integers(0, 6)), height, width)
        boxes = np.concatenate([boxes, [[0, 0, 1e-9, height], [0, 0, width, height]]])
        new, moved, kept = detection_train_transform(
            np.zeros((height, width, 3), np.uint8),
            boxes,
            rng,
            preprocessing=preprocessing,
            augmentation=augmentation,
            short=32,
            canvas=(32, 64),
        )
        assert len(moved) == kept.sum() >= 1
        shares = to_cxcywh_01(moved, new.shape[:2])
        assert np.isfinite(shares).all()
        assert (moved[:, 2:] > moved[:, :2]).all()
        assert moved.min() >= 0
        assert (moved[:, 2:] <= new.shape[1::-1]).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_are_mirrored(channels, rng):
    image = rng.integers(0, 256, (7, 9, channels), np.uint8)
    for view in (image, image[1:5, 2:7]):
        assert np.array_equal(flip_image(view), view[:, ::-1])


def test_evaluation_only_resizes(rng):
    image = rng.integers(0, 256, (48, 64, 3), np.uint8)
    boxes = np.array([[1.0, 2.0, 33.0, 26.0]])
    new, moved = detection_eval_transform(image, boxes, detr(96, 160), (96, 160))
    assert new.shape == (96, 128, 3)
    assert moved.tolist() == [[2, 4, 66, 52]]
    shrunk, moved = detection_eval_transform(image, boxes, detr(96, 160), (96, 64))
    assert shrunk.shape == (48, 64, 3)
    assert np.array_equal(shrunk, image)
    assert moved.tolist() == boxes.tolist()
    grey = detection_eval_transform(image[..., :1], boxes, detr(96, 160), (96, 160))[0]
    assert grey.shape == (96, 128, 3)


# --- random draws -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(480, 640), (900, 700), (50, 300)])
def test_windows_are_drawn_as_detr_draws_them(size, rng):
    """Means and deviations against DETR's recipe in whole pixels of the resized image."""
    count = 4000
    ours = np.array([random_window(size, rng, DetectionAugmentation(), 800) for _ in range(count)])
    assert (ours[:, 0] + ours[:, 2] <= size[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= size[1]).all()
    assert ours.min() >= 0
    theirs = []
    for _ in range(count):
        short = rng.choice([400, 500, 600])
        scale = short / min(size)
        height, width = (int(side * scale) for side in size)
        w = rng.integers(384, min(width, 600) + 1)
        h = rng.integers(384, min(height, 600) + 1)
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        theirs.append(np.array([top, left, h, w]) / scale)
    theirs = np.array(theirs)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * error + 0.5).all()
    assert (np.abs(ours.std(0) / theirs.std(0) - 1) < 6 / math.sqrt(count) + 0.01).all()


def test_draws_follow_the_generator(rng):
    image = rng.integers(0, 256, (60, 80, 3), np.uint8)
    arguments = {
        "preprocessing": detr(32, 53),
        "augmentation": AUGMENTATIONS["all"],
        "short": 30,
        "canvas": (32, 64),
    }
    boxes = random_boxes(rng, 4, 60, 80)
    seeds = [np.random.default_rng(seed) for seed in (1, 1, 2)]
    one, same, other = (detection_train_transform(image, boxes, g, **arguments) for g in seeds)
    for a, b in zip(one, same, strict=True):
        assert np.array_equal(a, b)
    assert one[0].shape != other[0].shape or (one[0] != other[0]).any()
    # Boxes draw nothing: the same image without them.
    bare = detection_train_transform(image, boxes[:0], np.random.default_rng(1), **arguments)
    assert np.array_equal(bare[0], one[0])


class Fixed:
    """A generator that draws what it is told to."""

    def __init__(self, *values):
        self.values = np.array(values)

    def uniform(self, low, high, count):
        assert (low, high, count) == (-1, 1, 3)
        return self.values


@pytest.mark.parametrize("draws", list(itertools.product([-1.0, 0.0, 0.7], repeat=3)))
def test_color_jitter(draws, rng):
    """Against the definition in float64: brightness, contrast about the mean luma, saturation."""
    image = rng.integers(0, 256, (40, 50, 3), np.uint8)
    augmentation = DetectionAugmentation(brightness=0.4, contrast=0.5, saturation=0.6)
    brightness, contrast, saturation = 1 + np.array([0.4, 0.5, 0.6]) * draws
    luma = image @ np.array([0.299, 0.587, 0.114])
    exact = saturation * image + (1 - saturation) * luma[..., None]
    exact = brightness * (luma.mean() + contrast * (exact - luma.mean()))
    ours = color_jitter(image, Fixed(*draws), augmentation).astype(float)
    assert np.abs(ours - np.clip(exact, 0, 255)).max() <= 0.5 + 1e-3
    nothing = DetectionAugmentation()
    assert color_jitter(image, Fixed(*draws), nothing) is image


def test_color_jitter_draws_within_its_limits(rng):
    image = np.full((2, 2, 3), 100, np.uint8)
    augmentation = DetectionAugmentation(brightness=0.3)
    values = [color_jitter(image, rng, augmentation)[0, 0, 0] for _ in range(300)]
    assert 70 <= min(values) < 75
    assert 125 < max(values) <= 130


def test_flips_and_crops_come_as_often_as_asked(monkeypatch, rng):
    image = np.zeros((30, 30, 3), np.uint8)
    image[:, :15] = 255
    windows = []
    real = detection_transforms.random_window
    monkeypatch.setattr(
        detection_transforms, "random_window", lambda *a: windows.append(1) or real(*a)
    )
    flipped = 0
    for _ in range(400):
        new, _, _ = detection_train_transform(
            image,
            np.zeros((0, 4)),
            rng,
            preprocessing=detr(32, 53),
            augmentation=DetectionAugmentation(crop=0.25),
            short=32,
            canvas=(32, 64),
        )
        flipped += int(new[0, -1, 0]) > int(new[0, 0, 0])
    assert 65 <= len(windows) <= 135  # 100 ± 4 deviations
    assert 120 <= flipped <= 240  # half of 400, but some windows show one color only


@pytest.mark.parametrize("height", [1, STRIP - 1, STRIP, STRIP + 1, 2 * STRIP + 1])
def test_resizing_without_antialiasing_is_the_same_for_any_number_of_strips(height, rng):
    """Within half a level of its formula in float64, and of rounding."""
    image = rng.integers(0, 256, (*rng.integers(1, 90, 2), 3), np.uint8)
    size = height, int(rng.integers(1, 70))
    rows, columns = map(bilinear_weights, image.shape[:2], size)
    want = np.einsum("Hh,hwc,Ww->HWc", rows, image.astype(np.float64), columns)
    got = resize_image(image, size, "bilinear_aliased")
    assert got.dtype == np.uint8
    assert np.abs(got - want).max() <= 0.5 + 1e-4
