"""DETR (Carion et al. 2020, https://arxiv.org/abs/2005.12872): objects as a set of queries.

A ResNet, a transformer over its last map, and one class and one box of each query. The structure is
that of the original code (https://github.com/facebookresearch/detr) and of transformers 5.24
(models/detr/modeling_detr.py).

Exactness, where ports go wrong:
  - norms follow the branches; epsilon 1e-5; the encoder has no norm at its end, and the decoder's
    acts on the output of every layer on its way to the heads, but not on the way to the next layer
    (transformers with auxiliary_loss normalizes that too);
  - positions are added to queries and keys, not to values; the decoder starts from zeros;
  - sine positions count the valid cells from 1, rows before columns, see ops/position_embedding.py;
  - the dilated C5 (DC5) dilates all 3 x 3 convolutions of the last stage but its first;
  - the references let padded pixels into the image's features: only the attention is masked. Here
    `mask_padding=True` is the network of the image alone, whatever canvas it came on. They
    also pick each cell's mask at floor(i · H / h), which is not the cell's own center.

From random initialization the paper's queries take hundreds of epochs to find out where they look.
`grid_queries=True` tells them: each starts in a cell of a grid over the image, attends near its box
(Gao et al. 2021, https://arxiv.org/abs/2101.07448, section 3.2, with fixed offsets of the heads)
and moves it from layer to layer (Zhu et al. 2020, https://arxiv.org/abs/2010.04159, appendix A.4).
The parameters are the same.
"""

import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from vision_jax.models.attention import attend
from vision_jax.models.backbone import OnBackbone
from vision_jax.models.layers import Conv, Dense, Initializer, layer_norm
from vision_jax.models.resnet import VARIANTS as RESNETS
from vision_jax.models.resnet import ResNet
from vision_jax.models.taps import ATTENTION, make_tap
from vision_jax.ops.position_embedding import sine_positions
from vision_jax.trees.parted import INPUTS, OUTPUTS, TensorRule

EPSILON = 1e-5
LOOKS = ((-0.7, 0.0), (0.7, 0.0), (0.0, -0.7), (0.0, 0.7), (0.0, 0.0))  # of heads, see _nearness
VARIANTS: dict[str, dict[str, Any]] = {
    f"detr_resnet{n}{suffix}": {**RESNETS[f"resnet{n}"], "dilation": dilation}
    for n in (50, 101)
    for suffix, dilation in (("", False), ("_dc5", True))
}

