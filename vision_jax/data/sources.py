"""Where labelled images come from: one `Source` for all of them, read by random access.

`read_source` is the one entry. A specification is one of

    embedded:fashion_mnist/train      4,000 images in the package; /test has 1,000
    cifar10:DIR/train                 DIR holds cifar10.npz, see scripts/fetch_cifar10.py; /test
    tfds:NAME/SPLIT[@DATA_DIR]        prepared as array_record; read without TensorFlow
    generated:RUN                     what `vision_jax generate RUN` made, by its manifest
    FOLDER                            one folder of images per class
    FILE.csv                          a header `path,label`, paths in the file's folder; separated
                                      by commas, semicolons, tabs or bars
    FILE.jsonl                        {"path": ..., "label": ...} a line, likewise
    FOLDER/NAME-{0000..0127}.tar      WebDataset shards: braces, *, one file, or their folder
    FOLDER/NAME-*.parquet[:LABEL]     Parquet with images in a column, likewise

`read_unlabelled` takes all of these without their labels, and any FOLDER of images.
"""

import codecs
import csv
import hashlib
import io
import os
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vision_jax.data import parquet
from vision_jax.data.decode import Picture, decode_array, decode_picture, read_image_file
from vision_jax.data.folders import Inside, list_files, list_folders, refuse_splits, splits_among
from vision_jax.data.shards import are_shards, find_shards, holds_shards
from vision_jax.data.tar_shards import list_tars
from vision_jax.errors import UserError, nearest
from vision_jax.files import (
    MAX_LIST_BYTES,
    decode_text,
    expand,
    parse_json,
    read_arrays,
    read_bytes,
    read_json,
)

MANIFEST = "manifest.json"  # of what a generator made
ASSETS = Path(__file__).parent / "assets"
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy"}
)
PATH_NAMES = ("path", "file_name", "filename", "filepath", "file_path", "image_path")
SPLIT_NAMES = ("split", "subset", "partition")
LABEL_NAMES = ("label", "class", "class_name", "category")
MAX_INTEGER_LABEL = 1_000_000  # a slip of the pen in one label must not make 10¹² classes


class Reader(Protocol):
    """What images are read from, by row. Picklable; threads share it."""

    def open(self, row: int) -> Picture:
        """The image. Raises DamagedImageError if it can't be read."""

    def read(self, row: int) -> np.ndarray:
        """The image as uint8[H, W, C]."""

    def encoded(self, row: int) -> bytes:
        """The image's file; of an array, what a file of it would hold."""

    def example_name(self, row: int) -> str:
        """What to call it in messages."""

    def relative_name(self, row: int) -> str:
        """Its name wherever the data set lies."""

    def stamp(self, row: int) -> int:
        """A number that shows most edits, read without the image: its size in bytes, mostly."""


@dataclass(frozen=True)
class Source:
    """Labelled images by random access: `source[i]`, 0 ≤ i < len(source). Picklable.

    `labels` int32[N] are known without reading an image. `rows` int64[N] are the positions of the
    examples in what `reader` reads, so that a part of a source is a source. `note` says what was
    ignored when the source was read, for the log ("" if nothing was).
    """

    name: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    rows: np.ndarray
    reader: Reader
    note: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"image": uint8[H, W, C], "label": int32, "index": int32 = i}.

        Raises DamagedImageError if the image can't be read.
        """
        example = self.open(i)
        return example | {"image": np.asarray(example["image"])}

    def open(self, i: int) -> dict[str, Any]:
        """`source[i]` with the image as transforms.py takes it fastest: a file's is Pillow's."""
        image = self.reader.open(int(self.rows[i]))
        return {"image": image, "label": self.labels[i], "index": np.int32(i)}

    def example_name(self, i: int) -> str:
        """What to call example i in messages: its path, or the data set and its position."""
        return self.reader.example_name(int(self.rows[i]))

    def blocks(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(i64[N], i64[B]): the block that each example is read with, and the bytes of each block.

        None where each example is read by itself.
        """
        if isinstance(self.reader, parquet.ParquetReader):
            return self.reader.blocks(self.rows), self.reader.sizes
        return None


