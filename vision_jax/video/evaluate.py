"""How good tracks and alarms are, beside what a person says.

Tracks: MOTA, IDF1 and HOTA of `trackers`, whose code keeps to TrackEval's, on truth in the format
of MOTChallenge. Alarms: how many are right, how many of the true ones are found, and how late, on a
file of true intervals.
"""

import csv
import io
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from vision_jax.errors import UserError, nearest
from vision_jax.files import read_text
from vision_jax.video import events
from vision_jax.video.lines import writing
from vision_jax.video.rules import Rules
from vision_jax.video.track import Track

MAX_BYTES = 200_000_000  # of a file of truth
MAX_BOXES = 10_000  # of a frame
MAX_NUMBER = 10**12  # of a frame or an id
IOU = 0.5  # least of a pair for MOTA and IDF1; HOTA takes 0.05 to 0.95
PEDESTRIAN = 1  # MOTChallenge's class that counts
DISTRACTORS = (2, 7, 8, 12)  # person on vehicle, static person, distractor, reflection


class Boxes(NamedTuple):
    """Of one frame.

    Attributes:
      ids: i64[N], distinct.
      boxes_xyxy_px: f64[N, 4].
    """

    ids: np.ndarray
    boxes_xyxy_px: np.ndarray


class Others(NamedTuple):
    """Boxes of one frame of a truth that are not to be found.

    Attributes:
      boxes_xyxy_px: f64[N, 4].
      distractors: bool[N], which of them are such that finding them is no fault.
    """

    boxes_xyxy_px: np.ndarray
    distractors: np.ndarray


class Truth(NamedTuple):
    """A file of truth, by frame from 0.

    Attributes:
      boxes: that are to be found.
      others: that are not.
    """

    boxes: dict[int, Boxes]
    others: dict[int, Others]


class Interval(NamedTuple):
    """In which a rule is true.

    Attributes:
      rule: its name.
      start, end: seconds since the first frame.
    """

    rule: str
    start: float
    end: float


NOBODY = Boxes(np.zeros(0, np.int64), np.zeros((0, 4)))


def read_mot(path: Path) -> Truth:
    """A file of MOTChallenge: rows of frame, id, left, top, width, height, and maybe confidence and
    class; frames are counted from 1.

    As TrackEval has it, rows are to be found whose confidence isn't 0 and whose class is 1, or, as
    in files of 2015 and of tracks, isn't there or is -1. (For MOT20 it takes class 6 for
    distractors, too, but files don't say what they are of.)

    Raises:
      UserError: a row that is none, or two boxes of one id in a frame.
    """
    rows: dict[int, dict[int, tuple[float, ...]]] = {}
    others: dict[int, list[tuple[tuple[float, ...], bool]]] = {}
    for number, row in _rows_of(path):
        if not row:
            continue
        where = f"{path}: line {number}"
        try:
            frame, own = (int(float(one)) for one in row[:2])
            box = tuple(float(one) for one in row[2:6])
            of = float(row[7]) if len(row) > 7 else -1.0
            counts = (len(row) < 7 or float(row[6]) != 0) and of in (-1, PEDESTRIAN)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{where} has no frame,id,left,top,width,height") from error
        if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0 or frame < 1:
            raise UserError(f"{where} has no frame from 1 on, or no box with an area")
        if max(frame, abs(own)) > MAX_NUMBER:
            raise UserError(f"{where}: frame {frame:g}, id {own:g}: {MAX_NUMBER} at most")
        if not of.is_integer():
            raise UserError(
                f"{where}: its eighth column is {row[7]} and no class: give a file of boxes, not of"
                " places in 3D"
            )
        there, beside = rows.setdefault(frame - 1, {}), others.setdefault(frame - 1, [])
        if counts and own in there:
            raise UserError(f"{where}: a second box of {own} in frame {frame}")
        if len(there) + len(beside) >= MAX_BOXES:
            raise UserError(f"{where}: more than {MAX_BOXES} boxes in frame {frame}")
        left, top, width, height = box
        corners = (left, top, left + width, top + height)
        if counts:
            there[own] = corners
        else:
            beside.append((corners, of in DISTRACTORS))
    if not any(rows.values()):
        raise UserError(f"{path} has no boxes of class {PEDESTRIAN} whose confidence isn't 0")
    return Truth(
        {
            frame: Boxes(np.array(list(own), np.int64), np.array(list(own.values())))
            for frame, own in rows.items()
            if own
        },
        {
            frame: Others(np.array([box for box, _ in own]), np.array([bad for _, bad in own]))
            for frame, own in others.items()
            if own
        },
    )


