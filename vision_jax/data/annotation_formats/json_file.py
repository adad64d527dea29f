"""What the two formats in JSON share: the file, its categories, and where its images lie."""

import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import orjson
except ImportError:  # no wheel for this platform: slower, the same
    orjson = None  # type: ignore[assignment]

from vision_jax.data.annotation_formats.reading import Reading
from vision_jax.data.annotation_formats.values import get_id, is_text, short
from vision_jax.data.folders import Inside
from vision_jax.errors import UserError
from vision_jax.files import read_bytes

MAX_JSON_BYTES = 2_000_000_000


def read_json(path: Path, *, masks: bool = False) -> Any:
    """The content; without `masks` what entries with a box state of their region is left out."""
    data = read_bytes(path, MAX_JSON_BYTES)
    has_masks = not masks and b'"segmentation"' in data
    try:
        if orjson and not has_masks:  # twice as fast, but it can't leave out what isn't needed
            with suppress(orjson.JSONDecodeError):  # a mark, UTF-16 and NaN are read below
                return orjson.loads(data)
        return json.loads(data, object_hook=_drop_masks if has_masks else None)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or "too little memory for it"
        raise UserError(f"{path}: not readable as JSON ({reason})") from error


def _drop_masks(entry: dict) -> dict:
    if entry.get("bbox"):
        entry.pop("segmentation", None)  # most of a COCO file
    return entry


@contextmanager
def without_collector() -> Iterator[None]:
    """No search for cycles of references: a million small dicts have none, and it takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def outline(content: Any) -> str:
    if not isinstance(content, dict):
        return "a list" if isinstance(content, list) else short(content)
    return ", ".join(short(key) for key in list(content)[:8]) or "nothing"


def dicts(reading: Reading, path: Path, content: dict, key: str) -> Iterator[tuple[str, dict]]:
    """(place, entry) of each entry that is an object."""
    for i, entry in enumerate(content[key]):
        place = f"{path}: {key}[{i}]"
        if isinstance(entry, dict):
            yield place, entry
        else:
            reading.complain("entry", place, f"{short(entry)} is no object")


def read_categories(reading: Reading, path: Path, content: dict) -> frozenset[int | str]:
    """The ids that are declared."""
    if content.get("categories") is None:
        return frozenset()
    if not isinstance(content["categories"], list):
        raise UserError(f"{path}: `categories` is no list")
    for place, entry in dicts(reading, path, content, "categories"):
        category_id, name, parent = (
            get_id(entry, "id"),
            entry.get("name"),
            entry.get("supercategory"),
        )
        if category_id is None or not is_text(name):
            reading.complain("entry", place, "needs `id`, a number or text, and `name`, a text")
        elif category_id in reading.categories:
            reading.complain("id", place, f"id {short(category_id)} is given twice", category_id)
        else:
            reading.category(category_id, name, parent if is_text(parent) else "")
    return frozenset(reading.categories)


def find_images(path: Path, names: Iterable[Any]) -> Path:
    """Beside the file, or where COCO and common tools keep images, judged by the first few."""
    parent = path.parent
    known = [
        n for n in (name for name, _ in zip(names, range(20), strict=False)) if isinstance(n, str)
    ]
    part = path.stem.rpartition("_")[2]  # instances_train2017
    for folder in (
        parent,
        parent / "images",
        parent / "data",  # FiftyOne's, beside labels.json
        parent.parent / part,
        parent.parent / "images" / part,
        parent.parent / "images",
    ):
        inside = Inside(folder)
        if any(n and "\0" not in n and inside.locate(n)[1] == "found" for n in known):
            return folder
    return parent
