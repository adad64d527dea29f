"""Evaluation's views of segmenters against transformers' processor and torchvision's preset."""

import numpy as np
import pytest
import torchvision
import transformers
from PIL import Image
from torchvision.transforms._presets import SemanticSegmentation

from vision_jax.convert.package import _torchvision_transform
from vision_jax.convert.processors import processor_config
from vision_jax.convert.read import read_preprocessing, torchvision_preprocessing
from vision_jax.data.segmentation_transforms import (
    SegmentationPreprocessing,
    segmentation_eval_transform,
)
from vision_jax.errors import UserError
from vision_jax.tasks.segmentation.windows import spread

SIZES = ((97, 150), (233, 199), (64, 64), (301, 417))
VIEWS = [("squash", (64, 80)), ("short", (64, 64)), ("original", (9, 9))]


def record_of(view, size):
    return {
        "image_size": size,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.25),
        "interpolation": "bilinear",
        "view": view,
    }


def seen(image, record):
    view = segmentation_eval_transform(image, SegmentationPreprocessing(**record)) / 255
    return (view - np.asarray(record["mean"])) / np.asarray(record["std"])


@pytest.mark.parametrize(("view", "size"), VIEWS)
def test_transformers_processor(rng, view, size):
    """Written by us, read again, and equal on images of any size."""
    record = record_of(view, size)
    file = processor_config(record)
    found = read_preprocessing({"preprocessor": file})
    wanted = record if view != "original" else {**record, "image_size": None}
    assert {name: found[name] for name in record} == wanted
    processor = transformers.SegformerImageProcessorPil(**file)
    for height, width in SIZES:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        theirs = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(seen(image, record), theirs.transpose(1, 2, 0), atol=1e-5)


@pytest.mark.parametrize("short", [64, None])
def test_torchvisions_preset(rng, short):
    record = record_of("short" if short else "original", (short or 9,) * 2)
    written = _torchvision_transform(record)
    preset = SemanticSegmentation(
        **{**written, "interpolation": torchvision.transforms.InterpolationMode.BILINEAR}
    )
    for height, width in SIZES:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        theirs = preset(Image.fromarray(image)).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(seen(image, record), theirs, atol=1e-5)
    found = read_preprocessing({"config": {"library": "torchvision"}, "preprocessor": written})
    assert found["view"] == record["view"]
    assert found["image_size"] == (record["image_size"] if short else None)


EOMT = {"image_processor_type": "EomtImageProcessorFast", "image_mean": [0.4, 0.5, 0.6]}
SPLIT = {"do_split_image": True, "size": {"shortest_edge": 32, "longest_edge": None}}


@pytest.mark.parametrize(
    ("fields", "view", "size"),
    [
        ({}, "squash", (640, 640)),
        ({"size": {"shortest_edge": 32, "longest_edge": 32}, "do_pad": True}, "pad", (32, 32)),
        ({"size": {"shortest_edge": 32, "longest_edge": 32}}, "squash", (32, 32)),
        ({"size": {"shortest_edge": 32, "longest_edge": 48}, "do_pad": True}, "squash", (32, 48)),
        ({"size": {"height": 24, "width": 40}}, "squash", (24, 40)),
        ({"size": 32}, "squash", (32, 32)),
        ({**SPLIT, "size": 32}, "windows", (32, 32)),
        ({**SPLIT, "resample": 3, "do_rescale": False}, "windows", (32, 32)),
        ({"do_split_image": True}, "squash", (640, 640)),  # no side is longer than a window
    ],
)
def test_eomts_processor(rng, fields, view, size):
    """Images of whose kind the view is: any for squashes and windows, squares where one pads."""
    file = EOMT | fields
    found = read_preprocessing({"preprocessor": file})
    assert (found["view"], found["image_size"]) == (view, size)
    record = {name: found[name] for name in record_of(view, size)}
    processor = transformers.EomtImageProcessorPil.from_dict(dict(file))
    squares = "height" not in processor.size and view == "squash"
    for height, width in [(64, 64), (41, 41)] if squares else SIZES:
        if size[0] != size[1] and squares:
            continue  # padded: another image
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        theirs = processor(Image.fromarray(image), return_tensors="np")
        short = record | {"view": "short"} if view == "windows" else record
        ours = seen(image, short)
        windows = [ours]
        if view == "windows":
            starts = spread(max(ours.shape[:2]), 32)
            windows = [ours[a : a + 32] if height > width else ours[:, a : a + 32] for a in starts]
            assert [o[1] for o in theirs["patch_offsets"][0:]] == starts
        for our, their in zip(windows, theirs["pixel_values"], strict=True):
            np.testing.assert_allclose(our, their.transpose(1, 2, 0), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("view", ["windows", "pad"])
def test_eomts_processor_is_written_and_read_again(view):
    record = record_of(view, (64, 64))
    file = processor_config(record)
    found = read_preprocessing({"preprocessor": file})
    assert {name: found[name] for name in record} == record
    theirs = transformers.EomtImageProcessorPil.from_dict(dict(file))
    assert (theirs.do_split_image, theirs.do_pad) == (view == "windows", view == "pad")
    with pytest.raises(UserError, match=r"data\.view=short"):
        _torchvision_transform(record)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"do_resize": False}, "do_resize False"),
        ({"size": {"longest_edge": 32}}, "size {'longest_edge': 32}"),
        ({"size": {"height": 32, "width": 32}, "do_split_image": True}, "size {'height': 32"),
    ],
)
def test_eomts_processor_without_an_equal_is_refused(fields, named):
    with pytest.raises(UserError, match=named):
        read_preprocessing({"preprocessor": EOMT | fields})


def test_the_published_presets_are_read():
    names = torchvision.models.list_models(torchvision.models.segmentation)
    for name in (name for name in names if name.startswith("deeplabv3_resnet")):
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        found = torchvision_preprocessing(preset)
        assert (found["view"], found["image_size"]) == ("short", (520, 520))
