"""Explanations by a map inside of the model and the score's gradient there (CAM and its heirs).

The map is at a tap: the last stage of a convolutional network, the tokens that a transformer's last
block attends to. Results are of the map's size, f[B, h, w], and not negative.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.explain.forward import Forward, Target, Variables, tapped_and_gradients

# Of the sums that Grad-CAM++ divides by, as pytorch-grad-cam 1.5.7 has it.
EPSILON = 1e-6


def grad_cam(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array | None = None,
    *,
    layer: str = "",
) -> jax.Array:
    """Channels weighed by their mean gradient (Selvaraju et al. 2016, arXiv:1610.02391).

    Args:
      forward: the model.
      variables: its arrays.
      images: f[B, H, W, C] in [0, 1].
      target: what of the outputs is explained.
      keys: not used: nothing is drawn.
      layer: a tap; Forward.map_tap's if "".

    Returns:
      f[B, h, w], at least 0.
    """
    del keys

    def weigh(activation, gradient):
        return gradient.mean((1, 2), keepdims=True)  # [B, 1, 1, D]

    return _cam(forward, variables, images, target, layer, weigh)


def grad_cam_plus_plus(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array | None = None,
    *,
    layer: str = "",
) -> jax.Array:
    """Channels weighed by what each cell of theirs does alone (Chattopadhay et al. 2017,
    arXiv:1710.11063, equations 10 and 19, where the score is the logit).

    Arguments and result: see `grad_cam`.
    """
    del keys

    def weigh(activation, gradient):
        second, third = gradient**2, gradient**3
        share = second / (2 * second + activation.sum((1, 2), keepdims=True) * third + EPSILON)
        share = jnp.where(gradient != 0, share, 0)
        return (jax.nn.relu(gradient) * share).sum((1, 2), keepdims=True)  # [B, 1, 1, D]

    return _cam(forward, variables, images, target, layer, weigh)


def layer_cam(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    keys: jax.Array | None = None,
    *,
    layer: str = "",
) -> jax.Array:
    """Each cell weighed by its own positive gradient (Jiang et al. 2021,
    doi:10.1109/TIP.2021.3089943).

    Arguments and result: see `grad_cam`.
    """
    del keys
    return _cam(
        forward, variables, images, target, layer, lambda _, gradient: jax.nn.relu(gradient)
    )


def _cam(
    forward: Forward,
    variables: Variables,
    images: jax.Array,
    target: Target,
    layer: str,
    weigh: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """relu of the sum over channels of weights · activations, f[B, h, w]."""
    layer = layer or forward.map_tap(variables, images)
    found, gradients = tapped_and_gradients(forward, variables, images, target, [layer])
    activation, gradient = (
        forward.as_map(tree[layer]).astype(np.promote_types(images.dtype, np.float32))
        for tree in (found, gradients)
    )
    return jax.nn.relu((weigh(activation, gradient) * activation).sum(-1))
