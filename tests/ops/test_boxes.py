"""Boxes against their formulas written out in numpy, and at the degenerate ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.ops import boxes


def random_xyxy(rng: np.random.Generator, *shape: int) -> np.ndarray:
    corners = rng.uniform(-2, 10, (*shape, 2, 2))
    return np.concatenate([corners.min(-2), corners.max(-2)], axis=-1)


def test_conversions_are_each_others_inverse(rng):
    xyxy = random_xyxy(rng, 3, 50)
    cxcywh = boxes.xyxy_to_cxcywh(jnp.asarray(xyxy, jnp.float32))
    np.testing.assert_allclose(cxcywh[..., 0], xyxy[..., [0, 2]].mean(-1), atol=2e-6)
    np.testing.assert_allclose(cxcywh[..., 3], xyxy[..., 3] - xyxy[..., 1], atol=2e-6)
    np.testing.assert_allclose(boxes.cxcywh_to_xyxy(cxcywh), xyxy, atol=4e-6)


def test_clipping_cuts_each_side_at_its_own_border(rng):
    xyxy = random_xyxy(rng, 4, 50)
    size = np.array([[3, 5], [9, 2], [1, 1], [6, 6]])
    expected = xyxy.copy()
    for image, (height, width) in enumerate(size):
        expected[image, :, ::2] = expected[image, :, ::2].clip(0, width)
        expected[image, :, 1::2] = expected[image, :, 1::2].clip(0, height)
    result = boxes.clip_xyxy(jnp.asarray(xyxy, jnp.float32), jnp.asarray(size)[:, None])
    np.testing.assert_array_equal(result, expected.astype(np.float32))


def reference(box, other):
    """IoU and GIoU of two boxes, by the axis."""
    spans = [(box[i], box[i + 2], other[i], other[i + 2]) for i in (0, 1)]
    inter = np.prod([max(min(b, d) - max(a, c), 0) for a, b, c, d in spans])
    union = np.prod([b - a for a, b, _, _ in spans]) + np.prod([d - c for *_, c, d in spans])
    union -= inter
    hull = np.prod([max(b, d) - min(a, c) for a, b, c, d in spans])
    return inter / union, inter / union - (hull - union) / hull


def test_overlaps_of_all_pairs(rng):
    with jax.enable_x64(True):
        few, many = random_xyxy(rng, 2, 7), random_xyxy(rng, 2, 11)
        expected = np.array(
            [[[reference(a, b) for b in many[i]] for a in few[i]] for i in range(2)]
        )
        results = (boxes.pairwise_iou_xyxy, boxes.pairwise_giou_xyxy)
        for result, wanted in zip(results, np.moveaxis(expected, -1, 0), strict=True):
            np.testing.assert_allclose(
                result(jnp.asarray(few), jnp.asarray(many)), wanted, rtol=1e-12, atol=1e-12
            )
        np.testing.assert_allclose(
            boxes.giou_xyxy(jnp.asarray(few), jnp.asarray(many[:, :7])),
            np.einsum("bii->bi", expected[:, :, :7, 1]),
            rtol=1e-12,
        )


POINT, LINE, BOX = [3.0, 3, 3, 3], [3.0, 3, 5, 3], [3.0, 3, 5, 4]
SPECK = [3.0, 3.0, 3.0 + 1e-7, 3.0 + 1e-7]
TINY = [0.0, 0.0, 1e-12, 1e-12]  # its area squared is no float32


@pytest.mark.parametrize("box", [POINT, LINE, BOX, SPECK, TINY])
@pytest.mark.parametrize("other", [POINT, LINE, BOX, SPECK, TINY])
def test_degenerate_boxes_have_finite_overlaps_and_gradients(box, other):
    box, other = jnp.array(box), jnp.array(other)
    for function in (boxes.iou_xyxy, boxes.giou_xyxy):
        value, gradients = jax.value_and_grad(function, (0, 1))(box, other)
        assert -1 <= value <= 1
        assert np.isfinite(gradients).all()
    if (box == other).all() and box.tolist() in (POINT, LINE):
        assert boxes.giou_xyxy(box, other) == 0


@pytest.mark.parametrize("function", [boxes.iou_xyxy, boxes.giou_xyxy])
def test_nan_comes_through(function):
    box = jnp.array(BOX)
    assert all(np.isnan(function(box.at[i].set(jnp.nan), box)) for i in range(4))
