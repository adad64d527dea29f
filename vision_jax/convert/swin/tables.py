"""The tables of Swin Transformers: a naming, its anchors, what it can hold and its config each."""

from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.swin.arguments import infer_arguments
from vision_jax.convert.swin.config import (
    FIELDS,
    holds,
    timm_config,
    torchvision_config,
    transformers_config,
)
from vision_jax.convert.swin.names import (
    IN_MEMORY,
    ORIGINAL,
    TIMM,
    TORCHVISION,
    TRANSFORMERS,
    Names,
    modules_of,
    rules_of,
    windows_of,
)
from vision_jax.convert.table import Arguments, Table
from vision_jax.ops.position_embedding import resample_relative_positions


def adapt(path: str, array: np.ndarray, own: Arguments, wanted: Arguments) -> np.ndarray:
    """v1's tables of relative position biases for other windows, resampled as timm does."""
    stage, _, rest = path.removeprefix("stage_").partition("/")
    if not rest.endswith("relative_position_bias_table"):
        return array
    old, new = (windows_of(arguments)[int(stage)].size for arguments in (own, wanted))
    if array.ndim != 2 or len(array) != (2 * old[0] - 1) * (2 * old[1] - 1):
        return array  # the import reports its shape
    return resample_relative_positions(array, old, new)


def _table(library: str, kind: str, names: Names, *anchors: str, **arguments: Any) -> Table:
    return Table(
        library,
        "swin",
        kind,
        (f"{names.patches}.weight", f"{names.patch_norm}.weight", *anchors),
        arguments=partial(infer_arguments, names, library),
        rules=partial(rules_of, names, library),
        modules=partial(modules_of, library),
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
        holds=lambda a: a["version"] == version and holds("transformers", a),
        config=transformers_config,
        fields=FIELDS,
    )


_NAMES = r"swin(v2|_s3)?_[a-z0-9_]+?_\d{3}(?=\W|_|$)"
_BLOCK = "layers.0.blocks.0.attn.proj.weight"

# Microsoft's files, and timm's before 0.9, stand first: they have timm's names, others for merging.
TABLES = (
    _table(
        "timm",
        "original",
        ORIGINAL,
        _BLOCK,
        "layers.0.downsample.reduction.weight",
        dropped=(r".*\.attn_mask",),
        file_names=_NAMES,
        holds=lambda arguments: False,
    ),
    _table(
        "timm",
        "timm",
        TIMM,
        _BLOCK,
        file_names=_NAMES,
        holds=partial(holds, "timm"),
        pruned=("head_size",),
        config=timm_config,
    ),
    _table(
        "torchvision",
        "torchvision",
        TORCHVISION,
        "features.1.0.attn.relative_position_index",
        holds=partial(holds, "torchvision"),
        config=torchvision_config,
    ),
    _transformers_table("swin", "swin.", TRANSFORMERS, TRANSFORMERS.table, 1),
    _transformers_table("swin in memory", "swin.", IN_MEMORY, IN_MEMORY.table, 0),
    _transformers_table("swinv2", "swinv2.", TRANSFORMERS, "attention.self.logit_scale", 2),
)
