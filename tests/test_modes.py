"""Evaluation and prediction of a finished run."""

import csv
import dataclasses
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import runs
from PIL import Image
from safetensors.numpy import load_file

from vision_jax import convert, steps
from vision_jax.commands import evaluate, predict, robustness
from vision_jax.data.sources import read_source
from vision_jax.data.transforms import eval_transform
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.models.families import build_model
from vision_jax.run.restore import restore
from vision_jax.tasks.classification import task as classify
from vision_jax.trees import paths


@pytest.fixture(scope="module", autouse=True)
def finished():
    """The shared run, made before any test of this file replaces a part of the program."""
    return runs.finished()


@pytest.fixture(scope="module")
def restored():
    return restore(runs.full_config(), runs.finished(), "last")


def logged(step):
    records = read_metrics(runs.finished() / "metrics.jsonl")
    return next(r for r in records if r["step"] == step and "eval/top1" in r)


@pytest.mark.parametrize("batch_size", [8, 3, 20, 64])
def test_evaluate_reprints_the_numbers_of_training(capsys, batch_size):
    workdir = runs.finished()
    capsys.readouterr()
    config = runs.full_config(evaluate__batch_size=batch_size)
    assert evaluate.run(config, workdir, "last") == 0
    screen = capsys.readouterr().out
    values = {name: f"{logged(6)[f'eval/{name}']:.4f}" for name in ("top1", "top5", "loss", "ece")}
    line = "  ".join(f"{name} {value}" for name, value in values.items())
    data, summary, *rows = screen.splitlines()
    assert data == f"data: cifar10:{runs.inputs()}/test, 20 images"
    assert summary == f"step 6: evaluation on 20 images: {line}"
    assert [row.split()[0] for row in rows] == list(runs.CLASSES)


def test_evaluate_is_exact_to_the_last_digit(restored):
    evaluate = classify.make_evaluate(
        runs.full_config(),
        restored.run.outputs_fn,
        restored.run.mesh,
        classify.read_eval_source(runs.full_config(), runs.CLASSES),
        restored.run.description.preprocessing,
    )
    summary = evaluate(*restored.trained.arguments).summary
    for name in ("top1", "top5", "loss", "ece"):
        assert summary[name] == logged(6)[f"eval/{name}"]


def test_best_is_the_step_with_the_highest_top1(capsys):
    runs.finished()
    capsys.readouterr()
    assert evaluate.run(runs.full_config(), runs.finished(), "best") == 0
    best = max((3, 6), key=lambda step: (logged(step)["eval/top1"], step))
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(f"step {best}: ")
    assert f"loss {logged(best)['eval/loss']:.4f}" in line


def test_the_moving_average_is_what_is_evaluated_and_exported(restored):
    ema, last = restored.state.ema["head/kernel"], restored.state.trainable["head/kernel"]
    assert np.abs(np.asarray(ema) - np.asarray(last)).max() > 1e-4
    np.testing.assert_array_equal(steps.averaged(restored.state)[0]["head/kernel"], ema)
    exported = load_file(runs.finished() / "model.safetensors")
    np.testing.assert_array_equal(exported["head.weight"].T, ema)


def test_the_exported_model_computes_the_same_logits(restored, rng):
    weights = convert.read_weights(str(runs.finished() / "model.safetensors"))
    family, arguments = convert.recognize(weights)
    model = build_model(family, **arguments)
    images = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    flat = convert.import_weights(weights, paths.flatten(like["params"]), arguments)
    params = paths.unflatten(like["params"], flat)
    merged = jax.jit(model.apply)({"params": params}, images / np.float32(255))
    batch = {
        "image": images,
        "label": np.zeros(8, np.int32),
        "mask": np.ones(8, bool),
        "index": np.arange(8, dtype=np.int32),
    }
    attached = jax.jit(restored.run.outputs_fn)(*restored.trained.arguments, batch)["logits"]
    error = np.abs(np.asarray(merged) - np.asarray(attached)).max() / np.abs(merged).max()
    assert error < 3e-6


