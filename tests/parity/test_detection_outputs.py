"""Scored boxes against the image processors of transformers."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DetrImageProcessor
from transformers.models.rf_detr.image_processing_rf_detr import RfDetrImageProcessor

from vision_jax.ops.detection_outputs import sigmoid_detections, softmax_detections

SIZE = np.array([[480, 640], [1333, 800], [17, 31]], np.int32)


def _outputs(queries: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    logits = (4 * random.normal(size=(3, queries, classes))).astype(np.float32)
    return logits, random.random((3, queries, 4)).astype(np.float32)


def _theirs(processor, logits: np.ndarray, boxes: np.ndarray, **more) -> dict[str, np.ndarray]:
    outputs = SimpleNamespace(logits=torch.tensor(logits), pred_boxes=torch.tensor(boxes))
    found = processor.post_process_object_detection(
        outputs, threshold=0, target_sizes=torch.tensor(SIZE), **more
    )
    names = {"scores": "score", "labels": "label", "boxes": "boxes_xyxy_px"}
    return {ours: np.stack([image[key] for image in found]) for key, ours in names.items()}


@pytest.mark.parametrize("classes", [2, 92])
def test_detr(classes: int) -> None:
    logits, boxes = _outputs(100, classes)
    theirs = _theirs(DetrImageProcessor(), logits, boxes)
    _assert_close(softmax_detections(jnp.asarray(logits), jnp.asarray(boxes), SIZE), theirs)


@pytest.mark.parametrize(("classes", "queries"), [(1, 300), (91, 300), (2, 20)])
def test_rf_detr(classes: int, queries: int) -> None:
    _, boxes = _outputs(queries, classes)
    logits = np.linspace(-9, 3, 3 * queries * classes, dtype=np.float32)  # no two scores alike
    logits = np.random.default_rng(6).permutation(logits).reshape(3, queries, classes)
    theirs = _theirs(RfDetrImageProcessor(), logits, boxes, top_k=300)
    _assert_close(sigmoid_detections(jnp.asarray(logits), jnp.asarray(boxes), SIZE), theirs)


def _assert_close(ours: dict, theirs: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(ours["label"], theirs["label"])
    np.testing.assert_allclose(ours["score"], theirs["score"], rtol=1e-5)
    np.testing.assert_allclose(ours["boxes_xyxy_px"], theirs["boxes_xyxy_px"], rtol=1e-6, atol=2e-4)
