"""Frames and times of videos beside those of the program ffmpeg, bit for bit.

The files are made by ffmpeg when the test runs. What it shows by itself is the reference: its raw
frames in red, green, blue, turned upright, and the presentation times of its framemd5.
"""

import subprocess
from fractions import Fraction

import numpy as np
import pytest

from vision_jax.video.frames import open_stream

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("av")

SCENE = "testsrc2=size=128x96:rate=10:duration=2"
H264 = ("-c:v", "libx264", "-bf", "2")
# name: (the scene, what makes a file of it, what is made of that file without coding it anew)
CASES = {
    "b_frames.mp4": (SCENE, H264, ()),
    "edit_list.mp4": (SCENE, H264, ("-ss", "0.55")),
    "negative_start.mkv": (SCENE, (*H264, "-output_ts_offset", "-0.35"), ()),
    "late_start.ts": (SCENE, (*H264, "-output_ts_offset", "7.3"), ()),
    "turned_90.mp4": (SCENE, H264, ("-display_rotation:v:0", "90")),
    "turned_180.mp4": (SCENE, H264, ("-display_rotation:v:0", "180")),
    "turned_270.mp4": (SCENE, H264, ("-display_rotation:v:0", "270")),
    "mirrored.mp4": (SCENE, H264, ("-display_hflip:v:0",)),
    "upside_down.mp4": (SCENE, H264, ("-display_vflip:v:0",)),
    "turned_and_mirrored.mp4": (SCENE, H264, ("-display_rotation:v:0", "90", "-display_hflip:v:0")),
    "interlaced.ts": (
        SCENE,
        ("-vf", "interlace,setfield=tff", "-flags", "+ildct+ilme", "-c:v", "mpeg2video"),
        (),
    ),
    "odd_sizes.mp4": (
        "testsrc2=size=131x97:rate=30000/1001:duration=1",
        (*H264, "-pix_fmt", "yuv444p"),
        (),
    ),
    "odd_subsampled.webm": ("testsrc2=size=131x97:rate=10:duration=1", ("-c:v", "libvpx-vp9"), ()),
    "ten_bits.mkv": (SCENE, (*H264, "-pix_fmt", "yuv420p10le"), ()),
    "ten_bits_turned.mp4": (
        SCENE,
        (*H264, "-pix_fmt", "yuv422p10le"),
        ("-display_rotation:v:0", "90"),
    ),
    "variable_rate.mp4": (SCENE, ("-vf", "setpts=N*N/40/TB", "-fps_mode", "vfr", *H264), ()),
    "variable_rate.mkv": (SCENE, ("-vf", "select=not(mod(n\\,3))", "-fps_mode", "vfr", *H264), ()),
    "mpeg4.avi": (SCENE, ("-c:v", "mpeg4", "-bf", "2"), ()),
    "msmpeg4.avi": (SCENE, ("-c:v", "msmpeg4v2"), ()),
    "mjpeg.avi": (SCENE, ("-c:v", "mjpeg"), ()),
    "full_range_bt709.mp4": (
        SCENE,
        (
            *("-vf", "scale=out_range=full:out_color_matrix=bt709,format=yuv420p"),
            *("-color_range", "pc", "-colorspace", "bt709", *H264),
        ),
        (),
    ),
    "limited_range_bt709.mp4": (
        SCENE,
        (
            *("-vf", "scale=out_range=limited:out_color_matrix=bt709,format=yuv420p"),
            *("-color_range", "tv", "-colorspace", "bt709", *H264),
        ),
        (),
    ),
    "raw.h264": (SCENE, (*H264, "-f", "h264"), ()),
    "vp8.webm": (SCENE, ("-c:v", "libvpx"), ()),
    "theora.ogv": (SCENE, ("-c:v", "libtheora"), ()),
    "grey.mkv": (SCENE, ("-c:v", "ffv1", "-pix_fmt", "gray"), ()),
    "palette.gif": (SCENE, (), ()),
}


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y"]
    result = subprocess.run([*command, *map(str, arguments)], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout


def make(name, folder):
    scene, coding, container = CASES[name]
    path = folder / name
    first = path.with_name("first_" + name) if container else path
    ffmpeg("-f", "lavfi", "-i", scene, *coding, first)
    if container:
        ffmpeg(*container, "-i", first, "-c", "copy", path)
    return path


def their_frames(path):
    """(times since the first frame, u8[N, H, W, 3]) as ffmpeg shows a file."""
    how = ("-i", path, "-map", "0:v:0", "-fps_mode", "passthrough", "-pix_fmt", "rgb24")
    lines = ffmpeg(*how, "-c:v", "rawvideo", "-f", "framemd5", "-").decode().splitlines()
    said = {line.split(" ")[0]: line.split(" ")[-1] for line in lines if line.startswith("#")}
    base = Fraction(said["#tb"])
    width, height = map(int, said["#dimensions"].split("x"))
    shown = [int(line.split(",")[2]) for line in lines if not line.startswith("#")]
    pixels = np.frombuffer(ffmpeg(*how, "-f", "rawvideo", "-"), np.uint8)
    return [(at - shown[0]) * base for at in shown], pixels.reshape(-1, height, width, 3)


def our_frames(path):
    with open_stream(str(path)) as stream:
        frames = list(iter(stream.take, None))
        assert stream.problem == ""
        assert stream.notes() == []
    assert [frame.index for frame in frames] == list(range(len(frames)))
    assert {frame.pixels.shape[:2] for frame in frames} == {stream.size}
    return [frame.time for frame in frames], np.stack([frame.pixels for frame in frames])


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_frames_and_times_are_ffmpegs(name, tmp_path):
    path = make(name, tmp_path)
    times, pixels = their_frames(path)
    ours, found = our_frames(path)
    assert ours == times
    np.testing.assert_array_equal(found, pixels)
    assert len(np.unique(found[:, ::8, ::8])) > 10  # no blank file


@pytest.mark.long
def test_a_turned_video_is_the_turned_frames_of_the_upright_one(tmp_path):
    _, upright = our_frames(make("b_frames.mp4", tmp_path))
    for name, turn in (
        ("turned_90.mp4", lambda x: np.rot90(x, 1, (1, 2))),
        ("turned_180.mp4", lambda x: x[:, ::-1, ::-1]),
        ("turned_270.mp4", lambda x: np.rot90(x, 3, (1, 2))),
        ("mirrored.mp4", lambda x: x[:, :, ::-1]),
        ("upside_down.mp4", lambda x: x[:, ::-1]),
    ):
        _, found = our_frames(make(name, tmp_path))
        wanted = turn(upright).astype(int)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).mean() < 2  # chroma is interpolated along other axes
