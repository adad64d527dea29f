"""The graph from images to answers, the files of it, and the certificates that they carry."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from vision_jax import platform
from vision_jax.commands import export as command
from vision_jax.convert import arguments_of
from vision_jax.convert.quantized import write_quantized
from vision_jax.data.segmentation_transforms import SegmentationPreprocessing
from vision_jax.errors import UserError
from vision_jax.export import certificate, files, runtimes, stablehlo
from vision_jax.export.certificate import Ran, host_pipeline
from vision_jax.export.files import Request
from vision_jax.export.samples import INSIDE, SAMPLES, make_sample
from vision_jax.export.serving import serving_function
from vision_jax.loaded import load
from vision_jax.models.families import FAMILIES, GENERATION
from vision_jax.trees import quantize


def in_process(format_, given, python=""):
    """`certificate.run_files` without a process of its own."""
    found = []
    for path, images in given:
        run = runtimes.RUNTIMES[format_][1](str(path))
        outputs = [{name: np.asarray(x) for name, x in run(image).items()} for image in images]
        found.append(Ran(outputs, 1.0, {"runtime": format_, "version": "0", "python": "0"}))
    return found


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(certificate, "run_files", in_process)


def pictures(rng, *sizes):
    return certificate.fresh_images(rng, len(sizes), sizes, 3)


def test_every_family_has_a_sample():
    generators = {name for name, family in FAMILIES.items() if family.task == GENERATION}
    sampled = {sample.family for sample in SAMPLES.values()}
    assert sampled | set(INSIDE) | generators == FAMILIES.keys()


@pytest.mark.long(but=("vit",))
@pytest.mark.parametrize("name", SAMPLES)
def test_the_graph_says_what_the_pipeline_says(name, rng):
    """Of any size, in a batch of several sizes too, by operations that all formats have."""
    loaded = make_sample(name, seed=int(rng.integers(2**31)))
    serving = serving_function(loaded)
    run = host_pipeline(loaded, serving.kind)
    sizes = [(80, 61), (50, 90)] if serving.image_size is None else [serving.image_size] * 2
    images = pictures(rng, *sizes)
    with platform.traced_for(platform.ANY):
        alone = jax.jit(serving.function)(images[0])
        both = None
        if serving.kind != "pixels":
            canvas = np.full((2, 96, 96, 3), 200, np.uint8)
            for place, image in zip(canvas, images, strict=True):
                place[: image.shape[1], : image.shape[2]] = image[0]
            both = jax.jit(serving.function)(canvas, np.array(sizes, np.int32))
    want = [run(image) for image in images]
    pairs = [(want[:1], [alone])]
    if both is not None:
        parts = [{name: x[row : row + 1] for name, x in both.items()} for row in (0, 1)]
        pairs.append((want, parts))
    for ours, theirs in pairs:
        theirs = [{name: np.asarray(x) for name, x in part.items()} for part in theirs]
        assert alone.keys() == serving.outputs.keys() == ours[0].keys()
        found = certificate.compare(serving.kind, ours, theirs)
        assert max(found["relative_error"].values()) < 1e-5, found
        assert found["agreement"] > 0.999
        assert found["compared"] > 0


def test_features_that_point_elsewhere_are_no_agreement(rng):
    """The errors of int8 inputs have no bound of their own: features have no best class either."""
    ours = [{"features": rng.normal(size=(1, 64))} for _ in range(4)]
    near = [{"features": one["features"] + 0.02 * rng.normal(size=(1, 64))} for one in ours]
    far = [{"features": rng.normal(size=(1, 64))} for _ in ours]
    dead = [{"features": np.zeros((1, 64))} for _ in ours]
    same = {"preprocessing": {"largest_difference_in_255ths": 0}}
    found = certificate.compare("features", ours, near)
    assert certificate.reasons(found | same, "int8") == []
    assert "relative error" in certificate.reasons(found | same, "float32")[0]
    for theirs in (far, dead):
        found = certificate.compare("features", ours, theirs)
        assert certificate.reasons(found | same, "int8") == ["agreement 0.0000, under 0.95"]
    nothing = {"relative_error": {}, "agreement": 1.0, "compared": 0}
    assert "nothing to compare" in certificate.reasons(nothing | same, "int8")[0]


def test_the_model_before_is_none_of_the_current_folder(monkeypatch, tmp_path):
    for name in ("config.json", "model.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert command._before(None) is None
    assert command._before({"run": str(tmp_path)}) is None  # is there, and can't be read


@pytest.mark.long
def test_labels_of_a_padded_image(rng):
    """What lies beyond the image in the model's square is cut off, and not squeezed into it."""
    loaded = make_sample("eomt", seed=int(rng.integers(2**31)))
    own = dataclasses.replace(loaded.preprocessing, view="pad")
    loaded = dataclasses.replace(loaded, preprocessing=own)
    (image,) = pictures(rng, (48, 90))
    found = jax.jit(serving_function(loaded, image_size=(48, 90)).function)(image)
    want = host_pipeline(loaded, "pixels")(image)
    assert found["label"].shape == (1, 48, 90)
    found = certificate.compare("pixels", [want], [{n: np.asarray(x) for n, x in found.items()}])
    assert found["relative_error"]["scores"] < 1e-5
    assert found["agreement"] > 0.999


