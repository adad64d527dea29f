"""How supervisors talk: a JSON object a line, over TCP, each with that of process 0.

The hub, supervisor 0, hears all others and judges; a spoke reports and hears the verdict. What
comes over the line is checked: the port may be seen by others than supervisors.
"""

import contextlib
import hmac
import json
import os
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vision_jax.errors import UserError, printable
from vision_jax.hosts import judge
from vision_jax.hosts.judge import Report, Verdict

TICK = 0.2  # seconds between looks
SECONDS_BETWEEN_REPORTS = 1.0
COMING = 300.0  # seconds for all to come
LONGEST_LINE = 65_536  # bytes of a message
LEAVING = 5.0  # seconds for the others to read why
SECRET = "VISION_JAX_SECRET"  # in the environment: supervisors take in those alone that know it


@dataclass(frozen=True)
class Place:
    """A process's place in its run.

    Attributes:
      coordinator: HOST:PORT where the supervisors meet; "" if this one has all processes.
      processes: how many there are.
      first: the first that this supervisor has.
      count: how many it has.
    """

    coordinator: str
    processes: int
    first: int
    count: int = 1


@dataclass
class _Peer:
    """Another supervisor, from this one's end of the line."""

    connection: socket.socket
    heard: float = field(default_factory=time.monotonic)
    closed: bool = False
    unread: bytes = b""

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a peer that is gone shows when it is read
            self.connection.send(json.dumps(message).encode() + b"\n", _no_signal())

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come; closes the line of one who says something else."""
        messages: list[dict[str, Any]] = []
        try:
            while piece := self.connection.recv(LONGEST_LINE):
                self.unread += piece
                *lines, self.unread = self.unread.split(b"\n")
                if len(self.unread) > LONGEST_LINE:
                    raise ValueError("too long")
                found = [json.loads(line) for line in lines]
                if not all(isinstance(one, dict) for one in found):
                    raise ValueError("not an object")
                messages += found
            self.closed = True
        except BlockingIOError:
            pass
        except (OSError, ValueError, RecursionError):
            self.closed = True
        if messages:
            self.heard = time.monotonic()
        return messages


def _no_signal() -> int:
    return getattr(socket, "MSG_NOSIGNAL", 0) | getattr(socket, "MSG_DONTWAIT", 0)


class Hub:
    """Supervisor 0: hears all others, and judges."""

    def __init__(self, place: Place):
        self._place, self._begun = place, time.monotonic()
        self._listener: socket.socket | None = None
        self._strangers: list[_Peer] = []
        self._peers: dict[int, _Peer] = {}
        self._known: dict[int, Report] = {}
        self._refused: tuple[Verdict, float] | None = None  # and when
        self._said = 0.0
        self.address = ""
        self.done = False
        if place.coordinator:
            host, port = split_address(place.coordinator)
            self._listener = _listen(host, port)
            self._host, self._next = host, port + 1
        else:
            self._host, self._next = "127.0.0.1", 0

    def forget(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def exchange(self, own: dict[int, Report]) -> Verdict | None:
        """Hears the others for a tick; judges, and tells them the verdict."""
        self._hear()
        reports = {**own}
        now = time.monotonic()
        for process, peer in self._peers.items():
            known = self._known[process]
            reports[process] = replace(known, silent=now - peer.heard, closed=peer.closed)
        if len(reports) < self._place.processes:
            verdict = self._refusal(len(reports), now)
            verdict = verdict or judge.find_cause(reports) or self._missing(reports)
        else:
            if not self.address:
                name = f"[{self._host}]" if ":" in self._host else self._host
                self.address = f"{name}:{free_port(self._host, self._next)}"
                self._tell({"address": self.address})
            verdict = judge.find_cause(reports)
            self.done = all(one.fine for one in reports.values())
        if verdict is not None:
            self._tell({"verdict": asdict(verdict)})
        elif now - self._said > SECONDS_BETWEEN_REPORTS or self.done:
            self._said = now
            self._tell({"done": self.done})
        return verdict

    def _refusal(self, here: int, now: float) -> Verdict | None:
        """What ends all because of one that was refused, when the others have come to hear it."""
        if self._refused is None:
            return None
        verdict, since = self._refused
        return verdict if here + 1 >= self._place.processes or now - since > LEAVING else None

    def _missing(self, reports: dict[int, Report]) -> Verdict | None:
        waited = time.monotonic() - self._begun
        if waited < COMING:
            return None
        missing = sorted(set(range(self._place.processes)) - set(reports))
        names = ", ".join(map(str, missing[:8]))
        line = (
            f"process {names} has not come to {self._place.coordinator} within {waited:.0f} s: was "
            "it started, and can it reach that address?"
        )
        return Verdict(line, judge.LOST, missing[0])

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self._peers.values():
            peer.send(message)

    def leave(self) -> None:
        """Waits until the others have read the verdict and left."""
        end = time.monotonic() + LEAVING
        while time.monotonic() < end and any(not peer.closed for peer in self._peers.values()):
            for peer in self._peers.values():
                peer.receive()
            time.sleep(0.05)

    def _hear(self) -> None:
        open_ones = [p for p in (*self._strangers, *self._peers.values()) if not p.closed]
        watched: list[Any] = [peer.connection for peer in open_ones]
        if self._listener is not None:
            watched.append(self._listener)
        readable = _readable(watched)
        if self._listener in readable:
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()  # type: ignore[union-attr]
                _prepare(connection)
                self._strangers.append(_Peer(connection))
        for process, peer in self._peers.items():
            if peer.connection in readable:
                self._note(process, peer.receive())
        for stranger in [one for one in self._strangers if one.connection in readable]:
            if messages := stranger.receive():
                self._greet(stranger, messages[0])
                for process, peer in self._peers.items():
                    if peer is stranger:
                        self._note(process, messages[1:])
        now = time.monotonic()
        for stranger in list(self._strangers):
            if stranger.closed or now - stranger.heard > judge.SILENCE:  # a port scanner
                stranger.connection.close()
                self._strangers.remove(stranger)

    def _note(self, process: int, messages: Sequence[dict[str, Any]]) -> None:
        """Takes reports; whoever says anything else is no supervisor of this version."""
        for message in messages:
            report = judge.read_report(message.get("report"))
            if report is None:
                self._peers[process].closed = True
                return
            self._known[process] = report

    def _greet(self, stranger: _Peer, message: dict[str, Any]) -> None:
        """Takes a supervisor in, or tells it why not."""
        process, processes = message.get("process"), message.get("processes")
        count = self._place.processes
        secret = str(message.get("secret")).encode(errors="replace")
        known = hmac.compare_digest(secret, os.environ.get(SECRET, "").encode())
        if not (type(process) is int and type(processes) is int and known):
            stranger.closed = True
            return
        host = printable(str(message.get("host")))[:100]
        refusal = ""
        if processes != count:
            refusal = f"was started with --processes={processes}, and process 0 with {count}"
        elif not 0 < process < count:
            refusal = f"has no place among {count} processes"
        elif process in self._peers:
            refusal = "is here already: two were started with the same --process"
        if refusal:
            line = f"process {process} ({host}) {refusal}: start each with its own"
            stranger.send({"verdict": asdict(Verdict(line, judge.BAD, process))})
            if not self.address:  # nothing has begun: all end with it
                self._refused = self._refused or (
                    Verdict(line, judge.BAD, process),
                    time.monotonic(),
                )
            stranger.closed = True
            return
        self._strangers.remove(stranger)
        self._peers[process] = stranger
        self._known[process] = Report(host=host)
        if self.address:
            stranger.send({"address": self.address})


class Spoke:
    """Any other supervisor: tells supervisor 0 what it knows, and hears the verdict."""

    def __init__(self, place: Place):
        self._place, self._begun = place, time.monotonic()
        self._peer: _Peer | None = None
        self._told = 0.0
        self._last: tuple[Any, ...] = ()
        self.address = ""
        self.done = False

    def forget(self) -> None:
        """Nothing is open before the fork."""

    def leave(self) -> None:
        """Nobody waits for this one."""

    def exchange(self, own: dict[int, Report]) -> Verdict | None:
        """Reports, waits for a tick and hears supervisor 0."""
        ((process, report),) = own.items()
        if self._peer is None:
            return self._connect(process, report)
        now = time.monotonic()
        news = (report.code, report.kind, report.step, report.phase, report.state)
        if news[:2] != self._last[:2] or now - self._told > SECONDS_BETWEEN_REPORTS:
            self._last, self._told = news, now
            self._peer.send({"report": asdict(report)})
        readable = _readable([self._peer.connection] if not self._peer.closed else [])
        for message in self._peer.receive() if readable else ():
            if "address" in message:
                self.address = str(message["address"])[:200]
            self.done = self.done or bool(message.get("done"))
            if (verdict := judge.read_verdict(message.get("verdict"))) is not None:
                return verdict
        if self.done:
            return None
        silent = time.monotonic() - self._peer.heard
        if self._peer.closed or silent > judge.SILENCE:
            how = (
                "its connection closed"
                if self._peer.closed
                else f"no sign of life for {silent:.0f} s"
            )
            place = f"this one was {report.place}"
            host, _ = split_address(self._place.coordinator)
            return Verdict(f"process 0 ({host}) is lost: {how}; {place}", judge.LOST, 0)
        return None

    def _connect(self, process: int, report: Report) -> Verdict | None:
        try:
            connection = socket.create_connection(split_address(self._place.coordinator), 5)
        except OSError as error:
            waited = time.monotonic() - self._begun
            if waited > COMING or report.code is not None:
                line = (
                    f"process 0 does not answer at {self._place.coordinator} since {waited:.0f} s "
                    f"({error.strerror or error}): was it started, and can it be reached?"
                )
                return Verdict(line, judge.LOST, 0)
            time.sleep(TICK)
            return None
        _prepare(connection)
        self._peer = _Peer(connection)
        hello = {"process": process, "processes": self._place.processes, "host": report.host}
        self._peer.send({**hello, "secret": os.environ.get(SECRET, "")})
        return None


def _readable(sockets: Sequence[socket.socket]) -> list[Any]:
    """Those of which something can be read, within a tick."""
    with selectors.DefaultSelector() as selector:
        for one in sockets:
            selector.register(one, selectors.EVENT_READ)
        if not sockets:
            time.sleep(TICK)
        return [key.fileobj for key, _ in selector.select(TICK if sockets else 0)]


def make_link(place: Place) -> Hub | Spoke:
    return Hub(place) if place.first == 0 else Spoke(place)


def _prepare(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT or [IPv6]:PORT.

    Raises:
      UserError: it is none.

    Examples:
      >>> split_address("[::1]:80")
      ('::1', 80)
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise UserError(f"--coordinator={address}: it must be HOST:PORT of process 0, or auto")
    return host, int(port)


def _listen(host: str, port: int) -> socket.socket:
    """On all addresses of this machine; on the loopback's alone where that is what is named."""
    local = host in ("127.0.0.1", "localhost", "::1")
    try:
        if local or not socket.has_dualstack_ipv6():
            family = socket.AF_INET6 if host == "::1" else socket.AF_INET
            listener = socket.create_server((host if local else "", port), family=family)
        else:
            listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
        raise UserError(
            f"--coordinator={host}:{port}: process 0 cannot listen there ({error.strerror}): give "
            "a free port of its machine"
        ) from error
    listener.setblocking(False)
    return listener


def free_port(host: str = "", wanted: int = 0) -> int:
    """A TCP port that nobody listens at: this one, if it is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in (wanted, 0) if 0 < wanted < 65_536 else (0,):
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("::" if family == socket.AF_INET6 else "", port))
            return int(probe.getsockname()[1])
    raise UserError("there is no free port")
