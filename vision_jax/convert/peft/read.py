"""A PEFT folder's adapters, put on a tree."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.convert.engine import COPY, FUSE_BIAS, FUSE_LINEAR, LINEAR, Rule, import_tensors
from vision_jax.convert.files import open_safetensors
from vision_jax.convert.peft.config import read_config, settle_patterns
from vision_jax.convert.peft.names import (
    BIAS,
    CONFIG_FILE,
    MAGNITUDE,
    PREFIX,
    TENSORS_FILE,
    A,
    B,
    is_left_over,
    owners_of,
    recognize,
    unwrapped,
)
from vision_jax.convert.table import Arguments
from vision_jax.convert.tables import TABLES
from vision_jax.convert.vit.names import JOIN_BIAS, JOIN_LINEAR
from vision_jax.errors import UserError
from vision_jax.trees import lora, paths

MAX_NAME = 500  # characters


def read_adapter(
    directory: str | os.PathLike[str],
    params: lora.Params,
    *,
    family: str,
    arguments: Arguments,
    naming: str = "auto",
) -> lora.Params:
    """Puts the adapters of a PEFT folder on a plain tree, and the arrays that were saved with them.

    Separate adapters of q, k and v become the parts of one adapter, each with its own scale.
    Where their ranks differ the smaller are filled up with zeros.

    Where two patterns of rank_pattern or alpha_pattern match one module, PEFT itself trains with
    the first of its config and loads with the first in alphabetical order, in which it saves them.
    Here the tensors tell the rank, alpha is the one that PEFT loads with, and a warning says so.

    Args:
      directory: a folder with adapter_config.json and adapter_model.safetensors.
      params: parameter tree of plain arrays, of the model that the adapters are for.
      family: of that model.
      arguments: all of that model's.
      naming: "timm", "transformers" or "torchvision"; "auto" takes the first that has all names.

    Raises:
      UserError: a damaged file, an adapter of another kind or for another model. Each tensor is
        used, or the error names it.
    """
    directory = Path(directory)
    if not (directory / CONFIG_FILE).exists():
        inside = [path.parent.name for path in sorted(directory.glob(f"*/{CONFIG_FILE}"))]
        hint = f"; there is one in {inside[0]}" if inside else ""
        raise UserError(f"{directory}: no {CONFIG_FILE} in it; give the folder of an adapter{hint}")
    config = read_config(directory / CONFIG_FILE)
    if not (directory / TENSORS_FILE).is_file():
        raise UserError(
            f"{directory}: no {TENSORS_FILE} in it; pickled adapters are not read: load it in peft "
            "and save it with save_pretrained, which writes safetensors"
        )
    # By the names that stand in the file: the patterns of the config are about those.
    found, saved, called = _read_tensors(directory / TENSORS_FILE)
    arrays = paths.flatten(params)
    tables = [table for table in TABLES if table.family == family]
    rules = recognize(tables, naming, arguments, found, saved, arrays, str(directory))
    settle_patterns(config, called, found, str(directory))
    arrays |= _saved_arrays(saved, rules, arrays)
    adapters: lora.Adapters = {}
    for path, owners in owners_of(rules).items():
        total = len(owners.names)
        *inputs, outputs = arrays[path].shape
        parts = {
            part: _from_torch(
                name,
                found[name],
                (*inputs, outputs // total),
                config,
                str(directory),
                pointwise=owners.pointwise,
            )
            for part, name in enumerate(owners.names)
            if name in found
        }
        if parts:
            adapters[path] = lora.join_adapter(parts, arrays[path], total)
        if config["lora_bias"] and parts:
            bias = f"{path.removesuffix('kernel')}bias"
            if bias not in arrays:
                raise UserError(
                    f"{directory}: the adapter has a bias for {owners.names[0]}, and the layer none"
                )
            own = {part: found[owners.names[part]][BIAS] for part in parts}
            arrays[bias] = _with_biases(arrays[bias], own, parts, total)
    return lora.apply_adapters(paths.unflatten(params, arrays), adapters)


def _read_tensors(
    file: Path,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], dict[str, str]]:
    """(module -> kind -> tensor, what was saved whole, module -> its name in the file)."""
    found: dict[str, dict[str, np.ndarray]] = {}
    saved: dict[str, np.ndarray] = {}
    called: dict[str, str] = {}
    tensors, _ = open_safetensors(file)
    for original in tensors:
        if len(original) > MAX_NAME:
            raise UserError(f"{file}: a name of {len(original)} characters")
        if is_left_over(original, tensors):
            continue
        name = unwrapped(original)
        kind = next((kind for kind in (A, B, BIAS, MAGNITUDE) if name.endswith(kind)), "")
        group = found.setdefault(name.removesuffix(kind), {}) if kind else saved
        if (kind or name) in group:
            raise UserError(f"{file}: {name} is in it twice")
        group[kind or name] = tensors[original]
        if kind:
            called[name.removesuffix(kind)] = original.removeprefix(PREFIX).removesuffix(kind)
    if not found:
        raise UserError(f"{file}: no tensor in it ends in {A}")
    return found, saved, called


def _saved_arrays(
    saved: Mapping[str, np.ndarray], rules: Sequence[Rule], arrays: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The arrays that were saved whole, by path; of a fused one only some parts may be saved."""
    target: dict[str, Any] = {}
    single: list[Rule] = []
    parts_of: dict[str, list[str]] = {}  # a fused array's path -> those of its parts
    for rule in rules:
        if not any(name in saved for name in rule.names):
            continue
        if rule.layout not in (FUSE_LINEAR, FUSE_BIAS, JOIN_LINEAR, JOIN_BIAS):
            single.append(rule)
            target |= {path: arrays[path] for path in rule.paths}
            continue
        (path,) = rule.paths
        columns = jnp.split(arrays[path], len(rule.names), axis=-1)
        parts_of[path] = [f"{path}/{part}" for part in range(len(columns))]
        for name, own, array in zip(rule.names, parts_of[path], columns, strict=True):
            if name in saved:
                single.append(Rule((name,), (own,), LINEAR if array.ndim == 2 else COPY))
            target[own] = array
    read = {path for rule in single for path in rule.paths}
    filled = import_tensors(saved, single, {path: target[path] for path in target if path in read})
    placed = {path: jnp.asarray(array) for path, array in filled.items()}
    for path, parts in parts_of.items():
        fused = [placed.pop(own) if own in placed else target[own] for own in parts]
        placed[path] = jnp.concatenate(fused, axis=-1)
    return placed