def read_source(spec: str, *, class_names: tuple[str, ...] | None = None) -> Source:
    """Read the list of examples that `spec` (see the top of this file) names, but no image yet.

    With `class_names` (a training source's, or a checkpoint's) labels become positions in that
    tuple, matched by name. Raises UserError for what is missing, empty, unknown or out of range.
    """
    if not spec:
        raise UserError("no data: set config.data.train to a folder of class folders, for example")
    kind, _, rest = spec.partition(":")
    if kind == "embedded":
        return _read_npz(spec, ASSETS, rest, class_names)
    if kind == "cifar10":
        return _read_cifar10(spec, rest, class_names)
    if kind == "tfds":
        return _read_tfds(spec, class_names)
    if kind == "generated":
        return _read_generated(spec, expand(rest), class_names)
    if is_of_shards(spec):
        return _read_shards(spec, class_names)
    path = expand(spec)
    if path.is_dir():
        return _read_folder(path, class_names)
    if not path.is_file():
        raise UserError(
            f"{spec}: no such folder or file: give a folder of class folders, a .csv or .jsonl of"
            " paths and labels, .tar or .parquet shards, embedded:fashion_mnist/train,"
            " cifar10:DIR/train or tfds:NAME/SPLIT"
        )
    if path.suffix in _ENTRIES:
        return _read_list(path, class_names)
    raise UserError(f"{spec}: not a folder, .csv or .jsonl: list paths and labels in one of these")


def read_unlabelled(spec: str) -> Source:
    """`read_source` without labels: all are 0, and there are no class names.

    A folder's images may lie flat or at any depth, whatever their folders are called.

    Raises:
      UserError: what `read_source` refuses, or a folder without an image.
    """
    path = expand(spec) if spec else Path()
    if spec.startswith("tfds:"):
        return _read_unlabelled_tfds(spec)
    if are_shards(spec):
        return _read_shards(spec, None, labelled=False)
    if path.suffix in _ENTRIES and path.is_file():
        return _read_list(path, None, labelled=False)
    if not spec or not path.is_dir():
        source = read_source(spec)
        return replace(source, class_names=(), labels=np.zeros(len(source), np.int32))
    names, ignored = list_files(path, IMAGE_SUFFIXES, follow_links=True)
    if not names and holds_shards(path):
        return _read_shards(spec, None, labelled=False)
    if not names:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{path}: no image in it or below ({kinds})")
    note = f"{path}: {ignored} hidden files or files that are no images ignored"
    rows = np.arange(len(names))
    labels = np.zeros(len(names), np.int32)
    reader = FileReader(path, tuple(names))
    return Source(str(path), (), labels, rows, reader, note if ignored else "")


def read_pairs(
    path: Path, path_names: Sequence[str] = PATH_NAMES, text_name: str = "caption"
) -> "tuple[FileReader, list[str]]":
    """(reader of the images, their texts) of a .csv or .jsonl with a path and a text in each line.

    An image may have several lines. Paths are in the list's folder.

    Args:
      path: of the list.
      path_names: of the column of paths, any one of them.
      text_name: of the column of texts.

    Raises:
      UserError: a line without text or image, by file and line, or a list without lines.
    """
    inside = Inside(path.parent)
    paths: list[str] = []
    texts: list[str] = []
    for number, image_path, text in _ENTRIES[path.suffix](path, path_names, (text_name,)):
        place = f"{path}:{number}"
        paths.append(_check_path(place, inside, image_path))
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: {text_name} {text!r}: give the image a text, or no line")
        texts.append(text.strip())
    if not paths:
        raise UserError(f"{path}: no images are listed: add lines of path and {text_name}")
    return FileReader(path.parent, tuple(paths)), texts


