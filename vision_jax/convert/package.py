"""The way back: a folder that timm, torchvision or transformers load, strictly, by themselves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vision_jax.convert import diffusers
from vision_jax.convert.engine import Rule
from vision_jax.convert.files import Tensors, held, write_safetensors, write_shards
from vision_jax.convert.load import export_weights
from vision_jax.convert.npz import write_npz
from vision_jax.convert.processors import PREPROCESSOR_FILE, processor_config
from vision_jax.convert.read import CONFIG_FILE, WEIGHTS_FILE
from vision_jax.convert.table import Arguments, Table
from vision_jax.convert.tables import shapes_of, table_for_export
from vision_jax.data.transforms import complete_crop
from vision_jax.errors import UserError
from vision_jax.files import draft_folder, read_json

NPZ_FILE = "model.npz"
CROP_RULE_OF = {"timm": "torchvision", "torchvision": "torchvision", "transformers": "transformers"}


def write_package(
    folder: Path,
    params: Mapping[str, Any],
    family: str,
    arguments: Arguments,
    *,
    to: str,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
) -> list[Path]:
    """Writes weights, config and preprocessing as the library `to` saves them; returns the files.

    timm loads the folder with `timm.create_model("local-dir:FOLDER", pretrained=True)` and
    transformers with `AutoModelForImageClassification.from_pretrained(FOLDER)`, or ObjectDetection;
    for torchvision config.json names the builder and its arguments, and for the original DETR the
    options of its main.py, for YOLOX the arguments of pixeltable-yolox's YoloxConfig, for NanoDet
    what differs of the original's config nanodet-g; their
    `load_state_dict` takes the file's tensors. `smp.from_pretrained(FOLDER)` loads a U-Net of
    segmentation_models_pytorch, whose config.json is written where smp names the encoder, and
    `AutoencoderKL.from_pretrained(FOLDER)` and its like what is diffusers'.

    Args:
      folder: made if it is not there.
      params: plain arrays by path, BatchNorm statistics among them (adapters merged). `Tensors`
        are read and written one at a time.
      family: of the model.
      arguments: all of the model's.
      to: "timm", "torchvision", "transformers", "npz", "detr", "yolox", "nanodet", "smp", "dit" or
        "diffusers".
      class_names: by label.
      preprocessing: image_size (height, width), mean, std, crop_pct, crop_mode, interpolation; or
        a detector's short, longest, mean, std, interpolation.
      shard_bytes: of larger models each file holds at most so many; transformers alone reads such.

    Raises:
      UserError: the library has no such model or preprocessing, or the folder cannot be written.
    """
    table = table_for_export(to, family, arguments)
    if to == "torchvision" and arguments["in_channels"] != 3:
        raise UserError("torchvision's builders take images of 3 channels: use --to=timm")
    tensors, header = export_weights(
        params,
        family,
        arguments,
        to=to,
        class_names=class_names,
        preprocessing=preprocessing,
    )
    files: dict[str, dict[str, Any]] = {}
    if to == "timm":
        files[CONFIG_FILE] = _timm_config(table, arguments, class_names, preprocessing)
    elif to == "torchvision":
        config = files[CONFIG_FILE] = _torchvision_config(table, arguments, class_names)
        if preprocessing and "short" in preprocessing:  # a detector resizes by itself
            config["kwargs"] |= {
                "min_size": preprocessing["short"],
                "max_size": preprocessing["longest"],
                "image_mean": list(preprocessing["mean"]),
                "image_std": list(preprocessing["std"]),
            }
        elif preprocessing:
            files[PREPROCESSOR_FILE] = _torchvision_transform(preprocessing)
    elif to == "smp" and (config := table.config(arguments)):
        files[CONFIG_FILE] = config  # which takes no class names
    elif to == diffusers.SOURCE:
        files[CONFIG_FILE] = dict(table.config(arguments))
    elif to in ("detr", "yolox", "nanodet", "dit", "fid"):
        files[CONFIG_FILE] = _own_config(table, arguments, class_names)
    elif to == "transformers":
        files[CONFIG_FILE] = _transformers_config(table, arguments, class_names)
        if preprocessing:
            files[PREPROCESSOR_FILE] = processor_config(preprocessing)
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    size = sum(math.prod(shape) for shape in shapes_of(tensors).values()) * 4  # nearly all float32
    in_shards = bool(shard_bytes and size > shard_bytes)
    if in_shards and to != "transformers":
        raise UserError(f"{to} reads one file: shards are for --to=transformers")
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:  # all files are there, or none
        with draft_folder(folder / "files") as made:
            if to == "npz":
                write_npz(made / NPZ_FILE, tensors)
            elif in_shards:
                if not isinstance(tensors, Tensors):
                    tensors = Tensors({name: held(array) for name, array in tensors.items()})
                write_shards(made, tensors, header, shard_bytes or 0)
            else:
                name = diffusers.WEIGHTS_FILE if to == diffusers.SOURCE else WEIGHTS_FILE
                write_safetensors(made / name, tensors, header)
            for name, text in texts.items():
                (made / name).write_text(text)
            written = sorted(made.iterdir(), key=lambda path: (path.name in texts, path.name))
            return [path.replace(folder / path.name) for path in written]
    except BaseException:
        if new:
            folder.rmdir()
        raise


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a written folder."""
    return read_json(folder / CONFIG_FILE)


