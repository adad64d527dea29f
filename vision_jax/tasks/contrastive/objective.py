"""Contrastive learning: two views of an image are told from those of all others of the batch.

SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709; see ops.contrastive). Batches are
{"image": uint8[B, H, W, C], "index": i32[B], "mask": bool[B]}; "label", if it is there, is not
looked at.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from vision_jax.objective import Apply, Objective, forward_keys
from vision_jax.ops import multi_crop
from vision_jax.ops.contrastive import nt_xent_losses, unit
from vision_jax.ops.images import to_float
from vision_jax.ops.multi_crop import Crop
from vision_jax.tasks.collapse import Watch, Watching, spread


def make_objective(
    apply: Apply,
    assemble: Callable[[Mapping[str, jax.Array]], Any],
    *,
    views: Crop,
    temperature: float,
    watch: Watch | None = None,
) -> Objective:
    """The loss f[B] of each image: of both of its views among all 2·B.

    The view has "image" f[2·B, S, S, C], an image's views one after the other, which follow from
    the step's key. Metrics: "agreement", the mean cosine of an image's projections, and
    "projection_spread", of those of all images.
    """

    def prepare(trainable, frozen, model_state, batch, key):
        del trainable, frozen, model_state
        made = multi_crop.make_views(key, to_float(batch["image"]), views)
        return {**batch, "image": multi_crop.in_turn(made)}

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
        projections = outputs["logits"].reshape(len(view["index"]), 2, -1)  # [B, 2, P]
        first, second = unit(projections).swapaxes(0, 1)
        metrics = {
            "agreement": (first * second).sum(-1).mean(),
            "projection_spread": spread(projections.swapaxes(0, 1)),
        }
        return nt_xent_losses(projections, temperature), metrics

    make_watch = partial(Watching, watch) if watch is not None else None
    return Objective(prepare, forward, criterion, make_watch=make_watch)
