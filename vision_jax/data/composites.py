"""Composite images with exact boxes, from a seed: real pieces pasted on real ground.

    composites:SPLIT/SEED/COUNT[/SIZE]      as config.data.train, such as composites:train/0/2000
    python -m vision_jax.data.composites --out=DIR --split=train --count=2000     as files

Garments of Fashion-MNIST, scaled and turned, lie on crops of the aerial training tiles; each class
has hues of its own, so that a small detector can learn them in minutes. Both parts come with the
package; training and test images share neither a garment nor a tile. A detector that finds nothing
here is broken. One that finds everything has shown nothing about photographs: an AP on composites
is no measure of quality.
"""

import argparse
import colorsys
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vision_jax.data.annotation_formats.reading import Reading
from vision_jax.data.decode import decode_image
from vision_jax.data.sources import ASSETS, ArrayReader
from vision_jax.errors import UserError

# Shirts and coats are left out: as small as here, they can't be told from pullovers.
CLASS_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "sandal", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SPLITS = ("train", "test")
SIZES = (64, 256)  # least and largest side, in pixels
DEFAULT_SIZE = 64
MAX_OBJECTS = 4
MAX_BYTES = 4_000_000_000  # of the pixels of a source, which holds them in memory

_LONG_SIDE = (0.3, 0.55)  # of an object, as a share of the image's side
_MAX_TURN = 20.0  # degrees
_MAX_OVERLAP = 0.1  # of a box's area that a later box may cover, and of the later one's
_TRIES = 20  # to place an object; then it is left out
_FIRST_GREY = 12  # a garment's pixels are at least as bright


@dataclass(frozen=True)
class Pieces:
    """What the images of a split are made of: `garments` uint8[N, 28, 28] with `labels` i32[N] in
    CLASS_NAMES, and `grounds`, each uint8[256, 256, 3]."""

    garments: np.ndarray
    labels: np.ndarray
    grounds: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Composite:
    """`image` uint8[S, S, 3] and its objects: `boxes_xyxy_px` i32[T, 4], `labels` i32[T]."""

    image: np.ndarray
    boxes_xyxy_px: np.ndarray
    labels: np.ndarray


@functools.cache
def read_pieces(split: str) -> Pieces:
    """The embedded pieces of "train" or "test"."""
    with np.load(ASSETS / "fashion_mnist.npz", allow_pickle=False) as arrays:
        garments, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        names = [str(name) for name in arrays["class_names"]]
    position = np.array([CLASS_NAMES.index(n) if n in CLASS_NAMES else -1 for n in names])
    labels = position[labels].astype(np.int32)
    listed = json.loads((ASSETS / "aerial" / "train.json").read_text())["images"]
    grounds = (
        ASSETS / "aerial" / entry["file_name"]
        for index, entry in enumerate(listed)
        if (split == "test") == (index % 5 == 0)
    )
    return Pieces(
        garments[labels >= 0],
        labels[labels >= 0],
        tuple(decode_image(path.read_bytes(), name=path.name) for path in grounds),
    )


def make_composite(
    split: str, seed: int, index: int, *, size: int, max_objects: int = MAX_OBJECTS
) -> Composite:
    """Image `index` of a split: 1 to `max_objects` objects, a pure function of its arguments.

    A box is the smallest that holds all of an object's pixels that are at least half opaque; a
    later object may cover a tenth of it. All lie inside the image.
    """
    pieces = read_pieces(split)
    rng = np.random.default_rng((SPLITS.index(split), seed, index))
    image = Image.fromarray(_ground(pieces, rng, size))
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    for _ in range(rng.integers(1, max_objects + 1)):
        label = int(rng.integers(len(CLASS_NAMES)))
        garment = pieces.garments[rng.choice(np.flatnonzero(pieces.labels == label))]
        colors, alpha = _dress_up(garment, label, rng, size)
        for _ in range(_TRIES):
            left, top = rng.integers(0, (size - alpha.width + 1, size - alpha.height + 1))
            box = np.array([left, top, left + alpha.width, top + alpha.height])
            if all(_overlap(box, other) <= _MAX_OVERLAP for other in boxes):
                image.paste(colors, (int(left), int(top)), alpha)
                boxes.append(box)
                labels.append(label)
                break
    return Composite(
        np.asarray(image), np.array(boxes, np.int32).reshape(-1, 4), np.array(labels, np.int32)
    )


def _ground(pieces: Pieces, rng: np.random.Generator, size: int) -> np.ndarray:
    """uint8[size, size, 3]: somewhere in a tile, in one of eight orientations."""
    tile = pieces.grounds[rng.integers(len(pieces.grounds))]
    top, left = rng.integers(0, np.array(tile.shape[:2]) - size + 1)
    ground = np.rot90(tile[top : top + size, left : left + size], int(rng.integers(4)))
    return np.ascontiguousarray(ground[:, ::-1] if rng.integers(2) else ground)


