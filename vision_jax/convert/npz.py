"""big_vision's and AugReg's flat .npz files as tensors by name."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from vision_jax.errors import UserError


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Tensors by name; bfloat16, which numpy keeps as two raw bytes, becomes itself again.

    Raises:
      UserError: damaged, not a .npz file, or with Python objects in it (a pickle in disguise).
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            tensors = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged or no .npz file ({reason})") from None
    return {
        name: array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
        for name, array in tensors.items()
    }


def write_npz(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a .npz file, names in order, so that equal tensors give equal files."""
    with open(path, "wb") as file:
        np.savez(file, **{name: np.asarray(tensors[name]) for name in sorted(tensors)})  # type: ignore[arg-type]
