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
from vision_jax.models.taps import ATTENTION, NORMED, OUTPUT, apply_with_taps, tap_shapes

Variables = Mapping[str, Any]
Outputs = Mapping[str, Any]
Target = Callable[[Outputs], jax.Array]

NO_TAPS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Forward:
    """A model in evaluation as explanations call it.

    Attributes:
      model: the flax module, of any family.
    """

    model: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", families.unrolled(self.model))

    def __call__(
        self, variables: Variables, images: jax.Array, taps: Mapping[str, Any] = NO_TAPS
    ) -> tuple[Outputs, dict[str, jax.Array]]:
        """(outputs, what is at the taps); see models.taps.apply_with_taps."""
        outputs, found = apply_with_taps(self.model, variables, taps, images)
        return families.as_outputs(outputs), found

    def taps(self, variables: Variables, images: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of what can be tapped, in the order of computation."""
        return tap_shapes(self.model, variables, images)

    def map_tap(self, variables: Variables, images: Any) -> str:
        """The tap whose map is explained unless another is named.

        A convolutional network's last stage; what the last block of a transformer attends to, since
        its output has no gradient but at the class token.
        """
        ends = (f"/{OUTPUT}", f"/{NORMED}")
        names = [name for name in self.taps(variables, images) if name.endswith(ends)]
        if not names:
            raise UserError(f"a {families.family_of(self.model)} has no map to explain")
        return names[-1]

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

        Raises:
          UserError: tokens that are no grid behind the model's prefix.
        """
        if x.ndim == 4:
            return x
        self.check_tokens()
        rows, columns = self.grid or (0, 0)
        if x.shape[1] != self.num_prefix + rows * columns:
            raise UserError(
                f"{x.shape[1]} tokens are no {self.num_prefix} and a grid of {rows} x {columns}: "
                "name another tap"
            )
        return x[:, self.num_prefix :].reshape(x.shape[0], rows, columns, -1)


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
    """The mean logit of a class in a region of a segmenter's own grid: bool[B, h, w], i32[B]."""
    return Partial(_region_logit, region, labels)


def _place_logit(places: jax.Array, labels: jax.Array, outputs: Outputs) -> jax.Array:
    logits = outputs["logits"]
    logits = logits[-1] if logits.ndim == 4 else logits
    return logits[jnp.arange(len(places)), places, labels]


def _region_logit(region: jax.Array, labels: jax.Array, outputs: Outputs) -> jax.Array:
    logits = jnp.take_along_axis(outputs["logits"], labels[:, None, None, None], axis=-1)[..., 0]
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
