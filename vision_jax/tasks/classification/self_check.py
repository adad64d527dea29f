"""Does an attack's failure mean robustness? Signs that gradients are masked, looked for one by one.

A defence can stop gradients instead of attacks: saturated, quantized, random, not differentiable,
or simply the gradients of something else than what is computed (Athalye et al. 2018,
https://arxiv.org/abs/1802.00420; Carlini et al. 2019, https://arxiv.org/abs/1902.06705, section 5).
Each check compares two numbers that an honest model orders one way. A finding is a reason to
doubt the figures, not a proof; no finding is no proof either.

Run it in float32: half precision rounds logits, and so looks quantized.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.attacks import gradient, losses, norms
from vision_jax.attacks.examples import keys_of
from vision_jax.attacks.norms import Norm
from vision_jax.tasks.classification.under_attack import (
    Classifier,
    Examples,
    Outputs,
    make_over,
)

MOST = 64  # examples
STEPS = 40  # of the PGD that the others are compared with
QUERIES = 300  # of the black-box attack
RESTARTS = 2
VANISHED = 1e-30  # a gradient's largest entry: exp() of float32 ends there, at 0 or just above
REACH = 0.01  # L2 length over which slopes are measured in a thousand values


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
      name: for JSON.
      value: what was measured.
      limit: flagged above it.
      what: a sentence about the value.
      count: examples looked at.
    """

    name: str
    value: float
    limit: float
    what: str
    count: int

    @property
    def flagged(self) -> bool:
        """Whether it is a sign of gradient masking; a value that is no number is one."""
        return not self.value <= self.limit


def check_gradients(
    classifier: Classifier,
    examples: Examples,
    *,
    norm: Norm,
    epsilon: float,
    seed: int,
    surrogate: Classifier | None = None,
) -> list[Finding]:
    """All checks on the first 64 examples (a batch at most) that the model has right.

    Args:
      classifier: in float32.
      examples: from which they are taken.
      norm: of the attacks.
      epsilon: at which attacks are compared.
      seed: of the attacks' draws.
      surrogate: another model, whose adversarial examples are tried on this one.
    """
    over = partial(make_over, classifier)
    forward = over(_forward)
    right = forward(examples)["logits"].argmax(-1) == examples.labels
    some = examples.take(np.flatnonzero(right)[: min(MOST, classifier.batch_size)])
    count, values = len(some.labels), some.images[0].size
    if not count:
        return []
    everything = {"linf": 1.0, "l2": math.sqrt(values), "l1": float(values)}[norm]

    logits = forward(some)["logits"]
    turned = forward(some.take(np.arange(count)[::-1]))["logits"][::-1]
    others = forward(some)["logits"], turned
    spread = max(np.abs(other - logits).max() for other in others) / np.abs(logits).max()
    slopes = over(partial(_slopes, seed))(some)
    run_pgd = over(partial(_pgd, seed, norm))
    pgd, anywhere = run_pgd(some, epsilon), run_pgd(some, everything)
    step = over(partial(_fgsm, norm))(some, epsilon)
    search = over(partial(_search, seed, norm))(some, epsilon)

    def unlike_pgd(fooled: np.ndarray) -> float:
        return float(np.mean(fooled & ~pgd["fooled"]))

    # name, value, limit, what it is
    found = [
        ("repeats", spread, 1e-4, "repeated or reordered, logits differ by {:.1e} of the largest"),
        ("zero_gradients", np.mean(slopes["zero"]), 0.05, "{:.1%} have no gradient at all"),
        ("slopes", _mistake(slopes), 0.05, "gradients miss measured slopes by {:.1%}"),
        ("roughness", _roughness(slopes), 0.25, "slopes over two lengths differ by {:.1%}"),
        ("steps", np.mean(pgd["rise"] <= 0), 0.05, "PGD does not raise the loss of {:.1%}"),
        (
            "large_epsilon",
            1 - np.mean(anywhere["fooled"]),
            0.02,
            "{:.1%} withstand PGD that may change everything",
        ),
        ("single_step", unlike_pgd(step["fooled"]), 0.03, "{:.1%} fall to one step but not to PGD"),
        ("black_box", unlike_pgd(search["fooled"]), 0.03, "{:.1%} fall to random search alone"),
    ]
    if surrogate is not None:
        moved = make_over(surrogate, partial(_pgd, seed, norm))(some, epsilon)["image"]
        fooled = forward(replace(some, images=moved))["logits"].argmax(-1) != some.labels
        found.append(
            ("transfer", unlike_pgd(fooled), 0.03, "{:.1%} fall to another model's PGD alone")
        )
    return [
        Finding(name, float(value), limit, what.format(value), count)
        for name, value, limit, what in found
    ]


def _forward(logits_of_images, images, labels, index):
    del labels, index
    return {"logits": logits_of_images(images).astype(jnp.float32)}


def _fgsm(norm, logits_of_images, images, labels, index, epsilon):
    del index
    loss = losses.make_untargeted(logits_of_images, labels)
    return {"fooled": loss(gradient.fgsm(loss, images, epsilon=epsilon, norm=norm))[1]}


