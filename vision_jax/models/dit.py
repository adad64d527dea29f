"""DiT (Peebles and Xie 2022, https://arxiv.org/abs/2212.09748): a ViT that makes images from noise.

One transformer for all of them: DiT, which predicts the noise of a DDPM's step, SiT (Ma et al.
2024, https://arxiv.org/abs/2401.08740), which predicts the velocity of a flow, both in latents, and
JiT's way (Li and He 2025, https://arxiv.org/abs/2511.13720), which predicts the image in pixels.
The blocks are a ViT's, whose norms are shifted and scaled, and whose branches are gated, by what
the time and the class say. Names and structure follow github.com/facebookresearch/DiT, models.py.

Exactness, where ports go wrong:
  - no norm has parameters of its own; epsilon is 1e-6, but for diffusers' norm before the MLP,
    which has 1e-5;
  - the MLP's GELU is the tanh approximation;
  - the time's angles are t · 10000^(-i / 128), in diffusers t · 10000^(-i / 127), cosines before
    sines; frequencies are rounded to float32 on the way, as torch does;
  - the six numbers of a block are shift, scale and gate of the attention, then of the MLP;
  - a patch's outputs are by row, column and channel; the second half of the channels is the
    variance, where it is learned;
  - what a SiT is given is a time from 0, noise, to 1, image, as it is and not times 1000.
"""

import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models import tangents
from vision_jax.models.layers import Conv, Dense, normalize
from vision_jax.models.scanned import scan_blocks
from vision_jax.models.taps import NORMED, tap
from vision_jax.models.vit import Attention, Mlp, block_rules
from vision_jax.ops.position_embedding import grid_positions
from vision_jax.trees.parted import INPUTS, OUTPUTS, TensorRule

FREQUENCIES = 256  # cosines and sines of the time
_SIZES = {  # width, depth, heads
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
}
HEADS = {width: heads for width, _, heads in _SIZES.values()}  # which no tensor shows
_NAME = re.compile(r"(dit|sit|jit)[-_](s|b|l|xl)[-_/](\d{1,2})")


def variant(name: str) -> dict[str, Any] | None:
    """Arguments of "dit_xl_2", "sit_b_4", "jit_b_16" (or "DiT-XL/2") and the like; None for others.

    DiT's and SiT's are of latents of 32 x 32 cells, images of 256 pixels, with learned variances;
    JiT's of the pixels themselves.
    """
    match = _NAME.fullmatch(name.lower())
    if match is None:
        return None
    kind, size, patch = match.groups()
    width, depth, num_heads = _SIZES[size]
    arguments: dict[str, Any] = {
        "image_size": (256, 256) if kind == "jit" else (32, 32),
        "patch_size": int(patch),
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_width": 4 * width,
    }
    if kind == "jit":
        return {**arguments, "in_channels": 3, "predicts": "image"}
    return {
        **arguments,
        "learned_variance": True,
        "predicts": "noise" if kind == "dit" else "velocity",
    }


class Block(nn.Module):
    """x + gate1 · attn(shifted and scaled norm of x), then the same of the MLP."""

    num_heads: int
    mlp_width: int
    mlp_norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x, condition):
        """x[B, N, D], condition[B, D]."""
        width = x.shape[-1]
        numbers = Dense(6 * width, dtype=self.dtype, kernel_init=_ZEROS, name="ada")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(numbers[:, None], 6, axis=-1)
        y = tap(self, NORMED, modulated(x, shift1, scale1, 1e-6))
        y, _ = Attention(self.num_heads, True, False, 1e-6, self.dtype, name="attn")(y)
        x = x + gate1 * y
        y = modulated(x, shift2, scale2, self.mlp_norm_eps)
        return x + gate2 * Mlp(self.mlp_width, "gelu_tanh", False, self.dtype, name="mlp")(y)


