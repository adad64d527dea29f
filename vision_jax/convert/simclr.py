"""The table of contrastively learned models, projection head included.

Such a file is a ViT's too: `find_table` takes it for one and leaves the rest out, unless it is
asked for a "simclr". The head has the names of lightly's SimCLRProjectionHead without BatchNorm,
as an attribute `projection_head` beside a ViT of timm's.
"""

from typing import Any

from vision_jax.convert.engine import Rules, affine, expand
from vision_jax.convert.table import Arguments, Entry, Metadata, Shapes, Table
from vision_jax.convert.vit import names
from vision_jax.convert.vit.arguments import infer_arguments
from vision_jax.models.simclr import HEAD

_ENCODER = names.timm("norm")
_LAYER = "projection_head.layers."  # the linear ones have even numbers, ReLUs the others


def _rules(a: Arguments) -> Rules:
    return [
        *expand(_ENCODER, a["depth"]),
        *(
            rule
            for layer in range(a["head_depth"])
            for rule in affine(f"{_LAYER}{2 * layer}", f"{HEAD}/fc{layer + 1}")
        ),
    ]


def _arguments(shapes: Shapes, metadata: Metadata) -> dict[str, Any]:
    """A ViT's arguments, and the head's from its tensors."""
    depth = sum(f"{_LAYER}{2 * layer}.weight" in shapes for layer in range(len(shapes)))
    return {
        **infer_arguments("timm", _ENCODER, {}, shapes, metadata),
        "num_classes": 0,
        "head_width": shapes[f"{_LAYER}0.weight"][0],
        "head_depth": depth,
        "projection": shapes[f"{_LAYER}{2 * (depth - 1)}.weight"][0],
    }


TABLES = (
    Table(
        "timm",
        "simclr",
        "simclr",
        ("patch_embed.proj.weight", f"{_LAYER}0.weight"),
        arguments=_arguments,
        rules=_rules,
        holds=lambda arguments: False,  # timm has no such heads
        adapt=names.adapt,
        unseen=("num_heads", "activation", "layer_norm_eps"),
    ),
)

ZOO: tuple[Entry, ...] = ()
