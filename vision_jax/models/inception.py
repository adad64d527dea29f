"""Inception v3 (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567), and the one of the FID.

Structure and names follow torchvision (torchvision/models/inception.py). The weights that an FID
is measured with (Heusel et al. 2017, https://arxiv.org/abs/1706.08500) come from TensorFlow, of the
5th of December 2015, and pool otherwise.

Exactness, where ports go wrong:
  - BatchNorm: epsilon 1e-3, momentum 0.1; convolutions have no bias;
  - the stem and the blocks that halve the size do not pad;
  - average pooling counts the padding; of the FID it does not, and its last block takes the
    largest;
  - the classes of the FID's are 1,008.
"""

from functools import reduce
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.layers import BatchNorm, Conv, Dense, normalize
from vision_jax.models.tangents import max_pool
from vision_jax.models.taps import OUTPUT, tap
from vision_jax.trees.products import taps

UNIT = 16  # of which every width of the published model is a multiple
LEAST_SIZE = 75  # pixels a side: less than one cell is left of fewer

# A branch is its convolutions (name, width, kernel, strides), one after the other; those whose
# names end in a and b see the same, and stand side by side.
Layer = tuple[str, int, tuple[int, int], int]
STEM: tuple[Layer, ...] = (
    ("conv_1a", 32, (3, 3), 2),
    ("conv_2a", 32, (3, 3), 1),
    ("conv_2b", 64, (3, 3), 1),
    ("conv_3b", 80, (1, 1), 1),
    ("conv_4a", 192, (3, 3), 1),
)


def _double3(width: int) -> tuple[Layer, ...]:
    return (
        ("branch3x3dbl_1", width, (1, 1), 1),
        ("branch3x3dbl_2", 96, (3, 3), 1),
    )


def _fine(pooled: int) -> tuple[tuple[Layer, ...], ...]:
    return (
        (("branch1x1", 64, (1, 1), 1),),
        (("branch5x5_1", 48, (1, 1), 1), ("branch5x5_2", 64, (5, 5), 1)),
        (*_double3(64), ("branch3x3dbl_3", 96, (3, 3), 1)),
        (("branch_pool", pooled, (1, 1), 1),),
    )


def _middle(width: int) -> tuple[tuple[Layer, ...], ...]:
    return (
        (("branch1x1", 192, (1, 1), 1),),
        (
            ("branch7x7_1", width, (1, 1), 1),
            ("branch7x7_2", width, (1, 7), 1),
            ("branch7x7_3", 192, (7, 1), 1),
        ),
        (
            ("branch7x7dbl_1", width, (1, 1), 1),
            ("branch7x7dbl_2", width, (7, 1), 1),
            ("branch7x7dbl_3", width, (1, 7), 1),
            ("branch7x7dbl_4", width, (7, 1), 1),
            ("branch7x7dbl_5", 192, (1, 7), 1),
        ),
        (("branch_pool", 192, (1, 1), 1),),
    )


