"""RF-DETR (Robinson et al. 2025, https://arxiv.org/abs/2511.09554): DINOv2 in windows and a DETR.

A DINOv2 whose blocks attend within windows or globally, one map of its features, the map's best
cells as proposals, and a decoder that samples the map around them (LW-DETR,
https://arxiv.org/abs/2406.03459). The structure is that of transformers 5.24
(models/rf_detr/modeling_rf_detr.py) and of the package rfdetr 1.11.

Exactness, where ports go wrong:
  - each window has a class token of its own; the blocks of `global_blocks` attend to all tokens of
    the image, all class tokens among them;
  - a feature of depth i is what leaves block i - 1, but `global_blocks` are numbered from 0;
  - the backbone's one final norm acts on each of the features; no feature, no block: the last block
    of the base variant is in the files and of no effect;
  - epsilon 1e-6 in the backbone and of the projector's last norm, 1e-5 in the decoder and the
    proposals; inside the projector 1e-6 (rfdetr) or 1e-5 (transformers' default): an argument;
  - position embeddings are resampled to the image's grid bicubically with antialiasing, at each
    call, in float32; their table need not have the grid of any image (base: 37 x 37 at 560 pixels);
  - boxes are (dx, dy) · size + center and exp(dw, dh) · size, without a sigmoid; proposals start as
    5 % of the image around their cell, and cells nearer than 1 % to the edge are none;
  - the boxes that the decoder starts from get no gradient from it, its learned offsets of them do;
    the layers do not refine them further;
  - queries embed their box as 4 sines in the order y, x, w, h, of frequencies rounded to float32;
  - offsets of the sampling points are in half box sizes, divided by the number of points;
  - in training there are `num_groups` sets of queries and of proposal heads, which don't attend to
    each other; for inference the first one is left;
  - class heads have as many logits as classes; the published weights have 91, of which 0 is unused.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.models.detr import EPSILON, Attention, BoxHead
from vision_jax.models.layers import Conv, Dense, layer_norm, normalize
from vision_jax.models.taps import OUTPUT, tap
from vision_jax.models.vit import SIZES, Block
from vision_jax.ops.deformable import sample_weighted
from vision_jax.ops.position_embedding import resize_weights, sine_boxes

BACKBONE_EPSILON = 1e-6
PROPOSAL_SIZE = 0.05  # of the image
EDGE = 0.01


def _published(image_size: int, decoder_depth: int, **others: Any) -> dict[str, Any]:
    return {
        "image_size": (image_size, image_size),
        "position_grid": image_size // 16,
        "decoder_depth": decoder_depth,
        **others,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "rf_detr_nano": _published(384, 2),
    "rf_detr_small": _published(512, 3),
    "rf_detr_medium": _published(576, 4),
    "rf_detr_large": _published(704, 4),
    "rf_detr_base": _published(
        560,
        3,
        position_grid=37,
        patch_size=14,
        num_windows=4,
        feature_depths=(2, 5, 8, 11),
        global_blocks=(2, 5, 8, 11),
    ),
}

# torch's own start of linear layers and convolutions, uniform in ±1 / √inputs.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_one_percent = nn.initializers.constant(-float(np.log(99)))  # the sigmoid of it


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of a named variant ("rf_detr_nano"), or None."""
    return VARIANTS.get(name)