def _timm_config(
    table: Table,
    arguments: Arguments,
    class_names: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
) -> dict[str, Any]:
    config = dict(table.config(arguments))
    given = dict(config.get("model_args", {}))
    if arguments["in_channels"] != 3:
        given["in_chans"] = arguments["in_channels"]
    names = {
        path: rule.names[0].removesuffix(".weight")
        for rule in table.rules(arguments)
        if isinstance(rule, Rule)
        for path in rule.paths
    }
    pretrained: dict[str, Any] = {
        "num_classes": arguments["num_classes"],
        "first_conv": names.get(_stem(table, arguments)),
        "classifier": names.get("head/kernel"),
        "fixed_input_size": "image_size" in arguments,
        "mean": list(arguments["mean"]),
        "std": list(arguments["std"]),
        "custom_load": False,
    }
    size = preprocessing["image_size"] if preprocessing else arguments.get("image_size")
    if size:
        pretrained["input_size"] = [arguments["in_channels"], *size]
    if preprocessing:
        pretrained |= {
            "crop_pct": preprocessing["crop_pct"],
            "crop_mode": preprocessing["crop_mode"],
            "interpolation": preprocessing["interpolation"],
        }
    config |= {"num_classes": arguments["num_classes"], "model_args": given}
    if class_names:
        config["label_names"] = list(class_names)
    return config | {"pretrained_cfg": pretrained}


def _stem(table: Table, arguments: Arguments) -> str:
    from vision_jax.models.families import build_model

    return build_model(table.family, **arguments).stem


def _torchvision_config(
    table: Table, arguments: Arguments, class_names: Sequence[str] | None
) -> dict[str, Any]:
    config = dict(table.config(arguments))
    kwargs = {"num_classes": arguments["num_classes"], **config.get("kwargs", {})}
    names = {"class_names": list(class_names)} if class_names else {}
    return {"library": "torchvision", **config, "kwargs": kwargs, **names}


def _own_config(
    table: Table, arguments: Arguments, class_names: Sequence[str] | None
) -> dict[str, Any]:
    names = {"class_names": list(class_names)} if class_names else {}
    return {"library": table.source, **table.config(arguments), **names}


def _torchvision_transform(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of torchvision.transforms._presets' ImageClassification or SemanticSegmentation."""
    height, width = preprocessing["image_size"]
    if "view" in preprocessing:
        if preprocessing["view"] in ("squash", "pad", "windows"):
            raise UserError("torchvision's transform keeps the aspect ratio: use data.view=short")
        short = min(height, width) if preprocessing["view"] == "short" else None
        kept = ("mean", "std", "interpolation")
        return {"resize_size": short, **{name: preprocessing[name] for name in kept}}
    if height != width or preprocessing["crop_mode"] != "center":
        raise UserError("torchvision's transform crops squares from the center: use --to=timm")
    return {
        "crop_size": height,
        "resize_size": math.floor(height / preprocessing["crop_pct"]),
        "mean": list(preprocessing["mean"]),
        "std": list(preprocessing["std"]),
        "interpolation": preprocessing["interpolation"],
    }


def _transformers_config(
    table: Table, arguments: Arguments, class_names: Sequence[str] | None
) -> dict[str, Any]:
    config = dict(table.config(arguments))
    config |= {"num_channels": arguments["in_channels"], "dtype": "float32"}
    if count := arguments["num_classes"]:
        names = list(class_names) if class_names else [f"LABEL_{i}" for i in range(count)]
        config["id2label"] = {str(index): name for index, name in enumerate(names)}
        config["label2id"] = {name: index for index, name in enumerate(names)}
    return config


def crop_note(preprocessing: Mapping[str, Any] | None, to: str) -> str:
    """What to tell a person where `to` finds another center than the weights' own library did."""
    if not preprocessing or to not in CROP_RULE_OF or {"short", "view"} & set(preprocessing):
        return ""
    whole = preprocessing["crop_mode"] == "squash" and preprocessing["crop_pct"] == 1
    if whole or preprocessing["crop_rule"] == CROP_RULE_OF[to]:
        return ""
    return (
        f"note: {to} rounds the center of a crop otherwise than {preprocessing['crop_rule']} does: "
        "of an odd number of pixels left over its views can lie one pixel beside"
    )


def merging_note(arguments: Arguments, to: str) -> str:
    """What to tell a person where `to` computes with all tokens, and the model merges some."""
    merge = arguments.get("merge", 0)
    if not merge:
        return ""
    return (
        f"note: {to} merges no tokens: there the weights compute with all of them, and here "
        f"{merge:g} {'of' if merge < 1 else 'patches'} merge in each block"
    )


def preprocessing_of(arguments: Arguments, own: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Complete preprocessing of imported weights: what they say, and timm's defaults elsewhere."""
    own = own or {}
    if "short" in own:
        return {
            "short": own["short"],
            "longest": own["longest"],
            "square": bool(own.get("square")),
            "interpolation": own["interpolation"] or "bilinear",
            "mean": tuple(arguments["mean"]),
            "std": tuple(arguments["std"]),
            "rule": own.get("rule") or "detr",
        }
    size = own.get("image_size") or arguments.get("image_size")
    if size is None:
        return None
    if own.get("view"):
        return {
            "image_size": tuple(size),
            "mean": tuple(arguments["mean"]),
            "std": tuple(arguments["std"]),
            "interpolation": own.get("interpolation") or "bilinear",
            "view": own["view"],
        }
    return {
        "image_size": tuple(size),
        "mean": tuple(arguments["mean"]),
        "std": tuple(arguments["std"]),
        "interpolation": own.get("interpolation") or "bicubic",
        **complete_crop(own, size),
    }
