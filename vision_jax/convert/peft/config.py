"""adapter_config.json: what we write, and what of it we read."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax import files
from vision_jax.convert.patterns import Matcher
from vision_jax.convert.peft.names import CONFIG_FILE, A
from vision_jax.errors import UserError
from vision_jax.trees import lora

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


def make_config(
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


def read_config(path: Path) -> dict[str, Any]:
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


def settle_patterns(
    config: dict[str, Any],
    called: Mapping[str, str],
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    origin: str,
) -> None:
    """Adds to the config "of_module": (rank, alpha) of each module that a pattern matches.

    Args:
      config: of `read_config`.
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
