"""Tracks beside ByteTrack's of the package `trackers`, on made-up scenes at several rates.

    python -m benchmarks.tracking

Eight people of 30 x 80 pixels walk at 30 to 80 pixels a second, turn, pass each other, are hidden
for a second now and then and leave. Boxes tremble by 2.5 pixels, 7 % are missing, scores are drawn
around 0.65, and there is a false box in each seventh frame. Both trackers take boxes from 0.4 on
first, and keep who is hidden for two seconds; ours is told the frames' times, theirs the rate. The
scenes say how trackers compare where the truth is known, and nothing about your camera.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from vision_jax.logging import print_table
from vision_jax.video import evaluate, track
from vision_jax.video.evaluate import Boxes

SIZE = np.array([640.0, 470.0])
FIGURES = ("mota", "idf1", "hota", "switches")


class Found(NamedTuple):
    """What a detector would have found in a frame."""

    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def make_scene(
    rng: np.random.Generator, rate: int, seconds: int, people: int = 8
) -> Iterator[tuple[Boxes, Found]]:
    """(truth, what is found) of each frame."""
    place = rng.uniform((0, 150), SIZE, (people, 2))
    angle, speed = rng.uniform(0, 2 * np.pi, people), rng.uniform(30, 80, people)
    ids, hidden = np.arange(people), np.zeros(people)
    for _ in range(rate * seconds):
        angle += rng.normal(0, 0.6 / np.sqrt(rate), people)
        step = np.stack([np.cos(angle), 0.4 * np.sin(angle)], 1) * speed[:, None]
        place = place + step / rate
        for gone in np.flatnonzero((place < (0, 150)).any(1) | (place > SIZE).any(1)):
            place[gone] = rng.uniform((20, 170), SIZE - (20, 10))
            ids[gone] = ids.max() + 1
        hidden = np.where(rng.random(people) < 0.15 / rate, 1.0, hidden - 1 / rate)
        boxes = np.hstack([place - (15, 80), place + np.array([15, 0])])
        kept = (rng.random(people) < 0.93) & (hidden <= 0)
        trembling = boxes + rng.normal(0, 2.5, boxes.shape)
        scores = np.clip(rng.normal(0.65, 0.15, people), 0.11, 0.99)
        false = rng.uniform((0, 150), SIZE, (rng.poisson(0.15), 2))
        false_boxes = np.hstack([false - (15, 80), false + np.array([15, 0])])
        found = Found(
            np.vstack([trembling[kept], false_boxes]).astype(np.float32),
            np.append(scores[kept], rng.uniform(0.15, 0.6, len(false))).astype(np.float32),
            np.zeros(kept.sum() + len(false), np.int32),
        )
        yield Boxes(ids.copy(), boxes), found


def ours(rate: int) -> Callable[[Found], Boxes]:
    """A function of one frame after another."""
    state, frame = track.init(), 0

    def update(found: Found) -> Boxes:
        nonlocal state, frame
        state, tracks = track.update(state, found, Fraction(frame, rate))
        frame += 1
        return evaluate.seen([(0, tracks)], [0])[0]

    return update


def bytetrack(rate: int) -> Callable[[Found], Boxes]:
    """The same of the package `trackers`, whose buffer counts frames of 30 a second."""
    import supervision
    from trackers import ByteTrackTracker

    tracker = ByteTrackTracker(
        frame_rate=rate,
        lost_track_buffer=60,
        track_activation_threshold=0.4,
        high_conf_det_threshold=0.4,
    )

    def update(found: Found) -> Boxes:
        out = tracker.update(
            supervision.Detections(
                xyxy=found.boxes_xyxy_px, confidence=found.scores, class_id=found.labels
            )
        )
        if not len(out):
            return evaluate.NOBODY
        known = out.tracker_id >= 0
        return Boxes(out.tracker_id[known].astype(np.int64), out.xyxy[known].astype(float))

    return update


def main(arguments: list[str] | None = None) -> None:
    """Prints means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=int, nargs="+", default=[2, 10, 25], help="frames a second")
    parser.add_argument("--seconds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    flags = parser.parse_args(arguments)
    rows = []
    for rate in flags.rates:
        for name, make in (("ours", ours), ("ByteTrack", bytetrack)):
            figures, cpu = [], 0.0
            for seed in range(flags.seeds):
                scene = list(make_scene(np.random.default_rng(seed), rate, flags.seconds))
                update, start = make(rate), time.process_time()
                found = {i: update(one) for i, (_, one) in enumerate(scene)}
                cpu += time.process_time() - start
                truth = {i: own for i, (own, _) in enumerate(scene)}
                figures.append(evaluate.tracking_figures(truth, found))
            means = [np.mean([one[key] for one in figures]) for key in FIGURES]
            frames = rate * flags.seconds * flags.seeds
            rows.append([rate, name, *(f"{m:.3f}" for m in means), f"{1000 * cpu / frames:.2f}"])
    print_table("tracks", ["frames/s", "tracker", *FIGURES, "CPU-ms a frame"], rows)


if __name__ == "__main__":
    main()
