"""Every kind of image file that Pillow writes, against pixels written out by hand."""

import contextlib
import io
import os
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image

from vision_jax.data import decode as decode_module
from vision_jax.data.decode import (
    MAX_SCANS,
    DamagedImageError,
    _Room,
    decode_array,
    decode_image,
    decode_thumbnail,
    read_header,
    read_image_file,
    read_size,
)

# Pillow also warns about some of the damaged files and bombs made here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

DRAW = np.random.default_rng(0)
RGB = DRAW.integers(0, 256, (7, 5, 3), np.uint8)
GREY = DRAW.integers(0, 256, (7, 5), np.uint8)
ALPHA = DRAW.integers(0, 256, (7, 5), np.uint8)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def decode(data: bytes) -> np.ndarray:
    image = decode_image(data, name="some.png")
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    return image


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_lossless_rgb(file_format):
    assert np.array_equal(decode(encode(Image.fromarray(RGB), file_format)), RGB)


def test_lossless_webp():
    assert np.array_equal(decode(encode(Image.fromarray(RGB), "WEBP", lossless=True)), RGB)


def test_jpeg():
    smooth = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (64, 48, 3))
    decoded = decode(encode(Image.fromarray(np.ascontiguousarray(smooth)), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - smooth).max() <= 3


def test_grey():
    assert np.array_equal(decode(encode(Image.fromarray(GREY))), np.stack([GREY] * 3, -1))


def test_one_bit():
    bits = GREY > 127
    decoded = decode(encode(Image.fromarray(bits)))
    assert np.array_equal(decoded, np.stack([bits * np.uint8(255)] * 3, -1))


def test_rgba_is_composited_on_white():
    rgba = np.concatenate([RGB, ALPHA[..., None]], -1)
    assert np.abs(decode(encode(Image.fromarray(rgba))) - on_white(RGB, ALPHA)).max() <= 1


def test_grey_with_alpha_is_composited_on_white():
    image = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
    expected = on_white(np.stack([GREY] * 3, -1), ALPHA)
    assert np.abs(decode(encode(image)) - expected).max() <= 1


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palette(file_format, transparent, rng):
    palette = rng.integers(0, 256, (16, 3), np.uint8)
    index = rng.integers(0, 16, (7, 5), np.uint8)
    index[0] = 3
    image = Image.fromarray(index).convert("L")
    image.putpalette(palette.tobytes())
    data = encode(image, file_format, **({"transparency": 3} if transparent else {}))
    expected = palette[index]
    if transparent:
        expected[index == 3] = 255
    assert np.array_equal(decode(data), expected)


def test_rgb_with_a_transparent_color():
    image = RGB.copy()
    image[2] = (1, 2, 3)
    data = encode(Image.fromarray(image), transparency=(1, 2, 3))
    expected = image.copy()
    expected[2] = 255
    assert np.array_equal(decode(data), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_large_transparent_images_are_composited_in_strips(mode, monkeypatch, rng):
    image = Image.fromarray(rng.integers(0, 256, (7, 5, 4), np.uint8)).convert(mode)
    key = {"P": {"transparency": 3}, "RGB": {"transparency": (1, 2, 3)}}.get(mode, {})
    data = encode(image, **key)
    whole = decode(data)
    monkeypatch.setattr(decode_module, "STRIP", 10)  # two rows
    np.testing.assert_array_equal(decode(data), whole)


def test_cmyk():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # all magenta and yellow: red
    decoded = decode(encode(image, "JPEG", quality=95)).astype(int)
    assert np.abs(decoded - (255, 0, 0)).max() <= 3
    assert np.array_equal(decode(encode(image, "TIFF")), np.broadcast_to((255, 0, 0), (16, 16, 3)))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(file_format, rng):
    """The upper 8 bits, which is all that Pillow keeps of 16-bit colors: one rule for both."""
    deep = rng.integers(0, 65536, (7, 5), np.uint16)
    deep[0, :2] = 0, 65535
    decoded = decode(encode(Image.fromarray(deep), file_format))
    assert np.array_equal(decoded[..., 0], deep >> 8)
    assert (decoded == decoded[..., :1]).all()


def test_16_bit_rgb_png(rng):
    deep = rng.integers(0, 65536, (7, 5, 3), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    decoded = decode(png(5, 7, bit_depth=16, color_type=2, rows=rows))
    assert np.array_equal(decoded, deep >> 8)


def test_16_bit_png_with_alpha(rng):
    deep = rng.integers(0, 65536, (7, 5, 4), np.uint16)
    for channels, color_type in (([0, 1, 2, 3], 6), ([0, 3], 4)):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep[..., channels])
        colors = (deep[..., :3] if color_type == 6 else deep[..., [0, 0, 0]]) >> 8
        decoded = decode(png(5, 7, bit_depth=16, color_type=color_type, rows=rows))
        assert np.abs(decoded - on_white(colors, deep[..., 3] >> 8)).max() <= 1


@pytest.mark.parametrize("bit_depth", [1, 2, 4, 8, 16])
def test_grey_png_with_a_transparent_level(bit_depth, rng):
    """The level is stated in the file's own depth."""
    levels = rng.integers(0, 2**bit_depth, (7, 8))
    levels[0] = 1
    bits = (levels[..., None] >> np.arange(bit_depth)[::-1]) & 1
    rows = b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in bits)
    stated = (b"tRNS", struct.pack(">H", 1))
    expected = levels >> 8 if bit_depth == 16 else levels * 255 // (2**bit_depth - 1)
    data = png(8, 7, bit_depth=bit_depth, color_type=0, rows=rows)
    assert np.array_equal(decode(data)[..., 0], expected)
    data = png(8, 7, bit_depth=bit_depth, color_type=0, rows=rows, before=stated)
    assert np.array_equal(decode(data)[..., 0], np.where(levels == 1, 255, expected))


def test_16_bit_png_with_a_transparent_color_is_refused():
    """Pillow loses the lower bits, without which the color can't be told from its neighbors."""
    stated = (b"tRNS", struct.pack(">HHH", 1, 2, 3))
    data = png(1, 1, bit_depth=16, color_type=2, rows=bytes(7), before=stated)
    with pytest.raises(DamagedImageError, match="16-bit PNG with a transparent color"):
        decode(data)
    with pytest.raises(DamagedImageError, match="16-bit PNG with a transparent color"):
        read_header(data)


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
    for file_format, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {})):
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(decode(data), np.broadcast_to((255, 0, 0), (6, 6, 3)))


