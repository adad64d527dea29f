"""Adapters in the layout of Hugging Face PEFT: adapter_config.json, adapter_model.safetensors.

Reading and writing name modules by the tables of `convert/`. What PEFT says differently:

  - kernels are transposed: lora_A [r, in], lora_B [out, r]; of a convolution [r, in, h, w] and
    [out, r, 1, 1]; the magnitude of DoRA [out], of a convolution [1, out, 1, 1];
  - q, k and v are modules of their own in transformers and one fused module in timm. Separate
    adapters of the parts of a fused kernel go to timm as one adapter of the summed rank, whose
    B has a block for each part: the same update, and as many zeros as that takes;
  - transformers 5 names the modules of many models otherwise in memory than in its files. PEFT goes
    by memory, so that is what we write; older adapters have the files' names and are read too.

Source: peft 0.21, tuners/lora/{layer,dora,model}.py and utils/save_and_load.py.
"""

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax import files
from vision_jax.convert.engine import (
    CONV,
    COPY,
    FUSE_BIAS,
    FUSE_LINEAR,
    LINEAR,
    POINTWISE,
    Rule,
    export_tensors,
    import_tensors,
)
from vision_jax.convert.files import open_safetensors
from vision_jax.convert.load import write_safetensors
from vision_jax.convert.patterns import Matcher
from vision_jax.convert.table import Arguments, Table
from vision_jax.convert.tables import TABLES, naming_for_export
from vision_jax.convert.vit.names import JOIN_BIAS, JOIN_LINEAR
from vision_jax.errors import UserError
from vision_jax.files import write_whole
from vision_jax.trees import lora, paths

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
BIAS = ".lora_B.bias"

# What torch.compile and wrappers of a module put into the names of what is inside.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Settings of PEFT that say which modules have adapters, which the tensors say too, how training
# began and went, and where all came from. One that is neither here nor read may change what an
# adapter computes, and is an error unless it is off.
HARMLESS = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
    *("modules_to_save", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "megatron_core", "runtime_config"),
    *("ensure_weight_tying", "peft_type", "task_type", "auto_mapping", "inference_mode"),
    *("base_model_name_or_path", "revision", "peft_version", "init_lora_weights"),
}
# Beginnings of adapters that leave the base alone; others (PiSSA, OLoRA, CorDA ...) change it.
STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
MAX_NAME = 500  # characters


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
    rules = _rules(_table_in_memory(naming, family, arguments), arguments, arrays)
    modules = _owners(rules)

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
    config = _make_config(exported, base_model_name, dora, sorted(whole_modules))
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
    config = _read_config(directory / CONFIG_FILE)
    if not (directory / TENSORS_FILE).is_file():
        raise UserError(
            f"{directory}: no {TENSORS_FILE} in it; pickled adapters are not read: load it in peft "
            "and save it with save_pretrained, which writes safetensors"
        )
    found: dict[str, dict[str, np.ndarray]] = {}  # by module
    saved: dict[str, np.ndarray] = {}
    called: dict[str, str] = {}  # a module's name as the patterns of the config know it
    # By the names that stand in the file: the patterns of the config are about those.
    tensors, _ = open_safetensors(directory / TENSORS_FILE)
    for original in tensors:
        if len(original) > MAX_NAME:
            raise UserError(f"{directory / TENSORS_FILE}: a name of {len(original)} characters")
        if _is_left_over(original, tensors):
            continue
        name = _unwrapped(original)
        kind = next((kind for kind in (A, B, BIAS, MAGNITUDE) if name.endswith(kind)), "")
        group = found.setdefault(name.removesuffix(kind), {}) if kind else saved
        if (kind or name) in group:
            raise UserError(f"{directory / TENSORS_FILE}: {name} is in it twice")
        group[kind or name] = tensors[original]
        if kind:
            called[name.removesuffix(kind)] = original.removeprefix(PREFIX).removesuffix(kind)
    if not found:
        raise UserError(f"{directory / TENSORS_FILE}: no tensor in it ends in {A}")

    arrays = paths.flatten(params)
    tables = [table for table in TABLES if table.family == family]
    rules = _recognize(tables, naming, arguments, found, saved, arrays, str(directory))
    _settle_patterns(config, called, found, str(directory))
    arrays |= _saved_arrays(saved, rules, arrays)
    adapters: lora.Adapters = {}
    for path, owners in _owners(rules).items():
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


