"""The arguments of `Swin`, from shapes and what these don't say from config.json."""

import math
from collections.abc import Mapping
from typing import Any

from vision_jax.convert.engine import tree_shapes
from vision_jax.convert.swin.config import ACTIVATIONS
from vision_jax.convert.swin.names import Names, Sides, rules_of, windows_of
from vision_jax.convert.table import (
    Arguments,
    Metadata,
    Shapes,
    count_blocks,
    fill_prefix,
    head_channels,
    pair,
    timm_arguments,
)
from vision_jax.errors import UserError
from vision_jax.models.swin import VARIANTS

_TIMM_SEEN = (  # read, or in the tensors' shapes and names
    *("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias"),
    *("act_layer", "pretrained_window_sizes", "head_dim"),
)


def infer_arguments(
    names: Names, library: str, shapes: Shapes, metadata: Metadata
) -> dict[str, Any]:
    """Arguments of `Swin`: from shapes, and what these don't say from config.json."""
    block = names.block.replace("{p}", "").replace(".", r"\.")
    number = dict.fromkeys(("s", "b", "blocks"), r"(\d+)")
    depths = count_blocks(shapes, rf"{block.format(**number)}\.{names.norms[0]}\.weight")
    version = 2 if any(name.endswith("logit_scale") for name in shapes) else 1
    sketch: dict[str, Any] = {
        "image_size": (1, 1),
        "patch_size": 1,
        "windows": ((1, 1),) * len(depths),
        "library": library,
        "version": version,
        "depths": depths,
        "pretrained_windows": (),
    }
    ours = tree_shapes(shapes, fill_prefix(rules_of(names, library, sketch), ""))
    config, stages = metadata.get("config", {}), len(depths)
    said: dict[str, Any] = {}
    if library == "transformers":
        said = _from_transformers_config(config, stages)
    elif library == "timm":
        said = _from_timm_config(config, stages)

    tall, wide, channels, width = _shape(ours, "patch_embed/kernel", 4)
    if tall != wide or not tall:
        raise UserError(f"patches of {tall} x {wide} pixels: only squares are known")
    counted = "relative_position_bias_table" if version == 1 else "logit_scale"
    counts = [_shape(ours, f"stage_{s}/block_0/attn/{counted}", 2) for s in range(stages)]
    hidden = _shape(ours, f"stage_{stages - 1}/block_0/mlp/fc2/kernel", 2)
    found: dict[str, Any] = {
        "num_classes": ours["head/kernel"][1] if "head/kernel" in ours else 0,
        "in_channels": channels,
        "depths": depths,
        "num_heads": tuple(shape[1] if version == 1 else shape[0] for shape in counts),
        "width": width,
        "version": version,
        "library": library,
        "patch_size": tall,
        "mlp_ratio": _ratio(*hidden),
        "qkv_bias": "stage_0/block_0/attn/qkv" + ("/bias" if version == 1 else "_bias") in ours,
        "pretrained_windows": said.get("pretrained_windows", ()),
    }
    found |= {name: said[name] for name in ("activation", "layer_norm_eps") if name in said}
    found |= _pruned_heads(ours, width, found["num_heads"])
    sides = [_window(names, shapes, s) for s in range(stages)]
    image_size, windows = _sizes(said, sides, found)
    return {**found, "image_size": image_size, "windows": windows}


def _pruned_heads(ours: Shapes, width: int, num_heads: tuple[int, ...]) -> dict[str, int]:
    """`head_size` where a stage has fewer heads than share its width."""
    inner = [
        _shape(ours, f"stage_{s}/block_0/attn/qkv/kernel", 2)[1] // 3 for s in range(len(num_heads))
    ]
    if inner == [width * 2**stage for stage in range(len(inner))]:
        return {}
    sizes = [head_channels(*one) for one in zip(inner, num_heads, strict=True)]
    if len(set(sizes)) > 1:
        raise UserError(f"heads of {sizes} channels by stage: a Swin here has one size in all")
    return {"head_size": sizes[0]}


def _shape(shapes: Shapes, path: str, ndim: int) -> tuple[int, ...]:
    if len(shapes.get(path, ())) < ndim:
        raise UserError(f"the weights have nothing for {path}: not a Swin, or damaged")
    return shapes[path]


