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


def test_the_published_presets_are_read():
    names = torchvision.models.list_models(torchvision.models.segmentation)
    for name in (name for name in names if name.startswith("deeplabv3_resnet")):
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        found = torchvision_preprocessing(preset)
        assert (found["view"], found["image_size"]) == ("short", (520, 520))
