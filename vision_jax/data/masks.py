"""Masks, files that name each pixel's class, to u8[H, W] of class indices; 255 is no class.

A file holds whole numbers (grey or palette PNGs and other lossless images of 1 to 16 bits, or
.npy) or colors. Which class a number or a color is says a `ClassTable`; what it does not name is
refused, by file and value, and never guessed. Pixels are taken as stored: nothing is resized,
interpolated or turned.
"""

import csv
import io
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vision_jax.data.decode import (
    GREY_STEPS,
    MAX_BYTES,
    DamagedImageError,
    open_picture,
    read_image_file,
)
from vision_jax.data.segments import IGNORED, SegmentData
from vision_jax.data.sources import Reader
from vision_jax.errors import UserError, printable
from vision_jax.files import decode_text, read_bytes, read_json

MAX_CLASSES = 255  # 0 to 254
MASK_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff", ".gif", ".npy"})
TABLE_FILES = ("classes.json", "classes.csv", "id2label.json", "class_dict.csv")
_COLOR = re.compile("#[0-9a-fA-F]{6}")


class MaskReader(Protocol):
    """What masks are read from, by row. Picklable; threads share it."""

    def read(self, row: int) -> np.ndarray:
        """u8[H, W] of class indices, 255 where there is none.

        Raises:
          DamagedImageError: this mask can't be read; its image is skipped and counted.
          UserError: values that are no class, by the mask's name and the value: all stops.
        """

    def example_name(self, row: int) -> str:
        """What to call it in messages."""

    def stamp(self, row: int) -> int:
        """A number that shows most edits, read without the mask: its size in bytes, mostly."""


@dataclass(frozen=True)
class MaskedImages:
    """What a reader of a format finds, before classes are matched with those of another source.

    Attributes:
      name: of the data, for messages.
      class_names: by the class index that `masks` gives, at most 255.
      reader: of images, rows 0 to count - 1.
      masks: of the same rows.
      count: of images.
      groups: i64[count], what a split must keep together, such as slices of a patient's volume.
      note: what was left out, for the log.
      segments: of the same rows, where the format tells instances apart.
    """

    name: str
    class_names: tuple[str, ...]
    reader: Reader
    masks: MaskReader
    count: int
    groups: np.ndarray | None = None
    note: str = ""
    segments: SegmentData | None = None


@dataclass(frozen=True)
class ClassTable:
    """Which class a mask's values are.

    Attributes:
      path: of the file that says it, for messages.
      class_names: by index, at most 255.
      values: the values that masks may have: whole numbers from 0 to 65,535, or colors 0xRRGGBB.
      indices: u8[len(values)], the class index of each, or 255.
      colors: whether values are colors.
    """

    path: str
    class_names: tuple[str, ...]
    values: tuple[int, ...]
    indices: tuple[int, ...]
    colors: bool = False

    def reduced(self) -> "ClassTable":
        """Of masks that count classes from 1, and are 0 where there is none (ADE20K).

        Each value of the table is one more in the masks; 0 becomes 255, as 255 stays
        (transformers' `do_reduce_labels`).

        Raises:
          UserError: a table of colors.
        """
        if self.colors:
            raise UserError(f"{self.path}: reduce_zero is of numbers, and the classes have colors")
        values = (0, *(value + 1 for value in self.values if value != IGNORED))
        indices = (
            i for i, value in zip(self.indices, self.values, strict=True) if value != IGNORED
        )
        return ClassTable(self.path, self.class_names, values, (IGNORED, *indices))

    def look_up(self, pixels: np.ndarray, *, name: str) -> np.ndarray:
        """u8[H, W] of values i[H, W] or of colors u8[H, W, 3].

        Raises:
          UserError: a value that the table has not.
        """
        if self.colors:
            shifted = pixels.astype(np.int32)
            pixels = shifted[..., 0] << 16 | shifted[..., 1] << 8 | shifted[..., 2]  # [H, W]
        values, indices = self.values, self.indices
        if not self.colors and IGNORED not in values:
            values, indices = (*values, IGNORED), (*indices, IGNORED)
        order = np.argsort(values)
        known = np.array(values, np.int64)[order]
        if not self.colors and pixels.dtype == np.uint8:
            place = np.searchsorted(known, np.arange(256))[pixels]
        else:
            place = np.searchsorted(known, pixels)
        place = np.minimum(place, len(known) - 1)
        found = known[place] == pixels
        if not found.all():
            strange = pixels[~found]
            value = int(strange[0])
            raise UserError(
                f"{name}: {len(strange):,} pixels of the value {self.write(value)}, which"
                f" {self.path} does not name: add it there, or null as its name to ignore it"
            )
        return np.array(indices, np.uint8)[order][place]

    def write(self, value: int) -> str:
        """A value as the table's file writes it."""
        return f"#{value:06x}" if self.colors else str(value)