def _with_biases(
    bias: jax.Array,
    own: Mapping[int, np.ndarray],
    modules: Mapping[int, lora.Factors],
    total: int,
) -> jax.Array:
    """The layer's bias with its adapters' own added, scaled as their updates are."""
    columns = jnp.split(bias, total)
    for part, array in own.items():
        array = np.asarray(array, np.promote_types(bias.dtype, np.float32)) * modules[part].scale
        columns[part] = columns[part] + array.astype(bias.dtype)
    return jnp.concatenate(columns)


def _from_torch(
    name: str,
    tensors: Mapping[str, np.ndarray],
    kernel_shape: tuple[int, ...],
    config: Mapping[str, Any],
    origin: str,
    *,
    pointwise: bool,
) -> lora.Factors:
    """One module's adapter, for a kernel [in, out] or [h, w, in, out]."""
    rank, alpha = config["of_module"].get(name, (config["r"], config["lora_alpha"]))
    *window, rows, columns = (1, 1, *kernel_shape) if pointwise else kernel_shape
    ones = (1,) * len(window)
    expected = {A: (rank, rows, *window), B: (columns, rank, *ones)}
    if config["use_dora"]:
        expected[MAGNITUDE] = (1, columns, 1, 1) if window else (columns,)
    if config["lora_bias"]:
        expected[BIAS] = (columns,)
    for kind in sorted(set(expected) | set(tensors)):
        shape = tensors[kind].shape if kind in tensors else "missing"
        if shape != expected.get(kind):
            raise UserError(
                f"{origin}: {name}{kind} is {shape} and should be "
                f"{expected.get(kind, 'absent')}, for rank {rank} of "
                f"{CONFIG_FILE} and a kernel {kernel_shape} of this model"
            )
    return lora.Factors(
        a=np.moveaxis(tensors[A], (0, 1), (-1, -2)).reshape(*kernel_shape[:-1], rank),
        b=tensors[B].reshape(columns, rank).T,
        magnitude=tensors[MAGNITUDE].reshape(-1) if config["use_dora"] else None,
        scale=alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank,
        dropout=config["lora_dropout"],
    )
