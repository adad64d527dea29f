"""A generator learns captions: embeddings of a frozen text tower, computed once."""

import json
from functools import partial

import generators
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from PIL import Image
from safetensors.numpy import load_file
from test_latents import SHORT, SIT

from vision_jax import train
from vision_jax.commands import generate
from vision_jax.config import load_config
from vision_jax.convert import load_model
from vision_jax.data import captions, latents
from vision_jax.data.latents import store_embeddings
from vision_jax.errors import UserError
from vision_jax.tasks.generation import objective
from vision_jax.tasks.generation.captions import NOTHING, read_tower

WIDTH = 12


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return generators.write_tower(tmp_path_factory.mktemp("tower"))


def config_of(tower, cache, **changed):
    arguments = SIT | {"in_channels": 3, "caption_width": WIDTH}
    own = {"model.arguments": repr(tuple(arguments.items())), "latents.autoencoder": "",
           "latents.cache": str(cache), "text.tower": str(tower), "data.classes": "()",
           "text.caption_column": ""}  # fmt: skip
    own |= {key.replace("__", "."): str(value) for key, value in changed.items()}
    return load_config(str(runs.ROOT / "configs/sit_lora.py"), SHORT | own)


def test_embeddings_are_the_towers_and_are_kept(tower, tmp_path):
    found = read_tower(str(tower), "", allow_pickle=False)
    texts = ["a photo of a bag.", "shoes", "a photo of a bag.", "red"]
    lines, asked = [], []

    def embed(some):
        asked.extend(some)
        return found.embed(some)

    def store():
        return store_embeddings(
            tmp_path, texts, nothing=NOTHING, embed=embed, width=found.width,
            identity=found.identity, most_bytes=1e6, say=lines.append,
        )  # fmt: skip

    kept = store()
    assert asked == ["a photo of a bag.", "shoes", "red", NOTHING]
    again = store()
    assert len(asked) == 4
    model, variables = load_model(str(tower), family="siglip")
    tokenizer = captions.load_tokenizer(str(tower))
    for row, text in enumerate(texts):
        tokens = captions.tokenize(tokenizer, [text, NOTHING], 8)
        true = model.apply(variables, None, jnp.asarray(tokens))["text"] * WIDTH**0.5
        np.testing.assert_allclose(kept.read(row), true, atol=1e-5)
        np.testing.assert_array_equal(again.read(row), kept.read(row))
    (file,) = tmp_path.glob("*/part-00000")
    before = file.read_bytes()
    file.write_bytes(before[:100])
    store()
    assert file.read_bytes() == before


