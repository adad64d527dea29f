"""Files from outside: what is no file is not opened, and small files don't ask for much work."""

import itertools
import os
import re
import socket
import stat
import sys
import time
import zipfile

import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.files import (
    MAX_DEPTH,
    open_regular,
    own_draft_folder,
    parse_json,
    read_arrays,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
)


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # a socket's path must be short
        server.bind("socket")
        with open_regular(tmp_path / "a") as file:
            assert file.read() == b"\xef\xbb\xbfa\n"
        assert read_text(str(tmp_path / "a")) == "a\n"
        for name, reason in (
            ("pipe", "a named pipe"),
            ("link", "a named pipe"),
            ("socket", "No such device|a socket"),  # on Linux the system refuses
            ("", "a folder"),
            ("absent", "No such file"),
            ("nul\0", "null"),
            ("half\ud800", "surrogates"),
            ("x" * 300, "too long"),
        ):
            with pytest.raises(UserError, match=reason):
                open_regular(tmp_path / name)
    with pytest.raises(UserError, match="a device"):
        open_regular("/dev/zero")


def test_sizes_are_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match="over the limit of 4 bytes"):
        read_bytes(tmp_path / "a", 4)
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_text(tmp_path / "b")


def test_a_file_that_grew_since_it_was_opened_is_read_whole(tmp_path, monkeypatch):
    """The system says how large a file was; of what it makes up, as in /proc, it says 0."""
    (tmp_path / "a").write_bytes(b"12345")
    says = os.fstat

    def fstat(descriptor):
        found = list(says(descriptor))
        found[stat.ST_SIZE] = 2
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", fstat)
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match="over the limit of 4 bytes"):
        read_bytes(tmp_path / "a", 4)


def test_json(tmp_path):
    assert parse_json('{"a": 1, "a": [2.5, "\\ud83d\\ude00", null, 9223372036854775807]}', "x") == {
        "a": [2.5, "😀", None, 2**63 - 1]
    }
    whole = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(whole, "x") is not None
    for text, reason in (
        (f"[{whole}]", "deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "recursion|deep"),
        ("9223372036854775808", "out of range"),
        ("[1" + "0" * 10_000 + "]", "out of range"),
        ('["\\ud800"]', "surrogates"),
        ('{"\\udfff": 1}', "surrogates"),
        ("{", "JSON"),
        ("", "JSON"),
        (b"\xff\xff", "JSON"),
    ):
        with pytest.raises(UserError, match=reason) as found:
            parse_json(text, "the thing")
        assert re.fullmatch("the thing: .*", str(found.value))
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_yaml(tmp_path):
    path = tmp_path / "a.yaml"

    def read(text):
        path.write_text(text)
        return read_yaml(path)

    assert read("base: &b {x: 1, n: [a, b]}\ncopy: *b\nown: {<<: *b, x: 2}\n") == {
        "base": {"x": 1, "n": ["a", "b"]},
        "copy": {"x": 1, "n": ["a", "b"]},
        "own": {"x": 2, "n": ["a", "b"]},
    }
    aliases = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    aliases += [
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghi")
    ]
    merges = ["a: &a {x: 1}"]
    merges += [
        f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}" for a, b in itertools.pairwise("abcdefg")
    ]
    start = time.process_time()
    for text, reason in (
        ("\n".join(aliases), "100,000 values"),
        ("\n".join(merges), "100,000 values"),
        ("a: &a [*a]", "inside of what it repeats"),
        ("a: " + ":".join(["10"] * 100_000), "a number of more than 64 characters"),
        ("a: !!int ''", "YAML"),
        ("a: !!bool perhaps", "YAML"),
        ("a: !!timestamp soon", "YAML"),
        ("a: !!python/object/apply:os.system [true]", "YAML"),
        ("[" * 50_000, "recursion"),
        ("a: '\0'", "YAML"),
        ("a: *b", "YAML"),
    ):
        with pytest.raises(UserError, match=reason) as found:
            read(text)
        assert "\n" not in str(found.value)
    assert time.process_time() - start < 20  # 0.5 s on an idle machine; without bounds for ever


def test_arrays(tmp_path):
    path = tmp_path / "a.npz"
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 256, (3, 4, 5), np.uint8),
        "turned": np.asfortranarray(rng.normal(size=(3, 4))),
        "names": np.array(["ant", "🐝"]),
        "none": np.zeros((0, 3)),
        "one": np.array(7),
    }
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays)
        for name, array in read_arrays(path, list(arrays)).items():
            np.testing.assert_array_equal(array, arrays[name])
            assert array.dtype == arrays[name].dtype
    with pytest.raises(UserError, match="no array `labels`; it holds images, turned, names"):
        read_arrays(path, ["labels"])
    np.savez(path, a=np.array([{}]))
    with pytest.raises(UserError, match="Python objects"):
        read_arrays(path, ["a"])
    np.savez(path, a=arrays["images"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-80])
    with pytest.raises(UserError, match="damaged"):
        read_arrays(path, ["a"])
    changed = bytearray(whole)
    changed[whole.index(arrays["images"].tobytes())] ^= 1
    path.write_bytes(changed)
    with pytest.raises(UserError, match="CRC"):
        read_arrays(path, ["a"])

    def write(shape, data, descr="|u1"):
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".encode()
        header += b" " * (-(len(header) + 11) % 64) + b"\n"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            magic = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
            archive.writestr("a.npy", magic + header + data)

    for shape, data, reason in (
        ((1,) * 40, b"x", "40 dimensions"),
        ((10**18,), b"x", "size that its header says"),
        ((-1, -1), b"x", "size that its header says"),
        ((2**64, 0), b"", "damaged"),
        ((2**27,), bytes(2**27), "grows more than 200 times"),
    ):
        write(shape, data)
        with pytest.raises(UserError, match=reason):
            read_arrays(path, ["a"])


def test_text_of_windows_editors(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a").write_text("Kätzchen\n", encoding=encoding)
        assert read_text(tmp_path / "a") == "Kätzchen\n"


def test_drafts_of_several_and_of_a_killed_one(tmp_path):
    """Each has its own; what nobody holds any more goes."""
    killed = tmp_path / ".model.abc.draft"
    killed.mkdir()
    (killed / "lock").touch()
    with own_draft_folder(tmp_path / "model") as first:
        assert not killed.exists()
        (first / "model.onnx").write_text("first")
        with own_draft_folder(tmp_path / "model") as second:
            assert second != first
        assert (first / "model.onnx").read_text() == "first"
    assert not list(tmp_path.iterdir())


def test_drafts_where_there_are_no_locks(tmp_path, monkeypatch):
    """As on Windows: each has its own all the same, and nobody's is removed."""
    monkeypatch.setitem(sys.modules, "fcntl", None)  # its import fails
    left = tmp_path / ".model.abc.draft"
    left.mkdir()
    (left / "lock").touch()
    with own_draft_folder(tmp_path / "model") as first:
        with own_draft_folder(tmp_path / "model") as second:
            assert second != first
        assert first.is_dir()
        assert not second.exists()
    assert list(tmp_path.iterdir()) == [left]
