"""Identities of boxes over time: a Kalman filter and two rounds of association.

As SORT (Bewley et al. 2016, https://arxiv.org/abs/1602.00763) and ByteTrack (Zhang et al. 2021,
https://arxiv.org/abs/2110.06864): tracks are predicted, boxes of high scores are assigned to them,
then what is left of the tracks takes boxes of low scores. What differs, and why:

- Time is that of presentation and not a count of frames, so that rates may vary and frames be
  skipped: the noise is that of a white acceleration, of which two steps are one long step.
- Boxes are [cx, cy, w, h], each with a velocity of its own. The four are independent, so that the
  filter's 8 x 8 matrices are four of 2 x 2, written out: no inverse, no order of sums to depend on.
- A box's distance from a prediction is measured in the filter's doubt, within a gate, as DeepSORT
  does (https://arxiv.org/abs/1703.07402), and not by their overlap: at few frames a second a
  person's boxes don't overlap from one frame to the next.
- A box that is too far from where a track can be is never joined to it, however long the track was
  hidden: `jump` bounds what the filter's growing doubt allows.

NumPy in float64 on the CPU: of ten boxes a step takes less time than a compiled program's start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy.optimize import linear_sum_assignment

GATE = 13.277  # the 99th percentile of chi-squared with 4 degrees of freedom

LONG_LOST = 10  # times lost_seconds: then a track ends however few frames there were


class Found(Protocol):
    """What a detector found in a frame; see `video.detect.Detections`."""

    @property
    def boxes_xyxy_px(self) -> np.ndarray:
        """f[N, 4]."""

    @property
    def scores(self) -> np.ndarray:
        """f[N]."""

    @property
    def labels(self) -> np.ndarray:
        """i[N]."""


@dataclass(frozen=True)
class Settings:
    """How tracks come, go on and end. Sizes are the roots of boxes' areas.

    Attributes:
      high: least score of a box that is assigned first, and that can begin a track.
      low: least score of a box that can go on with a track.
      confirm: boxes that a track needs, one in each frame, before it is given out.
      lost_seconds: after so long unseen a track ends ...
      lost_frames: ... if it was unseen in more frames than that, too.
      jump: farthest that a box may lie from a prediction, in sizes of the track.
      growth: most that a box's size may differ from a prediction's, as a factor.
      position: standard deviation of a detector's boxes, in sizes.
      speed: standard deviation of a new track's velocity, in sizes a second.
      acceleration: of the white noise that drives velocities, in sizes / s^1.5.
    """

    high: float = 0.4
    low: float = 0.1
    confirm: int = 3
    lost_seconds: float = 2.0
    lost_frames: int = 10
    jump: float = 1.5
    growth: float = 2.0
    position: float = 0.08
    speed: float = 1.0
    acceleration: float = 0.6


class State(NamedTuple):
    """Of N tracks, confirmed or not. Arrays are never changed in place.

    Attributes:
      time: seconds, of the last frame; None before the first.
      next_id: of the next track to be confirmed.
      ids: i64[N]; 0 if not confirmed.
      labels: i64[N].
      scores: f64[N], of each track's last box.
      born: f64[N], seconds of its first box.
      seen: f64[N], seconds of its last box.
      missed: i64[N], frames since then.
      hits: i64[N], boxes of it.
      size: f64[N], pixels, of its last box: the unit of its noise.
      mean: f64[N, 4], cxcywh in pixels.
      velocity: f64[N, 4], pixels a second.
      var: f64[N, 4], variance of the mean.
      cov: f64[N, 4], its covariance with the velocity.
      var_velocity: f64[N, 4].
    """

    time: Fraction | None
    next_id: int
    ids: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    born: np.ndarray
    seen: np.ndarray
    missed: np.ndarray
    hits: np.ndarray
    size: np.ndarray
    mean: np.ndarray
    velocity: np.ndarray
    var: np.ndarray
    cov: np.ndarray
    var_velocity: np.ndarray


PER_TRACK = State._fields[2:]


class Track(NamedTuple):
    """A confirmed track in a frame.

    Attributes:
      id: from 1 on, in the order in which tracks were confirmed.
      box_xyxy_px: the filter's estimate, not clipped to the frame.
      label: its class.
      score: of its last box.
      age: seconds since its first box.
      unseen: seconds since its last box; 0 where this frame has one.
      velocity_px: (x, y) of its center, pixels a second.
    """

    id: int
    box_xyxy_px: tuple[float, float, float, float]
    label: int
    score: float
    age: float
    unseen: float
    velocity_px: tuple[float, float]


def init() -> State:
    """No tracks."""
    whole, one, four = np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 4))
    return State(
        None, 1, whole, whole, one, one, one, whole, whole, one, four, four, four, four, four
    )


def update(
    state: State, found: Found, time: Fraction, settings: Settings = Settings()
) -> tuple[State, list[Track]]:
    """One frame: predicts all tracks, gives them boxes, begins and ends some.

    Args:
      state: of the frame before.
      found: in this frame. Boxes that are not finite or have no area are left out.
      time: seconds of this frame. Where a clock jumps back, no time has passed.
      settings: see there.

    Returns:
      (state, confirmed tracks by id; those that this frame hides are predictions).
    """
    now = float(time)
    state = predict(state, elapsed(state, time), settings)._replace(time=time)
    measured, scores, labels = _sound(found, settings.low)
    tracks, boxes = _associate(state, measured, scores, labels, settings)
    hit = np.zeros(len(state.ids), bool)
    hit[tracks] = True
    state = correct(state, tracks, measured[boxes], settings)
    state = state._replace(
        scores=_with(state.scores, tracks, scores[boxes]),
        seen=_with(state.seen, tracks, now),
        hits=_with(state.hits, tracks, state.hits[tracks] + 1),
        missed=np.where(hit, 0, state.missed + 1),
    )
    state = _end(state, hit, now, settings)
    rest = scores >= settings.high
    rest[boxes] = False
    state = _begin(state, measured[rest], scores[rest], labels[rest], now, settings)
    state = _confirm(state, settings.confirm)
    return state, _tracks(state, now)


def elapsed(state: State, time: Fraction) -> float:
    """Seconds since the frame before, 0 at the first and where a clock jumps back."""
    return 0.0 if state.time is None else max(float(time - state.time), 0.0)


def predict(state: State, seconds: float, settings: Settings) -> State:
    """Constant velocities under a white acceleration: two steps are one of their sum."""
    q = (settings.acceleration * state.size[:, None]) ** 2
    return state._replace(
        mean=state.mean + seconds * state.velocity,
        var=state.var
        + 2 * seconds * state.cov
        + seconds**2 * state.var_velocity
        + q * seconds**3 / 3,
        cov=state.cov + seconds * state.var_velocity + q * seconds**2 / 2,
        var_velocity=state.var_velocity + q * seconds,
    )


def correct(state: State, tracks: np.ndarray, boxes: np.ndarray, settings: Settings) -> State:
    """The filter's update of some tracks i[M] by boxes f[M, 4], cxcywh."""
    noise = (settings.position * state.size[tracks, None]) ** 2
    var, cov = state.var[tracks], state.cov[tracks]
    total = var + noise
    off = boxes - state.mean[tracks]
    return state._replace(
        mean=_with(state.mean, tracks, state.mean[tracks] + var / total * off),
        velocity=_with(state.velocity, tracks, state.velocity[tracks] + cov / total * off),
        var=_with(state.var, tracks, var * noise / total),
        cov=_with(state.cov, tracks, cov * noise / total),
        var_velocity=_with(state.var_velocity, tracks, state.var_velocity[tracks] - cov**2 / total),
        size=_with(state.size, tracks, np.sqrt(boxes[:, 2] * boxes[:, 3])),
    )