def _unwrapped(name: str) -> str:
    """A tensor's name in the base model, without what wrappers and adapters add.

    >>> _unwrapped("base_model.model._orig_mod.head.base_layer.bias")
    'head.bias'
    """
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    return name.replace(".modules_to_save.", ".")


def _is_left_over(name: str, tensors: Collection[str]) -> bool:
    """Whether a tensor is written beside the one that counts, as bias="all" does of saved modules.

    Of the head's bias the file then has the old one, the new one, and the new one once more under
    the name that is read.
    """
    counts = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return name != counts and (counts in tensors or ".original_module." in name)


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


def _with_siblings(chosen: Collection[str], candidates: Collection[str]) -> set[str]:
    """The chosen paths and what else their layers have, since PEFT wants a saved module whole."""

    def layer(path: str) -> str | None:
        parent, _, name = path.rpartition("/")
        return parent if name in ("kernel", "bias", "scale") else None

    layers = {layer(path) for path in chosen} - {None}
    return set(chosen) | {path for path in candidates if layer(path) in layers}


def _table_in_memory(naming: str, family: str, arguments: Arguments) -> Table:
    """How the source names the modules of such a model, which may differ from its files' names."""
    table = naming_for_export(naming, family, arguments)
    kinds = (f"{table.kind} in memory", f"{table.kind}, in memory")
    for other in TABLES:
        if (other.source, other.family) == (table.source, family) and other.kind in kinds:
            return other.with_prefix(table.prefixes[0])
    return table


def _rules(table: Table, arguments: Arguments, arrays: Collection[str]) -> list[Rule]:
    """The table's rules for the arrays that there are."""
    return [
        rule
        for rule in table.rules(arguments)
        if isinstance(rule, Rule) and all(path in arrays for path in rule.paths)
    ]


@dataclass(frozen=True)
class _Owners:
    """The modules of PyTorch's that a kernel is made of: one, or those of q, k and v.

    Attributes:
      names: of the modules.
      pointwise: whether it is a convolution with a window of 1 x 1 there, and dense here.
    """

    names: tuple[str, ...]
    pointwise: bool


