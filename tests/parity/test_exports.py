"""Each family in each format, run by the format's runtime beside the model itself."""

import importlib.util

import pytest

from vision_jax.export import certificate
from vision_jax.export.files import FORMATS
from vision_jax.export.samples import SAMPLES, make_sample
from vision_jax.export.serving import serving_function

WRITERS = {"tflite": "litert_converter", "onnx": "onnx", "openvino": "openvino"}
FEW = ("vit", "resnet", "yolox", "segformer")


@pytest.mark.parametrize(
    ("format_", "name"),
    [
        pytest.param(format_, name, marks=[] if name in FEW else pytest.mark.long)
        for format_ in WRITERS
        for name in SAMPLES
    ],
)
def test_a_family_in_a_format(format_, name, rng, tmp_path):
    if importlib.util.find_spec(WRITERS[format_]) is None:
        pytest.skip(f"{WRITERS[format_]} is missing: see .ci/run")
    seed = int(rng.integers(2**31))
    loaded = certificate.as_float32(make_sample(name, seed))
    height, width = loaded.preprocessing.image_size
    resized = not hasattr(loaded.preprocessing, "view")
    given = (height * 5 // 4, width * 3 // 2) if resized else (height, width)
    sizes = [given] if not FORMATS[format_].any_size else [given, (width, height)]
    serving = serving_function(loaded, image_size=None if len(sizes) > 1 and resized else given)
    path, _ = FORMATS[format_].write(serving, None, tmp_path)
    images = certificate.fresh_images(rng, 2, sizes if resized else [given], 3)
    (ran,) = certificate.run_files(format_, [(path, images)])
    run = certificate.host_pipeline(loaded, serving.kind)
    found = certificate.compare(serving.kind, [run(image) for image in images], ran.outputs)
    assert max(found["relative_error"].values()) < 1e-5, found
    assert found["agreement"] > 0.999
