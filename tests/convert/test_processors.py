"""transformers' image processors: what is read of their files, what is refused, and the way back.

tests/parity/test_preprocessing.py compares every class with transformers itself.
"""

import math

import pytest

from vision_jax.convert.processors import (
    PROCESSORS,
    crop_share,
    processor_config,
    read_processor,
)
from vision_jax.errors import UserError


def read(kind, config=None, **fields):
    return read_processor({"image_processor_type": kind} | fields, config or {})


READ = [
    ("CLIPImageProcessor", {}, {"image_size": (224, 224), "crop_pct": 1.0, "crop_mode": "center"}),
    ("CLIPImageProcessorFast", {"size": 256}, {"crop_pct": 0.875, "interpolation": "bicubic"}),
    ("ViTImageProcessor", {"size": 32}, {"image_size": (32, 32), "crop_mode": "squash"}),
    ("ViTImageProcessorPil", {"size": {"height": 384, "width": 256}}, {"image_size": (384, 256)}),
    ("DeiTImageProcessor", {"size": 256, "crop_size": 224}, {"crop_mode": "squash"}),
    ("ConvNextImageProcessor", {"size": 224}, {"crop_pct": 0.875, "crop_mode": "center"}),
    ("ConvNextImageProcessor", {"size": 384}, {"crop_pct": 1.0, "crop_mode": "squash"}),
    ("ConvNextImageProcessor", {"size": 100, "crop_pct": 1.25}, {"crop_pct": 1.25}),
    ("BitImageProcessor", {"size": {"shortest_edge": 192}}, {"crop_pct": 224 / 192}),
    ("ViTImageProcessor", {"do_rescale": False, "image_std": 127.5}, {"std": (0.5,) * 3}),
    ("ViTImageProcessor", {"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
    ("ViTImageProcessor", {"rescale_factor": 1 / 127.5, "image_mean": 1}, {"mean": (0.5,) * 3}),
    ("EfficientNetImageProcessor", {}, {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
    ("EfficientNetImageProcessor", {"include_top": False}, {"std": (0.5,) * 3}),
    ("DetrImageProcessor", {}, {"short": 800, "longest": 1333, "square": False}),
    ("DetrImageProcessorFast", {"size": 480, "max_size": 640}, {"short": 480, "longest": 640}),
    ("DetrImageProcessor", {"size": 480}, {"short": 480, "longest": 1333}),
    ("DetrImageProcessor", {"size": [96, 96]}, {"short": 96, "longest": 96, "square": True}),
    ("DetrImageProcessor", {"size": [96, 96]}, {"interpolation": "bilinear"}),
    ("RfDetrImageProcessorFast", {"size": [96, 96]}, {"interpolation": "bilinear_aliased"}),
]


@pytest.mark.parametrize(("kind", "fields", "expected"), READ)
def test_read(kind, fields, expected):
    found = read(kind, **fields)
    assert {key: found[key] for key in expected} == expected


def test_the_class_is_that_of_autoimageprocessor():
    """Of an older file, of config.json, or by the model's type; DeiT's alone squashes and cuts."""
    for file, config in [
        ({"feature_extractor_type": "DeiTFeatureExtractor"}, {"model_type": "clip"}),
        ({}, {"image_processor_type": "DeiTImageProcessor", "model_type": "clip"}),
        ({}, {"model_type": "deit"}),
        ({"image_processor_type": "ViTFeatureExtractor"}, {"model_type": "deit"}),
    ]:
        found = read_processor(file, config)
        assert (found["image_size"], found["crop_pct"], found["crop_mode"]) == (
            (224, 224), 0.875, "squash",
        )  # fmt: skip


def test_numbers_of_channels():
    one = read("ViTImageProcessor", {"num_channels": 1}, image_mean=[0.5], image_std=0.25)
    assert (one["mean"], one["std"]) == ((0.5,), (0.25,))
    inner = {"vision_config": {"num_channels": 5}}
    five = read("CLIPImageProcessor", inner, image_mean=[0.1, 0.2, 0.3, 0.4, 0.5], image_std=0.5)
    assert (five["mean"], five["std"]) == ((0.1, 0.2, 0.3, 0.4, 0.5), (0.5,) * 5)


REFUSED = [
    ("LevitImageProcessor", {}, "image_processor_type 'LevitImageProcessor' is none that is read"),
    (None, {}, "it names no image_processor_type"),
    ("CLIPImageProcessor", {"do_resize": False}, "do_resize False .*always resized"),
    ("CLIPImageProcessor", {"do_center_crop": False}, "size .*without do_center_crop"),
    ("SiglipImageProcessor", {"size": 224}, "size 224 .*without do_center_crop"),
    ("CLIPImageProcessor", {"crop_size": {"height": 224, "width": 192}}, "crop_size .*squares"),
    ("CLIPImageProcessor", {"crop_size": {"shortest_edge": 224}}, "crop_size .*height and width"),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 9, "longest_edge": 20}}, "size {'shortest"),
    ("CLIPImageProcessor", {"size": {"longest_edge": 20}}, "size .*use height and width"),
    ("CLIPImageProcessor", {"use_square_size": True}, "use_square_size True"),
    ("DeiTImageProcessor", {"size": [100, 120], "crop_size": [90, 100]}, "crop_size .*same share"),
    ("ViTImageProcessor", {"do_center_crop": True}, "crop_size None .*whole numbers"),
    ("ViTImageProcessor", {"do_pad": True, "pad_size": 256}, "pad_size 256 .*not padded"),
    ("ViTImageProcessor", {"size": 2.5}, "size 2.5 .*whole numbers"),
    ("ViTImageProcessor", {"size": True}, "size True"),
    ("ViTImageProcessor", {"size": {"height": 0, "width": 9}}, "size .*whole numbers"),
    ("ViTImageProcessor", {"size": None}, "size None"),
    ("ViTImageProcessor", {"size": [1] * 1000}, r"size \[1, 1, .*\.\.\. \(ViT"),
    ("ViTImageProcessor", {"resample": None}, "resample None .*0 to 5"),
    ("ViTImageProcessor", {"resample": "bicubic"}, "resample 'bicubic'"),
    ("ViTImageProcessor", {"resample": [3]}, r"resample \[3\]"),
    ("ViTImageProcessor", {"rescale_factor": None}, "rescale_factor None .*no number"),
    ("ViTImageProcessor", {"rescale_factor": 0}, "rescale_factor 0 .*positive"),
    ("ViTImageProcessor", {"image_mean": [0.5, 0.5]}, "image_mean .*one or 3 numbers"),
    ("ViTImageProcessor", {"image_mean": ["x"]}, "image_mean .*no numbers"),
    ("ViTImageProcessor", {"image_std": None}, "image_std None"),
    ("ConvNextImageProcessor", {"size": [224, 224]}, "size .*shortest_edge for this class"),
    ("ConvNextImageProcessor", {"size": 224, "crop_pct": None}, "crop_pct None"),
    ("ConvNextImageProcessor", {"size": 224, "crop_pct": 300}, "crop_pct 300"),
    (
        "ConvNextImageProcessor",
        {"size": 224, "do_center_crop": True, "crop_size": 200},
        "crop_size 200 .*a second crop",
    ),
    ("DetrImageProcessor", {"do_resize": False}, "do_resize False"),
    ("DetrImageProcessor", {"size": {"shortest_edge": 800}}, "size .*and longest_edge"),
    ("DetrImageProcessor", {"size": [480, 640]}, "size .*only squares"),
    ("DetrImageProcessor", {"size": 480, "max_size": "x"}, "max_size 'x'"),
    ("RfDetrImageProcessor", {}, "size .*write height and width"),
    ("RfDetrImageProcessor", {"size": [96, 96], "resample": 3}, "resample 3 .*antialiasing"),
]


@pytest.mark.parametrize(("kind", "fields", "match"), REFUSED)
def test_refused(kind, fields, match):
    """One line that names the file and the field, and nothing computed otherwise in silence."""
    with pytest.raises(UserError, match=f"^preprocessor_config.json: {match}") as caught:
        read(kind, **fields)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_crop_shares_give_the_size_back():
    for crop in range(1, 120):
        for resized in range(1, 160):
            share = crop_share(crop, resized)
            assert math.floor(crop / share) == resized


@pytest.mark.parametrize("kind", sorted(PROCESSORS))
@pytest.mark.parametrize("fields", [{}, {"image_mean": [0.1, 0.2, 0.3], "resample": 2}])
def test_the_way_back_is_read_the_same(kind, fields):
    size = {"size": [96, 96]} if kind == "RfDetrImageProcessor" else {}
    found = read(kind, **fields, **size)
    again = read_processor(processor_config(found), {})
    assert again == found


def test_the_way_back_of_one_channel_makes_no_colors():
    one = read("CLIPImageProcessor", {"num_channels": 1}, image_mean=[0.5], image_std=[0.5])
    assert processor_config(one)["do_convert_rgb"] is False
    assert processor_config(read("CLIPImageProcessor"))["do_convert_rgb"] is True
