"""Pictures of alarms: a still and a short clip of each, and the whole video with what was seen.

    OUT/stills/000001.jpg   the frame in which alarm 1 began, as it was
    OUT/clips/000001.mp4    the seconds before and after
    OUT/annotated.mp4       the frames that were looked at, with tracks, zones and alarms

Frames that may be needed, ten a second, are kept in a ring of bounded bytes, as JPEG if they don't
fit as they are. A clip's frames are encoded
as they come, so that a long one needs no more memory than a short one. Files have their names when
they are whole. Clips and the annotated video need PyAV, the extra `video`; stills don't.
"""

import contextlib
import io
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vision_jax.errors import UserError, printable
from vision_jax.files import DRAFT, write_whole
from vision_jax.video.lines import writing
from vision_jax.video.rules import Rules
from vision_jax.video.track import Track

STILLS, CLIPS, ANNOTATED = "stills", "clips", "annotated.mp4"
QUALITY = 90  # of JPEG
MAX_RING = 64 * 2**20  # bytes of frames before an alarm
MAX_OPEN = 8  # clips that are written at once; of more alarms there are stills
TICKS = 90_000  # a second, of the times in a clip
CRF = "23"  # of x264: its own default
BT_709 = LIMITED = 1  # FFmpeg's AVCOL_SPC_BT709, AVCOL_PRI_BT709, AVCOL_TRC_BT709; AVCOL_RANGE_MPEG
ZONE, ALARM, CALM = (255, 200, 0), (255, 48, 48), (64, 200, 255)


def still_name(number: int) -> str:
    """Of an alarm's still, within the folder."""
    return f"{STILLS}/{number:06d}.jpg"


def clip_name(number: int) -> str:
    """Of an alarm's clip, within the folder."""
    return f"{CLIPS}/{number:06d}.mp4"


