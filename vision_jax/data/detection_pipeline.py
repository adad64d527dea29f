"""From a DetectionSource to batches of numpy arrays of a few fixed shapes, with grain.

A training batch is {"image": uint8[B, H, W, C], padded with 0 at the bottom and right, "size":
i32[B, 2] valid (height, width), "boxes_cxcywh_01": f32[B, T, 4] relative to the valid size,
"label": i32[B, T], "target_mask": bool[B, T], "mask": bool[B], "index": i32[B]}; an evaluation
batch has "original_size": i32[B, 2] too. (H, W) is one of the preprocessing's buckets.

Images are grouped by the bucket that their own shape needs, and a batch comes from one group, so
that little is padded. In training each group is an endless stream of permutations of its images,
and the batches of an epoch are spread over the groups by their sizes. The group, rows, short side,
bucket and augmentation of batch k are a pure function of (seed, k): thread, worker and process
counts don't change them.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.detection import DetectionSource
from vision_jax.data.detection_transforms import (
    DetectionAugmentation,
    DetectionPreprocessing,
    choose_bucket,
    detection_eval_transform,
    detection_train_transform,
    resized_size,
    to_cxcywh_01,
)
from vision_jax.data.mosaic import Example, mixup, mosaic
from vision_jax.data.order import OwnRows
from vision_jax.data.pipeline import (
    CountDamaged,
    Damaged,
    DamageLog,
    Loaded,
    batch_masked,
    collate,
    iterate,
    load_sound,
)
from vision_jax.data.transforms import to_channels
from vision_jax.errors import UserError

EPOCHS_A_PERIOD = 16  # over so many epochs the batches are divided among the groups
ENDLESS = 2**40  # examples


def note_crowded(source: DetectionSource, max_boxes: int) -> DetectionSource:
    """The source, its `note` saying how many images have more boxes than a batch has room for."""
    image = np.repeat(np.arange(len(source)), np.diff(source.crowd.offsets))
    counts = np.bincount(image[~source.crowd.values], minlength=len(source))
    crowded = int((counts > max_boxes).sum())
    if not crowded:
        return source
    note = (
        f"{source.note or source.name + ':'}{';' * bool(source.note)} {crowded} images have more"
        f" than {max_boxes} boxes, up to {counts.max()}: the {max_boxes} largest are trained on"
    )
    return replace(source, note=note)


# --- training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Images that share canvases. `canvases` are those of each short side that may be drawn."""

    rows: np.ndarray  # i64[n], of the source
    canvases: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Place:
    """What is to come at one place of a batch."""

    row: int
    group: int
    short: int
    canvas: tuple[int, int]
    batch: int


def _group_images(
    source: DetectionSource,
    preprocessing: DetectionPreprocessing,
    shorts: Sequence[int],
    least: int,
) -> list[_Group]:
    """Groups of `least` images or more (as far as there are), in the order of the buckets.

    Images of a smaller group join the one whose bucket they shrink least for: a batch shouldn't
    hold one image many times.
    """
    buckets = preprocessing.buckets
    # Images of unknown size can't be read; it doesn't matter where their replacement comes from.
    sizes, of_image = np.unique(np.maximum(source.sizes, 1), axis=0, return_inverse=True)
    of_image = of_image.reshape(-1)
    shapes = [(int(height), int(width)) for height, width in sizes]
    resized = [resized_size(shape, preprocessing) for shape in shapes]
    bucket = np.array([choose_bucket(size, buckets) for size in resized])  # of each distinct size
    own = bucket.copy()
    images = np.bincount(of_image, minlength=len(shapes))  # of each distinct size
    while True:
        counts = np.bincount(bucket, weights=images, minlength=len(buckets))
        left = np.flatnonzero(counts)
        smallest = left[np.argmin(counts[left])]
        if len(left) == 1 or counts[smallest] >= least:
            break
        others = [int(other) for other in left if other != smallest]
        for i in np.flatnonzero(bucket == smallest):
            bucket[i] = others[choose_bucket(resized[i], [buckets[other] for other in others])]
    groups = []
    for kept in left:
        native = [shapes[i] for i in np.flatnonzero((own == kept) & (bucket == kept))]
        canvases = tuple(
            _smallest_canvas(native, preprocessing, int(kept), short) for short in shorts
        )
        groups.append(_Group(np.flatnonzero(bucket[of_image] == kept), canvases))
    return groups


