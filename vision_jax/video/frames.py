"""Frames of a video with the times at which they are shown: of a file, a folder, a camera, RTSP.

A thread reads ahead of whoever takes the frames, as far as a bounded queue holds. What is decoded
by FFmpeg is decoded in a process of its own (decoder.py): a file that crashes it, fills its memory
or stops it is one line here. No stated number of frames is believed.

Times are those at which frames are shown, from the first one, and they only grow. A source's clock
that goes back has been set anew: what follows comes one usual step after the frame before it. A
frame that states the time of the one before it is left out. With a rate R the first frame of each
1/R seconds is taken, and the others are skipped; a live source, on which nobody can wait, loses its
oldest frames when they aren't taken in time. All of it is counted and said.
"""

import contextlib
import csv
import datetime
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time as clock
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from vision_jax import limits
from vision_jax.data.decode import MAX_PIXELS, decode_image, read_image_file
from vision_jax.data.folders import list_files
from vision_jax.data.sources import IMAGE_SUFFIXES
from vision_jax.errors import UserError, printable
from vision_jax.files import expand, open_regular, read_text

TIMES = "times.csv"  # in a folder of frames
SECURE = "rtsps://"
RTSP = ("rtsp://", SECURE)
DECODER = Path(__file__).with_name("decoder.py")
MOST_LINE = 10_000  # bytes of a message
MOST_SECONDS = 10**9  # of a time in times.csv
MOST_DIGITS = 40  # of a number there
DIGESTED = 2**20  # bytes
SHORT = 2  # seconds that a header may say too much
LATER = 2  # seconds after which the decoder gives up, too; who waits for it says so before that
STOP_SECONDS = 0.1  # in which a source that waits sees that it shall stop
NO_MORE = {"kind": "end", "why": ""}
POLL = 0.002  # seconds between looks at several live sources
SAID = {  # counts of a source, for a person
    "undecodable": "packets that can't be decoded",
    "corrupt": "packets that lack a part",
    "damaged": "damaged frames, shown as far as they could be decoded",
    "jumps": "the clock went back, and what followed came when its frame before had been shown",
    "gaps": "gaps of more than 10 seconds",
    "same time": "frames left out that state the time of the one before",
    "dropped": "frames dropped, since they weren't taken in time",
}


Message = tuple[Mapping[str, Any], np.ndarray | None]  # what decoder.py sends, and a frame's pixels


class Frame(NamedTuple):
    """A frame as it is shown.

    Attributes:
      index: its place in the order in which the frames are shown, from 0. What is skipped counts.
      time: seconds since the first frame, exact; later than that of the frame before it.
      pixels: u8[H, W, 3], red, green, blue, upright.
    """

    index: int  # type: ignore[assignment]  # tuple's method of that name isn't needed
    time: Fraction
    pixels: np.ndarray