@pytest.fixture
def pictures(tmp_path):
    """Sound files, one in a folder below, a damaged one, and one that is no image."""
    source = read_source(f"cifar10:{runs.inputs()}/test")
    (tmp_path / "in" / "below").mkdir(parents=True)
    for row, name in enumerate(("a.png", "b.PNG", "below/c.png")):
        Image.fromarray(source[row]["image"]).save(tmp_path / "in" / name)
    (tmp_path / "in" / "damaged.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    return tmp_path / "in"


def test_predict_prints_a_table_and_writes_a_grid(restored, pictures, tmp_path, capsys):
    np.save(pictures / "five.npy", np.zeros((8, 8, 5), np.uint8))
    given = [str(pictures), str(pictures / "a.png")]
    assert predict.run(runs.full_config(), runs.finished(), "last", given, tmp_path / "out") == 0
    screen = capsys.readouterr().out
    rows = [line.split() for line in screen.splitlines() if line.startswith(str(pictures))]
    names = ["a.png", "b.PNG", "below/c.png", "a.png"]
    assert [row[0] for row in rows] == [str(pictures / name) for name in names]
    assert f"skipped a damaged image: {pictures / 'damaged.jpg'}: not a readable image" in screen
    assert f"skipped a damaged image: {pictures / 'five.npy'}: the image has 5 channels" in screen
    assert f"wrote {tmp_path / 'out' / 'predict.png'}" in screen
    with Image.open(tmp_path / "out" / "predict.png") as grid:
        assert min(grid.size) > 100
    assert not (runs.finished() / "predict.png").exists()

    # The probabilities are those of the evaluation, image by image.
    source = read_source(f"cifar10:{runs.inputs()}/test")
    views = [
        eval_transform(source[i]["image"], restored.run.description.preprocessing) for i in range(8)
    ]
    batch = {
        "image": np.stack(views),
        "label": np.zeros(8, np.int32),
        "mask": np.ones(8, bool),
        "index": np.arange(8, dtype=np.int32),
    }
    logits = jax.jit(restored.run.outputs_fn)(*restored.trained.arguments, batch)["logits"]
    expected = np.asarray(jax.nn.softmax(logits))
    for row, index in zip(rows, (0, 1, 2, 0), strict=True):
        assert row[1] == runs.CLASSES[expected[index].argmax()]
        assert abs(float(row[2]) - expected[index].max()) < 6e-4

    # And the files have them all.
    for name in ("predictions.json", "predictions.csv"):
        assert f"wrote {tmp_path / 'out' / name}" in screen
    record = json.loads((tmp_path / "out/predictions.json").read_text())
    assert record["class_names"] == list(runs.CLASSES)
    given = ["a.png", "b.PNG", "below/c.png", "damaged.jpg", "five.npy", "a.png"]
    assert [one["file"] for one in record["images"]] == [str(pictures / name) for name in given]
    damaged, _ = (one for one in record["images"] if "error" in one)
    read = [one for one in record["images"] if "error" not in one]
    assert [one["file"] for one in read] == [row[0] for row in rows]
    assert damaged["file"] == str(pictures / "damaged.jpg")
    assert "not a readable image" in damaged["error"]
    with open(tmp_path / "out/predictions.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    for one, line, index in zip(read, table, (0, 1, 2, 0), strict=True):
        best = int(expected[index].argmax())
        assert (one["class"], one["label"]) == (runs.CLASSES[best], best)
        assert one["probability"] == max(one["probabilities"])
        np.testing.assert_allclose(one["probabilities"], expected[index], rtol=1e-4, atol=1e-6)
        assert [p for _, p in one["top"]] == sorted(one["probabilities"], reverse=True)
        assert dict(one["top"]) == dict(zip(runs.CLASSES, one["probabilities"], strict=True))
        assert (line["file"], line["class"]) == (one["file"], one["class"])
        assert [float(line[name]) for name in runs.CLASSES] == one["probabilities"]


def test_predict_takes_odd_names_and_no_hidden_files(pictures, tmp_path, capsys):
    folder = tmp_path / "odd"
    (folder / ".thumbnails").mkdir(parents=True)
    whole = (pictures / "a.png").read_bytes()
    odd = [b"bad\xff.png", b"esc\x1b[31m\n.png", "\u202eright.png".encode(), b"-dash.png"]
    try:
        for name in odd:
            (folder / os.fsdecode(name)).write_bytes(whole)
    except OSError:
        pytest.skip("this file system refuses such names")
    for hidden in ("._a.png", ".thumbnails/b.png"):
        (folder / hidden).write_bytes(b"no image")
    out = tmp_path / "out"
    assert predict.run(runs.full_config(), runs.finished(), "last", [str(folder)], out) == 0
    screen = capsys.readouterr().out
    screen.encode()
    assert screen.replace("\n", "").isprintable()
    for shown in (r"bad\udcff.png", r"esc\x1b[31m\n.png", r"\u202eright.png", "-dash.png"):
        assert screen.count(shown) == 1
    assert "_a.png" not in screen
    assert ".thumbnails" not in screen
    record = json.loads((out / "predictions.json").read_bytes().decode())
    names = {os.path.basename(one["file"]) for one in record["images"]}
    assert names == {r"bad\xff.png", "esc\x1b[31m\n.png", "\u202eright.png", "-dash.png"}
    for name in names:
        name.encode()
    (out / "predictions.csv").read_text(encoding="utf-8")


def test_predictions_without_a_place_are_refused_before_any_work(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "restore", lambda *given: pytest.fail("too late"))
    for out in (pictures / "a.png", pictures / "a.png/below"):
        with pytest.raises(UserError, match=f"--out: {out} can't be a folder"):
            predict.run(runs.full_config(), runs.finished(), "last", [str(pictures)], out)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [], "needs --images"),
        (lambda folder: [str(folder / "absent.png")], "there is no file"),
        (lambda folder: [str(folder)], "no images in"),
        (lambda folder: [str(folder / "bad.png")], "not one of its 1 images .*bad.png"),
    ],
)
def test_predict_without_images_is_one_line(tmp_path, make, message):
    if "bad" in message:
        (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=message):
        predict.run(runs.full_config(), runs.finished(), "last", make(tmp_path), None)