class Dit(nn.Module):
    """Noisy images or latents f32[B, H, W, in_channels], times and classes -> what they are of.

    Attributes:
      num_classes: that it can be asked for; one more, the last of `class_embed`, says none.
      image_size: (height, width) of the input: cells of the latents, or pixels.
      patch_size: cells a side.
      width, depth, num_heads, mlp_width: of the blocks.
      in_channels: of the input.
      learned_variance: twice as many outputs, the second half of which say the variance of a step.
      predicts: what the outputs are: the "noise" in the input, the "velocity" image - noise, or the
        "image".
      time_shift: frequencies of the time are 10000^(-i / (128 - time_shift)): 0, or 1 in diffusers.
      mlp_norm_eps: of the norm before each MLP; the others have 1e-6.
      caption_width: numbers of the embedding of a caption, which is asked for instead of a class;
        0: there are no captions.
      mean, std: what the input is normalized by; 0 and 1 of latents, and of images in [-1, 1], to
        which noise is added.
      dtype: compute dtype; parameters stay float32, and the outputs are float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
      scan: run the blocks as one scanned loop (compiles faster); parameters keep their names, and
        all blocks must then have leaves of the same kinds. A function is True, and what a block's
        parameters go through in the loop (see scanned.py).
    """

    num_classes: int
    image_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    in_channels: int = 4
    learned_variance: bool = False
    predicts: Literal["noise", "velocity", "image"] = "velocity"
    time_shift: int = 0
    mlp_norm_eps: float = 1e-6
    caption_width: int = 0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool | Callable[[Any, str], Any] = False

    stem: ClassVar[str] = "patch_embed/kernel"
    pyramid: ClassVar[tuple[tuple[str, int], ...]] = ()

    @property
    def size_divisor(self) -> int:
        """Of the input's sides."""
        return self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay."""
        return self.depth + 2

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: embeddings 0, block i at i + 1, what follows at depth + 1."""
        top = path.split("/")[0]
        if top.startswith("block_"):
            return int(top.removeprefix("block_")) + 1
        return 0 if top.endswith("_embed") else self.depth + 1

    @property
    def looped(self) -> str:
        """Regular expression of the parameters of the blocks that `scan` runs in a loop."""
        return r"block_\d+/.*"

    @property
    def tensor_rules(self) -> tuple[TensorRule, ...]:
        """What a mesh's axis `tensor` splits: of the numbers of a condition, their inputs."""
        return (
            *block_rules(self.num_heads),
            TensorRule(r"(block_\d+/|head_)ada/kernel", INPUTS),
            TensorRule("(time|caption)_embed/fc1/(kernel|bias)", OUTPUTS),
            TensorRule("(time|caption)_embed/fc2/kernel", INPUTS),
            TensorRule("class_embed", INPUTS),
        )

    @nn.compact
    def __call__(
        self, x, time=None, labels=None, *, train: bool = False, return_features: bool = False
    ):
        """Runs the model.

        Args:
          x: f32[B, H, W, in_channels], of `image_size`.
          time: f32[B]: a DDPM's step, 0 to 999, of a model that predicts noise; of others from 0,
            noise, to 1, image. None: 0.
          labels: i32[B], at most num_classes, which says none: of others the prediction is NaN.
            None: none of all. Of a model of captions f[B, caption_width], their embeddings.
          train: nothing is random here: who trains replaces labels by none.
          return_features: also return a dict of "condition" f[B, D], "embed" and "block_0" ...
            f[B, N, D].

        Returns:
          {"prediction": f32[B, H, W, in_channels]; "variance", of the same shape, where it is
          learned}
        """
        del train
        if x.shape[1:3] != self.image_size:
            raise ValueError(f"images are {x.shape[1:3]}, the model takes {self.image_size}")
        batch, dtype = x.shape[0], self.dtype
        condition = self._condition(batch, time, labels)
        features = {"condition": condition}
        condition = nn.silu(condition)
        height, width = self.image_size
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"dit: {height} x {width} pixels: this model takes multiples of {self.patch_size}"
            )
        if self.width % 4:
            raise UserError(f"dit: width {self.width}: sines of two places need a multiple of 4")
        patch = (self.patch_size,) * 2
        x = normalize(x, *(self._of_channels(values) for values in (self.mean, self.std)))
        x = Conv(self.width, patch, patch, dtype=dtype, name="patch_embed")(x)
        x = x.reshape(batch, -1, self.width)  # [B, N, D]
        x = x + jnp.asarray(grid_positions(self.grid, self.width, 0), dtype)
        features["embed"] = x
        x, outputs = self._blocks(x, condition)
        features.update({f"block_{index}": output for index, output in enumerate(outputs)})
        numbers = Dense(2 * self.width, dtype=dtype, kernel_init=_ZEROS, name="head_ada")(condition)
        shift, scale = jnp.split(numbers[:, None], 2, axis=-1)
        x = modulated(x, shift, scale, 1e-6)
        outputs = self.in_channels * (1 + self.learned_variance)
        wide = np.promote_types(dtype, np.float32)
        head = Dense(patch[0] ** 2 * outputs, dtype=wide, kernel_init=_ZEROS, name="head")
        x = head(x).reshape(batch, *self.grid, *patch, outputs)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *self.image_size, outputs)
        result = {"prediction": x[..., : self.in_channels]}
        if self.learned_variance:
            result["variance"] = x[..., self.in_channels :]
        return (result, features) if return_features else result

    def _blocks(self, x, condition):
        """(x behind the last block, x behind each)."""
        sizes = (self.num_heads, self.mlp_width, self.mlp_norm_eps, self.dtype)
        if self.scan and self.depth and not self.is_initializing():
            names = [f"block_{index}" for index in range(self.depth)]
            one = Block(*sizes, parent=None)

            def apply(variables, x, row, rngs):
                del row
                return one.apply(variables, x, condition, rngs=rngs)

            return scan_blocks(self, names, apply, x, remat=self.remat, enter=self.scan)
        block = nn.remat(Block) if self.remat else Block
        outputs = []
        for index in range(self.depth):
            x = block(*sizes, name=f"block_{index}")(x, condition)
            outputs.append(x)
        return x, outputs

    def _condition(self, batch, time, labels):
        """f[B, D], of the time and the class, or of the time, no class and the caption."""
        if time is None:
            time = jnp.zeros((batch,))
        waves = time_waves(time, self.time_shift, np.promote_types(self.dtype, np.float32))
        of_time = TimeEmbedding(self.width, self.dtype, name="time_embed")(waves)
        nothing = jnp.full((batch,), self.num_classes, jnp.int32)
        if self.caption_width:
            given = jnp.zeros((batch, self.caption_width)) if labels is None else labels
            embed = TimeEmbedding(self.width, self.dtype, name="caption_embed")
            of_time, labels = of_time + embed(given), None
        labels = nothing if labels is None else labels
        shape = (self.num_classes + 1, self.width)
        table = self.param("class_embed", nn.initializers.normal(0.02), shape)
        # Out of bounds JAX would take the last row, which says none.
        found = jnp.asarray(table).at[labels].get(mode="fill", fill_value=jnp.nan)
        return of_time + found.astype(self.dtype)

    def _of_channels(self, values):
        return tuple(values) * self.in_channels if len(values) == 1 else values