class Backbone(nn.Module):
    """DINOv2 in windows: f[B, H, W, C] normalized -> maps f[B, h, w, D], one a feature depth."""

    position_grid: int
    patch_size: int
    num_windows: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    feature_depths: tuple[int, ...]
    global_blocks: tuple[int, ...]
    drop_path: float
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, images, train: bool):
        size = (self.patch_size, self.patch_size)
        x = Conv(self.width, size, size, dtype=self.dtype, name="patch_embed")(images)
        batch, side, windows = x.shape[0], x.shape[1], self.num_windows
        token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width))
        table = (1, 1 + self.position_grid**2, self.width)
        positions = self.param("pos_embed", nn.initializers.normal(0.02), table)
        token = (token + positions[:, :1]).astype(self.dtype)
        x = x + self._resampled(positions[:, 1:], side).astype(self.dtype)

        within = side // windows
        x = x.reshape(batch, windows, within, windows, within, self.width)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch * windows**2, within**2, self.width)
        token = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
        x = jnp.concatenate([token, x], axis=1)  # [B·n², 1 + N, D]

        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        outputs = [x]
        for index in range(self.depth):
            shape = x.shape
            if index in self.global_blocks:
                x = x.reshape(batch, -1, self.width)  # [B, n²·(1 + N), D]
            x = block(
                self.num_heads,
                self.mlp_width,
                layer_scale=1.0,
                layer_norm_eps=BACKBONE_EPSILON,
                dtype=self.dtype,
                name=f"block_{index}",
            )(x, self.drop_path or None, train)
            x = x.reshape(shape)
            outputs.append(x)

        norm = layer_norm("norm", BACKBONE_EPSILON, self.dtype)
        maps = []
        for depth in self.feature_depths:
            x = norm(outputs[depth])[:, 1:]
            x = x.reshape(batch, windows, windows, within, within, self.width)
            x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side, side, self.width)
            maps.append(x)
        return maps

    def _resampled(self, positions, side):
        grid = positions.reshape(1, self.position_grid, self.position_grid, -1)
        if side == self.position_grid:
            return grid
        weights = jnp.asarray(resize_weights(self.position_grid, side), positions.dtype)
        return jnp.einsum("Hh,bhwd,Ww->bHWd", weights, grid, weights)


