"""The source's own preprocessing of an image, and how far ours is from it."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timm
import torchvision
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from vision_jax.certify.references import Reference
from vision_jax.convert.read import read_preprocessing, torchvision_preprocessing
from vision_jax.convert.table import Entry
from vision_jax.data.detection_transforms import DetectionPreprocessing, detection_eval_transform
from vision_jax.data.segmentation_transforms import (
    SegmentationPreprocessing,
    segmentation_eval_transform,
)
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.models import pyramid, yolox

ODD_SIZES = ((301, 417), (233, 199), (97, 512))  # (height, width) of the compared images,
LEFT_OVER = 4  # and so many for each of which another number of pixels is left beside the crop


def measure(
    entry: Entry, reference: Reference, seed: int
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(our preprocessing, its largest difference from the source's own in steps of 1/255).

    Both None where the source has none.
    """
    source = source_preprocessing(entry, reference)
    if source is None:
        return None, None
    transform, mean, std = _own_transform(source.ours)
    rng = np.random.default_rng(seed)
    worst = 0.0
    sizes = (*ODD_SIZES, *_cropped_sizes(source.ours))
    for height, width in sizes:
        ramp = np.linspace(0, 1, height)[:, None, None] * np.linspace(0, 1, width)[None, :, None]
        noise = rng.random((height, width, 3))
        image = (255 * (0.5 * ramp + 0.5 * noise)).astype(np.uint8)
        expected = source.transform(image)  # f32[h, w, 3], normalized
        view = transform(image).astype(np.float32) / 255
        difference = np.abs((view - mean) / std - expected) * std * 255
        worst = max(worst, float(difference.max()))
    return source.ours, {
        "against": source.name,
        "largest_difference_in_255ths": round(worst, 4),
        "sizes": [list(size) for size in sizes],
        **source.ours,
    }


