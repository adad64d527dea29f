"""big_vision's and AugReg's flat .npz files as tensors by name."""

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from vision_jax.errors import UserError
from vision_jax.limits import check_shape

Header = tuple[tuple[int, ...], np.dtype]


def read_headers(path: Path) -> dict[str, Header]:
    """Shape and dtype of each tensor by name, which says what reading it would take.

    Raises:
      UserError: damaged, not a .npz file, or with Python objects in it (a pickle in disguise).
    """
    headers: dict[str, Header] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if name in headers:
                    raise ValueError(f"{name} is there twice")
                with archive.open(entry) as file:
                    version = npy.read_magic(file)
                    old = version == (1, 0)
                    read = npy.read_array_header_1_0 if old else npy.read_array_header_2_0
                    shape, _, dtype = read(file)
                    check_shape(name, shape)
                    told = math.prod(shape) * dtype.itemsize
                    if told != entry.file_size - file.tell():
                        raise ValueError(f"{name} has not the size that its header says")
                headers[name] = shape, _dtype(name, dtype)
    except Exception as error:  # a hostile archive: any kind of damage
        raise _damaged(path, error) from None
    return headers


def read_npz(path: Path, name: str) -> np.ndarray:
    """One tensor; bfloat16, which numpy keeps as two raw bytes, becomes itself again.

    Raises:
      UserError: damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file[name]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, error) from None
    return array.view(_dtype(name, array.dtype))


def _dtype(name: str, dtype: np.dtype) -> np.dtype:
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
    if dtype.kind not in "fiub" and dtype != ml_dtypes.bfloat16:
        raise ValueError(f"{name} is of {dtype} and not a tensor of numbers")
    return dtype


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path}: damaged or no .npz file ({reason}); copy or download it again")


def write_npz(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a .npz file, names in order, so that equal tensors give equal files."""
    with open(path, "wb") as file:
        np.savez(file, **{name: np.asarray(tensors[name]) for name in sorted(tensors)})  # type: ignore[arg-type]
