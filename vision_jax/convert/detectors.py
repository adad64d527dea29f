"""What torchvision's detectors do by themselves, and neither a tensor nor a preset says.

Source: torchvision 0.29 models/detection/.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vision_jax.models.faster_rcnn import LOW_RESOLUTION, LOW_SIDES
from vision_jax.models.pyramid import PREPROCESSING

# How their builders begin. Of the dense ones each class is a sigmoid, and the background is one;
# a softmax has a place for none.
DENSE = ("retinanet", "fcos")
_BUILDERS = ("fasterrcnn", *DENSE)


def is_detector(builder: Any) -> bool:
    """Whether it is the name of such a builder, or how one's file is called."""
    return str(builder).startswith(_BUILDERS)


def class_names_of(builder: str, published: Sequence[str]) -> list[str]:
    """In the order of labels, of the names that torchvision publishes with the weights."""
    whole = not is_detector(builder) or builder.startswith(DENSE)
    return [name for name in published if whole or name != "__background__"]


def metadata_of(file_name: str) -> dict[str, Any]:
    """What the name of a lone file tells of its images: the smaller ones of one builder."""
    return {"config": {"model": LOW_RESOLUTION}} if file_name.startswith(LOW_RESOLUTION) else {}


def preprocessing_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a detector resizes to and normalizes by, by its builder and its arguments."""
    given = config.get("kwargs") or {}
    own = LOW_SIDES if config["model"] == LOW_RESOLUTION else {}
    sides: dict[str, Any] = {**PREPROCESSING, **own}
    for ours, name in (("short", "min_size"), ("longest", "max_size")):
        size = given.get(name) or sides[ours]
        sides[ours] = size if isinstance(size, int) else size[-1]  # of several, in evaluation
    return {**sides, "mean": given.get("image_mean"), "std": given.get("image_std")}
