"""A ViT's parameters from PyTorch weights, and back into a file that PyTorch programs read."""

import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from vision_jax.convert.arguments import infer_arguments
from vision_jax.convert.engine import ADD_1, export_tensors, import_tensors
from vision_jax.convert.read import Weights
from vision_jax.convert.vit import Table, find_table, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.vit import ViT
from vision_jax.ops.position_embedding import resample_positions
from vision_jax.trees.paths import flatten

# Fields that say how the model runs and not what it is; they don't travel with the weights.
RUN_FIELDS = ("parent", "name", "dtype", "remat", "scan", "dropout", "drop_path")


def infer_vit_arguments(weights: Weights) -> dict[str, Any]:
    """Arguments for `build_vit` with which the weights compute what they did where they came from.

    num_classes (0 without a head), image_size, and mean and std where the weights bring them, are
    among them.

    Raises:
      UserError: not a ViT, or one that `ViT` cannot be.
    """
    arguments = infer_arguments(weights.tensors, weights.metadata)
    known = {field.name for field in dataclasses.fields(ViT)} - set(RUN_FIELDS)
    if unknown := sorted(set(arguments) - known):
        raise UserError(
            f"{weights.origin}: its header has the argument {unknown[0]!r}, which ViT hasn't; "
            "it was written by another version of vision_jax"
        )
    preprocessing = weights.preprocessing or {}
    arguments |= {name: preprocessing[name] for name in ("mean", "std") if preprocessing.get(name)}
    return arguments


def import_vit(
    weights: Weights,
    abstract_params: Mapping[str, Any],
    *,
    reinitialized: Sequence[str],
    model: ViT,
    dropped: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Parameters by path; another image size resamples the position embeddings as timm does.

    Args:
      weights: the weights.
      abstract_params: the model's parameters as a nested tree of `jax.ShapeDtypeStruct`.
      reinitialized: paths that the caller initializes itself, a head for other classes, say. They
        are not in the result, and the file may have them in any shape or not at all.
      model: the model that `abstract_params` belongs to.
      dropped: regular expressions of whole tensor names to leave out on purpose (`pooler\\..*`).

    Raises:
      UserError: the weights and the model differ; lists the tensors on both sides.
    """
    table = find_table(weights.tensors)
    target = flatten(abstract_params)
    tensors = dict(weights.tensors)
    name, leading = _positions_tensor(table)
    if name in tensors and "pos_embed" not in reinitialized:
        tensors[name] = _fit_positions(tensors[name], leading, weights, model)
    try:
        return import_tensors(
            tensors,
            table.rules,
            target,
            skip=set(reinitialized),
            dropped=(*table.dropped, *dropped),
        )
    except UserError as error:
        raise UserError(f"{weights.origin} ({table.source}): {error}") from None


def _positions_tensor(table: Table) -> tuple[str, bool]:
    """Name of the position embeddings in the file, and whether they lack the leading axis."""
    rule = next(rule for rule in table.rules if rule.paths == ("pos_embed",))
    return rule.names[0], rule.layout is ADD_1


def _fit_positions(
    positions: np.ndarray, lacks_axis: bool, weights: Weights, model: ViT
) -> np.ndarray:
    full = positions[None] if lacks_axis else positions
    prefix = model.position_prefix if model.num_prefix else 0
    if full.ndim != 3:
        return positions  # the import reports its shape
    old_grid = _source_grid(full.shape[1] - prefix, weights, model)
    if old_grid is None:
        return positions
    full = resample_positions(full, old_grid, model.grid, prefix)
    return full[0] if lacks_axis else full


def _source_grid(patches: int, weights: Weights, model: ViT) -> tuple[int, int] | None:
    """Patches (rows, columns) of the image size that the weights were trained at."""
    arguments = infer_arguments(weights.tensors, weights.metadata)
    height, width = (side // model.patch_size for side in arguments["image_size"])
    if height * width == patches:
        return height, width
    side = math.isqrt(max(patches, 0))
    return (side, side) if side and side * side == patches else None


def export_vit(
    params: Mapping[str, Any],
    model: ViT,
    *,
    to: str = "timm",
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name and a header for `write_safetensors`; identical to the bit on the way back.

    Args:
      params: the parameters as a nested tree of plain arrays (adapters merged).
      model: their model; its arguments go into the header, so the file loads by itself.
      to: "timm", "torchvision" or "transformers".
      class_names: names of the classes, for the header.
      preprocessing: how images were prepared, for the header.

    Raises:
      UserError: the naming has no place for one of the parameters.
    """
    table = table_for_export(
        to, norm_after_pool=model.norm_after_pool, family=_transformers_family(model)
    )
    tensors = export_tensors(flatten(params), table.rules)
    arguments = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in RUN_FIELDS
    }
    ours = {
        "arguments": arguments,
        "preprocessing": dict(preprocessing) if preprocessing else None,
        "class_names": list(class_names) if class_names else None,
    }
    return tensors, {"format": "pt", "vision_jax": json.dumps(ours)}


def _transformers_family(model: ViT) -> str:
    """Which of transformers' models a ViT is, as far as a naming can hold it."""
    if model.pre_norm:
        return "clip"
    if model.pool == "map":
        return "siglip"
    if model.layer_scale is not None:
        return "dinov2_swiglu" if model.gated_mlp else "dinov2"
    if model.distillation_token:
        return "deit_distilled"
    return "deit" if model.num_registers else "vit"


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, whole or not at all: a temporary file beside it is renamed.

    Raises:
      UserError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    content = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = Path(file.name)
            file.write(_ordered(safetensors.numpy.save(content, dict(metadata or {}))))
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: not written ({error.strerror}); nothing was lost") from error


def _ordered(data: bytes) -> bytes:
    """The same file with its metadata sorted: the library writes them in an order of chance.

    The format is 8 bytes of the header's length, the header in JSON, then the tensors.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def class_names_of(weights: Weights) -> list[str] | None:
    """Names of the classes where the weights bring them: our header, or transformers' id2label."""
    ours = weights.metadata.get("vision_jax", {}).get("class_names")
    if isinstance(ours, list):
        return [str(name) for name in ours]
    labels = weights.metadata.get("config", {}).get("id2label")
    if isinstance(labels, dict) and all(re.fullmatch(r"\d+", str(key)) for key in labels):
        return [str(labels[key]) for key in sorted(labels, key=int)]
    return None
