"""`vision_jax generate` of weights: DiT and SiT, in latents of an autoencoder."""

import json

import generators
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vision_jax.commands import generate
from vision_jax.convert import load_model
from vision_jax.generate import samples
from vision_jax.ops import ddim, flow
from vision_jax.ops.noise import normal


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return generators.write_pipeline(tmp_path_factory.mktemp("DiT"))


@pytest.fixture(scope="module")
def sit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("SiT")
    learned = {"predicts": "velocity", "learned_variance": True}
    generators.write(folder, "dit", {**generators.DIT, **learned}, "dit")
    return folder


def made(source, out, *flags):
    assert generate.main([str(source), f"--out={out}", *flags]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    images = [np.asarray(Image.open(out / one["file"])) for one in manifest["images"]]
    return manifest, np.stack(images)


@pytest.mark.long
def test_a_dit_is_sampled_by_ddim_and_decoded(dit, tmp_path, capsys):
    vae = f"--autoencoder={dit.parent / 'vae'}"
    flags = [vae, "--steps=4", "--guidance=3", "--classes=tench,2", "--seed=5", "--count=8"]
    manifest, alone = made(dit, tmp_path / "1", *flags, "--batch-size=1")
    said = capsys.readouterr().out
    assert "DiT CC-BY-NC-4.0" in said
    _, together = made(dit, tmp_path / "8", *flags, "--batch-size=8")
    np.testing.assert_array_equal(alone, together)
    assert manifest["sampling"]["method"] == "ddim"
    assert len(manifest["autoencoder_sha256"]) == 64
    classes = [one["class"] for one in manifest["images"]]
    assert classes == ["tench, Tinca tinca", "great white shark"] * 4

    model, variables = load_model(str(dit))
    decoder, of_decoder = load_model(str(dit.parent / "vae"))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(8))
    noise = normal(keys, (4, 4, 4))
    labels = jnp.array([0, 2] * 4)

    def predict(x, time, labels):
        return model.apply(variables, x, time, labels)["prediction"]

    guided = flow.guided(predict, labels, 3, 3.0)
    latents = ddim.ddim(guided, noise, ddim.ddim_steps(4), ddim.kept_signal())
    images = jnp.clip(decoder.apply(of_decoder, latents, method="decode"), 0, 1)
    assert np.abs(np.asarray(images) * 255 - alone).max() < 0.51
    assert np.std(alone) > 5  # they show something


@pytest.mark.long
@pytest.mark.parametrize(("kind", "other"), [("SiT", "noise"), ("DiT", "velocity")])
def test_the_name_of_a_file_tells_the_prediction_on_the_screen(kind, other, tmp_path, capsys):
    sizes = {"width": 384, "num_heads": 6, "mlp_width": 16, "depth": 12}
    model, _ = generators.write(tmp_path, "dit", {**generators.DIT, **sizes}, "dit")
    (tmp_path / "config.json").unlink()
    file = (tmp_path / "model.safetensors").rename(tmp_path / f"{kind}-S-2-256.safetensors")
    model, _ = load_model(str(file))
    own = {"noise": "velocity", "velocity": "noise"}[other]
    assert model.predicts == own
    said = " ".join(capsys.readouterr().out.split())
    assert f"dit's {kind}-S-2, by the name of the file".lower() in said.lower()
    assert f"that it predicts {own}; if it is {other}, call the file" in said
    assert "DiT CC-BY-NC-4.0 (not for commercial use), SiT MIT" in said
    assert load_model(str(file), predicts=other)[0].predicts == other


@pytest.mark.long
@pytest.mark.parametrize("which", ["dit", "sit"])
def test_images_are_changed_in_latents(which, dit, sit, tmp_path):
    source = {"dit": dit, "sit": sit}[which]
    photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    mask = np.zeros((8, 8, 3), np.uint8)
    mask[1:4, 3:6] = 255
    for name, pixels in (("photo", photo), ("mask", mask)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    flags = [f"--autoencoder={dit.parent / 'vae'}", f"--images={tmp_path / 'photo.png'}",
             "--classes=1", "--steps=20", "--guidance=1"]  # fmt: skip
    _, anew = made(source, tmp_path / "mask", *flags, f"--mask={tmp_path / 'mask.png'}")
    outside = mask[..., 0] == 0
    np.testing.assert_array_equal(anew[0][outside], photo[outside])
    assert (anew[0][~outside] != photo[~outside]).any()

    model, variables = load_model(str(dit.parent / "vae"))
    latents = model.apply(variables, jnp.asarray(photo[None]) / 255.0, method="encode")
    again = 255 * np.clip(model.apply(variables, latents, method="decode"), 0, 1)
    apart = [
        np.abs(made(source, tmp_path / f"{s}", *flags, f"--strength={s}")[1] - again).mean()
        for s in (0.05, 1.0)
    ]
    assert apart[0] < 0.5 * apart[1]


@pytest.mark.long
def test_memory_does_not_grow_with_the_steps(dit, tmp_path):
    flags = [f"--autoencoder={dit.parent / 'vae'}", "--count=2"]

    def needed(steps):
        parsed = generate._parse([str(dit), *flags, f"--steps={steps}"])
        generator, _ = generate._load(parsed, dit, None)
        wanted = generate._wanted(parsed, generator)
        program = jax.jit(samples._make_program(generator))
        given = (generator.variables, generator.autoencoder.variables)
        compiled = program.lower(*given, wanted.labels, wanted.index, None, None).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = needed(2), needed(200)
    assert many - few < 200 * 4 * 8  # their times and shares of signal, but no images


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes=3"], "--classes: no class 3: their numbers are 0 to 2"),
        (["--classes=goldfisch"], "--classes: no class 'goldfisch': did you mean `goldfish`"),
        (["--method=heun"], "--method heun: a model of noise is sampled by ddim"),
        (["--steps=1001"], "--steps 1001: a model of noise has 1000"),
        (["--autoencoder="], "--autoencoder: this generator makes latents of 4 channels"),
        (["--autoencoder=embedded:vit_cifar10"], "is a vit, which encodes no images"),
    ],
)
def test_bad_input_is_one_line(flags, message, dit, tmp_path, capsys):
    given = [str(dit), f"--autoencoder={dit.parent / 'vae'}", f"--out={tmp_path / 'out'}", *flags]
    assert generate.main(given) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_label_out_of_bounds_has_no_image(dit):
    model, variables = load_model(str(dit))
    labels = jnp.array([0, 3, 4])
    found = model.apply(variables, jnp.ones((3, 4, 4, 4)), jnp.zeros(3), labels)["prediction"]
    assert np.isfinite(found).all((1, 2, 3)).tolist() == [True, True, False]