def _owners(rules: Sequence[Rule]) -> dict[str, _Owners]:
    """The modules by the path of the kernel that they make."""
    return {
        rule.paths[0]: _Owners(
            tuple(name.removesuffix(".weight") for name in rule.names), rule.layout is POINTWISE
        )
        for rule in rules
        if rule.layout in (LINEAR, CONV, POINTWISE, FUSE_LINEAR, JOIN_LINEAR)
        and rule.names[0].endswith(".weight")
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
            rules = _rules(table.with_prefix(prefix), arguments, arrays)
            modules = {name for owners in _owners(rules).values() for name in owners.names}
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


def _settle_patterns(
    config: dict[str, Any],
    called: Mapping[str, str],
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    origin: str,
) -> None:
    """Adds to the config "of_module": (rank, alpha) of each module that a pattern matches.

    Args:
      config: of `_read_config`.
      called: a module's name in the base model -> the one that the patterns are for.
      tensors: of each module.
      origin: of the adapter, for errors.
    """
    values: dict[str, dict[str, list[Any]]] = {}
    for field in ("rank_pattern", "alpha_pattern"):
        found = values[field] = {name: [] for name in called.values()}
        matcher = Matcher(list(found))
        for pattern, value in config[field].items():
            try:
                matched = matcher.matches(pattern)
            except UserError as error:
                raise UserError(f"{origin}/{CONFIG_FILE}: {field}: {error}") from None
            for name in matched:
                found[name].append(value)
    doubtful = [
        f"{field} of {name} ({', '.join(map(str, own))})"
        for field, found in values.items()
        for name, own in found.items()
        if len(set(own)) > 1
    ]
    config["of_module"] = {}
    for name, original in called.items():
        ranks = values["rank_pattern"][original] or [config["r"]]
        own = tensors[name][A].shape[0] if A in tensors[name] and tensors[name][A].ndim else None
        alphas = values["alpha_pattern"][original] or [config["lora_alpha"]]
        config["of_module"][name] = (own if own in ranks else ranks[0], alphas[0])
    if doubtful:
        warnings.warn(
            f"{origin}/{CONFIG_FILE}: several patterns match one module: {doubtful[0]}"
            f"{f' and {len(doubtful) - 1} more' * (len(doubtful) > 1)}. PEFT trains with the first "
            "of its config and loads with the first in alphabetical order; here the tensors tell "
            "the rank, and alpha is what PEFT loads with",
            stacklevel=3,
        )


def _make_config(
    modules: Mapping[str, lora.Factors], base_model_name: str, dora: bool, whole_modules: list[str]
) -> dict[str, Any]:
    ranks = {name: module.b.shape[0] for name, module in modules.items()}
    # Rank-stabilized or not, PEFT divides alpha by the rank, so this alpha gives the same scale.
    alphas = {name: _tidy(module.scale * ranks[name]) for name, module in modules.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))

    def patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
        """A name that others end in (`conv1`) is anchored, or it would speak for them too."""
        return {
            "^" * any(other.endswith(f".{name}") for other in modules) + name: value
            for name, value in values.items()
            if value != default
        }

    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(module.dropout for module in modules.values()),
        "target_modules": list(modules),
        "rank_pattern": patterns(ranks, rank),
        "alpha_pattern": patterns(alphas, alpha),
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
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is not LORA; only LoRA adapters are read")
    start = str(content.get("init_lora_weights", True)).lower()
    if start not in STARTS:
        raise UserError(
            f"{path}: init_lora_weights is {start[:80]!r}, which changes the base; save it in peft "
            "with path_initial_model_for_weight_conversion"
        )

    def is_rank(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**16

    def is_alpha(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def is_flag(value: Any) -> bool:
        return type(value) is bool

    def is_rate(value: Any) -> bool:
        return type(value) in (int, float) and 0 <= value < 1

    fields: dict[str, tuple[Any, Callable[[Any], bool]]] = {
        "r": (8, is_rank),
        "lora_alpha": (8, is_alpha),
        "lora_dropout": (0.0, is_rate),
        "use_rslora": (False, is_flag),
        "use_dora": (False, is_flag),
        "lora_bias": (False, is_flag),
        "rank_pattern": ({}, lambda x: _is_pattern(x, is_rank)),
        "alpha_pattern": ({}, lambda x: _is_pattern(x, is_alpha)),
    }
    for name, value in content.items():
        if value and name not in HARMLESS and name not in fields:
            raise UserError(
                f"{path}: {name[:80]} is set, which may change what the adapter computes; LoRA, "
                "rsLoRA and DoRA are read"
            )
    config = {}
    for name, (default, valid) in fields.items():
        config[name] = content.get(name, default)
        if config[name] is None and name.endswith("_pattern"):
            config[name] = default
        if not valid(config[name]):
            raise UserError(f"{path}: {name} is {str(config[name])[:80]!r}, which makes no sense")
    return config


def _is_pattern(value: Any, valid: Callable[[Any], bool]) -> bool:
    """A dict from regular expressions, which `Matcher` checks, to valid values."""
    return isinstance(value, dict) and all(map(valid, value.values()))
