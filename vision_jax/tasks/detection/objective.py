"""Object detection: boxes of an image, compared with its targets inside the step.

What a detector predicts (models.families.Family.predicts) decides how it is trained and how boxes
are read from it: PREDICTIONS says both, and nothing else of the task asks what the model is. Of a
model it is asked that it takes images and which of their pixels are some, and gives a dict.

Batches are as data/detection_pipeline.py makes them: images of one canvas, padded at the bottom and
at the right, with the size of what is valid; targets of fixed length with a mask.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.errors import UserError
from vision_jax.objective import Apply, Batch, Objective, forward_keys
from vision_jax.ops import detection_losses
from vision_jax.ops.dense_losses import anchor_loss, point_loss
from vision_jax.ops.detection_outputs import POSTPROCESS, Postprocess
from vision_jax.ops.images import to_float
from vision_jax.ops.proposal_losses import proposal_loss
from vision_jax.ops.simota import yolox_loss

# loss(outputs of the model, batch) -> (losses f[B], metrics)
Loss = Callable[[Mapping[str, jax.Array], Batch], tuple[jax.Array, dict[str, jax.Array]]]
# attack(loss of images, images f[B, H, W, C], keys[B], epsilon=, pixel_mask=) -> images
Attack = Callable[..., jax.Array]

# Of a batch, what the loss of a micro-batch counts over all of its update (steps.make_train_step).
WHOLE = ("target_mask", "mask")
TARGETS = ("label", "boxes_cxcywh_01", "target_mask")


@dataclass(frozen=True)
class Prediction:
    """What the task must know of detectors that predict the same.

    Attributes:
      make_loss: (model, max_boxes=, last_from=, alone=, **fields of config.loss) -> the loss.
        `alone`: an image's loss does not depend on the others of its batch. `last_from`: the update
        from which on the data is plain. Raises UserError where the model can't be trained so.
      postprocess: scored boxes of outputs.
      targets: whether the model's output depends on the targets where it is trained: it takes
        them as a third input then, a dict of TARGETS, and gives in evaluation, with train=False,
        what the loss needs of fixed draws.
      counted: the loss's metric, if any, that only the model tells and that all is divided by.
    """

    make_loss: Callable[..., Loss]
    postprocess: Postprocess
    targets: bool = False
    counted: str = ""


def pixel_mask(size: jax.Array, canvas: Sequence[int]) -> jax.Array:
    """bool[B, H, W] of a canvas (H, W): where the images of `size` i32[B, 2] are.

    Examples:
      >>> pixel_mask(jnp.array([[1, 2]]), (2, 3)).astype(int).tolist()
      [[[1, 1, 0], [0, 0, 0]]]
    """
    rows, columns = (
        jnp.arange(side)[None, :] < size[:, axis, None] for axis, side in enumerate(canvas)
    )
    return rows[:, :, None] & columns[:, None, :]


def make_set_loss(
    model: Any,
    *,
    sigmoid: bool,
    max_boxes: int,
    no_object_weight: float,
    last_from: int = 0,
    alone: bool = False,
    **weights: Any,
) -> Loss:
    """The set loss of a model's queries, of all its decoder layers at once.

    Args:
      model: with `num_queries`, in evaluation.
      sigmoid: whether each class has one; else a softmax has one more for no object.
      max_boxes: targets an image.
      no_object_weight: of a query without a box in the class term of a softmax; a sigmoid has none.
      last_from: not used: the loss is the same to the end.
      alone: an image's loss does not depend on the others of its batch (detection_losses).
      **weights: class_cost, l1_cost, giou_cost, class_weight, l1_weight, giou_weight.

    Raises:
      UserError: more boxes than queries.
    """
    del last_from
    num_queries = model.num_queries
    if max_boxes > num_queries:
        raise UserError(
            f"config.data.max_boxes {max_boxes}: the model has {num_queries} queries, and each "
            "finds one box at most: lower it"
        )

    def set_loss(outputs, batch):
        targets = (batch["label"], batch["boxes_cxcywh_01"], batch["target_mask"], batch["mask"])
        predicted = (outputs["logits"], outputs["boxes_cxcywh_01"])
        whole = tuple(batch["whole"][name] for name in WHOLE) if "whole" in batch else None
        if not sigmoid:
            return detection_losses.detr_loss(
                *predicted,
                *targets,
                **weights,
                alone=alone,
                whole=whole,
                no_object_weight=no_object_weight,
            )
        return detection_losses.sigmoid_detr_loss(
            *predicted,
            *targets,
            **weights,
            alone=alone,
            whole=whole,
            encoder_logits=outputs["encoder_logits"],
            encoder_boxes_cxcywh_01=outputs["encoder_boxes_cxcywh_01"],
            groups=outputs["logits"].shape[2] // num_queries,  # one in evaluation
        )

    return set_loss


def make_cell_loss(
    model: Any, *, l1_weight: float, last_from: int, alone: bool = False, **others: Any
) -> Loss:
    """YOLOX' loss (ops/simota.py).

    Args:
      model: with the `strides` of its maps.
      l1_weight: of the boxes' L1 distance, in training alone,
      last_from: from this update on.
      alone: an image's loss does not depend on the others of its batch.
      **others: of other detectors' losses.
    """
    del others

    def cell_loss(outputs, batch):
        sides = batch["size"][:, None, ::-1].astype(jnp.float32)  # width, height: [B, 1, 2]
        weight = jnp.zeros(())
        if "step" in batch:
            weight = jnp.where(batch["step"] >= last_from, l1_weight, 0.0)
        return yolox_loss(
            outputs["logits"],
            outputs["object_logits"],
            outputs["box_deltas"],
            batch["label"],
            batch["boxes_cxcywh_01"] * jnp.tile(sides, 2),
            batch["target_mask"],
            batch["mask"],
            canvas=batch["image"].shape[1:3],
            strides=model.strides,
            l1_weight=weight,
            alone=alone,
        )

    return cell_loss


def make_side_loss(model: Any, **others: Any) -> Loss:
    """Refuses: generalized focal loss and its assignment of cells are not here.

    Raises:
      UserError: always.
    """
    del model, others
    raise UserError(
        "config.model.variant: NanoDet finds boxes and is evaluated, but it is not trained or "
        "attacked here: fine-tune a YOLOX instead, configs/yolox_finetune.py"
    )


def make_proposal_loss(model: Any, *, max_boxes: int, alone: bool = False, **weights: Any) -> Loss:
    """The loss of anchors and proposals; config.loss has no weight of its terms."""
    del model, max_boxes, weights
    return lambda outputs, batch: proposal_loss(outputs, batch["mask"], alone=alone)


def make_anchor_loss(model: Any, **others: Any) -> Loss:
    """RetinaNet's loss (ops/dense_losses.py), of each image alone in any case.

    Args:
      model: with the kind of its `box_loss`.
      **others: of other detectors' losses; config.loss has no weight of its terms.
    """
    del others
    return lambda outputs, batch: anchor_loss(
        outputs,
        *(batch[name] for name in (*TARGETS, "mask", "size")),
        box_loss=model.box_loss,
    )


def make_point_loss(model: Any, *, alone: bool = False, **others: Any) -> Loss:
    """FCOS' loss (ops/dense_losses.py).

    Args:
      model: with the `radius` around the center of a box.
      alone: an image's loss does not depend on the others of its batch.
      **others: of other detectors' losses; config.loss has no weight of its terms.
    """
    del others
    return lambda outputs, batch: point_loss(
        outputs,
        *(batch[name] for name in (*TARGETS, "mask", "size")),
        radius=model.radius,
        alone=alone,
    )


PREDICTIONS: dict[str, Prediction] = {
    "softmax_set": Prediction(partial(make_set_loss, sigmoid=False), POSTPROCESS["softmax_set"]),
    "sigmoid_set": Prediction(partial(make_set_loss, sigmoid=True), POSTPROCESS["sigmoid_set"]),
    "proposals": Prediction(make_proposal_loss, POSTPROCESS["proposals"], targets=True),
    "anchors": Prediction(make_anchor_loss, POSTPROCESS["anchors"]),
    "points": Prediction(make_point_loss, POSTPROCESS["points"], counted="foreground"),
    "cells": Prediction(make_cell_loss, POSTPROCESS["cells"], counted="foreground"),
    "sides": Prediction(make_side_loss, POSTPROCESS["sides"]),
}


def make_objective(
    apply: Apply,
    assemble: Callable[[Mapping[str, jax.Array]], Any],
    *,
    loss: Loss,
    targets: bool = False,
    counted: str = "",
) -> Objective:
    """The loss of a detector; outputs are the model's.

    Args:
      apply: the model; its inputs are images f32[B, H, W, 3], `pixel_mask` and perhaps targets.
      assemble: from {path: array} of all parameters to the model's tree.
      loss: of the outputs.
      targets: whether the model takes them (see Prediction).
      counted: what the loss is divided by (see Prediction).
    """

    def prepare(trainable, frozen, model_state, batch: Batch, key):
        del trainable, frozen, model_state, key
        images = to_float(batch["image"])
        mask = pixel_mask(batch["size"], images.shape[1:3])[..., None]
        return {**batch, "image": images, "pixel_mask": mask}

    def forward(trainable, frozen, model_state, view, key, *, train):
        return apply(
            assemble({**trainable, **frozen}),
            model_state,
            view["image"],
            view["pixel_mask"][..., 0],
            *([{name: view[name] for name in TARGETS}] if targets else []),
            train=train,
            keys=forward_keys(key) if train else {},
        )

    def criterion(trainable, outputs, view):
        del trainable
        return loss(outputs, view)

    return Objective(prepare, forward, criterion, counted)


def make_outputs(
    apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any], *, postprocess: Postprocess
):
    """What evaluation needs of a batch: scored boxes in pixels of the original images.

    {"score": f32[B, N], "label": i32[B, N], "boxes_xyxy_px": f32[B, N, 4], "mask", "index"}.
    """

    def outputs_fn(trainable, frozen, model_state, batch: Batch):
        outputs, _ = apply(
            assemble({**trainable, **frozen}),
            model_state,
            to_float(batch["image"]),
            pixel_mask(batch["size"], batch["image"].shape[1:3]),
            train=False,
            keys={},
        )
        return make_read(postprocess)(outputs, batch)

    return outputs_fn


def make_read(postprocess: Postprocess) -> Callable[..., dict[str, jax.Array]]:
    """(outputs, batch) -> what `make_outputs` gives."""

    def read(outputs: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        found = postprocess(outputs, batch["original_size"])
        return {**found, **{name: batch[name] for name in ("mask", "index")}}

    return read
