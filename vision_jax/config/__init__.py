"""Experiments as files: what fields there are (fields.py) and how a config is read (load.py)."""

from vision_jax.config.composites import learn_composites
from vision_jax.config.fields import FEATURES, FIELDS, RECIPES, TASKS, Check, Field, fields_of
from vision_jax.config.load import (
    Reading,
    check_ranges,
    config_without_file,
    default_config,
    differences,
    fields,
    find_config,
    load_config,
    read_config,
    read_json,
    save_config,
    shipped_configs,
    updates_a_step,
    write_json,
)

__all__ = [
    "FEATURES",
    "FIELDS",
    "RECIPES",
    "TASKS",
    "Check",
    "Field",
    "Reading",
    "check_ranges",
    "config_without_file",
    "default_config",
    "differences",
    "fields",
    "fields_of",
    "find_config",
    "learn_composites",
    "load_config",
    "read_config",
    "read_json",
    "save_config",
    "shipped_configs",
    "updates_a_step",
    "write_json",
]
