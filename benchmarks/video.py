"""Frames of a street watched a second: PyAV, NanoDet-g and tracks, beside the same in PyTorch.

    pip install -e '.[parity,video]'
    python scripts/fetch_street_video.py street
    python -m benchmarks.video street/vtest.avi
    python -m benchmarks.video street/vtest.avi --peers channels --threads 2

A step reads the video's first frames again, finds boxes in each and joins them to tracks; ours is
what `vision_jax watch` does but for its log and clips, the decoder's process with its start and the
frames that it reads ahead included.
The peer decodes by PyAV in its own process, resizes by torch, has the same weights with norms
folded into convolutions, and torchvision's suppression; its tracks are ours. The value that must
agree is the sum of the scores of what is tracked. benchmarks/beside.py says what the columns are.
"""

from pathlib import Path

from benchmarks import beside
from benchmarks.beside import Job

HOWS = ("eager", "channels")


def job(video: str, frames: int, rows: int, their_rows: int) -> Job:
    """Frames of a video, in batches of `rows`."""
    shared = {"video": video, "batch_size": frames}
    peers = {how: ("video_peers.watch", {**shared, "rows": their_rows, "how": how}) for how in HOWS}
    return Job(
        f"{Path(video).name}, {frames} frames, batches of {rows} and {their_rows}",
        ("video_ours.watch", {**shared, "rows": rows, "one_heap": False}),
        peers,
        tolerance=2e-2,  # a box at the threshold is there or isn't
    )


def main() -> int:
    """Prints the table."""
    parser = beside.parser(__doc__)
    parser.add_argument("video")
    parser.add_argument("--frames", type=int, default=160, help="of a step")
    parser.add_argument("--rows", type=int, default=1, help="of our batches")
    parser.add_argument("--their-rows", type=int, default=1, help="of the peer's batches")
    flags = parser.parse_args()
    frames = 8 if flags.small else flags.frames
    video = str(Path(flags.video).absolute())
    return beside.run([job(video, frames, flags.rows, flags.their_rows)], flags)


if __name__ == "__main__":
    raise SystemExit(main())
