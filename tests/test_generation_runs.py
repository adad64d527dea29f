"""A generator trained, adapted to a class that it has not seen, and put to work by its command."""

import gzip
import hashlib
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs
from PIL import Image
from safetensors.numpy import load_file

from vision_jax import train
from vision_jax.commands import generate, robustness
from vision_jax.config import load_config
from vision_jax.errors import UserError
from vision_jax.loaded import load
from vision_jax.main import main
from vision_jax.tasks.generation import figures
from vision_jax.tasks.generation import task as generation

SIZES = {"width": 16, "depth": 2, "num_heads": 2, "mlp_width": 32, "patch_size": 7,
         "in_channels": 3, "predicts": "image"}  # fmt: skip
SHORT = {
    "total_steps": "3",
    "checkpoint_every": "3",
    "evaluate.every": "3",
    "evaluate.batch_size": "40",
    "log_every": "1",
    "optim.warmup_steps": "1",
    "sample.steps": "3",
    "batch_size": "16",
    "data.subset": "40",
}


def run_config(name, workdir, **changed):
    changes = SHORT | {key.replace("__", "."): str(value) for key, value in changed.items()}
    assert train.run(load_config(str(runs.ROOT / f"configs/{name}.py"), changes), workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    arguments = repr(tuple(SIZES.items()))
    return run_config(
        "generate_embedded", tmp_path_factory.mktemp("runs") / "base", model__arguments=arguments
    )


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    return run_config(
        "generate_lora",
        tmp_path_factory.mktemp("runs") / "adapted",
        model__weights=base / "model.safetensors",
    )


def made_at(workdir):
    """The strips of pictures of a run, by step: u8[8, 28, 28, 3]."""
    strips = {int(path.stem): Image.open(path) for path in (workdir / "samples").iterdir()}
    return {
        step: np.asarray(strip).reshape(28, 8, 28, 3).swapaxes(0, 1)
        for step, strip in sorted(strips.items())
    }


def generated(source, out, *flags):
    assert generate.main([str(source), f"--out={out}", *flags]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    images = [np.asarray(Image.open(out / one["file"])) for one in manifest["images"]]
    return manifest, np.stack(images)


@pytest.mark.long
def test_an_adapter_leaves_the_base_as_it_was(base, adapted):
    before = load_file(base / "model.safetensors")
    frozen = load(adapted).variables["params"]
    assert (adapted / "adapter/adapter_model.safetensors").is_file()
    # Merged it differs in the adapted kernels and in the classes, which are others.
    after = load_file(adapted / "model.safetensors")
    assert after.keys() == before.keys()
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert {"x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight"} <= same
    assert "y_embedder.embedding_table.weight" not in same
    assert after["y_embedder.embedding_table.weight"].shape == (2, 16)  # the class, and none
    assert frozen["class_embed"].shape == (2, 16)
    held = run_arrays(adapted)
    for path, array in run_arrays(base).items():
        if path in held:
            np.testing.assert_array_equal(held[path], array, err_msg=path)


@pytest.mark.long
def test_a_run_shows_what_it_makes_of_the_same_noise_before_and_after(base, adapted):
    for workdir in (base, adapted):
        made = made_at(workdir)
        assert list(made) == [0, 3]
        assert (made[0] != made[3]).any()
        assert (workdir / "samples.png").is_file()


def test_the_evaluation_before_the_first_update_stops_no_resumed_run(tmp_path):
    """An uninterrupted run doesn't count it either."""
    losses = {0: 0.1, 3: 0.5, 6: 0.4}
    lines = (json.dumps({"step": step, "eval/loss": loss}) for step, loss in losses.items())
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = load_config(str(runs.ROOT / "configs/generate_lora.py"), {"evaluate.stop_after": "1"})
    prepared = SimpleNamespace(config=config, task=generation)
    assert train._figures_up_to(6, prepared, tmp_path) == [0.5, 0.4]


def test_strips_that_are_none_are_left_out(tmp_path, rng, capsys):
    made = rng.integers(0, 256, (2, 8, 6, 3), np.uint8)
    for step in (0, 5):
        figures.write_strip(tmp_path, step, made)
    strip = np.asarray(Image.open(tmp_path / "samples/00000005.png"))
    np.testing.assert_array_equal(strip[:, 6:12], made[1])
    (tmp_path / "samples/00000007.png").write_bytes(b"half a file")
    Image.new("RGB", (5, 8)).save(tmp_path / "samples/00000009.png")
    Image.fromarray(np.full((8, 12, 4), 7, np.uint8)).save(tmp_path / "samples/00000011.png")
    figures.draw_progress(tmp_path, made)
    assert (tmp_path / "samples.png").is_file()
    said = "".join(capsys.readouterr())
    assert "00000007.png: no strip of 2 pictures" in said
    assert "00000009.png: no strip of 2 pictures" in said
    assert "00000011.png" not in said  # with alpha, which is left out


@pytest.mark.long
def test_a_resumed_run_makes_the_same_images(base, tmp_path, monkeypatch):
    """It ends at step 4, after the checkpoint of step 2, and goes on from there."""
    changed = {
        "model__weights": base / "model.safetensors", "total_steps": 4, "checkpoint_every": 2,
        "evaluate__every": 2,
    }  # fmt: skip
    whole = run_config("generate_lora", tmp_path / "whole", **changed)
    line, said = generation.Evaluation.line, []

    def interrupt(evaluation):
        said.append(line(evaluation))
        return said[-1] if len(said) < 3 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(generation.Evaluation, "line", interrupt)
        with pytest.raises(ZeroDivisionError):
            run_config("generate_lora", tmp_path / "parts", **changed)
    parts = run_config("generate_lora", tmp_path / "parts", **changed)
    one, other = made_at(whole), made_at(parts)
    assert list(one) == list(other) == [0, 2, 4]
    for step in one:
        np.testing.assert_array_equal(other[step], one[step])
    assert (parts / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()
    made = [generated(run, tmp_path / f"of_{run.name}", "--count=2") for run in (whole, parts)]
    np.testing.assert_array_equal(made[1][1], made[0][1])
    for name in ("weights_sha256", "adapter_sha256"):
        assert made[1][0][name] == made[0][0][name]


def run_arrays(workdir):
    """The arrays of a run's base, by path."""
    from vision_jax.run.restore import restore

    trained = restore(load_config(str(workdir / "config.json"), {}), workdir, "last").trained
    trainable, frozen, _ = trained.arguments
    whole = {**trainable, **frozen}
    found = {path.removesuffix("/base"): np.asarray(x) for path, x in whole.items()}
    return {path: x for path, x in found.items() if "lora" not in path and path != "class_embed"}


@pytest.mark.long
def test_images_do_not_depend_on_their_batch_and_are_told_apart(adapted, tmp_path):
    manifest, alone = generated(adapted, tmp_path / "1", "--count=8", "--batch-size=1")
    _, together = generated(adapted, tmp_path / "8", "--count=8", "--batch-size=8")
    _, first = generated(adapted, tmp_path / "3", "--count=3")
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(first, together[:3])
    assert manifest["sampling"]["seed"] == 0
    assert manifest["sampling"]["guidance"] == 2.0
    adapter = adapted / "adapter/adapter_model.safetensors"
    assert manifest["adapter_sha256"] == hashlib.sha256(adapter.read_bytes()).hexdigest()
    assert [one["class"] for one in manifest["images"]] == ["sneaker"] * 8
    assert {path.name for path in (tmp_path / "8").iterdir()} == {
        "manifest.json", "sneaker", "samples.png",
    }  # fmt: skip
    _, other = generated(adapted, tmp_path / "seed", "--count=8", "--seed=1")
    assert (other != together).any()


@pytest.mark.long
def test_a_folder_of_weights_makes_what_its_run_makes(base, tmp_path):
    """It has a config.json, too, which is not a run's."""
    assert main(["convert", str(base), f"--out={tmp_path / 'weights'}"]) == 0
    _, ours = generated(tmp_path / "weights", tmp_path / "1", "--count=3", "--steps=3")
    _, theirs = generated(base, tmp_path / "2", "--count=3")
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.long
def test_the_figures_are_those_of_the_images(adapted, tmp_path):
    out = tmp_path / "made"
    assert generate.main([str(adapted), "--count=30", "--measure", f"--out={out}"]) == 0
    figures = json.loads((out / "measures.json").read_text())
    assert figures["images"] == 30
    assert figures["held_out"] == 100  # sneakers of the test set
    assert figures["frechet"] > figures["frechet_train"] > 0  # three steps teach nothing
    assert figures["nearest"] > 1
    assert figures["copies"] == 0
    assert (out / "nearest.png").is_file()


@pytest.mark.long
def test_a_base_beside_its_adapter(base, adapted, tmp_path, capsys):
    out = tmp_path / "made"
    flags = ["--count=12", "--measure", f"--judge={base_judge(tmp_path)}", f"--beside={base}"]
    manifest, _ = generated(adapted, out, *flags)
    figures = json.loads((out / "measures.json").read_text())
    before = figures["beside"]
    assert before["images"] == figures["images"] == 12
    for given in ([str(tmp_path / "judge")], [str(adapted), "--beside=embedded:vit_cifar10"]):
        assert generate.main([*given, f"--out={tmp_path / 'no'}"]) == 2
        assert "makes no images: name" in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
    assert before["held_out"] == 100
    assert before["frechet_train"] == figures["frechet_train"]
    assert before["frechet"] != figures["frechet"]
    assert 0 <= before["judged_right"] <= 1
    assert (out / "beside.png").is_file()
    other, _ = generated(base, tmp_path / "base", "--count=12", "--measure")
    assert other["weights_sha256"] != manifest["weights_sha256"]
    assert "adapter_sha256" not in other


def base_judge(folder):
    """The embedded ViT with a head for the classes: weights that call themselves by their names."""
    changes = {"total_steps": "1", "optim.warmup_steps": "0", "data.subset": "64", "recipes": "()",
               "evaluate.every": "1", "checkpoint_every": "1"}  # fmt: skip
    workdir = folder / "judge"
    assert train.run(load_config(str(runs.ROOT / "configs/vit_lora.py"), changes), workdir) == 0
    return workdir


@pytest.mark.long
def test_a_classifier_takes_what_was_made_and_is_attacked_through_the_generator(
    base, tmp_path, capsys
):
    """Both bridges, by their commands: `generated:RUN`, and `robustness.purify`."""
    generated(base, tmp_path / "made", "--count=16")
    changes = {"total_steps": "2", "optim.warmup_steps": "0", "data.subset": "20", "recipes": "()",
               "evaluate.every": "2", "checkpoint_every": "2", "model.image_size": "28",
               "data.extra": f"generated:{tmp_path / 'made'}"}  # fmt: skip
    workdir = tmp_path / "classifier"
    assert train.run(load_config(str(runs.ROOT / "configs/vit_lora.py"), changes), workdir) == 0
    names = json.loads(gzip.decompress((workdir / "train_data.json.gz").read_bytes()))["name"]
    digest = hashlib.sha256((tmp_path / "made/manifest.json").read_bytes()).hexdigest()
    assert sum(name.startswith(f"generated:{digest[:16]}/") for name in names) == 16
    assert len(names) == 36
    fields = {"images": "6", "batch_size": "6", "epsilons": "(0.05,)", "steps": "2",
              "corruptions": "()", "self_check": "False", "purify": str(base),
              "purify_steps": "2", "purify_draws": "2"}  # fmt: skip
    given = {**changes, **{f"robustness.{name}": value for name, value in fields.items()}}
    config = load_config(str(runs.ROOT / "configs/vit_lora.py"), given)
    assert robustness.run(config, workdir, "last") == 0
    found = json.loads((workdir / "robustness.json").read_text())["purified"]
    assert set(found["attacks"]) == {"fgsm", "pgd"}
    for (row,) in found["attacks"].values():
        assert row["count"] == 6
        assert 0 <= max(row["transferred"], row["adaptive"]) <= found["clean"] <= 1
    assert "pgd 12.75/255 adaptive" in capsys.readouterr().out
    given["robustness.purify"] = str(tmp_path)
    with pytest.raises(UserError, match="holds no run: name a generator's"):
        robustness.run(load_config(str(runs.ROOT / "configs/vit_lora.py"), given), workdir, "last")


@pytest.mark.long
def test_parts_of_images_stay(base, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (28, 28, 3)).astype(np.uint8)
    mask = np.zeros((28, 28, 3), np.uint8)
    mask[5:15, 8:20] = 255
    for name, pixels in (("photo", photo), ("mask", mask)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    flags = ["--images", str(tmp_path / "photo.png"), "--classes=coat"]
    _, made = generated(base, tmp_path / "new", *flags, f"--mask={tmp_path / 'mask.png'}")
    outside = mask[..., 0] == 0
    np.testing.assert_array_equal(made[0][outside], photo[outside])
    assert (made[0][~outside] != photo[~outside]).any()
    manifest, near = generated(base, tmp_path / "near", *flags, "--strength=0.05", "--count=2")
    assert manifest["sampling"]["strength"] == 0.05
    assert near.shape == (2, 28, 28, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["nowhere", "--count=0"], "--count 0: give 1 or more"),
        (["nowhere", "--guidance=-1"], "--guidance -1.0: give a number above 0"),
        (["nowhere", "--strength=0.5"], "--mask and --strength are of --images"),
        (["nowhere", "--judge=x"], "--features and --judge go with --measure"),
        (["nowhere", "--images", "x.png", "--beside=y"], "--beside is of images made of noise"),
        (["nowhere", "--measure"], "--measure: nowhere is no run's folder"),
        (["embedded:vit_cifar10"], "takes a transformer that predicts velocities or images"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    assert generate.main([*flags, f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_what_images_are_measured_by_is_looked_at_before_they_are_made(adapted, tmp_path, capsys):
    out = tmp_path / "out"
    for flags, message in (
        (["--count=3"], "--measure: 3 images, and figures need more than 3: make more by --count"),
        (["--count=8", f"--features={tmp_path}"], "has no model.safetensors"),
        (["--count=8", "--judge=nowhere"], "nowhere: no such file or folder"),
        (["--count=8", "--judge=embedded:vit_cifar10"], "knows none of sneaker"),
    ):
        assert generate.main([str(adapted), "--measure", f"--out={out}", *flags]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        assert not out.exists()


@pytest.mark.long
def test_real_images_are_missing_or_damaged(tmp_path, capsys):
    """Missing ones are said before an image is made; damaged ones are left out."""
    for split, classes in (("train", {"cup": 30, "jug": 30}), ("eval", {"cup": 6, "jug": 2})):
        for name, count in classes.items():
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                picture = Image.new("RGB", (28, 28), (3 * number, 0, 90))
                picture.save(tmp_path / split / name / f"{number}.png")
    arguments = repr(tuple(SIZES.items()))
    run = run_config(
        "generate_embedded", tmp_path / "run", model__arguments=arguments, data__classes=(),
        data__train=tmp_path / "train", data__eval=tmp_path / "eval",
    )  # fmt: skip
    out = f"--out={tmp_path / 'out'}"
    assert generate.main([str(run), "--count=8", "--measure", "--classes=jug", out]) == 2
    said = capsys.readouterr().err
    assert "--measure: the run has 2 held-out images of jug, and figures need more than 3" in said
    assert not (tmp_path / "out").exists()

    damaged = tmp_path / "train/cup/0.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert generate.main([str(run), "--count=8", "--measure", "--classes=cup", out]) == 0
    assert f"left out of the figures: {damaged}" in capsys.readouterr().out
    figures = json.loads((tmp_path / "out/measures.json").read_text())
    assert (figures["images"], figures["held_out"]) == (8, 6)
    assert (tmp_path / "out/nearest.png").is_file()


@pytest.mark.long
def test_unknown_classes_and_full_folders_are_refused(base, tmp_path, capsys):
    assert generate.main([str(base), "--classes=coats", f"--out={tmp_path / 'out'}"]) == 2
    assert "--classes: no class 'coats': did you mean `coat`" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert generate.main([str(base), f"--out={tmp_path}"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert jax.process_count() == 1
