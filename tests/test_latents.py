"""A generator learns latents: encoded once, kept, and the same as if they were encoded anew."""

import json
from dataclasses import replace

import generators
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from PIL import Image
from safetensors.numpy import load_file

from vision_jax import cost, train
from vision_jax.commands import generate
from vision_jax.config import load_config
from vision_jax.data import latents
from vision_jax.data.latents import LoadForTraining, store_latents, with_stored
from vision_jax.data.sources import ArrayReader, Source
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError
from vision_jax.run.prepare import prepare
from vision_jax.tasks.generation import task as generation
from vision_jax.tasks.generation.autoencoder import read_autoencoder

SIT = {"width": 32, "depth": 1, "num_heads": 2, "mlp_width": 64, "patch_size": 7,
       "in_channels": 4, "predicts": "velocity", "learned_variance": True}  # fmt: skip
SHORT = {
    "model.weights": "", "model.variant": "dit", "model.reinitialize": "()", "recipes": "()",
    "model.arguments": repr(tuple(SIT.items())), "model.image_size": "28",
    "model.dtype": "float32", "trainable": "('.*',)", "optim.warmup_steps": "1",
    "data.train": "embedded:fashion_mnist/train", "data.eval": "embedded:fashion_mnist/test",
    "data.classes": "('bag', 'coat')", "data.subset": "40", "data.threads": "1",
    "total_steps": "6", "checkpoint_every": "3", "evaluate.every": "6", "log_every": "1",
    "evaluate.batch_size": "100", "batch_size": "16", "sample.steps": "2",
}  # fmt: skip


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    """Folders of diffusers by family."""
    folder = tmp_path_factory.mktemp("autoencoders")
    generators.write(folder / "kl", "autoencoder_kl", generators.KL, "diffusers")
    generators.write(folder / "tiny", "autoencoder_tiny", generators.TINY, "diffusers")
    return folder


def config_of(autoencoder, cache, **changed):
    own = {"latents.autoencoder": str(autoencoder), "latents.cache": str(cache)}
    own |= {key.replace("__", "."): str(value) for key, value in changed.items()}
    return load_config(str(runs.ROOT / "configs/sit_lora.py"), SHORT | own)


def images_of(rng, count, side=8):
    reader = ArrayReader("drawn", rng.integers(0, 256, (count, side, side, 3)).astype(np.uint8))
    return Source("drawn", ("a",), np.zeros(count, np.int32), np.arange(count), reader)


def encoder(found, preprocessing):
    run = jax.jit(lambda variables, images: found.posterior(variables, images / 255.0))
    return lambda images: jax.device_get(run(found.variables, jnp.asarray(images, jnp.float32)))


class Store:
    """Latents of a source in a folder, and what was said of it."""

    def __init__(self, folder, found, source, flips=True, most_bytes=1e9):
        self.lines, self.encoded = [], 0
        size = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic", "center")
        encode = encoder(found, size)

        def counted(images):
            self.encoded += len(images)
            return encode(images)

        self.latents = store_latents(
            folder, source, preprocessing=size, encode=counted, shapes=found.shapes((4, 4)),
            flips=flips, identity={"of": source.name}, most_bytes=most_bytes, num_threads=1,
            say=self.lines.append, show_progress=generators.silent,
        )  # fmt: skip
        self.files = sorted(folder.glob("*/part-*"))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(latents, "PART", 16)


@pytest.fixture(scope="module")
def found(autoencoders):
    return read_autoencoder(str(autoencoders / "kl"), allow_pickle=False, field="x")


def test_latents_are_those_of_each_image_and_its_mirror_image(rng, tmp_path, found, small_parts):
    source = images_of(rng, 37)
    stored = Store(tmp_path, found, source).latents
    for row in (0, 15, 16, 36):
        for flipped in (False, True):
            image = source[row]["image"][:, ::-1] if flipped else source[row]["image"]
            true = found.posterior(found.variables, jnp.asarray(image, jnp.float32)[None] / 255)
            kept = stored.read(row, flipped)
            assert kept.keys() == true.keys() == {"mean", "logvar"}
            for name, array in kept.items():
                scale = np.abs(true[name]).max()
                np.testing.assert_allclose(array, true[name][0], atol=1e-5 * scale)
    part = replace(source, rows=source.rows[[30, 2]], labels=source.labels[[30, 2]])
    read = with_stored(part, stored, None).open(0)
    np.testing.assert_array_equal(read["mean"], stored.read(30)["mean"])
    assert read["index"] == 0


