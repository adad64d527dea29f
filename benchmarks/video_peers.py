"""The peer's side of benchmarks/video.py: PyAV, PyTorch and torchvision, as people join them."""

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import batched_nms

from benchmarks.beside import Side
from vision_jax import load
from vision_jax.certify.reference_nanodet import ConvNorm, NanoDet
from vision_jax.convert import arguments_of, export_weights
from vision_jax.trees.paths import flatten
from vision_jax.video import track

SCORE, LEAST, OVERLAP = 0.3, 0.05, 0.6
SIDE, STRIDES, BINS = 416, (8, 16, 32), 11
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Found(NamedTuple):
    """What a frame has."""

    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def watch(folder: Path, *, video: str, batch_size: int, rows: int, how: str = "eager") -> Side:
    """`batch_size` frames, in batches of `rows`; `how` as in peers.py."""
    model = build()
    if how == "channels":
        model = model.to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (MEAN, STD))
    centers, strides = points()

    def detect(frames: list[np.ndarray]) -> list[Found]:
        height, width = frames[0].shape[:2]
        scale = min(SIDE / height, SIDE / width)
        view = int(height * scale), int(width * scale)
        images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
        images = F.interpolate(images, size=view, mode="bilinear", align_corners=False)
        images = F.pad(images.round() / 255, (0, SIDE - view[1], 0, SIDE - view[0]))
        outputs = model((images - mean) / std)
        chance = torch.softmax(outputs.side_logits, dim=-1)
        sides = (chance * torch.arange(BINS)).sum(-1) * strides
        boxes = torch.cat([centers - sides[..., :2], centers + sides[..., 2:]], dim=-1)
        boxes = boxes * torch.tensor([width / view[1], height / view[0]] * 2)
        return [suppress(*one) for one in zip(outputs.logits.sigmoid(), boxes, strict=True)]

    @torch.inference_mode()
    def step() -> float:
        state, total = track.init(), 0.0
        waiting: list[tuple[Fraction, np.ndarray]] = []
        with av.open(video) as container:
            container.streams.video[0].thread_count = 1
            for index, frame in enumerate(container.decode(video=0)):
                waiting.append((frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")))
                if len(waiting) == rows or index + 1 == batch_size:
                    found = detect([pixels for _, pixels in waiting])
                    for (time, _), boxes in zip(waiting, found, strict=True):
                        state, tracks = track.update(state, boxes, time)
                        total += sum(one.score for one in tracks)
                    waiting = []
                if index + 1 == batch_size:
                    break
        return total

    return Side(step)


def build() -> torch.nn.Module:
    """NanoDet-g with the embedded weights, its norms in the convolutions."""
    loaded = load("embedded:nanodet_coco")
    flat = {name: np.asarray(value) for name, value in flatten(loaded.variables["params"]).items()}
    flat |= {
        name: np.asarray(value) for name, value in flatten(loaded.variables["batch_stats"]).items()
    }
    tensors, _ = export_weights(flat, "nanodet", arguments_of(loaded.model), to="nanodet")
    model = NanoDet()
    state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    model.eval()
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = torch.nn.Identity()
    return model


def points() -> tuple[torch.Tensor, torch.Tensor]:
    """(x and y f[A, 2] of the points in pixels, strides f[A, 1])."""
    centers, strides = [], []
    for stride in STRIDES:
        y, x = (torch.from_numpy(np.indices((SIDE // stride,) * 2).reshape(2, -1)) + 0.5) * stride
        centers.append(torch.stack([x, y], dim=-1))
        strides.append(torch.full((len(x), 1), float(stride)))
    return torch.cat(centers).float(), torch.cat(strides)


def suppress(scores: torch.Tensor, boxes: torch.Tensor) -> Found:
    """Scores [A, C] and boxes [A, 4] without what a better box of the class covers."""
    place, label = torch.nonzero(scores > LEAST, as_tuple=True)
    score, box = scores[place, label], boxes[place]
    kept = batched_nms(box, score, label, OVERLAP)[:100]
    kept = kept[score[kept] >= SCORE]
    return Found(box[kept].numpy(), score[kept].numpy(), label[kept].numpy())
