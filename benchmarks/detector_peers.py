"""The peers' sides of benchmarks/detectors.py: torchvision and pixeltable-yolox.

Weights are random, with the statistics of the batch and heads whose scores are spread out, so that
suppression has something to do. `how` as in peers.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import save_file
from yolox.models import YoloxModule
from yolox.utils import postprocess

from benchmarks import beside, peers
from benchmarks.beside import Side
from benchmarks.peers import DEVICE
from vision_jax.certify.reference_yolox import Yolox

FROZEN = ("backbone.body.conv1", "backbone.body.layer1")  # besides every BatchNorm
BUILDER = "fasterrcnn_resnet50_fpn"
# Its weights stay next to what they are. Random ones that learn further propose fewer boxes, soon
# a tenth of the 512 samples, and the peer computes that much less; real ones propose enough.
RATE = 1e-9
# Of the outputs of random heads: enough boxes score more than the least that counts.
SPREAD = {
    "rpn.head.cls_logits": 2.0,
    "rpn.head.bbox_pred": 0.3,
    "roi_heads.box_predictor.cls_score": 2.5,
    "roi_heads.box_predictor.bbox_pred": 1.5,
}
HEADS = {f"head.{kind}.{i}": 2.0 for kind in ("cls_preds", "obj_preds") for i in range(3)}


def train(
    folder: Path,
    *,
    family: str,
    batch_size: int,
    image_size: int,
    classes: int,
    arguments: dict[str, Any] | None = None,
    how: str = "eager",
) -> Side:
    """A step of AdamW.

    Args:
      folder: where the weights are written.
      family: "faster_rcnn", of which the stem, the first stage and all norms are frozen, or
        "yolox".
      batch_size: images of a step.
      image_size: pixels a side.
      classes: without one for none.
      arguments: of the model.
      how: see peers.py.
    """
    images, boxes, labels = _batch(batch_size, image_size, classes, how)
    if family == "yolox":
        yolox = _yolox(folder, images, classes, arguments or {}).train()
        targets = torch.cat([labels[..., None].float(), boxes * image_size], dim=-1)
        seen = peers._like(yolox, how)
        return peers.stepping(
            yolox, lambda: seen(images * 255, targets)["total_loss"], peers.CLIP["detection"], False
        )
    rcnn = _faster_rcnn(folder, images, classes, image_size, arguments or {}).train()
    for module in rcnn.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    for name, parameter in rcnn.named_parameters():
        if name.startswith(FROZEN):
            parameter.requires_grad_(False)
    half = boxes[..., 2:] / 2
    corners = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1) * image_size
    wanted = [{"boxes": each, "labels": of + 1} for each, of in zip(corners, labels, strict=True)]
    seen = peers._like(rcnn, how)
    return peers.stepping(
        rcnn,
        lambda: torch.stack(list(seen(list(images), wanted).values())).sum(),
        peers.CLIP["detection"],
        False,
        RATE,
    )


def infer(
    folder: Path,
    *,
    family: str,
    batch_size: int,
    image_size: int,
    classes: int,
    arguments: dict[str, Any] | None = None,
    how: str = "eager",
) -> Side:
    """From images to boxes, suppression included; the value is the mean of the ten best scores."""
    images, _, _ = _batch(batch_size, image_size, classes, how)
    if family == "yolox":
        yolox = _yolox(folder, images, classes, arguments or {}).eval()

        def detect() -> list[torch.Tensor]:
            outputs = YoloxModule.forward(yolox, (images * 255).flip(1))
            return [one[:, 4] * one[:, 5] for one in postprocess(outputs, classes, 0.01, 0.65)]
    else:
        rcnn = _faster_rcnn(folder, images, classes, image_size, arguments or {}).eval()
        model = peers._like(rcnn, how)

        def detect() -> list[torch.Tensor]:
            return [one["scores"] for one in model(list(images))]

    def run() -> float:
        with torch.inference_mode():
            scores = detect()
        return float(np.mean([one.sort(descending=True)[0][:10].mean().item() for one in scores]))

    return Side(run, lambda: peers._facts(run))


def nms(folder: Path, *, batch_size: int, boxes: int, classes: int, how: str = "eager") -> Side:
    """torchvision's class-wise NMS of one image after the other; the value is how many are left."""
    del folder, how
    found = [torch.from_numpy(x).to(DEVICE) for x in beside.crowd(batch_size, boxes, classes)]

    def run() -> float:
        with torch.inference_mode():
            kept = [torchvision.ops.batched_nms(*each, 0.5) for each in zip(*found, strict=True)]
        return float(sum(map(len, kept)))

    return Side(run)


def _batch(count: int, size: int, classes: int, how: str) -> tuple[torch.Tensor, ...]:
    """Images f32[B, 3, H, W] in [0, 1], boxes as cxcywh of the image's sides, labels."""
    images, _ = peers.batch_of(count, size, classes, how, normalized=False)
    boxes = torch.from_numpy(beside.boxes(count)).to(DEVICE)
    labels = torch.from_numpy(beside.labels(boxes.shape[0] * boxes.shape[1], classes)).to(DEVICE)
    return images, boxes, labels.reshape(boxes.shape[:2])


def _faster_rcnn(folder: Path, images: Any, classes: int, size: int, arguments: dict) -> Any:
    torch.manual_seed(0)
    given = {"num_classes": classes + 1, "min_size": size, "max_size": size, **arguments}
    model = torchvision.models.get_model(BUILDER, weights=None, weights_backbone=None, **given)
    normalized = model.transform(list(images))[0].tensors
    _settle(model.backbone, lambda: model.backbone(normalized))
    _spread(model.eval(), lambda: model(list(images)))
    _write(folder, model, {"library": "torchvision", "model": BUILDER, "kwargs": given})
    return model.to(DEVICE)


def _yolox(folder: Path, images: Any, classes: int, arguments: dict) -> Any:
    torch.manual_seed(0)
    given = {"num_classes": classes, **arguments}
    model = Yolox(**given)
    for name in HEADS:  # they begin with next to no objects
        torch.nn.init.zeros_(model.get_submodule(name).bias)
    _settle(model, lambda: model.backbone(images * 255))
    _spread(model.eval(), lambda: model(images * 255), HEADS)
    _write(folder, model, given)
    return model.to(DEVICE)


def _settle(model: Any, forward: Callable[[], Any]) -> None:
    """Each BatchNorm's statistics are those of the batch."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        forward()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _spread(model: Any, forward: Callable[[], Any], spreads: dict[str, float] = SPREAD) -> None:
    """Scales heads until their outputs have these standard deviations."""
    for name, spread in spreads.items():
        head, seen = model.get_submodule(name), []
        hook = head.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.flatten()))
        with torch.no_grad():
            forward()
            scale = spread / torch.cat(seen).std()
            for parameter in head.parameters():
                parameter *= scale
        hook.remove()


def _write(folder: Path, model: Any, config: dict[str, Any]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
