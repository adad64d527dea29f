"""Tables for Swin Transformers: timm, Microsoft's own files, torchvision, and transformers.

Sources: timm 1.0 swin_transformer.py and swin_transformer_v2.py; torchvision 0.29
models/swin_transformer.py; transformers 5.23 models/swin and models/swinv2 (v1 has other names in
memory than in its files); https://github.com/microsoft/Swin-Transformer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.engine import (
    CONV,
    COPY,
    LINEAR,
    Fixed,
    Layout,
    Rule,
    Rules,
    affine,
    fused,
    norm,
    one,
    tree_shapes,
)
from vision_jax.convert.fields import Fields
from vision_jax.convert.table import (
    Arguments,
    Entry,
    Metadata,
    Shapes,
    Table,
    count_blocks,
    fill_prefix,
    pair,
    timm_arguments,
)
from vision_jax.errors import UserError
from vision_jax.models.swin import (
    EPSILON,
    VARIANTS,
    Swin,
    Windows,
    plan_windows,
    position_index,
    position_offsets,
)
from vision_jax.ops.position_embedding import resample_relative_positions

Sides = tuple[int, int]


@dataclass(frozen=True)
class Names:
    """What one kind of file calls the modules.

    `block` and `merging` (through which a stage is entered) are formatted with the stage s, the
    stage before it, the block b, and torchvision's running numbers of both.
    """

    block: str
    merging: str
    patches: str = "patch_embed.proj"
    patch_norm: str = "patch_embed.norm"
    norms: tuple[str, str] = ("norm1", "norm2")
    attention: str = "attn"
    qkv: tuple[str, ...] = ("attn.qkv",)
    proj: str = "attn.proj"
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    table: str = "attn.relative_position_bias_table"
    cpb_mlp: str = "attn.cpb_mlp"
    norm: str = "norm"
    head: str = "head"

    def at(self, template: str, s: int, b: int = 0) -> str:
        """A name in stage s; `{p}` stays."""
        return template.format(p="{p}", s=s, b=b, before=s - 1, merge=2 * s, blocks=2 * s + 1)


_TIMM = Names("layers.{s}.blocks.{b}", "layers.{s}.downsample", head="head.fc")
_ORIGINAL = Names("layers.{s}.blocks.{b}", "layers.{before}.downsample")
_TORCHVISION = Names(
    "features.{blocks}.{b}",
    "features.{merge}",
    patches="features.0.0",
    patch_norm="features.0.2",
    mlp=("mlp.0", "mlp.3"),
)
_TRANSFORMERS = Names(
    "{p}encoder.layers.{s}.blocks.{b}",
    "{p}encoder.layers.{before}.downsample",
    patches="{p}embeddings.patch_embeddings.projection",
    patch_norm="{p}embeddings.norm",
    norms=("layernorm_before", "layernorm_after"),
    attention="attention.self",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    proj="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    table="attention.self.relative_position_bias_table",
    cpb_mlp="attention.self.continuous_position_bias_mlp",
    norm="{p}layernorm",
    head="classifier",
)
_IN_MEMORY = replace(  # what torch.save(model.state_dict()) writes of transformers' v1
    _TRANSFORMERS,
    attention="attention.relative_position_bias",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    table="attention.relative_position_bias.relative_position_bias_table",
)

# transformers' names of activations by ours; timm's are ours.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
    "relu6": "relu6",
}
_TIMM_SEEN = (  # read, or in the tensors' shapes and names
    *("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias"),
    *("act_layer", "pretrained_window_sizes"),
)
_BUILDERS = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_s": "swinv2_small_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
}
_STRUCTURE = (
    "depths",
    "num_heads",
    "windows",
    "width",
    "version",
    "pretrained_windows",
    "patch_size",
    "mlp_ratio",
    "qkv_bias",
    "activation",
)
_DEFAULTS = {name: getattr(Swin, name) for name in _STRUCTURE if hasattr(Swin, name)}

_FIELDS = Fields(
    types=("swin", "swinv2"),
    used="pretrained_window_sizes layer_norm_eps hidden_act",
    seen="image_size patch_size num_channels embed_dim depths num_heads window_size mlp_ratio "
    "qkv_bias",
    free="hidden_dropout_prob attention_probs_dropout_prob drop_path_rate initializer_range "
    "encoder_stride num_layers hidden_size stage_names out_features out_indices path_norm",
    only={"use_absolute_embeddings": (False,)},
)

# q's and v's bias beside each other in one of ours, whose middle third is nobody's: [D] x 2, [3·D].
_Q_V = Layout(
    lambda xs: [np.concatenate([xs[0], np.zeros_like(xs[0]), xs[1]])],
    lambda xs: np.split(xs[0], 3)[::2],
)


def _rules(names: Names, library: str, arguments: Arguments) -> Rules:
    stages = _plan(arguments)
    rules: list[Rule | Fixed] = [
        *affine(names.patches, "patch_embed", CONV),
        *norm(names.patch_norm, "patch_norm"),
    ]
    for s, depth in enumerate(arguments["depths"]):
        if s:
            name, path = names.at(names.merging, s), f"stage_{s}/downsample"
            rules += one(f"{name}.reduction.weight", f"{path}/reduction/kernel", LINEAR)
            rules += norm(f"{name}.norm", f"{path}/norm")
        for b in range(depth):
            name, path = names.at(names.block, s, b) + ".", f"stage_{s}/block_{b}"
            rules += norm(name + names.norms[0], f"{path}/norm1")
            rules += norm(name + names.norms[1], f"{path}/norm2")
            rules += affine(name + names.proj, f"{path}/attn/proj")
            for index in (0, 1):
                rules += affine(name + names.mlp[index], f"{path}/mlp/fc{index + 1}")
            if arguments["version"] == 1:
                rules += _attention_v1(names, name, f"{path}/attn")
            else:
                rules += _attention_v2(names, name, f"{path}/attn", library)
            prefix = f"{name}{names.attention}."
            rules += _fixed(prefix, stages[s].size, arguments, s, library == "torchvision")
    return [*rules, *norm(names.norm, "norm"), *affine(names.head, "head")]


def _attention_v1(names: Names, name: str, path: str) -> tuple[Rule, ...]:
    parts = [name + part for part in names.qkv]
    qkv = fused(parts, f"{path}/qkv") if len(parts) == 3 else affine(parts[0], f"{path}/qkv")
    return (*qkv, *one(name + names.table, f"{path}/relative_position_bias_table"))


def _attention_v2(names: Names, name: str, path: str, library: str) -> tuple[Rule, ...]:
    parts = [name + part for part in names.qkv]
    cpb = name + names.cpb_mlp
    if len(parts) == 3:
        kernel, biases = fused(parts, f"{path}/qkv")[0], (f"{parts[0]}.bias", f"{parts[2]}.bias")
    else:
        (kernel,) = one(f"{parts[0]}.weight", f"{path}/qkv/kernel", LINEAR)
        biases = (f"{name}attn.q_bias", f"{name}attn.v_bias")
    whole = library == "torchvision"  # it has a bias for the key too, and takes none of it
    bias = (f"{parts[0]}.bias",) if whole else biases
    return (
        kernel,
        Rule(bias, (f"{path}/qkv_bias",), COPY if whole else _Q_V),
        *one(f"{name}{names.attention}.logit_scale", f"{path}/logit_scale"),
        *affine(f"{cpb}.0", f"{path}/cpb_mlp/hidden"),
        *one(f"{cpb}.2.weight", f"{path}/cpb_mlp/heads/kernel", LINEAR),
    )


def _fixed(
    prefix: str, window: Sides, arguments: Arguments, stage: int, torchvision: bool
) -> list[Fixed]:
    """Indices and offsets: torchvision's files have them, of the others' only older ones."""

    def index() -> np.ndarray:
        found = position_index(window)
        return found.reshape(-1) if torchvision else found

    def offsets() -> np.ndarray:
        given = arguments["pretrained_windows"]
        return position_offsets(window, given[stage] if given else 0)[None]

    fixed = [Fixed(f"{prefix}relative_position_index", index, written=torchvision)]
    if arguments["version"] == 2:
        name = f"{prefix}relative_coords_table"
        fixed.append(Fixed(name, offsets, exact=False, written=torchvision))
    return fixed


def _plan(arguments: Arguments, library: str | None = None) -> tuple[Windows, ...]:
    """The windows of such a model, by another library's rules if one is named."""
    return plan_windows(
        arguments["image_size"],
        arguments["patch_size"],
        arguments["windows"],
        library or arguments["library"],
        arguments["version"],
    )