def to_jpeg(pixels: np.ndarray) -> bytes:
    """A picture u8[H, W, 3] as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


class VideoWriter:
    """An MP4 of frames with times; its size is the first frame's, cut to even sides."""

    def __init__(self, path: Path, size: tuple[int, int]):
        try:
            import av
        except ImportError as error:
            raise UserError(
                "videos are written by PyAV: pip install 'vision_jax[video]'"
            ) from error
        self.path = path
        self.height, self.width = (side - side % 2 for side in size)
        if min(self.height, self.width) < 2:
            raise UserError(f"{path}: no video has frames of {size[1]} x {size[0]} pixels")
        self._draft = path.with_name(path.name + DRAFT)
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = av.open(self._draft, "w", format="mp4", options={"movflags": "+faststart"})
            # One thread: the same frames are the same bytes.
            stream: Any = self._file.add_stream(
                "libx264", options={"crf": CRF, "preset": "veryfast"}
            )
            stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
            stream.thread_count = 1
            # Colors by BT.709, and said so: players guess by size what isn't said.
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT_709
            context.color_range = LIMITED
            stream.time_base = stream.codec_context.time_base = Fraction(1, TICKS)
        self._stream = stream
        self._first: Fraction | None = None
        self._last = -1

    def write(self, pixels: np.ndarray, time: Fraction) -> None:
        """Adds a frame u8[H, W, 3], later than the one before."""
        import av
        from av.video.reformatter import ColorRange, Colorspace

        self._first = time if self._first is None else self._first
        frame = av.VideoFrame.from_ndarray(
            np.ascontiguousarray(pixels[: self.height, : self.width]), format="rgb24"
        )
        frame = frame.reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
        )
        frame.pts = max(round((time - self._first) * TICKS), self._last + 1)
        self._last = frame.pts
        frame.time_base = Fraction(1, TICKS)
        with writing(self.path.parent):
            for packet in self._stream.encode(frame):
                self._file.mux(packet)

    def drop(self) -> None:
        """Removes what was written."""
        with contextlib.suppress(Exception):  # what can't be ended goes all the same
            self._file.close()
        self._draft.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the file and gives it its name; one without frames is removed."""
        with writing(self.path.parent):
            if self._first is not None:
                for packet in self._stream.encode(None):
                    self._file.mux(packet)
            self._file.close()
            if self._first is None:
                self._draft.unlink(missing_ok=True)
            else:
                self._draft.replace(self.path)


@dataclass
class Recorder:
    """Writes stills and clips of alarms; a context manager.

    Attributes:
      out: the folder.
      before, after: seconds of a clip around the beginning of its alarm; without both there are no
        clips.
      most: bytes of the ring.
      step: least seconds from one kept frame to the next.
      ring: (time, u8[H, W, 3] or its JPEG) of the last frames.
      clips: (alarm, its file, seconds at which it ends) that are being written.
      held: bytes in the ring.
      stills: alarms that began.
      skipped: alarms without a clip, since too many were being written.
    """

    out: Path
    before: Fraction = Fraction(3)
    after: Fraction = Fraction(3)
    most: int = MAX_RING
    step: Fraction = Fraction(1, 10)
    ring: deque[tuple[Fraction, np.ndarray | bytes]] = field(default_factory=deque)
    held: int = 0
    clips: list[tuple[int, VideoWriter, Fraction]] = field(default_factory=list)
    stills: int = 0
    skipped: int = 0

    def __enter__(self) -> "Recorder":
        for left in (self.out / CLIPS).glob(f"*{DRAFT}"):  # of a kill
            left.unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, clip, _ in self.clips:  # those of a run that was stopped before its end
            clip.drop()
        self.clips.clear()

    def finish(self) -> None:
        """Ends the clips that are being written, which are as long as there were frames."""
        for _, clip, _ in self.clips:
            clip.close()
        self.clips.clear()

    def written(self) -> list[str]:
        """What was written, for a person."""
        said = [f"{self.out / STILLS}, {self.stills} stills"] if self.stills else []
        if self.stills > self.skipped and self.before + self.after > 0:
            said.append(f"{self.out / CLIPS}, {self.stills - self.skipped} clips")
        if self.skipped:
            said[-1] += f" ({self.skipped} alarms have none: {MAX_OPEN} are written at once)"
        return said

    def frame(
        self, pixels: np.ndarray, time: Fraction, raised: Sequence[Mapping[str, Any]]
    ) -> None:
        """A frame u8[H, W, 3] that was looked at, and the events that it raised."""
        begun = [event["number"] for event in raised if event["event"] == "start"]
        wanted = self.before + self.after > 0
        for _, clip, end in self.clips:
            if time <= end:
                clip.write(pixels, time)
        for _, clip, end in self.clips:
            if time > end:
                clip.close()
        self.clips = [one for one in self.clips if time <= one[2]]
        for number in begun:
            with writing(self.out):
                (self.out / STILLS).mkdir(parents=True, exist_ok=True)
                write_whole(to_jpeg(pixels), self.out / still_name(number))
            self.stills += 1
            if wanted and len(self.clips) < MAX_OPEN:
                clip = VideoWriter(self.out / clip_name(number), (pixels.shape[0], pixels.shape[1]))
                self.clips.append((number, clip, time + self.after))
                for earlier, kept in self.ring:
                    if earlier >= time - self.before:
                        clip.write(_pixels(kept), earlier)
                clip.write(pixels, time)
            elif wanted:
                self.skipped += 1
        if wanted and (not self.ring or time - self.ring[-1][0] >= self.step):
            fits = pixels.nbytes * (self.before / self.step + 1) <= self.most
            self.ring.append((time, pixels.copy() if fits else to_jpeg(pixels)))
            self.held += _bytes(self.ring[-1][1])
        while self.ring and (self.held > self.most or self.ring[0][0] < time - self.before):
            self.held -= _bytes(self.ring.popleft()[1])


def _pixels(kept: np.ndarray | bytes) -> np.ndarray:
    if isinstance(kept, np.ndarray):
        return kept
    return np.asarray(Image.open(io.BytesIO(kept)).convert("RGB"))


def _bytes(kept: np.ndarray | bytes) -> int:
    return kept.nbytes if isinstance(kept, np.ndarray) else len(kept)


def annotate(
    pixels: np.ndarray,
    rules: Rules,
    tracks: Sequence[Track],
    alarmed: Sequence[int],
    text: str = "",
) -> np.ndarray:
    """A frame u8[H, W, 3] with zones, lines and tracks drawn on it.

    Args:
      pixels: of the frame.
      rules: of `rules.check`.
      tracks: in it.
      alarmed: ids of those that take part in an alarm, which are red.
      text: in its corner.
    """
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    width = max(round(max(image.size) / 400), 1)
    font = ImageFont.load_default(max(image.size) / 55)
    for zone in rules.zones.values():
        draw.line([*zone.polygon, zone.polygon[0]], fill=ZONE, width=width)
    for line in rules.lines.values():
        draw.line([line.start, line.end], fill=ZONE, width=width)
    for track in tracks:
        color = ALARM if track.id in alarmed else CALM
        draw.rectangle(track.box_xyxy_px, outline=color, width=width if track.unseen else 2 * width)
        name = f"{track.id} {printable(rules.class_names[track.label])} {track.score:.2f}"
        draw.text(
            (track.box_xyxy_px[0], track.box_xyxy_px[1]),
            name,
            fill=color,
            font=font,
            anchor="lb",
            stroke_width=1,
            stroke_fill="black",
        )
    if text:
        draw.text((4, 4), printable(text), "white", font, stroke_width=2, stroke_fill="black")
    return np.asarray(image)


def alarmed_tracks(alarms: Mapping[tuple[str, int], Any]) -> list[int]:
    """Ids that take part in alarms that are on; `alarms` are those of `alarms.State`."""
    return sorted({one for alarm in alarms.values() if alarm.number for one in alarm.tracks})
