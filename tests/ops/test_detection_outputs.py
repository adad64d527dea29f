"""Scored boxes against loops in numpy; transformers' own: tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.ops.detection_outputs import (
    pair_detections,
    sigmoid_detections,
    softmax_detections,
)

SIZE = np.array([[480, 640], [300, 200]], np.int32)


def _outputs(classes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    return 3 * random.normal(size=(2, 7, classes)), random.random((2, 7, 4))


def _corners(box: np.ndarray, size: np.ndarray) -> list[float]:
    x, y, w, h = box
    height, width = size
    return [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]


def test_softmax_never_gives_no_object() -> None:
    logits, boxes = _outputs(5)
    logits[0, 0] = [0, 1, 0, 0, 9]  # no object is far likelier
    found = jax.jit(softmax_detections)(jnp.asarray(logits, jnp.float32), boxes, SIZE)
    chance = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    assert found["label"].dtype == jnp.int32
    assert found["label"][0, 0] == 1
    np.testing.assert_array_equal(found["label"], chance[..., :4].argmax(axis=-1))
    np.testing.assert_allclose(found["score"], chance[..., :4].max(axis=-1), rtol=2e-6)
    for b, q in np.ndindex(2, 7):
        expected = _corners(boxes[b, q], SIZE[b])
        np.testing.assert_allclose(found["boxes_xyxy_px"][b, q], expected, atol=1e-4)


@pytest.mark.long
def test_sigmoid_takes_the_best_pairs() -> None:
    logits, boxes = _outputs(3)
    logits[0, 2] = [5, 6, -9]  # one query with two classes
    for most, count in ((4, 4), (300, 21)):
        found = sigmoid_detections(jnp.asarray(logits, jnp.float32), jnp.asarray(boxes), SIZE, most)
        assert found["score"].shape == (2, count)
        for b in range(2):
            pairs = [(-logits[b, q, k], q, k) for q, k in np.ndindex(7, 3)]
            for n, (negative, q, k) in enumerate(sorted(pairs)[:count]):
                assert found["label"][b, n] == k
                score = 1 / (1 + np.exp(negative))
                np.testing.assert_allclose(found["score"][b, n], score, rtol=2e-6)
                expected = _corners(boxes[b, q], SIZE[b])
                np.testing.assert_allclose(found["boxes_xyxy_px"][b, n], expected, atol=1e-4)


@pytest.mark.long
def test_half_precision_is_computed_in_float32() -> None:
    logits, boxes = (jnp.asarray(values, jnp.bfloat16) for values in _outputs(4))
    for function in (softmax_detections, sigmoid_detections):
        found = function(logits, boxes, SIZE)
        expected = function(logits.astype(jnp.float32), boxes.astype(jnp.float32), SIZE)
        for name, values in found.items():
            np.testing.assert_array_equal(values, expected[name])
            assert values.dtype == (jnp.int32 if name == "label" else jnp.float32)


def test_pairs_of_cell_and_class_are_clipped_and_suppressed_within_a_class():
    """A cell counts with each class; what a better box of the class covers is gone."""
    logits = jnp.array([[[2.0, 1.0], [3.0, -9.0], [-9.0, -9.0]]])
    boxes = jnp.array([[[0.5, 0.5, 1.2, 0.5], [0.5, 0.5, 1.0, 0.5], [0.1, 0.1, 0.1, 0.1]]])
    found = pair_detections(logits, boxes, jnp.array([[100, 200]]), most=4)
    there = np.asarray(found["score"][0]) > 0
    assert there.tolist() == [True, True, False, False]
    assert found["label"][0][there].tolist() == [0, 1]
    np.testing.assert_allclose(found["score"][0][there], jax.nn.sigmoid(jnp.array([3.0, 1.0])))
    # The second reaches over both sides of the image.
    wanted = [[0.0, 25.0, 200.0, 75.0]] * 2
    np.testing.assert_allclose(found["boxes_xyxy_px"][0][there], wanted, rtol=1e-6)
