"""Losses and metrics of pixels beside torch's, smp's and torchmetrics' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vision_jax.ops import segmentation_losses as ops
from vision_jax.ops.resize import resize_bilinear
from vision_jax.tasks.segmentation.metrics import Tally

K = 5


def draw(rng, batch=3, size=(9, 11)):
    logits = rng.normal(size=(batch, *size, K)) * 2
    label = rng.integers(K - 1, size=(batch, 17, 21)).astype(np.uint8)  # a class is absent
    label[rng.random(label.shape) < 0.2] = 255
    return logits, label


def to_torch(logits, label):
    scores = torch.from_numpy(logits).permute(0, 3, 1, 2).requires_grad_()
    return scores, torch.from_numpy(label).long()


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_and_its_gradient_as_transformers_computes_it(rng, weighted):
    """Logits are resized to the mask, bilinear, and compared with ignore_index 255."""
    logits, label = draw(rng)
    scores, target = to_torch(logits, label)
    weight = torch.from_numpy(rng.random(K) + 0.1) if weighted else None
    resized = F.interpolate(scores, size=target.shape[-2:], mode="bilinear", align_corners=False)
    theirs = F.cross_entropy(resized, target, weight, ignore_index=255)

    def ours(logits):
        pixels = ops.pixel_losses(resize_bilinear(logits, label.shape[1:]), label)
        given = None if weight is None else jnp.asarray(weight.numpy())
        return ops.weighted_mean(pixels, jnp.asarray(label), given).mean()

    check_gradient(scores, theirs, ours, logits)


def check_gradient(scores, theirs, ours, logits):
    """Value and gradient of a torch loss of `scores` and of ours of `logits`, in float64."""
    theirs.backward()
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-10)
    found = scores.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, found, rtol=0, atol=1e-10 * np.abs(found).max())


def test_dice_of_one_image_and_its_gradient_as_smp_computes_it(rng):
    losses = pytest.importorskip("segmentation_models_pytorch").losses
    logits, label = draw(rng, batch=1, size=(17, 21))
    scores, target = to_torch(logits, label)
    theirs = losses.DiceLoss("multiclass", smooth=0.5, ignore_index=255)(scores, target)
    # Its smooth is added to halves, and its mean has a zero for each class that is absent.
    present = len(np.unique(label[label != 255]))
    check_gradient(scores, theirs, lambda x: ops.dice_losses(x, label)[0] * present / K, logits)


def test_dice_and_its_gradient_by_its_definition_in_torch(rng):
    """Of images of which one has no pixel that counts, and each has other classes."""
    logits, label = draw(rng, batch=4, size=(17, 21))
    label[0] = 255
    label[1][label[1] == 2] = 0
    scores, target = to_torch(logits, label)
    probabilities = scores.softmax(1)
    losses = []
    for p, t in zip(probabilities[1:], target[1:], strict=True):
        counted = t != 255
        dice = [
            (2 * p[k][t == k].sum() + 1) / (p[k][counted].sum() + (t == k).sum() + 1)
            for k in range(K)
            if (t == k).any()
        ]
        losses.append(1 - torch.stack(dice).mean())
    theirs = torch.stack(losses).sum()
    check_gradient(scores, theirs, lambda x: ops.dice_losses(x, label).sum(), logits)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.5])
def test_focal_loss_and_its_gradient_in_torch(rng, gamma):
    """(1 - p)^gamma times the cross-entropy, where p comes near 0 and 1 too."""
    logits, label = draw(rng, size=(17, 21))
    logits *= 5
    scores, target = to_torch(logits, label)
    each = F.cross_entropy(scores, target, ignore_index=255, reduction="none")
    counted = target != 255
    theirs = ((-torch.expm1(-each)) ** gamma * each)[counted].mean()

    def ours(x):
        losses = ops.pixel_losses(x, jnp.asarray(label), gamma=gamma)
        return ops.weighted_mean(losses, jnp.asarray(label)).mean()

    check_gradient(scores, theirs, ours, logits)


def test_iou_over_a_set_in_one_update_is_torchmetrics(rng):
    """Of all images in one update: its MeanIoU is a mean over batches otherwise."""
    torchmetrics = pytest.importorskip("torchmetrics")
    tally = Tally([f"c{k}" for k in range(K)])
    predictions, labels = [], []
    for size in ((12, 9), (12, 9), (12, 9)):
        label = rng.integers(K - 1, size=size).astype(np.uint8)
        label[rng.random(size) < 0.2] = 255
        prediction = rng.integers(K, size=size).astype(np.uint8)
        tally.add(prediction, label)
        predictions.append(prediction)
        labels.append(label)
    ours = tally.summarize()
    metric = torchmetrics.JaccardIndex("multiclass", num_classes=K, ignore_index=255, average=None)
    theirs = metric(
        torch.from_numpy(np.stack(predictions)).long(), torch.from_numpy(np.stack(labels)).long()
    )
    found = [one["iou"] for one in ours["per_class"].values()]
    np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-6)
    accuracy = torchmetrics.Accuracy(
        "multiclass", num_classes=K, ignore_index=255, average="micro"
    )(torch.from_numpy(np.stack(predictions)).long(), torch.from_numpy(np.stack(labels)).long())
    np.testing.assert_allclose(ours["pixel_accuracy"], accuracy.item(), rtol=1e-6)