def _arguments(names: Names, library: str, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
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
    ours = tree_shapes(shapes, fill_prefix(_rules(names, library, sketch), ""))
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
    sides = [_window(names, shapes, s) for s in range(stages)]
    image_size, windows = _sizes(said, sides, found)
    return {**found, "image_size": image_size, "windows": windows}


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
        plan = _plan({**found, "image_size": image_size, "windows": windows})
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
        said["activation"] = _activation(given["act_layer"], {name: name for name in _ACTIVATIONS})
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
        ours = {theirs: name for name, theirs in _ACTIVATIONS.items()}
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


def adapt(path: str, array: np.ndarray, own: Arguments, wanted: Arguments) -> np.ndarray:
    """v1's tables of relative position biases for other windows, resampled as timm does."""
    stage, _, rest = path.removeprefix("stage_").partition("/")
    if not rest.endswith("relative_position_bias_table"):
        return array
    old, new = (_plan(arguments)[int(stage)].size for arguments in (own, wanted))
    if array.ndim != 2 or len(array) != (2 * old[0] - 1) * (2 * old[1] - 1):
        return array  # the import reports its shape
    return resample_relative_positions(array, old, new)


def _same_windows(arguments: Arguments, library: str) -> bool:
    """Whether such a model has the same windows by another library's rules."""
    if library == arguments["library"]:
        return True
    try:
        plan, theirs = _plan(arguments), _plan(arguments, library)
    except UserError:  # windows that are not square
        return False
    # What timm shifts before it pads comes out otherwise than what is shifted after padding.
    padded = any(
        any(side % most for side, most in zip(w.grid, w.size, strict=True)) and any(w.shift)
        for w in plan
    )
    return plan == theirs and not (padded and "timm" in (library, arguments["library"]))


def _holds(library: str, arguments: Arguments) -> bool:
    a = arguments
    if not _same_windows(a, library):
        return False
    if library == "transformers":
        return len(set(a["windows"])) == 1 and a["windows"][0][0] == a["windows"][0][1]
    plain = a["layer_norm_eps"] == EPSILON
    if library == "timm":
        return plain and (a["version"] == 2 or a["activation"] == "gelu")
    fixed = a["activation"] == "gelu" and a["qkv_bias"] and not a["pretrained_windows"]
    return plain and fixed and len(set(a["windows"])) == 1


def _named(arguments: Arguments) -> str | None:
    """timm's first architecture that this is, at whatever image size."""
    structure = {name: arguments[name] for name in _STRUCTURE}
    for name, known in VARIANTS.items():
        known = {**_DEFAULTS, **known}
        if all(known[key] == value for key, value in structure.items()):
            return name
    return None


def _timm_config(arguments: Arguments) -> dict[str, Any]:
    a = arguments
    name = _named(a)
    if name is not None:
        own = VARIANTS[name]["image_size"] == a["image_size"]
        size = {} if own else {"img_size": list(a["image_size"])}
        return {"architecture": name, "model_args": size}
    given = {
        "img_size": list(a["image_size"]),
        "patch_size": a["patch_size"],
        "embed_dim": a["width"],
        "depths": list(a["depths"]),
        "num_heads": list(a["num_heads"]),
        "window_size": [list(window) for window in a["windows"]],
        "mlp_ratio": a["mlp_ratio"],
        "qkv_bias": a["qkv_bias"],
    }
    if a["version"] == 1:
        return {"architecture": "swin_tiny_patch4_window7_224", "model_args": given}
    given |= {
        "act_layer": a["activation"],
        "pretrained_window_sizes": list(a["pretrained_windows"] or [0] * len(a["depths"])),
    }
    return {"architecture": "swinv2_tiny_window8_256", "model_args": given}


def _torchvision_config(arguments: Arguments) -> dict[str, Any]:
    """A builder, or the class and its arguments, of which those in torchvision are named."""
    a = arguments
    for builder, name in _BUILDERS.items():
        if _named(a) == name:
            return {"model": builder, "kwargs": {}}
    module = "torchvision.models.swin_transformer."
    given = {
        "patch_size": [a["patch_size"]] * 2,
        "embed_dim": a["width"],
        "depths": list(a["depths"]),
        "num_heads": list(a["num_heads"]),
        "window_size": list(a["windows"][0]),
        "mlp_ratio": a["mlp_ratio"],
    }
    if a["version"] == 2:
        given |= {
            "block": f"{module}SwinTransformerBlockV2",
            "downsample_layer": f"{module}PatchMergingV2",
        }
    return {"model": f"{module}SwinTransformer", "kwargs": given}


def _transformers_config(arguments: Arguments) -> dict[str, Any]:
    a = arguments
    kind = "swin" if a["version"] == 1 else "swinv2"
    head = "ForImageClassification" if a["num_classes"] else "Model"
    square = a["image_size"][0] == a["image_size"][1]
    config = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}{head}"],
        "image_size": a["image_size"][0] if square else list(a["image_size"]),
        "patch_size": a["patch_size"],
        "embed_dim": a["width"],
        "depths": list(a["depths"]),
        "num_heads": list(a["num_heads"]),
        "window_size": a["windows"][0][0],
        "mlp_ratio": a["mlp_ratio"],
        "qkv_bias": a["qkv_bias"],
        "hidden_act": _ACTIVATIONS[a["activation"]],
        "layer_norm_eps": a["layer_norm_eps"],
        "use_absolute_embeddings": False,
    }
    if kind == "swinv2":
        none = [0] * len(a["depths"])
        config["pretrained_window_sizes"] = list(a["pretrained_windows"] or none)
    return config


