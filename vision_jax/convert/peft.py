"""Adapters in the layout of Hugging Face PEFT: adapter_config.json, adapter_model.safetensors.

Reading and writing name modules by the tables of `convert/`. What PEFT says differently:

  - kernels are transposed: lora_A [r, in], lora_B [out, r]; of a convolution [r, in, h, w] and
    [out, r, 1, 1]; the magnitude of DoRA [out], of a convolution [1, out, 1, 1];
  - q, k and v are modules of their own in transformers and one fused module in timm. Separate
    adapters of a fused kernel (`LowRank.parts`) go to timm as one adapter of the summed rank, whose
    B has a block for each part: the same update, and as many zeros as that takes;
  - transformers 5 names the modules of its ViTs otherwise in memory than in its files. PEFT goes by
    memory, so that is what we write; adapters from before have the files' names and are read too.

Source: peft 0.21, tuners/lora/{layer,dora,model}.py and utils/save_and_load.py.
"""

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.convert.engine import (
    CONV,
    FUSE_LINEAR,
    LINEAR,
    Rule,
    export_tensors,
    import_tensors,
)
from vision_jax.convert.load import write_safetensors
from vision_jax.convert.read import read_weights
from vision_jax.convert.table import Arguments, Table
from vision_jax.convert.tables import TABLES, naming_for_export
from vision_jax.errors import UserError
from vision_jax.trees import lora, paths
from vision_jax.trees.leaves import LowRank, merge_leaf, output_norm

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

