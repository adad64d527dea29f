"""The table of AutoencoderTiny (TAESD): diffusers' files.

Source: diffusers 0.42 models/autoencoders/autoencoder_tiny.py, whose halves are lists of layers:
a convolution, blocks, and between the stages a convolution to the next grid.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from vision_jax.convert.diffusers import SOURCE, fields, number
from vision_jax.convert.engine import CONV, Rule, Rules, affine, one
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.errors import UserError

# A layer of the list: its place there, what it is, and the stage and block that it belongs to.
Layer = tuple[int, str, int, int]


def _encoder(depths: Sequence[int]) -> Iterator[Layer]:
    yield 0, "conv_in", 0, 0
    place = 1
    for stage, depth in enumerate(depths):
        if stage:
            yield place, "downsample", stage, 0
            place += 1
        for block in range(depth):
            yield place, "block", stage, block
            place += 1
    yield place, "conv_out", 0, 0


def _decoder(depths: Sequence[int]) -> Iterator[Layer]:
    yield 0, "conv_in", 0, 0
    place = 2  # behind a ReLU
    for stage, depth in enumerate(depths):
        for block in range(depth):
            yield place, "block", stage, block
            place += 1
        if stage < len(depths) - 1:
            yield place + 1, "upsample", stage, 0  # the grid grows in a layer of its own
            place += 2
    yield place, "conv_out", 0, 0


_HALVES = {"encoder": _encoder, "decoder": _decoder}


def _rules(arguments: Arguments) -> Rules:
    rules: list[Rule] = []
    for part, layers in _HALVES.items():
        for place, kind, stage, block in layers(arguments[f"{part}_depths"]):
            name = f"{part}.layers.{place}"
            if kind == "block":
                path = f"{part}/stage_{stage}/block_{block}"
                for number_ in (1, 2, 3):
                    rules += affine(f"{name}.conv.{2 * number_ - 2}", f"{path}/conv{number_}", CONV)
            elif kind in ("downsample", "upsample"):
                rules += one(f"{name}.weight", f"{part}/stage_{stage}/{kind}/kernel", CONV)
            else:
                rules += affine(name, f"{part}/{kind}", CONV)
    return rules


def _depths(shapes: Shapes, part: str) -> tuple[int, ...]:
    """Blocks of each stage of a half: its convolutions that have no bias are between stages."""
    found = [0]
    places = sorted(
        {int(match[1]) for name in shapes if (match := re.match(rf"{part}\.layers\.(\d+)\.", name))}
    )
    for place in places[1:]:
        if f"{part}.layers.{place}.conv.0.weight" in shapes:
            found[-1] += 1
        elif f"{part}.layers.{place}.bias" not in shapes:
            found.append(0)
    return tuple(found)


def _arguments(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """Raises UserError where the decoder gives other images than the encoder takes."""
    config = metadata.get("config", {})
    width, channels = shapes["encoder.layers.0.weight"][:2]
    decoder_width, latents = shapes["decoder.layers.0.weight"][:2]
    depths = {part: _depths(shapes, part) for part in _HALVES}
    last = max(place for place, *_ in _decoder(depths["decoder"]))
    decoded = shapes.get(f"decoder.layers.{last}.weight", (channels,))[0]
    if decoded != channels:
        raise UserError(
            f"an autoencoder of images of {channels} channels that gives {decoded}: the model here "
            "has as many on both sides"
        )
    return {
        "num_classes": 0,
        "encoder_width": width,
        "decoder_width": decoder_width,
        "encoder_depths": depths["encoder"],
        "decoder_depths": depths["decoder"],
        "latent_channels": latents,
        "in_channels": channels,
        "scaling_factor": number(config, "scaling_factor", 1.0),
        "shift_factor": number(config, "shift_factor", 0.0),
    }


def _config(arguments: Arguments) -> dict[str, Any]:
    encoder, decoder = (list(arguments[f"{part}_depths"]) for part in _HALVES)
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["in_channels"],
        "encoder_block_out_channels": [arguments["encoder_width"]] * len(encoder),
        "decoder_block_out_channels": [arguments["decoder_width"]] * len(decoder),
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
        "latent_channels": arguments["latent_channels"],
        "scaling_factor": arguments["scaling_factor"],
        "shift_factor": arguments["shift_factor"],
    }


def _modules(arguments: Arguments) -> dict[str, str]:
    """The last layer of each stage."""
    return {
        f"{part}_{stage}": f"{part}.layers.{place}"
        for part, layers in _HALVES.items()
        for place, kind, stage, _ in layers(arguments[f"{part}_depths"])
        if kind not in ("conv_in", "conv_out")
    }


TABLES = (
    Table(
        SOURCE,
        "autoencoder_tiny",
        "AutoencoderTiny",
        (
            "encoder.layers.0.weight",
            "encoder.layers.1.conv.4.weight",
            "decoder.layers.0.weight",
            "decoder.layers.2.conv.4.weight",
        ),
        arguments=_arguments,
        rules=_rules,
        config=_config,
        modules=_modules,
        fields=fields(
            "AutoencoderTiny",
            used="scaling_factor shift_factor",
            seen="in_channels out_channels encoder_block_out_channels decoder_block_out_channels "
            "num_encoder_blocks num_decoder_blocks latent_channels",
            # How latents are stored as bytes, and one of the two lists of widths once more.
            free="force_upcast block_out_channels latent_magnitude latent_shift",
            only={
                "act_fn": ("relu",),
                "upsample_fn": ("nearest",),
                "upsampling_scaling_factor": (2,),
            },
        ),
        unseen=("scaling_factor", "shift_factor"),
    ),
)
ZOO = (
    Entry(
        "diffusers/taesd",
        "AutoencoderTiny",
        "AutoencoderTiny",
        image_size=64,
        published="hf://madebyollin/taesd",
        license="mit",
    ),
    Entry(
        "diffusers/taesd3",
        "AutoencoderTiny",
        "AutoencoderTiny",
        (("latent_channels", 16),),
        image_size=64,
        published="hf://madebyollin/taesd3",
        license="mit",
    ),
)
