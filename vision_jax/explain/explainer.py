"""Images explained by several methods, and each map measured: what a command asks of a model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.attacks.examples import keys_of
from vision_jax.errors import UserError
from vision_jax.explain import gradients, measures
from vision_jax.explain.forward import Forward, Target, Targets, Variables, score_of
from vision_jax.explain.methods import METHODS, OF_MAPS, find_method, make_explain

# f[B] of each map, beside the curves; of integrated gradients "completeness", too.
FIGURES = ("insertion", "deletion", "road", "rank_correlation")
RANDOM = "random"  # patches, or pixels, in random order: what a map's figures are compared with

# (mean color f[1, 1, 1, C], images f[B, H, W, C]) -> images without anything to see.
BASELINES: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mean": lambda mean, images: mean.astype(images.dtype),
    "black": lambda mean, images: jnp.zeros_like(mean, images.dtype),
    "blurred": lambda mean, images: measures.blurred(images),
}

Found = dict[str, jax.Array]
Maps = dict[str, np.ndarray]  # f[H, W] by method, of one image
Figures = dict[str, dict[str, float]]  # by method, and of RANDOM; of one image, or the mean of many


def choose_methods(
    forward: Forward, variables: Variables, size: tuple[int, int], asked: Sequence[str]
) -> list[str]:
    """The methods asked for, or all that the model can be explained by.

    Raises:
      UserError: no such method, or one that needs attention or a map which the model has not.
    """
    images = jax.ShapeDtypeStruct((1, *size, forward.model.in_channels), jnp.float32)

    def check(name: str) -> None:
        if name.startswith("attention"):
            forward.attention_taps(variables, images)
        elif name in OF_MAPS:
            forward.check_tokens()

    for name in asked:
        find_method(name)
        check(name)
    return list(dict.fromkeys(asked)) or [name for name in METHODS if _fits(check, name)]


def _fits(check: Callable[[str], None], name: str) -> bool:
    try:
        check(name)
    except UserError:
        return False
    return True


def make_explainer(
    forward: Forward,
    names: Sequence[str],
    *,
    size: tuple[int, int],
    seed: int,
    baseline: str = "mean",
) -> Callable[[Variables, jax.Array, Targets, jax.Array], dict[str, Found]]:
    """A function (variables, images f[B, H, W, C], targets, index i32[B]) of device arrays.

    Deletion ends with the mean color of the model's normalization, insertion begins with the
    blurred image, as in its paper. Of a model of patches they come and go patch by patch. A method
    is compiled once, and so is the measure of its maps, whatever the targets' classes, boxes or
    regions: these are arguments.

    Args:
      forward: the model.
      names: of methods.METHODS.
      size: (H, W) of the images.
      seed: of all that is drawn, with the index of each image.
      baseline: of BASELINES, what methods that need an image without anything to see take for it.

    Returns:
      The function; it gives {method: {"map": f[B, H, W], and FIGURES f[B] each}}, RANDOM among the
      methods. "insertion" and "deletion" are areas under the curves of the target's probability,
      "road" the difference of its probability without the least and without the most relevant
      pixels, "rank_correlation" is with the map of the same model with shuffled weights, and
      "completeness" the error of the sum of integrated gradients as a share of the scores'
      difference.
    """
    mean = jnp.asarray(forward.model.mean, jnp.float32).reshape(1, 1, 1, -1)
    empty = partial(BASELINES[baseline], mean)
    explain = {name: make_explain(forward, name, baseline_of=empty) for name in names}
    measure = jax.jit(partial(_measure, forward))
    compare = jax.jit(measures.rank_correlation)
    error = jax.jit(partial(_completeness, forward, empty))

    def run(
        variables: Variables, images: jax.Array, targets: Targets, index: jax.Array
    ) -> dict[str, Found]:
        drawn, measured = (
            keys_of(jax.random.fold_in(jax.random.key(seed), use), index) for use in range(2)
        )
        # Not compiled as one: leaves of one shape share a program.
        shuffled = measures.shuffled(variables, jax.random.fold_in(jax.random.key(seed), 2))
        found: dict[str, Found] = {}
        for name in names:
            method = find_method(name)
            target = targets.probability if method.of_probability else targets.score
            attributions = explain[name](variables, images, target, drawn)
            maps = measures.to_pixels(method.to_map(attributions), size)
            of_others = method.to_map(explain[name](shuffled, images, target, drawn))
            found[name] = {
                "map": maps,
                **measure(variables, images, targets.probability, maps, mean, measured),
                "rank_correlation": compare(maps, measures.to_pixels(of_others, size)),
            }
            if name == "integrated_gradients":
                found[name]["completeness"] = error(variables, images, targets.score, attributions)
        noise = gradients.noise_of(drawn, 0, images)[..., 0]  # [B, H, W]
        found[RANDOM] = measure(variables, images, targets.probability, noise, mean, measured)
        return found

    return run


def _measure(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    probability: Target,
    maps: jax.Array,
    baseline: jax.Array,
    keys: jax.Array,
) -> Found:
    order = measures.ranks(measures.to_patches(maps, forward.grid), keys)
    given = (forward, variables, images, probability, order)
    return {
        "insertion": measures.area(measures.insertion(*given, measures.blurred(images))),
        "deletion": measures.area(measures.deletion(*given, baseline)),
        "road": measures.road(*given, keys),
    }


def _completeness(
    forward: Forward,
    empty_of: Callable[[jax.Array], jax.Array],
    variables: Variables,
    images: jax.Array,
    target: Target,
    attributions: jax.Array,
) -> jax.Array:
    """f[B]: the error as a share of the difference of the scores."""
    empty = jnp.broadcast_to(empty_of(images), images.shape)
    score, base = (score_of(forward, variables, x, target) for x in (images, empty))
    error = measures.completeness(attributions, score, base)
    return error / jnp.maximum(abs(score - base), jnp.finfo(error.dtype).tiny)


def one_of(found: Mapping[str, Mapping[str, np.ndarray]], place: int) -> tuple[Maps, Figures]:
    """The maps and the figures of one image of a batch, as an explainer gave it, on the host."""
    maps = {name: own["map"][place] for name, own in found.items() if "map" in own}
    figures = {
        name: {figure: float(values[place]) for figure, values in own.items() if figure != "map"}
        for name, own in found.items()
    }
    return maps, figures


class Means:
    """The mean of each figure of what has come by."""

    def __init__(self) -> None:
        self.count = 0
        self._totals: Figures = {}

    def add(self, figures: Mapping[str, Mapping[str, float]]) -> None:
        """One image's figures, the same of each."""
        self.count += 1
        for name, own in figures.items():
            totals = self._totals.setdefault(name, dict.fromkeys(own, 0.0))
            for figure, value in own.items():
                totals[figure] += value

    def figures(self) -> Figures:
        """By method."""
        return {
            name: {figure: total / self.count for figure, total in own.items()}
            for name, own in self._totals.items()
        }


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
