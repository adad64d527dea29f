"""Image classification: cross-entropy over one label an image.

Batches are {"image": uint8[B, H, W, 3], "label": i32[B], "mask": bool[B], "index": i32[B]}.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.objective import Apply, Batch, Objective, forward_keys
from vision_jax.ops import augment, losses
from vision_jax.ops.images import to_float
from vision_jax.ops.segmentation_losses import check_weights
from vision_jax.ops.traced import is_on


def make_objective(
    apply: Apply,
    assemble: Callable[[Mapping[str, jax.Array]], Any],
    *,
    num_classes: int,
    label_smoothing: float = 0.0,
    policy: str = "none",
    policy_ops: int = 2,
    policy_magnitude: int = 9,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    erasing: float = 0.0,
    class_weights: Sequence[float] = (),
) -> Objective:
    """Cross-entropy of augmented images. The view has "target" f32[B, C], and outputs "logits".

    Args:
      apply: the model.
      assemble: from {path: array} of all parameters to the model's tree.
      num_classes: C.
      label_smoothing: share of the target spread evenly over all classes.
      policy: "none", "rand" (RandAugment) or "trivial" (TrivialAugment), on the device.
      policy_ops: operations an image, for "rand".
      policy_magnitude: 0 to 30, for "rand".
      mixup: its alpha; 0 turns it off.
      cutmix: its alpha; 0 turns it off. With both on, each batch draws one of them.
      erasing: probability of random erasing.
      class_weights: of the classes in the loss, C; () for equal ones.

    Raises:
      UserError: another number of weights than classes.
    """
    check_weights(tuple(class_weights), num_classes)

    def prepare(trainable, frozen, model_state, batch: Batch, key):
        del trainable, frozen, model_state
        policy_key, erase_key, mix_key = jax.random.split(key, 3)
        images = to_float(batch["image"])
        targets = losses.one_hot_targets(batch["label"], num_classes, label_smoothing)
        if policy == "rand":
            images = augment.rand_augment(
                policy_key, images, num_ops=policy_ops, magnitude=policy_magnitude
            )
        elif policy == "trivial":
            images = augment.trivial_augment(policy_key, images)
        if is_on(erasing):
            images = augment.random_erasing(erase_key, images, probability=erasing)
        images, targets = augment.mixup_or_cutmix(
            mix_key, images, targets, mixup_alpha=mixup, cutmix_alpha=cutmix
        )
        return {**batch, "image": images, "target": targets}

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
        weights = jnp.asarray(class_weights, jnp.float32) if class_weights else None
        return losses.cross_entropy(outputs["logits"], view["target"], weights), {}

    return Objective(prepare, forward, criterion)


def make_logits(apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any]):
    """The bare classifier: (trainable, frozen, model_state, images f32[B, H, W, C]) -> f[B, C].

    In evaluation mode: BatchNorm uses its running statistics, and nothing is random.
    """

    def logits_fn(trainable, frozen, model_state, images: jax.Array):
        outputs, _ = apply(
            assemble({**trainable, **frozen}), model_state, images, train=False, keys={}
        )
        return outputs["logits"]

    return logits_fn


def make_outputs(apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any]):
    """What evaluation needs of a batch: logits, and the labels, mask and indices beside them."""
    logits_fn = make_logits(apply, assemble)

    def outputs_fn(trainable, frozen, model_state, batch: Batch):
        logits = logits_fn(trainable, frozen, model_state, to_float(batch["image"]))
        return {"logits": logits, **{name: batch[name] for name in ("label", "mask", "index")}}

    return outputs_fn
