"""Swin Transformer v1 (Liu et al. 2021, https://arxiv.org/abs/2103.14030) and v2
(https://arxiv.org/abs/2111.09883), and the v1 with searched windows (S3,
https://arxiv.org/abs/2111.14725).

Structure and names follow timm 1.0 (timm/models/swin_transformer.py, swin_transformer_v2.py): a
stage begins by merging patches, where the other libraries end the one before with it.

Exactness, where ports go wrong:
  - LayerNorm epsilon 1e-5 throughout; transformers configures all but the stem's and the merging's;
  - GELU is exact (erf);
  - the four patches of a merge come in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column);
    an odd row or column is merged with zeros; v1 normalizes before the projection, v2 after it;
  - v1 scales q by 1 / √d; v2 takes cosines times exp(min(logit_scale, log 100));
  - v2's key has no bias, its relative biases are 16 · sigmoid(MLP(log-spaced offsets)), and its
    norms follow the branches;
  - pairs that a shift brought together get -100 on their logits, not minus infinity, and -200 in
    transformers' v2, which adds its mask twice;
  - the libraries' windows differ where maps don't fill them: see `Windows`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.attention import attend
from vision_jax.models.layers import Conv, Dense, drop_path, layer_norm, normalize
from vision_jax.models.taps import OUTPUT, tap
from vision_jax.models.vit import HEAD_RULE, Mlp, block_rules
from vision_jax.trees.parted import TensorRule

EPSILON = 1e-5  # of the norms that no library configures
CPB_WIDTH = 512  # hidden width of the MLP behind v2's continuous position biases

# width, depths, heads of the first stage; the others' double as the widths do
_SIZES: dict[str, tuple[int, tuple[int, ...], int]] = {
    "tiny": (96, (2, 2, 6, 2), 3),
    "small": (96, (2, 2, 18, 2), 3),
    "base": (128, (2, 2, 18, 2), 4),
    "large": (192, (2, 2, 18, 2), 6),
}


def _arguments(size: str, image: int, *windows: int, **more: Any) -> dict[str, Any]:
    width, depths, heads = _SIZES[size]
    return {
        "image_size": (image, image),
        "width": width,
        "depths": depths,
        "num_heads": tuple(heads * 2**stage for stage in range(4)),
        "windows": tuple((side, side) for side in (windows * 4)[:4]),
        **more,
    }


def _v2(size: str, image: int, window: int, **more: Any) -> dict[str, Any]:
    return _arguments(size, image, window, version=2, **more)


_FROM_12 = {"pretrained_windows": (12, 12, 12, 6)}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"swin_{size}_patch4_window7_224": _arguments(size, 224, 7) for size in _SIZES},
    **{f"swin_{size}_patch4_window12_384": _arguments(size, 384, 12) for size in ("base", "large")},
    "swin_s3_tiny_224": _arguments("tiny", 224, 7, 7, 14, 7),
    "swin_s3_small_224": _arguments("small", 224, 14, 14, 14, 7),
    "swin_s3_base_224": _arguments("small", 224, 7, 7, 14, 7) | {"depths": (2, 2, 30, 2)},
    **{
        f"swinv2_{size}_window{window}_256": _v2(size, 256, window)
        for size in ("tiny", "small", "base")
        for window in (8, 16)
    },
    **{
        f"swinv2_{size}_{name}": arguments
        for size in ("base", "large")
        for name, arguments in (
            ("window12_192", _v2(size, 192, 12)),
            ("window12to16_192to256", _v2(size, 256, 16, **_FROM_12)),
            ("window12to24_192to384", _v2(size, 384, 24, **_FROM_12)),
        )
    },
}


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant of timm's ("swin_tiny_patch4_window7_224"), or None."""
    return VARIANTS.get(name)