# Names in transformers' files and, from version 5, in memory; the last three not in DINOv2.
IN_MEMORY: tuple[tuple[str, str], ...] = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("encoder.layer.", "layers."),
)
# Settings of PEFT that change what an adapter computes; then initializations that change the base.
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class _Module:
    """The adapter of one module of PyTorch's, in our layout.

    Attributes:
      a: f[in, r], or f[h, w, in, r] of a convolution.
      b: f[r, out].
      magnitude: f[out] of DoRA, or None.
      scale, dropout: as in LowRank.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    scale: float
    dropout: float


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
      params: parameter tree with LowRank leaves.
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
    arrays = paths.flatten(base)
    table = naming_for_export(naming, family, arguments)
    rules = _rules(table, arguments, arrays, in_memory=True)
    modules = _modules(rules)

    dora = any(adapter.magnitude is not None for adapter in adapters.values())
    exported: dict[str, _Module] = {}
    for path, adapter in adapters.items():
        names = modules.get(path)
        if names is None:
            raise UserError(f"{path}: the {naming} model has no module of its own for this kernel")
        leaf = dataclasses.replace(adapter, base=jnp.asarray(arrays[path]))
        if dora and leaf.magnitude is None:  # PEFT has DoRA on all or none; a gain of 1 is none
            leaf = dataclasses.replace(leaf, magnitude=output_norm(merge_leaf(leaf)))
        exported |= {names[part]: x for part, x in _modules_of(leaf, len(names)).items()}

    tensors: dict[str, np.ndarray] = {}
    for name, module in exported.items():
        tensors |= _to_torch(name, module)
    adapted = {name for path in adapters for name in modules[path]}
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
    config = _make_config(exported, base_model_name, dora, sorted(whole_modules))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{directory}: not written ({error.strerror})") from error
    write_safetensors(
        directory / TENSORS_FILE,
        {PREFIX + name: array for name, array in tensors.items()},
        {"format": "pt"},
    )


def read_adapter(
    directory: str | os.PathLike[str],
    params: lora.Params,
    *,
    family: str,
    arguments: Arguments,
    naming: str = "auto",
) -> lora.Params:
    """Puts the adapters of a PEFT folder on a plain tree, and the arrays that were saved with them.

    Separate adapters of q, k and v become the parts of one LowRank leaf. Where their ranks differ
    the smaller are filled up with zeros; where their scales differ B takes the difference.

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
    config = _read_config(directory / CONFIG_FILE)
    if not (directory / TENSORS_FILE).is_file():
        raise UserError(
            f"{directory}: no {TENSORS_FILE} in it; pickled adapters are not read: load it in peft "
            "and save it with save_pretrained, which writes safetensors"
        )
    found: dict[str, dict[str, np.ndarray]] = {}  # by module
    saved: dict[str, np.ndarray] = {}
    for name, array in read_weights(str(directory / TENSORS_FILE)).tensors.items():
        name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        kind = next((kind for kind in (A, B, MAGNITUDE) if name.endswith(kind)), "")
        group = found.setdefault(name.removesuffix(kind), {}) if kind else saved
        if (kind or name) in group:
            raise UserError(f"{directory / TENSORS_FILE}: {name} is in it twice")
        group[kind or name] = array
    if not found:
        raise UserError(f"{directory / TENSORS_FILE}: no tensor in it ends in {A}")

    arrays = paths.flatten(params)
    tables = [table for table in TABLES if table.family == family]
    rules = _recognize(tables, naming, arguments, found, saved, arrays, str(directory))
    adapters: dict[str, LowRank] = {}
    for path, names in _modules(rules).items():
        *inputs, outputs = arrays[path].shape
        shape = (*inputs, outputs // len(names))
        parts = {
            part: _from_torch(name, found[name], shape, config, str(directory))
            for part, name in enumerate(names)
            if name in found
        }
        if parts:
            adapters[path] = _leaf_of(parts, len(names), arrays[path])
    target = {
        path: arrays[path]
        for rule in rules
        for path in rule.paths
        if any(name in saved for name in rule.names)
    }
    filled = import_tensors(saved, rules, target) if saved else {}
    arrays |= {path: jnp.asarray(array) for path, array in filled.items()}
    return lora.apply_adapters(paths.unflatten(params, arrays), adapters)


def _with_siblings(chosen: Collection[str], candidates: Collection[str]) -> set[str]:
    """The chosen paths and what else their layers have, since PEFT wants a saved module whole."""

    def layer(path: str) -> str | None:
        parent, _, name = path.rpartition("/")
        return parent if name in ("kernel", "bias", "scale") else None

    layers = {layer(path) for path in chosen} - {None}
    return set(chosen) | {path for path in candidates if layer(path) in layers}


def _rules(
    table: Table, arguments: Arguments, arrays: Collection[str], *, in_memory: bool
) -> list[Rule]:
    """The table's rules for the arrays that there are."""
    renames = IN_MEMORY[:4] if table.kind.startswith("dinov2") else IN_MEMORY
    if not in_memory or (table.source, table.family) != ("transformers", "vit"):
        renames = ()

    def rename(name: str) -> str:
        for old, new in renames:
            name = name.replace(old, new)
        return name

    return [
        dataclasses.replace(rule, names=tuple(map(rename, rule.names)))
        for rule in table.rules(arguments)
        if isinstance(rule, Rule) and all(path in arrays for path in rule.paths)
    ]


def _modules(rules: Sequence[Rule]) -> dict[str, list[str]]:
    """The modules that each kernel is made of: one, or those of q, k and v."""
    return {
        rule.paths[0]: [name.removesuffix(".weight") for name in rule.names]
        for rule in rules
        if rule.layout in (LINEAR, CONV, FUSE_LINEAR) and rule.names[0].endswith(".weight")
    }


def _recognize(
    tables: Sequence[Table],
    naming: str,
    arguments: Arguments,
    found: Collection[str],
    saved: Collection[str],
    arrays: Collection[str],
    origin: str,
) -> list[Rule]:
    """The rules of the first naming that knows every module and every saved tensor."""
    fewest: list[str] | None = None
    for table in tables:
        if naming not in ("auto", table.source):
            continue
        for prefix in table.prefixes:
            for in_memory in (True, False):
                rules = _rules(table.with_prefix(prefix), arguments, arrays, in_memory=in_memory)
                modules = {name for names in _modules(rules).values() for name in names}
                names = {name for rule in rules for name in rule.names}
                unknown = [name for name in found if name not in modules]
                unknown += [name for name in saved if name not in names]
                if not unknown:
                    return rules
                if fewest is None or len(unknown) < len(fewest):
                    fewest = unknown
    if fewest is None:
        raise UserError(f"naming {naming!r}: use auto, timm, transformers or torchvision")
    raise UserError(
        f"{origin}: {len(fewest)} names of the adapter have no place in this model: "
        f"{', '.join(sorted(fewest)[:5])}; it must be for the same architecture and depth"
    )


def _modules_of(leaf: LowRank, total: int) -> dict[int, _Module]:
    """The adapters of the `total` modules that a kernel is made of, by the module's position."""
    a, b = np.asarray(leaf.a), np.asarray(leaf.b)
    magnitude = None if leaf.magnitude is None else np.asarray(leaf.magnitude)
    whole = partial(_Module, scale=leaf.scale, dropout=leaf.dropout)
    magnitudes = [None] * total if magnitude is None else np.split(magnitude, total)
    if leaf.parts is None:  # one A serves all modules
        columns = np.split(b, total, axis=1)
        return {part: whole(a, columns[part], magnitudes[part]) for part in range(total)}
    if total == 1:  # adapters of parts as one of the summed rank: the same update
        count, rows, rank = a.shape
        blocks = np.zeros((count, rank, leaf.parts[0], b.shape[-1]), b.dtype)
        for position, part in enumerate(leaf.parts[1]):
            blocks[position, :, part] = b[position]
        a = a.transpose(1, 0, 2).reshape(rows, count * rank)
        return {0: whole(a, blocks.reshape(count * rank, -1), magnitude)}
    modules = {
        part: whole(a[position], b[position], magnitudes[part])
        for position, part in enumerate(leaf.parts[1])
    }
    if magnitude is not None:  # a part without an update may still have a trained magnitude
        for part in set(range(total)) - set(modules):
            modules[part] = whole(np.zeros_like(a[0]), np.zeros_like(b[0]), magnitudes[part])
    return modules


def _leaf_of(modules: Mapping[int, _Module], total: int, kernel: jax.Array) -> LowRank:
    """The inverse: modules of a kernel [..., total · out] as one leaf, without its base."""
    first = modules[min(modules)]
    rank = max(module.a.shape[-1] for module in modules.values())
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    a, b, magnitudes = [], [], []
    for part, columns in enumerate(jnp.split(kernel, total, axis=-1)):
        if part not in modules:
            magnitudes.append(output_norm(columns.astype(dtype)))
            continue
        module = modules[part]
        fill = rank - module.a.shape[-1]
        a.append(np.pad(module.a, [(0, 0)] * (module.a.ndim - 1) + [(0, fill)]))
        b.append(np.pad(module.b * (module.scale / first.scale), ((0, fill), (0, 0))))
        if module.magnitude is not None:
            magnitudes.append(jnp.asarray(module.magnitude, dtype))
    return LowRank(
        base=None,  # type: ignore[arg-type]
        a=jnp.asarray(np.stack(a) if total > 1 else a[0], dtype),
        b=jnp.asarray(np.stack(b) if total > 1 else b[0], dtype),
        magnitude=None if first.magnitude is None else jnp.concatenate(magnitudes),
        scale=first.scale,
        parts=(total, tuple(sorted(modules))) if total > 1 else None,
        dropout=first.dropout,
    )


def _to_torch(name: str, module: _Module) -> dict[str, np.ndarray]:
    """PEFT's tensors of one module."""
    a = np.moveaxis(module.a, (-1, -2), (0, 1))  # [r, in] or [r, in, h, w]
    ones = (1,) * (a.ndim - 2)
    tensors = {name + A: a, name + B: module.b.T.reshape(-1, len(a), *ones)}
    if module.magnitude is not None:
        shape = (1, -1, 1, 1) if ones else (-1,)
        tensors[name + MAGNITUDE] = module.magnitude.reshape(shape)
    return tensors


def _from_torch(
    name: str,
    tensors: Mapping[str, np.ndarray],
    kernel_shape: tuple[int, ...],
    config: Mapping[str, Any],
    origin: str,
) -> _Module:
    """One module's adapter, for a kernel [in, out] or [h, w, in, out]."""
    rank = _pattern(config["rank_pattern"], name, config["r"])
    alpha = _pattern(config["alpha_pattern"], name, config["lora_alpha"])
    *window, rows, columns = kernel_shape
    ones = (1,) * len(window)
    expected = {A: (rank, rows, *window), B: (columns, rank, *ones)}
    if config["use_dora"]:
        expected[MAGNITUDE] = (1, columns, 1, 1) if window else (columns,)
    for kind in sorted(set(expected) | set(tensors)):
        shape = tensors[kind].shape if kind in tensors else "missing"
        if shape != expected.get(kind):
            raise UserError(
                f"{origin}: {name}{kind} is {shape} and should be "
                f"{expected.get(kind, 'absent (use_dora is false)')}, for rank {rank} of "
                f"{CONFIG_FILE} and a kernel {kernel_shape} of this model"
            )
    return _Module(
        a=np.moveaxis(tensors[A], (0, 1), (-1, -2)),
        b=tensors[B].reshape(columns, rank).T,
        magnitude=tensors[MAGNITUDE].reshape(-1) if config["use_dora"] else None,
        scale=alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank,
        dropout=config["lora_dropout"],
    )


def _pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that ends the module's name decides."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _make_config(
    modules: Mapping[str, _Module], base_model_name: str, dora: bool, whole_modules: list[str]
) -> dict[str, Any]:
    ranks = {name: module.b.shape[0] for name, module in modules.items()}
    # Rank-stabilized or not, PEFT divides alpha by the rank, so this alpha gives the same scale.
    alphas = {name: _tidy(module.scale * ranks[name]) for name, module in modules.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(module.dropout for module in modules.values()),
        "target_modules": list(modules),
        "rank_pattern": {name: x for name, x in ranks.items() if x != rank},
        "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
        "modules_to_save": whole_modules or None,
        "use_rslora": False,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _tidy(number: float) -> float:
    """16.0 as 16, which is how people write it."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-15) else number


def _read_config(path: Path) -> dict[str, Any]:
    """The settings that decide what an adapter computes, checked.

    Raises:
      UserError: no such file, no JSON, another kind of adapter, a value of the wrong type.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a PEFT adapter") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: no JSON; copy or download it again") from None
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is not LORA; only LoRA adapters are read")
    for name in UNSUPPORTED:
        if content.get(name):
            raise UserError(f"{path}: {name} is set; plain LoRA, rsLoRA and DoRA are read")
    start = str(content.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {start!r}, which changes the base; save it in peft with "
            "path_initial_model_for_weight_conversion"
        )

    def is_rank(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**16

    def is_alpha(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def is_flag(value: Any) -> bool:
        return type(value) is bool

    def is_rate(value: Any) -> bool:
        return type(value) in (int, float) and 0 <= value < 1

    fields = {
        "r": (8, is_rank),
        "lora_alpha": (8, is_alpha),
        "lora_dropout": (0.0, is_rate),
        "use_rslora": (False, is_flag),
        "use_dora": (False, is_flag),
        "rank_pattern": ({}, lambda x: _is_pattern(x, is_rank)),
        "alpha_pattern": ({}, lambda x: _is_pattern(x, is_alpha)),
    }
    config = {}
    for name, (default, valid) in fields.items():
        config[name] = content.get(name, default)
        if not valid(config[name]):
            raise UserError(f"{path}: {name} is {str(config[name])[:80]!r}, which makes no sense")
    return config


def _is_pattern(value: Any, valid: Any) -> bool:
    """A dict from regular expressions to valid values; none that could take forever to match."""
    if not isinstance(value, dict) or not all(map(valid, value.values())):
        return False
    for pattern in value:
        if (
            len(pattern) > 200
            or re.search(r"\)[*+{]", pattern)
            or len(re.findall("[*+{]", pattern)) > 3
        ):
            return False
        try:
            re.compile(pattern)
        except re.error:
            return False
    return True
