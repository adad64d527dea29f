"""Flow matching: the error of the velocity from noise to images, and images made by it.

SiT (Ma et al. 2024, https://arxiv.org/abs/2401.08740) where the model predicts velocities, JiT (Li
and He 2025, https://arxiv.org/abs/2511.13720) where it predicts images. Batches are {"image":
uint8[B, H, W, C], "label": i32[B], "index": i32[B], "mask": bool[B]}.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vision_jax import platform as platforms
from vision_jax.objective import Apply, Batch, Objective, forward_keys
from vision_jax.ops import flow
from vision_jax.ops.images import to_float
from vision_jax.ops.noise import normal

EVALUATION_SEED = 0  # of the noise and the times of evaluation, the same in every run
TOGETHER = 64  # images that accelerators make together
EVALUATION_TIMES = 4  # of each image: one in each quarter of the distribution


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
      predicts: what the model's outputs are.
      num_classes: K; the label K says none.
      shape: (H, W, C) of an image.
      time_mean, time_std: of the logits of the times that are drawn.
      unconditional: share of the images whose class is left out.
    """

    predicts: Literal["velocity", "image"]
    num_classes: int
    shape: tuple[int, int, int]
    time_mean: float
    time_std: float
    unconditional: float


@dataclass(frozen=True)
class Sampling:
    """How images are made of noise.

    Attributes:
      method: "euler" or "heun".
      steps: of the integration.
      guidance: scale of the class's guidance; 1 for none.
      interval: the times between which there is guidance.
      shift: of the times towards noise.
      seed: of the noise, which follows from it and an image's index alone.
      strength: share of the way that an image is taken back to noise, to begin with it.
    """

    method: Literal["euler", "heun"]
    steps: int
    guidance: float
    interval: tuple[float, float]
    shift: float
    seed: int
    strength: float = 1.0


def centered(images: jax.Array) -> jax.Array:
    """Images of [0, 1] in [-1, 1], as noise is added to them."""
    return 2 * images - 1


def make_objective(
    apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any], task: Task
) -> Objective:
    """The loss. The view has "noisy" f[B, H, W, C], "time" f[B], "asked" i32[B] and "velocity".

    All that is random follows from the step's key, and so from (seed, step).
    """

    def prepare(trainable, frozen, model_state, batch: Batch, key):
        del trainable, frozen, model_state
        noise_key, time_key, class_key = jax.random.split(key, 3)
        images = centered(to_float(batch["image"]))
        time = flow.draw_times(time_key, len(images), task.time_mean, task.time_std)
        hidden = jax.random.bernoulli(class_key, task.unconditional, (len(images),))
        return {
            **batch,
            **_mixed(images, jax.random.normal(noise_key, images.shape), time),
            "asked": jnp.where(hidden, task.num_classes, batch["label"]),
        }

    def forward(trainable, frozen, model_state, view, key, *, train):
        return apply(
            assemble({**trainable, **frozen}),
            model_state,
            view["noisy"],
            view["time"],
            view["asked"],
            train=train,
            keys=forward_keys(key) if train else {},
        )

    def criterion(trainable, outputs, view):
        del trainable
        return _losses(task, outputs["prediction"], view), {}

    return Objective(prepare, forward, criterion)


def _mixed(images: jax.Array, noise: jax.Array, time: jax.Array) -> dict[str, jax.Array]:
    return {"noisy": flow.mix(images, noise, time), "time": time, "clean": images, "noise": noise}


def _losses(task: Task, prediction: jax.Array, view: Mapping[str, jax.Array]) -> jax.Array:
    """f[B]: the mean squared error of the velocity.

    Where the model predicts images its velocity is bounded next to the image, and so is the true
    one: what is left of the time is at least flow.LEAST_LEFT in both.
    """
    noisy, time = view["noisy"], view["time"].reshape(-1, 1, 1, 1)
    true = view["clean"] - view["noise"]
    if task.predicts == "image":
        true = flow.as_velocity(view["clean"], noisy, time, "image")
    found = flow.as_velocity(prediction, noisy, time, task.predicts)
    return jnp.square(found - true).mean((1, 2, 3))