def test_a_file_of_any_size_and_number(here, rng, tmp_path):
    loaded = make_sample("vit")
    path, record = files.export(loaded, tmp_path, Request("stablehlo", count=3, seed=5))
    found = record["certificate"]
    assert found["pass"], found
    assert (found["seed"], found["images"], found["agreement"]) == (5, 3, 1.0)
    assert found["preprocessing"]["largest_difference_in_255ths"] == 0
    assert json.loads(json.dumps(record)) == json.loads(
        (tmp_path / "model.stablehlo.json").read_text()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.stablehlo", "model.stablehlo.json"]
    assert record["bytes"] == path.stat().st_size
    assert record["written"]["platforms"] == ["cpu", "cuda", "tpu"]
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    images = np.concatenate(pictures(rng, (70, 33), (70, 33)))
    want = [host_pipeline(loaded, "classes")(image[None]) for image in images]
    both = exported.call(images)
    for row, one in enumerate(want):
        np.testing.assert_allclose(both["logits"][row], one["logits"][0], atol=1e-5)


@pytest.mark.long
def test_a_file_that_says_something_else_is_named_failed(here, monkeypatch, tmp_path):
    """And what an earlier export left of that name stays, with its description."""
    for name in ("model.stablehlo", "model.stablehlo.json", "model.stablehlo.failed"):
        (tmp_path / name).write_text("older")

    def wrong(*arguments):
        first, *others = in_process(*arguments)
        outputs = [{name: x + np.float32(1e-3) for name, x in one.items()} for one in first.outputs]
        return [dataclasses.replace(first, outputs=outputs), *others]

    monkeypatch.setattr(certificate, "run_files", wrong)
    path, record = files.export(make_sample("vit"), tmp_path, Request("stablehlo", count=2))
    assert path.name == "model.stablehlo.failed"
    assert path.read_bytes()[:5] != b"older"
    there = {p.name: p for p in tmp_path.iterdir()}
    assert there.keys() == {
        *("model.stablehlo", "model.stablehlo.failed"),
        *("model.stablehlo.json", "model.stablehlo.json.failed"),
    }
    for name in ("model.stablehlo", "model.stablehlo.json"):
        assert there[name].read_text() == "older"
    assert files.written(path, record) == [path, there["model.stablehlo.json.failed"]]
    assert not record["certificate"]["pass"]
    assert record["certificate"]["reasons"][0].startswith("logits: relative error ")


def test_a_runtime_that_is_not_there_or_dies(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    images = [np.zeros((1, 4, 4, 3), np.uint8)]
    for script, reason in (
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name': install its"),
        ("import os; os.abort()", "its runtime died of signal 6"),
        ("raise ValueError('no such operator')", "ValueError: no such operator"),
    ):
        program = tmp_path / "program"
        program.write_text(f'#!/bin/sh\nexec {command.sys.executable} -S -c "{script}"\n')
        program.chmod(0o755)
        with pytest.raises(
            certificate.RunFailedError, match=r"model\.onnx can.t be run: "
        ) as found:
            certificate.run_files("onnx", [(path, images)], str(program))
        assert reason in str(found.value)


def test_pairs_of_boxes():
    """A box that is lost, moved or of another class counts; one of no score doesn't."""
    boxes = np.array([[[0, 0, 10, 20], [5, 5, 50, 90], [1, 1, 2, 2]]], np.float32)
    one = {
        "score": np.array([[0.9, 0.5, 0.0]], np.float32),
        "label": np.array([[1, 2, 0]]),
        "boxes_xyxy_px": boxes,
    }
    turned = {name: x[:, [1, 0, 2]] for name, x in one.items()}
    found = certificate.compare("boxes", [one], [turned])
    assert found == {
        "relative_error": {"boxes_xyxy_px": 0.0, "score": 0.0}, "agreement": 1.0, "compared": 2,
    }  # fmt: skip
    moved = {**one, "boxes_xyxy_px": boxes + np.float32(0.009)}
    found = certificate.compare("boxes", [one], [moved])
    assert found["relative_error"]["boxes_xyxy_px"] == pytest.approx(1e-4, rel=0.01)
    for other in ({"label": np.array([[1, 1, 0]])}, {"boxes_xyxy_px": boxes * 1.1}):
        found = certificate.compare("boxes", [one], [{**one, **other}])
        assert found["agreement"] < 1, other
        assert certificate.reasons({**found, "preprocessing": dict(NONE)}, "float32")


NONE = {"largest_difference_in_255ths": 0, "share_that_differs": 0.0}


def test_what_makes_a_certificate_fail():
    good = {
        "relative_error": {"logits": 1e-6},
        "agreement": 1.0,
        "compared": 4,
        "preprocessing": NONE,
    }
    assert certificate.reasons(good, "float32") == []
    levels = {**NONE, "largest_difference_in_255ths": 2}
    for bad in (
        {"relative_error": {"logits": float("nan")}},
        {"relative_error": {"logits": 2e-5}},
        {"agreement": 0.99},
        {"preprocessing": levels},
    ):
        assert len(certificate.reasons({**good, **bad}, "float32")) == 1, bad
    assert certificate.reasons({**good, "relative_error": {"logits": 0.1}}, "int8") == []


def test_the_command_exports_a_run(here, capsys, tmp_path):
    """Of a run with adapters, by the chain that its certificate names."""
    workdir = runs.finished()
    described = json.loads((workdir / "model.json").read_text())
    proof = tmp_path / "import.json"
    proof.write_text(json.dumps({"sha256": described["sha256"], "worst": {"float32": 1e-6}}))
    given = [str(workdir), "--to=stablehlo", f"--out={tmp_path / 'o'}", "--checkpoint=best"]
    assert command.main([*given, f"--import-certificate={proof}", "--seed=3"]) == 0
    shown = capsys.readouterr().out
    assert "certified by stablehlo 0 on 8 images; relative error logits " in shown
    record = json.loads((tmp_path / "o/model.stablehlo.json").read_text())
    assert record["class_names"] == list(runs.CLASSES)
    chain = record["certificate"]["continues"]
    assert (chain["weights"], chain["sha256"]) == (described["weights"], described["sha256"])
    assert chain["of_the_same_file"]
    assert chain["import_certificate"]["worst"] == {"float32": 1e-6}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--to=onyx"], "invalid choice: 'onyx'"),
        (["--to=stablehlo", "--batch=0"], "--batch=0"),
        (["--to=stablehlo", "--image-size=a"], "no height and width"),
        (["--to=stablehlo", "--checkpoint=best"], "--checkpoint is of the folder of a run"),
        (["--to=stablehlo", "--image-size=100000,100000"], "1 x 100000 x 100000 pixels at once"),
        (["--to=stablehlo", "--batch=100000000"], "lower --image-size or --batch"),
        (["--to=stablehlo", "--batch=100000"], "100000 x 32 x 32 pixels at once"),
        (["--to=stablehlo", "--seed=-1"], "--seed: '-1' is no whole number from 0"),
        (["--to=stablehlo", "--python=/no/such"], "--python=/no/such: can't be run (No such file"),
        (["--to=stablehlo", "--python=false"], "--python=false: is no Python"),
        (["--to=safetensors", "--batch=2"], "--batch: --to=safetensors saves the weights alone"),
        (["--to=safetensors", "--image-size=8"], "--image-size: --to=safetensors saves"),
        ([], "--to"),
    ],
    ids=str,
)
def test_bad_flags_are_one_line(flags, reason, capsys):
    assert command.main(["embedded:vit_cifar10", *flags]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert reason in shown


def test_a_segmenter_of_windows_is_refused():
    own = SegmentationPreprocessing((64, 64), (0.5,) * 3, (0.5,) * 3, view="windows")
    loaded = dataclasses.replace(make_sample("vit"), preprocessing=own)
    with pytest.raises(UserError, match=r"data\.view=squash"):
        serving_function(loaded)


def test_nearest_pixels_of_any_size_are_refused(tmp_path):
    loaded = make_sample("vit")
    own = dataclasses.replace(loaded.preprocessing, interpolation="nearest")
    loaded = dataclasses.replace(loaded, preprocessing=own)
    with pytest.raises(UserError, match=r"nearest pixel.*give --image-size"):
        files.export(loaded, tmp_path, Request("stablehlo"))


@pytest.mark.long
def test_a_process_of_its_own(tmp_path):
    """What users run: no other than a StableHLO file and JAX are needed."""
    assert command.main(["embedded:vit_cifar10", "--to=stablehlo", f"--out={tmp_path}"]) == 0
    record = json.loads(Path(tmp_path, "model.stablehlo.json").read_text())
    assert record["certificate"]["runtime"]["runtime"] == "jax"
    assert record["certificate"]["cpu_time_beside_jax"] > 0


def test_the_readers_of_a_file_are_told():
    serving = serving_function(make_sample("vit"))
    _, about = stablehlo.write(serving, 1)
    low, high = about["calling_conventions_of_this_jax"]
    assert low <= about["calling_convention_version"] <= high
    assert about["jax"] == jax.__version__


@pytest.mark.long(but=("weights",))
@pytest.mark.parametrize("inputs", ["weights", "dynamic"])
def test_kernels_go_to_int8_on_the_way(here, inputs, capsys, tmp_path):
    """And are measured beside the file that would have been."""
    given = [str(runs.finished()), "--to=stablehlo", f"--out={tmp_path}", "--seed=3"]
    assert command.main([*given, f"--quantize={inputs}"]) == 0
    assert "int8: 4 kernels" in capsys.readouterr().out
    record = json.loads((tmp_path / "model.stablehlo.json").read_text())
    found = record["certificate"]["int8"]
    assert (found["kernels"], found["rounds_inputs"]) == (4, inputs == "dynamic")
    assert 0.3 < found["beside_float32"]["bytes"] < 1
    assert 1e-4 < found["beside_float32"]["relative_error"]["logits"] < 0.1
    program = jax.export.deserialize(
        bytearray((tmp_path / "model.stablehlo").read_bytes())
    ).mlir_module()
    assert ("xi8>) -> tensor" in program and "xi32>" in program) or inputs == "weights"


@pytest.mark.long
def test_a_quantized_model_keeps_its_integers(here, tmp_path):
    """Its certificate says what the float model of its run says, and what `quantize` measured."""
    loaded = load(runs.finished())
    make = partial(quantize.FORMS["int8"], dynamic=True)
    params = quantize.quantize(loaded.variables["params"], {"block_0/mlp/fc1/kernel"}, make)
    write_quantized(
        tmp_path / "model.safetensors",
        jax.device_get({"params": params}),
        family="vit",
        arguments=arguments_of(loaded.model),
        preprocessing=dataclasses.asdict(loaded.preprocessing),
        class_names=loaded.class_names,
    )
    report = {"run": str(runs.finished()), "error": 0.01, "kernels": [{}]}
    (tmp_path / "quantization.json").write_text(json.dumps(report))
    assert command.main([str(tmp_path), "--to=stablehlo", "--seed=3"]) == 0
    record = json.loads((tmp_path / "export/model.stablehlo.json").read_text())
    found = record["certificate"]
    assert found["continues"]["quantized"] == {"run": report["run"], "error": 0.01}
    assert found["int8"]["kernels"] == 1
    assert found["relative_error"]["logits"] < 1e-5
    assert 1e-5 < found["int8"]["beside_float32"]["relative_error"]["logits"] < 0.1
    again = [str(tmp_path), "--to=stablehlo", "--quantize=weights"]
    assert command.main(again) == 2
