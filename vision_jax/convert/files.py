"""Weight files as tensors that are read when asked for, and safetensors written tensor by tensor.

Files are hostile until read. A safetensors file is memory-mapped, so that its tensors take memory
only while somebody holds them; nothing here knows an architecture.
"""

import argparse
import contextlib
import json
import math
import mmap
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from vision_jax.convert.npz import read_headers, read_npz
from vision_jax.errors import UserError
from vision_jax.files import DRAFT
from vision_jax.limits import check_shape

# The names of the format, in the order in which its own library sorts a file's tensors, the last
# first, and then by name.
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}
NARROW = (ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn, np.float16, ml_dtypes.bfloat16)
# Where a training program may keep its weights beside other things. The averaged ones come first:
# they are what the program evaluates, and what timm takes of a file that has both.
EMA_WRAPPERS = ("state_dict_ema", "model_ema", "model_ema_state_dict", "ema_state_dict", "ema")
PLAIN_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "teacher")
WRAPPERS = (*EMA_WRAPPERS, "params_ema", *PLAIN_WRAPPERS, "params", "module", "network")
# Dicts that a program keeps beside its model's: never the weights.
BESIDE = re.compile(r"(?i).*(optim|sched|scaler|loss|criterion|rng|callback|loop|param|arg|conf)")
PREFIXES = (
    "module.",
    "model.",
    "_orig_mod.",
    "backbone.",
    "net.",
)  # of all names alike, in any order
# What torch.compile, FSDP and activation checkpointing write into names, wherever they wrap.
INSIDE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
QUANTIZED_KEY = "vision_jax_quantized"  # of the metadata: how the kernels are quantized
INDEX_FILE = "model.safetensors.index.json"
PAGE = mmap.ALLOCATIONGRANULARITY


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its shape and dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name. Half and quarter precision is widened to float32 when read."""

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.entries[name].read()
        return array.astype(np.float32) if array.dtype in NARROW else array

    def __contains__(self, name: object) -> bool:  # the inherited one would read it
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name; nothing is read."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def without_prefixes(self) -> "Tensors":
        """The tensors by names without what wrappers of a module put into them."""
        return Tensors(strip_prefixes(self.entries))


def strip_prefixes(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The values by names without what wrappers put before each, or inside of some."""
    bare = {INSIDE.sub("", name): value for name, value in entries.items()}
    entries = bare if len(bare) == len(entries) else dict(entries)
    # torch's AveragedModel counts its updates beside the `module.` that it averages.
    averaged = {name: value for name, value in entries.items() if name != "n_averaged"}
    if averaged and all(name.startswith("module.") for name in averaged):
        entries = averaged
    while entries:
        shared = (p for p in PREFIXES if all(name.startswith(p) for name in entries))
        prefix = next(shared, None)
        if prefix is None or prefix in entries:
            break
        entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    return entries


# Reading -----------------------------------------------------------------------------------------