def hold_out(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """(train, held out) of images without labels: the share, rounded, but 1 to all less 1.

    Both keep the order of the source. A function of the number of images and the seed.

    Raises:
      UserError: unless 0 < share < 1 and there are two images.
    """
    if not 0 < share < 1:
        raise UserError(f"holdout {share}: use a share between 0 and 1, say 0.1")
    if len(source) < 2:
        raise UserError(f"{source.name}: one image, so none can be held out: add images")
    count = min(max(round(share * len(source)), 1), len(source) - 1)
    held_out = np.zeros(len(source), bool)
    held_out[np.random.default_rng(seed).choice(len(source), count, replace=False)] = True
    return _part(source, ~held_out), _part(source, held_out)


def examine_source(spec: str) -> tuple[Source, list[UserError]]:
    """(`read_source` without what it would refuse, what it would refuse), for the doctor.

    Goes on after empty class folders and bad lines of lists; raises UserError for the rest.
    """
    problems: list[UserError] = []
    path = expand(spec)
    if is_of_shards(spec):
        return _read_shards(spec, None), problems
    if path.is_dir():
        return _read_folder(path, None, problems), problems
    if path.is_file() and path.suffix in _ENTRIES:
        return _read_list(path, None, problems), problems
    return read_source(spec), problems


def split_source(source: Source, holdout: float, seed: int) -> tuple[Source, Source]:
    """(train, held out): of each class the share `holdout`, rounded, but 1 to all less 1.

    For users who have one folder only. Both keep the order of the source. A function of the labels
    and the seed. Raises UserError unless 0 < holdout < 1 and each class has two images.
    """
    if not 0 < holdout < 1:
        raise UserError(f"holdout {holdout}: use a share between 0 and 1, say 0.1")
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(source), bool)
    for label in np.unique(source.labels):
        members = np.flatnonzero(source.labels == label)
        if len(members) < 2:
            raise UserError(
                f"{source.name}: class {source.class_names[label]!r} has one image, so none can be"
                " held out: add images, or give a separate evaluation set"
            )
        count = min(max(round(holdout * len(members)), 1), len(members) - 1)
        held_out[rng.choice(members, count, replace=False)] = True
    return _part(source, ~held_out), _part(source, held_out)


def subset(source: Source, count: int, seed: int) -> Source:
    """`count` random examples in the source's order, the classes in equal parts as far as possible.

    For few-shot runs and quick trials. Subsets of one seed are nested: a larger one holds a smaller
    one. Raises UserError if the source has fewer examples.
    """
    if not 0 < count <= len(source):
        raise UserError(f"{source.name}: a subset of {count}: use 1 to {len(source)}")
    return _part(source, balanced_subset(source.labels, count, seed))


def take_classes(source: Source, names: Sequence[str]) -> Source:
    """The source's examples of these classes alone, whose labels count them in this order.

    Raises:
      UserError: a class that the source has not, or one twice, or no example of any.
    """
    for name in names:
        if name not in source.class_names:
            raise UserError(
                f"{source.name} has no class {name!r}{nearest(name, source.class_names)}"
            )
        if names.count(name) > 1:
            raise UserError(f"{source.name}: class {name!r} is named twice: name it once")
    labels = [source.class_names.index(name) for name in names]
    kept = _part(source, np.isin(source.labels, labels))
    if not len(kept):
        raise UserError(f"{source.name} has no image of {', '.join(names)}: name other classes")
    new = np.full(len(source.class_names), -1, source.labels.dtype)
    new[labels] = np.arange(len(labels))
    return replace(kept, class_names=tuple(names), labels=new[kept.labels])


def leave_out(source: Source, path: str) -> Source:
    """The source without the images that a file names, as `vision_jax doctor --exclude` writes it.

    It is JSON: a list of names relative to the data set, or an object whose keys they are.

    Raises:
      UserError: another file, names that the source has not, or all that it has.
    """
    names = read_json(expand(path), MAX_LIST_BYTES)
    if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: not a list of names: write it with `doctor --exclude={path}`")
    excluded = set(names)
    own = [source.reader.relative_name(row) for row in source.rows.tolist()]
    unknown = sorted(excluded - set(own))
    if unknown:
        raise UserError(
            f"{path}: {len(unknown):,} of its {len(excluded):,} names are not in {source.name},"
            f" {unknown[0]!r} for one: write it again with `doctor --exclude={path}`"
        )
    if len(excluded) == len(set(own)):
        raise UserError(f"{path}: names all images of {source.name}, so none is left: correct it")
    kept = _part(source, np.array([name not in excluded for name in own]))
    note = f"{path}: {len(source) - len(kept):,} images left out"
    return replace(kept, note=f"{kept.note}; {note}" if kept.note else note)


