"""A classifier's images explained by several methods, and each map measured."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.attacks.examples import keys_of
from vision_jax.explain import gradients, measures
from vision_jax.explain.forward import (
    Forward,
    Variables,
    class_logit,
    class_probability,
)
from vision_jax.explain.methods import find_method, make_explain

# f[B] of each map, beside the curves; of integrated gradients "completeness", too.
FIGURES = ("insertion", "deletion", "road", "rank_correlation")
RANDOM = "random"  # patches, or pixels, in random order: what a map's figures are compared with

Found = dict[str, jax.Array]


def make_explain_classifier(
    forward: Forward, names: Sequence[str], *, size: tuple[int, int], seed: int
) -> Callable[..., dict[str, Found]]:
    """A function (variables, images f[B, H, W, C], labels i32[B], index i32[B]) of device arrays.

    What stands where pixels are taken away is the mean color of the model's normalization; what
    insertion begins with is the blurred image, as in its paper. Of a model of patches they come and
    go patch by patch. A method is compiled once, and so is the measure of its maps.

    Args:
      forward: the model.
      names: of methods.METHODS.
      size: (H, W) of the images.
      seed: of all that is drawn, with the index of each image.

    Returns:
      The function; it gives {method: {"map": f[B, H, W], and FIGURES f[B] each}}, RANDOM among the
      methods. "insertion" and "deletion" are areas under the curves of the class's probability,
      "road" the difference of its probability without the least and without the most relevant
      pixels, "rank_correlation" is with the map of the same model with shuffled weights, and
      "completeness" the error of the sum of integrated gradients as a share of the logits'
      difference.
    """
    mean = jnp.asarray(forward.model.mean, jnp.float32).reshape(1, 1, 1, -1)
    explain = {
        name: make_explain(
            forward, name, **({"baseline": mean} if find_method(name).takes_baseline else {})
        )
        for name in names
    }
    measure = jax.jit(partial(_measure, forward))
    compare = jax.jit(measures.rank_correlation)
    error = jax.jit(partial(_completeness, forward))
    shuffle = jax.jit(measures.shuffled)

    def run(
        variables: Variables, images: jax.Array, labels: jax.Array, index: jax.Array
    ) -> dict[str, Found]:
        drawn, measured = (
            keys_of(jax.random.fold_in(jax.random.key(seed), use), index) for use in range(2)
        )
        shuffled = shuffle(variables, jax.random.fold_in(jax.random.key(seed), 2))
        found: dict[str, Found] = {}
        for name in names:
            method = find_method(name)
            target = (class_probability if method.of_probability else class_logit)(labels)
            attributions = explain[name](variables, images, target, drawn)
            maps = measures.to_pixels(method.to_map(attributions), size)
            of_others = method.to_map(explain[name](shuffled, images, target, drawn))
            found[name] = {
                "map": maps,
                **measure(variables, images, labels, maps, mean, measured),
                "rank_correlation": compare(maps, measures.to_pixels(of_others, size)),
            }
            if name == "integrated_gradients":
                found[name]["completeness"] = error(variables, images, labels, attributions, mean)
        noise = gradients.noise_of(drawn, 0, images)[..., 0]  # [B, H, W]
        found[RANDOM] = measure(variables, images, labels, noise, mean, measured)
        return found

    return run


def _measure(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    maps: jax.Array,
    baseline: jax.Array,
    keys: jax.Array,
) -> Found:
    target = class_probability(labels)
    order = measures.ranks(measures.to_patches(maps, forward.grid), keys)
    given = (forward, variables, images, target, order)
    return {
        "insertion": measures.area(measures.insertion(*given, measures.blurred(images))),
        "deletion": measures.area(measures.deletion(*given, baseline)),
        "road": measures.road(*given, keys),
    }


def _completeness(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    attributions: jax.Array,
    baseline: jax.Array,
) -> jax.Array:
    """f[B]: the error as a share of the difference of the logits."""
    target = class_logit(labels)
    empty = jnp.broadcast_to(baseline.astype(images.dtype), images.shape)
    score, base = (target(forward(variables, x)[0]) for x in (images, empty))
    error = measures.completeness(attributions, score, base)
    return error / jnp.maximum(abs(score - base), jnp.finfo(error.dtype).tiny)


def survivors(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The methods whose maps stay when the weights are shuffled: they don't explain the model.

    Args:
      figures: of each method, the mean "rank_correlation" over images.
    """
    return [
        name
        for name, own in figures.items()
        if own.get("rank_correlation", 0.0) >= measures.SURVIVES
    ]
