"""From images with masks to batches of numpy arrays, with grain.

A training batch is

    image  u8[B, h, w, C]
    label  u8[B, h, w], class indices, 255 where nothing counts
    mask   bool[B], index i32[B], as in data/pipeline.py

and where targets are segments

    label  i32[B, T], class indices, -1 beyond the segments of an image
    masks  u8[B, T, h, w], 1 inside of each

The order, the crops and the damaged images that are replaced are functions of (seed, step) alone,
for any number of threads, workers and processes.

In evaluation images have many sizes, and each size is compiled once, so a batch is of one size:
"image" as the model sees it and "label" of the original size; where targets are segments it is 255
everywhere, and says the size alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from vision_jax.data.decode import DamagedImageError, read_size
from vision_jax.data.masks import IGNORED
from vision_jax.data.order import OwnRows
from vision_jax.data.pipeline import (
    CountDamaged,
    Damaged,
    DamageLog,
    Loaded,
    collate,
    iterate,
    load_sound,
    stack,
)
from vision_jax.data.segmentation import SegmentationSource
from vision_jax.data.segmentation_transforms import (
    SegmentationAugmentation,
    SegmentationPreprocessing,
    segmentation_eval_transform,
    segmentation_train_transform,
)
from vision_jax.data.segments import Segments
from vision_jax.data.sources import FileReader
from vision_jax.errors import UserError


@dataclass(frozen=True)
class _LoadForTraining:
    """(row, rng) → one augmented example and the damaged ones met. A class, so that it pickles."""

    source: SegmentationSource
    preprocessing: SegmentationPreprocessing
    augmentation: SegmentationAugmentation
    most: int

    def __call__(self, row: int, rng: np.random.Generator) -> Loaded:
        def load(row: int) -> dict[str, Any]:
            example = self.source[row]
            segments: Segments | None = example.get("segments")
            if segments is not None:
                segments = segments[~segments.crowd]
            image, drawn = segmentation_train_transform(
                example["image"],
                example["mask"] if segments is None else segments.pixels().view(np.uint8),
                rng,
                preprocessing=self.preprocessing,
                augmentation=self.augmentation,
            )
            label = {"label": drawn}
            if segments is not None:
                label = pad_segments(segments.label, drawn, self.most)
            mask = np.bool_(True)
            return {"image": image, **label, "mask": mask, "index": example["index"]}

        damaged: list[Damaged] = []
        return load_sound(self.source, row, load, rng, damaged), damaged


def pad_segments(label: np.ndarray, masks: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """{"label": i32[T], "masks": u8[T, h, w]} of segments that have a pixel; -1 and 0 beyond them.

    Args:
      label: u8[S].
      masks: u8[S, h, w], of these in a view.
      most: T.

    Raises:
      UserError: there are more.
    """
    seen = np.flatnonzero(masks.any((1, 2)))
    if len(seen) > most:
        raise UserError(
            f"an image has {len(seen)} segments: raise config.data.max_segments, {most}"
        )
    padded = np.full(most, -1, np.int32), np.zeros((most, *masks.shape[1:]), np.uint8)
    padded[0][: len(seen)], padded[1][: len(seen)] = label[seen], masks[seen]
    return {"label": padded[0], "masks": padded[1]}


def make_segmentation_train_iterator(
    source: SegmentationSource,
    *,
    batch_size: int,
    preprocessing: SegmentationPreprocessing,
    augmentation: SegmentationAugmentation,
    seed: int,
    num_threads: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    first_batch: int = 0,
    max_damaged: float,
    damage_log: DamageLog | None = None,
    most_segments: int = 0,
) -> grain.DatasetIterator:
    """Endless shuffled batches of `batch_size` rows (this process's share of the global batch).

    The arguments are those of `vision_jax.data.pipeline.make_train_iterator`; `most_segments` are T
    at the top, where targets are segments.
    """
    load = _LoadForTraining(source, preprocessing, augmentation, most_segments)
    examples = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()  # each epoch in another order
        .repeat()
        .random_map(load)  # of all: its draws don't depend on process_count
    )
    own = OwnRows(examples, batch_size, process_index, process_count)
    batches = own.batch(batch_size, drop_remainder=True, batch_fn=collate)
    count = CountDamaged(damage_log or DamageLog(), len(source), max_damaged)
    return iterate(batches, count, num_threads, num_workers, first_batch)


# --- evaluation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LoadForEvaluation:
    """row → an example, or the damaged one in its place."""

    source: SegmentationSource
    preprocessing: SegmentationPreprocessing

    def __call__(self, row: int) -> dict[str, Any] | Damaged:
        try:
            example = self.source[row]
            image = segmentation_eval_transform(example["image"], self.preprocessing)
        except DamagedImageError as error:
            return Damaged(row, self.source.example_name(row), str(error))
        return {
            "image": image,
            "label": _label_of(example),
            "mask": np.bool_(True),
            "index": np.int32(row),
        }


def _label_of(example: dict[str, Any]) -> np.ndarray:
    """u8[H, W]: the mask, or of segments 255."""
    if "mask" in example:
        return example["mask"]
    return np.full(example["segments"].size, IGNORED, np.uint8)


def make_segmentation_eval_batches(
    source: SegmentationSource,
    *,
    batch_size: int,
    preprocessing: SegmentationPreprocessing,
    num_threads: int,
    process_index: int = 0,
    process_count: int = 1,
    unit: int = 1,
    damage_log: DamageLog | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, size by size, in batches of at most `batch_size` rows of this process.

    Of a size that fewer images have, a batch has as many rows as there are images, rounded up to a
    multiple of `unit` over all processes. A batch is filled up with black rows whose mask is False,
    whose index is -1 and whose labels are 255. A damaged image is left out, and named in
    `damage_log`. Every process reads all images and yields its rows of each batch.

    Where sizes are not known without reading, images that follow each other share a batch.
    """
    log = damage_log or DamageLog()
    full = batch_size * process_count
    order, count = _by_size(source)
    examples = iter(
        grain.MapDataset.source(order)
        .map(_LoadForEvaluation(source, preprocessing))
        .to_iter_dataset(
            grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * batch_size)
        )
    )

    def filled(waiting: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        blank = {
            "image": np.zeros_like(waiting[0]["image"]),
            "label": np.full_like(waiting[0]["label"], IGNORED),
            "mask": np.bool_(False),
            "index": np.int32(-1),
        }
        rows = [*waiting, *[blank] * (limit - len(waiting))]
        return stack(rows[process_index::process_count])

    waiting: list[dict[str, Any]] = []
    limit = full
    for example, same in zip(examples, count, strict=True):
        if isinstance(example, Damaged):
            log.record(0, [example])
            continue
        log.record(1, [])
        shapes = {(one["image"].shape, one["label"].shape) for one in (*waiting[:1], example)}
        if waiting and (len(shapes) > 1 or len(waiting) == limit):
            yield filled(waiting)
            waiting = []
        if not waiting:
            limit = min(full, -(-int(same) // unit) * unit)
        waiting.append(example)
    if waiting:
        yield filled(waiting)


def _by_size(source: SegmentationSource) -> tuple[np.ndarray, np.ndarray]:
    """(rows, those of one size together; how many have the size of each), by files' headers."""
    rows = np.arange(len(source))
    if not isinstance(source.reader, FileReader):
        return rows, np.full(len(source), len(source))
    sizes = np.zeros((len(source), 2), np.int64)
    for i in rows:
        try:
            sizes[i] = read_size(source.example_name(int(i)))
        except DamagedImageError:
            continue  # it is left out and named when its turn comes
    _, group, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    return order, counts[group[order]]
