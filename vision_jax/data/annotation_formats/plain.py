"""Plain JSON: each entry of `images` holds an image and one box in corners, with its category."""

from pathlib import Path

from vision_jax.data.annotation_formats.json_file import find_images, read_categories
from vision_jax.data.annotation_formats.reading import Reading
from vision_jax.data.annotation_formats.values import (
    CORNERS,
    are_numbers,
    from_corners,
    get_id,
    get_size,
    short,
    size_fault,
)


def read_plain(spec: str, path: Path, content: dict, images: Path | None) -> Reading:
    """An entry without a box and a category is an image without boxes."""
    entries = content["images"]
    names = (e.get("file_name") for e in entries if isinstance(e, dict))
    reading = Reading(
        spec, images or find_images(path, names), "{file}: images[{entry}]", [str(path)]
    )
    declared = read_categories(reading, path, content)
    for i, entry in enumerate(entries):
        place = f"{path}: images[{i}]"
        if not isinstance(entry, dict):
            reading.complain("entry", place, f"{short(entry)} is no object")
            continue
        name, size = entry.get("file_name"), get_size(entry)
        if size is None:
            reading.complain("entry", place, size_fault(entry))
        if isinstance(name, str) and name in reading.images:
            row = reading.images[name]
            if size is not None and size != reading.sizes[row]:
                text = f"another width or height than an earlier entry of {short(name)} has"
                reading.complain("size", place, text, name)
        elif (path_inside := reading.check_path(place, name)) is None:
            continue
        else:
            row = reading.add_image(str(name), path_inside, *(size or (0, 0)))
        corners = [entry.get(key) for key in CORNERS]
        if all(value is None for value in [*corners, entry.get("category_id")]):
            continue
        category_id = get_id(entry, "category_id")
        if not are_numbers(corners, 4):
            text = f"xmin, ymin, xmax, ymax {short(corners)}: give 4 finite numbers"
            reading.complain("entry", place, text)
        elif category_id is None:
            text = f"category_id {short(entry.get('category_id'))}: give a number or text"
            reading.complain("entry", place, text)
        else:
            reading.check_category(place, category_id, declared)
            reading.add_box(row, reading.category(category_id), from_corners(corners), i)
    return reading
