"""Object detection: a set of boxes an image, matched to its targets inside the step.

Batches are as data/detection_pipeline.py makes them: images of one canvas, padded at the bottom and
at the right, with the size of what is valid; targets of fixed length with a mask.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.attacks.examples import keys_of
from vision_jax.recipes.objective import Objective
from vision_jax.tasks.classification import Apply, Batch, forward_keys, to_float

# set_loss(outputs of the model, batch) -> (losses f[B], metrics)
SetLoss = Callable[[Mapping[str, jax.Array], Batch], tuple[jax.Array, dict[str, jax.Array]]]
# find(logits f[B, Q, K or K + 1], boxes_cxcywh_01 f[B, Q, 4], size i32[B, 2]) -> scored boxes
Find = Callable[[jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]
# attack(loss of images, images f[B, H, W, C], keys[B], epsilon=, pixels=) -> images
Attack = Callable[..., jax.Array]


def pixel_mask(size: jax.Array, canvas: Sequence[int]) -> jax.Array:
    """bool[B, H, W] of a canvas (H, W): where the images of `size` i32[B, 2] are.

    >>> pixel_mask(jnp.array([[1, 2]]), (2, 3)).astype(int).tolist()
    [[[1, 1, 0], [0, 0, 0]]]
    """
    rows, columns = (
        jnp.arange(side)[None, :] < size[:, axis, None] for axis, side in enumerate(canvas)
    )
    return rows[:, :, None] & columns[:, None, :]


def make_objective(
    apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any], *, set_loss: SetLoss
) -> Objective:
    """The set loss; outputs are the model's.

    Args:
      apply: the model; its inputs are images f32[B, H, W, 3] and `pixel_mask`.
      assemble: from {path: array} of all parameters to the model's tree.
      set_loss: of all decoder layers at once; see ops/detection_losses.py.
    """

    def look(trainable, frozen, model_state, batch: Batch, key):
        del trainable, frozen, model_state, key
        images = to_float(batch["image"])
        pixels = pixel_mask(batch["size"], images.shape[1:3])[..., None]
        return {**batch, "image": images, "pixels": pixels}

    def forward(trainable, frozen, model_state, view, key, *, train):
        return apply(
            assemble({**trainable, **frozen}),
            model_state,
            view["image"],
            view["pixels"][..., 0],
            train=train,
            keys=forward_keys(key) if train else {},
        )

    def criterion(trainable, outputs, view):
        del trainable
        return set_loss(outputs, view)

    return Objective(look, forward, criterion)


def make_outputs(apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any], *, find: Find):
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
        found = find(outputs["logits"][-1], outputs["boxes_cxcywh_01"][-1], batch["original_size"])
        return {**found, **{name: batch[name] for name in ("mask", "index")}}

    return outputs_fn


def make_attacked_outputs(objective: Objective, *, find: Find, attack: Attack, seed: int):
    """As `make_outputs`, of images that are changed to raise the objective's losses.

    (trainable, frozen, (model_state, epsilon f32[], rows i32[N]), batch) -> what `make_outputs`
    gives, and "image" and "attacked" f32[B, H, W, C]. An image's random draws come from the seed
    and rows[index], its place in the whole data, and from nothing of the batch.

    Args:
      objective: its losses of an image must not depend on other images: `alone`, of a set loss.
      find: scored boxes of outputs.
      attack: (loss, images, keys, epsilon=, pixels=) -> images.
      seed: of the draws.
    """

    def outputs_fn(trainable, frozen, state, batch: Batch):
        model_state, epsilon, rows = state
        key = jax.random.key(seed)
        view = objective.look(trainable, frozen, model_state, batch, key)

        def outputs_of_images(images):
            seen = {**view, "image": images}
            return objective.forward(trainable, frozen, model_state, seen, key, train=False)[0]

        def loss(images):
            losses, _ = objective.criterion(trainable, outputs_of_images(images), view)
            return losses, jnp.zeros(losses.shape, bool)

        keys = keys_of(key, rows[batch["index"]])
        attacked = attack(loss, view["image"], keys, epsilon=epsilon, pixels=view["pixels"])
        outputs = outputs_of_images(attacked)
        found = find(outputs["logits"][-1], outputs["boxes_cxcywh_01"][-1], batch["original_size"])
        images = {"image": view["image"], "attacked": attacked}
        return {**found, **images, **{name: batch[name] for name in ("mask", "index")}}

    return outputs_fn
