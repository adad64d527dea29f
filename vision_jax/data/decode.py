"""Image files, which may be hostile, to uint8[H, W, 3]; .npy files to uint8[H, W, C].

Every file becomes three channels as its author saw it: EXIF orientation applied, palettes and grey
expanded, transparency composited on white, and of more than 8 bits the upper 8 taken. (Pillow does
so with most 16-bit files, as libpng and OpenCV do, and loses the others, so the rule is for all.)
What Pillow reads wrong without a word is refused.
"""

import io
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from vision_jax.errors import UserError
from vision_jax.files import open_regular, read_bytes

# Pillow knows many more formats; each is a parser that a hostile file could reach.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64_000_000
MAX_SCANS = 100  # of a progressive JPEG, which usually has 10; each passes over all pixels
MAX_PIXELS_AT_ONCE = 2 * MAX_PIXELS  # of all threads; a pixel takes up to 15 bytes on its way
STRIP = 2**20  # pixels that are composited on white at once

Picture = np.ndarray | Image.Image  # uint8[H, W, C], or Pillow's of mode RGB

_EXIF_ORIENTATION = 0x0112
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR = 258, 259, 262, 277, 284  # tags of TIFF
_PREDICTOR, _SAMPLE_FORMAT = 317, 339
_GREYS, _YCBCR, _CIELAB = (0, 1), 6, 8  # photometric interpretations
_WORD_ALIGNED_FAX = 32771
GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow's raw modes of PNGs with 2 and 4 bits
_PREDICTED = (5, 8, 32946, 34925, 50000)  # LZW, deflate (two numbers), LZMA, Zstandard
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # these swap height and width


class DamagedImageError(UserError):
    """One image that can't be used; its message names the file. Training skips and counts it."""


class UnknownFormatError(DamagedImageError):
    """A file that is none of FORMATS, or ends within its header."""


class TooManyPixelsError(DamagedImageError):
    """An image that is larger, by its header or in bytes, than is read."""


class _Room:
    """Lets threads decode as long as their images together have no more than so many pixels."""

    def __init__(self, pixels: int):
        self._all = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_ROOM = _Room(MAX_PIXELS_AT_ONCE)  # of the process, as its memory is


def read_image_file(path: str) -> bytes:
    """The bytes of an image file.

    Raises DamagedImageError if it is not there, no regular file, or larger than `MAX_BYTES`.
    """
    try:
        return read_bytes(path, MAX_BYTES)
    except UserError as error:
        raise DamagedImageError(str(error)) from error


def decode_image(
    data: bytes,
    *,
    name: str,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    upright: bool = True,
) -> np.ndarray:
    """Decode the bytes of a JPEG, PNG, WEBP, BMP, GIF (first frame) or TIFF (first page).

    `name` is what errors call the image. The size is read from the header and checked before any
    pixel is decoded, so a small file that claims a huge image costs nothing. Transparent pixels are
    composited on white. With `upright` False the EXIF orientation is ignored.

    Returns uint8[H, W, 3], RGB. Raises DamagedImageError if the image is truncated, damaged, larger
    than `max_pixels` or `max_bytes`, of another format, or of a depth without a defined range.
    """
    picture = decode_picture(
        data, name=name, max_pixels=max_pixels, max_bytes=max_bytes, upright=upright
    )
    return np.asarray(picture)


def decode_picture(
    data: bytes,
    *,
    name: str,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    upright: bool = True,
) -> Image.Image:
    """`decode_image` whose pixels stay Pillow's, of mode RGB: for what is cropped and resized next.

    An array of all pixels and back took a seventh of the time of a training view.
    """
    with open_picture(data, name=name, max_pixels=max_pixels, max_bytes=max_bytes) as image:
        return _load(image, name, upright)


