"""transformers' image processors: what preprocessor_config.json says, and the way back.

A field that is left out has its class's default, and the same field means another thing in another
class. So a class that is not known here, or a field that leaves nothing which `Preprocessing` could
hold, is an error. docs/weights.md lists both. Source: transformers 5.24, its
models/*/image_processing_pil_*.py, image_processing_backends.py and image_transforms.py.
"""

import math
from collections.abc import Mapping
from typing import Any

from vision_jax.errors import UserError

PREPROCESSOR_FILE = "preprocessor_config.json"
ALIASED = "_aliased"  # after an interpolation's name: without antialiasing
PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
RESAMPLE = {name: number for number, name in PIL_FILTERS.items()}
WARPED_FROM = 384  # pixels: ConvNextImageProcessor crops below and warps from here on
MAX_CHANNELS = 1024  # of images
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

DEFAULTS: dict[str, Any] = {  # of a class that doesn't say otherwise below
    "default_to_square": True,  # what a size of one number is
    "do_resize": True,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_pad": False,
    "pad_size": None,
}


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


_CLIP: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "crop_size": _square(224),
    "do_center_crop": True,
    "resample": 3,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_DETECTOR: dict[str, Any] = {
    "size": {"shortest_edge": 800, "longest_edge": 1333},
    "resample": 2,
    "image_mean": IMAGENET_MEAN,
    "image_std": IMAGENET_STD,
}
_WHOLE: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash", "crop_rule": "transformers"}
CONVNEXT, EFFICIENTNET = "ConvNextImageProcessor", "EfficientNetImageProcessor"
DETR, RF_DETR = "DetrImageProcessor", "RfDetrImageProcessor"
EOMT, SEGFORMER = "EomtImageProcessor", "SegformerImageProcessor"
UNPADDED = ("BeitImageProcessor", CONVNEXT, EFFICIENTNET, "MobileNetV2ImageProcessor")
PROCESSORS: dict[str, dict[str, Any]] = {
    "BeitImageProcessor": {
        "size": _square(224),
        "crop_size": _square(224),
        "resample": 3,
    },
    "BitImageProcessor": _CLIP,
    "CLIPImageProcessor": _CLIP,
    CONVNEXT: {
        "size": {"shortest_edge": 384},
        "default_to_square": False,
        "crop_pct": 224 / 256,
        "resample": 3,
    },
    "DeiTImageProcessor": {
        "size": _square(256),
        "crop_size": _square(224),
        "do_center_crop": True,
        "resample": 3,
    },
    DETR: _DETECTOR,
    EFFICIENTNET: {
        "size": _square(346),
        "crop_size": _square(289),
        "resample": 3,
        "rescale_offset": False,
        "include_top": True,
    },
    EOMT: {
        "size": {"shortest_edge": 640, "longest_edge": 640},
        "default_to_square": False,
        "do_split_image": False,
        "resample": 2,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    },
    "MobileNetV2ImageProcessor": {
        "size": {"shortest_edge": 256},
        "default_to_square": False,
        "crop_size": _square(224),
        "do_center_crop": True,
        "resample": 2,
    },
    RF_DETR: _DETECTOR,
    SEGFORMER: {
        "size": _square(512),
        "resample": 2,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    },
    "SiglipImageProcessor": {"size": _square(224), "default_to_square": False, "resample": 3},
    "ViTImageProcessor": {"size": _square(224), "resample": 2},
}
OF_MODEL_TYPE = {  # the class where the file names none
    **dict.fromkeys(("beit", "data2vec-vision"), "BeitImageProcessor"),
    **dict.fromkeys(("bit", "dinov2", "dinov2_with_registers"), "BitImageProcessor"),
    **dict.fromkeys(("clip", "clip_vision_model"), "CLIPImageProcessor"),
    **dict.fromkeys(("convnext", "convnextv2", "regnet", "resnet"), CONVNEXT),
    "deit": "DeiTImageProcessor",
    "detr": DETR,
    "efficientnet": EFFICIENTNET,
    "eomt": EOMT,
    "mobilenet_v2": "MobileNetV2ImageProcessor",
    "rf_detr": RF_DETR,
    **dict.fromkeys(("segformer", "upernet"), SEGFORMER),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "SiglipImageProcessor"),
    **dict.fromkeys(("swin", "swinv2", "vit", "vit_mae", "vit_msn"), "ViTImageProcessor"),
}


