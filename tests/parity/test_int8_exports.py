"""Kernels in int8 in exported files: as small as they should be, and what they compute."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax import platform
from vision_jax.config.fields import HEADS
from vision_jax.errors import UserError
from vision_jax.export import certificate, litert_int8
from vision_jax.export.files import FORMATS
from vision_jax.export.samples import make_sample
from vision_jax.export.serving import serving_function
from vision_jax.trees import lora, quantize

WRITERS = {"tflite": "litert_converter", "onnx": "onnx", "openvino": "openvino"}
FEW = ("vit", "resnet")
SAMPLES = (
    "vit",
    "resnet",
    "convnext",
    "regnet",
    "mobilenet v3",
    "swin",
    "detr",
    "yolox",
    "segformer",
)
INPUTS = {
    "float": lambda kernel: quantize.FORMS["int8"](kernel),
    "dynamic": lambda kernel: quantize.FORMS["int8"](kernel, dynamic=True),
    "static": lambda kernel: quantize.FORMS["int8"](kernel, input_scale=jnp.float32(0.05)),
}


def quantized(name, inputs, seed):
    loaded = certificate.as_float32(make_sample(name, seed))
    params = loaded.variables["params"]
    chosen = quantize.choose(params, [".*kernel"], HEADS)
    params = quantize.quantize(params, chosen, INPUTS[inputs])
    return dataclasses.replace(loaded, variables={**loaded.variables, "params": params})


@pytest.mark.parametrize(
    ("format_", "inputs", "name"),
    [
        pytest.param(format_, inputs, name, marks=[] if name in FEW else pytest.mark.long)
        for format_ in WRITERS
        for inputs in INPUTS
        for name in SAMPLES
        if (format_, inputs) != ("tflite", "static")
    ],
)
def test_a_quantized_model_in_a_format(format_, inputs, name, rng, tmp_path):
    """With inputs in float to float32's bar; with rounded ones as far as a rounding apart."""
    if importlib.util.find_spec(WRITERS[format_]) is None:
        pytest.skip(f"{WRITERS[format_]} is missing: see .ci/run")
    loaded = quantized(name, inputs, int(rng.integers(2**31)))
    size, known = loaded.preprocessing.image_size, FORMATS[format_]
    serving = serving_function(loaded, image_size=size, integers=known.integers)
    plain = dataclasses.replace(
        loaded, variables={**loaded.variables, "params": lora.merge(loaded.variables["params"])}
    )
    files, left = [], set()
    for place, one in (("int8", serving), ("float", serving_function(plain, image_size=size))):
        (tmp_path / place).mkdir()
        path, about = known.write(one, 1, tmp_path / place)
        files.append(path)
        left = {*left, *about.get("not_in_int8", ())}
    first = "decoder_0/self_attn"  # of queries alone, whatever the image
    assert left <= {f"{first}/{part}/kernel" for part in ("q", "k", "v", "out", "proj")}
    weights = sum(one.values.size for path, one in serving.int8.items() if path not in left)
    if format_ == "openvino":  # whose graph is XML, large beside so small a model
        files_of_weights = [file.with_suffix(".bin") for file in files]
    else:
        files_of_weights = files
    small, large = (file.stat().st_size for file in files_of_weights)
    assert 2.2 * weights < large - small < 3 * weights

    images = certificate.fresh_images(rng, 3, [size], serving.channels)
    (ran,) = certificate.run_files(format_, [(files[0], images)])
    pipeline = certificate.host_pipeline(loaded, serving.kind)
    ours = [pipeline(image) for image in images]
    if inputs == "float":
        found = certificate.compare(serving.kind, ours, ran.outputs)
        assert max(found["relative_error"].values()) < 1e-5, found
        assert found["agreement"] > 0.999
    elif serving.kind == "boxes":  # which lie beside each other, and a rounding may decide
        found = certificate.compare(serving.kind, ours, ran.outputs)
        assert found["compared"] >= 30
        assert found["agreement"] > 0.5, found
    else:
        values = {"classes": "logits", "pixels": "scores"}[serving.kind]
        for a, b in zip(ours, ran.outputs, strict=True):
            assert np.linalg.norm(a[values] - b[values]) < 0.15 * np.linalg.norm(a[values])


def far_from_halves(x):
    """Whether no last bit decides to which level a number is rounded."""
    largest = [np.abs(x).max(axes, keepdims=True) for axes in ((3,), (1, 2, 3))]
    for scale in (0.05, *(np.maximum(one, 1e-30) / 127 for one in largest)):
        levels = x / scale
        if np.abs(levels - np.floor(levels) - 0.5).min() < 1e-4:
            return False
    return True


def test_integers_multiply_as_the_model_has_them(rng, tmp_path):
    """A layer's products, of tokens whose largest values are far apart, and of none."""
    import onnxruntime

    from vision_jax.export import onnx_file
    from vision_jax.export.serving import Serving
    from vision_jax.trees.leaf import convolve, dot

    dense = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
    window = jnp.asarray(rng.normal(size=(3, 3, 3, 5)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2, (1, 1, 1, 7)), jnp.float32)
    while True:
        images = rng.integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
        images[0, 1] = 128
        images[1] = 128 + np.array([-3, -1, 0, 1, 3])[images[1] % 5]
        if far_from_halves((images - 128.0) * 0.0617):
            break
    for make in INPUTS.values():

        def function(images, make=make):
            x = (images.astype(jnp.float32) - 128) * 0.0617
            return {
                "dense": dot(x, make(dense)),
                "scaled": dot(x, make(dense)) * scale * scale,
                "window": convolve(x, make(window), (2, 1), ((1, 0), (1, 1))),
            }

        names = {"dense": "", "scaled": "", "window": ""}
        serving = Serving(function, None, names, None, 3, (), "features")
        content, _ = onnx_file.write(serving, None)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = dict(zip(names, session.run([*names], {"images": images}), strict=True))
        with platform.traced_for(platform.NO_LOOPS):
            want = jax.jit(function)(images)
        for name, theirs in found.items():
            np.testing.assert_allclose(theirs, want[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_calibrated_inputs_are_nothing_for_litert():
    leaf = INPUTS["static"](jnp.ones((4, 2)))
    kernels = quantize.int8_kernels({"fc": {"kernel": leaf}})
    with pytest.raises(UserError, match=r"fc/kernel: LiteRT has no product .*activations=dynamic"):
        litert_int8.store_int8(b"", kernels)
