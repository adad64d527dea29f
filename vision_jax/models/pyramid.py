"""A feature pyramid over a backbone's maps, and the canvas that each image sees on it.

FPN (Lin et al. 2017, https://arxiv.org/abs/1612.03144) as torchvision 0.29 has it
(ops/feature_pyramid_network.py): 1 x 1 convolutions of the maps, to which the coarser map is added
with each cell four times, and 3 x 3 convolutions of the sums, without a ReLU. Beyond the coarsest
map there is every second cell of its level (Faster R-CNN's), or there are P6 and P7 by convolutions
of stride 2 with a ReLU between them (RetinaNet's).

An image is seen on a canvas of its own, its sides rounded up to multiples of 32 and filled with the
mean color, as torchvision has it of one image. What lies beyond, on a batch's canvas, is zero after
each layer, so that nothing depends on it; torchvision's results do.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.models.backbone import OnBackbone
from vision_jax.models.efficientnet import each
from vision_jax.models.layers import BatchNorm, Conv, Initializer, masked
from vision_jax.ops import anchors

STRIDE = 32  # an image's own canvas is a multiple of it
# An image's sides, as torchvision's detectors resize it by themselves.
PREPROCESSING = {
    "short": 800,
    "longest": 1333,
    "rule": "torchvision",
    "interpolation": "bilinear_aliased",
}
# torch's own start of a pyramid: uniform in ±√(3 / inputs).
_uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class ConvNorm(nn.Module):
    """norm(conv(x)), or conv(x) with a bias, padded such that it keeps the size."""

    features: int
    size: int
    kernel_init: Initializer
    norm: bool
    frozen: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        sides = (self.size // 2,) * 2
        x = Conv(
            self.features,
            (self.size, self.size),
            padding=(sides, sides),
            use_bias=not self.norm,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )(x)
        if not self.norm:
            return x
        return BatchNorm(frozen=self.frozen, dtype=self.dtype, name="bn")(x, train)


class Pyramid(nn.Module):
    """Maps f[B, h, w, C] from fine to coarse -> maps f[B, h, w, D], and one level more or two.

    Attributes:
      width: D.
      norm: convolutions have norms in place of biases.
      frozen: of the norms.
      coarser: two levels more, P6 and P7, where there is one otherwise.
      of_map: P6 is of the coarsest map, not of its level.
    """

    width: int
    norm: bool
    frozen: bool
    dtype: Any
    coarser: bool = False
    of_map: bool = False

    @nn.compact
    def __call__(self, maps, masks, train: bool):
        """masks: bool[B, h, w] or None of each map and, behind them, of P6 and P7."""

        def conv(name, size, x, mask):
            rest = (self.norm, self.frozen, self.dtype)
            layer = ConvNorm(self.width, size, _uniform, *rest, name=name)
            return masked(layer(x, train), mask)

        levels: list[Any] = []
        above = None
        for index in reversed(range(len(maps))):
            x = conv(f"inner_{index}", 1, maps[index], masks[index])
            if above is not None:
                x = x + (above if above.shape == x.shape else _repeated(above, x.shape))
            above = x
            levels.insert(0, conv(f"layer_{index}", 3, above, masks[index]))
        if not self.coarser:
            return [*levels, levels[-1][:, ::2, ::2]]
        p6 = self._halved("p6", maps[-1] if self.of_map else levels[-1], masks[len(maps)])
        return [*levels, p6, self._halved("p7", nn.relu(p6), masks[len(maps) + 1])]

    def _halved(self, name, x, mask):
        layer = Conv(
            self.width,
            (3, 3),
            (2, 2),
            ((1, 1), (1, 1)),
            dtype=self.dtype,
            kernel_init=_uniform,
            name=name,
        )
        return masked(layer(x), mask)


def _repeated(x, shape):
    """x[B, h, w, C] with each cell four times: [B, 2·h, 2·w, C]."""
    batch, height, width, channels = shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height // 2, 2, width // 2, 2, channels))
    return x.reshape(shape)


def inside(grid, counts):
    """bool[B, h, w]: the first counts[B, 2] rows and columns of a grid (h, w)."""
    rows, columns = (
        jnp.arange(side)[None] < counts[:, axis, None] for axis, side in enumerate(grid)
    )
    return rows[:, :, None] & columns[:, None, :]


class OnPyramid(OnBackbone):
    """What detectors on a pyramid have in common; a model says its `_backbone`, `_maps`, `_more`.

    `_maps` are the features of it that levels are made of, with their strides from fine to coarse;
    `_more` is how many levels there are beyond them.
    """

    _more = 1
    _layers_above = 2  # the pyramid, and all heads

    @property
    def _maps(self) -> tuple[tuple[str, int], ...]:
        return self.pyramid

    def _depth_above(self, top: str) -> int:
        return 0 if top == "fpn" else 1

    def _canvas(self, images, pixel_mask):
        """Images on a canvas of a multiple of 32, filled up with the mean color.

        Returns:
          (images, sizes i32[B, 2] of the images without padding, extents i32[B, 2] of their own
          canvases, masks of these: bool[B, h, w] of the canvas and of each level, or None).
        """
        batch, *canvas = images.shape[:3]
        more = [(0, -side % STRIDE) for side in canvas]
        if pixel_mask is None:
            sizes = jnp.broadcast_to(jnp.array([canvas]), (batch, 2))
        else:
            sides = [pixel_mask.any(axis=axis).sum(1) for axis in (2, 1)]
            sizes = jnp.maximum(jnp.stack(sides, axis=1).astype(jnp.int32), 1)
        extents = -(-sizes // STRIDE) * STRIDE
        images = jnp.pad(images, ((0, 0), *more, (0, 0)))
        grid = images.shape[1:3]
        if pixel_mask is not None or any(after for _, after in more):
            mean = jnp.asarray(self._backbone(parent=None).mean, images.dtype).reshape(1, 1, 1, -1)
            images = jnp.where(inside(grid, sizes)[..., None], images, mean)
        if pixel_mask is None:
            return images, sizes, extents, [None] * (1 + len(self._maps) + self._more)
        mask = inside(grid, extents)
        masks = [mask, *(mask[:, ::stride, ::stride] for _, stride in self._maps)]
        for _ in range(self._more):
            masks.append(masks[-1][:, ::2, ::2])
        return images, sizes, extents, masks

    def _anchors(self, levels, extents, sizes, ratios):
        """Of each level its anchors f[B, N, 4] in pixels, and which lie on the image's canvas.

        They step by the canvas's side // the cells of a level, which beyond the coarsest map may be
        61 where 64 would be its stride.
        """
        boxes, there = [], []
        for index, (x, size) in enumerate(zip(levels, sizes, strict=True)):
            cells = extents // self._maps[min(index, len(self._maps) - 1)][1]
            for _ in range(index - len(self._maps) + 1):
                cells = -(-cells // 2)
            grid = x.shape[1:3]
            base = anchors.base_anchors(each(size, 1), ratios)
            strides = (extents // cells).astype(np.promote_types(x.dtype, np.float32))
            boxes.append(anchors.grid_anchors(base, grid, strides))
            within = inside(grid, cells).reshape(cells.shape[0], -1)
            there.append(jnp.repeat(within, len(base), axis=1))
        return boxes, there