def _modules(library: str, arguments: Arguments) -> dict[str, str]:
    stages = range(len(arguments["depths"]))
    if library == "timm":
        named = {f"stage_{s}": f"layers.{s}" for s in stages}
        return {"embed": "patch_embed", **named, "pooled": "head.global_pool"}
    if library == "torchvision":
        named = {f"stage_{s}": f"features.{2 * s + 1}" for s in stages}
        return {"embed": "features.0", **named, "pooled": "flatten"}
    # A stage's own output is merged already.
    last = {f"stage_{s}": arguments["depths"][s] - 1 for s in stages}
    named = {f"stage_{s}": f"{{p}}encoder.layers.{s}.blocks.{last[f'stage_{s}']}" for s in stages}
    return {"embed": "{p}embeddings", **named, "pooled": "{p}pooler"}


def _table(library: str, kind: str, names: Names, *anchors: str, **arguments: Any) -> Table:
    return Table(
        library,
        "swin",
        kind,
        (f"{names.patches}.weight", f"{names.patch_norm}.weight", *anchors),
        arguments=partial(_arguments, names, library),
        rules=partial(_rules, names, library),
        modules=partial(_modules, library),
        unseen=("image_size", "windows", "pretrained_windows", "activation", "layer_norm_eps"),
        adapt=adapt,
        **arguments,
    )


