"""The log of a run: what is on disk, what is on the screen, and what a resumed run keeps."""

import errno
import io
import json
import math
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from vision_jax import logging as run_logging
from vision_jax.errors import UserError
from vision_jax.event_file import EventFile
from vision_jax.logging import (
    PARAMETER_COLUMNS,
    RunLog,
    explain_write_errors,
    open_log,
    read_metrics,
    summarize_parameters,
)


def _events(workdir: Path) -> list[Event]:
    """TFRecord framing: length u64, its checksum u32, the bytes, their checksum u32."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            events.append(Event.FromString(data[offset + 12 : offset + 12 + length]))
            offset += 12 + length + 4
    return events


def _steps(workdir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(workdir / "metrics.jsonl")]


def test_scalars_go_to_both_files_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path, resume_step=0)
    log.scalars(3, {"train/loss": np.float32(0.1), "train/learning_rate": jnp.float32(2.0)})
    # Before close: a killed run keeps what it logged.
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 3
    assert record["train/loss"] == float(np.float32(0.1))
    assert record["train/learning_rate"] == 2.0
    assert record["time"] > 1.7e9
    last = _events(tmp_path)[-1]
    assert last.step == 3
    assert last.wall_time == record["time"]
    values = {value.tag: value.simple_value for value in last.summary.value}
    assert values == {"train/loss": np.float32(0.1), "train/learning_rate": 2.0}
    log.close()


def test_numbers_that_are_not_finite_stay_strict_json(tmp_path: Path) -> None:
    log = open_log(tmp_path, resume_step=0)
    log.scalars(1, {"nan": math.nan, "up": math.inf, "down": -math.inf})
    log.close()

    def refuse(name: str) -> float:
        raise AssertionError(name)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert (record["nan"], record["up"], record["down"]) == ("NaN", "Infinity", "-Infinity")
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["nan"])
    assert (record["up"], record["down"]) == (math.inf, -math.inf)


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = open_log(tmp_path, resume_step=0)
    for step in range(1, 8):
        log.scalars(step, {"x": step / 3, "bad": math.nan})
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    log = open_log(tmp_path, resume_step=4)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == before[:4]
    log.scalars(5, {"x": 50.0})
    log.close()
    assert _steps(tmp_path) == [1, 2, 3, 4, 5]
    assert not list(tmp_path.glob("*.draft"))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # none was overwritten


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = open_log(tmp_path, resume_step=0)
    for step in range(1, 8):
        log.scalars(step, {"x": 0.0})
    log.close()
    log = open_log(tmp_path, resume_step=4)
    log.scalars(5, {"x": 50.0})
    log.close()
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    seen = [(event.step, event.value) for event in board.Scalars("x")]
    assert seen == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0), (5, 50.0)]


def test_the_restart_mark_is_after_the_checkpoint(tmp_path: Path) -> None:
    open_log(tmp_path, resume_step=4).close()
    marks = [event for event in _events(tmp_path) if event.HasField("session_log")]
    assert [(mark.step, mark.session_log.status) for mark in marks] == [(5, 1)]  # 1 is START


def test_starting_anew_drops_everything(tmp_path: Path) -> None:
    log = open_log(tmp_path, resume_step=0)
    log.scalars(0, {"x": 1.0})
    log.scalars(1, {"x": 1.0})
    log.close()
    open_log(tmp_path, resume_step=0).close()
    assert _steps(tmp_path) == []


@pytest.mark.parametrize("tail", [b'{"step": 3, "ti', b'{"step": 3', b"\xff\xfe", b"\0\0\0", b"3"])
def test_a_half_written_last_line_is_tolerated(tmp_path: Path, tail: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "x": 1.0}\n{"step": 2}\n' + tail)
    assert _steps(tmp_path) == [1, 2]
    log = open_log(tmp_path, resume_step=9)
    log.scalars(10, {"x": 2.0})
    log.close()
    assert _steps(tmp_path) == [1, 2, 10]


def test_other_processes_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = tmp_path / "run"
    log = open_log(workdir, resume_step=0, show=False)
    log.say("hello")
    log.table("t", ["a"], [[1]])
    log.scalars(1, {"x": 1.0})
    with log.progress(2) as meter:
        meter.update(1, 1.0, 1.0, 1.0)
    log.wrote("f", "file")
    log.close()
    assert capsys.readouterr() == ("", "")
    assert not workdir.exists()


def test_plain_text_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path, resume_step=0)
    capsys.readouterr()
    log.say("[bold]/a/path[/bold] " + "x" * 300)
    log.say("name\x1b[2J\x07é")
    assert capsys.readouterr().out == (
        "[bold]/a/path[/bold] " + "x" * 300 + "\n" + "name\\x1b[2J\\x07é\n"
    )
    log.close()


def test_close_lists_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path, resume_step=0)
    log.wrote(tmp_path / "curves.png", "loss and accuracy")
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Files written:"
    assert [line.split()[0] for line in lines[1:]] == [
        str(tmp_path / "metrics.jsonl"),
        str(tmp_path / "tensorboard"),
        str(tmp_path / "curves.png"),
    ]
    assert lines[3].endswith("  loss and accuracy")


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 1000.0
    monkeypatch.setattr(run_logging.time, "monotonic", lambda: clock)
    log = open_log(tmp_path, resume_step=0)
    with log.progress(100, 50) as meter:
        for step in range(51, 101):
            meter.update(step, 0.51234, 3e-4, 1234.4)
            clock += 3.0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        *(f"{step}/100" for step in range(51, 100, 4)),
        "100/100",
    ]
    with log.progress(100) as meter:
        meter.update(1, 0.51234, 3e-4, 1234.4)
        clock += 60.0
        meter.update(21, 0.41234, 3e-4, 1234.4)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/100  loss 0.5123  lr 3.00e-04  1,234 images/s",
        "step 21/100  loss 0.4123  lr 3.00e-04  1,234 images/s  0:03:57 left",
    ]
    log.close()


def test_the_time_left_leaves_out_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = 0.0, {}
    monkeypatch.setattr(run_logging.time, "monotonic", lambda: clock)
    meter = run_logging.Meter(1000, lambda step, text: shown.update({step: text}))
    clock += 100.0  # of the first step
    for step in range(1, 401):
        meter.update(step, 0.5, 1e-3, 10.0)
        clock += 2.0
        if step == 50:
            clock += 70.0  # another canvas
        if step % 100 == 0:
            meter.pause()
            clock += 90.0 if step == 100 else 30.0  # the first evaluation is compiled
    assert shown[1].endswith("10 images/s")
    # 2 seconds a step, and an evaluation of 30 each hundred
    for step, pauses in ((2, 0), (50, 0), (60, 0), (250, 2)):
        seconds = (1000 - step) * (2 + 30 * pauses / (step - 1))
        assert shown[step].endswith(f" {run_logging._clock(seconds)} left")


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    log = RunLog(tmp_path, metrics=None, events=None, console=console)
    with log.progress(20, 10) as meter:
        for step in range(11, 21):
            meter.update(step, 0.5, 3e-4, 1234.0)
        log.say("a line above the bar")
    text = screen.getvalue()
    assert "━" in text
    assert "20/20" in text
    assert "loss 0.5000  lr 3.00e-04  1,234 images/s  0:00:00 left" in text
    assert "a line above the bar\n" in text


def test_table_shows_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path, resume_step=0)
    log.table("Result", ["class", "n", "top-1"], [["[red]a", 12345, 0.98765], (), ["b", 7, ""]])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert lines == [
        ["Result"],
        ["class", "n", "top-1"],
        ["[red]a", "12,345", "0.9877"],
        ["b", "7"],
    ]
    log.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    full = Path("/dev/full").open("a")  # noqa: SIM115  leaving a `with` would raise again
    broken = RunLog(tmp_path, metrics=full, events=EventFile(tmp_path, 0), console=None)
    said = re.escape(f"no space left on the device that holds {tmp_path}")
    with pytest.raises(UserError, match=said):
        broken.scalars(1, {"x": 1.0})
    with pytest.raises(UserError, match=said):
        broken.close()
    assert full.closed


def test_other_write_errors_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write in .*/file: "):
        open_log(tmp_path / "file", resume_step=0)
    with (
        pytest.raises(UserError, match="no space left"),
        explain_write_errors(tmp_path),
    ):
        raise OSError(errno.EDQUOT, "Quota exceeded")


def test_parameter_rows_collapse_blocks_and_add_up() -> None:
    frozen = {"embed/kernel": jax.ShapeDtypeStruct((4, 4, 3, 8), jnp.bfloat16)}
    trainable = {"scale": np.zeros((), np.float64)}
    for block in range(12):
        frozen[f"block_{block}/qkv/kernel/base"] = jax.ShapeDtypeStruct((8, 24), jnp.float32)
        trainable[f"block_{block}/qkv/kernel/a"] = np.zeros((8, 2), np.float32)
    rows = summarize_parameters(trainable, frozen)
    assert rows == [
        ("trainable", "13 arrays", 193, "776 B", "6.70%"),
        ("  scale", "[]", 1, "8 B", "0.03%"),
        ("  block_*/qkv/kernel/a", "12 x [8, 2]", 192, "768 B", "6.66%"),
        (),
        ("frozen", "13 arrays", 2688, "9.8 KiB", "93.30%"),
        ("  embed/kernel", "[4, 4, 3, 8]", 384, "768 B", "13.33%"),
        ("  block_*/qkv/kernel/base", "12 x [8, 24]", 2304, "9.0 KiB", "79.97%"),
        (),
    ]
    assert {len(row) for row in rows if row} == {len(PARAMETER_COLUMNS)}


def test_parameter_rows_keep_apart_what_differs() -> None:
    arrays = {
        "stage_0/block_0/kernel": np.zeros((3, 3)),
        "stage_0/block_1/kernel": np.zeros((3, 3)),
        "stage_1/block_0/kernel": np.zeros((5, 5)),
        "norm_2": np.zeros(3),
        "norm_3": np.zeros(3),
    }
    rows = summarize_parameters(arrays, {})
    assert [row[:2] for row in rows[1:5]] == [
        ("  stage_0/block_*/kernel", "2 x [3, 3]"),
        ("  stage_1/block_0/kernel", "[5, 5]"),
        ("  norm_2", "[3]"),
        ("  norm_3", "[3]"),
    ]
    assert summarize_parameters({}, {})[0] == ("trainable", "0 arrays", 0, "0 B", "")
