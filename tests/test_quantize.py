"""`vision_jax quantize`: ranges, exceptions, the file and its report."""

import json
import re
from dataclasses import asdict

import detection_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import segmentation_runs
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import vision_jax
from vision_jax import convert, main, train
from vision_jax.commands.quantize import _choose
from vision_jax.convert.files import QUANTIZED_KEY
from vision_jax.convert.quantized import write_quantized
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.ops.ranges import BINS, count_magnitudes, find_range
from vision_jax.run.calibrate import _compared, choose_exceptions
from vision_jax.trees import lora, paths, quantize


def test_ranges_are_those_of_the_magnitudes(rng):
    x = rng.normal(size=5000).astype(np.float32) * 3
    largest = float(np.abs(x).max())
    counts = np.asarray(count_magnitudes(jnp.asarray(x), jnp.float32(largest)))
    edges = np.linspace(0, largest, BINS + 1)
    assert counts.sum() == 5000
    np.testing.assert_allclose(
        np.cumsum(counts), [(np.abs(x) <= end).sum() for end in edges[1:]], atol=2
    )
    assert find_range(counts, largest, "absmax") == pytest.approx(largest)
    bin_ = largest / BINS
    for percentile in (50.0, 99.0):
        found = find_range(counts, largest, "percentile", percentile)
        assert found == pytest.approx(np.percentile(np.abs(x), percentile), abs=2 * bin_ + 0.05)

    def squared_error(end):
        step = end / 127
        return np.square(np.clip(np.round(x / step), -127, 127) * step - x).mean()

    best = min(squared_error(end) for end in np.linspace(largest / 10, largest, 400))
    assert squared_error(find_range(counts, largest, "mse")) < 1.05 * best
    assert squared_error(find_range(counts, largest, "mse")) <= squared_error(largest)
    dead = np.asarray(count_magnitudes(jnp.zeros(9), jnp.zeros(())))
    assert find_range(dead, 0.0, "mse") == 0


def test_the_fewest_exceptions_that_meet_the_bound():
    errors = {f"layer_{i}": error for i, error in enumerate((0.01, 0.5, 0.02, 0.3, 0.001))}
    asked = []

    def error(on):
        asked.append(set(on))
        return sum(errors[path] ** 2 for path in on) ** 0.5

    assert choose_exceptions(errors, error, 0.05) == ("layer_1", "layer_3")
    assert choose_exceptions(errors, error, 1.0) == ()
    assert choose_exceptions(errors, error, 0.0) == tuple(sorted(errors, key=lambda p: -errors[p]))
    assert len(asked) < 10


def test_inputs_stay_in_float_before_whole_kernels():
    """Of a kernel whose inputs can't be rounded the weights are, where that is off by little."""
    errors = {"a": 0.5, "b": 0.01, "c": 0.3, "d": 0.002}
    weights = {"a": 0.004, "b": 0.001, "c": 0.02, "d": 0.001}

    def error(on, mildly=()):
        parts = [errors[path] for path in on] + [weights[path] for path in mildly]
        return sum(part**2 for part in parts) ** 0.5

    def choose(bound, mildly=True):
        return _choose(errors, error, bound, mildly)

    assert choose(1) == (set(), set())
    assert choose(0.05) == ({"a", "c"}, set())
    assert choose(0.022) == ({"a", "b", "c"}, set())
    assert choose(0.01) == ({"a", "b"}, {"c"})
    assert choose(1e-4) == (set(), set(errors))
    assert choose(0.05, mildly=False) == (set(), {"a", "c"})


def test_what_kernels_multiply_is_seen(rng):
    """By the path of each kernel; the head's input is the pooled features."""
    loaded = vision_jax.load("embedded:vit_cifar10")
    images = jnp.asarray(rng.uniform(size=(2, 32, 32, 3)), jnp.float32)

    @jax.jit
    def see(variables, images):
        outputs, seen = families.apply_with_inputs(loaded.model, variables, images)
        return outputs, seen, loaded.features(variables, images, ["pooled"])["pooled"]

    outputs, seen, pooled = see(loaded.variables, images)
    kernels = {p for p in paths.flatten(loaded.variables["params"]) if p.endswith("kernel")}
    assert seen.keys() == kernels
    np.testing.assert_allclose(seen["head/kernel"][0], pooled, rtol=1e-6)
    params = loaded.variables["params"]
    again = pooled @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(outputs, again, rtol=1e-4, atol=1e-5)


