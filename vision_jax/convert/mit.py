"""Tables for Mix Transformers, SegFormer's encoder, of which transformers has the files.

Source: transformers 5.24 models/segformer/modeling_segformer.py, whose files keep older names than
its modules (conversion_mapping.py).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from vision_jax.convert.engine import CONV, Rule, affine, norm
from vision_jax.convert.fields import Fields
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table, count_blocks
from vision_jax.models.mit import VARIANTS

FIELDS = Fields(
    types=("segformer",),
    used="num_attention_heads strides",
    seen="num_channels num_encoder_blocks depths sr_ratios hidden_sizes patch_sizes mlp_ratios "
    "decoder_hidden_size",
    # Nothing reads layer_norm_eps, nor what older files say of sizes.
    free="attention_probs_dropout_prob classifier_dropout_prob drop_path_rate hidden_dropout_prob "
    "initializer_range layer_norm_eps semantic_loss_ignore_index downsampling_rates image_size "
    "encoder_stride",
    only={"hidden_act": ("gelu",), "reshape_last_stage": (True,)},
)


@dataclass(frozen=True)
class Names:
    """What one kind of file calls the modules; a stage is `{s}`, a block `{i}`."""

    patches: str
    block: str
    norm: str
    attention: tuple[str, ...]  # q, k, v, proj, sr_conv, sr_norm
    norms: tuple[str, str]
    mlp: tuple[str, str]
    projections: str = ""  # of SegFormer's decoder

    def of_block(self, stage: int, index: int) -> str:
        """The name of a block, with the dot."""
        return self.block.replace("{s}", str(stage)).replace("{i}", str(index))

    @property
    def pattern(self) -> str:
        """What finds all blocks, as `count_blocks` takes it."""
        name = self.block.replace(".", r"\.").replace("{s}", r"(\d+)").replace("{i}", r"(\d+)")
        return rf"{name}{self.norms[0]}\.weight"


HUB = Names(
    patches="encoder.patch_embeddings.{s}",
    block="encoder.block.{s}.{i}.",
    norm="encoder.layer_norm.{s}",
    attention=(
        "self.query",
        "self.key",
        "self.value",
        "output.dense",
        "self.sr",
        "self.layer_norm",
    ),
    norms=("layer_norm_1", "layer_norm_2"),
    mlp=("dense1", "dense2"),
    projections="decode_head.linear_c",
)
MEMORY = Names(  # what torch.save(model.state_dict()) writes
    patches="stages.{s}.patch_embeddings",
    block="stages.{s}.blocks.{i}.",
    norm="stages.{s}.layer_norm",
    attention=(
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("sequence_reduction.sequence_reduction", "sequence_reduction.layer_norm"),
    ),
    norms=("layernorm_before", "layernorm_after"),
    mlp=("fc1", "fc2"),
    projections="decode_head.linear_projections",
)


def encoder_rules(names: Names, arguments: Arguments, prefix: str, path: str) -> list[Rule]:
    """The rules of an encoder whose tensors begin with `prefix`, and its parameters with `path`."""
    rules: list[Rule] = []
    for stage, depth in enumerate(arguments["depths"]):
        own = f"{path}stage_{stage}"
        patches, last = (
            prefix + name.replace("{s}", str(stage)) for name in (names.patches, names.norm)
        )
        rules += affine(f"{patches}.proj", f"{own}/patch_embed", CONV)
        rules += norm(f"{patches}.layer_norm", f"{own}/patch_norm")
        rules += norm(last, f"{own}/norm")
        for index in range(depth):
            block, ours = prefix + names.of_block(stage, index), f"{own}/block_{index}"
            *projections, conv, conv_norm = (f"{block}attention.{it}" for it in names.attention)
            for name, part in zip(projections, ("q", "k", "v", "proj"), strict=True):
                rules += affine(name, f"{ours}/attn/{part}")
            if arguments["reductions"][stage] > 1:
                rules += affine(conv, f"{ours}/attn/sr_conv", CONV)
                rules += norm(conv_norm, f"{ours}/attn/sr_norm")
            for number in (1, 2):
                rules += norm(block + names.norms[number - 1], f"{ours}/norm{number}")
                rules += affine(f"{block}mlp.{names.mlp[number - 1]}", f"{ours}/mlp/fc{number}")
            rules += affine(f"{block}mlp.dwconv.dwconv", f"{ours}/mlp/conv_dw", CONV)
    return rules


def encoder_arguments(names: Names, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """The encoder's arguments, of tensors by their names without the prefix."""
    config = metadata.get("config", {})
    depths = count_blocks(shapes, names.pattern)
    stages = range(len(depths))
    patches = [shapes[f"{names.patches.replace('{s}', str(s))}.proj.weight"] for s in stages]
    reductions, ratios = [], []
    for stage in stages:
        block = names.of_block(stage, 0)
        window = shapes.get(f"{block}attention.{names.attention[4]}.weight")
        reductions.append(window[2] if window else 1)
        hidden, width = shapes[f"{block}mlp.{names.mlp[0]}.weight"]
        ratios.append(hidden // width)
    return {
        "in_channels": patches[0][1],
        "depths": depths,
        "widths": tuple(shape[0] for shape in patches),
        "num_heads": tuple(config.get("num_attention_heads", (1, 2, 5, 8)))[: len(depths)],
        "reductions": tuple(reductions),
        "patch_sizes": tuple(shape[2] for shape in patches),
        "strides": tuple(config.get("strides", (4, 2, 2, 2)))[: len(depths)],
        "mlp_ratios": tuple(ratios),
    }


def encoder_config(arguments: Arguments) -> dict[str, Any]:
    """What config.json says of the encoder."""
    a = arguments
    return {
        "model_type": "segformer",
        "num_encoder_blocks": len(a["depths"]),
        "depths": list(a["depths"]),
        "hidden_sizes": list(a["widths"]),
        "num_attention_heads": list(a["num_heads"]),
        "sr_ratios": list(a["reductions"]),
        "patch_sizes": list(a["patch_sizes"]),
        "strides": list(a["strides"]),
        "mlp_ratios": list(a["mlp_ratios"]),
        "hidden_act": "gelu",
        "reshape_last_stage": True,
    }


def _rules(names: Names, arguments: Arguments) -> list[Rule]:
    return [*encoder_rules(names, arguments, "{p}", ""), *affine("classifier", "head")]


def _from_file(names: Names, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    head = shapes.get("classifier.weight", (0,))
    return {"num_classes": head[0], **encoder_arguments(names, shapes, metadata)}


def _config(arguments: Arguments) -> dict[str, Any]:
    head = "ForImageClassification" if arguments["num_classes"] else "Model"
    return {"architectures": [f"Segformer{head}"], **encoder_config(arguments)}


TABLES = tuple(
    Table(
        "transformers",
        "mit",
        kind,
        tuple(
            "{p}" + name
            for name in (
                f"{names.patches.replace('{s}', '0')}.proj.weight",
                f"{names.of_block(0, 0)}mlp.dwconv.dwconv.weight",
            )
        ),
        arguments=partial(_from_file, names),
        rules=partial(_rules, names),
        prefixes=("segformer.", ""),
        config=_config,
        modules=lambda a: {f"stage_{i}": f"{{p}}stages.{i}" for i in range(len(a["depths"]))},
        fields=FIELDS,
        unseen=("num_heads", "strides"),
    )
    for kind, names in (("encoder", HUB), ("encoder in memory", MEMORY))
)


def config_of(name: str) -> dict[str, Any]:
    """Keywords of a SegformerConfig for a variant of the encoder ("mit_b0")."""
    arguments = VARIANTS[name]
    return {"depths": arguments["depths"], "hidden_sizes": arguments["widths"]}


ZOO = tuple(
    Entry(
        f"transformers/{name.replace('_', '-')}",
        "Mix Transformer",
        "SegformerForImageClassification",
        tuple({**config_of(name), "num_labels": 1000}.items()),
        reduced=(("depths", (2, 2, 2, 2)),) if name > "mit_b2" else (),
        published=f"hf://nvidia/{name.replace('_', '-')}",
        license="NVIDIA Source Code License, non-commercial",
    )
    for name in VARIANTS
)