def balanced_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """bool[N]: `count` random places, the labels in equal parts as far as possible, nested."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank_in_class = np.empty(len(labels), np.int64)  # how many of its class come earlier in `order`
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank_in_class[members] = np.arange(len(members))
    by_rank = order[np.argsort(rank_in_class[order], kind="stable")]
    kept = np.zeros(len(labels), bool)
    kept[by_rank[:count]] = True
    return kept


def _part(source: Source, kept: np.ndarray) -> Source:
    return replace(source, labels=source.labels[kept], rows=source.rows[kept])


# --- arrays -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrayReader:
    """Images in memory: uint8[N, H, W] grey or uint8[N, H, W, 3]."""

    name: str
    images: np.ndarray

    def open(self, row: int) -> np.ndarray:
        image = self.images[row]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)

    read = open

    def encoded(self, row: int) -> bytes:
        bitmap = io.BytesIO()
        Image.fromarray(self.read(row)).save(bitmap, "bmp")
        return bitmap.getvalue()

    def example_name(self, row: int) -> str:
        return f"{self.name}[{row}]"

    relative_name = example_name

    def stamp(self, row: int) -> int:
        return zlib.crc32(self.images[row].tobytes())


def _read_cifar10(spec: str, rest: str, class_names: tuple[str, ...] | None) -> Source:
    folder, _, split = rest.rpartition("/")
    if not (Path(folder) / "cifar10.npz").is_file():
        raise UserError(
            f"{spec}: there is no {Path(folder) / 'cifar10.npz'}:"
            f" run `python scripts/fetch_cifar10.py {folder or 'DIR'}`, then use"
            f" cifar10:{folder or 'DIR'}/train or /test"
        )
    return _read_npz(spec, Path(folder), f"cifar10/{split}", class_names)


def _read_npz(spec: str, folder: Path, rest: str, class_names: tuple[str, ...] | None) -> Source:
    """`rest` is STEM/SPLIT; the file holds SPLIT_images, SPLIT_labels and class_names."""
    stem, _, split = rest.partition("/")
    known = [f"{p.stem}/{s}" for p in sorted(folder.glob("*.npz")) for s in ("train", "test")]
    if rest not in known:
        raise UserError(f"{spec}: there is no {rest!r}: use one of {', '.join(known)}")
    path, keys = folder / f"{stem}.npz", (f"{split}_images", f"{split}_labels", "class_names")
    images, labels, held_names = read_arrays(path, keys).values()
    own_names = tuple(map(str, held_names.ravel()))
    if images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)) or images.ndim < 3:
        found = f"{images.dtype}{list(images.shape)}"
        raise UserError(f"{path}: `{keys[0]}` is {found}: give uint8[N, H, W] or uint8[N, H, W, 3]")
    if 0 in images.shape:
        raise UserError(f"{path}: `{keys[0]}` holds no image: its shape is {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: `{keys[1]}` is {labels.dtype}{list(labels.shape)}: give one whole number for"
            f" each of the {len(images):,} images"
        )
    if held_names.dtype.kind != "U" or held_names.ndim != 1:
        raise UserError(f"{path}: `class_names` is {held_names.dtype}: give a list of texts")
    if len(set(own_names)) < len(own_names):
        raise UserError(f"{path}: `class_names` has a name twice: rename one of them")
    if labels.min() < 0 or labels.max() >= len(own_names):
        raise UserError(
            f"{path}: `{keys[1]}` goes from {labels.min()} to {labels.max()}, and there are"
            f" {len(own_names)} `class_names`"
        )
    labels, class_names = _map_by_name(spec, labels, own_names, class_names)
    return Source(spec, class_names, labels, np.arange(len(labels)), ArrayReader(spec, images))


# --- files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileReader:
    """Image files: `paths` relative to `folder`."""

    folder: Path
    paths: tuple[str, ...]

    def read(self, row: int, *, upright: bool = True) -> np.ndarray:
        """`upright` False leaves a photo as it is stored, whatever its EXIF orientation says."""
        return np.asarray(self.open(row, upright=upright))

    def open(self, row: int, *, upright: bool = True) -> Picture:
        name, data = self.example_name(row), self.encoded(row)
        if name.endswith(".npy"):
            return decode_array(data, name=name)
        return decode_picture(data, name=name, upright=upright)

    def encoded(self, row: int) -> bytes:
        return read_image_file(self.example_name(row))

    def example_name(self, row: int) -> str:
        return str(self.folder / self.paths[row])

    def relative_name(self, row: int) -> str:
        return self.paths[row]

    def stamp(self, row: int) -> int:
        try:
            return os.stat(os.path.join(self.folder, self.paths[row])).st_size
        except OSError:  # it is skipped, counted and named when its turn comes
            return -1


@dataclass(frozen=True)
class GeneratedReader(FileReader):
    """Image files that a generator made; `manifest` is the sha256 of what tells how."""

    manifest: str

    def relative_name(self, row: int) -> str:
        """With the manifest in it: images that are made anew are others, whatever their names."""
        return f"generated:{self.manifest[:16]}/{self.paths[row]}"


def _read_generated(spec: str, run: Path, class_names: tuple[str, ...] | None) -> Source:
    """RUN/generated/manifest.json, or RUN/manifest.json where `generate --out=RUN` wrote it."""
    folder = next((f for f in (run / "generated", run) if (f / MANIFEST).is_file()), None)
    if folder is None:
        raise UserError(
            f"{spec}: no images of it were made yet: `vision_jax generate {run} --count=1000` does"
        )
    data = read_bytes(folder / MANIFEST, MAX_LIST_BYTES)
    record = parse_json(data, str(folder / MANIFEST))
    entries = record.get("images") if isinstance(record, dict) else None
    good = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    if not good or not entries:
        raise UserError(f"{folder / MANIFEST}: lists no images: make them anew, by generate")
    inside = Inside(folder)
    paths, names = [], []
    for number, entry in enumerate(entries):
        place = f"{folder / MANIFEST}: image {number}"
        paths.append(_check_path(place, inside, entry.get("file")))
        names.append(entry.get("class"))
        if not isinstance(names[-1], str):
            raise UserError(f"{place} has no class: a classifier takes images of classes")
    own_names = tuple(sorted(set(names)))
    labels, class_names = _map_by_name(
        spec, np.array([own_names.index(name) for name in names]), own_names, class_names
    )
    digest = hashlib.sha256(data).hexdigest()
    reader = GeneratedReader(folder, tuple(paths), digest)
    note = f"{spec}: {len(paths):,} images of the manifest with sha256 {digest[:16]}"
    return Source(spec, class_names, labels, np.arange(len(labels)), reader, note)


class MissingFileError(UserError):
    """A listed file that isn't there."""


