"""Losses of logits of each pixel: arrays in, one number per image out, at least in float32.

Pixels whose label is 255 count nowhere. A loss of pixels is a mean over all counted ones of an
update, so it is divided by their number, `count`, and not image by image: the mean of the results
over B images is what torch's reduction "mean" gives, and micro-batches that know the count of the
whole update add up to it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.errors import UserError

Array = jax.Array
IGNORED = 255
SMOOTH = 1.0  # of Dice, as in transformers' dice_loss
LEAST_LOG = 1.02  # ENet's constant: no class weighs more than 1 / log 1.02 = 50


def pixel_losses(logits: Array, label: Array, *, gamma: float = 0.0) -> Array:
    """Cross-entropy of each pixel, times (1 - p)^gamma: f[B, H, W], 0 where it is ignored.

    p is the probability of the true class; gamma 0 is plain cross-entropy, above 0 the focal loss
    (Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 4, of a softmax).

    Args:
      logits: f[B, H, W, K].
      label: u8[B, H, W], below K or 255.
      gamma: at least 0.
    """
    logits = logits.astype(np.promote_types(logits.dtype, np.float32))
    counted = label != IGNORED
    place = jnp.where(counted, label, 0).astype(jnp.int32)
    logs = jax.nn.log_softmax(logits, axis=-1)
    log_p = jnp.take_along_axis(logs, place[..., None], axis=-1)[..., 0]  # [B, H, W]
    losses = -log_p
    if gamma:
        # The gradient of 0 ** gamma has no limit below gamma 1; p is 1 only by rounding.
        losses *= jnp.maximum(-jnp.expm1(log_p), jnp.finfo(log_p.dtype).tiny) ** gamma
    return jnp.where(counted, losses, 0.0)


def class_counts(label: Array, num_classes: int) -> Array:
    """f32[K]: how many pixels of u8[B, H, W] are of each class."""
    return jnp.bincount(label.reshape(-1), length=IGNORED + 1)[:num_classes].astype(jnp.float32)


def frequency_weights(counts: Array) -> Array:
    """f[K]: 1 / log(1.02 + share of the pixels), of counts f[K].

    Paszke et al. 2016 (ENet), https://arxiv.org/abs/1606.02147, section 5.2.
    """
    return 1 / jnp.log(LEAST_LOG + counts / jnp.maximum(counts.sum(), 1))


def weighted_mean(
    losses: Array,
    label: Array,
    weights: Array | None = None,
    whole: Array | None = None,
    *,
    alone: bool = False,
) -> Array:
    """Losses of pixels f[B, H, W] -> f[B] of images, whose mean is that over all counted pixels.

    Args:
      losses: 0 where they don't count.
      label: u8[B, H, W].
      weights: f[K] of the classes; the mean is a weighted one then, as torch's cross_entropy has
        it.
      whole: u8[N, H, W], the labels of all of an update, of which these are a micro-batch.
      alone: an image's loss is the mean over its own pixels and depends on no other image.
    """
    whole = label if whole is None else whole

    def weigh(label):
        counted = (label != IGNORED).astype(losses.dtype)
        if weights is None:
            return counted
        return counted * weights.astype(losses.dtype)[jnp.where(label != IGNORED, label, 0)]

    own = weigh(label)
    sums = (losses * own).sum((1, 2))
    counts = own.sum((1, 2)) if alone else weigh(whole).sum() / len(whole)
    return sums / jnp.maximum(counts, jnp.finfo(losses.dtype).tiny)


def dice_losses(logits: Array, label: Array) -> Array:
    """1 - Dice of the softmax's probabilities, mean over the classes of each image: f[B].

    Dice of a class is (2 Σ p t + 1) / (Σ p + Σ t + 1) over the image's counted pixels, t being 1
    where the class is. Classes that the image has not are left out of the mean; an image without a
    counted pixel has loss 0. Milletari et al. 2016, https://arxiv.org/abs/1606.04797, without its
    squares; the smoothing is transformers'.

    Args:
      logits: f[B, H, W, K].
      label: u8[B, H, W], below K or 255.
    """
    logits = logits.astype(np.promote_types(logits.dtype, np.float32))
    counted = (label != IGNORED)[..., None]
    p = jnp.where(counted, jax.nn.softmax(logits, axis=-1), 0.0)
    t = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)  # 255 is no class: zeros
    both, ours, theirs = (x.sum((1, 2)) for x in (p * t, p, t))  # [B, K]
    losses = 1 - (2 * both + SMOOTH) / (ours + theirs + SMOOTH)
    there = (theirs > 0).astype(losses.dtype)
    return (losses * there).sum(1) / jnp.maximum(there.sum(1), 1)


def check_weights(weights: tuple[float, ...], num_classes: int) -> None:
    """Checks weights of classes.

    Raises:
      UserError: another number of them.
    """
    if weights and len(weights) != num_classes:
        raise UserError(
            f"config.loss.class_weights: {len(weights)} for {num_classes} classes: give one for"
            " each"
        )