# Query, key and value as one matrix of the original's, [3·D, D] by Xavier; and torch's own start of
# a linear layer, uniform in ±1 / √inputs.
_packed_xavier = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("detr_resnet50", "detr_resnet101_dc5"), or None."""
    return VARIANTS.get(name)


class Attention(nn.Module):
    """Attention of q[B, N, D] to k, v[B, M, D]; bias f[B, 1, 1, M] or None."""

    num_heads: int
    dtype: Any
    head_size: int | None = None

    @nn.compact
    def __call__(self, q, k, v, bias=None):
        width = q.shape[-1]
        inner = self.num_heads * self.head_size if self.head_size else width

        def project(x, name):
            x = Dense(inner, dtype=self.dtype, kernel_init=_packed_xavier, name=name)(x)
            return x.reshape(*x.shape[:2], self.num_heads, -1)  # [B, N, K, d]

        tap = make_tap(self, ATTENTION)
        x = attend(project(q, "q"), project(k, "k"), project(v, "v"), bias=bias, tap=tap)
        return Dense(width, dtype=self.dtype, name="out")(x.reshape(*q.shape[:2], inner))


class Layer(nn.Module):
    """A layer of the encoder, or of the decoder where there is a memory: norm(x + branch(x))."""

    num_heads: int
    mlp_width: int
    dropout: float
    dtype: Any
    head_size: int | None = None

    @nn.compact
    def __call__(self, x, positions, train: bool, bias=None, memory=None, memory_positions=None):
        norms = 0

        def drop(y):
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        def add(x, y):
            nonlocal norms
            norms += 1
            return layer_norm(f"norm{norms}", EPSILON, self.dtype)(x + drop(y))

        def attention(name):
            return Attention(self.num_heads, self.dtype, self.head_size, name=name)

        placed = x + positions
        if memory is None:
            x = add(x, attention("self_attn")(placed, placed, x, bias))
        else:
            x = add(x, attention("self_attn")(placed, placed, x))
            keys = memory + memory_positions
            x = add(x, attention("cross_attn")(x + positions, keys, memory, bias))
        y = nn.relu(Dense(self.mlp_width, dtype=self.dtype, name="fc1")(x))
        return add(x, Dense(x.shape[-1], dtype=self.dtype, name="fc2")(drop(y)))


class Detr(OnBackbone):
    """Images f32[B, H, W, in_channels] in [0, 1] -> logits and boxes of each query.

    Attributes:
      num_classes: K; each query has K + 1 logits, the last for "no object".
      depths, block, widths, mid_widths, stem_width: of the ResNet, as there.
      dilation: the ResNet's last stage keeps the grid of the one before (DC5).
      num_queries: Q, the most objects that an image can have.
      width: of the transformer, a multiple of 4 and of the heads.
      head_size: channels of a head; None for width / num_heads.
      num_heads, mlp_width, encoder_depth, decoder_depth: of the transformer.
      decoder_heads, decoder_mlp_width: the decoder's, if not the encoder's.
      grid_queries: queries start in a grid and attend near their boxes; not in the references.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      mask_padding: padding does not change what is computed of the image. False computes what the
        references do.
      dropout: rate in training, after each branch and inside the MLPs. The original also drops
        attention weights, which transformers and fused kernels do not.
      freeze_norm: BatchNorm keeps its running statistics in training, as in the paper.
      dtype: compute dtype; parameters stay float32. The heads compute in float32.
      remat: recompute each block and layer in the backward pass instead of keeping its activations.
    """

    num_classes: int
    depths: tuple[int, ...]
    block: Literal["basic", "bottleneck"] = "bottleneck"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    mid_widths: tuple[int, ...] = ()
    stem_width: int = 64
    dilation: bool = False
    num_queries: int = 100
    width: int = 256
    num_heads: int = 8
    head_size: int | None = None
    mlp_width: int = 2048
    encoder_depth: int = 6
    decoder_depth: int = 6
    decoder_heads: int | None = None
    decoder_mlp_width: int | None = None
    grid_queries: bool = False
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    mask_padding: bool = True
    dropout: float = 0.0
    freeze_norm: bool = True
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def tensor_rules(self) -> tuple[TensorRule, ...]:
        """What a mesh's axis `tensor` splits: the transformer; backbone and heads are whole."""
        decoder_heads = self.decoder_heads or self.num_heads
        return (*_layer_rules("encoder", self.num_heads), *_layer_rules("decoder", decoder_heads))

    @property
    def _layers_above(self) -> int:  # type: ignore[override]
        return self.encoder_depth + self.decoder_depth + 1

    def _depth_above(self, top: str) -> int:
        """The projection counts with the encoder's first layer, the queries with the decoder's."""
        first = {"encoder": 0, "decoder": self.encoder_depth}
        known = {"input_proj": 0, "query_embed": self.encoder_depth}
        part, _, index = top.partition("_")
        if part in first and index.isdigit():
            return first[part] + int(index)
        return known.get(top, self._layers_above - 1)

    @nn.compact
    def __call__(
        self, images, pixel_mask=None, *, train: bool = False, return_features: bool = False
    ):
        """Applies the model.

        Args:
          images: f32[B, H, W, in_channels] in [0, 1], of any size, padded at the bottom and right.
          pixel_mask: bool[B, H, W], True where the image is; None if nothing is padded.
          train: dropout acts, with keys from "dropout"; BatchNorm updates unless frozen.
          return_features: also return a dict of named intermediates: "stem", "stage_0" ... and
            "input_proj" as f[B, h, w, C], "encoder_0" ... as f[B, h·w, D], "decoder_0" ... (before
            the norm) as f[B, Q, D].

        Returns:
          {"logits": f32[L, B, Q, K + 1], "boxes_cxcywh_01": f32[L, B, Q, 4]} of the L layers of the
          decoder, the last of which is the prediction; boxes are relative to the image without
          its padding. Or (that, features).
        """
        if pixel_mask is None:
            pixel_mask = jnp.ones(images.shape[:3], bool)
            mask = None
        else:
            mask = pixel_mask
        backbone = self._backbone(name="backbone")
        if mask is not None and not self.mask_padding:
            # Zero after the normalization, as the references pad.
            mean = jnp.asarray(self.mean, images.dtype).reshape(1, 1, 1, -1)
            images, mask = jnp.where(mask[..., None], images, mean), None
        _, features = backbone(images, mask=mask, train=train, return_features=True)
        del features["pooled"]
        x = features[f"stage_{len(self.depths) - 1}"]
        x = Conv(self.width, (1, 1), dtype=self.dtype, kernel_init=_uniform, name="input_proj")(x)
        features["input_proj"] = x
        batch, height, width, _ = x.shape
        valid = self._cells(pixel_mask, (height, width))  # [B, h, w]
        wide = np.promote_types(self.dtype, np.float32)
        positions = sine_positions(valid, self.width, wide).astype(self.dtype)
        x, positions = (y.reshape(batch, height * width, self.width) for y in (x, positions))
        # Not minus infinity: an image that is nothing but padding would have no gradient.
        bias = jnp.where(valid.reshape(batch, 1, 1, -1), 0, jnp.finfo(wide).min / 2)

        layer_of = nn.remat(Layer, static_argnums=(3,)) if self.remat else Layer
        shared = (self.num_heads, self.mlp_width, self.dropout, self.dtype, self.head_size)
        heads = self.decoder_heads or self.num_heads
        decoding = (heads, self.decoder_mlp_width or self.mlp_width, *shared[2:])
        for index in range(self.encoder_depth):
            x = layer_of(*shared, name=f"encoder_{index}")(x, positions, train, bias)
            features[f"encoder_{index}"] = x
        shape = (self.num_queries, self.width)
        queries = self.param("query_embed", nn.initializers.normal(1.0), shape)
        queries = jnp.broadcast_to(queries.astype(self.dtype)[None], (batch, *shape))
        norm = layer_norm("decoder_norm", EPSILON, self.dtype)
        last_init = nn.initializers.zeros if self.grid_queries else _uniform
        box_head = BoxHead(self.width, wide, last_init, name="box_head")
        box = jnp.broadcast_to(jnp.asarray(_grid(self.num_queries), wide), (*queries.shape[:2], 4))
        y, outputs, boxes = jnp.zeros_like(queries), [], []
        for index in range(self.decoder_depth):
            near = bias
            if self.grid_queries:
                box = lax.stop_gradient(box)
                near = bias + _nearness(nn.sigmoid(box), valid, heads)
            layer = layer_of(*decoding, name=f"decoder_{index}")
            y = layer(y, queries, train, near, x, positions)
            features[f"decoder_{index}"] = y
            outputs.append(norm(y))
            move = box_head(outputs[-1])
            box = box + move if self.grid_queries else move
            boxes.append(nn.sigmoid(box))
        predictions = {
            "logits": Dense(
                self.num_classes + 1, dtype=wide, kernel_init=_uniform, name="class_head"
            )(jnp.stack(outputs)),  # [L, B, Q, K + 1]
            "boxes_cxcywh_01": jnp.stack(boxes),
        }
        return (predictions, features) if return_features else predictions

    def _backbone(self, **place):
        return self._built(ResNet, **place)

    def _cells(self, pixel_mask, grid):
        """bool[B, h, w]: the cells of the last map that are the image."""
        rows, columns = (
            # The cell's center, or what torch's interpolation takes, in its float32.
            np.arange(cells) * self.pyramid[-1][1]
            if self.mask_padding
            else (np.arange(cells, dtype=np.float32) * np.float32(side / cells)).astype(int)
            for side, cells in zip(pixel_mask.shape[1:], grid, strict=True)
        )
        return pixel_mask[:, rows][:, :, columns]


