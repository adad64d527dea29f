"""TensorBoard's event files, of scalars alone.

A file is a row of records, each framed as `length u64, checksum u32, bytes, checksum u32`; the
bytes are a protocol buffer `Event` (tensorflow/core/util/event.proto). tensorboardX writes the same
bytes, and imports PyTorch where it is installed, which takes seconds and half a gigabyte.
"""

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

POLYNOMIAL = 0x82F63B78  # of CRC-32C (RFC 3720, appendix B.4), its bits reversed


class EventFile:
    """A new event file in a folder, which TensorBoard reads while it grows."""

    def __init__(self, folder: Path, first_step: int):
        """`first_step`: from here on TensorBoard forgets what older files of the folder say."""
        # TensorBoard reads the files of a folder in the order of their names.
        now = time.time_ns()
        self.path = folder / f"events.out.tfevents.{now // 10**9}.{os.getpid()}.{now}"
        self._file = self.path.open("xb")
        self._write(_text(3, "brain.Event:2"))
        session_start = _message(7, _integer(1, 1))
        self._write(_integer(2, first_step) + session_start)
        self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        """Appends numbers by name, in single precision, and flushes."""
        summary = b"".join(
            _message(1, _text(1, name) + _tag(2, 5) + _single(value))
            for name, value in values.items()
        )
        self._write(_integer(2, step) + _message(5, summary), wall_time)
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, fields: bytes, wall_time: float | None = None) -> None:
        event = _tag(1, 1) + struct.pack("<d", wall_time or time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


# Protocol buffers: a field is its number and wire type, then the value ---------------------------


def _varint(value: int) -> bytes:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _integer(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value) if value else b""


def _message(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _single(value: float) -> bytes:
    """Beyond the range of float32 it is infinite, as a cast would make it."""
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


# The checksum: CRC-32C, turned and moved so that a checksum's checksum says something -----------


def _make_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _make_table()


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