def _cropped_sizes(record: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Images that are halved, and of which a crop then leaves any number of pixels modulo 4.

    Where the center is after an odd number depends on who rounds. Empty for the record of a
    detector or a segmenter.
    """
    if {"short", "view"} & set(record):
        return []
    height, width = (math.floor(n / record["crop_pct"]) for n in record["image_size"])
    return [(2 * height, 2 * (width + more)) for more in range(LEFT_OVER)]


def _own_transform(
    record: Mapping[str, Any],
) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, np.ndarray]:
    """(what we do to an image uint8[H, W, 3] up to normalization, mean, std)."""
    mean, std = (np.asarray(record[name]) for name in ("mean", "std"))
    if "view" in record:
        names = ("image_size", "mean", "std", "interpolation", "view")
        seen = SegmentationPreprocessing(**{name: record[name] for name in names})
        return partial(segmentation_eval_transform, preprocessing=seen), mean, std
    if "short" not in record:
        return partial(eval_transform, preprocessing=Preprocessing(**record)), mean, std
    canvas = (record["longest"],) * 2
    fields = {name: record[name] for name in ("short", "longest", "interpolation", "mean", "std")}
    shape = {"square": record["square"], "rule": record.get("rule") or "detr"}
    ours = DetectionPreprocessing(**fields, **shape, buckets=(canvas,))
    boxes = np.zeros((0, 4))
    return lambda image: detection_eval_transform(image, boxes, ours, canvas)[0], mean, std


@dataclass
class SourcePreprocessing:
    """A source's own preprocessing.

    Attributes:
      name: what it is.
      ours: what we read of it: the fields of `Preprocessing`.
      transform: uint8[H, W, 3] -> f32[h, w, 3], normalized.
    """

    name: str
    ours: dict[str, Any]
    transform: Callable[[np.ndarray], np.ndarray]


def source_preprocessing(entry: Entry, reference: Reference) -> SourcePreprocessing | None:
    """What the source does to an image, and what we understand of it."""
    if entry.source == "timm":
        config = timm.data.resolve_data_config({}, model=reference.module)
        if config["input_size"][0] != 3:
            return None
        transform = timm.data.create_transform(**config)
        metadata = {"config": {"pretrained_cfg": {**config, "input_size": [*config["input_size"]]}}}
        return SourcePreprocessing(
            "timm create_transform",
            read_preprocessing(metadata) or {},
            lambda image: transform(Image.fromarray(image)).permute(1, 2, 0).numpy(),
        )
    if entry.source == "torchvision":
        weights = torchvision.models.get_model_weights(entry.name.partition("/")[2]).DEFAULT
        preset = weights.transforms()
        if not hasattr(preset, "resize_size"):
            resize: Any = reference.module.transform
            return SourcePreprocessing(
                f"torchvision {type(resize).__name__}",
                {
                    **pyramid.PREPROCESSING,
                    "short": resize.min_size[-1],
                    "longest": resize.max_size,
                    "square": False,
                    "mean": tuple(resize.image_mean),
                    "std": tuple(resize.image_std),
                },
                lambda image: _resized(resize, preset(Image.fromarray(image))),
            )
        return SourcePreprocessing(
            f"torchvision {weights}, Pillow",
            torchvision_preprocessing(preset) or {},
            lambda image: preset(Image.fromarray(image)).permute(1, 2, 0).numpy(),
        )
    if entry.source == "yolox":
        side, (mean, std) = entry.image_size, ((0.0,) * 3, (1 / 255,) * 3)
        record = {**yolox.PREPROCESSING, "short": side, "longest": side, "square": False}
        return SourcePreprocessing(
            f"pixeltable-yolox preproc, {side} pixels",
            {**record, "mean": mean, "std": std},
            lambda image: _letterboxed(image, side),
        )
    if entry.source == "transformers":
        kind = reference.module.config.model_type
        kind = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}.get(kind, kind)
        kind = {"dinov2_with_registers": "dinov2"}.get(kind, kind)
        names = IMAGE_PROCESSOR_MAPPING_NAMES[kind]
        name = names["pil"] if "pil" in names else names["torchvision"]
        sides = _sides(getattr(transformers, name), entry)
        processor = getattr(transformers, name)(**sides)
        return SourcePreprocessing(
            f"transformers {name}, " + (f"{entry.image_size} pixels" if sides else "defaults"),
            read_preprocessing({"preprocessor": json.loads(processor.to_json_string())}) or {},
            lambda image: processor(Image.fromarray(image), return_tensors="np")["pixel_values"][
                0
            ].transpose(1, 2, 0),
        )
    return None


def _resized(resize: Any, image: Any) -> np.ndarray:
    """What a detector of torchvision's makes of an image, without the padding."""
    images, _ = resize([image])
    height, width = images.image_sizes[0]
    return images.tensors[0, :, :height, :width].permute(1, 2, 0).numpy()


def _letterboxed(image: np.ndarray, side: int) -> np.ndarray:
    """What pixeltable-yolox makes of an image, without the grey around it."""
    from yolox.data.data_augment import preproc

    canvas, scale = preproc(image, (side, side), swap=(0, 1, 2))
    return canvas[: int(image.shape[0] * scale), : int(image.shape[1] * scale)]


def _sides(kind: Any, entry: Entry) -> dict[str, Any]:
    """The processor's sizes for a variant's: its class's own are one variant's only.

    What is resized and then cut keeps the class's proportion of the two.
    """
    side, size = entry.image_size, dict(kind.size)
    if "Eomt" in kind.__name__:  # the class pads on request alone, and panoptic variants ask
        return {"size": dict.fromkeys(size, side), "do_pad": True}
    if "longest_edge" in size:  # a detector of any size
        return {"size": {"height": side, "width": side}} if "RfDetr" in kind.__name__ else {}
    if not getattr(kind, "do_center_crop", False):
        return {"size": dict.fromkeys(size, side)}
    cut = kind.crop_size["height"]
    resized = {key: round(side * value / cut) for key, value in size.items()}
    return {"size": resized, "crop_size": {"height": side, "width": side}}