def make_sample(
    apply: Apply,
    assemble: Callable[[Mapping[str, jax.Array]], Any],
    task: Task,
    sampling: Sampling,
    platform: str | None = None,
) -> Callable[..., jax.Array]:
    """A function that makes images of noise, or of images.

        (trainable, frozen, model_state, labels i32[B], index i32[B]) -> f32[B, H, W, C] in [0, 1]

    An image follows from the seed and its index. Two arguments more make it of others: `images`
    f[B, H, W, C] in [0, 1], into which noise is mixed as `Sampling.strength` says, and `fresh`
    bool[B, H, W, 1], outside of which they stay as they are.

    On a CPU images are made one after the other, which takes a tenth more time, and is the same to
    the bit in every batch: products of more rows are rounded otherwise. Other platforms (see
    platform.py; the current one if None) make as many together as fill them.
    """
    together = 1 if (platform or platforms.current()) == "cpu" else TOGETHER
    times = flow.even_times(sampling.steps, sampling.shift, 1 - sampling.strength)

    def sample(trainable, frozen, model_state, labels, index, images=None, fresh=None):
        params = assemble({**trainable, **frozen})

        def predict(x, time, asked):
            outputs, _ = apply(params, model_state, x, time, asked, train=False, keys={})
            found, time = outputs["prediction"], time.reshape(-1, 1, 1, 1)
            return flow.as_velocity(found, x, time, task.predicts)

        def one(given):  # of a batch of one
            label, row, image, anew = jax.tree.map(lambda x: x[None], given)
            scale, interval = sampling.guidance, sampling.interval
            velocity = flow.guided(predict, label, task.num_classes, scale, interval=interval)
            noise = normal(
                jax.random.fold_in(jax.random.key(sampling.seed), row[0])[None], task.shape
            )

            def known(time):
                return flow.mix(centered(image), noise, time)

            x = noise if image is None else known(jnp.asarray(times[0], noise.dtype))
            keep = None if anew is None else lambda x, time: jnp.where(anew, x, known(time))
            x = flow.integrate(velocity, x, times, sampling.method, keep)
            return jnp.clip((x[0] + 1) / 2, 0, 1)

        given = (labels, index, images, fresh)
        if len(labels) > 1:
            return jax.lax.map(one, given, batch_size=together)
        # A loop of one turn is none to the compiler, which rounds otherwise: two turns of the same.
        twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), given)
        return jax.lax.map(one, twice, batch_size=together)[:1]

    return sample


def make_outputs(
    apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any], task: Task, sampling: Sampling
) -> Callable[..., dict[str, jax.Array]]:
    """What evaluation needs of a batch; all that is random follows from an image's index.

    "loss" f[B], the mean over EVALUATION_TIMES times, one in each part of their distribution;
    "generated" u8[B, H, W, C], made anew of the image's class.
    """
    sample = make_sample(apply, assemble, task, sampling)

    def draw(index: jax.Array) -> tuple[jax.Array, jax.Array]:  # (noise, place in a quarter)
        key = jax.random.fold_in(jax.random.key(EVALUATION_SEED), index)
        return jax.random.normal(key, task.shape), jax.random.uniform(jax.random.fold_in(key, 1))

    def outputs_fn(trainable, frozen, model_state, batch: Batch):
        images = centered(to_float(batch["image"]))
        noise, place = jax.vmap(draw)(batch["index"])
        params = assemble({**trainable, **frozen})

        def losses(part):
            quantile = (part + place) / EVALUATION_TIMES
            logit = jax.scipy.special.ndtri(jnp.clip(quantile, 1e-4, 1 - 1e-4))
            time = jax.nn.sigmoid(task.time_mean + task.time_std * logit)
            view = _mixed(images, noise, time)
            asked = (view["noisy"], time, batch["label"])
            outputs, _ = apply(params, model_state, *asked, train=False, keys={})
            return _losses(task, outputs["prediction"], view)

        made = sample(trainable, frozen, model_state, batch["label"], batch["index"])
        return {
            "loss": jax.lax.map(losses, jnp.arange(float(EVALUATION_TIMES))).mean(0),
            "generated": jnp.round(255 * made).astype(jnp.uint8),
            **{name: batch[name] for name in ("label", "mask", "index")},
        }

    return outputs_fn
