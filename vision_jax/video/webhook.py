"""Sends events to a host that the user names, each at least once, in order.

    OUT/deliveries.jsonl   of which log, and which of its lines the host has taken

What is sent is read from events.jsonl, after the last line that the host has taken: nothing is held
in memory, and what a kill or a dead host left out is sent the next time. A line that the host took
just before a kill is sent again: its header Idempotency-Key says that it is the same.

There is one POST for each event, to that host and to nobody else: no proxy, no redirection.
"""

import base64
import datetime
import hashlib
import http.client
import json
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from vision_jax.errors import UserError
from vision_jax.files import parse_json, write_whole
from vision_jax.logging import say
from vision_jax.video import events
from vision_jax.video.lines import append_line, lines_from, whole_lines, writing

DELIVERIES = "deliveries.jsonl"
SECONDS = 10.0  # that a host has to answer
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before another try; the last one repeats
AGAIN = (408, 425, 429)  # answers below 500 after which another try may help


class Host(NamedTuple):
    """Where to.

    Attributes:
      name: for a person, without what may be secret in the address.
      url: all of it.
    """

    name: str
    url: SplitResult


def parse_host(url: str) -> Host:
    """Checks an address.

    Raises:
      UserError: it is none of http or https with a host.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise UserError(f"--webhook: this is no address ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("--webhook takes an address such as https://example.org/alarms")
    if any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise UserError("--webhook: an address has no spaces")
    if not f"{parts.path}{parts.query}".isascii():
        raise UserError(
            "--webhook: what isn't ASCII in an address is written with percent signs, é as %C3%A9"
        )
    return Host(f"{parts.scheme}://{parts.hostname}{f':{port}' if port else ''}", parts)


def post(host: Host, body: bytes, key: str, seconds: float = SECONDS) -> int:
    """One POST of JSON; returns the status of the answer.

    Raises:
      OSError, http.client.HTTPException: no answer.
    """
    kind = http.client.HTTPSConnection if host.url.scheme == "https" else http.client.HTTPConnection
    connection = kind(host.url.hostname or "", host.url.port, timeout=seconds)
    path = (host.url.path or "/") + (f"?{host.url.query}" if host.url.query else "")
    try:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        if host.url.username is not None:
            who = f"{unquote(host.url.username)}:{unquote(host.url.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(who.encode()).decode()}"
        connection.request("POST", path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


class Taken(NamedTuple):
    """What deliveries.jsonl says.

    Attributes:
      log: digest of the first line of the log that its numbers are of.
      key: random, of this file: what is sent again has the same keys, and nothing else has.
      line: of events.jsonl, the last that is done with; 0 if none is.
    """

    log: str
    key: str
    line: int


def read_taken(out: Path) -> Taken | None:
    """What OUT/deliveries.jsonl says; None if there is none.

    Raises:
      UserError: it is something else.
    """
    path = out / DELIVERIES
    if not path.is_file():
        return None
    found = None
    for number, line, _ in whole_lines(path):
        record = parse_json(line, f"{path}: line {number}")
        try:
            if found is None:
                found = Taken(str(record["log"]), str(record["key"]), 0)
            else:
                found = found._replace(line=max(found.line, int(record["line"])))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: line {number} is of no delivery") from error
    return found


class Webhook:
    """A thread that sends events as they are written; a context manager.

    Attributes:
      host: where to.
      sent: events that the host took.
      refused: events that it won't take.
      tries: in vain, since the last answer.
      reason: of the last one of these.
    """

    def __init__(
        self,
        out: Path,
        host: Host,
        waits: tuple[float, ...] = WAITS,
        send: Callable[[Host, bytes, str], int] = post,
    ):
        self.sent = self.refused = self.tries = 0
        self._out, self.host, self._waits, self._send = out, host, waits, send
        self.reason = ""
        self._key = ""
        self._line = self._offset = 0
        self._read = 0  # lines up to the offset
        self._news, self._stop = threading.Event(), threading.Event()
        self._moved = threading.Condition()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)

    def __enter__(self) -> "Webhook":
        self._thread.start()
        self.wake()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.wake()
        self._thread.join(SECONDS + 1)

    def wake(self) -> None:
        """Says that events were written."""
        self._news.set()

    def finish(self, seconds: float) -> int:
        """Waits until all events are sent, for at most so many seconds; how many are left then.

        Raises:
          UserError: deliveries.jsonl can't be written.
        """
        path = self._out / events.EVENTS
        lines = sum(1 for _ in whole_lines(path)) if path.is_file() else 0
        self.wake()
        with self._moved:
            self._moved.wait_for(lambda: self._line >= lines or self._failure, seconds)
        if self._failure:
            raise self._failure
        return max(lines - self._line, 0)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._news.wait()
                self._news.clear()
                self._send_new()
        except BaseException as error:  # told by finish, too
            say(f"{self.host.name}: nothing more is sent ({error})")
            with self._moved:
                self._failure = error
                self._moved.notify_all()

    def _send_new(self) -> None:
        path = self._out / events.EVENTS
        if not path.is_file():
            return
        for line, after in lines_from(path, self._offset):
            number = self._read + 1
            if number == 1:
                self._begin(hashlib.sha256(line).hexdigest())
            if number > self._line and not self._deliver(line, number):
                return
            self._read, self._offset = number, after

    def _begin(self, log: str) -> None:
        """Takes up what was delivered of this log; numbers of another one are of no use."""
        known = read_taken(self._out)
        if known is None or known.log != log:
            known = Taken(log, secrets.token_hex(16), 0)
            first = json.dumps({"log": known.log, "key": known.key})
            with writing(self._out):
                write_whole(f"{first}\n".encode(), self._out / DELIVERIES)
        self._key = known.key
        with self._moved:
            self._line = known.line
            self._moved.notify_all()

    def _deliver(self, line: bytes, number: int) -> bool:
        """Until the host takes it or won't; False if it is time to stop."""
        for attempt in range(1, 10**9):
            if self._stop.is_set():
                return False
            status, reason = 0, ""
            text = f"{self._key} {number} ".encode() + line
            try:
                status = self._send(self.host, line, hashlib.sha256(text).hexdigest()[:32])
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            final = status and status < 500 and status not in AGAIN
            if final:
                accepted = 200 <= status < 300
                self.sent += accepted
                self.refused += not accepted
                self.tries, self.reason = 0, ""
                self._note(number, status, attempt)
                with self._moved:
                    self._line = number
                    self._moved.notify_all()
                if not accepted:
                    say(f"{self.host.name} refuses event {number} with status {status}")
                return True
            self.tries += 1
            self.reason = f"status {status}" if status else reason
            if attempt == 1:
                say(f"{self.host.name} doesn't take event {number} ({self.reason}): trying again")
            self._stop.wait(self._waits[min(attempt, len(self._waits)) - 1])
        return False

    def _note(self, number: int, status: int, tries: int) -> None:
        at = datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
        record = {"line": number, "status": status, "tries": tries, "at": at.isoformat()}
        append_line(self._out / DELIVERIES, json.dumps(record))
