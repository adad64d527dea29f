"""What methods are given: the model with its taps, and what of its outputs is explained.

A target is a function outputs -> scores f[B], each of its own image alone. Made with
jax.tree_util.Partial its arrays are arguments of a compiled program, so that one is enough for all
classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.models.taps import (
    ATTENTION,
    LEVEL,
    NORMED,
    OUTPUT,
    apply_with_taps,
    tap_shapes,
)
from vision_jax.ops.resize import resize_bilinear

Variables = Mapping[str, Any]
Outputs = Mapping[str, Any]
Target = Callable[[Outputs], jax.Array]

NO_TAPS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Forward:
    """A model in evaluation as explanations call it.

    Attributes:
      model: the flax module, of any family.
      pixel_mask: bool[B, H, W] of a detector, True where the images are; None if they fill the
        canvas. Made inside of a compiled function it is an argument like the images.
    """

    model: Any
    pixel_mask: jax.Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", families.unrolled(self.model))

    def __call__(
        self, variables: Variables, images: jax.Array, taps: Mapping[str, Any] = NO_TAPS
    ) -> tuple[Outputs, dict[str, jax.Array]]:
        """(outputs, what is at the taps); see models.taps.apply_with_taps."""
        masks = () if self.pixel_mask is None else (self.pixel_mask,)
        outputs, found = apply_with_taps(self.model, variables, taps, images, *masks)
        return families.as_outputs(outputs), found

    def taps(self, variables: Variables, images: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of what can be tapped, in the order of computation."""
        return tap_shapes(self.model, variables, images)

    def map_taps(self, variables: Variables, images: Any) -> list[str]:
        """The taps whose maps are explained unless another is named.

        All levels of a detector's pyramid: a box has a gradient in the one that it comes from. Else
        one, a convolutional network's last stage, or what the last block of a transformer attends
        to, since its output has no gradient but at the class token.
        """
        known = list(self.taps(variables, images))
        if levels := [name for name in known if name.startswith(f"{LEVEL}_")]:
            return levels
        names = [name for name in known if name.endswith((f"/{OUTPUT}", f"/{NORMED}"))]
        if not names:
            raise UserError(f"a {families.family_of(self.model)} has no map to explain")
        return names[-1:]

    def attention_taps(self, variables: Variables, images: Any) -> list[str]:
        """The taps of attention among all tokens, block by block.

        Raises:
          UserError: a model whose tokens don't all see each other, or without attention.
        """
        self.check_tokens()
        shapes = self.taps(variables, images)
        tokens = self.num_prefix + self.grid[0] * self.grid[1] if self.grid else 0
        names = [
            name
            for name, shape in shapes.items()
            if name.endswith(f"/attn/{ATTENTION}") and shape.shape[-2:] == (tokens, tokens)
        ]
        if not names:
            raise UserError(
                f"a {families.family_of(self.model)} has no blocks whose tokens all see each "
                "other: take grad_cam, layer_cam or integrated_gradients"
            )
        return names

    def check_tokens(self) -> None:
        """Raises UserError where tokens are no grid of patches, because some have merged."""
        if merge := getattr(self.model, "merge", 0):
            raise UserError(
                f"tokens merge (model.merge {merge:g}), and are no grid then: take gradients "
                "of the image or perturbations (integrated_gradients, rise ...)"
            )

    @property
    def grid(self) -> tuple[int, int] | None:
        """Patches (rows, columns) of a model of tokens, None of others."""
        return getattr(self.model, "grid", None)

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches."""
        return getattr(self.model, "num_prefix", 0)

    def as_map(self, x: jax.Array) -> jax.Array:
        """f[B, h, w, D] of tokens f[B, P + h·w, D]; a map f[B, h, w, D] as it is.

        In an EoMT's last blocks its queries stand in front of the tokens.

        Raises:
          UserError: tokens that are no grid behind the model's prefix.
        """
        if x.ndim == 4:
            return x
        self.check_tokens()
        rows, columns = self.grid or (0, 0)
        before = x.shape[1] - rows * columns
        if before not in (self.num_prefix, self.num_prefix + getattr(self.model, "num_queries", 0)):
            raise UserError(
                f"{x.shape[1]} tokens are no {self.num_prefix} and a grid of {rows} x {columns}: "
                "name another tap"
            )
        return x[:, before:].reshape(x.shape[0], rows, columns, -1)


class Targets(NamedTuple):
    """What is explained of each image, and how a map of it is measured.

    Attributes:
      score: whose gradient is taken, and what an ablation loses: a logit.
      probability: in [0, 1]: what insertion, deletion and ROAD are curves of, and what a method
        explains that needs scores of at least 0.
    """

    score: Target
    probability: Target


def class_targets(labels: jax.Array) -> Targets:
    """Of a class each: labels i32[B]."""
    return Targets(class_logit(labels), class_probability(labels))


def class_logit(labels: jax.Array) -> Target:
    """The logit of a class each: labels i32[B]."""
    return Partial(_logit, labels)


def class_probability(labels: jax.Array) -> Target:
    """The probability of a class each, by the softmax: labels i32[B]."""
    return Partial(_probability, labels)


def place_logit(places: jax.Array, labels: jax.Array) -> Target:
    """A detector's logit of a class at a place each.

    Args:
      places: i32[B], rows of the logits f[B, A, C] or f[L, B, Q, C]: an anchor, a cell, a point, or
        a query of the last layer.
      labels: i32[B].
    """
    return Partial(_place_logit, places, labels)


def region_logit(region: jax.Array, labels: jax.Array) -> Target:
    """The mean logit of a class in a region: bool[B, H, W], i32[B].

    The region may be finer than a segmenter's own grid: its logits are resized to it.
    """
    return Partial(_region_logit, region, labels)


def _place_logit(places: jax.Array, labels: jax.Array, outputs: Outputs) -> jax.Array:
    logits = outputs["logits"]
    logits = logits[-1] if logits.ndim == 4 else logits
    return logits[jnp.arange(len(places)), places, labels]


def _region_logit(region: jax.Array, labels: jax.Array, outputs: Outputs) -> jax.Array:
    logits = jnp.take_along_axis(outputs["logits"], labels[:, None, None, None], axis=-1)
    logits = resize_bilinear(logits, region.shape[1:])[..., 0]
    counted = jnp.maximum(region.sum((1, 2)), 1).astype(logits.dtype)
    return jnp.where(region, logits, 0).sum((1, 2)) / counted


def _logit(labels: jax.Array, outputs: Outputs) -> jax.Array:
    return jnp.take_along_axis(outputs["logits"], labels[:, None], axis=-1)[:, 0]


def _probability(labels: jax.Array, outputs: Outputs) -> jax.Array:
    probabilities = jax.nn.softmax(outputs["logits"], axis=-1)
    return jnp.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0]


def score_of(
    forward: Forward, variables: Variables, images: jax.Array, target: Target
) -> jax.Array:
    """The scores f[B] of images f[B, H, W, C]."""
    return target(forward(variables, images)[0])


def score_and_gradient(
    forward: Forward, variables: Variables, images: jax.Array, target: Target
) -> tuple[jax.Array, jax.Array]:
    """(scores f[B], the gradient of each with respect to its image f[B, H, W, C])."""

    def total(images):
        scores = score_of(forward, variables, images, target)
        return scores.sum(), scores

    gradient, scores = jax.grad(total, has_aux=True)(images)
    return scores, gradient


def tapped_and_gradients(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    names: Sequence[str],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(what is at the taps, the gradients of the scores with respect to it), f[B, ...] by name."""
    shown = jax.eval_shape(
        lambda variables, images: forward(variables, images, dict.fromkeys(names, 0.0))[1],
        variables,
        images,
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shown)

    def total(taps):
        outputs, found = forward(variables, images, taps)
        return target(outputs).sum(), found

    gradients, found = jax.grad(total, has_aux=True)(zeros)
    return found, gradients