def distances(
    state: State, boxes: np.ndarray, labels: np.ndarray, settings: Settings
) -> np.ndarray:
    """f[N, M]: squared Mahalanobis distances of boxes f[M, 4] from tracks' predictions.

    Infinite for pairs of different classes, farther than `jump`, or of other sizes than `growth`
    allows.
    """
    total = state.var + (settings.position * state.size[:, None]) ** 2  # [N, 4]
    off = boxes[None] - state.mean[:, None]  # [N, M, 4]
    far = np.hypot(off[..., 0], off[..., 1]) > settings.jump * state.size[:, None]
    ratio = np.sqrt(boxes[:, 2] * boxes[:, 3])[None] / state.size[:, None]
    grown = (ratio > settings.growth) | (ratio * settings.growth < 1)
    other = state.labels[:, None] != labels[None]
    return np.where(other | far | grown, np.inf, (off**2 / total[:, None]).sum(-1))


def assign(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of f[N, M] of which GATE - distance sums to the most: (i[K], i[K]), by row.

    A pair is worth what it lies within the gate, so that a track rather stays without a box than
    that two tracks take each other's.

    Examples:
      >>> assign(np.array([[1.0, 9.0], [np.inf, 3.0]]))[1].tolist()
      [0, 1]
      >>> assign(np.array([[9.0, np.inf], [1.0, 9.0]]))[0].tolist()  # 1 keeps its box
      [1]
    """
    worth = np.maximum(GATE - distance, 0.0)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    inside = worth[rows, columns] > 0
    return rows[inside], columns[inside]


def _associate(
    state: State, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """(tracks i[K], their boxes i[K]), in rounds; nobody takes what an earlier round gave away.

    Tracks of the frame before take high boxes, then those that were hidden, whose doubt is wide
    enough to take another's; then both take low boxes; new tracks come last, and take high ones.
    """
    distance = distances(state, boxes, labels, settings)
    high, confirmed, hidden = scores >= settings.high, state.ids > 0, state.missed > 0
    rounds = (
        (confirmed & ~hidden, high),
        (confirmed & hidden, high),
        (confirmed, ~high),
        (~confirmed, high),
    )
    taken = np.full(len(state.ids), -1)  # box of each track
    free = np.ones(len(boxes), bool)
    for of_tracks, of_boxes in rounds:
        rows = np.flatnonzero(of_tracks & (taken < 0))
        columns = np.flatnonzero(of_boxes & free)
        if len(rows) and len(columns):
            i, j = assign(distance[np.ix_(rows, columns)])
            taken[rows[i]] = columns[j]
            free[columns[j]] = False
    tracks = np.flatnonzero(taken >= 0)
    return tracks, taken[tracks]


def _sound(found: Found, low: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cxcywh f64[M, 4], scores f64[M], labels i64[M]) of the boxes that can be used."""
    boxes = np.asarray(found.boxes_xyxy_px, np.float64).reshape(-1, 4)
    scores = np.asarray(found.scores, np.float64)
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = np.isfinite(boxes).all(-1) & (sides > 0).all(-1) & (scores >= low)
    boxes, sides = boxes[keep], sides[keep]
    centers = boxes[:, :2] + sides / 2
    return np.hstack([centers, sides]), scores[keep], np.asarray(found.labels, np.int64)[keep]


def _end(state: State, hit: np.ndarray, now: float, settings: Settings) -> State:
    """Without the tracks that have been unseen for too long; new ones may miss no frame."""
    unseen = now - state.seen
    lost = (unseen > settings.lost_seconds) & (state.missed > settings.lost_frames)
    lost |= unseen > LONG_LOST * settings.lost_seconds  # where a clock jumps
    return _take(state, np.where(state.ids > 0, ~lost, hit))


def _begin(
    state: State,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    now: float,
    settings: Settings,
) -> State:
    """With a new track, not confirmed, for each box."""
    count = len(boxes)
    size = np.sqrt(boxes[:, 2] * boxes[:, 3])
    unit = np.repeat(size[:, None], 4, axis=1)
    none = np.zeros(count, np.int64)
    new = State(
        state.time,
        state.next_id,
        ids=none,
        labels=labels,
        scores=scores,
        born=np.full(count, now),
        seen=np.full(count, now),
        missed=none,
        hits=none + 1,
        size=size,
        mean=boxes,
        velocity=np.zeros((count, 4)),
        var=(settings.position * unit) ** 2,
        cov=np.zeros((count, 4)),
        # A thing moves faster than its size changes.
        var_velocity=(settings.speed * unit * np.array([1, 1, 0.3, 0.3])) ** 2,
    )
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(state, name), getattr(new, name)]) for name in PER_TRACK
    }
    return state._replace(**joined)