def _layer_rules(stack: str, num_heads: int) -> tuple[TensorRule, ...]:
    """Of a stack's layers: heads and hidden channels, each pair summed up once."""
    layers = rf"{stack}_\d+/"
    return (
        TensorRule(layers + "(self|cross)_attn/[qkv]/(kernel|bias)", OUTPUTS, num_heads),
        TensorRule(layers + "(self|cross)_attn/out/kernel", INPUTS, num_heads),
        TensorRule(layers + "fc1/(kernel|bias)", OUTPUTS),
        TensorRule(layers + "fc2/kernel", INPUTS),
    )


class BoxHead(nn.Module):
    """Three linear layers to the logits of a box."""

    width: int
    dtype: Any
    last_init: Initializer = _uniform

    @nn.compact
    def __call__(self, x):
        for index, features in enumerate((self.width, self.width, 4), 1):
            init = _uniform if index < 3 else self.last_init
            x = Dense(features, dtype=self.dtype, kernel_init=init, name=f"fc{index}")(x)
            x = nn.relu(x) if index < 3 else x
        return x


def _grid(count):
    """f64[count, 4]: logits of cxcywh_01 of the cells of a grid as square as can be."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    row, column = np.divmod(np.arange(count), columns)
    centers = (column + 0.5) / columns, (row + 0.5) / rows
    sides = (np.full(count, min(1 / cells, 0.5)) for cells in (columns, rows))
    boxes = np.stack([*centers, *sides], axis=-1)
    return np.log(boxes / (1 - boxes))


def _nearness(boxes_cxcywh_01, valid, num_heads):
    """Attention's bias f[B, K, Q, h·w] towards boxes[B, Q, 4], in the cells valid[B, h, w].

    Minus the squared distance of a cell from where the head looks: towards one side of the box, or
    at its center. The unit is half the box and half a cell.
    """
    cells = jnp.stack([valid.any(axis=1).sum(axis=1), valid.any(axis=2).sum(axis=1)], axis=-1)
    cells = jnp.maximum(cells, 1)[:, None].astype(boxes_cxcywh_01.dtype)  # [B, 1, 2]
    rows, columns = np.indices(valid.shape[1:]).reshape(2, -1)
    places = (np.stack([columns, rows], axis=-1)[None] + 0.5) / cells  # [B, h·w, 2]
    center, side = jnp.split(boxes_cxcywh_01, 2, axis=-1)  # [B, Q, 2]
    unit = (side + 1 / cells) / 2
    away = (places[:, None] - center[:, :, None]) / unit[:, :, None]  # [B, Q, h·w, 2]
    looks = jnp.array([LOOKS[head % len(LOOKS)] for head in range(num_heads)], away.dtype)
    return -jnp.square(away[:, None] - looks[None, :, None, None]).sum(axis=-1)
