"""Losses of pairs: which views belong to one image, and which image and text together.

NT-Xent, SimCLR's (Chen et al. 2020, https://arxiv.org/abs/2002.05709, equation 1), is a choice
among all of a batch. In the sigmoid loss of SigLIP (Zhai et al. 2023,
https://arxiv.org/abs/2303.15343, algorithm 1 and section 3.3, "efficient chunked implementation")
every pair of an image and a text is a yes or a no by itself, so a batch's matrix of pairs is a sum
over its blocks and no device needs all of it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

SHORTEST = 1e-12  # of a vector that is divided by its length


def unit(vectors: jax.Array) -> jax.Array:
    """Vectors f[..., D] of length 1."""
    squared = (vectors * vectors).sum(-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.maximum(squared, SHORTEST**2))  # without a gradient at zero


def nt_xent_losses(projections: jax.Array, temperature: float) -> jax.Array:  # f[B]
    """Each image's mean cross-entropy of telling a view's partner from all 2·B - 1 other views.

    Of these one is the partner, and a view is not compared with itself. Views that are all alike
    cost log(2·B - 1).

    Args:
      projections: f[B, 2, P], of the two views of each image, of any length.
      temperature: that cosines are divided by.

    Raises:
      ValueError: not two views.

    Examples:
      >>> [round(float(x), 4) for x in nt_xent_losses(jnp.ones((2, 2, 3)), 0.5)]  # log 3
      [1.0986, 1.0986]
    """
    count, of_each, _ = projections.shape
    if of_each != 2:
        raise ValueError(f"nt_xent is of two views of an image, and here are {of_each}")
    pairs = unit(projections)
    views = pairs.reshape(2 * count, -1)
    logits = jnp.matmul(views, views.T, precision="highest") / temperature  # [2·B, 2·B]
    logits = jnp.where(jnp.eye(2 * count, dtype=bool), -jnp.inf, logits)
    positive = (pairs[:, 0] * pairs[:, 1]).sum(-1) / temperature  # [B], of both views
    return jax.nn.logsumexp(logits, axis=1).reshape(count, 2).mean(1) - positive


# Images and texts; scalars are 0-d arrays, so that they may be differentiated.


def sigmoid_losses(
    image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, mesh: Mesh
) -> jax.Array:
    """f[B] of each image: -Σⱼ log sigmoid(±logit), + for its own text and - for all others.

    The mean over B is the paper's loss and that of transformers' `SiglipModel(return_loss=True)`.
    Each device keeps its images and its share of the matrix at a time, B/n × B/n for n devices: the
    texts go around the ring of the devices, and once more in the backward pass, with their
    gradients, since nothing but the features is kept for it.

    Args:
      image: f[B, D], split over all axes of the mesh.
      text: f[B, D], likewise; text i belongs to image i.
      scale: f[], a pair's logit is scale · (image · text) + bias.
      bias: f[].
      mesh: of the devices; their number divides B.
    """
    return _losses(mesh, image, text, scale, bias)


def constant_loss(count: int) -> float:
    """The least loss of a batch in which every pair gets the same logit: nothing is told apart.

    Each pair is then a yes with probability 1/B. A logit of 0 costs B · log 2 instead.

    Examples:
      >>> round(constant_loss(64), 4)
      5.151
    """
    if count < 2:
        return 0.0
    share = 1 / count
    return float(-jnp.log(share) - (count - 1) * jnp.log1p(-share))


# Around the ring ----------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(mesh, image, text, scale, bias):
    return _forward(mesh, image, text, scale, bias)[0]


def _forward(mesh, image, text, scale, bias):
    split, axes = PartitionSpec(mesh.axis_names), mesh.axis_names

    def of_device(image, text, scale, bias):  # [b, D], [b, D]
        def add(turn, losses, text):
            logits, signs = _block(image, text, scale, bias, turn)
            return losses - jax.nn.log_sigmoid(signs * logits).sum(1)

        def body(turn, carry):
            losses, text = carry
            text = _pass_on(text, axes)
            return add(turn, losses, text), text

        losses = add(0, jnp.zeros_like(image[:, 0]), text)
        return jax.lax.fori_loop(1, mesh.size, body, (losses, text))[0]

    whole = PartitionSpec()
    run = jax.shard_map(
        of_device, mesh=mesh, in_specs=(split, split, whole, whole), out_specs=split
    )
    return run(image, text, scale, bias), (image, text, scale, bias)


def _backward(mesh, kept, weights):
    image, text, scale, bias = kept
    split, axes = PartitionSpec(mesh.axis_names), mesh.axis_names

    def of_device(image, text, scale, bias, weights):  # weights [b]: of each image's loss
        def add(turn, sums, text, to_text):
            logits, signs = _block(image, text, scale, bias, turn)
            to_logits = -weights[:, None] * signs * jax.nn.sigmoid(-signs * logits)  # [b, b]
            to_image, to_scale, to_bias = sums
            sums = (
                to_image + scale * (to_logits @ text),
                to_scale + (to_logits * (image @ text.T)).sum(),
                to_bias + to_logits.sum(),
            )
            return sums, to_text + scale * (to_logits.T @ image)

        def body(turn, carry):
            sums, text, to_text = carry
            text, to_text = _pass_on(text, axes), _pass_on(to_text, axes)
            sums, to_text = add(turn, sums, text, to_text)
            return sums, text, to_text

        zero = image[0, 0] * 0
        begin = add(0, (jnp.zeros_like(image), zero, zero), text, jnp.zeros_like(text))
        sums, _, to_text = jax.lax.fori_loop(1, mesh.size, body, (begin[0], text, begin[1]))
        to_image, to_scale, to_bias = sums
        # One step more and each text's gradient is where the text is.
        to_text = _pass_on(to_text, axes) if mesh.size > 1 else to_text
        return to_image, to_text, jax.lax.psum(to_scale, axes), jax.lax.psum(to_bias, axes)

    whole = PartitionSpec()
    run = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(split, split, whole, whole, split),
        out_specs=(split, split, whole, whole),
    )
    return run(image, text, scale, bias, weights)


_losses.defvjp(_forward, _backward)


def _block(image, text, scale, bias, turn):
    """(logits f[b, b], signs) of a device's images and the texts that are there at a turn."""
    logits = scale * (image @ text.T) + bias
    own = jnp.eye(len(image), dtype=logits.dtype)
    positive = jnp.where(turn == 0, own, jnp.zeros_like(own))
    return logits, 2 * positive - 1


def _pass_on(x, axes):
    """What the previous device of the ring had."""
    count = jax.lax.axis_size(axes)
    ring = [(place, (place + 1) % count) for place in range(count)]
    return jax.lax.ppermute(x, axes, ring)
