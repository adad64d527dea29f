"""Images and texts: the sigmoid loss of all pairs of a batch.

SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343). Batches are
{"image": uint8[B, H, W, C], "tokens": i32[B, L], "index": i32[B], "mask": bool[B]}; "label", if it
is there, is not looked at.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vision_jax.objective import Apply, Batch, Objective, forward_keys
from vision_jax.ops import contrastive
from vision_jax.ops.images import to_float
from vision_jax.tasks.collapse import Watch, Watching, spread


def make_objective(
    apply: Apply,
    assemble: Callable[[Mapping[str, jax.Array]], Any],
    mesh: Mesh,
    watch: Watch | None = None,
) -> Objective:
    """The loss f[B] of each image with all texts of the batch, on all devices of the mesh.

    Metrics are "image_spread" and "text_spread" of the features (see collapse.spread),
    "pair_logit", the mean logit of an image and its own text, "logit_scale" and "logit_bias".
    """

    def prepare(trainable, frozen, model_state, batch: Batch, key):
        del trainable, frozen, model_state, key
        return {**batch, "image": to_float(batch["image"])}

    def forward(trainable, frozen, model_state, view, key, *, train):
        return apply(
            assemble({**trainable, **frozen}),
            model_state,
            view["image"],
            view["tokens"],
            train=train,
            keys=forward_keys(key) if train else {},
        )

    def criterion(trainable, outputs, view):
        del trainable, view
        image, text = outputs["image"], outputs["text"]
        scale, bias = jnp.exp(outputs["logit_scale"]), outputs["logit_bias"]
        losses = contrastive.sigmoid_losses(image, text, scale, bias, mesh)
        return losses, {
            "image_spread": spread(image[None]),
            "text_spread": spread(text[None]),
            "pair_logit": scale * (image * text).sum(1).mean() + bias,
            "logit_scale": scale,
            "logit_bias": bias,
        }

    make_watch = partial(Watching, watch) if watch is not None else None
    return Objective(prepare, forward, criterion, make_watch=make_watch)


def make_outputs(
    apply: Apply, assemble: Callable[[Mapping[str, jax.Array]], Any]
) -> Callable[..., dict[str, jax.Array]]:
    """What evaluation needs of a batch, of images or of tokens: "features" f[B, D] of length 1.

    Beside them "logit_scale" and "logit_bias" f[B], the same for all.
    """

    def outputs_fn(trainable, frozen, model_state, batch: Batch):
        params = assemble({**trainable, **frozen})
        images = to_float(batch["image"]) if "image" in batch else None
        outputs, _ = apply(params, model_state, images, batch.get("tokens"), train=False, keys={})
        count = batch["mask"].shape
        return {
            "features": outputs["text" if images is None else "image"],
            "logit_scale": jnp.broadcast_to(jnp.exp(outputs["logit_scale"]), count),
            "logit_bias": jnp.broadcast_to(outputs["logit_bias"], count),
            "mask": batch["mask"],
            "index": batch["index"],
        }

    return outputs_fn
