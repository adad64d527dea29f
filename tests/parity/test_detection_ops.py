"""NMS, RoIAlign, anchors, deltas and the focal loss against torchvision, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchvision.models.detection import _utils as theirs
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, nms, sigmoid_focal_loss
from torchvision.ops import boxes as box_ops

from vision_jax.ops import anchors, losses
from vision_jax.ops.nms import nms as our_nms
from vision_jax.ops.roi_align import roi_align


def random_boxes(rng, *shape, side=100.0):
    first = rng.uniform(0, side, (*shape, 2))
    return np.concatenate([first, first + rng.uniform(0, side / 2, (*shape, 2))], axis=-1)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_nms_keeps_what_torchvision_keeps_class_by_class(rng, platform, classes):
    """Among ties of scores, boxes twice, boxes without area, and padding."""
    images, count = 24, 60
    boxes = random_boxes(rng, images, count)
    boxes[:, 30:35] = boxes[:, :5]
    boxes[:, 40, 2:] = boxes[:, 40, :2]
    scores = np.round(rng.uniform(size=(images, count)), 1)
    labels = rng.integers(classes, size=(images, count))
    labels[::2] = 0
    valid = rng.uniform(size=(images, count)) < 0.8
    valid[3] = False
    with jax.enable_x64(True):
        told = labels if classes > 1 else None
        kept = np.asarray(our_nms(boxes, scores, valid, 0.5, told, platform))
    for image in range(images):
        wanted = np.zeros(count, bool)
        for label in range(classes):
            rows = np.flatnonzero(valid[image] & (labels[image] == label))
            chosen = nms(torch.tensor(boxes[image, rows]), torch.tensor(scores[image, rows]), 0.5)
            wanted[rows[chosen.numpy()]] = True
        np.testing.assert_array_equal(kept[image], wanted, err_msg=f"image {image}")


def test_nms_of_distant_boxes_is_that_of_the_loop_and_not_of_moved_corners():
    boxes = np.array([[0, 0, 1, 1], [0, 0, 1, 0.7], [1e7, 0, 1e7 + 1, 1]], np.float32)
    scores, labels = np.array([0.9, 0.8, 0.7], np.float32), np.array([1, 1, 0])
    kept = our_nms(boxes, scores, np.ones(3, bool), 0.75, labels)
    arguments = [torch.tensor(x) for x in (boxes, scores, labels)]
    loop = box_ops._batched_nms_vanilla(*arguments, 0.75)
    moved = box_ops._batched_nms_coordinate_trick(*arguments, 0.75)
    assert np.flatnonzero(kept).tolist() == sorted(loop.tolist()) == [0, 1, 2]
    assert sorted(moved.tolist()) != [0, 1, 2]


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (32, 32)])
def test_roi_align_and_its_gradient(rng, strides):
    """Boxes of all levels, over the border, of no area."""
    side = 256
    maps = [rng.normal(size=(2, side // s, side // s, 3)) for s in strides]
    boxes = random_boxes(rng, 2, 12, side=side)
    boxes[:, 1] = [-30, -9, 20, 280]
    boxes[:, 2, 2:] = boxes[:, 2, :2] + 1e-3
    boxes[:, 3] = [0, 0, side, side]
    boxes[:, 4] = [3, 5, 20, 19]
    probe = rng.normal(size=(2, 12, 7, 7, 3))
    torch_maps = [torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True) for x in maps]
    pool = MultiScaleRoIAlign([str(i) for i in range(len(maps))], 7, 2)
    wanted = pool(
        {str(i): x for i, x in enumerate(torch_maps)}, list(torch.tensor(boxes)), [(side, side)] * 2
    ).permute(0, 2, 3, 1)
    wanted.backward(torch.tensor(probe).reshape(wanted.shape))
    with jax.enable_x64(True):

        @jax.jit
        def both(maps):
            found, pull = jax.vjp(lambda maps: roi_align(maps, strides, boxes), maps)
            return found, pull(jnp.asarray(probe))[0]

        found, gradients = both([jnp.asarray(x) for x in maps])
    np.testing.assert_allclose(
        found, wanted.detach().numpy().reshape(found.shape), rtol=0, atol=1e-12
    )
    for ours, leaf in zip(gradients, torch_maps, strict=True):
        there = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(ours, there.transpose(0, 2, 3, 1), rtol=0, atol=1e-12)


def test_anchors_of_a_pyramid():
    sizes = ((32,), (64, 128))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 2)
    images = ImageList(torch.zeros(1, 3, 96, 160, dtype=torch.float64), [(96, 160)])
    grids = ((12, 20), (2, 3))
    (wanted,) = generator(images, [torch.zeros(1, 1, *g, dtype=torch.float64) for g in grids])
    with jax.enable_x64(True):
        found = [
            anchors.grid_anchors(
                anchors.base_anchors(side, (0.5, 1.0, 2.0)),
                grid,
                jnp.array([[96 // grid[0], 160 // grid[1]]], jnp.float64),
            )
            for side, grid in zip(sizes, grids, strict=True)
        ]
    np.testing.assert_array_equal(np.concatenate(found, axis=1)[0], wanted.numpy())


def test_deltas_both_ways(rng):
    weights = (10.0, 10.0, 5.0, 5.0)
    coder = theirs.BoxCoder(weights)
    boxes, targets = (random_boxes(rng, 50) + np.array([0, 0, 1, 1]) for _ in range(2))
    deltas = rng.normal(size=(50, 4)) * 20
    with jax.enable_x64(True):
        found = anchors.decode(jnp.asarray(deltas), jnp.asarray(boxes), weights)
        coded = anchors.encode(jnp.asarray(targets), jnp.asarray(boxes), weights)
    wanted = coder.decode_single(torch.tensor(deltas), torch.tensor(boxes))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-12, atol=1e-10)
    wanted = coder.encode_single(torch.tensor(targets), torch.tensor(boxes))
    np.testing.assert_allclose(coded, wanted.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("low_quality", [True, False])
def test_who_is_trained_as_what(rng, low_quality):
    """Ties of a target's best boxes, targets that nobody overlaps well, padded targets, none."""
    boxes = random_boxes(rng, 3, 400)
    boxes[:, 5] = boxes[:, 6]
    targets = random_boxes(rng, 3, 6)
    targets[:, 0] = boxes[:, 5] + [0, 0, 3, 3]
    targets[:, 1] = boxes[:, 20]
    mask = np.array([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
    matcher = theirs.Matcher(0.7, 0.3, allow_low_quality_matches=low_quality)
    with jax.enable_x64(True):
        target, label = anchors.assign(
            jnp.asarray(boxes),
            jnp.asarray(targets),
            jnp.asarray(mask),
            foreground=0.7,
            background=0.3,
            low_quality=low_quality,
        )
    for image in range(2):
        real = torch.tensor(targets[image, mask[image]])
        found = matcher(box_ops.box_iou(real, torch.tensor(boxes[image]))).numpy()
        np.testing.assert_array_equal(
            label[image], np.select([found >= 0, found == -1], [1, 0], -1)
        )
        there = found >= 0
        np.testing.assert_array_equal(np.asarray(target[image])[there], found[there])
    assert not np.asarray(label[2]).any()


@pytest.mark.parametrize("alpha", [0.25, -1.0])
def test_focal_loss(rng, alpha):
    logits, targets = rng.normal(size=50) * 5, rng.integers(2, size=50).astype(float)
    wanted = sigmoid_focal_loss(torch.tensor(logits), torch.tensor(targets), alpha=alpha, gamma=1.5)
    with jax.enable_x64(True):
        found = losses.sigmoid_focal_loss(
            jnp.asarray(logits), jnp.asarray(targets), alpha=alpha, gamma=1.5
        )
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-12, atol=1e-15)
