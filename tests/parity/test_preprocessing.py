"""Evaluation transforms against timm's, torchvision's and transformers' own, to the byte."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms
from transformers import ViTImageProcessorPil

from vision_jax.data.transforms import Preprocessing, eval_transform, random_resized_crop

rng = np.random.default_rng()
SIZES = [(500, 375), (375, 500), (33, 77), (224, 224), (225, 223), (31, 30), (10, 300), (301, 11)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_image(height: int, width: int) -> np.ndarray:
    """Random, but smooth enough for the resampling filters to disagree in a visible manner."""
    coarse = rng.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))


def assert_equal_to_timm(image, preprocessing):
    transform = create_transform(
        (3, *preprocessing.image_size),
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        normalize=False,
    )
    expected = transform(Image.fromarray(image)).numpy().transpose(1, 2, 0)
    assert expected.dtype == np.uint8
    assert np.array_equal(eval_transform(image, preprocessing), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("image_size", [(224, 224), (97, 97), (64, 48)])
def test_timm(size, crop_mode, crop_pct, image_size):
    for interpolation in ("bicubic", "bilinear"):
        preprocessing = Preprocessing(image_size, MEAN, STD, crop_pct, interpolation, crop_mode)
        assert_equal_to_timm(random_image(*size), preprocessing)


def test_timm_on_random_sizes():
    for _ in range(150):
        height, width = rng.integers(20, 400, 2)
        preprocessing = Preprocessing(
            tuple(int(n) for n in rng.integers(16, 130, 2)),
            MEAN,
            STD,
            float(rng.uniform(0.5, 1)),
            str(rng.choice(["bicubic", "bilinear", "lanczos", "nearest"])),
            str(rng.choice(["center", "squash", "border"])),
        )
        assert_equal_to_timm(random_image(height, width), preprocessing)


@pytest.mark.parametrize("size", SIZES)
def test_torchvision(size):
    """The preset of torchvision's ViT-B/16 weights: resize 256, crop 224, bilinear."""
    image = random_image(*size)
    bilinear = transforms.InterpolationMode.BILINEAR
    twin = transforms.Compose(
        [transforms.Resize(256, bilinear), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    preprocessing = Preprocessing((224, 224), MEAN, STD, 224 / 256, "bilinear", "center")
    expected = twin(Image.fromarray(image)).numpy().transpose(1, 2, 0)
    assert np.array_equal(eval_transform(image, preprocessing), expected)


@pytest.mark.parametrize("size", SIZES)
def test_transformers(size):
    """ViTImageProcessor's plain resize to (height, width)."""
    image = random_image(*size)
    processor = ViTImageProcessorPil(
        size={"height": 96, "width": 80}, resample=2, do_rescale=False, do_normalize=False
    )
    pixels = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    preprocessing = Preprocessing((96, 80), MEAN, STD, 1.0, "bilinear", "squash")
    assert np.array_equal(eval_transform(image, preprocessing), pixels.transpose(1, 2, 0))


def test_random_resized_crop_draws_windows_as_torchvision_does():
    """Other random numbers, so distributions are compared: means and deviations of the windows."""
    height, width, count = 90, 130, 4000
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    ours, theirs = [], []
    for _ in range(count):
        out = random_resized_crop(image, rng, (64, 64), scale, ratio, "nearest").astype(int)
        (top, left), (bottom, right) = out[0, 0, :2], out[-1, -1, :2]
        ours.append((top, left, bottom - top, right - left))
        top, left, h, w = transforms.RandomResizedCrop.get_params(
            torch.empty(3, height, width), scale, ratio
        )
        # The corner pixels of a nearest-neighbour resize stand at half a step into the window.
        in_h, in_w = int(h / 128), int(w / 128)
        last_h, last_w = int(h - h / 128), int(w - w / 128)
        theirs.append((top + in_h, left + in_w, last_h - in_h, last_w - in_w))
    ours, theirs = np.array(ours, float), np.array(theirs, float)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * error + 0.05).all()
    assert (np.abs(ours.std(0) / theirs.std(0) - 1) < 5 / math.sqrt(count)).all()
