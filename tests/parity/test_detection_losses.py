"""Set losses against transformers: every term of every layer, and the gradients."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from transformers.loss.loss_lw_detr import LwDetrForObjectDetectionLoss

from vision_jax.ops import boxes, detection_losses

RNG = np.random.default_rng()
LAYERS, EXAMPLES, QUERIES, CLASSES, SLOTS = 3, 4, 12, 5, 6
TOLERANCES = {"float64": 1e-12, "float32": 5e-6}
TERMS = ("loss_ce", "loss_bbox", "loss_giou")


def random_boxes(*shape: int) -> np.ndarray:
    return np.concatenate(
        [RNG.uniform(0.2, 0.8, (*shape, 2)), RNG.uniform(0.05, 0.4, (*shape, 2))], axis=-1
    )


def make_targets(counts: list[int]):
    """Targets padded to SLOTS, the real ones anywhere, and the list that transformers takes."""
    mask = np.zeros((len(counts), SLOTS), bool)
    for row, count in zip(mask, counts, strict=True):
        row[RNG.permutation(SLOTS)[:count]] = True
    label = RNG.integers(0, CLASSES, mask.shape)
    target_boxes = random_boxes(*mask.shape)
    labels = [
        {"class_labels": torch.tensor(label[i][mask[i]]), "boxes": target_boxes[i][mask[i]]}
        for i in range(len(counts))
    ]
    return (label, target_boxes, mask), labels


def config(groups: int) -> SimpleNamespace:
    """Weights and costs that are all different, so that none can stand in for another."""
    return SimpleNamespace(
        class_cost=1.5, bbox_cost=4.0, giou_cost=2.5,
        bbox_loss_coefficient=3.0, giou_loss_coefficient=1.25,
        class_loss_coefficient=1.75 if groups else 1.0,
        eos_coefficient=0.15, focal_alpha=0.25, num_labels=CLASSES, auxiliary_loss=True,
        decoder_layers=LAYERS, group_detr=groups,
    )  # fmt: skip


def settings(twin: SimpleNamespace) -> dict[str, float]:
    return {
        "class_cost": twin.class_cost,
        "l1_cost": twin.bbox_cost,
        "giou_cost": twin.giou_cost,
        "class_weight": twin.class_loss_coefficient,
        "l1_weight": twin.bbox_loss_coefficient,
        "giou_weight": twin.giou_loss_coefficient,
    }


def reference(function, twin, logits, predicted, labels, dtype, encoder=()):
    """Loss, terms and gradients of transformers; the last layer of the arrays is the prediction."""
    tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (logits, predicted)]
    tensors += [torch.tensor(x, dtype=dtype, requires_grad=True) for x in encoder]
    labels = [{**x, "boxes": torch.tensor(x["boxes"], dtype=dtype)} for x in labels]
    (logits, predicted), encoder = tensors[:2], tensors[2:]
    torch.set_default_dtype(dtype)  # of the class weights that it makes
    loss, terms, _ = function(
        logits[-1], labels, "cpu", predicted[-1], twin, logits, predicted, *encoder
    )
    torch.set_default_dtype(torch.float32)
    loss.backward()
    return loss.item(), terms, [x.grad.numpy() for x in tensors]


def close(result, expected, dtype: str) -> None:
    """Relative to the largest value of the array."""
    expected = np.asarray(expected, np.float64)
    atol = TOLERANCES[dtype] * max(np.abs(expected).max(), 1e-30)
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=0, atol=atol)


CASES = {"mixed": [3, 0, 6, 1], "empty": [0, 0, 0, 0], "full": [6, 6, 6, 6]}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_detr(case, dtype):
    with jax.enable_x64(dtype == "float64"):
        logits = 3 * RNG.normal(size=(LAYERS, EXAMPLES, QUERIES, CLASSES + 1))
        predicted = random_boxes(LAYERS, EXAMPLES, QUERIES)
        (label, target_boxes, target_mask), labels = make_targets(CASES[case])
        twin = config(groups=0)
        expected, terms, gradients = reference(
            ForObjectDetectionLoss, twin, logits, predicted, labels, getattr(torch, dtype)
        )
        assert len(terms) == 4 * LAYERS

        def loss_fn(logits, predicted):
            return detection_losses.detr_loss(
                logits, predicted, label, jnp.asarray(target_boxes, dtype), target_mask,
                np.ones(EXAMPLES, bool), no_object_weight=twin.eos_coefficient, **settings(twin),
            )  # fmt: skip

        arrays = jnp.asarray(logits, dtype), jnp.asarray(predicted, dtype)
        step = jax.jit(jax.value_and_grad(loss_fn, (0, 1), has_aux=True))
        (loss, _), ours = step(*arrays)
        assert loss.dtype == dtype
        close(loss, expected, dtype)
        for result, wanted in zip(ours, gradients, strict=True):
            close(result, wanted, dtype)
        layer_loss = jax.jit(loss_fn)
        for layer in range(LAYERS):
            _, metrics = layer_loss(*(x[layer : layer + 1] for x in arrays))
            suffix = f"_{layer}" if layer < LAYERS - 1 else ""
            for name in (*TERMS, "cardinality_error"):
                close(metrics[name], terms[name + suffix].detach(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", [1, 2])
def test_rf_detr(case, groups, dtype):
    check_sigmoid(LwDetrForObjectDetectionLoss, "ia_bce", case, groups, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_deformable_detr(case, dtype):
    check_sigmoid(DeformableDetrForObjectDetectionLoss, "focal", case, 0, dtype)


def check_sigmoid(function, class_loss, case, groups, dtype):
    """`groups` of 0: a loss without groups or proposals."""
    with jax.enable_x64(dtype == "float64"):
        shape = LAYERS, EXAMPLES, max(groups, 1) * QUERIES
        logits, predicted = 2 * RNG.normal(size=(*shape, CLASSES)) - 1, random_boxes(*shape)
        encoder = [2 * RNG.normal(size=(*shape[1:], CLASSES)), random_boxes(*shape[1:])]
        encoder = encoder if groups else []
        (label, target_boxes, target_mask), labels = make_targets(CASES[case])
        twin = config(groups)
        expected, terms, gradients = reference(
            function, twin, logits, predicted, labels, getattr(torch, dtype), encoder
        )
        assert len(terms) == 4 * (LAYERS + bool(groups))

        def loss_fn(logits, predicted, *encoder):
            names = ("encoder_logits", "encoder_boxes_cxcywh_01")
            return detection_losses.sigmoid_detr_loss(
                logits, predicted, label, jnp.asarray(target_boxes, dtype), target_mask,
                np.ones(EXAMPLES, bool), class_loss=class_loss, groups=max(groups, 1),
                **dict(zip(names, encoder, strict=False)), **settings(twin),
            )  # fmt: skip

        arrays = [jnp.asarray(x, dtype) for x in (logits, predicted, *encoder)]
        step = jax.jit(jax.value_and_grad(loss_fn, range(len(arrays)), has_aux=True))
        (loss, metrics), ours = step(*arrays)
        assert loss.dtype == dtype
        close(loss, expected, dtype)
        for result, wanted in zip(ours, gradients, strict=True):
            close(result, wanted, dtype)
        layer_loss = jax.jit(loss_fn)
        layers = [(x[layer : layer + 1] for x in arrays[:2]) for layer in range(LAYERS)]
        suffixes = [*(f"_{layer}" for layer in range(LAYERS - 1)), ""]
        if groups:
            layers.append(x[None] for x in arrays[2:])
            suffixes.append("_enc")
            weights = settings(twin)
            expected = sum(
                weights[weight] * terms[f"{name}_enc"].detach()
                for weight, name in zip(
                    ("class_weight", "l1_weight", "giou_weight"), TERMS, strict=True
                )
            )
            close(metrics["loss_encoder"], expected, dtype)
        for layer, suffix in zip(layers, suffixes, strict=True):
            _, metrics = layer_loss(*layer)
            names = TERMS if groups > 1 else (*TERMS, "cardinality_error")
            for name in names:
                close(metrics[name], terms[name + suffix].detach(), dtype)


def test_overlaps_are_torchvisions():
    with jax.enable_x64(True):
        few, many = (boxes.cxcywh_to_xyxy(jnp.asarray(random_boxes(n))) for n in (20, 30))
        arguments = [torch.tensor(np.asarray(x)) for x in (few, many)]
        close(boxes.pairwise_iou_xyxy(few, many), box_iou(*arguments), "float64")
        close(boxes.pairwise_giou_xyxy(few, many), generalized_box_iou(*arguments), "float64")
