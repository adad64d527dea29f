"""Experiments as files: reading a config, overriding its fields, keeping it beside its results.

A config file defines `get_config() -> ConfigDict` with every field that exists. A field on the
command line, `--config.optim.lr=0.001`, must be one of them and of its type.
"""

import ast
import difflib
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vision_jax.errors import UserError

Value = Any


def load_config(path: str, overrides: Mapping[str, str]) -> ConfigDict:
    """Runs the file's `get_config()` and applies {"optim.lr": "0.001"}; the result is locked.

    Raises:
      UserError: no such file, no get_config in it, an unknown field (with the nearest one), or a
        value of another type.
    """
    if not Path(path).is_file():
        raise UserError(f"--config: there is no file {path}")
    if path.endswith(".json"):
        config = ConfigDict(_tuples(json.loads(Path(path).read_text())))
    else:
        namespace = runpy.run_path(path)
        if "get_config" not in namespace:
            raise UserError(f"--config: {path} defines no get_config()")
        config = namespace["get_config"]()
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
    path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Fields that differ, as "optim.lr: 0.001 -> 0.002"."""
    before, after = fields(old), fields(new)
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def nearest(name: str, names: list[str]) -> str:
    """A clause that suggests the nearest name, or nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": did you mean `{near[0]}`?" if near else ""


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
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    if isinstance(like, tuple) and isinstance(value, list):
        value = tuple(value)
    elif isinstance(like, tuple) and isinstance(value, str):
        value = (value,)  # a single rule needs no Python quoting
    if type(value) is not type(like):
        raise UserError(
            f"config key `{name}` takes {type(like).__name__} (now {like!r}), not {text!r}"
        )
    return value


def _tuples(value: Value) -> Value:
    """JSON has no tuples; configs have no lists."""
    if isinstance(value, dict):
        return {name: _tuples(below) for name, below in value.items()}
    return tuple(_tuples(below) for below in value) if isinstance(value, list) else value
