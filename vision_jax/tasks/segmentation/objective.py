"""Semantic segmentation: classes of pixels, compared with a mask inside the step.

What a segmenter predicts (models.families.Family.predicts) decides how it is trained and how scores
of pixels are read from it: PREDICTIONS says both, and nothing else of the task asks what the model
is. Of a model it is asked that it takes images and gives a dict, at whatever stride.

Batches are as data/segmentation_pipeline.py makes them; labels are u8[B, H, W], 255 where nothing
counts.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.attacks.examples import keys_of
from vision_jax.data.detection_transforms import bounded_size
from vision_jax.data.segments import INSTANCE
from vision_jax.errors import UserError, nearest
from vision_jax.objective import Apply, Batch, Objective, forward_keys
from vision_jax.ops import mask_losses, mask_outputs
from vision_jax.ops import segmentation_losses as ops
from vision_jax.ops.images import to_float
from vision_jax.ops.resize import resize_bilinear

# loss(outputs of the model, batch) -> (losses f[B], metrics)
Loss = Callable[[Mapping[str, jax.Array], Batch], tuple[jax.Array, dict[str, jax.Array]]]
# scores(outputs of the model, (H, W)) -> f[B, H, W, K]; the largest is the class
Scores = Callable[[Mapping[str, jax.Array], Sequence[int]], jax.Array]
# attack(loss of images, images f[B, H, W, C], keys[B], epsilon=) -> images
Attack = Callable[..., jax.Array]

# Of a batch, what the loss of a micro-batch counts over all of its update (steps.make_train_step).
WHOLE = ("label",)
BALANCES = ("none", "frequency")
DRAWS = 1  # folded into the step's key


@dataclass(frozen=True)
class Prediction:
    """What the task must know of segmenters that predict the same.

    Attributes:
      make_loss: (model, alone=, **fields of config.loss) -> the loss. `alone`: an image's loss does
        not depend on the others of its batch. Raises UserError where the model can't be trained so.
      scores: of the outputs, at any size.
      draws: the loss draws something of each image, by the keys "draws" u32[B, 2] in its batch.
      batch_axis: of the outputs, the axis of images; those before it are of several predictions.
    """

    make_loss: Callable[..., Loss]
    scores: Scores
    draws: bool = False
    batch_axis: int = 0


def make_pixel_loss(
    model: Any,
    *,
    pixel_weight: float,
    dice_weight: float,
    focal_gamma: float,
    class_weights: tuple[float, ...],
    balance: str,
    auxiliary_weight: float,
    alone: bool = False,
    **others: Any,
) -> Loss:
    """Cross-entropy or focal loss, and Dice, of "logits", and of "auxiliary_logits" if there are.

    Args:
      model: with `num_classes`.
      pixel_weight: of the loss of pixels.
      dice_weight: of Dice.
      focal_gamma: of the loss of pixels; 0 is cross-entropy.
      class_weights: of the loss of pixels; () for equal ones.
      balance: "frequency" weighs classes by how rare they are in an update's labels.
      auxiliary_weight: of the loss of "auxiliary_logits", which a model gives in training.
      alone: an image's loss does not depend on the others of its batch. Weights by frequency are
        then by the image's.
      **others: of other segmenters' losses.

    Raises:
      UserError: weights that cannot be used.
    """
    del others
    if class_weights and balance != "none":
        raise UserError(
            "config.loss.class_weights and config.loss.balance are two ways to weigh classes: use"
            " one of them"
        )
    if not (pixel_weight or dice_weight):
        raise UserError("config.loss: pixel_weight and dice_weight are both 0: nothing to minimize")
    ops.check_weights(class_weights, model.num_classes)

    def weights_of(label):
        if class_weights:
            return jnp.asarray(class_weights)
        if balance == "none":
            return None
        return ops.frequency_weights(ops.class_counts(label, model.num_classes))

    def loss_of(logits, label, whole):
        logits = resize_bilinear(logits, label.shape[1:3])
        parts = {}
        if pixel_weight:
            losses = ops.pixel_losses(logits, label, gamma=focal_gamma)
            if alone and balance != "none":
                one = jax.vmap(
                    lambda x, y: ops.weighted_mean(x[None], y[None], weights_of(y[None]))
                )
                parts["pixel_loss"] = pixel_weight * one(losses, label)[:, 0]
            else:
                weights = weights_of(label if whole is None else whole)
                mean = ops.weighted_mean(losses, label, weights, whole, alone=alone)
                parts["pixel_loss"] = pixel_weight * mean
        if dice_weight:
            parts["dice_loss"] = dice_weight * ops.dice_losses(logits, label)
        return parts, logits

    def pixel_loss(outputs, batch):
        label = batch["label"]
        whole = batch["whole"]["label"] if "whole" in batch else None
        parts, logits = loss_of(outputs["logits"], label, whole)
        right = (jnp.argmax(logits, -1) == label).astype(logits.dtype)
        metrics = {name: part.mean() for name, part in parts.items()}
        metrics["pixel_accuracy"] = ops.weighted_mean(right, label, whole=whole).mean()
        total = sum(parts.values())
        if "auxiliary_logits" in outputs and auxiliary_weight:
            beside, _ = loss_of(outputs["auxiliary_logits"], label, whole)
            auxiliary = sum(beside.values())
            metrics["auxiliary_loss"] = auxiliary.mean()
            total += auxiliary_weight * auxiliary
        return total, metrics

    return pixel_loss


def make_mask_loss(
    model: Any,
    *,
    class_weight: float,
    mask_weight: float,
    mask_dice_weight: float,
    no_object_weight: float,
    points: int,
    most_segments: int = 0,
    alone: bool = False,
    **others: Any,
) -> Loss:
    """The set loss of masks (ops.mask_losses): of segments, or of each class of an image.

    Pixels of no class are in no mask.

    Args:
      model: with `num_classes` and `num_queries`.
      class_weight: of the queries' classes, in the matching too.
      mask_weight: of the cross-entropy of masks, in the matching too.
      mask_dice_weight: of Dice, in the matching too.
      no_object_weight: of queries without a mask in the class term.
      points: at which masks are compared.
      most_segments: that a batch has of an image; 0 for a mask of classes.
      alone: an image's loss does not depend on the others of its batch.
      **others: of other segmenters' losses.

    Raises:
      UserError: weights of which none counts, or more masks than queries.
    """
    del others
    targets = most_segments or model.num_classes
    if targets > model.num_queries:
        what = "config.data.max_segments" if most_segments else "the number of classes"
        advice = f"lower it to {model.num_queries}, or " if most_segments else ""
        raise UserError(
            f"{what} is {targets}, and the model has {model.num_queries} queries, each of which"
            f" finds one mask: {advice}give the model more, config.model.arguments"
            f"=(('num_queries', {targets}),)"
        )
    if not (class_weight or mask_weight or mask_dice_weight):
        raise UserError(
            "config.loss: class_weight, mask_weight and mask_dice_weight are all 0: nothing to"
            " minimize"
        )
    classes = jnp.arange(model.num_classes, dtype=jnp.int32)

    def masks_of(label):
        """bool[B, K, H, W]."""
        return label.astype(jnp.int32)[:, None] == classes.reshape(1, -1, 1, 1)

    def targets_of(label):
        """bool[B, T]: which targets there are, by labels i32[B, T] or u8[B, H, W]."""
        return label >= 0 if most_segments else masks_of(label).any((2, 3))

    def mask_loss(outputs, batch):
        if most_segments:
            label, masks = jnp.maximum(batch["label"], 0), batch["masks"]
        else:
            masks = masks_of(batch["label"])
            label = jnp.broadcast_to(classes, masks.shape[:2])
        keys = jax.random.wrap_key_data(batch["draws"])

        def drawn(prediction):
            own = jax.vmap(lambda key: jax.random.fold_in(key, prediction))(keys)
            return mask_losses.draw_points(own, targets, points)

        whole = batch["whole"]["label"] if "whole" in batch else None
        return mask_losses.mask_set_loss(
            outputs["logits"],
            outputs["mask_logits"],
            label,
            masks,
            targets_of(batch["label"]),
            points=drawn,
            class_weight=class_weight,
            mask_weight=mask_weight,
            dice_weight=mask_dice_weight,
            no_object_weight=no_object_weight,
            whole=None if whole is None else targets_of(whole),
            alone=alone,
        )

    return mask_loss


def mask_scores(outputs: Mapping[str, jax.Array], size: Sequence[int]) -> jax.Array:
    """f[B, H, W, K] of the last prediction: its masks at this size, by the queries' classes."""
    logits, masks = outputs["logits"][-1], outputs["mask_logits"][-1]
    masks = resize_bilinear(masks.transpose(0, 2, 3, 1), size)  # [B, H, W, Q]
    return mask_losses.class_scores(logits, masks.transpose(0, 3, 1, 2))