class Stream:
    """A source that was opened; `close` it, or use it in a `with`.

    Attributes:
      name: the source, as the user named it, without what an address keeps secret.
      live: nobody can wait for it: a camera or an address.
      size: (height, width) of all frames.
      rate: frames a second as the header states it, or None; for a person alone.
      seconds: how long it lasts as the header states it, or None; likewise.
      problem: why it ended before its end; "" if it did not, so far.
      counts: by the names of SAID, complete at the end.
      began: when the first frame came, by this machine's clock.
    """

    def __init__(
        self,
        name: str,
        live: bool,
        messages: Generator[Message, None, None],
        stop: Callable[[], None],
        *,
        ahead: int,
        timeout: float,
        most: int | None = None,
        seconds: Fraction | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ):
        """Waits for the first frame.

        Args:
          name: of the source.
          live: whether the oldest frames are dropped where too many wait.
          messages: what decoder.py sends.
          stop: ends `messages`, from another thread.
          ahead: frames that wait at most.
          timeout: seconds without a frame after which the source has stalled.
          most: frames that are taken.
          seconds: of the source that are taken.
          stopped: whether nothing more is wanted; asked while nothing comes, too.

        Raises:
          UserError: no frame can be had.
        """
        self.name, self.live, self.problem = name, live, ""
        self.counts: Counter[str] = Counter()
        self._stop, self._ahead, self._timeout = stop, ahead, timeout
        self._left, self._seconds, self._stopped = most, seconds, stopped
        self._start: Mapping[str, Any] | None = None
        self._waiting: deque[Message] = deque()  # frames, and what comes at the end
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._last, self._short = Fraction(0), ""
        self.seconds: float | None = None
        self._latest = clock.monotonic()  # when something came
        self.began: datetime.datetime | None = None
        self._thread = threading.Thread(target=self._read, args=(messages,), daemon=True)
        self._thread.start()
        with self._changed:
            while (
                not self._waiting and not stopped() and clock.monotonic() - self._latest < timeout
            ):
                self._changed.wait(STOP_SECONDS)
        if self._start is None or not self._waiting:
            self.take()  # why
            self.close()
            if stopped():
                raise KeyboardInterrupt
            raise UserError(f"{name}: {self.problem or 'there is no frame in it'}")
        height, width = self._start["size"]
        self.size: tuple[int, int] = (height, width)
        self.rate = Fraction(*self._start["rate"]) if self._start["rate"] else None
        self.seconds = self._start["seconds"]

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops reading."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._stop()
        self._thread.join()

    def ready(self) -> bool:
        """Whether `take` answers at once."""
        stalled = clock.monotonic() - self._latest > self._timeout
        return self._ended or bool(self._waiting) or stalled or self._stopped()

    def take(self) -> Frame | None:
        """The next frame, waiting for it; None at the end, and `problem` says if it came early."""
        if not self._ended:
            message, pixels = self._next()
            if pixels is not None:
                frame = Frame(message["index"], Fraction(*message["time"]), pixels)
                if self._seconds is None or frame.time < self._seconds:
                    self._last = frame.time
                    self._left = None if self._left is None else self._left - 1
                    return frame
            self._ended = True
            self.counts.update(message.get("counts", {}))
            self.problem = message.get("why", "")
            stated = self.seconds or 0
            last = Fraction(*message["last"]) if "last" in message else self._last
            if message is not NO_MORE and pixels is None and stated > last + SHORT:
                self._short = (
                    f"its header says {stated:.3f} seconds, and its last frame is shown at "
                    f"{float(last):.3f}: parts may be missing"
                )
        return None

    def _next(self) -> Message:
        """What comes next, or why nothing will."""
        if self._left == 0 or self._stopped():
            return NO_MORE, None
        with self._changed:
            while not self._waiting:
                left = self._latest + self._timeout - clock.monotonic()
                if self._stopped():
                    return NO_MORE, None
                if left <= 0:
                    why = f"it stalled: no frame came for {self._timeout:g} seconds"
                    return {"kind": "error", "why": why}, None
                self._changed.wait(min(left, STOP_SECONDS))
            if len(self._waiting) >= self._ahead:  # since then the source waited for whoever takes
                self._latest = clock.monotonic()
            found = self._waiting.popleft()
            self._changed.notify_all()
            return found

    def notes(self) -> list[str]:
        """One line for each thing that a person should know of what was read."""
        early = [f"it ended early: {self.problem}"] if self.problem else []
        seen = [f"{words}: {self.counts[key]:,}" for key, words in SAID.items() if self.counts[key]]
        short = [self._short] if self._short else []
        return [printable(f"{self.name}: {line}") for line in early + short + seen]

    def _read(self, messages: Generator[Message, None, None]) -> None:
        """The thread: messages into the queue."""
        try:
            with contextlib.closing(messages):
                for message, pixels in messages:
                    if message["kind"] == "start":
                        self._start = message
                    elif not self._put(message, pixels):
                        return
        except UserError as error:
            self._put({"kind": "error", "why": str(error)}, None)
        except Exception as error:  # whoever takes the frames is to know
            self._put({"kind": "error", "why": f"{type(error).__name__}: {error}"}, None)

    def _put(self, message: Mapping[str, Any], pixels: np.ndarray | None) -> bool:
        """Whether anybody wants more."""
        with self._changed:
            if self.live and len(self._waiting) >= self._ahead:
                self._waiting.popleft()
                self.counts["dropped"] += 1
            self._changed.wait_for(lambda: self._closed or len(self._waiting) < self._ahead)
            self._waiting.append((message, pixels))
            self.began = self.began or datetime.datetime.now().astimezone()
            self._latest = clock.monotonic()
            self._changed.notify_all()
            return not self._closed


def without_secrets(source: str) -> str:
    """An address without the name and password of who may see it, wherever it has them.

    Examples:
      >>> without_secrets("rtsp://me:word@10.0.0.7:554/front?user=me&password=word")
      'rtsp://10.0.0.7:554/front'
    """
    if "://" not in source:
        return source
    scheme, _, rest = source.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{re.split('[?#;]', path)[0]}"


# Opening ------------------------------------------------------------------------------------------


