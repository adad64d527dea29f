"""Weights from a file, a folder, the package, the hub or a library's own, as plain numpy arrays.

Nothing here knows an architecture. Files are hostile until read: safetensors by default, pickles
only when asked for by name, and then through torch's weights-only reader.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import numpy as np

from vision_jax.checksums import DamagedFileError, verify_checksums
from vision_jax.convert import detectors, diffusers
from vision_jax.convert.files import (
    INDEX_FILE,
    QUANTIZED_KEY,
    Tensors,
    open_npz,
    open_pickle,
    open_safetensors,
)
from vision_jax.convert.onnx_file import open_onnx
from vision_jax.convert.processors import (
    ALIASED,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_CHANNELS,
    PREPROCESSOR_FILE,
    crop_share,
    read_processor,
    shown,
)
from vision_jax.convert.table import pair
from vision_jax.convert.tfjs_file import open_tfjs
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError, nearest
from vision_jax.files import open_regular, parse_json, read_json
from vision_jax.trees.paths import select

WEIGHTS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"
# By the library that calls them so: the file, its index where it is in shards, a pickle.
WEIGHT_FILES = (
    (WEIGHTS_FILE, INDEX_FILE, PICKLE_FILE),
    (diffusers.WEIGHTS_FILE, diffusers.INDEX_FILE, diffusers.PICKLE_FILE),
)
RUN_FILE = "model.json"  # only in the folder of a run of ours
PROCESSOR_FILE = "processor_config.json"  # its image_processor goes before the other file
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
ALLOW_PICKLE = "--config.model.allow_pickle=True, or --allow-pickle where a command has no config"
STANDARD: dict[str, Any] = {  # stands in for what a config leaves out, to check the rest
    "image_size": (1, 1),
    "mean": (0.5,),
    "std": (0.5,),
    "crop_pct": 1.0,
    "crop_mode": "center",
    "interpolation": "bicubic",
}


@dataclass(frozen=True)
class Weights:
    """Tensors and what came with them.

    Attributes:
      tensors: by the file's own names, without what a wrapper puts before all of them; half
        precision is widened to float32. Of files they are `Tensors`, read when asked for.
      metadata: "config" (config.json's contents) and "vision_jax" (our own header), where there.
      preprocessing: mean, std, image_size (height, width), crop_pct, crop_mode, crop_rule and
        interpolation; each None where unknown; `short`, `longest`, `square` and `rule`, about the
        sides, of detectors alone. None as a whole if nothing came with the weights.
      origin: where they came from, for people.
      files: that they were read from.
      family: what to take them for, where they could be more than one (see tables.find_table).
    """

    tensors: Mapping[str, np.ndarray]
    metadata: dict[str, Any]
    preprocessing: dict[str, Any] | None
    origin: str
    files: Sequence[Path] = ()
    family: str = ""

    @cached_property
    def sha256(self) -> str:
        """Of the weight file, or of all shards one after another; computed when asked for."""
        digest = hashlib.sha256()
        for path in self.files:
            with open_regular(path) as file:
                while chunk := file.read(2**22):
                    digest.update(chunk)
        return digest.hexdigest()


def read_weights(
    spec: str,
    *,
    allow_pickle: bool = False,
    dropped: Sequence[str] = (),
    field: str = "config.model.drop",
    family: str = "",
) -> Weights:
    """Reads weights.

    Args:
      spec: where they are:
        `embedded:NAME`, a file of the package;
        a path of a `.safetensors`, `.npz`, `.onnx`, `.pth`, `.pt`, `.bin` or `.ckpt` file, or of
        the `.json` file of a TensorFlow.js graph model;
        a path of a folder in Hugging Face's layout, or of a finished run;
        `hf://OWNER/NAME[/FOLDER][@REVISION]`, the folder being that of a part of a pipeline;
        `timm://NAME[.TAG]`, timm's published weights of an architecture;
        `torchvision://BUILDER[@WEIGHTS]`, torchvision's, by default those it recommends.
      allow_pickle: read pickled files too, with torch's weights-only reader. The files that timm
        and torchvision themselves name are read so in any case.
      dropped: regular expressions of whole names of tensors to leave out, as the file names them
        or without what a wrapper puts before all the rest; each must match something.
      field: where `dropped` comes from, for the error message.
      family: what to take them for, where they could be more than one: "mae" keeps an MAE's
        decoder, which is left out otherwise.

    Raises:
      UserError: nothing there, damaged, or not weights.
    """
    if spec.startswith("embedded:"):
        return _read_embedded(spec.removeprefix("embedded:"))
    weights = _read(spec, allow_pickle)
    return replace(weights, tensors=_bare(weights.tensors, dropped, field), family=family)


def _bare(tensors: Any, dropped: Sequence[str], field: str) -> Tensors:
    """Without the dropped, and then without the prefixes that only the rest has in common."""
    seen: set[str] = set(tensors)
    while True:
        left_out = select(seen, dropped, field=field, strict=False)
        kept = {name: entry for name, entry in tensors.entries.items() if name not in left_out}
        bare = Tensors(kept).without_prefixes()
        if set(bare) == set(tensors):
            select(seen, dropped, field=field)  # each rule matches something
            return bare
        tensors = bare
        seen |= set(tensors)


def _read(spec: str, allow_pickle: bool) -> Weights:
    if spec.startswith("hf://"):
        return _read_folder(_download(spec, allow_pickle), allow_pickle, spec)
    if spec.startswith("timm://"):
        return _read_timm(spec)
    if spec.startswith("torchvision://"):
        return _read_torchvision(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _read_folder(path, allow_pickle, str(path))
    if not path.is_file():
        raise UserError(
            f"{spec}: no such file or folder; weights are embedded:NAME, a .safetensors, .npz, "
            ".pth or .bin file, a folder with config.json and model.safetensors, hf://owner/name, "
            "timm://name or torchvision://builder"
        )
    return _assemble([path], allow_pickle, str(path), _read_config(path.parent, beside=path))


def embedded_names() -> list[str]:
    """The NAMEs of `embedded:NAME`."""
    assets = resources.files("vision_jax.data").joinpath("assets")
    names = sorted(entry.name for entry in assets.iterdir())
    return [name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")]


def _read_embedded(name: str) -> Weights:
    assets, names = resources.files("vision_jax.data").joinpath("assets"), embedded_names()
    if (bare := name.removesuffix(".safetensors")) not in names:
        raise UserError(
            f"embedded:{name}: the package has no such weights, only {', '.join(names)}"
        )
    with resources.as_file(assets.joinpath(f"{bare}.safetensors")) as path:
        weights = _assemble([path], False, f"embedded:{name}", {})
        assert weights.sha256  # while the file is there: it may be out of a zip
        return weights


def _read_folder(
    folder: Path, allow_pickle: bool, origin: str, default: Mapping[str, Any] | None = None
) -> Weights:
    """`default` is the config of a folder that has none."""
    # The config.json of a finished run is the run's own; what is the model's is in the header.
    is_run = (folder / RUN_FILE).is_file()
    if is_run:
        try:
            verify_checksums(folder, only=WEIGHTS_FILE)
        except DamagedFileError as error:
            raise UserError(
                f"{error}: run that run's training command again, which writes it anew from the "
                "last checkpoint, or convert that with `python -m vision_jax.convert "
                f"{folder} --checkpoint=last`"
            ) from error
    config = {} if is_run else dict(default or {}) | _read_config(folder) | _pipeline(folder)
    for whole, index, pickled in WEIGHT_FILES:
        if (folder / whole).is_file():
            return _assemble([folder / whole], allow_pickle, origin, config)
        if (folder / index).is_file():
            return _assemble(_shards(folder / index), allow_pickle, origin, config)
        if (folder / pickled).is_file():
            return _assemble([folder / pickled], allow_pickle, origin, config)
    if (folder / diffusers.PIPELINE_FILE).is_file():
        parts = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
        raise UserError(
            f"{origin}: a pipeline of diffusers, and its models are in folders inside: name one, "
            f"such as {origin}/{next(iter(parts), 'vae')}"
        )
    if is_run:
        raise UserError(
            f"{origin}: this run has not written its model yet: let it end, or write what its last "
            f"checkpoint holds with `python -m vision_jax.convert {folder} --out=DIR`"
        )
    raise UserError(
        f"{origin}: the folder has no {WEIGHTS_FILE}, {INDEX_FILE} or {PICKLE_FILE} (for "
        f"which set {ALLOW_PICKLE}); name the weight file itself if it is called otherwise"
    )


def _pipeline(folder: Path) -> dict[str, Any]:
    """Class names by number, which diffusers keeps of a DiT in the folder around its own."""
    path = folder.parent / diffusers.PIPELINE_FILE
    if not path.is_file() or not (folder / CONFIG_FILE).is_file():
        return {}
    try:
        found = _read_json(path)
    except UserError:  # of somebody else: these weights are whole without it
        return {}
    names = found.get("id2label") if "_class_name" in found else None
    return {"pipeline": names} if isinstance(names, dict) else {}


def _shards(index_file: Path) -> list[Path]:
    folder = index_file.parent
    weight_map = _read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_file}: no weight_map in it; download the file again")
    paths = []
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index_file}: shard {name!r} is no .safetensors file beside")
        if not os.path.isfile(folder / name):  # Path's raises at a name that is too long
            raise UserError(f"{folder / name}: shard is missing; download the model again")
        paths.append(folder / name)
    return paths


def _assemble(
    paths: Sequence[Path],
    allow_pickle: bool,
    origin: str,
    config: dict[str, Any],
    preprocessing: dict[str, Any] | None = None,
) -> Weights:
    tensors = Tensors({})
    header: dict[str, str] = {}
    for path in paths:
        if path.name.endswith(PICKLES):
            if not allow_pickle:
                raise UserError(
                    f"{path} is a pickle, which can run code when it is read: take a .safetensors "
                    f"file, or, if you trust where it came from, set {ALLOW_PICKLE}"
                )
            part = open_pickle(path)
        elif path.suffix == ".npz":
            part = open_npz(path)
        elif path.suffix == ".onnx":
            part = open_onnx(path)
        elif path.suffix == ".json":
            part, shards = open_tfjs(path)
            paths = [*paths, *shards]
        else:
            part, metadata = open_safetensors(path)
            if QUANTIZED_KEY in metadata:
                from vision_jax.convert import quantized  # it needs the tables, which need this

                part, metadata = quantized.multiplied_out(path, part, metadata[QUANTIZED_KEY])
            header.update(metadata)
        if repeated := sorted(set(part) & set(tensors)):
            raise UserError(f"{path}: tensor {repeated[0]} is in another shard too")
        tensors = Tensors({**tensors.entries, **part.entries})
    ours = _header_json(header, paths[0])
    metadata = dict(config, **({"vision_jax": ours} if ours else {}))
    try:
        told = metadata or detectors.metadata_of(paths[0].name)
        preprocessing = preprocessing or read_preprocessing(told)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{origin}: its preprocessing makes no sense ({reason})") from None
    return Weights(tensors, metadata, preprocessing, origin, tuple(paths))


# Published weights -------------------------------------------------------------------------------


def _read_timm(spec: str) -> Weights:
    name = spec.removeprefix("timm://")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{spec}: write timm://NAME or timm://NAME.TAG, as timm.list_pretrained()")
    try:
        import timm
    except ImportError:
        if "." in name:  # where timm publishes them under this very name
            return _read_folder(_download(f"hf://timm/{name}", True), True, spec)
        raise UserError(
            f"{spec}: which of its weights is known to timm only: pip install timm, or add the tag "
            "as in timm://resnet50.a1_in1k"
        ) from None
    try:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # no such architecture or tag
        cfg = None
    if cfg is None or not cfg.has_weights:
        hint = nearest(name, timm.list_pretrained())
        raise UserError(f"{spec}: timm {timm.__version__} has no such weights{hint}")
    # What timm writes into the config.json of its own repositories.
    content = json.loads(json.dumps(cfg.to_dict(remove_source=True), default=str))
    config = {"config": {"architecture": name.partition(".")[0], "pretrained_cfg": content}}
    if cfg.hf_hub_id:
        folder = _download(f"hf://{cfg.hf_hub_id}", True, cfg.hf_hub_filename)
        if cfg.hf_hub_filename:
            return _assemble([folder / cfg.hf_hub_filename], True, spec, config)
        return _read_folder(folder, True, spec, config)
    if not isinstance(cfg.url, str):
        raise UserError(f"{spec}: timm reads these from {cfg.file}: give that path")
    return _assemble([_fetch(cfg.url, spec)], True, spec, config)


def _read_torchvision(spec: str) -> Weights:
    name, _, choice = spec.removeprefix("torchvision://").partition("@")
    try:
        from torchvision import models
    except ImportError:
        raise UserError(f"{spec} needs torchvision: pip install torchvision") from None
    if name not in models.list_models():
        hint = nearest(name, models.list_models())
        raise UserError(f"{spec}: torchvision has no builder of that name{hint}")
    published = models.get_model_weights(name)
    choice = choice.rpartition(".")[2] or "DEFAULT"  # also ResNet50_Weights.IMAGENET1K_V2
    if choice not in published.__members__:
        known = ", ".join(published.__members__) or "none"
        raise UserError(f"{spec}: torchvision's weights of {name} are {known}")
    entry = published[choice]
    config: dict[str, Any] = {"library": "torchvision", "model": name, "kwargs": {}}
    config["weights"] = entry.name
    names = entry.meta.get("categories") or ()
    config["class_names"] = detectors.class_names_of(name, names) or None
    preset = entry.transforms()
    preprocessing = torchvision_preprocessing(preset)
    path = _fetch(entry.url, spec)
    return _assemble([path], True, spec, {"config": config}, preprocessing)


def _fetch(url: str, spec: str) -> Path:
    """The file of an address, in torch's own cache, downloaded first if it is not there."""
    from torch import hub

    name = PurePosixPath(urlparse(url).path).name
    path = Path(hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        digest = re.search(r"-([a-f0-9]{6,})\.", name)  # torch's files carry their hash's start
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{spec}: {url} is not to be had ({reason}); connect once, or put the file into "
                f"{path.parent}"
            ) from None
    return path


def _download(spec: str, allow_pickle: bool, file: str | None = None) -> Path:
    """Folder of a hub repository in the local cache, downloaded first where it can be.

    `file` is one that has a name of its own, and is then the only one.
    """
    match = re.fullmatch(r"hf://(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)(?:@([\w./-]+))?", spec)
    if not match:
        raise UserError(
            f"{spec}: write hf://owner/name, hf://owner/name@revision or hf://owner/name/folder"
        )
    import huggingface_hub
    from huggingface_hub import errors

    repository, inside, revision = match.groups()
    inside = inside.removeprefix("/")
    patterns = [CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE, diffusers.PIPELINE_FILE]
    for whole, index, pickled in WEIGHT_FILES:
        shards = whole.replace(".safetensors", "-*.safetensors")
        patterns += [whole, index, shards, *([pickled] if allow_pickle else [])]
    if file is not None:
        patterns = [file]
    if inside:
        patterns = [f"{inside}/{pattern}" for pattern in patterns] + [diffusers.PIPELINE_FILE]
    fetch = partial(
        huggingface_hub.snapshot_download, repository, revision=revision, allow_patterns=patterns
    )
    refused = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    reason = "this machine is offline"
    try:  # itself falls back on the cache when the hub can't be reached
        return Path(fetch()) / inside
    except refused as error:
        raise UserError(
            f"{spec}: the hub has no such model or revision, or it is private ("
            f"{type(error).__name__}); check the name, or `hf auth login` first"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        return Path(fetch(local_files_only=True)) / inside
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
    usual = {name for names in WEIGHT_FILES for name in names}
    if beside is not None and beside.name not in usual:
        return {}
    found: dict[str, Any] = {}
    for key, name in (("config", CONFIG_FILE), ("preprocessor", PREPROCESSOR_FILE)):
        if (folder / name).is_file():
            found[key] = _read_json(folder / name)
    if (folder / PROCESSOR_FILE).is_file():  # of models of several inputs, such as CLIP
        inner = _read_json(folder / PROCESSOR_FILE).get("image_processor")
        if isinstance(inner, dict):
            found |= {"preprocessor": inner, "preprocessor_file": PROCESSOR_FILE}
    return found


def _read_json(path: Path) -> dict[str, Any]:
    return _object(read_json(path), str(path))


def _header_json(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    what = f"{path}: the header's vision_jax entry"
    return _object(parse_json(text, what), what) if (text := header.get("vision_jax")) else {}


def _object(content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{what} is a {type(content).__name__} and not an object")
    return content


def read_preprocessing(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Preprocessing from our header, timm's pretrained_cfg or transformers' preprocessor config.

    Raises:
      UserError: a field that is there and makes no sense.
    """
    config, preprocessor = metadata.get("config", {}), metadata.get("preprocessor")
    cfg = timm_cfg(config)
    channels = 3
    found: dict[str, Any]
    if isinstance(metadata.get("vision_jax", {}).get("preprocessing"), dict):
        found = metadata["vision_jax"]["preprocessing"]
        channels = len(found["mean"]) if isinstance(found.get("mean"), list) else 3
    elif cfg is not None:
        found, channels = _from_timm(config, cfg)
    elif isinstance(preprocessor, dict) and config.get("library") == "torchvision":
        found = _from_torchvision(preprocessor)
    elif detectors.is_detector(config.get("model")):
        found = detectors.preprocessing_of(config)
    elif isinstance(preprocessor, dict):
        found = read_processor(preprocessor, config, metadata.get("preprocessor_file"))
        channels = len(found["mean"])
    else:
        return None
    read: dict[str, Any] = {
        "mean": _numbers(found.get("mean"), channels, "mean"),
        "std": _numbers(found.get("std"), channels, "std"),
        "image_size": _numbers(found.get("image_size"), 2, "image_size", int),
        "crop_pct": None if found.get("crop_pct") is None else float(found["crop_pct"]),
        "crop_mode": found.get("crop_mode"),
        "crop_rule": found.get("crop_rule") or "torchvision",
        "interpolation": found.get("interpolation"),
    }
    known = {name: value for name, value in read.items() if value is not None}
    if isinstance(known.get("interpolation"), str):
        known["interpolation"] = known["interpolation"].removesuffix(ALIASED)
    Preprocessing(**{**STANDARD, **known})  # raises where a value makes no sense
    if found.get("view"):  # a segmenter's
        read["view"] = str(found["view"])
    edges = {name: int(found[name]) for name in ("short", "longest") if found.get(name)}
    if not edges:
        return read
    rule = {"rule": found["rule"]} if found.get("rule") else {}
    return read | edges | {"square": bool(found.get("square")), **rule}


def timm_cfg(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """timm's pretrained_cfg in config.json, which before timm 0.8 was the whole of it; else None.

    Names of classes stand inside or beside it. Source: timm 1.0.31, models/_hub.py
    `_parse_model_cfg`.
    """
    cfg = config.get("pretrained_cfg")
    if isinstance(cfg, dict):
        return cfg | ({"label_names": config["label_names"]} if "label_names" in config else {})
    told = {"mean", "std", "input_size", "crop_pct", "interpolation"} & set(config)
    if not told or "model_type" in config or not isinstance(config.get("architecture"), str):
        return None
    return {**config, **({"label_names": config["labels"]} if "labels" in config else {})}


def _from_timm(config: Mapping[str, Any], cfg: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """(fields as timm resolves them for evaluation, channels); what is left out is timm's default.

    Source: timm 1.0.31, data/config.py `resolve_data_config`.
    """
    size, given = cfg.get("input_size"), config.get("model_args")
    given = given if isinstance(given, dict) else {}
    channels = size[0] if isinstance(size, list) and len(size) == 3 else 3
    sides: Sequence[int] | None = size[-2:] if isinstance(size, list) else None
    if isinstance(given.get("in_chans"), int):
        channels = given["in_chans"]
    if not (isinstance(channels, int) and 0 < channels <= MAX_CHANNELS):
        raise UserError(f"config.json: images of {shown(channels)} channels")
    if given.get("img_size") is not None and cfg.get("fixed_input_size"):
        sides = pair(given["img_size"], "img_size")
    found = {
        "mean": cfg.get("mean") or IMAGENET_MEAN,
        "std": cfg.get("std") or IMAGENET_STD,
        "image_size": sides,
        "crop_pct": cfg.get("crop_pct") or 0.875,
        "crop_mode": cfg.get("crop_mode") or "center",
        "interpolation": cfg.get("interpolation") or "bicubic",
    }
    return found, channels


_AS_IT_IS = {"view": "original"}


def _from_torchvision(config: Mapping[str, Any]) -> dict[str, Any]:
    """What package.py writes: the arguments of torchvision's presets."""
    kept = {name: config.get(name) for name in ("mean", "std", "interpolation")}
    if "crop_size" not in config:  # SemanticSegmentation
        short = config["resize_size"]
        return {**kept, **({"view": "short", "image_size": (short,) * 2} if short else _AS_IT_IS)}
    crop, resized = config["crop_size"], config["resize_size"]
    share = crop_share(crop, resized)
    return {**kept, "image_size": (crop, crop), "crop_pct": share, "crop_mode": "center"}


def torchvision_preprocessing(preset: Any) -> dict[str, Any] | None:
    """Preprocessing of torchvision's presets of whole images and of pixels; None of others."""
    if not hasattr(preset, "resize_size"):  # of detectors, which resize by themselves
        return None
    (resized,) = preset.resize_size
    kept = {
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
    }
    if not hasattr(preset, "crop_size"):
        return {**kept, "view": "short", "image_size": (resized, resized)}
    (crop,) = preset.crop_size
    share = crop_share(crop, resized)
    return {**kept, "image_size": (crop, crop), "crop_pct": share, "crop_mode": "center"}


def _numbers(values: Any, count: int, name: str, kind: type = float) -> tuple[Any, ...] | None:
    """So many numbers; of a mean one is all channels', and three are adapted to the model's."""
    if values is None:
        return None
    try:
        numbers = tuple(kind(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if kind is float and len(numbers) == 1:
        numbers *= count
    if len(numbers) != count and not (kind is float and len(numbers) == 3):
        raise UserError(
            f"the weights' preprocessing: {name} {shown(values)} is not {count} numbers"
        )
    return numbers
