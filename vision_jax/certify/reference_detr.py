"""The original DETR in PyTorch, restated: the PyTorch reference of the files of its own repository.

https://github.com/facebookresearch/detr, models/detr.py, backbone.py and transformer.py, in
evaluation mode, with its names of modules and tensors.
"""

import math
from types import SimpleNamespace

import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d


class Backbone(nn.Module):
    """torchvision's ResNet up to its last map, `body`."""

    def __init__(self, name: str, dilation: bool):
        super().__init__()
        resnet = torchvision.models.get_model(
            name,
            weights=None,
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        self.channels = resnet.fc.in_features
        self.body = IntermediateLayerGetter(resnet, {"layer4": "0"})


class Layer(nn.Module):
    """A layer of the encoder, or of the decoder."""

    def __init__(self, width: int, heads: int, mlp_width: int, decodes: bool):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        if decodes:
            self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        for index in range(2 + decodes):
            setattr(self, f"norm{index + 1}", nn.LayerNorm(width))

    def forward(self, x, positions, padding, memory=None, memory_positions=None):
        placed = x + positions
        if memory is None:
            y, _ = self.self_attn(placed, placed, x, padding, need_weights=False)
            x = self.norm1(x + y)
        else:
            y, _ = self.self_attn(placed, placed, x, need_weights=False)
            x = self.norm1(x + y)
            keys = memory + memory_positions
            y, _ = self.multihead_attn(x + positions, keys, memory, padding, need_weights=False)
            x = self.norm2(x + y)
        last = self.norm2 if memory is None else self.norm3
        return last(x + self.linear2(self.linear1(x).relu()))


class Boxes(nn.Module):
    """The three layers of `bbox_embed`."""

    def __init__(self, width: int):
        super().__init__()
        sizes = ((width, width), (width, width), (width, 4))
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def forward(self, x):
        first, second, last = self.layers
        return last(second(first(x).relu()).relu()).sigmoid()


class DETR(nn.Module):
    """Normalized images [B, 3, H, W] and pixel_mask [B, H, W], True inside -> logits, pred_boxes.

    The arguments are the options of the original's main.py.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        dilation: bool = False,
        hidden_dim: int = 256,
        nheads: int = 8,
        dim_feedforward: int = 2048,
        enc_layers: int = 6,
        dec_layers: int = 6,
        num_queries: int = 100,
        num_classes: int = 91,
    ):
        super().__init__()
        self.backbone = nn.ModuleList([Backbone(backbone, dilation)])
        self.input_proj = nn.Conv2d(self.backbone[0].channels, hidden_dim, 1)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        shared = (hidden_dim, nheads, dim_feedforward)
        encoder, decoder = nn.Module(), nn.Module()
        encoder.layers = nn.ModuleList(Layer(*shared, False) for _ in range(enc_layers))
        decoder.layers = nn.ModuleList(Layer(*shared, True) for _ in range(dec_layers))
        decoder.norm = nn.LayerNorm(hidden_dim)
        self.transformer = nn.Module()
        self.transformer.encoder, self.transformer.decoder = encoder, decoder
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = Boxes(hidden_dim)

    def forward(self, images, pixel_mask=None):
        x = self.input_proj(self.backbone[0].body(images)["0"])
        if pixel_mask is None:
            pixel_mask = torch.ones(len(images), *images.shape[2:])
        padded = 1 - pixel_mask.float()
        cells = nn.functional.interpolate(padded[None], size=x.shape[2:])[0].bool()  # [B, h, w]
        positions = sines(~cells, x.shape[1] // 2, x.dtype).flatten(1, 2)
        padding, x = cells.flatten(1), x.flatten(2).transpose(1, 2)  # [B, h·w], [B, h·w, D]
        for layer in self.transformer.encoder.layers:
            x = layer(x, positions, padding)
        queries = self.query_embed.weight.expand(len(x), -1, -1)
        y, outputs = torch.zeros_like(queries), []
        for layer in self.transformer.decoder.layers:
            y = layer(y, queries, padding, x, positions)
            outputs.append(self.transformer.decoder.norm(y))
        last = outputs[-1]
        return SimpleNamespace(
            logits=self.class_embed(last),
            pred_boxes=self.bbox_embed(last),
            auxiliary=[(self.class_embed(y), self.bbox_embed(y)) for y in outputs[:-1]],
        )


def sines(valid: torch.Tensor, features: int, dtype: torch.dtype) -> torch.Tensor:
    """Position embeddings [B, h, w, 2 · features] of the valid cells, the row's first."""
    both = []
    for axis in (1, 2):
        place = valid.cumsum(axis, dtype=dtype)
        place = place / (place.narrow(axis, place.shape[axis] - 1, 1) + 1e-6) * 2 * math.pi
        index = torch.arange(features, dtype=dtype)
        angle = place[..., None] / 10000 ** (2 * (index // 2) / features)
        pair = torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1)
        both.append(pair.flatten(-2))
    return torch.cat(both, dim=-1)
