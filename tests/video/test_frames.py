"""Sources and their times: what is made of files that PyAV writes when the test runs."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_jax.errors import UserError
from vision_jax.video import frames
from vision_jax.video.frames import batches, open_stream

av = pytest.importorskip("av")

SIZE = (48, 64)


def write(path, count=12, rate=10, times=None, codec="mpeg4", size=SIZE, **options):
    """A video whose frame i is grey of level 20 · i; times are in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.bit_rate = 4_000_000
        stream.options = {key: str(value) for key, value in options.items()}
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for index in range(count):
            pixels = np.full((*size, 3), 20 * index % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def take_all(stream):
    return list(iter(stream.take, None))


def levels(found):
    """Which frame each one is, by its grey."""
    return [round(float(frame.pixels.mean()) / 20) for frame in found]


def test_every_frame_of_a_file_with_its_time(tmp_path):
    path = write(tmp_path / "a.mp4", rate=25)
    with open_stream(path) as stream:
        found = take_all(stream)
    assert levels(found) == list(range(12))
    assert [frame.index for frame in found] == list(range(12))
    assert [frame.time for frame in found] == [Fraction(i, 25) for i in range(12)]
    assert (stream.size, stream.rate, stream.live) == (SIZE, 25, False)
    assert stream.notes() == []


def test_times_are_those_of_presentation_where_the_rate_varies(tmp_path):
    times = [500, 540, 700, 701, 1500, 9000]
    path = write(tmp_path / "a.mkv", len(times), times=times)
    with open_stream(path) as stream:
        found = take_all(stream)
    assert [frame.time for frame in found] == [Fraction(t - 500, 1000) for t in times]
    assert levels(found) == list(range(6))


def test_a_rate_takes_the_first_frame_of_each_interval(tmp_path):
    times = [0, 90, 210, 390, 410, 1000, 1100, 1190, 1200]
    path = write(tmp_path / "a.mkv", len(times), times=times)
    with open_stream(path, rate=Fraction(5)) as stream:
        found = take_all(stream)
    assert [int(frame.time * 1000) for frame in found] == [0, 210, 410, 1000, 1200]
    assert [frame.index for frame in found] == [0, 2, 4, 5, 8]
    assert levels(found) == [0, 2, 4, 5, 8]


def test_so_many_frames_and_seconds_are_taken(tmp_path):
    path = write(tmp_path / "a.mp4")
    with open_stream(path, most=5) as stream:
        assert len(take_all(stream)) == 5
    with open_stream(path, seconds=Fraction(2, 5)) as stream:
        assert len(take_all(stream)) == 4
    assert stream.problem == ""


def test_a_clock_that_goes_back_is_said_and_times_grow_on(tmp_path):
    """Two files behind one another, as a recorder that starts again leaves them."""
    first = write(tmp_path / "a.ts", 6, codec="mpeg2video", rate=25)
    second = write(tmp_path / "b.ts", 4, codec="mpeg2video", rate=25)
    joined = tmp_path / "c.ts"
    joined.write_bytes(b"".join(Path(path).read_bytes() for path in (first, second)))
    with open_stream(str(joined)) as stream:
        found = take_all(stream)
    times = [frame.time for frame in found]
    assert len(found) >= 9  # the decoder may lose one at the seam
    assert all(after > before for before, after in itertools.pairwise(times))
    assert max(np.diff([float(time) for time in times])) < 0.2
    assert stream.counts["jumps"] == 1
    assert any("the clock went back" in note for note in stream.notes())


def test_a_file_that_ends_within_a_frame_gives_what_it_has_and_says_so(tmp_path):
    path = write(tmp_path / "a.avi", codec="mjpeg")
    data = Path(path).read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(data[: data.index(b"idx1") - 100])
    with open_stream(str(cut)) as stream:
        found = take_all(stream)
    assert len(found) >= 11
    assert levels(found)[:11] == list(range(11))
    assert "ends within a frame" in stream.problem
    assert any(note.startswith(f"{cut}: it ended early") for note in stream.notes())


def test_damaged_packets_are_counted_and_the_rest_is_shown(tmp_path):
    path = write(tmp_path / "a.avi", codec="mjpeg")
    data = bytearray(Path(path).read_bytes())
    starts = [at.start() for at in re.finditer(b"\xff\xd8\xff", data)]
    data[starts[5] : starts[6] - 8] = bytes(starts[6] - 8 - starts[5])
    damaged = tmp_path / "damaged.avi"
    damaged.write_bytes(data)
    with open_stream(str(damaged)) as stream:
        found = take_all(stream)
    assert stream.counts["undecodable"] + stream.counts["damaged"] >= 1
    assert levels(found) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert found[5].time == Fraction(6, 10)  # and not that of the lost one
    assert stream.notes() == [f"{damaged}: packets that can't be decoded: 1"]


@pytest.mark.parametrize("codec", ["mpeg2video", "libx264"])
def test_a_part_that_is_missing_within_a_stream_is_counted(tmp_path, codec):
    """One packet of a transport stream, as radio loses them: what follows is watched to its end."""
    data = Path(write(tmp_path / "a.ts", 60, codec=codec, rate=25)).read_bytes()
    at = len(data) // 188 // 2 * 188
    (tmp_path / "b.ts").write_bytes(data[:at] + data[at + 188 :])
    with open_stream(str(tmp_path / "b.ts")) as stream:
        found = take_all(stream)
    assert len(found) >= 57
    assert found[-1].time >= Fraction(58, 25)
    assert stream.problem == ""
    assert stream.counts["corrupt"] + stream.counts["damaged"] + stream.counts["undecodable"] >= 1
    assert stream.notes()


def test_a_file_that_lacks_its_end_is_told_by_what_its_header_says(tmp_path):
    path = write(tmp_path / "a.mkv", 300)
    cut = tmp_path / "cut.mkv"
    data = Path(path).read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    with open_stream(str(cut)) as stream:
        found = take_all(stream)
    assert 50 < len(found) < 250
    assert any("its header says 30.0" in note for note in stream.notes())
    with open_stream(path, most=5) as stream:
        take_all(stream)
    assert stream.notes() == []


def test_files_that_are_none_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    (tmp_path / "empty.mp4").touch()
    playlist = "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    (tmp_path / "list.mp4").write_text(playlist)
    (tmp_path / "join.txt").write_text("ffconcat version 1.0\nfile /etc/hostname\n")
    sdp = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"
    (tmp_path / "stream.sdp").write_text(sdp + "a=rtpmap:96 H264/90000\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=str(path)) as error:
            open_stream(str(path), timeout=20)
        assert "\n" not in str(error.value)
    for address in ("http://127.0.0.1:9/a.mp4", "https://x/y", "concat:a|b", "file:///etc/passwd"):
        with pytest.raises(UserError):
            open_stream(address)
    with pytest.raises(UserError, match="No such file"):
        open_stream(str(tmp_path / "nothing.mp4"))


def test_a_header_of_too_many_pixels_is_refused_before_any_is_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    monkeypatch.setattr(frames, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(UserError, match=r"a\.mp4"):
        open_stream(path)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "died of SIGSEGV"),
        ("raise RuntimeError('what it was')", "what it was"),
        ("import time; time.sleep(60)", "no frame came for 0.5 seconds"),
        ("print('no message')", "JSONDecodeError"),
        ('print(\'{"kind": "start", "size": [99999, 99999]}\')', "frames of 99999 x 99999"),
    ],
)
def test_a_decoder_that_dies_or_stops_is_one_line(tmp_path, monkeypatch, program, said):
    path = write(tmp_path / "a.mp4", 2)
    (tmp_path / "decoder.py").write_text(program)
    monkeypatch.setattr(frames, "DECODER", tmp_path / "decoder.py")
    with pytest.raises(UserError, match=said) as error:
        open_stream(path, timeout=0.5 if "sleep" in program else 30)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(path)


