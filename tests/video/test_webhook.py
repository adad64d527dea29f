"""The webhook on loopback: retries, its log, kills, and hosts that answer anything."""

import http.server
import json
import threading
from contextlib import contextmanager
from fractions import Fraction

import pytest
import scenes
import watch_kills

from vision_jax.errors import UserError
from vision_jax.video import events
from vision_jax.video.outputs import Wanted
from vision_jax.video.webhook import DELIVERIES, Webhook, parse_host, read_taken


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    out = tmp_path_factory.mktemp("log")
    watch_kills.write(out)
    return (out / events.EVENTS).read_bytes().splitlines(keepends=True)[:12]


@contextmanager
def host(statuses):
    """A server that gives these answers in turn, then 204s: (address, [(key, body)])."""
    came, answers = [], iter(statuses)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            came.append((self.headers["Idempotency-Key"], body))
            status = next(answers, 204)
            if not status:  # goes without an answer
                self.close_connection = True
                return
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/alarms?token=secret", came
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def deliver(out, url, seconds=20.0):
    with Webhook(out, parse_host(url), waits=(0.01, 0.02)) as webhook:
        return webhook.finish(seconds), webhook


def test_each_event_is_sent_in_order_and_once(tmp_path, lines):
    (tmp_path / events.EVENTS).write_bytes(b"".join(lines))
    with host([]) as (url, came):
        left, webhook = deliver(tmp_path, url)
        assert (left, webhook.sent) == (0, len(lines))
        assert [body + b"\n" for _, body in came] == lines
        assert len({key for key, _ in came}) == len(lines)
        assert deliver(tmp_path, url)[1].sent == 0  # nothing is new
        assert len(came) == len(lines)


def test_events_are_sent_as_they_are_written(tmp_path, lines):
    path = tmp_path / events.EVENTS
    with host([]) as (url, came), Webhook(tmp_path, parse_host(url)) as webhook:
        for number, line in enumerate(lines, 1):
            with path.open("ab") as file:
                file.write(line)
            webhook.wake()
            assert webhook.finish(20.0) == 0
            assert len(came) == number
        with path.open("ab") as file:
            file.write(b'{"event": "sta')  # half a line is none
        assert webhook.finish(20.0) == 0
        assert len(came) == len(lines)


def test_a_host_that_fails_is_tried_again(tmp_path, lines, capsys):
    (tmp_path / events.EVENTS).write_bytes(b"".join(lines))
    with host([500, 0, 503, 200, 429, 200]) as (url, came):
        left, webhook = deliver(tmp_path, url)
    assert (left, webhook.sent, len(came)) == (0, len(lines), len(lines) + 4)
    assert len({came[i] for i in range(4)}) == 1  # the same key and the same bytes
    noted = (tmp_path / DELIVERIES).read_text().splitlines()[1:]
    tries = [json.loads(line)["tries"] for line in noted]
    assert tries == [4, 2] + [1] * (len(lines) - 2)
    said = capsys.readouterr().out
    assert said.count("trying again") == 2
    assert "secret" not in said


@pytest.mark.parametrize("status", [301, 400, 404])
def test_what_a_host_refuses_is_said_and_not_sent_again(tmp_path, lines, status, capsys):
    (tmp_path / events.EVENTS).write_bytes(b"".join(lines[:2]))
    with host([status]) as (url, came):
        left, webhook = deliver(tmp_path, url)
    assert (left, webhook.sent, webhook.refused, len(came)) == (0, 1, 1, 2)
    assert f"refuses event 1 with status {status}" in capsys.readouterr().out


def test_a_dead_host_loses_nothing(tmp_path, lines, capsys):
    (tmp_path / events.EVENTS).write_bytes(b"".join(lines))
    with host([]) as (url, _):
        pass  # it has gone
    left, webhook = deliver(tmp_path, url, seconds=0.5)
    assert left == len(lines)
    assert "refused" in webhook.reason
    with host([]) as (url, came):
        assert deliver(tmp_path, url)[0] == 0
    assert [body + b"\n" for _, body in came] == lines


def test_a_kill_between_an_answer_and_its_note_sends_one_event_again(tmp_path, lines):
    (tmp_path / events.EVENTS).write_bytes(b"".join(lines))
    with host([]) as (url, came):
        deliver(tmp_path, url)
        noted = (tmp_path / DELIVERIES).read_bytes()
        kept = noted.splitlines(keepends=True)[:6]
        (tmp_path / DELIVERIES).write_bytes(b"".join(kept) + b'{"line": 6, "sta')
        assert read_taken(tmp_path).line == 5
        before = len(came)
        deliver(tmp_path, url)
    assert came[before:] == came[5:before]  # the same keys
    again = (tmp_path / DELIVERIES).read_text().splitlines()[1:]
    assert [json.loads(line)["line"] for line in again] == list(range(1, len(lines) + 1))


@pytest.mark.parametrize(
    "url",
    ["example.org", "ftp://example.org", "http://", "http://a:b:c/", "http://a b/", "http://[/",
     "http://a/käse", "http://a/?q=é", f"http://{'a' * 64}.org/"],
)  # fmt: skip
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="--webhook"):
        parse_host(url)


def test_what_can_not_be_noted_is_told(tmp_path, lines):
    (tmp_path / events.EVENTS).write_bytes(lines[0])
    (tmp_path / DELIVERIES).mkdir()
    with host([]) as (url, _), pytest.raises(UserError, match="cannot write in"):
        deliver(tmp_path, url)


def test_another_log_in_the_folder_is_sent_from_its_first_line(tmp_path, lines):
    """And the same log in another folder has other keys: a host takes both."""
    (tmp_path / "other").mkdir()
    with host([]) as (url, came):
        for folder in (tmp_path, tmp_path / "other"):
            (folder / events.EVENTS).write_bytes(b"".join(lines))
            deliver(folder, url)
        assert len({key for key, _ in came}) == 2 * len(lines)
        other = lines[0].replace(b"made up", b"another")
        (tmp_path / events.EVENTS).write_bytes(b"".join([other, *lines[1:3]]))
        deliver(tmp_path, url)
    assert [body + b"\n" for _, body in came[2 * len(lines) :]] == [other, *lines[1:3]]


def test_a_name_and_password_are_sent_as_such(tmp_path, lines):
    sent = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            sent.append(self.headers["Authorization"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    address = parse_host(f"http://me:a%40b@127.0.0.1:{server.server_port}/")
    assert "me" not in address.name
    (tmp_path / events.EVENTS).write_bytes(lines[0])
    with Webhook(tmp_path, address) as webhook:
        assert webhook.finish(20.0) == 0
    thread.join()
    server.server_close()
    assert sent == ["Basic bWU6YUBi"]


def test_a_watch_sends_what_it_logs(tmp_path):
    with host([503]) as (url, came):
        _, said = scenes.watch(
            tmp_path, wanted=Wanted(Fraction(0), Fraction(0), webhook=parse_host(url))
        )
    logged = (tmp_path / events.EVENTS).read_bytes().splitlines()
    assert [body for _, body in came[1:]] == logged
    assert said[-1].startswith(f"sent {len(logged)} events to http://127.0.0.1")
    assert "secret" not in said[-1]