def _transformers_table(kind: str, prefix: str, names: Names, anchor: str, version: int) -> Table:
    """A table of transformers'; exports of a version are in its naming, of 0 none."""
    return _table(
        "transformers",
        kind,
        names,
        f"{names.at(names.block, 0)}.{anchor}",
        prefixes=(prefix, ""),
        dropped=(r"{p}embeddings\.mask_token", r"decoder\..*"),  # of masked image modeling
        holds=lambda a: a["version"] == version and _holds("transformers", a),
        config=_transformers_config,
        fields=_FIELDS,
    )


_NAMES = r"swin(v2|_s3)?_[a-z0-9_]+?_\d{3}(?=\W|_|$)"
_BLOCK = "layers.0.blocks.0.attn.proj.weight"

# Microsoft's files, and timm's before 0.9, stand first: they have timm's names, others for merging.
TABLES = (
    _table(
        "timm",
        "original",
        _ORIGINAL,
        _BLOCK,
        "layers.0.downsample.reduction.weight",
        dropped=(r".*\.attn_mask",),
        file_names=_NAMES,
        holds=lambda arguments: False,
    ),
    _table(
        "timm",
        "timm",
        _TIMM,
        _BLOCK,
        file_names=_NAMES,
        holds=partial(_holds, "timm"),
        config=_timm_config,
    ),
    _table(
        "torchvision",
        "torchvision",
        _TORCHVISION,
        "features.1.0.attn.relative_position_index",
        holds=partial(_holds, "torchvision"),
        config=_torchvision_config,
    ),
    _transformers_table("swin", "swin.", _TRANSFORMERS, _TRANSFORMERS.table, 1),
    _transformers_table("swin in memory", "swin.", _IN_MEMORY, _IN_MEMORY.table, 0),
    _transformers_table("swinv2", "swinv2.", _TRANSFORMERS, "attention.self.logit_scale", 2),
)


