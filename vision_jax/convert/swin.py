"""Tables for Swin Transformers: timm, Microsoft's own files, torchvision, and transformers.

Sources: timm 1.0 swin_transformer.py and swin_transformer_v2.py; torchvision 0.29
models/swin_transformer.py; transformers 5.23 models/swin and models/swinv2 (whose v1 has other names
in memory than in its files); https://github.com/microsoft/Swin-Transformer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.engine import (
    CONV,
    FUSE_LINEAR,
    LINEAR,
    Fixed,
    Layout,
    Rule,
    Rules,
    affine,
    fused,
    norm,
    one,
    tree_shapes,
)
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table, fill_prefix, pair
from vision_jax.errors import UserError
from vision_jax.models.swin import (
    EPSILON,
    VARIANTS,
    Swin,
    Windows,
    plan_windows,
    position_index,
    position_offsets,
)
from vision_jax.ops.position_embedding import resample_relative_positions

# q's and v's bias of the file in one of ours, whose middle third is nobody's: [D] × 2, [3·D].
_FUSE_Q_V = Layout(
    lambda xs: [np.concatenate([xs[0], np.zeros_like(xs[0]), xs[1]])],
    lambda xs: [xs[0][: len(xs[0]) // 3], xs[0][2 * (len(xs[0]) // 3) :]],
)

# transformers' names of activations by ours; timm's are ours.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
    "relu6": "relu6",
}
_TORCHVISION = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_s": "swinv2_small_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
}
_STRUCTURE = (
    "depths",
    "num_heads",
    "windows",
    "width",
    "version",
    "pretrained_windows",
    "patch_size",
    "mlp_ratio",
    "qkv_bias",
    "activation",
)
_DEFAULTS = {name: getattr(Swin, name) for name in _STRUCTURE if hasattr(Swin, name)}


@dataclass(frozen=True)
class _Names:
    """What one kind of file calls its modules.

    `stage` and `block` are filled in by `at` and `merging`; `scale` is what torchvision counts
    stages by, and `merging_first` whether a stage begins with the merging or ends with it.
    """

    library: str
    patches: str
    patch_norm: str
    block: str
    merging: str
    merging_first: bool
    norms: tuple[str, str]
    attention: str
    qkv: tuple[str, ...]
    proj: str
    mlp: tuple[str, str]
    table: str = "relative_position_bias_table"
    cpb_mlp: str = "cpb_mlp"
    final_norm: str = "norm"
    head: str = "head"
    scale: tuple[int, int] = (1, 0)

    def at(self, stage: int | str, block: int | str) -> str:
        """The name of a block."""
        times, plus = self.scale
        number = stage if isinstance(stage, str) else times * stage + plus
        return self.block.format(stage=number, block=block)

    def merge(self, stage: int) -> str:
        """The name of the merging through which a stage is entered."""
        times = self.scale[0]
        return self.merging.format(stage=times * stage - (not self.merging_first))


_TIMM = _Names(
    "timm",
    "patch_embed.proj",
    "patch_embed.norm",
    "layers.{stage}.blocks.{block}",
    "layers.{stage}.downsample",
    True,
    ("norm1", "norm2"),
    "attn",
    ("qkv",),
    "attn.proj",
    ("mlp.fc1", "mlp.fc2"),
    head="head.fc",
)
