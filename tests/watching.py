"""A video of a square that walks, a detector that finds it, and a program that is killed.

python tests/watching.py VIDEO RULES OUT SEED KILLS   # prints how often it was killed
"""

import itertools
import os
import random
import signal
import sys
from fractions import Fraction

import av
import numpy as np

from vision_jax import machine
from vision_jax.commands import watch
from vision_jax.video import events
from vision_jax.video.detect import Detections, Detector

HEIGHT, WIDTH, SIDE = 48, 96, 12
RULES = """
[zones.right]
unit = "fraction"
polygon = [[0.5, 0], [1, 0], [1, 1], [0.5, 1]]

[rules.walked_in]
kind = "inside"
zone = "right"
classes = ["square"]
"""


def pictures(count=120):
    """The square crosses the frame and comes back, twice: u8[HEIGHT, WIDTH, 3] each."""
    for index in range(count):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        left = int((WIDTH - SIDE) * (0.5 - 0.5 * np.cos(index / count * 4 * np.pi)))
        pixels[20 : 20 + SIDE, left : left + SIDE] = 255
        yield pixels


def write_video(path, count=120):
    """Of the pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = (
            HEIGHT,
            WIDTH,
            "yuv420p",
            10**6,
        )
        for index, pixels in enumerate(pictures(count)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_detector(rows=4, each=lambda frames: None):
    """Finds the square. Its score says how many frames there were in the batch, and which it was.

    So a batch that is put together another way gives other bytes.
    """

    def run(frames):
        each(frames)
        found = []
        for place, pixels in enumerate(frames):
            y, x = np.nonzero(pixels.mean(-1) > 128)
            box = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1]], np.float32)
            score = np.array([0.5 + 0.01 * len(frames) + 0.001 * place], np.float32)
            found.append(Detections(box, score, np.zeros(1, np.int32)))
        return found

    return Detector("squares", ("square",), rows, run)


def run(video, rules, out, each=lambda frames: None, extra=()):
    """The command with that detector; its exit code."""
    before = watch._load_detector
    watch._load_detector = lambda flags, rows: make_detector(rows, each)
    try:
        videos = [str(one) for one in (video if isinstance(video, list) else [video])]
        return watch.main(
            [*videos, "--model=x", f"--rules={rules}", f"--out={out}", "--rows=4", *extra]
        )
    finally:
        watch._load_detector = before


def main():
    video, rules, out, seed, kills = sys.argv[1:]
    machine.keep_memory(one_heap=False)  # imports JAX, once for all children
    rng, killed = random.Random(int(seed)), 0
    for _ in range(int(kills)):
        batch, moment = rng.randrange(1, 4), rng.choice(("before", "within", "after"))
        child = os.fork()
        if child == 0:
            os._exit(run(video, rules, out, each=die_at(batch, moment, rng)))
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    run(video, rules, out)
    print("killed", killed)


def die_at(batch, moment, rng):
    """What a detector calls with each batch, so that this process kills itself.

    `before` it is detected; `within` a line of what it gives; `after` one of these lines.
    """
    lines, torn, write = rng.randrange(1, 5), rng.random(), events.append
    batches, written = itertools.count(1), itertools.count(1)
    reached = []

    def each(frames):
        reached.append(next(batches) >= batch)
        if reached[-1] and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)

    def append(file, line):
        last = bool(reached) and reached[-1] and next(written) == lines
        if last and moment == "within":
            file.write(line[: int(len(line) * torn)])
        else:
            write(file, line)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    events.append = append
    return each


if __name__ == "__main__":
    main()
