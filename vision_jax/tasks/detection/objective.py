"""Object detection: a set of boxes an image, matched to its targets inside the step.

Batches are as data/detection_pipeline.py makes them: images of one canvas, padded at the bottom and
at the right, with the size of what is valid; targets of fixed length with a mask.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.attacks.examples import keys_of
from vision_jax.errors import UserError
from vision_jax.objective import Apply, Batch, Objective, forward_keys
from vision_jax.ops import detection_losses
from vision_jax.ops.detection_outputs import sigmoid_detections, softmax_detections
from vision_jax.ops.images import to_float

# set_loss(outputs of the model, batch) -> (losses f[B], metrics)
SetLoss = Callable[[Mapping[str, jax.Array], Batch], tuple[jax.Array, dict[str, jax.Array]]]
# postprocess(logits f[B, Q, K or K + 1], boxes_cxcywh_01 f[B, Q, 4], size i32[B, 2])
# -> scored boxes
Postprocess = Callable[[jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]
# attack(loss of images, images f[B, H, W, C], keys[B], epsilon=, pixel_mask=) -> images
Attack = Callable[..., jax.Array]

# Of a batch, what the loss of a micro-batch counts over all of its update (steps.make_train_step).
WHOLE = ("target_mask", "mask")
# What a detector predicts (models.families.Family.predicts), and how boxes are read from it.
POSTPROCESS: dict[str, Postprocess] = {
    "softmax_set": softmax_detections,
    "sigmoid_set": sigmoid_detections,
}


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
    predicts: str,
    *,
    num_queries: int,
    max_boxes: int,
    no_object_weight: float,
    alone: bool = False,
    **weights: Any,
) -> SetLoss:
    """The set loss of what a detector predicts, of all its decoder layers at once.

    Args:
      predicts: of POSTPROCESS.
      num_queries: of the model, in evaluation.
      max_boxes: targets an image.
      no_object_weight: of a query without a box in the class term of a softmax; a sigmoid has none.
      alone: an image's loss does not depend on the others of its batch (detection_losses).
      **weights: class_cost, l1_cost, giou_cost, class_weight, l1_weight, giou_weight.

    Raises:
      UserError: more boxes than queries.
    """
    if max_boxes > num_queries:
        raise UserError(
            f"config.data.max_boxes {max_boxes}: the model has {num_queries} queries, and each "
            "finds one box at most: lower it"
        )

    def set_loss(outputs, batch):
        targets = (batch["label"], batch["boxes_cxcywh_01"], batch["target_mask"], batch["mask"])
        predicted = (outputs["logits"], outputs["boxes_cxcywh_01"])
        whole = tuple(batch["whole"][name] for name in WHOLE) if "whole" in batch else None
        if predicts == "softmax_set":
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


def make_objective(
    apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any], *, set_loss: SetLoss
) -> Objective:
    """The set loss; outputs are the model's.

    Args:
      apply: the model; its inputs are images f32[B, H, W, 3] and `pixel_mask`.
      assemble: from {path: array} of all parameters to the model's tree.
      set_loss: of all decoder layers at once; see ops/detection_losses.py.
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
            train=train,
            keys=forward_keys(key) if train else {},
        )

    def criterion(trainable, outputs, view):
        del trainable
        return set_loss(outputs, view)

    return Objective(prepare, forward, criterion)


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
        found = postprocess(
            outputs["logits"][-1], outputs["boxes_cxcywh_01"][-1], batch["original_size"]
        )
        return {**found, **{name: batch[name] for name in ("mask", "index")}}

    return outputs_fn


def make_adversarial_outputs(
    objective: Objective, *, postprocess: Postprocess, attack: Attack, seed: int
):
    """As `make_outputs`, of images that are changed to maximize the objective's losses.

    (trainable, frozen, (model_state, epsilon f32[], rows i32[N]), batch) -> what `make_outputs`
    gives, and "image" and "adversarial" f32[B, H, W, C]. An image's random draws come from the seed
    and rows[index], its place in the whole data, and from nothing of the batch.

    Args:
      objective: its losses of an image must not depend on other images: `alone`, of a set loss.
      postprocess: scored boxes of outputs.
      attack: (loss, images, keys, epsilon=, pixel_mask=) -> images.
      seed: of the draws.
    """

    def outputs_fn(trainable, frozen, state, batch: Batch):
        model_state, epsilon, rows = state
        key = jax.random.key(seed)
        view = objective.prepare(trainable, frozen, model_state, batch, key)

        def outputs_of_images(images):
            seen = {**view, "image": images}
            return objective.forward(trainable, frozen, model_state, seen, key, train=False)[0]

        def loss(images):
            losses, _ = objective.criterion(trainable, outputs_of_images(images), view)
            return losses, jnp.zeros(losses.shape, bool)

        keys = keys_of(key, rows[batch["index"]])
        adversarial = attack(
            loss, view["image"], keys, epsilon=epsilon, pixel_mask=view["pixel_mask"]
        )
        outputs = outputs_of_images(adversarial)
        found = postprocess(
            outputs["logits"][-1], outputs["boxes_cxcywh_01"][-1], batch["original_size"]
        )
        images = {"image": view["image"], "adversarial": adversarial}
        return {**found, **images, **{name: batch[name] for name in ("mask", "index")}}

    return outputs_fn
