"""Tables for SegFormer, of which transformers has the files.

Source: transformers 5.24 models/segformer/modeling_segformer.py, whose files keep older names than
its modules (conversion_mapping.py). The encoder's names are in mit.py.
"""

from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.engine import LINEAR, POINTWISE, Arrays, Layout, Rule, affine, batch_norm
from vision_jax.convert.mit import (
    FIELDS,
    HUB,
    MEMORY,
    Names,
    config_of,
    encoder_arguments,
    encoder_config,
    encoder_rules,
)
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.models.mit import VARIANTS
from vision_jax.models.segformer import VARIANTS as DECODERS

_PREFIX = "segformer."


def _fusion(stages: int) -> Layout:
    """The fusing convolution [D, stages · D, 1, 1], its parts from coarse to fine, [D, D] each."""

    def split(arrays: Arrays) -> Arrays:
        return [part[:, :, 0, 0].T for part in np.split(arrays[0], stages, axis=1)]

    def join(arrays: Arrays) -> Arrays:
        return [np.concatenate([x.T for x in arrays], axis=1)[:, :, None, None]]

    return Layout(split, join)


def _rules(names: Names, arguments: Arguments) -> list[Rule]:
    rules = encoder_rules(names, arguments, _PREFIX, "backbone/")
    stages = len(arguments["depths"])
    for stage in range(stages):
        rules += affine(f"{names.projections}.{stage}.proj", f"proj_{stage}", LINEAR)
    parts = tuple(f"fuse_{stage}/kernel" for stage in reversed(range(stages)))
    rules.append(Rule(("decode_head.linear_fuse.weight",), parts, _fusion(stages)))
    rules += batch_norm("decode_head.batch_norm", "fuse_bn")
    rules += affine("decode_head.classifier", "class_head", POINTWISE)
    return rules


def _from_file(names: Names, shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    bare = {name.removeprefix(_PREFIX): shape for name, shape in shapes.items()}
    classes, width = shapes["decode_head.classifier.weight"][:2]
    return {
        "num_classes": classes,
        "decoder_width": width,
        **encoder_arguments(names, bare, metadata),
    }


def _config(arguments: Arguments) -> dict[str, Any]:
    return {
        "architectures": ["SegformerForSemanticSegmentation"],
        **encoder_config(arguments),
        "decoder_hidden_size": arguments["decoder_width"],
    }


def _modules(arguments: Arguments) -> dict[str, str]:
    stages = range(len(arguments["depths"]))
    inside = {f"stage_{index}": f"segformer.stages.{index}" for index in stages}
    return {**inside, "fused": "decode_head.activation"}


TABLES = tuple(
    Table(
        "transformers",
        "segformer",
        kind,
        (
            f"{_PREFIX}{names.patches.replace('{s}', '0')}.proj.weight",
            f"{names.projections}.0.proj.weight",
            "decode_head.linear_fuse.weight",
            "decode_head.classifier.weight",
        ),
        arguments=partial(_from_file, names),
        rules=partial(_rules, names),
        config=_config,
        modules=_modules,
        fields=FIELDS,
        unseen=("num_heads", "strides"),
    )
    for kind, names in (("segformer", HUB), ("in memory", MEMORY))
)


def _entry(name: str) -> Entry:
    """Of "mit_b0", with ADE20K's 150 classes."""
    size = name.removeprefix("mit_")
    side = 640 if size == "b5" else 512
    width = DECODERS[f"segformer_{size}"]["decoder_width"]
    given = {**config_of(name), "decoder_hidden_size": width, "num_labels": 150}
    return Entry(
        f"transformers/segformer-{size}",
        "SegFormer",
        "SegformerForSemanticSegmentation",
        tuple(given.items()),
        reduced=(("depths", (2, 2, 2, 2)),) if size > "b2" else (),
        image_size=side,
        published=f"hf://nvidia/segformer-{size}-finetuned-ade-{side}-{side}",
        license="NVIDIA Source Code License, non-commercial",
    )


ZOO = tuple(_entry(name) for name in VARIANTS)