def test_a_kill_in_the_middle_of_captions_is_gone_on_with(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PART", 4)
    texts = [f"caption {number}" for number in range(10)] + [NOTHING, "caption 3"]
    numbers = {text: rng.normal(size=5).astype(np.float32) for text in [*texts, "more"]}
    asked = []

    def embed(some, last=99):
        asked.extend(some)
        if len(asked) > last:
            raise KeyboardInterrupt
        return np.stack([numbers[text] for text in some])

    def store(folder, embed=embed, texts=texts):
        return latents.store_embeddings(
            folder, texts, nothing=NOTHING, embed=embed, width=5, identity={"of": "a tower"},
            most_bytes=1e6, say=lambda line: None,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "parts", partial(embed, last=6))
    asked.clear()
    found = store(tmp_path / "parts")
    assert asked == texts[4:-1]  # the first part is there
    for row, text in enumerate(texts):
        np.testing.assert_array_equal(found.read(row), [numbers[text], numbers[NOTHING]])
    store(tmp_path / "whole")
    (parts, whole) = (sorted(tmp_path.glob(f"{name}/*/part-*")) for name in ("parts", "whole"))
    assert [file.name for file in parts] == ["part-00000", "part-00001", "part-00002"]
    for one, other in zip(parts, whole, strict=True):
        assert one.read_bytes() == other.read_bytes()
    parts[1].write_bytes(parts[1].read_bytes()[:50])
    asked.clear()
    store(tmp_path / "parts")
    assert asked == texts[4:8]
    assert parts[1].read_bytes() == whole[1].read_bytes()
    asked.clear()
    store(tmp_path / "parts", texts=["more"])  # other captions are another cache
    assert asked == ["more", NOTHING]


def test_a_share_of_the_captions_is_left_out(rng):
    task = objective.Task("velocity", 0, (4, 4, 3), 0.0, 1.0, 0.25, captions=True)
    made = objective.make_objective(None, None, task)
    caption = jnp.asarray(rng.normal(size=(400, 2, 5)), jnp.float32)
    batch = {"image": jnp.zeros((400, 4, 4, 3), jnp.uint8), "caption": caption}
    asked = np.asarray(made.prepare({}, {}, {}, batch, jax.random.key(0))["asked"])
    own = (asked == np.asarray(caption[:, 0])).all(1)
    none = (asked == np.asarray(caption[:, 1])).all(1)
    assert (own ^ none).all()
    assert abs(none.mean() - 0.25) < 0.08


@pytest.mark.long
def test_a_caption_changes_the_prediction_and_goes_into_files(tmp_path):
    sizes = {**generators.DIT, "num_classes": 0, "caption_width": 5, "predicts": "velocity"}
    model, params = generators.write(tmp_path, "dit", sizes, "dit", header=True)
    x, time = jnp.ones((2, 4, 4, 4)), jnp.full(2, 0.5)
    given = jnp.arange(10.0).reshape(2, 5)
    found = model.apply({"params": params}, x, time, given)["prediction"]
    assert np.abs(found[0] - found[1]).max() > 1e-3 * np.abs(found).max()
    again, variables = load_model(str(tmp_path))
    assert again.caption_width == 5
    np.testing.assert_array_equal(again.apply(variables, x, time, given)["prediction"], found)


@pytest.mark.long
@pytest.mark.parametrize("latent", [False, True])
def test_a_run_learns_captions_and_makes_images_of_others(latent, tower, tmp_path, capsys):
    changed = {}
    if latent:
        changed = {"latents__autoencoder": generators.autoencoder(), "model__arguments": repr(
            tuple((SIT | {"caption_width": WIDTH}).items()))}  # fmt: skip
    changed |= {"optim__ema_decay": 0.0, "optim__lr": 0.03}  # so that captions tell after 6 steps
    config = config_of(tower, tmp_path / "cache", **changed)
    assert train.run(config, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "encoding 11 captions" in said  # of ten classes, and none
    written = load_file(tmp_path / "run/model.safetensors")
    assert written["caption_embedder.mlp.0.weight"].shape == (32, WIDTH)
    assert written["y_embedder.embedding_table.weight"].shape == (1, 32)

    def made(out, *flags):
        given = [str(tmp_path / "run"), f"--out={tmp_path / out}", *flags]
        assert generate.main(given) == 0
        manifest = json.loads((tmp_path / out / "manifest.json").read_text())
        files = [tmp_path / out / one["file"] for one in manifest["images"]]
        return manifest, np.stack([np.asarray(Image.open(file)) for file in files])

    asked = ["--captions", "a red bag", "a coat", "--count=4"]
    manifest, alone = made("1", *asked, "--batch-size=1")
    _, together = made("4", *asked, "--batch-size=4")
    np.testing.assert_array_equal(alone, together)
    assert [one["caption"] for one in manifest["images"]] == ["a red bag", "a coat"] * 2
    (tmp_path / "texts.txt").write_text("a red bag\n\na coat\n")
    _, of_file = made("file", "--captions", str(tmp_path / "texts.txt"), "--count=4")
    np.testing.assert_array_equal(of_file, together)
    _, other = made("other", "--captions", "a boot", "--count=4", "--guidance=8")
    assert (other != together).any()
    manifest, _ = made("none", "--count=2")  # nothing is asked for, and nothing leaves the folder
    assert [one["file"] for one in manifest["images"]] == ["_/000000.png", "_/000001.png"]
    (tmp_path / "empty.txt").write_text("\n  \n")
    for file, message in (("empty.txt", "has no line of text"), ("text.txt", "no such file")):
        given = [str(tmp_path / "run"), f"--out={tmp_path / 'no'}", "--captions"]
        assert generate.main([*given, str(tmp_path / file)]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model__arguments": repr(tuple((SIT | {"in_channels": 3}).items()))},
         r'12 numbers, and the generator takes 0: add \("caption_width", 12\)'),
        ({"data__classes": "('bag',)"}, "config.data.classes: with config.text.tower captions"),
        ({"text__tower": "embedded:vit_cifar10"}, "is a vit, which reads no texts"),
        ({"text__tower": ""}, "config.text.tower: this generator learns captions"),
    ],
)  # fmt: skip
def test_bad_configs_are_refused(changed, message, tower, tmp_path):
    with pytest.raises(UserError, match=message):
        train.run(config_of(tower, tmp_path / "cache", **changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()
