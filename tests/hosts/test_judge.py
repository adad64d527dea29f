"""Whose failure it is, from reports alone."""

import dataclasses
import signal

import pytest

from vision_jax.hosts import board, judge
from vision_jax.hosts.judge import Report, find_cause

WAITING = {"step": 7, "phase": board.STEP, "usual": 0.5, "age": 35.0}


def others(**one):
    """Process 1 is as said, 0 and 2 wait for it in step 7."""
    before = one.get("phase", board.STEP) <= board.STEP
    age = one.get("age", 35.0) if before else 35.0
    return {
        0: Report("a", **{**WAITING, "age": age}),
        1: Report("b", **{**WAITING, **one}),
        2: Report("c", **{**WAITING, "age": age}),
    }


GLOO = "JaxRuntimeError: INTERNAL: Gloo AllReduce failed: Connection closed by peer"


@pytest.mark.parametrize(
    ("one", "words", "code"),
    [
        ({"code": -signal.SIGKILL}, "was killed by SIGKILL (out of memory?)", 75),
        ({"code": -signal.SIGSEGV}, "was killed by SIGSEGV", 75),
        ({"code": -signal.SIGTERM}, "was killed by SIGTERM", 143),
        ({"closed": True}, "is lost: its connection closed; it was at step 7, computing", 75),
        ({"silent": 26.0}, "is lost: no sign of life for 26 s", 75),
        ({"state": "T", "still": 11.0}, "is stopped (SIGSTOP) since 11 s", 75),
        ({"still": 26.0}, "does not answer since 26 s; it was at step 7, computing", 75),
        ({"phase": board.DATA, "age": 41.0}, "is slow: the others wait for 41 s, it is at ste", 75),
        ({"kind": 1, "text": "no image is sound", "ended": 3.0}, "step 7): no image is sound", 75),
        ({"kind": 1, "text": "no such file", "ended": 3.0, "step": 0}, "(b): no such file", 2),
        ({"kind": 1, "text": "process 1 (b): holds another", "ended": 3.0}, "1 (b): holds", 75),
        ({"kind": 2, "text": "KeyError: 'x'", "ended": 3.0}, "step 7): KeyError: 'x'", 1),
        ({"code": 3, "ended": 3.0}, "step 7): ended with code 3", 1),
        ({"kind": 2, "text": GLOO, "ended": 31.0}, "Connection closed by peer", 75),
        ({"code": -signal.SIGABRT, "ended": 31.0}, "was ended by SIGABRT", 75),
    ],
)
def test_one_process_is_named_with_its_cause(one, words, code):
    verdict = find_cause(others(**one))
    assert words in verdict.line
    assert verdict.line.startswith("process 1 (b")
    assert (verdict.code, verdict.process) == (code, 1)
    assert "\n" not in verdict.line


def test_an_abort_goes_before_the_collective_that_it_broke():
    """It is seen later than what the others say of their connections."""
    broken = Report("a", step=7, kind=2, text=GLOO, code=1, ended=0.6)
    aborted = Report("b", step=7, code=-signal.SIGABRT, ended=0.1)
    assert find_cause({0: broken, 1: aborted}).process == 1
    later = dataclasses.replace(broken, ended=9.0)  # as JAX ends those that lost the others
    assert find_cause({0: later, 1: aborted}).process == 0


@pytest.mark.parametrize(
    "one",
    [
        {},
        {"silent": 20.0, "still": 20.0},
        {"state": "T", "still": 5.0},
        {"phase": board.DATA, "age": 39.0},
        {"phase": board.COMPILE, "age": 1000.0},
        {"phase": board.EVALUATE, "age": 1000.0},
        {"phase": board.SAVE, "age": 1000.0},
        {"phase": board.DATA, "age": 41.0, "usual": 6.0},  # its data took as long before
        {"kind": 1, "text": "x", "ended": 0.5},  # others may say more
        {"kind": 2, "text": GLOO, "ended": 20.0},
        {"code": 0},
        {"code": 128 + signal.SIGTERM},  # saved and ended
    ],
)
def test_what_is_no_failure_yet(one):
    assert find_cause(others(**one)) is None


def test_a_cause_comes_before_its_consequences():
    reports = others(code=-signal.SIGKILL)
    for process in (0, 2):
        reports[process] = dataclasses.replace(
            reports[process], kind=2, text=GLOO, ended=9.0, code=1
        )
    assert find_cause(reports).process == 1
    reports = others(kind=2, text="OSError: the disk", ended=1.0, code=1)
    reports[0] = dataclasses.replace(reports[0], kind=2, text=GLOO, ended=9.0, code=1)
    reports[2] = dataclasses.replace(reports[2], kind=2, text=GLOO, ended=9.0, code=1)
    assert find_cause(reports).line == "process 1 (b, step 7): OSError: the disk"