def test_cmyk_jpeg_without_adobes_marker():
    """Their values are inverted with the marker and without it."""
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    start = data.index(b"\xff\xee")
    plain = data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4]) :]
    assert np.abs(decode(plain).astype(int) - (255, 0, 0)).max() <= 3


def test_big_endian_16_bit_tiff(rng):
    deep = rng.integers(0, 65536, (7, 5), np.uint16)
    image = Image.frombytes("I;16B", (5, 7), deep.astype(">u2").tobytes())
    assert np.array_equal(decode(encode(image, "TIFF"))[..., 0], deep >> 8)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_32_bit_is_refused(mode):
    with pytest.raises(DamagedImageError, match="32-bit"):
        decode(encode(Image.new(mode, (4, 4)), "TIFF"))


def test_first_frame_of_a_gif():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(data), np.broadcast_to((255, 0, 0), (4, 4, 3)))


# The stored image for each EXIF orientation, from the upright one, after the EXIF 2.3 standard:
# 1 the 0th row is the top, 0th column left; 3 bottom right; 6 right top (turned 90° counter-
# clockwise when stored) and so on; even-odd pairs 2, 4, 5, 7 are mirrored.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, file_format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](RGB)))
    options = {"lossless": True} if file_format == "WEBP" else {}
    assert np.array_equal(decode(encode(stored, file_format, exif=exif, **options)), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_jpeg(orientation):
    quadrants = np.kron(np.array([[10, 90], [160, 250]], np.uint8), np.ones((16, 24), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](quadrants)))
    decoded = decode(encode(stored, "JPEG", quality=95, exif=exif)).astype(int)
    assert np.abs(decoded - quadrants[..., None]).max() <= 12


def test_threads_share_a_bound_of_pixels():
    room, lock = _Room(100), threading.Lock()
    now = most = 0

    def decode_one(pixels: int) -> None:
        nonlocal now, most
        with room.take(pixels):
            with lock:
                now += min(pixels, 100)
                most = max(most, now)
            time.sleep(0.001)
            with lock:
                now -= min(pixels, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_one, [30, 60, 500, 40, 1] * 8))
    assert 60 < most <= 100
    assert now == 0


def test_jpeg_of_too_many_scans():
    data = encode(Image.fromarray(RGB), "JPEG", progressive=True)
    assert decode(data).shape == (7, 5, 3)
    start = data.rindex(b"\xff\xda")
    many = data[:start] + MAX_SCANS * data[start:-2] + data[-2:]
    for read in (decode, lambda data: decode_thumbnail(data, name="some.png")):
        with pytest.raises(DamagedImageError, match=r"some\.png: .* more than 100 scans"):
            read(many)


