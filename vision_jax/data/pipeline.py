"""From a source to batches of numpy arrays, with grain.

A batch is {"image": uint8[B, h, w, 3], "label": int32[B], "index": int32[B], "mask": bool[B]};
`index` is the row in the source. Training order is a pure function of (seed, step): thread, worker
and process counts don't change which examples a global batch holds, nor their augmentation. So the
number of batches taken is all that a run must remember of its data.

A damaged image is replaced by another one, drawn at random, so that no other example moves. It is
reported beside the batch and counted on this side of the workers, so counts are exact.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grain
import numpy as np
from absl import flags

from vision_jax.data.decode import DamagedImageError, Picture
from vision_jax.data.order import OwnRows, shuffled
from vision_jax.data.sources import Source
from vision_jax.data.transforms import (
    Preprocessing,
    eval_transform,
    random_crop_padded,
    random_flip,
    random_resized_crop,
    to_channels,
)
from vision_jax.errors import UserError, printable

CROPS = ("random_resized", "pad", "none")
EXAMPLES_AT_ONCE = 8  # in evaluation
MAX_DRAWS = 20  # images tried for one place in a batch; all damaged means that nearly all are


@dataclass(frozen=True)
class Damaged:
    """An image that couldn't be used, and why."""

    index: int
    name: str
    reason: str


class DamageLog:
    """The distinct damaged images of one source that were met, and how much was seen. Thread-safe.

    `names` are in the order met, `lines` the same with the reason, `count` is their number, `seen`
    the number of elements that came by, damaged or not, over all epochs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._damaged: dict[int, Damaged] = {}  # by row
        self._seen = 0

    @property
    def names(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(one.name for one in self._damaged.values())

    @property
    def lines(self) -> tuple[str, ...]:
        """Of each image, its name and why it couldn't be used."""
        return tuple(self.by_row.values())

    @property
    def by_row(self) -> dict[int, str]:
        """`lines`, by the image's row."""
        with self._lock:
            found = dict(self._damaged)
        return {
            row: one.reason
            if one.name in one.reason or printable(one.name) in one.reason
            else f"{one.name}: {one.reason}"
            for row, one in found.items()
        }

    @property
    def count(self) -> int:
        return len(self._damaged)

    @property
    def seen(self) -> int:
        return self._seen

    def record(self, seen: int, damaged: Sequence[Damaged]) -> None:
        """Note `seen` sound examples and the damaged ones met on the way."""
        with self._lock:
            self._seen += seen + len(damaged)
            for one in damaged:
                self._damaged.setdefault(one.index, one)

    def update(self, other: "DamageLog") -> None:
        """Note what another log of the same source has."""
        self.record(other.seen - other.count, [*other._damaged.values()])


# A training example, None where too many were damaged, and the damaged ones met on the way.
Loaded = tuple[dict[str, Any] | None, list[Damaged]]
Stack = Callable[[Sequence[dict[str, Any]]], dict[str, np.ndarray]]
T = TypeVar("T")


class Examples(Protocol):
    """What is asked of a source here."""

    def __len__(self) -> int: ...
    def example_name(self, row: int, /) -> str: ...


