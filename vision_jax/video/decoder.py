"""The process that decodes a video: FFmpeg's C code reads what may be hostile, and alone can die.

It is started by frames.py as a program of its own, which imports PyAV and nothing of this package.
Its standard input says what to read, in JSON: an address may hold a password, and everybody can see
a program's arguments. On its standard output come messages, one line of JSON each; after "frame"
follow the frame's pixels, u8[H, W, 3].

    {"kind": "start", "size": [H, W], "rate": [25, 1], "seconds": 79.5}   null if not stated
    {"kind": "frame", "index": 0, "time": [0, 1]}
    {"kind": "end", "why": "", "last": [159, 2], "counts": {"undecodable": 0, ...}}
    {"kind": "error", "why": "what it can't read, for a person"}

Frames are turned upright and converted to red, green, blue by libavfilter, as the program ffmpeg
does by itself, with the same numbers: the matrix and range that a frame states, the container's
display matrix, nothing deinterlaced.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
from fractions import Fraction
from typing import Any
from urllib.parse import urlsplit

import av
import av.error
import av.logging
from av.filter import Graph

# Containers that hold video and name no other file or address; the reader that a file's first bytes
# choose must be one of them. A playlist (HLS, DASH, concat, SDP) is none.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,ivf,nut,mxf,"
    "h261,h263,h264,hevc,vvc,av1,obu,mjpeg,mpjpeg,yuv4mpegpipe,dv,gxf,swf,rm,wtv,nsv,vc1,gif,apng,"
    "live_flv,bink,smk,flic"
)
MEMORY = 4 * 2**30  # bytes of addresses of this process
DEFAULT_RATE = 25  # frames a second where nothing is stated, as libavformat has it
LONG_GAP = 10  # seconds between two frames that are said
PORTS = {"rtsp": 554, "rtsps": 322}  # where an address names none
SET_PIPE_SIZE, PIPE_BYTES = 1031, 2**20  # of fcntl
DEATH_SIGNAL = 1  # of prctl


class Refused(Exception):
    """What can't be watched; its text is for a person."""


def main() -> None:
    """Sends all of a video."""
    request = json.load(sys.stdin)
    _bound()
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints is no message
    try:
        for message, pixels in read(request):
            _send(out, message, pixels)
    except Refused as refused:
        _send(out, {"kind": "error", "why": str(refused)})
    except av.error.FFmpegError as error:
        _send(out, {"kind": "error", "why": _words(error)})
    except MemoryError:
        _send(out, {"kind": "error", "why": "it takes too much memory to decode"})
    except BrokenPipeError:  # nobody reads any more
        pass
    except Exception as error:  # PyAV's own, of a header that it can't turn into Python's values
        _send(out, {"kind": "error", "why": f"{type(error).__name__}: {error}"})


