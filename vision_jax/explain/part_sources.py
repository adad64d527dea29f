"""What a detector or a segmenter is explained on: image files, or data sets with their truth."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from vision_jax.config import default_config
from vision_jax.data.detection import DetectionSource, detection_subset, images_alone
from vision_jax.data.detection_pipeline import make_detection_eval_batches
from vision_jax.data.detection_transforms import bounded_size
from vision_jax.data.masks import IGNORED
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.segmentation import images_to_segment, segmentation_subset
from vision_jax.data.segmentation_pipeline import make_segmentation_eval_batches
from vision_jax.data.segmentation_transforms import resize_mask
from vision_jax.data.segments import SEMANTIC
from vision_jax.errors import UserError
from vision_jax.explain.classes import Subject
from vision_jax.explain.parts import Parts
from vision_jax.models import families
from vision_jax.ops.boxes import cxcywh_to_xyxy, pairwise_iou_xyxy
from vision_jax.tasks.api import find_task

AT_ONCE = 16  # images at most,
PIXELS = 2**18  # and pixels, but one image
THREADS = 2
SAME = 0.5  # overlap from which on a part is what it is compared with

Batch = dict[str, np.ndarray]


def detects(model: Any) -> bool:
    """Whether a model finds boxes, else regions."""
    return families.FAMILIES[families.family_of(model)].task == "detection"


# Sources ----------------------------------------------------------------------------------------


def source_of(subject: Subject, names: Sequence[str]) -> Any:
    """Image files without a truth."""
    make = images_alone if detects(subject.model) else images_to_segment
    return make(names, subject.class_names)


def read_source(subject: Subject, data: str) -> Any:
    """A data set as config.data.eval takes it, of the subject's classes."""
    task = families.FAMILIES[families.family_of(subject.model)].task
    config = default_config(task)
    config.data.eval = data
    return find_task(task).read_eval_source(config, subject.class_names)


def part_of_source(source: Any, count: int, seed: int) -> Any:
    """At most so many images of a data set.

    Raises:
      UserError: a segmenter's data whose targets are no classes of pixels.
    """
    if getattr(source, "targets", SEMANTIC) != SEMANTIC:
        raise UserError(
            f"--dataset: maps are measured by classes of pixels, and {source.name} has "
            f"{source.targets} targets: explain some of its images with --images"
        )
    subset = detection_subset if isinstance(source, DetectionSource) else segmentation_subset
    return subset(source, min(count, len(source)), seed)


# Batches and truth ------------------------------------------------------------------------------


def _at_once(size: tuple[int, int], count: int) -> int:
    return min(count, AT_ONCE, max(PIXELS // (size[0] * size[1]), 1))


def detection_batches(preprocessing: Any, source: Any, damage: DamageLog) -> Iterator[Batch]:
    largest = max(preprocessing.buckets, key=lambda bucket: bucket[0] * bucket[1])
    return make_detection_eval_batches(
        source,
        batch_size=_at_once(largest, len(source)),
        preprocessing=preprocessing,
        max_boxes=int(np.diff(source.label.offsets).max(initial=1)),
        num_threads=THREADS,
        damage_log=damage,
    )


def segmentation_batches(preprocessing: Any, source: Any, damage: DamageLog) -> Iterator[Batch]:
    """With the "size" of what is valid; what is seen in windows elsewhere is squashed into one."""
    if preprocessing.view == "windows":
        preprocessing = replace(preprocessing, view="squash")
    for batch in make_segmentation_eval_batches(
        source,
        batch_size=_at_once(preprocessing.image_size, len(source)),
        preprocessing=preprocessing,
        num_threads=THREADS,
        damage_log=damage,
    ):
        size = batch["image"].shape[1:3]
        if preprocessing.view == "pad":
            size = bounded_size(batch["label"].shape[1:3], *size)
        yield {**batch, "size": np.tile(np.array([size], np.int32), (len(batch["mask"]), 1))}


def match_boxes(
    parts: Any, inside: Any, batch: Batch, source: Any
) -> tuple[Parts, np.ndarray, np.ndarray]:
    """(the true boxes of parts that are right, which these are: bool[B, N], which don't count).

    Each true box is that of one part at most, the surest first, as in COCO's evaluation. As there,
    a part that is not right and of which SAME or more lies in a crowd of its class doesn't count.
    """
    del inside
    true = cxcywh_to_xyxy(jnp.asarray(batch["boxes_cxcywh_01"]))
    overlap = np.asarray(pairwise_iou_xyxy(parts.xyxy_01, true))  # [B, N, T]
    same = np.asarray(parts.label)[:, :, None] == batch["label"][:, None]
    overlap = np.where(same & batch["target_mask"][:, None], overlap, 0)
    boxes, right = np.array(parts.xyxy_01), np.zeros(overlap.shape[:2], bool)
    for image, number in np.argwhere(np.asarray(parts.score) > 0):  # by falling score
        best = overlap[image, number].argmax()
        if overlap[image, number, best] >= SAME:
            right[image, number] = True
            boxes[image, number] = true[image, best]
            overlap[image, :, best] = 0
    ignored = np.zeros_like(right)
    for image in np.flatnonzero(batch["mask"]):
        row, (height, width) = int(batch["index"][image]), batch["original_size"][image]
        own = np.asarray(parts.xyxy_01)[image] * np.array([width, height] * 2)
        ignored[image] = _in_crowds(own, np.asarray(parts.label)[image], source, row)
    return parts._replace(xyxy_01=jnp.asarray(boxes)), right, ignored & ~right


def _in_crowds(
    boxes_xyxy_px: np.ndarray, labels: np.ndarray, source: DetectionSource, row: int
) -> np.ndarray:
    """bool[N]: whether of a box f[N, 4] of an image SAME or more lies in a crowd of its class."""
    crowds = source.boxes_xyxy_px[row][source.crowd[row]]
    low = np.maximum(boxes_xyxy_px[:, None, :2], crowds[None, :, :2])
    high = np.minimum(boxes_xyxy_px[:, None, 2:], crowds[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)  # [N, crowds]
    area = (boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2]).prod(-1)[:, None]
    same = labels[:, None] == source.label[row][source.crowd[row]]
    return (same & (area > 0) & (shared >= SAME * area)).any(1)


def match_regions(
    parts: Any, inside: Any, batch: Batch, source: Any
) -> tuple[Parts, np.ndarray, np.ndarray]:
    """(the true regions of the classes of parts that are right, which these are: bool[B, N],
    which don't count: what lies in ignored pixels, which are left out of the others).
    """
    del source
    found = np.array(inside)
    labels, right = np.asarray(parts.label), np.zeros(found.shape[:2], bool)
    ignored = np.zeros_like(right)
    for image, number in np.argwhere(np.asarray(parts.score) > 0):
        height, width = batch["size"][image]
        true = np.zeros(found.shape[2:], bool)
        seen = resize_mask(batch["label"][image], (int(height), int(width)))
        true[:height, :width] = seen == labels[image, number]
        own = found[image, number].copy()
        own[:height, :width] &= seen != IGNORED
        ignored[image, number] = not own.any()
        if own.any() and (own & true).sum() >= SAME * (own | true).sum():
            right[image, number] = True
            found[image, number] = true
    return parts._replace(inside=jnp.asarray(found)), right, ignored