def _smallest_canvas(
    shapes: Sequence[tuple[int, int]], preprocessing: DetectionPreprocessing, own: int, short: int
) -> tuple[int, int]:
    """The smallest bucket that holds images of these shapes at `short`; bucket `own` if none."""
    buckets = preprocessing.buckets
    sizes = [resized_size(shape, preprocessing, short) for shape in shapes]
    need = max(h for h, _ in sizes), max(w for _, w in sizes)
    best = buckets[choose_bucket(need, buckets)]
    return best if need[0] <= best[0] and need[1] <= best[1] else buckets[own]


@functools.lru_cache(maxsize=8)
def _period(counts: tuple[int, ...], seed: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """(group, how many of that group's came before in this period) of each batch of a period.

    Batches of a group are evenly spread over the period, up to a random shift of each.
    """
    rng = np.random.default_rng((seed, 0, period))
    times = np.concatenate([(np.arange(count) + rng.random(count)) / count for count in counts])
    order = np.argsort(times, kind="stable")
    group = np.repeat(np.arange(len(counts)), counts)
    before = np.concatenate([np.arange(count) for count in counts])
    return group[order], before[order]


@functools.lru_cache(maxsize=64)
def _permutation(count: int, seed: int, group: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 1, group, epoch)).permutation(count)


class _Schedule:
    """schedule[p] → _Place p % batch_size of the global batch p // batch_size. Picklable."""

    def __init__(self, groups: Sequence[_Group], shorts: Sequence[int], batch_size: int, seed: int):
        self._groups, self._shorts = groups, shorts
        self._batch_size, self._seed = batch_size, seed
        sizes = np.array([len(group.rows) for group in groups])
        total = max(EPOCHS_A_PERIOD * int(sizes.sum()) // batch_size, len(groups))
        exact = total * sizes / sizes.sum()
        counts = np.maximum(exact.astype(int), 1)
        for _ in range(total - int(counts.sum())):  # the largest remainders
            counts[np.argmax(exact - counts)] += 1
        self._counts = tuple(int(count) for count in counts)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, place: int) -> _Place:
        batch, at = divmod(int(place), self._batch_size)
        period, slot = divmod(batch, sum(self._counts))
        of_slot, before = _period(self._counts, self._seed, period)
        number = int(of_slot[slot])
        nth = period * self._counts[number] + int(before[slot])  # batch of this group
        rows = self._groups[number].rows
        epoch, rank = divmod(nth * self._batch_size + at, len(rows))
        row = rows[_permutation(len(rows), self._seed, number, epoch)[rank]]
        drawn = int(np.random.default_rng((self._seed, 2, batch)).integers(len(self._shorts)))
        canvas = self._groups[number].canvases[drawn]
        return _Place(int(row), number, self._shorts[drawn], canvas, batch)


