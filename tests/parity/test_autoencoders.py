"""Our AutoencoderKL and AutoencoderTiny against diffusers': outputs, gradients, draws, files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, sample_images
from vision_jax.certify.references import make_reference
from vision_jax.convert.diffusers import PICKLE_FILE, WEIGHTS_FILE
from vision_jax.convert.load import load_model
from vision_jax.convert.tables import ZOO
from vision_jax.errors import UserError
from vision_jax.models.families import build_model, find_variant
from vision_jax.trees.paths import flatten

BARS = {"float32": 1e-5, "float64": 1e-12}


def kl(*widths, **more):
    count = len(widths)
    return {
        "block_out_channels": widths, "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count, "norm_num_groups": 4, **more,
    }  # fmt: skip


KL = {
    "two stages": kl(8, 12),
    "four stages": kl(8, 8, 16, 12, layers_per_block=2, latent_channels=3),
    "one stage": kl(8, norm_num_groups=8),
    "SD 3": kl(8, 12, 12, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
               scaling_factor=1.5305, shift_factor=0.0609),
    "no attention": kl(8, 12, mid_block_add_attention=False, use_post_quant_conv=False),
    "32 groups": kl(32, 64, norm_num_groups=32),
    "grey": kl(8, 8, 12, in_channels=1, out_channels=1),
}  # fmt: skip
TINY = {
    "as published": {},
    "16 latents": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "other depths": {
        "scaling_factor": 0.7, "shift_factor": 0.2,
        "encoder_block_out_channels": (8,) * 3, "num_encoder_blocks": (1, 2, 1),
        "decoder_block_out_channels": (12,) * 3, "num_decoder_blocks": (2, 1, 1),
    },
    "two stages": {
        "encoder_block_out_channels": (8, 8), "num_encoder_blocks": (2, 0),
        "decoder_block_out_channels": (8, 8), "num_decoder_blocks": (1, 1),
        "in_channels": 1, "out_channels": 1,
    },
}  # fmt: skip
CASES = [
    *(("AutoencoderKL", name, given) for name, given in KL.items()),
    *(("AutoencoderTiny", name, given) for name, given in TINY.items()),
]
every_case = pytest.mark.parametrize(
    ("build", "given"), [pytest.param(b, g, id=f"{b} {name}") for b, name, g in CASES]
)


def reference(build, given, seed=0):
    made = make_reference("diffusers", build, given)
    randomize(made.module, seed)
    return made


def torched(images, dtype="float32"):
    return torch.from_numpy((2 * images - 1).transpose(0, 3, 1, 2).astype(dtype))


SIZES = ((16, 16), (24, 16), (21, 29))  # pixels; the last fill no cells of four stages


@every_case
def test_a_certificate(build, given, request):
    seed = request.config.option.seed
    made = reference(build, given, seed)
    size = SIZES[(seed + len(given)) % len(SIZES)]
    measured = certify_reference(made, size, seed=seed, whole=True)
    assert measured["reasons"] == []
    assert set(measured["errors"]["float64"]) >= {"latents", "reconstruction", "encoder_0"}
    assert measured["tensors_dropped"] == []


@pytest.mark.parametrize(
    ("build", "given"),
    [("AutoencoderKL", KL["SD 3"]), ("AutoencoderTiny", TINY["other depths"])],
    ids=["AutoencoderKL", "AutoencoderTiny"],
)
@pytest.mark.parametrize("dtype", BARS)
def test_encode_and_decode_are_what_pipelines_do(build, given, dtype, tmp_path, request):
    """Latents that a generator takes, draws, and images in [0, 1], with their gradients."""
    seed = request.config.option.seed
    made = reference(build, given, seed)
    made.save(tmp_path)
    config, module = made.module.config, made.module.to(getattr(torch, dtype))
    images = sample_images(3, (16, 24), config.in_channels, seed)
    pixels = torched(images, dtype).requires_grad_()
    encoded = module.encode(pixels)
    shift, scale = config.shift_factor or 0, config.scaling_factor

    with jax.enable_x64(dtype == "float64"):
        model, variables = load_model(str(tmp_path), dtype=jnp.dtype(dtype))
        variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)
        keys = jax.random.split(jax.random.key(seed), 3)

        @jax.jit
        def run(variables, images, keys):
            latents = model.apply(variables, images, keys, method="encode")
            return model.apply(variables, latents, method="decode"), latents

        given_images = jnp.asarray(images, dtype)
        decoded, latents = run(variables, given_images, keys)
        noise = 0.0
        if hasattr(encoded, "latent_dist"):
            mean, logvar = model.apply(variables, given_images, method="posterior")
            noise = (latents / model.scaling_factor + model.shift_factor - mean) / jnp.exp(
                logvar / 2
            )
            z = encoded.latent_dist
            drawn = torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2)
            z = z.mean + z.std * drawn
            wanted = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], dtype))(keys)
            assert np.abs(noise - wanted).max() < (1e-3 if dtype == "float32" else 1e-9)
        else:
            z = encoded.latents
        gradient = jax.jit(
            jax.grad(lambda v, x: jnp.sin(run(v, x, keys)[0]).sum(), argnums=(0, 1))
        )(variables, given_images)
    wanted_latents = ((z - shift) * scale).permute(0, 2, 3, 1)
    wanted = (module.decode(z).sample / 2 + 0.5).permute(0, 2, 3, 1)
    # Noise is recovered by a difference and a quotient, which cost some digits.
    bar = 10 * BARS[dtype]
    assert relative_error(np.asarray(latents), wanted_latents.detach().numpy()) <= bar
    assert relative_error(np.asarray(decoded), wanted.detach().numpy()) <= bar
    wanted.sin().sum().backward()
    theirs = 2 * pixels.grad.numpy().transpose(0, 2, 3, 1)
    assert relative_error(np.asarray(gradient[1]), theirs) <= 10 * bar


def test_files_of_before_diffusers_0_12(tmp_path):
    """Whose attention has other names; they are written with today's."""
    made = reference("AutoencoderKL", KL["two stages"])
    made.save(tmp_path)
    now = load_file(tmp_path / WEIGHTS_FILE)
    old = {}
    for name, tensor in now.items():
        for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                         ("to_out.0", "proj_attn")):  # fmt: skip
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        old[name] = tensor
    assert old.keys() != now.keys()
    save_file(old, tmp_path / WEIGHTS_FILE, {"format": "pt"})
    model, variables = load_model(str(tmp_path))
    flat = {path: np.asarray(x) for path, x in flatten(variables["params"]).items()}
    tensors, _ = convert.export_weights(
        flat, "autoencoder_kl", convert.arguments_of(model), to="diffusers"
    )
    assert tensors.keys() == now.keys()
    assert all(np.array_equal(tensors[name], x.numpy()) for name, x in now.items())