def run_command(out, *fields, workdir=None):
    workdir = workdir or runs.finished()
    arguments = ["quantize", f"--workdir={workdir}", f"--out={out}", "--no-cache"]
    return main.main([*arguments, "--config.ptq.images=16", *fields])


@pytest.mark.long
def test_a_finished_run_in_int8_and_back(tmp_path, capsys):
    assert run_command(tmp_path, "--config.ptq.activations=static") == 0
    said = capsys.readouterr().out
    assert "survive the rounding" in said
    report = json.loads((tmp_path / "quantization.json").read_text())
    kept = {one["path"]: one["kept"] for one in report["kernels"]}
    assert kept["head/kernel"] == kept["patch_embed/kernel"] == "float: by rule"
    assert {kept[f"block_0/{name}/kernel"] for name in ("attn/qkv", "mlp/fc1")} == {""}
    assert 0 < report["error"] < 0.05
    assert report["bytes"]["quantized"] < report["bytes"]["float"]
    assert (tmp_path / "quantization.png").stat().st_size > 1000

    merged = vision_jax.load(runs.finished())
    loaded = vision_jax.load(tmp_path)
    assert loaded.class_names == merged.class_names == runs.CLASSES
    tensors = load_file(tmp_path / "model.safetensors")
    flat = paths.flatten(loaded.variables["params"])
    assert flat.keys() == tensors.keys()
    for path, array in flat.items():
        np.testing.assert_array_equal(array, tensors[path])
        assert array.dtype == tensors[path].dtype
    kernel = merged.variables["params"]["block_0"]["mlp"]["fc1"]["kernel"]
    ours = lora.merge(loaded.variables["params"])["block_0"]["mlp"]["fc1"]["kernel"]
    assert np.abs(ours - kernel).max() <= 0.51 * np.abs(kernel).max() / 127

    images = np.random.default_rng(0).uniform(size=(8, 16, 16, 3)).astype(np.float32)
    both = [one.apply(one.variables, images)["logits"] for one in (loaded, merged)]
    off = np.linalg.norm(both[0] - both[1]) / np.linalg.norm(both[1])
    assert 1e-5 < off < 0.1
    program = jax.jit(loaded.apply).lower(loaded.variables, images).as_text()
    assert re.search(r"dot_general.*xi8>, tensor<.*xi8>\) -> tensor<.*xi32>", program)
    evaluated = vision_jax.evaluate(loaded, loaded.variables, f"cifar10:{runs.inputs()}/test")
    assert evaluated.summary["top1"] == pytest.approx(report["evaluation"]["quantized"]["top1"])


@pytest.mark.long
def test_a_detector_in_int8(tmp_path):
    """A DETR, whose convolutions and attention have calibrated inputs; its heads stay in float."""
    finished = detection_runs.finished()
    fields = ("--config.ptq.activations=static", "--config.ptq.max_error=1")
    assert run_command(tmp_path, *fields, "--config.ptq.images=4", workdir=finished) == 0
    report = json.loads((tmp_path / "quantization.json").read_text())
    kept = {one["path"] for one in report["kernels"] if one["kept"]}
    assert {"class_head/kernel", "box_head/fc1/kernel", "box_head/fc3/kernel"} < kept
    loaded = vision_jax.load(tmp_path)
    flat = paths.flatten(loaded.variables["params"])
    inside = {path for path in flat if path.endswith("/input_scale")}
    assert len(inside) == len(report["kernels"]) - len(kept)
    assert all(float(flat[path]) > 0 for path in inside)


