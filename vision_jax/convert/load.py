"""A model's parameters from PyTorch weights, and back into a file that PyTorch programs read."""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from vision_jax.convert.engine import export_tensors, import_tensors
from vision_jax.convert.read import Weights
from vision_jax.convert.table import Table
from vision_jax.convert.tables import find_table, infer_arguments, shapes_of, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, RUN_ARGUMENTS, build_model


def recognize(weights: Weights) -> tuple[str, dict[str, Any]]:
    """(family, arguments for `build_model`) of the model that the weights are.

    With these arguments the model computes what the weights did where they came from; num_classes
    (0 without a head), in_channels, and mean and std where the weights bring them are among them.

    Raises:
      UserError: no architecture that is known, or a relative that the model cannot be.
    """
    table, arguments = _recognize(weights)
    arguments = {name: value for name, value in arguments.items() if name not in RUN_ARGUMENTS}
    if unknown := sorted(set(arguments) - set(FAMILIES[table.family].arguments)):
        raise UserError(
            f"{weights.origin}: its header has the argument {unknown[0]!r}, which {table.family} "
            "hasn't; it was written by another version of vision_jax"
        )
    preprocessing = weights.preprocessing or {}
    arguments |= {name: preprocessing[name] for name in ("mean", "std") if preprocessing.get(name)}
    return table.family, arguments


def _recognize(weights: Weights) -> tuple[Table, dict[str, Any]]:
    shapes = shapes_of(weights.tensors)
    try:
        table = find_table(shapes)
        inferred = infer_arguments(table, shapes, weights.metadata)
        return table, {**FAMILIES[table.family].defaults, **inferred}
    except UserError as error:
        raise UserError(f"{weights.origin}: {error}") from None


def import_weights(
    weights: Weights,
    target: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    reinitialized: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Parameters and BatchNorm statistics by path, all of them, or an error.

    Another image size resamples what depends on it, and another number of channels sums or repeats
    the first convolution's, both as timm does.

    Args:
      weights: the weights.
      target: path -> `jax.ShapeDtypeStruct`, of parameters and statistics together.
      arguments: of the model that `target` belongs to.
      reinitialized: paths that the caller initializes itself, a head for other classes, say. They
        are not in the result, and the file may have them in any shape or not at all.
      dropped: regular expressions of whole tensor names to leave out on purpose (`pooler\\..*`).

    Raises:
      UserError: the weights and the model differ; lists the tensors on both sides.
    """
    table, own = _recognize(weights)
    wanted = {**own, **arguments}
    stem = build_model(table.family, **wanted).stem

    def adapt(path: str, array: np.ndarray) -> np.ndarray:
        if path == stem:
            return adapt_channels(array, wanted["in_channels"])
        return table.adapt(path, array, own, wanted)

    try:
        return import_tensors(
            weights.tensors,
            table.rules(own),
            target,
            skip=set(reinitialized),
            dropped=(*table.dropped, *dropped),
            adapt=adapt,
        )
    except UserError as error:
        raise UserError(f"{weights.origin} ({table.source}): {error}") from None


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The first convolution's kernel f[h, w, in, out] for images of another number of channels.

    One channel takes the sum over the old ones. Others repeat the old channels in turn, scaled so
    that the sum over channels keeps its size. timm/models/_manipulate.py adapt_input_conv.
    """
    if kernel.ndim != 4 or kernel.shape[2] == channels:
        return kernel
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(2, keepdims=True, dtype=kernel.dtype)
    repeated = np.concatenate([kernel] * -(-channels // old), axis=2)[:, :, :channels]
    return repeated * kernel.dtype.type(old / channels)


def export_weights(
    params: Mapping[str, Any],
    family: str,
    arguments: Mapping[str, Any],
    *,
    to: str = "timm",
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name and a header for `write_safetensors`; identical to the bit on the way back.

    Args:
      params: plain arrays by path, BatchNorm statistics among them (adapters merged).
      family: of the model.
      arguments: all of the model's; they go into the header, so the file loads by itself.
      to: "timm", "torchvision" or "transformers".
      class_names: names of the classes, for the header.
      preprocessing: how images were prepared, for the header.

    Raises:
      UserError: the naming has no place for such a model.
    """
    table = table_for_export(to, family, arguments)
    tensors = export_tensors(params, table.rules(arguments))
    lasting = {name: value for name, value in arguments.items() if name not in RUN_ARGUMENTS}
    ours = {
        "family": family,
        "arguments": lasting,
        "preprocessing": dict(preprocessing) if preprocessing else None,
        "class_names": list(class_names) if class_names else None,
    }
    return tensors, {"format": "pt", "vision_jax": json.dumps(ours)}


def arguments_of(model: Any) -> dict[str, Any]:
    """All arguments of a built model, by name."""
    return {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name")
    }


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
    content = {name: np.asarray(array, order="C") for name, array in tensors.items()}
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
