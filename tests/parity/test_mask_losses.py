"""The loss of masks against transformers' EomtLoss, at the same points."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.eomt import modeling_eomt

from vision_jax.certify.measure import relative_error
from vision_jax.ops.mask_losses import Points, mask_set_loss, sample

LAYERS, BATCH, QUERIES, TARGETS, CLASSES, POINTS = 2, 3, 6, 4, 5, 40
COUNTS = (4, 1, 0)  # targets of each image
TAKEN = int(0.75 * POINTS)


def drawn(rng):
    """(what both see, the points of each layer)."""
    given = {
        "logits": rng.normal(size=(LAYERS, BATCH, QUERIES, CLASSES + 1)),
        "mask_logits": 3 * rng.normal(size=(LAYERS, BATCH, QUERIES, 12, 9)),
        "label": rng.integers(0, CLASSES, (BATCH, TARGETS)),
        "masks": rng.random((BATCH, TARGETS, 30, 21)) > 0.6,
        "target_mask": np.arange(TARGETS)[None] < np.asarray(COUNTS)[:, None],
    }
    points = Points(
        rng.random((LAYERS, BATCH, POINTS, 2)),
        rng.random((LAYERS, BATCH, TARGETS, 3 * POINTS, 2)),
        rng.random((LAYERS, BATCH, TARGETS, POINTS - TAKEN, 2)),
    )
    return given, points


def theirs(given, points, monkeypatch, images):
    """(loss, gradients of logits and masks) of transformers', for some of the images."""
    config = transformers.EomtConfig(num_labels=CLASSES, train_num_points=POINTS)
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    criterion = modeling_eomt.EomtLoss(config, weights).double()
    criterion.empty_weight[-1] = 0.1  # which was rounded to float32
    logits, maps = (
        torch.from_numpy(given[name][:, images]).requires_grad_()
        for name in ("logits", "mask_logits")
    )
    labels = [torch.from_numpy(given["label"][i, : COUNTS[i]]) for i in images]
    masks = [torch.from_numpy(given["masks"][i, : COUNTS[i]]).double() for i in images]
    total = 0.0
    for layer in range(LAYERS):
        draws = deque(points.matching[layer, i][None] for i in images)
        # Matched pairs come by the number of the query, of one image after the other.
        pairs = []

        def rand(*size, device=None, draws=draws, pairs=pairs, layer=layer):
            if draws:
                return torch.from_numpy(draws.popleft())
            kind = points.candidates if size[1] == 3 * POINTS else points.others
            return torch.from_numpy(np.stack([kind[layer, i, target] for i, target in pairs]))

        matcher = criterion.matcher.forward

        def matched(*arguments, matcher=matcher, pairs=pairs, **keywords):
            found = matcher(*arguments, **keywords)
            pairs += [(i, int(j)) for i, (_, js) in zip(images, found, strict=True) for j in js]
            return found

        monkeypatch.setattr(criterion.matcher, "forward", matched)
        monkeypatch.setattr(modeling_eomt.torch, "rand", rand)
        losses = criterion(maps[layer], logits[layer], masks, labels)
        monkeypatch.undo()
        total = total + sum(weights[name] * value for name, value in losses.items())
    total.backward()
    return total.item(), logits.grad.numpy(), maps.grad.numpy()


def ours(given, points, **options):
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(x) for name, x in given.items()}
        kept = Points(*map(jnp.asarray, points))

        def loss(logits, mask_logits):
            losses, metrics = mask_set_loss(
                logits,
                mask_logits,
                arrays["label"],
                arrays["masks"],
                arrays["target_mask"],
                points=lambda layer: Points(*(x[layer] for x in kept)),
                **options,
            )
            return losses.mean(), (losses, metrics)

        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (total, (losses, metrics)), gradients = step(arrays["logits"], arrays["mask_logits"])
        return float(total), np.asarray(losses), metrics, [np.asarray(x) for x in gradients]


def test_values_and_gradients(rng, monkeypatch):
    given, points = drawn(rng)
    expected, class_gradient, mask_gradient = theirs(given, points, monkeypatch, range(BATCH))
    total, _, metrics, gradients = ours(given, points)
    assert abs(total - expected) <= 1e-10 * abs(expected)
    assert relative_error(gradients[0], class_gradient) <= 1e-10
    assert relative_error(gradients[1], mask_gradient) <= 1e-10
    factors = {"class_loss": 2, "mask_loss": 5, "mask_dice_loss": 5, "deep_loss": 1}
    weighted = sum(factor * float(metrics[name]) for name, factor in factors.items())
    assert abs(weighted - expected) <= 1e-10 * abs(expected)


@pytest.mark.parametrize("image", [0, 1])
def test_alone_each_image_is_a_batch_of_its_own(rng, monkeypatch, image):
    given, points = drawn(rng)
    expected, _, _ = theirs(given, points, monkeypatch, [image])
    _, losses, _, _ = ours(given, points, alone=True)
    assert abs(losses[image] - expected) <= 1e-10 * abs(expected)


def test_a_part_of_an_update_counts_all_of_it(rng):
    given, points = drawn(rng)
    _, losses, _, _ = ours(given, points)
    parts = []
    for images in ([0], [1, 2]):
        part = {
            name: x[:, images] if name.endswith("logits") else x[images]
            for name, x in given.items()
        }
        some = Points(*(x[:, images] for x in points))
        parts.append(ours(part, some, whole=given["target_mask"])[1])
    np.testing.assert_allclose(np.concatenate(parts), losses, rtol=1e-12)


def test_sampling_is_torchs_grid_sample(rng):
    maps, points = rng.normal(size=(3, 5, 8)), rng.random((50, 2))
    points[:4] = [[0, 0], [1, 1], [0, 1], [0.001, 0.999]]
    given = torch.from_numpy(2 * points - 1)[None, :, None]
    expected = torch.nn.functional.grid_sample(
        torch.from_numpy(maps)[None], given, align_corners=False
    )
    with jax.enable_x64(True):
        found = np.asarray(sample(jnp.asarray(maps), jnp.asarray(points)))
    np.testing.assert_allclose(found, expected[0, :, :, 0].numpy(), atol=1e-14)