@dataclass(frozen=True)
class Windows:
    """How one stage's map is divided.

    Attributes:
      grid: rows and columns of the map.
      size: of a window, (rows, columns); smaller than asked where a library clips it.
      shift: of the windows of every second block.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int]


def plan_windows(
    image_size: tuple[int, int],
    patch_size: int,
    windows: tuple[tuple[int, int], ...],
    library: str,
    version: int,
    always_partition: bool = False,
) -> tuple[Windows, ...]:
    """The windows of each stage by one library's rules.

    timm clips each side of a window to the map, and does not shift a side that it fills.
    torchvision clips nothing (the map is padded) and does not shift such a side either. In
    transformers v1 clips nothing and v2 clips a square window to the rows of a map whose odd rows
    are not counted; both shift both sides or none.
    With `always_partition` windows are neither clipped nor left where they are, by any rules.

    Raises:
      UserError: another library, or windows that are not square in transformers.
    """
    if library not in ("timm", "torchvision", "transformers"):
        raise UserError(f"library: {library!r} is none of timm, torchvision, transformers")
    rounded = -1 if library == "transformers" else 1  # up: the image is padded to whole patches
    rows, columns = (rounded * (rounded * side // patch_size) for side in image_size)
    stages = []
    for stage, (tall, wide) in enumerate(windows):
        size = (min(rows, tall), min(columns, wide)) if library == "timm" else (tall, wide)
        shift = (tall // 2 if rows > tall else 0, wide // 2 if columns > wide else 0)
        if library == "transformers":
            if tall != wide:
                raise UserError(
                    f"windows {tall} x {wide}: transformers' are square: library='timm'"
                )
            least = min(rows, columns)
            if version == 2:
                least = image_size[0] // patch_size // 2**stage
                size = (max(min(least, tall), 1),) * 2
            shift = (tall // 2 if least > tall else 0,) * 2
        if always_partition:
            size, shift = (tall, wide), (tall // 2, wide // 2)
        stages.append(Windows((rows, columns), size, shift))
        rows, columns = -(-rows // 2), -(-columns // 2)
    return tuple(stages)


def position_index(window: tuple[int, int]) -> np.ndarray:
    """i64[N, N]: row of the bias table for each pair of the window's N tokens (query, key)."""
    tokens = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij")).reshape(2, -1)  # [2, N]
    rows, columns = tokens[:, :, None] - tokens[:, None, :]  # [N, N] each
    return (rows + window[0] - 1) * (2 * window[1] - 1) + columns + window[1] - 1


def position_offsets(window: tuple[int, int], pretrained: int = 0) -> np.ndarray:
    """f32[2h - 1, 2w - 1, 2]: v2's log-spaced offsets of a window (h, w), about -1.06 to 1.06.

    `pretrained` is the side of the window that the weights were trained with, if another. The
    logarithm is rounded from float64, which is bit-identical to torch's.
    """
    sides = []
    for side in window:
        unit = np.float32(max((pretrained or side) - 1, 1))
        offsets = np.arange(1 - side, side, dtype=np.float32) / unit * np.float32(8)
        logs = np.log2((np.abs(offsets) + np.float32(1)).astype(np.float64)).astype(np.float32)
        sides.append(np.sign(offsets) * logs / np.float32(3))  # log2(8)
    return np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1)


