"""Our samplers against diffusers' schedulers: times, sigmas, steps, and samples of 10 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from vision_jax.certify.measure import relative_error
from vision_jax.certify.random_weights import randomize
from vision_jax.certify.references import make_reference
from vision_jax.convert.load import load_model
from vision_jax.ops.ddim import ddim, ddim_steps, kept_signal
from vision_jax.ops.flow import diffusers_times, guided, integrate

SIT = {"hidden_size": 32, "depth": 2, "num_heads": 2, "input_size": 8, "num_classes": 5,
       "predicts": "velocity"}  # fmt: skip
DIT = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8,
       "out_channels": 8}  # fmt: skip
VAE = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
       "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4}  # fmt: skip


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, 6.93])
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 28, 250])
def test_times_and_sigmas_of_flow_matching(steps, shift):
    for build in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler):
        scheduler = build(shift=shift)
        scheduler.set_timesteps(steps)
        sigmas = torch.unique_consecutive(scheduler.sigmas).numpy()
        ours = 1 - diffusers_times(steps, shift)
        np.testing.assert_allclose(ours, sigmas, rtol=0, atol=1e-7)
        timesteps = torch.unique_consecutive(scheduler.timesteps).numpy()
        np.testing.assert_allclose(1000 * ours[:-1], timesteps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("count", [1, 3, 10, 50, 250, 999, 1000])
def test_steps_and_signal_of_ddim(count, spacing):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(count)
    np.testing.assert_array_equal(ddim_steps(count, spacing), scheduler.timesteps.numpy())
    plain = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    np.testing.assert_allclose(kept_signal(), plain.alphas_cumprod.numpy(), rtol=3e-6)


def loaded(made, folder, dtype):
    """(model, variables) of a reference in a precision, and the reference in it."""
    model, variables = load_model(made.save(folder), dtype=jnp.dtype(dtype))
    module = made.module.to(getattr(torch, dtype))
    return model, jax.tree.map(lambda x: jnp.asarray(x, dtype), variables), module


def drawn(seed, dtype, count=3):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, 8, 8, 4)).astype(dtype)
    return noise, rng.integers(0, 5, count), torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_ten_steps_of_a_flow(method, dtype, tmp_path, request):
    """With guidance in three of four channels, and between two times only."""
    seed = request.config.option.seed
    made = make_reference("dit", "DiT", SIT)
    randomize(made.module, seed)
    noise, labels, x = drawn(seed, dtype)
    interval, scale = (0.2, 0.7), 2.5

    with jax.enable_x64(dtype == "float64"):
        model, variables, module = loaded(made, tmp_path, dtype)

        def predict(x, time, labels):
            return model.apply(variables, x, time, labels)["prediction"]

        @jax.jit
        def sample(noise, labels):
            velocity = guided(predict, labels, 5, scale, interval=interval, channels=3)
            return integrate(velocity, noise, diffusers_times(10, 1.5), method)

        ours = np.asarray(sample(jnp.asarray(noise), jnp.asarray(labels, jnp.int32)))

    build = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}
    scheduler = build[method](shift=1.5)
    scheduler.set_timesteps(10)
    if dtype == "float64":  # it computes its sigmas in it, and rounds them then
        exact = torch.from_numpy(1 - diffusers_times(10, 1.5))
        repeats = torch.unique_consecutive(scheduler.sigmas, return_counts=True)[1]
        scheduler.sigmas = exact.repeat_interleave(repeats)
        repeats = torch.unique_consecutive(scheduler.timesteps, return_counts=True)[1]
        scheduler.timesteps = 1000 * exact[:-1].repeat_interleave(repeats)
    asked, none = torch.from_numpy(labels), torch.full((3,), 5)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            time = 1 - timestep.to(x.dtype) / 1000
            velocity = module(x, time.expand(3), asked)[:, :4]
            if interval[0] <= time <= interval[1]:
                bare = module(x, time.expand(3), none)[:, :3]
                velocity[:, :3] = bare + scale * (velocity[:, :3] - bare)
            x = scheduler.step(-velocity, timestep, x, return_dict=False)[0]
    # Each of diffusers' steps is rounded to float32, whatever the model's precision is.
    assert relative_error(ours, x.numpy()) <= {"float32": 1e-5, "float64": 1e-6}[dtype]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_ten_steps_of_ddim_are_the_pipelines(scale, tmp_path, request):
    """diffusers' whole DiTPipeline: noise, guidance, steps, latents, decoder, images."""
    seed = request.config.option.seed
    made = make_reference("diffusers", "DiTTransformer2DModel", DIT)
    randomize(made.module, seed)
    vae = randomize(AutoencoderKL(**VAE).eval(), seed + 1)
    vae.save_pretrained(tmp_path / "vae")
    scheduler = DDIMScheduler(clip_sample=False)
    pipeline = DiTPipeline(made.module, vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    labels = [3, 999, 0]
    generator = torch.Generator().manual_seed(seed)
    theirs = pipeline(
        labels, guidance_scale=scale, num_inference_steps=10, output_type="np", generator=generator
    ).images
    noise = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(seed))

    model, variables, _ = loaded(made, tmp_path / "transformer", "float32")
    decoder, of_decoder = load_model(str(tmp_path / "vae"))

    @jax.jit
    def sample(noise, labels):
        def predict(x, step, labels):
            return model.apply(variables, x, step, labels)["prediction"]

        found = guided(predict, labels, model.num_classes, scale)
        latents = ddim(found, noise, ddim_steps(10), kept_signal())
        return decoder.apply(of_decoder, latents, method="decode")

    images = sample(jnp.asarray(noise.permute(0, 2, 3, 1).numpy()), jnp.asarray(labels))
    assert relative_error(np.clip(np.asarray(images), 0, 1), theirs) <= 1e-5
