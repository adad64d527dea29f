"""Every layout of TIFF that tifffile writes: the right pixels or a refusal, never anything else.

LZW, PackBits, JPEG and Zstandard need imagecodecs beside tifffile, from the `parity` extra.
"""

import importlib.util
import io
import itertools
import logging

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.decode import DamagedImageError, decode_image, read_header

tifffile = pytest.importorskip("tifffile")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

HEIGHT, WIDTH = 37, 29
COMPRESSIONS = [None, "deflate"]
if importlib.util.find_spec("imagecodecs"):
    COMPRESSIONS += ["lzw", "packbits", "jpeg", "zstd"]
# (type, bits) of a channel
DEPTHS = [("bool", 1), ("uint8", 2), ("uint8", 4), ("uint8", 8), ("uint16", 12), ("uint16", 16)]
UNDEFINED = [("int8", 8), ("int16", 16), ("uint32", 32), ("float32", 32)]
COLORS = {"minisblack": 1, "miniswhite": 1, "palette": 1, "rgb": 3, "ycbcr": 3, "separated": 4}
LAYOUTS = [(name, count, None) for name, count in COLORS.items()]
LAYOUTS += [("minisblack", 2, kind) for kind in ("unassalpha", "assocalpha", "unspecified")]
LAYOUTS += [("rgb", 4, kind) for kind in ("unassalpha", "assocalpha", "unspecified")]
LAYOUTS += [("minisblack", 3, "unspecified"), ("miniswhite", 2, "unassalpha")]
# What must be read and not refused: all that scanners, cameras and microscopes commonly write.
READ = {("minisblack", 1), ("miniswhite", 1), ("rgb", 3), ("rgb", 4), ("separated", 4)}


def write(photometric, count, extra, kind, bits, planar, rng, **options):
    """(file, its channels as integers [H, W, C], color map) of random pixels."""
    shape = {"contig": (HEIGHT, WIDTH, count), "separate": (count, HEIGHT, WIDTH)}[planar]
    if kind == "float32":
        stored = rng.random(shape).astype(kind)
    else:
        low = -(2 ** (bits - 1)) if kind.startswith("int") else 0
        stored = rng.integers(low, low + 2**bits, shape).astype(kind)
    if count == 1:
        stored = stored[..., 0]
    else:
        options["planarconfig"] = planar
    if kind != "bool" and bits not in (8, 16, 32):
        options["bitspersample"] = bits
    if extra:
        options["extrasamples"] = [extra] * (count - COLORS[photometric])
    colormap = rng.integers(0, 65536, (3, 2**bits)) if photometric == "palette" else None
    if colormap is not None:
        options["colormap"] = colormap.astype(np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, stored, photometric=photometric, metadata=None, **options)
    if options["compression"] == "jpeg":
        stored = tifffile.imread(io.BytesIO(file.getvalue()))
    channels = np.moveaxis(stored, 0, -1) if planar == "separate" and count > 1 else stored
    return file.getvalue(), channels.reshape(HEIGHT, WIDTH, count), colormap


def shown(channels, colormap, photometric, extra, bits, are_rgb) -> np.ndarray:
    """f64[H, W, 3]: what the file shows, on white. tifffile gives RGB of YCbCr in JPEG."""
    if colormap is not None:
        return colormap[:, channels[..., 0].astype(int)].transpose(1, 2, 0) >> 8
    values = channels.astype(int)
    values = values >> (bits - 8) if bits > 8 else values * 255 // (2**bits - 1)
    count = COLORS[photometric]
    colors, alpha = values[..., :count], values[..., count:] / 255
    if photometric == "miniswhite":
        colors = 255 - colors
    if photometric in ("separated", "ycbcr") and not are_rgb:
        mode = {"separated": "CMYK", "ycbcr": "YCbCr"}[photometric]
        colors = np.asarray(Image.fromarray(colors.astype(np.uint8), mode).convert("RGB"))
    if extra == "unassalpha":
        colors = colors * alpha + 255 * (1 - alpha)
    elif extra == "assocalpha":
        colors = np.minimum(colors + 255 * (1 - alpha), 255)
    return np.broadcast_to(colors, (HEIGHT, WIDTH, 3))


@pytest.mark.long(but=("None-contig", "deflate-separate"))
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_right_pixels_or_a_refusal(compression, planar, capfd, rng):
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    parts = ({}, {"tile": (16, 16)}, {"rowsperstrip": 8})
    read = set()
    for layout, (kind, bits), part, byteorder, predictor in itertools.product(
        LAYOUTS, DEPTHS + UNDEFINED, parts, "<>", (False, True)
    ):
        if byteorder == ">" and bits <= 8 and part:
            continue  # the order of bytes says nothing about them
        photometric, count, extra = layout
        options = {"compression": compression, "byteorder": byteorder, "predictor": predictor}
        try:
            data, channels, colormap = write(*layout, kind, bits, planar, rng, **options, **part)
        except Exception:  # a layout that tifffile or the codec has not
            continue
        try:
            image = decode_image(data, name="x").astype(int)
        except DamagedImageError:
            continue
        assert (kind, bits) in DEPTHS, layout
        assert read_header(data).upright_size == image.shape[:2]
        expected = shown(
            channels,
            colormap,
            photometric,
            extra,
            bits,
            (photometric, compression) == ("ycbcr", "jpeg"),
        )
        allowed = 6 if compression == "jpeg" else 2 if extra or photometric == "ycbcr" else 0
        error = np.abs(image - expected).max()
        assert error <= allowed, (layout, kind, bits, options, part, error)
        read.add((photometric, count, bits))
    if compression in (None, "deflate", "lzw") and planar == "contig":
        assert {(*layout, 8) for layout in READ} <= read
        assert {("minisblack", 1, 16), ("miniswhite", 1, 16), ("rgb", 3, 16)} <= read
        assert {("minisblack", 1, 1), ("palette", 1, 8)} <= read


def test_the_first_page_and_its_orientation(rng):
    deep = rng.integers(0, 65536, (7, 5), np.uint16)
    turn = {1: deep, 3: deep[::-1, ::-1], 6: np.rot90(deep, -1), 8: np.rot90(deep)}
    for orientation, expected in turn.items():
        file = io.BytesIO()
        tag = (274, 3, 1, orientation, True)
        with tifffile.TiffWriter(file, bigtiff=orientation == 3) as writer:
            for page in (deep, np.zeros_like(deep)):
                writer.write(page, photometric="minisblack", extratags=[tag], metadata=None)
        image = decode_image(file.getvalue(), name="x")
        assert np.array_equal(image[..., 0], expected >> 8)
        assert read_header(file.getvalue()).upright_size == expected.shape