@dataclass(frozen=True)
class _LoadForTraining:
    """(place, rng) → an augmented example and the damaged ones met. A class, so that it pickles."""

    source: DetectionSource
    preprocessing: DetectionPreprocessing
    augmentation: DetectionAugmentation
    groups: Sequence[_Group]
    max_boxes: int

    def __call__(self, place: _Place, rng: np.random.Generator) -> Loaded:
        damaged: list[Damaged] = []
        found = self._read(place.row, place, rng, damaged)
        augmentation = self.augmentation
        mosaics = augmentation.mosaic if place.batch < augmentation.plain_from else 0.0
        if found and mosaics and rng.random() < mosaics:
            found = self._mosaic(found, place, rng, damaged)
            augmentation = replace(augmentation, crop=0.0)
        if found is None:
            return None, damaged
        row, (image, boxes, label) = found
        image, boxes, kept = detection_train_transform(
            image,
            boxes,
            rng,
            preprocessing=self.preprocessing,
            augmentation=augmentation,
            short=place.short,
            canvas=place.canvas,
        )
        made = _make_example(image, boxes, label[kept], place.canvas, self.max_boxes)
        return made | {"mask": np.bool_(True), "index": np.int32(row)}, damaged

    def _read(
        self, row: int, place: _Place, rng: np.random.Generator, damaged: list[Damaged]
    ) -> tuple[int, Example] | None:
        """(row, example), another row's where it can't be read; None after too many of these."""

        def load(row: int) -> tuple[int, Example]:
            example = self.source[row]
            counted = ~example["crowd"]
            boxes = example["boxes_xyxy_px"][counted].astype(np.float64)
            return row, (example["image"], boxes, example["label"][counted])

        return load_sound(self.source, row, load, rng, damaged, self.groups[place.group].rows)

    def _mosaic(
        self,
        first: tuple[int, Example],
        place: _Place,
        rng: np.random.Generator,
        damaged: list[Damaged],
    ) -> tuple[int, Example] | None:
        """A mosaic of an example and three drawn ones, perhaps mixed with a fifth."""

        def draw() -> Example | None:
            found = self._read(int(rng.integers(len(self.source))), place, rng, damaged)
            if found is None:
                return None
            image, boxes, label = found[1]
            return to_channels(image, channels), boxes, label

        channels = len(self.preprocessing.mean)
        row, (image, boxes, label) = first
        four = [(to_channels(image, channels), boxes, label), draw(), draw(), draw()]
        whole = [example for example in four if example is not None]
        if len(whole) < len(four):
            return None
        made = mosaic(
            whole,
            rng,
            preprocessing=self.preprocessing,
            side=place.short,
            scale=self.augmentation.mosaic_scale,
        )
        if len(made[1]) and rng.random() < self.augmentation.mixup:
            other = draw()
            if other is None:
                return None
            made = mixup(made, other, rng, preprocessing=self.preprocessing)
        return row, made