def test_what_is_no_regular_file_is_damaged(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("pipe.png", "pipe.npy"):
        path = str(tmp_path / name)
        for read in (read_image_file, read_size):
            with pytest.raises(DamagedImageError, match="a named pipe"):
                read(path)


def test_damaged_exif_is_no_damaged_image():
    plain = encode(Image.fromarray(RGB))
    chunk = b"eXIf" + b"II*\0\xff\xff\xff\xff"
    broken = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert np.array_equal(decode(plain[:33] + broken + plain[33:]), RGB)


def png(
    width: int,
    height: int,
    *,
    bit_depth: int,
    color_type: int,
    rows: bytes,
    before: tuple[bytes, bytes] | None = None,
) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(*before) if before else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8001, 12_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(side, monkeypatch):
    def refuse(self):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    bomb = png(side, side, bit_depth=1, color_type=0, rows=bytes(1000))
    with pytest.raises(DamagedImageError, match=r"some.png.*pixels"):
        decode(bomb)


def test_pixels_and_bytes_are_bounded():
    data = encode(Image.fromarray(RGB))
    assert decode_image(data, name="n", max_pixels=35, max_bytes=len(data)).shape == RGB.shape
    with pytest.raises(DamagedImageError, match="5 × 7 pixels, over the limit of 34"):
        decode_image(data, name="n", max_pixels=34)
    with pytest.raises(DamagedImageError, match="over the limit"):
        decode_image(data, name="n", max_bytes=len(data) - 1)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated(file_format, rng):
    noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    decode(data)
    for share in (0.01, 0.3, 0.9):
        with pytest.raises(DamagedImageError, match=r"some\.png"):
            decode(data[: int(share * len(data))])


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n", bytes(100)])
def test_no_image(data):
    with pytest.raises(DamagedImageError, match=r"some\.png: not a readable image") as found:
        decode(data)
    assert "object" not in str(found.value)  # the address of one differs from run to run


@pytest.mark.parametrize("file_format", ["PPM", "ICO", "PCX", "TGA"])
def test_other_formats_are_refused(file_format):
    with pytest.raises(DamagedImageError):
        decode(encode(Image.fromarray(RGB), file_format))


def test_random_damage_raises_nothing_else(rng):
    for file_format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        data = np.frombuffer(encode(Image.fromarray(RGB), file_format), np.uint8)
        for _ in range(60):
            broken = data.copy()
            broken[rng.integers(len(data), size=3)] = rng.integers(0, 256, 3, np.uint8)
            with contextlib.suppress(DamagedImageError):
                decode(broken.tobytes())


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_arrays_of_any_number_of_channels(rng):
    image = rng.integers(0, 256, (5, 4, 7), np.uint8)
    np.testing.assert_array_equal(decode_array(saved(image), name="a.npy"), image)
    np.testing.assert_array_equal(decode_array(saved(image[..., 0]), name="a.npy"), image[..., :1])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY damaged",
        saved(np.zeros((2, 2, 3), np.float32)),
        saved(np.zeros((2, 2, 2, 3), np.uint8)),
        saved(np.zeros((0, 2, 3), np.uint8)),
        saved(np.array([{}])),  # a pickle
        saved(np.zeros((9, 9, 3), np.uint8))[:-50],
    ],
    ids=["empty", "damaged", "floats", "4 axes", "no pixels", "pickle", "cut short"],
)
def test_other_arrays_are_damaged_images(data):
    with pytest.raises(DamagedImageError, match=r"^a\.npy: "):
        decode_array(data, name="a.npy")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8, 99])
def test_header_has_the_size_of_the_decoded_image(file_format, orientation, tmp_path):
    exif = Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.fromarray(RGB), file_format, exif=exif.tobytes())
    (tmp_path / "x").write_bytes(data)
    header = read_header(tmp_path / "x")
    assert header == read_header(data)
    assert header.upright_size == decode(data).shape[:2]
    if file_format != "TIFF":  # Pillow turns it on its own
        assert header == (7, 5, orientation if orientation in (3, 6, 8) else 1)


def test_header_of_a_png_whose_exif_follows_its_pixels():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encode(Image.fromarray(RGB), exif=exif.tobytes())
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert read_header(late) == (7, 5, 6)
    assert decode(late).shape == (5, 7, 3)


def test_header_of_what_is_no_image(tmp_path):
    bomb = encode(Image.new("1", (10_000, 10_000)))
    for file in (b"", b"text", RGB.tobytes(), bomb, tmp_path, tmp_path / "nope"):
        with pytest.raises(DamagedImageError, match="photo"):
            read_header(file, name="photo")
