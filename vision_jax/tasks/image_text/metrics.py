"""Retrieval and zero-shot classification, and signs of a collapse in the metrics of training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vision_jax.errors import DivergedError
from vision_jax.ops.contrastive import constant_loss
from vision_jax.tasks.collapse import AGREE, RATE

DEPTHS = (1, 5)  # k of recall@k
CHUNK = 1024  # queries at once


def summarize(
    image: np.ndarray, text: np.ndarray, image_names: Sequence[str], captions: Sequence[str]
) -> dict[str, Any]:
    """The figures of held-out pairs, as plain numbers that JSON can hold.

    The same image in several pairs is one image, and the same caption one caption: an image's
    recall asks for any one of its captions, as it is done on COCO and Flickr30k.

    Args:
      image: f[N, D] of length 1.
      text: f[N, D] of length 1, of each image's caption.
      image_names: N.
      captions: N.

    Returns:
      image_to_text_1, image_to_text_5: share of the images of which one of the k nearest captions
        is right; text_to_image_1, text_to_image_5 likewise; recall: the mean of the two with k = 1;
      count: N.

    Raises:
      UserError: features that are not finite.
    """
    bad = int(np.sum(~(np.isfinite(image).all(1) & np.isfinite(text).all(1))))
    if bad:
        raise DivergedError(
            f"evaluation: the features are not finite for {bad} of {len(image)} pairs; the "
            "weights are damaged or training diverged"
        )
    (images, first_image), (texts, first_text) = (_number(x) for x in (image_names, captions))
    pairs = np.unique(np.stack([images, texts], 1), axis=0)
    image, text = image[first_image], text[first_text]
    found: dict[str, float] = {}
    for name, queries, keys, of in (
        ("image_to_text", image, text, pairs),
        ("text_to_image", text, image, pairs[:, ::-1]),
    ):
        ranks = best_ranks(queries, keys, of)
        found |= {f"{name}_{depth}": float((ranks < depth).mean()) for depth in DEPTHS}
    recall = (found["image_to_text_1"] + found["text_to_image_1"]) / 2
    return {**found, "recall": recall, "count": len(images)}


def _number(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(the number of each name, where each number is first)."""
    _, first, numbers = np.unique(np.array(names, object), return_index=True, return_inverse=True)
    return numbers, first


def best_ranks(queries: np.ndarray, keys: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """i[Q]: how many wrong keys are at least as near to a query as the nearest of its right ones.

    Where all keys are as near, the rank is the worst: constant features find nothing.

    Args:
      queries: f[Q, D].
      keys: f[K, D].
      pairs: i[P, 2], (query, right key); each query has one.

    Examples:
      >>> keys = np.eye(3)
      >>> best_ranks(np.float32([[0.9, 0.1, 0.2]]), keys, np.array([[0, 2]])).tolist()
      [1]
    """
    ranks = []
    for start in range(0, len(queries), CHUNK):
        similarity = queries[start : start + CHUNK] @ keys.T
        own = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + CHUNK)]
        right = np.zeros(similarity.shape, bool)
        right[own[:, 0] - start, own[:, 1]] = True
        best = np.where(right, similarity, -np.inf).max(1, keepdims=True)
        ranks.append((~right & (similarity >= best)).sum(1))
    return np.concatenate(ranks)


def class_features(prompts: np.ndarray, classes: int) -> np.ndarray:
    """f[C, D] of length 1: each class's mean over the templates of prompts f[C·T, D]."""
    mean = prompts.reshape(classes, -1, prompts.shape[-1]).mean(1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


# Collapse -----------------------------------------------------------------------------------------

CONSTANT = 0.995  # share of the loss of one logit for all pairs from which on nothing is learned


@dataclass(frozen=True)
class Watch:
    """What a collapse would be of, and when it is looked for.

    Attributes:
      pairs: images of a batch that meet each other, B.
      warn_after: updates before anything is said.
      warmup_steps: of the learning rate, in which nothing need be learned yet.
      stop: whether a collapse ends the run.
    """

    names: ClassVar[tuple[str, ...]] = ("loss", "image_spread", "text_spread", "logit_bias")
    section: ClassVar[str] = "text"

    pairs: int
    warn_after: int
    warmup_steps: int
    stop: bool

    def diagnose(self, means: Mapping[str, float], step: int) -> str:
        """What has collapsed, and why it may have, of metrics that are means; "" if nothing has.

        Examples:
          >>> watch = Watch(64, 100, 50, False)
          >>> healthy = {"loss": 3.0, "image_spread": 0.9, "text_spread": 0.9, "logit_bias": -10.0}
          >>> watch.diagnose(healthy, 400)
          ''
          >>> watch.diagnose({**healthy, "text_spread": 0.001}, 400)[:44]
          'collapse: the features of all texts agree (s'
          >>> watch.diagnose({**healthy, "loss": 5.2}, 400)[:35]
          'collapse: no pair is told from othe'
        """
        for kind in ("image", "text"):
            if (spread := means[f"{kind}_spread"]) < AGREE:
                alike = "the images are alike" if kind == "image" else "the captions are alike"
                return (
                    f"collapse: the features of all {kind}s agree (spread {spread:.4f}): {RATE}; "
                    f"or {alike}"
                )
        constant = constant_loss(self.pairs)
        warm = step >= self.warmup_steps + self.warn_after
        if warm and self.pairs > 1 and means["loss"] > CONSTANT * constant:
            cause = (
                "the captions are not of their images, all the same, or the rate is too high or "
                "too low: try a tenth of config.optim.lr"
            )
            if means["logit_bias"] > -1:
                cause = (
                    f"logit_bias is {means['logit_bias']:.1f}, where most pairs must be told no: "
                    "begin with -10, which config.model.reinitialize does by logit_(scale|bias)"
                )
            return (
                f"collapse: no pair is told from others (loss {means['loss']:.4f}, of one logit "
                f"for all {constant:.4f}): {cause}"
            )
        return ""
