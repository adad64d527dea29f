"""Evaluation transforms against timm's, torchvision's and transformers' own, bit-identical."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from timm.data import create_transform
from torchvision import transforms
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from vision_jax.convert.processors import DEFAULTS, OF_MODEL_TYPE, PROCESSORS
from vision_jax.convert.read import read_preprocessing
from vision_jax.data.detection_transforms import DetectionPreprocessing, detection_eval_transform
from vision_jax.data.segmentation_transforms import (
    SegmentationPreprocessing,
    segmentation_eval_transform,
)
from vision_jax.data.transforms import Preprocessing, eval_transform, random_resized_crop
from vision_jax.errors import UserError

transformers.utils.logging.set_verbosity_error()

SIZES = [(500, 375), (375, 500), (33, 77), (224, 224), (225, 223), (31, 30), (10, 300), (301, 11)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
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
def test_timm(size, crop_mode, crop_pct, image_size, rng):
    for interpolation in ("bicubic", "bilinear"):
        preprocessing = Preprocessing(image_size, MEAN, STD, crop_pct, interpolation, crop_mode)
        assert_equal_to_timm(random_image(rng, *size), preprocessing)


def test_timm_on_random_sizes(rng):
    for _ in range(150):
        height, width = rng.integers(20, 400, 2)
        preprocessing = Preprocessing(
            tuple(int(n) for n in rng.integers(16, 130, 2)),
            MEAN,
            STD,
            float(rng.uniform(0.5, 1.5)),
            str(rng.choice(["bicubic", "bilinear", "lanczos", "nearest"])),
            str(rng.choice(["center", "squash", "border"])),
        )
        assert_equal_to_timm(random_image(rng, height, width), preprocessing)


@pytest.mark.parametrize("size", SIZES)
def test_torchvision(size, rng):
    """The preset of torchvision's ViT-B/16 weights: resize 256, crop 224, bilinear."""
    image = random_image(rng, *size)
    bilinear = transforms.InterpolationMode.BILINEAR
    reference = transforms.Compose(
        [transforms.Resize(256, bilinear), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    preprocessing = Preprocessing((224, 224), MEAN, STD, 224 / 256, "bilinear", "center")
    expected = reference(Image.fromarray(image)).numpy().transpose(1, 2, 0)
    assert np.array_equal(eval_transform(image, preprocessing), expected)


# transformers -------------------------------------------------------------------------------------

CROP = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
GEOMETRY = {
    "defaults": {},
    "number": {"size": 32},
    "number, cut": {"size": 37, "do_center_crop": True, "crop_size": 32},
    "number, square": {"size": 32, "default_to_square": True},
    "number, short": {"size": 37, "default_to_square": False} | CROP,
    "two numbers": {"size": [36, 28], "do_center_crop": False},
    "short": {"size": {"shortest_edge": 32}},
    "short, cut": {"size": {"shortest_edge": 37}} | CROP,
    "short, cut to its own": {"size": {"shortest_edge": 32}} | CROP,
    "short, framed": {"size": {"shortest_edge": 27}} | CROP,
    "short, not cut": {"size": {"shortest_edge": 32}, "do_center_crop": False},
    "height and width": {"size": {"height": 36, "width": 28}},
    "height and width, cut": {"size": {"height": 41, "width": 41}} | CROP,
    "height and width, framed": {"size": {"height": 27, "width": 27}} | CROP,
    "cut, without a size of the crop": {"size": [40, 40], "do_center_crop": True},
    "cut, null": {"size": [40, 40], "do_center_crop": True, "crop_size": None},
    "cut, by a short side": CROP | {"size": [40, 40], "crop_size": {"shortest_edge": 32}},
    "height alone": {"size": {"height": 32}},
    "long side alone": {"size": {"longest_edge": 48}},
    "ConvNeXt's share": {"size": {"shortest_edge": 33}, "crop_pct": 0.7},
    "ConvNeXt's share over 1": {"size": {"shortest_edge": 33}, "crop_pct": 1.2},
    "ConvNeXt's share null": {"size": {"shortest_edge": 33}, "crop_pct": None},
    "just cut by ConvNeXt": {"size": {"shortest_edge": 383}},
    "warped by ConvNeXt": {"size": 384},
    "not resized, not cut": {"do_resize": False, "do_center_crop": False},
    "null": {"do_resize": None, "do_center_crop": False},
    "a filter that is none": {"size": [32, 32], "resample": 9, "do_center_crop": False},
    **{
        f"resample {number}": {"size": 33, "resample": number, "default_to_square": False}
        | CROP
        | {"crop_size": 33}
        for number in range(6)
    },
}
PIXELS = {
    "not rescaled": {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": 60.0},
    "not rescaled, null": {"do_rescale": None},
    "1/127.5": {"rescale_factor": 1 / 127.5},
    "factor null": {"rescale_factor": None},
    "factor null, not used": {"rescale_factor": None, "do_rescale": False},
    "not normalized": {"do_normalize": False},
    "not normalized, null": {"do_normalize": None, "image_mean": None},
    "bytes": {"do_normalize": False, "do_rescale": False},
    "one number": {"image_mean": 0.4, "image_std": 0.3},
    "mean null": {"image_mean": None},
    "two numbers": {"image_mean": [0.4, 0.3]},
    "offset": {"rescale_offset": True},
    "offset, 1/127.5": {"rescale_offset": True, "rescale_factor": 1 / 127.5},
    "offset, not rescaled": {"rescale_offset": True, "do_rescale": False},
    "once": {"include_top": False},
    "of EfficientNet alone": {"include_top": True, "do_normalize": False},
    "padded": {"do_pad": True},
    "padded to its size": {"do_pad": True, "pad_size": 32},
    "colors": {"do_convert_rgb": True},
}
# What the class would do, and what Preprocessing has no place for.
NOT_READ = {
    "not resized": {"do_resize": False} | CROP,
    "padded": {"size": [32, 32], "do_center_crop": False, "do_pad": True, "pad_size": 40},
    "not a square": {"size": {"shortest_edge": 37}} | CROP | {"crop_size": [32, 24]},
    "other shares": {"size": [40, 20]} | CROP | {"crop_size": [30, 19]},
    "a long side": {"size": {"shortest_edge": 32, "longest_edge": 40}} | CROP,
}
# EoMT's has tests of its own: it keeps the aspect ratio where images are squashed here.
KINDS = sorted(kind for kind in PROCESSORS if "Detr" not in kind and "Eomt" not in kind)
PHOTOS = [(47, 61), (53, 40), (31, 90), (33, 30), (200, 151), (33, 36), (36, 33)]


def theirs(processor, image):
    """f64[h, w, 3], normalized."""
    pixels = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    return pixels[0].transpose(1, 2, 0).astype(np.float64)


def fields_of(kind, name):
    if name in GEOMETRY:
        return GEOMETRY[name]
    size = {"shortest_edge": 32} if "ConvNext" in kind else {"height": 32, "width": 32}
    return {"size": size, "do_center_crop": False} | PIXELS[name]


def ours_in_bytes(read, image, expected):
    """(our view, what theirs was before it was normalized)."""
    before = 255 * (expected * np.array(read["std"]) + np.array(read["mean"]))
    if "view" in read:  # a segmenter's
        names = ("image_size", "mean", "std", "interpolation", "view")
        own = {name: read[name] or (1, 1) for name in names}  # as they are, images have no size
        return segmentation_eval_transform(image, SegmentationPreprocessing(**own)), before
    return eval_transform(image, Preprocessing(**read)), before


@pytest.mark.parametrize("kind", KINDS)
def test_processors_of_transformers(kind, rng):
    """Bit-identical to what the class computes with Pillow; refused where that fails."""
    images = [random_image(rng, *size) for size in PHOTOS]
    read_count = 0
    for name in [*GEOMETRY, *PIXELS]:
        file = {"image_processor_type": kind} | fields_of(kind, name)
        try:
            processor = getattr(transformers, f"{kind}Pil").from_dict(dict(file))
            views = [theirs(processor, image) for image in images]
        except (ValueError, TypeError, KeyError, AttributeError):
            views = []
        alike = len({view.shape for view in views}) == 1
        if not alike and not (views and kind == "SegformerImageProcessor"):
            with pytest.raises(UserError, match=r"preprocessor_config\.json: "):
                read_preprocessing({"preprocessor": file})
            continue
        read_count += 1
        try:
            read = read_preprocessing({"preprocessor": file})
        except UserError as error:
            # The size of the matrix and the class's own crop, or ConvNeXt's and another.
            if "same share" in str(error) or "a second crop" in str(error):
                continue
            raise
        for image, view in zip(images, views, strict=True):
            ours, before = ours_in_bytes(read, image, view)
            assert ours.shape == before.shape, name
            assert np.abs(ours - before).max() < 0.01, name
    assert read_count > 25


@pytest.mark.parametrize("name", NOT_READ)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_read_is_refused(kind, name, rng):
    """Unless the class has no use for the field: BEiT's and others never pad."""
    file = {"image_processor_type": kind} | NOT_READ[name]
    try:
        read = read_preprocessing({"preprocessor": file})
    except UserError as error:
        if "preprocessor_config.json: " in str(error):
            return
        raise
    processor = getattr(transformers, f"{kind}Pil").from_dict(dict(file))
    for size in PHOTOS:
        image = random_image(rng, *size)
        ours, before = ours_in_bytes(read, image, theirs(processor, image))
        assert np.abs(ours - before).max() < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [37, 32])
def test_torchvisions_backend_of_transformers(kind, size, rng):
    """The same pixels, bilinear, to one grey level; its bicubic overshoots at edges."""
    file = {"image_processor_type": kind, "resample": 2, "size": {"shortest_edge": size}}
    file |= {"size": {"shortest_edge": 32}} if "ConvNext" in kind else CROP
    read = read_preprocessing({"preprocessor": file})
    processor = getattr(transformers, kind).from_dict(dict(file))
    for shape in PHOTOS:
        image = random_image(rng, *shape)
        ours, before = ours_in_bytes(read, image, theirs(processor, image))
        assert ours.shape == before.shape
        assert np.abs(ours - before).max() < 1.01


@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_defaults_are_the_classs_own(kind):
    """Of both backends, and the class is the one that transformers takes for the model's type."""
    for name in (kind, f"{kind}Pil"):
        if not hasattr(transformers, name):
            assert name == "RfDetrImageProcessorPil"
            continue
        processor = getattr(transformers, name)()
        for field, value in {**DEFAULTS, **PROCESSORS[kind]}.items():
            found = getattr(processor, field, None)
            if "Detr" in kind and field in ("do_pad", "default_to_square"):
                continue  # a batch's, whose model gets a mask; their sizes are never square
            found = dict(found) if field in ("size", "crop_size") and found else found
            found = list(found) if isinstance(found, tuple) else found
            assert found == value or (not found and not value), (name, field)
    for model_type, name in OF_MODEL_TYPE.items():
        if model_type in IMAGE_PROCESSOR_MAPPING_NAMES:
            assert IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["torchvision"] == name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("older", ["Fast", "FeatureExtractor"])
def test_older_names_of_classes_are_read_as_autoimageprocessor_does(kind, older, tmp_path, rng):
    named = {"image_processor_type": f"{kind}Fast"}
    if older == "FeatureExtractor":
        named = {"feature_extractor_type": kind.replace("ImageProcessor", "FeatureExtractor")}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(named))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    read = read_preprocessing({"preprocessor": named})
    image = random_image(rng, 301, 226)
    ours, before = ours_in_bytes(read, image, theirs(processor, image))
    assert np.abs(ours - before).max() < 0.01


@pytest.mark.parametrize("fields", [{"size": [40, 33]}, {"size": {"shortest_edge": 37}} | CROP])
def test_one_channel(fields, rng):
    file = {"image_processor_type": "DeiTImageProcessor", "do_center_crop": False} | fields
    file |= {"image_mean": [0.4], "image_std": [0.3]}
    read = read_preprocessing({"preprocessor": file, "config": {"num_channels": 1}})
    processor = transformers.DeiTImageProcessorPil.from_dict(dict(file))
    for size in PHOTOS:
        image = random_image(rng, *size)[..., :1]
        grey = processor(Image.fromarray(image[..., 0]), return_tensors="np")["pixel_values"][0]
        ours, before = ours_in_bytes(read, image, grey.transpose(1, 2, 0))
        assert ours.shape == before.shape
        assert np.abs(ours - before).max() < 0.01


DETECTORS = [
    ("DetrImageProcessor", {"size": {"shortest_edge": 48, "longest_edge": 64}}),
    ("DetrImageProcessor", {"size": 48, "max_size": 64}),
    ("DetrImageProcessor", {"size": 48, "resample": 3}),
    ("DetrImageProcessor", {"size": {"height": 48, "width": 48}, "do_rescale": False}),
    ("DetrImageProcessor", {"size": [48, 48], "rescale_factor": 1 / 127.5, "image_mean": 0.9}),
    ("DetrImageProcessor", {"do_normalize": False, "size": 32}),
    ("RfDetrImageProcessor", {"size": {"height": 48, "width": 48}}),
    ("RfDetrImageProcessor", {"size": [48, 48], "image_std": 0.5, "rescale_factor": 1 / 127.5}),
]


@pytest.mark.parametrize(("kind", "fields"), DETECTORS)
def test_detectors(kind, fields, rng):
    file = {"image_processor_type": f"{kind}Fast"} | fields
    read = read_preprocessing({"preprocessor": file})
    name = f"{kind}Pil" if hasattr(transformers, f"{kind}Pil") else kind
    processor = getattr(transformers, name).from_dict(dict(file))
    canvas = (read["longest"],) * 2
    ours = DetectionPreprocessing(
        **{key: read[key] for key in ("short", "longest", "square", "interpolation")},
        mean=read["mean"],
        std=read["std"],
        buckets=(canvas,),
    )
    for size in PHOTOS:
        image = random_image(rng, *size)
        expected = theirs(processor, image)
        before = 255 * (expected * np.array(read["std"]) + np.array(read["mean"]))
        view = detection_eval_transform(image, np.zeros((0, 4)), ours, canvas)[0]
        assert view.shape == before.shape
        # RF-DETR's is computed in floats there.
        assert np.abs(view - before).max() < (0.51 if "Rf" in kind else 0.01)


def test_random_resized_crop_draws_windows_as_torchvision_does(rng):
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