def _confirm(state: State, boxes: int) -> State:
    """With ids for new tracks that have enough boxes."""
    ready = np.flatnonzero((state.ids == 0) & (state.hits >= boxes))
    ids = _with(state.ids, ready, state.next_id + np.arange(len(ready)))
    return state._replace(ids=ids, next_id=state.next_id + len(ready))


def _tracks(state: State, now: float) -> list[Track]:
    half = np.maximum(state.mean[:, 2:], 0.1 * state.size[:, None]) / 2  # one that shrinks unseen
    corners = np.hstack([state.mean[:, :2] - half, state.mean[:, :2] + half]).tolist()
    order: Sequence[int] = np.argsort(state.ids, kind="stable").tolist()
    return [
        Track(
            id=int(state.ids[i]),
            box_xyxy_px=tuple(corners[i]),
            label=int(state.labels[i]),
            score=float(state.scores[i]),
            age=now - float(state.born[i]),
            unseen=now - float(state.seen[i]),
            velocity_px=(float(state.velocity[i, 0]), float(state.velocity[i, 1])),
        )
        for i in order
        if state.ids[i] > 0
    ]


def _with(array: np.ndarray, places: np.ndarray, values: np.ndarray | float) -> np.ndarray:
    """A copy with other values at some places."""
    array = array.copy()
    array[places] = values
    return array


def _take(state: State, keep: np.ndarray) -> State:
    kept: dict[str, Any] = {name: getattr(state, name)[keep] for name in PER_TRACK}
    return state._replace(**kept)