_COARSE: tuple[tuple[Layer, ...], ...] = (
    (("branch1x1", 320, (1, 1), 1),),
    (
        ("branch3x3_1", 384, (1, 1), 1),
        ("branch3x3_2a", 384, (1, 3), 1),
        ("branch3x3_2b", 384, (3, 1), 1),
    ),
    (
        ("branch3x3dbl_1", 448, (1, 1), 1),
        ("branch3x3dbl_2", 384, (3, 3), 1),
        ("branch3x3dbl_3a", 384, (1, 3), 1),
        ("branch3x3dbl_3b", 384, (3, 1), 1),
    ),
    (("branch_pool", 192, (1, 1), 1),),
)
# The blocks in order; those that halve the size have a branch of the largest pixels besides.
BLOCKS: dict[str, tuple[tuple[Layer, ...], ...]] = {
    "mixed_5b": _fine(32),
    "mixed_5c": _fine(64),
    "mixed_5d": _fine(64),
    "mixed_6a": (
        (("branch3x3", 384, (3, 3), 2),),
        (*_double3(64), ("branch3x3dbl_3", 96, (3, 3), 2)),
    ),
    "mixed_6b": _middle(128),
    "mixed_6c": _middle(160),
    "mixed_6d": _middle(160),
    "mixed_6e": _middle(192),
    "mixed_7a": (
        (("branch3x3_1", 192, (1, 1), 1), ("branch3x3_2", 320, (3, 3), 2)),
        (
            ("branch7x7x3_1", 192, (1, 1), 1),
            ("branch7x7x3_2", 192, (1, 7), 1),
            ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, (3, 3), 2),
        ),
    ),
    "mixed_7b": _COARSE,
    "mixed_7c": _COARSE,
}
_LAYERS = (*(name for name, *_ in STEM), *BLOCKS)


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of "inception_v3", and of "inception_fid", that of the FID; None for others."""
    return {"inception_v3": {}, "inception_fid": FID}.get(name)


# (x - 128) / 128 of whole pixels, as the graph of the FID's has it.
FID: dict[str, Any] = {"fid": True, "mean": (128 / 255,) * 3, "std": (128 / 255,) * 3}


class ConvNorm(nn.Module):
    """relu(norm(conv(x)))."""

    features: int
    kernel: tuple[int, int]
    strides: int
    padded: bool
    freeze_norm: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        padding = [(side // 2,) * 2 if self.padded else (0, 0) for side in self.kernel]
        x = Conv(
            self.features,
            self.kernel,
            (self.strides,) * 2,
            padding,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            name="conv",
        )(x)
        norm = BatchNorm(epsilon=1e-3, frozen=self.freeze_norm, dtype=self.dtype, name="bn")
        return nn.relu(norm(x, train))


class Block(nn.Module):
    """Branches of convolutions side by side, and one behind a pool."""

    branches: tuple[tuple[Layer, ...], ...]
    unit: int
    fid: bool
    largest: bool
    freeze_norm: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        halves = any(strides > 1 for branch in self.branches for *_, strides in branch)

        def layer(y, name, width, kernel, strides):
            sizes = (width * self.unit // UNIT, kernel, strides, strides == 1)
            return ConvNorm(*sizes, self.freeze_norm, self.dtype, name=name)(y, train)

        outputs = []
        for branch in self.branches:
            y = self._pooled(x) if branch[0][0] == "branch_pool" else x
            beside = [one for one in branch if one[0].endswith(("a", "b"))]
            for one in branch[: len(branch) - len(beside)]:
                y = layer(y, *one)
            outputs += [layer(y, *one) for one in beside] or [y]
        if halves:
            outputs.append(max_pool(x, 3, 2))
        return tap(self, OUTPUT, jnp.concatenate(outputs, axis=-1))

    def _pooled(self, x):
        """The mean or the largest of 3 x 3 pixels; those outside are 0, below which nothing is."""
        around = ((1, 1), (1, 1))
        seen = list(taps((1, 1), around, 1, x, window=(3, 3)))
        if self.largest:
            return reduce(jnp.maximum, seen)
        count = np.full((1, *x.shape[1:3], 1), 9)
        if self.fid:
            sides = x.shape[1:3]
            rows, columns = (np.convolve(np.ones(side), np.ones(3))[1:-1] for side in sides)
            count = np.outer(rows, columns)[None, ..., None]
        return sum(seen[1:], start=seen[0]) * jnp.asarray(1 / count, x.dtype)


class Inception(nn.Module):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits f[B, num_classes].

    Attributes:
      num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
      fid: pools as the weights that an FID is measured with do.
      unit: every width is a multiple of it; 16 is the published model.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      dropout: rate in training, before the head.
      freeze_norm: BatchNorm keeps its running statistics in training.
      dtype: compute dtype; parameters stay float32. The head computes in float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    num_classes: int
    fid: bool = False
    unit: int = UNIT
    in_channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dropout: float = 0.0
    freeze_norm: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    stem: ClassVar[str] = "conv_1a/conv/kernel"
    # Without padding maps lose their borders: they have no stride that divides an image.
    pyramid: ClassVar[tuple[tuple[str, int], ...]] = ()

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay."""
        return len(_LAYERS) + 1

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the stem's convolutions, then block by block, the head last."""
        top = path.split("/")[0]
        return _LAYERS.index(top) if top in _LAYERS else len(_LAYERS)

    @nn.compact
    def __call__(self, images, *, train: bool = False, return_features: bool = False):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of 75 pixels a side or more; 299 as trained.
          train: BatchNorm takes the batch's statistics and updates its own (collection
            "batch_stats") unless frozen; dropout acts, with keys from "dropout".
          return_features: also return a dict of named intermediates: each convolution of the stem
            and each block, "conv_1a" ... "mixed_7c", as f[B, h, w, C], and "pooled" f[B, D].

        Returns:
          logits f32[B, num_classes], or (logits, features).

        Raises:
          UserError: smaller images.
        """
        lacking = [max(LEAST_SIZE - side, 0) for side in images.shape[1:3]]
        if self.is_initializing():  # parameters are the same for every size
            images = jnp.pad(images, ((0, 0), *((0, more) for more in lacking), (0, 0)))
        elif any(lacking):
            raise UserError(
                f"inception: images of {images.shape[1]} x {images.shape[2]} pixels: it takes "
                f"{LEAST_SIZE} a side or more, 299 as it was trained"
            )
        x = normalize(images, self.mean, self.std)
        features = {}
        for name, width, kernel, strides in STEM:
            sizes = (width * self.unit // UNIT, kernel, strides, name == "conv_2b")
            x = ConvNorm(*sizes, self.freeze_norm, self.dtype, name=name)(x, train)
            features[name] = x
            if name in ("conv_2b", "conv_4a"):
                x = max_pool(x, 3, 2)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for name, branches in BLOCKS.items():
            largest = self.fid and name == "mixed_7c"
            pools = (self.fid, largest, self.freeze_norm, self.dtype)
            x = features[name] = block(branches, self.unit, *pools, name=name)(x, train)
        features["pooled"] = logits = pooled = x.mean((1, 2))  # [B, D]
        if self.num_classes:
            if train and self.dropout:
                pooled = nn.Dropout(self.dropout, deterministic=False)(pooled)
            dtype = np.promote_types(self.dtype, np.float32)
            zeros = nn.initializers.zeros
            logits = Dense(self.num_classes, dtype=dtype, kernel_init=zeros, name="head")(pooled)
        return (logits, features) if return_features else logits