def make_class_table(
    path: str, names: Sequence[tuple[int, str | None]], colors: bool = False
) -> ClassTable:
    """A ClassTable of (value, name) in their order; a name of None is no class.

    Several values may have one name, and are one class then.

    Raises:
      UserError: no class, too many, or values twice or out of range.
    """
    largest = 0xFFFFFF if colors else 0xFFFF
    position: dict[str, int] = {}
    indices: dict[int, int] = {}
    for value, name in names:
        if not 0 <= value <= largest:
            raise UserError(f"{path}: the value {value}: values go from 0 to {largest:,}")
        if value in indices:
            raise UserError(f"{path}: the value {value} has two names: leave one of them")
        indices[value] = (
            IGNORED if name is None else position.setdefault(printable(name), len(position))
        )
    if not position:
        raise UserError(f"{path}: no class in it: give values and names: docs/segmentation_data.md")
    if len(position) > MAX_CLASSES:
        raise UserError(
            f"{path}: {len(position):,} classes: {MAX_CLASSES} at most, since masks have 8 bits"
        )
    return ClassTable(path, tuple(position), tuple(indices), tuple(indices.values()), colors)


def read_class_table(path: Path) -> ClassTable:
    """A table out of a JSON or CSV file.

    JSON is a list of names, by value; or an object {value: name}, the value being a number or a
    color "#rrggbb", as Hugging Face's id2label.json is. null as a name is no class. CSV has the
    columns name and value, or name and r, g, b, as CamVid's class_dict.csv; an empty name is no
    class.

    Raises:
      UserError: another file.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    pairs: list[tuple[int, str | None]] = []
    kinds = set()
    for value, name in rows:
        text = str(value).strip()
        if _COLOR.fullmatch(text):
            kinds.add("color")
            number = int(text[1:], 16)
        elif text.isascii() and text.isdigit() and len(text) < 9:
            kinds.add("number")
            number = int(text)
        else:
            turned = isinstance(name, (int, list))  # {"road": 1}, {"road": [128, 64, 128]}
            raise UserError(
                f"{path}: {text[:40]!r} is no value: use a whole number or #rrggbb"
                + (', and the name behind it, such as {"1": "road"}' if turned else "")
            )
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise UserError(f"{path}: the name {name!r}: give a text, or null for no class")
        pairs.append((number, name and name.strip()))
    if len(kinds) > 1:
        raise UserError(f"{path}: numbers and colors among the values: use one of both")
    return make_class_table(str(path), pairs, "color" in kinds)


def find_table(folder: Path, images: Path, masks: Path) -> Path:
    """The file of the classes, in one of these folders or above it.

    Raises:
      UserError: there is none.
    """
    places = dict.fromkeys(
        place
        for start in (folder, masks, images)
        for place in (start, *start.absolute().parents[:2])
    )
    for place in places:
        for name in TABLE_FILES:
            if (place / name).is_file():
                return place / name
    raise UserError(
        f"{folder / TABLE_FILES[0]}: no such file: write which value of the masks is which class,"
        ' such as {"0": "background", "1": "road", "255": null}, or colors "#rrggbb"'
    )


def _json_rows(path: Path) -> list[tuple[Any, Any]]:
    content = read_json(path)
    if isinstance(content, list):
        return list(enumerate(content))
    if isinstance(content, dict):
        return list(content.items())
    raise UserError(f'{path}: not a list of names, nor {{"0": "background", "255": null}}')


def _csv_rows(path: Path) -> list[tuple[Any, Any]]:
    try:
        text = decode_text(read_bytes(path))
        separator = max(",;\t", key=text.partition("\n")[0].count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV ({error})") from error
    found: list[tuple[Any, Any]] = []
    for number, row in enumerate(rows, start=2):
        cells = {str(key).strip().lower(): value for key, value in row.items()}
        if "name" not in cells or not ("value" in cells or {"r", "g", "b"} <= set(cells)):
            raise UserError(f"{path}:1: begin with `name,value` or `name,r,g,b`")
        value: Any = cells.get("value")
        if value is None:
            levels = [str(cells[key]).strip() for key in "rgb"]
            if not all(x.isascii() and x.isdigit() and int(x[:4]) < 256 for x in levels):
                raise UserError(f"{path}:{number}: {','.join(levels)[:40]} is no color of 0 to 255")
            value = "#" + "".join(f"{int(x):02x}" for x in levels)
        found.append((value, (cells["name"] or "").strip() or None))
    return found


@dataclass(frozen=True)
class FileMasks:
    """Mask files: `paths` relative to `folder`, their values named by `table`."""

    folder: Path
    paths: tuple[str, ...]
    table: ClassTable

    def read(self, row: int) -> np.ndarray:
        name = self.example_name(row)
        pixels = decode_mask(read_image_file(name), name=name, colors=self.table.colors)
        return self.table.look_up(pixels, name=name)

    def example_name(self, row: int) -> str:
        return str(self.folder / self.paths[row])

    def stamp(self, row: int) -> int:
        try:
            size = os.stat(self.folder / self.paths[row]).st_size
        except OSError:  # it is skipped, counted and named when its turn comes
            size = -1
        meaning = (self.paths[row], size, self.table.values, self.table.indices)
        return zlib.crc32(repr(meaning).encode())


@dataclass(frozen=True)
class ArrayMasks:
    """Masks in memory, u8[H, W] each, of class indices."""

    name: str
    masks: tuple[np.ndarray, ...]

    def read(self, row: int) -> np.ndarray:
        return self.masks[row]

    def example_name(self, row: int) -> str:
        return f"{self.name}[{row}]"

    def stamp(self, row: int) -> int:
        return zlib.crc32(self.masks[row].tobytes())


def decode_mask(data: bytes, *, name: str, colors: bool = False) -> np.ndarray:
    """The values of a mask's pixels as they are stored: u8 or u16[H, W], or u8[H, W, 3].

    A palette's indices are values, and its colors are colors; grey of 1, 2 and 4 bits counts from 0
    to 1, 3 and 15, where Pillow would stretch it to 255.

    Args:
      data: the bytes of a lossless image file, or of a .npy file.
      name: what errors call it.
      colors: whether colors are wanted, else numbers.

    Raises:
      DamagedImageError: not readable, or too large.
      UserError: colors where numbers are wanted, transparency, or a lossy format.
    """
    if name.endswith(".npy"):
        return _decode_array(data, name, colors)
    with open_picture(data, name=name) as image:
        raw_mode = image.tile[0].args if image.format == "PNG" and image.tile else None
        lossy = image.format in ("JPEG", "MPO") or (image.format, image.mode) == ("WEBP", "RGB")
        image.load()
        mode = image.mode
        plain: Image.Image = image
        opaque = True
        if mode in ("RGBA", "LA"):
            opaque = image.getchannel("A").getextrema() == (255, 255)
            plain = image.convert(mode[:-1])
        if colors:
            pixels = np.asarray(plain.convert("RGB")) if not mode.startswith("I") else None
        elif mode in ("1", "L", "LA", "P") or mode.startswith("I;16"):
            pixels = np.asarray(plain)
        elif mode == "I":
            pixels = np.asarray(plain).astype(np.int64)
        else:
            pixels = _equal_channels(np.asarray(plain)) if plain.mode == "RGB" else None
    if lossy:
        raise UserError(f"{name}: a lossy format changes classes at every edge: save it as PNG")
    if not opaque:
        raise UserError(f"{name}: transparent pixels in a mask: save it without an alpha channel")
    if pixels is None:
        wanted = "numbers, by the table of classes" if not colors else "colors"
        raise UserError(
            f"{name}: an image of mode {mode}, and masks here have {wanted}: give"
            f" {'colors #rrggbb in the table' if not colors else 'numbers in the table'}"
        )
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8)
    if isinstance(raw_mode, str) and raw_mode in GREY_STEPS and not colors:
        return pixels // np.uint8(GREY_STEPS[raw_mode])
    return pixels


def _equal_channels(rgb: np.ndarray) -> np.ndarray | None:
    """u8[H, W] of a grey image that was saved as RGB; None if it has colors."""
    grey = rgb[..., 0]
    return grey if (grey == rgb[..., 1]).all() and (grey == rgb[..., 2]).all() else None


def _decode_array(data: bytes, name: str, colors: bool) -> np.ndarray:
    if len(data) > MAX_BYTES:
        raise DamagedImageError(f"{name}: {len(data)} bytes or more, over the limit of {MAX_BYTES}")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises many types on damaged headers
        raise DamagedImageError(f"{name}: not a readable .npy file ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "bui" or 0 in array.shape:
        raise DamagedImageError(f"{name}: not an array of whole numbers")
    wanted = "uint8[H, W, 3] of colors" if colors else "[H, W] of values"
    if colors and (array.shape[2:] != (3,) or array.dtype != np.uint8):
        raise UserError(f"{name}: an array {array.dtype}{list(array.shape)}: give {wanted}")
    if not colors and array.ndim != 2:
        raise UserError(f"{name}: an array {array.dtype}{list(array.shape)}: give {wanted}")
    return array.astype(np.uint8) if array.dtype.kind == "b" else array