def shift_mask(
    map_size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> np.ndarray:
    """bool[n, N, N]: pairs in each of a map's n windows that only the shift brought together."""
    regions = []
    for side, most, step in zip(map_size, window, shift, strict=True):
        place = np.arange(side)
        far = (place >= side - most).astype(int) + (place >= side - step)
        regions.append(far if step else np.zeros(side, int))
    region = 3 * regions[0][:, None] + regions[1][None]  # [H, W]
    down, across = (side // most for side, most in zip(map_size, window, strict=True))
    region = region.reshape(down, window[0], across, window[1]).transpose(0, 2, 1, 3)
    region = region.reshape(down * across, -1)  # [n, N]
    return region[:, :, None] != region[:, None, :]


class PositionBias(nn.Module):
    """v2's relative position biases from a small MLP: f[(2h - 1)·(2w - 1), K]."""

    num_heads: int
    window: tuple[int, int]
    pretrained: int
    dtype: Any

    @nn.compact
    def __call__(self):
        offsets = position_offsets(self.window, self.pretrained).reshape(-1, 2)
        x = Dense(CPB_WIDTH, dtype=self.dtype, name="hidden")(jnp.asarray(offsets))
        x = Dense(self.num_heads, use_bias=False, dtype=self.dtype, name="heads")(nn.relu(x))
        return 16 * nn.sigmoid(x)


class WindowAttention(nn.Module):
    """Self-attention inside the windows of x[B, h, w, D], shifted or not.

    The fused qkv kernel is [D, 3·D]. In v2 its bias is `qkv_bias` [3·D] beside it, whose middle
    third, the key's, is kept for the files that have one and takes no part.
    """

    num_heads: int
    window: tuple[int, int]
    shift: tuple[int, int]
    version: int
    library: str
    pretrained: int
    qkv_bias: bool
    dtype: Any
    head_size: int | None = None

    @nn.compact
    def __call__(self, x):
        rows, columns = x.shape[1:3]
        shifted = any(self.shift)

        def roll(x, sign):
            return jnp.roll(x, [sign * step for step in self.shift], (1, 2)) if shifted else x

        def pad(x):
            return pad_to(x, self.window)

        # timm pads what is shifted already, so its padding lies elsewhere.
        timm = self.library == "timm"
        x = pad(roll(x, -1)) if timm else roll(pad(x), -1)
        width, x = x.shape[-1], self._attend(x)
        x = roll(x[:, :rows, :columns], 1) if timm else roll(x, 1)[:, :rows, :columns]
        return Dense(width, dtype=self.dtype, name="proj")(x)

    def _attend(self, x):
        batch, rows, columns = x.shape[:3]
        (tall, wide), heads = self.window, self.num_heads
        down, across = rows // tall, columns // wide
        qkv = self._qkv(x)  # [B, h, w, 3·K·d], or [B, h, w, 3, K·d] where devices share heads
        heads_first = qkv.ndim > x.ndim
        qkv = qkv.reshape(batch, down, tall, across, wide, 3, heads, -1)
        # Each window's heads are heads of their own, so that biases and masks need no batch. They
        # lie as [3, B, tall, wide, down, across, K, d]; shared, with K before the windows.
        qkv = qkv.transpose(5, 0, 2, 4, *((6, 1, 3) if heads_first else (1, 3, 6)), 7)
        q, k, v = qkv.reshape(3, batch, tall * wide, down * across * heads, -1)  # [B, N, n·K, d]
        scale = None
        if self.version == 2:
            q, k, scale = self._cosine(q, down * across, heads_first), _unit(k), 1.0
            q, k = q.astype(v.dtype), k.astype(v.dtype)
        bias = self._bias(rows, columns, heads_first)  # [n·K, N, N]
        x = attend(q, k, v, bias=bias, scale=scale)
        if heads_first:
            x = x.reshape(batch, tall, wide, heads, down, across, -1)
            x = x.transpose(0, 4, 1, 5, 2, 3, 6)
        else:
            x = x.reshape(batch, tall, wide, down, across, -1).transpose(0, 3, 1, 4, 2, 5)
        return x.reshape(batch, rows, columns, -1)

    def _qkv(self, x):
        width = self.num_heads * self.head_size if self.head_size else x.shape[-1]
        plain = self.version == 1 and self.qkv_bias
        x = Dense(3 * width, use_bias=plain, dtype=self.dtype, name="qkv")(x)
        if self.version == 2 and self.qkv_bias:
            bias = self.param("qkv_bias", nn.initializers.zeros, (3 * width,))
            bias = bias.at[width : 2 * width].set(0)
            x = x + bias.astype(x.dtype).reshape(1, 1, 1, *x.shape[3:])
        return x

    def _cosine(self, q, windows, heads_first):
        init = nn.initializers.constant(math.log(10))
        logit_scale = self.param("logit_scale", init, (self.num_heads, 1, 1))
        scale = jnp.exp(jnp.minimum(logit_scale, math.log(100)))
        each = jnp.repeat(scale, windows, 0) if heads_first else jnp.tile(scale, (windows, 1, 1))
        return _unit(q) * each.reshape(1, 1, -1, 1)

    def _bias(self, rows, columns, heads_first):
        dtype = np.promote_types(self.dtype, np.float32)
        tall, wide = self.window
        if self.version == 1:
            table = self.param(
                "relative_position_bias_table",
                nn.initializers.truncated_normal(0.02),
                ((2 * tall - 1) * (2 * wide - 1), self.num_heads),
            ).astype(dtype)
        else:
            table = PositionBias(
                self.num_heads, self.window, self.pretrained, dtype, name="cpb_mlp"
            )()
        bias = table[position_index(self.window)].transpose(2, 0, 1)[None]  # [1, K, N, N]
        windows, tokens = rows // tall * (columns // wide), tall * wide
        if any(self.shift):
            apart = -200.0 if (self.library, self.version) == ("transformers", 2) else -100.0
            mask = shift_mask((rows, columns), self.window, self.shift)  # [n, N, N]
            bias = bias + jnp.asarray(apart * mask[:, None], dtype)
        bias = jnp.broadcast_to(bias, (windows, self.num_heads, tokens, tokens))
        bias = bias.swapaxes(0, 1) if heads_first else bias
        return bias.reshape(windows * self.num_heads, tokens, tokens)


class Block(nn.Module):
    """Windowed attention and an MLP as residual branches; v1 normalizes before them, v2 after."""

    attention: dict[str, Any]
    shift: tuple[int, int]
    hidden_width: int
    activation: str
    layer_norm_eps: float

    @nn.compact
    def __call__(self, x, rate, train: bool):
        version, dtype = self.attention["version"], self.attention["dtype"]

        def branch(x, index, layer):
            # A post-norm starts at zero, so that a deep network starts as its shortcuts.
            init = nn.initializers.zeros if version == 2 else nn.initializers.ones
            norm = layer_norm(f"norm{index}", self.layer_norm_eps, dtype, init)
            x = norm(layer(x)) if version == 2 else layer(norm(x))
            return drop_path(x, rate, self.make_rng("dropout")) if train and rate else x

        x = x + branch(x, 1, WindowAttention(**self.attention, shift=self.shift, name="attn"))
        return x + branch(x, 2, Mlp(self.hidden_width, self.activation, False, dtype, name="mlp"))


class PatchMerging(nn.Module):
    """x[B, h, w, D] -> [B, h / 2, w / 2, 2·D], odd sides rounded up."""

    version: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = pad_to(x, (2, 2))
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, width).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, rows // 2, columns // 2, 4 * width)
        norm = layer_norm("norm", EPSILON, self.dtype)
        reduction = Dense(2 * width, use_bias=False, dtype=self.dtype, name="reduction")
        return reduction(norm(x)) if self.version == 1 else norm(reduction(x))


class Stage(nn.Module):
    """Patch merging, except in the first stage, then blocks, every second one shifted.

    `block` are the arguments that all blocks share; `rates` of drop_path, one a block.
    """

    block: dict[str, Any]
    shift: tuple[int, int]
    rates: tuple[float, ...]
    merge: bool
    remat: bool

    @nn.compact
    def __call__(self, x, train: bool):
        if self.merge:
            attention = self.block["attention"]
            x = PatchMerging(attention["version"], attention["dtype"], name="downsample")(x)
        block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
        for index, rate in enumerate(self.rates):
            shift = self.shift if index % 2 else (0, 0)
            x = block(**self.block, shift=shift, name=f"block_{index}")(x, rate, train)
        return tap(self, OUTPUT, x)


class Swin(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, num_classes].

    Attributes:
      num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
      image_size: (height, width) in pixels.
      depths: blocks of each stage.
      num_heads: of each stage.
      windows: (rows, columns) of each stage's windows in tokens, before clipping.
      width: channels of the first stage; each further one has twice as many.
      version: 1 or 2.
      library: whose rules hold where a map does not fill its windows ("timm", "torchvision",
        "transformers"); see `plan_windows`. An image that does not fill its patches is cut, by
        transformers padded.
      always_partition: windows are as large as said and shifted on any map, and images of any size,
        as transformers' SwinBackbone has it (v1) for dense predictions.
      pretrained_windows: in v2, the side of each stage's window in the training that the weights
        come from, which the offsets are counted in; 0 or () for the window's own.
      patch_size: pixels a side.
      mlp_ratio: hidden width of the MLPs by their width, rounded down.
      mlp_widths: each stage's hidden width, where pruning has left others than follow from
        `mlp_ratio`; () otherwise.
      head_size: channels of a head; None for width / num_heads, of each stage.
      layer_norm_eps: of the blocks' norms and the last one.
      in_channels: of the images; `mean` and `std` have as many entries.
      dropout, drop_path: rates in training; drop_path grows linearly with depth up to its value.
      mean, std: per-channel normalization of the images in [0, 1].
      dtype: compute dtype; parameters stay float32. The head computes in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    num_classes: int
    image_size: tuple[int, int]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    width: int = 96
    version: Literal[1, 2] = 1
    library: Literal["timm", "torchvision", "transformers"] = "timm"
    always_partition: bool = False
    pretrained_windows: tuple[int, ...] = ()
    patch_size: int = 4
    in_channels: int = 3
    mlp_ratio: float = 4.0
    mlp_widths: tuple[int, ...] = ()
    head_size: int | None = None
    qkv_bias: bool = True
    activation: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    drop_path: float = 0.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dtype: Any = jnp.float32
    remat: bool = False

    stem: ClassVar[str] = "patch_embed/kernel"

    @property
    def pyramid(self) -> tuple[tuple[str, int], ...]:
        """Named features and their stride in pixels, from fine to coarse."""
        return tuple((f"stage_{i}", self.patch_size * 2**i) for i in range(len(self.depths)))

    @property
    def size_divisor(self) -> int:
        """Of an image's sides: of others the last pixels would be cut off."""
        return 1 if self.library == "transformers" else self.patch_size

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay."""
        return sum(self.depths) + 2

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the embedding 0, then block by block, what follows last.

        As in timm, merged patches belong to the block that they enter, and the final norm counts
        with the last block.
        """
        top, _, rest = path.partition("/")
        if top.startswith("stage_"):
            stage, block = int(top.removeprefix("stage_")), rest.split("/")[0]
            index = 0 if block == "downsample" else int(block.removeprefix("block_"))
            return sum(self.depths[:stage]) + index + 1
        last = sum(self.depths)
        return {"patch_embed": 0, "patch_norm": 0, "norm": last}.get(top, last + 1)

    @property
    def tensor_rules(self) -> tuple[TensorRule, ...]:
        """What a mesh's axis `tensor` splits; a stage whose heads it does not divide is whole."""
        stages = [
            block_rules(heads, blocks=rf"stage_{index}/block_\d+/")
            for index, heads in enumerate(self.num_heads)
        ]
        return (*(rule for rules in stages for rule in rules), HEAD_RULE)

    @nn.compact
    def __call__(
        self,
        images,
        *,
        train: bool = False,
        return_features: bool | Literal["maps"] = False,
    ):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1]; of any size with `always_partition`.
          train: dropout and drop_path act, with keys from the "dropout" collection.
          return_features: also return a dict of named intermediates: "embed" and "stage_0" ... as
            f[B, h, w, C], and "pooled" f[B, D]. "maps" leaves out all that follows the last stage.

        Returns:
          logits f32[B, num_classes], or (logits, features), the former None of maps alone.
        """
        if images.shape[1:3] != self.image_size and not self.always_partition:
            raise ValueError(f"images are {images.shape[1:3]}, the model takes {self.image_size}")
        x = self._embed(normalize(images, self.mean, self.std))  # [B, h, w, D]
        features = {"embed": x}
        for index, windows in enumerate(self._plan(images.shape[1:3])):
            x = self._stage(index, windows)(x, train)
            features[f"stage_{index}"] = x
        if return_features == "maps":
            return None, features
        x = layer_norm("norm", self.layer_norm_eps, self.dtype)(x)
        pooled = x.mean((1, 2))  # [B, D]
        features["pooled"] = pooled
        if self.num_classes:
            if train and self.dropout:
                pooled = nn.Dropout(self.dropout, deterministic=False)(pooled)
            dtype = np.promote_types(self.dtype, np.float32)
            init = nn.initializers.zeros
            pooled = Dense(self.num_classes, dtype=dtype, kernel_init=init, name="head")(pooled)
        return (pooled, features) if return_features else pooled

    def _plan(self, image_size):
        stages = {"depths": self.depths, "num_heads": self.num_heads, "windows": self.windows}
        if len(set(map(len, stages.values()))) > 1 or self.version not in (1, 2):
            raise UserError(f"swin: version is 1 or 2, and {', '.join(stages)} say it by stage")
        rules = (self.library, self.version, self.always_partition)
        return plan_windows(image_size, self.patch_size, self.windows, *rules)

    def _embed(self, x):
        patch = (self.patch_size, self.patch_size)
        if self.library == "transformers":
            x = pad_to(x, patch)
        x = Conv(self.width, patch, patch, dtype=self.dtype, name="patch_embed")(x)
        return layer_norm("patch_norm", EPSILON, self.dtype)(x)

    def _stage(self, index, windows):
        before, last = sum(self.depths[:index]), max(sum(self.depths) - 1, 1)
        attention = {
            "num_heads": self.num_heads[index],
            "window": windows.size,
            "version": self.version,
            "library": self.library,
            "pretrained": self.pretrained_windows[index] if self.pretrained_windows else 0,
            "qkv_bias": self.qkv_bias,
            "dtype": self.dtype,
            "head_size": self.head_size,
        }
        hidden = int(2**index * self.width * self.mlp_ratio)
        return Stage(
            {
                "attention": attention,
                "hidden_width": self.mlp_widths[index] if self.mlp_widths else hidden,
                "activation": self.activation,
                "layer_norm_eps": self.layer_norm_eps,
            },
            shift=windows.shift,
            rates=tuple(self.drop_path * (before + i) / last for i in range(self.depths[index])),
            merge=index > 0,
            remat=self.remat,
            name=f"stage_{index}",
        )


def pad_to(x: jax.Array, multiple: tuple[int, int]) -> jax.Array:
    """x[B, h, w, C] with zeros at the bottom and right, up to multiples of both sides."""
    bottom, right = (-side % most for side, most in zip(x.shape[1:3], multiple, strict=True))
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def _unit(x: jax.Array) -> jax.Array:
    """x[..., d] / max(‖x‖, 1e-12), in float32 or better; its gradient at zero is finite."""
    x = x.astype(np.promote_types(x.dtype, np.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