def _refuse(error: UserError, problems: list[UserError] | None) -> None:
    """Raises it, or goes on where problems are collected."""
    if problems is None:
        raise error
    problems.append(error)


def _read_folder(
    folder: Path, class_names: tuple[str, ...] | None, problems: list[UserError] | None = None
) -> Source:
    """One folder per class, in sorted order; images may lie deeper inside it, and behind links."""
    names, ignored = list_folders(folder)
    if not names:
        raise UserError(
            f"{folder}: no class folders: put the images of each class into a folder of its name"
        )
    paths_of: dict[str, list[str]] = {}
    for name in names:
        paths_of[name], others = list_files(folder / name, IMAGE_SUFFIXES, follow_links=True)
        ignored += others
    if class_names is None or not set(names) <= set(class_names):
        refuse_splits(folder, paths_of)
    for name, images in paths_of.items():
        if not images:
            text = f"{folder / name}: no image in this class folder: add"
            text += f" {', '.join(sorted(IMAGE_SUFFIXES))}, or remove the folder"
            if holds_shards(folder / name):
                text = f"{folder / name}: shards and no images of a class: use {folder / name}"
            _refuse(UserError(text), problems)
    paths = tuple(f"{name}/{path}" for name, images in paths_of.items() for path in images)
    labels = np.repeat(np.arange(len(names)), [len(images) for images in paths_of.values()])
    mapped, class_names = _map_by_name(str(folder), labels, tuple(names), class_names)
    note = f"{folder}: {ignored} hidden files or files that are no images ignored"
    reader = FileReader(folder, paths)
    return Source(
        str(folder), class_names, mapped, np.arange(len(paths)), reader, note if ignored else ""
    )


def _csv_entries(
    path: Path,
    path_names: Sequence[str] = PATH_NAMES,
    label_names: Sequence[str] = LABEL_NAMES,
) -> Iterator[tuple[int, Any, Any]]:
    """(line number, path, label) of each row; the header tells what separates the columns.

    Without `label_names` the label is any value.
    """
    number = 1
    try:
        text = decode_text(read_bytes(path, MAX_LIST_BYTES))
        separator = max(",;\t|", key=text.partition("\n")[0].count)
        rows = csv.reader(
            io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True
        )
        header = [name.strip().lower() for name in next(rows, [])]
        columns = [_first_of(names, header) for names in (label_names or path_names, path_names)]
        missing = [name for name in columns if name not in header]
        if missing:
            begin = f"`{path_names[0]},{label_names[0] if label_names else 'label'}`"
            raise UserError(
                f"{path}:1: no column {', '.join(dict.fromkeys(missing))}: begin with {begin}"
            )
        label_at, path_at = (header.index(name) for name in columns)
        split = _first_of(SPLIT_NAMES, header)
        splits: set[str | None] = set()
        for row in rows:
            number = rows.line_num
            if any(row):  # spreadsheets end with rows of nothing
                cells = [*row, *[None] * (len(header) - len(row))]
                if split in header:
                    splits.add(cells[header.index(split)])
                label = cells[label_at]
                yield number, cells[path_at], label if label is None else label.strip()
        _refuse_mixed(path, split, splits)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}:{number}: not readable as CSV ({error})") from error