def _dress_up(
    garment: np.ndarray, label: int, rng: np.random.Generator, size: int
) -> tuple[Image.Image, Image.Image]:
    """The garment's colors (RGB) and its alpha (L), cut to what is at least half opaque."""
    alpha = _silhouette(garment)
    hue = (label + rng.uniform(-0.35, 0.35)) / len(CLASS_NAMES)
    tint = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.6, 1.0), rng.uniform(0.7, 1.0))
    lit = 0.25 + 0.75 * garment[..., None] / 255 * np.ones(3)
    colors = Image.fromarray(np.round(lit * tint * 255).astype(np.uint8))

    left, top, right, bottom = _extent(alpha)
    scale = rng.uniform(*_LONG_SIDE) * size / max(right - left, bottom - top)
    side = round(28 * scale)
    turn = rng.uniform(-_MAX_TURN, _MAX_TURN)
    colors, alpha = (
        layer.resize((side, side), Image.Resampling.BICUBIC).rotate(
            turn, Image.Resampling.BILINEAR, expand=True
        )
        for layer in (colors, alpha)
    )
    extent = _extent(alpha)
    return colors.crop(extent), alpha.crop(extent)


def _silhouette(garment: np.ndarray) -> Image.Image:
    """255 where the garment is, dark parts that it encloses included; L[28, 28]."""
    mask = Image.new("L", (30, 30), 255)
    mask.paste(Image.fromarray(np.where(garment >= _FIRST_GREY, 0, 255).astype(np.uint8)), (1, 1))
    ImageDraw.floodfill(mask, (0, 0), 128)  # around the garment
    return mask.crop((1, 1, 29, 29)).point([255 if level != 128 else 0 for level in range(256)])


def _extent(alpha: Image.Image) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what is at least half opaque."""
    opaque = alpha.point([255 if level >= 128 else 0 for level in range(256)]).getbbox()
    assert opaque is not None
    return opaque


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """The intersection of two boxes as a share of the smaller one."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    smaller = min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
    return float(np.prod(np.maximum(sides, 0)) / smaller)


def read_composites(spec: str) -> Reading:
    """All images of `composites:SPLIT/SEED/COUNT[/SIZE]`, made here and kept in memory.

    SIZE is 64 unless given; 1,000 images take some seconds and 12 MB. Raises UserError.
    """
    split, *numbers = spec.partition(":")[2].split("/")
    if split not in SPLITS or len(numbers) not in (2, 3) or not all(map(_is_number, numbers)):
        raise UserError(
            f"{spec}: write composites:SPLIT/SEED/COUNT or composites:SPLIT/SEED/COUNT/SIZE, such"
            " as composites:train/0/2000"
        )
    seed, count, size = *map(int, numbers), *((DEFAULT_SIZE,) * (3 - len(numbers)))
    check(count, seed, size, spec)
    images = np.empty((count, size, size, 3), np.uint8)
    reading = Reading(spec, Path(), "{file}: object {entry}")
    reading.records = ArrayReader(spec, images)
    for label, name in enumerate(CLASS_NAMES):
        reading.category(label + 1, name)
    for index in range(count):
        composite = make_composite(split, seed, index, size=size)
        images[index] = composite.image
        reading.files.append(reading.records.example_name(index))
        reading.add_image(index + 1, reading.files[-1], size, size)
        boxes = composite.boxes_xyxy_px.tolist()
        for entry, (box, label) in enumerate(zip(boxes, composite.labels.tolist(), strict=True)):
            x0, y0, x1, y1 = box
            reading.add_box(index, label, (x0, y0, x1 - x0, y1 - y0), entry)
    return reading


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9


# --- files --------------------------------------------------------------------------------------


def write_composites(
    folder: Path, split: str, *, count: int, seed: int, size: int, plain: bool = False
) -> Path:
    """Writes `count` images and the file that lists them, SPLIT.json; returns that file.

    It is COCO JSON, or with `plain` the simplest there is: one object an image, all of one class
    "garment", the box in the image's own entry.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        max_objects = 1 if plain else MAX_OBJECTS
        composite = make_composite(split, seed, index, size=size, max_objects=max_objects)
        name = f"{split}/{index:06d}.png"
        Image.fromarray(composite.image).save(folder / name)
        entry = {"file_name": name, "width": size, "height": size}
        boxes = composite.boxes_xyxy_px.tolist()
        if plain:
            (box,) = boxes
            corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            images.append({**entry, **corners, "category_id": 1})
            continue
        images.append({"id": index + 1, **entry})
        for (x0, y0, x1, y1), label in zip(boxes, composite.labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    names = ("garment",) if plain else CLASS_NAMES
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    content: dict[str, Any] = {"images": images, "categories": categories}
    if not plain:
        content["annotations"] = annotations
    path = folder / f"{split}.json"
    path.write_text(json.dumps(content) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vision_jax.data.composites", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, required=True, help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=DEFAULT_SIZE, help="pixels a side")
    parser.add_argument("--plain", action="store_true", help="one class, one box an image")
    options = parser.parse_args()
    try:
        check(options.count, options.seed, options.size, "composites")
        path = write_composites(
            options.out,
            options.split,
            count=options.count,
            seed=options.seed,
            size=options.size,
            plain=options.plain,
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {path} and {options.count} images")
    return 0


def check(count: int, seed: int, size: int, name: str) -> None:
    """Raises UserError unless there can be such composites."""
    if not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"{name}: size {size}: use {SIZES[0]} to {SIZES[1]} pixels")
    if count < 1 or count * size * size * 3 > MAX_BYTES:
        raise UserError(f"{name}: {count} images: use 1 to {MAX_BYTES // (3 * size * size)}")
    if seed < 0:
        raise UserError(f"{name}: seed {seed}: use one from 0")


if __name__ == "__main__":
    sys.exit(main())
