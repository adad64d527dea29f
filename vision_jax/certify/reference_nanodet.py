"""NanoDet-g in PyTorch, with the original's names, since no package carries it.

Written from the description of its config nanodet-g and the names of its modules
(https://github.com/RangiLyu/nanodet, version 0.x). tests/parity/test_real_nanodet.py compares the
model with the published network's own graph instead.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SLOPE = 0.1


class ConvNorm(nn.Module):
    """leaky_relu(bn(conv(x)))."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.bn(self.conv(x)), SLOPE)


class Block(nn.Module):
    """Half of the channels, and what another convolution makes of them before them."""

    def __init__(self, width: int):
        super().__init__()
        self.in_conv = ConvNorm(width, width // 2)
        self.mid_conv = ConvNorm(width // 2, width // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = self.in_conv(x)
        return torch.cat([self.mid_conv(half), half], dim=1)


class Stage(nn.Module):
    """Blocks on one way and nothing on the other, joined."""

    def __init__(self, width: int, depth: int, stride: int):
        super().__init__()
        self.in_conv = ConvNorm(width, width, stride)
        self.res_blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.res_out_conv = ConvNorm(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.in_conv(x)
        return torch.cat([self.res_out_conv(self.res_blocks(x)), x], dim=1)


class Lateral(nn.Module):
    """A convolution of 1 x 1, which the original's pyramid wraps."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class NanoDet(nn.Module):
    """Images [B, 3, H, W], normalized, red first -> logits [B, A, C], side_logits [B, A, 4, R]."""

    backbone: Any
    fpn: Any
    head: Any

    def __init__(
        self,
        num_classes: int = 80,
        depths: Sequence[int] = (1, 2, 2, 3),
        stem_width: int = 32,
        feat_channels: int = 128,
        reg_max: int = 10,
    ):
        super().__init__()
        stages = [
            Stage(stem_width * 2**index, depth, 2 if index else 1)
            for index, depth in enumerate(depths)
        ]
        self.num_classes, self.sides = num_classes, 4 * (reg_max + 1)
        self.backbone = nn.Module()
        self.backbone.stages = nn.ModuleList(
            [ConvNorm(3, stem_width, 2), nn.MaxPool2d(3, 2, padding=1), *stages]
        )
        self.fpn = nn.Module()
        self.fpn.lateral_convs = nn.ModuleList(
            Lateral(stem_width * 2**index, feat_channels) for index in (2, 3, 4)
        )
        self.head = nn.Module()
        self.head.cls_convs = nn.ModuleList(
            nn.ModuleList([ConvNorm(feat_channels, feat_channels)]) for _ in range(3)
        )
        self.head.gfl_cls = nn.ModuleList(
            nn.Conv2d(feat_channels, num_classes + self.sides, 1) for _ in range(3)
        )

    def forward(self, images: torch.Tensor) -> Any:
        x, found = images.flip(1), []
        for stage in self.backbone.stages:
            x = stage(x)
            found.append(x)
        fine, middle, coarse = (
            lateral(x) for lateral, x in zip(self.fpn.lateral_convs, found[-3:], strict=True)
        )
        middle = middle + F.interpolate(coarse, scale_factor=2, mode="bilinear")
        fine = fine + F.interpolate(middle, scale_factor=2, mode="bilinear")
        middle = middle + F.interpolate(fine, scale_factor=0.5, mode="bilinear")
        coarse = coarse + F.interpolate(middle, scale_factor=0.5, mode="bilinear")
        outputs = []
        for x, (conv,), last in zip(
            (fine, middle, coarse), self.head.cls_convs, self.head.gfl_cls, strict=True
        ):
            outputs.append(last(conv(x)).flatten(2).transpose(1, 2))
        logits, sides = torch.cat(outputs, dim=1).split([self.num_classes, self.sides], dim=-1)
        return SimpleNamespace(logits=logits, side_logits=sides.unflatten(-1, (4, -1)))