def _jsonl_entries(
    path: Path, path_names: Sequence[str] = PATH_NAMES, label_names: Sequence[str] = ("label",)
) -> Iterator[tuple[int, Any, Any]]:
    """(line number, path, label) of each line that isn't blank."""
    data = read_bytes(path, MAX_LIST_BYTES)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", "replace").encode()
    splits: set[str | None] = set()
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        entry = parse_json(line, f"{path}:{number}")
        if not isinstance(entry, dict):
            form = (
                f'{{"{path_names[0]}": ..., "{label_names[0] if label_names else "label"}": ...}}'
            )
            raise UserError(f"{path}:{number}: not of the form {form}")
        split = entry.get(_first_of(SPLIT_NAMES, entry))
        splits.add(split if isinstance(split, str) else None)
        label = entry.get(label_names[0]) if label_names else None
        yield number, entry.get(_first_of(path_names, entry)), label
    _refuse_mixed(path, SPLIT_NAMES[0], splits)


def _refuse_mixed(path: Path, column: str, values: Iterable[str | None]) -> None:
    """A list that says of each image which split it belongs to is no one set."""
    splits = splits_among(filter(None, values))
    if len(splits) > 1:
        raise UserError(
            f"{path}: its images belong to several splits, by `{column}`: {_few(splits)}: write a"
            " list of each, one to train on and another to evaluate on"
        )


def _first_of(names: Sequence[str], given: Container[str]) -> str:
    """The first of equivalent names that is given, or the first of all."""
    return next((name for name in names if name in given), names[0])


def _read_list(
    path: Path,
    class_names: tuple[str, ...] | None,
    problems: list[UserError] | None = None,
    *,
    labelled: bool = True,
) -> Source:
    """Labels are class names, or integers if all of them are (names are then "0", "1", ...)."""
    inside = Inside(path.parent)
    places: list[str] = []  # FILE:LINE
    paths: list[str] = []
    raw_labels: list[str] = []
    columns = {} if labelled else {"label_names": ()}
    for number, image_path, label in _ENTRIES[path.suffix](path, **columns):
        place = f"{path}:{number}"
        try:
            image_path = _check_path(place, inside, image_path)
            usable = isinstance(label, str | int) and not isinstance(label, bool) and label != ""
            if labelled and not usable:
                raise UserError(f"{place}: label {label!r}: use a class name or an integer from 0")
        except UserError as error:
            _refuse(error, problems)
            continue
        paths.append(image_path)
        places.append(place)
        raw_labels.append(str(label))
    if not paths and not problems:
        raise UserError(f"{path}: no images are listed: add lines of path and label")
    reader = FileReader(path.parent, tuple(paths))
    rows = np.arange(len(paths))
    if not labelled:
        return Source(str(path), (), np.zeros(len(paths), np.int32), rows, reader)
    if class_names is None:
        class_names = _infer_class_names(places, raw_labels)
    position = {name: i for i, name in enumerate(class_names)}
    labels = [
        _find_label(place, raw, position) for place, raw in zip(places, raw_labels, strict=True)
    ]
    return Source(str(path), class_names, np.array(labels, np.int32), rows, reader)


def _check_path(place: str, inside: Inside, image_path: Any) -> str:
    """A listed path, relative to the list's folder, if it is a file in there."""
    if not isinstance(image_path, str) or not image_path or "\0" in image_path:
        raise UserError(f"{place}: path {image_path!r}: give the file's path")
    found, verdict = inside.locate(image_path)
    folder = inside.folder
    if verdict == "elsewhere":
        raise UserError(f"{place}: {image_path}: use a path relative to {folder}, without `..`")
    if verdict == "outside":
        raise UserError(f"{place}: {image_path} leads out of {folder}: move the file inside")
    if verdict == "missing":
        raise MissingFileError(f"{place}: {image_path}: no such file in {folder}")
    return found


_ENTRIES = {".csv": _csv_entries, ".jsonl": _jsonl_entries}


