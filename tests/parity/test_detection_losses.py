"""Set losses against transformers: every term of every layer, and the gradients."""

import functools
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

LAYERS, EXAMPLES, QUERIES, CLASSES, SLOTS = 3, 4, 12, 5, 6
TOLERANCES = {"float64": 2e-14, "float32": 2e-6}


def random_boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.concatenate(
        [rng.uniform(0.2, 0.8, (*shape, 2)), rng.uniform(0.05, 0.4, (*shape, 2))], axis=-1
    )


def make_targets(rng: np.random.Generator, counts: list[int]):
    """Targets padded to SLOTS, the real ones anywhere, and the list that transformers takes."""
    mask = np.zeros((len(counts), SLOTS), bool)
    for row, count in zip(mask, counts, strict=True):
        row[rng.permutation(SLOTS)[:count]] = True
    label = rng.integers(0, CLASSES, mask.shape)
    target_boxes = random_boxes(rng, *mask.shape)
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


def settings(reference: SimpleNamespace) -> dict[str, float]:
    return {
        "class_cost": reference.class_cost,
        "l1_cost": reference.bbox_cost,
        "giou_cost": reference.giou_cost,
        "class_weight": reference.class_loss_coefficient,
        "l1_weight": reference.bbox_loss_coefficient,
        "giou_weight": reference.giou_loss_coefficient,
    }


def reference_losses(function, reference, predictions, labels, dtype):
    """Loss, terms and gradients of transformers; the last layer is the prediction."""
    tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in predictions]
    labels = [{**x, "boxes": torch.tensor(x["boxes"], dtype=dtype)} for x in labels]
    logits, predicted, *encoder = tensors
    torch.set_default_dtype(dtype)  # of the class weights that it makes
    loss, terms, _ = function(
        logits[-1], labels, "cpu", predicted[-1], reference, logits, predicted, *encoder
    )
    torch.set_default_dtype(torch.float32)
    loss.backward()
    return loss.item(), terms, [x.grad.numpy() for x in tensors]


def close(result, expected, dtype: str) -> None:
    """Relative to the largest value of the array."""
    expected = np.asarray(expected, np.float64)
    atol = TOLERANCES[dtype] * max(np.abs(expected).max(), 1e-30)
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=0, atol=atol)


@functools.cache  # a compile for all cases of a dtype
def compiled(function, dtype: str, inputs: int, **settings):
    """The step with its gradients over `inputs` arrays, and the metrics alone."""
    names = ("logits", "boxes_cxcywh_01", "encoder_logits", "encoder_boxes_cxcywh_01")

    def loss_fn(predictions, label, target_boxes, target_mask):
        mask = jnp.ones(label.shape[0], bool)
        predictions = dict(zip(names, predictions, strict=False))
        targets = (label, target_boxes, target_mask, mask)
        arrays = predictions.pop("logits"), predictions.pop("boxes_cxcywh_01"), *targets
        losses, metrics = function(*arrays, **predictions, **settings)
        return losses.mean(), metrics

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    return step, jax.jit(lambda *arrays: loss_fn(*arrays)[1])


def check(
    rng: np.random.Generator,
    function,
    torch_function,
    case: str,
    groups: int,
    dtype: str,
    **arguments,
):
    """`groups` of 0: a loss without groups or proposals."""
    with jax.enable_x64(dtype == "float64"):
        classes = CLASSES + (function is detection_losses.detr_loss)
        shape = (LAYERS + bool(groups), EXAMPLES, max(groups, 1) * QUERIES)
        logits, predicted = 2 * rng.normal(size=(*shape, classes)) - 1, random_boxes(rng, *shape)
        predictions = [logits[:LAYERS], predicted[:LAYERS]]
        if groups:
            predictions += [logits[LAYERS], predicted[LAYERS]]
        targets, labels = make_targets(rng, CASES[case])
        reference = config(groups)
        expected, terms, gradients = reference_losses(
            torch_function, reference, predictions, labels, getattr(torch, dtype)
        )
        assert len(terms) == 4 * shape[0]

        if groups:
            arguments["groups"] = groups
        step, metrics_of = compiled(
            function, dtype, len(predictions), **arguments, **settings(reference)
        )
        targets = targets[0], jnp.asarray(targets[1], dtype), targets[2]
        (loss, metrics), ours = step([jnp.asarray(x, dtype) for x in predictions], *targets)
        assert loss.dtype == dtype
        close(loss, expected, dtype)
        for result, wanted in zip(ours, gradients, strict=True):
            close(result, wanted, dtype)

        suffixes = [*(f"_{layer}" for layer in range(LAYERS - 1)), "", "_enc"][: shape[0]]
        for layer, suffix in enumerate(suffixes):
            one = [jnp.asarray(x[layer : layer + 1], dtype) for x in (logits, predicted)]
            single = metrics_of(one, *targets)
            for name in ("loss_ce", "loss_bbox", "loss_giou"):
                close(single[name], terms[name + suffix].detach(), dtype)
            if groups <= 1:  # ours counts the first group alone
                close(single["cardinality_error"], terms["cardinality_error" + suffix], dtype)
            if suffix == "":  # the metrics of all layers are the last one's
                for name in single.keys() - {"loss_aux"}:
                    close(metrics[name], single[name], dtype)


CASES = {"mixed": [3, 0, 6, 1], "empty": [0, 0, 0, 0], "full": [6, 6, 6, 6]}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_detr(case, dtype, rng):
    check(
        rng,
        detection_losses.detr_loss,
        ForObjectDetectionLoss,
        case,
        0,
        dtype,
        no_object_weight=0.15,
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", [1, 3])
def test_rf_detr(case, groups, dtype, rng):
    function = detection_losses.sigmoid_detr_loss
    check(rng, function, LwDetrForObjectDetectionLoss, case, groups, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_deformable_detr(case, dtype, rng):
    function, reference = detection_losses.sigmoid_detr_loss, DeformableDetrForObjectDetectionLoss
    check(rng, function, reference, case, 0, dtype, class_loss="focal")


def test_overlaps_are_torchvisions(rng):
    with jax.enable_x64(True):
        few, many = (boxes.cxcywh_to_xyxy(jnp.asarray(random_boxes(rng, n))) for n in (20, 30))
        arguments = [torch.tensor(np.asarray(x)) for x in (few, many)]
        close(boxes.pairwise_iou_xyxy(few, many), box_iou(*arguments), "float64")
        close(boxes.pairwise_giou_xyxy(few, many), generalized_box_iou(*arguments), "float64")
