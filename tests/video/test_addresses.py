"""RTSP by a server on the loopback, as cameras are watched; and devices that are no cameras."""

import json
import os
import shutil
import stat
import subprocess

import numpy as np
import pytest

from vision_jax.commands import watch
from vision_jax.errors import UserError
from vision_jax.video.frames import open_stream

pytest.importorskip("av")
rtsp_server = pytest.importorskip("rtsp_server")
watching = pytest.importorskip("watching")

Server = rtsp_server.Server


@pytest.fixture(scope="module")
def greys():
    """Frame i is of level 10 · i."""
    return [np.full((48, 96, 3), 10 * i, np.uint8) for i in range(25)]


def take_all(stream):
    return list(iter(stream.take, None))


def test_every_frame_comes_with_its_time_until_the_server_ends(greys):
    with Server(greys) as server, open_stream(server.address, ahead=100) as stream:
        found = take_all(stream)
    assert [round(float(frame.pixels.mean()) / 10) for frame in found] == list(range(25))
    assert [frame.index for frame in found] == list(range(25))
    steps = np.diff([float(frame.time) for frame in found])
    assert np.abs(steps - 0.04).max() < 1e-4  # ticks of RTP are 1 / 90,000 s
    assert (stream.size, stream.live) == ((48, 96), True)
    assert stream.problem == "its server has ended it"
    assert [method for method, _ in server.asked][:4] == ["OPTIONS", "DESCRIBE", "SETUP", "PLAY"]


def test_a_server_that_breaks_off_within_a_packet_is_said(greys):
    with Server(greys, then="reset") as server, open_stream(server.address, ahead=100) as stream:
        assert len(take_all(stream)) >= 24
    assert stream.problem
    assert stream.notes() == [f"{server.address}: it ended early: {stream.problem}"]


@pytest.mark.long
def test_a_stream_that_stalls_is_said_in_time(greys):
    """What came before it is watched."""
    server = Server(2 * greys, then="stall", pause=0.04)
    with server, open_stream(server.address, ahead=100, timeout=6) as stream:
        assert len(take_all(stream)) >= 45
    assert stream.problem == "it stalled: no frame came for 6 seconds"


def test_what_the_server_refuses_is_one_line(greys):
    with Server(greys) as server, pytest.raises(UserError, match="404 Not Found") as error:
        open_stream(server.address.replace("walk", "nothing"))
    assert "\n" not in str(error.value)
    with Server(greys, word="me:secret") as server:
        with pytest.raises(UserError, match="401 Unauthorized"):
            open_stream(server.address)
        with pytest.raises(UserError, match="401 Unauthorized") as error:
            open_stream(server.address.replace("//", "//me:wrong@"))
        assert str(error.value).startswith(server.address)
        with open_stream(server.address.replace("//", "//me:secret@"), ahead=100) as stream:
            assert len(take_all(stream)) == 25
        assert "secret" not in stream.name


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_a_redirection_to_what_nobody_named_is_refused(greys, host):
    """To another port, and to another host: nothing of what it sends is watched."""
    other = Server(greys, host=host)
    server = Server(moved=other.address)
    said = pytest.raises(UserError, match=f"redirects to {host}, port")
    with other, server, said as error:
        open_stream(server.address, ahead=100)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(server.address)


def test_a_redirection_within_the_server_is_followed(greys):
    with Server(greys) as server:
        server.moves["/old"] = server.address
        with open_stream(server.address.replace("walk", "old"), ahead=100) as stream:
            assert len(take_all(stream)) == 25


def test_a_host_that_there_is_not_is_one_line():
    with pytest.raises(UserError, match="its host can't be found") as error:
        open_stream("rtsp://nobody.invalid/x")
    assert "\n" not in str(error.value)


