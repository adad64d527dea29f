"""An RTSP server on the loopback: frames of a walking square by RTP within the one connection.

Packets are made by FFmpeg's own muxer of RTP, and RTSP is RFC 2326's, as far as a client asks for
it that plays one video over TCP.
"""

import base64
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from fractions import Fraction

import av

SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=a square\r\nt=0 0\r\n"
    "m=video 0 RTP/AVP 32\r\na=control:video\r\n"  # 32: MPEG-1 and 2, by RFC 2250
)


class Packets:
    """A file that takes what the muxer writes, packet by packet."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []

    def write(self, data) -> int:
        self.waiting.append(bytes(data))
        return len(data)


def packets_of(pictures, rate=25) -> Iterator[list[bytes]]:
    """RTP packets of each picture u8[H, W, 3]."""
    file = Packets()
    with av.open(file, "w", format="rtp", options={"rtpflags": "skip_rtcp"}) as container:
        stream = container.add_stream("mpeg2video", rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.bit_rate, stream.gop_size, stream.max_b_frames = (
            "yuv420p",
            10**6,
            1,  # each frame is one by itself
            0,
        )
        for index, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(frame))
            yield [file.waiting.pop(0) for _ in range(len(file.waiting))]
        container.mux(stream.encode(None))
    yield file.waiting


class Server:
    """Answers clients at `address` until it is closed; a context manager.

    Attributes:
      address: rtsp://127.0.0.1:PORT/walk, where the pictures are.
      asked: (method, path) of all requests.
      moves: {path: the address to which clients are redirected}.
    """

    def __init__(
        self,
        pictures=(),
        *,
        then="teardown",
        moved="",
        pause=0.0,
        word="",
        host="127.0.0.1",
        proof=None,
    ):
        """Begins to listen.

        Args:
          pictures: u8[H, W, 3] each.
          then: what comes after the last: "teardown" closes, "stall" sends nothing more, "reset"
            closes within a packet.
          moved: an address to which clients are redirected.
          pause: seconds between pictures.
          word: NAME:PASSWORD that a client must have, by RFC 2617's basic scheme.
          host: where it listens.
          proof: (certificate, key), files in PEM; then it speaks TLS, and its address is rtsps://.
        """
        self._packets = list(packets_of(pictures)) if len(pictures) else []
        self._then, self._pause, self._word = then, pause, word
        self.moves = {"/walk": moved} if moved else {}
        self._closed = threading.Event()
        self._socket = socket.create_server((host, 0))
        self._tls = None
        if proof is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*proof)
        self.address = f"rtsp{'s' if proof else ''}://{host}:{self._socket.getsockname()[1]}/walk"
        self.asked: list[tuple[str, str]] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            stack.enter_context(connection)
            lines = stack.enter_context(connection.makefile("rb"))
            while request := lines.readline().split():
                method, url = request[0].decode(), request[1].decode()
                heads = {}
                while line := lines.readline().strip():
                    name, _, value = line.decode().partition(":")
                    heads[name.lower()] = value.strip()
                path = "/" + url.split("://")[-1].partition("/")[2]
                self.asked.append((method, path))
                connection.sendall(self._answer(method, path, heads))
                if method == "PLAY":
                    self._play(connection)
                    if isinstance(connection, ssl.SSLSocket):
                        connection.unwrap()  # says that this is the end
                    return

    def _answer(self, method: str, path: str, heads: dict[str, str]) -> bytes:
        status, more, body = "200 OK", "", ""
        if method == "OPTIONS":
            more = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
        elif self._word and not self._may(heads):
            status, more = "401 Unauthorized", 'WWW-Authenticate: Basic realm="door"\r\n'
        elif path in self.moves:
            status, more = "302 Found", f"Location: {self.moves[path]}\r\n"
        elif not path.startswith("/walk"):
            status = "404 Not Found"
        elif method == "DESCRIBE":
            more, body = "Content-Type: application/sdp\r\n", SDP
        elif method == "SETUP":
            more = f"Transport: {heads['transport']}\r\nSession: 1\r\n"
        elif method == "PLAY":
            more = "Session: 1\r\n"
        head = f"RTSP/1.0 {status}\r\nCSeq: {heads['cseq']}\r\n{more}"
        return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()

    def _may(self, heads: dict[str, str]) -> bool:
        given = heads.get("authorization", "").removeprefix("Basic ")
        return base64.b64decode(given).decode() == self._word

    def _play(self, connection: socket.socket) -> None:
        for packets in self._packets:
            for packet in packets:
                connection.sendall(struct.pack("!cBH", b"$", 0, len(packet)) + packet)
            self._closed.wait(self._pause)
        if self._then == "reset":
            connection.sendall(struct.pack("!cBH", b"$", 0, 500) + bytes(100))
        elif self._then == "stall":
            self._closed.wait()
