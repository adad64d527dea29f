"""The peers' sides of benchmarks.segmenters: SegFormer and DeepLabV3 of their own libraries."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

from benchmarks import beside
from benchmarks.beside import Side
from benchmarks.peers import CLIP, DEVICE, MEAN, STD, _facts, _like, batch_of, stepping


def train(
    folder: Path,
    *,
    batch_size: int,
    image_size: int,
    classes: int,
    build: str,
    arguments: dict[str, Any] | None = None,
    how: str = "eager",
) -> Side:
    """A step of AdamW on all of the model, on the cross-entropy of all pixels at their own size."""
    model = _written(folder, build, classes, image_size, arguments or {}).to(DEVICE).train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    images, _ = batch_of(batch_size, image_size, classes, how)
    label = beside.labels(batch_size * image_size**2, classes)
    label = torch.from_numpy(label).reshape(batch_size, image_size, image_size).to(DEVICE)
    seen = _like(model, how)

    def loss() -> torch.Tensor:
        if build == "segformer":
            return seen(images, labels=label).loss
        return functional.cross_entropy(seen(images)["out"], label)

    return stepping(model, loss, CLIP["classification"], False)


def infer(
    folder: Path,
    *,
    batch_size: int,
    image_size: int,
    classes: int,
    build: str,
    arguments: dict[str, Any] | None = None,
    how: str = "eager",
) -> Side:
    """The logits at their own stride."""
    model = _written(folder, build, classes, image_size, arguments or {})
    images, _ = batch_of(batch_size, image_size, classes, how)
    seen = _like(model.to(DEVICE).eval(), how)

    def run() -> float:
        with torch.inference_mode():
            if build == "segformer":
                logits = seen(images).logits
            else:
                logits = seen.classifier(seen.backbone(images)["out"])
        return float(logits.float().square().mean())

    return Side(run, lambda: _facts(run))


def _written(
    folder: Path, build: str, classes: int, image_size: int, arguments: dict[str, Any]
) -> Any:
    """A model of random weights, written for the other sides, or read if that was done."""
    torch.manual_seed(0)
    file = folder / "model.safetensors"
    if build == "segformer":
        config = transformers.SegformerConfig(
            num_labels=classes, drop_path_rate=0.0, classifier_dropout_prob=0.0, **arguments
        )
        if file.exists():
            return transformers.SegformerForSemanticSegmentation.from_pretrained(folder)
        model = transformers.SegformerForSemanticSegmentation(config)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            model.save_pretrained(folder)
        side = {"height": image_size, "width": image_size}
        processor = transformers.SegformerImageProcessor(size=side, image_mean=MEAN, image_std=STD)
        processor.save_pretrained(folder)
        return model
    given = {"num_classes": classes, "aux_loss": False, "weights_backbone": None, **arguments}
    model = torchvision.models.get_model(build, weights=None, **given)
    if file.exists():
        model.load_state_dict(load_file(file))
        return model
    save_file(model.state_dict(), file)
    config = {"library": "torchvision", "model": build, "kwargs": given}
    preset = {"resize_size": image_size, "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preset))
    return model