def _conv_norm(index, x, features, size, epsilon, dtype):
    """silu(norm(conv(x))), with the names conv1 and norm1 of index 1."""
    pad = (size // 2, size // 2)
    x = Conv(
        features,
        (size, size),
        padding=(pad, pad),
        use_bias=False,
        dtype=dtype,
        kernel_init=_uniform,
        name=f"conv{index}",
    )(x)
    return nn.silu(layer_norm(f"norm{index}", epsilon, dtype)(x))


class ProjectorBlock(nn.Module):
    """Two 3 x 3 convolutions."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        for index in (1, 2):
            x = _conv_norm(index, x, x.shape[-1], 3, self.epsilon, self.dtype)
        return x


class Projector(nn.Module):
    """Maps side by side -> one map f[B, h, w, D]: C2f, as in YOLOv8, and a norm."""

    width: int
    hidden_width: int
    num_blocks: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, maps):
        rest = (self.epsilon, self.dtype)
        x = jnp.concatenate(maps, axis=-1)
        x = _conv_norm(1, x, 2 * self.hidden_width, 1, *rest)
        parts = jnp.split(x, 2, axis=-1)
        for index in range(self.num_blocks):
            parts.append(ProjectorBlock(*rest, name=f"block_{index}")(parts[-1]))
        x = _conv_norm(2, jnp.concatenate(parts, axis=-1), self.width, 1, *rest)
        return tap(self, OUTPUT, layer_norm("norm", BACKBONE_EPSILON, self.dtype)(x))


class DeformableAttention(nn.Module):
    """Queries f[B, Q, D] read a map f[B, h, w, D] at points that they choose around their boxes."""

    num_heads: int
    num_points: int
    dtype: Any

    @nn.compact
    def __call__(self, queries, boxes, memory, valid):
        batch, count, width = queries.shape
        wide = np.promote_types(self.dtype, np.float32)
        heads, points = self.num_heads, self.num_points
        value = Dense(width, dtype=self.dtype, name="value")(memory)
        value = jnp.where(valid[..., None], value, 0)
        value = value.reshape(*value.shape[:3], heads, -1)  # [B, h, w, K, d]

        def zeros(features, name, **arguments):
            return Dense(
                features, dtype=wide, kernel_init=nn.initializers.zeros, name=name, **arguments
            )(queries)

        offsets = zeros(heads * points * 2, "offsets", bias_init=self._directions)
        offsets = offsets.reshape(batch, count, heads, points, 2)
        weights = zeros(heads * points, "weights").reshape(batch, count, heads, points)
        boxes = boxes[:, :, None, None]  # [B, Q, 1, 1, 4]
        xy = boxes[..., :2] + offsets / points * boxes[..., 2:] * 0.5
        x = sample_weighted(value, xy, nn.softmax(weights)).reshape(batch, count, width)
        return Dense(width, dtype=self.dtype, name="out")(x)

    def _directions(self, key, shape, dtype=jnp.float32):
        """Each head starts in a direction of its own, its points at 1, 2, ... steps."""
        angle = np.arange(self.num_heads) * 2 * np.pi / self.num_heads
        xy = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        xy /= np.abs(xy).max(axis=-1, keepdims=True)  # [K, 2]
        steps = np.arange(1, self.num_points + 1)
        return jnp.asarray(xy[:, None] * steps[:, None], dtype).reshape(shape)  # [K · P · 2]


class Layer(nn.Module):
    """norm(x + branch(x)): attention within each group, to the map, and an MLP."""

    num_heads: int
    cross_heads: int
    num_points: int
    mlp_width: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, positions, boxes, memory, valid, groups: int, train: bool):
        norms = 0

        def drop(y):
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        def add(x, y):
            nonlocal norms
            norms += 1
            return layer_norm(f"norm{norms}", EPSILON, self.dtype)(x + drop(y))

        def split(x):
            return x.reshape(-1, x.shape[1] // groups, x.shape[2])  # [B·G, Q/G, D]

        placed = split(x + positions)
        y = Attention(self.num_heads, self.dtype, name="self_attn")(placed, placed, split(x))
        x = add(x, y.reshape(x.shape))
        y = DeformableAttention(self.cross_heads, self.num_points, self.dtype, name="cross_attn")(
            x + positions, boxes, memory, valid
        )
        x = add(x, y)
        y = nn.relu(Dense(self.mlp_width, dtype=self.dtype, name="fc1")(x))
        return add(x, Dense(x.shape[-1], dtype=self.dtype, name="fc2")(drop(y)))


def _box_head(width, dtype):
    """The head of shifts and log scales; at first, none."""
    return BoxHead(width, dtype, nn.initializers.zeros, name="box_head")


def _class_head(num_classes, dtype):
    return Dense(
        num_classes, dtype=dtype, kernel_init=_uniform, bias_init=_one_percent, name="class_head"
    )


def _moved(boxes, deltas):
    """Boxes (cx, cy, w, h) moved by (dx, dy) sizes and scaled by exp(dw, dh)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    center = deltas[..., :2] * size + center
    return jnp.concatenate([center, jnp.exp(deltas[..., 2:]) * size], axis=-1)


class Proposals(nn.Module):
    """One group's first stage: the classes and boxes of the cells with the highest logits.

    memory f[B, N, D], boxes f[B, N, 4], valid bool[B, N] -> f[B, Q, K], f[B, Q, 4].
    """

    num_classes: int
    num_queries: int
    dtype: Any

    @nn.compact
    def __call__(self, memory, boxes, valid):
        width = memory.shape[-1]
        wide = np.promote_types(self.dtype, np.float32)
        x = Dense(width, dtype=self.dtype, name="proj")(memory)
        x = layer_norm("norm", EPSILON, self.dtype)(x)
        logits = _class_head(self.num_classes, wide)(x)
        score = jnp.where(valid, logits.max(axis=-1), -jnp.inf)
        _, best = jax.lax.top_k(jax.lax.stop_gradient(score), self.num_queries)
        x, logits, boxes = (
            jnp.take_along_axis(values, best[..., None], axis=1) for values in (x, logits, boxes)
        )
        return logits, _moved(boxes, _box_head(width, wide)(x))


class RfDetr(nn.Module):
    """Square images f32[B, H, H, in_channels] in [0, 1] -> logits and boxes of each query.

    Attributes:
      num_classes: K, a logit of its own each (sigmoid).
      image_size: (height, width) in pixels, the same, that the weights are for. Images of another
        size are taken too, with patches and windows that divide it.
      position_grid: side of the table of position embeddings.
      decoder_depth: layers of the decoder.
      patch_size: pixels a side.
      num_windows: a side; blocks attend within a window but for `global_blocks`.
      feature_depths: after how many blocks the projector reads the backbone.
      backbone_width, backbone_depth, backbone_heads, backbone_mlp_width: of the DINOv2.
      width: of the projector and the decoder, a multiple of 4 and of all heads.
      projector_width: inside the projector.
      projector_blocks: of two convolutions each.
      projector_eps: of the norms inside the projector.
      num_queries: the most objects that an image can have.
      num_groups: groups of as many queries each in training.
      num_heads, cross_heads: of the decoder's attention among queries and to the map.
      num_points: that a query reads of the map, for each head.
      mlp_width: of the decoder.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      dropout: rate in training, in the decoder after each branch and inside the MLPs.
      drop_path: rate in training, the same for each block of the backbone.
      dtype: compute dtype; parameters stay float32. Boxes and logits compute in float32.
      remat: recompute each block and layer in the backward pass instead of keeping its activations.
    """

    num_classes: int
    image_size: tuple[int, int]
    position_grid: int
    decoder_depth: int
    patch_size: int = 16
    num_windows: int = 2
    feature_depths: tuple[int, ...] = (3, 6, 9, 12)
    global_blocks: tuple[int, ...] = (3, 6, 9)
    backbone_width: int = SIZES["s"][0]
    backbone_depth: int = SIZES["s"][1]
    backbone_heads: int = SIZES["s"][2]
    backbone_mlp_width: int = SIZES["s"][3]
    width: int = 256
    projector_width: int = 128
    projector_blocks: int = 3
    projector_eps: float = 1e-6
    num_queries: int = 300
    num_groups: int = 13
    num_heads: int = 8
    cross_heads: int = 16
    num_points: int = 2
    mlp_width: int = 2048
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    stem: ClassVar[str] = "backbone/patch_embed/kernel"

    @property
    def pyramid(self) -> tuple[tuple[str, int], ...]:
        """Named features and their stride in pixels."""
        return (("memory", self.patch_size),)

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay, which acts on the backbone alone, as in rfdetr."""
        return self.feature_depths[-1] + 3

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: embeddings 0, block i at i + 1, all others on top."""
        top, _, rest = path.partition("/")
        if top != "backbone" or rest.startswith("norm/"):
            return self.num_layers - 1
        if rest.startswith("block_"):
            return int(rest.split("/")[0].removeprefix("block_")) + 1
        return 0

    @nn.compact
    def __call__(
        self, images, pixel_mask=None, *, train: bool = False, return_features: bool = False
    ):
        """Applies the model.

        Args:
          images: f32[B, H, H, in_channels] in [0, 1]. The references squash each image to a square
            and so does this model's preprocessing; padding at the bottom and right is possible.
          pixel_mask: bool[B, H, H], True where the image is; None if nothing is padded. As in the
            references padding makes no proposals and is not read by the decoder, but the backbone
            attends to it.
          train: all groups of queries, group after group; dropout and drop_path act, with keys from
            "dropout".
          return_features: also return a dict of named intermediates: "feature_0" ... of the
            backbone and "memory" as f[B, h, w, C], "reference" as f[B, Q, 4] and "decoder_0" ...
            (after the norm) as f[B, Q, D].

        Returns:
          {"logits": f32[L, B, Q, K], "boxes_cxcywh_01": f32[L, B, Q, 4]} of the L layers of the
          decoder, the last of which is the prediction, and of the proposals {"encoder_logits":
          f32[B, Q, K], "encoder_boxes_cxcywh_01": f32[B, Q, 4]}. Q is num_queries, in training
          num_groups · num_queries. Or (that, features).
        """
        self._check(images)
        images = normalize(images, self.mean, self.std)
        if pixel_mask is None:
            pixel_mask = jnp.ones(images.shape[:3], bool)
        else:  # zero after the normalization, as the references pad
            images = jnp.where(pixel_mask[..., None], images, 0)
        maps = self._backbone(images, train)
        features = {f"feature_{index}": x for index, x in enumerate(maps)}
        memory = Projector(
            self.width,
            self.projector_width,
            self.projector_blocks,
            self.projector_eps,
            self.dtype,
            name="projector",
        )(maps)
        features["memory"] = memory
        wide = np.promote_types(self.dtype, np.float32)
        valid = pixel_mask[:, :: self.patch_size, :: self.patch_size]  # [B, h, w]
        ratio = jnp.stack([valid[:, 0].mean(-1, wide), valid[:, :, 0].mean(-1, wide)], axis=-1)
        ratio = jnp.where(ratio > 0, ratio, 1)  # an image that is nothing but padding
        ratio = jnp.tile(ratio, 2)[:, None]  # [B, 1, 4]: of the canvas that is the image

        groups = self.num_groups if train else 1
        logits, boxes = self._proposals(memory, valid, ratio, groups)
        count = groups * self.num_queries
        init, total = nn.initializers.normal(1.0), self.num_groups * self.num_queries
        x = self.param("query_embed", init, (total, self.width))[:count]
        moves = self.param("box_embed", nn.initializers.zeros, (total, 4))[:count]
        x = jnp.broadcast_to(x.astype(self.dtype)[None], (images.shape[0], count, self.width))
        reference = _moved(jax.lax.stop_gradient(boxes), moves.astype(wide)[None])
        features["reference"] = reference
        placed = reference * ratio
        positions = sine_boxes(placed, self.width // 2).astype(self.dtype)  # [B, Q, 2·D]
        for index in (1, 2):
            name = f"position_fc{index}"
            positions = Dense(self.width, dtype=self.dtype, name=name)(positions)
            positions = nn.relu(positions) if index == 1 else positions

        layer = nn.remat(Layer, static_argnums=(6, 7)) if self.remat else Layer
        norm, outputs = layer_norm("decoder_norm", EPSILON, self.dtype), []
        for index in range(self.decoder_depth):
            x = layer(
                self.num_heads,
                self.cross_heads,
                self.num_points,
                self.mlp_width,
                self.dropout,
                self.dtype,
                name=f"decoder_{index}",
            )(x, positions, placed, memory, valid, groups, train)
            outputs.append(norm(x))
            features[f"decoder_{index}"] = outputs[-1]
        y = jnp.stack(outputs)  # [L, B, Q, D]
        predictions = {
            "logits": _class_head(self.num_classes, wide)(y),
            "boxes_cxcywh_01": _moved(reference[None], _box_head(self.width, wide)(y)),
            "encoder_logits": logits,
            "encoder_boxes_cxcywh_01": boxes,
        }
        return (predictions, features) if return_features else predictions

    def _check(self, images):
        height, width = images.shape[1:3]
        unit = self.patch_size * self.num_windows
        if height != width or height % unit:
            raise ValueError(
                f"images are {(height, width)}: RF-DETR takes squares of a multiple of {unit} "
                "pixels (patch_size · num_windows)"
            )
        if (cells := (height // self.patch_size) ** 2) < self.num_queries:
            raise ValueError(
                f"images of {height} pixels have {cells} cells for {self.num_queries} queries: "
                "take larger images or a smaller num_queries"
            )

    def _backbone(self, images, train):
        return Backbone(
            self.position_grid,
            self.patch_size,
            self.num_windows,
            self.backbone_width,
            self.backbone_depth,
            self.backbone_heads,
            self.backbone_mlp_width,
            self.feature_depths,
            self.global_blocks,
            self.drop_path,
            self.dtype,
            self.remat,
            name="backbone",
        )(images, train)

    def _proposals(self, memory, valid, ratio, groups):
        """Each group's classes f[B, Q, K] and boxes f[B, Q, 4], side by side."""
        batch, height, width, _ = memory.shape
        rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        centers = np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=-1)
        centers = jnp.asarray(centers.reshape(1, -1, 2), ratio.dtype) / ratio[..., :2]  # [B, N, 2]
        inside = ((centers > EDGE) & (centers < 1 - EDGE)).all(axis=-1)
        valid = valid.reshape(batch, -1) & inside  # [B, N]
        boxes = jnp.concatenate([centers, jnp.full_like(centers, PROPOSAL_SIZE)], axis=-1)
        boxes = jnp.where(valid[..., None], boxes, 0)
        memory = jnp.where(valid[..., None], memory.reshape(batch, height * width, -1), 0)
        # The unused groups' parameters exist all the same.
        needed = self.num_groups if self.is_initializing() else groups
        found = [
            Proposals(self.num_classes, self.num_queries, self.dtype, name=f"proposals_{index}")(
                memory, boxes, valid
            )
            for index in range(needed)
        ][:groups]
        return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