def open_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """A safetensors file's tensors and the metadata of its header.

    Raises:
      UserError: damaged, or no safetensors file.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:  # checks the header against the file
            metadata = file.metadata() or {}
        with open(path, "rb") as file:
            # Copy on write: who changes an array changes neither the file nor another's array.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:start])
        header.pop("__metadata__", None)
        entries = {name: _mapped(mapped, start, name, entry) for name, entry in header.items()}
        # save_model writes tensors that share memory once, and the other names into the metadata.
        tied = {name: entries[kept] for name, kept in metadata.items() if kept in entries}
        entries = {**tied, **entries}
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: damaged or no safetensors file ({reason}); copy or download it again"
        ) from None
    return Tensors(entries), metadata


def _mapped(mapped: mmap.mmap, start: int, name: str, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {entry['dtype']}")
    shape, dtype = tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])
    check_shape(f"tensor {name}", shape)
    first, last = (start + offset for offset in entry["data_offsets"])
    # Kept weakly: who asks twice gets one array, and its pages are given back with the last holder.
    kept: Callable[[], np.ndarray | None] | None = None

    def read() -> np.ndarray:
        nonlocal kept
        array = kept() if kept else None
        if array is None:
            array = np.ndarray(shape, dtype, buffer=mapped, offset=first)
            kept = weakref.ref(array)
            weakref.finalize(array, _give_back, mapped, first, last).atexit = False
        return array

    return Tensor(shape, dtype, read)


def _give_back(mapped: mmap.mmap, first: int, last: int) -> None:
    """Frees the whole pages of these bytes; read again, they come from the file again."""
    first, last = -(-first // PAGE) * PAGE, last // PAGE * PAGE
    if first < last and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def open_npz(path: Path) -> Tensors:
    """A .npz file's tensors.

    Raises:
      UserError: damaged, no .npz file, or with Python objects in it.
    """
    return Tensors(
        {
            name: Tensor(shape, dtype, partial(read_npz, path, name))
            for name, (shape, dtype) in read_headers(path).items()
        }
    )


def held(array: np.ndarray) -> Tensor:
    """An array that is in memory anyway."""
    return Tensor(array.shape, array.dtype, lambda: array)


def open_pickle(path: Path) -> Tensors:
    """A pickled checkpoint's tensors, by torch's weights-only reader, out of any usual wrapper.

    Raises:
      UserError: no torch, or a file that is damaged, holds code, or has no weights in it.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs torch: pip install 'vision_jax[torch]'") from None
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise UserError(
            f"torch {torch.__version__} can be made to run code by a pickle: pip install "
            "'torch>=2.10'"
        )
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"  # torch can memory-map these, not those before 1.6
        with (
            warnings.catch_warnings(action="ignore"),  # of what then fails, or works
            # Training programs keep their flags beside the weights: a class that holds values only.
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # unpickling a hostile or damaged file raises anything
        raise UserError(f"{path}: not a file of weights alone ({_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__} and not a dict of tensors by name")
    try:
        tensors = _unwrap(content)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not tensors:
        raise UserError(f"{path}: a dict without any tensor; keys: {sorted(map(str, content))[:5]}")
    return Tensors({name: _of_torch(path, name, tensor) for name, tensor in tensors.items()})


def _unwrap(content: Mapping[Any, Any], depth: int = 3) -> dict[str, Any]:
    """The tensors by name of a checkpoint, {} if there are none.

    Raises:
      ValueError: several dicts of tensors under names that don't tell which is the model's.
    """
    import torch

    def inside(name: Any) -> dict[str, Any]:
        dictionary = isinstance(content.get(name), dict)
        return _unwrap(content[name], depth - 1) if dictionary and depth else {}

    for name in WRAPPERS:
        if found := inside(name):
            return found
    own = {str(n): value for n, value in content.items() if isinstance(value, torch.Tensor)}
    if any(tensor.ndim for tensor in own.values()):
        return own
    # Nothing but counts and losses here: the weights stand under a name of the program's own.
    others = {str(n): inside(n) for n in content if not BESIDE.match(str(n))}
    others = {name: found for name, found in others.items() if found}
    if len(others) > 1:
        raise ValueError(f"dicts of tensors under {', '.join(others)}: save the model's alone")
    return next(iter(others.values()), own)


def _of_torch(path: Path, name: str, tensor: Any) -> Tensor:
    import torch

    whole = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not plain or tensor.dtype.is_complex:
        raise UserError(f"{path}: {name} is a {tensor.dtype} tensor of a kind that no model has")
    try:
        check_shape(name, tuple(tensor.shape))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: {name} has {tensor.numel()} numbers, of which the file has fewer")
    name_of = str(tensor.dtype).removeprefix("torch.")
    dtype = np.dtype(name_of if whole or tensor.dtype == torch.float64 else "float32")

    wanted = tensor.dtype if dtype.name == name_of else torch.float32

    def read() -> np.ndarray:
        return tensor.detach().to(wanted).numpy()

    return Tensor(tuple(tensor.shape), dtype, read)


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    reason = re.search(r"WeightsUnpickler error: (.*)", text)
    # Without torch's advice to trust the file.
    return (reason[1] if reason else text.splitlines()[0].split(" In PyTorch ")[0])[:300]


# Writing -----------------------------------------------------------------------------------------


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all: a draft beside it is renamed.

    Equal tensors give equal bytes, those that the format's own library writes, with the metadata
    sorted. `Tensors` are read one at a time.

    Raises:
      UserError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    entries = (
        tensors.entries
        if isinstance(tensors, Tensors)
        else {name: held(np.asarray(array)) for name, array in tensors.items()}
    )
    names, header = _header(entries, metadata or {})
    draft = path.with_name(path.name + DRAFT)  # what a kill leaves, the next call writes over
    try:
        with draft.open("wb") as file:
            file.write(header)
            for name in names:
                array = np.asarray(entries[name].read(), order="C")
                if (array.shape, array.dtype) != (entries[name].shape, entries[name].dtype):
                    raise ValueError(f"{name} is {array.dtype}{array.shape}, not as announced")
                file.write(array.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror}); nothing was lost") from error
    finally:  # once renamed it is not there
        with contextlib.suppress(OSError):
            draft.unlink()


def write_shards(
    folder: Path, tensors: Tensors, metadata: Mapping[str, str], limit: int
) -> list[Path]:
    """Writes files of at most `limit` bytes of tensors each, and their index; returns them all.

    A tensor larger than that has a file of its own. The layout is transformers'.

    Raises:
      UserError: the disk is full, or the folder cannot be written.
    """
    names, _ = _header(tensors.entries, metadata)
    parts: list[list[str]] = []
    room = 0
    for name in names:
        size = _size(tensors.entries[name])
        if size > room or not parts:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= size
    paths, weight_map = [], {}
    for number, part in enumerate(parts, 1):
        path = folder / f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_safetensors(path, Tensors({name: tensors.entries[name] for name in part}), metadata)
        weight_map.update(dict.fromkeys(part, path.name))
        paths.append(path)
    index = {
        "metadata": {"total_size": sum(map(_size, tensors.entries.values()))},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return [*paths, folder / INDEX_FILE]


def _size(entry: Tensor) -> int:
    return entry.dtype.itemsize * math.prod(entry.shape)


def _header(entries: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    """(names in the order of the data, the bytes before the data).

    The format is 8 bytes of the header's length, the header in JSON, then the tensors.
    """
    order = {np.dtype(dtype): number for number, dtype in enumerate(DTYPES.values())}
    codes = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
    names = sorted(entries, key=lambda name: (-order[entries[name].dtype], name))
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        entry = entries[name]
        start, end = end, end + _size(entry)
        content[name] = {
            "dtype": codes[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return names, len(text).to_bytes(8, "little") + text