def _pgd(seed, norm, logits_of_images, images, labels, index, epsilon):
    """Of PGD on the cross-entropy: the images, who is fooled, and by how much the loss rose."""
    loss = losses.make_untargeted(logits_of_images, labels)
    moved = gradient.pgd(
        loss,
        images,
        keys_of(jax.random.key(seed), index),
        epsilon=epsilon,
        step_size=gradient.STEP_SHARE * epsilon / STEPS,
        steps=STEPS,
        norm=norm,
        restarts=RESTARTS,
        freeze_solved=True,
    )
    last, fooled = loss(moved)
    return {"image": moved, "fooled": fooled, "rise": last - loss(images)[0]}


def _slopes(seed, logits_of_images, images, labels, index):
    """Slopes of the margin along five directions: by the gradient, and measured over two lengths.

    Returns "zero" bool[B], no gradient of the cross-entropy; "length" f[B] of the margin's
    gradient; "told", "full" and "half" f[B, 5].
    """
    images_inside = jnp.clip(images, 0.05, 0.95)  # steps to both sides must exist
    loss = losses.make_untargeted(logits_of_images, labels, losses.margin)
    ascent = gradient.input_gradient(loss, images_inside)[0]
    axes = tuple(range(1, images.ndim))
    keys = keys_of(jax.random.key(seed), index)

    def draw(number, shape):
        folded = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(folded)

    coarse = draw(2, (2, 2, images.shape[-1]))
    directions = (
        ascent,
        jnp.ones_like(images),  # brightness and contrast, which normalizations take out
        images_inside - images_inside.mean(axes, keepdims=True),
        draw(1, images.shape[1:]),
        jax.image.resize(coarse, images.shape, "linear"),
    )
    reach = REACH * math.sqrt(images[0].size / 1000)

    def measure(direction, reach):
        ahead, behind = (loss(images_inside + s * reach * direction)[0] for s in (1, -1))
        return (ahead - behind) / (2 * reach)

    def along(direction):
        direction = norms.normalize(direction, "l2")
        told = (ascent * direction).sum(axes)
        return told, measure(direction, reach), measure(direction, reach / 2)

    told, full, half = (x.T for x in jax.lax.map(along, jnp.stack(directions)))
    attacked = losses.make_untargeted(logits_of_images, labels)
    zero = jnp.abs(gradient.input_gradient(attacked, images)[0]).max(axes) < VANISHED
    length = norms.size(ascent, "l2").reshape(-1)
    return {"zero": zero, "length": length, "told": told, "full": full, "half": half}


def _search(seed, norm, logits_of_images, images, labels, index, epsilon):
    """Random search over squares of one color, smaller and smaller; it sees margins alone.

    After Square (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049).
    """
    loss = losses.make_untargeted(logits_of_images, labels, losses.margin)
    height, width, channels = images.shape[1:]
    y, x = (jnp.arange(length, dtype=float) for length in (height, width))
    y, x = y[:, None, None], x[None, :, None]

    def square(key, number):
        place_key, color_key = jax.random.split(key)
        side = jnp.maximum(min(height, width) * 0.5 ** (1 + 4 * number / QUERIES), 1)
        corner = jax.random.uniform(place_key, (2,)) * jnp.array([height, width], float)
        top, left = corner - side / 2
        color = jax.random.rademacher(color_key, (1, 1, channels), images.dtype)
        return jnp.where((abs(y - top) < side) & (abs(x - left) < side), color, 0)

    def query(number, best):
        at, highest = best
        keys = jax.vmap(partial(jax.random.fold_in, data=number))(
            keys_of(jax.random.key(seed), index)
        )
        change = 2 * norms.normalize(jax.vmap(square, (0, None))(keys, number), norm)
        tried = norms.project(at + epsilon * change, images, epsilon, norm)
        margin = loss(tried)[0]
        better = margin > highest
        at = jnp.where(better[:, None, None, None], tried, at)
        return at, jnp.maximum(margin, highest)

    found = jax.lax.fori_loop(0, QUERIES, query, (images, loss(images)[0]))
    return {"fooled": loss(found[0])[1]}


def _mistake(slopes: Outputs) -> float:
    """By how much gradients miss the measured slopes, beyond what measuring misses itself.

    In the worst direction, as a share of the gradient's length; medians over the images.
    """
    length = np.median(slopes["length"])
    missed = np.median(np.abs(slopes["half"] - slopes["told"]), axis=0)
    noise = np.median(np.abs(slopes["full"] - slopes["half"]), axis=0)
    return max((missed - 4 * noise).max(), 0.0) / length if length else 0.0


def _roughness(slopes: Outputs) -> float:
    """The difference between slopes measured over two lengths, as a share of the gradient's."""
    length = np.median(slopes["length"])
    noise = np.median(np.abs(slopes["full"] - slopes["half"]), axis=0)
    return noise.max() / length if length else 0.0
