"""A real YOLOX-tiny out of an ONNX file beside onnxruntime: raw outputs, and boxes of 20 images.

It finds characters. pip install onnxruntime, and 76 MB are downloaded; skipped without.
"""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import nms

from vision_jax import convert
from vision_jax.data.detection_transforms import DetectionPreprocessing, detection_eval_transform
from vision_jax.models.families import build_model
from vision_jax.models.yolox import PREPROCESSING, STRIDES
from vision_jax.ops import cells
from vision_jax.tasks.detection.objective import PREDICTIONS
from vision_jax.trees.paths import flatten, unflatten

onnxruntime = pytest.importorskip("onnxruntime")
SIDE, LEAST = 416, 0.1


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    spec = importlib.util.spec_from_file_location(
        "fetch_real_weights", runs.ROOT / "scripts/fetch_real_weights.py"
    )
    script = importlib.util.module_from_spec(spec)
    sys.modules["fetch_real_weights"] = script
    spec.loader.exec_module(script)
    try:
        (path,) = script.fetch(tmp_path_factory.mktemp("real"), script.DETECTORS)
    except OSError as error:
        pytest.skip(str(error))
    return path


def drawn(rng):
    """A light image of four dark letters."""
    height, width = rng.integers(60, 200), rng.integers(160, 400)
    ground, ink = rng.integers(180, 255, 3), rng.integers(0, 120, 3)
    image = Image.new("RGB", (int(width), int(height)), tuple(ground.tolist()))
    pen = ImageDraw.Draw(image)
    for place in range(4):
        at = 20 + place * int(width) / 5, int(rng.integers(5, height - 54))
        font = ImageFont.load_default(size=int(rng.integers(28, 50)))
        pen.text(at, chr(rng.integers(65, 91)), fill=tuple(ink.tolist()), font=font)
    return np.asarray(image)


def their_boxes(raw, scale):
    """f64[N, 4] in pixels of the image and scores, of outputs that are not decoded."""
    deltas = np.asarray(cells.decode(jnp.asarray(raw[None, :, :4]), (SIDE, SIDE), STRIDES))[0]
    corners = np.concatenate(
        [deltas[:, :2] - deltas[:, 2:] / 2, deltas[:, :2] + deltas[:, 2:] / 2], 1
    )
    score = raw[:, 4] * raw[:, 5]
    corners, score = corners[score >= LEAST].astype(np.float64), score[score >= LEAST]
    kept = nms(torch.from_numpy(corners), torch.from_numpy(score.astype(np.float64)), 0.65).numpy()
    return corners[kept] * np.tile(scale, 2), score[kept]


@pytest.mark.long
def test_outputs_and_boxes_are_onnxruntimes(file):
    weights = convert.read_weights(str(file))
    family, arguments = convert.recognize(weights)
    assert (family, arguments["width"], arguments["num_classes"]) == ("yolox", 24, 1)
    model = build_model(family, **arguments)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))
    target = {path: x for tree in like.values() for path, x in flatten(tree).items()}
    flat = convert.import_weights(weights, target, arguments)
    variables = {
        kind: unflatten(tree, {path: flat[path] for path in flatten(tree)})
        for kind, tree in like.items()
    }
    fields = {**PREPROCESSING, "short": SIDE, "longest": SIDE, "square": False}
    preprocessing = DetectionPreprocessing(
        **fields, mean=arguments["mean"], std=arguments["std"], buckets=((SIDE, SIDE),)
    )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    apply, postprocess = jax.jit(model.apply), jax.jit(PREDICTIONS["cells"].postprocess)
    rng, found = np.random.default_rng(0), 0
    for _ in range(20):
        image = drawn(rng)
        size = np.array(image.shape[:2])
        view, _ = detection_eval_transform(image, np.zeros((0, 4)), preprocessing, (SIDE, SIDE))
        height, width = view.shape[:2]
        canvas, mask = np.zeros((1, SIDE, SIDE, 3), np.float32), np.zeros((1, SIDE, SIDE), bool)
        canvas[0, :height, :width], mask[0, :height, :width] = view / np.float32(255), True
        given = np.full((1, SIDE, SIDE, 3), 114, np.float32)
        given[0, :height, :width] = view
        blue_first = np.ascontiguousarray(given[..., ::-1].transpose(0, 3, 1, 2))
        (raw,) = session.run(None, {session.get_inputs()[0].name: blue_first})

        outputs = apply(variables, canvas, mask)
        scores = [outputs["object_logits"][..., None], outputs["logits"]]
        ours = np.concatenate([outputs["box_deltas"], *map(jax.nn.sigmoid, scores)], axis=-1)
        assert np.abs(ours - raw).max() <= 1e-5 * np.abs(raw).max()
        boxes, score = their_boxes(raw[0], size[::-1] / (width, height))
        dets = postprocess(outputs, jnp.asarray(size)[None])
        kept = np.asarray(dets["score"][0]) >= LEAST
        assert kept.sum() == len(boxes)
        np.testing.assert_allclose(dets["boxes_xyxy_px"][0][kept], boxes, atol=0.01)
        np.testing.assert_allclose(dets["score"][0][kept], score, atol=1e-4)
        found += len(boxes)
    assert found > 20
