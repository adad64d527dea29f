"""torchvision's Faster R-CNN as a function of normalized images, for comparing raw outputs.

By itself it takes a list of images, resizes them, and gives detections alone.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers


def raw(model: Any) -> Any:
    """The model itself, whose `forward` takes images and gives what `outputs` does."""
    model.forward = partial(outputs, model)
    return model


def outputs(model: Any, images: torch.Tensor) -> SimpleNamespace:
    """Raw outputs of images [B, 3, H, W] that are normalized and not padded.

    rpn_logits [B, A] and rpn_deltas [B, A, 4] of all anchors; proposals_xyxy_px [B, R, 4], zero
    where `proposed` [B, R] is, and their logits [B, R, K + 1] and deltas [B, R, K + 1, 4].
    """
    batch, sizes = len(images), [tuple(images.shape[2:])] * len(images)
    features = model.backbone(images)
    scored = concat_box_prediction_layers(*model.rpn.head(list(features.values())))
    rpn_logits, rpn_deltas = (x.reshape(batch, -1, x.shape[-1]) for x in scored)
    found, _ = model.rpn(ImageList(images, sizes), features)
    count = model.rpn.post_nms_top_n()
    proposals = torch.stack([_padded(boxes, count) for boxes in found])
    bins = model.roi_heads.box_roi_pool(features, list(proposals), sizes)
    logits, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(bins))
    return SimpleNamespace(
        rpn_logits=rpn_logits[..., 0],
        rpn_deltas=rpn_deltas,
        proposals_xyxy_px=proposals,
        proposed=torch.stack([_padded(torch.ones(len(x), 1), count)[:, 0] for x in found]),
        logits=logits.reshape(batch, count, -1),
        deltas=deltas.reshape(batch, count, -1, 4),
    )


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, count - len(rows)))
