"""DiT and SiT in PyTorch, whose code is in no package: written after the papers and their files.

Names and arithmetic are those of github.com/facebookresearch/DiT, models.py, which SiT shares, as
far as their checkpoints show them and the paper's section 3 and appendix A say them.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class DiT(nn.Module):
    """Inputs [B, C, H, W], times [B] and classes [B] -> noise or velocity, and perhaps variances.

    Args are those of the original, and `predicts`, what they were trained for.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        predicts: str = "noise",
    ):
        super().__init__()
        self.num_classes, self.predicts = num_classes, predicts
        self.patch_size = patch_size
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        places = positions(hidden_size, input_size // patch_size)
        self.register_buffer("pos_embed", torch.from_numpy(places).float()[None])
        width = int(hidden_size * mlp_ratio)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, width) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size)
        )
        outputs = patch_size**2 * in_channels * (2 if learn_sigma else 1)
        self.final_layer.linear = nn.Linear(hidden_size, outputs)

    def forward(self, x, t, y):
        """[B, C, H, W], or [B, 2 · C, H, W] with learn_sigma."""
        _, _, height, width = x.shape
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        x = self.final_layer.linear(modulate(x, shift, scale))
        p = self.patch_size
        x = x.reshape(len(x), height // p, width // p, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, height, width)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm that the condition scales and shifts, and gated."""

    def __init__(self, width: int, num_heads: int, mlp_width: int):
        super().__init__()
        self.num_heads = num_heads
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width)
        self.attn.proj = nn.Linear(width, width)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, mlp_width)
        self.mlp.fc2 = nn.Linear(mlp_width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        """[B, N, D] and [B, D] -> [B, N, D]."""
        numbers = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = numbers
        x = x + gate_msa[:, None] * self.attend(modulate(x, shift_msa, scale_msa))
        y = F.gelu(self.mlp.fc1(modulate(x, shift_mlp, scale_mlp)), approximate="tanh")
        return x + gate_mlp[:, None] * self.mlp.fc2(y)

    def attend(self, x):
        """Plain multi-head attention."""
        batch, tokens, width = x.shape
        qkv = self.attn.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        return self.attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class TimestepEmbedder(nn.Module):
    """Cosines and sines of the time, through an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        """[B] -> [B, D]. The frequencies are computed in the precision of t."""
        places = torch.arange(128, dtype=t.dtype)
        angles = t[:, None] * torch.exp(-math.log(10000) * places / 128)[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def modulate(x, shift, scale):
    """A norm without parameters, then what the condition says."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def positions(width: int, side: int) -> np.ndarray:
    """Sines and cosines of the column, then of the row: f64[side², D]."""
    frequencies = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    return np.concatenate([wave(a) for a in angles for wave in (np.sin, np.cos)], axis=1)
