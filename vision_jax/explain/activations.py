"""Explanations by a map inside of the model and the score's gradient there (CAM and its heirs).

The map is at a tap: the last stage of a convolutional network, the tokens that a transformer's last
block attends to, the level of a pyramid that a box comes from. The methods differ in how they weigh
it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.explain.forward import Forward, Target, Variables, tapped_and_gradients
from vision_jax.ops.resize import resize_bilinear

# Of the sums that Grad-CAM++ divides by, as pytorch-grad-cam 1.5.7 has it.
EPSILON = 1e-6

# (activation f[B, h, w, D], the score's gradient f[B, h, w, D]) -> weights of the activation.
Weigh = Callable[[jax.Array, jax.Array], jax.Array]


def mean_gradient(activation: jax.Array, gradient: jax.Array) -> jax.Array:
    """Grad-CAM: a channel's mean gradient (Selvaraju et al. 2016, arXiv:1610.02391)."""
    del activation
    return gradient.mean((1, 2), keepdims=True)  # [B, 1, 1, D]


def gain_of_cells(activation: jax.Array, gradient: jax.Array) -> jax.Array:
    """Grad-CAM++: what each cell of a channel does alone.

    Chattopadhay et al. 2017, arXiv:1710.11063, equations 10 and 19, where the score is the logit.
    """
    second, third = gradient**2, gradient**3
    share = second / (2 * second + activation.sum((1, 2), keepdims=True) * third + EPSILON)
    share = jnp.where(gradient != 0, share, 0)
    return (jax.nn.relu(gradient) * share).sum((1, 2), keepdims=True)  # [B, 1, 1, D]


def positive_gradient(activation: jax.Array, gradient: jax.Array) -> jax.Array:
    """LayerCAM: each cell's own gradient (Jiang et al. 2021, doi:10.1109/TIP.2021.3089943)."""
    del activation
    return jax.nn.relu(gradient)


def cam(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array | None = None,
    *,
    weigh: Weigh = mean_gradient,
    layer: str = "",
) -> jax.Array:
    """The positive part of the sum over channels of weights · activations.

    Args:
      forward: the model.
      variables: its arrays.
      images: f[B, H, W, C] in [0, 1].
      target: what of the outputs is explained.
      keys: not used: nothing is drawn.
      weigh: `mean_gradient`, `gain_of_cells` or `positive_gradient`.
      layer: a tap; Forward.map_taps' if "".

    Returns:
      f[B, h, w], of the map's size, at least 0.
    """
    del keys
    names = [layer] if layer else forward.map_taps(variables, images)
    trees = tapped_and_gradients(forward, variables, images, target, names)
    maps: list[jax.Array] = []
    for name in names:
        activation, gradient = (
            forward.as_map(tree[name]).astype(np.promote_types(images.dtype, np.float32))
            for tree in trees
        )
        maps.append(jax.nn.relu((weigh(activation, gradient) * activation).sum(-1)))
    size = maps[0].shape[1:]  # the finest; a level without a gradient adds nothing
    return jnp.stack([resize_bilinear(x[..., None], size)[..., 0] for x in maps]).sum(0)
