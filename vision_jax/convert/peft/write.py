"""Adapters of a tree, written for `peft.PeftModel.from_pretrained`."""

import json
import os
from collections.abc import Collection
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vision_jax.convert.engine import export_tensors
from vision_jax.convert.load import write_safetensors
from vision_jax.convert.peft.config import make_config
from vision_jax.convert.peft.names import (
    CONFIG_FILE,
    MAGNITUDE,
    PREFIX,
    TENSORS_FILE,
    A,
    B,
    owners_of,
    rules_of,
    table_in_memory,
)
from vision_jax.convert.table import Arguments
from vision_jax.errors import UserError
from vision_jax.files import write_whole
from vision_jax.trees import lora, paths


def write_adapter(
    directory: str | os.PathLike[str],
    params: lora.Params,
    *,
    family: str,
    arguments: Arguments,
    base_model_name: str,
    naming: str,
    modules_to_save: Collection[str] = (),
) -> None:
    """Writes the adapters of a tree so that `peft.PeftModel.from_pretrained` loads them.

    Args:
      directory: made if it is not there.
      params: parameter tree with adapters.
      family: of the model, as in models.families.FAMILIES.
      arguments: all of the model's.
      base_model_name: what the adapters are for; PEFT keeps it for people to read.
      naming: "timm" or "transformers": whose model PEFT will load them into.
      modules_to_save: paths of the trained arrays that are no adapters, such as the head's.

    Raises:
      UserError: no adapter in `params`, a kernel or an array without a module in this naming, or a
        folder that cannot be written.
    """
    base, adapters = lora.detach(params)
    if not adapters:
        raise UserError(f"{directory}: no adapter to write; set lora.rules to attach some")
    arrays = paths.flatten(lora.merge(base))
    rules = rules_of(table_in_memory(naming, family, arguments), arguments, arrays)
    modules = owners_of(rules)

    # PEFT has DoRA on all or none.
    dora = any(lora.has_magnitude(adapter) for adapter in adapters.values())
    exported: dict[str, lora.Factors] = {}
    tensors: dict[str, np.ndarray] = {}
    for path, adapter in adapters.items():
        owners = modules.get(path)
        if owners is None:
            raise UserError(f"{path}: the {naming} model has no module of its own for this kernel")
        kernel = jnp.asarray(arrays[path])
        parts = lora.split_adapter(adapter, kernel, len(owners.names), magnitude=dora)
        for part, module in parts.items():
            name = owners.names[part]
            exported[name] = module
            tensors |= _to_torch(name, module, pointwise=owners.pointwise)
    adapted = {name for path in adapters for name in modules[path].names}
    whole_modules = set()
    saved = _with_siblings(modules_to_save, arrays.keys() - adapters.keys())
    host = {path: np.asarray(arrays[path]) for path in saved}
    for name, array in export_tensors(host, rules).items():
        owner, _, kind = name.rpartition(".")
        if owner in exported:  # PEFT wraps this layer in its own
            name = f"{owner}.base_layer.{kind}"
        elif kind in ("weight", "bias") and owner not in adapted:
            whole_modules.add(owner)
        tensors[name] = array

    directory = Path(directory)
    config = make_config(exported, base_model_name, dora, sorted(whole_modules))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole((json.dumps(config, indent=2) + "\n").encode(), directory / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"{directory}: not written ({error.strerror})") from error
    write_safetensors(
        directory / TENSORS_FILE,
        {PREFIX + name: array for name, array in tensors.items()},
        {"format": "pt"},
    )


def _with_siblings(chosen: Collection[str], candidates: Collection[str]) -> set[str]:
    """The chosen paths and what else their layers have, since PEFT wants a saved module whole."""

    def layer(path: str) -> str | None:
        parent, _, name = path.rpartition("/")
        return parent if name in ("kernel", "bias", "scale") else None

    layers = {layer(path) for path in chosen} - {None}
    return set(chosen) | {path for path in candidates if layer(path) in layers}


def _to_torch(name: str, module: lora.Factors, *, pointwise: bool) -> dict[str, np.ndarray]:
    """PEFT's tensors of one module."""
    a = module.a[None, None] if pointwise else module.a
    a = np.moveaxis(a, (-1, -2), (0, 1))  # [r, in] or [r, in, h, w]
    ones = (1,) * (a.ndim - 2)
    tensors = {name + A: a, name + B: module.b.T.reshape(-1, len(a), *ones)}
    if module.magnitude is not None:
        shape = (1, -1, 1, 1) if ones else (-1,)
        tensors[name + MAGNITUDE] = module.magnitude.reshape(shape)
    return tensors
