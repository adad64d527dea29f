"""Supervisors of processes that don't know JAX: whatever ends one, ends all in one line."""

import os
import re
import signal
import sys
import time

import pytest
from clusters import Cluster, free_port

from vision_jax.hosts import board, judge

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# A run without JAX: each process says that it is at one step after the other, and does what is
# asked of it at step 5. Limits are small, so that silence is noticed soon.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from vision_jax.hosts import board, judge, link, supervise

fault, victim, folder, address, processes, process = sys.argv[1:7]
short = fault in ("SIGSTOP", "silence")  # where it is what is waited for
judge.SILENCE, judge.STANDSTILL = (3.0, 2.5) if short else (60.0, 60.0)
judge.GRACE, judge.CONSEQUENCE = 0.5, 60.0
link.SECONDS_BETWEEN_REPORTS = board.SECONDS_BETWEEN_BEATS = 0.1
link.COMING = 2.0 if fault == "alone" else 60.0
address, _, number = address.partition("#")
place = link.Place(address, int(processes), int(process))
mine = supervise.start(place)
mine.board.wait_for_address()
mine.board.have_patience(2.0 if fault == "slow" else 60.0)
Path(folder, f"pid{process}").write_text(str(os.getpid()))
hit = process == victim
for step in range(1, 400):
    mine.board.at(step, board.DATA)
    if step == 5:
        Path(folder, f"at5_{process}").touch()
        if hit and fault in vars(signal):
            os.kill(os.getpid(), getattr(signal, fault))
        if hit and fault == "slow":
            time.sleep(60)
        if hit and fault == "bad":
            mine.board.say("no image is sound", board.BAD_INPUT)
            sys.exit(2)
        if hit and fault == "unforeseen":
            mine.board.say("KeyError: 3", board.UNFORESEEN)
            sys.stderr.write("Traceback (most recent call last):\\nKeyError: 3\\n")
            sys.exit(1)
        if hit and fault == "collective":
            os.kill(os.getpid(), 9)
        if fault == "collective":
            mine.board.say("Gloo: connection closed by peer", board.UNFORESEEN)
            sys.stderr.write("Traceback of a consequence\\n")
            sys.exit(1)
        if hit and fault == "grandchild":
            import subprocess
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
            os.kill(os.getpid(), 9)
        if fault == "done":
            print("done", process)
            sys.exit(0)
    mine.board.at(step, board.WAIT)
    time.sleep(0.05 if step < 5 or fault not in ("idle", "silence", "slow") else 60)
