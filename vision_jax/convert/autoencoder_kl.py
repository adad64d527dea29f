"""The table of AutoencoderKL: diffusers' files, those from before 0.12 among them.

Source: diffusers 0.42 models/autoencoders/autoencoder_kl.py.
"""

from dataclasses import replace
from typing import Any

from vision_jax.convert.diffusers import SOURCE, count, fields, number
from vision_jax.convert.engine import CONV, Rule, Rules, affine, fused, norm
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.errors import UserError
from vision_jax.models.autoencoder_kl import AutoencoderKl

_FACTOR = AutoencoderKl.scaling_factor
_RESNET = "resnets.{i}"
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


def _block(name: str, path: str, shortcut: bool) -> list[Rule]:
    rules: list[Rule] = []
    for number_ in (1, 2):
        rules += norm(f"{name}.norm{number_}", f"{path}/norm{number_}")
        rules += affine(f"{name}.conv{number_}", f"{path}/conv{number_}", CONV)
    if shortcut:
        rules += affine(f"{name}.conv_shortcut", f"{path}/shortcut", CONV)
    return rules


def _middle(name: str, path: str, attention: bool) -> list[Rule]:
    rules = _block(f"{name}.resnets.0", f"{path}/block_0", False)
    if attention:
        own, ours = f"{name}.attentions.0", f"{path}/attn"
        rules += norm(f"{own}.group_norm", f"{path}/norm")
        rules += fused([f"{own}.to_{part}" for part in "qkv"], f"{ours}/qkv")
        rules += affine(f"{own}.to_out.0", f"{ours}/proj")
        # As these were called at first, and are in the files of Stable Diffusion 1.
        old = (
            *fused([f"{own}.{part}" for part in ("query", "key", "value")], f"{ours}/qkv"),
            *affine(f"{own}.proj_attn", f"{ours}/proj"),
        )
        rules += [replace(rule, written=False) for rule in old]
    return rules + _block(f"{name}.resnets.1", f"{path}/block_1", False)


def _half(arguments: Arguments, part: str) -> list[Rule]:
    """The encoder's or the decoder's rules, in the order of computation."""
    encodes = part == "encoder"
    widths = arguments["widths"] if encodes else arguments["widths"][::-1]
    stages, way = ("down_blocks", "downsample") if encodes else ("up_blocks", "upsample")
    middle = _middle(f"{part}.mid_block", f"{part}/middle", arguments["mid_attention"])
    rules: list[Rule] = [*affine(f"{part}.conv_in", f"{part}/conv_in", CONV)]
    rules += [] if encodes else middle
    before = widths[0]
    for stage, width in enumerate(widths):
        name, path = f"{part}.{stages}.{stage}", f"{part}/stage_{stage}"
        for block in range(arguments["stage_depth"] + (not encodes)):
            rules += _block(f"{name}.resnets.{block}", f"{path}/block_{block}", before != width)
            before = width
        if stage < len(widths) - 1:
            rules += affine(f"{name}.{way}rs.0.conv", f"{path}/{way}", CONV)
    rules += middle if encodes else []
    rules += norm(f"{part}.conv_norm_out", f"{part}/norm")
    return [*rules, *affine(f"{part}.conv_out", f"{part}/conv_out", CONV)]


def _rules(arguments: Arguments) -> Rules:
    return [
        *_half(arguments, "encoder"),
        *(affine("quant_conv", "quant_conv", CONV) if arguments["quant_conv"] else ()),
        *(
            affine("post_quant_conv", "post_quant_conv", CONV)
            if arguments["post_quant_conv"]
            else ()
        ),
        *_half(arguments, "decoder"),
    ]


