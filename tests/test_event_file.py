"""Event files hold the very bytes that tensorboardX writes."""

import math
import struct

import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from vision_jax.event_file import EventFile, _checksum


@pytest.mark.parametrize("first_step", [0, 5, 2**40])
def test_bytes_are_those_of_tensorboardx(first_step, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1700000000.25)
    records = [
        (0, {}, 1.5),
        (1, {"train/loss": 0.1}, 1700000000.125),
        (300, {"ü" * 200: -0.0, "b": math.inf, "c": 1e300, "d": -1e300, "e": 5e-324}, 2.0),
        (2**40, {f"metric_{i}": float(i) for i in range(100)}, 3.0),
    ]
    own = EventFile(tmp_path, first_step)
    theirs = EventsWriter(str(tmp_path / "theirs"))
    start = Event(wall_time=1700000000.25, step=first_step)
    start.session_log.status = SessionLog.START
    theirs.write_event(start)
    for step, values, now in records:
        own.scalars(step, values, now)
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        theirs.write_event(Event(wall_time=now, step=step, summary=summary))
    before = own.path.read_bytes()
    own.close()
    theirs.close()
    (path,) = tmp_path.glob("theirs*")
    assert own.path.read_bytes() == before == path.read_bytes()


def test_the_checksum_is_crc_32c():
    # RFC 3720, appendix B.4: 32 bytes of zeros, of ones, and 0 to 31.
    for data, crc in (
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ):
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert _checksum(data) == struct.pack("<I", masked)
