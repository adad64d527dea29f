"""Taps: places inside of a model that an explicit argument shows and shifts.

A tap has a name, the path of its module and what it is there: "stage_3/output",
"block_0/attn/attention". What is given for it is added there, so that zeros show what is there, and
the gradient with respect to them is the activation's, under jit, grad and vmap. What nobody asks
for is no operation of the program: a model without taps compiles to what it would be without this
file.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vision_jax.errors import UserError, nearest
from vision_jax.trees import paths

TAPS = "taps"  # the collection of what is added, by the path of the tap

# The last parts of the taps' names.
OUTPUT = "output"  # of a stage: a map f[B, h, w, D]
LEVEL = "level"  # "level_0" ... of a pyramid: maps f[B, h, w, D] as its heads read them
NORMED = "normed"  # what a block attends to: tokens f[B, N, D]
ATTENTION = "attention"  # probabilities f[B, K, N, M]


def tap(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """x, and what was given for `name` in this module; x alone if nothing was."""
    if module.is_initializing():
        return x
    if module.is_mutable_collection(TAPS):  # see tap_shapes
        module.put_variable(TAPS, name, jnp.zeros_like(x))
    elif module.has_variable(TAPS, name):
        x = x + module.get_variable(TAPS, name)
        module.sow("intermediates", name, x)
    return x


def tap_levels(module: nn.Module, levels: Sequence[jax.Array]) -> list[jax.Array]:
    """`tap` of each map of a pyramid, from fine to coarse, where nothing but heads reads them."""
    return [tap(module, f"{LEVEL}_{index}", x) for index, x in enumerate(levels)]


def make_tap(module: nn.Module, name: str) -> Callable[[jax.Array], jax.Array] | None:
    """`tap` of x alone, or None where nobody asks for it: what it would show need not be there."""
    asked = module.is_mutable_collection(TAPS) or module.has_variable(TAPS, name)
    return partial(tap, module, name) if asked and not module.is_initializing() else None


def apply_with_taps(
    model: Any, variables: Mapping[str, Any], taps: Mapping[str, Any], *inputs: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """`model.apply` in evaluation, and what is at the taps.

    Args:
      model: of any family, without loops over its blocks (see families.unrolled).
      variables: its collections, "params" and perhaps "batch_stats".
      taps: by name, what is added there: of the shapes that `tap_shapes` tells, or 0.0.
      *inputs: images, and a detector's pixel mask.

    Returns:
      (outputs, {name: f[B, ...]} of the taps given)

    Raises:
      UserError: a tap that the model has not, with the nearest that it has.
    """
    if not taps:
        return model.apply(variables, *inputs), {}
    given = {**variables, TAPS: paths.nest(taps)}
    outputs, changed = model.apply(given, *inputs, mutable=["intermediates"])
    flat = paths.flatten(changed.get("intermediates", {}))
    found = {}
    for name in taps:
        if f"{name}/0" not in flat:
            known = list(tap_shapes(model, variables, *inputs))
            raise UserError(f"taps: the model has no {name!r}{nearest(name, known)}")
        found[name] = flat[f"{name}/0"]
    return outputs, found


def tap_shapes(
    model: Any, variables: Mapping[str, Any], *inputs: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """What can be tapped, in the order of computation; nothing is computed.

    Args:
      model: of any family, without loops over its blocks (see families.unrolled).
      variables: its collections, or their ShapeDtypeStructs.
      *inputs: images, and a detector's pixel mask, or their ShapeDtypeStructs.
    """
    found: dict[str, jax.ShapeDtypeStruct] = {}

    def run(variables, inputs):
        _, changed = model.apply(variables, *inputs, mutable=[TAPS])
        found.update(_shapes(changed.get(TAPS, {})))

    jax.eval_shape(run, variables, inputs)  # whose result would be sorted by name
    return found


def _shapes(tree: Mapping[str, Any], prefix: str = "") -> dict[str, jax.ShapeDtypeStruct]:
    """By path, in the order of insertion, which is that of computation."""
    found: dict[str, jax.ShapeDtypeStruct] = {}
    for name, below in tree.items():
        if isinstance(below, Mapping):
            found |= _shapes(below, f"{prefix}{name}/")
        else:
            found[prefix + name] = jax.ShapeDtypeStruct(below.shape, below.dtype)
    return found