def _bound() -> None:
    """Holds this process to memory, and to the life of the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the watcher's, who ends this process
    av.logging.set_level(None)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
        with contextlib.suppress(OSError):
            fcntl.fcntl(1, SET_PIPE_SIZE, PIPE_BYTES)


def _send(out: Any, message: dict[str, Any], pixels: Any = b"") -> None:
    for part in (json.dumps(message).encode() + b"\n", pixels):
        view = memoryview(part)
        while view:
            view = view[out.write(view) :]


def read(request: dict[str, Any]) -> Any:
    """(message, pixels) after (message, pixels) of a request."""
    container = _open(request)
    video = next(iter(container.streams.video), None)
    if video is None:
        raise Refused("there is no video in it")
    context = video.codec_context
    if context is None:
        raise Refused("no decoder for its video")
    context.options = {"max_pixels": str(request["most_pixels"])}
    context.thread_count = 1  # the cores are the detector's; a file's errors come in one order
    stated = video.guessed_rate or video.average_rate
    clock = Clock(Fraction(1, 1) / stated if stated else Fraction(1, DEFAULT_RATE))
    counts = {
        "undecodable": 0,
        "corrupt": 0,
        "damaged": 0,
        "jumps": 0,
        "gaps": 0,
        "same time": 0,
        "skipped": 0,
    }
    rate = Fraction(*request["rate"]) if request["rate"] else None
    converter, size, index, slot, why = None, None, 0, -1, ""
    packets = _packets(container, video)
    for packet, problem in packets:
        if packet is None or packet.size:  # after a damaged one a sound one: the source went on
            why = problem
            counts["corrupt"] += packet is not None and bool(problem)
        for frame in _decode(packet, counts):
            counts["damaged"] += frame.is_corrupt
            time = clock.read(frame, counts)
            if time is None:
                counts["same time"] += 1
                continue
            here, index = index, index + 1
            if rate is not None:
                if math.floor(time * rate) <= slot:
                    counts["skipped"] += 1
                    continue
                slot = math.floor(time * rate)
            if converter is None or not converter.fits(frame):
                converter = Converter(frame, video.time_base, request)
            if size is None:
                size = converter.size
                seconds = video.duration and float(video.duration * video.time_base)
                if seconds is None and container.duration:
                    seconds = container.duration / 1e6
                ratio = stated and [stated.numerator, stated.denominator]
                yield {"kind": "start", "size": size, "rate": ratio, "seconds": seconds}, b""
            if converter.size != size:
                why = (
                    f"frames of {size[1]} x {size[0]} pixels become {converter.size[1]} x "
                    f"{converter.size[0]} after {float(time):.3f} s: what follows is not watched"
                )
                packets.close()
                break
            message = {"kind": "frame", "index": here, "time": [time.numerator, time.denominator]}
            yield message, converter.convert(frame)
    if index == 0:
        raise Refused(why or "no frame of it can be decoded")
    if request["source"] == "address" and not why:
        why = "its server has ended it"
    last = [clock.last.numerator, clock.last.denominator]
    yield {"kind": "end", "why": why, "last": last, "counts": counts}, b""


# Reading ------------------------------------------------------------------------------------------


def _open(request: dict[str, Any]) -> Any:
    kind, address = request["source"], request["address"]
    options = {}
    if kind == "file":
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        return av.open(f"file:{address}", options=options, metadata_errors="replace")
    timeout = request["timeout"]
    if kind == "camera":
        return av.open(address, format="v4l2", timeout=timeout, metadata_errors="replace")
    options = {
        "protocol_whitelist": "rtsp,rtsps,tcp,tls,rtp,crypto",
        "format_whitelist": "rtsp,sdp,rtp,mpegts,asf",
        "rtsp_transport": "tcp",  # all comes over the one connection that the user named
        "allowed_media_types": "video",
        "timeout": str(int(timeout * 1e6)),
    }
    certificates = request["certificates"]
    if certificates:
        options |= {"tls_verify": "1", "ca_file": certificates}
    named = _peers_named(address)
    try:
        container = av.open(address, options=options, timeout=timeout, metadata_errors="replace")
    except av.error.FFmpegError as error:
        if certificates and error.errno == errno.EIO:  # FFmpeg says no more
            raise Refused(
                f"it can't be watched safely ({_words(error)}): nothing in {certificates} proves"
                f" that it is {urlsplit(address).hostname}; name the host as its certificate does,"
                " see openssl x509 -noout -ext subjectAltName"
            ) from None
        raise
    _refuse_others(named | _peers_named(address))
    return container


def _peers_named(address: str) -> set[tuple[str, int]]:
    """(IP, port) of all that an address may mean."""
    try:
        parts = urlsplit(address)
        port = parts.port or PORTS[parts.scheme]
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (ValueError, OSError, UnicodeError) as error:
        raise Refused(f"its host can't be found ({_words(error)})") from None
    return {one[4][:2] for one in found}  # type: ignore[misc]


def _refuse_others(named: set[tuple[str, int]]) -> None:
    """A server may have redirected to another host, which FFmpeg follows and says to nobody.

    No option of it forbids that, so connections are looked at before a frame of them is.
    """
    for descriptor in map(int, os.listdir("/dev/fd")):
        try:
            with socket.socket(fileno=os.dup(descriptor)) as one:
                peer = one.getpeername()[:2]
        except OSError:  # no socket, or one that isn't connected
            continue
        if one.family in (socket.AF_INET, socket.AF_INET6) and peer not in named:
            raise Refused(
                f"its server redirects to {peer[0]}, port {peer[1]}, which nobody named: watch"
                " that address itself if it is right"
            )


def _packets(container: Any, video: Any) -> Any:
    """(packet, what was wrong with the rest of the source) after the other, one to flush last."""
    try:
        for packet in container.demux(video):
            cut = packet.is_corrupt and packet.size
            yield packet, "it has damaged parts, or ends within a frame" if cut else ""
        return
    except av.error.EOFError:
        problem = ""
    except av.error.FFmpegError as error:
        problem = f"it ends early: {_words(error)}"
    yield None, problem


def _decode(packet: Any, counts: dict[str, int]) -> Any:
    try:
        if packet is None:
            return []
        return packet.decode()
    except av.error.EOFError:
        return []
    except MemoryError:
        raise
    except av.error.FFmpegError:
        counts["undecodable"] += 1
        return []


def _words(error: Any) -> str:
    return str(getattr(error, "strerror", None) or error)


# Times --------------------------------------------------------------------------------------------


class Clock:
    """Times since the first frame that only grow, whatever a source's clock does.

    A clock that goes back has been set anew, so what follows is taken to come when the frame before
    it has been shown for as long as it says; so is a frame without a time.

    Attributes:
      last: of the last frame that was read.
    """

    def __init__(self, step: Fraction):
        self._step = step  # how long a frame is shown, until one says it
        self._zero: Fraction | None = None
        self.last = Fraction(0)

    def read(self, frame: Any, counts: dict[str, int]) -> Fraction | None:
        """The time of a frame; None if it is that of the frame before it."""
        if frame.pts is None or frame.time_base is None:  # no time is stated: one step later
            shown = None
        else:
            shown = frame.pts * frame.time_base
        step = self._step
        if frame.duration and frame.time_base:
            self._step = frame.duration * frame.time_base
        if self._zero is None:
            self._zero = Fraction(0) if shown is None else shown
            return self.last
        time = self.last + step if shown is None else shown - self._zero
        if time == self.last:
            return None
        if time < self.last:
            counts["jumps"] += 1
            self._zero -= self.last + step - time
            time = self.last + step
        elif time - self.last > LONG_GAP:
            counts["gaps"] += 1
        self.last = time
        return time


# Pixels -------------------------------------------------------------------------------------------


class Converter:
    """Turns frames of one kind upright and into red, green, blue."""

    def __init__(self, frame: Any, time_base: Fraction, request: dict[str, Any]):
        self._kind = _kind_of(frame)
        turned, filters = _turn(_display_matrix(frame))
        height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
        if max(height, width) > request["most_side"] or height * width > request["most_pixels"]:
            raise Refused(
                f"its frames have {width} x {height} pixels: at most {request['most_side']} a side"
                f" and {request['most_pixels']:,} in all"
            )
        self.size = [height, width]
        graph = Graph()
        last = graph.add(
            "buffer",
            f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
            f":time_base={time_base.numerator}/{time_base.denominator}:pixel_aspect=1/1"
            f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}",
        )
        chain = [*((name, arguments) for name, arguments in filters), ("format", "pix_fmts=rgb24")]
        for name, arguments in [*chain, ("buffersink", None)]:
            following = graph.add(name, arguments) if arguments else graph.add(name)
            last.link_to(following)
            last = following
        graph.configure()
        self._graph = graph

    def fits(self, frame: Any) -> bool:
        """Whether a frame is of this kind."""
        return _kind_of(frame) == self._kind

    def convert(self, frame: Any) -> bytes:
        """u8[H, W, 3] of a frame."""
        self._graph.push(frame)
        plane: Any = self._graph.pull().planes[0]
        row, step = 3 * self.size[1], plane.line_size
        pixels = memoryview(plane)
        if step == row:
            return bytes(pixels[: row * self.size[0]])
        return b"".join(pixels[at : at + row] for at in range(0, step * self.size[0], step))


def _kind_of(frame: Any) -> tuple[Any, ...]:
    matrix = _display_matrix(frame)
    size = frame.width, frame.height
    return (*size, frame.format.name, int(frame.colorspace), int(frame.color_range), matrix)


def _display_matrix(frame: Any) -> tuple[int, ...] | None:
    """(a, b, c, d): a pixel at x, y is shown at (a · x + c · y, b · x + d · y), y downwards."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    entries = struct.unpack("=9i", bytes(data)[:36])
    return entries[0], entries[1], entries[3], entries[4]


def _turn(matrix: tuple[int, ...] | None) -> tuple[bool, list[tuple[str, str]]]:
    """(whether height and width change places, filters that show a frame as the matrix says).

    Of the eight ways that a right angle and a mirror allow; the program ffmpeg's too.
    """
    if matrix is None or not any(matrix):
        return False, []
    a, b, c, d = matrix
    small = max(map(abs, matrix)) / 64
    flips: list[tuple[str, str]] = []
    if abs(b) < small and abs(c) < small:
        turned, across, down = False, a, d
    elif abs(a) < small and abs(d) < small:
        turned, across, down = True, c, b
        flips = [("transpose", "dir=cclock_flip")]  # mirrored at the main diagonal
    else:
        angle = math.degrees(math.atan2(b, a))
        raise Refused(f"it is to be shown turned by {angle:.0f} degrees: convert it to upright")
    flips += [("hflip", "")] if across < 0 else []
    flips += [("vflip", "")] if down < 0 else []
    return turned, flips


if __name__ == "__main__":
    main()
