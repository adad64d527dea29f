"""What is said of an image: the records of `predict`'s predictions.json, by the same functions.

classes    {"class", "label", "probability", "top": [[name, probability], ...]}
boxes      {"boxes": [{"name", "label", "score", "box_xyxy_px"}, ...]}, by falling score
pixels     {"shares": {name: share of the pixels}, "objects" if they are counted, "mask_png"}
features   {"features": [...]}
"""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vision_jax.serve.body import Refused
from vision_jax.serve.model import Found, Servable, Size
from vision_jax.tasks.classification.metrics import best_classes, softmax
from vision_jax.tasks.detection.metrics import collect_detections, describe_boxes

TOP = 5  # classes that are named unless more are asked for


@dataclass(frozen=True)
class Asked:
    """What a request asks for beside its images.

    Attributes:
      top: classes to name, the most probable ones.
      score: of the boxes to name, at least.
      mask: whether the mask comes too.
    """

    top: int = TOP
    score: float = 0.5
    mask: bool = True


# (what was found in an image, its size, what is asked for) -> its record
Describe = Callable[[Found, Size, Asked], dict[str, Any]]


def read_query(query: Mapping[str, str], kind: str, default: Asked) -> Asked:
    """The fields of an address's query: `top` of classes, `score` of boxes, `mask` of pixels.

    Raises:
      Refused: another field, or a value out of range.
    """
    known = {"classes": "top", "boxes": "score", "pixels": "mask"}
    given: dict[str, Any] = {}
    for name, text in query.items():
        if name != known.get(kind):
            hint = f"{known[kind]} is known here" if kind in known else "none is known here"
            raise Refused(400, f"unknown query field {name[:40]!r}: {hint}")
        try:
            value = float(text) if name == "score" else int(text)
        except ValueError:
            raise Refused(400, f"{name}={text[:40]!r} is no number") from None
        low, high = (1, 10**6) if name == "top" else (0, 1)
        if not low <= value <= high:
            raise Refused(400, f"{name}={text[:40]}: use {low} to {high}")
        given[name] = bool(value) if name == "mask" else value
    return Asked(**{**vars(default), **given})


def make_describe(
    servable: Servable, count_objects: Callable[[np.ndarray], int] | None = None
) -> Describe:
    """How a servable's answers read.

    Args:
      servable: what is served.
      count_objects: in a mask u8[H, W]; None counts none.
    """
    names = servable.class_names

    def classes(found: Found, size: Size, asked: Asked) -> dict[str, Any]:
        return best_classes(softmax(found["logits"][None])[0], names, asked.top)

    def boxes(found: Found, size: Size, asked: Asked) -> dict[str, Any]:
        one = {"mask": np.ones(1, bool), "index": np.zeros(1, np.int32)}
        rows = {name: array[None] for name, array in found.items()}
        every = collect_detections([{**rows, **one}])
        return {"boxes": describe_boxes(every[every.score >= asked.score], names)}

    def features(found: Found, size: Size, asked: Asked) -> dict[str, Any]:
        return {"features": found["logits"].tolist()}

    known = {"classes": classes, "boxes": boxes, "features": features}
    return known[servable.kind] if servable.kind in known else _of_masks(names, count_objects)


def _of_masks(names: tuple[str, ...], count_objects: Callable[..., int] | None) -> Describe:
    # Imported here: they draw, too, by matplotlib.
    from vision_jax.tasks.segmentation.figures import palette
    from vision_jax.tasks.segmentation.predictions import describe

    colors = palette(len(names)).tobytes()

    def pixels(found: Found, size: Size, asked: Asked) -> dict[str, Any]:
        record = describe(found["label"], names, count_objects)
        if asked.mask:
            mask = Image.fromarray(found["label"])
            mask.putpalette(colors)
            written = io.BytesIO()
            mask.save(written, "png")
            record["mask_png"] = base64.b64encode(written.getvalue()).decode()
        return record

    return pixels