def _ratio(hidden: int, width: int) -> float:
    """A ratio that gives `hidden` when its product with the width is rounded down."""
    ratio = hidden / max(width, 1)
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _window(names: Names, shapes: Shapes, stage: int) -> Sides | None:
    """A stage's window as far as tensors say it: any from v2's offsets, a square one of v1's."""
    block = names.at(names.block, stage).replace("{p}", "")
    offsets = shapes.get(f"{block}.{names.attention}.relative_coords_table", ())
    if len(offsets) == 4:
        return (offsets[1] + 1) // 2, (offsets[2] + 1) // 2
    rows = shapes.get(f"{block}.{names.table}", (0,))[0]
    side = math.isqrt(rows)
    return ((side + 1) // 2,) * 2 if rows and side * side == rows and side % 2 else None


def _sizes(
    said: Mapping[str, Any], sides: list[Sides | None], found: Arguments
) -> tuple[Sides, tuple[Sides, ...]]:
    """(image size, windows): the config's if the tensors agree, else what they say."""
    stages, last = len(sides), sides[-1]
    windows = said.get("windows")
    if windows is None and None not in sides:
        known: Any = tuple(sides)
        # transformers and torchvision have one window, which only v2 of the former clips.
        windows = known if found["library"] == "timm" else (max(known),) * stages
    if windows is None:
        raise UserError(
            "the tensors don't say how large the windows are: config.json beside the weights must, "
            "by timm's architecture (swinv2_tiny_window8_256) or transformers' window_size"
        )
    stride = found["patch_size"] * 2 ** (stages - 1)
    natural = tuple(side * stride for side in last or windows[-1])
    image_size = said.get("image_size", natural)

    def agree(image_size: Any, windows: Any) -> bool:
        plan = windows_of({**found, "image_size": image_size, "windows": windows})
        return all(side in (None, w.size) for side, w in zip(sides, plan, strict=True))

    if None in sides or agree(image_size, windows):
        return image_size, windows
    return (natural[0], natural[1]), tuple(side for side in sides if side)


def _from_timm_config(config: Mapping[str, Any], stages: int) -> dict[str, Any]:
    name, given = timm_arguments({"config": config}, _TIMM_SEEN, {"global_pool": "avg"})
    named = VARIANTS.get(name, {})
    taken = ("image_size", "windows", "pretrained_windows")
    said: dict[str, Any] = {key: named[key] for key in taken if key in named}
    cfg = config.get("pretrained_cfg")
    if isinstance(cfg, dict) and isinstance(cfg.get("input_size"), list):
        said["image_size"] = pair(cfg["input_size"][-2:], "input_size")
    if "img_size" in given:
        said["image_size"] = pair(given["img_size"], "img_size")
    if "pretrained_window_sizes" in given:
        said["pretrained_windows"] = _pretrained_windows(given["pretrained_window_sizes"])
    if "act_layer" in given:
        said["activation"] = _activation(given["act_layer"], {name: name for name in ACTIVATIONS})
    if "window_size" in given:
        said["windows"] = _stage_windows(given["window_size"], stages)
    elif len(set(said.get("windows", ()))) == 1:  # one for all stages, however many
        said["windows"] = said["windows"][:1] * stages
    if "windows" in said and len(said["windows"]) != stages:
        raise UserError(f"config.json: {len(said['windows'])} windows for {stages} stages")
    return said


def _from_transformers_config(config: Mapping[str, Any], stages: int) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if "image_size" in config:
        said["image_size"] = pair(config["image_size"], "image_size")
    if "window_size" in config:
        said["windows"] = _stage_windows(config["window_size"], stages)
    if "pretrained_window_sizes" in config:
        said["pretrained_windows"] = _pretrained_windows(config["pretrained_window_sizes"])
    if "layer_norm_eps" in config:
        said["layer_norm_eps"] = float(config["layer_norm_eps"])
    if "hidden_act" in config:
        ours = {theirs: name for name, theirs in ACTIVATIONS.items()}
        said["activation"] = _activation(config["hidden_act"], {**ours, "swish": "silu"})
    return said


def _activation(name: Any, known: Mapping[str, str]) -> str:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"config.json: activation {name!r} is none of {', '.join(known)}")
    return known[name]


def _stage_windows(given: Any, stages: int) -> tuple[Sides, ...]:
    """Each stage's window from one size, one (rows, columns), or one of either for each stage."""
    staged = isinstance(given, list | tuple) and not (len(given) == 2 and isinstance(given[0], int))
    return tuple(pair(side, "window_size") for side in (given if staged else [given] * stages))


def _pretrained_windows(given: Any) -> tuple[int, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(side, int) for side in given):
        raise UserError(f"config.json: pretrained_window_sizes {given!r} are not square windows")
    return tuple(given) if any(given) else ()
