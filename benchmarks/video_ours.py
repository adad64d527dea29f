"""Our side of benchmarks/video.py."""

from pathlib import Path

from benchmarks.beside import Side
from vision_jax import load
from vision_jax.video import track
from vision_jax.video.detect import make_detector
from vision_jax.video.frames import batches, open_stream

SCORE = 0.3


def watch(folder: Path, *, video: str, batch_size: int, rows: int) -> Side:
    """`batch_size` frames, in batches of `rows`."""
    detector = make_detector(load("embedded:nanodet_coco"), rows, SCORE)

    def step() -> float:
        state, total = track.init(), 0.0
        with open_stream(video, most=batch_size) as stream:
            for _, frames in batches([stream], rows):
                found = detector.run([frame.pixels for frame in frames])
                for frame, boxes in zip(frames, found, strict=True):
                    state, tracks = track.update(state, boxes, frame.time)
                    total += sum(one.score for one in tracks)
        return total

    return Side(step)
