"""Weights from a file, a folder, the package or the hub, as plain numpy arrays.

Nothing here knows an architecture. Files are hostile until read: safetensors by default, pickles
only when asked for by name, and then through torch's weights-only reader.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from vision_jax.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
ALLOW_PICKLE = "--config.model.allow_pickle=True"
JSON_LIMIT = 64 * 2**20  # bytes; a config is a few kB, the index of a large model a few MB
PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Weights:
    """Tensors and what came with them.

    Attributes:
      tensors: by the file's own names; half precision is widened to float32.
      metadata: "config" (config.json's contents) and "vision_jax" (our own header), where there.
      preprocessing: mean, std, image_size (height, width), crop_pct, crop_mode, interpolation; each
        None where unknown. None as a whole if nothing came with the weights.
      origin: where they came from, for people.
      sha256: of the weight file, or of all shards one after another.
    """

    tensors: Mapping[str, np.ndarray]
    metadata: dict[str, Any]
    preprocessing: dict[str, Any] | None
    origin: str
    sha256: str = field(repr=False)


def read_weights(spec: str, *, allow_pickle: bool = False) -> Weights:
    """Reads weights.

    Args:
      spec: `embedded:NAME` (a file of the package), a path of a `.safetensors`, `.pth`, `.pt` or
        `.bin` file, a path of a folder in Hugging Face's layout, or `hf://OWNER/NAME[@REVISION]`.
      allow_pickle: read pickled files too, with torch's weights-only reader.

    Raises:
      UserError: nothing there, damaged, or not weights.
    """
    if spec.startswith("embedded:"):
        return _read_embedded(spec.removeprefix("embedded:"))
    if spec.startswith("hf://"):
        return _read_folder(_download(spec, allow_pickle), allow_pickle, spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _read_folder(path, allow_pickle, str(path))
    if not path.is_file():
        raise UserError(
            f"{spec}: no such file or folder; weights are embedded:NAME, a .safetensors, .pth or "
            ".bin file, a folder with config.json and model.safetensors, or hf://owner/name"
        )
    return _assemble([path], allow_pickle, str(path), _read_config(path.parent, beside=path))


def _read_embedded(name: str) -> Weights:
    assets = resources.files("vision_jax.data").joinpath("assets")
    names = sorted(entry.name for entry in assets.iterdir() if entry.name.endswith(".safetensors"))
    for candidate in (name, f"{name}.safetensors"):
        if candidate in names:
            with resources.as_file(assets.joinpath(candidate)) as path:
                return _assemble([path], False, f"embedded:{name}", {})
    raise UserError(f"embedded:{name}: the package has no such weights, only {', '.join(names)}")


def _read_folder(folder: Path, allow_pickle: bool, origin: str) -> Weights:
    config = _read_config(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return _assemble([folder / WEIGHTS_FILE], allow_pickle, origin, config)
    if (folder / INDEX_FILE).is_file():
        return _assemble(_shards(folder), allow_pickle, origin, config)
    if (folder / PICKLE_FILE).is_file():
        return _assemble([folder / PICKLE_FILE], allow_pickle, origin, config)
    raise UserError(
        f"{origin}: the folder has no {WEIGHTS_FILE}, {INDEX_FILE} or {PICKLE_FILE}; name the "
        "weight file itself if it is called otherwise"
    )


def _shards(folder: Path) -> list[Path]:
    index = _read_json(folder / INDEX_FILE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX_FILE}: no weight_map in it; download the file again")
    paths = []
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX_FILE}: shard {name!r} is no .safetensors file beside")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: shard is missing; download the model again")
        paths.append(folder / name)
    return paths


def _assemble(
    paths: Sequence[Path], allow_pickle: bool, origin: str, config: dict[str, Any]
) -> Weights:
    tensors: dict[str, np.ndarray] = {}
    header: dict[str, str] = {}
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix in PICKLES:
            part = _read_pickle(path, allow_pickle)
        else:
            part, metadata = _read_safetensors(path)
            header.update(metadata)
        if repeated := sorted(set(part) & set(tensors)):
            raise UserError(f"{path}: tensor {repeated[0]} is in another shard too")
        tensors.update(part)
        with open(path, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
    ours = _header_json(header, paths[0])
    metadata = dict(config, **({"vision_jax": ours} if ours else {}))
    return Weights(tensors, metadata, read_preprocessing(metadata), origin, digest.hexdigest())


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            tensors = {name: _widen(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no dict)
            return tensors, file.metadata() or {}
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: damaged or no safetensors file ({reason}); copy or download it again"
        ) from None


def _read_pickle(path: Path, allow_pickle: bool) -> dict[str, np.ndarray]:
    if not allow_pickle:
        raise UserError(
            f"{path} is a pickle, which can run code when it is read: take a .safetensors file, or "
            f"set {ALLOW_PICKLE} if you trust where it came from"
        )
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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a hostile or damaged file raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a file of weights alone ({reason})") from None
    for wrapper in ("state_dict", "model", "model_ema"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__} and not a dict of tensors by name")
    tensors = {
        str(name).removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise UserError(f"{path}: a dict without any tensor; keys: {sorted(map(str, content))[:5]}")
    halves = (torch.bfloat16, torch.float16)
    return {
        name: (value.float() if value.dtype in halves else value).detach().numpy()
        for name, value in tensors.items()
    }


def _widen(array: np.ndarray) -> np.ndarray:
    """bfloat16 and float16 as float32; anything else as it is."""
    return array.astype(np.float32) if array.dtype in (ml_dtypes.bfloat16, np.float16) else array


def _download(spec: str, allow_pickle: bool) -> Path:
    """Folder of a hub repository in the local cache, downloaded first where it can be."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", spec)
    if not match:
        raise UserError(f"{spec}: write hf://owner/name or hf://owner/name@revision")
    import huggingface_hub
    from huggingface_hub import errors

    repository, revision = match.groups()
    patterns = [CONFIG_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*.safetensors"]
    if allow_pickle:
        patterns.append(PICKLE_FILE)
    fetch = partial(
        huggingface_hub.snapshot_download, repository, revision=revision, allow_patterns=patterns
    )
    refused = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    reason = "this machine is offline"
    try:  # itself falls back on the cache when the hub can't be reached
        return Path(fetch())
    except refused as error:
        raise UserError(
            f"{spec}: the hub has no such model or revision, or it is private ("
            f"{type(error).__name__}); check the name, or `hf auth login` first"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        return Path(fetch(local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        raise UserError(
            f"{spec}: not in the cache and not to be had from the hub ({reason}); connect once, or "
            "give the path of a local folder"
        ) from None


def _read_config(folder: Path, beside: Path | None = None) -> dict[str, Any]:
    """config.json and preprocessor_config.json of a folder.

    A lone weight file takes them only if it has the name it would have in such a folder: other
    files beside it may well be another model's.
    """
    if beside is not None and beside.name not in (WEIGHTS_FILE, PICKLE_FILE):
        return {}
    found = {}
    for key, name in (("config", CONFIG_FILE), ("preprocessor", PREPROCESSOR_FILE)):
        if (folder / name).is_file():
            found[key] = _read_json(folder / name)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > JSON_LIMIT:
        raise UserError(f"{path}: {path.stat().st_size} bytes is no config; download it again")
    return _parse_json(path.read_bytes(), str(path))


def _header_json(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    text = header.get("vision_jax")
    return _parse_json(text.encode(), f"{path}: the header's vision_jax entry") if text else {}


def _parse_json(text: bytes, what: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{what} is a {type(content).__name__} and not an object")
    return content


def read_preprocessing(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Preprocessing from our header, timm's pretrained_cfg or transformers' preprocessor config.

    Raises:
      UserError: a field that is there and makes no sense.
    """
    config, preprocessor = metadata.get("config", {}), metadata.get("preprocessor")
    cfg = config.get("pretrained_cfg")
    found: dict[str, Any]
    if isinstance(metadata.get("vision_jax", {}).get("preprocessing"), dict):
        found = metadata["vision_jax"]["preprocessing"]
    elif isinstance(cfg, dict):
        size = cfg.get("input_size")
        found = {
            "mean": cfg.get("mean"),
            "std": cfg.get("std"),
            "image_size": size[-2:] if isinstance(size, list) else None,
            "crop_pct": cfg.get("crop_pct"),
            "crop_mode": cfg.get("crop_mode"),
            "interpolation": cfg.get("interpolation"),
        }
    elif isinstance(preprocessor, dict):
        found = _from_preprocessor(preprocessor)
    else:
        return None
    return {
        "mean": _numbers(found.get("mean"), 3, "mean"),
        "std": _numbers(found.get("std"), 3, "std"),
        "image_size": _numbers(found.get("image_size"), 2, "image_size", int),
        "crop_pct": None if found.get("crop_pct") is None else float(found["crop_pct"]),
        "crop_mode": found.get("crop_mode"),
        "interpolation": found.get("interpolation"),
    }


def _from_preprocessor(config: Mapping[str, Any]) -> dict[str, Any]:
    size, crop = _side(config.get("size")), _side(config.get("crop_size"))
    center = bool(config.get("do_center_crop")) and crop is not None
    by_edges = isinstance(config.get("size"), dict) and "height" in config["size"]
    shortest = isinstance(config.get("size"), dict) and "shortest_edge" in config["size"]
    crop_pct = crop_share(crop[0], size[0]) if center and crop and size else 1.0
    if shortest and size and isinstance(config.get("crop_pct"), int | float):
        # ConvNextImageProcessor: `size` is what remains, and from 384 pixels on nothing is cut.
        shortest = size[0] < 384
        crop_pct = float(config["crop_pct"]) if shortest else 1.0
    mode = "center" if shortest or (center and not by_edges) else "squash"
    normalize = config.get("do_normalize", True)
    return {
        "mean": config.get("image_mean") if normalize else [0.0] * 3,
        "std": config.get("image_std") if normalize else [1.0] * 3,
        "image_size": crop if center else size,
        "crop_pct": crop_pct,
        "crop_mode": mode,
        "interpolation": PIL_FILTERS.get(config.get("resample", 2)),
    }


def crop_share(crop: int, resized: int) -> float:
    """The share that a center crop keeps, such that floor(crop / share) is `resized` again."""
    share = crop / resized
    return math.nextafter(share, 0) if math.floor(crop / share) < resized else share


def torchvision_preprocessing(preset: Any) -> dict[str, Any]:
    """Preprocessing of a torchvision.transforms._presets.ImageClassification."""
    (crop,), (resized,) = preset.crop_size, preset.resize_size
    return {
        "image_size": (crop, crop),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "crop_pct": crop_share(crop, resized),
        "crop_mode": "center",
        "interpolation": preset.interpolation.value,
    }


def _side(size: Any) -> list[int] | None:
    """Height and width of the ways in which preprocessor configs have written a size."""
    if isinstance(size, int):
        return [size, size]
    if isinstance(size, dict) and "shortest_edge" in size:
        return [size["shortest_edge"]] * 2
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return [size["height"], size["width"]]
    return None


def _numbers(values: Any, count: int, name: str, kind: type = float) -> tuple[Any, ...] | None:
    if values is None:
        return None
    try:
        numbers = tuple(kind(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count:
        raise UserError(f"the weights' preprocessing: {name} {values!r} is not {count} numbers")
    return numbers