@contextmanager
def open_picture(
    data: bytes, *, name: str, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Iterator[ImageFile.ImageFile]:
    """Pillow's image, checked by its header, whose pixels are read inside of the `with`.

    Raises DamagedImageError for whatever goes wrong there, as `decode_image` says.
    """
    if len(data) > max_bytes:
        raise TooManyPixelsError(
            f"{name}: {len(data)} bytes or more, over the limit of {max_bytes}"
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise TooManyPixelsError(
                    f"{name}: {width} × {height} pixels, over the limit of {max_pixels}: shrink it"
                )
            _check_scans(image, data, name)
            _check_layout(image, name)
            with _ROOM.take(width * height):
                yield image
    except DamagedImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, above ours
        (count,) = re.findall(r"size \((\d+) pixels", str(error)) or ["too many"]
        raise TooManyPixelsError(
            f"{name}: {count} pixels, over the limit of {max_pixels}: shrink it"
        ) from None
    except Exception as error:  # Pillow's parsers raise nearly every type on damaged files
        raise _unreadable(name, error) from error


def image_to_array(image: Image.Image, *, name: str, upright: bool = True) -> np.ndarray:
    """uint8[H, W, 3] of an opened Pillow image, as `decode_image` gives it of the file's bytes.

    Raises DamagedImageError if it cannot be read, or its depth has no defined range.
    """
    try:
        return np.asarray(_load(image, name, upright))
    except DamagedImageError:
        raise
    except Exception as error:  # as above
        raise _unreadable(name, error) from error


def _load(image: Image.Image, name: str, upright: bool) -> Image.Image:
    image.load()  # also reads what follows the pixels: a PNG's EXIF may stand there
    rgb = _to_rgb(image, name)
    return _upright(rgb, image) if upright else rgb


def _check_scans(image: Image.Image, data: bytes, name: str) -> None:
    """A small JPEG of many scans asks for much work: each of them passes over all pixels."""
    if image.format not in ("JPEG", "MPO"):
        return
    read = np.frombuffer(data, np.uint8)  # a quarter of the time of data.count
    if np.count_nonzero((read[:-1] == 0xFF) & (read[1:] == 0xDA)) > MAX_SCANS:
        raise DamagedImageError(
            f"{name}: a progressive JPEG of more than {MAX_SCANS} scans: save it again"
        )


def _check_layout(image: Image.Image, name: str) -> None:
    """Refuses TIFFs and PNGs whose pixels Pillow 12 and 13 get wrong without an error.

    Found by a matrix of what tifffile writes, which tests/data/test_tiff.py repeats.
    """
    raw_mode = image.tile[0].args if isinstance(image, PngImagePlugin.PngImageFile) else None
    if "transparency" in image.info and raw_mode == "RGB;16B":
        raise DamagedImageError(
            f"{name}: a 16-bit PNG with a transparent color: save it with an alpha channel"
        )
    if "transparency" in image.info and raw_mode in GREY_STEPS:
        image.info["transparency"] *= GREY_STEPS[raw_mode]  # Pillow scales all pixels but not this
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tag = image.tag_v2
    bits, signs = max(tag.get(_BITS, (1,))), tag.get(_SAMPLE_FORMAT, (1,))
    compression, photometric = tag.get(_COMPRESSION, 1), tag.get(_PHOTOMETRIC)
    count, planar = tag.get(_SAMPLES, 1), tag.get(_PLANAR, 1) == 2
    fault = ""
    if (bits == 12 and compression != 1) or compression == _WORD_ALIGNED_FAX:
        fault = f"{bits} bits compressed by method {compression}"
    elif 2 in signs and bits <= 16:
        fault = "signed numbers, whose black and white are not defined"
    elif photometric in _GREYS and count > 2:
        fault = f"{count} grey channels"
    elif planar and count > 1 and bits > 8 and compression == 1:
        fault = "uncompressed 16-bit channels, one plane after the other"
    elif planar and count > 1 and photometric in (*_GREYS, _CIELAB, _YCBCR):
        fault = "channels in one plane after the other, and not RGB or CMYK"
    elif tag.get(_PREDICTOR, 1) != 1 and compression not in _PREDICTED:
        fault = "a predictor beside a compression that has none, which readers differ on"
    if fault:
        raise DamagedImageError(f"{name}: a TIFF of {fault}: save it as PNG, or as plain RGB")


def _unreadable(name: str, error: Exception) -> DamagedImageError:
    if isinstance(error, UnidentifiedImageError):  # names the buffer that it was read from
        reason = f"none of {', '.join(FORMATS)}"
        return UnknownFormatError(f"{name}: not a readable image ({reason})")
    reason = re.sub(r"<[^<>]*>", "it", " ".join(str(error).split())) or type(error).__name__
    kind = DamagedImageError
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own bound, above ours
        kind = TooManyPixelsError
    return kind(f"{name}: not a readable image ({reason})")


class Header(NamedTuple):
    """Of an image file: its size as stored, and the EXIF orientation (1 where there is none)."""

    height: int
    width: int
    orientation: int

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) of what decode_image returns."""
        turned = self.orientation in _TURNED
        return (self.width, self.height) if turned else (self.height, self.width)


def read_header(file: Path | bytes, *, name: str = "") -> Header:
    """Read an image's size and orientation from a file or its bytes, without decoding pixels.

    Raises DamagedImageError if there is no file, or none that decode_image would begin to decode.
    """
    name = name or str(file)
    try:
        with (
            io.BytesIO(file) if isinstance(file, bytes) else open_regular(file) as opened,
            Image.open(opened, formats=FORMATS) as image,
        ):
            width, height = image.size
            _check_layout(image, name)
            if image.format == "PNG" and not _has_late_exif(image):
                image.info.setdefault("exif", b"")  # else Pillow decodes all of it in search of one
            # Pillow states a TIFF's size as if it had turned it already.
            orientation = 1 if image.format == "TIFF" else _orientation(image)
    except DamagedImageError:
        raise
    except UserError as error:
        reason = str(error).removeprefix("" if isinstance(file, bytes) else f"{file}: ")
        raise DamagedImageError(f"{name}: {reason}") from error
    except Exception as error:
        raise _unreadable(name, error) from error
    if width * height > MAX_PIXELS:
        raise DamagedImageError(
            f"{name}: {width} × {height} pixels, over the limit of {MAX_PIXELS}: shrink it"
        )
    return Header(height, width, orientation)


def read_size(path: str) -> tuple[int, int]:
    """(height, width) of an image file as `decode_image` or `decode_array` gives it, by its header.

    Raises DamagedImageError if there is no readable header.
    """
    if not path.endswith(".npy"):
        return read_header(Path(path)).upright_size
    try:
        with open_regular(path) as file:
            old = npy.read_magic(file) == (1, 0)
            shape = (npy.read_array_header_1_0 if old else npy.read_array_header_2_0)(file)[0]
            height, width = shape[:2]
    except UserError as error:
        raise DamagedImageError(str(error)) from error
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    if min(shape) <= 0 or math.prod(shape) > MAX_BYTES:
        raise DamagedImageError(f"{path}: not a readable image (an array of {shape})")
    return height, width


def decode_thumbnail(data: bytes, *, name: str, side: int = 16) -> np.ndarray:
    """Decode an image to a grey, upright uint8[side, side], by which images can be compared.

    All of the file is read, so that a truncated one is found; JPEG at an eighth of its size, which
    is several times faster. Raises DamagedImageError as decode_image does.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_scans(image, data, name)
            _check_layout(image, name)
            image.draft("L", (4 * side, 4 * side))
            with _ROOM.take(math.prod(image.size)):
                image.load()
                grey = image if image.mode == "L" else _to_rgb(image, name).convert("L")
                upright = _upright(grey, image)
                return np.asarray(upright.resize((side, side), Image.Resampling.BOX))
    except DamagedImageError:
        raise
    except Exception as error:  # as above
        raise _unreadable(name, error) from error


def decode_array(data: bytes, *, name: str) -> np.ndarray:
    """Decode the bytes of a .npy file: images of any number of channels, for other sensors.

    Returns uint8[H, W, C] of a file of uint8[H, W, C] or uint8[H, W]. Raises DamagedImageError for
    anything else, or a damaged file.
    """
    if len(data) > MAX_BYTES:
        raise DamagedImageError(f"{name}: {len(data)} bytes or more, over the limit of {MAX_BYTES}")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises many types on damaged headers
        raise DamagedImageError(f"{name}: not a readable .npy file ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DamagedImageError(f"{name}: not an array of uint8[H, W] or uint8[H, W, C]")
    if 0 in array.shape:
        raise DamagedImageError(f"{name}: an empty image, {array.shape}")
    return array if array.ndim == 3 else array[..., None]


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        bits, inverted = _grey_depth(image)
        deep = np.asarray(image)  # [H, W]
        grey = (deep >> (bits - 8)).astype(np.uint8)
        if "transparency" in image.info:
            grey[deep == image.info["transparency"]] = 255
        return Image.fromarray(255 - grey if inverted else grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise DamagedImageError(
            f"{name}: 32-bit pixels have no defined white: save it with 8 or 16 bits a channel"
        )
    if image.has_transparency_data:
        rgb = Image.new("RGB", image.size)
        rows = max(1, STRIP // max(1, image.width))
        for top in range(0, image.height, rows):  # four more copies of all of it would be gigabytes
            box = (0, top, image.width, min(top + rows, image.height))
            colors = image.crop(box).convert("RGBA")
            white = Image.new("RGBA", colors.size, (255, 255, 255, 255))
            rgb.paste(Image.alpha_composite(white, colors).convert("RGB"), box)
        return rgb
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _grey_depth(image: Image.Image) -> tuple[int, bool]:
    """(bits, whether 0 is white) of an image that Pillow decoded to 16-bit grey as it is stored."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 16, False
    return image.tag_v2.get(_BITS, (16,))[0], image.tag_v2.get(_PHOTOMETRIC) == 0


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. (Pillow itself has already turned TIFFs, and dropped the tag.)"""
    orientation = _orientation(original)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged metadata around healthy pixels: viewers show these unturned
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _has_late_exif(image: ImageFile.ImageFile) -> bool:
    """Whether an opened PNG may have EXIF behind its pixels, seen from the chunks' headers."""
    file = image.fp
    if file is None:
        return False
    start = file.tell()
    file.seek(8)
    late = False
    while len(head := file.read(8)) == 8:
        late |= head[4:] == b"eXIf"
        file.seek(int.from_bytes(head[:4]) + 4, 1)
    file.seek(start)
    return late and "exif" not in image.info