def _rows_of(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(its number, the cells of a line) of a CSV.

    Raises:
      UserError: it can't be read, or is none.
    """
    try:
        yield from enumerate(csv.reader(io.StringIO(read_text(path, MAX_BYTES))), 1)
    except csv.Error as error:
        raise UserError(f"{path} is not readable as CSV ({error})") from error


def without_distractors(truth: Truth, found: Mapping[int, Boxes]) -> dict[int, Boxes]:
    """Boxes of tracks but for those on distractors, as MOTChallenge's preprocessing has it.

    In each frame they are assigned to all boxes of the truth, by the largest sum of IoUs of at
    least 0.5; those whose partner is a distractor are neither right nor wrong. TrackEval,
    datasets/mot_challenge_2d_box.py.
    """
    left = dict(found)
    for frame, others in truth.others.items():
        if frame not in found or not others.distractors.any():
            continue
        own, seen_here = truth.boxes.get(frame, NOBODY), found[frame]
        boxes = np.concatenate([own.boxes_xyxy_px, others.boxes_xyxy_px])
        bad = np.concatenate([np.zeros(len(own.ids), bool), others.distractors])
        overlap = pairwise_iou(boxes, seen_here.boxes_xyxy_px)
        overlap[overlap < IOU - np.finfo(float).eps] = 0
        row, column = linear_sum_assignment(-overlap)
        taken = column[bad[row] & (overlap[row, column] > 0)]
        kept = np.delete(np.arange(len(seen_here.ids)), taken)
        left[frame] = Boxes(seen_here.ids[kept], seen_here.boxes_xyxy_px[kept])
    return left


def write_mot(frames: Iterable[tuple[int, Sequence[Track]]], path: Path) -> None:
    """Tracks that are seen, as a file of MOTChallenge's format, which other programs take too."""
    with writing(path.parent), path.open("w", encoding="ascii") as file:
        for frame, tracks in frames:
            for one in tracks:
                left, top, right, bottom = one.box_xyxy_px
                if one.unseen == 0:
                    file.write(
                        f"{frame + 1},{one.id},{left:.2f},{top:.2f},{right - left:.2f},"
                        f"{bottom - top:.2f},{one.score:.4f},-1,-1,-1\n"
                    )


def tracks_of(out: Path, rules: Rules) -> Iterator[tuple[int, list[Track]]]:
    """(frame, tracks) of a log, by the rules' settings of tracking."""
    progress = events.begin()
    for logged in events.read_frames(out):
        progress, tracks, _ = events.step(rules, progress, logged)
        yield logged.frame, tracks


def seen(frames: Iterable[tuple[int, Sequence[Track]]], labels: Sequence[int]) -> dict[int, Boxes]:
    """Tracks that have a box, of some classes, by frame."""
    found = {}
    for frame, tracks in frames:
        own = [one for one in tracks if one.unseen == 0 and one.label in labels]
        boxes = np.array([one.box_xyxy_px for one in own]).reshape(-1, 4)
        found[frame] = Boxes(np.array([one.id for one in own], np.int64), boxes)
    return found


def pairwise_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """f64[N, M] of f64[N, 4] and f64[M, 4]; see `ops.boxes`, which is for the device."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = np.maximum(high - low, 0).prod(-1)
    areas = [(one[:, 2:] - one[:, :2]).prod(-1) for one in (boxes, others)]
    return both / (areas[0][:, None] + areas[1][None] - both)


def tracking_figures(truth: Mapping[int, Boxes], found: Mapping[int, Boxes]) -> dict[str, Any]:
    """MOTA, IDF1, HOTA and what they are made of, over the frames of `found`.

    Args:
      truth: by frame; frames that were not looked at don't count.
      found: by frame; with an entry for each frame that was looked at.

    Raises:
      UserError: `trackers` isn't installed; no frame has truth.
    """
    try:
        from trackers import eval as figures
    except ImportError as error:
        raise UserError(
            "tracks are measured by the package trackers: pip install 'vision_jax[tracking]'"
        ) from error
    frames = sorted(found)
    pairs = [(truth.get(frame, NOBODY), found[frame]) for frame in frames]
    if not any(len(true.ids) for true, _ in pairs):
        raise UserError("the truth has no box in any frame that was looked at")
    true_ids, found_ids = [one.ids for one, _ in pairs], [one.ids for _, one in pairs]
    overlaps = [pairwise_iou(t.boxes_xyxy_px, f.boxes_xyxy_px) for t, f in pairs]
    clear = figures.compute_clear_metrics(true_ids, found_ids, overlaps, IOU)
    identity = figures.compute_identity_metrics(true_ids, found_ids, overlaps, IOU)
    hota = figures.compute_hota_metrics(true_ids, found_ids, overlaps)
    return {
        "frames": len(frames),
        "mota": clear["MOTA"],
        "motp": clear["MOTP"],
        "recall": clear["CLR_Re"],
        "precision": clear["CLR_Pr"],
        "switches": int(clear["IDSW"]),
        "idf1": identity["IDF1"],
        "hota": hota["HOTA"],
        "deta": hota["DetA"],
        "assa": hota["AssA"],
    }


def read_intervals(path: Path, rule_names: Sequence[str]) -> list[Interval]:
    """A CSV with the columns rule, start and end: seconds since the first frame.

    Raises:
      UserError: another head, a rule that there isn't, or no interval of time.
    """
    rows = _rows_of(path)
    _, head = next(rows, (1, []))
    if not {"rule", "start", "end"} <= set(head):
        raise UserError(f"{path}: its first line is not rule,start,end")
    found = []
    for number, cells in rows:
        if not cells:
            continue
        row = dict(itertools.zip_longest(head, cells[: len(head)], fillvalue=""))
        where = f"{path}: line {number}"
        name = row["rule"]
        if name not in rule_names:
            raise UserError(f"{where}: there is no rule `{name}`{nearest(name, rule_names)}")
        try:
            start, end = float(row["start"]), float(row["end"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: `start` and `end` are seconds") from error
        if not 0 <= start <= end < math.inf:
            raise UserError(f"{where}: {start:g} to {end:g} is no time of the source")
        found.append(Interval(name, start, end))
    return sorted(found, key=lambda one: (one.rule, one.start, one.end))


def _end(interval: Interval) -> float:
    return interval.end


def alarm_figures(
    true: Sequence[Interval],
    alarms: Sequence[tuple[str, float]],
    rule_names: Sequence[str],
    seconds: float,
    tolerance: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """Precision, recall and delay of each rule's alarms, and of all under "all".

    An alarm is right if it begins in a true interval of its rule, or at most `tolerance` seconds
    beside it. Of several alarms in one interval the first is right, and the others are repeats,
    which count as false: a person is called twice. Where intervals overlap, an alarm is of the one
    that ends first, so that as many are right as can be.

    Args:
      true: intervals.
      alarms: (rule, seconds at which it began).
      rule_names: in the order of the result.
      seconds: how long the source is.
      tolerance: see above.

    Returns:
      {rule: {true, found, alarms, right, repeats, precision, recall, delay_median, delay_max,
      false_per_hour}}; what has nothing to be measured on is None.
    """
    counts: dict[str, dict[str, Any]] = {}
    delays: dict[str, list[float]] = {}
    for name in rule_names:
        own = sorted(one for one in true if one.rule == name)
        begun = sorted(start for rule, start in alarms if rule == name)
        delays[name], repeats = [], 0
        open_now = list(own)
        for start in begun:
            near = [one for one in own if one.start - tolerance <= start <= one.end + tolerance]
            new = min((one for one in near if one in open_now), key=_end, default=None)
            if new:
                open_now.remove(new)
                delays[name].append(start - new.start)
            else:
                repeats += bool(near)
        counts[name] = {"true": len(own), "alarms": len(begun), "repeats": repeats}
    delays["all"] = [delay for name in rule_names for delay in delays[name]]
    counts["all"] = {
        key: sum(counts[name][key] for name in rule_names) for key in ("true", "alarms", "repeats")
    }
    for name, count in counts.items():
        right = len(delays[name])
        count["right"] = right
        count["precision"] = right / count["alarms"] if count["alarms"] else None
        count["recall"] = right / count["true"] if count["true"] else None
        count["delay_median"] = statistics.median(delays[name]) if right else None
        count["delay_max"] = max(delays[name]) if right else None
        count["false_per_hour"] = (
            (count["alarms"] - right) * 3600 / seconds if seconds > 0 else None
        )
    return counts