def _make_example(
    image: np.ndarray,
    boxes: np.ndarray,
    label: np.ndarray,
    canvas: tuple[int, int],
    max_boxes: int,
) -> dict[str, Any]:
    """Targets of fixed shape; the image is not padded yet, its canvas goes with it."""
    if len(boxes) > max_boxes:
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        largest = np.sort(np.argsort(-area, kind="stable")[:max_boxes])
        boxes, label = boxes[largest], label[largest]
    count, size = len(boxes), (image.shape[0], image.shape[1])
    padded_boxes = np.zeros((max_boxes, 4), np.float32)
    padded_boxes[:count] = to_cxcywh_01(boxes, size)
    padded_label = np.zeros(max_boxes, np.int32)
    padded_label[:count] = label
    return {
        "image": image,
        "canvas": canvas,
        "size": np.array(size, np.int32),
        "boxes_cxcywh_01": padded_boxes,
        "label": padded_label,
        "target_mask": np.arange(max_boxes) < count,
    }


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Examples of one canvas, their images padded at the bottom and right."""
    channels = examples[0]["image"].shape[2]
    images = np.zeros((len(examples), *examples[0]["canvas"], channels), np.uint8)
    for padded, example in zip(images, examples, strict=True):
        height, width = example["size"]
        padded[:height, :width] = example["image"]
    others = [key for key in examples[0] if key not in ("image", "canvas")]
    return {"image": images} | {
        key: np.stack([example[key] for example in examples]) for key in others
    }


def make_detection_train_iterator(
    source: DetectionSource,
    *,
    batch_size: int,
    preprocessing: DetectionPreprocessing,
    augmentation: DetectionAugmentation,
    max_boxes: int,
    seed: int,
    num_threads: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    first_batch: int = 0,
    max_damaged: float,
    damage_log: DamageLog | None = None,
) -> grain.DatasetIterator:
    """Endless shuffled batches of `batch_size` rows (this process's share of the global batch).

    Args:
      max_boxes: T; of an image with more boxes the largest are kept. Crowds are left out.

    The other arguments are those of `vision_jax.data.pipeline.make_train_iterator`. All processes
    draw the same canvas.

    Returns:
      grain's iterator.
    """
    if max_boxes < 1:
        raise UserError(f"data max_boxes {max_boxes}: use 1 or more, say 100")
    if augmentation.mosaic and not preprocessing.on_squares:
        raise UserError(
            f"augmentation mosaic {augmentation.mosaic}: a mosaic is square, and this model's "
            "images are not: leave it at 0"
        )
    shorts = augmentation.shorts or (preprocessing.short,)
    for short in shorts:
        if preprocessing.on_squares and (short, short) not in preprocessing.buckets:
            raise UserError(
                f"augmentation shorts {short}: square images of {short} need the bucket"
                f" ({short}, {short}): add it to the buckets"
            )
    global_size = batch_size * process_count
    groups = _group_images(source, preprocessing, shorts, global_size)
    load = _LoadForTraining(source, preprocessing, augmentation, groups, max_boxes)
    examples = (
        grain.MapDataset.source(_Schedule(groups, shorts, global_size, seed))
        .seed(seed)
        .random_map(load)  # of all: its draws don't depend on process_count
    )
    own = OwnRows(examples, batch_size, process_index, process_count)
    batches = own.batch(
        batch_size, drop_remainder=True, batch_fn=functools.partial(collate, stack=_stack)
    )
    count = CountDamaged(damage_log or DamageLog(), len(source), max_damaged)
    return iterate(batches, count, num_threads, num_workers, first_batch)


# --- evaluation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LoadForEvaluation:
    """(row, bucket) → an example; a padding row (-1) or a Damaged one keeps its place, masked."""

    source: DetectionSource
    preprocessing: DetectionPreprocessing
    max_boxes: int

    def __call__(self, place: tuple[int, int]) -> tuple[dict[str, Any], Damaged | None]:
        row, canvas = place[0], self.preprocessing.buckets[place[1]]
        image = np.zeros((*canvas, len(self.preprocessing.mean)), np.uint8)
        boxes, label, damaged = np.zeros((0, 4)), np.zeros(0, np.int32), None
        original = canvas
        if row >= 0:
            try:
                example = self.source[row]
                counted = ~example["crowd"]
                label = example["label"][counted]
                found = example["boxes_xyxy_px"][counted].astype(np.float64)
                image, boxes = detection_eval_transform(
                    example["image"], found, self.preprocessing, canvas
                )
                original = example["image"].shape[:2]
            except DamagedImageError as error:
                damaged = Damaged(row, self.source.example_name(row), str(error))
                label = label[:0]
        made = _make_example(image, boxes, label, canvas, self.max_boxes)
        made["mask"] = np.bool_(row >= 0 and damaged is None)
        made["index"] = np.int32(row)
        return made | {"original_size": np.array(original, np.int32)}, damaged


def make_detection_eval_batches(
    source: DetectionSource,
    *,
    batch_size: int,
    preprocessing: DetectionPreprocessing,
    max_boxes: int,
    num_threads: int,
    process_index: int = 0,
    process_count: int = 1,
    damage_log: DamageLog | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, canvas by canvas, in batches of `batch_size` rows of this process.

    `index` tells which image a row is. The last batch of a canvas is filled up with black rows
    whose mask is False and whose index is -1; all processes yield the same canvases. A damaged
    image keeps its row, black, with mask False, and is named in `damage_log`.
    """
    log = damage_log or DamageLog()
    global_size = batch_size * process_count
    sizes, of_image = np.unique(np.maximum(source.sizes, 1), axis=0, return_inverse=True)
    shapes = [(int(height), int(width)) for height, width in sizes]
    bucket_of = [
        choose_bucket(resized_size(shape, preprocessing), preprocessing.buckets) for shape in shapes
    ]
    bucket = np.array(bucket_of)[of_image.reshape(-1)]
    places: list[tuple[int, int]] = []
    for number in np.unique(bucket):
        rows = [int(row) for row in np.flatnonzero(bucket == number)]
        rows += [-1] * (-len(rows) % global_size)
        places += [(row, int(number)) for row in rows]
    examples = iter(
        grain.MapDataset.source(places[process_index::process_count])
        .map(_LoadForEvaluation(source, preprocessing, max_boxes))
        .to_iter_dataset(
            grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * batch_size)
        )
    )
    yield from batch_masked(examples, batch_size, log, stack=_stack)
