"""Tables for BEiT: timm with Microsoft's own files, and transformers, with its data2vec.

Sources: timm 1.0 beit.py; https://github.com/microsoft/unilm (beit, beit2); transformers 5.23
models/beit (other names in memory than in its files) and models/data2vec.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.engine import (
    CONV,
    LINEAR,
    Fixed,
    Rule,
    Rules,
    affine,
    expand,
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
    fill_prefix,
    pair,
    timm_arguments,
)
from vision_jax.errors import UserError
from vision_jax.models.beit import NUM_EXTRA, VARIANTS, Beit, num_offsets, relative_index
from vision_jax.ops.position_embedding import resample_positions, resample_relative_positions

Sides = tuple[int, int]

TIMM_EPSILON = 1e-6  # which nothing configures
TABLE = "relative_position_bias_table"
INDEX = "relative_position_index"


@dataclass(frozen=True)
class Names:
    """What one kind of file calls the modules; those of a block follow its name."""

    patches: str
    cls_token: str
    positions: str
    shared: str
    block: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    biases: tuple[str, str]
    table: str
    proj: str
    mlp: tuple[str, str]
    scales: tuple[str, str]
    norm: str
    pooled_norm: str
    head: str


_TIMM = Names(
    patches="patch_embed.proj",
    cls_token="cls_token",
    positions="pos_embed",
    shared="rel_pos_bias",
    block="blocks.{i}",
    norms=("norm1", "norm2"),
    qkv=("attn.qkv",),
    biases=("attn.q_bias", "attn.v_bias"),
    table="attn",
    proj="attn.proj",
    mlp=("mlp.fc1", "mlp.fc2"),
    scales=("gamma_1", "gamma_2"),
    norm="norm",
    pooled_norm="fc_norm",
    head="head",
)
_FILES = Names(
    patches="{p}embeddings.patch_embeddings.projection",
    cls_token="{p}embeddings.cls_token",
    positions="{p}embeddings.position_embeddings",
    shared="{p}encoder.relative_position_bias",
    block="{p}encoder.layer.{i}",
    norms=("layernorm_before", "layernorm_after"),
    qkv=tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    biases=("attention.attention.query.bias", "attention.attention.value.bias"),
    table="attention.attention.relative_position_bias",
    proj="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    scales=("lambda_1", "lambda_2"),
    norm="{p}layernorm",
    pooled_norm="{p}pooler.layernorm",
    head="classifier",
)
_MEMORY = replace(  # what torch.save(model.state_dict()) writes
    _FILES,
    shared="{p}shared_position_bias",
    block="{p}layers.{i}",
    qkv=tuple(f"attention.{part}_proj" for part in "qkv"),
    biases=("attention.q_proj.bias", "attention.v_proj.bias"),
    table="relative_position_bias",
    proj="attention.o_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
)
_MASKED = replace(_FILES, norm="layernorm")  # BeitForMaskedImageModeling

# transformers' names of activations by ours; timm's BEiT has none but the first.
_TIMM_SEEN = (  # read, or in the tensors' shapes and names
    *("patch_size", "embed_dim", "depth", "num_heads", "qkv_bias", "mlp_ratio", "swiglu_mlp"),
    *("scale_mlp", "init_values", "use_abs_pos_emb", "use_rel_pos_bias", "use_fc_norm"),
    *("use_shared_rel_pos_bias", "global_pool"),
)
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
    "relu6": "relu6",
}


_FIELDS = Fields(
    types=("beit", "data2vec-vision"),
    used="layer_norm_eps hidden_act",
    seen="image_size patch_size num_channels hidden_size num_hidden_layers num_attention_heads "
    "intermediate_size use_absolute_position_embeddings use_relative_position_bias "
    "use_shared_relative_position_bias use_mean_pooling layer_scale_init_value",
    # Training, the mask token of pretraining, and the heads for segmentation.
    free="hidden_dropout_prob attention_probs_dropout_prob initializer_range drop_path_rate "
    "use_mask_token vocab_size pool_scales use_auxiliary_head auxiliary_loss_weight "
    "auxiliary_channels auxiliary_num_convs auxiliary_concat_input semantic_loss_ignore_index "
    "add_fpn reshape_hidden_states stage_names out_features out_indices segmentation_indices",
)
_MASKED_FIELDS = replace(  # without a pooler
    _FIELDS,
    seen=_FIELDS.seen.replace("use_mean_pooling ", ""),
    free=f"{_FIELDS.free} use_mean_pooling",
)


def _rules(names: Names, arguments: Arguments) -> Rules:
    block, attention = names.block + ".", "block_{i}/attn"
    kernel, *_ = (
        fused([block + part for part in names.qkv], f"{attention}/qkv")
        if len(names.qkv) == 3
        else one(f"{block}{names.qkv[0]}.weight", f"{attention}/qkv/kernel", LINEAR)
    )
    rules: list[Rule] = [
        *affine(names.patches, "patch_embed", CONV),
        *one(names.cls_token, "cls_token"),
        *one(names.positions, "pos_embed"),
        *one(f"{names.shared}.{TABLE}", TABLE),
        *norm(block + names.norms[0], "block_{i}/norm1"),
        kernel,
        *one(block + names.biases[0], f"{attention}/q_bias"),
        *one(block + names.biases[1], f"{attention}/v_bias"),
        *one(f"{block}{names.table}.{TABLE}", f"{attention}/{TABLE}"),
        *affine(block + names.proj, f"{attention}/proj"),
        *one(block + names.scales[0], "block_{i}/layer_scale1"),
        *norm(block + names.norms[1], "block_{i}/norm2"),
        *affine(block + names.mlp[0], "block_{i}/mlp/fc1"),
        *affine(block + names.mlp[1], "block_{i}/mlp/fc2"),
        *one(block + names.scales[1], "block_{i}/layer_scale2"),
        *norm(names.pooled_norm if arguments["norm_after_pool"] else names.norm, "norm"),
        *affine(names.head, "head"),
    ]
    depth = arguments["depth"]
    # Older files carry what pairs of patches take from the tables.
    of_blocks = [names.block.replace("{i}", str(i)) + f".{names.table}" for i in range(depth)]
    make = partial(_index, _grid(arguments))
    indices = [Fixed(f"{at}.{INDEX}", make, written=False) for at in (names.shared, *of_blocks)]
    return [*expand(rules, depth), *indices]


_index = functools.lru_cache(maxsize=2)(relative_index)


def _grid(arguments: Arguments) -> Sides:
    height, width = arguments["image_size"]
    return height // arguments["patch_size"], width // arguments["patch_size"]


def _bare(name: str) -> str:
    return name.replace("{p}", "")


def _is_beit(names: Names, shapes: Shapes) -> bool:
    """By a bias for q and none for k, or by a table: ViTs have the other names too."""
    block = _bare(names.block).replace("{i}", "0")
    tables = (f"{block}.{names.table}.{TABLE}", f"{_bare(names.shared)}.{TABLE}")
    key_bias = f"{block}.{names.qkv[len(names.qkv) // 2]}.bias"
    q_bias = f"{block}.{names.biases[0]}"
    return any(t in shapes for t in tables) or (q_bias in shapes and key_bias not in shapes)


def _arguments(names: Names, source: str, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """Arguments of `Beit`: from shapes, and what these don't say from config.json."""
    first_norm = re.escape(f"{_bare(names.block)}.{names.norms[0]}.weight")
    numbered = re.compile(first_norm.replace(r"\{i\}", r"\d+"))
    depth = sum(numbered.fullmatch(name) is not None for name in shapes)
    after = f"{_bare(names.pooled_norm)}.weight" in shapes
    sketch = {"norm_after_pool": after, "depth": depth, "image_size": (1, 1), "patch_size": 1}
    ours = tree_shapes(shapes, fill_prefix(_rules(names, sketch), ""))
    config = metadata.get("config", {})
    read = _from_timm_config if source == "timm" else _from_transformers_config
    said = read(config)

    for path in ("patch_embed/kernel", "block_0/mlp/fc2/kernel"):
        if len(ours.get(path, ())) < 2:
            raise UserError(f"the weights have nothing for {path}: not a BEiT, or damaged")
    tall, wide, channels, width = ours["patch_embed/kernel"]
    if tall != wide or not tall:
        raise UserError(f"patches of {tall} x {wide} pixels: only squares are known")
    own, shared = ours.get(f"block_0/attn/{TABLE}"), ours.get(TABLE)
    table = own or shared
    if source == "timm" and table is None and "known" not in said:
        raise UserError(
            "a BEiT without relative positions has the tensors of timm's EVA, which computes "
            "otherwise: config.json beside the weights must name its architecture (beit_...)"
        )
    heads = table[-1] if table else said.get("num_heads", max(width // 64, 1))
    scaled = "block_0/layer_scale1" in ours
    positions = ours.get("pos_embed")
    found: dict[str, Any] = {
        "num_classes": ours["head/kernel"][1] if "head/kernel" in ours else 0,
        "image_size": _image_size(said.get("image_size"), tall, table, positions, source),
        "patch_size": tall,
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_width": ours["block_0/mlp/fc2/kernel"][0],
        "in_channels": channels,
        "pool": "avg" if after or names is _MASKED else "token",
        "norm_after_pool": after,
        "absolute_positions": positions is not None,
        "relative_bias": own is not None,
        "shared_relative_bias": shared is not None,
        "qkv_bias": "block_0/attn/q_bias" in ours,
        "layer_scale": (said.get("layer_scale") or 1e-5) if scaled else None,
        "layer_norm_eps": TIMM_EPSILON if source == "timm" else 1e-12,
    }
    taken = ("activation", "layer_norm_eps", "pool")
    return found | {name: said[name] for name in taken if name in said}


def _image_size(
    said: Sides | None,
    patch: int,
    table: tuple[int, ...] | None,
    positions: tuple[int, ...] | None,
    source: str,
) -> Sides:
    """The config's if the tensors agree, else the square that they say."""

    def agree(size: Sides) -> bool:
        grid = (size[0] // patch, size[1] // patch)
        tables_agree = table is None or table[0] == num_offsets(grid) + NUM_EXTRA
        return tables_agree and (positions is None or positions[-2:-1] == (grid[0] * grid[1] + 1,))

    size = said
    if size is None or not agree(size):
        if table is not None:
            side = (math.isqrt(max(table[0] - NUM_EXTRA, 0)) + 1) // 2
        elif positions is not None and len(positions) == 3:
            side = math.isqrt(max(positions[1] - 1, 0))
        elif said is None:
            raise UserError(
                "the tensors don't say the image size: config.json beside the weights must, by "
                "timm's architecture (beit_base_patch16_224) or transformers' image_size"
            )
        else:
            side = 0
        size = (side * patch, side * patch)
        if not side or not agree(size):
            raise UserError(
                f"{'tables of' if table else ''} positions {table or positions} fit no square "
                "image, and config.json says no image size that they fit"
            )
    if source == "transformers" and size[0] != size[1] and (table or positions):
        raise UserError(
            f"images of {size[0]} x {size[1]} pixels: transformers exchanges rows and columns of "
            "their positions; it is right for squares only, and only these are imported"
        )
    return size


def _from_timm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    name, given = timm_arguments({"config": config}, _TIMM_SEEN)
    said: dict[str, Any] = {}
    if re.match(r"beit(v2)?_", name):
        said["known"] = True
    if named := VARIANTS.get(name):
        said |= {key: named[key] for key in ("image_size", "num_heads", "layer_scale")}
    cfg = config.get("pretrained_cfg")
    if isinstance(cfg, dict) and isinstance(cfg.get("input_size"), list):
        said["image_size"] = pair(cfg["input_size"][-2:], "input_size")
    pool = given.get("global_pool", config.get("global_pool"))
    if pool in ("token", "avg"):
        said["pool"] = pool
    elif pool:
        raise UserError(f"config.json: global_pool {pool!r} is none of token, avg")
    if "img_size" in given:
        said["image_size"] = pair(given["img_size"], "img_size")
    if "num_heads" in given:
        said["num_heads"] = _count(given["num_heads"], "num_heads")
    if "init_values" in given:
        said["layer_scale"] = _number(given["init_values"] or 0, "init_values")
    return said


def _from_transformers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if "num_attention_heads" in config:
        said["num_heads"] = _count(config["num_attention_heads"], "num_attention_heads")
    if "image_size" in config:
        said["image_size"] = pair(config["image_size"], "image_size")
    if "layer_norm_eps" in config:
        said["layer_norm_eps"] = _number(config["layer_norm_eps"], "layer_norm_eps")
    if "layer_scale_init_value" in config:
        value = config["layer_scale_init_value"]
        said["layer_scale"] = _number(value, "layer_scale_init_value")
    if "hidden_act" in config:
        ours = {theirs: name for name, theirs in _ACTIVATIONS.items()} | {"swish": "silu"}
        name = config["hidden_act"]
        if not isinstance(name, str) or name not in ours:
            raise UserError(f"config.json: hidden_act {name!r} is none of {', '.join(ours)}")
        said["activation"] = ours[name]
    return said


def _count(value: Any, name: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {name} {value!r} is no positive whole number")
    return value


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float):
        raise UserError(f"config.json: {name} {value!r} is no number")
    return float(value)


def adapt(path: str, array: np.ndarray, own: Arguments, wanted: Arguments) -> np.ndarray:
    """Positions, absolute and relative, for another image size, resampled as timm does."""
    old, new = _grid(own), _grid(wanted)
    if path == "pos_embed" and array.ndim == 3 and array.shape[1] == old[0] * old[1] + 1:
        return resample_positions(array, old, new, 1)
    relative = path.endswith(TABLE) and array.ndim == 2
    if relative and len(array) == num_offsets(old) + NUM_EXTRA:
        return resample_relative_positions(array, old, new, NUM_EXTRA)
    return array


def _holds(source: str, arguments: Arguments) -> bool:
    a = arguments
    if source == "timm":
        return a["layer_norm_eps"] == TIMM_EPSILON and a["activation"] == "gelu"
    positions = a["absolute_positions"] or a["relative_bias"] or a["shared_relative_bias"]
    square = a["image_size"][0] == a["image_size"][1]
    pooled = a["norm_after_pool"] == (a["pool"] == "avg")
    return a["qkv_bias"] and pooled and (square or not positions)


# What timm's variants have in common.
_USUAL = (
    "pool",
    "norm_after_pool",
    "absolute_positions",
    "relative_bias",
    "shared_relative_bias",
    "qkv_bias",
)


def _named(arguments: Arguments) -> str | None:
    """timm's architecture that this is; only the images' mean tells a large v2 from a large v1."""
    usual = {name: getattr(Beit, name) for name in _USUAL}
    found = []
    for name, known in VARIANTS.items():
        computed = {key: known[key] for key in known if key not in ("mean", "std")}
        if all(arguments[key] == value for key, value in {**usual, **computed}.items()):
            found.append((arguments["mean"] != known.get("mean", Beit.mean), name))
    return min(found)[1] if found else None


def _timm_config(arguments: Arguments) -> dict[str, Any]:
    a = arguments
    ratio = a["mlp_width"] / a["width"]
    if int(a["width"] * ratio) != a["mlp_width"]:  # timm rounds the product down
        ratio = math.nextafter(ratio, math.inf)
    if name := _named(a):
        return {"architecture": name, "model_args": {}}
    given = {
        "img_size": list(a["image_size"]),
        "patch_size": a["patch_size"],
        "embed_dim": a["width"],
        "depth": a["depth"],
        "num_heads": a["num_heads"],
        "mlp_ratio": ratio,
        "qkv_bias": a["qkv_bias"],
        "init_values": a["layer_scale"],
        "use_abs_pos_emb": a["absolute_positions"],
        "use_rel_pos_bias": a["relative_bias"],
        "use_shared_rel_pos_bias": a["shared_relative_bias"],
        "global_pool": a["pool"],
        "use_fc_norm": a["norm_after_pool"],
    }
    return {"architecture": "beit_base_patch16_224", "model_args": given}


def _transformers_config(arguments: Arguments) -> dict[str, Any]:
    a = arguments
    square = a["image_size"][0] == a["image_size"][1]
    return {
        "model_type": "beit",
        "architectures": ["BeitForImageClassification" if a["num_classes"] else "BeitModel"],
        "image_size": a["image_size"][0] if square else list(a["image_size"]),
        "patch_size": a["patch_size"],
        "hidden_size": a["width"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["num_heads"],
        "intermediate_size": a["mlp_width"],
        "hidden_act": _ACTIVATIONS[a["activation"]],
        "layer_norm_eps": a["layer_norm_eps"],
        "layer_scale_init_value": a["layer_scale"] or 0.0,
        "use_absolute_position_embeddings": a["absolute_positions"],
        "use_relative_position_bias": a["relative_bias"],
        "use_shared_relative_position_bias": a["shared_relative_bias"],
        "use_mean_pooling": a["pool"] == "avg",
    }


def _modules(source: str, arguments: Arguments) -> dict[str, str]:
    blocks = range(arguments["depth"])
    if source == "timm":
        named = {f"block_{i}": f"blocks.{i}" for i in blocks}
        return {"embed": "pos_drop", **named, "pooled": "fc_norm"}
    named = {f"block_{i}": f"{{p}}layers.{i}" for i in blocks}
    return {"embed": "{p}embeddings", **named, "pooled": "{p}pooler"}


def _table(source: str, kind: str, names: Names, *anchors: str, **arguments: Any) -> Table:
    first = names.block.replace("{i}", "0")
    return Table(
        source,
        "beit",
        kind,
        (f"{names.patches}.weight", names.cls_token, f"{first}.{names.norms[0]}.weight", *anchors),
        arguments=partial(_arguments, names, source),
        rules=partial(_rules, names),
        recognizes=partial(_is_beit, names),
        modules=partial(_modules, source),
        unseen=("activation", "pool", "layer_norm_eps"),
        adapt=adapt,
        **arguments,
    )


def _nothing_holds(arguments: Arguments) -> bool:
    return False


_MASK_TOKEN = r"{p}embeddings\.mask_token"
_PREFIXES = ("beit.", "data2vec_vision.", "")

TABLES = (
    _table(
        "timm",
        "timm",
        _TIMM,
        # Microsoft's files of the pretraining: its token, its head and v2's decoder.
        file_names=r"beit(v2)?_(base|large)_patch16_\d{3}",
        dropped=("mask_token", r"lm_head\..*", r"cls_pt_layers\..*"),
        holds=partial(_holds, "timm"),
        config=_timm_config,
    ),
    _table(
        "transformers",
        "masked image modeling",
        _MASKED,
        "lm_head.weight",
        "layernorm.weight",
        prefixes=("beit.",),
        dropped=(_MASK_TOKEN, r"lm_head\..*"),
        holds=_nothing_holds,
        config=_transformers_config,
        fields=_MASKED_FIELDS,
    ),
    _table(
        "transformers",
        "beit",
        _FILES,
        prefixes=_PREFIXES,
        dropped=(_MASK_TOKEN,),
        holds=partial(_holds, "transformers"),
        config=_transformers_config,
        fields=_FIELDS,
    ),
    _table(
        "transformers",
        "beit in memory",
        _MEMORY,
        prefixes=("beit.", ""),
        dropped=(_MASK_TOKEN,),
        holds=_nothing_holds,
        config=_transformers_config,
        fields=_FIELDS,
    ),
)


_REDUCED_TIMM = (("depth", 2),)
_REDUCED_TRANSFORMERS = (("num_hidden_layers", 2),)


def _transformers_entry(name: str) -> Entry:
    arguments: dict[str, Any] = {key: getattr(Beit, key, None) for key in Beit.__annotations__}
    arguments |= VARIANTS[name] | {"num_classes": 1, "layer_norm_eps": 1e-12}
    config = _transformers_config(arguments)
    (build,) = config.pop("architectures")
    del config["model_type"]
    published = name.replace("_", "-")
    return Entry(
        f"transformers/{published}",
        "BEiT",
        build,
        (*config.items(), ("num_labels", 1000)),
        reduced=_REDUCED_TRANSFORMERS if "large" in name else (),
        image_size=VARIANTS[name]["image_size"][0],
        published=f"hf://microsoft/{published}",
        license="apache-2.0",
    )


ZOO = (
    *(
        Entry(
            f"timm/{name}",
            "BEiT v2" if name.startswith("beitv2") else "BEiT",
            name,
            reduced=_REDUCED_TIMM if "large" in name else (),
            image_size=VARIANTS[name]["image_size"][0],
            published=f"timm://{name}",
        )
        for name in VARIANTS
    ),
    *(_transformers_entry(name) for name in VARIANTS if not name.startswith("beitv2")),
)