PREDICTIONS: dict[str, Prediction] = {
    "semantic": Prediction(
        make_pixel_loss, lambda outputs, size: resize_bilinear(outputs["logits"], size)
    ),
    "mask_set": Prediction(make_mask_loss, mask_scores, draws=True, batch_axis=1),
}


def find_prediction(predicts: str) -> Prediction:
    """Of a model's family.

    Raises:
      UserError: a model whose head is for something else.
    """
    if predicts not in PREDICTIONS:
        raise UserError(
            f"config.model.variant: the model predicts {predicts}, not classes of pixels"
            f"{nearest(predicts, list(PREDICTIONS))}: take a segmenter, such as unet_resnet50"
        )
    return PREDICTIONS[predicts]


def make_objective(
    apply: Apply,
    assemble: Callable[[Mapping[str, jax.Array]], Any],
    *,
    loss: Loss,
    draws: bool = False,
) -> Objective:
    """The loss of a segmenter; outputs are the model's.

    Args:
      apply: the model.
      assemble: from {path: array} of all parameters to the model's tree.
      loss: of the outputs.
      draws: it draws something of each image.
    """

    def prepare(trainable, frozen, model_state, batch: Batch, key):
        del trainable, frozen, model_state
        view = {**batch, "image": to_float(batch["image"])}
        if draws:
            keys = keys_of(jax.random.fold_in(key, DRAWS), batch["index"])
            view["draws"] = jax.random.key_data(keys)
        return view

    def forward(trainable, frozen, model_state, view, key, *, train):
        return apply(
            assemble({**trainable, **frozen}),
            model_state,
            view["image"],
            train=train,
            keys=forward_keys(key) if train else {},
        )

    def criterion(trainable, outputs, view):
        del trainable
        return loss(outputs, view)

    return Objective(prepare, forward, criterion)


