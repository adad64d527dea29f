"""Losses: arrays in, one number per example out, always computed in float32."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def one_hot_targets(labels: Array, num_classes: int, label_smoothing: float = 0.0) -> Array:
    """Class probabilities that a classifier is trained towards.

    The true class gets 1 - ε + ε/C and each other one ε/C (Szegedy et al. 2016, section 7; the same
    as torch's `label_smoothing`).

    Examples:
      >>> one_hot_targets(jnp.array([2]), num_classes=4, label_smoothing=0.5).tolist()
      [[0.125, 0.125, 0.625, 0.125]]

    Args:
      labels: int32[B], each in 0 .. num_classes - 1.
      num_classes: C.
      label_smoothing: ε in [0, 1].

    Returns:
      f32[B, C], each row with sum 1.
    """
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return (1 - label_smoothing) * one_hot + label_smoothing / num_classes


def cross_entropy(logits: Array, targets: Array, weights: Array | None = None) -> Array:
    """Cross-entropy of each example, -Σ targets · log softmax(logits), in nats.

    With weights the terms of the sum are weighted, as torch's `cross_entropy` of probabilities does
    with `weight`: its mean is over examples, not over weights.

    Examples:
      >>> cross_entropy(jnp.zeros((1, 4)), one_hot_targets(jnp.array([1]), 4)).tolist()
      [1.3862943649291992]

    Args:
      logits: f[B, C], of any floating dtype.
      targets: f[B, C], class probabilities; mixed and smoothed ones too.
      weights: f[C], of the classes; None for equal ones.

    Returns:
      f32[B], or f64[B] where the logits are.
    """
    if weights is not None:
        targets = targets * weights.astype(targets.dtype)[None]
    logits = logits.astype(np.promote_types(logits.dtype, np.float32))
    return -jnp.sum(targets.astype(logits.dtype) * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def sigmoid_focal_loss(
    logits: Array, targets: Array, *, alpha: float = 0.25, gamma: float = 2.0
) -> Array:
    """Focal loss of each logit (Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 5).

    BCE, weighed down where the right answer is likely already. Equal to torchvision 0.29.

    Examples:
      >>> round(sigmoid_focal_loss(jnp.array(0.0), jnp.array(1.0), alpha=0.5).item(), 4)
      0.0866

    Args:
      logits: f[...].
      targets: f[...], 1 for what is there and 0 for what is not.
      alpha: weight of what is there, 1 - alpha of what is not; negative: of neither.
      gamma: exponent of 1 - the probability of the right answer.

    Returns:
      f[...].
    """
    probability = jax.nn.sigmoid(logits)
    right = probability * targets + (1 - probability) * (1 - targets)
    losses = (1 - right) ** gamma * (jax.nn.softplus(logits) - logits * targets)
    return losses if alpha < 0 else losses * (alpha * targets + (1 - alpha) * (1 - targets))


def smooth_l1(difference: Array, beta: float) -> Array:
    """d² / 2·beta of each difference below beta, |d| - beta / 2 above (Girshick 2015, equation 3).

    Examples:
      >>> smooth_l1(jnp.array([0.5, -3.0]), 1.0).tolist()
      [0.125, 2.5]
    """
    size = jnp.abs(difference)
    return jnp.where(size < beta, 0.5 * jnp.square(difference) / beta, size - 0.5 * beta)
