"""Generators' files through the converter, Python and the page about them, without torch."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import vision_jax
from vision_jax import convert
from vision_jax.commands.convert import main
from vision_jax.config import default_config
from vision_jax.convert.files import open_safetensors
from vision_jax.convert.package import write_package
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.run import description
from vision_jax.trees.paths import flatten

SMALL = {
    "autoencoder_kl": {"widths": (8, 8), "stage_depth": 1, "groups": 4, "shift_factor": 0.1},
    "autoencoder_tiny": {"encoder_width": 6, "decoder_width": 8, "encoder_depths": (1, 2),
                         "decoder_depths": (2, 1)},
    "dit": {"num_classes": 400, "image_size": (4, 4), "patch_size": 2, "width": 16, "depth": 2,
            "num_heads": 2, "mlp_width": 64, "learned_variance": True},
}  # fmt: skip
OWN = {family: ("diffusers", {}) for family in ("autoencoder_kl", "autoencoder_tiny")}
CASES = {
    **OWN,
    "dit": ("dit", {}),
    "dit of diffusers": ("diffusers", {"time_shift": 1, "mlp_norm_eps": 1e-5, "predicts": "noise"}),
}


def written(folder, case, rng):
    """(folder, arrays by path) of a small model with random weights."""
    family = case.split()[0]
    to, more = CASES[case]
    arguments = {**FAMILIES[family].defaults, **SMALL[family], **more}
    for name in ("mean", "std"):  # as files are recognized
        channels = arguments["in_channels"]
        arguments[name] = (arguments[name] * channels)[:channels]
    model = build_model(family, **arguments)
    size = arguments.get("image_size", (8, 8))
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, model.in_channels)))[
        "params"
    ]
    arrays = {
        path: rng.normal(size=leaf.shape).astype(np.float32) * 0.1
        for path, leaf in flatten(like).items()
    }
    write_package(folder, arrays, family, arguments, to=to)
    return folder, arrays


@pytest.mark.parametrize("case", CASES)
def test_a_folder_goes_through_the_converter_bit_for_bit(case, tmp_path, rng, capsys):
    folder, arrays = written(tmp_path / "first", case, rng)
    assert main([str(folder), f"--out={tmp_path / 'second'}", f"--to={CASES[case][0]}"]) == 0
    printed = capsys.readouterr().out
    assert ("license of the published weights of this kind: DiT CC-BY-NC" in printed) == (
        case.startswith("dit")
    )
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    assert (CASES[case][0] == "diffusers") == ("diffusion_pytorch_model.safetensors" in names)
    configs = [(made / "config.json").read_text() for made in (folder, tmp_path / "second")]
    assert configs[0] == configs[1]
    (file,) = {*names} - {"config.json"}
    (first, header), (second, again) = (
        open_safetensors(made / file) for made in (folder, tmp_path / "second")
    )
    assert json.loads(header["vision_jax"]) == json.loads(again["vision_jax"])
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    _, variables = convert.load_model(str(tmp_path / "second"))
    for path, array in flatten(variables["params"]).items():
        np.testing.assert_array_equal(array, arrays[path], err_msg=path)


def test_what_diffusers_does_not_say_of_a_dit_is_in_no_file_of_its_kind(tmp_path, rng):
    """Its frequencies and epsilon are those of diffusers, whatever else a config says."""
    folder, _ = written(tmp_path / "dit", "dit of diffusers", rng)
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = dict(open_safetensors(weights)[0])
    convert.write_safetensors(weights, tensors, {"format": "pt"})  # without our header
    model, _ = convert.load_model(str(folder))
    assert (model.time_shift, model.mlp_norm_eps, model.predicts) == (1, 1e-5, "noise")
    config = json.loads((folder / "config.json").read_text())
    del config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"num_attention_heads 16 of attention_head_dim 8"):
        convert.load_model(str(folder))


def test_a_pipeline_names_its_parts_and_load_the_way_to_a_generator(tmp_path, rng):
    written(tmp_path / "pipeline/vae", "autoencoder_kl", rng)
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    message = r"a pipeline of diffusers, .* such as .*pipeline/vae$"
    with pytest.raises(UserError, match=message):
        convert.read_weights(str(tmp_path / "pipeline"))
    with pytest.raises(UserError, match=r"makes images: vision_jax\.convert\.load_model gives"):
        vision_jax.load(tmp_path / "pipeline/vae")


@pytest.mark.parametrize("task", ["classification", "detection", "pretraining"])
def test_tasks_that_make_no_images_refuse_a_generator(task, tmp_path, rng):
    folder, _ = written(tmp_path / "tiny", "autoencoder_tiny", rng)
    for given in ({"model__weights": str(folder)}, {"model__variant": "dit_s_2"}):
        config = default_config(task)
        config.model.weights, config.model.variant = "", ""
        config.model.update({name.removeprefix("model__"): x for name, x in given.items()})
        message = rf"{next(iter(given.values()))} is a (autoencoder_tiny|dit), which makes images: "
        with pytest.raises(UserError, match=f"{message}config.task {task} has no use for it"):
            description.describe(config, description.read_weights(config), runs.CLASSES)


@pytest.mark.parametrize("keys", [None, "by image"])
def test_latents_are_scaled_and_drawn_by_image(keys, tmp_path, rng):
    model, variables = convert.load_model(str(written(tmp_path / "vae", "autoencoder_kl", rng)[0]))
    images = jnp.asarray(rng.random((3, 8, 8, 3)), jnp.float32)
    keys = None if keys is None else jax.random.split(jax.random.key(1), 3)
    encode = jax.jit(lambda x, keys: model.apply(variables, x, keys, method="encode"))
    latents = encode(images, keys)
    mean, logvar = model.apply(variables, images, method="posterior")
    z = mean
    if keys is not None:
        noise = jnp.stack([jax.random.normal(key, mean.shape[1:]) for key in keys])
        z = mean + jnp.exp(0.5 * logvar) * noise
        assert jnp.abs(latents - (mean - 0.1) * 0.18215).max() > 0.01
        order = np.asarray([2, 0, 1])
        np.testing.assert_allclose(encode(images[order], keys[order]), latents[order], atol=1e-6)
    np.testing.assert_allclose(latents, (z - 0.1) * 0.18215, atol=1e-6)


def test_the_pages_python_runs(tmp_path, rng):
    """Of docs/generation.md, with small files for those that it names."""
    page = (runs.ROOT / "docs/generation.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.M)
    for named, case in (
        ("SiT-XL-2-256x256.pt", "dit"), ("hf://stabilityai/sd-vae-ft-mse", "autoencoder_kl"),
    ):  # fmt: skip
        assert named in block
        block = block.replace(named, str(written(tmp_path / case, case, rng)[0]))
    assert "even_times(50)" in block
    names = {}
    exec(compile(block.replace("even_times(50)", "even_times(3)"), "generation.md", "exec"), names)
    images = np.asarray(names["images"])
    assert images.shape == (2, 8, 8, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01
