"""Flow matching: the error of the velocity from noise to images, and images made by it.

SiT (Ma et al. 2024, https://arxiv.org/abs/2401.08740) where the model predicts velocities, JiT (Li
and He 2025, https://arxiv.org/abs/2511.13720) where it predicts images. Batches are {"image":
uint8[B, H, W, C], "label": i32[B], "index": i32[B], "mask": bool[B]}, of latents "mean" and perhaps
"logvar" f32[B, h, w, Z] instead of the image, with captions also "caption" f32[B, 2, E], the
embeddings of an image's caption and of none.

What a model that predicts noise has learned, a DiT, is not learned here, but it makes images, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vision_jax import platform as platforms
from vision_jax.objective import Apply, Batch, Objective, forward_keys
from vision_jax.ops import ddim, flow, latents
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
      shape: (H, W, C) of what the model makes: an image, or its latents.
      time_mean, time_std: of the logits of the times that are drawn.
      unconditional: share of the images whose class or caption is left out.
      scales: (scaling_factor, shift_factor) of latents; None of pixels.
      captions: whether they are asked for instead of classes.
    """

    predicts: Literal["noise", "velocity", "image"]
    num_classes: int
    shape: tuple[int, int, int]
    time_mean: float
    time_std: float
    unconditional: float
    scales: tuple[float, float] | None = None
    captions: bool = False

    @property
    def condition(self) -> str:
        """The array of a batch that says what is asked for."""
        return "caption" if self.captions else "label"

    def asked(self, given: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(what is asked for, what stands for nothing) of this array: i32[B], or f32[B, E]."""
        if self.captions:
            return given[:, 0], given[:, 1]
        return given, jnp.full_like(given, self.num_classes)


@dataclass(frozen=True)
class Sampling:
    """How images are made of noise.

    Attributes:
      method: "euler" or "heun"; "ddim" where the model predicts noise.
      steps: of the integration.
      guidance: scale of the class's guidance; 1 for none.
      interval: the times between which there is guidance.
      shift: of the times towards noise; of no use to "ddim".
      seed: of the noise, which follows from it and an image's index alone.
      strength: share of the way that an image is taken back to noise, to begin with it.
    """

    method: Literal["euler", "heun", "ddim"]
    steps: int
    guidance: float
    interval: tuple[float, float]
    shift: float
    seed: int
    strength: float = 1.0


def centered(images: jax.Array) -> jax.Array:
    """Images of [0, 1] in [-1, 1], as noise is added to them."""
    return 2 * images - 1


def shown(x: jax.Array) -> jax.Array:
    """Images in [0, 1] of what a model of pixels makes."""
    return jnp.clip((x + 1) / 2, 0, 1)


# The loss ---------------------------------------------------------------------------------------


def make_objective(
    apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any], task: Task
) -> Objective:
    """The loss. The view has "noisy" f[B, H, W, C], "time" f[B], "asked" i32[B] and "velocity".

    All that is random follows from the step's key, and so from (seed, step).
    """

    def prepare(trainable, frozen, model_state, batch: Batch, key):
        del trainable, frozen, model_state
        noise_key, time_key, class_key, latent_key = jax.random.split(key, 4)
        clean = _clean(task, batch, latent_key)
        time = flow.draw_times(time_key, len(clean), task.time_mean, task.time_std)
        hidden = jax.random.bernoulli(class_key, task.unconditional, (len(clean),))
        asked, nothing = task.asked(batch[task.condition])
        hidden = hidden.reshape(-1, *(1,) * (asked.ndim - 1))
        return {
            **batch,
            **_mixed(clean, jax.random.normal(noise_key, clean.shape), time),
            "asked": jnp.where(hidden, nothing, asked),
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


def _clean(task: Task, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """What noise is added to f[B, H, W, C]: centered images, or their latents.

    The latents are drawn by the key, and are their means without one.
    """
    if task.scales is None:
        return centered(to_float(batch["image"]))
    keys = None if key is None else jax.random.split(key, len(batch["mean"]))
    return latents.scaled(latents.draw(batch["mean"], batch.get("logvar"), keys), *task.scales)


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


# Samples ----------------------------------------------------------------------------------------


def make_sample(
    apply: Apply,
    assemble: Callable[[Mapping[str, jax.Array]], Any],
    task: Task,
    sampling: Sampling,
    platform: str | None = None,
) -> Callable[..., jax.Array]:
    """A function that makes images or latents of noise, or of others.

        (trainable, frozen, model_state, asked, index i32[B]) -> f32[B, H, W, C]

    centered, as noise is added to them; asked are labels i32[B], or captions f32[B, 2, E], as in a
    batch. An image follows from the seed and its index. Two arguments more
    make it of others: `clean` f[B, H, W, C], into which noise is mixed as `Sampling.strength` says,
    and `fresh` bool[B, H, W, 1], outside of which they stay as they are.
    """

    def sample(trainable, frozen, model_state, asked, index, clean=None, fresh=None):
        params = assemble({**trainable, **frozen})

        def predict(x, time, asked):
            outputs, _ = apply(params, model_state, x, time, asked, train=False, keys={})
            return outputs["prediction"]

        def one(given):
            asked, row, clean, fresh = given
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), row)
            noise = normal(keys, task.shape)
            follow = _denoised if task.predicts == "noise" else _integrated
            return follow(predict, task, sampling, noise, asked, clean, fresh)

        return one_by_one(one, (asked, index, clean, fresh), platform)

    return sample


def _integrated(predict, task, sampling, noise, asked, clean, fresh):
    """What the flow leads to from noise f[B, H, W, C]."""
    times = flow.even_times(sampling.steps, sampling.shift, 1 - sampling.strength)

    def velocity(x, time, asked):
        found, time = predict(x, time, asked), time.reshape(-1, 1, 1, 1)
        return flow.as_velocity(found, x, time, task.predicts)

    def known(time):
        return flow.mix(clean, noise, time)

    asked, nothing = task.asked(asked)
    interval, scale = sampling.interval, sampling.guidance
    guided = flow.guided(velocity, asked, nothing, scale, interval=interval)
    x = noise if clean is None else known(jnp.asarray(times[0], noise.dtype))
    keep = None if fresh is None else lambda x, time: jnp.where(fresh, x, known(time))
    return flow.integrate(guided, x, times, sampling.method, keep)


def _denoised(predict, task, sampling, noise, asked, clean, fresh):
    """What DDIM leads to from noise f[B, H, W, C]."""
    signal, steps = ddim.kept_signal(), ddim.ddim_steps(sampling.steps)
    begin = len(steps) - max(1, round(len(steps) * sampling.strength))
    steps = steps[begin:]
    interval = tuple(ddim.STEPS * (1 - time) for time in reversed(sampling.interval))
    asked, nothing = task.asked(asked)
    guided = flow.guided(predict, asked, nothing, sampling.guidance, interval=interval)

    def known(signal):
        return ddim.noised(clean, noise, signal)

    whole = clean is None or begin == 0
    x = noise if whole else known(jnp.asarray(signal[steps[0]], noise.dtype))
    keep = None if fresh is None else lambda x, signal: jnp.where(fresh, x, known(signal))
    return ddim.ddim(guided, x, steps, signal, keep)


def one_by_one(
    function: Callable[[Any], jax.Array], given: Any, platform: str | None = None
) -> jax.Array:
    """function(given), whose arrays [B, ...] have a row for each image.

    On a CPU images are made one after the other, which takes a tenth more time, and is the same to
    the bit in every batch: products of more rows are rounded otherwise. Other platforms (see
    platform.py; the current one if None) make as many together as fill them.
    """
    together = 1 if (platform or platforms.current()) == "cpu" else TOGETHER

    def one(row):  # of a batch of one
        return function(jax.tree.map(lambda x: x[None], row))[0]

    if len(jax.tree.leaves(given)[0]) > 1:
        return jax.lax.map(one, given, batch_size=together)
    # A loop of one turn is none to the compiler, which rounds otherwise: two turns of the same.
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), given)
    return jax.lax.map(one, twice, batch_size=together)[:1]


# Evaluation -------------------------------------------------------------------------------------


def make_outputs(
    apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any], task: Task, sampling: Sampling
) -> Callable[..., dict[str, jax.Array]]:
    """What evaluation needs of a batch; all that is random follows from an image's index.

    "loss" f[B], the mean over EVALUATION_TIMES times, one in each part of their distribution;
    "generated", made anew of the image's class or caption: u8[B, H, W, C], or latents f32.
    """
    sample = make_sample(apply, assemble, task, sampling)

    def draw(index: jax.Array) -> tuple[jax.Array, jax.Array]:  # (noise, place in a quarter)
        key = jax.random.fold_in(jax.random.key(EVALUATION_SEED), index)
        noise_key, time_key = jax.random.split(key)
        return jax.random.normal(noise_key, task.shape), jax.random.uniform(time_key)

    def outputs_fn(trainable, frozen, model_state, batch: Batch):
        clean, given = _clean(task, batch), batch[task.condition]
        noise, place = jax.vmap(draw)(batch["index"])
        params = assemble({**trainable, **frozen})

        def losses(part):
            quantile = (part + place) / EVALUATION_TIMES
            logit = jax.scipy.special.ndtri(jnp.clip(quantile, 1e-4, 1 - 1e-4))
            time = jax.nn.sigmoid(task.time_mean + task.time_std * logit)
            view = _mixed(clean, noise, time)
            noisy, asked = view["noisy"], task.asked(given)[0]
            outputs, _ = apply(params, model_state, noisy, time, asked, train=False, keys={})
            return _losses(task, outputs["prediction"], view)

        made = sample(trainable, frozen, model_state, given, batch["index"])
        if task.scales is None:
            made = jnp.round(255 * shown(made)).astype(jnp.uint8)
        return {
            "loss": jax.lax.map(losses, jnp.arange(float(EVALUATION_TIMES))).mean(0),
            "generated": made,
            **{name: batch[name] for name in ("label", "mask", "index")},
        }

    return outputs_fn