def open_stream(
    source: str,
    *,
    rate: Fraction | None = None,
    folder_rate: Fraction | None = None,
    timeout: float = 30.0,
    ahead: int = 8,
    most: int | None = None,
    seconds: Fraction | None = None,
    stopped: Callable[[], bool] = lambda: False,
    certificates: Path | None = None,
) -> Stream:
    """Opens a source.

    Args:
      source: a video file, a folder of frames, a camera's device (/dev/video0) or rtsp://...
      rate: frames a second that are taken; None for all.
      folder_rate: frames a second of a folder that has no times.csv.
      timeout: seconds without a frame after which the source has stalled.
      ahead: frames that wait at most.
      most: frames that are taken.
      seconds: of the source that are taken.
      stopped: whether nothing more is wanted; asked while nothing comes, too.
      certificates: a file in PEM. An rtsps:// server must have a certificate for its host that is
        one of these or signed by one; None: nobody looks who it is.

    Raises:
      UserError: no such source, or no frame can be had of it.
    """
    how: dict[str, Any] = {"ahead": ahead, "timeout": timeout, "most": most, "seconds": seconds}
    how["stopped"] = stopped
    if source.lower().startswith(RTSP):
        scheme, _, rest = source.partition("://")
        kind, address = "address", f"{scheme.lower()}://{rest}"
    elif "://" in source:
        raise UserError(
            f"{without_secrets(source)}: a source is a video file, a folder of frames, a camera or "
            f"{RTSP[0]}...; other addresses are not fetched"
        )
    else:
        path = expand(source)
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"{source}: can't be read ({reason})") from None
        if stat.S_ISDIR(mode):
            messages = _frames_of_folder(path, rate, folder_rate)
            return Stream(source, False, messages, lambda: None, **how)
        kind, address = "camera" if stat.S_ISCHR(mode) else "file", str(path.absolute())
        if kind == "file":
            open_regular(path).close()  # says what it is instead
    if folder_rate is not None:
        raise UserError(f"{source}: it has times of its own, and --folder-rate is of a folder")
    if importlib.util.find_spec("av") is None:
        raise UserError("PyAV is missing: pip install 'vision_jax[video]'")
    request = {
        "source": kind,
        "address": address,
        "rate": None if rate is None else [rate.numerator, rate.denominator],
        "timeout": timeout + LATER,
        "most_pixels": MAX_PIXELS,
        "most_side": limits.SIDE,
        "certificates": None,
    }
    if certificates is not None and source.lower().startswith(SECURE):
        open_regular(certificates).close()  # says why it can't be read
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificates)
        except (OSError, ValueError):
            raise UserError(f"{certificates}: it has no certificate in PEM") from None
        request["certificates"] = str(certificates.absolute())
    said = tempfile.TemporaryFile()  # noqa: SIM115  # the generator below closes it
    process = subprocess.Popen(
        [sys.executable, "-P", str(DECODER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
    )
    assert process.stdin is not None
    with contextlib.suppress(OSError), process.stdin:  # what died at once is told below
        process.stdin.write(json.dumps(request).encode())
    messages = _messages_of(process, said)
    return Stream(without_secrets(source), kind != "file", messages, process.kill, **how)


def _messages_of(
    process: subprocess.Popen[bytes], said: IO[bytes]
) -> Generator[Message, None, None]:
    """What a decoder sends, and an error if it dies."""
    assert process.stdout is not None
    size, ended = (0, 0), False
    with said, process.stdout as stdout:
        try:
            while line := stdout.readline(MOST_LINE):
                message = json.loads(line)
                if message["kind"] == "start":
                    height, width = size = message["size"]
                    if not (0 < height <= limits.SIDE and 0 < width <= limits.SIDE):
                        raise UserError(f"frames of {width} x {height} pixels")
                pixels = None
                if message["kind"] == "frame":
                    pixels = np.empty((*size, 3), np.uint8)
                    left = memoryview(pixels.data).cast("B")
                    while left:
                        count = stdout.readinto(left)  # type: ignore[attr-defined]
                        if not count:
                            break
                        left = left[count:]
                    if left:
                        break
                ended = message["kind"] in ("end", "error")
                yield message, pixels
        finally:
            process.kill()
            code = process.wait()
        if not ended:
            yield {"kind": "error", "why": f"its decoder died {_death(code, said)}"}, None


def _death(code: int, said: IO[bytes]) -> str:
    """How a process ended, with the last line that it said."""
    if code < 0:
        return f"of {signal.Signals(-code).name}: the file is damaged, or made to do so"
    said.seek(max(0, said.seek(0, os.SEEK_END) - 1000))
    lines = said.read().decode("utf-8", "replace").strip().splitlines()
    return f"({lines[-1] if lines else f'exit code {code}'})"


def content_of(source: str) -> str:
    """A digest by which a file or folder is told from another of its name; "" of a live source.

    Of a file's size and its first megabyte; of a folder's names and sizes.
    """
    path = expand(source)
    if "://" in source or not (path.is_file() or path.is_dir()):
        return ""
    digest = hashlib.sha256()
    if path.is_dir():
        for name in list_files(path, (*IMAGE_SUFFIXES, TIMES))[0]:
            digest.update(f"{name}\0{(path / name).stat().st_size}\0".encode("utf-8", "replace"))
    else:
        with open_regular(path) as file:
            digest.update(f"{os.fstat(file.fileno()).st_size}\0".encode())
            digest.update(file.read(DIGESTED))
    return digest.hexdigest()[:16]


# Folders ------------------------------------------------------------------------------------------


def _frames_of_folder(
    folder: Path, rate: Fraction | None, folder_rate: Fraction | None
) -> Generator[Message, None, None]:
    """A folder's images in the order of their names, or of its times."""
    shown = _times_of(folder, folder_rate)
    counts, slot, size = Counter[str](), -1, (0, 0)
    for index, (name, time) in enumerate(shown):
        if rate is not None and math.floor(time * rate) <= slot:
            continue
        slot = math.floor(time * rate) if rate is not None else slot
        path = str(folder / name)
        pixels = decode_image(read_image_file(path), name=path)
        if size == (0, 0):
            size = (pixels.shape[0], pixels.shape[1])
            seconds = float(shown[-1][1])
            ratio = folder_rate and [folder_rate.numerator, folder_rate.denominator]
            yield {"kind": "start", "size": size, "rate": ratio, "seconds": seconds}, None
        if pixels.shape[:2] != size:
            height, width = pixels.shape[:2]
            raise UserError(
                f"{name} has {width} x {height} pixels, and the frames before it {size[1]} x "
                f"{size[0]}: what follows is not watched"
            )
        message = {"kind": "frame", "index": index, "time": [time.numerator, time.denominator]}
        yield message, pixels
    time = shown[-1][1]
    last = [time.numerator, time.denominator]
    yield {"kind": "end", "why": "", "last": last, "counts": counts}, None


def _times_of(folder: Path, rate: Fraction | None) -> list[tuple[str, Fraction]]:
    """(name, seconds since the first) of each frame of a folder.

    Raises:
      UserError: no frames, neither times nor a rate or both, times that are none or don't grow.
    """
    table = folder / TIMES
    if table.is_file():
        if rate is not None:
            raise UserError(f"its {TIMES} has the times of the frames: leave --folder-rate out")
        found: list[tuple[str, Fraction]] = []
        for number, row in enumerate(csv.reader(io.StringIO(read_text(table))), 1):
            where = f"{TIMES}, line {number}"
            if number == 1 and row == ["file", "seconds"]:
                continue
            if len(row) != 2 or not (folder / row[0]).resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{where}: give a file of this folder and its time in seconds")
            seconds = exact(row[1].strip())
            if seconds is None or abs(seconds) > MOST_SECONDS:
                raise UserError(f"{where}: {row[1]!r} is no time in seconds")
            if found and seconds <= found[-1][1]:
                raise UserError(f"{where}: {row[1]} is not later than the time before it")
            found.append((row[0], seconds))
        if not found:
            raise UserError(f"its {TIMES} names no frames")
        return [(name, seconds - found[0][1]) for name, seconds in found]
    names, _ = list_files(folder, IMAGE_SUFFIXES - {".npy"})
    if not names:
        raise UserError("it has no images")
    if rate is None:
        raise UserError(
            f"when are its frames shown? Give --folder-rate=25, or a {TIMES} in it whose lines are "
            "FILE,SECONDS"
        )
    return [(name, index / rate) for index, name in enumerate(names)]


def exact(text: str) -> Fraction | None:
    """The number of "25", "-0.5" or "30000/1001"; None of anything else, powers of ten among it.

    Examples:
      >>> exact("0.04"), exact("1e9"), exact("1/0")
      (Fraction(1, 25), None, None)
    """
    if len(text) > MOST_DIGITS or not re.fullmatch(r"-?\d+(\.\d+|/0*[1-9]\d*)?", text, re.ASCII):
        return None
    return Fraction(text)


# Batches ------------------------------------------------------------------------------------------


def batches(streams: Sequence[Stream], rows: int) -> Iterator[tuple[int, list[Frame]]]:
    """(place of a stream, frames of it) by turns, [] once at each stream's end.

    A batch is of one stream, so that what is found in it depends on nobody else. A file's is full
    but for its last one, and always the same. A live stream's has what is there, since nobody may
    wait: 1 to `rows` frames; so has a file's beside a live stream.
    """
    running = list(range(len(streams)))
    live = any(stream.live for stream in streams)
    while running:
        if live and not any(streams[place].ready() for place in running):
            clock.sleep(POLL)
        for place in list(running):
            stream = streams[place]
            frames: list[Frame] = []
            while len(frames) < rows and (not live or stream.ready()):
                frame = stream.take()
                if frame is None:
                    running.remove(place)
                    break
                frames.append(frame)
            if frames:
                yield place, frames
            if place not in running:
                yield place, []
