"""Made-up scenes for the tests of vision_jax.video: boxes that walk, flicker, hide and jump."""

from collections import namedtuple
from fractions import Fraction

import numpy as np

Found = namedtuple("Found", "boxes_xyxy_px scores labels")
FIELD = """
[zones.lawn]
unit = "pixel"
polygon = [[200, 100], [500, 100], [500, 400], [200, 400]]

[lines.gate]
unit = "pixel"
from = [300, 0]
to = [300, 480]
"""
NAMES = ("person", "car", "dog")
SIZE = (480, 640)


def found(*rows):
    """Rows of (x, y of the foot, width, height, score, label)."""
    rows = np.array(rows, float).reshape(-1, 6)
    x, y, width, height, scores, labels = rows.T
    boxes = np.stack([x - width / 2, y - height, x + width / 2, y], 1)
    return Found(boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int32))


def walk(start, speed, frames, rate=10, score=0.8, label=0):
    """A person of 30 x 80 pixels: [(x, y, w, h, score, label)] of each frame."""
    return [
        (start[0] + speed[0] * i / rate, start[1] + speed[1] * i / rate, 30, 80, score, label)
        for i in range(frames)
    ]


def times(frames, rate=10):
    """Of frames at a constant rate."""
    return [Fraction(i, rate) for i in range(frames)]


def picture(found, size=SIZE):
    """A frame u8[H, W, 3] with a grey ground and a colored box for each one found."""
    pixels = np.full((*size, 3), 120, np.uint8)
    pixels[:, :, 0] += (np.arange(size[1]) // 8 % 2 * 20).astype(np.uint8)
    for number, box in enumerate(np.asarray(found.boxes_xyxy_px)):
        left, top, right, bottom = (max(int(side), 0) for side in box)
        pixels[top:bottom, left:right] = [(200, 40, 40), (40, 160, 60), (40, 60, 200)][number % 3]
    return pixels


TWO = """
[rules.lawn]
kind = "inside"
zone = "lawn"
classes = ["person"]
[rules.gate]
kind = "cross"
line = "gate"
"""


def watch(out, frames=60, wanted=None, text=TWO + FIELD):
    """Watches a person and a dog who walk through the zone: the log, and all outputs if wanted."""
    from vision_jax.video import events
    from vision_jax.video.outputs import Outputs
    from vision_jax.video.rules import check, parse_rules

    rules = check(parse_rules(text, "rules", NAMES), SIZE)
    head = events.Head("made <up>", SIZE, NAMES)
    log, progress = events.open_log(out, head, rules, text)
    said = []
    ways = walk((120, 300), (60, 0), frames), walk((520, 380), (-50, 0), frames, label=2)
    with log, Outputs(out, rules, wanted) as outputs:
        for i, time in enumerate(times(frames)):
            seen = found(
                ways[0][i], ways[1][i], (80, 100, 30, 80, 0.6, 0), (50, 470, 40, 30, 0.3, 1)
            )
            progress, tracks, raised = events.step(rules, progress, log.frame(i, time, seen))
            log.raised(raised)
            outputs.frame(picture(seen), progress, tracks, raised)
        said = outputs.finish()
        log.end(rules, progress)
        said += [outputs.page(), *outputs.deliver()]
    return rules, said


def sequences(rng, frames=40, people=6):
    """(truth, found): boxes tremble, are missing, false, and change their ids now and then."""
    from vision_jax.video.evaluate import Boxes

    place, speed = rng.uniform(50, 400, (people, 2)), rng.normal(0, 4, (people, 2))
    ids = np.arange(people)
    truth, found = {}, {}
    for frame in range(frames):
        place = place + speed
        boxes = np.hstack([place, place + np.array([30, 80])])
        there = rng.random(people) < 0.9
        truth[frame] = Boxes(np.arange(people)[there], boxes[there])
        if rng.random() < 0.1:
            ids[rng.integers(people)] = (
                rng.integers(people, 40) if rng.random() < 0.5 else people + frame
            )
        ids = np.where(
            np.bincount(ids, minlength=60)[ids] > 1, np.arange(people) + 60 + people * frame, ids
        )
        kept = rng.random(people) < 0.85
        trembling = boxes + rng.normal(0, 6, boxes.shape)
        false = rng.uniform(0, 400, (int(rng.integers(0, 3)), 2))
        false = np.hstack([false, false + np.array([30, 80])])
        found[frame] = Boxes(
            np.concatenate([ids[kept], 10_000 + 10 * frame + np.arange(len(false))]),
            np.vstack([trembling[kept], false]),
        )
    return truth, found