def test_damaged_images_are_left_out_of_the_evaluation_and_named(restored, pictures, capsys):
    (pictures.parent / "data").mkdir()
    (pictures.parent / "data" / "ant").symlink_to(pictures)
    source = dataclasses.replace(
        read_source(str(pictures.parent / "data")), class_names=runs.CLASSES
    )
    evaluate = classify.make_evaluate(
        runs.full_config(),
        restored.run.outputs_fn,
        restored.run.mesh,
        source,
        restored.run.description.preprocessing,
    )
    result = evaluate(*restored.trained.arguments)
    assert result.summary["count"] == len(source) - 1
    assert "(1 damaged skipped)" in result.line()
    assert re.search(r"damaged\.jpg: not a readable image", result.damaged[0])
    assert result.summary["per_class"]["dog"] is None


def test_workdirs_without_a_run_are_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        evaluate.run(runs.full_config(), tmp_path, "last")
    for name in ("config.json", "model.json"):
        (tmp_path / name).write_text((runs.finished() / name).read_text())
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        evaluate.run(runs.full_config(), tmp_path, "last")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.json"]
    (tmp_path / "model.json").write_text(json.dumps({"arguments": {}}))
    with pytest.raises(UserError, match=r"model\.json is damaged"):
        evaluate.run(runs.full_config(), tmp_path, "last")


# Robustness -------------------------------------------------------------------------------------


def robustness_run(tmp_path, name="robust", **changes):
    """A copy of the finished run, and its config with a quick robustness section."""
    quick = {
        "images": 12,
        "batch_size": 8,
        "epsilons": "(0.02, 0.1)",
        "steps": 3,
        "corruptions": "('fog', 'jpeg')",
        "severities": "(1, 5)",
        "self_check": False,
    }
    fields = {f"robustness__{k}": v for k, v in (quick | changes).items()}
    workdir = tmp_path / name
    shutil.copytree(runs.finished(), workdir)
    return runs.full_config(**fields), workdir


@pytest.mark.long
def test_robustness_writes_figures_and_a_picture(tmp_path, capsys):
    config, workdir = robustness_run(tmp_path)
    assert robustness.run(config, workdir, "last") == 0
    screen = capsys.readouterr().out
    record = json.loads((workdir / "robustness.json").read_text())
    assert record["step"] == 6
    assert record["images"] == record["clean"]["count"] == 12
    assert set(record["attacks"]) == {"fgsm", "pgd", "all"}
    for rows in record["attacks"].values():
        assert [row["epsilon"] for row in rows] == [0.02, 0.1]
        assert all(row["count"] == 12 for row in rows)
        assert record["clean"]["accuracy"] >= rows[0]["accuracy"] >= rows[1]["accuracy"]
    assert set(record["corruptions"]) == {"fog", "jpeg"}
    figures = screen.splitlines()[1:]
    assert sum(line.endswith("n=12") for line in figures) == 1 + 6 + 4 + 1
    for name in ("robustness.json", "robustness.png"):
        assert f"wrote {workdir / name}" in screen
    with Image.open(workdir / "robustness.png") as picture:
        assert min(picture.size) > 500

    config, sharded = robustness_run(tmp_path, "sharded", batch_size=3)
    with config.unlocked():
        config.mesh.data, config.mesh.fsdp = 1, 8
    assert robustness.run(config, sharded, "last") == 0
    again = json.loads((sharded / "robustness.json").read_text())
    for name, rows in record["attacks"].items():
        for one, other in zip(rows, again["attacks"][name], strict=True):
            assert one["accuracy"] == other["accuracy"]
            if name != "all":
                assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert again["corruptions"] == record["corruptions"] or (
        again["corruptions"]["fog"][1]["accuracy"] == record["corruptions"]["fog"][1]["accuracy"]
    )


@pytest.mark.long
def test_the_self_check_takes_another_run_s_attacks(tmp_path, capsys):
    config, workdir = robustness_run(
        tmp_path, attacks="()", corruptions="()", self_check=True, transfer_from=runs.finished()
    )
    assert robustness.run(config, workdir, "last") == 0
    findings = json.loads((workdir / "robustness.json").read_text())["self_check"]
    assert {f["name"]: f["flagged"] for f in findings}["transfer"] is False
    assert not any(f["flagged"] for f in findings), findings
    assert f"0 of {len(findings)} checks" in capsys.readouterr().out
    assert (workdir / "robustness.png").is_file()


def test_robustness_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(UserError, match=r"config.robustness.norm is 'l3'"):
        robustness.run(runs.tiny_config(robustness__norm="l3"), tmp_path, "last")
    with pytest.raises(UserError, match="unknown `fgsn`"):
        robustness.run(runs.full_config(robustness__attacks="fgsn"), runs.finished(), "last")
    changed = runs.full_config(robustness__transfer_from=tmp_path)
    with pytest.raises(UserError, match=r"transfer_from: .* holds no run"):
        robustness.run(changed, runs.finished(), "last")