def test_a_stream_is_watched_until_the_server_ends(tmp_path, capsys):
    """A square walks in and stays, which is an alarm; then the exit code is 1, and all is written.

    However late the frames are taken, the last ones have it.
    """
    pictures = list(watching.pictures(120))[:31]
    rules, out = tmp_path / "rules.toml", tmp_path / "out"
    rules.write_text(watching.RULES)
    with Server(pictures + pictures[-1:] * 60, pause=0.02) as server:
        assert watching.run(server.address, rules, out) == 1
    assert "it ended early: its server has ended it" in capsys.readouterr().err
    (folder,) = out.iterdir()
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [one["event"] for one in events].count("start") >= 1
    assert events[-1]["event"] == "finish"
    assert all("clock" in one for one in events if one["event"] in ("start", "end"))
    assert (folder / "stills" / "000001.jpg").is_file()
    assert (folder / "index.html").is_file()


def make_proof(folder):
    """(certificate, key) of 127.0.0.1, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    files = certificate, key = folder / "certificate.pem", folder / "key.pem"
    folder.mkdir()
    subject = ["-subj", "/CN=camera", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    command += ["-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    return files


def test_a_camera_proves_who_it_is_where_that_is_asked(greys, tmp_path):
    proof, other = make_proof(tmp_path / "own"), make_proof(tmp_path / "other")
    with Server(greys, proof=proof) as server:
        for certificates in (None, proof[0]):
            how = {"ahead": 100, "certificates": certificates}
            with open_stream(server.address, **how) as stream:
                assert len(take_all(stream)) == 25
        asked = len(server.asked)
        with pytest.raises(UserError, match=r"nothing in .*certificate\.pem proves") as error:
            open_stream(server.address, certificates=other[0])
        assert str(error.value).startswith(server.address)
        assert "\n" not in str(error.value)
        assert len(server.asked) == asked  # nothing was asked, no password sent
        for name, content in (("nothing.pem", None), ("empty.pem", ""), ("key.pem", "a key")):
            path = tmp_path / name
            if content is not None:
                path.write_text(content)
            with pytest.raises(UserError, match=f"{name}: "):
                open_stream(server.address, certificates=path)
        with open_stream(server.address.upper().replace("WALK", "walk"), ahead=100) as stream:
            assert len(take_all(stream)) == 25
    with Server(greys, proof=proof, host="127.0.0.2") as server:  # whose certificate it is not
        with pytest.raises(UserError, match=r"proves that it is 127\.0\.0\.2"):
            open_stream(server.address, certificates=proof[0])
        assert server.asked == []


def test_certificates_are_for_rtsps_alone(tmp_path, capsys):
    rules = tmp_path / "rules.toml"
    rules.write_text(watching.RULES)
    arguments = ["--model=embedded:nanodet_coco", f"--rules={rules}", f"--out={tmp_path / 'out'}"]
    sources = ["rtsps://127.0.0.1/x", "rtsp://me:secret@127.0.0.1/x"]
    assert watch.main([*sources, *arguments, "--certificates=ca.pem"]) == 2
    said = "--certificates is of rtsps:// sources, and rtsp://127.0.0.1/x is none"
    assert capsys.readouterr().err == f"error: {said}: leave one out\n"


# Cameras ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_a_device_that_is_no_camera_is_one_line(device):
    with pytest.raises(UserError, match=f"^{device}: ") as error:
        open_stream(device, timeout=20)
    assert "\n" not in str(error.value)


def test_a_camera_that_there_is_not_is_one_line():
    with pytest.raises(UserError, match=r"^/dev/video99: can't be read \(No such file"):
        open_stream("/dev/video99")


def test_a_camera_that_one_may_not_open_is_one_line(tmp_path):
    path = tmp_path / "video0"
    try:
        os.mknod(path, stat.S_IFCHR | 0o000, os.makedev(81, 0))
    except OSError:
        pytest.skip("devices can't be made here")
    with pytest.raises(UserError, match=f"^{path}: ") as error:
        open_stream(str(path), timeout=20)
    assert "\n" not in str(error.value)
