"""Latents of a source's images and embeddings of its captions, computed once, read in training.

    FOLDER/KEY/part-00000 ...    teacher caches (teacher_cache.py) of PART examples each

KEY is the sha256 of all that the records depend on: of latents the autoencoder's weights, the
preprocessing and the images' fingerprint, of captions the tower's weights and the texts. Record n
is of caption n, or of image n // views; with two views the second one is of the image mirrored left
to right. A part is written whole or not at all, so what a kill leaves is gone on with, and a part
that is missing or damaged is computed again, the same to the bit.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.pipeline import Damaged, Loaded, load_sound, make_eval_batches
from vision_jax.data.sources import Source
from vision_jax.data.teacher_cache import TeacherCache, open_teacher_cache, write_teacher_cache
from vision_jax.data.transforms import Preprocessing, flip_image
from vision_jax.errors import UserError
from vision_jax.files import lock_file

PART = 512  # images or captions of a file
BATCH = 8  # images encoded at once, in every part, so that each is the same when it is made again
SOUND = "sound"  # of a record: whether the image could be read
EMBEDDING = "embedding"  # of a record of a caption
STORED = {"images": "latents", "captions": "embeddings"}

# encode(u8[B, H, W, C]) -> {"mean": f32[B, h, w, Z], perhaps "logvar": f32[B, h, w, Z]}
Encode = Callable[[np.ndarray], Mapping[str, np.ndarray]]
# Of so many batches: a context whose value begins with what is to be called after each.
Progress = Callable[[int], AbstractContextManager[tuple[Callable[[], None], Any]]]


@dataclass(frozen=True)
class Latents:
    """Stored latents of the images of a source. Picklable, and may be read from several threads.

    Attributes:
      parts: the files, in the order of the images.
      views: 2 with mirrored images, 1 without.
      numbers: i64[R], the image of each row that the source's reader reads, -1 for none.
    """

    parts: tuple[TeacherCache, ...]
    views: int
    numbers: np.ndarray

    def read(self, row: int, flipped: bool = False) -> dict[str, np.ndarray]:
        """{"mean", perhaps "logvar": f32[h, w, Z]} of what is a row to the reader.

        Raises:
          DamagedImageError: the image could not be read when it was to be encoded.
        """
        record = int(self.numbers[row]) * self.views + int(flipped)
        part, place = divmod(record, PART * self.views)
        found = {name: array[0] for name, array in self.parts[part].read([place]).items()}
        if not found.pop(SOUND):
            raise DamagedImageError("can't be read, as was found when its latents were made")
        return found


@dataclass(frozen=True)
class Embeddings:
    """Stored embeddings of captions. Picklable, and may be read from several threads.

    Attributes:
      parts: the files, a record for each caption.
      numbers: i64[R], the record of each row that the source's reader reads.
      nothing: f32[E], of no caption.
    """

    parts: tuple[TeacherCache, ...]
    numbers: np.ndarray
    nothing: np.ndarray

    def read(self, row: int) -> np.ndarray:
        """f32[2, E]: of what is a row to the reader, and of no caption."""
        part, place = divmod(int(self.numbers[row]), PART)
        return np.stack([self.parts[part].read([place])[EMBEDDING][0], self.nothing])


@dataclass(frozen=True)
class StoredSource(Source):
    """A source with arrays that were computed of its examples before training.

    Attributes:
      latents: "mean" and perhaps "logvar" f32[h, w, Z] instead of "image", where there are any.
      embeddings: "caption" f32[2, E], where there are any.
    """

    latents: Latents | None = None
    embeddings: Embeddings | None = None

    def open(self, i: int, *, flipped: bool = False) -> dict[str, Any]:
        """Example i; of latents, of the image or of its mirror image."""
        row = int(self.rows[i])
        own = {"label": self.labels[i], "index": np.int32(i)}
        example = super().open(i) if self.latents is None else self.latents.read(row, flipped) | own
        if self.embeddings is not None:
            example["caption"] = self.embeddings.read(row)
        return example


# Examples -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadForTraining:
    """(row, rng) -> an example and the damaged ones met, mirrored as often as images are."""

    source: StoredSource
    flip: bool

    def __call__(self, row: int, rng: np.random.Generator) -> Loaded:
        def load(row: int) -> dict[str, Any]:
            flipped = self.flip and rng.random() < 0.5
            return self.source.open(row, flipped=flipped) | {"mask": np.bool_(True)}

        damaged: list[Damaged] = []
        return load_sound(self.source, row, load, rng, damaged), damaged


@dataclass(frozen=True)
class LoadForEvaluation:
    """row -> an example; a padding row (row -1) or a damaged one is of zeros, masked out.

    Attributes:
      source: that is read.
      blank: the arrays of an example, of zeros.
    """

    source: StoredSource
    blank: Mapping[str, Any]

    def __call__(self, row: int) -> tuple[dict[str, Any], Damaged | None]:
        blank = {**self.blank, "index": np.int32(row), "mask": np.bool_(False)}
        if row < 0:
            return blank, None
        try:
            return self.source.open(row) | {"mask": np.bool_(True)}, None
        except DamagedImageError as error:
            damaged = Damaged(row, self.source.example_name(row), str(error))
            return blank | {"label": self.source.labels[row]}, damaged


# The cache ----------------------------------------------------------------------------------------


def store_latents(
    folder: Path,
    source: Source,
    *,
    preprocessing: Preprocessing,
    encode: Encode,
    shapes: Mapping[str, tuple[int, ...]],
    flips: bool,
    identity: Mapping[str, Any],
    most_bytes: float,
    num_threads: int,
    say: Callable[[str], None],
    show_progress: Progress,
) -> Latents:
    """The latents of a source's images: those that are stored, and the others computed and stored.

    Args:
      folder: of the caches of all sources.
      source: of the images.
      preprocessing: of the images.
      encode: a compiled function; it is asked for batches of BATCH images alone.
      shapes: of what `encode` gives of an image, float32 all of it.
      flips: whether mirrored images are encoded, too.
      identity: all that the latents depend on, for JSON.
      most_bytes: that the folder may hold.
      num_threads: that read images.
      say: shows a line.
      show_progress: of so many batches (see logging.show_progress).

    Raises:
      UserError: more than the folder may hold, or it cannot be written.
    """
    views = 1 + flips
    record = sum(4 * int(np.prod(shape)) for shape in shapes.values())

    def compute(missing: Sequence[int]) -> Iterator[Iterator[dict[str, np.ndarray]]]:
        parts = [_part(source, number) for number in missing]
        with show_progress(sum(-(-len(part) // BATCH) for part in parts)) as shown:
            for part in parts:
                batches = make_eval_batches(
                    part, batch_size=BATCH, preprocessing=preprocessing, num_threads=num_threads
                )
                yield _encoded(batches, encode, views, shown[0])

    parts = _store(
        folder, identity, len(source), compute, views * record, most_bytes, say, "images"
    )
    numbers = np.full(int(source.rows.max(initial=-1)) + 1, -1, np.int64)
    numbers[source.rows] = np.arange(len(source))
    return Latents(parts, views, numbers)


def store_embeddings(
    folder: Path,
    captions: Sequence[str],
    *,
    nothing: str,
    embed: Callable[[Sequence[str]], np.ndarray],
    width: int,
    identity: Mapping[str, Any],
    most_bytes: float,
    say: Callable[[str], None],
) -> Embeddings:
    """The embeddings of captions: stored ones, or computed and stored.

    Args:
      folder: as of `store_latents`.
      captions: of the rows that a source's reader reads.
      nothing: what stands for no caption.
      embed: (texts) -> f32[N, E].
      width: E.
      identity: what they depend on beside the texts.
      most_bytes: that the folder may hold.
      say: shows a line.

    Raises:
      UserError: see `store_latents`.
    """
    texts = [*dict.fromkeys([*captions, nothing])]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    def compute(missing: Sequence[int]) -> Iterator[Iterator[dict[str, np.ndarray]]]:
        for start in (PART * number for number in missing):
            yield iter([{EMBEDDING: embed(texts[start : start + PART])}])

    identity = {**identity, "captions": digest}
    parts = _store(folder, identity, len(texts), compute, 4 * width, most_bytes, say, "captions")
    number_of = {text: number for number, text in enumerate(texts)}
    part, place = divmod(number_of[nothing], PART)
    numbers = np.array([number_of[caption] for caption in captions], np.int64)
    return Embeddings(parts, numbers, parts[part].read([place])[EMBEDDING][0])


def _store(
    folder: Path,
    identity: Mapping[str, Any],
    count: int,
    compute: Callable[[Sequence[int]], Iterator[Iterator[dict[str, np.ndarray]]]],
    each: int,
    most_bytes: float,
    say: Callable[[str], None],
    what: str,
) -> tuple[TeacherCache, ...]:
    """The parts of what is stored of `count` examples; those that are missing are computed.

    Args:
      folder: of all caches.
      identity: all that the records depend on.
      count: of the examples.
      compute: (numbers of parts) -> of each part, its records in batches.
      each: bytes of an example's records.
      most_bytes: that the folder may hold.
      say: shows a line.
      what: the examples are, a key of STORED.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    place = folder / key[:32]
    paths = [place / f"part-{number:05d}" for number in range(-(-count // PART))]

    def open_others(
        opened: Sequence[TeacherCache | None], say: Callable[[str], None]
    ) -> list[TeacherCache | None]:
        return [
            part or _open(path, identity, number, say)
            for number, (path, part) in enumerate(zip(paths, opened, strict=True))
        ]

    # Parts are written whole, so nobody waits for another to read what is there.
    opened = open_others([None] * len(paths), lambda line: None)
    if not all(opened):
        with _held(place, say):
            opened = open_others(opened, say)
            missing = [number for number, part in enumerate(opened) if part is None]
            if missing:
                new = sum(min(PART, count - PART * number) for number in missing)
                _check_room(folder, new * each, most_bytes, what)
                say(f"encoding {new} {what} into {place}")
                for number, batches in zip(missing, compute(missing), strict=True):
                    write_teacher_cache(paths[number], batches, {**identity, "part": number})
                opened = open_others(opened, say)
                size = _gb(sum(path.stat().st_size for path in paths))
                say(f"wrote {place}: the {STORED[what]} of {count} {what}, {size}")
    parts = tuple(part for part in opened if part is not None)
    if len(parts) < len(paths):
        raise UserError(f"{place}: what was just written there is damaged: is the disk whole?")
    return parts


def with_stored(
    source: Source, latents: Latents | None, embeddings: Embeddings | None
) -> StoredSource:
    """The source whose examples have these arrays."""
    fields = ("name", "class_names", "labels", "rows", "reader", "note")
    own = {name: getattr(source, name) for name in fields}
    return StoredSource(**own, latents=latents, embeddings=embeddings)


@contextmanager
def _held(place: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the folder of a cache, so that two runs don't encode the same images at once."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = (place / "lock").open("wb")
    except OSError as error:
        raise UserError(
            f"config.latents.cache: {place} can't be written ({error.strerror}): name another"
        ) from error
    with file:
        if lock_file(file) is False:
            say(f"waiting for another run that encodes these images into {place}")
            lock_file(file, wait=True)
        yield


def _open(
    path: Path, identity: Mapping[str, Any], number: int, say: Callable[[str], None]
) -> TeacherCache | None:
    """A part that is there and whole, read once from end to end; None if it must be made."""
    if not path.is_file():
        return None
    try:
        part = open_teacher_cache(path, {**identity, "part": number})
        for start in range(0, part.count, PART):
            part.read(np.arange(start, min(start + PART, part.count)))
        return part
    except UserError as error:
        say(f"warning: what it holds is encoded again: {error}")
        return None


def _check_room(folder: Path, needed: float, most: float, what: str) -> None:
    held = sum(path.stat().st_size for path in folder.glob("*/part-*"))
    if held + needed > most:
        raise UserError(
            f"config.latents.max_gb {most / 1e9:g}: {folder} holds {_gb(held)} of latents "
            f"and these {what} need {_gb(needed)} more: remove folders of older data from "
            "there, or raise it"
        )


def _gb(octets: float) -> str:
    return f"{octets / 1e9:.3g} GB"


def _part(source: Source, number: int) -> Source:
    rows = slice(PART * number, PART * (number + 1))
    return replace(source, labels=source.labels[rows], rows=source.rows[rows])


def _encoded(
    batches: Iterator[Mapping[str, np.ndarray]],
    encode: Encode,
    views: int,
    advance: Callable[[], None],
) -> Iterator[dict[str, np.ndarray]]:
    """The records of batches of images: one of each view, image by image."""
    for batch in batches:
        images = batch["image"]
        seen = [images, np.stack([flip_image(image) for image in images])][:views]
        found = [encode(view) for view in seen]
        kept = batch["index"] >= 0  # without the rows that fill up the last batch
        records = {name: np.stack([one[name] for one in found], 1)[kept] for name in found[0]}
        whole = {name: x.reshape(-1, *x.shape[2:]) for name, x in records.items()}
        yield {**whole, SOUND: np.repeat(batch["mask"][kept], views)}
        advance()
