"""Images of a request: a raw body or a form's files, within bounds, and never by an address.

Bounds are held while bytes come in: of a request, of all requests together, and of time. An image's
pixels are counted from its header before one of them is decoded (data/decode.py).
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vision_jax.data.decode import (
    DamagedImageError,
    Picture,
    TooManyPixelsError,
    UnknownFormatError,
    decode_array,
    decode_picture,
)
from vision_jax.errors import UserError, printable, utf8

if TYPE_CHECKING:
    from starlette.requests import Request

FORM = "multipart/form-data"
RAW = ("application/octet-stream", "binary/octet-stream", "")  # beside image/...
NPY = b"\x93NUMPY"
MOST_FIELDS = 16  # of a form, beside its files
FIELD_BYTES = 1024
LONGEST_NAME = 200  # characters of a file's name
LINGER = 2  # seconds that the rest of a refused body is read and thrown away
NAME = "image"  # of a raw body


class Refused(Exception):
    """A request, or an image, that gets no answer.

    Attributes:
      status: of HTTP.
      retry_after: seconds, with 503.
    """

    def __init__(self, status: int, message: str, retry_after: int = 0):
        super().__init__(printable(utf8(message)))
        self.status, self.retry_after = status, retry_after

    def let_go(self) -> None:
        """Forgets where it came from: frames that hold the image, and this error in a circle."""
        self.__traceback__ = self.__context__ = None


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
      body_bytes: of one request.
      held_bytes: of all bodies at once.
      pixels: of one image, by its header.
      images: in one request.
      seats: images at once, of all requests, from the first byte to the answer.
      seconds: from a request's head to its answer.
    """

    body_bytes: int = 32_000_000
    held_bytes: int = 256_000_000
    pixels: int = 25_000_000
    images: int = 16
    seats: int = 256
    seconds: float = 30.0


class Upload(NamedTuple):
    """A file as it came."""

    name: str
    data: bytes


class Room:
    """What all requests together hold, for the one thread of the event loop."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.seats = self.bytes = 0

    def enter(self) -> "Seat":
        """A request's place. Raises Refused where none is free."""
        seat = Seat(self)
        seat.take(1)
        return seat


class Seat:
    """A request's part of a room; `leave` gives it back.

    Attributes:
      works: what holds the request's images, even when its client has left.
    """

    def __init__(self, room: Room):
        self._room = room
        self._seats = self._bytes = 0
        self.works: list[asyncio.Future[Any]] = []

    def take(self, seats: int) -> None:
        """Room for more images. Raises Refused where there is none."""
        if self._room.seats + seats > self._room.limits.seats:
            raise Refused(503, f"busy: {self._room.limits.seats} images are in work: try again", 1)
        self._room.seats += seats
        self._seats += seats

    def hold(self, count: int) -> None:
        """Room for more bytes. Raises Refused where there is none."""
        if self._room.bytes + count > self._room.limits.held_bytes:
            raise Refused(503, "busy: too many bytes are coming in: try again", 1)
        self._room.bytes += count
        self._bytes += count

    def leave(self) -> None:
        """Gives all of it back, once all works have ended."""
        for work in self.works:
            if not work.done():
                work.add_done_callback(lambda _: self.leave())
                return
        self._room.seats -= self._seats
        self._room.bytes -= self._bytes
        self._seats = self._bytes = 0


async def read_uploads(request: "Request", seat: Seat, limits: Limits) -> list[Upload]:
    """The files of a request: its body, or those of a form.

    Raises:
      Refused: another kind of body, none, too many bytes or files, or a damaged form.
      starlette.requests.ClientDisconnect: the client is gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM:
        uploads = await _read_form(request, seat, limits)
    elif kind.startswith("image/") or kind in RAW:
        data = b"".join([chunk async for chunk in _stream(request, seat, limits)])
        uploads = [Upload(NAME, data)] if data else []
    else:
        raise Refused(
            415,
            f"a body of type {kind[:80]}: send the bytes of an image with its type, image/jpeg "
            f"say, or {FORM} with files; no address is ever fetched",
        )
    if not uploads:
        raise Refused(400, "no image: send its bytes as the body, or as files of a form")
    return uploads


async def _stream(request: "Request", seat: Seat, limits: Limits) -> AsyncGenerator[bytes, None]:
    """The body, as long as it keeps to the bounds."""
    too_large = Refused(413, f"more than {limits.body_bytes} bytes: send a smaller image, or fewer")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > limits.body_bytes:
        raise too_large
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limits.body_bytes:
            raise too_large
        seat.hold(len(chunk))
        yield chunk


async def _read_form(request: "Request", seat: Seat, limits: Limits) -> list[Upload]:
    from python_multipart.exceptions import FormParserError
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    class InMemory(MultiPartParser):  # the disk may be read-only
        spool_max_size = limits.body_bytes + 1

    parser = InMemory(
        request.headers,
        _stream(request, seat, limits),
        max_files=limits.images,
        max_fields=MOST_FIELDS,
        max_part_size=FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        text = error.message if isinstance(error, MultiPartException) else str(error)
        if text.startswith("Too many files"):
            text = f"more than {limits.images} images: send them in several requests"
            raise Refused(413, text) from None
        raise Refused(400, f"a damaged form: {text}") from None
    try:
        files = [file for _, file in form.multi_items() if isinstance(file, UploadFile)]
        names = [(file.filename or NAME)[:LONGEST_NAME] for file in files]
        read = [await file.read() for file in files]
        return [
            Upload(utf8(name), data)
            for name, data in zip(names, read, strict=True)
            if data or name != NAME  # a form's empty choice of files
        ]
    finally:
        await form.close()


async def linger(request: "Request") -> None:
    """Reads what still comes of a refused body, for a client looks at no answer before it has sent.

    For a short while, and nothing is kept.
    """
    from starlette.requests import ClientDisconnect

    try:
        async with asyncio.timeout(LINGER):
            async for _ in request.stream():
                pass
    except (TimeoutError, ClientDisconnect, RuntimeError):
        pass


def decode(upload: Upload, limits: Limits) -> Picture:
    """An image's pixels, by the package's reader of hostile files.

    Raises:
      Refused: 413 for too many pixels, 415 for another format, 422 for a damaged file.
    """
    name, data = upload
    try:
        if data.startswith(NPY):
            array = decode_array(data, name=name)
            if array.shape[0] * array.shape[1] > limits.pixels:
                raise TooManyPixelsError(f"{name}: more than {limits.pixels} pixels: shrink it")
            return array
        return decode_picture(data, name=name, max_pixels=limits.pixels)
    except DamagedImageError as error:
        raise refusal(error) from None


def refusal(error: UserError) -> Refused:
    """An image's error with its status."""
    if isinstance(error, TooManyPixelsError):
        return Refused(413, str(error))
    return Refused(415 if isinstance(error, UnknownFormatError) else 422, str(error))


def look_at(upload: Upload, limits: Limits, look: Any) -> Any:
    """An upload's view (model.Servable.look). Raises Refused."""
    try:
        return look(decode(upload, limits))
    except DamagedImageError as error:
        raise Refused(refusal(error).status, f"{upload.name}: {error}") from None
    except MemoryError:
        raise Refused(413, f"{upload.name}: no memory for its pixels: shrink it") from None