def test_what_all_say_is_nobodys():
    same = {n: Report("h", kind=1, text="step 5 is not finite", step=5) for n in range(3)}
    assert find_cause(same).line == "step 5 is not finite"
    assert find_cause(same).code == judge.BAD


def test_what_all_do_may_take_hours():
    for phase in (board.START, board.COMPILE, board.EVALUATE, board.SAVE, board.RESULTS):
        for step in (0, 7):
            same = {n: Report("h", step=step, phase=phase, age=1e5) for n in range(2)}
            assert find_cause(same) is None
    behind = {**same, 1: dataclasses.replace(same[1], phase=board.EVALUATE)}
    assert "process 1 (h) is slow: the others wait for 100000 s" in find_cause(behind).line
    just = {**behind, 0: dataclasses.replace(same[0], age=10.0)}  # nobody has waited for long
    assert find_cause(just) is None


def test_ctrl_c_is_no_failure_of_anybody():
    same = {n: Report("h", kind=3, text="stopped", code=130, ended=0.1) for n in range(2)}
    assert (find_cause(same).line, find_cause(same).code) == ("stopped", 130)


def test_reports_from_outside():
    good = dataclasses.asdict(Report("a", step=3, text="x\x1b[31m"))
    assert judge.read_report(good).text == "x\\x1b[31m"
    for changes in (
        *({"step": "a"}, {"code": "k"}, {"phase": 99}, {"closed": True}, {"kind": -1}, {"x": 1}),
        *({"age": float("nan")}, {"age": -1.0}, {"host": None}, {"step": 2**70}, {"phase": 1.5}),
    ):
        assert judge.read_report({**good, **changes}) is None, changes
    for message in (None, [], "x", {}, {"host": "a"}):
        assert judge.read_report(message) is None
        assert judge.read_verdict(message) is None
    assert judge.read_verdict({"line": "a\nb", "code": 3, "process": 0}).line == "a\\nb"


def test_all_wait_and_nobody_is_behind():
    reports = {n: Report("h", **{**WAITING, "age": 50.0}) for n in range(2)}
    verdict = find_cause(reports)
    assert "all processes wait for each other for 50 s, at step 7" in verdict.line
    assert (verdict.code, verdict.process) == (judge.LOST, -1)
    slow = {n: dataclasses.replace(one, usual=10.0) for n, one in reports.items()}
    assert find_cause(slow) is None


def test_before_a_whole_step_was_seen_nobody_is_slow():
    for phase in (board.DATA, board.READY, board.STEP, board.WAIT):
        same = {n: Report("h", step=2, phase=phase, age=500.0) for n in range(2)}
        assert find_cause(same) is None
    for phase in (board.READY, board.STEP, board.WAIT):  # but for the half hour that all may take
        hung = {n: Report("h", step=2, phase=phase, age=1801.0) for n in range(2)}
        assert "all processes wait for each other for 1801 s" in find_cause(hung).line
    behind = {**same, 1: dataclasses.replace(same[1], phase=board.DATA)}
    assert find_cause(behind) is None
    late = {n: dataclasses.replace(one, age=1801.0) for n, one in behind.items()}
    assert find_cause(late).process == 1


def test_a_disk_that_all_wait_for_is_nobodys():
    same = {n: Report("h", **{**WAITING, "phase": board.DATA, "age": 500.0}) for n in range(2)}
    assert find_cause(same) is None


def test_a_board_knows_what_a_step_takes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: now[0])
    page = board.Board()

    def spend(step, phase, seconds):
        page.at(step, phase)
        now[0] += seconds

    for step, wait in ((1, 2), (2, 30), (3, 2), (4, 2), (5, 2), (6, 2)):
        spend(step, board.DATA, 1)
        spend(step, board.COMPILE if step == 1 else board.STEP, 300 if step == 1 else 1)
        spend(step, board.WAIT, wait)
        spend(step, board.SAVE, 1000)
        assert page.read().usual == {1: 0, 2: 4, 3: 18, 4: 4, 5: 4, 6: 4}[step]


def test_the_first_steps_may_take_long():
    reports = {n: Report("h", phase=board.START, age=1000.0) for n in range(2)}
    assert find_cause(reports) is None


def test_one_that_ended_too_soon():
    reports = others(code=0, ended=30.0)
    assert "process 1 (b) has ended" in find_cause(reports).line
