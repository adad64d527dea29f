"""Self-distillation: a student learns the teacher's soft choice among prototypes on other views.

DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294), the loss of masked patches of iBOT
(Zhou et al. 2022, https://arxiv.org/abs/2111.07832), Sinkhorn-Knopp in place of the center
(Caron et al. 2020, https://arxiv.org/abs/2006.09882) and the spread of features of DINOv2 (Oquab
et al. 2023, https://arxiv.org/abs/2304.07193; Sablayrolles et al. 2019,
https://arxiv.org/abs/1806.03198). Where ports go wrong: a view is not compared with itself, and
the mean is over the pairs that are left; a batch is centered by the center from before it, which
moves afterwards; KoLeo adds its epsilon to each difference and once more to the distance.
"""

import jax
import jax.numpy as jnp

KOLEO_EPSILON = 1e-8
SINKHORN_ITERATIONS = 3

# The teacher's side -------------------------------------------------------------------------------


def centered_probabilities(
    logits: jax.Array, center: jax.Array, temperature: jax.typing.ArrayLike
) -> jax.Array:
    """Softmax f[..., K] of logits f[..., K] less the center f[1, K], over the temperature."""
    center = center.reshape((1,) * (logits.ndim - 1) + (-1,))
    return jax.nn.softmax((logits - center) / temperature)


def sinkhorn_knopp(
    logits: jax.Array, temperature: jax.typing.ArrayLike, weights: jax.Array
) -> jax.Array:
    """Probabilities f[N, K] of which the whole batch uses each prototype about equally.

    Rows and columns are scaled in turn, three times, the rows last, as in DINOv2's code; here by
    logarithms, so that no temperature overflows.

    Args:
      logits: f[N, K].
      temperature: of the softmax.
      weights: f[N], 1 for rows that count and 0 for those that stand in for none.

    Examples:
      >>> sinkhorn_knopp(jnp.array([[1.0, 0.0], [1.0, 0.0]]), 0.1, jnp.ones(2)).round(3).tolist()
      [[0.5, 0.5], [0.5, 0.5]]
    """
    scaled = logits / temperature
    counted = weights[:, None]
    for _ in range(SINKHORN_ITERATIONS):
        scaled -= jax.nn.logsumexp(scaled, axis=0, b=counted, keepdims=True)
        scaled -= jax.nn.logsumexp(scaled, axis=1, keepdims=True)
    return jnp.exp(scaled)


def update_center(
    center: jax.Array, logits: jax.Array, weights: jax.Array, momentum: float
) -> jax.Array:
    """The center f[1, K] after a batch of the teacher's logits f[N, K]; weights f[N] are 0 or 1.

    A batch without a row that counts leaves it where it is.

    Examples:
      >>> update_center(jnp.zeros((1, 2)), jnp.array([[1.0, 3.0]]), jnp.ones(1), 0.9).round(3)
      Array([[0.1, 0.3]], dtype=float32)
    """
    count = weights.sum()
    mean = (logits * weights[:, None]).sum(0, keepdims=True) / jnp.maximum(count, 1)
    moved = center * momentum + mean.astype(center.dtype) * (1 - momentum)
    return jnp.where(count > 0, moved, center)


def entropy(probabilities: jax.Array) -> jax.Array:
    """f[...], in nats, of f[..., K]; at most log K."""
    return jax.scipy.special.entr(probabilities).sum(-1)


# Schedules ----------------------------------------------------------------------------------------


def teacher_temperature(
    step: jax.typing.ArrayLike, *, first: float, last: float, warmup_steps: int
) -> jax.Array:
    """The temperature at update `step`, counted from 0: a line over `warmup_steps` updates.

    Examples:
      >>> warming = {"first": 0.04, "last": 0.07, "warmup_steps": 4}
      >>> [round(float(teacher_temperature(t, **warming)), 3) for t in range(5)]
      [0.04, 0.05, 0.06, 0.07, 0.07]
    """
    progress = jnp.asarray(step, jnp.float32) / max(warmup_steps - 1, 1)
    progress = jnp.where(warmup_steps > 1, jnp.clip(progress, 0, 1), 1)
    return first + (last - first) * progress


# Losses -------------------------------------------------------------------------------------------


def dino_losses(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:  # f[B]
    """Each image's mean cross-entropy over pairs of a teacher's and another of the student's views.

    Args:
      student: logits f[S, B, K]; the first views are the teacher's, in its order.
      teacher: probabilities f[T, B, K].
      temperature: of the student.

    Raises:
      ValueError: one view on both sides, of which no pair is left.
    """
    views = teacher.shape[0], student.shape[0]
    pairs = views[0] * views[1] - min(views)
    if pairs < 1:
        raise ValueError(f"{views[0]} teacher's and {views[1]} student's views make no pair")
    log_probabilities = jax.nn.log_softmax(student / temperature)
    crossed = -jnp.einsum("tbk,sbk->tsb", teacher, log_probabilities)
    others = 1 - jnp.eye(*views, dtype=crossed.dtype)[..., None]  # not a view with itself
    return (crossed * others).sum((0, 1)) / pairs


def masked_patch_losses(
    student: jax.Array, teacher: jax.Array, masked: jax.Array, temperature: float
) -> jax.Array:  # f[B]
    """Each image's mean cross-entropy over its masked patches, 0 of an image without one.

    Args:
      student: logits f[B, M, K] of the image with its patches masked.
      teacher: probabilities f[B, M, K] of the same patches of the whole image.
      masked: f[B, M], 1 where a patch is masked and 0 where none is in the place.
      temperature: of the student.
    """
    log_probabilities = jax.nn.log_softmax(student / temperature)
    crossed = -(teacher * log_probabilities).sum(-1)  # [B, M]
    return (crossed * masked).sum(1) / jnp.maximum(masked.sum(1), 1)


def koleo_losses(features: jax.Array) -> jax.Array:  # f[B]
    """Minus the logarithm of each row's distance to the nearest other one, of unit vectors.

    The gradient is the neighbor's too.

    Args:
      features: f[B, D], B at least 2.

    Examples:
      >>> [round(float(x), 4) for x in koleo_losses(jnp.array([[2.0, 0.0], [0.0, 1.0]]))]
      [-0.3466, -0.3466]
    """
    norm = jnp.linalg.norm(features, axis=1, keepdims=True)
    unit = features / jnp.maximum(norm, KOLEO_EPSILON)
    similar = jax.lax.stop_gradient(unit @ unit.T)
    similar = jnp.where(jnp.eye(len(unit), dtype=bool), -2, similar)
    nearest = unit[similar.argmax(1)]
    distance = jnp.sqrt(((unit - nearest + KOLEO_EPSILON) ** 2).sum(1))
    return -jnp.log(distance + KOLEO_EPSILON)


# Of what was learned ------------------------------------------------------------------------------


def effective_rank(features: jax.Array) -> jax.Array:
    """exp of the entropy of the normalized singular values of features f[N, D]: 1 to min(N, D).

    RankMe (Garrido et al. 2023, https://arxiv.org/abs/2210.02885), of the features less their mean,
    so that features that all agree have rank 1 also where they are far from zero.

    Examples:
      >>> float(effective_rank(jnp.array([[1.0, 0.0], [-1.0, 0.0]])).round(3))
      1.0
      >>> float(effective_rank(jnp.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])).round(3))
      2.0
    """
    centered = features - features.mean(0, keepdims=True)
    values = jnp.linalg.svd(centered, compute_uv=False)
    shares = values / jnp.maximum(values.sum(), jnp.finfo(values.dtype).tiny)
    return jnp.exp(entropy(shares))
