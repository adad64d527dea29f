"""A page of all alarms: when, where, who, and whether a person says that they were false.

One file that needs nothing from elsewhere: pictures are in it, and so are clips as long as they are
few; others are looked for beside it. What a person marks is exported for `feedback.py`.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vision_jax.data.decode import decode_image, read_image_file
from vision_jax.errors import UserError, printable
from vision_jax.files import parse_json, read_bytes, write_whole
from vision_jax.pages import read_template
from vision_jax.video import clips, events
from vision_jax.video.lines import whole_lines, writing
from vision_jax.video.rules import Rules

PAGE = "index.html"
_TEMPLATE = Path(__file__).with_name("page.html")
MAX_CARDS = 300  # alarms with pictures; the last ones. Of all others there is the timeline.
MAX_ALARMS = 20_000
MAX_CLIP_BYTES = 24 * 2**20  # in the page, together
LARGEST = 640  # pixels of a still's longer side
QUALITY = 80  # of WebP
LIKE = 0.3  # least IoU of a track's estimate with its box in that frame


def read_events(out: Path) -> list[dict[str, Any]]:
    """The whole lines of OUT/events.jsonl.

    Raises:
      UserError: there is no such file, or a line isn't one of an event.
    """
    path = out / events.EVENTS
    found = []
    for number, line, _ in whole_lines(path):
        record = parse_json(line, f"{path}: line {number}")
        try:
            found.append(_event(record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: line {number} is no event: write the file again with --replay"
            ) from error
    return found


def _event(record: Any) -> dict[str, Any]:
    """A line of events.jsonl, checked; raises what Python does if it isn't one."""
    kind = record["event"]
    texts = {"watch": ("source", "rules", "start"), "start": ("rule",), "end": ("rule",)}
    wholes = {
        "start": ("number", "frame"),
        "end": ("number", "frame"),
        "finish": ("frame", "frames"),
    }
    if kind not in ("watch", *wholes):
        raise ValueError(kind)
    checks = [isinstance(record[name], str) for name in texts.get(kind, ())]
    checks += [isinstance(record.get(name, ""), str) for name in ("zone", "line", "clock")]
    checks += [_is_whole(record[name]) for name in wholes.get(kind, ())]
    checks += [_is_number(record["time"])] if kind != "watch" else []
    if kind == "start":
        checks.append(record["score"] is None or _is_number(record["score"]))
        for one in record["tracks"]:
            box = one["box_xyxy_px"]
            checks += [_is_whole(one["id"]), isinstance(one["class"], str), len(box) == 4]
            checks += map(_is_number, box)
    elif kind == "end":
        checks.append(isinstance(record["cut"], bool))
    if not all(checks):
        raise ValueError
    return dict(record)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def alarms_of(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Alarms, by number: what their starts say, their `end` in seconds, `open` if they were cut.

    An alarm of a log that was cut ends with the last event.
    """
    last = max((one["time"] for one in found if "time" in one), default=0.0)
    alarms = {
        one["number"]: {**one, "end": last, "open": True}
        for one in found
        if one["event"] == "start"
    }
    for one in found:
        if one["event"] == "end" and one["number"] in alarms:
            alarms[one["number"]] |= {"end": one["time"], "open": one["cut"]}
    return [alarms[number] for number in sorted(alarms)]


def boxes_at(out: Path, frames: set[int]) -> dict[int, events.Logged]:
    """What was found in some frames of a log."""
    return {one.frame: one for one in events.read_frames(out) if one.frame in frames}


def write_page(out: Path, rules: Rules) -> Path:
    """Writes OUT/index.html of what is in the folder.

    Args:
      out: with a log, and stills and clips where there are some.
      rules: those of the log, of `rules.check`.

    Raises:
      UserError: there is no log, or it isn't one.
    """
    head = events.read_head(out)
    found = read_events(out)
    alarms = alarms_of(found)[-MAX_ALARMS:]
    shown = {alarm["number"] for alarm in alarms[-MAX_CARDS:]}
    boxes = boxes_at(out, {alarm["frame"] for alarm in alarms if alarm["number"] in shown})
    left = MAX_CLIP_BYTES
    for alarm in alarms:
        alarm["shown"] = alarm["number"] in shown
        if alarm["shown"]:
            alarm["found"] = _found(boxes.get(alarm["frame"]), alarm, rules)
            alarm["still"] = _still(out / clips.still_name(alarm["number"]))
            alarm["clip"], left = _clip(out, alarm["number"], left)
    end = next((one for one in reversed(found) if one["event"] == "finish"), None)
    last = max((one["time"] for one in found if "time" in one), default=0.0)
    about = f"{len(alarms)} alarms" if len(alarms) != 1 else "1 alarm"
    if end:
        about += f" in {end['frames']} frames, {end['time']:.1f} seconds"
    if len(shown) < len(alarms):
        about += f"; pictures of the last {len(shown)}"
    first = next((alarm["still"] for alarm in alarms if alarm.get("still")), "")
    content = {
        "source": printable(head.source),
        "key": key_of(found),
        "size": rules.size,
        "about": about,
        "seconds": end["time"] if end else last,
        "rules": [rule.name for rule in rules.rules],
        "zones": [{"name": z.name, "polygon": z.polygon} for z in rules.zones.values()],
        "lines": [
            {"name": one.name, "from": one.start, "to": one.end} for one in rules.lines.values()
        ],
        "scene": first,
        "alarms": alarms,
    }
    with writing(out):
        write_whole(fill(read_template(_TEMPLATE), content).encode(), out / PAGE)
    return out / PAGE


def fill(template: str, content: Mapping[str, Any]) -> str:
    """The page; nothing in the content can end the element that holds it."""
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    return template.replace("{{data}}", text)


def key_of(found: Sequence[Mapping[str, Any]]) -> str:
    """What a log is called in a browser's storage and in exported marks."""
    first = next((one for one in found if one["event"] == "watch"), {})
    return f"{first.get('source', '')} {first.get('rules', '')} {first.get('start', '')}".strip()


def _found(
    logged: events.Logged | None, alarm: Mapping[str, Any], rules: Rules
) -> list[dict[str, Any]]:
    """Boxes of an alarm's frame that are high enough, or the alarm's: {box, class, score, ...}.

    `place` is that in the frame's line, `alarm` whether a track of the alarm took it.
    """
    if logged is None:
        return []
    taken = set()
    for track in alarm["tracks"]:
        overlap = _iou(np.array(track["box_xyxy_px"]), logged.boxes_xyxy_px)
        named = [rules.class_names[label] == track["class"] for label in logged.labels]
        overlap = np.where(named, overlap, 0)
        if len(overlap) and overlap.max() >= LIKE:
            taken.add(int(overlap.argmax()))
    return [
        {
            "box": logged.boxes_xyxy_px[i].tolist(),
            "class": rules.class_names[logged.labels[i]],
            "score": float(logged.scores[i]),
            "place": i,
            "alarm": i in taken,
        }
        for i in range(len(logged.scores))
        if i in taken or logged.scores[i] >= rules.tracking.high
    ]


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """f[N] of a box f[4] with others f[N, 4], all xyxy."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    both = np.maximum(high - low, 0).prod(-1)
    areas = np.maximum(others[:, 2:] - others[:, :2], 0).prod(-1) + (box[2:] - box[:2]).prod()
    return both / np.maximum(areas - both, 1e-9)


def _still(path: Path) -> str:
    """A picture as an address that holds it; "" if there is none."""
    if not path.is_file():
        return ""
    name = str(path)
    picture = Image.fromarray(decode_image(read_image_file(name), name=name))
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _clip(out: Path, number: int, left: int) -> tuple[str, int]:
    """(an address that holds the clip while `left` bytes suffice, or its path; what is left)."""
    path = out / clips.clip_name(number)
    if not path.is_file():
        return "", left
    size = path.stat().st_size
    if size > left:
        return clips.clip_name(number), left
    return f"data:video/mp4;base64,{base64.b64encode(read_bytes(path, left)).decode()}", left - size