@dataclass(frozen=True)
class _LoadForTraining:
    """(row, rng) → one augmented example and the damaged ones met. A class, so that it pickles."""

    source: Source
    preprocessing: Preprocessing
    crop: str
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool

    def __call__(self, row: int, rng: np.random.Generator) -> Loaded:
        def load(row: int) -> dict[str, Any]:
            example = self.source.open(row)
            image = self._augment(example["image"], rng)
            return example | {"image": image, "mask": np.bool_(True)}

        damaged: list[Damaged] = []
        return load_sound(self.source, row, load, rng, damaged), damaged

    def _augment(self, picture: Picture, rng: np.random.Generator) -> np.ndarray:
        size = self.preprocessing.image_size
        if self.crop == "random_resized":
            picture = to_channels(picture, len(self.preprocessing.mean))
            interpolation = self.preprocessing.interpolation
            image = random_resized_crop(
                picture, rng, size, self.crop_scale, self.crop_ratio, interpolation
            )
        else:
            image = eval_transform(picture, self.preprocessing)
            if self.crop == "pad":
                image = random_crop_padded(image, rng, padding=min(size) // 8)
        return random_flip(image, rng) if self.flip else image


def load_sound(
    source: Examples,
    row: int,
    load: Callable[[int], T],
    rng: np.random.Generator,
    damaged: list[Damaged],
    rows: Sequence[int] | np.ndarray | None = None,
) -> T | None:
    """`load(row)`, another row's where it can't be read, drawn of `rows` or of all.

    Damaged ones are appended to `damaged`; None once these are too many.
    """
    while len(damaged) < MAX_DRAWS:
        try:
            return load(row)
        except DamagedImageError as error:
            damaged.append(Damaged(row, source.example_name(row), str(error)))
            row = int(rng.integers(len(source)) if rows is None else rng.choice(rows))
    return None


def stack(examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Each array of the examples along a new first axis."""
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def collate(
    loaded: Sequence[Loaded], *, stack: Stack = stack
) -> tuple[dict[str, np.ndarray] | None, list[Damaged]]:
    """A batch (None if an example couldn't be replaced) and the damaged images met."""
    examples = [example for example, _ in loaded if example is not None]
    damaged = [one for _, some in loaded for one in some]
    return (stack(examples) if len(examples) == len(loaded) else None), damaged


@dataclass(frozen=True)
class CountDamaged:
    """Note the damaged images and hand on the batch; raises UserError at one too many.

    The limit is a share of the whole data set, so the first of many is no alarm. Each process
    judges the images that it met itself.
    """

    log: DamageLog
    size: int
    max_damaged: float

    def __call__(
        self, collated: tuple[dict[str, np.ndarray] | None, list[Damaged]]
    ) -> dict[str, np.ndarray]:
        batch, damaged = collated
        self.log.record(0 if batch is None else len(batch["label"]), damaged)
        too_many = bool(damaged) and self.log.count > self.max_damaged * self.size
        if batch is None or too_many:
            raise UserError(
                f"{self.log.count} of {self.size} images were found damaged, over the share of"
                f" {self.max_damaged:g} that config.data.max_damaged allows: mend or remove them,"
                f" or allow more; the last: {damaged[-1].reason}"
            )
        return batch


def make_train_iterator(
    source: Source,
    *,
    batch_size: int,
    preprocessing: Preprocessing,
    crop: str,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool,
    seed: int,
    num_threads: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    first_batch: int = 0,
    max_damaged: float,
    balance: float = 0.0,
    damage_log: DamageLog | None = None,
) -> grain.DatasetIterator:
    """Endless shuffled batches of `batch_size` rows (this process's share of the global batch).

    Args:
      crop: "random_resized" (torchvision's, with `crop_scale` and `crop_ratio`), "pad" (the
        evaluation view shifted by up to 1/8 of its size) or "none" (the evaluation view).
      seed: 0 ≤ seed < 2³²; the same seed gives bit-identical batches.
      num_threads: images are read and decoded by this many threads (in each worker).
      num_workers: 0, or the number of processes to spawn: 5–10 s to the first batch, for data
        whose decoding holds Python's lock.
      process_index: this process reads the `batch_size` neighbours of each global batch that are
        its own: process 0 the first ones.
      process_count: of processes.
      first_batch: where to begin; the batches before it are neither read nor drawn. A run that has
        made n steps goes on at n, with any number of threads, workers and processes.
      max_damaged: the share of the data set, in [0, 1], that may be damaged: such images are
        skipped; with more of them the iterator raises UserError.
      balance: 0 for each image once an epoch; see order.BalancedOrder.
      damage_log: filled with what was skipped, if the caller wants to report it.

    Returns grain's iterator.
    """
    if crop not in CROPS:
        raise UserError(f"data crop {crop!r}: use one of {', '.join(CROPS)}")
    load = _LoadForTraining(source, preprocessing, crop, crop_scale, crop_ratio, flip)
    return stream(
        source,
        load,
        batch_size=batch_size,
        seed=seed,
        num_threads=num_threads,
        num_workers=num_workers,
        process_index=process_index,
        process_count=process_count,
        first_batch=first_batch,
        max_damaged=max_damaged,
        balance=balance,
        damage_log=damage_log,
    )


def stream(
    source: Source,
    load: Callable[[int, np.random.Generator], Loaded],
    *,
    batch_size: int,
    seed: int,
    num_threads: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    first_batch: int = 0,
    max_damaged: float,
    balance: float = 0.0,
    damage_log: DamageLog | None = None,
) -> grain.DatasetIterator:
    """`make_train_iterator` of examples that somebody else loads; `load` must pickle."""
    # Each epoch in another order; drawn for all, so that no draw depends on process_count.
    examples = shuffled(source, seed, balance).random_map(load)
    own = OwnRows(examples, batch_size, process_index, process_count)
    batches = own.batch(batch_size, drop_remainder=True, batch_fn=collate)
    count = CountDamaged(damage_log or DamageLog(), len(source), max_damaged)
    return iterate(batches, count, num_threads, num_workers, first_batch)


def iterate(
    batches: grain.MapDataset,
    count_damaged: CountDamaged,
    num_threads: int,
    num_workers: int,
    first_batch: int,
) -> grain.DatasetIterator:
    """The batches from `first_batch` on, made ahead in threads, and in workers if there are any.

    Each comes with the damaged images met. Workers take turns, so their number changes no order.
    """
    # A thread makes a whole batch: handing over single examples cost more than small images.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 1)
    ahead = batches.slice(slice(first_batch, None)).to_iter_dataset(options)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read flags; a library has none to parse
            flags.FLAGS.mark_as_parsed()
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(ahead.map(count_damaged))


@dataclass(frozen=True)
class _LoadForEvaluation:
    """row → one example; a padding row (row -1) or a Damaged one keeps its place, masked out."""

    source: Source
    preprocessing: Preprocessing
    beside: Mapping[str, np.ndarray]

    def __call__(self, row: int) -> tuple[dict[str, Any], Damaged | None]:
        preprocessing = self.preprocessing
        blank = {
            "image": np.zeros((*preprocessing.image_size, len(preprocessing.mean)), np.uint8),
            "label": np.int32(0),
            "index": np.int32(row),
            "mask": np.bool_(False),
            **self.beside,
        }
        if row < 0:
            return blank, None
        try:
            example = self.source.open(row)
            image = eval_transform(example["image"], self.preprocessing)
        except DamagedImageError as error:
            damaged = Damaged(row, self.source.example_name(row), str(error))
            return blank | {"label": self.source.labels[row]}, damaged
        return example | {"image": image, "mask": np.bool_(True)}, None


def make_eval_batches(
    source: Source,
    *,
    batch_size: int,
    preprocessing: Preprocessing,
    num_threads: int,
    process_index: int = 0,
    process_count: int = 1,
    damage_log: DamageLog | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in the source's order, in batches of `batch_size` rows of this process.

    The last batch is filled up with rows whose mask is False and whose index is -1; so are whole
    batches on a process that has fewer examples, because every process yields the same number. A
    damaged image keeps its row, black, with mask False, and is named in `damage_log`. `beside` is
    what such rows have of arrays that only this source's examples have.
    """
    return evaluation_batches(
        source,
        _LoadForEvaluation(source, preprocessing, beside or {}),
        batch_size=batch_size,
        num_threads=num_threads,
        process_index=process_index,
        process_count=process_count,
        damage_log=damage_log,
    )


def evaluation_batches(
    source: Source,
    load: Callable[[int], tuple[dict[str, Any], Damaged | None]],
    *,
    batch_size: int,
    num_threads: int,
    process_index: int = 0,
    process_count: int = 1,
    damage_log: DamageLog | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """`make_eval_batches` of examples that somebody else loads; row -1 is a padding row."""
    log = damage_log or DamageLog()
    batch_count = -(-len(source) // (batch_size * process_count))
    rows = np.full(batch_count * batch_size * process_count, -1, np.int32)
    rows[: len(source)] = np.arange(len(source))
    # A thread hands over some examples at once: one by one costs more than small images, and a
    # whole batch would leave the other threads idle at the end.
    parts = (
        grain.MapDataset.source(rows[process_index::process_count])
        .map(load)
        .batch(EXAMPLES_AT_ONCE, batch_fn=list)
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=num_threads,
                prefetch_buffer_size=-(-2 * batch_size // EXAMPLES_AT_ONCE),
            )
        )
    )
    yield from batch_masked(itertools.chain.from_iterable(parts), batch_size, log)


def batch_masked(
    examples: Iterator[tuple[dict[str, Any], Damaged | None]],
    batch_size: int,
    log: DamageLog,
    *,
    stack: Stack = stack,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of examples in which a damaged one keeps its row, masked, and is noted in `log`."""
    while loaded := list(itertools.islice(examples, batch_size)):
        batch = stack([example for example, _ in loaded])
        log.record(int(batch["mask"].sum()), [one for _, one in loaded if one is not None])
        yield batch