def test_what_is_missing_or_damaged_is_encoded_again_to_the_bit(rng, tmp_path, found, small_parts):
    source = images_of(rng, 40)
    first = Store(tmp_path, found, source)
    before = [path.read_bytes() for path in first.files]
    assert len(before) == 3
    assert first.encoded == 2 * 40
    assert Store(tmp_path, found, source).encoded == 0
    first.files[1].unlink()
    cut = before[0][: len(before[0]) // 2]
    flipped = bytearray(before[2])
    flipped[before[2].index(first.latents.read(35)["mean"].tobytes())] ^= 1
    for broken in ({1: None}, {0: cut}, {2: bytes(flipped)}):
        for number, content in broken.items():
            if content is not None:
                first.files[number].write_bytes(content)
        again = Store(tmp_path, found, source)
        assert again.encoded == 2 * (8 if 2 in broken else 16)
        assert [path.read_bytes() for path in again.files] == before
        assert any("encoding" in line for line in again.lines)


def test_a_kill_in_the_middle_is_gone_on_with(rng, tmp_path, found, small_parts, monkeypatch):
    source = images_of(rng, 40)
    write, calls = latents.write_teacher_cache, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_teacher_cache", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path, found, source)
    assert Store(tmp_path, found, source).encoded == 2 * 24


def test_the_cache_is_read_once_at_a_start(
    rng, tmp_path, found, small_parts, autoencoders, monkeypatch
):
    source = images_of(rng, 37)
    first = Store(tmp_path / "cache", found, source)
    opened, calls = [], []
    open_one = latents.open_teacher_cache
    monkeypatch.setattr(
        latents, "open_teacher_cache", lambda *given: opened.append(given[0]) or open_one(*given)
    )
    monkeypatch.setattr(latents, "_held", None)  # and nobody waits for another who reads
    Store(tmp_path / "cache", found, source)
    assert sorted(opened) == first.files
    assert len(opened) == 3
    monkeypatch.setattr(latents, "store_latents", lambda *given, **named: calls.append(named))
    config = config_of(autoencoders / "kl", tmp_path / "cache")
    size = Preprocessing((4, 4), (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic", "center")
    generation._stored(config, source, size, flips=False)
    assert len(calls) == 1


def test_the_folder_is_bounded_and_keeps_sources_apart(rng, tmp_path, found):
    source = images_of(rng, 10)
    with pytest.raises(UserError, match=r"max_gb 1e-06: .* need 1.02e-05 GB more"):
        Store(tmp_path, found, source, most_bytes=1e3)
    Store(tmp_path, found, source)
    Store(tmp_path, found, replace(source, name="others"))
    assert len(list(tmp_path.glob("*/part-00000"))) == 2
    with pytest.raises(UserError, match="remove folders of older data"):
        Store(tmp_path, found, replace(source, name="more"), most_bytes=2.5e4)


def test_damaged_images_are_replaced_and_named(rng, tmp_path, found):
    class Reader(ArrayReader):
        def open(self, row):
            if row in (3, 5):
                raise latents.DamagedImageError("torn")
            return super().open(row)

        read = open

    whole = images_of(rng, 12)
    source = replace(whole, reader=Reader("drawn", whole.reader.images))
    read = with_stored(source, Store(tmp_path, found, source).latents, None)
    example, damaged = LoadForTraining(read, True)(3, np.random.default_rng(0))
    assert damaged[0].index == 3
    assert example["index"] not in (3, 5)
    assert "can't be read" in damaged[0].reason


# Runs -------------------------------------------------------------------------------------------


def run(config, workdir):
    assert train.run(config, workdir) == 0
    return load_file(workdir / "model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_a_run_learns_latents_resumes_to_the_bit_and_makes_images(
    kind, autoencoders, tmp_path, monkeypatch, capsys
):
    config = config_of(autoencoders / kind, tmp_path / "cache")
    whole = run(config, tmp_path / "whole")
    said = capsys.readouterr().out
    assert "encoding 40 images" in said
    assert said.count("the latents of") == 2  # of training and evaluation
    with Image.open(tmp_path / "whole/samples.png") as picture:
        assert min(picture.size) > 100

    report = train._report_evaluation

    def interrupt(log, prepared, workdir, step, result):
        if step == 6:
            raise KeyboardInterrupt
        return report(log, prepared, workdir, step, result)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_report_evaluation", interrupt)  # after checkpoint 3
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "resumed")
    for path in (tmp_path / "cache").glob("*/part-*"):
        path.unlink()  # encoded again, the same
    resumed = run(config, tmp_path / "resumed")
    assert "resumed at step 3" in capsys.readouterr().out
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)

    def made(*flags):
        out = tmp_path / "-".join(flags)
        assert generate.main([str(tmp_path / "whole"), f"--out={out}", "--count=4", *flags]) == 0
        listed = json.loads((out / "manifest.json").read_text())
        return np.stack([np.asarray(Image.open(out / x["file"])) for x in listed["images"]])

    alone, together = made("--batch-size=1"), made("--batch-size=4")
    np.testing.assert_array_equal(alone, together)
    assert alone.shape == (4, 28, 28, 3)


@pytest.mark.long
def test_other_weights_of_the_autoencoder_are_not_taken_for_the_runs(
    autoencoders, tmp_path, capsys
):
    place = tmp_path / "vae"
    generators.write(place, "autoencoder_kl", generators.KL, "diffusers")
    config = config_of(place, tmp_path / "cache", total_steps=3)
    run(config, tmp_path / "run")
    for path in place.iterdir():
        path.unlink()
    place.rmdir()
    generators.write(place, "autoencoder_kl", generators.KL, "diffusers", seed=1)
    with pytest.raises(UserError, match="vae has changed since this run began"):
        train.run(config, tmp_path / "run")
    assert generate.main([str(tmp_path / "run"), f"--out={tmp_path / 'out'}"]) == 2
    assert "vae has changed since the run began" in capsys.readouterr().err


@pytest.mark.long
def test_a_step_has_the_flops_of_its_latents_and_none_of_the_encoder(
    autoencoders, tmp_path, monkeypatch
):
    config = config_of(autoencoders / "kl", tmp_path)
    prepared = prepare(config, ("bag", "coat"))
    arguments = (prepared.abstract_state, prepared.parameters.abstract()[1])
    lowered = prepared.make_train_step().lower(*arguments, prepared.abstract_batch())
    ours = cost.count(lowered.compile()).flops
    monkeypatch.setattr(generation, "check_fits", lambda *arguments: None)
    pixels = config_of("", tmp_path, model__image_size=14)  # whose images are 14 x 14 x 4
    plain = prepare(pixels, ("bag", "coat"))
    arguments = (plain.abstract_state, plain.parameters.abstract()[1])
    lowered = plain.make_train_step().lower(*arguments, plain.abstract_batch())
    assert ours == pytest.approx(cost.count(lowered.compile()).flops, rel=1e-6)
    found = read_autoencoder(str(autoencoders / "kl"), allow_pickle=False, field="x")
    images = jax.ShapeDtypeStruct((16, 28, 28, 3), jnp.float32)
    encode = jax.jit(found.posterior).lower(found.variables, images).compile()
    assert cost.count(encode).flops > ours  # so it would show


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__crop": "pad"}, "config.data.crop pad: latents are encoded once"),
        ({"model__image_size": 29}, "image_size 29: latents have cells of 2 pixels a side"),
        ({"latents__autoencoder": "embedded:vit_cifar10"}, "is a vit, which encodes no images"),
        ({"latents__autoencoder": "", "model__image_size": 14}, None),
        ({"latents__max_gb": 1e-6}, "config.latents.max_gb 1e-06"),
    ],
)
def test_bad_configs_are_refused(changed, message, autoencoders, tmp_path):
    config = config_of(autoencoders / "kl", tmp_path / "cache", **changed)
    with pytest.raises(UserError, match=message or "latents of 4 channels, which an autoencoder"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