def test_a_decoder_that_dies_later_loses_no_frame_before_that(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", 2)
    start = json.dumps({"kind": "start", "size": [1, 1], "rate": None, "seconds": None})
    frame = json.dumps({"kind": "frame", "index": 0, "time": [0, 1]})
    program = f"import os, sys; sys.stdout.write({start!r} + chr(10) + {frame!r} + chr(10) + 'abc')"
    (tmp_path / "decoder.py").write_text(f"{program}; sys.stdout.flush(); os.kill(os.getpid(), 6)")
    monkeypatch.setattr(frames, "DECODER", tmp_path / "decoder.py")
    with open_stream(path) as stream:
        (only,) = take_all(stream)
    assert only.pixels.tobytes() == b"abc"
    assert "died of SIGABRT" in stream.problem


def test_the_decoder_goes_with_the_process_that_started_it(tmp_path):
    """Not with its thread's end, and with a kill -9 that leaves no time for anything."""
    path = write(tmp_path / "a.mp4", 200)
    code = (
        "import os, sys; from vision_jax.video import frames\n"
        f"stream = frames.open_stream({path!r}, ahead=1)\n"
        "children = open(f'/proc/self/task/{os.getpid()}/children').read()\n"
        "print(children, flush=True); os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL
    (child,) = result.stdout.split()
    for _ in range(500):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # nobody waits for it here
            return
        threading.Event().wait(0.01)
    raise AssertionError("the decoder lives on")


def test_a_live_source_drops_its_oldest_frames_and_counts_them(tmp_path):
    go = threading.Event()

    def messages():
        yield {"kind": "start", "size": (1, 1), "rate": None, "seconds": None}, None
        for index in range(10):
            yield {"kind": "frame", "index": index, "time": (index, 1)}, np.zeros((1, 1, 3))
        go.set()
        yield {"kind": "end", "why": "", "counts": {}}, None

    stream = frames.Stream("camera", True, messages(), lambda: None, ahead=3, timeout=10)
    assert go.wait(10)
    stream._thread.join(10)
    found = take_all(stream)
    assert [frame.index for frame in found] == [8, 9]  # and the end takes the place of a third
    assert stream.counts["dropped"] == 8
    assert stream.notes() == ["camera: frames dropped, since they weren't taken in time: 8"]


def test_an_address_that_says_nothing_has_stalled(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"rtsp://127.0.0.1:{port}/x: ") as error:
            open_stream(f"rtsp://me:secret@127.0.0.1:{port}/x?password=secret", timeout=1)
        assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="Connection refused"):
        open_stream(f"rtsp://127.0.0.1:{port}/x", timeout=60)


def folder_of(path, count=4, size=SIZE):
    path.mkdir()
    for index in range(count):
        Image.new("RGB", size[::-1], (index,) * 3).save(path / f"{index:03}.png")
    return path


def test_a_folder_has_a_rate_or_times(tmp_path):
    folder = folder_of(tmp_path / "frames")
    with pytest.raises(UserError, match="--folder-rate"):
        open_stream(str(folder))
    with open_stream(str(folder), folder_rate=Fraction(4)) as stream:
        found = take_all(stream)
    assert [(frame.index, frame.time) for frame in found] == [(i, Fraction(i, 4)) for i in range(4)]
    assert [frame.pixels[0, 0, 0] for frame in found] == [0, 1, 2, 3]
    (folder / "times.csv").write_text("file,seconds\n003.png,5\n000.png,5.25\n002.png,7/1\n")
    with open_stream(str(folder), rate=Fraction(1)) as stream:
        found = take_all(stream)
    assert [(frame.time, frame.pixels[0, 0, 0]) for frame in found] == [(0, 3), (2, 2)]
    with pytest.raises(UserError, match="leave --folder-rate out"):
        open_stream(str(folder), folder_rate=Fraction(4))


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ("000.png,1\n001.png,1\n", "line 2: 1 is not later"),
        ("000.png,soon\n", "'soon' is no time"),
        ("000.png,1e999999999\n", "is no time"),
        ("../secret.png,1\n", "give a file of this folder"),
        ("000.png\n", "give a file of this folder"),
        ("file,seconds\n", "names no frames"),
        ("nothing.png,1\n", "nothing.png"),
    ],
)
def test_times_that_are_none_are_named(tmp_path, times, said):
    folder = folder_of(tmp_path / "frames", 2)
    (folder / "times.csv").write_text(times)
    with pytest.raises(UserError, match=said):
        open_stream(str(folder))