@dataclass(frozen=True)
class Outputs(abc.ABC):
    """What evaluation needs of a batch, as a function of (trainable, frozen, model_state, batch).

    Attributes:
      apply: the model.
      assemble: from {path: array} of all parameters to the model's tree.
      padded: pixels a side of the square that images are padded to at the bottom or at the right;
        0 where they fill what the model sees.
      batch_axis: of the model's outputs (see `Prediction`).
    """

    apply: Apply
    assemble: Callable[[Mapping[str, jax.Array]], Any]
    padded: int = field(default=0, kw_only=True)
    batch_axis: int = field(default=0, kw_only=True)

    def __call__(self, trainable, frozen, model_state, batch: Batch) -> dict[str, jax.Array]:
        return self.read(self.of_model(trainable, frozen, model_state, batch), batch)

    def of_model(self, trainable, frozen, model_state, batch: Batch) -> Mapping[str, jax.Array]:
        """The model's outputs, at its own stride: the part that takes long to compile."""
        params = self.assemble({**trainable, **frozen})
        images = to_float(batch["image"])
        return self.apply(params, model_state, images, train=False, keys={})[0]

    def read_rows(
        self, outputs: Mapping[str, jax.Array], rows: jax.Array, batch: Batch
    ) -> dict[str, jax.Array]:
        """`read` of the images i32[n] of the outputs, which are all of this batch."""
        some = {
            name: jnp.take(x, rows, self.batch_axis, mode="clip") for name, x in outputs.items()
        }
        return self.read(some, batch)

    @abc.abstractmethod
    def read(self, outputs: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        """The rest: what the outputs say at the size that is wanted."""


@dataclass(frozen=True)
class SegmentOutputs(Outputs):
    """Instances or panoptic segments (ops/mask_outputs.py) at the size of "label" u8[B, H, W].

    With "mask" bool[B] and "index" i32[B] beside them, and "width" i32[B] in pixels.

    Attributes:
      canvas: (height, width) of the model's images.
      targets: of data.segments.TARGETS.
      score: below which a query is no panoptic segment.
      overlap: the share of its mask that a panoptic segment keeps at least.
    """

    canvas: tuple[int, int]
    targets: str
    score: float
    overlap: float

    def read(self, outputs: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        logits, masks = outputs["logits"][-1], outputs["mask_logits"][-1]
        height, width = batch["label"].shape[1:3]
        content = self.canvas
        if self.padded:
            content = bounded_size((height, width), self.padded, self.padded)
        view = mask_outputs.View(self.canvas, content, (height, width))
        if self.targets == INSTANCE:
            found = mask_outputs.instance_outputs(logits, masks, view)
        else:
            found = mask_outputs.panoptic_outputs(
                logits, masks, view, threshold=self.score, overlap_threshold=self.overlap
            )
        beside = {name: batch[name] for name in ("mask", "index")}
        return {**found, **beside, "width": jnp.full(len(batch["mask"]), width, jnp.int32)}


@dataclass(frozen=True)
class PixelOutputs(Outputs):
    """Classes of pixels.

    With "label" u8[B, H, W] in it: "prediction" u8[B, H, W], and "label", "mask" and "index".
    Without: "scores" f[B, h, w, K] of images that are windows of a larger one.

    Attributes:
      scores: of the outputs.
    """

    scores: Scores

    def read(self, outputs: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        scores = unpad_scores(self.scores, self.padded) if self.padded else self.scores
        return make_read(scores)(outputs, batch)


def unpad_scores(scores: Scores, side: int) -> Scores:
    """Of images that were padded to a square of `side`: what lies beyond them is cut off."""

    def unpadded(outputs: Mapping[str, jax.Array], size: Sequence[int]) -> jax.Array:
        height, width = bounded_size((size[0], size[1]), side, side)
        return resize_bilinear(scores(outputs, (side, side))[:, :height, :width], size)

    return unpadded


def make_read(scores: Scores) -> Callable[..., dict[str, jax.Array]]:
    """(outputs, batch) -> "prediction" and more, or "scores" (see `PixelOutputs`)."""

    def read(outputs: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        if "label" not in batch:
            return {"scores": scores(outputs, batch["image"].shape[1:3])}
        found = scores(outputs, batch["label"].shape[1:3])
        prediction = jnp.argmax(found, axis=-1).astype(jnp.uint8)
        kept = {name: batch[name] for name in ("label", "mask", "index")}
        return {"prediction": prediction, **kept}

    return read
