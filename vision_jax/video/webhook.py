"""Sends events to a host that the user names, each at least once, in order.

    OUT/deliveries.jsonl   which lines of events.jsonl the host has taken, and after how many tries

What is sent is read from events.jsonl, after the last line that the host has taken: nothing is held
in memory, and what a kill or a dead host left out is sent the next time. A line that the host took
just before a kill is sent again: its header Idempotency-Key says that it is the same.

There is one POST for each event, to that host and to nobody else: no proxy, no redirection.
"""

import datetime
import hashlib
import http.client
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from vision_jax.errors import UserError
from vision_jax.files import parse_json
from vision_jax.logging import say
from vision_jax.video import events
from vision_jax.video.lines import append_line, lines_from, whole_lines

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
    except ValueError as error:
        raise UserError(f"--webhook: this is no address ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("--webhook takes an address such as https://example.org/alarms")
    if any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise UserError("--webhook: an address has no spaces")
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
        connection.request("POST", path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def taken(out: Path) -> int:
    """The last line of events.jsonl that is done with; 0 if none is."""
    path = out / DELIVERIES
    last = 0
    if path.is_file():
        for number, line, _ in whole_lines(path):
            record = parse_json(line, f"{path}: line {number}")
            if not isinstance(record, dict) or not isinstance(record.get("line"), int):
                raise UserError(f"{path}: line {number} is of no delivery")
            last = max(last, record["line"])
    return last


class Webhook:
    """A thread that sends events as they are written; a context manager.

    Attributes:
      host: where to.
      sent: events that the host took.
      refused: events that it won't take.
      tries: in vain, since the last success.
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
        self._key = ""
        self._line, self._offset = taken(out), 0
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
        except BaseException as error:  # told by finish
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
                self._key = hashlib.sha256(line).hexdigest()[:16]
            if number > self._line and not self._deliver(line, number):
                return
            self._read, self._offset = number, after

    def _deliver(self, line: bytes, number: int) -> bool:
        """Until the host takes it or won't; False if it is time to stop."""
        for attempt in range(1, 10**9):
            if self._stop.is_set():
                return False
            status, reason = 0, ""
            try:
                status = self._send(self.host, line, f"{self._key}-{number}")
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            final = status and status < 500 and status not in AGAIN
            if final:
                accepted = 200 <= status < 300
                self.sent += accepted
                self.refused += not accepted
                self.tries = 0
                self._note(number, status, attempt)
                with self._moved:
                    self._line = number
                    self._moved.notify_all()
                if not accepted:
                    say(f"{self.host.name} refuses event {number} with status {status}")
                return True
            self.tries += 1
            if attempt == 1:
                what = f"status {status}" if status else reason
                say(f"{self.host.name} doesn't take event {number} ({what}): trying again")
            self._stop.wait(self._waits[min(attempt, len(self._waits)) - 1])
        return False

    def _note(self, number: int, status: int, tries: int) -> None:
        at = datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
        record = {"line": number, "status": status, "tries": tries, "at": at.isoformat()}
        append_line(self._out / DELIVERIES, json.dumps(record))
