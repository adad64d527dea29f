"""Experiments as files: reading a config, overriding its fields, keeping it beside its results.

A config file defines `get_config() -> ConfigDict` with every field that exists. A field on the
command line, `--config.optim.lr=0.001`, must be one of them and of its type.
"""

import ast
import inspect
import json
import math
import os
import runpy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vision_jax import files
from vision_jax.errors import UserError, nearest

Value = Any

# What distill.features may compare (recipes/distillation.py).
FEATURES = (
    "hint",
    "attention_transfer",
    "attention_maps",
    "patch_tokens",
    "relational_distance",
    "relational_angle",
)

# Of the fields that nothing else checks before work begins: what they must be.
RANGES: tuple[tuple[str, Callable[[Value], bool], str], ...] = (
    (
        "batch_size total_steps log_every checkpoint_every data.threads optim.accumulate "
        "evaluate.batch_size evaluate.repeats robustness.batch_size robustness.steps "
        "robustness.restarts adversarial.steps",
        lambda value: value >= 1,
        "at least 1",
    ),
    ("adversarial.replays", lambda value: value >= 2, "at least 2"),
    ("adversarial.epsilon", lambda value: 0 < value < math.inf, "above 0"),
    (
        "adversarial.method",
        lambda value: value in ("pgd", "fast", "free", "trades", "mart"),
        "pgd, fast, free, trades or mart",
    ),
    ("distill.temperature", lambda value: 0 < value < math.inf, "above 0"),
    ("distill.dtype", lambda value: value in ("float32", "bfloat16"), "float32 or bfloat16"),
    (
        "distill.logits",
        lambda value: value in ("soft", "hard", "decoupled", "queries", "none"),
        "soft, hard, decoupled, queries or none",
    ),
    (
        "distill.teachers",
        lambda value: all(isinstance(name, str) for name in value),
        "a tuple of finished runs or weights",
    ),
    (
        "distill.features",
        lambda value: all(
            isinstance(match, tuple)
            and len(match) == 4
            and match[0] in FEATURES
            and isinstance(match[3], int | float)
            for match in value
        ),
        f"a tuple of (kind, layer, teacher's layer, weight), kind being one of {FEATURES}",
    ),
    ("adversarial.norm", lambda value: value in ("linf", "l2"), "linf or l2"),
    ("optim.drop_at", lambda value: 0 < value <= 1, "above 0 and at most 1"),
    ("seed", lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
    (
        "data.workers data.subset model.image_size model.width model.mlp_width augment.ops "
        "augment.mixup augment.cutmix "
        "evaluate.every robustness.images adversarial.step adversarial.beta "
        "adversarial.weight_epsilon adversarial.warmup_steps adversarial.watch distill.top_k",
        lambda value: 0 <= value < math.inf,
        "at least 0",
    ),
    (
        "model.dropout model.drop_path optim.ema_decay",
        lambda value: 0 <= value < 1,
        "at least 0 and below 1",
    ),
    (
        "data.crop_pct data.max_damaged augment.erasing augment.label_smoothing distill.weight",
        lambda value: 0 <= value <= 1,
        "between 0 and 1",
    ),
    (
        "evaluate.neighbors evaluate.shots",
        lambda value: len(value) > 0 and all(type(x) is int and x > 0 for x in value),
        "positive whole numbers",
    ),
    (
        "robustness.epsilons",
        lambda value: all(type(x) in (int, float) and 0 < x < math.inf for x in value),
        "numbers above 0",
    ),
    (
        "robustness.severities",
        lambda value: len(value) > 0 and all(x in range(1, 6) for x in value),
        "whole numbers from 1 to 5",
    ),
    (
        "robustness.autoattack",
        lambda value: value in ("off", "standard", "plus", "rand"),
        "off, standard, plus or rand",
    ),
    ("robustness.autoattack_epsilon", lambda value: 0 < value < math.inf, "above 0"),
    ("robustness.norm", lambda value: value in ("linf", "l2", "l1"), "linf, l2 or l1"),
    ("augment.magnitude", lambda value: 0 <= value <= 30, "between 0 and 30"),
    (
        "augment.policy",
        lambda value: value in ("none", "rand", "trivial"),
        "none, rand or trivial",
    ),
    (
        "data.crop_scale",
        lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
        "two shares of the image's area, the smaller first",
    ),
    (
        "model.mean model.std",
        lambda value: all(type(x) in (int, float) for x in value),
        "a number for each channel, or ()",
    ),
    (
        "trainable model.reinitialize model.drop lora.rules",
        lambda value: all(isinstance(rule, str) for rule in value),
        "a tuple of regular expressions",
    ),
    (
        "model.layers",
        lambda value: (
            all(
                isinstance(pair, tuple)
                and len(pair) == 2
                and isinstance(pair[0], str)
                and all(
                    type(x) is int for x in (pair[1] if isinstance(pair[1], tuple) else pair[1:])
                )
                for pair in value
            )
            and len(dict(value)) == len(value)
        ),
        "a tuple of (row, indices or how many), each row once",
    ),
    (
        "model.arguments sharding_rules optim.rates",
        lambda value: all(isinstance(pair, tuple) and len(pair) == 2 for pair in value),
        "a tuple of pairs",
    ),
)


def load_config(path: str, overrides: Mapping[str, str]) -> ConfigDict:
    """Runs the file's `get_config()` and applies {"optim.lr": "0.001"}; the result is locked.

    `path` is FILE or FILE:ARGUMENT, where the argument goes to `get_config(argument)`.

    Raises:
      UserError: no such file, no get_config in it, an unknown field (with the nearest one), or a
        value of another type.
    """
    if not Path(path).is_file():
        path, _, argument = path.partition(":")
    else:
        argument = ""
    installed = Path(__file__).parent / path  # an installed package brings configs/ along
    if not Path(path).is_file() and installed.is_file():
        path = str(installed)
    if not Path(path).is_file():
        raise UserError(f"--config: there is no file {path}")
    if path.endswith(".json"):
        config = ConfigDict(read_json(Path(path)))
    else:
        try:
            namespace = runpy.run_path(path)
        except SyntaxError as error:
            raise UserError(f"--config: {path} is no Python file: {error}") from error
        if "get_config" not in namespace:
            raise UserError(f"--config: {path} defines no get_config()")
        get_config = namespace["get_config"]
        if argument and not inspect.signature(get_config).parameters:
            raise UserError(f"--config: {path} takes no argument; what is {argument!r}?")
        config = get_config(argument) if argument else get_config()
    for name, text in overrides.items():
        _override(config, name, text)
    return config.lock()


def fields(config: ConfigDict) -> dict[str, Value]:
    """All fields by dotted name.

    >>> fields(ConfigDict({"seed": 0, "optim": {"lr": 0.1}}))
    {'optim.lr': 0.1, 'seed': 0}
    """
    found: dict[str, Value] = {}
    for name in sorted(config):
        value = config[name]
        if isinstance(value, ConfigDict):
            found |= {f"{name}.{below}": leaf for below, leaf in fields(value).items()}
        else:
            found[name] = value
    return found


def save_config(config: ConfigDict, path: Path) -> None:
    """Writes the config as JSON, to be read again by `load_config`."""
    write_json(config.to_dict(), path)


def write_json(record: dict[str, Any], path: Path) -> None:
    """Writes a JSON file, whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote, lists as tuples: JSON has none, and configs have no lists.

    Raises:
      UserError: the file is damaged.
    """
    record = files.read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return _tuples(record)


def check_ranges(config: ConfigDict) -> None:
    """Checks the numbers and the names of choices that nothing else checks before work begins.

    Raises:
      UserError: the first field that is out of range.
    """
    values = fields(config)
    for names, fits, wanted in RANGES:
        for name in names.split():
            if name in values and not fits(values[name]):  # each task has fields of its own
                raise UserError(f"config.{name} is {values[name]!r}: it must be {wanted}")


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Fields that differ, as "optim.lr: 0.001 -> 0.002"."""
    before, after = fields(old), fields(new)
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _override(config: ConfigDict, name: str, text: str) -> None:
    known = fields(config)
    if name not in known:
        raise UserError(f"unknown config key `{name}`{nearest(name, list(known))}")
    *parents, last = name.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = _parse(name, text, known[name])


def _parse(name: str, text: str, like: Value) -> Value:
    """The value that `text` spells, of the type of `like`; integers pass for floats."""
    if isinstance(like, str):
        return text
    try:
        with warnings.catch_warnings(action="ignore"):  # of the backslashes in regexes
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    if isinstance(like, tuple) and isinstance(value, list):
        value = tuple(value)
    elif isinstance(like, tuple) and isinstance(value, str):
        value = (value,) if value else ()  # a single rule needs no Python quoting
    if type(value) is not type(like):
        raise UserError(
            f"config key `{name}` takes {type(like).__name__} (now {like!r}), not {text!r}"
        )
    return value


def _tuples(value: Value) -> Value:
    if isinstance(value, dict):
        return {name: _tuples(below) for name, below in value.items()}
    return tuple(_tuples(below) for below in value) if isinstance(value, list) else value
