"""What a person marked on the page, as a data set to fine-tune the detector on.

    OUT/annotations.json   COCO's format: the boxes that are left, by all classes of the detector
    OUT/images/000001.jpg  the frame of alarm 1

The frame of a false alarm without any box is a negative example, and the most telling one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_jax.errors import UserError
from vision_jax.files import read_bytes, read_json, write_whole
from vision_jax.video import clips, events
from vision_jax.video.lines import writing
from vision_jax.video.page import alarms_of, boxes_at, key_of, read_events
from vision_jax.video.rules import Rules

ANNOTATIONS, IMAGES = "annotations.json", "images"
MAX_STILL = 64 * 2**20  # bytes
VERSION = 1


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
      path: of the annotations.
      images: how many.
      boxes: how many are left.
      taken_out: boxes that were marked as wrong.
      negatives: images without boxes.
    """

    path: Path
    images: int
    boxes: int
    taken_out: int
    negatives: int


def write_coco(out: Path, marks: Path, to: Path, rules: Rules, least: float | None = None) -> Made:
    """Makes a data set of the alarms that a person judged.

    Args:
      out: the folder of the log, with its stills.
      marks: the file that the page exported.
      to: a folder, made if it isn't there.
      rules: of the log.
      least: score of boxes that are taken for true if nobody marked them; that of the rules'
        tracking by default.

    Raises:
      UserError: no marks, or marks of another log; a still is missing.
    """
    least = rules.tracking.high if least is None else least
    head = events.read_head(out)
    found = read_events(out)
    frames = {alarm["number"]: alarm["frame"] for alarm in alarms_of(found)}
    wrong = _wrong_of(marks, frames, key_of(found))
    first: dict[int, int] = {}  # two alarms of one frame have one picture
    for number in wrong:
        first.setdefault(frames[number], number)
    boxes = boxes_at(out, set(first))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    taken_out = 0
    height, width = head.size
    with writing(to):
        (to / IMAGES).mkdir(parents=True, exist_ok=True)
    for frame, number in sorted(first.items()):
        bad = {place for other in wrong if frames[other] == frame for place in wrong[other]}
        name = f"{number:06d}.jpg"
        picture = read_bytes(out / clips.still_name(number), MAX_STILL)
        with writing(to):
            write_whole(picture, to / IMAGES / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        logged = boxes[frame]
        if any(place >= len(logged.scores) for place in bad):
            raise UserError(f"{marks}: alarm {number} has no box {max(bad)}: it is of another log")
        taken_out += len(bad)
        for place in range(len(logged.scores)):
            if place in bad or logged.scores[place] < least:
                continue
            left, top, right, bottom = logged.boxes_xyxy_px[place].tolist()
            sides = round(right - left, 2), round(bottom - top, 2)
            if min(sides) <= 0:
                continue
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": int(logged.labels[place]) + 1,
                "bbox": [left, top, *sides],
                "area": round(sides[0] * sides[1], 2),
                "iscrowd": 0,
            })  # fmt: skip
    content = {
        "info": {"description": f"alarms of {head.source} that a person judged"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(head.class_names, 1)],
    }
    with writing(to):
        write_whole(json.dumps(content, indent=1).encode(), to / ANNOTATIONS)
    with_boxes = {one["image_id"] for one in annotations}
    return Made(
        to / ANNOTATIONS,
        len(images),
        len(annotations),
        taken_out,
        sum(one["id"] not in with_boxes for one in images),
    )


def _wrong_of(path: Path, frames: Mapping[int, int], key: str) -> dict[int, list[int]]:
    """{alarm: places of the boxes that are wrong} of all that were judged."""
    content: Any = read_json(path)
    try:
        if content["version"] != VERSION:
            raise UserError(
                f"{path} has version {content['version']}: this program reads {VERSION}"
            )
        if content["key"] != key:
            raise UserError(
                f"{path} is of the log `{content['key']}`, and not of this one, `{key}`:"
                " export the marks of this folder's page"
            )
        wrong: dict[int, list[int]] = {}
        for one in content["alarms"]:
            number, places = one["number"], one["wrong"]
            sound = all(isinstance(p, int) and not isinstance(p, bool) and p >= 0 for p in places)
            if one["verdict"] not in ("true", "false") or not sound:
                raise ValueError
            if frames.get(number) != one["frame"]:
                raise UserError(f"{path}: there is no alarm {number} in frame {one['frame']} here")
            wrong[number] = places
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} has no marks of the page: export them there") from error
    if not wrong:
        raise UserError(f"{path} has no alarm that was judged: mark some on the page")
    return wrong
