"""The methods by name, the one list of what there is, and how one is compiled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from vision_jax.errors import UserError, nearest
from vision_jax.explain import activations, attention, gradients, perturbations
from vision_jax.explain.forward import Forward


def of_map(attributions: jax.Array) -> jax.Array:
    """A map f[B, h, w] as it is."""
    return attributions


def largest(attributions: jax.Array) -> jax.Array:
    """f[B, H, W]: the largest absolute value over the channels, as Simonyan et al. show it."""
    return abs(attributions).max(-1)


def total(attributions: jax.Array) -> jax.Array:
    """f[B, H, W]: the sum over the channels, shares of the score with their sign."""
    return attributions.sum(-1)


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
      function: (forward, variables, images, target, keys, **options) -> attributions.
      to_map: attributions -> relevance f[B, h, w] of the pixels or of the cells of a map.
      of_probability: it explains a probability, Targets.probability, and not the score.
      takes_baseline: it has the option `baseline`.
    """

    function: Callable[..., jax.Array]
    to_map: Callable[[jax.Array], jax.Array] = of_map
    of_probability: bool = False
    takes_baseline: bool = False


METHODS: Mapping[str, Method] = {
    "saliency": Method(gradients.saliency, largest),
    "smooth_grad": Method(gradients.smooth_grad, largest),
    "integrated_gradients": Method(gradients.integrated_gradients, total, takes_baseline=True),
    "grad_cam": Method(partial(activations.cam, weigh=activations.mean_gradient)),
    "grad_cam_plus_plus": Method(partial(activations.cam, weigh=activations.gain_of_cells)),
    "layer_cam": Method(partial(activations.cam, weigh=activations.positive_gradient)),
    "attention_rollout": Method(attention.attention_rollout),
    "attention_relevance": Method(attention.attention_relevance),
    "occlusion": Method(perturbations.occlusion, takes_baseline=True),
    "feature_ablation": Method(perturbations.feature_ablation, takes_baseline=True),
    "rise": Method(perturbations.rise, of_probability=True, takes_baseline=True),
}

OF_MAPS = ("grad_cam", "grad_cam_plus_plus", "layer_cam")  # of features that lie as the image does


def find_method(name: str) -> Method:
    """A method of the list.

    Raises:
      UserError: there is none of this name; the message has the nearest.
    """
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}{nearest(name, list(METHODS))}")
    return METHODS[name]


def make_explain(
    forward: Forward,
    name: str,
    *,
    baseline_of: Callable[[jax.Array], jax.Array] | None = None,
    **options: Any,
) -> Callable[..., jax.Array]:
    """A compiled function (variables, images, target, keys) -> attributions; one compile a shape.

    Args:
      forward: the model.
      name: of METHODS.
      baseline_of: images -> the option `baseline`, for a method that takes one; None for its own.
      **options: of the method.
    """
    method = find_method(name)

    def explain(variables, images, target, keys):
        given = dict(options)
        if baseline_of and method.takes_baseline:
            given["baseline"] = baseline_of(images)
        return method.function(forward, variables, images, target, keys, **given)

    return jax.jit(explain)