"""


@pytest.fixture
def start(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    clusters = []

    def make(fault, victim, count=3, numbers=None, counts=None, **keywords):
        port = free_port()
        address = f"127.0.0.1:{port}"
        commands = [
            [program, fault, victim, tmp_path, address, (counts or {}).get(n, count), number]
            for n, number in enumerate(numbers or range(count))
        ]
        clusters.append(Cluster(commands, **keywords))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.__exit__()


def ended(cluster, code, words, but=()):
    """All end with the code and one line with the words, and leave nothing running."""
    codes = cluster.wait(60, but)
    assert [c for n, c in enumerate(codes) if n not in but] == [code] * (len(codes) - len(but)), (
        cluster.screens()
    )
    for n in range(len(codes)):
        if n not in but:
            (line,) = cluster.errors(n)
            assert re.search(words, line), line


FAULTS = {
    "SIGKILL": (judge.LOST, r"process {} \(\S+\) was killed by SIGKILL .* at step 5, reading data"),
    "SIGSEGV": (judge.LOST, r"process {} \(\S+\) was killed by SIGSEGV"),
    "SIGSTOP": (judge.LOST, r"process {} \(\S+\) is stopped \(SIGSTOP\) since"),
    "slow": (judge.LOST, r"process {} \(\S+\) is slow: the others wait .* step 5, reading data"),
    "bad": (judge.LOST, r"process {} \(\S+, step 5\): no image is sound"),
    "unforeseen": (1, r"process {} \(\S+, step 5\): KeyError: 3"),
    "collective": (judge.LOST, r"process {} \(\S+\) was killed by SIGKILL"),
    "grandchild": (judge.LOST, r"process {} \(\S+\) was killed by SIGKILL"),
}


@pytest.mark.long(but=("SIGKILL-1", "bad-0"))
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_end_of_one_is_told_to_all(start, fault, victim):
    code, words = FAULTS[fault]
    cluster = start(fault, victim)
    ended(cluster, code, words.format(victim))
    assert cluster.no_orphans()


@pytest.mark.long
def test_the_traceback_is_shown_where_it_belongs(start):
    cluster = start("unforeseen", 1)
    ended(cluster, 1, "KeyError: 3")
    assert ["Traceback" in errors for _, errors in cluster.screens()] == [False, True, False]


@pytest.mark.long
def test_a_consequence_is_not_shown(start):
    cluster = start("collective", 1)
    cluster.wait(60)
    for _, errors in cluster.screens():
        assert "Traceback of a consequence" not in errors


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_supervisor_that_is_killed_takes_its_process_along(start, victim, tmp_path):
    cluster = start("idle", -1)
    cluster.wait_until(lambda: all((tmp_path / f"at5_{n}").exists() for n in range(3)))
    os.kill(cluster.children[victim].pid, signal.SIGKILL)
    words = rf"process {victim} \(\S+\) is lost: its connection closed"
    ended(cluster, judge.LOST, words, but=[victim])
    assert cluster.no_orphans()


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_supervisor_that_is_stopped(start, victim, tmp_path):
    cluster = start("silence", -1)
    cluster.wait_until(lambda: all((tmp_path / f"at5_{n}").exists() for n in range(3)))
    os.kill(cluster.children[victim].pid, signal.SIGSTOP)
    ended(cluster, judge.LOST, rf"process {victim} \(\S+\) is lost: no sign of life", but=[victim])
    os.kill(cluster.children[victim].pid, signal.SIGCONT)
    assert cluster.wait(60)[victim] == judge.LOST
    assert cluster.no_orphans()


def test_signals_reach_the_process_once(start, tmp_path):
    cluster = start("idle", -1, count=1)
    cluster.wait_until((tmp_path / "at5_0").exists)
    os.kill(cluster.children[0].pid, signal.SIGTERM)
    assert cluster.wait(60) == [128 + signal.SIGTERM]
    assert cluster.no_orphans()


def test_all_that_end_well_end_with_0_and_say_nothing(start):
    cluster = start("done", -1)
    assert cluster.wait(60) == [0, 0, 0]
    assert cluster.screens() == [(f"done {n}\n", "") for n in range(3)]


@pytest.mark.long
def test_one_that_never_comes(start):
    cluster = start("alone", -1, count=3, numbers=[0, 1])
    ended(cluster, judge.LOST, r"process 2 has not come to 127.0.0.1:\d+ within [23] s")


@pytest.mark.long
def test_process_0_that_never_comes(start):
    cluster = start("alone", -1, count=2, numbers=[1])
    ended(cluster, judge.LOST, r"process 0 does not answer at 127.0.0.1:\d+ .*Connection refused")


@pytest.mark.long
def test_two_of_one_number(start):
    cluster = start("idle", -1, count=3, numbers=[0, 1, 1])
    ended(cluster, judge.BAD, r"process 1 \(\S+\) is here already: two were started with the same")


@pytest.mark.long
def test_other_numbers_of_processes(start):
    cluster = start("idle", -1, count=3, counts={1: 2})
    ended(
        cluster, judge.BAD, r"process 1 \(\S+\) was started with --processes=2, and process 0 .*3"
    )


@pytest.mark.long
def test_strangers_at_the_port_change_nothing(start, tmp_path):
    import socket

    cluster = start("idle", -1)
    cluster.wait_until(lambda: all((tmp_path / f"at5_{n}").exists() for n in range(3)))
    port = int(re.search(r"127\.0\.0\.1:(\d+)", str(cluster.children[0].args))[1])
    for content in (
        b"GET / HTTP/1.0\r\n\r\n",
        b"\xff" * 200_000,
        b'{"process": 1, "processes": 3, "secret": "no"}\n',
        b"[" * 99_999,
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(content)
    time.sleep(1)
    assert cluster.wait(0) == [None] * 3
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    ended(cluster, judge.LOST, "process 1 .* was killed by SIGKILL")


def test_a_port_that_is_taken(tmp_path):
    import socket

    from vision_jax.errors import UserError
    from vision_jax.hosts.link import Place
    from vision_jax.hosts.supervise import start

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="process 0 cannot listen there"):
            start(Place(address, 2, 0))


# The child neither computes nor takes a lock, of which JAX warns where it was imported before.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_board_is_never_read_half_written():
    """A process that writes without a pause, beside one that reads."""
    page = board.Board()
    child = os.fork()
    if not child:
        for step in range(1, 1_000_000):
            page.at(step, step % 8)
            page._head[0] = page._head[1]
        os._exit(0)
    try:
        begin, steps = time.monotonic(), set()
        while time.monotonic() < begin + (1 if len(steps) > 10 else 60):
            place = page.read()
            steps.add(place.step)
            assert place.phase == place.step % 8
            assert place.step == 0 or place.beats == place.step - 1
            assert place.patience == board.PATIENCE
        assert len(steps) > 10
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.long
def test_a_supervisor_that_talks_nonsense_is_lost(start):
    """It has said the hello of process 2, which never comes itself."""
    import json
    import socket

    cluster = start("nothing", -1, count=3, numbers=[0, 1])
    port = int(re.search(r"127\.0\.0\.1:(\d+)", str(cluster.children[0].args))[1])

    def open_for_it():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    cluster.wait_until(open_for_it)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        hello = {"process": 2, "processes": 3, "host": "x", "secret": ""}
        for message in (hello, {"report": {"host": "x", "step": "a"}}):
            stranger.sendall(json.dumps(message).encode() + b"\n")
        # Process 1 may not have come by then.
        ended(cluster, judge.LOST, r"process 2 \(x\) is lost: its connection closed", but=[1])


def test_what_was_held_back_is_shown_where_nothing_failed(tmp_path):
    from vision_jax.hosts.worker import Relay

    reading, writing = os.pipe()
    with (tmp_path / "shown").open("w+b") as shown:
        relay = Relay(reading, shown.fileno(), b"", lambda: False)
        relay.start()
        lines = b"a\nE1201 08:00:00.0 coordination service: an error\nb\n"
        os.write(writing, lines)
        os.close(writing)
        relay.close(show=True)
        shown.seek(0)
        assert shown.read() == lines
    os.close(reading)