def _transformers_entry(name: str, published: str) -> Entry:
    arguments: dict[str, Any] = {name: getattr(Swin, name, None) for name in Swin.__annotations__}
    config = _transformers_config({**arguments, **VARIANTS[name], "num_classes": 1})
    (build,) = config.pop("architectures")
    config["num_labels"] = 1000
    del config["model_type"]
    return Entry(
        f"transformers/{published}",
        "Swin v2" if build.startswith("Swinv2") else "Swin",
        build,
        tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in config.items()),
        reduced=_REDUCED if "large" in name else (),
        image_size=VARIANTS[name]["image_size"][0],
        published=f"hf://microsoft/{published}",
        license="apache-2.0",
    )


_REDUCED = (("depths", (2, 2, 2, 2)),)
_CERTIFIED = tuple(name for name in VARIANTS if not name.startswith("swinv2_large_window12to"))
_PUBLISHED = {
    "swin_tiny_patch4_window7_224": "swin-tiny-patch4-window7-224",
    "swin_small_patch4_window7_224": "swin-small-patch4-window7-224",
    "swin_base_patch4_window7_224": "swin-base-patch4-window7-224",
    "swin_large_patch4_window7_224": "swin-large-patch4-window7-224",
    "swinv2_tiny_window8_256": "swinv2-tiny-patch4-window8-256",
    "swinv2_small_window8_256": "swinv2-small-patch4-window8-256",
    "swinv2_base_window8_256": "swinv2-base-patch4-window8-256",
    "swinv2_base_window12to16_192to256": "swinv2-base-patch4-window12to16-192to256-22kto1k-ft",
}
ZOO = (
    *(
        Entry(
            f"timm/{name}",
            "Swin v2" if name.startswith("swinv2") else "Swin S3" if "_s3_" in name else "Swin",
            name,
            reduced=_REDUCED if "large" in name else (),
            image_size=VARIANTS[name]["image_size"][0],
        )
        for name in _CERTIFIED
    ),
    *(
        Entry(
            f"torchvision/{builder}",
            "Swin v2" if "v2" in builder else "Swin",
            builder,
            image_size=VARIANTS[name]["image_size"][0],
            published=f"torchvision://{builder}",
            license="BSD-3-Clause",
        )
        for builder, name in _BUILDERS.items()
    ),
    *(_transformers_entry(name, published) for name, published in _PUBLISHED.items()),
)
