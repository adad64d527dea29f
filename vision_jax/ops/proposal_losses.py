"""Losses of detectors that propose boxes first: Faster R-CNN's, of anchors and of proposals.

    BCE of whether an anchor finds a target, CE of a proposal's class, smooth L1 of both's deltas

Ren et al. 2015 (https://arxiv.org/abs/1506.01497, equation 1) as torchvision 0.29 computes it: each
of the four is divided by the number of samples of the batch, box terms too. What is sampled is the
model's to say (models/faster_rcnn.py).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vision_jax.ops.losses import smooth_l1

Array = jax.Array
BETA = 1 / 9  # of smooth L1


def proposal_loss(
    outputs: Mapping[str, Array], mask: Array, *, alone: bool = False
) -> tuple[Array, dict[str, Array]]:
    """The sum of the four losses of each image.

    The mean of the losses is torchvision's loss: sums are divided by the samples of all images.

    Args:
      outputs: "rpn_logits" f[B, A], "rpn_deltas" f[B, A, 4], "rpn_sample" i32[B, A] and
        "rpn_target_deltas" f[B, A, 4]; "box_logits" f[B, S, K + 1], "box_deltas" f[B, S, 4],
        "box_sample" i32[B, S] and "box_target_deltas" f[B, S, 4], as the model gives them. A sample
        of -1 counts nothing.
      mask: bool[B], the images that count.
      alone: sums are divided by the samples of their own image.

    Returns:
      The losses f[B], 0 of a padded example, and metrics: `loss_objectness`, `loss_rpn_box`,
      `loss_class` and `loss_box`; `anchors` and `boxes` of targets that were sampled, an image.
    """
    logits, sample = outputs["rpn_logits"], outputs["rpn_sample"]
    bce = jax.nn.softplus(logits) - logits * (sample > 0).astype(logits.dtype)
    # The class that is sampled; a softmax without it would do for -1 too.
    classes = jnp.maximum(outputs["box_sample"], 0)[..., None]
    likely = jax.nn.log_softmax(outputs["box_logits"])
    ce = -jnp.take_along_axis(likely, classes, axis=-1)[..., 0]
    losses = {}
    for name, scored, part, sample in (
        ("objectness", bce, "rpn", outputs["rpn_sample"]),
        ("class", ce, "box", outputs["box_sample"]),
    ):
        counted = (sample >= 0) & mask[:, None]
        number = counted.sum(1)  # [B]
        total = number if alone else number.sum() / len(mask)
        total = jnp.where(total > 0, total, 1).astype(scored.dtype)
        off = smooth_l1(outputs[f"{part}_deltas"] - outputs[f"{part}_target_deltas"], BETA).sum(-1)
        boxed = counted & (sample > 0)
        regression = "rpn_box" if part == "rpn" else "box"
        losses[f"loss_{name}"] = jnp.where(counted, scored, 0).sum(1) / total
        losses[f"loss_{regression}"] = jnp.where(boxed, off, 0).sum(1) / total
    found = {
        name: ((outputs[part] > 0) & mask[:, None]).sum() / jnp.maximum(mask.sum(), 1)
        for name, part in (("anchors", "rpn_sample"), ("boxes", "box_sample"))
    }
    metrics = {name: values.mean() for name, values in losses.items()} | found
    return sum(losses.values(), jnp.zeros(len(mask), logits.dtype)), metrics
