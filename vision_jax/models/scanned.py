"""Blocks of a transformer as one loop: one of them is compiled instead of all."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vision_jax.errors import UserError
from vision_jax.models.layers import ADAPTER_KEYS


def scan_blocks(
    module: nn.Module,
    names: Sequence[str],
    apply: Callable[[Any, jax.Array, Any, Any], jax.Array],
    x: jax.Array,
    rows: Any = None,
    *,
    remat: bool = False,
    enter: Callable[[Any, str], Any] | bool = True,
) -> tuple[jax.Array, list[jax.Array]]:
    """(x behind the last block, x behind each).

    The parameters are stacked when the model is applied, so its tree has the same names either way.

    Args:
      module: whose submodules the blocks are.
      names: of the blocks, in their order.
      apply: (a block's variables, x, its row, its keys by collection) -> x.
      x: what the first takes.
      rows: arrays with a row for each block.
      remat: recompute each block in the backward pass.
      enter: (parameters, path of the first block with a slash) -> what a block's parameters become
        inside of the loop, where only one block's are there at once; True: they stay as they are.

    Raises:
      UserError: blocks whose parameters are of different kinds or shapes.
    """
    blocks = [module.variables["params"][name] for name in names]
    layouts = [jax.tree.map(jnp.shape, block) for block in blocks]
    if any(layout != layouts[0] for layout in layouts):
        raise UserError(
            "model.scan: the blocks have leaves of different kinds or shapes (factors or "
            "adapters on some only, or of several ranks); set model.scan=False or give all the "
            "same"
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    keys = {
        name: jax.random.split(module.make_rng(name), len(names))
        for name in ("dropout", ADAPTER_KEYS)
        if module.has_rng(name)
    }

    first = "/".join((*module.path, names[0], ""))

    def body(x, layer):
        params, row, rngs = layer
        if callable(enter):
            params = enter(params, first)
        x = apply({"params": params}, x, row, rngs)
        return x, x

    step = jax.checkpoint(body) if remat else body
    x, outputs = jax.lax.scan(step, x, (stacked, rows, keys))
    return x, list(outputs)