def test_a_folder_whose_sizes_change_ends_there_and_says_so(tmp_path):
    folder = folder_of(tmp_path / "frames", 3)
    Image.new("RGB", (8, 8)).save(folder / "002.png")
    with open_stream(str(folder), folder_rate=Fraction(1)) as stream:
        assert len(take_all(stream)) == 2
    assert "8 x 8 pixels" in stream.problem


def test_batches_are_of_one_stream_each_and_full_but_for_the_last(tmp_path):
    paths = [write(tmp_path / f"{count}.mp4", count) for count in (5, 9)]
    streams = [open_stream(path) for path in paths]
    found = [(place, [frame.index for frame in each]) for place, each in batches(streams, 4)]
    for stream in streams:
        stream.close()
    assert [one for one in found if one[0] == 0] == [(0, [0, 1, 2, 3]), (0, [4]), (0, [])]
    assert [one for one in found if one[0] == 1] == [
        (1, [0, 1, 2, 3]),
        (1, [4, 5, 6, 7]),
        (1, [8]),
        (1, []),
    ]


def test_a_source_that_says_nothing_is_left_when_told(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"rtsp://127.0.0.1:{server.getsockname()[1]}/x"
        with pytest.raises(KeyboardInterrupt):
            open_stream(address, timeout=600, stopped=lambda: True)


def test_a_source_has_not_stalled_while_nobody_takes_its_frames(tmp_path):
    """Of more frames than wait, taken late and at once, as a batch of many rows is."""
    folder = folder_of(tmp_path / "frames", 40)
    with open_stream(str(folder), folder_rate=Fraction(1), timeout=0.5, ahead=2) as stream:
        threading.Event().wait(1)
        assert len(take_all(stream)) == 40
    assert stream.problem == ""


def test_a_low_rate_lacks_no_part(tmp_path):
    """The last frame that is taken is far from the last that there is."""
    folder = folder_of(tmp_path / "frames", 40)
    for source, how in (
        (str(folder), {"folder_rate": Fraction(1)}),
        (write(tmp_path / "a.mp4", 100, rate=2), {}),
    ):
        with open_stream(source, rate=Fraction(1, 30), **how) as stream:
            assert len(take_all(stream)) == 2
        assert stream.notes() == []


def test_contents_tell_files_of_one_name_apart(tmp_path):
    path, folder = Path(write(tmp_path / "a.mp4")), folder_of(tmp_path / "frames")
    before = frames.content_of(str(path)), frames.content_of(str(folder))
    assert before == (frames.content_of(str(path)), frames.content_of(str(folder)))
    write(path, 13)
    (folder / "003.png").write_bytes((folder / "002.png").read_bytes() + b"0")
    assert frames.content_of(str(path)) != before[0]
    assert frames.content_of(str(folder)) != before[1]
    assert frames.content_of("rtsp://127.0.0.1/x") == ""


def test_a_stream_that_shall_stop_stops_while_nothing_comes():
    stop = threading.Event()
    waits = threading.Event()

    def messages():
        yield {"kind": "start", "size": (1, 1), "rate": None, "seconds": None}, None
        yield {"kind": "frame", "index": 0, "time": (0, 1)}, np.zeros((1, 1, 3))
        waits.wait(60)

    stream = frames.Stream(
        "camera", True, messages(), waits.set, ahead=3, timeout=60, stopped=stop.is_set
    )
    assert stream.take().index == 0
    threading.Timer(0.1, stop.set).start()
    assert stream.take() is None
    assert stream.problem == ""
    stream.close()


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "mpeg4"), ("a.avi", "mjpeg"), ("a.ts", "mpeg2video"), ("a.mkv", "libx264")],
)
def test_cut_files_and_flipped_bytes_end_with_frames_or_one_line(tmp_path, rng, name, codec):
    whole = Path(write(tmp_path / name, codec=codec)).read_bytes()
    for case in range(12):
        data = np.frombuffer(whole, np.uint8).copy()
        flipped = rng.integers(0, min(len(data), 2000) if case % 2 else len(data), 1 + 8 * case)
        data[flipped] = rng.integers(0, 256, len(flipped))
        path = tmp_path / f"{case}_{name}"
        path.write_bytes(data[: rng.integers(len(data)) if case % 3 == 0 else None].tobytes())
        try:
            with open_stream(str(path), timeout=60) as stream:
                found = take_all(stream)
        except UserError as error:
            said = str(error)
        else:
            said = stream.problem
            assert {frame.pixels.shape[:2] for frame in found} == {stream.size}
            times = [frame.time for frame in found]
            assert times == sorted(set(times))
        assert "\n" not in said
        assert "died" not in said
