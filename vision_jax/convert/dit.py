"""The tables of DiT and SiT: their own checkpoints, and diffusers' DiTTransformer2DModel.

diffusers keeps a copy of the embeddings of time and class in each block: they are one here, and a
file whose copies differ is refused. Its frequencies of the time and one epsilon are not the
original's, so a model of one of them is none of the other.

Source: github.com/facebookresearch/DiT models.py and github.com/willisma/SiT models.py, which name
and shape the same; diffusers 0.42 models/transformers/dit_transformer_2d.py.
"""

from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.diffusers import SOURCE, count, fields, number
from vision_jax.convert.engine import (
    CONV,
    COPY,
    LINEAR,
    Arrays,
    Fixed,
    Layout,
    Rule,
    Rules,
    affine,
    expand,
    fused,
    one,
)
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table, pair
from vision_jax.errors import UserError
from vision_jax.models.dit import HEADS
from vision_jax.ops.position_embedding import grid_positions

_DIFFUSERS_EPS = 1e-5  # of the norm before the MLP, where a config doesn't say


def _common(shapes: Shapes, names: dict[str, str], metadata: Metadata) -> dict[str, Any]:
    """The arguments that the tensors of both kinds of files show, by their own names."""
    width, channels, side = shapes[names["patch"]][:3]
    outputs, double = shapes[names["head"]][0], 2 * channels * side**2
    if outputs not in (double, double // 2):
        raise UserError(
            f"a DiT of {channels} channels in patches of {side} whose last layer has {outputs} "
            f"outputs: {double // 2} are known, or {double} with variances"
        )
    return {
        "num_classes": shapes[names["classes"]][0] - 1,
        "patch_size": side,
        "width": width,
        "depth": count(shapes, names["block"]),
        "mlp_width": shapes[names["mlp"]][0],
        "in_channels": channels,
        "learned_variance": outputs == double,
    }


# Their own files ---------------------------------------------------------------------------------

_BLOCK = "blocks.{i}"
_OWN: tuple[Rule, ...] = (
    *affine("x_embedder.proj", "patch_embed", CONV),
    *affine("t_embedder.mlp.0", "time_embed/fc1"),
    *affine("t_embedder.mlp.2", "time_embed/fc2"),
    *one("y_embedder.embedding_table.weight", "class_embed"),
    *affine(f"{_BLOCK}.attn.qkv", "block_{i}/attn/qkv"),
    *affine(f"{_BLOCK}.attn.proj", "block_{i}/attn/proj"),
    *affine(f"{_BLOCK}.mlp.fc1", "block_{i}/mlp/fc1"),
    *affine(f"{_BLOCK}.mlp.fc2", "block_{i}/mlp/fc2"),
    *affine(f"{_BLOCK}.adaLN_modulation.1", "block_{i}/ada"),
    *affine("final_layer.adaLN_modulation.1", "head_ada"),
    *affine("final_layer.linear", "head"),
)
_OWN_NAMES = {
    "patch": "x_embedder.proj.weight",
    "head": "final_layer.linear.weight",
    "classes": "y_embedder.embedding_table.weight",
    "block": "blocks.{i}.adaLN_modulation.1.weight",
    "mlp": "blocks.0.mlp.fc1.weight",
}


def _own_rules(arguments: Arguments) -> Rules:
    grid = tuple(side // arguments["patch_size"] for side in arguments["image_size"])
    positions = partial(grid_positions, grid, arguments["width"], 0)
    rules: list[Rule | Fixed] = [
        Fixed("pos_embed", positions, exact=False),
        *expand(_OWN, arguments["depth"]),
    ]
    if arguments["caption_width"]:  # in a run's own files alone
        rules += affine("caption_embedder.mlp.0", "caption_embed/fc1")
        rules += affine("caption_embedder.mlp.2", "caption_embed/fc2")
    return rules


def _own_arguments(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """What a file's name tells, as `config["architecture"]`, is whether it is a SiT.

    Raises:
      UserError: a width of which nobody knows the heads, a grid that is no square.
    """
    config = metadata.get("config", {})
    found = _common(shapes, _OWN_NAMES, metadata)
    heads = config.get("num_heads", HEADS.get(found["width"], 0))
    if not isinstance(heads, int) or heads < 1 or found["width"] % heads:
        raise UserError(
            f"how many heads share a DiT's {found['width']} channels is not in the weights: put "
            'config.json with {"num_heads": 16} beside model.safetensors'
        )
    cells = shapes["pos_embed"][1]
    side = round(cells**0.5)
    if side**2 != cells:
        raise UserError(f"pos_embed is of {cells} patches, which are no square grid")
    sit = str(config.get("architecture", "")).lower().startswith("sit")
    return {
        **found,
        "image_size": (side * found["patch_size"],) * 2,
        "num_heads": heads,
        "predicts": config.get("predicts", "velocity" if sit else "noise"),
        "time_shift": 0,
        "mlp_norm_eps": 1e-6,
    }


def _holds(shift: int, arguments: Arguments) -> bool:
    square = arguments["image_size"][0] == arguments["image_size"][1]
    as_it_is = {*arguments["mean"]} == {0.0} and {*arguments["std"]} == {1.0}
    own = arguments["caption_width"] > 0
    return square and as_it_is and not own and arguments["time_shift"] == shift


def _own_modules(arguments: Arguments) -> dict[str, str]:
    return {
        "embed": "x_embedder",
        **{f"block_{i}": f"blocks.{i}" for i in range(arguments["depth"])},
    }


# diffusers' --------------------------------------------------------------------------------------

_PART = "transformer_blocks.{i}"
_DIFFUSERS: tuple[Rule, ...] = (
    *affine("pos_embed.proj", "patch_embed", CONV),
    *affine(f"{_PART}.norm1.linear", "block_{i}/ada"),
    *fused([f"{_PART}.attn1.to_{part}" for part in "qkv"], "block_{i}/attn/qkv"),
    *affine(f"{_PART}.attn1.to_out.0", "block_{i}/attn/proj"),
    *affine(f"{_PART}.ff.net.0.proj", "block_{i}/mlp/fc1"),
    *affine(f"{_PART}.ff.net.2", "block_{i}/mlp/fc2"),
    *affine("proj_out_1", "head_ada"),
    *affine("proj_out_2", "head"),
)
_EMBEDDINGS = (
    ("timestep_embedder.linear_1.weight", "time_embed/fc1/kernel", LINEAR),
    ("timestep_embedder.linear_1.bias", "time_embed/fc1/bias", COPY),
    ("timestep_embedder.linear_2.weight", "time_embed/fc2/kernel", LINEAR),
    ("timestep_embedder.linear_2.bias", "time_embed/fc2/bias", COPY),
    ("class_embedder.embedding_table.weight", "class_embed", COPY),
)
_DIFFUSERS_NAMES = {
    "patch": "pos_embed.proj.weight",
    "head": "proj_out_2.weight",
    "classes": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
    "block": "transformer_blocks.{i}.norm1.linear.weight",
    "mlp": "transformer_blocks.0.ff.net.0.proj.weight",
}


def _copies(name: str, depth: int, inner: Layout) -> Layout:
    """One array that the file has in each block."""

    def to_tree(arrays: Arrays) -> Arrays:
        for index, array in enumerate(arrays):
            if array.dtype != bool and not np.array_equal(array, arrays[0]):  # bool: shapes alone
                raise UserError(
                    f"{name} differs between block 0 and block {index}: this model has one "
                    "embedding of time and class for all of its blocks"
                )
        return inner.to_tree(arrays[:1])

    return Layout(to_tree, lambda arrays: [inner.to_file(arrays)[0]] * depth)


def _diffusers_rules(arguments: Arguments) -> Rules:
    depth = arguments["depth"]
    shared = [
        Rule(
            tuple(f"transformer_blocks.{i}.norm1.emb.{name}" for i in range(depth)),
            (path,),
            _copies(name, depth, layout),
        )
        for name, path, layout in _EMBEDDINGS
    ]
    return [*shared, *expand(_DIFFUSERS, depth)]


def _diffusers_arguments(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """Raises UserError where the heads don't share the channels, which no tensor shows."""
    config = metadata.get("config", {})
    found = _common(shapes, _DIFFUSERS_NAMES, metadata)
    size = config.get("attention_head_dim", 72)
    heads = config.get("num_attention_heads", 16)
    whole = all(isinstance(value, int) and value > 0 for value in (size, heads))
    if not whole or heads * size != found["width"]:
        raise UserError(
            f"config.json: num_attention_heads {heads!r} of attention_head_dim {size!r} are not "
            f"the {found['width']} channels of the tensors: put the model's config.json beside "
            "the weights"
        )
    return {
        **found,
        "image_size": pair(config.get("sample_size", 32), "sample_size"),
        "num_heads": heads,
        "predicts": "noise",
        "time_shift": 1,
        "mlp_norm_eps": number(config, "norm_eps", _DIFFUSERS_EPS),
    }


def _diffusers_config(arguments: Arguments) -> dict[str, Any]:
    channels, heads = arguments["in_channels"], arguments["num_heads"]
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": arguments["width"] // heads,
        "in_channels": channels,
        "out_channels": channels * (1 + arguments["learned_variance"]),
        "num_layers": arguments["depth"],
        "sample_size": arguments["image_size"][0],
        "patch_size": arguments["patch_size"],
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": arguments["num_classes"],
        "norm_eps": arguments["mlp_norm_eps"],
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "attention_bias": True,
    }


def _diffusers_modules(arguments: Arguments) -> dict[str, str]:
    return {
        "condition": "transformer_blocks.0.norm1.emb",
        "embed": "pos_embed",
        **{f"block_{i}": f"transformer_blocks.{i}" for i in range(arguments["depth"])},
    }


TABLES = (
    Table(
        "dit",
        "dit",
        "DiT, SiT",
        (
            "t_embedder.mlp.0.weight",
            "pos_embed",
            *(name.replace("{i}", "0") for name in _OWN_NAMES.values()),
        ),
        arguments=_own_arguments,
        rules=_own_rules,
        holds=lambda a: _holds(0, a) and a["mlp_norm_eps"] == 1e-6,
        config=lambda a: {"num_heads": a["num_heads"], "predicts": a["predicts"]},
        modules=_own_modules,
        unseen=("predicts", "num_heads"),
        file_names=r"(dit|sit)-(s|b|l|xl)-\d",
        license="DiT CC-BY-NC-4.0 (not for commercial use), SiT MIT",
    ),
    Table(
        SOURCE,
        "dit",
        "DiTTransformer2DModel",
        tuple(name.replace("{i}", "0") for name in _DIFFUSERS_NAMES.values()),
        arguments=_diffusers_arguments,
        rules=_diffusers_rules,
        holds=lambda a: (
            _holds(1, a) and a["predicts"] == "noise" and a["mlp_width"] == 4 * a["width"]
        ),
        config=_diffusers_config,
        modules=_diffusers_modules,
        fields=fields(
            # The first is what the published folders say, from before it had a class of its own.
            "Transformer2DModel",
            "DiTTransformer2DModel",
            used="num_attention_heads attention_head_dim sample_size norm_eps",
            seen="in_channels out_channels num_layers patch_size num_embeds_ada_norm",
            free="dropout norm_num_groups upcast_attention use_linear_projection",
            only={
                "activation_fn": ("gelu-approximate",),
                "norm_type": ("ada_norm_zero",),
                "norm_elementwise_affine": (False,),
                "attention_bias": (True,),
                "cross_attention_dim": (None,),
                "num_vector_embeds": (None,),
                "only_cross_attention": (False,),
                "double_self_attention": (False,),
                "attention_type": ("default",),
                "caption_channels": (None,),
                "interpolation_scale": (None,),
                "use_additional_conditions": (None, False),
            },
        ),
        unseen=("num_heads", "image_size", "mlp_norm_eps"),
        license="DiT CC-BY-NC-4.0 (not for commercial use)",
    ),
)
_DEPTH = (("depth", 4),)
_S_2 = (("hidden_size", 384), ("depth", 12), ("num_heads", 6))
_SIT = (("predicts", "velocity"),)
ZOO = (
    Entry("dit/DiT-S-2", "DiT", "DiT", (("in_channels", 4), *_S_2), image_size=32),
    Entry(
        "dit/DiT-XL-2",
        "DiT",
        "DiT",
        (("in_channels", 4),),
        _DEPTH,
        image_size=32,
        license="cc-by-nc-4.0",
    ),
    Entry("dit/SiT-S-2", "SiT", "SiT", (("in_channels", 4), *_S_2, *_SIT), image_size=32),
    Entry(
        "dit/SiT-XL-2",
        "SiT",
        "SiT",
        (("in_channels", 4), *_SIT),
        _DEPTH,
        image_size=32,
        license="mit",
    ),
    Entry(
        "diffusers/DiT-XL-2-256",
        "DiT",
        "DiTTransformer2DModel",
        (("in_channels", 4), ("out_channels", 8)),
        (("num_layers", 4),),
        image_size=32,
        published="hf://facebook/DiT-XL-2-256/transformer",
        license="cc-by-nc-4.0",
    ),
    Entry(
        "diffusers/DiT-XL-2-512",
        "DiT",
        "DiTTransformer2DModel",
        (("in_channels", 4), ("out_channels", 8), ("sample_size", 64)),
        (("num_layers", 2),),
        image_size=64,
        published="hf://facebook/DiT-XL-2-512/transformer",
        license="cc-by-nc-4.0",
    ),
)