def read_processor(
    file: Mapping[str, Any], config: Mapping[str, Any], name: str | None = None
) -> dict[str, Any]:
    """Fields of `Preprocessing`, or a detector's short, longest and square, from a processor's.

    Args:
      file: contents of preprocessor_config.json, or what processor_config.json has inside.
      config: contents of config.json; its model_type stands in for a class that `file` leaves out.
      name: of the file, for errors; None is preprocessor_config.json.

    Raises:
      UserError: names the file and the field whose value is none, or has no equal here.
    """
    name = name or PREPROCESSOR_FILE
    kind = _processor_class(file, config, name)
    fields = {**DEFAULTS, **PROCESSORS[kind], **file}
    read = _Reader(kind, fields, name)
    if file.get("use_square_size") and kind == "CLIPImageProcessor":
        raise read.refusal("use_square_size", "write the size itself")
    views = {
        **dict.fromkeys((DETR, RF_DETR), read.detector_view),
        SEGFORMER: read.segmenter_view,
        EOMT: read.eomt_view,
    }
    view = views.get(kind, read.classifier_view)()
    filters = {"interpolation": read.interpolation()}
    return {**filters, **view, **read.normalization(_channels(config))}


def _processor_class(file: Mapping[str, Any], config: Mapping[str, Any], name: str) -> str:
    """AutoImageProcessor's choice: of the file, else of config.json, else by its model_type.

    Fast classes were renamed to what they compute, and feature extractors to image processors.
    """
    named = file.get("image_processor_type")
    field = "image_processor_type"
    if named is None and file.get("feature_extractor_type") is not None:
        field = "feature_extractor_type"
        named = str(file[field]).replace("FeatureExtractor", "ImageProcessor")
    elif named is None:
        named = config.get(field)
    base = str(named).removesuffix("Fast").removesuffix("Pil")
    if named is not None and base in PROCESSORS:
        return base
    renamed = base.endswith("FeatureExtractor")  # by the field of image processors
    kind = config.get("model_type")
    if (named is None or renamed) and isinstance(kind, str) and kind in OF_MODEL_TYPE:
        return OF_MODEL_TYPE[kind]
    known = ", ".join(PROCESSORS)
    if named is None:
        raise UserError(
            f"{name}: it names no image_processor_type, and config.json no model_type that has one "
            f"here: add that of {known} which prepared the images"
        )
    raise UserError(
        f"{name}: {field} {shown(named)} is none that is read here ({known}): write the one that "
        "computes the same, or take the file away and set size, crop and interpolation yourself"
    )