SEGFORMER = {
    "model__variant": "segformer",
    "model__image_size": 32,
    "data__view": "squash",
    "model__arguments": (
        ("depths", (1, 1, 1, 1)), ("widths", (8, 16, 20, 32)), ("decoder_width", 16),
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("model", [{}, SEGFORMER], ids=["unet", "segformer"])
def test_a_segmenter_in_int8(model, tmp_path):
    """Its head stays in float, and its file has the numbers of the report."""
    workdir = segmentation_runs.finished()
    if model:
        workdir = tmp_path / "run"
        assert train.run(segmentation_runs.tiny_config(**model), workdir) == 0
    out = tmp_path / "quantized"
    fields = ("--config.ptq.activations=static", "--config.ptq.max_error=1")
    assert run_command(out, *fields, workdir=workdir) == 0
    report = json.loads((out / "quantization.json").read_text())
    kept = {one["path"] for one in report["kernels"] if one["kept"]}
    assert "class_head/kernel" in kept
    assert 1e-5 < report["error"] < 1
    loaded = vision_jax.load(out)
    data = segmentation_runs.data() / "test"
    found = vision_jax.evaluate(loaded, loaded.variables, data).summary
    for name, value in report["evaluation"]["quantized"].items():
        if found[name] is not None:  # the run's config names a background and objects
            assert found[name] == pytest.approx(value), name


@pytest.mark.long
def test_adapters_are_not_rounded_to_4_bits_unasked(tmp_path, capsys):
    assert run_command(tmp_path, "--config.ptq.form=nf4") == 2
    assert "ptq.requantize=True" in capsys.readouterr().err
    fields = ("--config.ptq.requantize=True", "--config.ptq.max_error=1")
    assert run_command(tmp_path, "--config.ptq.form=nf4", *fields) == 0
    assert "survive the rounding" in capsys.readouterr().out
    shares = json.loads((tmp_path / "quantization.json").read_text())["adapters_survive"]
    assert set(shares) == {
        f"block_0/{name}/kernel" for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    }
    loaded = vision_jax.load(tmp_path)
    assert quantize.describe(loaded.variables["params"])["block_0/mlp/fc1/kernel"] == {
        "form": "nf4",
        "block_size": 64,
        "double": True,
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, header: tensors.pop("head/bias"), "head/bias should be there"),
        (lambda tensors, header: tensors.update(x=np.zeros(3)), "x should be absent"),
        (
            lambda tensors, header: tensors.update({"head/bias": np.zeros(11, np.float32)}),
            r"head/bias is float32\[11\], and the model's is float32\[10\]",
        ),
        (
            lambda tensors, header: header["kernels"]["head/kernel"].update(form="int2"),
            "head/kernel: it cannot be quantized as",
        ),
        (
            lambda tensors, header: header["kernels"].update({"neck/kernel": {}}),
            "neck/kernel is described as quantized",
        ),
        (lambda tensors, header: header.pop("arguments"), "its header is damaged"),
        (lambda tensors, header: header["arguments"].update(depth=10**9), "vit: depth"),
        (lambda tensors, header: header.update(preprocessing={}), "its preprocessing is damaged"),
        (lambda tensors, header: header.update(class_names="ab"), "no list of texts"),
    ],
)
def test_damaged_files_are_refused_in_one_line(damage, message, tmp_path):
    file = tmp_path / "model.safetensors"
    write_small(file)
    tensors = load_file(file)
    header = json.loads(vision_jax_header(file))
    damage(tensors, header)
    save_file(tensors, file, {QUANTIZED_KEY: json.dumps(header)})
    with pytest.raises(UserError, match=message):
        vision_jax.load(tmp_path)


def test_a_quantized_file_is_for_its_own_classes(tmp_path):
    write_small(tmp_path / "model.safetensors")
    assert vision_jax.load(tmp_path).class_names == tuple("abcdefghij")
    with pytest.raises(UserError, match="is quantized for its classes and size"):
        vision_jax.load(tmp_path, num_classes=3)
    with pytest.raises(UserError, match="is a quantized model"):
        convert.read_weights(str(tmp_path))


def write_small(file):
    """The embedded ViT with its head in int8."""
    loaded = vision_jax.load("embedded:vit_cifar10")
    make = quantize.FORMS["int8"]
    params = quantize.quantize(loaded.variables["params"], {"head/kernel"}, make)
    write_quantized(
        file,
        jax.device_get({"params": params}),
        family="vit",
        arguments=convert.arguments_of(loaded.model),
        preprocessing=asdict(loaded.preprocessing),
        class_names="abcdefghij",
    )


def vision_jax_header(file):
    with safe_open(file, "numpy") as opened:
        return opened.metadata()[QUANTIZED_KEY]


def test_errors_are_of_outputs_whose_order_stands():
    """Detections are in the order of their scores: a small difference swaps two of them."""
    x = jnp.ones(3)
    dense = {"logits": x, "box_deltas": x, "label": jnp.ones(3, jnp.int32)}
    ordered = {"score": x, "boxes_xyxy_01": x}
    assert _compared(dense).keys() == _compared({**dense, **ordered}).keys()
    assert _compared(dense).keys() == {"logits", "box_deltas"}
    assert _compared({"logits": x, "boxes_cxcywh_01": x}).keys() == {"logits", "boxes_cxcywh_01"}
    proposed = {"proposals_xyxy_px": x, "logits": x, "deltas": x}
    assert _compared({"rpn_logits": x, **proposed, **ordered}).keys() == {"rpn_logits"}
