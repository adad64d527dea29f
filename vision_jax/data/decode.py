"""Image files, which may be hostile, to uint8[H, W, 3]; .npy files to uint8[H, W, C].

Every file becomes three channels as its author saw it: EXIF orientation applied, palettes and grey
expanded, transparency composited on white, 16 bits scaled (not clipped) to 8.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from vision_jax.errors import UserError

# Pillow knows many more formats; each is a parser that a hostile file could reach.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64_000_000

_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that exchange width and height
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
    if len(data) > max_bytes:
        raise DamagedImageError(f"{name}: {len(data)} bytes or more, over the limit of {max_bytes}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DamagedImageError(
                    f"{name}: {width} × {height} pixels, over the limit of {max_pixels}: shrink it"
                )
            image.load()  # also reads what follows the pixels: a PNG's EXIF may stand there
            rgb = _to_rgb(image, name)
            return np.asarray(_upright(rgb, image) if upright else rgb)
    except DamagedImageError:
        raise
    except Exception as error:  # Pillow's parsers raise nearly every type on damaged files
        raise DamagedImageError(f"{name}: not a readable image ({error})") from error


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
        with Image.open(
            io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS
        ) as image:
            width, height = image.size
            if image.format == "PNG" and not _has_late_exif(image):
                image.info.setdefault("exif", b"")  # else Pillow decodes all of it in search of one
            # Pillow states a TIFF's size as if it had turned it already.
            orientation = 1 if image.format == "TIFF" else _orientation(image)
    except Exception as error:
        raise DamagedImageError(f"{name}: not a readable image ({error})") from error
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
        height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
        return height, width
    except Exception as error:  # as above
        raise DamagedImageError(f"{path}: not a readable image ({error})") from error


def decode_thumbnail(data: bytes, *, name: str, side: int = 16) -> np.ndarray:
    """Decode an image to a grey, upright uint8[side, side], by which images can be compared.

    All of the file is read, so that a truncated one is found; JPEG at an eighth of its size, which
    is several times faster. Raises DamagedImageError as decode_image does.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft("L", (4 * side, 4 * side))
            image.load()
            grey = image if image.mode == "L" else _to_rgb(image, name).convert("L")
            upright = _upright(grey, image)
            return np.asarray(upright.resize((side, side), Image.Resampling.BOX))
    except DamagedImageError:
        raise
    except Exception as error:  # as above
        raise DamagedImageError(f"{name}: not a readable image ({error})") from error


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
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255. 65535 / 257 = 255, so this rounds to nearest.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # [H, W]
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DamagedImageError(
            f"{name}: 32-bit pixels have no defined white: save it with 8 or 16 bits a channel"
        )
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colors).convert("RGB")
    return image.convert("RGB")


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