def _infer_class_names(places: Sequence[str], raw_labels: Sequence[str]) -> tuple[str, ...]:
    if not all(_is_integer(label) for label in raw_labels):
        return tuple(sorted(set(raw_labels)))
    values = [int(label[:20]) for label in raw_labels]  # 20 digits are too large in any case
    for place, value in zip(places, values, strict=True):
        if not 0 <= value <= MAX_INTEGER_LABEL:
            raise UserError(
                f"{place}: label {value} is out of range: use 0 to the number of classes less 1"
            )
    return tuple(str(i) for i in range(max(values, default=-1) + 1))


def _find_label(place: str, raw: str, position: dict[str, int]) -> int:
    if raw in position:
        return position[raw]
    if _is_integer(raw):
        value = int(raw[:20])
        if 0 <= value < len(position):
            return value
        raise UserError(
            f"{place}: label {value} is out of range: there are {len(position)} classes, from 0"
        )
    raise UserError(
        f"{place}: class {raw!r} is not among the {len(position)} classes ({_few(list(position))})"
    )


def _is_integer(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").isdigit()


# --- tfds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TfdsReader:
    """A tfds data source whose images are left encoded, for decode.py to check and decode."""

    name: str
    data_source: Any

    def read(self, row: int) -> np.ndarray:
        return np.asarray(self.open(row))

    def open(self, row: int) -> Picture:
        return decode_picture(self.encoded(row), name=self.example_name(row))

    def encoded(self, row: int) -> bytes:
        return self.data_source[row]["image"]

    def example_name(self, row: int) -> str:
        return f"{self.name}[{row}]"

    relative_name = example_name

    def stamp(self, row: int) -> int:
        return 0


def open_tfds(spec: str) -> tuple[dict[str, Any], Any]:
    """(features, records by random access) of tfds:NAME/SPLIT[@DIR]; images are left encoded.

    Raises UserError if tfds isn't installed or can't read it.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{spec}: run `pip install 'vision_jax[tfds]'` to read it") from error
    where, _, data_dir = spec.removeprefix("tfds:").partition("@")
    name, _, split = where.rpartition("/")
    if not name or not split:
        raise UserError(f"{spec}: use tfds:NAME/SPLIT or tfds:NAME/SPLIT@DATA_DIR")
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        features = dict(builder.info.features.items())
        skip = {"image": tfds.decode.SkipDecoding()} if "image" in features else None
        return features, builder.as_data_source(split=split, decoders=skip)
    except Exception as error:  # tfds raises a dozen types, with a page of advice
        reason = next(line for line in [*str(error).splitlines(), repr(error)] if line.strip())
        raise UserError(
            f"{spec}: tfds can't read it ({reason.strip()}): prepare it once with"
            f" tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        ) from error


def _read_tfds(spec: str, class_names: tuple[str, ...] | None) -> Source:
    """Labels are read in one pass over the records, without decoding images."""
    features, data_source = open_tfds(spec)
    import tensorflow_datasets as tfds

    if not isinstance(features.get("image"), tfds.features.Image) or not isinstance(
        features.get("label"), tfds.features.ClassLabel
    ):
        raise UserError(
            f"{spec}: needs the features `image` (Image) and `label` (ClassLabel); it has"
            f" {', '.join(features)}"
        )
    labels = np.array([data_source[i]["label"] for i in range(len(data_source))], np.int64)
    own_names = tuple(features["label"].names)
    if len(labels) == 0 or labels.min() < 0:
        raise UserError(f"{spec}: this split has no labels: use another one")
    mapped, names = _map_by_name(spec, labels, own_names, class_names)
    return Source(spec, names, mapped, np.arange(len(mapped)), TfdsReader(spec, data_source))


def _read_unlabelled_tfds(spec: str) -> Source:
    """The images alone, whatever else the data set has; no record is read."""
    features, records = open_tfds(spec)
    import tensorflow_datasets as tfds

    if not isinstance(features.get("image"), tfds.features.Image):
        raise UserError(f"{spec}: needs the feature `image` (Image); it has {', '.join(features)}")
    count = len(records)
    if not count:
        raise UserError(f"{spec}: this split has no images: use another one")
    reader = TfdsReader(spec, records)
    return Source(spec, (), np.zeros(count, np.int32), np.arange(count), reader)


# --- shards -------------------------------------------------------------------------------------


def is_of_shards(spec: str) -> bool:
    """Whether it names shards, or a folder with nothing else to train on."""
    if are_shards(spec):
        return True
    path = expand(spec)
    return path.is_dir() and not list_folders(path)[0] and holds_shards(path)


def read_captioned_shards(spec: str, column: str = "caption") -> tuple[Reader, list[str], str]:
    """(reader of the images, their captions, a note for the log) of tar or Parquet shards.

    Args:
      spec: of shards.
      column: of a Parquet file, unless `spec` names one; "caption" is any of the usual names.

    Raises:
      UserError: what the shards refuse, or an image without a caption by its name.
    """
    shards, named = find_shards(spec)
    reader: Reader
    captions: Sequence[str | int | None]
    if shards[0].path.endswith(".parquet"):
        usual = parquet.CAPTIONS if column == parquet.CAPTIONS[0] else (column,)
        table = parquet.read_table(spec, shards, named, usual)
        reader, captions, note = table.reader, table.texts, ""
        advice = "leave its row out, or name another column behind the file, as in a.parquet:text"
    else:
        if column != parquet.CAPTIONS[0]:
            raise UserError(
                f"{spec}: captions of a tar are its .txt or the `caption` of its .json, and not"
                f" {column!r}: leave config.text.caption_column as it is"
            )
        listed = list_tars(shards, IMAGE_SUFFIXES)
        reader, captions, note = listed.reader, listed.captions, listed.note
        advice = "pack a .txt, or a .json with `caption`, of the same name right behind it"
    texts: list[str] = []
    for row, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(
                f"{reader.example_name(row)}: has no caption: {advice}; or, if it has labels, make"
                " captions of these, by config.text.caption_column='' and config.text.templates"
            )
        texts.append(caption.strip())
    return reader, texts, note


def _read_shards(
    spec: str,
    class_names: tuple[str, ...] | None,
    *,
    labelled: bool = True,
) -> Source:
    """Labels are class names, or integers if all of them are, as in lists."""
    shards, column = find_shards(spec)
    reader: Reader
    own_names, note = None, ""
    if shards[0].path.endswith(".parquet"):
        table = parquet.read_table(spec, shards, column, parquet.LABELS if labelled else None)
        reader, raw, own_names = table.reader, table.texts, table.names
        advice = "name a split that has labels"
        count = int(table.reader.starts[-1])
    else:
        listed = list_tars(shards, IMAGE_SUFFIXES)
        reader, raw, note = listed.reader, listed.labels, listed.note
        advice = "pack a .cls, or a .json with `label`, of the same name right behind it"
        count = len(raw)
    rows = np.arange(count)
    if not labelled:
        return Source(spec, (), np.zeros(count, np.int32), rows, reader, note)
    first_of: dict[Any, int] = {}  # of each label the first row that has it
    for row, label in enumerate(raw):
        first_of.setdefault(label, row)
    for label in (None, "", *([-1] if own_names else [])):
        if label in first_of:
            raise UserError(f"{reader.example_name(first_of[label])}: has no label: {advice}")
    places = [reader.example_name(row) for row in first_of.values()]
    texts = [str(label) for label in first_of]
    if own_names:  # numbers count in these, whatever their own names look like
        texts = [own_names[i] if i in range(len(own_names)) else str(i) for i in first_of]
    names = own_names or class_names or _infer_class_names(places, texts)
    position = {name: i for i, name in enumerate(names)}
    pairs = zip(places, texts, strict=True)
    number_of = {
        label: _find_label(place, text, position)
        for label, (place, text) in zip(first_of, pairs, strict=True)
    }
    numbers = [number_of[label] for label in raw]
    labels, names = _map_by_name(spec, np.array(numbers, np.int32), names, class_names)
    return Source(spec, names, labels, rows, reader, note)


# --- classes ------------------------------------------------------------------------------------


def _map_by_name(
    spec: str,
    labels: np.ndarray,
    own_names: tuple[str, ...],
    class_names: tuple[str, ...] | None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels into `own_names` become labels into `class_names`, where these are given: int32[N]."""
    if class_names is None:
        return labels.astype(np.int32), own_names
    position = {name: i for i, name in enumerate(class_names)}
    for name in own_names:
        if name not in position:
            raise UserError(
                f"{spec}: class {name!r} is not among the {len(class_names)} classes"
                f" ({_few(class_names)}): rename or remove it"
            )
    table = np.array([position[name] for name in own_names], np.int32)
    return table[labels], class_names


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