def test_a_pickle_is_read_when_allowed(tmp_path):
    made = reference("AutoencoderTiny", TINY["two stages"])
    made.save(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS_FILE), tmp_path / PICKLE_FILE)
    _, safe = load_model(str(tmp_path))
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match="is a pickle"):
        load_model(str(tmp_path))
    _, pickled = load_model(str(tmp_path), allow_pickle=True)
    jax.tree.map(np.testing.assert_array_equal, safe, pickled)


OTHER = {
    "AutoencoderKL": {
        "act_fn": "relu", "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "latent_channels": 8,
        "block_out_channels": [8, 16], "layers_per_block": 2, "in_channels": 4, "out_channels": 4,
        "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False,
        "down_block_types": ["AttnDownEncoderBlock2D"] * 2, "norm_num_groups": 3,
        "up_block_types": ["AttnUpDecoderBlock2D"] * 2, "_class_name": "AsymmetricAutoencoderKL",
        "scaling_factor": "large", "shift_factor": [0.1],
    },
    "AutoencoderTiny": {
        "act_fn": "silu", "upsample_fn": "bilinear", "upsampling_scaling_factor": 4,
        "latent_channels": 8, "in_channels": 4, "out_channels": 4, "_class_name": "VQModel",
        "num_encoder_blocks": [1, 1], "num_decoder_blocks": [2, 1], "scaling_factor": True,
        "encoder_block_out_channels": [8, 16], "decoder_block_out_channels": [8, 16],
        "shift_factor": "none",
    },
}  # fmt: skip
FREE = {  # these change nothing of encoding and decoding
    "AutoencoderKL": {"sample_size": 512, "force_upcast": False},
    "AutoencoderTiny": {
        "force_upcast": True, "latent_magnitude": 4, "latent_shift": 0.1,
        "block_out_channels": [9, 9],
    },
}  # fmt: skip


@pytest.mark.parametrize("build", OTHER)
def test_every_field_of_the_config_is_used_checked_or_of_no_effect(build, tmp_path):
    made = reference(build, {"AutoencoderKL": KL, "AutoencoderTiny": TINY}[build]["two stages"])
    made.save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    plain = load_model(str(tmp_path))[0]

    def changed(name, value):
        path.write_text(json.dumps({**config, name: value}))
        return load_model(str(tmp_path))[0]

    for name, value in OTHER[build].items():
        with pytest.raises(UserError, match=name):
            changed(name, value)
    for name, value in FREE[build].items():
        assert changed(name, value) == plain, name
    for name, value in (("scaling_factor", 0.5), ("shift_factor", 0.25)):
        assert getattr(changed(name, value), name) == value
    known = {*OTHER[build], *FREE[build], "scaling_factor", "shift_factor", "_diffusers_version"}
    assert set(config) <= known


@pytest.mark.parametrize(
    ("build", "name", "count"),
    [("AutoencoderKL", "autoencoder_kl_sd", 83_653_863),
     ("AutoencoderTiny", "autoencoder_tiny_sd", 2_445_063)],
)  # fmt: skip
def test_named_sizes_are_the_published_ones(build, name, count):
    entry = next(e for e in ZOO if e.build == build)
    with torch.device("meta"):
        module = make_reference("diffusers", build, dict(entry.arguments)).module
    assert sum(p.numel() for p in module.parameters()) == count
    family, arguments = find_variant(name)
    model = build_model(family, **arguments)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
