"""Masked autoencoding: the error of the pixels that the encoder does not see.

MAE (He et al. 2022, https://arxiv.org/abs/2111.06377). Batches are {"image": uint8[B, H, W, C],
"index": i32[B], "mask": bool[B]}; "label", if it is there, is not looked at.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from vision_jax.models.layers import normalize
from vision_jax.objective import Apply, Batch, Objective, forward_keys
from vision_jax.ops import reconstruction
from vision_jax.ops.images import to_float

EVALUATION_SEED = 0  # of the patches that evaluation hides, the same in every run


@dataclass(frozen=True)
class Task:
    """What is hidden, and what is to be told of it.

    Attributes:
      patch_size: pixels a side.
      patches: N, of an image.
      mean, std: per channel, of the images in [0, 1], as the model has them.
      mask_ratio: share of the patches that is hidden.
      normalize: whether each patch's pixels are scaled by their own mean and standard deviation.
    """

    patch_size: int
    patches: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mask_ratio: float
    normalize: bool

    def targets(self, images: jax.Array) -> jax.Array:
        """f[B, N, P·P·C] of images f[B, H, W, C] in [0, 1]."""
        patches = reconstruction.patchify(normalize(images, self.mean, self.std), self.patch_size)
        return reconstruction.normalize_patches(patches) if self.normalize else patches

    def draw(self, key: jax.Array, count: int) -> jax.Array:
        """i32[B, n]: the visible patches of so many images."""
        noise = jax.random.uniform(key, (count, self.patches))
        return reconstruction.visible_patches(noise, self.mask_ratio)


def make_objective(
    apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any], task: Task
) -> Objective:
    """The loss. The view has "visible" i32[B, n] and "target" f[B, N, D], and outputs "logits".

    Which patches are visible follows from the step's key, and so from (seed, step).
    """

    def prepare(trainable, frozen, model_state, batch: Batch, key):
        del trainable, frozen, model_state
        images = to_float(batch["image"])
        visible = task.draw(key, len(images))
        return {**batch, "image": images, "visible": visible, "target": task.targets(images)}

    def forward(trainable, frozen, model_state, view, key, *, train):
        return apply(
            assemble({**trainable, **frozen}),
            model_state,
            view["image"],
            view["visible"],
            train=train,
            keys=forward_keys(key) if train else {},
        )

    def criterion(trainable, outputs, view):
        del trainable
        hidden = reconstruction.hidden_mask(view["visible"], task.patches)
        predicted = outputs["logits"]
        return reconstruction.reconstruction_losses(predicted, view["target"], hidden), {}

    return Objective(prepare, forward, criterion)


def make_outputs(
    apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any], task: Task
) -> Callable[..., dict[str, jax.Array]]:
    """What evaluation needs of a batch; an image's hidden patches follow from its index alone.

    "loss" f[B]; "spread" and "target_spread" f[B], of the hidden patches (see
    reconstruction.spread_of_patches); "predicted" f[B, N, D] and "hidden" f[B, N]; "token" f[B, D],
    of the whole image.
    """

    def visible_of(index: jax.Array) -> jax.Array:  # i32[n]
        key = jax.random.fold_in(jax.random.key(EVALUATION_SEED), index)
        return task.draw(key, 1)[0]

    def outputs_fn(trainable, frozen, model_state, batch: Batch):
        images = to_float(batch["image"])
        visible = jax.vmap(visible_of)(batch["index"])
        params = assemble({**trainable, **frozen})
        outputs, _ = apply(params, model_state, images, visible, train=False, keys={})
        hidden = reconstruction.hidden_mask(visible, task.patches)
        predicted, targets = outputs["logits"], task.targets(images)
        seen, _ = apply(params, model_state, images, None, train=False, keys={})
        return {
            "loss": reconstruction.reconstruction_losses(predicted, targets, hidden),
            "spread": reconstruction.spread_of_patches(predicted, hidden),
            "target_spread": reconstruction.spread_of_patches(targets, hidden),
            "predicted": predicted,
            "hidden": hidden,
            "token": seen["token"],
            **{name: batch[name] for name in ("label", "mask", "index")},
        }

    return outputs_fn
