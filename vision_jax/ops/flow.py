"""Flow matching (Lipman et al. 2022, https://arxiv.org/abs/2210.02747): from noise to images.

x = time · image + (1 - time) · noise, so time goes from 0, noise, to 1, image, as SiT and JiT count
it, and a velocity is image - noise. diffusers counts the other way: its sigma is 1 - time, its
timestep 1000 · sigma, and its velocity points to the noise.

A sample is `integrate`d in one loop, whose memory does not depend on the number of steps; its noise
is drawn by a key of its own (ops/noise.py), so that it does not depend on its batch.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x[B, ...], time[]) -> velocity[B, ...]
Predict = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, time[B], labels[B, ...])

LEAST_LEFT = 0.05  # JiT's bound of the division by what is left of the time


def mix(images: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
    """x f[B, ...] at times f[B], or at one time f[], between noise and images of its shape."""
    time = time.reshape(-1, *(1,) * (images.ndim - 1)).astype(images.dtype)
    return time * images + (1 - time) * noise


def draw_times(key: jax.Array, count: int, mean: float, std: float) -> jax.Array:
    """f32[count] in (0, 1) whose logits are normal (Esser et al. 2024, section 3.1)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (count,)))


def even_times(steps: int, shift: float = 1.0, start: float = 0.0) -> np.ndarray:
    """Times f64[steps + 1] from `start` to 1, evenly spaced but for the shift.

    Args:
      steps: at least 1.
      shift: above 1 spends more steps near the noise: sigma = 1 - time becomes
        shift · sigma / (1 + (shift - 1) · sigma) (Esser et al. 2024, section 5.3.2).
      start: where the way begins that is left, of an image with some noise.

    Examples:
      >>> even_times(4).tolist()
      [0.0, 0.25, 0.5, 0.75, 1.0]
      >>> even_times(2, shift=3.0).tolist()
      [0.0, 0.25, 1.0]
    """
    start = 1 - start
    unshifted = start / (shift - (shift - 1) * start)  # so that the first is `start` all the same
    return 1 - _shifted(np.linspace(unshifted, 0.0, steps + 1), shift)


def diffusers_times(steps: int, shift: float = 1.0) -> np.ndarray:
    """Times f64[steps + 1] of diffusers 0.42's FlowMatchEulerDiscreteScheduler and Heun's.

    Its last step but the end is at sigma 1/1000, as every step of training is a multiple of it, and
    what is there is shifted twice.

    Examples:
      >>> diffusers_times(3).round(4).tolist()
      [0.0, 0.4995, 0.999, 1.0]
    """
    first = _shifted(np.float32(1), shift)
    last = _shifted(np.float32(1) / np.float32(1000), shift)
    sigmas = _shifted(np.linspace(float(first) * 1000, float(last) * 1000, steps) / 1000, shift)
    return 1 - np.append(sigmas, 0.0)


def _shifted(sigmas, shift):
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def integrate(
    velocity: Velocity,
    noise: jax.Array,
    times: np.ndarray | jax.Array,
    method: Literal["euler", "heun"] = "heun",
    keep: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Follows velocities from noise to images, in one loop under jit.

    Args:
      velocity: (x f[B, ...], time f[]) -> f[B, ...].
      noise: f[B, ...], what is there at the first time.
      times: [T + 1], rising.
      method: "euler" takes T velocities; "heun" corrects each step but the last by the velocity at
        its end, and takes 2 T - 1 (Karras et al. 2022, algorithm 1).
      keep: (x, time f[]) -> x after each step, which puts back what is known of the images.

    Returns:
      f[B, ...] at the last time, in the dtype of `noise`.

    Examples:
      >>> integrate(lambda x, time: 2 * jnp.ones_like(x), jnp.zeros(3), even_times(4)).tolist()
      [2.0, 2.0, 2.0]
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"method {method!r} is none of euler, heun")
    dtype = np.promote_types(noise.dtype, np.float32)  # half precision is too coarse for times
    times = jnp.asarray(times, dtype)
    pairs = jnp.stack([times[:-1], times[1:]], axis=1)

    def moved(x, by, slope):
        return (x.astype(dtype) + by * slope.astype(dtype)).astype(x.dtype)

    kept = keep or (lambda x, time: x)

    def euler(x, pair):
        start, end = pair
        return kept(moved(x, end - start, velocity(x, start)), end), None

    def heun(x, pair):
        start, end = pair
        slope = velocity(x, start)
        again = velocity(moved(x, end - start, slope), end)
        return kept(moved(x, end - start, (slope + again) / 2), end), None

    if method == "euler":
        return jax.lax.scan(euler, noise, pairs)[0]
    x, _ = jax.lax.scan(heun, noise, pairs[:-1])
    return euler(x, pairs[-1])[0]


def as_velocity(
    prediction: jax.Array,
    x: jax.Array,
    time: jax.Array,
    predicts: str,
    least: float = LEAST_LEFT,
) -> jax.Array:
    """The velocity at x of what a model predicts.

    Args:
      prediction: f[B, ...].
      x: f[B, ...], what it was given.
      time: f[], or f[B, 1, ...] of each, from 0 to 1.
      predicts: "velocity" is it already; of an "image" it is (image - x) / (1 - time).
      least: of 1 - time in this division.
    """
    if predicts == "velocity":
        return prediction
    if predicts != "image":
        raise ValueError(f"predicts {predicts!r}: a flow takes a velocity or an image")
    return (prediction - x) / jnp.maximum(1 - time, least)


def guided(
    predict: Predict,
    labels: jax.Array,
    none: int | jax.Array | np.ndarray,
    scale: float,
    *,
    interval: tuple[float, float] = (-np.inf, np.inf),
    channels: int | None = None,
) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022): away from what no class predicts.

    none's + scale · (the class's - none's), both out of one forward of 2 B inputs; outside of the
    interval, and of scale 1, the class's alone, of B inputs.

    Args:
      predict: (x f[B, ..., C], time f[B], labels i32[B]) -> f[B, ..., C].
      labels: i32[B], or embeddings of captions f[B, E].
      none: the label that says none, or the embedding f[E] of no caption.
      scale: a number of Python, not traced; 1 guides nowhere.
      interval: (first, last) time at which it guides (Kynkäänniemi et al. 2024).
      channels: how many of C it guides, the first; all by default. The samples of the originals of
        DiT and SiT are guided in 3 of 4.

    Returns:
      (x f[B, ..., C], time f[]) -> f[B, ..., C], for `integrate` and ops.ddim.
    """

    def plain(x, time):
        return predict(x, jnp.full(x.shape[:1], time), labels)

    def both(x, time):
        twice = jnp.concatenate([x, x])
        nothing = jnp.broadcast_to(jnp.asarray(none, labels.dtype), labels.shape)
        asked = jnp.concatenate([labels, nothing])
        of_class, of_none = jnp.split(predict(twice, jnp.full(twice.shape[:1], time), asked), 2)
        made = of_none + scale * (of_class - of_none)
        if channels is None:
            return made
        return jnp.concatenate([made[..., :channels], of_class[..., channels:]], axis=-1)

    def velocity(x, time):
        inside = (time >= interval[0]) & (time <= interval[1])
        return jax.lax.cond(inside, both, plain, x, time)

    if scale == 1:
        return plain
    return both if interval == (-np.inf, np.inf) else velocity