def _channels(config: Mapping[str, Any]) -> int:
    """Of the model's images, as config.json or its part about the vision tower says."""
    inner = config.get("vision_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        count = part.get("num_channels")
        if isinstance(count, int) and 0 < count <= MAX_CHANNELS:
            return count
    return 3


def shown(value: Any) -> str:
    """A value out of a file, short enough for a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Reader:
    """The fields of one processor, defaults filled in, and what its class makes of them."""

    def __init__(self, kind: str, fields: Mapping[str, Any], name: str):
        self.kind, self.fields, self.name = kind, fields, name

    def refusal(self, field: str, what: str) -> UserError:
        return UserError(f"{self.name}: {field} {shown(self.fields[field])} ({self.kind}): {what}")

    def classifier_view(self) -> dict[str, Any]:
        """image_size, crop_pct, crop_mode and crop_rule."""
        fields, crop = self.fields, None
        if not fields["do_resize"]:
            raise self.refusal("do_resize", "images are always resized here; write the size")
        size = self.sides("size", bool(fields["default_to_square"]))
        if fields["do_center_crop"]:
            crop = self.sides("crop_size", True)
            if "height" not in crop:
                raise self.refusal("crop_size", "its keys are height and width")
        if self.kind == CONVNEXT:
            if "shortest_edge" not in size:
                raise self.refusal("size", "its key is shortest_edge for this class")
            side = size["shortest_edge"]
            if crop not in (None, _square(side)):
                raise self.refusal("crop_size", f"a second crop, after that to {side} pixels")
            crop, size = _square(side), _square(side)
            if side < WARPED_FROM:
                share = self.number("crop_pct")
                size = {"shortest_edge": int(min(side / share, 2**31))}
        if set(size) == {"shortest_edge"}:
            mode, resized = "center", (size["shortest_edge"],) * 2
            if crop is None:
                raise self.refusal(
                    "size", "without do_center_crop every image has another shape; add a crop_size"
                )
            if crop["height"] != crop["width"]:
                raise self.refusal("crop_size", "only squares are cut after a shortest_edge here")
        elif set(size) == {"height", "width"}:
            mode, resized = "squash", (size["height"], size["width"])
        else:
            raise self.refusal("size", "use height and width, or shortest_edge and a crop_size")
        height, width = resized if crop is None else (crop["height"], crop["width"])
        share = crop_share(height, resized[0]) if resized[0] else 0.0
        if not share or tuple(math.floor(n / share) for n in (height, width)) != resized:
            field = "crop_size" if resized[0] else "crop_pct"
            raise self.refusal(field, "both sides are cut by the same share here")
        padded = fields["do_pad"] and fields["pad_size"] is not None
        if (
            padded
            and self.kind not in UNPADDED
            and self.sides("pad_size", True) != {"height": height, "width": width}
        ):
            raise self.refusal("pad_size", "images are not padded after the crop here")
        return {
            "image_size": (height, width),
            "crop_pct": share,
            "crop_mode": mode,
            "crop_rule": "transformers",
        }

    def detector_view(self) -> dict[str, Any]:
        """short, longest and square: the limits of both sides, or the side of a square."""
        fields = self.fields
        if not fields["do_resize"]:
            raise self.refusal("do_resize", "images are always resized here; write the size")
        size = self.sides("size", False) if fields["size"] is not None else _DETECTOR["size"]
        if set(size) == {"shortest_edge"} and not isinstance(fields["size"], dict):
            size = size | {"longest_edge": 1333}  # older files say max_size
            if fields.get("max_size") is not None:
                size["longest_edge"] = self.side("max_size", fields["max_size"])
        if set(size) == {"height", "width"}:
            if size["height"] != size["width"]:
                raise self.refusal("size", "height and width differ: only squares are read here")
            side = size["height"]
            return {"short": side, "longest": side, "square": True, "image_size": (side, side)}
        if self.kind == RF_DETR:
            raise self.refusal("size", "write height and width, which this model's images have")
        if set(size) != {"shortest_edge", "longest_edge"}:
            raise self.refusal("size", "its keys are shortest_edge and longest_edge")
        return {"short": size["shortest_edge"], "longest": size["longest_edge"], "square": False}

    def segmenter_view(self) -> dict[str, Any]:
        """view, as data.segmentation_transforms has it, and image_size; squashed also a crop's.

        The class crops and pads nothing, whatever its fields say.
        """
        if self.fields["do_center_crop"] and self.fields["crop_size"] is None:
            raise self.refusal("crop_size", "transformers wants one beside do_center_crop")
        if not self.fields["do_resize"]:
            return {"view": "original"}
        size = self.sides("size", bool(self.fields["default_to_square"]))
        if set(size) == {"shortest_edge"}:
            return {"view": "short", "image_size": (size["shortest_edge"],) * 2}
        if set(size) != {"height", "width"}:
            raise self.refusal("size", "use height and width, or shortest_edge alone")
        return {"view": "squash", "image_size": (size["height"], size["width"]), **_WHOLE}

    def eomt_view(self) -> dict[str, Any]:
        """The view "windows" where the class splits what has a short side of its size, or "squash".

        "pad" where it pads to a square. Its semantic masks are the padded canvas at the image's
        size, its segments are not. With both edges and no padding the class keeps the aspect ratio,
        and its images have many sizes, which the model does not take: squares are squashed too.
        """
        fields = self.fields
        if not fields["do_resize"]:
            raise self.refusal("do_resize", "images are always resized here; write the size")
        given = fields["size"]
        if isinstance(given, dict):  # the class writes all keys, null where it has none
            kept = {edge: side for edge, side in given.items() if side is not None}
            self.fields = fields = {**fields, "size": kept}
        size = self.sides("size", False)
        if set(size) == {"height", "width"} and not fields["do_split_image"]:
            return {"view": "squash", "image_size": (size["height"], size["width"]), **_WHOLE}
        if "shortest_edge" not in size or set(size) - {"shortest_edge", "longest_edge"}:
            raise self.refusal("size", "its keys are shortest_edge and longest_edge")
        sides = (size["shortest_edge"], size.get("longest_edge", size["shortest_edge"]))
        if fields["do_split_image"] and "longest_edge" not in size:
            return {"view": "windows", "image_size": sides, **_WHOLE}
        view = "pad" if fields["do_pad"] and sides[0] == sides[1] else "squash"
        return {"view": view, "image_size": sides, **_WHOLE}

    def interpolation(self) -> str:
        """RF-DETR's own processor does not antialias; DETR's, which the hub's files name, does."""
        number = self.fields["resample"]
        if type(number) is not int or number not in PIL_FILTERS:
            raise self.refusal(
                "resample",
                f"use a number of Pillow's filters, {min(PIL_FILTERS)} to {max(PIL_FILTERS)}",
            )
        found = PIL_FILTERS[number]
        if self.kind == RF_DETR and found != "bilinear":
            raise self.refusal("resample", "without antialiasing only 2, bilinear, is read here")
        return found + (ALIASED if self.kind == RF_DETR else "")

    def normalization(self, channels: int) -> dict[str, tuple[float, ...]]:
        """mean and std of images from 0 to 1, of what the class subtracts and divides by."""
        fields = self.fields
        # Pixels from 0 to 255 times `factor`, less `offset`, less the mean, over the standard
        # deviation; and the same in pixels from 0 to 1.
        factor = self.number("rescale_factor") if fields["do_rescale"] else 1.0
        mean, std = [0.0] * channels, [1.0] * channels
        if fields["do_normalize"]:
            mean, std = self.numbers("image_mean", channels), self.numbers("image_std", channels)
        if self.kind == EFFICIENTNET:
            if fields["do_rescale"] and fields["rescale_offset"]:
                mean = [value + 1 for value in mean]
            if fields["include_top"]:
                again = self.numbers("image_std", channels)
                std = [a * b for a, b in zip(std, again, strict=True)]
        unit = 255 * factor
        return {
            "mean": tuple(value / unit for value in mean),
            "std": tuple(value / unit for value in std),
        }

    def sides(self, field: str, to_square: bool) -> dict[str, int]:
        """A size by its keys, from one number, from (height, width) or from such an object."""
        value = self.fields[field]
        if isinstance(value, list) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        if not isinstance(value, dict):
            side = self.side(field, value)
            return _square(side) if to_square else {"shortest_edge": side}
        return {str(key): self.side(field, side) for key, side in value.items()}

    def side(self, field: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.refusal(field, "sizes are whole numbers of pixels")
        return value

    def number(self, field: str) -> float:
        value = self.fields[field]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(field, "this is no number")
        if not 1e-9 < value < 1e9:
            raise self.refusal(field, "use a positive number")
        return float(value)

    def numbers(self, field: str, channels: int) -> list[float]:
        """One for each channel; a single one is all channels'."""
        value = self.fields[field]
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            raise self.refusal(field, "these are no numbers")
        # Three beside another number of channels are adapted as the first convolution is.
        if len(values) not in (1, 3, channels):
            raise self.refusal(field, f"one or {channels} numbers, one for each channel")
        return [float(value) for value in (values * channels if len(values) == 1 else values)]


def crop_share(crop: int, resized: int) -> float:
    """The share that a center crop keeps, such that floor(crop / share) is `resized` again."""
    share = crop / resized
    return math.nextafter(share, 0) if math.floor(crop / share) < resized else share


def processor_config(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: the processor class that resizes and crops as the model needs.

    Raises:
      UserError: there is none.
    """
    config: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
        "resample": RESAMPLE[preprocessing["interpolation"].removesuffix(ALIASED)],
    }
    if "short" in preprocessing:
        short, longest = preprocessing["short"], preprocessing["longest"]
        size = {"shortest_edge": short, "longest_edge": longest}
        if preprocessing["square"]:
            size = _square(short)
        aliased = preprocessing["interpolation"].endswith(ALIASED)
        kind = {"image_processor_type": RF_DETR if aliased else DETR, "format": "coco_detection"}
        return {**kind, **config, "size": size, "do_pad": True}
    height, width = preprocessing["image_size"]
    if "view" in preprocessing:
        views: dict[str, dict[str, Any]] = {
            "squash": {"size": {"height": height, "width": width}},
            "short": {"size": {"shortest_edge": min(height, width)}},
            "original": {"do_resize": False},
            "windows": {"size": {"shortest_edge": height, "longest_edge": None}},
            "pad": {"size": {"shortest_edge": height, "longest_edge": height}},
        }
        own: dict[str, Any] = {"image_processor_type": SEGFORMER, "do_reduce_labels": False}
        if preprocessing["view"] == "windows":
            own = {"image_processor_type": EOMT, "do_split_image": True, "do_pad": False}
        if preprocessing["view"] == "pad":
            own = {"image_processor_type": EOMT, "do_split_image": False, "do_pad": True}
        return {**own, **config, **views[preprocessing["view"]]}
    crop = {"height": height, "width": width}
    resized = {side: math.floor(n / preprocessing["crop_pct"]) for side, n in crop.items()}
    cut = {"do_center_crop": True, "crop_size": crop}
    if preprocessing["crop_mode"] == "squash":
        if resized == crop:
            return {"image_processor_type": "ViTImageProcessor", **config, "size": crop}
        return {"image_processor_type": "DeiTImageProcessor", **config, "size": resized, **cut}
    if preprocessing["crop_mode"] == "center" and height == width:
        color = {"do_convert_rgb": len(preprocessing["mean"]) == 3}
        size = {"shortest_edge": resized["height"]}
        return {"image_processor_type": "BitImageProcessor", **config, **color, "size": size, **cut}
    raise UserError(
        "transformers has no processor that prepares images so (crop_mode "
        f"{preprocessing['crop_mode']!r}, {height} x {width} pixels): use --to=timm"
    )
