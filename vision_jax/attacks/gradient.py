"""Attacks by gradient ascent on the loss: FGSM, PGD, and PGD with momentum and diversity."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vision_jax.attacks import norms
from vision_jax.attacks.examples import where
from vision_jax.attacks.losses import LossOfImages
from vision_jax.attacks.norms import Norm
from vision_jax.errors import UserError

Array = jax.Array

STEP_SHARE = 2.5  # of a step: epsilon / steps times this (Madry et al. 2018)


def input_gradient(loss_of_images: LossOfImages, images: Array) -> tuple[Array, Array, Array]:
    """(gradient of each example's loss with respect to its image, loss f[B], fooled bool[B])."""

    def total(images):
        loss, fooled = loss_of_images(images)
        return loss.sum(), (loss, fooled)

    gradient, (loss, fooled) = jax.grad(total, has_aux=True)(images)
    return gradient, loss, fooled


def fgsm(
    loss_of_images: LossOfImages,
    images: Array,
    keys: Array | None = None,
    *,
    epsilon: ArrayLike,
    norm: Norm = "linf",
    pixel_mask: Array | None = None,
) -> Array:
    """One whole step from the images themselves (Goodfellow et al. 2015); it draws nothing."""
    return pgd(
        loss_of_images,
        images,
        keys,
        epsilon=epsilon,
        step_size=epsilon,
        steps=1,
        norm=norm,
        pixel_mask=pixel_mask,
        random_start=False,
    )


def pgd(
    loss_of_images: LossOfImages,
    images: Array,
    keys: Array | None,
    *,
    epsilon: ArrayLike,
    step_size: ArrayLike,
    steps: int,
    norm: Norm = "linf",
    pixel_mask: Array | None = None,
    random_start: bool = True,
    start: Array | None = None,
    restarts: int = 1,
    momentum: float = 0.0,
    diversity: float = 0.0,
    smallest: float = 0.9,
    freeze_solved: bool = False,
) -> Array:
    """Steepest ascent of the loss with a projection after each step (Madry et al. 2018).

    The last point of each restart counts. One restart costs `steps` forward passes with the input's
    gradient; more restarts cost one forward pass each besides, and so does `freeze_solved`.

    Args:
      loss_of_images: what is maximized; see the package.
      images: f[B, H, W, C] in [0, 1].
      keys: key[B]; None where nothing is drawn.
      epsilon: radius, a scalar or f[B], in units of the pixels; may be traced.
      step_size: the norm of a step, a scalar or f[B]; may be traced.
      steps: number of steps of each restart.
      norm: of the ball and of the steps.
      pixel_mask: bool[B, H, W, 1], True where the attack may change the image: not in padding; None
        for everywhere.
      random_start: from a uniform point of the ball instead of the image.
      start: f[B, H, W, C], the point to start at instead of either.
      restarts: of each example, the end that fools is kept, then the one of the highest loss.
      momentum: share of the last direction that is added to the gradient, both of L1 norm 1
        (MI-FGSM; Dong et al. 2018, whose share is 1).
      diversity: probability that a step sees its image smaller and on black, at a random size and
        place (DI-FGSM; Xie et al. 2019, who took 0.5).
      smallest: side of the smallest such image over the full side.
      freeze_solved: an example that fools moves no more, and one whose image fools not at all.

    Returns:
      f[B, H, W, C] within epsilon of images and in [0, 1].

    Raises:
      UserError: a `start` and several restarts; no keys for what is to be drawn.
    """
    draws = diversity > 0 or (random_start and start is None)
    if start is not None and restarts > 1:
        raise UserError("attack: restarts from one given start are all the same; give one of both")
    if keys is None:
        if draws:
            raise UserError("attack: keys are missing for its random start or diversity")
        keys = jax.random.split(jax.random.key(0), len(images))
    images = images.astype(np.promote_types(images.dtype, np.float32))
    length = norms.per_example(step_size, images)

    def ascend(restart: ArrayLike, solved: Array) -> Array:
        own = _fold(keys, restart)
        if start is not None:
            begin = start.astype(images.dtype)
        elif random_start:
            begin = norms.random_start(_fold(own, 0), images, epsilon, norm)
        else:
            begin = images
        if pixel_mask is not None:
            begin = jnp.where(pixel_mask, begin, images)

        def step(carry, number):
            at, direction = carry
            seen = loss_of_images
            if diversity:
                draw = partial(diversify, _fold(own, number), probability=diversity)
                seen = lambda x: loss_of_images(draw(x, smallest=smallest))  # noqa: E731
            gradient, _, fooled = input_gradient(seen, at)
            if pixel_mask is not None:
                gradient = jnp.where(pixel_mask, gradient, 0)
            direction = momentum * direction + norms.normalize(gradient, "l1")
            moved = at + length * norms.steepest(direction, at, norm)
            moved = norms.project(moved, images, epsilon, norm)
            if freeze_solved:
                fooled = loss_of_images(at)[1] if diversity else fooled
                moved = where(solved | fooled, at, moved)
            return (moved, direction), None

        carry = where(solved, images, begin), jnp.zeros_like(images)
        return jax.lax.scan(step, carry, jnp.arange(1, steps + 1))[0][0]

    solved = jnp.zeros(len(images), bool)
    if freeze_solved:
        solved = loss_of_images(images)[1]
    if restarts == 1:
        return ascend(0, solved)
    return _worst_of(restarts, ascend, loss_of_images, images, solved, freeze_solved)


def _worst_of(
    restarts: int,
    ascend: Callable[[ArrayLike, Array], Array],
    loss_of_images: LossOfImages,
    images: Array,
    solved: Array,
    freeze_solved: bool,
) -> Array:
    """Of each example's ends the one that fools, then the one of the highest loss."""

    def keep_worst(best, restart):
        kept, highest, solved = best
        ends = ascend(restart, solved & freeze_solved)
        loss, fooled = loss_of_images(ends)
        worse = (fooled > solved) | ((fooled == solved) & (loss > highest))
        worse &= ~(solved & freeze_solved)
        best = where(worse, ends, kept), jnp.where(worse, loss, highest), solved | fooled
        return best, None

    lowest = jnp.full(len(images), -jnp.inf, images.dtype)
    return jax.lax.scan(keep_worst, (images, lowest, solved), jnp.arange(restarts))[0][0]


def _fold(keys: Array, number: ArrayLike) -> Array:
    """key[B]: each key with the number folded in."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def diversify(keys: Array, images: Array, *, probability: float, smallest: float) -> Array:
    """Images as they are, or smaller (bilinear) at a random place on black; one draw an example.

    Args:
      keys: key[B].
      images: f[B, H, W, C].
      probability: of a smaller one.
      smallest: the smallest height over the full height, in (0, 1).
    """
    height, width = images.shape[1:3]

    def one(key: Array, image: Array) -> Array:
        chosen, size, place = draw_smaller(key, (height, width), probability, smallest)
        smaller = jax.image.scale_and_translate(
            image,
            image.shape,
            (0, 1),
            (size / jnp.array([height, width])).astype(image.dtype),
            place.astype(image.dtype),
            "linear",
            antialias=False,
        )
        return jnp.where(chosen, smaller, image)

    return jax.vmap(one)(keys, images)


def draw_smaller(
    key: Array, shape: tuple[int, int], probability: float, smallest: float
) -> tuple[Array, Array, Array]:
    """(whether it is made smaller, size i32[2], place i32[2] of its corner), all uniform."""
    chance_key, size_key, row_key, column_key = jax.random.split(key, 4)
    height, width = shape
    row = jax.random.randint(size_key, (), int(smallest * height), height)
    size = jnp.stack([row, row * width // height])
    top = jax.random.randint(row_key, (), 0, height - size[0] + 1)
    left = jax.random.randint(column_key, (), 0, width - size[1] + 1)
    return jax.random.bernoulli(chance_key, probability), size, jnp.stack([top, left])