class TimeEmbedding(nn.Module):
    """fc2(silu(fc1(waves))): f[B, D]; of captions, of their embeddings."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, waves):
        init = nn.initializers.normal(0.02)
        x = Dense(self.width, dtype=self.dtype, kernel_init=init, name="fc1")(waves)
        return Dense(self.width, dtype=self.dtype, kernel_init=init, name="fc2")(nn.silu(x))


_ZEROS = nn.initializers.zeros  # adaLN-zero: each block begins as the identity


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) · (1 + scale) + shift of x[B, N, D].

    Shift and scale are f[B, 1, D]. In float32 (or better), in x's dtype again.
    """
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    ones, zeros = jnp.ones(x.shape[-1:], wide.dtype), jnp.zeros(x.shape[-1:], wide.dtype)
    normed = tangents.layer_norm(wide, ones, zeros, epsilon)
    return (normed * (1 + scale.astype(wide.dtype)) + shift.astype(wide.dtype)).astype(x.dtype)


def time_waves(time: jax.Array, shift: int, dtype: Any) -> jax.Array:
    """Cosines, then sines, of times f[B] at 128 frequencies: f[B, 256].

    Args:
      time: in the model's own unit.
      shift: see `Dit.time_shift`.
      dtype: float32 or float64. Frequencies come out of a chain of roundings in it, as in torch:
        one more digit of a frequency is a ten thousandth of the angle at step 999.
    """
    half = FREQUENCIES // 2
    exponents = (
        np.arange(half, dtype=dtype)
        * -np.log(10000).astype(dtype)
        / np.dtype(dtype).type(half - shift)
    )
    frequencies = np.exp(exponents.astype(np.float64)).astype(dtype)
    angles = time.astype(dtype)[:, None] * jnp.asarray(frequencies)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
