"""Boxes of a tfds data set, prepared as array_record."""

from pathlib import Path

import numpy as np

from vision_jax.data.annotation_formats.reading import Reading
from vision_jax.data.annotation_formats.values import are_numbers, from_corners
from vision_jax.data.decode import DamagedImageError, read_header
from vision_jax.data.sources import TfdsReader, open_tfds
from vision_jax.errors import UserError


def read_tfds(spec: str) -> Reading:
    """Boxes and image headers in one pass over the records; pixels are not decoded."""
    import tensorflow_datasets as tfds

    features, records = open_tfds(spec)
    objects = features.get("objects")
    inner = getattr(objects, "feature", None)  # of a Sequence
    inner = dict(inner.items()) if isinstance(inner, tfds.features.FeaturesDict) else {}
    if (
        not isinstance(features.get("image"), tfds.features.Image)
        or not isinstance(inner.get("bbox"), tfds.features.BBoxFeature)
        or not isinstance(inner.get("label"), tfds.features.ClassLabel)
    ):
        raise UserError(
            f"{spec}: needs the features `image` and `objects`, a sequence of `bbox` and `label`;"
            f" it has {', '.join(features)}"
        )
    reading = Reading(spec, Path(), "{file}: objects[{entry}]")
    for i, name in enumerate(inner["label"].names):
        reading.category(i, name)
    reading.records = reader = TfdsReader(spec, records)
    for row in range(len(records)):
        record, place = records[row], reader.example_name(row)
        reading.files.append(place)
        try:
            height, width = read_header(record["image"], name=place).upright_size
        except DamagedImageError as error:
            reading.complain("unreadable", place, str(error).removeprefix(f"{place}: "), place)
            height, width = 0, 0
        image_id: int | str = int(record["image/id"]) if "image/id" in features else row
        if image_id in reading.images:
            reading.complain("id", place, f"image/id {image_id} is given twice", image_id)
            image_id = f"row {row}"
        reading.add_image(image_id, place, height, width)
        found = record["objects"]
        shares = np.asarray(found["bbox"], np.float64).reshape(-1, 4)
        boxes = shares[:, [1, 0, 3, 2]] * (width, height, width, height)
        for i, box in enumerate(boxes.tolist()):
            label = int(found["label"][i])
            if not are_numbers(box, 4) or label < 0:
                reading.complain("entry", f"{place}: objects[{i}]", "bbox or label is not given")
                continue
            crowd = bool(found["is_crowd"][i]) if "is_crowd" in found else False
            area = float(found["area"][i]) if "area" in found else None
            reading.add_box(row, label, from_corners(box), i, area, crowd)
    return reading
