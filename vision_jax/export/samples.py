"""Small models with random arrays of each family, and ways to prepare images: docs/exports.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.config import default_config
from vision_jax.data.detection_transforms import DetectionPreprocessing
from vision_jax.data.segmentation_transforms import SegmentationPreprocessing
from vision_jax.data.transforms import INTERPOLATIONS, Preprocessing
from vision_jax.loaded import Loaded
from vision_jax.models import families
from vision_jax.models.families import FAMILIES
from vision_jax.tasks.api import find_task
from vision_jax.trees import paths

_VIT = {"patch_size": 8, "width": 48, "depth": 2, "num_heads": 3, "mlp_width": 96}
_RESNET = {"depths": (1, 1, 1, 1), "widths": (16, 32, 64, 128), "stem_width": 16}
_PYRAMID = {**_RESNET, "width": 32, "freeze_norm": True}


@dataclass(frozen=True)
class Sample:
    """A model of a family.

    Attributes:
      family: its name.
      arguments: of the model, without the number of classes.
      image_size: (height, width).
    """

    family: str
    arguments: Mapping[str, Any]
    image_size: tuple[int, int] = (64, 64)


SAMPLES: dict[str, Sample] = {
    "vit": Sample("vit", _VIT),
    "vit, pooled by attention, SwiGLU": Sample(
        "vit", {**_VIT, "pool": "map", "gated_mlp": True, "num_registers": 2}
    ),
    "vit, tokens merge": Sample("vit", {**_VIT, "merge": 24}),
    "beit": Sample(
        "beit", {"patch_size": 16, "width": 48, "depth": 2, "num_heads": 3, "mlp_width": 96}
    ),
    "convnext": Sample("convnext", {"depths": (1, 1, 2, 1), "widths": (16, 24, 32, 48)}),
    "convnext v2": Sample(
        "convnext",
        {"depths": (1, 1, 2, 1), "widths": (16, 24, 32, 48), "grn": True, "layer_scale": None},
    ),
    "efficientnet": Sample(
        "efficientnet",
        {"depths": (1, 2, 2), "widths": (8, 16, 24), "kernels": (3, 5, 3), "strides": (1, 2, 2),
         "expansions": (1, 4, 4), "stem_width": 16, "head_width": 64, "se_ratio": 0.25,
         "activation": "silu"},
    ),
    "mobilenet v3": Sample(
        "efficientnet",
        {"depths": (1, 2, 2), "widths": (8, 16, 24), "kernels": (3, 5, 3), "strides": (1, 2, 2),
         "expansions": (1, 4, 4), "stem_width": 16, "head_width": 64, "hard_gate": True,
         "se_ratio": (0.0, 0.25, 0.25), "activation": "hard_swish", "relu_stages": 1,
         "head_hidden": 64},
    ),
    "inception": Sample("inception", {"unit": 2}, (80, 80)),
    "mit": Sample("mit", {"depths": (1, 1, 1, 1), "widths": (16, 32, 40, 64)}),
    "regnet": Sample(
        "regnet",
        {"depths": (1, 1, 2, 1), "widths": (16, 32, 64, 96), "group_widths": (8, 8, 16, 16),
         "stem_width": 16, "se_ratio": 0.25},
    ),
    "resnet": Sample("resnet", {**_RESNET, "block": "bottleneck"}),
    "swin": Sample(
        "swin",
        {"width": 24, "depths": (2, 2), "num_heads": (2, 4), "windows": ((4, 4), (4, 4))},
    ),
    "swin v2": Sample(
        "swin",
        {"width": 24, "depths": (2, 2), "num_heads": (2, 4), "windows": ((4, 4), (4, 4)),
         "version": 2},
    ),
    "detr": Sample(
        "detr",
        {**_RESNET, "num_queries": 20, "width": 64, "num_heads": 4, "mlp_width": 128,
         "encoder_depth": 2, "decoder_depth": 2},
        (128, 128),
    ),
    "rf_detr": Sample(
        "rf_detr",
        {"image_size": (64, 64), "position_grid": 8, "decoder_depth": 2, "patch_size": 8,
         "feature_depths": (1, 2), "global_blocks": (1,), "backbone_width": 48,
         "backbone_depth": 2, "backbone_heads": 2, "backbone_mlp_width": 96, "width": 32,
         "projector_width": 16, "projector_blocks": 1, "num_queries": 20, "num_groups": 2,
         "num_heads": 2, "cross_heads": 4, "mlp_width": 64},
    ),
    "faster_rcnn": Sample(
        "faster_rcnn",
        {**_PYRAMID, "anchor_sizes": (16, 32, 64, 96, 128), "proposals": 50, "head_width": 64,
         "candidates": 100, "most": 20},
        (128, 128),
    ),
    "fcos": Sample(
        "fcos",
        {**_PYRAMID, "head_depth": 2, "head_groups": 4, "candidates": 50, "most": 20,
         "least_score": 0.001},
        (128, 128),
    ),
    "retinanet": Sample(
        "retinanet",
        {**_PYRAMID, "anchor_sizes": (16, 32, 64, 96, 128), "head_depth": 2, "candidates": 50,
         "most": 20, "least_score": 0.001},
        (128, 128),
    ),
    "nanodet": Sample("nanodet", {}, (128, 128)),
    "yolox": Sample("yolox", {"csp_depth": 1, "width": 8}, (128, 128)),
    "yolox, depthwise": Sample(
        "yolox", {"csp_depth": 1, "width": 8, "depthwise": True}, (128, 128)
    ),
    "deeplab": Sample(
        "deeplab", {**_RESNET, "rates": (2, 4), "width": 16, "auxiliary_head": True}
    ),
    "eomt": Sample("eomt", {**_VIT, "num_queries": 10, "num_blocks": 1}),
    "segformer": Sample(
        "segformer",
        {"depths": (1, 1, 1, 1), "widths": (16, 32, 40, 64), "decoder_width": 32},
    ),
    "unet": Sample(
        "unet",
        {"encoder": "resnet", "decoder_widths": (32, 24, 16, 16, 8),
         "encoder_arguments": (("depths", (1, 1, 1, 1)), ("widths", (16, 24, 32, 48)),
                               ("stem_width", 16), ("block", "basic"))},
    ),
    "upernet": Sample(
        "upernet",
        {"encoder": "convnext", "width": 16, "pool_sizes": (1, 2, 3), "map_norm_eps": 1e-6,
         "encoder_arguments": (("depths", (1, 1, 1, 1)), ("widths", (16, 24, 32, 48)))},
        (128, 128),
    ),
}  # fmt: skip

_NORM: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
_LARGEST: dict[str, Any] = {
    "short": 48,
    "longest": 64,
    "square": False,
    "buckets": ((64, 64),),
    **_NORM,
}
_ALIASED = {**_LARGEST, "interpolation": "bilinear_aliased"}

# Ways to prepare images, as classifiers, detectors and segmenters have them.
VIEWS: dict[str, Preprocessing | DetectionPreprocessing | SegmentationPreprocessing] = {
    **{
        f"classifiers, {interpolation}": Preprocessing(
            (40, 48), **_NORM, crop_pct=1.0, interpolation=interpolation, crop_mode="squash"
        )
        for interpolation in INTERPOLATIONS
    },
    **{
        f"classifiers, {mode} crop of {rule}": Preprocessing(
            (40, 40), **_NORM, crop_pct=0.875, interpolation="bicubic", crop_mode=mode,
            crop_rule=rule,
        )
        for mode, rule in (
            ("center", "torchvision"), ("center", "transformers"), ("border", "torchvision"),
        )
    },
    "detectors, detr": DetectionPreprocessing(**_LARGEST, interpolation="bilinear"),
    "detectors, square": DetectionPreprocessing(**_ALIASED | {"short": 64, "square": True}),
    "detectors, torchvision": DetectionPreprocessing(**_ALIASED, rule="torchvision"),
    "detectors, letterbox": DetectionPreprocessing(**_ALIASED | {"short": 64}, rule="letterbox"),
    **{
        f"segmenters, {view}": SegmentationPreprocessing((48, 48), **_NORM, view=view)
        for view in ("original", "squash", "pad", "short")
    },
}  # fmt: skip

# Families whose task needs no class names: what is exported of them is the ViT inside.
INSIDE = ("mae", "dino", "simclr", "siglip")


def make_sample(name: str, seed: int = 0, num_classes: int = 7) -> Loaded:
    """The model of SAMPLES[name] with random arrays, every statistic among them."""
    sample = SAMPLES[name]
    known = FAMILIES[sample.family]
    given = dict(sample.arguments)
    if "image_size" in known.arguments:
        given["image_size"] = sample.image_size
    model = families.build_model(sample.family, num_classes=num_classes, in_channels=3, **given)
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(
        lambda key: families.initialize(model, key, sample.image_size), jax.random.key(0)
    )
    variables = {
        collection: paths.unflatten(
            tree,
            {path: jnp.asarray(_draw(rng, path, x)) for path, x in paths.flatten(tree).items()},
        )
        for collection, tree in like.items()
    }
    config = default_config(known.task)
    if known.task == "detection":
        config.data.short = min(sample.image_size)
        config.data.longest = max(sample.image_size)
    own = {**known.preprocessing, "image_size": sample.image_size}
    preprocessing = find_task(known.task).make_preprocessing(
        config, own, {**given, "mean": model.mean, "std": model.std}
    )
    names = tuple(f"class {label}" for label in range(num_classes))
    return Loaded(model, variables, names, preprocessing, f"random: {name}")


def _draw(rng: np.random.Generator, path: str, leaf: Any) -> np.ndarray:
    """Of a scale that keeps activations near 1, variances positive."""
    if not np.issubdtype(leaf.dtype, np.floating):
        return np.zeros(leaf.shape, leaf.dtype)
    noise = rng.standard_normal(leaf.shape, np.float32)
    last = path.rsplit("/", 1)[-1]
    if last == "var":
        return 0.5 + np.abs(noise)
    if last == "scale":
        return 1 + 0.2 * noise
    if len(leaf.shape) > 1:
        return noise * np.float32(np.prod(leaf.shape[:-1])) ** -0.5
    return 0.2 * noise
