"""torchvision's RetinaNet and FCOS as functions of normalized images, for comparing raw outputs.

By themselves they take a list of images, resize them, and give detections alone.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch


def raw(model: Any) -> Any:
    """The model itself, whose `forward` takes images and gives what `outputs` does."""
    model.forward = partial(outputs, model)
    return model


def outputs(model: Any, images: torch.Tensor) -> SimpleNamespace:
    """Raw outputs of images [B, 3, H, W] that are normalized and not padded.

    logits [B, A, C] of all anchors or points, and a RetinaNet's box_deltas [B, A, 4], or an FCOS'
    distances [B, A, 4] and center_logits [B, A].
    """
    said = model.head(list(model.backbone(images).values()))
    if "bbox_ctrness" not in said:
        return SimpleNamespace(logits=said["cls_logits"], box_deltas=said["bbox_regression"])
    return SimpleNamespace(
        logits=said["cls_logits"],
        distances=said["bbox_regression"],
        center_logits=said["bbox_ctrness"][..., 0],
    )
