"""The table of self-distilled models, heads and centers included.

Such a file is a ViT's too: `find_table` takes it for one and leaves the rest out, unless it is
asked for a "dino". Its names are those of DINOv2's code (facebookresearch/dinov2, ssl_meta_arch.py)
in a checkpoint's teacher, without `backbone.`, which names the ViT as timm does.
"""

from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.engine import ADD_1, LINEAR, Fixed, Rule, Rules, affine, expand, one
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.convert.vit import names
from vision_jax.convert.vit.arguments import infer_arguments
from vision_jax.models.dino import HEAD, PATCH_HEAD

_ENCODER = names.timm("norm")
_LAST = "last_layer.weight"


def _head(name: str, depth: int, prototypes: int) -> tuple[Rule | Fixed, ...]:
    """Linear layers at even places of an MLP; the last layer's magnitude is one and stays so."""
    return (
        *(
            rule
            for layer in range(depth)
            for rule in affine(f"{name}.mlp.{2 * layer}", f"{name}/fc{layer + 1}")
        ),
        *one(f"{name}.{_LAST}_v", f"{name}/prototypes", LINEAR),
        Fixed(f"{name}.{_LAST}_g", partial(np.ones, (prototypes, 1), np.float32)),
    )


def _rules(a: Arguments) -> Rules:
    heads = _head(HEAD, a["head_depth"], a["prototypes"])
    if a["patch_prototypes"]:
        heads += _head(PATCH_HEAD, a["head_depth"], a["patch_prototypes"])
    return [
        *expand(_ENCODER, a["depth"]),
        *one("mask_token", "mask_token", ADD_1),
        *heads,
        *one("dino_loss.center", "center"),
        *one("ibot_patch_loss.center", "patch_center"),
    ]


def _arguments(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """A ViT's arguments, and the heads' from their tensors."""
    depth = sum(f"{HEAD}.mlp.{2 * layer}.weight" in shapes for layer in range(len(shapes)))
    prototypes, bottleneck = shapes[f"{HEAD}.{_LAST}_v"]
    return {
        **infer_arguments("timm", _ENCODER, {}, shapes, metadata),
        "num_classes": 0,
        "prototypes": prototypes,
        "patch_prototypes": shapes.get(f"{PATCH_HEAD}.{_LAST}_v", (0,))[0],
        "head_width": shapes[f"{HEAD}.mlp.0.weight"][0],
        "head_depth": depth,
        "bottleneck": bottleneck,
    }


TABLES = (
    Table(
        "timm",
        "dino",
        "dino",
        ("patch_embed.proj.weight", f"{HEAD}.{_LAST}_v"),
        arguments=_arguments,
        rules=_rules,
        holds=lambda arguments: False,  # timm has no heads of prototypes
        adapt=names.adapt,
        unseen=("num_heads", "activation", "layer_norm_eps"),
    ),
)

ZOO: tuple[Entry, ...] = ()
