"""What attacks on a classifier maximize: from logits of images to a loss of images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.errors import UserError
from vision_jax.ops import losses

Array = jax.Array
LogitsOfImages = Callable[[Array], Array]  # f[B, H, W, C] -> f[B, C]
# f[B, H, W, C] -> (loss f[B], to be maximized; fooled bool[B])
LossOfImages = Callable[[Array], tuple[Array, Array]]
# (logits f[B, C], labels i32[B] or class probabilities f[B, C]) -> f[B], large where labels are not
# predicted
Loss = Callable[[Array, Array], Array]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy in nats, of hard or soft labels."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labels = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return losses.cross_entropy(logits, labels)


def margin(logits: Array, labels: Array) -> Array:
    """The largest other logit minus the label's; above 0 where the label is not the prediction.

    Carlini & Wagner 2017, f_6 without its lower bound.

    Examples:
      >>> margin(jnp.array([[1.0, 4.0, 2.0]]), jnp.array([1])).tolist()
      [-2.0]
    """
    own = jax.nn.one_hot(hard(labels), logits.shape[-1], dtype=bool)
    return jnp.where(own, -jnp.inf, logits).max(-1) - jnp.where(own, logits, 0).sum(-1)


def dlr(logits: Array, labels: Array) -> Array:
    """The margin over the distance of the first from the third logit (Croce & Hein 2020, eq. 6).

    Neither a shift nor a positive factor of the logits changes it.

    Examples:
      >>> dlr(jnp.array([[1.0, 5.0, 2.0]]), jnp.array([1])).tolist()
      [-0.75]

    Raises:
      UserError: fewer than 3 classes.
    """
    top = _top(logits, 3, "dlr")
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def hard(labels: Array) -> Array:
    """i32[B] of labels i32[B] or of class probabilities f[B, C]."""
    return labels if jnp.issubdtype(labels.dtype, jnp.integer) else jnp.argmax(labels, axis=-1)


def predicts(logits: Array, labels: Array) -> Array:
    """bool[B], whether the likeliest class is that of the labels, i32[B] or f[B, C]."""
    classes = hard(labels)
    return jnp.argmax(logits, axis=-1).astype(classes.dtype) == classes


def make_untargeted(
    logits_of_images: LogitsOfImages, labels: Array, loss: Loss = cross_entropy
) -> LossOfImages:
    """Away from labels: maximizes `loss`; fooled is whoever predicts another class.

    Args:
      logits_of_images: the model, deterministic: BatchNorm with its running statistics, no dropout.
      labels: i32[B], or class probabilities f[B, C], the likeliest of which is the class.
      loss: cross_entropy, dlr, margin, or any other Loss.
    """

    def loss_of_images(images: Array) -> tuple[Array, Array]:
        logits = _logits(logits_of_images, images)
        return loss(logits, labels), ~predicts(logits, labels)

    return loss_of_images


def make_targeted(
    logits_of_images: LogitsOfImages, targets: Array, loss: Loss = cross_entropy
) -> LossOfImages:
    """Towards targets i32[B] (or f[B, C]): minimizes `loss`; fooled is who predicts the target."""

    def loss_of_images(images: Array) -> tuple[Array, Array]:
        logits = _logits(logits_of_images, images)
        return -loss(logits, targets), predicts(logits, targets)

    return loss_of_images


def make_targeted_dlr(
    logits_of_images: LogitsOfImages, labels: Array, targets: Array
) -> LossOfImages:
    """From labels to targets by the targeted DLR loss (Croce & Hein 2020, eq. 7).

    Fooled is whoever no longer predicts the label: the target is a direction, not an aim.

    Args:
      logits_of_images: as for make_untargeted.
      labels: i32[B], the true classes.
      targets: i32[B], other classes.

    Raises:
      UserError: fewer than 4 classes, when the loss is traced.
    """

    def loss_of_images(images: Array) -> tuple[Array, Array]:
        logits = _logits(logits_of_images, images)
        top = _top(logits, 4, "targeted dlr")
        label, target = (
            jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]
            for classes in (labels, targets)
        )
        spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12
        return (target - label) / spread, ~predicts(logits, labels)

    return loss_of_images


def _logits(logits_of_images: LogitsOfImages, images: Array) -> Array:
    """Logits in float32 or better, whatever the model computes in."""
    logits = logits_of_images(images)
    return logits.astype(np.promote_types(logits.dtype, np.float32))


def _top(logits: Array, number: int, name: str) -> Array:
    if logits.shape[-1] < number:
        raise UserError(
            f"the {name} loss compares {number} classes and the model has {logits.shape[-1]};"
            " take the margin or cross-entropy"
        )
    return jax.lax.top_k(logits, number)[0]
