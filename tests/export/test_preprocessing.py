"""Preprocessing in the graph against the host's transforms, which the libraries' own pin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.data.detection_transforms import (
    DetectionPreprocessing,
    choose_bucket,
    detection_eval_transform,
    resized_size,
)
from vision_jax.data.segmentation_transforms import (
    SegmentationPreprocessing,
    segmentation_eval_transform,
)
from vision_jax.data.transforms import INTERPOLATIONS, Preprocessing, eval_transform
from vision_jax.export import preprocessing
from vision_jax.export.preprocessing import make_view

NORM = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2)}


def draw(rng, size):
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def levels(view):
    return np.rint(np.asarray(view.images[0]) * 255).astype(np.int64)


def exported(own):
    """The view of one image of any size, by a graph that doesn't know it."""
    shape = jax.export.symbolic_shape("1, h, w, 3")
    made = jax.export.export(jax.jit(lambda images: tuple(make_view(images, own))))(
        jax.ShapeDtypeStruct(shape, jnp.uint8)
    )
    return lambda image: np.rint(np.asarray(made.call(image[None])[0][0]) * 255).astype(np.int64)


CLASSIFIERS = [
    ((20, 20), 0.875, "center", "torchvision"),
    ((21, 21), 0.9, "center", "transformers"),
    ((24, 15), 0.875, "center", "torchvision"),
    ((18, 23), 1.0, "squash", "torchvision"),
    ((17, 17), 1.25, "center", "transformers"),
    ((16, 16), 1.25, "center", "torchvision"),
    ((16, 20), 0.95, "border", "torchvision"),
]


@pytest.mark.long(but=(str(CLASSIFIERS[1]),))
@pytest.mark.parametrize("case", CLASSIFIERS, ids=str)
def test_a_classifiers_view_is_equal_to_the_byte(case, rng):
    size, crop_pct, mode, rule = case
    own = Preprocessing(
        size, **NORM, crop_pct=crop_pct, interpolation="bicubic", crop_mode=mode, crop_rule=rule
    )
    of_any = exported(own)
    for _ in range(4):
        image = draw(rng, rng.integers(3, 90, 2))
        want = eval_transform(image, own).astype(np.int64)
        np.testing.assert_array_equal(levels(make_view(jnp.asarray(image[None]), own)), want)
        np.testing.assert_array_equal(of_any(image), want)


@pytest.mark.long
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_filters(interpolation, rng):
    own = Preprocessing(
        (19, 26), **NORM, crop_pct=1.0, interpolation=interpolation, crop_mode="squash"
    )
    of_any = exported(own)
    for _ in range(3):
        image = draw(rng, rng.integers(2, 120, 2))
        want = eval_transform(image, own).astype(np.int64)
        fixed = levels(make_view(jnp.asarray(image[None]), own))
        for found in (fixed, of_any(image)):
            apart = np.abs(found - want)
            if interpolation == "nearest" and found is not fixed:  # steps are not added up there
                assert (apart > 0).mean() < 0.15
            else:  # sines of two libraries differ in their last bits
                assert apart.max() <= (interpolation in ("lanczos", "hamming"))


PLAIN = {"short": 30, "longest": 45, "square": False, "interpolation": "bilinear"}
DETECTORS = {
    "detr": {**PLAIN, "buckets": ((32, 48), (48, 32))},
    "square": {**PLAIN, "short": 32, "square": True, "interpolation": "bilinear_aliased",
               "buckets": ((32, 32),)},
    "letterbox": {**PLAIN, "short": 32, "buckets": ((32, 32),), "rule": "letterbox"},
    "torchvision": {**PLAIN, "interpolation": "bilinear_aliased", "buckets": ((64, 64),),
                    "rule": "torchvision"},
    "too small a canvas": {**PLAIN, "longest": 60, "buckets": ((32, 40),)},
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detectors_view(name, rng):
    own = DetectionPreprocessing(**DETECTORS[name], **NORM)
    whole = tuple(max(bucket[axis] for bucket in own.buckets) for axis in (0, 1))
    of_any = exported(own)
    for _ in range(4):
        image = draw(rng, rng.integers(8, 130, 2))
        size = image.shape[:2]
        view = make_view(jnp.asarray(image[None]), own)
        bucket = own.buckets[choose_bucket(resized_size(size, own), own.buckets)]
        for canvas, found in ((bucket, levels(view)), (whole, of_any(image))):
            seen = detection_eval_transform(image, np.zeros((0, 4)), own, canvas)[0]
            want = np.zeros((*canvas, 3), np.int64)
            want[: seen.shape[0], : seen.shape[1]] = seen
            np.testing.assert_array_equal(found, want)
            if canvas == bucket:
                assert view.inside.sum() == seen.shape[0] * seen.shape[1]


@pytest.mark.long
@pytest.mark.parametrize("view", ["squash", "short", "original", "pad"])
def test_a_segmenters_view(view, rng):
    own = SegmentationPreprocessing((24, 24) if view == "pad" else (20, 24), **NORM, view=view)
    for _ in range(3):
        image = draw(rng, rng.integers(8, 70, 2))
        want = segmentation_eval_transform(image, own).astype(np.int64)
        np.testing.assert_array_equal(levels(make_view(jnp.asarray(image[None]), own)), want)


def test_a_batch_of_several_sizes_is_its_images(rng):
    own = Preprocessing((16, 16), **NORM, crop_pct=0.9, interpolation="bicubic", crop_mode="center")
    images = [draw(rng, size) for size in ((20, 33), (40, 17), (40, 40))]
    canvas = np.full((3, 40, 40, 3), 77, np.uint8)
    for place, image in zip(canvas, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    sizes = jnp.array([image.shape[:2] for image in images], jnp.int32)
    found = jax.jit(lambda x, s: make_view(x, own, s).images)(canvas, sizes)
    for one, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(np.rint(one * 255), eval_transform(image, own))


@pytest.mark.long
@pytest.mark.parametrize("name", DETECTORS)
def test_sizes_of_many_images(name, rng):
    """Where a float falls short of a whole number, too."""
    own = DetectionPreprocessing(**DETECTORS[name], **NORM)
    sizes = rng.integers(1, 2000, (20000, 2))
    height, width = sizes.T.astype(np.float64)
    found = preprocessing._detector_size(own, (height, width), np)
    want = np.array([resized_size((int(h), int(w)), own) for h, w in sizes])
    for ours, theirs in zip(found, want.T, strict=True):
        np.testing.assert_array_equal(ours, theirs)