def _arguments(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """Raises UserError where the decoder gives other images than the encoder takes."""
    config = metadata.get("config", {})
    stages = count(shapes, "encoder.down_blocks.{i}.resnets.0.conv1.weight")
    channels = shapes["encoder.conv_in.weight"][1]
    decoded = shapes["decoder.conv_out.weight"][0]
    if decoded != channels:
        raise UserError(
            f"an autoencoder of images of {channels} channels that gives {decoded}: the model here "
            "has as many on both sides"
        )
    widths = tuple(
        shapes[f"encoder.down_blocks.{stage}.resnets.0.conv1.weight"][0] for stage in range(stages)
    )
    groups = config.get("norm_num_groups", AutoencoderKl.groups)
    if not isinstance(groups, int) or groups < 1 or any(width % groups for width in widths):
        raise UserError(
            f"config.json: norm_num_groups {groups!r} does not divide the widths "
            f"{', '.join(map(str, widths))}: put the config.json that says how many beside the "
            "weights"
        )
    return {
        "num_classes": 0,
        "widths": widths,
        "stage_depth": count(shapes, "encoder.down_blocks.0.resnets.{i}.conv1.weight"),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "in_channels": channels,
        "groups": groups,
        "mid_attention": "encoder.mid_block.attentions.0.group_norm.weight" in shapes,
        "quant_conv": "quant_conv.weight" in shapes,
        "post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": number(config, "scaling_factor", _FACTOR),
        "shift_factor": number(config, "shift_factor", 0.0),
    }


def _config(arguments: Arguments) -> dict[str, Any]:
    stages = len(arguments["widths"])
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["in_channels"],
        "down_block_types": [_DOWN] * stages,
        "up_block_types": [_UP] * stages,
        "block_out_channels": list(arguments["widths"]),
        "layers_per_block": arguments["stage_depth"],
        "act_fn": "silu",
        "latent_channels": arguments["latent_channels"],
        "norm_num_groups": arguments["groups"],
        "scaling_factor": arguments["scaling_factor"],
        "shift_factor": arguments["shift_factor"] or None,
        "use_quant_conv": arguments["quant_conv"],
        "use_post_quant_conv": arguments["post_quant_conv"],
        "mid_block_add_attention": arguments["mid_attention"],
    }


def _modules(arguments: Arguments) -> dict[str, str]:
    stages = range(len(arguments["widths"]))
    return {
        **{f"encoder_{i}": f"encoder.down_blocks.{i}" for i in stages},
        "encoder_middle": "encoder.mid_block",
        "decoder_middle": "decoder.mid_block",
        **{f"decoder_{i}": f"decoder.up_blocks.{i}" for i in stages},
    }


TABLES = (
    Table(
        SOURCE,
        "autoencoder_kl",
        "AutoencoderKL",
        (
            "encoder.down_blocks.0.resnets.0.conv1.weight",
            "encoder.mid_block.resnets.1.conv2.weight",
            "decoder.up_blocks.0.resnets.0.conv1.weight",
        ),
        arguments=_arguments,
        rules=_rules,
        config=_config,
        modules=_modules,
        fields=fields(
            "AutoencoderKL",
            used="norm_num_groups scaling_factor shift_factor",
            seen="in_channels out_channels down_block_types up_block_types block_out_channels "
            "layers_per_block latent_channels use_quant_conv use_post_quant_conv "
            "mid_block_add_attention",
            free="sample_size force_upcast",
            only={
                "act_fn": ("silu", "swish"),
                "latents_mean": (None,),
                "latents_std": (None,),
            },
        ),
        unseen=("groups", "scaling_factor", "shift_factor"),
    ),
)
_STAGES = (
    ("block_out_channels", (128, 256, 512, 512)),
    ("layers_per_block", 2),
    ("down_block_types", (_DOWN,) * 4),
    ("up_block_types", (_UP,) * 4),
)
_16 = (("latent_channels", 16), ("use_quant_conv", False), ("use_post_quant_conv", False))
ZOO = (
    Entry(
        "diffusers/sd-vae-ft-mse",
        "AutoencoderKL",
        "AutoencoderKL",
        _STAGES,
        image_size=64,
        published="hf://stabilityai/sd-vae-ft-mse",
        license="mit",
    ),
    Entry(
        "diffusers/sdxl-vae",
        "AutoencoderKL",
        "AutoencoderKL",
        (*_STAGES, ("scaling_factor", 0.13025)),
        image_size=64,
        published="hf://stabilityai/sdxl-vae",
        license="mit",
    ),
    Entry(
        "diffusers/FLUX.1-schnell-vae",
        "AutoencoderKL",
        "AutoencoderKL",
        (*_STAGES, *_16, ("scaling_factor", 0.3611), ("shift_factor", 0.1159)),
        image_size=64,
        published="hf://black-forest-labs/FLUX.1-schnell/vae",
        license="apache-2.0",
    ),
)
